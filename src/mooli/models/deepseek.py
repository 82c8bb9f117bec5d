"""Decoders with latent attention and a mixture of experts: DeepSeek V2, V3 and R1, Kimi K2, GLM-4.7-Flash.

Owns their configuration and model: which layers have experts, how these are chosen, and what every token goes through
besides. Layers behind the last one, which predict further tokens (MTP), are left out.

Sources: DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437; the models' code in Transformers.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.base import Array, CacheLayer, Ops, Weight
from mooli.backends.routing import MAX_EXPERTS, MAX_TOP_K, RouteSpec, Score
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import llama, mla, rope
from mooli.models.config import ModelConfig, TensorSpec
from mooli.models.experts import SharedMLP, SparseMLP
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, short
from mooli.models.layers import (
    ALWAYS_PAIRS,
    MLP,
    PAIRS_IN_GGUF,
    GatedMLP,
    Pairs,
    Tensors,
    norm_tensors,
    vocabulary_tensors,
)
from mooli.models.mla import LatentAttention, LatentHeads
from mooli.models.packer import Packer
from mooli.models.qwen_moe import shared_tensors
from mooli.models.rope import RopeScaling

logger = logging.getLogger(__name__)

SUM_EPS = 1e-20
"""Added to the sum of weights that are normalised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekConfig(ModelConfig):
    """Of a decoder of these families. CheckpointError if any number is out of its bounds.

    expert_width: the inner size of each expert. shared_width: of what every token goes through besides; 0 where there
    is none. dense_layers: which have a plain MLP instead, of intermediate_size. correction: routers have one. num_mtp:
    layers behind the last one that files may have, and that are left out.
    """

    norm_names: ClassVar[tuple[tuple[str, str], ...]] = (
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    )
    """Of each layer, in folders and in GGUF files."""

    intermediate_size: int
    heads: LatentHeads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int = 0
    dense_layers: tuple[int, ...] = ()
    score: Score = "sigmoid"
    groups: int = 1
    kept_groups: int = 1
    normalise: bool = True
    routed_scaling_factor: float = 1.0
    correction: bool = True
    num_mtp: int = 0

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        check_range("intermediate_size", self.intermediate_size, 1, 2**20)
        check_range("rms_norm_eps", self.rms_norm_eps, 1e-30, 1.0)
        check_range("rope_theta", self.rope_theta, 1e-3, 1e15)
        check_range("n_routed_experts", self.num_experts, 1, MAX_EXPERTS)
        check_range("num_experts_per_tok", self.top_k, 1, min(self.num_experts, MAX_TOP_K))
        check_range("moe_intermediate_size", self.expert_width, 1, 2**20)
        check_range("n_shared_experts times moe_intermediate_size", self.shared_width, 0, 2**20)
        check_range("routed_scaling_factor", self.routed_scaling_factor, 1e-6, 1e6)
        check_range("num_nextn_predict_layers", self.num_mtp, 0, 64)
        check_range("n_group", self.groups, 1, self.num_experts)
        check_range("topk_group", self.kept_groups, 1, self.groups)
        size = self.num_experts // self.groups
        if self.num_experts % self.groups or self.top_k > self.kept_groups * size or size < self._group_top:
            raise CheckpointError(
                f"{self.top_k} of {self.num_experts} experts are not chosen from {self.kept_groups} of {self.groups}"
                " equal groups"
            )
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.heads.rope_dim)

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
            eps=SUM_EPS if self.normalise else 0.0,
            factor=self.routed_scaling_factor,
        )

    def tensors(self) -> dict[str, TensorSpec]:
        hidden = self.hidden_size
        tensors = vocabulary_tensors("model.embed_tokens", "token_embd", self.vocab_size, hidden)
        for layer in range(self.num_layers):
            name, gguf = f"model.layers.{layer}", f"blk.{layer}"
            for norm, in_gguf in self.norm_names:
                tensors |= norm_tensors(f"{name}.{norm}", f"{gguf}.{in_gguf}", hidden)
            tensors |= LatentAttention.tensors(f"{name}.self_attn", gguf, hidden, self.heads)
            tensors |= self._mlp_tensors(layer, f"{name}.mlp", gguf)
        tensors |= norm_tensors("model.norm", "output_norm", hidden)
        if not self.tie_word_embeddings:
            tensors |= vocabulary_tensors("lm_head", "output", self.vocab_size, hidden)
        return tensors

    def _mlp_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        hidden = self.hidden_size
        if layer in self.dense_layers:
            return GatedMLP.tensors(name, gguf, hidden_size=hidden, width=self.intermediate_size, bias=False)
        tensors = SparseMLP.tensors(
            name,
            gguf,
            hidden_size=hidden,
            num_experts=self.num_experts,
            width=self.expert_width,
            correction=self.correction,
        )
        if not self.shared_width:
            return tensors
        return tensors | shared_tensors(f"{name}.shared_experts", gguf, hidden_size=hidden, width=self.shared_width)

    def may_ignore(self, name: str) -> bool:
        if name == "lm_head.weight":
            return self.tie_word_embeddings
        further = range(self.num_layers, self.num_layers + self.num_mtp)
        return name.endswith("rotary_emb.inv_freq") or name.startswith(
            tuple(f"{prefix}.{layer}." for layer in further for prefix in ("model.layers", "blk"))
        )

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        return (self.heads.layer,) * self.num_layers

    def part(self, size: int) -> DeepseekConfig:
        return dataclasses.replace(
            self,
            heads=self.heads.part(size),
            intermediate_size=self.intermediate_size // size,
            expert_width=self.expert_width // size,
            shared_width=self.shared_width // size,
        )


