"""Chat messages to token ids, where the words of a message are never taken for control tokens.

Owns the separation of what the template wrote from what the messages say. A template gives one text, in which the
"<|im_end|>" that a user typed looks like the one that ends a turn. So the control tokens' texts inside messages are
replaced by private characters before rendering, and put back when the control tokens of the template have been found.
Never renders and never splits words itself: that is `ChatTemplate`'s and `Tokenizer`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mooli.errors import ChatTemplateError, PromptError
from mooli.frontend.inputs import refuse_too_long
from mooli.frontend.tokenizer import Tokenizer

_PRIVATE = range(0xF0000, 0xFFFFE)
"""Characters without a meaning (Unicode's supplementary private use area A)."""


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    parse_special_in_content: bool = False,
    context_length: int | None = None,
    **template_arguments: Any,
) -> list[int]:
    """The ids of a conversation, by default up to where the assistant is to go on.

    messages, template_arguments: as `ChatTemplate.render` takes them.
    parse_special_in_content: True reads the text of a special token inside a message as that token, as encoding the
        rendered text does. False reads it as ordinary characters, so that no message can end its turn or begin another.
        Messages without such texts have the same ids either way.
    context_length: refuse a conversation that is certainly longer before it is tokenised; None tokenises any.

    Only special tokens are held back: added tokens that a vocabulary does not call special, such as "<think>" of some
    models, are read in messages as well.

    Raises ChatTemplateError if the model has no template or it refuses the messages; ContextLengthError if they are too
    long; PromptError if a message holds a special token's text and this tokenizer cannot read that as ordinary
    characters.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ChatTemplateError("the model has no chat template: give one with chat_template")
    text = template.render(messages, **template_arguments)
    if context_length is not None:
        refuse_too_long(tokenizer, text, context_length)
    mask = _Mask(tokenizer.special_texts, set(text).union(*_strings(messages)))
    masked_messages = [mask.hide(message) for message in messages]
    if parse_special_in_content or not mask.has_hidden:
        return tokenizer.encode(text, add_special_tokens=False)
    masked = template.render(masked_messages, **template_arguments)
    spans = tokenizer.special_spans(masked)
    if [span[0] for span in spans] == [span[0] for span in tokenizer.special_spans(text)]:
        return tokenizer.encode(text, add_special_tokens=False)  # what looked like one did not become one
    return _encode_around(tokenizer, masked, spans, mask)


class _Mask:
    """Takes special tokens out of messages, reversibly.

    A text that only begins one at the end of a string is taken out as well: what the template puts behind it, another
    part of the message for example, could complete it.
    """

    def __init__(self, special_texts: Iterable[str], used: set[str]) -> None:
        """`used`: characters that cannot stand for something else."""
        specials = sorted(special_texts, key=len, reverse=True)
        beginnings = {special[:end] for special in specials for end in range(1, len(special))}
        self._hidden: dict[str, str] = {}
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self._whole = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        longest_first = sorted(beginnings, key=len, reverse=True)
        self._at_end = re.compile(rf"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})(?=\s*\Z)")
        self._longest_beginning = len(longest_first[0]) if longest_first else 0

    @property
    def has_hidden(self) -> bool:
        return bool(self._hidden)

    def hide(self, value: Any) -> Any:
        """A copy of a message with private characters in the places of special tokens."""
        if isinstance(value, str):
            text = self._whole.sub(self._stand_in, value)
            # Only there can a text begin that has nothing but spaces after it; all else need not be looked through.
            end = max(0, len(text.rstrip()) - self._longest_beginning)
            return text[:end] + self._at_end.sub(self._stand_in, text[end:])
        if isinstance(value, Mapping):
            return {name: self.hide(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def show(self, text: str) -> str:
        """The text with everything put back."""
        return text.translate({ord(char): special for special, char in self._hidden.items()})

    def _stand_in(self, match: re.Match[str]) -> str:
        if match[0] not in self._hidden:
            self._hidden[match[0]] = next(self._free)
        return self._hidden[match[0]]


def _strings(value: Any) -> Iterator[str]:
    """Every string inside a value made of JSON types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _encode_around(tokenizer: Tokenizer, masked: str, spans: Sequence[tuple[int, int, int]], mask: _Mask) -> list[int]:
    """The ids of `masked` with its special tokens at `spans` and everything between them as ordinary text."""
    ids: list[int] = []
    as_masked: list[int] = []
    position = 0
    for token_id, start, end in [*spans, (-1, len(masked), len(masked))]:
        between = masked[position:start]
        if between:
            as_masked += tokenizer.encode(between, add_special_tokens=False, parse_special=False)
            ids += tokenizer.encode(mask.show(between), add_special_tokens=False, parse_special=False)
        if token_id >= 0:
            as_masked.append(token_id)
            ids.append(token_id)
        position = end
    # Some tokenizers (SentencePiece) read a text differently when it stands alone.
    if as_masked != tokenizer.encode(masked, add_special_tokens=False):
        raise PromptError(
            "a message holds the text of a special token, which this tokenizer cannot read as ordinary characters in a"
            " conversation; remove it from the message",
            advice="or encode with parse_special_in_content=True",
        )
    return ids
