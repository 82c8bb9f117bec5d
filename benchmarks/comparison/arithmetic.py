"""Medians, spreads and ratios of samples.

Owns which rounds are compared with which and which peer is the best. Never formats anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from comparison.catalogue import FILE_BITS, MOOLI, TRANSFORMERS
from comparison.health import HEALTHY
from comparison.results import EngineFacts, Results, Sample

LOWER_IS_BETTER = ("ttft_ms", "ms_per_token")


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    return Spread(statistics.median(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class Target:
    """A row that Mooli is judged by: its weights of `bits` (`label` for people) against peers of bits from low to high,
    and how many times faster it must be and aims to be."""

    title: str
    workload: str
    figure: str
    bits: int
    low: int
    high: int
    must: float | None
    aim: float | None


@dataclass(frozen=True)
class Ratio:
    """How many times faster `ours` is than `theirs`, over the rounds that both finished."""

    model: str
    target: Target
    ours: str
    theirs: str
    spread: Spread
    ours_value: float
    theirs_value: float
    rounds: int
    healthy: int


MAIN_MODEL = "qwen"
_FORMATS = (("int4", 4), ("file", FILE_BITS), ("int8", 8))
_ROWS = (
    ("TTFT of 512 tokens", "single", "ttft_ms", 1.15, 1.5),
    ("ms per token", "single", "ms_per_token", None, None),
    ("total tok/s", "random", "total_tok_s", 1.25, 1.6),
    ("total tok/s", "shared", "total_tok_s", 2.0, 2.8),
    ("total tok/s", "multiturn", "total_tok_s", 1.3, 1.8),
)
_PER_TOKEN = {4: (4, 4, 1.6, 2.2), FILE_BITS: (FILE_BITS, 16, None, None), 8: (8, 8, 1.4, 2.0)}
"""Time per token goes with the bytes of weights, so formats of the same size are compared: low, high, must, aim."""

_OTHER_MODELS = (1.3, 2.5)


def targets(model: str) -> list[Target]:
    """All rows, for Mooli's three formats, each against peers at equal or finer weights."""
    rows = []
    for what, workload, figure, must, aim in _ROWS:
        for label, bits in _FORMATS:
            low, high, goal = bits, 16, (must, aim)
            if figure == "ms_per_token":
                low, high, *rest = _PER_TOKEN[bits]
                goal = (rest[0], rest[1])
            if model != MAIN_MODEL and goal != (None, None):
                goal = _OTHER_MODELS
            rows.append(Target(f"{workload}: {what}, {label}", workload, figure, bits, low, high, *goal))
    return rows


def of(results: Results, model: str, variant: str, workload: str) -> dict[int, Sample]:
    """The finished samples by round."""
    return {
        sample.round: sample
        for sample in results.samples
        if (sample.model, sample.variant, sample.workload) == (model, variant, workload) and sample.figures
    }


def values(samples: Iterable[Sample], figure: str) -> list[float]:
    return [sample.figures[figure] for sample in samples if sample.figures]


def best_gauge(results: Results) -> float:
    return max((value["ops_s"] for sample in results.samples for value in (sample.before, sample.after)), default=0.0)


def is_healthy(sample: Sample, best: float) -> bool:
    """Whether the machine gave its integer units before and after."""
    return min(sample.before["ops_s"], sample.after["ops_s"]) > HEALTHY * best


def against_best_peer(results: Results, model: str, target: Target) -> Ratio | None:
    """The least of the ratios to the peers that `target` allows: the one to the best peer.

    A peer in process is compared with Mooli in process, a server with Mooli's server, in the same rounds.
    """
    facts = results.variants.get(model, {})
    ours = {each.through: key for key, each in facts.items() if each.engine == MOOLI and each.bits == target.bits}
    ratios = [
        ratio
        for key, each in facts.items()
        if _is_peer(each) and target.low <= each.bits <= target.high and each.through in ours
        if (ratio := _ratio(results, model, target, ours[each.through], key))
    ]
    return min(ratios, key=lambda ratio: ratio.spread.median, default=None)


def _is_peer(facts: EngineFacts) -> bool:
    return facts.engine not in (MOOLI, TRANSFORMERS)


def _ratio(results: Results, model: str, target: Target, ours: str, theirs: str) -> Ratio | None:
    mine, other = (of(results, model, key, target.workload) for key in (ours, theirs))
    rounds = sorted(mine.keys() & other.keys())
    if not rounds:
        return None
    best = best_gauge(results)
    a = values([mine[number] for number in rounds], target.figure)
    b = values([other[number] for number in rounds], target.figure)
    pairs = zip(b, a, strict=True) if target.figure in LOWER_IS_BETTER else zip(a, b, strict=True)
    found = spread([over / under for over, under in pairs])
    assert found is not None
    healthy = sum(is_healthy(mine[number], best) and is_healthy(other[number], best) for number in rounds)
    return Ratio(model, target, ours, theirs, found, statistics.median(a), statistics.median(b), len(rounds), healthy)