@dataclass(frozen=True, slots=True)
class DeepseekLayer:
    """One decoder layer, with a norm before attention and one before what follows."""

    attention: LatentAttention
    mlp: MLP
    norms: tuple[Weight, ...]
    eps: float

    def after_attention(self, ops: Ops, batch: Any, mixed: Array, hidden: Array) -> Array:
        """What the layer gives (T, H), of what its attention mixed and of what came in."""
        hidden = self.attention.output(batch, mixed, residual=hidden)
        return self.mlp.output(batch, ops.rms_norm(hidden, self.norms[1], self.eps), hidden)


class DeepseekModel:
    """T tokens in a step, H hidden size."""

    layer: ClassVar[type[DeepseekLayer]] = DeepseekLayer

    def __init__(self, config: DeepseekConfig, ops: Ops, packer: Packer) -> None:
        self.config = config
        self._ops = ops
        if config.num_mtp:
            logger.info(
                "layers behind the last one, which predict further tokens (MTP), are not used: up to %d", config.num_mtp
            )
        spec = config.heads.spec(config.rope_scaling)
        rotary = rope.rope_spec(config.heads.rope_dim, config.rope_theta, config.rope_scaling)
        if config.tie_word_embeddings:
            self._embedding, self._head = packer.tied("model.embed_tokens")
        else:
            self._embedding, self._head = packer.embedding("model.embed_tokens"), packer.head("lm_head")
        self._layers = []
        for index in range(config.num_layers):
            name = f"model.layers.{index}"
            self._layers.append(
                self.layer(
                    attention=LatentAttention.load(packer, f"{name}.self_attn", ops, config.heads, spec, rotary),
                    mlp=self._mlp(packer, index, f"{name}.mlp"),
                    norms=tuple(packer.vector(f"{name}.{norm}.weight") for norm, _ in config.norm_names),
                    eps=config.rms_norm_eps,
                )
            )
        self._norm = packer.vector("model.norm.weight")

    def _mlp(self, packer: Packer, layer: int, name: str) -> MLP:
        config, ops = self.config, self._ops
        if layer in config.dense_layers:
            return GatedMLP.load(packer, name, ops)
        shared = None
        if config.shared_width:
            shared = SharedMLP(GatedMLP.load(packer, f"{name}.shared_experts", ops), None)
        return SparseMLP.load(packer, name, ops, config.route, correction=config.correction, shared=shared)

    def forward(self, batch: Any) -> Array:
        """The hidden states (T, H) of a planned step, before the final norm, of asked tokens. Stores the latents of
        all."""
        ops, eps = self._ops, self.config.rms_norm_eps
        hidden = ops.embed(batch, self._embedding)
        for index, layer in enumerate(self._layers):
            mixed = layer.attention.mix(batch, index, ops.rms_norm(hidden, layer.norms[0], eps))
            if index + 1 == len(self._layers):
                mixed, hidden = ops.asked_rows(batch, mixed), ops.asked_rows(batch, hidden)
            hidden = layer.after_attention(ops, batch, mixed, hidden)
        return hidden

    def logits(self, batch: Any, hidden: Array) -> Array:
        """The logits (S, vocab_size) of rows of hidden states (S, H), as `forward` returned them, and their batch."""
        return self._ops.linear(batch, self._ops.rms_norm(hidden, self._norm, self.config.rms_norm_eps), self._head)


