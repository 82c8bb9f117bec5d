"""Long texts that were tokenised before, so that of a conversation only what is new is tokenised.

Owns what is remembered: texts in pieces, cut where that changes no id (`mooli.frontend.text_cuts`), with the ids of
each. The result is always that of `Tokenizer.encode`. Never looks at what a text says, and never at the cache of keys
and values.

Pieces of different owners are apart, as their pages in that cache are: how long a text takes tells nobody what others
have sent. What is remembered is bounded in bytes, and what was used least recently goes first.
"""

from __future__ import annotations

import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mooli.errors import PromptError
from mooli.frontend.tokenizer import Tokenizer

LONG_CHARS = 8192
"""Of shorter texts nothing is remembered: they take a few milliseconds."""

PIECE_CHARS = 1024
"""At least, of every piece but the last. That one is not remembered: the next turn goes on in it."""

MAX_BYTES = 1 << 25
"""Of all pieces, about two a character: some four million tokens of English."""

_ENTRY_BYTES = 400
"""That a piece takes beside its characters and ids."""

_LEAD = "a"
"""Before every piece but the first (`mooli.frontend.text_cuts.safe_cuts`)."""

_Key = tuple[str, bool, bool, str]


class Encode(Protocol):
    """`Tokenizer.encode`."""

    def __call__(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]: ...


class TextMemory:
    """Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._cuts: Callable[[], re.Pattern[str] | None] = tokenizer.safe_cuts
        self._pieces: OrderedDict[_Key, NDArray[np.uint32]] = OrderedDict()
        self._num_bytes = 0

    def of(self, owner: str | None) -> Encode:
        """`encode` for one owner; for None that of the tokenizer, which remembers nothing."""
        if owner is None:
            return self._tokenizer.encode

        def encode(text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
            return self.encode(owner, text, add_special_tokens=add_special_tokens, parse_special=parse_special)

        return encode

    def encode(
        self, owner: str, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """As `Tokenizer.encode`. owner: who sends it, as far as the cache tells (`InputRules.namespace_of`)."""
        ids = None
        if isinstance(text, str) and len(text) >= LONG_CHARS and (cuts := self._cuts()) is not None:
            ids = self._in_pieces(owner, _cut(text, cuts), parse_special)
        if ids is None:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, parse_special=parse_special)
        if not add_special_tokens:
            return ids
        before, after = self._tokenizer.ids_around
        return [*before, *ids, *after] if before or after else ids

    def _in_pieces(self, owner: str, texts: list[str], parse_special: bool) -> list[int] | None:
        """The ids of a text that is cut so; None where it has to be looked at as a whole."""
        if len(texts) < 2:
            return None
        keys = [(owner, parse_special, index == 0, text) for index, text in enumerate(texts)]
        last = len(keys) - 1
        with self._lock:
            known = [self._known(key) for key in keys[:last]]
        new = [index for index in range(len(keys)) if index == last or known[index] is None]
        try:
            lead, *encoded = self._tokenizer.encode_parts(
                [_LEAD, *(f"{_LEAD}{texts[index]}" if index else texts[0] for index in new)],
                parse_special=parse_special,
            )
        except PromptError:  # said of the whole
            return None
        found: list[NDArray[np.uint32] | None] = [*known, None]
        for index, ids in zip(new, encoded, strict=True):
            if index and ids[: len(lead)] != lead:
                return None
            found[index] = np.asarray(ids[len(lead) :] if index else ids, dtype=np.uint32)
        with self._lock:
            for index in new[:-1]:
                self._add(keys[index], found[index])
        return np.concatenate([ids for ids in found if ids is not None]).tolist()  # type: ignore[no-any-return]

    def _known(self, key: _Key) -> NDArray[np.uint32] | None:
        ids = self._pieces.get(key)
        if ids is not None:
            self._pieces.move_to_end(key)
        return ids

    def _add(self, key: _Key, ids: NDArray[np.uint32] | None) -> None:
        if ids is None or key in self._pieces:
            return
        self._pieces[key] = ids
        self._num_bytes += _num_bytes(key, ids)
        while self._num_bytes > MAX_BYTES:
            self._num_bytes -= _num_bytes(*self._pieces.popitem(last=False))


def _cut(text: str, cuts: re.Pattern[str]) -> list[str]:
    """Pieces that begin where they begin whatever follows them."""
    pieces, start = [], 0
    while (found := cuts.search(text, start + PIECE_CHARS)) is not None:
        pieces.append(text[start : found.start()])
        start = found.start()
    return [*pieces, text[start:]]


def _num_bytes(key: _Key, ids: NDArray[np.uint32]) -> int:
    return sys.getsizeof(key[3]) + ids.nbytes + _ENTRY_BYTES
