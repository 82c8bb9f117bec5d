"""The word by which a client, a proxy and the log mean the same HTTP request: `X-Request-Id`.

Owns which of a client's words are taken, and the words drawn where there is none. Never the `rid` of the engine: one
HTTP request may hold many of these.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any

HEADER = b"x-request-id"

_KEY = "request_id"
"""In the `state` of a scope."""

_TAKEN = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
"""What may stand in a log line and a header as it is. Anything else is answered with a word of our own."""

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the HTTP request that the running task answers; empty outside of one."""


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """Of the request of `scope`: the client's word if it sent one that is taken, otherwise a new one. The same for all
    who ask, the connection and the application."""
    state = scope.setdefault("state", {})
    if _KEY not in state:
        given = [value for name, value in scope["headers"] if name == HEADER]
        is_taken = len(given) == 1 and _TAKEN.fullmatch(given[0])
        state[_KEY] = given[0].decode("ascii") if is_taken else draw()
    request_id: str = state[_KEY]
    return request_id


def draw() -> str:
    return uuid.uuid4().hex
