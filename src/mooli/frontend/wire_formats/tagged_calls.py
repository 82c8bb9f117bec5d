"""Formats whose calls stand between tags, one for each parameter: Qwen3-Coder, MiniMax M2, GLM, Hunyuan, DSML, Step3,
Kimi K3.

Owns a declaration a format, one parser for all and one grammar for all. The values between the tags are raw: what they
are in JSON says the schema of the function (`raw_values`), or in DSML and Kimi K3 the tag itself.

A call is told when its first parameter or its end is seen: a marker alone is text. White space between tags means
nothing. Of the tags that end a call the first one that comes is enough, or that another call begins: a text that is cut
short between two parameters is no whole call. The tag that ends a value counts only where another tag or the end of the
text follows it, so that a value may quote it.

Sources: the chat templates of the models; DeepSeek's encoding of V3.2; MiniMax's guide to tool calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mooli.errors import GrammarError
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.calls import CallParser, Waiting, length_of_beginning
from mooli.frontend.wire_formats.raw_values import RawValue
from mooli.lark import quoted
from mooli.raw_rules import Rules, escaped, parameters_of, takes_any
from mooli.schemas import ANY_TYPES, STRING, schema_of, types_of

NAME = re.compile(r"[^\s<>\"'`{}\[\]()=|]*")
"""Of a function: up to white space, a quote or a bracket."""

_DIGITS = re.compile(r"[0-9]*")
NUMBER = "/[1-9][0-9]{0,3}/"
"""Of a call, in a grammar."""


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """One format. Tags are given with the white space that the model writes behind them; read is any.

    section: around all calls of a message, with `between` inside of both. opening: what stands before the name of a
    function; with `is_bare` the last of them begins a call without the others too. name_end: behind the name; white
    space alone where a tag may follow at once. number: behind that, around the number of the call. parameter,
    key_end, value: around the name of a parameter, up to its value. says: instead of `value`, tags that say of which
    types a value is; one may be without. around: what stands on both sides of a value. close: ends it, `{key}` being
    the name of the parameter. banned: what of `close` a forced string has not; its first character is in it once.
    closing: of a call. between: two calls.
    """

    name: str
    section: tuple[str, str] | None = None
    opening: tuple[str, ...] = ("<tool_call>\n", "<function=")
    is_bare: bool = False
    name_end: str = ">\n"
    number: tuple[str, str] | None = None
    parameter: str = "<parameter="
    key_end: str = ">"
    value: str = ""
    says: tuple[tuple[str, frozenset[str]], ...] = ()
    around: str = ""
    close: str = "</parameter>\n"
    banned: str = ""
    closing: tuple[str, ...] = ("</function>\n", "</tool_call>")
    between: str = "\n"
    tokens: tuple[str, ...] = ()

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        tags = (*(self.section or ()), *self.opening, self.name_end, self.parameter, self.key_end, self.value)
        marks = [mark for tag in (*tags, self.close, *self.closing) for mark in re.findall(r"<[^<>{}]+>", tag)]
        return tuple(dict.fromkeys((*marks, *self.tokens)))

    def with_suffix(self, suffix: str) -> TaggedCalls:
        """The same whose tags have `suffix` behind their names."""

        def told(text: str) -> str:
            return re.sub(r"</?\w+(?=>)", lambda tag: tag[0] + suffix, text)

        section = None if self.section is None else (told(self.section[0]), told(self.section[1]))
        return replace(
            self,
            section=section,
            opening=tuple(map(told, self.opening)),
            name_end=told(self.name_end),
            parameter=told(self.parameter),
            key_end=told(self.key_end),
            value=told(self.value),
            close=told(self.close),
            closing=tuple(map(told, self.closing)),
        )

    def triggers(self) -> tuple[str, ...]:
        return ((self.section or self.opening)[0].strip(),)

    def parser(self, tools: ToolSet) -> TaggedParser:
        return TaggedParser(self, tools)

    def calls_grammar(self, tools: ToolSet) -> str:
        rules = Rules()
        (trigger,) = self.triggers()
        # White space and the tag behind it are one literal: of two that begin alike, the longer would always be read.
        head = (self.between if self.section else "") + "".join(self.opening)
        head = head if self.section else head.removeprefix(trigger)
        call = rules.add(" | ".join(rules.add(self._call_rule(rules, tool, head)) for tool in tools.tools))
        between = "" if self.section else f"{quoted(self.between + trigger)} "
        end = f" {quoted(self.between + self.section[1])}" if self.section else ""
        more = f" ({between}{call})*" if tools.parallel else ""
        return "\n".join(
            [
                f"calls: {quoted(trigger)} calls_after_trigger",
                f"calls_after_trigger: {call}{more}{end}",
                *rules.lines,
            ]
        )

    def _call_rule(self, rules: Rules, tool: Tool, head: str) -> str:
        """One function's call, from behind the trigger or the beginning of the section."""
        words = [quoted(head + tool.name + self.name_end)]
        if self.number:
            words = [quoted(head + tool.name + self.name_end + self.number[0]), NUMBER, quoted(self.number[1])]
        root = tool.parameters or {}
        for key, schema, is_required in parameters_of(tool.parameters, f"tool {tool.name}"):
            where = f"tool {tool.name}, parameter {key}"
            close = self._close_of(key)
            mark = self.key_end.strip()
            if not key or mark in key or "\n" in key or (self.key_end == '"' and "\\" in key):
                raise GrammarError(f"{where}: this model cannot write the name {key!r}")
            told = self._parameter(rules, quoted(self.parameter + key + self.key_end), schema, root, close, where)
            words.append(told if is_required else f"({told})?")
        if takes_any(tool.parameters):
            schema = root.get("additionalProperties")
            where, close = f"tool {tool.name}, additionalProperties", self._close_of("")
            key = f"{quoted(self.parameter)} /[^{escaped(self.key_end[0])}\\n]+/ {quoted(self.key_end)}"
            words.append(f"({self._parameter(rules, key, schema, root, close, where)})*")
        return " ".join([*words, quoted("".join(self.closing))])

    def _parameter(self, rules: Rules, head: str, schema: Any, root: Mapping[str, Any], close: str, where: str) -> str:
        """An expression for a parameter from its tag on, of which `head` is the expression."""
        end, banned = quoted(self.around + close), self.banned or close.strip()
        if self.says:
            return f"{head} {rules.told_value(schema, root, banned, end, where, self.says)}"
        before = self.value + self.around
        return f"{head} {quoted(before) + ' ' if before else ''}{rules.value(schema, root, banned, end, where)}"

    def _close_of(self, key: str) -> str:
        return self.close.replace("{key}", key)


