"""The words between routes and the HTTP layer: what a route is, what its handler gets and gives back, and ASGI's types.

Owns plain data. Never reads a socket: that is `mooli.server.http`'s; what is done for a route is its module's.

Source: ASGI 3.0.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from mooli.errors import RequestError
from mooli.frontend.inputs import Caller
from mooli.server.keys import Key

if TYPE_CHECKING:
    from mooli.server.service import Service

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CLIENT = "mooli.client"
"""Where a scope says who sends the request (`mooli.server.routing.Client`)."""


class Access(enum.Enum):
    """Who may call a route. Nothing is open unless its route says so."""

    OPEN = "open"
    """Anybody: probes and metrics."""
    KEY = "key"
    """Who has the API key, if there is one."""
    ADMIN = "admin"
    """Who has an admin's key; where only --api-key is given, that is one."""


class Dialect(enum.Enum):
    """Whose error bodies and error events a route speaks."""

    NATIVE = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    OLLAMA = "ollama"


class HttpError(RequestError):
    """A request is answered with an error. param: the field that is wrong. code: a word for programs, such as
    context_length_exceeded. retry_after_s: when it is worth to try again."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


ModelName = Annotated[str, msgspec.Meta(max_length=1024)]
"""In a body. Answers repeat it, a stream in each of its chunks."""

LONG_VALUE = "(a long value)"
"""Stands in `Incoming.unsupported` for a value that is not kept."""


@dataclass(frozen=True, slots=True)
class Client:
    """Who sends a request. address: of the other end of its connection, "" where it has none. key: what it brought.
    is_background: its requests have time, and others do not wait for them. no_store: nothing of them is to be kept."""

    address: str = ""
    key: Key | None = None
    is_background: bool = False
    no_store: bool = False

    @property
    def name(self) -> str:
        """Whose share of the queue its requests take: that of the key's name, or of the address."""
        return (self.key.name if self.key is not None else "") or self.address

    @property
    def caller(self) -> Caller:
        """What `InputRules.prepare` is told of it."""
        return Caller(self.name, "" if self.key is None else self.key.tenant, self.is_background, self.no_store)


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request as its handler sees it. body: what came, as the route's `body` type (None if it has none); fields
    that the type does not have are not kept. unsupported: what came under the route's `unsupported` names.
    query: the last value of each name. stream: pieces of the body as they come, of a route that `reads_stream`.

    A handler that is long in answering lets go of it when it has read it: bodies may be large.
    """

    body: Any
    unsupported: Mapping[str, Any]
    query: Mapping[str, str]
    path_params: Mapping[str, str]
    headers: Mapping[str, str]
    client: Client
    stream: AsyncIterator[bytes] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. content: anything msgspec can write as JSON, or bytes as they are."""

    content: Any
    status: int = 200
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EventStream:
    """Server-sent events, already framed ("data: …\\n\\n"; several in one piece are fine).

    media_type: of a stream that is framed in another way, as its dialect's errors are then too.

    The first piece is awaited before the status is sent, so an error before it has its own status. A MooliError after
    that is sent as the dialect's error event, and ends the stream. When the client leaves, the iterator is closed.
    Source: WHATWG HTML, server-sent events.
    """

    pieces: AsyncIterator[bytes]
    media_type: str = "text/event-stream; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Download:
    """A file, in `pieces` of `num_bytes` bytes together. When something fails in between, the connection is cut: only
    that tells a client that the file is not whole. The iterator is closed in any case."""

    pieces: AsyncIterator[bytes]
    num_bytes: int
    media_type: str = "application/octet-stream"
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[["Service", Incoming], Awaitable["Reply | EventStream | Download"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One path. body: type of the JSON body; None: a body is neither needed nor read. Without `needs_body` an empty one
    stands for {}. unsupported: names of fields that `body` does not have, but of which the handler wants to hear.
    names: what clients of this route call an argument of `Engine.generate` or a sampling parameter, where it is another
    word; errors are told in them.
    is_watching: it looks at what a model does, and neither has one loaded for that nor keeps it from being ended.
    is_generation: it makes the engine work, so it is refused while the server drains and counts against its limits.
    reads_stream: the media type of a body that the handler reads itself (`Incoming.stream`), and bounds; None for JSON.
    is_page: what a browser shows, the same for everybody: links of other sites may lead there."""

    path: str
    methods: tuple[str, ...]
    handler: Handler
    access: Access
    dialect: Dialect
    summary: str
    body: type[msgspec.Struct] | None = None
    needs_body: bool = True
    unsupported: frozenset[str] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict)
    is_watching: bool = False
    is_generation: bool = False
    reads_stream: str | None = None
    is_page: bool = False


def sse(data: Any, *, event: str | None = None) -> bytes:
    """One framed event with `data` as JSON."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


def json_line(data: Any) -> bytes:
    """`data` as a line of JSON."""
    return msgspec.json.encode(data) + b"\n"


JSON_LINES = "application/x-ndjson"
"""Media type of a stream of such lines."""

SSE_DONE = b"data: [DONE]\n\n"
