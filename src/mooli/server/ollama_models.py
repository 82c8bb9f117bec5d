"""Ollama's API, all but its answers: the version, the model that is served, and what there is none of here.

Owns the shapes of /api/version, /api/tags, /api/ps and /api/show, and the words in which the management of models and
embeddings are refused. Never loads, unloads or fetches a model: a server has the one that it was started with, and
every name means that one.

Source: Ollama's API documentation and the types of its Go client, of version 0.33.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec

from mooli.server.routing import Access, Dialect, Handler, HttpError, Incoming, ModelName, Reply, Route
from mooli.server.service import Service
from mooli.version import __version__

API_VERSION = "0.33.0"
"""Whose fields are spoken here. Clients compare it with the least they need; Mooli's own would mean nothing to them."""

_FOREVER = timedelta(days=36500)
"""Until a model is unloaded, which it never is."""

_FILE_TYPE = re.compile(r"(?<![A-Za-z0-9])(I?Q\d_[A-Z0-9]+(?:_[A-Z0-9]+)*|BF16|F16|F32)(?![A-Za-z0-9])", re.IGNORECASE)
"""In the name of a GGUF file, how its weights are stored."""

_PULLED = "this server has the one model that it was started with: another is served by starting it anew"

_EMBEDS = "this server has no embeddings"


class ShowBody(msgspec.Struct, kw_only=True):
    """Which model, by either name: any of them means the one that is served."""

    model: ModelName | None = None
    name: ModelName | None = None


class AnyBody(msgspec.Struct):
    """Nothing of it is read."""


def timestamp(seconds: float | None = None) -> str:
    """Now, or the time that a Unix time means."""
    moment = datetime.now(timezone.utc) if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


async def show_version(service: Service, request: Incoming) -> Reply:
    return Reply({"version": API_VERSION, "mooli": __version__})


async def list_models(service: Service, request: Incoming) -> Reply:
    return Reply({"models": [await tags_entry(service)]})


async def tags_entry(service: Service) -> dict[str, Any]:
    """What a list of models says of one."""
    return {
        **_name(service),
        "modified_at": await _modified_at(service),
        "size": service.facts.weight_bytes,
        "details": _details(service),
        "capabilities": capabilities(service),
    }


async def list_running(service: Service, request: Incoming) -> Reply:
    return Reply({"models": [running_entry(service)]})


def running_entry(service: Service) -> dict[str, Any]:
    """What a list of loaded models says of one. It never expires: the time is one that no client waits for."""
    facts = service.facts
    size = facts.weight_bytes + facts.kv_cache_bytes
    return {
        **_name(service),
        "size": size,
        "details": _details(service),
        "expires_at": timestamp((datetime.now(timezone.utc) + _FOREVER).timestamp()),
        "size_vram": 0 if service.engine_config.backend_name in ("cpu", "reference", "torch") else size,
        "context_length": facts.context_length,
    }


async def show_model(service: Service, request: Incoming) -> Reply:
    facts, family = service.facts, _family(service)
    template = None if service.tokenizer is None else service.tokenizer.chat_template
    return Reply(
        {
            "modelfile": f"FROM {service.model_name}\n",
            "parameters": "\n".join(f"{name:<30} {value}" for name, value in service.sampling_defaults.items()),
            "template": "" if template is None else template.source,
            "details": _details(service),
            "model_info": {
                "general.architecture": family,
                "general.parameter_count": facts.num_parameters,
                # Of what is served: clients cut their prompts by it.
                f"{family}.context_length": facts.context_length,
                f"{family}.vocab_size": facts.vocab_size,
            },
            "capabilities": capabilities(service),
            "modified_at": await _modified_at(service),
        }
    )


def capabilities(service: Service) -> list[str]:
    """In Ollama's words, by what is known of the model's messages and vocabulary."""
    tokenizer = service.tokenizer
    found = {
        "completion": tokenizer is not None,
        "tools": service.wire_format.calls is not None,
        "thinking": service.wire_format.name is not None,
        "insert": service.infill is not None,
    }
    return [name for name, is_there in found.items() if is_there]


def _name(service: Service) -> dict[str, Any]:
    # The digest tells models apart, as Ollama's does; it is that of no file.
    digest = hashlib.sha256(service.facts.cache_namespace.encode()).hexdigest()
    return {"name": service.model_name, "model": service.model_name, "digest": digest}


def _details(service: Service) -> dict[str, Any]:
    facts, family = service.facts, _family(service)
    path = Path(facts.resolved_model_path)
    is_gguf = path.suffix.lower() == ".gguf"
    named = _FILE_TYPE.search(path.stem) if is_gguf else None
    level = facts.quantization or (named[1] if named else "unknown" if facts.dtype == "auto" else facts.dtype)
    return {
        "parent_model": "",
        "format": "gguf" if is_gguf else "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": _in_short(facts.num_parameters),
        "quantization_level": level if level == "unknown" else level.upper(),
    }


def _family(service: Service) -> str:
    """Such as qwen2."""
    return re.sub(r"for[a-z]+$", "", service.facts.architecture.lower()) or "unknown"


def _in_short(count: int) -> str:
    """Such as 494.03M."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.4g}{letter}"
    return str(count)


async def _modified_at(service: Service) -> str:
    path = Path(service.facts.resolved_model_path)
    try:
        stat = await asyncio.to_thread(path.stat)
    except OSError:
        return timestamp(service.started_at)
    return timestamp(stat.st_mtime)


# -- what there is none of ---------------------------------------------------------------------------------------------
def _refusing(message: str) -> Handler:
    async def refuse(service: Service, request: Incoming) -> Reply:
        raise HttpError(501, message)

    return refuse


def _route(methods: tuple[str, ...], path: str, handler: Handler, summary: str, body: Any = None) -> Route:
    return Route(
        path=path, methods=methods, handler=handler, access=Access.KEY, dialect=Dialect.OLLAMA, summary=summary,
        body=body,
    )  # fmt: skip


ROUTES = (
    _route(("GET",), "/api/version", show_version, "The version of Ollama's API that is spoken"),
    _route(("GET",), "/api/tags", list_models, "The model that is served (Ollama's list)"),
    _route(("GET",), "/api/ps", list_running, "The model that is loaded (Ollama's list)"),
    _route(("POST",), "/api/show", show_model, "What the model is and can (Ollama's)", ShowBody),
    *(
        _route((method,), f"/api/{name}", _refusing(message), f"Not there: {message}", AnyBody)
        for message, method, names in (
            (_EMBEDS, "POST", ("embed", "embeddings")),
            (_PULLED, "POST", ("pull", "push", "create", "copy")),
            (_PULLED, "DELETE", ("delete",)),
        )
        for name in names
    ),
)
