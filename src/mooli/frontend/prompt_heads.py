"""What is kept of earlier prompts, to say what became of them: hashes and counts, never a word.

Owns the form (`PromptHead`), how it is made of a conversation, and a bounded memory of those of requests that asked for
a report. Heads of different tenants are apart: one never learns of another's, not even that it is there.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mooli.frontend.prompt_parts import PromptPart
from mooli.frontend.tools import ToolSet

MAX_HEADS = 512
"""Remembered in all; those used least recently are forgotten first."""

MAX_HEADS_OF_TENANT = 64
"""Of one tenant."""

MAX_UNITS = 1024
"""Messages and tools of one head; of longer prompts the beginning is remembered."""

MAX_UNITS_IN_ALL = 32768
"""About 350 bytes each."""

_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Unit:
    """A message, or a tool, in the order of the prompt.

    rendered: hash of what the template makes of it. said: of all that was sent of it; words: of its content alone.
    num_chars: of what the template makes. reasons: reasoning was sent with it. calls: hash of its calls.
    """

    kind: Literal["message", "tool"]
    index: int
    role: str
    rendered: bytes
    said: bytes
    words: bytes
    calls: bytes
    num_chars: int
    reasons: bool


@dataclass(slots=True)
class PromptHead:
    """One earlier request. tenant, namespace: whose cache it used. arguments: hash of what else the template was told.
    num_prompt_tokens: of the prompt. num_tokens: that were computed, its answer's too as far as that is known.
    has_reasoned: the answer began with reasoning."""

    rid: str
    tenant: str
    namespace: str
    model: str
    arguments: bytes
    units: tuple[Unit, ...]
    num_prompt_tokens: int
    num_tokens: int = 0
    has_reasoned: bool = False

    @property
    def said(self) -> frozenset[bytes]:
        """Hashes of messages that are not the system's."""
        return frozenset(unit.said for unit in self.units if unit.kind == "message" and unit.role != "system")


def units_of(
    messages: Sequence[Any], tools: ToolSet | None, text: str, parts: Sequence[PromptPart]
) -> tuple[Unit, ...]:
    """Of a conversation, its rendered `text` and the parts of that (`mooli.frontend.prompt_parts`). A message that the
    template drops has none."""
    texts: dict[tuple[str, int], list[str]] = {}
    for part in parts:
        if part.kind != "end":
            texts.setdefault((part.kind, part.index), []).append(text[part.start : part.end])
    shown = [] if tools is None else tools.for_template()
    units: list[Unit] = []
    for (kind, index), pieces in list(texts.items())[:MAX_UNITS]:
        whole = "".join(pieces)
        said: Mapping[str, Any] = shown[index] if kind == "tool" else messages[index]
        content = said.get("content")
        units.append(
            Unit(
                kind="tool" if kind == "tool" else "message",
                index=index,
                role=str(said["function"]["name"] if kind == "tool" else said.get("role")),
                rendered=digest(whole),
                said=digest(said),
                words=digest(content),
                calls=digest(said.get("tool_calls")),
                num_chars=len(whole),
                reasons=kind == "message" and _reasons(said),
            )
        )
    return tuple(units)


def _reasons(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if any(message.get(name) for name in _REASONING):
        return True
    if isinstance(content, (list, tuple)):
        return any(isinstance(part, Mapping) and part.get("type") == "thinking" for part in content)
    return message.get("role") == "assistant" and isinstance(content, str) and "</think>" in content


def digest(value: Any) -> bytes:
    """A short hash of JSON values."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


@dataclass(slots=True)
class PromptHeads:
    """The memory. Thread-safe."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _heads: OrderedDict[tuple[str, str], PromptHead] = field(default_factory=OrderedDict)
    _counts: dict[str, int] = field(default_factory=dict)
    _num_units: int = 0

    def __len__(self) -> int:
        return len(self._heads)

    def add(self, head: PromptHead) -> None:
        with self._lock:
            self._drop((head.tenant, head.rid))
            self._heads[head.tenant, head.rid] = head
            self._counts[head.tenant] = self._counts.get(head.tenant, 0) + 1
            if self._counts[head.tenant] > MAX_HEADS_OF_TENANT:
                self._drop(next(key for key in self._heads if key[0] == head.tenant))
            self._num_units += len(head.units)
            while len(self._heads) > MAX_HEADS or (self._num_units > MAX_UNITS_IN_ALL and len(self._heads) > 1):
                self._drop(next(iter(self._heads)))

    def find(self, tenant: str, rid: str) -> PromptHead | None:
        with self._lock:
            head = self._heads.get((tenant, rid))
            if head is not None:
                self._heads.move_to_end((tenant, rid))
            return head

    def most_like(self, head: PromptHead) -> PromptHead | None:
        """Of the same tenant, the one of the same conversation: with most messages in common, then in the same
        namespace, then with most at the beginning, then the latest. None where no message is in common that is not the
        system's."""
        wanted = head.said
        with self._lock:
            best, most = None, (0, False, 0)
            for other in self._heads.values():
                if other.tenant != head.tenant or other.rid == head.rid:
                    continue
                rank = (
                    len(wanted & other.said),
                    other.namespace == head.namespace,
                    _num_alike(head.units, other.units),
                )
                if rank[0] and rank >= most:
                    best, most = other, rank
            return best

    def _drop(self, key: tuple[str, str]) -> None:
        head = self._heads.pop(key, None)
        if head is not None:
            self._num_units -= len(head.units)
            self._counts[key[0]] -= 1
            if not self._counts[key[0]]:
                del self._counts[key[0]]


def _num_alike(one: Sequence[Unit], other: Sequence[Unit]) -> int:
    """Units at the beginning that are the same."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a.rendered != b.rendered:
            break
        count += 1
    return count
