"""Models that bring the description of their own messages: `response_template` of tokenizer_config.json.

Owns the reading of a template and of messages by it. A message is regions in a row: each field but one says what opens
it and what closes it, and the one without an opening has what is left over. What is refused is refused when a template
is read, by the name of its field: no answer fails by it.

Reasoning and text are told as they come, but for what may still be a marker and for white space at their ends. A call
is told when its region is over. One that is cut short, or that is no call, is text as it is written: nothing is made up
to close it. A template says nothing of how calls are to be written, so that forced calls have a format of their own.

Source: the documentation of `transformers` 5 (`response_template`, version 1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mooli.config import RESPONSE_TEMPLATE
from mooli.errors import TokenizerError
from mooli.frontend.parts import PLAIN_TEXT, Part, PartKind, WireFormat
from mooli.frontend.tools import ToolSet
from mooli.frontend.wire_formats.calls import pieces_of
from mooli.frontend.wire_formats.growing_pattern import Found, GrowingPattern
from mooli.frontend.wire_formats.raw_values import as_json
from mooli.frontend.wire_formats.region_content import (
    MAX_CONTENT_CHARS,
    Content,
    check_transform,
    content_of,
    is_stripped,
    transformed,
)
from mooli.schemas import STRING, schema_of, types_of
from mooli.types import Reasoning

Role = Literal["reasoning", "text", "calls", "as written", "left out"]
"""What is told of a region."""

_ROLES: Mapping[str, Role] = {
    "thinking": "reasoning",
    "reasoning": "reasoning",
    "reasoning_content": "reasoning",
    "content": "text",
    "tool_calls": "calls",
}
"""By the names of fields. Others are nobody's that dialects know."""

_KEYS = {"version", "defaults", "fields", "start_anchor", "start_anchor_pattern"}
_FIELD_KEYS = {
    "open", "open_pattern", "close", "close_pattern", "content", "content_args", "repeats", "join", "optional",
    "transform", "transform_each",
}  # fmt: skip
_MAX_FIELDS, _MAX_TEXTS = 32, 32
_TAIL_TOKENS, _CONTINUED_TAIL_TOKENS = 256, 1 << 14
"""Of a prompt: where its last message begins is looked for in them."""


# -- reading a template ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class TemplateField:
    """opening: None of the field that has what is left over. closing: None where only the message's end ends it.
    texts: what opens and closes it, where these are texts. join: what stands between the words of two regions."""

    name: str
    role: Role
    opening: GrowingPattern | None
    closing: GrowingPattern | None
    texts: tuple[str, str]
    kind: str
    content: Content
    strips: bool
    join: str
    transform: Any
    transform_each: bool


@dataclass(frozen=True, slots=True)
class ResponseTemplate:
    """anchor: behind its last match in a prompt the message begins. texts: all that is looked for in messages."""

    fields: tuple[TemplateField, ...]
    anchor: GrowingPattern
    texts: tuple[str, ...]

    @property
    def implicit(self) -> TemplateField | None:
        """The field that has what is left over."""
        return next((field for field in self.fields if field.opening is None), None)

    @property
    def has_reasoning(self) -> bool:
        return any(field.role == "reasoning" for field in self.fields)

    @property
    def has_calls(self) -> bool:
        return any(field.role == "calls" for field in self.fields)


def read_response_template(value: Any) -> ResponseTemplate:
    """Raises TokenizerError for a template that is none, or that has what is not read here."""
    if not isinstance(value, dict):
        raise TokenizerError(f"response_template is no table but a {type(value).__name__}")
    if value.get("version", 1) != 1:
        raise TokenizerError(f"response_template has version {value['version']!r}; only version 1 is read")
    _check_keys("response_template", value, _KEYS)
    fields = value.get("fields")
    if not isinstance(fields, dict) or not 0 < len(fields) <= _MAX_FIELDS:
        raise TokenizerError(f"response_template.fields is no table of 1 to {_MAX_FIELDS} fields")
    anchor, _ = _delimiter("response_template", value, "start_anchor")
    if anchor is None:
        raise TokenizerError("response_template has neither start_anchor nor start_anchor_pattern")
    found = tuple(_field(name, field) for name, field in fields.items())
    implicit = [field.name for field in found if field.opening is None]
    if len(implicit) > 1:
        raise TokenizerError(f"response_template.fields {', '.join(implicit)} have no open; only one may have none")
    roles = [field.role for field in found]
    for role in ("reasoning", "text", "calls"):
        if roles.count(role) > 1:
            names = ", ".join(field.name for field in found if field.role == role)
            raise TokenizerError(f"response_template.fields {names} are the same to who reads them")
    return ResponseTemplate(found, anchor, tuple(_texts_in(fields)))


