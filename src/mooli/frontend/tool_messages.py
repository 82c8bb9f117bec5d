"""Tools and histories in OpenAI's chat shape: what a request says becomes a `ToolSet` and messages for a template.

Owns what is accepted of tools, of the choice between them and of messages, and the form in which chat templates read
these: arguments as objects, results in the order of their calls, every content one text. Never renders a template and
never calls a function. Errors name the place: `messages[1].tool_calls[0]`.

Source: OpenAI API reference, chat: tools, tool_choice, messages; the published templates of the models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mooli.errors import RequestError
from mooli.frontend.tools import Tool, ToolChoice, ToolSet

IMAGE_NOTE = "[image]"
"""Stands in a result for a picture: a tool may show one to any model, and this one reads text."""

TEXT_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
"""Of a tool that takes a text."""

MAX_ARGUMENT_VALUES = 500_000
"""Brackets and commas in the arguments of all calls of one history: each may become an object in memory."""

_NAME = re.compile(r"[\w.:/-]{1,256}")
"""What every wire format can write. OpenAI's and Anthropic's names are among them, and those of MCP's servers."""

_SHOWN_CHARS = 80


# -- tools -------------------------------------------------------------------------------------------------------------
def read_tools(
    tools: Any,
    choice: Any = None,
    parallel: bool | None = None,
    *,
    tools_name: str = "tools",
    choice_name: str = "tool_choice",
) -> ToolSet | None:
    """The functions of a request; None where there are none.

    tools: a list as OpenAI has it. choice: "none", "auto", "required" (or "any"), one tool by name, or OpenAI's
    `allowed_tools`. tools_name, choice_name: what errors call these. Raises RequestError.
    """
    if tools is not None and not isinstance(tools, (list, tuple)):
        raise RequestError(f"{tools_name} must be a list of tools, not {_shown(tools)}", argument=tools_name)
    found = [read_tool(tool, f"{tools_name}[{i}]", tools_name) for i, tool in enumerate(tools or ())]
    return choose(found, choice, parallel, choice_name=choice_name, tools_name=tools_name)


def read_tool(given: Any, where: str, argument: str = "tools") -> Tool:
    """One tool: {"type": "function", "function": {name, description, parameters, strict}}, or the same without the
    inner object; or of type "custom", which takes a text. Raises RequestError, whose `argument` that is."""
    if not isinstance(given, Mapping):
        raise RequestError(f"{where} must be an object, not {_shown(given)}", argument=argument)
    kind = given.get("type", "function")
    if kind not in ("function", "custom"):
        raise RequestError(f"{where}.type={_shown(kind)} is neither 'function' nor 'custom'", argument=argument)
    body = given.get(kind)
    inner = where if body is None else f"{where}.{kind}"
    body = given if body is None else body
    if not isinstance(body, Mapping):
        raise RequestError(f"{inner} must be an object, not {_shown(body)}", argument=argument)
    return make_tool(
        body.get("name"),
        body.get("description"),
        TEXT_PARAMETERS if kind == "custom" else body.get("parameters"),
        where=inner,
        argument=argument,
        strict=body.get("strict"),
        takes_text=kind == "custom",
    )