class TaggedParser(CallParser):
    """One sequence."""

    def __init__(self, form: TaggedCalls, tools: ToolSet) -> None:
        self._form = form
        self._opening = tuple(tag.strip() for tag in form.opening)
        self._closing = (*(tag.strip() for tag in form.closing), *((form.section[1].strip(),) if form.section else ()))
        entries = (form.triggers()[0], self._opening[0], *(self._opening[-1:] if form.is_bare else ()))
        self._entries = tuple(dict.fromkeys(entries))
        self._tags = (form.parameter, *self._closing)
        super().__init__(tools)

    def _read(self) -> Waiting[None]:
        while entry := (yield from self._text_until(*self._entries)):
            yield from self._call_behind(entry)

    def _call_behind(self, entry: str) -> Waiting[None]:
        """A call that begins with `entry`, or else that as text."""
        behind = self._at
        found = yield from self._head(entry)
        if found is None:
            self._tell_text(behind)
        else:
            yield from self._call_of(*found)

    def _head(self, entry: str) -> Waiting[tuple[str, str] | None]:
        """The name of a function, and the tag behind it; None if they do not follow."""
        first = self._opening.index(entry) + 1 if entry in self._opening else 0
        if not first and self._form.is_bare:
            yield from self._skip_spaces()
            first = len(self._opening) if (yield from self._skip(self._opening[-1])) else 0
        for tag in self._opening[first:]:
            yield from self._skip_spaces()
            if not (yield from self._skip(tag)):
                return None
        yield from self._skip_spaces()
        name, end = (yield from self._run_of(NAME)), self._form.name_end.strip()
        if not name or (end and not (yield from self._skip(end))):
            return None
        if self._form.number:
            opening, closing = self._form.number
            if (yield from self._skip(opening)):
                yield from self._run_of(_DIGITS)
            else:
                closing = _behind_quote(closing)
            if not (yield from self._skip(closing)):
                return None
        yield from self._skip_spaces()
        tag = yield from self._skip(*self._tags)
        return (name, tag) if tag else None

    def _call_of(self, name: str, tag: str) -> Waiting[None]:
        """A call from behind its first tag on."""
        tool = self._tools.named(name)
        parameters = None if tool is None else tool.parameters
        self._tell_call(name)
        before = "{"
        while tag == self._form.parameter:
            key = yield from self._until(self._form.key_end.strip())
            types = None if key is None else (yield from self._value_types(key.strip(), parameters))
            if key is None or types is None:
                yield from self._stream_broken(*self._closing)
                return
            self._tell_arguments(f"{before}{json.dumps(key.strip(), ensure_ascii=False)}: ")
            if not (yield from self._value(types, self._form._close_of(key).strip())):
                return
            before = ", "
            yield from self._skip_spaces()
            tag = yield from self._skip(*self._tags)
            if not tag and self._text.startswith(self._entries, self._at):
                break
            if not tag:
                return
        self._tell_arguments("}" if before == ", " else "{}")
        for closing in self._closing[self._closing.index(tag) + 1 :] if tag else ():
            behind = self._at
            yield from self._skip_spaces()
            if not (yield from self._skip(closing)):
                self._at = behind
        self._tell_end()

    def _value_types(self, key: str, parameters: Mapping[str, object] | None) -> Waiting[frozenset[str] | None]:
        """Of the value of `key`, up to which is read; None if none follows."""
        form = self._form
        if form.says:
            yield from self._skip_spaces()
            kinds = {mark.strip(): types for mark, types in form.says}
            mark = yield from self._skip(*kinds, _behind_quote(form.says[0][0]))
            if not mark:
                return None
            if mark in kinds:
                return kinds[mark]
        elif form.value:
            yield from self._skip_spaces()
            if not (yield from self._skip(form.value.strip())):
                return None
        if form.around and (yield from self._char()) == form.around:
            self._at += 1
        schema = schema_of(parameters, key)
        return ANY_TYPES if schema is None else types_of(schema, parameters or {})

    def _value(self, types: frozenset[str], close: str) -> Waiting[bool]:
        """Tell a value, up to behind its `close`. Whether that came."""
        value, around = RawValue(types), self._form.around
        while True:
            start, place = self._at, self._text.find(close, self._at)
            if place < 0:
                held = 0 if self._is_over else length_of_beginning(self._text[start:], (around + close, close))
                self._at = len(self._text) - held
                self._tell_arguments(value.push(self._text[start : self._at]))
                self._text, self._at = self._text[self._at :], 0
                if not (yield from self._more()):
                    self._tell_arguments(value.rest())
                    return False
                continue
            self._at = place + len(close)
            is_end = yield from self._is_followed()
            said = self._text[start:place].removesuffix(around) if is_end else self._text[start : self._at]
            self._tell_arguments(value.push(said) + (value.end() if is_end else ""))
            if is_end:
                return True

    def _is_followed(self) -> Waiting[bool]:
        """Whether a tag or the end of the text comes next."""
        start = self._at
        yield from self._skip_spaces()
        tags = (*self._tags, *self._entries)
        found = yield from self._skip(*tags)
        rest, self._at = self._text[self._at :], start
        return bool(found) or (self._is_over and any(tag.startswith(rest) for tag in tags))


