"""Responses that clients may ask for again, and conversations that go on from one of them, within a limit of bytes.

Owns what is kept, whose it is, and what is let go first: what was used least recently. Keeps each answer and its own
input once, as JSON; a conversation is the chain of them. Nothing outlives the process. Never knows HTTP, and never what
an item means.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

ENTRY_BYTES = 1024
"""Of the tables, for each response."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """response: JSON. items: those of its own input, a list as JSON. previous: the id of what it goes on from."""

    response: bytes
    items: bytes
    previous: str | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.items) + ENTRY_BYTES


class ResponseStore:
    """Not thread-safe: it lives in the server's event loop. An owner finds what is its own, and nothing of others."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, owner: str, response_id: str, stored: StoredResponse) -> None:
        """Keep it, and let others go for it; one that is longer than all there is room for is not kept."""
        if stored.num_bytes > self._max_bytes:
            return
        self.delete(owner, response_id)
        self._kept[owner, response_id] = stored
        self.num_bytes += stored.num_bytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        stored = self._kept.get((owner, response_id))
        if stored is not None:
            self._kept.move_to_end((owner, response_id))
        return stored

    def delete(self, owner: str, response_id: str) -> bool:
        """Whether there was one."""
        stored = self._kept.pop((owner, response_id), None)
        if stored is not None:
            self.num_bytes -= stored.num_bytes
        return stored is not None

    def conversation(self, owner: str, response_id: str) -> list[StoredResponse]:
        """What led to a response, and it, the oldest first. Raises KeyError with the id of one that is not there."""
        chain: list[StoredResponse] = []
        wanted: str | None = response_id
        while wanted is not None:
            stored = self.get(owner, wanted)
            if stored is None:
                raise KeyError(wanted)
            chain.append(stored)
            wanted = stored.previous
        return chain[::-1]
