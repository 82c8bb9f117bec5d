"""Native routes that say what is served, how, and how busy it is.

Owns the shape of their answers, which is SGLang's. The numbers come from the engine; where it is computing a long step,
those of the step before are shown, so that whoever watches a busy server is not left waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from mooli.frontend.native_answer import model_info
from mooli.server.page_files import show_front
from mooli.server.routing import Access, Dialect, Handler, HttpError, Incoming, Reply, Route
from mooli.server.service import Service
from mooli.version import __version__

PATIENCE_S = 1.0
"""How long the engine may take to tell its numbers, before the last known ones are taken."""

GIGABYTE = 10**9

SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues")
"""Of /v1/loads. There is no adapter and no disaggregation here, so that those sections are null; so is `spec` where no
tokens are guessed."""

PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_GAUGES = {
    "num_running_reqs": "Requests being computed.",
    "num_waiting_reqs": "Requests waiting in the engine.",
    "num_used_tokens": "Tokens of the KV cache that running requests hold.",
    "max_total_num_tokens": "Tokens the KV cache can hold.",
    "max_running_requests": "Requests that can be computed at the same time.",
    "token_usage": "Share of the KV cache that running requests hold.",
    "gen_throughput": "Generated tokens per second.",
    "cache_hit_rate": "Share of all prompt tokens that came from the cache.",
    "utilization": "The larger of token usage and running to possible requests.",
}


async def show_model(service: Service, request: Incoming) -> Reply:
    return Reply(model_info(service.engine_config, service.facts, service.wire_format))


async def show_server(service: Service, request: Incoming) -> Reply:
    """All arguments but for keys, what became of their defaults, the device, and the engine's counters."""
    stats = await engine_stats(service)
    facts = service.facts
    state = {
        "last_gen_throughput": service.step_log.last_gen_throughput,
        "memory_usage": _memory(service),
        "effective_max_running_requests_per_dp": facts.max_running_requests,
        **stats,
    }
    if service.facts.speculative_algorithm is not None:
        state["avg_spec_accept_length"] = _speculation(stats)["accept_length"]
    return Reply(
        {
            **service.config.to_dict(),
            **service.engine_config.to_dict(),
            **facts.to_dict(),
            "launch_command": service.launch_command,
            "startup_time": service.startup_time_s,
            "internal_states": [state],
            "version": __version__,
        }
    )


async def show_loads(service: Service, request: Incoming) -> Reply:
    """?include: sections with commas between, or all. ?format: json or prometheus. ?dp_rank: 0 is the only one."""
    query = request.query
    if query.get("dp_rank", "0") != "0":
        raise HttpError(400, f"dp_rank={query['dp_rank'][:40]!r}: there is only rank 0", param="dp_rank")
    form = query.get("format", "json")
    if form not in ("json", "prometheus"):
        raise HttpError(400, f"format={form[:40]!r} is not possible: json or prometheus", param="format")
    sections = _sections(query.get("include", "all"))
    stats = await engine_stats(service)
    load = _load(service, stats)
    if form == "prometheus":
        return Reply("".join(_exposition(load)).encode(), media_type=PROMETHEUS_TYPE)
    core = load if "core" in sections else {"dp_rank": load["dp_rank"]}
    return Reply(
        {
            "timestamp": datetime.now(timezone.utc).isoformat(),
            "version": __version__,
            "accelerator": service.engine_config.backend_name,
            "num_accelerators": 1,
            "loads": [{**core, **{name: _section(service, name, load, stats) for name in sections if name != "core"}}],
        }
    )


async def show_rank_loads(service: Service, request: Incoming) -> Reply:
    """The older form of /v1/loads, an entry a rank: what gateways of SGLang's 0.3 compare workers by."""
    load = _load(service, await engine_stats(service))
    running, waiting = load["num_running_reqs"], load["num_waiting_reqs"]
    entry = {
        "dp_rank": load["dp_rank"],
        "num_reqs": running + waiting,
        "num_waiting_reqs": waiting,
        "num_tokens": load["num_total_tokens"],
    }
    return Reply([entry])


