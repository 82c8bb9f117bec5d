"""Chat messages to token ids, where the words of a message are never taken for control tokens.

Owns the separation of what the template wrote from what the messages say. A template gives one text, in which the
"<|im_end|>" that a user typed looks like the one that ends a turn. So the control tokens' texts inside messages are
replaced by private characters before rendering, and put back when the control tokens of the template have been found.
Never renders and never splits words itself: that is `ChatTemplate`'s and `Tokenizer`'s.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mooli.errors import ChatTemplateError, PromptError
from mooli.frontend.inputs import refuse_too_long
from mooli.frontend.text_memory import Encode
from mooli.frontend.tokenizer import Tokenizer

_PRIVATE = range(0xF0000, 0xFFFFE)
"""Characters without a meaning (Unicode's supplementary private use area A)."""

_HEAD_CHARS = 3
"""By so many characters most texts that only look like a special token are told from one."""


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    parse_special_in_content: bool = False,
    context_length: int | None = None,
    **template_arguments: Any,
) -> list[int]:
    """`encode_conversation` with the template's arguments by name."""
    return encode_conversation(
        tokenizer,
        messages,
        tools,
        template_arguments,
        parse_special_in_content=parse_special_in_content,
        context_length=context_length,
    )


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_arguments: Mapping[str, Any],
    *,
    parse_special_in_content: bool = False,
    context_length: int | None = None,
    encode: Encode | None = None,
) -> list[int]:
    """The ids of a conversation, by default up to where the assistant is to go on.

    messages, tools, template_arguments: as `ChatTemplate.render` takes them.
    parse_special_in_content: True reads the text of a special token inside a message or a tool as that token, as
        encoding the rendered text does. False reads it as ordinary characters, so that no message can end its turn or
        begin another.
        Messages without such texts have the same ids either way.
    context_length: refuse a conversation that is certainly longer before it is tokenised; None tokenises any.
    encode: does what `tokenizer.encode` does (`TextMemory.of`).

    Only special tokens are held back: added tokens that a vocabulary does not call special, such as "<think>" of some
    models, are read in messages as well.

    Raises ChatTemplateError if the model has no template or it refuses the messages; ContextLengthError if they are too
    long; PromptError if a message holds a special token's text and this tokenizer cannot read that as ordinary
    characters.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ChatTemplateError("the model has no chat template: give one with chat_template")
    encode = encode or tokenizer.encode
    text = template.render(messages, tools=tools, **template_arguments)
    if context_length is not None:
        refuse_too_long(tokenizer, text, context_length)
    mask = _Mask(tokenizer.special_texts, lambda: set(text).union(*_strings([messages, tools or ()])))
    masked_messages = [mask.hide(message) for message in messages]
    masked_tools = None if tools is None else [mask.hide(tool) for tool in tools]
    if parse_special_in_content or not mask.has_hidden:
        return encode(text, add_special_tokens=False)
    masked = template.render(masked_messages, tools=masked_tools, **template_arguments)
    spans = tokenizer.special_spans(masked)
    if [span[0] for span in spans] == [span[0] for span in tokenizer.special_spans(text)]:
        return encode(text, add_special_tokens=False)  # what looked like one did not become one
    return _encode_around(encode, masked, spans, mask)


class _Mask:
    """Takes special tokens out of messages, reversibly.

    A text that only begins one at the end of a string is taken out as well: what the template puts behind it, another
    part of the message for example, could complete it.
    """

    def __init__(self, special_texts: frozenset[str], used: Callable[[], set[str]]) -> None:
        """`used`: characters that cannot stand for something else; asked for when one is to."""
        self._specials = _specials(special_texts)
        self._hidden: dict[str, str] = {}
        self._free = _free(used)

    @property
    def has_hidden(self) -> bool:
        return bool(self._hidden)

    def hide(self, value: Any) -> Any:
        """A copy of a message with private characters in the places of special tokens."""
        if isinstance(value, str):
            return self._specials.replace_at_end(self._specials.replace(value, self._stand_in), self._stand_in)
        if isinstance(value, Mapping):
            return {self._hide_name(name): self.hide(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def _hide_name(self, name: Any) -> Any:
        """Of an argument, say. What could be a name in the template's program stays."""
        return self.hide(name) if isinstance(name, str) and not name.isidentifier() else name

    def show(self, text: str) -> str:
        """The text with everything put back."""
        return text.translate({ord(char): special for special, char in self._hidden.items()})

    def _stand_in(self, special: str) -> str:
        if special not in self._hidden:
            char = next(self._free, None)
            if char is None:
                raise PromptError(
                    "the messages hold texts of special tokens and so many characters for private use that none is left"
                    " to tell them apart; remove either from the messages"
                )
            self._hidden[special] = char
        return self._hidden[special]