def make_tool(
    name: Any,
    description: Any = None,
    parameters: Any = None,
    *,
    where: str,
    argument: str = "tools",
    parameters_name: str = "parameters",
    strict: Any = None,
    takes_text: bool = False,
) -> Tool:
    """A tool of checked values. Raises RequestError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.name={_shown(name)} is no name of a function: it has 1 … 256 letters, digits and _ - . : /",
            argument=argument,
        )
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{where}.description must be a string, not {_shown(description)}", argument=argument)
    if parameters is not None and (
        not isinstance(parameters, Mapping) or parameters.get("type", "object") not in ("object", ["object"])
    ):
        raise RequestError(
            f"{where}.{parameters_name} must be a JSON schema whose type is 'object', not {_shown(parameters)}",
            argument=argument,
        )
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{where}.strict must be true or false, not {_shown(strict)}", argument=argument)
    return Tool(name, description or "", parameters or None, bool(strict), takes_text)


def choose(
    tools: Sequence[Tool],
    choice: Any,
    parallel: bool | None = None,
    *,
    choice_name: str = "tool_choice",
    tools_name: str = "tools",
) -> ToolSet | None:
    """The tools of which `choice` (as `read_tools` has it) lets the model choose. Raises RequestError."""
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise RequestError(f"{tools_name} has two functions of the name {twice!r}: give one", argument=tools_name)
    mode, wanted = _mode(choice, choice_name)
    if not tools:
        if mode == "required":
            raise RequestError(
                f"{choice_name}={_shown(choice)} asks for a call, but {tools_name} is empty", argument=choice_name
            )
        return None
    # A function that is chosen by its name is called once: who asks so reads one call.
    is_named = wanted is not None and choice.get("type") != "allowed_tools"
    every = ToolSet(tuple(tools), mode, parallel is not False and not is_named)
    if wanted is None:
        return every
    missing = next((name for name in wanted if name not in names), None)
    if missing is not None or not wanted:
        what = "no function" if missing is None else f"{_shown(missing)}, which {tools_name} does not have"
        raise RequestError(f"{choice_name} names {what}", argument=choice_name)
    return replace(every, tools=tuple(tool for tool in tools if tool.name in wanted), shown=every.tools)


def _mode(choice: Any, where: str) -> tuple[ToolChoice, list[Any] | None]:
    """What a choice asks for, and of which functions alone; None for all."""
    if choice is None:
        return "auto", None
    if isinstance(choice, Mapping):
        kind = choice.get("type", "function")
        if kind in ("function", "custom", "tool"):
            inner = choice.get(kind, choice)
            name = inner.get("name") if isinstance(inner, Mapping) else None
            if not isinstance(name, str):
                raise RequestError(f"{where} names no function: give its name", argument=where)
            return "required", [name]
        if kind == "allowed_tools":
            allowed = choice.get(kind, choice)
            mode = allowed.get("mode", "auto") if isinstance(allowed, Mapping) else None
            listed = allowed.get("tools") if isinstance(allowed, Mapping) else None
            if mode not in ("auto", "required") or not isinstance(listed, (list, tuple)):
                raise RequestError(
                    f"{where}.allowed_tools must have a mode, 'auto' or 'required', and a list of tools", argument=where
                )
            return mode, [_mode(item, f"{where}.allowed_tools.tools[{i}]")[1][0] for i, item in enumerate(listed)]  # type: ignore[index]
        choice = kind
    if choice == "any":
        return "required", None
    if choice not in ("none", "auto", "required"):
        raise RequestError(
            f"{where}={_shown(choice)} is none of 'none', 'auto', 'required', nor a function by its name",
            argument=where,
        )
    return choice, None


def text_argument(arguments: str) -> str:
    """The text for a tool that takes one, of the arguments as the model wrote them; these where they are no such."""
    try:
        value = json.loads(arguments).get("input")
    except (ValueError, AttributeError, RecursionError):
        return arguments
    return value if isinstance(value, str) else arguments


# -- messages ----------------------------------------------------------------------------------------------------------
def template_messages(messages: Sequence[Any], *, messages_name: str = "messages") -> list[Any]:
    """Messages of OpenAI's chat shape as chat templates read them, the given ones left as they are.

    Contents become one text: parts on lines of their own, "" for none, a picture in a result a note. Of tool_calls,
    arguments may be JSON or an object and become an object; a custom tool's text is the argument `input`. function_call
    and the role function are OpenAI's older names for a call and its result. Results that follow a message with calls
    are put in the order of the calls, and know the name of theirs; a call may have none, or several. `developer` is the
    system. What is no mapping is left to the template's error.

    Raises RequestError, whose `argument` is "messages".
    """
    told: list[Any] = []
    budget = [MAX_ARGUMENT_VALUES]
    for i, message in enumerate(messages):
        where = f"{messages_name}[{i}]"
        told.append(_message(message, where, budget) if isinstance(message, Mapping) else message)
    return _in_call_order(told)


def content_text(content: Any, where: str, kinds: Sequence[str], wanted: str = "text") -> str:
    """One text of the parts of the kind that is wanted, put on lines of their own. Raises RequestError for a part that
    is of none of `kinds`."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, (list, tuple)):
        raise _wrong(f"{where} must be a text or a list of parts, not {_shown(content)}")
    texts = []
    for i, part in enumerate(content):
        kind = str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
        if kind not in kinds:
            raise _wrong(f"{where}[{i}]: a part of type {kind[:_SHOWN_CHARS]!r} is not supported, only text is")
        if kind in _IMAGES:
            texts.append(IMAGE_NOTE)
            continue
        if not isinstance(part.get(_TEXT_OF.get(kind, kind)), str):
            raise _wrong(f"{where}[{i}].{_TEXT_OF.get(kind, kind)} must be a string")
        if kind == wanted or (wanted == "text" and kind in _SAID):
            texts.append(part[_TEXT_OF.get(kind, kind)])
    return "\n".join(texts)


_IMAGES = ("image", "image_url", "input_image")
_SAID = ("input_text", "output_text", "refusal")
_TEXT_OF = {"input_text": "text", "output_text": "text"}
_KINDS: Mapping[str, Sequence[str]] = {
    "assistant": ("text", "thinking", "refusal", "output_text"),
    "tool": ("text", "input_text", *_IMAGES),
}


