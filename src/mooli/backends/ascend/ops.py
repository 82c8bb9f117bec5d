"""The operations of the seam with the NPU's fused ones: norms, rotations, gates. Not tried on hardware.

Owns which of them are used, and the rotary tables in the form they take. Whatever the self-test switched off is
computed in plain torch. The residual is added in the linear operation: the fused add-and-norm has no place in this
seam.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mooli.backends.ascend.experts import GroupedExperts, mixed_in_groups
from mooli.backends.ascend.paths import RMS_NORM, ROTARY, SWIGLU, Switches
from mooli.backends.base import Activation, AttentionSpec, RopeSpec
from mooli.backends.torch.experts import ExpertsWeight, Routing, activate
from mooli.backends.torch.ops import TorchOps, rotary_table
from mooli.backends.torch.step_plan import ForwardBatch
from mooli.backends.torch.weights import GatedLinear

WIDEST_ROTARY_HEAD = 896
MOST_ROTARY_HEADS = 999


class AscendOps(TorchOps):
    """`Ops` on one NPU."""

    def __init__(self, device: torch.device, switches: Switches) -> None:
        super().__init__(device)
        self._is_on = switches.is_on
        self._tables: dict[tuple[tuple[bytes, float], torch.dtype], tuple[Tensor, Tensor]] = {}

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        if not self._is_on(RMS_NORM):
            return super().rms_norm(x, weight, eps, residual)
        # Heads between others in a packed row are no tensor of their own.
        normed: Tensor = torch.ops.npu.npu_rms_norm(x.contiguous(), weight, eps)[0]
        return normed if residual is None else normed + residual

    def gated_linear(self, batch: ForwardBatch, x: Tensor, weight: GatedLinear) -> Tensor:
        return self._gated(weight.stacked.matmul(x), weight.activation)

    def experts(
        self,
        batch: ForwardBatch,
        x: Tensor,
        routing: Routing,
        weight: ExpertsWeight | GroupedExperts,
        residual: Tensor | None = None,
    ) -> Tensor:
        if isinstance(weight, ExpertsWeight):
            return super().experts(batch, x, routing, weight, residual)
        total = mixed_in_groups(x, routing, weight, self._gated)
        return (total if residual is None else total + residual).to(x.dtype)

    def _gated(self, products: Tensor, activation: Activation) -> Tensor:
        if not self._is_on(SWIGLU) or activation != "silu":
            gate, up = products.chunk(2, dim=-1)
            return activate(gate, up, activation)
        gated: Tensor = torch.ops.npu.npu_swiglu(products.contiguous(), -1)
        return gated

    def rope(self, batch: ForwardBatch, qkv: Tensor, spec: AttentionSpec, rope: RopeSpec) -> Tensor:
        turning = spec.num_heads + spec.num_kv_heads
        is_whole = 2 * len(rope.inv_freq) == spec.head_dim
        fits = is_whole and turning <= MOST_ROTARY_HEADS and spec.head_dim < WIDEST_ROTARY_HEAD
        if not self._is_on(ROTARY) or not fits:
            return super().rope(batch, qkv, spec, rope)
        cos, sin = self._rotations_in(qkv.dtype, batch, rope)
        heads = qkv.view(1, len(qkv), -1, spec.head_dim)
        turned = torch.ops.npu.npu_rotary_mul(heads[:, :, :turning].contiguous(), cos, sin)
        return self.warmed(batch, torch.cat([turned[0], heads[0, :, turning:]], dim=1).flatten(1), spec, rope)

    def _rotations_in(self, dtype: torch.dtype, batch: ForwardBatch, rope: RopeSpec) -> tuple[Tensor, Tensor]:
        """Cosines and sines at the step's rotary positions, each half twice: (1, T, 1, head_dim) in the heads' type."""
        name = (rope.name, dtype)
        key = ("rotations", name)
        if key not in batch.memo:
            table = self._tables.get(name)
            if table is None or len(table[0]) <= batch.max_rope_position:
                self.num_positions = max(self.num_positions, batch.max_rope_position + 1)
                table = self._tables[name] = self._table(rope, dtype)
            batch.memo[key] = tuple(part.index_select(0, batch.rope_positions)[None, :, None, :] for part in table)
        cos, sin = batch.memo[key]
        return cos, sin

    def _table(self, rope: RopeSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_table(rope, self.num_positions, self.device)
        return torch.cat([cos, cos], dim=1).to(dtype), torch.cat([sin, sin], dim=1).to(dtype)

    def close(self) -> None:
        super().close()
        self._tables.clear()