def read_hf(source: HFSource, common: dict[str, Any], **own: Any) -> dict[str, Any]:
    """What all read of a config.json alike. own: what they read otherwise."""
    fields = source.fields
    llama.check_silu(source)
    for key in ("index_topk", "index_n_heads"):
        if source.values.get(key) is not None:
            raise UnsupportedModelError(f"an indexer that chooses the tokens to attend to ({key}) is not implemented")
    if fields.integer("moe_layer_freq", 1) != 1:
        raise UnsupportedModelError("experts in only some of the layers (moe_layer_freq) are not implemented")
    theta, scaling = rope.hf_rope(source.values)
    width = fields.integer("moe_intermediate_size")
    read = {
        "intermediate_size": fields.integer("intermediate_size"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "num_experts": fields.integer("n_routed_experts"),
        "top_k": fields.integer("num_experts_per_tok"),
        "expert_width": width,
        "shared_width": (fields.optional_integer("n_shared_experts") or 0) * width,
        "groups": fields.optional_integer("n_group") or 1,
        "kept_groups": fields.optional_integer("topk_group") or 1,
        "routed_scaling_factor": fields.number("routed_scaling_factor", 1.0),
        "num_mtp": fields.optional_integer("num_nextn_predict_layers") or 0,
    }
    return {**common, **read, **own}


def _dense(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """The layers without experts."""
    check_range("num_hidden_layers", num_layers, 1, 1024)
    return tuple(range(min(fields.integer("first_k_dense_replace", 0), num_layers)))


def _pairs(fields: Fields) -> Pairs:
    return ALWAYS_PAIRS if fields.flag("rope_interleave", True) else PAIRS_IN_GGUF


def _hf_v2(source: HFSource) -> DeepseekConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=2048, bos_id=1, eos_id=2)
    method = source.values.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModelError(f"topk_method {short(method)} is not implemented for deepseek_v2")
    if fields.flag("norm_topk_prob"):
        raise UnsupportedModelError("norm_topk_prob is not implemented for deepseek_v2")
    groups = {} if method == "group_limited_greedy" else {"groups": 1, "kept_groups": 1}
    return DeepseekConfig(
        **read_hf(source, common, **groups),
        heads=mla.hf_heads(fields, ALWAYS_PAIRS),
        dense_layers=_dense(fields, common["num_layers"]),
        score="softmax",
        normalise=False,
        correction=False,
    )


def _hf_v3(source: HFSource) -> DeepseekConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=4096, bos_id=0, eos_id=1)
    check_sigmoid(source)
    return DeepseekConfig(
        **read_hf(source, common),
        heads=mla.hf_heads(fields, _pairs(fields)),
        dense_layers=_dense(fields, common["num_layers"]),
        normalise=fields.flag("norm_topk_prob", True),
    )


def check_sigmoid(source: HFSource) -> None:
    """Raise UnsupportedModelError for a config.json of routers with other scores, or of another way to choose."""
    for key, known in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        value = source.values.get(key)
        if value not in (None, known):
            raise UnsupportedModelError(f"{key} {short(value)} is not implemented for {source.family}, only {known}")


def _hf_glm(source: HFSource) -> DeepseekConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=202752, bos_id=0, eos_id=1)
    check_sigmoid(source)
    kinds, num_layers = source.values.get("mlp_layer_types"), common["num_layers"]
    check_range("num_hidden_layers", num_layers, 1, 1024)
    if kinds is None:
        dense = tuple(range(min(fields.integer("first_k_dense_replace", 1), num_layers)))
    elif not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {"dense", "sparse"}:
        raise CheckpointError(f"config.json: mlp_layer_types must be a list of dense and sparse, got {short(kinds)}")
    else:
        dense = tuple(index for index, kind in enumerate(kinds) if kind == "dense")
    return DeepseekConfig(
        **read_hf(source, common, rms_norm_eps=fields.number("rms_norm_eps", 1e-5)),
        heads=mla.hf_heads(fields, _pairs(fields)),
        dense_layers=dense,
        normalise=fields.flag("norm_topk_prob", True),
    )


