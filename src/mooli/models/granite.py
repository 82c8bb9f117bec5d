"""Granite 3, dense and with experts: Llama's layers with four multipliers.

Owns the multipliers and where they go. With m the residual multiplier, what runs through the layers here is h / m:
branches are then added as they are, the embedding is scaled by (embedding multiplier) / m, and every norm of h is that
of h / m with eps / m^2. Logits are divided by scaling the gains of the last norm. So no operation is added. Folders
have all experts of a layer in two tensors.

Source: the Granite 3 models' configuration and code in Transformers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.base import Array, Ops, RopeSpec
from mooli.backends.routing import MAX_EXPERTS, MAX_TOP_K, RouteSpec
from mooli.errors import UnsupportedModelError
from mooli.models import llama, rope
from mooli.models.config import TensorSpec
from mooli.models.experts import SparseMLP
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range
from mooli.models.layers import MLP, PAIRS_IN_GGUF, Attention, Mixer, Tensors
from mooli.models.packer import Packer
from mooli.models.stacks import Stacked


@dataclass(frozen=True, slots=True, kw_only=True)
class GraniteConfig(llama.LlamaConfig):
    """Of a decoder of the family. attention_multiplier: of scores. CheckpointError for a number out of its bounds."""

    attention_multiplier: float = 1.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def __post_init__(self) -> None:
        llama.LlamaConfig.__post_init__(self)
        for name in ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
            check_range(name, getattr(self, name), 1e-6, 1e6)

    def tensors(self) -> dict[str, TensorSpec]:
        tensors = llama.LlamaConfig.tensors(self)
        last = "model.norm.weight"
        return {**tensors, last: dataclasses.replace(tensors[last], factor=1.0 / self.logits_scaling)}


class GraniteModel:
    """T tokens in a step, H hidden size."""

    def __init__(self, config: GraniteConfig, ops: Ops, packer: Packer) -> None:
        self.config = config
        self._ops = ops
        self._eps = config.rms_norm_eps / config.residual_multiplier**2
        self._spec = llama.attention_spec(config, scale=config.attention_multiplier)
        rotary = rope.rope_spec(config.head_dim, config.rope_theta, config.rope_scaling)
        self._embedding, self._head = llama.load_vocabulary(config, packer)
        self._layers = []
        for index in range(config.num_layers):
            name = f"model.layers.{index}"
            mixer = self.load_mixer(packer, index, rotary)
            self._layers.append(llama.load_layer(name, mixer, ops, packer, self.load_mlp(packer, name)))
        self._norm = packer.vector("model.norm.weight")

    def load_mixer(self, packer: Packer, index: int, rotary: RopeSpec) -> Mixer:
        """What layer `index` takes from other tokens by."""
        return self.load_attention(packer, f"model.layers.{index}.self_attn", rotary)

    def load_attention(self, packer: Packer, name: str, rotary: RopeSpec | None) -> Attention:
        return Attention.load(packer, name, self._ops, self._spec, rotary, self._eps, qk_norm=False)

    def load_mlp(self, packer: Packer, name: str) -> MLP | None:
        """Of the layer called `name`, where it is no gated MLP."""
        return None

    def forward(self, batch: Any) -> Array:
        """The hidden states (T, H) of a planned step over the residual multiplier, before the final norm, of asked
        tokens. Stores the KV of all."""
        ops, config = self._ops, self.config
        hidden = ops.embed(batch, self._embedding, config.embedding_multiplier / config.residual_multiplier)
        for index, layer in enumerate(self._layers):
            mixed = layer.attention.mix(batch, index, ops.rms_norm(hidden, layer.input_norm, self._eps))
            if index + 1 == len(self._layers):
                mixed, hidden = ops.asked_rows(batch, mixed), ops.asked_rows(batch, hidden)
            hidden = layer.attention.output(batch, mixed, residual=hidden)
            hidden = layer.mlp.output(batch, ops.rms_norm(hidden, layer.post_attention_norm, self._eps), hidden)
        return hidden

    def logits(self, batch: Any, hidden: Array) -> Array:
        """The logits (S, vocab_size) of rows of hidden states (S, H), as `forward` returned them, and their batch."""
        return self._ops.linear(batch, self._ops.rms_norm(hidden, self._norm, self._eps), self._head)


class GraniteExperts(SparseMLP):
    """Other names."""

    __slots__ = ()
    router_name: ClassVar[str] = "router.layer"

    @classmethod
    def hf_stacks(cls, name: str, kind: str, part: int, expert: int, num_experts: int) -> tuple[Stacked, ...]:
        block = name.removesuffix(".experts")
        if part == 2:
            return (Stacked(f"{block}.output_linear.{kind}", expert, num_experts),)
        return (Stacked(f"{block}.input_linear.{kind}", expert, num_experts, part, 2),)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraniteMoeConfig(GraniteConfig):
    """Of a decoder with experts of intermediate_size in every layer. CheckpointError for a number out of its
    bounds."""

    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        GraniteConfig.__post_init__(self)
        check_range("num_local_experts", self.num_experts, 1, MAX_EXPERTS)
        check_range("num_experts_per_tok", self.top_k, 1, min(self.num_experts, MAX_TOP_K))

    @property
    def route(self) -> RouteSpec:
        return RouteSpec(num_experts=self.num_experts, top_k=self.top_k, score="chosen_softmax")

    def mlp_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        return GraniteExperts.tensors(
            f"{name}.block_sparse_moe",
            gguf,
            hidden_size=self.hidden_size,
            num_experts=self.num_experts,
            width=self.intermediate_size,
        )


class GraniteMoeModel(GraniteModel):
    """With experts."""

    config: GraniteMoeConfig

    def load_mlp(self, packer: Packer, name: str) -> MLP:
        return GraniteExperts.load(packer, f"{name}.block_sparse_moe", self._ops, self.config.route)


def _hf(source: HFSource) -> GraniteConfig:
    return GraniteConfig(**read_hf(source, mlp_bias=source.fields.flag("mlp_bias")))


def _hf_moe(source: HFSource) -> GraniteMoeConfig:
    fields = source.fields
    num_experts = fields.optional_integer("num_experts") or fields.integer("num_local_experts", 8)
    return GraniteMoeConfig(**read_hf(source), num_experts=num_experts, top_k=fields.integer("num_experts_per_tok", 2))


def read_hf(source: HFSource, **own: Any) -> dict[str, Any]:
    """What all of the family read of a config.json alike."""
    fields, bias = source.fields, source.fields.flag("attention_bias")
    common = source.common(max_position_embeddings=2048, bos_id=1, eos_id=2)
    multipliers: dict[str, Any] = {name: fields.number(name, 1.0) for name in MULTIPLIERS}
    alike = llama.read_hf(source, common, qkv_bias=bias, o_bias=bias, **own)
    return {**alike, **multipliers, "pairs": PAIRS_IN_GGUF}


def _gguf(source: GGUFSource) -> GraniteConfig:
    return GraniteConfig(**_read_gguf(source))


def _gguf_moe(source: GGUFSource) -> GraniteMoeConfig:
    fields = source.fields
    if "blk.0.ffn_up_shexp.weight" in source.shapes:
        raise UnsupportedModelError(
            "experts beside an MLP that all tokens go through (GraniteMoeShared) are not implemented"
        )
    return GraniteMoeConfig(
        **_read_gguf(source, has_experts=True),
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
    )


def _read_gguf(source: GGUFSource, *, has_experts: bool = False) -> dict[str, Any]:
    alike = llama.read_gguf(source, has_experts=has_experts)
    return {**alike, **gguf_multipliers(source), "pairs": PAIRS_IN_GGUF}


def gguf_multipliers(source: GGUFSource) -> dict[str, Any]:
    changed = source.overridden({name: source.fields.number(key, 1.0) for name, key in MULTIPLIERS.items()})
    return {name: changed.number(name) for name in MULTIPLIERS}


MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
"""Their names in a config.json and in GGUF files."""

GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    gguf=("granite",),
    hf_keys=llama.HF_KEYS | {"attention_bias", "mlp_bias"} | MULTIPLIERS.keys(),
    gguf_keys=llama.GGUF_KEYS | MULTIPLIERS.keys(),
    read_hf=_hf,
    read_gguf=_gguf,
    model=GraniteModel,
)
GRANITE_MOE = Family(
    name="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    gguf=("granitemoe",),
    hf_keys=llama.HF_KEYS
    | {"attention_bias", "num_experts", "num_local_experts", "num_experts_per_tok"}
    | MULTIPLIERS.keys(),
    gguf_keys=llama.GGUF_KEYS | MULTIPLIERS.keys(),
    read_hf=_hf_moe,
    read_gguf=_gguf_moe,
    model=GraniteMoeModel,
)
