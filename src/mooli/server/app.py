"""The whole ASGI application: every route, behind what protects it.

Owns which modules bring routes, and the order of the layers: what is kept of each request, cross-origin rules, keys,
web pages, limits, routes. Never answers anything itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.middleware.cors import CORSMiddleware

from mooli.server import (
    anthropic,
    metrics,
    native_control,
    native_generate,
    native_info,
    openai_chat,
    openai_completions,
    openai_models,
    openapi,
)
from mooli.server.asgi import App
from mooli.server.auth import KeyCheck
from mooli.server.http import Endpoint
from mooli.server.limits import Admission, BodyRoom
from mooli.server.route_table import RouteTable
from mooli.server.routing import Route
from mooli.server.traffic import Traffic
from mooli.server.web_pages import PageCheck

if TYPE_CHECKING:
    from mooli.server.service import Service

API_ROUTES: tuple[Route, ...] = (
    *native_generate.ROUTES,
    *native_info.ROUTES,
    *native_control.ROUTES,
    *openai_models.ROUTES,
    *openai_completions.ROUTES,
    *openai_chat.ROUTES,
    *anthropic.ROUTES,
    *metrics.ROUTES,
)

ROUTES = (*API_ROUTES, openapi.make_route(API_ROUTES))

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
