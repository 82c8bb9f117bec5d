"""Mixtures of experts that families share: their tensors, how they are loaded, and what they compute.

Owns the router with its experts, and what may stand beside them for every token. Never names a device, sees a request
or touches an array: every computation is an operation of the backend seam. T tokens in a step, H hidden size.

Each expert is cut over ranks as a gated MLP is, along its inner width: every rank has a part of all experts, and makes
the same choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from mooli.backends.base import Activation, Array, Ops, Weight
from mooli.backends.routing import RouteSpec
from mooli.models.config import COLUMNS, ROWS, Split, TensorSpec
from mooli.models.layers import GatedMLP, Tensors
from mooli.models.packer import Packer
from mooli.models.stacks import Stacked

AnySparse = TypeVar("AnySparse", bound="SparseMLP")


@dataclass(frozen=True, slots=True)
class SharedMLP:
    """A gated MLP of every token, whose result is multiplied by sigmoid(gate x) where there is a gate (1, H)."""

    mlp: GatedMLP
    gate: Weight | None

    def output(self, batch: Any, x: Array, residual: Array | None = None) -> Array:
        if self.gate is None:
            return self.mlp.output(batch, x, residual)
        ops = self.mlp.ops
        # One number for a row: it may multiply what the last projection takes as well as what it gives.
        gated = ops.sigmoid_mul(ops.gated_linear(batch, x, self.mlp.gate_up), ops.linear(batch, x, self.gate))
        return ops.linear(batch, gated, self.mlp.down, residual=residual)


@dataclass(frozen=True, slots=True)
class SparseMLP:
    """The sum of the experts that a router chooses, and of what is shared.

    Subclasses have other names. Of a stack of all experts, `gate_up` has gate and up projection of each, and the shape
    (experts, outputs, inputs).
    Sources: see `RouteSpec`; shared experts, DeepSeekMoE, arXiv 2401.06066.
    """

    router_name: ClassVar[str] = "gate"
    names: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    """Of each expert's modules, in folders."""

    correction_name: ClassVar[str] = "gate.e_score_correction_bias"
    gguf_correction: ClassVar[str] = "exp_probs_b.bias"

    ops: Ops
    spec: RouteSpec
    router: Weight
    experts: Weight
    shared: SharedMLP | None

    @classmethod
    def tensors(
        cls,
        name: str,
        gguf: str,
        *,
        hidden_size: int,
        num_experts: int,
        width: int,
        bias: bool = False,
        router_bias: bool = False,
        correction: bool = False,
    ) -> Tensors:
        """Without what is shared. name: of the module, as `model.layers.0.mlp`; gguf: of the block, as `blk.0`."""
        router = f"{name}.{cls.router_name}"
        tensors = {f"{router}.weight": TensorSpec((num_experts, hidden_size), f"{gguf}.ffn_gate_inp.weight")}
        if router_bias:
            tensors[f"{router}.bias"] = TensorSpec((num_experts,), f"{gguf}.ffn_gate_inp.bias")
        if correction:
            tensors[f"{name}.{cls.correction_name}"] = TensorSpec((num_experts,), f"{gguf}.{cls.gguf_correction}")
        what = "columns of experts"
        made, summed = Split(ROWS, width, what), Split(COLUMNS, width, what)
        for expert in range(num_experts):
            for part, (shape, split) in enumerate(
                (
                    ((width, hidden_size), made),
                    ((width, hidden_size), made),
                    ((hidden_size, width), summed),
                )
            ):
                module = f"{name}.experts.{expert}.{cls.names[part]}"
                for kind in ("weight", "bias")[: 1 + bias]:
                    tensors[f"{module}.{kind}"] = TensorSpec(
                        shape if kind == "weight" else shape[:1],
                        f"{gguf}.ffn_{_GGUF_PARTS[part]}.{expert}.{kind}",
                        split,
                        hf_stacks=cls.hf_stacks(f"{name}.experts", kind, part, expert, num_experts),
                        gguf_stacks=gguf_stacks(gguf, kind, part, expert, num_experts),
                    )
        return tensors

    @classmethod
    def hf_stacks(cls, name: str, kind: str, part: int, expert: int, num_experts: int) -> tuple[Stacked, ...]:
        """Where folders may have the `weight` or `bias` of an expert's gate (part 0), up (1) or down projection (2)."""
        suffix = "" if kind == "weight" else "_bias"
        if part == 2:
            return (Stacked(f"{name}.down_proj{suffix}", expert, num_experts),)
        return (Stacked(f"{name}.gate_up_proj{suffix}", expert, num_experts, part, 2),)

    @classmethod
    def load(
        cls: type[AnySparse],
        packer: Packer,
        name: str,
        ops: Ops,
        spec: RouteSpec,
        *,
        correction: bool = False,
        activation: Activation = "silu",
        shared: SharedMLP | None = None,
    ) -> AnySparse:
        router = packer.router(f"{name}.{cls.router_name}", f"{name}.{cls.correction_name}" if correction else None)
        gate, up, down = cls.names
        each = [f"{name}.experts.{expert}" for expert in range(spec.num_experts)]
        experts = packer.experts([(f"{e}.{gate}", f"{e}.{up}", f"{e}.{down}") for e in each], activation)
        return cls(ops, spec, router, experts, shared)

    def output(self, batch: Any, x: Array, residual: Array | None = None) -> Array:
        """(T, H), the residual added where there is one."""
        routing = self.ops.route(batch, x, self.router, self.spec)
        if self.shared is not None:
            residual = self.shared.output(batch, x, residual)
        return self.ops.experts(batch, x, routing, self.experts, residual=residual)


_GGUF_PARTS = ("gate", "up", "down")


def gguf_stacks(block: str, kind: str, part: int, expert: int, num_experts: int) -> tuple[Stacked, ...]:
    """Where GGUF files have it: one tensor of all experts, or one of the gate and up projections of all."""
    own = Stacked(f"{block}.ffn_{_GGUF_PARTS[part]}_exps.{kind}", expert, num_experts)
    if part == 2:
        return (own,)
    return own, Stacked(f"{block}.ffn_gate_up_exps.{kind}", expert, num_experts, part, 2)
