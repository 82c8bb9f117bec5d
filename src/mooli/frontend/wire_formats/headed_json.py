"""Formats whose calls are a name, a marker, and the arguments in JSON: DeepSeek V3 and V3.1, Kimi K2, Hunyuan A13B.

```text
<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Oslo"}<|tool_call_end|>
```

A marker without a name and an object behind it is text. Kimi K2 writes an id for a name, whose number
counts the calls of the conversation. Hunyuan A13B writes a list of objects.

Sources: the chat templates of the models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.calls import CallParser, Waiting, calls_rules, object_call
from mooli.frontend.wire_formats.tagged_calls import HY3, NAME, TaggedCalls, TaggedParser
from mooli.lark import quoted


@dataclass(frozen=True, slots=True)
class HeadedJson:
    """section: around all calls of a message. opening: before a name. separator: behind it; it may have white space
    at its end. fence: around the arguments. closing: behind them. has_ids: the name is an id."""

    name: str
    section: tuple[str, str]
    opening: str
    separator: str
    closing: str
    kind: str = ""
    fence: tuple[str, str] = ("", "")
    between: str = ""
    has_ids: bool = False

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        return tuple(mark for mark in (*self.section, self.opening, self.separator, self.closing, self.kind) if mark)

    def triggers(self) -> tuple[str, ...]:
        return (self.section[0],)

    def parser(self, tools: ToolSet) -> HeadedJsonParser:
        return HeadedJsonParser(self, tools)

    def calls_grammar(self, tools: ToolSet) -> str:
        return calls_rules(tools, self._call, trigger=self.section[0], between=self.between, closing=self.section[1])

    def _call(self, tool: Tool, arguments: str) -> str:
        head = quoted(self.opening + self.kind + ("functions." if self.has_ids else "") + tool.name)
        number = '":" /[0-9]{1,4}/ ' if self.has_ids else ""
        behind = "\n" if self.fence[0] else self.separator
        return f"{head} {number}{quoted(behind + self.fence[0])} {arguments} {quoted(self.fence[1] + self.closing)}"


class HeadedJsonParser(CallParser):
    """One sequence."""

    def __init__(self, form: HeadedJson, tools: ToolSet) -> None:
        self._form = form
        super().__init__(tools)

    def _read(self) -> Waiting[None]:
        form = self._form
        while entry := (yield from self._text_until(form.section[0], form.opening)):
            behind = self._at
            if entry == form.section[0]:
                yield from self._skip_spaces()
                entry = yield from self._skip(form.opening)
            name = (yield from self._head()) if entry else ""
            if name:
                yield from self._call_of(name)
            else:
                self._tell_text(behind)

    def _head(self) -> Waiting[str]:
        """A name, up to the object behind it; "" if they do not follow."""
        form = self._form
        if form.kind:
            yield from self._skip_spaces()
            if not (yield from self._skip(form.kind)):
                return ""
        name = yield from self._run_of(NAME)
        yield from self._skip_spaces()
        if not form.kind and not (yield from self._skip(form.separator)):
            return ""
        yield from self._skip_spaces()
        if form.fence[0] and (yield from self._skip(form.fence[0].strip())):
            yield from self._skip_spaces()
        return name if (yield from self._char()) == "{" or (yield from self._has_end()) else ""

    def _has_end(self) -> Waiting[bool]:
        """Whether the call ends here, without arguments."""
        start = self._at
        found = yield from self._skip(self._form.closing)
        self._at = start
        return bool(found)

    def _call_of(self, head: str) -> Waiting[None]:
        """A call from behind its head on."""
        form = self._form
        found = re.fullmatch(r"(?:functions\.)?(.+?)(:\d+)?", head) if form.has_ids else None
        self._tell_call(found[1] if found else head, head if found and found[2] else "")
        if (yield from self._char()) != "{":
            self._tell_arguments("{}")
        elif (yield from self._stream_json()) != "whole":
            yield from self._stream_broken(form.closing, form.section[1])
            return
        for mark in (form.fence[1].strip(), form.closing, form.section[1]):
            behind = self._at
            yield from self._skip_spaces()
            if mark and not (yield from self._skip(mark)):
                self._at = behind
        self._tell_end()


# -- Hunyuan -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Hunyuan(TaggedCalls):
    """Two forms between the same markers, of which a parser reads both: Hy3's tags, and A13B's list of objects."""

    writes_objects: bool = False

    def parser(self, tools: ToolSet) -> HunyuanParser:
        return HunyuanParser(self, tools)

    def calls_grammar(self, tools: ToolSet) -> str:
        if not self.writes_objects:
            return super(Hunyuan, self).calls_grammar(tools)
        opening, closing = self.section or ("", "")
        return calls_rules(tools, object_call(), trigger=opening, opening="[", between=", ", closing="]" + closing)


class HunyuanParser(TaggedParser):
    """One sequence."""

    def _read(self) -> Waiting[None]:
        opening, closing = self._form.section or ("", "")
        while entry := (yield from self._text_until(*self._entries)):
            behind = self._at
            if entry == opening and (yield from self._skip_spaces()) == "[":
                if (yield from self._object_calls(ends=(closing,))):
                    yield from self._skip_spaces()
                    yield from self._skip(closing)
                else:
                    self._tell_text(behind)
                continue
            self._at = behind
            yield from self._call_behind(entry)


_DEEPSEEK = HeadedJson(
    "deepseekv31",
    section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    opening="<｜tool▁call▁begin｜>",
    separator="<｜tool▁sep｜>",
    closing="<｜tool▁call▁end｜>",
)

HEADED_FORMATS: Mapping[str, HeadedJson | Hunyuan] = {
    form.name: form
    for form in (
        replace(
            _DEEPSEEK,
            name="deepseekv3",
            kind="function<｜tool▁sep｜>",
            fence=("```json\n", "\n```"),
            between="\n",
        ),
        _DEEPSEEK,
        HeadedJson(
            "kimi_k2",
            section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            opening="<|tool_call_begin|>",
            separator="<|tool_call_argument_begin|>",
            closing="<|tool_call_end|>",
            has_ids=True,
        ),
        Hunyuan(**HY3),
        Hunyuan(**{**HY3, "name": "hunyuan_a13b"}, writes_objects=True),
    )
}
"""By the names that `tool_call_parser` takes."""
