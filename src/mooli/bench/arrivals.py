"""When requests are sent.

Owns the arrival processes. Never sends anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mooli.bench.errors import BenchmarkError
from mooli.bench.records import BenchRequest


def arrival_times(
    requests: Sequence[BenchRequest], *, request_rate: float, generator: np.random.RandomState
) -> list[float]:
    """Seconds from the start of the run at which each request is sent, in the order given.

    Requests that carry a time of their own keep it; the rate is then not looked at. Otherwise an infinite rate sends
    all at once, and a finite one makes a Poisson process: the first at 0, then gaps drawn from an exponential
    distribution with mean 1 / `request_rate` (requests per second). A request that could not be sent in time does
    not delay those after it, so that the rate holds over the whole run.

    Raises BenchmarkError for a rate that is not above 0.
    """
    own = [request.arrival_s for request in requests]
    if any(time is not None for time in own):
        return [time or 0.0 for time in own]
    if not request_rate > 0:
        raise BenchmarkError(f"--request-rate must be above 0, got {request_rate}; inf sends everything at once")
    if math.isinf(request_rate):
        return [0.0] * len(requests)
    gaps = [float(generator.exponential(1.0 / request_rate)) for _ in requests]
    return [float(time) for time in np.cumsum([0.0, *gaps])[: len(requests)]]
