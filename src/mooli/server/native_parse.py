"""POST /separate_reasoning and /parse_function_call: what a model's text says, for who has the text already.

Owns their bodies and the shape of their answers, which is SGLang's. Knows no format: a name finds one, and without a
name it is the one of the model that is served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from mooli.frontend.parts import Parser, Part
from mooli.frontend.tool_messages import read_tools
from mooli.frontend.wire_formats.choice import CALL_FORMATS
from mooli.frontend.wire_formats.reasoning import REASONING_FORMATS
from mooli.server.json_body import check_count
from mooli.server.routing import Access, Dialect, HttpError, Incoming, Reply, Route
from mooli.server.service import Service

MAX_CHARS = 1 << 20

FormatName = Annotated[str, msgspec.Meta(max_length=100)]


class SeparateReasoningBody(msgspec.Struct, kw_only=True):
    """reasoning_parser: a name, as the argument of a server has it; without it the one of this server's model."""

    text: str
    reasoning_parser: FormatName | None = None


class ParseFunctionCallBody(msgspec.Struct, kw_only=True):
    """tool_call_parser: a name, as the argument of a server has it; without it the one of this server's model."""

    text: str
    tools: list[Any]
    tool_call_parser: FormatName | None = None


async def separate_reasoning(service: Service, request: Incoming) -> Reply:
    """Raises HttpError for a format that is not known."""
    body: SeparateReasoningBody = request.body
    wire_format = service.wire_format
    if body.reasoning_parser not in (None, "auto", wire_format.name):
        wire_format = _named(REASONING_FORMATS, "reasoning_parser", body.reasoning_parser)
    elif wire_format.name is None:
        raise HttpError(
            400,
            "nothing is known of reasoning in this model's answers: give reasoning_parser",
            param="reasoning_parser",
        )
    parts = await _parts(service, wire_format.parser(""), body.text)
    told = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "text")}
    return Reply({"reasoning_text": told["reasoning"], "text": told["text"]})


async def parse_function_call(service: Service, request: Incoming) -> Reply:
    """`parameters` of a call are JSON. One that is cut short is not among them. Raises HttpError for a format that is
    not known, RequestError for tools that are none."""
    body: ParseFunctionCallBody = request.body
    check_count("tools", len(body.tools), service.config.max_request_items)
    tools = read_tools(body.tools)
    calls = service.wire_format.calls
    if body.tool_call_parser not in (None, "auto", calls and calls.name):
        calls = _named(CALL_FORMATS, "tool_call_parser", body.tool_call_parser)
    if calls is None:
        raise HttpError(
            400, "nothing is known of how this model writes calls: give tool_call_parser", param="tool_call_parser"
        )
    if tools is None:
        return Reply({"normal_text": body.text, "calls": []})
    parts = await _parts(service, calls.parser(tools), body.text)
    found: list[dict[str, Any]] = []
    name = arguments = ""
    for part in parts:
        if part.kind == "call_begin":
            name, arguments = part.text, ""
        elif part.kind == "arguments":
            arguments += part.text
        elif part.kind == "call_end":
            found.append({"tool_index": part.call, "name": name, "parameters": _tidy(arguments)})
    return Reply({"normal_text": "".join(part.text for part in parts if part.kind == "text"), "calls": found})


def _named(formats: Mapping[str, Any], field: str, name: str | None) -> Any:
    """Raises HttpError."""
    if name is None or name not in formats:
        raise HttpError(400, f"{field}={name!r} is none of {', '.join(formats)}", param=field)
    return formats[name]


async def _parts(service: Service, parser: Parser, text: str) -> list[Part]:
    """Raises HttpError for a text that no answer is as long as."""
    if len(text) > MAX_CHARS:
        raise HttpError(400, f"text has {len(text)} characters; at most {MAX_CHARS} are read", param="text")
    return await service.text_threads.run(
        len(text), lambda: [*(parser.push(text, [len(text)]) if text else []), *parser.flush()]
    )


def _tidy(arguments: str) -> str:
    """As SGLang writes them: the values of what the model wrote."""
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments


ROUTES = (
    Route(
        path="/separate_reasoning",
        methods=("POST",),
        handler=separate_reasoning,
        access=Access.KEY,
        dialect=Dialect.NATIVE,
        summary="Tell the reasoning in a text apart from the answer",
        body=SeparateReasoningBody,
    ),
    Route(
        path="/parse_function_call",
        methods=("POST",),
        handler=parse_function_call,
        access=Access.KEY,
        dialect=Dialect.NATIVE,
        summary="Find the calls of functions in a text",
        body=ParseFunctionCallBody,
    ),
)
