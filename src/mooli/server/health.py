"""Whether the engine lives and the server takes requests: what probes are told.

Owns the questions, each answered with None or with what is wrong in words. A busy engine is not a dead one: it says
nothing while it computes a long step, so that only a silence of `watchdog_timeout` counts. An engine that has ended
counts at once. Never ends or restarts anything: that is the server's life, `mooli.server.launch`.
"""

from __future__ import annotations

import asyncio
import time
import uuid

from mooli.errors import BusyError, MooliError
from mooli.frontend.inputs import GenerateCall
from mooli.server.service import Service

GENERATE_LIMIT_S = 20.0
"""How long `generation_problem` waits for a sign of the engine."""

KEEP_S = 1.0
"""How long its answer is good for others: so often, at most, probes make the engine generate."""

_LOOK_INTERVAL_S = 0.05

PROBE_RID_PREFIX = "HEALTH_CHECK"


def engine_problem(service: Service) -> str | None:
    """Whether the engine process is gone or hung. Someone who restarts servers wants to know this and nothing more."""
    client = service.client
    if not client.is_alive:
        return str(client.died.result()) if client.died.done() else "the engine process has ended"
    silence_s = time.monotonic() - client.last_sign_s
    if silence_s > service.config.watchdog_timeout:
        return f"the engine has given no sign for {silence_s:.0f} s"
    return None


def server_problem(service: Service) -> str | None:
    """`engine_problem`, or that the server is about to end."""
    return engine_problem(service) or ("the server is shutting down" if service.is_draining else None)


def readiness_problem(service: Service) -> str | None:
    """`server_problem`, or that a request would be refused for lack of room."""
    problem = server_problem(service)
    if problem is None and service.client.num_open >= service.max_open:
        return f"the request queue is full: {service.client.num_open} requests are open"
    return problem


async def generation_problem(service: Service) -> str | None:
    """`server_problem`, or that a request of one token brought no sign of the engine within GENERATE_LIMIT_S.

    Any sign counts, as other requests may be before it. All who ask within KEEP_S share one request, which is not
    counted in the metrics.
    """
    return (
        server_problem(service)
        or await service.shared("generation_problem", lambda: _generation_problem(service), keep_s=KEEP_S).result()
    )


async def _generation_problem(service: Service) -> str | None:
    client = service.client
    if client.num_open >= service.max_open:
        return None  # with a full queue only the signs of others can be judged
    sampling_params = {
        "max_new_tokens": 1, "min_new_tokens": 0, "temperature": 0.0, "n": 1, "stop": [], "ignore_eos": True,
    }  # fmt: skip
    inputs = await service.prepare(
        GenerateCall(input_ids=[0], sampling_params=sampling_params, rid=f"{PROBE_RID_PREFIX}_{uuid.uuid4().hex}")
    )
    before_s = client.last_sign_s
    deadline_s = time.monotonic() + GENERATE_LIMIT_S
    try:
        with service.start(inputs, is_counted=False) as call:
            waiting = asyncio.ensure_future(call.wait())
            try:
                while time.monotonic() < deadline_s:
                    await asyncio.wait({waiting}, timeout=_LOOK_INTERVAL_S)
                    if waiting.done():
                        await waiting
                        return None
                    if client.last_sign_s > before_s:
                        return None
            finally:
                waiting.cancel()
    except BusyError:
        return None  # the queue has become full meanwhile: the engine is as well as a moment ago
    except MooliError as exc:
        return str(exc)
    return f"the engine has not answered a request within {GENERATE_LIMIT_S:g} s"