def _behind_quote(text: str) -> str:
    """Of the end of a tag with an attribute, what it is without."""
    return text.rpartition('"')[2]


# -- the formats -------------------------------------------------------------------------------------------------------
_QWEN = TaggedCalls("qwen3_coder", is_bare=True, around="\n")
_INVOKE = TaggedCalls(
    "minimax-m2",
    section=("<minimax:tool_call>", "</minimax:tool_call>"),
    opening=('<invoke name="',),
    name_end='">\n',
    parameter='<parameter name="',
    key_end='">',
    closing=("</invoke>",),
)
_GLM = TaggedCalls(
    "glm45",
    opening=("<tool_call>",),
    name_end="\n",
    parameter="<arg_key>",
    key_end="</arg_key>\n",
    value="<arg_value>",
    close="</arg_value>\n",
    closing=("</tool_call>",),
)

_GLM47 = replace(_GLM, name="glm47", name_end="", key_end="</arg_key>", close="</arg_value>", between="")
HY3: Mapping[str, Any] = {
    "name": "hunyuan",
    "section": ("<tool_calls>", "</tool_calls>"),
    "opening": ("<tool_call>",),
    "name_end": "<tool_sep>\n",
    "parameter": "<arg_key>",
    "key_end": "</arg_key>\n",
    "value": "<arg_value>",
    "close": "</arg_value>\n",
    "closing": ("</tool_call>",),
}
"""Hunyuan's tags, of which a format is made that reads its other form too."""


