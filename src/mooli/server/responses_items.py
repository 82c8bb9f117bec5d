"""What a Responses request says, as a conversation: items as messages in the shape of chats, tools as a `ToolSet`.

Owns the types of items, of their parts and of tools. Pure functions of the body. A hosted tool, such as a web search,
is left out and so are items of types that are not known here: clients send what their vendor's API takes. Never renders
a template, and never writes an item: that is `mooli.server.responses_events`.

Source: OpenAI API reference, responses: input items, tools, tool choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import msgspec

from mooli.frontend.tool_messages import TEXT_PARAMETERS, choose, make_tool
from mooli.frontend.tools import Tool, ToolSet
from mooli.server.routing import HttpError
from mooli.server.work import num_chars

Item = dict[str, Any]

BETWEEN_PARTS = "\n"
BETWEEN_MESSAGES = "\n\n"
"""Of messages in a row that become one, because many templates have roles take turns and know one system prompt."""

CUSTOM_ARGUMENT = "input"
"""The one argument, a text, by which a model calls a custom tool."""

_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "summary_text": "text", "refusal": "refusal"}
"""By type of part, the field with its text."""


# -- items -------------------------------------------------------------------------------------------------------------
def read_messages(items: str | Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Messages in the shape of OpenAI's chats.

    Instructions, system and developer messages become one system message at the beginning, wherever they stand:
    templates know no other. What an assistant says in a row (reasoning, words, calls) is one message.

    Raises HttpError (400) that names the item, or where nothing is said.
    """
    turns = _Turns()
    if instructions:
        turns.say("system", instructions)
    if isinstance(items, str):
        turns.say("user", items)
    else:
        for index, item in enumerate(items):
            turns.add(item, f"input[{index}]")
    messages = turns.messages()
    if not messages:
        raise HttpError(400, "input says nothing: send a text, or a list with a message", param="input")
    return messages


def without_oldest(messages: Sequence[Mapping[str, Any]], share: float) -> list[Mapping[str, Any]] | None:
    """Messages without the oldest turns, whole ones that each begin with a user's message, until `share` of all that
    was said is gone. What systems say and the last turn stay. None where there is only that turn."""
    first = int(messages[0]["role"] == "system")
    starts = [index for index, message in enumerate(messages) if index > first and message["role"] == "user"]
    said = list(accumulate(map(num_chars, messages), initial=0))
    enough = said[first] + share * (said[-1] - said[first])
    cut = next((start for start in starts if said[start] >= enough), starts[-1] if starts else 0)
    return [*messages[:first], *messages[cut:]] if cut else None


