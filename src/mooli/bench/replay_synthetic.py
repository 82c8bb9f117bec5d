"""Traces made up after published ones, in Mooncake's format, so that a replay needs no download.

Owns their shape. Lengths and rates are the averages of the traces of the Mooncake paper (FAST '25): 12,031 requests of
conversations in an hour, 12,035 tokens in and 343 out; 23,608 requests of tools and agents, 8,596 in and 182 out. How
prompts share their heads is Mooli's own model: see `Workload`. Never sends anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mooli.bench.mooncake import BLOCK_TOKENS

_SIGMA = 0.6
"""Spread of lengths, which are log-normal; at 0.6 the median is 84 % of the mean."""

_LONGEST = 4.0
"""No length is more than this many times its mean, so that no request is out of all proportion."""

_NUM_OPEN = 32
"""Sessions that may go on: the latest ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths in tokens, rates in requests per second.

    Each request goes on with an open session with the probability `continuing`, else begins one. A session begins with
    one of `num_heads` common heads of `head_len` tokens (system prompt and tools; rank r is 1 / r as frequent as the
    first) and a text of its own; each later turn has all of the one before, its answer, and a new text.
    """

    request_rate: float
    output_len: float
    continuing: float
    head_len: int
    num_heads: int
    first_len: float
    later_len: float


WORKLOADS = {
    "conversation": Workload(
        request_rate=12031 / 3600,
        output_len=343,
        continuing=0.41,
        head_len=0,
        num_heads=1,
        first_len=11000,
        later_len=1500,
    ),
    "tool-agent": Workload(
        request_rate=23608 / 3600,
        output_len=182,
        continuing=0.4,
        head_len=6 * BLOCK_TOKENS,
        num_heads=16,
        first_len=4780,
        later_len=1200,
    ),
}


@dataclass(slots=True)
class _Session:
    """block_ids: of its whole blocks, as long as `num_tokens`."""

    block_ids: list[int]
    num_tokens: int
    output_len: int = 0


def synthetic_trace(workload: Workload, num: int, seed: int) -> list[dict[str, Any]]:
    """`num` records of timestamp (ms), input_length, output_length (tokens) and hash_ids; the same for the same seed.

    The averages hold over many requests; arrivals are a Poisson process.
    """
    return _Writer(workload, np.random.RandomState(seed)).records(num)


def possible_reuse(trace: Sequence[dict[str, Any]]) -> float:
    """Share of all prompt tokens, 0 to 1, that a cache without limits would have: blocks at the head of a prompt that
    an earlier prompt began with too."""
    nodes: dict[tuple[int, Any], int] = {}
    reused = total = 0
    for record in trace:
        node, num_shared, is_shared = 0, 0, True
        for block_id in record["hash_ids"]:
            is_shared = is_shared and (node, block_id) in nodes
            num_shared += is_shared
            node = nodes.setdefault((node, block_id), len(nodes) + 1)
        reused += min(num_shared * BLOCK_TOKENS, record["input_length"])
        total += record["input_length"]
    return reused / total if total else 0.0


class _Writer:
    def __init__(self, workload: Workload, generator: np.random.RandomState) -> None:
        self._workload = workload
        self._generator = generator
        self._num_ids = 0
        blocks = workload.head_len // BLOCK_TOKENS
        self._heads = [[self._new_id() for _ in range(blocks)] for _ in range(workload.num_heads)]
        weights = 1 / np.arange(1, workload.num_heads + 1)
        self._weights = weights / weights.sum()
        self._open: list[_Session] = []

    def records(self, num: int) -> list[dict[str, Any]]:
        gaps = self._generator.exponential(1000 / self._workload.request_rate, size=num)
        return [self._record(int(at_ms)) for at_ms in np.cumsum(gaps) - gaps[:1].sum()]

    def _record(self, at_ms: int) -> dict[str, Any]:
        workload = self._workload
        if self._open and self._generator.random_sample() < workload.continuing:
            session = self._open[self._generator.randint(len(self._open))]
            session.num_tokens += session.output_len + self._length(workload.later_len)
        else:
            head = self._heads[int(self._generator.choice(workload.num_heads, p=self._weights))]
            session = _Session(list(head), len(head) * BLOCK_TOKENS + self._length(workload.first_len))
            self._open = [*self._open[-_NUM_OPEN + 1 :], session]
        num_whole, rest = divmod(session.num_tokens, BLOCK_TOKENS)
        session.block_ids += [self._new_id() for _ in range(num_whole - len(session.block_ids))]
        session.output_len = self._length(workload.output_len)
        return {
            "timestamp": at_ms,
            "input_length": session.num_tokens,
            "output_length": session.output_len,
            # A block that is not full holds other tokens once the session goes on.
            "hash_ids": [*session.block_ids, *([self._new_id()] if rest else [])],
        }

    def _length(self, mean: float) -> int:
        drawn = self._generator.lognormal(math.log(mean) - _SIGMA**2 / 2, _SIGMA)
        return max(round(min(drawn, _LONGEST * mean)), 1)

    def _new_id(self) -> int:
        self._num_ids += 1
        return self._num_ids - 1