def _message(message: Mapping[str, Any], where: str, budget: list[int]) -> dict[str, Any]:
    told = {name: value for name, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role == "developer":  # OpenAI's newer name for who writes the system prompt
        told["role"] = "system"
    elif role == "function":
        told["role"] = role = "tool"
    if role == "assistant":
        told.pop("function_call", None)
        calls = [_call(call, at, budget) for at, call in _calls(message, where)]
        told.pop("tool_calls", None)
        if calls:
            told["tool_calls"] = calls
        if content is None:
            content = told.pop("refusal", None)  # said instead
    elif content is None and role != "tool":
        raise _wrong(f"{where}.content is missing")
    kinds = _KINDS.get(str(role), ("text", "input_text"))
    told["content"] = content_text(content, f"{where}.content", kinds)
    if role == "assistant" and isinstance(content, (list, tuple)) and told.get("reasoning_content") is None:
        reasoning = content_text(content, f"{where}.content", kinds, "thinking")
        if reasoning:
            told["reasoning_content"] = reasoning
    return told


def _calls(message: Mapping[str, Any], where: str) -> list[tuple[str, Any]]:
    """Each with its place."""
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise _wrong(f"{where}.tool_calls must be a list, not {_shown(calls)}")
    if not calls and message.get("function_call"):
        return [(f"{where}.function_call", {"function": message["function_call"]})]
    return [(f"{where}.tool_calls[{j}]", call) for j, call in enumerate(calls or ())]


def _call(call: Any, where: str, budget: list[int]) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise _wrong(f"{where} must be an object, not {_shown(call)}")
    kind = "custom" if "custom" in call else "function"
    body = call.get(kind)
    name = body.get("name") if isinstance(body, Mapping) else None
    if not isinstance(body, Mapping) or not isinstance(name, str) or not name:
        raise _wrong(f"{where}.{kind}.name is missing: a call has the name of its function and its arguments")
    if kind == "custom":
        arguments: Mapping[str, Any] = {"input": str(body.get("input") or "")}
    else:
        arguments = _arguments(body.get("arguments"), f"{where}.function.arguments", budget)
    told: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if isinstance(call.get("id"), str):
        told = {"id": call["id"], **told}
    return told


def _arguments(given: Any, where: str, budget: list[int]) -> Mapping[str, Any]:
    """An object: templates take its items. A function without arguments may have been called with an empty text."""
    if given is None or given == "":
        return {}
    value = given
    if isinstance(given, str):
        budget[0] -= sum(map(given.count, ",[{"))
        if budget[0] < 0:
            raise _wrong(f"{where}: the calls of this history have more than {MAX_ARGUMENT_VALUES} values: send fewer")
        try:
            value = json.loads(given, parse_constant=_no_number)
        except (ValueError, RecursionError) as exc:
            raise _wrong(f"{where} is no JSON ({str(exc)[:_SHOWN_CHARS]}): {_shown(given)}") from None
    if not isinstance(value, Mapping):
        raise _wrong(f"{where} must be a JSON object, not {_shown(given)}")
    return value


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no value of JSON")


def _in_call_order(messages: Sequence[Any]) -> list[Any]:
    """Results behind a message with calls, in the order of these; of one call, and of none, as they came."""
    ordered: list[Any] = []
    i = 0
    while i < len(messages):
        message = messages[i]
        ordered.append(message)
        i += 1
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        if not calls:
            continue
        start = i
        while i < len(messages) and isinstance(messages[i], Mapping) and messages[i].get("role") == "tool":
            i += 1
        ordered += _placed(messages[start:i], calls)
    return ordered


def _placed(results: Iterable[dict[str, Any]], calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    answered = [0] * len(calls)
    placed: list[tuple[int, dict[str, Any]]] = []
    for result in results:
        call_id, name = result.get("tool_call_id"), result.get("name")
        mine = [
            j
            for j, call in enumerate(calls)
            if (call.get("id") == call_id if call_id is not None else call["function"]["name"] == name)
        ]
        if not mine and call_id is None and name is None and len(calls) > sum(map(bool, answered)):
            mine = [answered.index(0)]  # neither: the next one
        if not mine:
            placed.append((len(calls), result))
            continue
        at = min(mine, key=lambda j: answered[j])  # the same id twice: each call has one of the results
        answered[at] += 1
        function = calls[at]["function"]["name"]
        known = {"tool_call_id": calls[at]["id"]} if "id" in calls[at] else {}
        placed.append((at, {**result, **known, "name": function}))
    return [result for _, result in sorted(placed, key=lambda pair: pair[0])]


def _wrong(message: str) -> RequestError:
    return RequestError(message, argument="messages")


def _shown(value: Any) -> str:
    """As it was given, and not longer than an error should be."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