class _Specials:
    """Finds special tokens in texts, in a time that does not grow with their number: there may be thousands."""

    def __init__(self, texts: frozenset[str]) -> None:
        self._sorted = sorted(texts)
        self._longest = max(map(len, texts), default=0)
        self._head_chars = min(_HEAD_CHARS, min(map(len, texts), default=0))
        self._lengths: dict[str, list[int]] = {}
        for text in texts:
            self._lengths.setdefault(text[: self._head_chars], []).append(len(text))
        self._lengths = {head: sorted(set(lengths), reverse=True) for head, lengths in self._lengths.items()}
        self._texts = texts
        firsts = "".join(sorted({text[0] for text in texts}))
        self._first = re.compile(f"[{re.escape(firsts)}]" if firsts else r"(?!)")

    def replace(self, text: str, stand_in: Callable[[str], str]) -> str:
        """`text` with `stand_in` of each special token in its place, the longest of those that begin there."""
        return self._replace(text, 0, stand_in, self._at)

    def replace_at_end(self, text: str, stand_in: Callable[[str], str]) -> str:
        """The same with what only begins one and is followed by nothing but spaces."""
        end = len(text.rstrip())
        return self._replace(
            text, max(0, end - self._longest), stand_in, lambda text, at: self._beginning(text, at, end)
        )

    def _replace(
        self, text: str, position: int, stand_in: Callable[[str], str], length_at: Callable[[str, int], int]
    ) -> str:
        pieces = [text[:position]]
        for match in self._first.finditer(text, position):
            at = match.start()
            if at >= position and (length := length_at(text, at)):
                pieces += [text[position:at], stand_in(text[at : at + length])]
                position = at + length
        return "".join([*pieces, text[position:]])

    def _at(self, text: str, at: int) -> int:
        """Length of the longest special token at `at`; 0 if there is none."""
        lengths = self._lengths.get(text[at : at + self._head_chars], ())
        return next((length for length in lengths if text[at : at + length] in self._texts), 0)

    def _beginning(self, text: str, at: int, end: int) -> int:
        """Length of the longest beginning of a special token that goes from `at` to `end` or beyond; 0 if none."""
        for stop in range(min(len(text), at + self._longest - 1), max(at, end - 1), -1):
            piece = text[at:stop]
            index = bisect_left(self._sorted, piece)
            index += self._sorted[index : index + 1] == [piece]  # the whole of one is no beginning of it
            if index < len(self._sorted) and self._sorted[index].startswith(piece):
                return stop - at
        return 0


@lru_cache(maxsize=4)
def _specials(texts: frozenset[str]) -> _Specials:
    return _Specials(texts)


def _free(used: Callable[[], set[str]]) -> Iterator[str]:
    taken = used()
    yield from (chr(code) for code in _PRIVATE if chr(code) not in taken)


def _strings(value: Any) -> Iterator[str]:
    """Every string inside a value made of JSON types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in [*value, *value.values()] if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _encode_around(encode: Encode, masked: str, spans: Sequence[tuple[int, int, int]], mask: _Mask) -> list[int]:
    """The ids of `masked` with its special tokens at `spans` and everything between them as ordinary text."""
    ids: list[int] = []
    as_masked: list[int] = []
    position = 0
    for token_id, start, end in [*spans, (-1, len(masked), len(masked))]:
        between = masked[position:start]
        if between:
            as_masked += encode(between, add_special_tokens=False, parse_special=False)
            ids += encode(mask.show(between), add_special_tokens=False, parse_special=False)
        if token_id >= 0:
            as_masked.append(token_id)
            ids.append(token_id)
        position = end
    # Some tokenizers (SentencePiece) read a text differently when it stands alone.
    if as_masked != encode(masked, add_special_tokens=False):
        raise PromptError(
            "a message holds the text of a special token, which this tokenizer cannot read as ordinary characters in a"
            " conversation; remove it from the message",
            advice="or encode with parse_special_in_content=True",
        )
    return ids
