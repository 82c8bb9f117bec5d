"""Which part of a rendered conversation belongs to which message or tool.

Owns the way to find out: the conversation is rendered once more with marks around what its messages say, and where the
marks come out, the message is. So it is right for templates that reorder, drop or trim. Where a mark changes what a
template writes (it looks how a text begins, for example), that message goes without, and its text counts to its
neighbours. Never changes a prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mooli.errors import MooliError
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.tool_prompt import for_template
from mooli.frontend.tools import ToolSet

MAX_RENDERINGS = 24
"""Of one conversation, to find the messages that cannot be marked."""

_FIRST_MARK = 0x100000
"""Characters without a meaning (Unicode's supplementary private use area B)."""

_MOST_MARKS = 0xFFFE

_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Characters `start` … `end` of a prompt. kind: "message" or "tool", `index` of them as they were sent; "end": what
    the template puts behind all of them."""

    kind: Literal["message", "tool", "end"]
    index: int
    start: int
    end: int


Owner = tuple[Literal["message", "tool"], int]


def prompt_parts(
    template: ChatTemplate, messages: Sequence[Any], tools: ToolSet | None, **template_arguments: Any
) -> tuple[str, list[PromptPart]]:
    """The text of a conversation, and its parts in order: together all of it. messages, tools: as
    `mooli.frontend.tool_prompt.for_template` has them; template_arguments: as `ChatTemplate.render`.

    Raises what these raise.
    """

    def render(told: Sequence[Any], shown: ToolSet | None) -> str:
        rendered, functions = for_template(template, told, shown)
        return template.render(rendered, tools=functions, **template_arguments)

    text = render(messages, tools)
    marked = _Marked(messages, tools, text, render)
    return text, _parts(marked.places(), len(text))


@dataclass(frozen=True, slots=True)
class _Mark:
    owner: Owner
    is_end: bool


class _Marked:
    """The same conversation with as many marks as leave its text alone."""

    def __init__(
        self,
        messages: Sequence[Any],
        tools: ToolSet | None,
        text: str,
        render: Callable[[Sequence[Any], ToolSet | None], str],
    ) -> None:
        self._messages = messages
        self._tools = tools
        self._text = text
        self._render = render
        self._left = MAX_RENDERINGS
        self._used = {char for char in set(text) if ord(char) >= _FIRST_MARK}
        self._marks: dict[str, _Mark] = {}

    def places(self) -> list[tuple[int, _Mark]]:
        """Where each mark is in the text, the first time it is there."""
        shown = () if self._tools is None else (self._tools.shown or self._tools.tools)
        owners: list[Owner] = [("tool", i) for i in range(len(shown))]
        owners += [("message", i) for i, message in enumerate(self._messages) if isinstance(message, Mapping)]
        sides = self._possible(dict.fromkeys(owners, (True, True)))
        found = self._try(sides)
        if found is None:  # each alone is possible, and all together are not
            return []
        places: list[tuple[int, _Mark]] = []
        seen: set[str] = set()
        at = 0
        for char in found:
            if char not in self._marks:
                at += 1
            elif char not in seen:
                seen.add(char)
                places.append((at, self._marks[char]))
        return places

    def _possible(self, sides: dict[Owner, tuple[bool, bool]]) -> dict[Owner, tuple[bool, bool]]:
        """Those that can be marked at both sides, or at one: at their beginnings, at their ends."""
        if not sides or self._try(sides) is not None:
            return sides
        if len(sides) > 1:
            items = list(sides.items())
            half = len(items) // 2
            return {**self._possible(dict(items[:half])), **self._possible(dict(items[half:]))}
        (owner,) = sides
        for one in ((False, True), (True, False)):
            if self._try({owner: one}) is not None:
                return {owner: one}
        return {}

    def _try(self, sides: Mapping[Owner, tuple[bool, bool]]) -> str | None:
        """The text with marks; None if it is not the same but for them, or too much was tried."""
        if self._left <= 0:
            return None
        self._left -= 1
        self._marks = {}
        messages = [
            self._message(message, ("message", i), sides[("message", i)]) if ("message", i) in sides else message
            for i, message in enumerate(self._messages)
        ]
        try:
            found = self._render(messages, self._marked_tools(sides))
        except MooliError:
            return None
        if len(self._marks) > _MOST_MARKS:
            return None
        plain = found.translate(dict.fromkeys(map(ord, self._marks)))
        return found if plain == self._text else None

    def _marked_tools(self, sides: Mapping[Owner, tuple[bool, bool]]) -> ToolSet | None:
        tools = self._tools
        if tools is None:
            return None
        marked = [
            replace(tool, name=self._begun(tool.name, ("tool", i))) if ("tool", i) in sides else tool
            for i, tool in enumerate(tools.tools if tools.shown is None else tools.shown)
        ]
        return replace(tools, shown=tuple(marked))

    def _message(self, message: Mapping[str, Any], owner: Owner, sides: tuple[bool, bool]) -> dict[str, Any]:
        marked = dict(message)
        mark = functools.partial(self._around, owner=owner, sides=sides)
        content = marked.get("content")
        if isinstance(content, str):
            marked["content"] = mark(content)
        elif isinstance(content, (list, tuple)):
            marked["content"] = [
                {name: mark(item) if name in ("text", "thinking") else item for name, item in part.items()}
                if isinstance(part, Mapping)
                else part
                for part in content
            ]
        for name in _REASONING:
            if name in marked:
                marked[name] = mark(marked[name])
        calls = marked.get("tool_calls")
        if isinstance(calls, (list, tuple)) and sides[0]:
            marked["tool_calls"] = [self._call(call, owner) for call in calls]
        return marked

    def _call(self, call: Any, owner: Owner) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return call
        return {**call, "function": {**function, "name": self._begun(function["name"], owner)}}

    def _around(self, value: Any, owner: Owner, sides: tuple[bool, bool]) -> Any:
        """A text with marks inside the spaces at its ends, which templates trim. One without words stays: templates ask
        whether there are any."""
        if not isinstance(value, str) or not value.strip():
            return value
        start = len(value) - len(value.lstrip())
        end = len(value.rstrip())
        before = self._new(owner, False) if sides[0] else ""
        after = self._new(owner, True) if sides[1] else ""
        return f"{value[:start]}{before}{value[start:end]}{after}{value[end:]}"

    def _begun(self, name: str, owner: Owner) -> str:
        return self._new(owner, False) + name

    def _new(self, owner: Owner, is_end: bool) -> str:
        code = _FIRST_MARK + len(self._marks)
        while chr(code) in self._used or chr(code) in self._marks:
            code += 1
        self._marks[chr(code)] = _Mark(owner, is_end)
        return chr(code)


def _parts(places: Sequence[tuple[int, _Mark]], length: int) -> list[PromptPart]:
    """What stands between two messages is the beginning of the second: who speaks, what is before its words."""
    parts: list[PromptPart] = []
    open_owner: Owner | None = None
    at = 0

    def add(owner: Owner | None, end: int) -> None:
        nonlocal at
        if end > at:
            part = PromptPart("end", 0, at, end) if owner is None else PromptPart(*owner, at, end)
            if parts and (parts[-1].kind, parts[-1].index) == (part.kind, part.index):
                parts[-1] = replace(parts[-1], end=end)
            else:
                parts.append(part)
        at = end

    for place, mark in places:
        if mark.is_end:
            add(mark.owner, place)
            open_owner = None
        else:
            add(open_owner or mark.owner, place)
            open_owner = mark.owner
    add(open_owner, length)
    return parts
