"""Log-probabilities in the two shapes of OpenAI's API.

Owns the shapes, the texts of single tokens in them, where each token begins in the text, and which thread writes many
of them. Never decides which positions are wanted. Source: OpenAI API reference, `logprobs` of the completion object and
of the chat completion object.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mooli.frontend.detokenizer import IncrementalDetokenizer
from mooli.frontend.tokenizer import Tokenizer
from mooli.types import Request, TokenLogprobs

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write; OpenAI's API has the same."""

MANY_ENTRIES = 4096
"""So many log-probabilities and more are put into shape by another thread: streams must not wait for it."""

T = TypeVar("T")


async def written(function: Callable[[], T], num_entries: int) -> T:
    """What `function` makes of `num_entries` log-probabilities, which do not change meanwhile."""
    return function() if num_entries < MANY_ENTRIES else await asyncio.to_thread(function)


class TextOffsets:
    """Where each token of a sequence begins in its text, in characters.

    start: length of the text before the sequence. spelled: the text itself, where it was given and not made of the ids;
    a special token has a place in it only where it is written out.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, start: int = 0, skip_special_tokens: bool = True, spelled: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._spelled = spelled
        self._position = start
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens or spelled is not None
        )

    def next(self, token_id: int) -> int:
        """The offset of the next token. One that goes on with a character begins where that begins."""
        offset = self._position
        self._position += len(self._detokenizer.push([token_id]))
        if self._spelled is not None and token_id in self._tokenizer.special_ids:
            text = self._tokenizer.token_text(token_id)
            if text and self._spelled.startswith(text, offset):
                self._position += len(text)
        return offset


class LegacyLogprobs:
    """Lists that grow token by token: the shape of completions.

    echoed: the prompt's text, if it is part of the answer. is_given: that text came from the client as it is.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request, *, echoed: str | None, is_given: bool = False) -> None:
        skip = request.sampling.skip_special_tokens
        self._tokenizer = tokenizer
        self._prompt_offsets = TextOffsets(tokenizer, skip_special_tokens=skip, spelled=echoed if is_given else None)
        self._offsets = TextOffsets(tokenizer, start=len(echoed or ""), skip_special_tokens=skip)

    def prompt(self, items: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """The lists for the tokens of an echoed prompt. Once, before the first `more`."""
        return self._lists(items, self._prompt_offsets)

    def more(self, items: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """The lists for the next tokens of the answer."""
        return self._lists(items, self._offsets)

    def _lists(self, items: Sequence[TokenLogprobs], offsets: TextOffsets) -> dict[str, list[Any]]:
        return {
            "tokens": [legacy_text(self._tokenizer, item.token_id) for item in items],
            "token_logprobs": [None if item.logprob is None else max(item.logprob, LOWEST) for item in items],
            "top_logprobs": [self._alternatives(item) for item in items],
            "text_offset": [offsets.next(item.token_id) for item in items],
        }

    def _alternatives(self, item: TokenLogprobs) -> dict[str, float] | None:
        """The likeliest tokens and the one that is there. Of tokens with the same text the likeliest counts."""
        if item.logprob is None:
            return None
        found: dict[str, float] = {}
        for logprob, token_id in [*item.top, (item.logprob, item.token_id)]:
            found.setdefault(legacy_text(self._tokenizer, token_id), max(logprob, LOWEST))
        return found


def joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: first[name] + second[name] for name in first}


def legacy_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of a token as a key: part of a character is written as "bytes:\\xe4", so that tokens stay apart."""
    text = tokenizer.token_text(token_id)
    if "\ufffd" in text and tokenizer.is_byte_level:
        raw = tokenizer.token_bytes(token_id)
        if raw != text.encode():
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return text


def chat_logprobs(tokenizer: Tokenizer, items: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The shape of chats."""
    content = []
    for item in items:
        entry = _chat_entry(tokenizer, item.token_id, item.logprob)
        entry["top_logprobs"] = [_chat_entry(tokenizer, token_id, logprob) for logprob, token_id in item.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    text = tokenizer.token_text(token_id)
    raw: list[int] | None
    if tokenizer.is_byte_level:
        raw = list(tokenizer.token_bytes(token_id))
    else:
        raw = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": LOWEST if logprob is None else max(logprob, LOWEST), "bytes": raw}
