"""GET /openapi.json: the API as an OpenAPI document, made from the route table and the types of its bodies.

Owns the document alone. Source: OpenAPI 3.1.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from mooli.server.routing import Access, Dialect, Incoming, Reply, Route
from mooli.version import __version__

if TYPE_CHECKING:
    from mooli.server.service import Service

PATH = "/openapi.json"

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string", "minLength": 1}},
        }
    },
}
"""What all dialects have in common in the body of an error."""


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
