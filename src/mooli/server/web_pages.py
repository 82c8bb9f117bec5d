"""What web pages in a user's browser may do to a server that their user can reach, and they cannot.

Owns three refusals. Without an API key nothing else tells a page's requests from its user's, so:

- **A page whose host name was made to point here** (DNS rebinding) is same-origin for its browser, and would read every
  answer. Its requests show that name in Host. Taken are only hosts whose name no stranger can own: addresses, which
  need no name; localhost; the name of this machine; what `--host` and `--allowed-hosts` say. A server that listens
  beyond the loopback interface takes names of private networks too, single words among them (mooli, gpu.local): who
  can give such a name is in that network, and needs no browser to call the server.
- **A page of another origin** may send requests, though it may not read the answers. Refused is an Origin that is
  neither the server's own nor one of `--cors-allow-origins`, and what the browser calls cross-site.
- Not every browser sends those headers with a GET or a form. So what changes the server, and needs no JSON body, is a
  POST with a header that browsers do not send to another origin without asking it first.

With an API key the name is not asked for, so that users behind proxies need no second setting: a page does not know the
key, and what is open without one is open to everybody. For the same reason a request that brings a key may come from
anywhere: no page can add it to a request unless CORS allowed that page.

Sources: Fetch standard (Origin; CORS-safelisted request-headers), Fetch Metadata (Sec-Fetch-Site), URL standard (a host
whose last label is a number is an address), RFC 6761 and 6762, RFC 8375, ICANN's reservation of .internal.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence

from mooli.server.asgi import CLIENT, App, Receive, Scope, Send
from mooli.server.config import ServerConfig
from mooli.server.errors import Problem, error_reply
from mooli.server.keys import KeyRing
from mooli.server.route_table import RouteTable
from mooli.server.routing import Access, Dialect, Route

OWN_HEADER = "X-Mooli"
"""Any value of it shows that no page has sent the request unasked."""

_PRIVATE = (".internal", ".local", ".localhost", ".home.arpa")

_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")

_DEFAULT_PORTS = {"http": ":80", "https": ":443"}

_SHOWN_CHARS = 100


class PageCheck:
    """ASGI middleware, behind `KeyCheck`: refuses what a page may have sent without its user's knowledge (403)."""

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
        problem = self._host_problem(hosts) or self._origin_problem(scope, hosts) or _form_problem(scope, route)
        if problem is None:
            await self._app(scope, receive, send)
            return
        for message in error_reply(Dialect.OPENAI if route is None else route.dialect, problem):
            await send(message)

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

    def _origin_problem(self, scope: Scope, hosts: Sequence[str]) -> Problem | None:
        if "*" in self._origins:
            return None
        origins = _values(scope, b"origin")
        if origins and all(origin in self._origins for origin in origins):
            return None
        foreign = next((origin for origin in origins if not _is_own(origin, hosts)), None)
        if foreign is None and "cross-site" not in _values(scope, b"sec-fetch-site"):
            return None
        whose = "of another site" if foreign is None else f"of {foreign[:_SHOWN_CHARS]!r}"
        return Problem(
            403,
            f"Web pages {whose} may not call this server without a key: name their origin in --cors-allow-origins",
            code="origin_not_allowed",
        )


def _form_problem(scope: Scope, route: Route | None) -> Problem | None:
    """With a JSON body no more need be asked: its content type is such a header."""
    if route is None or route.access is not Access.ADMIN or (route.body is not None and route.needs_body):
        return None
    if scope["method"] == "POST":
        media_types = {value.partition(";")[0].strip() for value in _values(scope, b"content-type")}
        if media_types == {"application/json"} or _values(scope, OWN_HEADER.lower().encode()):
            return None
    return Problem(
        403,
        f"Without a key {route.path} takes only a POST with the header '{OWN_HEADER}: 1' or with 'Content-Type:"
        " application/json', as no web page sends it unasked.",
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
