"""The whole ASGI application: every route, behind what protects it, and the document that shows them all.

Owns which modules bring routes, the order of the layers (what is kept of each request, cross-origin rules, keys, web
pages, limits, routes), and GET /openapi.json, made from the routes and the types of what comes in and goes out. Never
answers anything else itself.

Source: OpenAPI 3.1.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.middleware.cors import CORSMiddleware

from mooli.server import (
    anthropic,
    cache_routes,
    infill,
    metrics,
    native_control,
    native_generate,
    native_info,
    native_parse,
    ollama,
    ollama_models,
    openai_batches,
    openai_chat,
    openai_completions,
    openai_files,
    openai_models,
    openai_responses,
    page_files,
)
from mooli.server.answer_shapes import Answer, answer_of
from mooli.server.http import Endpoint, RouteTable
from mooli.server.json_body import BodyRoom
from mooli.server.protection import Admission, KeyCheck, PageCheck
from mooli.server.routing import Access, App, Dialect, Incoming, Reply, Route
from mooli.server.traffic import Traffic
from mooli.version import __version__

if TYPE_CHECKING:
    from mooli.server.service import Service

# -- the document ------------------------------------------------------------------------------------------------------

PATH = "/openapi.json"

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "anyOf": [
                {
                    "type": "object",
                    "required": ["type", "message"],
                    "properties": {"type": {"type": "string"}, "message": {"type": "string", "minLength": 1}},
                },
                {"type": "string", "minLength": 1},
            ]
        }
    },
}
"""What all dialects have in common in the body of an error; Ollama's is a text."""


def make_route(routes: Sequence[Route]) -> Route:
    """The route that shows `routes`."""
    written: list[bytes] = []

    async def show(service: Service, request: Incoming) -> Reply:
        if not written:
            written.append(msgspec.json.encode(document(routes)))
        return Reply(written[0])

    return Route(
        path=PATH,
        methods=("GET",),
        handler=show,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="This document",
    )


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """An OpenAPI document of `routes`."""
    answers = {(method, route.path): answer_of(method, route.path) for route in routes for method in route.methods}
    types: dict[Any, None] = {route.body: None for route in routes if route.body is not None}
    for answer in answers.values():
        types |= {} if answer is None else {kind: None for kind in (answer.json, answer.stream) if kind is not None}
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        for method in route.methods:
            operation = _operation(route, method, _content(answers[method, route.path], schema_of))
            if route.body is not None:
                content = {"application/json": {"schema": schema_of[route.body]}}
                operation["requestBody"] = {"required": route.needs_body, "content": content}
            elif route.reads_stream is not None:
                operation["requestBody"] = {"required": True, "content": {route.reads_stream: {}}}
            paths.setdefault(path, {})[method.lower()] = operation
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Mooli", "version": __version__},
        "paths": paths,
        "components": {"schemas": {**components, "Error": ERROR}, "securitySchemes": schemes},
    }


def _content(answer: Answer | None, schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    """Of a 200, by media type. OpenAPI 3.1 has no word for the events of a stream: the schema is that of one, with its
    JSON as OpenAPI 3.2 shows it."""
    if answer is None:
        return {}
    content: dict[str, Any] = {kind: {"schema": {"type": "string"}} for kind in answer.others}
    if answer.json is not None:
        content["application/json"] = {"schema": schema_of[answer.json]}
    if answer.stream is not None:
        schema = schema_of[answer.stream]
        one = {"anyOf": [schema, {"const": "[DONE]"}]} if answer.is_done else schema
        content[answer.framing] = {"schema": _event(one) if answer.framing.startswith("text/event-stream") else one}
    return {"content": content} if content else {}


def _event(data: Mapping[str, Any]) -> dict[str, Any]:
    """One server-sent event, whose text is JSON."""
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": text}}


def _operation(route: Route, method: str, content: Mapping[str, Any]) -> dict[str, Any]:
    name = "_".join(re.findall(r"\w+", route.path)) or "root"
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}_{name}",
        "summary": route.summary,
        "security": [] if route.access is Access.OPEN else [{"bearer": []}, {"header": []}],
        "responses": {
            "200": {"description": "Done", **content},
            "default": {
                "description": "An error; the body says which, to probes in plain text",
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/Error"}},
                    "text/plain": {"schema": {"type": "string"}},
                },
            },
        },
    }
    names = re.findall(r"\{(\w+)", route.path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return operation


# -- the application ---------------------------------------------------------------------------------------------------

API_ROUTES: tuple[Route, ...] = (
    *native_generate.ROUTES,
    *native_info.ROUTES,
    *native_parse.ROUTES,
    *native_control.ROUTES,
    *cache_routes.ROUTES,
    *openai_models.ROUTES,
    *openai_completions.ROUTES,
    *openai_chat.ROUTES,
    *openai_responses.ROUTES,
    *openai_files.ROUTES,
    *openai_batches.ROUTES,
    *anthropic.ROUTES,
    *infill.ROUTES,
    *ollama.ROUTES,
    *ollama_models.ROUTES,
    *metrics.ROUTES,
)

ROUTES = (*API_ROUTES, *page_files.ROUTES, make_route(API_ROUTES))

LONG_BODIES = 16
"""So many of the longest bodies may be read at a time."""


def build_app(service: Service, routes: Sequence[Route] = ROUTES) -> App:
    """The ASGI application that serves `service`."""
    room = BodyRoom(LONG_BODIES * service.config.max_body_bytes)
    return protected(RouteTable((route, Endpoint(service, route, room)) for route in routes), service)


def protected(table: RouteTable, service: Service) -> App:
    """All layers around the applications of routes."""
    config = service.config
    app: App = Admission(table, service)
    app = PageCheck(app, table, config, service.keys)
    app = KeyCheck(app, table, service.keys)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    return Traffic(app, table, service)
