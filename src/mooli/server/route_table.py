"""Which route a request is for.

Owns the table of all routes and the answers to requests that fit none. Never checks who asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from starlette.routing import compile_path

from mooli.errors import ConfigError
from mooli.server.asgi import App, Receive, Scope, Send
from mooli.server.errors import Problem, error_reply
from mooli.server.routing import Dialect, Route


class RouteTable:
    """ASGI application: hands a request to the application of its route, or answers 404 or 405.

    Paths are exact, but for `{name}` and `{name:path}` as Starlette reads them.
    Raises ConfigError where two routes claim the same path and method.
    """

    def __init__(self, entries: Iterable[tuple[Route, App]]) -> None:
        """entries: routes, each with its ASGI application."""
        self._entries = list(entries)
        self._exact: dict[str, dict[str, int]] = {}
        self._patterns: list[tuple[Any, Mapping[str, Any], dict[str, int]]] = []
        by_path: dict[str, dict[str, int]] = {}
        for index, (route, _) in enumerate(self._entries):
            methods = by_path.setdefault(route.path, {})
            for method in route.methods:
                if method in methods:
                    raise ConfigError(f"two routes claim {method} {route.path}")
                methods[method] = index
        for path, methods in by_path.items():
            if "GET" in methods:
                methods.setdefault("HEAD", methods["GET"])
            if "{" in path:
                regex, _, convertors = compile_path(path)
                self._patterns.append((regex, convertors, methods))
            else:
                self._exact[path] = methods

    def __iter__(self) -> Iterator[Route]:
        return (route for route, _ in self._entries)

    def route_of(self, scope: Scope) -> Route | None:
        """The route that will answer, None if there is none."""
        methods, _ = self._methods(scope)
        index = methods.get(scope["method"])
        return None if index is None else self._entries[index][0]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        methods, path_params = self._methods(scope)
        index = methods.get(scope["method"])
        if index is not None:
            scope["path_params"] = path_params
            await self._entries[index][1](scope, receive, send)
            return
        if methods:
            allowed = ", ".join(sorted(methods))
            problem = Problem(
                405, f"{_path(scope)} takes {allowed}, not {scope['method']}.", headers={"Allow": allowed}
            )
        else:
            problem = Problem(404, f"There is no {_path(scope)} here.", code="unknown_url")
        for message in error_reply(Dialect.OPENAI, problem):
            await send(message)

    def _methods(self, scope: Scope) -> tuple[Mapping[str, int], dict[str, Any]]:
        """What the path of a request takes, by method, and the values in the path."""
        path = _path(scope)
        exact = self._exact.get(path)
        if exact is not None:
            return exact, {}
        for regex, convertors, methods in self._patterns:
            match = regex.match(path)
            if match:
                return methods, {name: convertors[name].convert(value) for name, value in match.groupdict().items()}
        return {}, {}


def _path(scope: Scope) -> str:
    """Without the root path, which the server puts in front of it (ASGI 3.0)."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path
