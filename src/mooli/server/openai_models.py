"""GET /v1/models and /v1/models/{id}: the one model that is served.

Owns the shapes of a model card: OpenAI's, and Anthropic's for who sends the header of Anthropic's clients. Sources:
OpenAI API reference, models; SGLang's `max_model_len` and `root`; Anthropic's API reference, Models.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from mooli.server.errors import error_body, problem_of
from mooli.server.routing import Access, Dialect, HttpError, Incoming, Reply, Route
from mooli.server.service import Service

ANTHROPIC_HEADER = "anthropic-version"


async def list_models(service: Service, request: Incoming) -> Reply:
    if wants_anthropic(request):
        return Reply(_anthropic_page(service, request))
    return Reply({"object": "list", "data": [_card(service)]})


def wants_anthropic(request: Incoming) -> bool:
    """Whether the client is one of Anthropic's."""
    return ANTHROPIC_HEADER in request.headers


async def retrieve_model(service: Service, request: Incoming) -> Reply:
    is_anthropic = wants_anthropic(request)
    name = request.path_params["model_id"]
    if name == service.model_name:
        return Reply(_anthropic_card(service) if is_anthropic else _card(service))
    error = HttpError(
        404,
        f"The model {name[:200]!r} does not exist; this server has {service.model_name!r}",
        param="model",
        code="model_not_found",
    )
    if not is_anthropic:
        raise error
    # The route's own dialect is OpenAI's.
    problem = problem_of(error, Dialect.ANTHROPIC, {})
    return Reply(error_body(Dialect.ANTHROPIC, problem), status=problem.status)


def _card(service: Service) -> dict[str, Any]:
    return card(service.model_name, int(service.started_at), service)


def card(name: str, created: int, service: Service | None) -> dict[str, Any]:
    """Of a model, by OpenAI's names; of one that is not loaded (None), what is known."""
    known = {"id": name, "object": "model", "created": created, "owned_by": "mooli", "root": name, "parent": None}
    if service is None:
        return known
    return known | {"root": service.engine_config.model_path, "max_model_len": service.facts.context_length}


def _anthropic_page(service: Service, request: Incoming) -> dict[str, Any]:
    """?after_id, ?before_id: nothing is on either side of the one model. A larger ?limit than 1 changes nothing."""
    is_beyond = any(request.query.get(name) == service.model_name for name in ("after_id", "before_id"))
    cards = [] if is_beyond else [_anthropic_card(service)]
    name = cards[0]["id"] if cards else None
    return {"data": cards, "has_more": False, "first_id": name, "last_id": name}


def _anthropic_card(service: Service) -> dict[str, Any]:
    return anthropic_card(service.model_name, int(service.started_at), service)


def anthropic_card(name: str, created: int, service: Service | None) -> dict[str, Any]:
    """The same by Anthropic's names."""
    known = {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
    }
    if service is None:
        return known
    most = service.facts.context_length - 1
    return known | {"max_input_tokens": most, "max_tokens": most}


ROUTES = (
    Route(
        path="/v1/models",
        methods=("GET",),
        handler=list_models,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="The model that is served",
    ),
    # Names of models have slashes.
    Route(
        path="/v1/models/{model_id:path}",
        methods=("GET",),
        handler=retrieve_model,
        access=Access.KEY,
        dialect=Dialect.OPENAI,
        summary="One model, by its name",
    ),
)
