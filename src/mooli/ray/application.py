"""The application: which deployments there are, and what Serve must know of each.

Owns the settings by which Serve does not get in the engines' way. Serve's own defaults are those of a function that
computes one thing at a time: five requests a replica and 20 seconds to end.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from mooli.ray.config import MARGIN_S, Model, read_arguments
from mooli.ray.ingress import Ingress
from mooli.ray.replica import EngineReplica

logger = logging.getLogger(__name__)

ENGINE = "engine"
"""Name of the deployment of engines; of several models, with a dash and the model's name behind it."""

INGRESS = "ingress"

ROUTERS = {
    "head": "mooli.ray.router.HeadRouter",
    "round_robin": "ray.serve.experimental.round_robin_router.RoundRobinRouter",
}

STATS_PERIOD_S = 2.0
HEALTH_PERIOD_S = 5.0

INGRESS_REQUESTS = 100_000
"""In progress at a time: replicas refuse what is too much for them."""


def build(arguments: Mapping[str, Any]) -> Application:
    """The application of `mooli.ray.config.read_arguments`. Raises ConfigError."""
    config = read_arguments(arguments)
    handles: dict[str, Application] = {}
    for model in config.models:
        suffix = "" if len(config.models) == 1 else "-" + re.sub(r"[^\w.-]+", "-", model.name)
        handles[model.name] = _engines(ENGINE + suffix, _with_threads(model))
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name=INGRESS,
        num_replicas=config.ingress_replicas,
        max_ongoing_requests=INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=max(_end_s(model) for model in config.models),
        health_check_period_s=HEALTH_PERIOD_S,
        ray_actor_options={"num_cpus": 0},  # it passes on what others compute
    )
    return ingress.bind(config.models[0].server, config.head_chars, handles)


def _engines(name: str, model: Model) -> Application:
    server, engine, settings = model.server, model.engine, model.replica
    num_cpus = settings.cpus if settings.cpus is not None else float(engine.num_threads or 1)
    options: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas,
                max_replicas=settings.max_replicas,
                target_ongoing_requests=settings.target_requests,
            )
        }
    return (
        serve.deployment(EngineReplica)
        .options(
            name=name,
            max_ongoing_requests=server.max_concurrent_requests,
            graceful_shutdown_timeout_s=_end_s(model),
            graceful_shutdown_wait_loop_s=0.5,
            health_check_period_s=HEALTH_PERIOD_S,
            logging_config=LoggingConfig(enable_access_log=False),  # the ingress has a line for each request
            request_router_config=RequestRouterConfig(
                request_router_class=ROUTERS[settings.routing],
                request_router_kwargs=settings.rules if settings.routing == "head" else {},
                request_routing_stats_period_s=STATS_PERIOD_S,
            ),
            ray_actor_options={
                "num_cpus": num_cpus,
                "num_gpus": settings.gpus,
                "resources": {"NPU": settings.npus} if settings.npus else {},
            },
            **options,
        )
        .bind(server, engine)
    )


def _with_threads(model: Model) -> Model:
    """Replicas share a machine: without a number, each would compute with all its cores."""
    engine = model.engine
    if engine.backend_name != "cpu" or engine.num_threads is not None:
        return model
    num_threads = max(1, int(model.replica.cpus or 1))
    logger.warning("%s: num_threads is not given: a replica computes with %d", model.name, num_threads)
    return replace(model, engine=replace(engine, num_threads=num_threads))


def _end_s(model: Model) -> float:
    return model.server.shutdown_timeout + MARGIN_S
