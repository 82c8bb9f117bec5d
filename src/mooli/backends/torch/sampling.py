"""Sampling and log-probabilities on the device, in float32, with the meaning of `reference_sampling`.

Owns the batched form of that meaning: one sort a step for rows that draw, none for greedy ones, and one copy to the
host for ids and log-probabilities together. Random numbers are the reference's own, made on the host from seed and
position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mooli.backends.base import SampleResult
from mooli.backends.reference_sampling import NO_TOKEN, LogprobTuple, uniform
from mooli.backends.torch.step_plan import Upload
from mooli.batch import SamplingBatch, TokenMasks

SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Devices may take smaller numbers for zero. Already here every other logit than the largest has no probability."""

_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)


class TorchSampler:
    """Samples rows of logits. Holds no state; a device with fused kernels overrides single steps."""

    def __init__(self, upload: Upload) -> None:
        self.upload = upload

    def sample(self, logits: Tensor, sampling: SamplingBatch) -> SampleResult:
        """Sample every row of raw logits float32 (S, vocab). Rows with `num_top` >= 0 get log-probabilities."""
        allowed = None if sampling.masks is None else self.allowed(sampling.masks, logits.shape[1])
        adjusted = self.adjust(logits, sampling)
        if allowed is not None:
            adjusted = torch.where(allowed, adjusted, -math.inf)
        has_token = ~torch.isnan(logits).any(dim=1) & (adjusted.amax(dim=1) != -math.inf)
        token_ids = self.choose(adjusted, sampling)
        token_ids = torch.where(has_token, token_ids, NO_TOKEN).to(torch.int32)

        rows = np.flatnonzero(sampling.num_top >= 0)
        if not len(rows):
            return SampleResult(token_ids.cpu().numpy(), [None] * len(sampling))
        wanted = Wanted([int(sampling.num_top[row]) for row in rows], [sampling.logprob_token_ids[row] for row in rows])
        where = self.upload(rows.astype(np.int64))
        targets = token_ids.index_select(0, where).clamp(min=0).long()
        possible = logits if allowed is None else torch.where(allowed, logits, -math.inf)
        packed = self.pack_logprobs(possible.index_select(0, where), targets, wanted)
        # One copy for both.
        host = torch.cat([token_ids, packed.flatten()]).cpu().numpy()
        ids, entries = host[: len(sampling)], wanted.unpack(host[len(sampling) :])
        logprobs: list[LogprobTuple | None] = [None] * len(sampling)
        for row, entry in zip(rows.tolist(), entries, strict=True):
            logprobs[row] = entry if ids[row] != NO_TOKEN else None
        return SampleResult(ids.copy(), logprobs)

    def logprobs(
        self, logits: Tensor, target_ids: NDArray[np.int32], num_top: int, token_ids: Sequence[int]
    ) -> list[LogprobTuple]:
        """Per row of raw logits float32 (R, vocab): at the target, the best `num_top`, and at `token_ids`."""
        wanted = Wanted([max(0, num_top)] * len(target_ids), [tuple(token_ids)] * len(target_ids))
        packed = self.pack_logprobs(logits, self.upload(target_ids.astype(np.int64)), wanted)
        return wanted.unpack(packed.flatten().cpu().numpy())

    # -- what `sample` is made of --

    def allowed(self, masks: TokenMasks, vocab_size: int) -> Tensor:
        """Whether each row may sample each id: bool (S, vocab). The bits travel packed."""
        packed = self.upload(np.concatenate([masks.allowed.reshape(-1), _BITS]).view(np.int32))
        words, bits = packed[:-32].view(masks.allowed.shape), packed[-32:]
        # A product with each bit and no shift, which not every device has for integers.
        each = torch.bitwise_and(words[:, :, None], bits) != 0
        # A row of ones at the end, which -1 finds: the rows without a mask.
        each = each.view(len(words), -1)[:, :vocab_size]
        each = torch.cat([each, torch.ones_like(each[:1])])
        return each.index_select(0, self.upload(np.where(masks.rows < 0, len(words), masks.rows).astype(np.int64)))

    def adjust(self, logits: Tensor, sampling: SamplingBatch) -> Tensor:
        """Penalties, then biases, on a copy of the rows that have any."""
        penalties, biases = penalty_entries(sampling), bias_entries(sampling)
        if penalties is None and biases is None:
            return logits
        adjusted = logits.clone()
        if penalties is not None:
            where, (factors, subtracted) = self._entries(*penalties)
            values = adjusted[where]
            values = torch.where(values > 0, values / factors, values * factors)
            adjusted[where] = values - subtracted
        if biases is not None:
            where, (added,) = self._entries(*biases)
            banned = torch.full_like(added, -math.inf)
            # A ban beats everything, +inf included, which a sum would not.
            adjusted[where] = torch.where(added == -math.inf, banned, adjusted[where] + added)
        return adjusted

    def choose(self, adjusted: Tensor, sampling: SamplingBatch) -> Tensor:
        """Ids int64 (S,): the largest logit, of equals the lowest id, or drawn where the temperature is above zero."""
        rows = np.flatnonzero(sampling.temperature != 0)
        if len(rows) == len(sampling):
            return self.draw(adjusted, sampling, rows)
        token_ids = torch.argmax(adjusted, dim=1)
        if len(rows):
            where = self.upload(rows.astype(np.int64))
            token_ids.index_copy_(0, where, self.draw(adjusted.index_select(0, where), sampling, rows))
        return token_ids

    def draw(self, adjusted: Tensor, sampling: SamplingBatch, rows: NDArray[np.intp]) -> Tensor:
        """One id for each row of adjusted logits (R, vocab); `rows` are their rows in `sampling`."""
        top_k, top_p, min_p = sampling.top_k[rows], sampling.top_p[rows], sampling.min_p[rows]
        random = [
            uniform(int(seed), int(position))
            for seed, position in zip(sampling.seeds[rows], sampling.positions[rows], strict=True)
        ]
        columns = [
            np.maximum(sampling.temperature[rows], SMALLEST_TEMPERATURE),
            # Cuts that cut nothing: no sum exceeds inf, and no weight is below zero.
            np.where(top_p < 1, top_p, np.inf),
            np.maximum(min_p, 0),
            np.array(random),
        ]
        temperature, top_p_limit, min_p_limit, u = self.upload(np.stack(columns).astype(np.float32))[:, :, None]

        # Stable, so that of equal logits the lower id comes first.
        values, order = torch.sort(adjusted, dim=1, descending=True, stable=True)
        weights = weights_of(values, values[:, :1], temperature)
        rank = torch.arange(adjusted.shape[1], device=adjusted.device)
        if (top_k > 0).any():
            counts = np.where(top_k > 0, top_k, adjusted.shape[1])
            weights = weights.masked_fill(rank >= self.upload(counts.astype(np.int64))[:, None], 0)
        if (top_p < 1).any():
            # A prefix ends with the first entry whose sum reaches the limit.
            sums = weights.cumsum(dim=1)
            count = (sums < top_p_limit * sums[:, -1:]).sum(dim=1, keepdim=True) + 1
            weights = weights.masked_fill(rank >= count, 0)
        if (min_p > 0).any():
            weights = weights.masked_fill(weights < min_p_limit * weights[:, :1], 0)
        sums = weights.cumsum(dim=1)
        drawn = (sums <= u * sums[:, -1:]).sum(dim=1)
        # Rounding can leave every sum at or below: the last that has any probability then ends the range.
        last = (weights > 0).sum(dim=1) - 1
        drawn = torch.minimum(drawn, last.clamp(min=0))
        return order.gather(1, drawn[:, None])[:, 0]

    def pack_logprobs(self, logits: Tensor, targets: Tensor, wanted: Wanted) -> Tensor:
        """What `Wanted.unpack` reads, int32 (R, columns), from raw logits float32 (R, vocab) and targets int64 (R,)."""
        num_top = wanted.limit_top(logits.shape[1])
        largest = logits.amax(dim=1, keepdim=True)
        is_bad = torch.isnan(logits).any(dim=1, keepdim=True) | (largest == -math.inf)
        shifted = torch.where(logits == largest, 0.0, logits - largest)
        values = shifted - shifted.exp().sum(dim=1, keepdim=True).log()
        parts = [values.gather(1, targets[:, None])]
        best = None
        if num_top:
            best = torch.sort(logits, dim=1, descending=True, stable=True)[1][:, :num_top]
            parts.append(values.gather(1, best))
        if wanted.num_chosen:
            parts.append(values.gather(1, self.upload(wanted.chosen_ids())))
        packed = [is_bad.to(torch.int32), torch.cat(parts, dim=1).view(torch.int32)]
        if best is not None:
            packed.append(best.to(torch.int32))
        return torch.cat(packed, dim=1)

    def _entries(
        self, rows: NDArray[np.int64], ids: NDArray[np.int64], values: NDArray[np.float64]
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        where = self.upload(np.stack([rows, ids]))
        return (where[0], where[1]), self.upload(values.astype(np.float32))


@dataclass(slots=True)
class Wanted:
    """Which log-probabilities rows ask for, and how they lie in one int32 array.

    A row is [bad, target, best values, values of chosen ids, best ids]; the values are float32 seen as int32, bad is 1
    for NaN or nothing but -inf. All rows are as wide as the one that asks for most.
    """

    num_tops: list[int]
    token_ids: list[tuple[int, ...]]
    num_top: int = 0

    @property
    def num_chosen(self) -> int:
        return max((len(ids) for ids in self.token_ids), default=0)

    def limit_top(self, vocab_size: int) -> int:
        """The most alternatives of any row, no more than there are ids."""
        self.num_top = min(max(self.num_tops, default=0), vocab_size)
        return self.num_top

    def chosen_ids(self) -> NDArray[np.int64]:
        """int64 (R, num_chosen), zeros past a row's own."""
        ids = np.zeros((len(self.token_ids), self.num_chosen), dtype=np.int64)
        for row, given in enumerate(self.token_ids):
            ids[row, : len(given)] = given
        return ids

    def unpack(self, packed: NDArray[np.int32]) -> list[LogprobTuple]:
        """The entries of `pack_logprobs`, flat on the host."""
        rows = packed.reshape(len(self.num_tops), -1)
        num_values = 1 + self.num_top + self.num_chosen
        values = np.ascontiguousarray(rows[:, 1 : 1 + num_values]).view(np.float32)
        best_ids = rows[:, 1 + num_values :]
        entries: list[LogprobTuple] = []
        for row, (num_top, chosen) in enumerate(zip(self.num_tops, self.token_ids, strict=True)):
            if rows[row, 0]:
                entries.append((math.nan, [], [(math.nan, int(token_id)) for token_id in chosen]))
                continue
            own = values[row].tolist()
            num_top = min(num_top, self.num_top)
            pairs = zip(own[1 : 1 + num_top], best_ids[row, :num_top].tolist(), strict=True)
            best = [(value, token_id) for value, token_id in pairs if value != -math.inf]
            first = 1 + self.num_top
            entries.append((own[0], best, list(zip(own[first : first + len(chosen)], map(int, chosen), strict=True))))
        return entries


def weights_of(values: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities times a constant. Entries of +inf share everything; the largest is taken off before dividing."""
    shifted = torch.where(values == largest, 0.0, values - largest)
    return torch.exp(shifted / temperature)


def penalty_entries(
    sampling: SamplingBatch,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]] | None:
    """(rows, ids, [repetition factors, amounts to subtract]) of every id a penalty touches; None if there is none.

    Each pair of row and id appears once.
    """
    rows, ids, values = [], [], []
    has_penalty = (
        (sampling.repetition_penalty != 1) | (sampling.frequency_penalty != 0) | (sampling.presence_penalty != 0)
    )
    for row in np.flatnonzero(has_penalty & (np.diff(sampling.history_indptr) > 0)):
        history = sampling.history_ids[sampling.history_indptr[row] : sampling.history_indptr[row + 1]]
        seen, inverse = np.unique(history, return_inverse=True)
        counts = np.bincount(inverse[sampling.output_starts[row] :], minlength=len(seen))
        rows.append(np.full(len(seen), row, dtype=np.int64))
        ids.append(seen.astype(np.int64))
        amounts = sampling.frequency_penalty[row] * counts + sampling.presence_penalty[row] * (counts > 0)
        values.append(np.stack([np.full(len(seen), sampling.repetition_penalty[row], dtype=np.float64), amounts]))
    if not rows:
        return None
    return np.concatenate(rows), np.concatenate(ids), np.concatenate(values, axis=1)


def bias_entries(
    sampling: SamplingBatch,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]] | None:
    """(rows, ids, [sums of biases]) of every biased id, each once; None if there is none. A ban is -inf."""
    if not len(sampling.bias_ids):
        return None
    rows = np.repeat(np.arange(len(sampling), dtype=np.int64), np.diff(sampling.bias_indptr))
    pairs, inverse = np.unique(np.stack([rows, sampling.bias_ids]), axis=1, return_inverse=True)
    sums = np.zeros(pairs.shape[1])
    is_ban = np.isneginf(sampling.bias_values)
    inverse = inverse.reshape(-1)
    np.add.at(sums, inverse[~is_ban], sampling.bias_values[~is_ban].astype(np.float64))
    sums[inverse[is_ban]] = -np.inf
    return pairs[0], pairs[1], sums[None, :]