def _gguf(source: GGUFSource) -> DeepseekConfig:
    fields, shapes = source.fields, source.shapes
    common = source.common()
    num_mtp = fields.integer("nextn_predict_layers", 0)
    common["num_layers"] -= num_mtp
    check_range("block_count", common["num_layers"], 1, 1024)
    # With keys and values apart, the lengths of a key and a value are those of the latents.
    ending = "_mla" if fields.optional_integer("attention.key_length_mla") is not None else ""
    rope_dim = fields.integer("rope.dimension_count")
    key_dim = fields.integer(f"attention.key_length{ending}")
    gating = fields.integer("expert_gating_func", 0) or 1
    if gating not in (1, 2):
        raise UnsupportedModelError(f"expert_gating_func {gating} is not implemented; implemented: 1, 2")
    width, num_experts = fields.integer("expert_feed_forward_length"), fields.integer("expert_count")
    changed = source.overridden(
        {
            "rope_theta": fields.number("rope.freq_base", 10000.0),
            "rope_scaling": rope.gguf_scaling(fields, source.freq_factors),
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        }
    )
    scaling = changed.values["rope_scaling"]
    if not isinstance(scaling, RopeScaling):
        scaling = rope.read_scaling(scaling, fields.integer("context_length"))
    dense = range(min(fields.integer("leading_dense_block_count", 0), common["num_layers"]))
    return DeepseekConfig(
        **common,
        intermediate_size=fields.per_layer("feed_forward_length"),
        heads=LatentHeads(
            num_heads=fields.per_layer("attention.head_count"),
            q_rank=fields.optional_integer("attention.q_lora_rank") if "blk.0.attn_q_a.weight" in shapes else None,
            rank=fields.integer("attention.kv_lora_rank"),
            nope_dim=key_dim - rope_dim,
            rope_dim=rope_dim,
            value_dim=fields.integer(f"attention.value_length{ending}"),
            is_split="blk.0.attn_k_b.weight" in shapes,
            pairs=ALWAYS_PAIRS,
        ),
        rms_norm_eps=changed.number("rms_norm_eps"),
        rope_theta=changed.number("rope_theta"),
        rope_scaling=scaling,
        tie_word_embeddings="output.weight" not in shapes,
        num_experts=num_experts,
        top_k=fields.integer("expert_used_count"),
        expert_width=width,
        shared_width=fields.integer("expert_shared_count", 0) * width,
        dense_layers=tuple(dense),
        score="sigmoid" if gating == 2 else "softmax",
        groups=fields.integer("expert_group_count", 0) or 1,
        kept_groups=fields.integer("expert_group_used_count", 0) or 1,
        normalise=fields.flag("expert_weights_norm"),
        routed_scaling_factor=fields.number("expert_weights_scale", 1.0) or 1.0,
        correction=f"blk.{len(dense)}.exp_probs_b.bias" in shapes,
        num_mtp=num_mtp,
    )


HF_KEYS = (
    rope.HF_KEYS
    | mla.HF_KEYS
    | frozenset(
        (
            *("intermediate_size", "num_attention_heads", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
            *("attention_bias", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts"),
            *("n_group", "topk_group", "routed_scaling_factor", "num_nextn_predict_layers", "moe_layer_freq"),
            *("index_topk", "index_n_heads"),
        )
    )
)
_SIGMOID_KEYS = frozenset(("scoring_func", "topk_method", "norm_topk_prob", "rope_interleave"))

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    hf_keys=HF_KEYS | {"topk_method", "norm_topk_prob", "first_k_dense_replace"},
    read_hf=_hf_v2,
    model=DeepseekModel,
)
DEEPSEEK_V3 = Family(
    name="deepseek_v3",  # Kimi K2 names its class too
    architectures=("DeepseekV3ForCausalLM",),
    gguf=("deepseek2",),
    hf_keys=HF_KEYS | _SIGMOID_KEYS | {"first_k_dense_replace"},
    gguf_keys=frozenset(("rope_theta", "rope_scaling", "rms_norm_eps")),
    read_hf=_hf_v3,
    read_gguf=_gguf,
    model=DeepseekModel,
)
GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    architectures=("Glm4MoeLiteForCausalLM",),
    hf_keys=HF_KEYS | _SIGMOID_KEYS | {"first_k_dense_replace", "mlp_layer_types"},
    read_hf=_hf_glm,
    model=DeepseekModel,
)
