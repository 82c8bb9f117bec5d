"""What a chat template is told of a conversation with tools, whether or not it knows any.

Owns the words for a template that knows none, where functions, calls and results become contents of messages. Calls are
written there as Hermes's models do, which is also how they are to be answered: by the format `hermes`. Never renders.

Source of the form: the function calling prompt of Hermes (Nous Research).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.tool_messages import template_messages
from mooli.frontend.tools import ToolSet

_SYSTEM = """\
You can call functions. These are the functions, in JSON:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as a JSON object, like this:
<tool_call>
{{"name": "the name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
What it returns comes back between <tool_response> and </tool_response>."""


def for_template(
    template: ChatTemplate, messages: Sequence[Any], tools: ToolSet | None
) -> tuple[list[Any], list[dict[str, Any]] | None]:
    """What `template` is told: messages of OpenAI's chat shape as it reads them, and functions as it knows them; None
    where there are none to tell it. Raises RequestError for messages that are wrong."""
    told = template_messages(messages)
    shown = None if tools is None or tools.choice == "none" else tools
    has_calls = any(isinstance(message, Mapping) and message.get("tool_calls") for message in told)
    if template.has_tools or (shown is None and not has_calls):
        return told, None if shown is None else shown.for_template()
    return without_tools(told, shown), None


def without_tools(messages: Sequence[Any], tools: ToolSet | None) -> list[Any]:
    """Messages, as `mooli.frontend.tool_messages.template_messages` gives them, that say all there is of tools in their
    contents: functions in the system's, calls in the assistant's, results in the user's."""
    told: list[dict[str, Any]] = []
    for message in messages:
        if not isinstance(message, Mapping):
            told.append(message)
            continue
        plain = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id")}
        if message.get("role") == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            plain = {"role": "user", "content": content}
        elif message.get("tool_calls"):
            calls = [_call(call["function"]) for call in message["tool_calls"]]
            plain["content"] = "\n".join([text for text in (message.get("content"),) if text] + calls)
        # Many templates take turns: what follows a result is its user's.
        is_same = bool(told) and told[-1].get("role") == plain.get("role") == "user"
        if is_same and (message.get("role") == "tool" or told[-1]["content"].endswith("</tool_response>")):
            told[-1] = {**told[-1], "content": f"{told[-1]['content']}\n{plain['content']}"}
        else:
            told.append(plain)
    return told if tools is None else _with_system(told, tools)


def _call(function: Mapping[str, Any]) -> str:
    body = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(body, ensure_ascii=False)}\n</tool_call>"


def _with_system(messages: list[dict[str, Any]], tools: ToolSet) -> list[dict[str, Any]]:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools.for_template())
    words = _SYSTEM.format(tools=listed)
    if messages and messages[0].get("role") == "system":
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]