async def engine_stats(service: Service) -> Mapping[str, int]:
    """`Scheduler.stats` of now, or of the last step if the engine is in the middle of one that takes long. However many
    ask, the engine has one such question at a time.

    Raises EngineDeadError, and HttpError (503) if there has been no step yet.
    """
    client = service.client
    try:
        stats: Mapping[str, int] = await service.shared("stats", lambda: client.ask("stats", PATIENCE_S)).result()
    except TimeoutError as exc:
        if service.last_stats is None:
            raise HttpError(503, str(exc)) from exc
        return service.last_stats
    return stats


async def current_load(service: Service) -> dict[str, Any]:
    """What /v1/loads says of now, without its sections. Raises like `engine_stats`."""
    return _load(service, await engine_stats(service))


def _load(service: Service, stats: Mapping[str, int]) -> dict[str, Any]:
    facts = service.facts
    token_usage = stats["used_pages"] / facts.num_pages
    return {
        "dp_rank": 0,
        "num_running_reqs": stats["running"],
        "num_waiting_reqs": stats["waiting"],
        "num_used_tokens": stats["used_pages"] * facts.page_size,
        "num_total_tokens": stats["used_pages"] * facts.page_size + stats["waiting_tokens"],
        "max_total_num_tokens": facts.max_total_num_tokens,
        "max_running_requests": facts.max_running_requests,
        "token_usage": token_usage,
        "gen_throughput": service.step_log.last_gen_throughput,
        "cache_hit_rate": stats["cached_tokens"] / max(stats["prompt_tokens"], 1),
        "utilization": max(token_usage, stats["running"] / facts.max_running_requests),
    }


def _sections(given: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in (*SECTIONS, "all"):
            raise HttpError(
                400, f"include={name[:40]!r} is not possible: {', '.join(SECTIONS)} or all", param="include"
            )
    return [name for name in SECTIONS if "all" in names or name in names]


def _section(service: Service, name: str, load: Mapping[str, Any], stats: Mapping[str, int]) -> dict[str, Any] | None:
    if name == "memory":
        return {**_memory(service), "graph_gb": 0.0}
    if name == "queues":
        waiting = load["num_waiting_reqs"]
        return {"waiting": waiting, "grammar": 0, "paused": 0, "retracted": 0, "prealloc_ready": 0}
    if name == "spec" and service.facts.speculative_algorithm is not None:
        return _speculation(stats)
    return None


def _speculation(stats: Mapping[str, int]) -> dict[str, Any]:
    """Tokens a step of a request, and the share of right guesses, since the start."""
    right = stats["correct_drafts"]
    return {
        "accept_length": 1 + right / max(stats["verify_steps"], 1),
        "accept_rate": right / max(stats["proposed_drafts"], 1),
    }


def _memory(service: Service) -> dict[str, Any]:
    facts = service.facts
    return {
        "weight_gb": facts.weight_bytes / GIGABYTE,
        "kv_cache_gb": facts.kv_cache_bytes / GIGABYTE,
        "token_capacity": facts.max_total_num_tokens,
    }


def _exposition(load: Mapping[str, Any]) -> Iterator[str]:
    """Source: the Prometheus text exposition format."""
    for name, text in _GAUGES.items():
        yield f"# HELP sglang:{name} {text}\n# TYPE sglang:{name} gauge\n"
        yield f'sglang:{name}{{dp_rank="{load["dp_rank"]}"}} {load[name]}\n'


def _get(path: str, handler: Handler, summary: str) -> Route:
    return Route(
        path=path, methods=("GET",), handler=handler, access=Access.KEY, dialect=Dialect.NATIVE, summary=summary
    )


ROUTES = (
    Route(
        path="/",
        methods=("GET",),
        handler=show_front,
        access=Access.OPEN,
        dialect=Dialect.NATIVE,
        summary="The page, for a browser; for others a word that the server runs",
        is_page=True,
    ),
    _get("/model_info", show_model, "Which model is served"),
    _get("/get_model_info", show_model, "The older name of /model_info"),
    _get("/server_info", show_server, "All arguments and the engine's numbers"),
    _get("/get_server_info", show_server, "The older name of /server_info"),
    _get("/v1/loads", show_loads, "How busy the engine is"),
    _get("/get_load", show_rank_loads, "The older form of /v1/loads"),
)
