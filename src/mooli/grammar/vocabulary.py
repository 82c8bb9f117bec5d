"""A vocabulary as llguidance knows it, made of token bytes.

Owns the way from `TokenBytes` to an `LLTokenizer`, and how forced bytes are cut into tokens: by merging pairs in the
order of their ids, which is the order in which byte pair encodings learn them. Any cut says the same bytes; this one is
nearly always the tokenizer's own. Never reads a tokenizer's files: what those call special says too much (tool and
reasoning markers are text that a grammar writes).

`llguidance` is imported inside functions: whoever sends no grammar does not need it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mooli.errors import GrammarError
from mooli.types import TokenBytes

if TYPE_CHECKING:
    import llguidance

_WORDS = re.compile(rb" ?[A-Za-z\x80-\xff]{1,64}| ?[0-9]{1,64}| ?[^\sA-Za-z0-9\x80-\xff]{1,64}|\s{1,64}")
_MAX_CACHED_WORDS = 4096


class ByteEncoder:
    """Bytes to ids. Thread-safe."""

    def __init__(self, tokens: list[bytes], special_ids: frozenset[int], whole_ids: Iterable[int] = ()) -> None:
        self._ids: dict[bytes, int] = {}
        for token_id, token in enumerate(tokens):
            if token and token_id not in special_ids:
                self._ids.setdefault(token, token_id)
        wholes = sorted({tokens[i] for i in whole_ids if tokens[i] and i not in special_ids}, key=len, reverse=True)
        self._wholes = re.compile(b"(%s)" % b"|".join(map(re.escape, wholes))) if wholes else None
        self._word = functools.lru_cache(_MAX_CACHED_WORDS)(self._merged)

    def __call__(self, data: bytes) -> list[int]:
        """Raises KeyError for a byte that no token has."""
        # Where text is split at wholes, every second part is one.
        parts = [data] if self._wholes is None else self._wholes.split(data)
        found: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                found.append(self._ids[part])
            else:
                for word in _WORDS.findall(part):
                    found += self._word(word)
        return found

    def _merged(self, word: bytes) -> tuple[int, ...]:
        ids = self._ids
        parts = self._letters(word)
        while len(parts) > 1:
            pairs = [ids.get(parts[i] + parts[i + 1], len(ids) * 2) for i in range(len(parts) - 1)]
            best = min(pairs)
            if best >= len(ids) * 2:
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return tuple(ids[part] for part in parts)

    def _letters(self, word: bytes) -> list[bytes]:
        """Characters that are tokens, and the bytes of others."""
        try:
            letters = [char.encode() for char in word.decode()]
        except UnicodeDecodeError:
            return [word[i : i + 1] for i in range(len(word))]
        parts: list[bytes] = []
        for letter in letters:
            parts += [letter] if letter in self._ids else [letter[i : i + 1] for i in range(len(letter))]
        return parts


class _Source:
    """What `LLTokenizer` reads."""

    def __init__(self, given: TokenBytes, tokens: list[bytes]) -> None:
        self.eos_token_id = given.eos_ids[0]
        self.bos_token_id = None
        self.tokens = tokens
        self.special_token_ids = sorted({*given.special_ids, *given.eos_ids})
        whole_ids = [token_id for token_id in given.whole_ids if token_id < len(tokens)]
        self._encode = ByteEncoder(tokens, frozenset(self.special_token_ids), whole_ids)

    def __call__(self, data: bytes) -> list[int]:
        return self._encode(data)


def open_vocabulary(given: TokenBytes, vocab_size: int) -> llguidance.LLTokenizer:
    """vocab_size: ids that can be sampled; ids beyond the given tokens are never allowed.

    Raises GrammarError where no token ends an answer.
    """
    import llguidance

    if not given.eos_ids:
        raise GrammarError("this model has no token that ends an answer, so none can be held to a grammar")
    tokens = [*given.tokens[:vocab_size], *[b""] * (vocab_size - len(given.tokens))]
    wrapper = llguidance.TokenizerWrapper(_Source(given, tokens))
    return llguidance.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=given.eos_ids)
