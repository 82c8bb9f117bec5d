"""Keys: what needs which, on every route there is; and what pages of other origins may do."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace

import pytest
from route_server import Counts, message_of, post

from mooli.errors import ConfigError
from mooli.server.app import ROUTES, build_app
from mooli.server.config import ServerConfig
from mooli.server.http import RouteTable
from mooli.server.keys import KeyRing
from mooli.server.routing import Access, Dialect, Reply

OPEN_PATHS = {
    "/health", "/health_generate", "/health/live", "/health/ready", "/ready", "/metrics",
    "/", "/docs", "/page/{version}/{name}",
}  # fmt: skip


async def answer(service=None, request=None) -> Reply:
    return Reply("reached")


EVERY_ROUTE = [
    post(route.path, answer, methods=route.methods, access=route.access, dialect=route.dialect) for route in ROUTES
]
"""The real table, with handlers that only say that they were reached."""


def calls():
    """Each way to call each route, with who may."""
    for route in ROUTES:
        path = re.sub(r"\{.*?\}", "x", route.path)
        for method in route.methods:
            yield method, path, route.access


def test_only_probes_metrics_and_the_page_are_open():
    assert {route.path for route in ROUTES if route.access is Access.OPEN} == OPEN_PATHS


@pytest.mark.parametrize("root", ["", "/llm"])
@pytest.mark.parametrize(
    ("key", "admin_key", "given", "admitted"),
    [
        (None, None, None, {Access.OPEN, Access.KEY, Access.ADMIN}),
        ("user", None, None, {Access.OPEN}),
        ("user", None, "wrong", {Access.OPEN}),
        ("user", None, "", {Access.OPEN}),
        ("user", None, "use", {Access.OPEN}),
        ("user", None, "users", {Access.OPEN}),
        ("user", None, "usér", {Access.OPEN}),
        ("user", None, "user", {Access.OPEN, Access.KEY, Access.ADMIN}),
        ("user", "admin", None, {Access.OPEN}),
        ("user", "admin", "user", {Access.OPEN, Access.KEY}),
        ("user", "admin", "admin", {Access.OPEN, Access.KEY, Access.ADMIN}),
        (None, "admin", None, {Access.OPEN, Access.KEY}),
        (None, "admin", "admin", {Access.OPEN, Access.KEY, Access.ADMIN}),
    ],
)
def test_every_route_asks_for_its_key(key, admin_key, given, admitted, root):
    config = ServerConfig.from_kwargs(api_key=key, admin_api_key=admin_key, fastapi_root_path=root)
    service = SimpleNamespace(config=config, metrics=Counts(), is_draining=False, keys=KeyRing(config))
    app = build_app(service, EVERY_ROUTE)
    headers = [] if given is None else [(b"authorization", f"Bearer {given}".encode())]

    async def walk() -> dict[tuple[str, str], int]:
        return {(method, path): await status_of(app, method, root, path, headers) for method, path, _ in calls()}

    wanted = {(method, path): 200 if access in admitted else 401 for method, path, access in calls()}
    if given is None and Access.ADMIN in admitted:  # see test_web_pages
        wanted |= {(method, path): 403 for method, path, access in calls() if access is Access.ADMIN}
    assert asyncio.run(walk()) == wanted


async def status_of(app, method: str, root: str, path: str, headers: list[tuple[bytes, bytes]]) -> int:
    """Of the application's answer, called as uvicorn calls it."""
    sent = []
    left = asyncio.Event()

    async def receive():
        await left.wait()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": root + path, "root_path": root, "headers": headers,
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer user"}, 200),
        ({"Authorization": "bearer  user"}, 200),
        ({"x-api-key": "user"}, 200),
        ({"X-API-Key": "wrong", "Authorization": "Bearer user"}, 200),
        ({"Authorization": "user"}, 401),
        ({"Authorization": "Basic user"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"api-key": "user"}, 401),
        ({"Cookie": "api_key=user"}, 401),
    ],
)
def test_a_key_is_a_bearer_token_or_an_api_key_header(serve, headers, status):
    server = serve(*EVERY_ROUTE, api_key="user")
    assert server.http.get("/v1/models", headers=headers).status_code == status


