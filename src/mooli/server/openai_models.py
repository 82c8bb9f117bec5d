"""GET /v1/models and /v1/models/{id}: the one model that is served.

Owns the shape of a model card. Source: OpenAI API reference, models; SGLang's `max_model_len` and `root`.
"""

from __future__ import annotations

from typing import Any

from mooli.server.routing import Access, Dialect, HttpError, Incoming, Reply, Route
from mooli.server.service import Service


async def list_models(service: Service, request: Incoming) -> Reply:
    return Reply({"object": "list", "data": [_card(service)]})


async def retrieve_model(service: Service, request: Incoming) -> Reply:
    name = request.path_params["model_id"]
    if name != service.model_name:
        raise HttpError(
            404,
            f"The model {name[:200]!r} does not exist; this server has {service.model_name!r}",
            param="model",
            code="model_not_found",
        )
    return Reply(_card(service))


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": int(service.started_at),
        "owned_by": "mooli",
        "root": service.engine_config.model_path,
        "parent": None,
        "max_model_len": service.facts.context_length,
    }


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
