"""What goes between the ingress and the engines: a request with its body, and its answer in pieces.

Owns plain data that is sent from process to process. Never knows Ray, and never what a request asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mooli.ray.heads import Heads
from mooli.server.routing import Scope

_KEPT = ("type", "asgi", "http_version", "method", "scheme", "path", "root_path", "query_string", "headers", "client")


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One request, on its way to an engine.

    scope: what of ASGI's scope can be sent. heads: what routing goes by; None where any replica will do.
    wanted: the replica that shall answer, and no other; "" for any.
    avoid: replicas that have failed this request. failed: those that did since it was last sent.
    """

    scope: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""
    heads: Heads | None = None
    wanted: str = ""
    avoid: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an answer. status, headers: of its first piece; 0 afterwards. is_last: nothing comes behind it."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    is_last: bool


@dataclass(frozen=True, slots=True)
class Whole:
    """The answer of one replica to a question that all of them are asked."""

    replica: str
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class EngineGoneError(Exception):
    """The engine of a replica has ended, before anything was answered. Not of Mooli's tree: it goes between two of our
    processes, and no caller sees it."""

    def __init__(self, replica: str, cause: str) -> None:
        super().__init__(replica, cause)
        self.replica = replica
        self.cause = cause


def sendable(scope: Scope) -> dict[str, Any]:
    """What of a scope another process needs, as plain values."""
    kept = {name: scope[name] for name in _KEPT if name in scope}
    kept["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    kept["client"] = tuple(scope["client"]) if scope.get("client") else None
    return kept
