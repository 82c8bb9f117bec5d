"""Who may call what.

Owns the check of keys, in front of everything else. What the route table does not call open needs a key, paths that do
not exist included. Never says which keys there are, nor which routes.

Sources: RFC 6750 (bearer tokens), RFC 9110 section 11.6.1 (WWW-Authenticate).
"""

from __future__ import annotations

import hmac

from mooli.server.asgi import App, Receive, Scope, Send
from mooli.server.errors import Problem, error_reply
from mooli.server.route_table import RouteTable
from mooli.server.routing import Access, Dialect

UNAUTHORIZED = "Unauthorized: send the key as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."


class KeyCheck:
    """ASGI middleware: lets a request through to `app` if it has the key its route asks for.

    Without any key everything is open. Admin routes ask for the admin key, or for the API key if there is no admin key.
    """

    def __init__(self, app: App, table: RouteTable, *, api_key: str | None, admin_api_key: str | None) -> None:
        self._app = app
        self._table = table
        self._keys = {Access.KEY: api_key, Access.ADMIN: admin_api_key or api_key}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._table.route_of(scope)
        access = Access.KEY if route is None else route.access
        if access is not Access.OPEN and not _has(scope, self._keys[access]):
            dialect = Dialect.OPENAI if route is None else route.dialect
            problem = Problem(401, UNAUTHORIZED, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            for message in error_reply(dialect, problem):
                await send(message)
            return
        await self._app(scope, receive, send)


def _has(scope: Scope, key: str | None) -> bool:
    if key is None:
        return True
    wanted = key.encode()
    has_key = False
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, given = value.partition(b" ")
            has_key |= scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), wanted)
        elif name == b"x-api-key":
            has_key |= hmac.compare_digest(value.strip(), wanted)
    return has_key
