"""The whole ASGI application: every route, behind what protects it, and the document that shows them all.

Owns which modules bring routes, the order of the layers (what is kept of each request, cross-origin rules, keys, web
pages, limits, routes), and GET /openapi.json, made from the routes and the types of their bodies. Never answers
anything else itself.

Source: OpenAPI 3.1.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.middleware.cors import CORSMiddleware

from mooli.server import (
    anthropic,
    infill,
    metrics,
    native_control,
    native_generate,
    native_info,
    native_parse,
    ollama,
    ollama_models,
    openai_chat,
    openai_completions,
    openai_models,
    openai_responses,
)
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
    types = list({route.body: None for route in routes if route.body is not None})
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        for method in route.methods:
            operation = _operation(route, method)
            if route.body is not None:
                content = {"application/json": {"schema": schema_of[route.body]}}
                operation["requestBody"] = {"required": route.needs_body, "content": content}
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


def _operation(route: Route, method: str) -> dict[str, Any]:
    name = "_".join(re.findall(r"\w+", route.path)) or "root"
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}_{name}",
        "summary": route.summary,
        "security": [] if route.access is Access.OPEN else [{"bearer": []}, {"header": []}],
        "responses": {
            "200": {"description": "Done"},
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
    *openai_models.ROUTES,
    *openai_completions.ROUTES,
    *openai_chat.ROUTES,
    *openai_responses.ROUTES,
    *anthropic.ROUTES,
    *infill.ROUTES,
    *ollama.ROUTES,
    *ollama_models.ROUTES,
    *metrics.ROUTES,
)

ROUTES = (*API_ROUTES, make_route(API_ROUTES))

LONG_BODIES = 16
"""So many of the longest bodies may be read at a time."""


def build_app(service: Service, routes: Sequence[Route] = ROUTES) -> App:
    """The ASGI application that serves `service`."""
    config = service.config
    room = BodyRoom(LONG_BODIES * config.max_body_bytes)
    table = RouteTable((route, Endpoint(service, route, room)) for route in routes)
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