def _field(name: str, value: Any) -> TemplateField:
    scope = f"response_template.fields.{name[:80]}"
    if not isinstance(value, dict):
        raise TokenizerError(f"{scope} is no table")
    _check_keys(scope, value, _FIELD_KEYS)
    for key in ("repeats", "optional", "transform_each"):
        if not isinstance(value.get(key, False), bool):
            raise TokenizerError(f"{scope}.{key}={value[key]!r} is neither true nor false")
    role = _ROLES.get(name, "left out")
    opening, opening_text = _delimiter(scope, value, "open")
    closing, closing_text = _delimiter(scope, value, "close")
    if opening is not None and not opening.least_chars:
        raise TokenizerError(f"{scope}.open_pattern matches where there is nothing")
    if opening is None and closing is not None and not closing.least_chars:
        raise TokenizerError(f"{scope}.close_pattern matches where there is nothing, and the field has no open")
    if opening is None and role == "calls":
        raise TokenizerError(f"{scope} has no open: calls are only read between markers")
    kind, join = value.get("content", "text"), value.get("join")
    transform, each = value.get("transform"), value.get("transform_each", False)
    if role in ("reasoning", "text") and (kind != "text" or transform is not None):
        raise TokenizerError(f"{scope} has content={kind!r} or a transform; only plain text is read there")
    if join is not None and not (isinstance(join, str) and value.get("repeats")):
        raise TokenizerError(f"{scope}.join={join!r} is no text, or the field does not repeat")
    names = {name for pattern in (opening, closing) if pattern is not None for name in pattern.names}
    if each and transform is None:
        raise TokenizerError(f"{scope}.transform_each is set, and there is no transform")
    try:
        content = content_of(kind, value.get("content_args"))
        check_transform(transform, None if each else frozenset({"content", *names}))
    except ValueError as exc:
        raise TokenizerError(f"{scope}: {exc}") from exc
    return TemplateField(
        name=name,
        role=role,
        opening=opening,
        closing=closing,
        texts=(opening_text, closing_text),
        kind=kind,
        content=content,
        strips=is_stripped(value.get("content_args") or {}),
        join="\n" if join is None else join,
        transform=transform,
        transform_each=each,
    )


