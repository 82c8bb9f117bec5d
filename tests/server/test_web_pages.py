"""What pages in a browser may do: by a name that was made to point here, from another origin, with a form or a link."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
import httpx
import pytest
from fake_engine import says
from route_server import message_of, post

from mooli.bench.client import ServerContact
from mooli.server.app import ROUTES
from mooli.server.routing import Access, Dialect, Reply


async def answer(service, request) -> Reply:
    return Reply("reached")


EVERY_ROUTE = [
    post(route.path, answer, methods=route.methods, access=route.access, dialect=route.dialect) for route in ROUTES
]
"""The real table, with handlers that only say that they were reached."""

POSTS_WITH_AN_ID = {"/v1/batches/{batch_id}/cancel"}
"""Without a JSON body; nobody guesses such an id."""

SAFE = {"allowed_hosts": None}
"""What a server is without being told anything."""


@pytest.fixture(autouse=True)
def _name_of_this_machine(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Gpu7.Lab.Example")


def status(server, method="GET", path="/v1/models", **headers: str) -> int:
    return server.http.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}).status_code


# -- names -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "host",
    [
        "localhost", "localhost:30000", "LOCALHOST", "localhost.", "127.0.0.1", "127.0.0.1:1", "127.1.2.3", "[::1]",
        "[::1]:30000", "10.1.2.3", "192.168.0.7:80", "[fe80::1]", "2130706433", "0x7f000001", "127.1", "",
    ],
)  # fmt: skip
def test_an_address_and_localhost_are_always_this_server(serve, host):
    assert status(serve(*EVERY_ROUTE, **SAFE), Host=host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:30000", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example.",
        "localhostevil", "evil.local", "evil.localhost", "xlocalhost", "1.example", "a",
    ],
)  # fmt: skip
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/v1/messages"), ("GET", "/metrics")])
def test_a_name_that_was_made_to_point_here_reads_nothing(serve, host, method, path):
    server = serve(*EVERY_ROUTE, **SAFE)
    reply = server.http.request(method, path, headers={"Host": host})
    assert reply.status_code == 403
    assert "reached" not in reply.text
    assert "--allowed-hosts" in reply.json()["error"]["message"]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_no_route_is_left_out(serve, route):
    server = serve(*EVERY_ROUTE, **SAFE)
    path = route.path.replace("{model_id:path}", "x")
    assert status(server, route.methods[0], path, Host="evil.example") == 403
    assert status(server, "GET", "/nothing", Host="evil.example") == 403


def test_one_wrong_name_of_two_is_enough(serve):
    with serve(*EVERY_ROUTE, **SAFE).connect() as client:
        client.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert client.read_until(b"\r\n").split()[1] in (b"400", b"403")


def test_this_machine_goes_by_its_own_name(serve):
    server = serve(*EVERY_ROUTE, **SAFE)
    assert status(server, Host="gpu7.lab.example:30000") == 200
    assert status(server, Host="gpu8.lab.example:30000") == 403


@pytest.mark.parametrize("host", ["mooli", "mooli:30000", "gpu.local", "llm.corp.internal", "box.home.arpa"])
def test_a_server_for_others_goes_by_private_names(serve, host):
    assert status(serve(*EVERY_ROUTE, **SAFE, host="0.0.0.0"), Host=host) == 200


@pytest.mark.parametrize("host", ["evil.example", "local.example", "internal.evil.example", "evillocal.example"])
def test_a_server_for_others_does_not_go_by_public_names(serve, host):
    assert status(serve(*EVERY_ROUTE, **SAFE, host="0.0.0.0"), Host=host) == 403


def test_the_name_that_is_listened_on_is_this_server(serve):
    server = serve(*EVERY_ROUTE, **SAFE, host="llm.example.com")
    assert status(server, Host="llm.example.com:30000") == 200


def test_allowed_hosts_are_this_server_too(serve):
    server = serve(*EVERY_ROUTE, allowed_hosts="llm.example, Other.Example")
    names = {
        host: status(server, Host=host) for host in ("llm.example:80", "other.example", "x.llm.example", "localhost")
    }
    assert names == {"llm.example:80": 200, "other.example": 200, "x.llm.example": 403, "localhost": 200}
    assert status(serve(*EVERY_ROUTE, allowed_hosts="*"), Host="anything.example") == 200


def test_with_a_key_the_name_does_not_matter(serve):
    server = serve(*EVERY_ROUTE, **SAFE, api_key="user")
    assert status(server, Host="llm.example", Authorization="Bearer user") == 200
    assert status(server, Host="llm.example") == 401
    assert status(server, path="/health", Host="llm.example") == 200


def test_an_admins_key_alone_protects_no_chats(serve):
    server = serve(*EVERY_ROUTE, **SAFE, admin_api_key="admin")
    assert status(server, Host="evil.example") == 403
    assert status(server, Host="evil.example", Authorization="Bearer admin") == 200


# -- origins -----------------------------------------------------------------------------------------------------------
FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:1"},
    {"Origin": "chrome-extension://abc"},
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("path", ["/v1/models", "/health_generate", "/metrics", "/flush_cache", "/nothing"])
def test_a_page_of_another_origin_reaches_nothing(serve, headers, path):
    server = serve(*EVERY_ROUTE)
    assert status(server, path=path, **headers) == 403
    assert status(server, "POST", path, X_Mooli="1", **headers) == 403


def test_a_server_with_a_key_lets_pages_see_no_more(serve):
    server = serve(*EVERY_ROUTE, api_key="user")
    for headers in FOREIGN:
        assert status(server, path="/health_generate", **headers) == 403
        assert status(server, **headers) == 401
        assert status(server, Authorization="Bearer user", **headers) == 200


@pytest.mark.parametrize("site", ["same-origin", "none", "same-site"])
@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:30000", "http://localhost:30000"),
        ("LocalHost:30000", "http://localhost:30000"),
        ("localhost", "http://localhost"),
        ("localhost:80", "http://localhost"),
        ("llm.example", "https://llm.example"),
        ("llm.example:443", "https://llm.example"),
        ("[::1]:30000", "http://[::1]:30000"),
    ],
)
def test_a_page_of_the_servers_own_may_call(serve, host, origin, site):
    assert status(serve(*EVERY_ROUTE), Host=host, Origin=origin, Sec_Fetch_Site=site) == 200


@pytest.mark.parametrize(
    ("allowed", "origin", "wanted"),
    [
        ("https://page.example", "https://page.example", 200),
        ("https://page.example", "https://other.example", 403),
        ("*", "https://other.example", 200),
    ],
)
def test_pages_that_cors_allows_may_call(serve, allowed, origin, wanted):
    server = serve(*EVERY_ROUTE, cors_allow_origins=allowed)
    assert status(server, Origin=origin, Sec_Fetch_Site="cross-site") == wanted


def test_a_link_is_no_way_around_cors(serve):
    """It brings no origin, so nobody knows whether the page is one of the allowed."""
    server = serve(*EVERY_ROUTE, cors_allow_origins="https://page.example")
    assert status(server, Sec_Fetch_Site="cross-site") == 403


@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_refusal_is_in_the_routes_words(serve, dialect):
    server = serve(post("/route", answer, methods=("GET",), dialect=dialect))
    reply = server.http.get("/route", headers={"Origin": "https://evil.example"})
    assert "https://evil.example" in message_of(reply)
    if dialect is Dialect.OPENAI:
        assert reply.json()["error"]["code"] == "origin_not_allowed"
    if dialect is Dialect.ANTHROPIC:
        assert reply.json()["error"]["type"] == "permission_error"


# -- forms and links ---------------------------------------------------------------------------------------------------
SIMPLE_TYPES = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
"""What a page may send anywhere without being asked (Fetch standard, CORS-safelisted request-headers)."""


@pytest.mark.parametrize("headers", [{}, *({"Content_Type": kind} for kind in SIMPLE_TYPES)], ids=str)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_what_a_page_can_send_unasked_changes_nothing(live, method, headers):
    """An old browser names no origin with it."""
    server = live(says("hello"))
    body = {"text": "0123456789>", "sampling_params": {"max_new_tokens": 1}}
    server.http.post("/generate", json=body)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = server.http.request(method, "/flush_cache", headers=given)
    assert reply.status_code == 403
    assert method == "HEAD" or "X-Mooli: 1" in reply.json()["error"]["message"]
    assert server.http.request(method, "/abort_request", headers=given, content=b"{}").status_code in (400, 405)
    assert server.http.post("/generate", json=body).json()["meta_info"]["cached_tokens"] == 10


@pytest.mark.parametrize("headers", [{"X-Mooli": "1"}, {"Content-Type": "application/json; charset=utf-8"}])
def test_what_a_page_cannot_send_unasked_flushes(live, headers):
    assert live().http.post("/flush_cache", headers=headers).text == "Cache flushed.\n"
    assert live().http.get("/flush_cache", headers=headers).status_code == 403


def test_our_own_benchmark_flushes(live):
    async def flush() -> None:
        async with aiohttp.ClientSession() as session:
            await ServerContact(session, live().url, print).flush_cache(1)

    asyncio.run(flush())


def test_every_route_that_changes_something_wants_json_or_the_header():
    """All others are read with a JSON body, whose content type no page sends unasked, have a method that no page sends
    unasked, name what they change by an id that no page knows, or answer questions. Uploads are in test_files."""
    without_json = {route.path for route in ROUTES if route.body is None or not route.needs_body}
    changes = {route.path for route in ROUTES if route.access is Access.ADMIN}
    assert changes & without_json == {"/flush_cache", "/v1/logs"}
    others = [route for route in ROUTES if route.path in without_json - changes and route.methods == ("POST",)]
    assert {route.path for route in others if not route.reads_stream and route.body is None} == POSTS_WITH_AN_ID
    methods = {route.methods for route in ROUTES if route.path in without_json - changes and route.body is None}
    assert methods == {("GET",), ("DELETE",), ("POST",)}


def test_a_page_behind_a_name_of_its_own_cannot_use_a_server_with_chats(live):
    """The whole way: the name points here, so that its page is same-origin for the browser."""
    server = live(says("hello"))
    port = server.http_server.port
    page = {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}", "Sec-Fetch-Site": "same-origin"}
    body = {"messages": [{"role": "user", "content": "What did my neighbour ask?"}], "max_tokens": 1}
    with httpx.Client(base_url=server.url, headers=page) as browser:
        assert browser.post("/v1/chat/completions", json=body).status_code == 403
        assert browser.get("/server_info").status_code == 403
