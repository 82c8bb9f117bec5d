"""Who may call what.

Owns the check of keys, in front of everything else. What the route table does not call open needs a key, paths that do
not exist included. Tells what is behind it who sends a request. Never says which keys there are, nor which routes.

Sources: RFC 6750 (bearer tokens), RFC 9110 section 11.6.1 (WWW-Authenticate).
"""

from __future__ import annotations

from mooli.server.asgi import CLIENT, App, Receive, Scope, Send
from mooli.server.errors import Problem, error_reply
from mooli.server.keys import Key, KeyRing
from mooli.server.route_table import RouteTable
from mooli.server.routing import Access, Client, Dialect

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
            dialect = Dialect.OPENAI if route is None else route.dialect
            problem = Problem(401, UNAUTHORIZED, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            for message in error_reply(dialect, problem):
                await send(message)
            return
        await self._app(scope, receive, send)

    def _admits(self, key: Key | None, access: Access) -> bool:
        if access is Access.ADMIN:
            return not self._keys.asks_admins or (key is not None and key.is_admin)
        return access is Access.OPEN or not self._keys.asks_users or key is not None