def test_a_key_in_the_address_does_not_count(serve):
    assert serve(*EVERY_ROUTE, api_key="user").http.get("/v1/models?api_key=user").status_code == 401


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing"),
        ("POST", "/health"),
        ("GET", "/healthy"),
        ("GET", "/health/"),
        ("GET", "//health"),
        ("GET", "/metrics/../v1/models"),
        ("GET", "/ready/%2e%2e/v1/models"),
        ("GET", "/HEALTH"),
        ("OPTIONS", "/generate"),
        ("DELETE", "/generate"),
        ("PROPFIND", "/v1/models"),
    ],
)
def test_what_is_no_route_needs_a_key_before_it_is_unknown(serve, method, path):
    server = serve(*EVERY_ROUTE, api_key="user")
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n"
    with server.connect() as client:
        client.send(f"{head}\r\n".encode())
        assert client.read_until(b"\r\n").startswith(b"HTTP/1.1 401 ")
    with server.connect() as client:
        client.send(f"{head}x-api-key: user\r\n\r\n".encode())
        assert client.read_until(b"\r\n").split()[1] in (b"404", b"405")


@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_refusal_is_in_the_routes_words(serve, dialect):
    async def handler(service, request) -> Reply:
        return Reply("reached")

    answer = serve(post("/route", handler, dialect=dialect), api_key="a-secret").http.post("/route")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert message_of(answer).startswith("Unauthorized")
    assert "a-secret" not in answer.text
    if dialect is Dialect.OPENAI:
        assert answer.json()["error"]["code"] == "invalid_api_key"
    if dialect is Dialect.ANTHROPIC:
        assert answer.json()["error"]["type"] == "authentication_error"


def test_a_body_without_a_key_is_not_read(serve):
    server = serve(*EVERY_ROUTE, api_key="user")
    head = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    with server.connect() as client:
        assert client.send(head).read_until(b"\r\n").startswith(b"HTTP/1.1 401 ")
    assert server.counts.requests == [("/generate", "POST")]


def test_two_routes_for_one_call_are_a_mistake():
    with pytest.raises(ConfigError, match="two routes claim POST /a"):
        RouteTable([(post("/a", answer), answer), (post("/a", answer), answer)])


# -- cross-origin rules ------------------------------------------------------------------------------------------------
PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


def test_pages_of_other_origins_are_told_nothing_by_default(serve):
    server = serve(*EVERY_ROUTE)
    asked = server.http.options("/generate", headers=PREFLIGHT)
    done = server.http.get("/v1/models", headers={"Origin": "https://page.example"})
    assert asked.status_code == done.status_code == 403
    assert not any(name.startswith("access-control") for answer in (asked, done) for name in answer.headers)


@pytest.mark.parametrize("allowed", ["*", "https://page.example", "http://localhost:3000, https://page.example"])
def test_allowed_pages_may_call_with_a_key(serve, allowed):
    server = serve(*EVERY_ROUTE, api_key="user", cors_allow_origins=allowed)
    asked = server.http.options("/generate", headers=PREFLIGHT)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] in ("*", "https://page.example")
    assert "authorization" in asked.headers["access-control-allow-headers"].lower()
    without = server.http.post("/generate", headers={"Origin": "https://page.example"})
    assert without.status_code == 401
    assert without.headers["access-control-allow-origin"] in ("*", "https://page.example")
    key = {"Origin": "https://page.example", "Authorization": "Bearer user"}
    assert server.http.post("/generate", headers=key).status_code == 200


def test_other_pages_than_the_allowed_may_not(serve):
    server = serve(*EVERY_ROUTE, cors_allow_origins="https://good.example")
    asked = server.http.options("/generate", headers=PREFLIGHT)
    assert asked.status_code == 400
    assert "access-control-allow-origin" not in asked.headers
