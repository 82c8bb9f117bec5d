"""Mixtures of experts that families share: their tensors, how they are loaded, and what they compute.

Owns the router with its experts, and what may stand beside them for every token. Never names a device, sees a request
or touches an array: every computation is an operation of the backend seam. T tokens in a step, H hidden size.

Each expert is cut over ranks as a gated MLP is, along its inner width: every rank has a part of all experts, and makes
the same choice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from mooli.backends.base import Activation, Array, Ops, Weight
from mooli.backends.routing import MAX_EXPERTS, MAX_TOP_K, RouteSpec, Score
from mooli.errors import CheckpointError
from mooli.models.config import COLUMNS, ROWS, Split, TensorSpec
from mooli.models.fields import check_range
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

    module: ClassVar[str] = "mlp"
    """What a layer calls its experts, in folders."""

    router_name: ClassVar[str] = "gate"
    shared_mlp: ClassVar[type[GatedMLP]] = GatedMLP
    shared_name: ClassVar[str] = "mlp.shared_expert"
    """Of what every token goes through besides: in the layer."""

    shared_has_gate: ClassVar[bool] = True
    has_bias: ClassVar[bool] = False
    """Experts and router."""

    activation: ClassVar[Activation] = "silu"
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
        cls, name: str, gguf: str, *, hidden_size: int, num_experts: int, width: int, correction: bool
    ) -> Tensors:
        """Without what is shared. name: of the module, as `model.layers.0.mlp`; gguf: of the block, as `blk.0`."""
        router = f"{name}.{cls.router_name}"
        tensors = {f"{router}.weight": TensorSpec((num_experts, hidden_size), f"{gguf}.ffn_gate_inp.weight")}
        if cls.has_bias:
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
                for kind in ("weight", "bias")[: 1 + cls.has_bias]:
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
    def shared_tensors(cls, layer: str, gguf: str, *, hidden_size: int, width: int) -> Tensors:
        """Of what every token of the layer called `layer` goes through besides: as of any MLP, but for its names in
        GGUF files."""
        name = f"{layer}.{cls.shared_name}"
        tensors = {
            each: dataclasses.replace(spec, gguf=spec.gguf.replace(".weight", "_shexp.weight"))
            for each, spec in cls.shared_mlp.tensors(
                name, gguf, hidden_size=hidden_size, width=width, bias=False
            ).items()
        }
        if cls.shared_has_gate:
            tensors[f"{name}_gate.weight"] = TensorSpec((1, hidden_size), f"{gguf}.ffn_gate_inp_shexp.weight")
        return tensors

    @classmethod
    def load_shared(cls, packer: Packer, layer: str, ops: Ops) -> SharedMLP:
        name = f"{layer}.{cls.shared_name}"
        mlp = cls.shared_mlp.load(packer, name, ops)
        return SharedMLP(mlp, packer.linear(f"{name}_gate") if cls.shared_has_gate else None)

    @classmethod
    def load(
        cls: type[AnySparse],
        packer: Packer,
        name: str,
        ops: Ops,
        spec: RouteSpec,
        *,
        correction: bool,
        shared: SharedMLP | None,
    ) -> AnySparse:
        router = packer.router(f"{name}.{cls.router_name}", f"{name}.{cls.correction_name}" if correction else None)
        gate, up, down = cls.names
        each = [f"{name}.experts.{expert}" for expert in range(spec.num_experts)]
        experts = packer.experts([(f"{e}.{gate}", f"{e}.{up}", f"{e}.{down}") for e in each], cls.activation)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture of a decoder: its sizes, how experts are chosen, and what they are called.

    kind: has the names. width: the inner size of each expert. shared_width: of what every token goes through besides; 0
    where there is none. dense_layers: which have a plain MLP instead. correction: routers have one. The others:
    `RouteSpec`. CheckpointError for a number out of its bounds.
    """

    kind: type[SparseMLP] = SparseMLP
    num_experts: int
    top_k: int
    width: int
    shared_width: int = 0
    dense_layers: tuple[int, ...] = ()
    correction: bool = False
    score: Score = "softmax"
    groups: int = 1
    kept_groups: int = 1
    normalise: bool = False
    eps: float = 0.0
    minimum: float = 0.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_range("num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_range("num_experts_per_tok", self.top_k, 1, min(self.num_experts, MAX_TOP_K))
        check_range("moe_intermediate_size", self.width, 1, 2**20)
        check_range("width of shared experts", self.shared_width, 0, 2**20)
        check_range("n_group", self.groups, 1, self.num_experts)
        check_range("topk_group", self.kept_groups, 1, self.groups)
        check_range("moe_norm_min", self.minimum, 0.0, 1.0)
        check_range("routed_scaling_factor", self.factor, 1e-6, 1e6)
        size = self.num_experts // self.groups
        if self.num_experts % self.groups or self.top_k > self.kept_groups * size or size < self._group_top:
            raise CheckpointError(
                f"{self.top_k} of {self.num_experts} experts are not chosen from {self.kept_groups} of {self.groups}"
                " equal groups"
            )

    @property
    def _group_top(self) -> int:
        """How many experts of a group count for its choice."""
        return 2 if self.score == "sigmoid" and self.groups > 1 else 1

    @property
    def route(self) -> RouteSpec:
        return RouteSpec(
            num_experts=self.num_experts,
            top_k=self.top_k,
            score=self.score,
            groups=self.groups,
            kept_groups=self.kept_groups,
            group_top=self._group_top,
            normalise=self.normalise,
            eps=self.eps,
            minimum=self.minimum,
            factor=self.factor,
        )

    def tensors(self, layer: str, gguf: str, hidden_size: int) -> Tensors:
        """Of the layer that is called `layer` in folders and `gguf` in GGUF files."""
        kind, count = self.kind, self.num_experts
        tensors = kind.tensors(
            f"{layer}.{kind.module}",
            gguf,
            hidden_size=hidden_size,
            num_experts=count,
            width=self.width,
            correction=self.correction,
        )
        if self.shared_width:
            tensors |= kind.shared_tensors(layer, gguf, hidden_size=hidden_size, width=self.shared_width)
        return tensors

    def load(self, packer: Packer, ops: Ops, layer: str) -> SparseMLP:
        kind = self.kind
        shared = kind.load_shared(packer, layer, ops) if self.shared_width else None
        name = f"{layer}.{kind.module}"
        return kind.load(packer, name, ops, self.route, correction=self.correction, shared=shared)

    def part(self, size: int) -> Experts:
        """Of one of `size` ranks."""
        return dataclasses.replace(self, width=self.width // size, shared_width=self.shared_width // size)
