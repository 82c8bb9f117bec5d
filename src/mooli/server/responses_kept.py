"""Responses that are kept: to see, to delete, to go on from.

Owns which items make up a conversation that goes on, who may see what, and the routes of a response by its id. What is
kept and for how long is `mooli.server.response_store`'s. Without a store (`--enable-response-store`) all of it is
answered by saying that there is none.

Source: OpenAI API reference, responses: get, delete, list input items, conversation state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from mooli.server.response_store import ResponseStore, StoredResponse
from mooli.server.responses_items import Item
from mooli.server.routing import Access, Client, Dialect, HttpError, Incoming, Reply, Route
from mooli.server.service import Service

NOTHING_KEPT = "this server keeps no responses"
SEND_ALL = "send the whole conversation as input, its beginning is found in the cache"

Keep = Callable[[dict[str, Any]], None]
"""Told of a response that is whole."""


def _owner(client: Client) -> str:
    """Who finds a response again: the keys of one tenant, as with what is cached."""
    return client.caller.tenant


def keeper(
    service: Service, client: Client, response_id: str, items: str | list[Item], previous: str | None
) -> Keep | None:
    """What keeps a response, with its own input and what it goes on from. None where nothing is kept: of rows of a
    batch too, whose answers are in a file."""
    store, owner = service.responses, _owner(client)
    if store is None or client.is_background:
        return None
    own = msgspec.json.encode(_with_ids(items, response_id.removeprefix("resp_")))
    return lambda response: store.put(owner, response_id, StoredResponse(msgspec.json.encode(response), own, previous))


def _with_ids(items: str | list[Item], suffix: str) -> list[Item]:
    """Items as they are shown again."""
    if isinstance(items, str):
        items = [{"role": "user", "content": [{"type": "input_text", "text": items}]}]
    return [
        {**({"type": "message"} if "role" in item else {}), "id": f"in_{suffix}{index:02x}", **item}
        for index, item in enumerate(items)
    ]


async def all_items(
    service: Service, client: Client, items: str | list[Item], previous: str | None
) -> str | list[Item]:
    """The conversation that goes on and what is new of it. Raises HttpError (400) where it is not there any more, or
    has become larger than a body may be."""
    if service.responses is None or not previous:
        return items
    try:
        chain = service.responses.conversation(_owner(client), previous)
    except KeyError as exc:
        raise HttpError(
            400,
            f"Previous response with id {exc.args[0][:80]!r} not found: it was deleted, let go for others, or never"
            f" kept. Instead of previous_response_id {SEND_ALL}.",
            param="previous_response_id",
            code="previous_response_not_found",
        ) from None
    num_bytes = sum(stored.num_bytes for stored in chain)
    num_values = sum(stored.items.count(sign) for stored in chain for sign in (b",", b"{", b"["))
    if num_bytes > service.config.max_body_bytes or num_values > service.config.max_body_values:
        raise HttpError(400, "The conversation of previous_response_id is too large to go on.", param="input")
    before = await service.text_threads.run(num_bytes, lambda: _items_of(chain))
    return [*before, *_with_ids(items, "")]


def _items_of(chain: Sequence[StoredResponse]) -> list[Item]:
    """What was said in a conversation, both sides of it."""
    items: list[Item] = []
    for stored in chain:
        items += msgspec.json.decode(stored.items)
        items += msgspec.json.decode(stored.response)["output"]
    return items


def _stored(service: Service, request: Incoming) -> tuple[ResponseStore, str, StoredResponse]:
    """Where it is kept, the id in the path, and what is kept under it. Raises HttpError (404)."""
    response_id, store = request.path_params["response_id"], service.responses
    if store is None:
        raise HttpError(404, f"There is no response {response_id[:80]!r}: {NOTHING_KEPT}.")
    stored = store.get(_owner(request.client), response_id)
    if stored is None:
        raise HttpError(404, f"Response with id {response_id[:80]!r} not found.")
    return store, response_id, stored


async def retrieve_response(service: Service, request: Incoming) -> Reply:
    """GET /v1/responses/{id}. Raises HttpError (404)."""
    if request.query.get("stream") == "true":
        raise HttpError(400, "A response that is kept is whole: leave stream out.", param="stream")
    return Reply(_stored(service, request)[2].response)


async def delete_response(service: Service, request: Incoming) -> Reply:
    """DELETE /v1/responses/{id}. Raises HttpError (404)."""
    store, response_id, _ = _stored(service, request)
    store.delete(_owner(request.client), response_id)
    return Reply({"id": response_id, "object": "response", "deleted": True})


async def list_input_items(service: Service, request: Incoming) -> Reply:
    """GET /v1/responses/{id}/input_items: the conversation up to the response. ?order, ?after, ?limit as the API has
    them. Raises HttpError."""
    store, _, own = _stored(service, request)
    try:
        before = store.conversation(_owner(request.client), own.previous) if own.previous else []
    except KeyError:
        before = []  # let go
    num_bytes = sum(stored.num_bytes for stored in (*before, own))
    items = await service.text_threads.run(num_bytes, lambda: [*_items_of(before), *msgspec.json.decode(own.items)])
    order, after, limit = (request.query.get(name) for name in ("order", "after", "limit"))
    if order != "asc":
        items.reverse()
    if after is not None:
        place = next((index for index, item in enumerate(items) if item.get("id") == after), None)
        if place is None:
            raise HttpError(400, f"after={after[:80]!r} is no item of this response.", param="after")
        items = items[place + 1 :]
    if limit is not None and not re.fullmatch("[1-9][0-9]?|100", limit):
        raise HttpError(400, f"limit={limit[:80]!r} must be a number of 1 … 100.", param="limit")
    page = items[: int(limit or 20)]
    ids = [item.get("id") for item in page] or [None]
    return Reply(
        {"object": "list", "data": page, "first_id": ids[0], "last_id": ids[-1], "has_more": len(page) < len(items)}
    )


ROUTES = (
    Route(
        path="/v1/responses/{response_id}",
        methods=("GET",),
        handler=retrieve_response,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="A response that was kept",
    ),
    Route(
        path="/v1/responses/{response_id}",
        methods=("DELETE",),
        handler=delete_response,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="Let go of a response",
    ),
    Route(
        path="/v1/responses/{response_id}/input_items",
        methods=("GET",),
        handler=list_input_items,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="What led to a response that was kept",
    ),
)
