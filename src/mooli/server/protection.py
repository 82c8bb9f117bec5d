"""What stands in front of all routes: who may call what, what web pages may do, how much is taken at once.

Owns the refusals that need no look at the body; each is a layer around the next, in the order of this file. Limits of a
single request are in `mooli.server.http`, those of what it asks for in the frontend's input rules.

- `KeyCheck`: what the route table does not call open needs a key, paths that do not exist included. It tells what is
  behind it who sends a request, and nobody which keys or routes there are.
- `PageCheck`: what pages in a user's browser may do to a server that their user can reach, and they cannot.
- `Admission`: no more at a time than limits allow, and nothing new while the server drains.

Sources: RFC 6750 (bearer tokens), RFC 9110 section 11.6.1 (WWW-Authenticate); Fetch standard (Origin; CORS-safelisted
request-headers), Fetch Metadata (Sec-Fetch-Site), URL standard (a host whose last label is a number is an address),
RFC 6761 and 6762, RFC 8375, ICANN's reservation of .internal.
"""

from __future__ import annotations

import collections
import re
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mooli.server.config import ServerConfig
from mooli.server.errors import RETRY_AFTER_S, Problem, error_reply
from mooli.server.http import RouteTable
from mooli.server.keys import Key, KeyRing, given_keys
from mooli.server.routing import CLIENT, Access, App, Client, Dialect, Receive, Route, Scope, Send

if TYPE_CHECKING:
    from mooli.server.service import Service

UNAUTHORIZED = "Unauthorized: send the key as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."


