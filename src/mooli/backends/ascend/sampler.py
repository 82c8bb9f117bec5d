"""Sampling on the NPU: that of the torch backend, and the watch for numbers that a type of 16 bits cannot hold.

Owns which rows of logits are given up. The drawing itself is plain torch with one stable sort: `npu_top_k_top_p` keeps
every logit that equals the last one kept, and the meaning of this project's sampling does not.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mooli.backends.base import SampleResult
from mooli.backends.reference_sampling import NO_TOKEN
from mooli.backends.torch.sampling import TorchSampler
from mooli.backends.torch.step_plan import Upload
from mooli.batch import SamplingBatch

logger = logging.getLogger(__name__)


class AscendSampler(TorchSampler):
    """Rows whose logits overflowed get no token. dtype: the name of the computation's type."""

    def __init__(self, upload: Upload, dtype: str) -> None:
        super().__init__(upload)
        self._dtype = dtype
        self._has_told = False

    def sample(self, logits: Tensor, sampling: SamplingBatch) -> SampleResult:
        if self._dtype != "float32":
            is_whole = torch.isfinite(logits).all(dim=1, keepdim=True)
            logits = torch.where(is_whole, logits, torch.nan)
        result = super().sample(logits, sampling)
        num_lost = int((result.token_ids == NO_TOKEN).sum())
        if num_lost:
            self._tell(num_lost)
        return result

    def _tell(self, num_lost: int) -> None:
        advice = "" if self._has_told else f": {self._advice()}"
        self._has_told = True
        logger.error("the logits of %d requests hold NaN or infinity in %s%s", num_lost, self._dtype, advice)

    def _advice(self) -> str:
        if self._dtype == "float16":
            return "float16 ends at 65504, try dtype='bfloat16'"
        return "try MOOLI_GRAPHS=0, and `mooli selftest --device npu`, which compares every operation with plain torch"