class _Turns:
    """Messages, as items come."""

    def __init__(self) -> None:
        self._system: list[str] = []
        self._turns: list[dict[str, Any]] = []

    def messages(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": BETWEEN_MESSAGES.join(self._system)}] if self._system else []
        return [*system, *self._turns]

    def say(self, role: str, text: str) -> None:
        if role == "system":
            self._system.append(text)
            return
        turn = self._turn(role)
        turn["content"] = turn["content"] + BETWEEN_MESSAGES + text if turn["content"] else text

    def add(self, item: Item, where: str) -> None:
        kind = item.get("type")
        if kind is None:
            kind = "message" if "role" in item else "item_reference"
        if kind == "message":
            role = item.get("role")
            if role not in ("user", "assistant", "system", "developer"):
                raise HttpError(
                    400, f"{where}.role={str(role)[:80]!r} is none of user, assistant, system, developer", param=where
                )
            # Templates know no developer: it is OpenAI's newer name for who writes the system prompt.
            self.say("system" if role == "developer" else role, _text(item.get("content"), f"{where}.content"))
        elif kind in ("function_call", "custom_tool_call"):
            self._turn("assistant").setdefault("tool_calls", []).append(_call(item, kind, where))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            text = _text(item.get("output"), f"{where}.output", refuses_files=False)
            call_id = _named(item, "call_id", where)
            self._turns.append({"role": "tool", "tool_call_id": call_id, "content": text})
        elif kind == "reasoning":
            self._reason(item, where)
        elif kind == "item_reference":
            raise HttpError(
                400,
                f"{where} names an item by its id, but this server keeps no items to look it up: send the item itself",
                param=where,
            )

    def _reason(self, item: Item, where: str) -> None:
        """What was thought, or else its summary; encrypted content is only for who made it."""
        for name in ("content", "summary"):
            parts = item.get(name) or []
            if not isinstance(parts, list):
                raise HttpError(400, f"{where}.{name} must be a list", param=where)
            texts = [part.get("text") for part in parts if isinstance(part, dict)]
            said = BETWEEN_PARTS.join(text for text in texts if isinstance(text, str))
            if said:
                turn = self._turn("assistant")
                before = turn.get("reasoning_content")
                turn["reasoning_content"] = said if before is None else before + BETWEEN_PARTS + said
                return

    def _turn(self, role: str) -> dict[str, Any]:
        """The message of that role that is being written."""
        if not self._turns or self._turns[-1]["role"] != role:
            self._turns.append({"role": role, "content": ""})
        return self._turns[-1]


def _call(item: Item, kind: str, where: str) -> dict[str, Any]:
    """A call of an earlier turn, under the name by which the model knows its tool."""
    name, call_id = qualified(_named(item, "name", where), item.get("namespace")), _named(item, "call_id", where)
    if kind == "custom_tool_call":
        return {"id": call_id, "type": "custom", "custom": {"name": name, "input": item.get("input")}}
    arguments = item.get("arguments") or "{}"
    if not isinstance(arguments, str):
        raise HttpError(400, f"{where}.arguments must be a string of JSON", param=where)
    try:
        msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        # The model wrote it, and its client has told it so: refused, the conversation could never go on.
        arguments = json.dumps({"arguments": arguments}, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _named(item: Item, field: str, where: str) -> str:
    value = item.get(field)
    if not isinstance(value, str) or not value:
        raise HttpError(400, f"{where}.{field} must be a string that is not empty", param=where)
    return value


def _text(content: Any, where: str, *, refuses_files: bool = True) -> str:
    """One text of all parts, each on lines of its own. In the place of what is no text the model reads that it is
    missing; a file that a user wants read is refused. Raises HttpError (400)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise HttpError(400, f"{where} must be a string or a list of parts, which are objects", param=where)
    texts = []
    for index, part in enumerate(content):
        kind, at = str(part.get("type")), f"{where}[{index}]"
        if kind in _TEXTS:
            text = part.get(_TEXTS[kind])
            if not isinstance(text, str):
                raise HttpError(400, f"{at}.{_TEXTS[kind]} must be a string", param=at)
            texts.append(text)
        elif kind == "input_file" and refuses_files:
            raise HttpError(400, f"{at}: files are not read here, send their text as an input_text", param=at)
        else:
            what = kind.removeprefix("input_")[:40]
            texts.append(f"[Left out: {what}. Only text can be read here.]")
    return BETWEEN_PARTS.join(texts)


# -- tools -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class CalledTool:
    """How a client knows a tool. namespace: "" for none. is_custom: it takes a text instead of arguments."""

    name: str
    namespace: str = ""
    is_custom: bool = False


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """tools: for the model; None where it has nothing to call. called: by the model's name for it, each of them."""

    tools: ToolSet | None
    called: Mapping[str, CalledTool]


def qualified(name: str, namespace: Any) -> str:
    """A tool's name for the model, which knows no namespaces. Members of two may have the same name."""
    return f"{namespace}__{name}" if isinstance(namespace, str) and namespace else name


def read_tools(given: Sequence[Item], items: str | Sequence[Item], choice: Any, *, parallel: bool) -> OfferedTools:
    """Functions and custom tools, those in namespaces too, and those that items of the conversation bring.

    given, choice: `tools` and `tool_choice`. A tool with the name of an earlier one takes its place.

    Raises RequestError, whose `argument` is "tools" or "tool_choice".
    """
    offered: dict[str, tuple[Tool, CalledTool]] = {}
    for where, tool in _all_tools(given, items):
        for made, called in _read_tool(tool, "", where):
            offered[made.name] = made, called
    called_by = {name: called for name, (_, called) in offered.items()}
    tools = choose([tool for tool, _ in offered.values()], _told_choice(choice, called_by), parallel)
    return OfferedTools(tools, called_by)


def _all_tools(given: Sequence[Item], items: str | Sequence[Item]) -> Iterator[tuple[str, Item]]:
    for index, tool in enumerate(given):
        yield f"tools[{index}]", tool
    for index, item in enumerate(() if isinstance(items, str) else items):
        if item.get("type") in ("additional_tools", "tool_search_output") and isinstance(item.get("tools"), list):
            for place, tool in enumerate(item["tools"]):
                if isinstance(tool, dict):
                    yield f"input[{index}].tools[{place}]", tool


def _read_tool(tool: Item, namespace: str, where: str) -> Iterator[tuple[Tool, CalledTool]]:
    """Of a namespace its members; of what only a vendor can run nothing."""
    kind = tool.get("type")
    if kind == "namespace" and not namespace:
        members = tool.get("tools")
        for index, member in enumerate(members if isinstance(members, list) else ()):
            if isinstance(member, dict):
                yield from _read_tool(member, _named(tool, "name", where), f"{where}.tools[{index}]")
    elif kind in ("function", "custom"):
        # Some clients send the shape of chats.
        inner = tool[kind] if isinstance(tool.get(kind), dict) else tool
        name, is_custom = _named(inner, "name", where), kind == "custom"
        made = make_tool(
            qualified(name, namespace),
            _custom_description(inner) if is_custom else inner.get("description"),
            TEXT_PARAMETERS if is_custom else inner.get("parameters"),
            where=where,
            strict=inner.get("strict"),
            takes_text=is_custom,
        )
        yield made, CalledTool(name, namespace, is_custom)


def _custom_description(tool: Item) -> Any:
    """With the grammar of its input, which is told and not enforced."""
    said, form = tool.get("description"), tool.get("format")
    if not isinstance(form, dict) or form.get("type") != "grammar" or not isinstance(form.get("definition"), str):
        return said
    about = f"{CUSTOM_ARGUMENT} must match this {form.get('syntax', 'lark')} grammar:\n{form['definition']}"
    return f"{said}{BETWEEN_MESSAGES}{about}" if isinstance(said, str) and said else about


def _told_choice(choice: Any, called: Mapping[str, CalledTool]) -> Any:
    """A choice in the model's names. Of `allowed_tools`, what is not offered is left out: a vendor would run it."""
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind in ("function", "custom"):
        names = _matching(choice, called)
        if len(names) == 1:
            return {"type": "function", "name": names[0]}
        return {"type": "allowed_tools", "mode": "required", "tools": _functions(names)} if names else choice
    if kind == "allowed_tools" and isinstance(choice.get("tools"), list):
        names = [name for wanted in choice["tools"] for name in _matching(wanted, called)]
        if not names and choice.get("mode") != "required":
            return "none"
        return {**choice, "tools": _functions(list(dict.fromkeys(names)))}
    return choice


def _functions(names: Sequence[str]) -> list[Item]:
    return [{"type": "function", "name": name} for name in names]


def _matching(wanted: Any, called: Mapping[str, CalledTool]) -> list[str]:
    """The tools that a choice names, by the client's name or the model's; of a name in several namespaces all."""
    if not isinstance(wanted, dict):
        return []
    inner = wanted.get("function")
    name, namespace = (inner if isinstance(inner, dict) else wanted).get("name"), wanted.get("namespace")
    return [
        key
        for key, tool in called.items()
        if key == qualified(str(name), namespace) or (namespace is None and tool.name == name)
    ]