class KeyCheck:
    """ASGI middleware: lets a request through to `app` if it has the key its route asks for.

    Without any key everything is open. Admin routes ask for an admin's key, which opens what a user's key does too.
    """

    def __init__(self, app: App, table: RouteTable, keys: KeyRing) -> None:
        self._app = app
        self._table = table
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._table.route_of(scope)
        key = self._keys.find(scope["headers"]) if self._keys.asks_admins else None
        address = scope.get("client")
        scope[CLIENT] = Client(address=address[0] if address else "", key=key)
        if not self._admits(key, Access.KEY if route is None else route.access):
            problem = Problem(401, UNAUTHORIZED, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            await _refuse(send, route, problem)
            return
        await self._app(scope, receive, send)

    def _admits(self, key: Key | None, access: Access) -> bool:
        if access is Access.ADMIN:
            return not self._keys.asks_admins or (key is not None and key.is_admin)
        return access is Access.OPEN or not self._keys.asks_users or key is not None


OWN_HEADER = "X-Mooli"
"""Any value of it shows that no page has sent the request unasked."""

QUOTED_JSON = "'Content-Type: application/json'"

_PRIVATE = (".internal", ".local", ".localhost", ".home.arpa")

_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")

_DEFAULT_PORTS = {"http": ":80", "https": ":443"}

_SHOWN_CHARS = 100


class PageCheck:
    """ASGI middleware, behind `KeyCheck`: refuses what a page may have sent without its user's knowledge (403).

    Three refusals. Without an API key nothing else tells a page's requests from its user's, so:

    - **A page whose host name was made to point here** (DNS rebinding) is same-origin for its browser, and would read
      every answer. Its requests show that name in Host. Taken are only hosts whose name no stranger can own: addresses,
      which need no name; localhost; the name of this machine; what `--host` and `--allowed-hosts` say. A server that
      listens beyond the loopback interface takes names of private networks too, single words among them (mooli,
      gpu.local): who can give such a name is in that network, and needs no browser to call the server.
    - **A page of another origin** may send requests, though it may not read the answers. Refused is an Origin that is
      neither the server's own nor one of `--cors-allow-origins`, and what the browser calls cross-site. A link may
      lead to the page that this server itself shows: it is the same for everybody, and no other page can frame it.
    - Not every browser sends those headers with a GET or a form. So what changes the server, and needs no JSON body, is
      a POST with a header that browsers do not send to another origin without asking it first. For an upload that is
      also the key that OpenAI's clients always send, whatever it is.

    With an API key the name is not asked for, so that users behind proxies need no second setting: a page does not know
    the key, and what is open without one is open to everybody. For the same reason a request that brings a key may come
    from anywhere: no page can add it to a request unless CORS allowed that page.
    """

    def __init__(self, app: App, table: RouteTable, config: ServerConfig, keys: KeyRing) -> None:
        self._app = app
        self._table = table
        self._keys = keys
        self._origins = config.cors_origins
        self._hosts = {"localhost", _name(socket.gethostname()), _name(config.host), *map(_name, config.host_names)}
        self._takes_any_host = "*" in config.host_names
        self._takes_private_names = not config.is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope[CLIENT].key is not None:
            await self._app(scope, receive, send)
            return
        route = self._table.route_of(scope)
        hosts = _values(scope, b"host")
        problem = self._host_problem(hosts) or self._origin_problem(scope, route, hosts) or _form_problem(scope, route)
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await _refuse(send, route, problem)

    def _host_problem(self, hosts: Sequence[str]) -> Problem | None:
        if self._keys.asks_users or self._takes_any_host:
            return None
        unknown = next((host for host in hosts if not self._is_ours(_name(host))), None)
        if unknown is None:
            return None
        name = _name(unknown)[:_SHOWN_CHARS]
        return Problem(
            403,
            f"This server is not known as {name!r}: call it by its address, or have it started with an API key or with"
            f" --allowed-hosts {name}",
            code="host_not_allowed",
        )

    def _is_ours(self, name: str) -> bool:
        if name in self._hosts or not name or name.startswith("["):
            return True
        if _NUMBER.fullmatch(name.rpartition(".")[2]):
            return True
        return self._takes_private_names and ("." not in name or name.endswith(_PRIVATE))

    def _origin_problem(self, scope: Scope, route: Route | None, hosts: Sequence[str]) -> Problem | None:
        if "*" in self._origins:
            return None
        origins = _values(scope, b"origin")
        if origins and all(origin in self._origins for origin in origins):
            return None
        foreign = next((origin for origin in origins if not _is_own(origin, hosts)), None)
        if foreign is None and "cross-site" not in _values(scope, b"sec-fetch-site"):
            return None
        if (
            foreign is None
            and route is not None
            and route.is_page
            and _values(scope, b"sec-fetch-dest") == ["document"]
        ):
            return None
        whose = "of another site" if foreign is None else f"of {foreign[:_SHOWN_CHARS]!r}"
        return Problem(
            403,
            f"Web pages {whose} may not call this server without a key: name their origin in --cors-allow-origins",
            code="origin_not_allowed",
        )


def _form_problem(scope: Scope, route: Route | None) -> Problem | None:
    """With a JSON body no more need be asked: its content type is such a header."""
    if route is None or (route.body is not None and route.needs_body):
        return None
    is_upload = route.reads_stream is not None
    if route.access is not Access.ADMIN and not is_upload:
        return None
    if is_upload and any(given_keys(scope["headers"])):
        return None
    if scope["method"] == "POST":
        media_types = {value.partition(";")[0].strip() for value in _values(scope, b"content-type")}
        if media_types == {"application/json"} or _values(scope, OWN_HEADER.lower().encode()):
            return None
    return Problem(
        403,
        f"Without a key {route.path} takes only a POST with the header '{OWN_HEADER}: 1' or with"
        f" {'any key' if is_upload else QUOTED_JSON}, as no web page sends it unasked.",
        code="own_header_needed",
    )


def _values(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1").strip().lower() for name, value in scope["headers"] if name == wanted]


def _name(host: str) -> str:
    """Without its port, and without the dot that may end a name. Addresses of IPv6 keep their bracket."""
    return host.lower() if host.startswith("[") else host.lower().partition(":")[0].removesuffix(".")


def _is_own(origin: str, hosts: Sequence[str]) -> bool:
    """Whether a page of `origin` came from this server. TLS may end in front of it, so the scheme says nothing."""
    scheme, _, address = origin.partition("://")
    port = _DEFAULT_PORTS.get(scheme, "")
    return any(address.removesuffix(port) == host.removesuffix(port) for host in hosts if host)


async def _refuse(send: Send, route: Route | None, problem: Problem) -> None:
    for message in error_reply(Dialect.OPENAI if route is None else route.dialect, problem):
        await send(message)


DRAINING_RETRY_S = 5
"""About the time until another server, or this one started anew, answers."""

SHUTTING_DOWN = "The server is shutting down."

MAX_PROBES = 256
"""Requests to one open route at a time: more is no probing."""

ALL_OTHERS = ""
"""Stands for the path of routes that are counted together."""


class Admission:
    """ASGI middleware: refuses what would be more than `max_concurrent_requests` of the server or of a key at a time
    (429), and new generations while the server drains (503). Probes, open to anybody, are counted apart, each kind for
    itself: a busy server is not a dead one, whatever strangers ask of it."""

    def __init__(self, table: RouteTable, service: Service) -> None:
        self._table = table
        self._service = service
        self._num_running: collections.Counter[str] = collections.Counter()
        """By the path of an open route, of all others together under ALL_OTHERS."""
        self._num_of: collections.Counter[str] = collections.Counter()
        """By the name of the key, probes left out."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._table.route_of(scope)
        kind = route.path if route is not None and route.access is Access.OPEN else ALL_OTHERS
        key = scope[CLIENT].key if kind == ALL_OTHERS else None
        problem = self._problem(route, kind) or self._key_problem(key)
        if problem is not None:
            await _refuse(send, route, problem)
            return
        name = "" if key is None else key.name
        self._num_running[kind] += 1
        self._num_of[name] += 1
        try:
            await self._table(scope, receive, send)
        finally:
            self._num_running[kind] -= 1
            self._num_of[name] -= 1

    def _problem(self, route: Route | None, kind: str) -> Problem | None:
        if route is not None and route.is_generation and self._service.is_draining:
            headers = {"Retry-After": str(DRAINING_RETRY_S), "Connection": "close"}
            return Problem(503, SHUTTING_DOWN, code="shutting_down", headers=headers)
        most = self._service.config.max_concurrent_requests if kind == ALL_OTHERS else MAX_PROBES
        if self._num_running[kind] < most:
            return None
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return Problem(429, f"The server is answering {most} requests already.", code="busy", headers=headers)

    def _key_problem(self, key: Key | None) -> Problem | None:
        if key is None or key.max_concurrent_requests is None:
            return None
        if self._num_of[key.name] < key.max_concurrent_requests:
            return None
        return Problem(
            429,
            f"This key may have {key.max_concurrent_requests} requests in progress at a time, and has them: try again"
            " when one of them has ended.",
            code="key_busy",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )
