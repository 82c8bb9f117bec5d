"""Llama's decoder with a mixture of experts in the place of its MLP: Qwen3-MoE, Qwen2-MoE, Mixtral.

Owns their configuration: how many experts, how they are chosen, which layers have none, and what is shared.

Sources: Qwen3, arXiv 2505.09388; Qwen2, arXiv 2407.10671; Mixtral, arXiv 2401.04088.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.base import Ops
from mooli.backends.routing import MAX_EXPERTS, MAX_TOP_K, RouteSpec
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import llama
from mooli.models.config import TensorSpec
from mooli.models.experts import SharedMLP, SparseMLP
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, short
from mooli.models.layers import MLP, PAIRS_IN_GGUF, GatedMLP, Tensors
from mooli.models.packer import Packer


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig(llama.LlamaConfig):
    """Of a decoder with experts. CheckpointError if any number is out of its bounds.

    expert_width: the inner size of each. shared_width: of what every token goes through besides; 0 where there is none.
    dense_layers: which have a plain MLP instead, of intermediate_size.
    """

    sparse: ClassVar[type[SparseMLP]] = SparseMLP
    module: ClassVar[str] = "mlp"
    """What a layer calls its experts, in folders."""

    shared_name: ClassVar[str] = "shared_expert"
    shared_has_gate: ClassVar[bool] = True
    has_correction: ClassVar[bool] = False
    """Of the router: see `RouteSpec`."""

    num_experts: int
    top_k: int
    expert_width: int
    normalise: bool = False
    shared_width: int = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        llama.LlamaConfig.__post_init__(self)
        check_range("num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_range("num_experts_per_tok", self.top_k, 1, min(self.num_experts, MAX_TOP_K))
        check_range("moe_intermediate_size", self.expert_width, 1, 2**20)
        check_range("shared_expert_intermediate_size", self.shared_width, 0, 2**20)

    @property
    def route(self) -> RouteSpec:
        return RouteSpec(num_experts=self.num_experts, top_k=self.top_k, normalise=self.normalise)

    def mlp_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        if layer in self.dense_layers:
            return llama.LlamaConfig.mlp_tensors(self, layer, name, gguf)
        tensors = self.sparse.tensors(
            f"{name}.{self.module}",
            gguf,
            hidden_size=self.hidden_size,
            num_experts=self.num_experts,
            width=self.expert_width,
            correction=self.has_correction,
        )
        shared = f"{name}.{self.module}.{self.shared_name}"
        if self.shared_width:
            tensors |= shared_tensors(shared, gguf, hidden_size=self.hidden_size, width=self.shared_width)
        if self.shared_width and self.shared_has_gate:
            tensors[f"{shared}_gate.weight"] = TensorSpec((1, self.hidden_size), f"{gguf}.ffn_gate_inp_shexp.weight")
        return tensors

    def part(self, size: int) -> MoeConfig:
        return dataclasses.replace(
            self,
            num_heads=self.num_heads // size,
            num_kv_heads=max(1, self.num_kv_heads // size),
            intermediate_size=self.intermediate_size // size,
            expert_width=self.expert_width // size,
            shared_width=self.shared_width // size,
        )


def shared_tensors(name: str, gguf: str, *, hidden_size: int, width: int) -> Tensors:
    """Of an MLP of every token that stands beside experts: as any, but for its names in GGUF files."""
    tensors = GatedMLP.tensors(name, gguf, hidden_size=hidden_size, width=width, bias=False)
    return {
        each: dataclasses.replace(spec, gguf=spec.gguf.replace(".weight", "_shexp.weight"))
        for each, spec in tensors.items()
    }


class MoeModel(llama.LlamaModel):
    """Llama's, with experts in most layers."""

    config: MoeConfig

    def load_mlp(self, packer: Packer, layer: int, name: str) -> MLP:
        config = self.config
        if layer in config.dense_layers:
            return llama.LlamaModel.load_mlp(self, packer, layer, name)
        name = f"{name}.{config.module}"
        shared = None
        if config.shared_width:
            shared = load_shared(packer, f"{name}.{config.shared_name}", self._ops, has_gate=config.shared_has_gate)
        return config.sparse.load(
            packer, name, self._ops, config.route, correction=config.has_correction, shared=shared
        )


def load_shared(packer: Packer, name: str, ops: Ops, *, has_gate: bool) -> SharedMLP:
    """The gate is called `{name}_gate`."""
    mlp = GatedMLP.load(packer, name, ops)
    return SharedMLP(mlp, packer.linear(f"{name}_gate") if has_gate else None)


class MixtralExperts(SparseMLP):
    """Other names."""

    __slots__ = ()
    names: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtralConfig(MoeConfig):
    """Of Mixtral, whose experts are as wide as an MLP would be."""

    sparse: ClassVar[type[SparseMLP]] = MixtralExperts
    module: ClassVar[str] = "block_sparse_moe"


def dense_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Of Qwen's: those listed, and those that are no multiple of the step."""
    check_range("num_layers", num_layers, 1, 1024)
    step = fields.integer("decoder_sparse_step", 1)
    check_range("decoder_sparse_step", step, 1, 1024)
    listed = fields.values.get("mlp_only_layers") or []
    if not isinstance(listed, list) or any(type(layer) is not int for layer in listed):
        raise CheckpointError(f"config.json: mlp_only_layers must be a list of layers, got {short(listed)}")
    return tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)


def _hf_qwen(source: HFSource, **own: Any) -> MoeConfig:
    """What both versions of Qwen read alike."""
    fields = source.fields
    if fields.flag("use_sliding_window"):
        raise UnsupportedModelError(f"a sliding window is not implemented for {source.family} models")
    common = source.common(max_position_embeddings=32768)
    own["normalise"] = fields.flag("norm_topk_prob")
    own["dense_layers"] = dense_layers(fields, common["num_layers"])
    return MoeConfig(**llama.read_hf(source, common, **own))


def _hf_qwen3(source: HFSource) -> MoeConfig:
    fields, bias = source.fields, source.fields.flag("attention_bias")
    return _hf_qwen(
        source,
        num_experts=fields.optional_integer("num_experts") or fields.integer("num_local_experts", 128),
        top_k=fields.integer("num_experts_per_tok", 8),
        expert_width=fields.integer("moe_intermediate_size", 768),
        num_kv_heads=fields.optional_integer("num_key_value_heads", 4) or fields.integer("num_attention_heads"),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )


def _hf_qwen2(source: HFSource) -> MoeConfig:
    fields = source.fields
    return _hf_qwen(
        source,
        num_experts=fields.optional_integer("num_experts") or fields.integer("num_local_experts", 60),
        top_k=fields.integer("num_experts_per_tok", 4),
        expert_width=fields.integer("moe_intermediate_size", 1408),
        shared_width=fields.integer("shared_expert_intermediate_size", 5632),
        num_kv_heads=fields.optional_integer("num_key_value_heads", 16) or fields.integer("num_attention_heads"),
        qkv_bias=fields.flag("qkv_bias", True),
    )


def _hf_mixtral(source: HFSource) -> MixtralConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=131072, bos_id=1, eos_id=2)
    own: dict[str, Any] = {
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 8) or fields.integer("num_attention_heads"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "sliding_window": fields.optional_integer("sliding_window"),
        "num_experts": fields.optional_integer("num_experts") or fields.integer("num_local_experts", 8),
        "top_k": fields.integer("num_experts_per_tok", 2),
        "expert_width": fields.integer("intermediate_size"),
        "normalise": True,
        "pairs": PAIRS_IN_GGUF,
    }
    return MixtralConfig(**llama.read_hf(source, common, **own))


def _gguf_qwen3(source: GGUFSource) -> MoeConfig:
    return _gguf(source, normalise=True)


def _gguf_qwen2(source: GGUFSource) -> MoeConfig:
    shared = source.shapes.get("blk.0.ffn_up_shexp.weight", (0,))[0]
    return _gguf(source, normalise=False, shared_width=int(shared))


def _gguf_mixtral(source: GGUFSource) -> MixtralConfig:
    return MixtralConfig(**read_gguf(source, normalise=True), pairs=PAIRS_IN_GGUF)


def _gguf(source: GGUFSource, **own: Any) -> MoeConfig:
    return MoeConfig(**read_gguf(source, **own))


def read_gguf(source: GGUFSource, **own: Any) -> dict[str, Any]:
    """Most files do not say whether weights are normalised; which layers have no experts is seen by their tensors."""
    fields, shapes = source.fields, source.shapes
    alike = llama.read_gguf(source, has_experts=True)
    own["normalise"] = fields.flag("expert_weights_norm", own["normalise"])
    return {
        **alike,
        "num_experts": fields.integer("expert_count"),
        "top_k": fields.integer("expert_used_count"),
        "expert_width": fields.integer("expert_feed_forward_length", alike["intermediate_size"]),
        "dense_layers": tuple(i for i in range(alike["num_layers"]) if f"blk.{i}.ffn_gate_inp.weight" not in shapes),
        **own,
    }


_ROUTER_KEYS = frozenset(("num_experts", "num_local_experts", "num_experts_per_tok"))
_QWEN_KEYS = _ROUTER_KEYS | {
    *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "use_sliding_window"),
}

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    gguf=("qwen3moe",),
    hf_keys=llama.HF_KEYS | _QWEN_KEYS | {"attention_bias"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf_qwen3,
    read_gguf=_gguf_qwen3,
    model=MoeModel,
)
QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    gguf=("qwen2moe",),
    hf_keys=llama.HF_KEYS | _QWEN_KEYS | {"qkv_bias", "shared_expert_intermediate_size"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf_qwen2,
    read_gguf=_gguf_qwen2,
    model=MoeModel,
)
MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    gguf=("llama",),  # with experts
    gguf_with="expert_count",
    hf_keys=llama.HF_KEYS | _ROUTER_KEYS | {"sliding_window"},
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf_mixtral,
    read_gguf=_gguf_mixtral,
    model=MoeModel,
)
