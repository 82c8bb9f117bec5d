"""A store of pages in memory, and a disk that answers when and as far as a trial wants.

Owns what tests of loads have in common. Nothing here has a thread or looks at a clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from mooli.cache.store.page_store import StoredPage
from mooli.cache.store_io import Piece
from mooli.scheduler.speed import BreakEven


class ChosenEven(BreakEven):
    """Says what a test wants, whatever is measured."""

    def __init__(self, least: float = 1.0, patience: float = 10.0) -> None:
        super().__init__(8.0, 64)
        self._least, self._patience = least, patience

    @property
    def least_tokens(self) -> float:
        return self._least

    def tokens_for(self, num_bytes: int) -> float:
        return 0.0

    def patience_s(self, num_tokens: int) -> float:
        return self._patience


class MemoryStore:
    """What `StoreIO` needs of a store. Its rules are checked: parents first, nothing twice, tokens compared."""

    def __init__(self, page_size: int) -> None:
        self.pages: dict[bytes, StoredPage] = {}
        self.num_touched = 0
        self.is_closed = False
        self._token_bytes = 4 * page_size
        self._roots: set[bytes] = set()

    def leading(self, digests: Sequence[bytes]) -> int:
        return next((n for n, digest in enumerate(digests) if digest not in self.pages), len(digests))

    def read(self, digests: Sequence[bytes], tokens: Sequence[bytes]) -> list[bytes]:
        found = [self.pages[digest] for digest in digests[: self.leading(digests)]]
        assert all(page.tokens == own for page, own in zip(found, tokens, strict=False))
        return [bytes(page.payload) for page in found]

    def append(self, pages: Sequence[StoredPage]) -> int:
        for page in pages:
            assert len(page.digest) == len(page.parent) == 32 and len(page.tokens) == self._token_bytes
            assert page.position >= 0
            self.pages.setdefault(page.digest, page._replace(payload=bytes(page.payload)))
        return len(pages)

    def touch(self, digests: Sequence[bytes]) -> None:
        assert all(isinstance(digest, bytes) for digest in digests)
        self.num_touched += len(digests)

    def forget(self, digests: Sequence[bytes]) -> None:
        """These, and what continues them."""
        gone = set(digests)
        for digest, page in list(self.pages.items()):  # heads come first
            if digest in gone or page.parent in gone:
                gone.add(digest)
                del self.pages[digest]

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


Asked = tuple[int, list[bytes], list[bytes], tuple[bytes, bytes] | None]


class ErraticIO:
    """`StoreIO` without threads: each look may bring pieces of any size, none, or the end of a load. Its clock moves by
    one with each look.

    states: of a model with recurrent layers. failure_rate: of looks at a load that end it early. speed: of looks that
    bring something. loss_rate: of pages, which leave the store as if others had needed the room.
    """

    def __init__(
        self,
        store: MemoryStore,
        rng: random.Random,
        *,
        failure_rate: float,
        speed: float,
        loss_rate: float,
        states: MemoryStore | None = None,
    ):
        self.store, self.states = store, states
        self.now = 0.0
        self.num_loads = self.num_cancelled = self.num_cut = 0
        self.is_stuck = False
        self._rng = rng
        self._failure_rate, self._speed, self._loss_rate = failure_rate, speed, loss_rate
        self._loads: dict[int, Asked] = {}
        self._queued: list[StoredPage] = []

    def clock(self) -> float:
        return self.now

    def on_change(self, wake: Callable[[], None]) -> None:
        pass

    def alarm(self, seconds: float) -> None:
        assert seconds > 0

    def on_disk(self, digests: Sequence[bytes]) -> int:
        return self.store.leading(digests)

    def deepest_state(self, digests: Sequence[bytes]) -> int:
        assert self.states is not None
        there = self.states.pages
        return next((n for n in range(len(digests), 0, -1) if digests[n - 1] in there), 0)

    def load(
        self,
        number: int,
        first: int,
        digests: list[bytes],
        tokens: list[bytes],
        state: tuple[bytes, bytes] | None = None,
    ) -> None:
        assert (digests or state) and len(digests) == len(tokens)
        self.num_loads += 1
        self._loads[number] = (first, digests, tokens, state)

    def cancel(self, number: int) -> None:
        self.num_cancelled += 1
        if self._rng.random() < 0.7:  # otherwise it was read already
            self._loads.pop(number, None)

    @property
    def has_arrived(self) -> bool:
        return bool(self._loads)

    def take(self) -> list[Piece]:
        self.now += 1.0
        rng, pieces = self._rng, []
        for number, (first, digests, tokens, state) in list(self._loads.items()):
            if rng.random() >= self._speed:
                continue
            if not digests:
                pieces.append(self._state_piece(number, first, state))
                continue
            count = rng.randint(1, len(digests))
            payloads = self.store.read(digests[:count], tokens[:count])
            if rng.random() < self._failure_rate:
                payloads = payloads[: rng.randrange(len(payloads) + 1)]
                self.num_cut += 1
                count = len(payloads) + 1
            is_last = len(payloads) < count or (count >= len(digests) and state is None)
            pieces.append(Piece(number, first, len(payloads), b"".join(payloads), is_last, rng.random()))
            self._loads[number] = (first + count, digests[count:], tokens[count:], state)
            if is_last:
                del self._loads[number]
        return pieces

    def _state_piece(self, number: int, first: int, state: tuple[bytes, bytes] | None) -> Piece:
        assert self.states is not None and state is not None
        del self._loads[number]
        found = self.states.read([state[0]], [state[1]])
        if found and self._rng.random() < self._failure_rate:
            found = []
            self.num_cut += 1
            if self._rng.random() < 0.5:  # it was damaged, and is found no more
                self.states.forget([state[0]])
        return Piece(number, first, 0, b"", True, self._rng.random(), found[0] if found else None)

    def knows_state(self, digest: bytes) -> bool:
        assert self.states is not None
        return digest in self.states.pages

    def append_state(self, state: StoredPage) -> None:
        assert self.states is not None and state.position == 0
        self.states.append([state])
        if self._rng.random() < self._loss_rate:
            self.states.pages.pop(self._rng.choice(sorted(self.states.pages)))

    def known(self, digests: Sequence[bytes]) -> int:
        names = self.store.pages.keys() | {page.digest for page in self._queued}
        return next((n for n, digest in enumerate(digests) if digest not in names), len(digests))

    @property
    def has_room(self) -> bool:
        self._write()
        return len(self._queued) < 8

    def append(self, pages: Sequence[StoredPage]) -> None:
        self._queued += pages

    def _write(self) -> None:
        taken = self._queued[: self._rng.randrange(4)]
        del self._queued[: len(taken)]
        self.store.append(taken)
        if self.store.pages and self._rng.random() < self._loss_rate:
            self.store.pages.pop(self._rng.choice(sorted(self.store.pages)))

    def touch(self, digests: Sequence[bytes]) -> None:
        self.store.touch(digests)

    def forget(self, digests: Sequence[bytes]) -> None:
        self.store.forget(digests)
        if self.states is not None:
            self.states.forget(digests)

    def wait_for_room(self, timeout_s: float) -> bool:
        return True

    def close(self, timeout_s: float) -> bool:
        self.store.append(self._queued)
        return True
