"""What all formats of tool calls have in common: the seam that one module a format fills, and what it is made of.

Owns the protocol (`CallFormat`), the reading of text that comes in pieces (`CallParser`) and of calls that are JSON
objects, and the shape of grammars. Knows nothing that a single model does.

A format's parser is written as if its whole text were there: a `CallParser` whose `_read` is a generator. Where it
needs more text than has come it waits (`yield from`), and `CallParser` goes on with it a token later. So a parser never
sees a cut. What is certain is told at once: text up to what may be a marker, a call when its name and the beginning of
its arguments are there, its arguments as they come, as they are written.

What all formats do, unless their module says otherwise:
- a marker without a call behind it is text, and nothing of it is lost;
- a call without arguments has the arguments `{}`;
- a function that the tools do not have is told as a call where a marker says that it is one: who called can answer that
  there is no such function, and the model goes on. Where only its name says so, it is text;
- a call whose arguments are whole is whole, whether or not its end marker came. One whose arguments are cut short, or
  are no JSON, is told as it is written, and has no `call_end`. Nothing is made up to close it;
- white space around calls is nobody's: chat templates write it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

from mooli.frontend.parts import Parser, Part
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.json_text import JsonScanner
from mooli.lark import json_of, quoted, without_options

TAIL_TOKENS = 32
"""Of a prompt, to be read for how it ends: enough for a marker that is no token of its own, and white space behind."""

T = TypeVar("T")
Waiting = Generator[None, None, T]
"""Something that is read from text that comes; each `yield` waits for more of it."""

_BEFORE_NAME = ("type", "id", "index")
"""Keys of calls that may stand before the name. Any other says that an object is none."""

Outcome = Literal["none", "whole", "broken"]
"""Of reading a call: there was none, and nothing is told; it is told; or its arguments stopped being JSON."""


class Scanner(Protocol):
    """Arguments in text that grows, as JSON: `mooli.frontend.wire_formats.json_text.JsonScanner`."""

    is_over: bool
    is_broken: bool

    def feed(self, text: str, *, is_last: bool = False) -> tuple[str, int]: ...


class CallFormat(Protocol):
    """How a model writes calls of functions into its text."""

    @property
    def name(self) -> str:
        """As `--tool-call-parser` knows it."""
        ...

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        """Texts that the parser looks for. Where one is a special token, its text is shown to the parser, and a grammar
        may write it."""
        ...

    def parser(self, tools: ToolSet) -> Parser:
        """For the text of one sequence, behind its reasoning: parts text, call_begin, arguments, call_end."""
        ...

    def calls_grammar(self, tools: ToolSet) -> str:
        """Rules of Lark (llguidance's) whose rule `calls` is one call, or with `tools.parallel` one or more, exactly as
        the model writes them, with each function's schema enforced; up to the end of the message. Rule
        `calls_after_trigger` is the same without the trigger it begins with."""
        ...

    def triggers(self) -> tuple[str, ...]:
        """Texts that only a call begins with. Up to one of them text is free where calls are not forced."""
        ...


def pieces_of(text: str, lengths: Sequence[int]) -> Iterator[tuple[str, int]]:
    """What came with each token, and 1; then what was held back before, and 0."""
    start = 0
    for length in lengths:
        yield text[start : start + length], 1
        start += length
    if start < len(text):
        yield text[start:], 0


def length_of_beginning(text: str, markers: Iterable[str]) -> int:
    """How many characters at the end of `text` may still become one of `markers`."""
    markers = tuple(markers)
    longest = max(map(len, markers)) - 1
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(mark.startswith(text[-n:]) for mark in markers)), 0
    )


class CallParser:
    """One sequence. A format gives `_read`; see the module.

    `_text` is what was not told yet, and `_at` how much of it is read. Telling a part takes what is read out of
    `_text`, and gives the part all tokens that came since the last one. What follows a failed reading is read again:
    until something is told nothing is lost.
    """

    def __init__(self, tools: ToolSet) -> None:
        self._tools = tools
        self._text = ""
        self._at = 0
        self._is_over = False
        self._num_tokens = 0
        self._call = -1
        self._parts: list[Part] = []
        self._reading = self._read()
        next(self._reading, None)

    def push(self, text: str, lengths: Sequence[int]) -> list[Part]:
        for piece, num_tokens in pieces_of(text, lengths):
            self._text += piece
            self._num_tokens += num_tokens
            next(self._reading, None)
        return self._taken()

    def flush(self) -> list[Part]:
        self._is_over = True
        for _ in self._reading:
            pass
        return self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _read(self) -> Waiting[None]:
        """All of the message, to the end of its text."""
        raise NotImplementedError

    # -- reading: each may wait, and moves `_at` behind what it has read
    def _more(self) -> Waiting[bool]:
        """Wait for text. Whether there may be some."""
        if self._is_over:
            return False
        yield
        return True

    def _char(self) -> Waiting[str]:
        """The next character, not read; "" at the end."""
        while self._at >= len(self._text):
            if not (yield from self._more()):
                return ""
        return self._text[self._at]

    def _skip_spaces(self) -> Waiting[str]:
        """White space is read. The character behind it, not read."""
        while True:
            char = yield from self._char()
            if not char.isspace():
                return char
            self._at += 1

    def _skip(self, *literals: str) -> Waiting[str]:
        """The longest of `literals` that comes next is read; "" if none does."""
        while True:
            rest = self._text[self._at : self._at + max(map(len, literals))]
            open_ones = [literal for literal in literals if len(rest) < len(literal) and literal.startswith(rest)]
            if not open_ones or not (yield from self._more()):
                found = max((literal for literal in literals if rest.startswith(literal)), key=len, default="")
                self._at += len(found)
                return found

    def _until(self, *ends: str) -> Waiting[str | None]:
        """All up to the first of `ends`, both read; None, and nothing read, if none comes."""
        start = self._at
        while True:
            places = [(place, end) for end in ends if (place := self._text.find(end, start)) >= 0]
            if places:
                place, end = min(places)
                said, self._at = self._text[self._at : place], place + len(end)
                return said
            start = max(start, len(self._text) - max(map(len, ends)) + 1)
            if not (yield from self._more()):
                return None

    def _run_of(self, pattern: re.Pattern[str]) -> Waiting[str]:
        """The longest text that `pattern` matches here is read; pattern: of any number of characters of a kind."""
        while True:
            found = pattern.match(self._text, self._at)
            end = self._at if found is None else found.end()
            if end < len(self._text) or not (yield from self._more()):
                said, self._at = self._text[self._at : end], end
                return said

    def _json(self) -> Waiting[str | None]:
        """A JSON value of any kind, as text; None, and nothing read, if there is none."""
        start, scanner, found = self._at, JsonScanner(), ""
        while True:
            piece, length = scanner.feed(self._text[self._at :], is_last=self._is_over)
            found, self._at = found + piece, self._at + length
            if scanner.is_over:
                return found
            if scanner.is_broken or not (yield from self._more()):
                self._at = start
                return None

    def _json_string(self) -> Waiting[str | None]:
        """What a JSON string says; None, and nothing read, if there is none."""
        if (yield from self._char()) != '"':
            return None
        found = yield from self._json()
        return None if found is None else _said(found)

    def _is_function(self, name: str) -> bool:
        return self._tools.named(name) is not None

    # -- telling
    def _tell(self, part: Part) -> None:
        part.num_tokens, self._num_tokens = self._num_tokens, 0
        self._parts.append(part)
        self._text, self._at = self._text[self._at :], 0

    def _tell_text(self, end: int) -> None:
        """The first `end` characters are text; what was read behind them will be read again."""
        said, self._at = self._text[:end], end
        if self._call >= 0 and self._is_between:
            said = said.lstrip()
        if said:
            self._is_between = False
            self._tell(Part("text", said))
        else:
            self._text, self._at = self._text[end:], 0

    _is_between = False
    """Nothing but white space has come since the last call."""

    def _tell_call(self, name: str, call_id: str = "") -> None:
        """A call begins; all that is read is its head."""
        self._call += 1
        self._tell(Part("call_begin", name, call=self._call, call_id=call_id or self._new_id()))

    def _new_id(self) -> str:
        """The id of a call that brings none; "" for one that `PartReader` makes."""
        return ""

    def _tell_arguments(self, text: str) -> None:
        """A piece of its arguments, for what is read."""
        if text:
            self._tell(Part("arguments", text, call=self._call))

    def _tell_end(self) -> None:
        """The call is whole; all that is read is its tail."""
        self._is_between = True
        self._tell(Part("call_end", call=self._call))

    def _text_until(self, *triggers: str) -> Waiting[str]:
        """Tell text up to the first of `triggers`, which is read; "" if none comes. What was read before is nobody's.

        The white space before a trigger is only lost when a call is told: where none begins, telling as text all that
        was read by now tells both.
        """
        self._text, self._at = self._text[self._at :], 0
        while True:
            places = [
                (place, -len(trigger), trigger) for trigger in triggers if (place := self._text.find(trigger)) >= 0
            ]
            if places:
                place, _, trigger = min(places)
                rest = self._text[place:]
                if any(len(other) > len(rest) and other.startswith(rest) for other in triggers) and (
                    yield from self._more()
                ):
                    continue  # it may become a longer one
                spaces = place - len(self._text[:place].rstrip())
                self._tell_text(place - spaces)
                self._at = spaces + len(trigger)
                return trigger
            held = length_of_beginning(self._text, triggers)
            certain = len(self._text[: len(self._text) - held].rstrip())
            if certain:
                self._tell_text(certain)
            elif not self._text and self._num_tokens:
                self._tell(Part("text"))  # tokens that are no text
            if not (yield from self._more()):
                self._tell_text(len(self._text))
                return ""

    def _rest_is_text(self) -> Waiting[None]:
        """Tell all that is not read as text, to the end."""
        self._text, self._at = self._text[self._at :], 0
        while True:
            self._tell_text(len(self._text))
            if not (yield from self._more()):
                return

    def _stream_json(self) -> Waiting[Outcome]:
        """Tell the JSON value that comes next as arguments, as it comes."""
        return (yield from self._stream(JsonScanner()))

    def _stream(self, scanner: Scanner) -> Waiting[Outcome]:
        """Tell what `scanner` makes of what comes next as arguments, as it comes."""
        while True:
            piece, length = scanner.feed(self._text[self._at :], is_last=self._is_over)
            self._at += length
            self._tell_arguments(piece)
            if scanner.is_over:
                return "whole"
            if scanner.is_broken or not (yield from self._more()):
                return "broken"

    def _stream_broken(self, *ends: str) -> Waiting[None]:
        """Tell what comes next as arguments, up to one of `ends` or the end of the text. The call has no end."""
        while True:
            places = [place for end in ends if (place := self._text.find(end, self._at)) >= 0]
            held = length_of_beginning(self._text[self._at :], ends) if ends and not self._is_over else 0
            self._at, start = (min(places) if places else len(self._text) - held), self._at
            self._tell_arguments(self._text[start : self._at])
            if places:
                yield from self._skip(*ends)
            if places or not (yield from self._more()):
                self._is_between = True
                return

    # -- calls that are JSON objects with a name and arguments
    def _object_call(self, is_function: Callable[[str], bool] = bool) -> Waiting[Outcome]:
        """A call as an object: `{"name": …, "arguments": {…}}`, in either order, arguments also as `parameters`, as
        null or as a text that is JSON. is_function: whether a name makes it one."""
        name: str | None = None
        arguments: str | None = None
        is_told = is_closed = False
        if not (yield from self._skip("{")):
            return "none"
        while not is_closed and (yield from self._skip_spaces()) == '"':
            key = yield from self._json_string()
            yield from self._skip_spaces()
            if key is None or not (yield from self._skip(":")):
                break
            char = yield from self._skip_spaces()
            if key == "name" and name is None:
                name = yield from self._json_string()
                if not name or not is_function(name):
                    return "none"
            elif key in ("arguments", "parameters") and arguments is None:
                if char == "{" and name is not None:
                    self._tell_call(name)
                    is_told, arguments = True, ""
                    if (yield from self._stream_json()) == "broken":
                        return "broken"
                else:
                    arguments = _object_text((yield from self._json()))
                    if arguments is None:
                        return "none"
            elif (name is None and key not in _BEFORE_NAME) or (yield from self._json()) is None:
                break
            yield from self._skip_spaces()
            is_closed = (yield from self._skip(",", "}")) == "}"
        if is_told:
            return "whole"
        if name is None or not (is_closed or (yield from self._skip("}"))):
            return "none"
        self._tell_call(name)
        self._tell_arguments(arguments or "{}")
        return "whole"

    def _object_calls(
        self, is_function: Callable[[str], bool] = bool, *, separators: str = "", ends: Sequence[str] = ()
    ) -> Waiting[bool]:
        """One call or several, as objects in a row or in a list. Whether there was one; if not, nothing is told.

        separators: characters that may stand between two objects in a row. ends: what ends a call that is no JSON.
        """
        yield from self._skip_spaces()
        is_list = bool((yield from self._skip("[")))
        between = "," if is_list else separators
        has_calls = False
        while True:
            yield from self._skip_spaces()
            start = self._at
            read = yield from self._object_call(is_function)
            if read == "none":
                self._at = start
                return has_calls
            has_calls, is_function = True, bool  # what stands beside a call is one
            if read == "broken":
                yield from self._stream_broken(*ends)
                return True
            self._tell_end()
            char = yield from self._skip_spaces()
            while char and char in between + "}":  # a brace too many is a slip that many models make
                self._at += 1
                char = yield from self._skip_spaces()
            if is_list and char == "]":
                self._at += 1
            if char != "{":
                return True


def _said(string: str) -> str:
    """What a JSON string says; half a pair of surrogates is a `?`."""
    return str(json.loads(string)).encode("utf-8", "replace").decode()


def _object_text(text: str | None) -> str | None:
    """Arguments as an object, of JSON that may be null, or a text that holds an object; None if they are none."""
    if text == "null":
        return "{}"
    if text is not None and text.startswith('"'):
        text = _said(text).strip() or "{}"
        scanner = JsonScanner()
        found, length = scanner.feed(text)
        text = found if scanner.is_over and length == len(text) else None
    return text if text is not None and text.startswith("{") else None


# -- grammars ----------------------------------------------------------------------------------------------------------
def calls_rules(
    tools: ToolSet,
    call: Callable[[Tool, str], str],
    *,
    trigger: str,
    opening: str = "",
    between: str,
    closing: str = "",
) -> str:
    """The rules of `CallFormat.calls_grammar` for calls that are alike.

    call: the body of the rule of one function's call, as Lark, of the tool and the name of the rule for its arguments,
    JSON of its schema. trigger, opening: what stands before the first call. between: between two. closing: behind the
    last. The texts are no Lark.
    """
    after = several(tools, "call", between)
    return "\n".join(
        [
            f"calls: {literal(trigger)} calls_after_trigger",
            f"calls_after_trigger: {literal(opening)} {after} {literal(closing)}",
            *call_rules(tools, "call", call),
            *arguments_rules(tools),
        ]
    )


def several(tools: ToolSet, rule: str, between: str) -> str:
    """What stands for one `rule`, or for more where one message may have more calls."""
    return f"{rule} ({literal(between)} {rule})*" if tools.parallel else rule


def call_rules(tools: ToolSet, rule: str, call: Callable[[Tool, str], str]) -> list[str]:
    """A rule of any function's call, and one for each of them. call: as `calls_rules` has it."""
    bodies = [call(tool, f"arguments_{index}") for index, tool in enumerate(tools.tools)]
    names = " | ".join(f"{rule}_{index}" for index in range(len(bodies)))
    return [f"{rule}: {names}", *(f"{rule}_{index}: {body}" for index, body in enumerate(bodies))]


def arguments_rules(tools: ToolSet) -> list[str]:
    """`arguments_0` and so on: JSON of each function's arguments, without white space where there are none."""
    schemas = [arguments_schema(tool) for tool in tools.tools]
    bodies = [quoted("{}") if _NOTHING.items() <= schema.items() else json_of(schema) for schema in schemas]
    return [f"arguments_{index}: {body}" for index, body in enumerate(bodies)]


_NOTHING: dict[str, Any] = {"properties": {}, "additionalProperties": False}


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """What arguments are held to: without a schema none are allowed, and with one that lists them no others, unless it
    says that there may be."""
    schema = without_options({"type": "object", **({"properties": {}} if tool.parameters is None else tool.parameters)})
    is_list = schema.keys() <= {
        "type",
        "properties",
        "required",
        "title",
        "description",
        "$schema",
        "$defs",
        "definitions",
    }
    return {**schema, "additionalProperties": False} if is_list and "properties" in schema else schema


def object_call(key: str = "arguments", *, behind: str = "") -> Callable[[Tool, str], str]:
    """For `call_rules`: a call as `{"name": …, "arguments": …}`, with that key; without `behind`, which it begins
    with."""

    def call(tool: Tool, arguments: str) -> str:
        head = '{"name": ' + json.dumps(tool.name, ensure_ascii=False) + f', "{key}": '
        return f"{quoted(head.removeprefix(behind))} {arguments} {quoted('}')}"

    return call


def literal(text: str) -> str:
    """A text as Lark; nothing for no text."""
    return quoted(text) if text else ""