def _check_keys(scope: str, value: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(str(key)[:80] for key in value.keys() - known)
    if unknown:
        raise TokenizerError(f"{scope} has {', '.join(unknown)}, which is not known")


def _delimiter(scope: str, value: Mapping[str, Any], key: str) -> tuple[GrowingPattern | None, str]:
    """What `key` or `key`_pattern says, and the text, if it is one (the first of several)."""
    text, pattern = value.get(key), value.get(f"{key}_pattern")
    if text is not None and pattern is not None:
        raise TokenizerError(f"{scope} has both {key} and {key}_pattern")
    if text is not None:
        texts = [text] if isinstance(text, str) else text
        is_list = isinstance(texts, list) and 0 < len(texts) <= _MAX_TEXTS
        if not is_list or not all(isinstance(one, str) and one for one in texts):
            raise TokenizerError(f"{scope}.{key} is neither a text nor a list of 1 to {_MAX_TEXTS} texts")
    elif pattern is None:
        return None, ""
    elif not isinstance(pattern, str):
        raise TokenizerError(f"{scope}.{key}_pattern is no text")
    try:
        if pattern is None:
            return GrowingPattern.of_texts(texts), texts[0]
        return GrowingPattern(pattern), ""
    except ValueError as exc:
        raise TokenizerError(f"{scope}.{key}{'' if pattern is None else '_pattern'}: {exc}") from exc


def _texts_in(value: Any) -> Iterator[str]:
    """All texts of a template, patterns also without their escapes."""
    if isinstance(value, str):
        yield value
        yield re.sub(r"\\(\W)", r"\1", value)
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


# -- the format --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class TemplateFormat:
    """marker_tokens: special tokens that the template's texts have. tools: whose calls are told; None tells calls as
    they are written. keeps_rest: what is in no region is text; else it is nobody's."""

    template: ResponseTemplate
    marker_tokens: tuple[str, ...]
    tools: ToolSet | None = None
    keeps_rest: bool = False
    prompt_tail_tokens: int = _TAIL_TOKENS

    calls = None

    @property
    def name(self) -> str | None:
        return RESPONSE_TEMPLATE if self.template.has_reasoning else None

    @property
    def continued(self) -> TemplateFormat:
        return replace(self, prompt_tail_tokens=_CONTINUED_TAIL_TOKENS)

    @property
    def without_reasoning(self) -> WireFormat:
        return PLAIN_TEXT

    def with_tools(self, tools: ToolSet) -> TemplateFormat:
        return replace(self, tools=tools)

    def parser(self, prompt_tail: str) -> TemplateParser:
        is_told = {"calls": self.tools is not None}
        parser = TemplateParser(self.template, self.tools, is_told, keeps_rest=self.keeps_rest)
        end = self.template.anchor.last_end(prompt_tail)
        parser.begin_with(prompt_tail[end or 0 :])
        return parser

    def reasoning_ahead(self, prompt_tail: str) -> Reasoning | None:
        parser = self.parser(prompt_tail)
        reasoning = next((field for field in self.template.fields if field.role == "reasoning"), None)
        if reasoning is None or not all(reasoning.texts) or (parser.has_opened and parser.region is not reasoning):
            return None
        text = next((field for field in self.template.fields if field.role == "text"), None)
        words = "" if text is None else text.texts[0]
        return Reasoning(*reasoning.texts, is_open=parser.region is reasoning, words=words)


@dataclass(frozen=True, slots=True)
class TemplateCalls:
    """Calls as a template has them; reasoning is told as it is written."""

    template: ResponseTemplate
    marker_tokens: tuple[str, ...]
    name: str = RESPONSE_TEMPLATE

    def parser(self, tools: ToolSet) -> TemplateParser:
        return TemplateParser(self.template, tools, {"reasoning": False}, keeps_rest=False)

    def calls_grammar(self, tools: ToolSet) -> str:
        """Raises ValueError."""
        raise ValueError("this model's response_template says how calls are read, and not how they are written")

    def triggers(self) -> tuple[str, ...]:
        return ()


class TemplateParser:
    """One sequence. is_told: roles that are told as they are written are False.

    region: the field that is open. has_opened: one with an opening was.
    """

    def __init__(
        self, template: ResponseTemplate, tools: ToolSet | None, is_told: Mapping[str, bool], *, keeps_rest: bool
    ) -> None:
        self._implicit = template.implicit
        self._opening_fields = [field for field in template.fields if field.opening is not None]
        self._roles: dict[str, Role] = {
            field.name: field.role if is_told.get(field.role, True) else "as written" for field in template.fields
        }
        self._tools = tools
        self._rest_role: Role = "text" if keeps_rest else "left out"
        self.region = self._implicit
        self.has_opened = False
        self._text = ""
        self._at = 0
        self._num_silent = 0
        """Characters that are read next and were the prompt's."""
        self._num_tokens = 0
        self._parts: list[Part] = []
        self._call = -1
        self._told: set[PartKind] = set()
        self._spaces = ""
        """Behind the words that were told."""
        self._goes_on = False
        """Markers were told as text: what follows is text with all its white space."""
        self._begin_region("", {})

    def begin_with(self, prompt: str) -> None:
        """The message that the prompt has begun."""
        self._text, self._num_silent = prompt, len(prompt)
        self._read(is_last=False)
        self._parts.clear()

    def push(self, text: str, lengths: Sequence[int]) -> list[Part]:
        for piece, num_tokens in pieces_of(text, lengths):
            self._text += piece
            self._num_tokens += num_tokens
            self._read(is_last=False)
        return self._taken()

    def flush(self) -> list[Part]:
        self._read(is_last=True)
        self._end_region(closed_by=None)
        return self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    # -- regions
    def _read(self, *, is_last: bool) -> None:
        while (found := self._next(is_last)) is not None:
            field, match, opens = found
            self._take(self._text[self._at : match.start()])
            self._at = match.end()
            said = self._unheard(match[0])
            if opens:
                self._end_region(closed_by=None)
                self.region, self.has_opened = field, True
                self._begin_region(said, match.groupdict())
            else:
                self._captures |= {name: text for name, text in match.groupdict().items() if text is not None}
                self._end_region(closed_by=said)
                self.region = self._implicit
                self._begin_region("", {})
        kept = max(self._at - 1, 0)  # a word's edge is seen by the character before it
        self._text, self._at = self._text[kept:], self._at - kept

    def _next(self, is_last: bool) -> tuple[TemplateField, re.Match[str], bool] | None:
        """The next marker, if it is certain: its field, and whether it opens it. What certainly is before any is
        taken."""
        held = len(self._text)
        best: tuple[tuple[int, int, bool, str], TemplateField, re.Match[str]] | None = None
        for field, pattern, opens in self._watched():
            found: Found | None = pattern.search(self._text, self._at, is_last=is_last)
            if found is None:
                continue
            if found.match is None:
                held = min(held, found.start)
                continue
            key = (found.start, -len(found.match[0]), not opens, field.name)
            if best is None or key < best[0]:
                best = key, field, found.match
        if best is not None and (is_last or best[0][0] < held):
            return best[1], best[2], not best[0][2]
        self._take(self._text[self._at : held])
        self._at = held
        return None

    def _watched(self) -> Iterator[tuple[TemplateField, GrowingPattern, bool]]:
        if self.region is self._implicit:
            for field in self._opening_fields:
                if field.opening is not None:
                    yield field, field.opening, True
        if self.region is not None and self.region.closing is not None:
            yield self.region, self.region.closing, False

    def _begin_region(self, opening: str, captures: Mapping[str, str | None]) -> None:
        self._captures = {name: text for name, text in captures.items() if text is not None}
        role, spaces = self._role(), self._spaces
        self._has_words, self._goes_on = self._goes_on, False
        self._spaces = ""
        self._body: list[str] = []
        self._raw = [spaces + opening]
        if role == "as written":
            self._tell("text", spaces + opening)
        elif opening and role in ("reasoning", "text"):
            self._tell("reasoning" if role == "reasoning" else "text", "")

    def _end_region(self, *, closed_by: str | None) -> None:
        """closed_by: what closes it; None where it is over without."""
        role, field = self._role(), self.region
        if role == "as written":
            self._tell("text", closed_by or "")
            self._goes_on = True
        elif role == "reasoning":
            self._tell("reasoning", "")
        elif role == "calls" and field is not None:
            self._end_calls(field, closed_by)

    def _role(self) -> Role:
        return self._rest_role if self.region is None else self._roles[self.region.name]

    def _unheard(self, text: str) -> str:
        """What of the text that is read next is not the prompt's."""
        num_silent = min(self._num_silent, len(text))
        self._num_silent -= num_silent
        return text[num_silent:]

    def _take(self, text: str) -> None:
        """Text of the region that is open."""
        role, said = self._role(), self._unheard(text)
        if role == "calls":
            self._body.append(text)
            self._raw.append(said)
        elif role == "as written":
            self._tell("text", said)
        elif role != "left out":
            if len(said) < len(text):
                self._has_words |= bool(text[: len(text) - len(said)].strip())
            self._take_words("reasoning" if role == "reasoning" else "text", said)

    def _take_words(self, kind: PartKind, text: str) -> None:
        words = self._spaces + text
        if self.region is None or self.region.strips:
            words = words if self._has_words else words.lstrip()
            end = len(words.rstrip())
            words, self._spaces = words[:end], words[end:]
        if not words:
            return
        if not self._has_words and kind in self._told:
            words = ("\n" if self.region is None else self.region.join) + words
        self._has_words = True
        self._told.add(kind)
        self._tell(kind, words)

    def _tell(self, kind: PartKind, text: str, call_id: str = "") -> None:
        if text or self._num_tokens or kind in ("call_begin", "call_end"):
            self._parts.append(Part(kind, text, self._num_tokens, call=max(self._call, 0), call_id=call_id))
            self._num_tokens = 0

    # -- calls
    def _end_calls(self, field: TemplateField, closed_by: str | None) -> None:
        # Whether JSON is whole is seen from itself, whatever else is whole from its end.
        is_whole = closed_by is not None or field.closing is None or field.kind == "json"
        calls = self._calls_in(field) if is_whole else None
        if calls is None:
            self._tell("text", "".join(self._raw) + (closed_by or ""))
            self._goes_on = True
            return
        for name, arguments, call_id in calls:
            self._call += 1
            self._tell("call_begin", name, call_id)
            self._tell("arguments", arguments)
            self._tell("call_end", "")

    def _calls_in(self, field: TemplateField) -> list[tuple[str, str, str]] | None:
        """Names, arguments and ids of the calls in the region that is over; None if it is no call."""
        body = "".join(self._body)
        if len(body) > MAX_CONTENT_CHARS:
            return None
        try:
            value = field.content(body)
            if field.transform is not None:
                if field.transform_each:
                    if not isinstance(value, list):
                        return None
                    scopes = [{**self._captures, **dict(item)} for item in value]
                    value = [transformed(field.transform, scope) for scope in scopes]
                else:
                    value = transformed(field.transform, {**self._captures, "content": value})
            return [self._call_of(item) for item in (value if isinstance(value, list) else [value])]
        except (ValueError, TypeError, RecursionError):
            return None

    def _call_of(self, value: Any) -> tuple[str, str, str]:
        """Raises ValueError for a value that is no call."""
        function = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
            raise ValueError("no call")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = json.loads(arguments) if arguments.strip() else None
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise ValueError("arguments that are no object")
        tool = None if self._tools is None else self._tools.named(name)
        if tool is not None and tool.parameters:
            root = tool.parameters
            arguments = {key: _as_schema_says(item, schema_of(root, key), root) for key, item in arguments.items()}
        call_id = value.get("id")
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace").decode()
        return name, written, call_id if isinstance(call_id, str) else ""


def _as_schema_says(value: Any, schema: Any, root: Mapping[str, Any]) -> Any:
    """A text as the JSON that it is, where its schema allows no string."""
    if not isinstance(value, str) or schema is None:
        return value
    types = types_of(schema, root)
    written = None if types & STRING else as_json(value.strip(), types)
    return value if written is None else json.loads(written)
