"""/v1/batches: files of requests that are answered when nobody else waits.

Owns the shapes of batches, what of a request for one is checked, and the way of a row to the route that answers it: as
a request of whoever made the batch, without a socket and in the background. The states of batches and the work on them
are `mooli.server.batch_desk`'s, files `mooli.server.openai_files`'.

Source: OpenAI API reference, batches.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from mooli.batches.rows import NOT_YET, URLS
from mooli.errors import BatchError
from mooli.server import openai_chat, openai_completions, openai_responses
from mooli.server.batch_desk import GONE, BatchDesk, BatchRecord, Rows, RowsOf
from mooli.server.http import Endpoint, asked
from mooli.server.json_body import BodyRoom
from mooli.server.keys import Key
from mooli.server.logs import REQUEST_ID
from mooli.server.openai_files import DAY_S, INPUT, desk_of, expiry_s, found_file, list_reply, owner_of, page_of
from mooli.server.routing import CLIENT, Access, Client, Dialect, HttpError, Incoming, Reply, Route
from mooli.server.service import Service

MOST_LISTED, LISTED = 100, 20

MOST_DAYS = 30
"""Of a completion window."""

MOST_PAIRS, KEY_CHARS, VALUE_CHARS = 16, 64, 512
"""Of the metadata."""

LONG_ROWS = 4
"""So many of the longest rows may be read at a time."""

_WINDOW = re.compile(r"([1-9][0-9]{0,2})([hd])")


class ExpiresAfter(msgspec.Struct):
    """When a file expires. anchor: "created_at"."""

    anchor: str
    seconds: int


class BatchBody(msgspec.Struct):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


# -- routes ------------------------------------------------------------------------------------------------------------
async def create_batch(service: Service, request: Incoming) -> Reply:
    """POST /v1/batches. Raises HttpError, RequestError, StorageError."""
    desk, body, client = desk_of(service), request.body, request.client
    if body.endpoint not in URLS:
        words = "is not supported yet" if body.endpoint in NOT_YET else "has no batches"
        raise HttpError(400, f"endpoint={body.endpoint[:80]!r} {words}: use one of {', '.join(URLS)}", param="endpoint")
    window_s = _window_s(body.completion_window)
    _check_metadata(body.metadata or {})
    expires_after_s = None
    if body.output_expires_after is not None:
        given = msgspec.structs.asdict(body.output_expires_after)
        expires_after_s = expiry_s(given, "output_expires_after")
    source = found_file(service, client, body.input_file_id, status=400, param="input_file_id")
    if source.purpose != INPUT:
        raise HttpError(
            400, f"the file {source.id} is of the purpose {source.purpose!r}, not {INPUT!r}", param="input_file_id"
        )
    config = service.engine_config
    record = await desk.create(
        source,
        key="" if client.key is None else client.key.name,
        endpoint=body.endpoint,
        completion_window=body.completion_window,
        window_s=window_s,
        seed=None if "seed" in config.preferred_sampling else config.random_seed,
        metadata=body.metadata,
        output_expires_after_s=expires_after_s,
    )
    return Reply(batch_object(desk, record))


def _window_s(given: str) -> float:
    """Raises HttpError."""
    match = _WINDOW.fullmatch(given)
    days = 0.0 if match is None else int(match[1]) / (24 if match[2] == "h" else 1)
    if not 0 < days <= MOST_DAYS:
        raise HttpError(
            400,
            f"completion_window={given[:80]!r} must be 24h, or another number of hours or days up to {MOST_DAYS}d",
            param="completion_window",
        )
    return days * DAY_S


def _check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises HttpError."""
    if len(metadata) > MOST_PAIRS:
        raise HttpError(400, f"metadata has {len(metadata)} pairs: {MOST_PAIRS} are the most", param="metadata")
    for name, value in metadata.items():
        if len(name) > KEY_CHARS or len(value) > VALUE_CHARS:
            raise HttpError(
                400,
                f"metadata: {name[:KEY_CHARS]!r} is too long: names have at most {KEY_CHARS} characters, and values"
                f" {VALUE_CHARS}",
                param="metadata",
            )


