"""The meaning of sampling and of log-probabilities, one row at a time in float64.

Owns the order of the steps, every tie rule and the random numbers. Never sees a batch's layout of logits on a device;
other backends implement exactly this and are compared with it id by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mooli.backends.base import SampleResult
from mooli.batch import SamplingBatch

LogprobTuple = tuple[float, list[tuple[float, int]], list[tuple[float, int]]]
"""Log-probability of the target; the best (log-probability, id) pairs, descending; the pairs of the ids asked for."""

NO_TOKEN = -1
"""What is sampled where no token can be: the logits hold NaN, or every one of them is -inf."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Candidates:
    """What can be drawn: ids in the order of the draw, and their probabilities, which sum to one."""

    ids: NDArray[np.int64]
    probabilities: NDArray[np.float64]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone.

    x = seed + 0x9E3779B97F4A7C15 * (position + 1) mod 2^64, finalised as in splitmix64, top 53 bits taken.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants of
    Vigna's splitmix64.
    """
    x = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    x ^= x >> 31
    return (x >> 11) * 2.0**-53


def adjust_logits(
    logits: NDArray[np.float64],
    history_ids: NDArray[np.int32],
    output_start: int,
    repetition_penalty: float,
    frequency_penalty: float,
    presence_penalty: float,
    bias_ids: NDArray[np.int32],
    bias_values: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Penalties, then biases, on a copy of one row of logits (vocab,).

    Repetition: an id seen in prompt or output has its logit divided by the penalty if positive, else multiplied.
    Frequency: minus penalty times count in the output. Presence: minus penalty if in the output.
    Bias: added; -inf is a ban, whatever the logit. A repeated id adds up.
    """
    adjusted = np.array(logits, dtype=np.float64)
    if repetition_penalty != 1.0 and len(history_ids):
        seen = np.unique(history_ids)
        values = adjusted[seen]
        adjusted[seen] = np.where(values > 0, values / repetition_penalty, values * repetition_penalty)
    if frequency_penalty != 0.0 or presence_penalty != 0.0:
        output_ids, counts = np.unique(history_ids[output_start:], return_counts=True)
        adjusted[output_ids] -= frequency_penalty * counts + presence_penalty
    banned = np.isneginf(bias_values)
    np.add.at(adjusted, bias_ids[~banned], bias_values[~banned].astype(np.float64))
    adjusted[bias_ids[banned]] = -np.inf
    return adjusted


def softmax(logits: NDArray[np.float64], temperature: float = 1.0) -> NDArray[np.float64]:
    """Softmax of one row. Entries of +inf share all the probability. At least one entry must be above -inf."""
    largest = logits.max()
    if np.isposinf(largest):
        weights = np.isposinf(logits).astype(np.float64)
    else:
        # The largest is taken off first: a tiny temperature must not overflow.
        with np.errstate(over="ignore", under="ignore"):
            weights = np.exp((logits - largest) / temperature)
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def candidates(logits: NDArray[np.float64], temperature: float, top_k: int, top_p: float, min_p: float) -> Candidates:
    """What can be drawn from adjusted logits at a temperature above zero, cut by top_k, then top_p, then min_p.

    Order: probability descending, id ascending. top_k <= 0 keeps all. top_p keeps the smallest prefix whose sum reaches
    it, the first always. min_p drops what lies below min_p times the largest probability. Renormalised after each cut.
    """
    probabilities = softmax(logits, temperature)
    # Sorting by logits, whose order is that of the probabilities, stays exact where the latter underflow to zero.
    order = np.argsort(-logits, kind="stable")
    probabilities = probabilities[order]
    if 0 < top_k < len(order):
        order, probabilities = _keep(order, probabilities, top_k)
    if top_p < 1.0:
        reached = np.flatnonzero(np.cumsum(probabilities) >= top_p)
        count = int(reached[0]) + 1 if len(reached) else len(order)
        order, probabilities = _keep(order, probabilities, count)
    if min_p > 0.0:
        count = int(np.count_nonzero(probabilities >= min_p * probabilities[0]))
        order, probabilities = _keep(order, probabilities, max(1, count))
    return Candidates(order, probabilities)


