"""The parts of a message, as they come: tokens → text → parts, with one cursor.

Owns the kinds of parts, the seam to how a model writes them (`WireFormat`), and the one place that knows what a reader
has seen of a sequence. Never waits, and never knows a shape that clients see: a dialect writes parts.

The text belongs to the `Generation`, the cursor to its reader: a slow reader gets fewer, larger parts, which joined are
the same. A growing answer is read once, so its prompt, tokens and log-probabilities are in it once.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mooli.frontend.detokenizer import IncrementalDetokenizer
from mooli.frontend.generation import Generation
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.tools import ToolSet
from mooli.types import Reasoning, Request, TokenLogprobs

if TYPE_CHECKING:
    from mooli.frontend.wire_formats.calls import CallFormat

PartKind = Literal["begin", "reasoning", "text", "call_begin", "arguments", "call_end", "end"]

_GROWING: tuple[PartKind, ...] = ("reasoning", "text", "arguments")
"""Kinds of which there may be several pieces in a row."""


@dataclass(slots=True)
class Part:
    """A piece of one sequence. The first is `begin`, the last `end`; of those, the reader knows all from the sequence.

    text: of `reasoning` and `text` the words; of `call_begin` the name of the function; of `arguments` JSON, which all
    of one call make up together. num_tokens: how many tokens became this part, in the order of the sequence; those of a
    marker too. token_ids, logprobs: these tokens, filled in by `PartReader`; logprobs only where they were asked for.
    call: which call of the message, from 0. call_id: of `call_begin`, the id that its result will name; made by
    `PartReader` where the format has none. A call without `call_end` is not whole: its arguments are no JSON object.
    """

    kind: PartKind
    text: str = ""
    num_tokens: int = 0
    call: int = 0
    call_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Parser(Protocol):
    """Finds the parts in one sequence's text. What it makes of a text must not depend on how the text came cut."""

    def push(self, text: str, lengths: Sequence[int]) -> list[Part]:
        """The parts that are certain now, of what was not returned before.

        text: what is new. lengths: for each new token, how many characters came with it; what is left of `text` was
        held back before. Tokens belong to parts in their order; those of text that may still become a marker wait.
        A marker that is complete may be told as a part without text, to have its tokens counted there.
        """
        ...

    def flush(self) -> list[Part]:
        """The text is over: the parts of what waits. Tokens that are left belong to the reasoning, text or arguments
        that come last."""
        ...


class WireFormat(Protocol):
    """How a model writes reasoning and calls into its text."""

    @property
    def name(self) -> str | None:
        """As `--reasoning-parser` knows it; None for plain text."""
        ...

    @property
    def prompt_tail_tokens(self) -> int:
        """How many of the prompt's last tokens say where an answer begins: inside its reasoning, say."""
        ...

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        """Texts that the parser looks for. Where one is a special token, its text is shown to the parser."""
        ...

    @property
    def calls(self) -> CallFormat | None:
        """How calls are written; None where no call is ever found."""
        ...

    @property
    def continued(self) -> WireFormat:
        """The same for an answer that goes on with what the assistant has begun to say."""
        ...

    @property
    def without_reasoning(self) -> WireFormat:
        """The same that tells reasoning as text, with its markers."""
        ...

    def with_tools(self, tools: ToolSet) -> WireFormat:
        """The same that finds calls too; none where the choice is "none" or the model has no format of calls."""
        ...

    def parser(self, prompt_tail: str) -> Parser:
        """For one sequence. prompt_tail: the text of the prompt's last tokens, special ones written out."""
        ...

    def reasoning_ahead(self, prompt_tail: str) -> Reasoning | None:
        """The reasoning that the answer to such a prompt begins with, or may begin with; None where it has none."""
        ...


class PlainText:
    """Text that means nothing but itself. It keeps nothing, and so is its own parser."""

    name = None
    prompt_tail_tokens = 0
    marker_tokens = ()
    calls = None

    @property
    def continued(self) -> PlainText:
        return self

    @property
    def without_reasoning(self) -> PlainText:
        return self

    def with_tools(self, tools: ToolSet) -> PlainText:
        return self

    def parser(self, prompt_tail: str) -> PlainText:
        return self

    def reasoning_ahead(self, prompt_tail: str) -> None:
        return None

    def push(self, text: str, lengths: Sequence[int]) -> list[Part]:
        return [Part("text", text, len(lengths))]

    def flush(self) -> list[Part]:
        return []


PLAIN_TEXT = PlainText()


def parser_for(wire_format: WireFormat, request: Request, tokenizer: Tokenizer) -> Parser:
    """A parser for the answer to `request`."""
    return wire_format.parser(prompt_tail(wire_format, request.prompt_ids, tokenizer))