async def list_batches(service: Service, request: Incoming) -> Reply:
    """GET /v1/batches: ?after, ?limit. Raises HttpError."""
    desk = desk_of(service)
    records = desk.of(owner_of(request.client))
    page, has_more = page_of(records, request.query, MOST_LISTED, LISTED, lambda record: record.id)
    return list_reply([batch_object(desk, record) for record in page], has_more)


async def retrieve_batch(service: Service, request: Incoming) -> Reply:
    """GET /v1/batches/{id}. Raises HttpError (404)."""
    return Reply(batch_object(desk_of(service), _found(service, request)))


async def cancel_batch(service: Service, request: Incoming) -> Reply:
    """POST /v1/batches/{id}/cancel. Raises HttpError, RequestError for one that has ended, StorageError."""
    desk, record = desk_of(service), _found(service, request)
    await desk.cancel(record)
    return Reply(batch_object(desk, record))


def _found(service: Service, request: Incoming) -> BatchRecord:
    batch_id = request.path_params["batch_id"]
    record = desk_of(service).get(owner_of(request.client), batch_id)
    if record is None:
        raise HttpError(404, f"No batch found with id {batch_id[:80]!r}.", param="id")
    return record


def batch_object(desk: BatchDesk, record: BatchRecord) -> dict[str, Any]:
    """As the API shows it."""
    total, completed, failed = desk.counts(record)
    times = {
        f"{status}_at": int(record.times[status]) if status in record.times else None
        for status in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    }
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "errors": {"object": "list", "data": record.errors} if record.errors else None,
        "input_file_id": record.input_file_id,
        "completion_window": record.completion_window,
        "status": record.status,
        "output_file_id": record.output_file_id,
        "error_file_id": record.error_file_id,
        "created_at": int(record.created_at),
        "expires_at": int(record.expires_at),
        **times,
        "request_counts": {"total": total, "completed": completed, "failed": failed},
        "metadata": record.metadata,
    }


# -- rows --------------------------------------------------------------------------------------------------------------
def settings_of(service: Service) -> dict[str, Any]:
    """What a batch must be gone on with as it was begun."""
    return {"model": service.model_name}


def rows_of(service: Service) -> RowsOf:
    """What answers the rows of batches, as requests of whoever made them."""
    room = BodyRoom(LONG_ROWS * service.config.max_body_bytes)
    routes = (*openai_chat.ROUTES, *openai_completions.ROUTES, *openai_responses.ROUTES)
    endpoints = {
        route.path: Endpoint(service, route, room) for route in routes if route.path in URLS and "POST" in route.methods
    }

    def client_of(record: BatchRecord) -> Client | None:
        key = service.keys.named(record.key) if record.key else Key(tenant=record.owner)
        return None if key is None else Client(key=key, is_background=True)

    def find(record: BatchRecord) -> Rows | None:
        client = client_of(record)
        if client is None or client.key is None:
            return None

        async def send(url: str, body: dict[str, Any]) -> tuple[int, Any]:
            client = client_of(record)
            if client is None:
                raise BatchError(GONE)
            REQUEST_ID.set(record.id)
            status, answer = await asked(endpoints[url], url, body, **{CLIENT: client})
            if status >= 500 and (service.client.error is not None or service.is_draining):
                await asyncio.Event().wait()  # it is no answer: whoever comes next gives one
            return status, msgspec.json.decode(answer)

        return Rows(send, client.key.max_sequences or sys.maxsize)

    return find


def _route(path: str, method: str, handler: Any, summary: str, **fields: Any) -> Route:
    return Route(
        path=path, methods=(method,), handler=handler, access=Access.KEY, dialect=Dialect.OPENAI, summary=summary,
        **fields,
    )  # fmt: skip


ROUTES = (
    _route("/v1/batches", "POST", create_batch, "Have the rows of a file answered", body=BatchBody),
    _route("/v1/batches", "GET", list_batches, "Your batches"),
    _route("/v1/batches/{batch_id}", "GET", retrieve_batch, "How far a batch is"),
    _route("/v1/batches/{batch_id}/cancel", "POST", cancel_batch, "End a batch, and keep what was answered"),
)