def _dsml(name: str, block: str, language: str = "DSML", space: str = "") -> TaggedCalls:
    mark = f"｜{language}｜{space}"
    return TaggedCalls(
        name,
        section=(f"<{mark}{block}>", f"</{mark}{block}>"),
        opening=(f'<{mark}invoke name="',),
        name_end='">\n',
        parameter=f'<{mark}parameter name="',
        key_end='"',
        says=((' string="true">', STRING), (' string="false">', ANY_TYPES - STRING)),
        close=f"</{mark}parameter>\n",
        closing=(f"</{mark}invoke>",),
        tokens=(f"｜{language}｜",),
    )


_NAMED_TYPES = (
    ("string", STRING),
    ("number", frozenset({"integer", "number"})),
    ("boolean", frozenset({"boolean"})),
    ("object", frozenset({"object"})),
    ("array", frozenset({"array"})),
    ("null", frozenset({"null"})),
    ("integer", frozenset({"integer"})),
)
"""By their names, the one that is written first."""

TAGGED_FORMATS: Mapping[str, TaggedCalls] = {
    form.name: form
    for form in (
        _QWEN,
        replace(_QWEN, name="step3p5"),
        replace(_QWEN, name="mimo", around=""),
        _INVOKE,
        replace(_INVOKE, name="dots", section=("<dots_function_call>", "</dots_function_call>")),
        *(replace(_GLM, name=name) for name in ("glm", "glm45", "ling3", "poolside_v1")),
        replace(_GLM, name="spark25", key_end="</arg_key>"),
        _GLM47,
        replace(_GLM47, name="iquest_q1", opening=("<iquest_tool_call>",), closing=("</iquest_tool_call>",)),
        _dsml("deepseekv32", "function_calls"),
        _dsml("deepseekv4", "tool_calls"),
        _dsml("deepseekv41", "calls", space=" "),
        _dsml("gigachat35", "tool_calls", "GCML"),
        TaggedCalls(
            "step3",
            section=("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"),
            opening=("<｜tool_call_begin｜>", "function<｜tool_sep｜>", '<steptml:invoke name="'),
            name_end='">\n',
            parameter='<steptml:parameter name="',
            key_end='">',
            close="</steptml:parameter>\n",
            closing=("</steptml:invoke>", "<｜tool_call_end｜>"),
        ),
        TaggedCalls(
            "kimi_k3",
            section=("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
            opening=('<|open|>call tool="',),
            name_end='"',
            number=(' index="', '"<|sep|>'),
            parameter='<|open|>argument key="',
            key_end='"',
            says=tuple((f' type="{name}"<|sep|>', types) for name, types in _NAMED_TYPES),
            close="<|close|>argument<|sep|>",
            banned="<|close|>argument",
            closing=("<|close|>call<|sep|>",),
            between="",
        ),
    )
}
"""By the names that `tool_call_parser` takes."""