def prompt_tail(wire_format: WireFormat, prompt_ids: Sequence[int] | NDArray[np.int32], tokenizer: Tokenizer) -> str:
    """The text of the last tokens of a prompt, as many as the format looks at."""
    num_tokens = wire_format.prompt_tail_tokens
    tail = [int(token_id) for token_id in prompt_ids[-num_tokens:]] if num_tokens else []
    return tokenizer.decode(tail, skip_special_tokens=False) if tail else ""


class ReasoningCount:
    """How many tokens of a sequence are reasoning, where its text is told as it is. Not thread-safe."""

    def __init__(self, generation: Generation, wire_format: WireFormat, tokenizer: Tokenizer) -> None:
        self._generation = generation
        self._parser = parser_for(wire_format, generation.request, tokenizer)
        # Its own text: special tokens are markers here, and the answer may leave them out.
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        self._num_read = self._num_told = self._count = 0
        self._kind: PartKind = "text"

    def update(self) -> int:
        """The count by now; at the end that of all tokens."""
        output_ids = self._generation.output_ids
        for token_id in output_ids[self._num_read :]:
            piece = self._detokenizer.push([token_id])
            self._take(self._parser.push(piece, [len(piece)]))
        self._num_read = len(output_ids)
        if self._generation.finish is not None:
            self._take(self._parser.flush())
            self._take([Part(self._kind, num_tokens=self._num_read - self._num_told)])
        return self._count

    def _take(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._kind = part.kind
            self._num_told += part.num_tokens
            self._count += part.num_tokens if part.kind == "reasoning" else 0


class PartReader:
    """One reader's cursor over a sequence. Not thread-safe.

    stream_interval: tokens between two takings, unless the request has its own. shows_tokens: tokens that say nothing
    yet (half a character, or what could begin a stop string) are worth a taking. streams_reasoning: False gives it in
    one piece when it is over.
    """

    def __init__(
        self,
        generation: Generation,
        parser: Parser = PLAIN_TEXT,
        *,
        stream_interval: int = 1,
        shows_tokens: bool = True,
        streams_reasoning: bool = True,
    ) -> None:
        self.generation = generation
        self.num_reasoning_tokens = 0
        self._parser = parser
        self._interval = generation.request.sampling.stream_interval or stream_interval
        self._shows_tokens = shows_tokens
        self._streams_reasoning = streams_reasoning
        self._num_chars = 0
        self._num_tokens = 0
        self._num_parsed = 0
        self._num_taken = 0
        self._open: tuple[PartKind, int] = ("text", 0)
        """Whose the tokens are that the parser leaves over."""
        self._waiting: list[Part] = []
        self._has_begun = False
        self.is_over = False

    def take(self) -> list[Part]:
        """What is new, if it is time: at the first token, then at the interval, and at the end. Parts in a row are of
        different kinds or calls."""
        generation = self.generation
        finish, num_tokens = generation.finish, len(generation.output_ids)
        num_new = num_tokens - self._num_taken
        if self.is_over or (finish is None and num_new < (self._interval if self._has_begun else 1)):
            return []
        self._parse()
        new, growing = self._waiting, []
        if new and new[-1].kind == "reasoning" and finish is None and not self._streams_reasoning:
            new, growing = new[:-1], new[-1:]
        is_due = finish is not None or (bool(growing) and not self._has_begun)
        if not is_due and not (new if self._shows_tokens else any(part.text for part in new)):
            return []
        parts = new if self._has_begun else [Part("begin"), *new]
        if finish is not None:
            parts.append(Part("end"))
        self._num_taken, self._waiting = num_tokens, growing
        self._has_begun, self.is_over = True, finish is not None
        return parts

    def _parse(self) -> None:
        generation = self.generation
        text, lengths = generation.text[self._num_chars :], generation.text_lengths[self._num_parsed :]
        self._num_chars += len(text)
        self._num_parsed += len(lengths)
        for part in self._parser.push(text, lengths):
            self._add(part)
        if generation.finish is not None:
            for part in self._parser.flush():
                self._add(part)
            kind, call = self._open
            self._add(Part(kind, num_tokens=self._num_parsed - self._num_tokens, call=call))

    def _add(self, part: Part) -> None:
        """Put it behind those that wait, as one with the last of them where both are of a kind."""
        start, self._num_tokens = self._num_tokens, self._num_tokens + part.num_tokens
        part.token_ids = self.generation.output_ids[start : self._num_tokens]
        part.logprobs = self.generation.logprobs[start : self._num_tokens]
        if part.kind == "reasoning":
            self.num_reasoning_tokens += part.num_tokens
        if part.kind == "call_begin" and not part.call_id:
            part.call_id = f"call_{secrets.token_hex(12)}"
        self._open = (part.kind, part.call) if part.kind in _GROWING else ("text", 0)
        last = self._waiting[-1] if self._waiting else None
        if last is not None and (last.kind, last.call) == (part.kind, part.call):
            last.text += part.text
            last.num_tokens += part.num_tokens
            last.token_ids += part.token_ids
            last.logprobs += part.logprobs
        elif part.text or part.num_tokens or part.kind not in _GROWING:
            self._waiting.append(part)