def draw(choices: Candidates, u: float) -> int:
    """The first candidate whose cumulative probability exceeds u."""
    exceeding = np.flatnonzero(np.cumsum(choices.probabilities) > u)
    if len(exceeding):
        return int(choices.ids[exceeding[0]])
    # Rounding can leave the sum just below one: the last candidate that has any probability then ends the range.
    return int(choices.ids[np.flatnonzero(choices.probabilities > 0)[-1]])


def sample_row(logits: NDArray[np.floating], sampling: SamplingBatch, row: int) -> int:
    """The token id of sampling row `row` for its raw logits (vocab,); NO_TOKEN if they hold NaN or are all -inf.

    What a mask does not allow is -inf, after penalties and biases. A NaN counts even there: it says that the model's
    computation has failed.
    """
    if np.isnan(logits).any():
        return NO_TOKEN
    history = slice(sampling.history_indptr[row], sampling.history_indptr[row + 1])
    bias = slice(sampling.bias_indptr[row], sampling.bias_indptr[row + 1])
    adjusted = adjust_logits(
        logits.astype(np.float64),
        sampling.history_ids[history],
        int(sampling.output_starts[row]),
        float(sampling.repetition_penalty[row]),
        float(sampling.frequency_penalty[row]),
        float(sampling.presence_penalty[row]),
        sampling.bias_ids[bias],
        sampling.bias_values[bias],
    )
    allowed = _allowed(sampling, row, len(logits))
    if allowed is not None:
        adjusted[~allowed] = -np.inf
    if np.isneginf(adjusted).all():
        return NO_TOKEN
    temperature = float(sampling.temperature[row])
    if temperature == 0.0:
        return int(np.argmax(adjusted))
    choices = candidates(
        adjusted, temperature, int(sampling.top_k[row]), float(sampling.top_p[row]), float(sampling.min_p[row])
    )
    return draw(choices, uniform(int(sampling.seeds[row]), int(sampling.positions[row])))


def logprob_row(logits: NDArray[np.floating], target_id: int, num_top: int, token_ids: Sequence[int]) -> LogprobTuple:
    """Natural-log softmax of one row of raw logits at the target, the `num_top` best and `token_ids`.

    Ties in the best go to the lower id, and what has no chance is not among them. Logits with NaN, or all -inf, give
    NaN everywhere and no best. Entries of +inf share all the probability.
    """
    if np.isnan(logits).any() or np.isneginf(logits).all():
        return float("nan"), [], [(float("nan"), int(token_id)) for token_id in token_ids]
    wide = logits.astype(np.float64)
    largest = wide.max()
    if np.isposinf(largest):
        infinite = np.isposinf(wide)
        values = np.where(infinite, -np.log(np.count_nonzero(infinite)), -np.inf)
    else:
        shifted = wide - largest
        values = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-wide, kind="stable")[: max(0, num_top)]
    best = best[~np.isneginf(values[best])]
    return (
        float(values[target_id]),
        [(float(values[token_id]), int(token_id)) for token_id in best],
        [(float(values[token_id]), int(token_id)) for token_id in token_ids],
    )


def sample(logits: NDArray[np.floating], sampling: SamplingBatch) -> SampleResult:
    """Sample every row of raw logits (S, vocab). Rows with `num_top` >= 0 and a token get log-probabilities.

    These are of the raw logits of what the row's mask allows: neither penalties nor biases nor temperature change them,
    a mask does.
    """
    token_ids = np.array([sample_row(logits[row], sampling, row) for row in range(len(sampling))], dtype=np.int32)
    logprobs: list[LogprobTuple | None] = []
    for row, token_id in enumerate(token_ids):
        num_top = int(sampling.num_top[row])
        if num_top < 0 or token_id == NO_TOKEN:
            logprobs.append(None)
            continue
        allowed = _allowed(sampling, row, logits.shape[1])
        possible = logits[row] if allowed is None else np.where(allowed, logits[row], -np.inf)
        logprobs.append(logprob_row(possible, int(token_id), num_top, sampling.logprob_token_ids[row]))
    return SampleResult(token_ids, logprobs)


def _allowed(sampling: SamplingBatch, row: int, vocab_size: int) -> NDArray[np.bool_] | None:
    return None if sampling.masks is None else sampling.masks.ids_of(row, vocab_size)


def _keep(
    order: NDArray[np.int64], probabilities: NDArray[np.float64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    kept = probabilities[:count]
    return order[:count], kept / kept.sum()
