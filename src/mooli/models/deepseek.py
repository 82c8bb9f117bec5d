"""Decoders with latent attention and a mixture of experts: DeepSeek V2, V3 and R1, Kimi K2, GLM-4.7-Flash.

Owns their configuration and model: which layers have experts, how these are chosen, and what every token goes through
besides. Layers behind the last one, which predict further tokens (MTP), are left out.

Sources: DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437; the models' code in Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.base import CacheLayer, Ops, RopeSpec
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import llama, mla, rope
from mooli.models.decoder import DecoderConfig
from mooli.models.experts import Experts, SparseMLP
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, equal_heads, short
from mooli.models.layer_kinds import MAX_LAYERS, first_layers
from mooli.models.layers import ALWAYS_PAIRS, PAIRS_IN_GGUF, Mixer, Pairs, Tensors
from mooli.models.mla import LatentAttention, LatentHeads
from mooli.models.packer import Packer
from mooli.models.rope import RopeScaling


class DeepseekExperts(SparseMLP):
    """Beside what every token goes through."""

    __slots__ = ()
    shared_name: ClassVar[str] = "mlp.shared_experts"
    shared_has_gate: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekConfig(DecoderConfig):
    """Of a decoder with latent attention. CheckpointError if any number is out of its bounds."""

    heads: LatentHeads

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.heads.rope_dim)

    def rotations(self) -> tuple[RopeSpec, ...]:
        return (rope.rope_spec(self.heads.rope_dim, self.rope_theta, self.rope_scaling),) * self.num_layers

    def mixer_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        return LatentAttention.tensors(f"{name}.self_attn", gguf, self.hidden_size, self.heads)

    def load_mixer(self, packer: Packer, ops: Ops, layer: int, name: str, rotation: RopeSpec | None) -> Mixer:
        assert rotation is not None  # `rotations` has one for each layer
        spec = self.heads.spec(self.rope_scaling)
        return LatentAttention.load(packer, f"{name}.self_attn", ops, self.heads, spec, rotation)

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        return (self.heads.layer,) * self.num_layers

    def shares(self, size: int) -> dict[str, Any]:
        return DecoderConfig.shares(self, size) | {"heads": self.heads.part(size)}


def read_hf(source: HFSource, common: dict[str, Any], pairs: Pairs, **own: Any) -> dict[str, Any]:
    """What all read of a config.json alike. own: what they read of the experts otherwise."""
    fields = source.fields
    llama.check_silu(source)
    for key in ("index_topk", "index_n_heads"):
        if source.values.get(key) is not None:
            raise UnsupportedModelError(f"an indexer that chooses the tokens to attend to ({key}) is not implemented")
    if fields.integer("moe_layer_freq", 1) != 1:
        raise UnsupportedModelError("experts in only some of the layers (moe_layer_freq) are not implemented")
    theta, scaling = rope.hf_rope(source.values)
    width = fields.integer("moe_intermediate_size")
    experts: dict[str, Any] = {
        "num_experts": fields.integer("n_routed_experts"),
        "top_k": fields.integer("num_experts_per_tok"),
        "width": width,
        "shared_width": (fields.optional_integer("n_shared_experts") or 0) * width,
        "score": "sigmoid",
        "correction": True,
        "eps": SUM_EPS,
        "groups": fields.optional_integer("n_group") or 1,
        "kept_groups": fields.optional_integer("topk_group") or 1,
        "factor": fields.number("routed_scaling_factor", 1.0),
    }
    if "dense_layers" not in own:
        own["dense_layers"] = first_layers(fields.integer("first_k_dense_replace", 0), common["num_layers"])
    return {
        **common,
        "intermediate_size": fields.integer("intermediate_size"),
        "heads": mla.hf_heads(fields, pairs),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "experts": Experts(kind=DeepseekExperts, **experts | own),
        "num_extra_blocks": fields.optional_integer("num_nextn_predict_layers") or 0,
    }


def _pairs(fields: Fields) -> Pairs:
    return ALWAYS_PAIRS if fields.flag("rope_interleave", True) else PAIRS_IN_GGUF


def _hf_v2(source: HFSource) -> DeepseekConfig:
    common = source.common(max_position_embeddings=2048, bos_id=1, eos_id=2)
    method = source.values.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModelError(f"topk_method {short(method)} is not implemented for deepseek_v2")
    if source.fields.flag("norm_topk_prob"):
        raise UnsupportedModelError("norm_topk_prob is not implemented for deepseek_v2")
    own: dict[str, Any] = {} if method == "group_limited_greedy" else {"groups": 1, "kept_groups": 1}
    own |= {"score": "softmax", "correction": False}
    return DeepseekConfig(**read_hf(source, common, ALWAYS_PAIRS, **own))


def _hf_v3(source: HFSource) -> DeepseekConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=4096, bos_id=0, eos_id=1)
    check_sigmoid(source)
    normalise = fields.flag("norm_topk_prob", True)
    return DeepseekConfig(**read_hf(source, common, _pairs(fields), normalise=normalise))


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
    if kinds is None:
        dense = first_layers(fields.integer("first_k_dense_replace", 1), num_layers)
    elif not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {"dense", "sparse"}:
        raise CheckpointError(f"config.json: mlp_layer_types must be a list of dense and sparse, got {short(kinds)}")
    else:
        dense = tuple(index for index, kind in enumerate(kinds) if kind == "dense")
    own = {"normalise": fields.flag("norm_topk_prob", True), "dense_layers": dense}
    alike = read_hf(source, common, _pairs(fields), **own)
    return DeepseekConfig(**alike | {"rms_norm_eps": fields.number("rms_norm_eps", 1e-5)})


def _gguf(source: GGUFSource) -> DeepseekConfig:
    fields, shapes = source.fields, source.shapes
    common = source.common()
    num_mtp = fields.integer("nextn_predict_layers", 0)
    common["num_layers"] -= num_mtp
    check_range("block_count", common["num_layers"], 1, MAX_LAYERS)
    gating = fields.integer("expert_gating_func", 0) or 1
    if gating not in (1, 2):
        raise UnsupportedModelError(f"expert_gating_func {gating} is not implemented; implemented: 1, 2")
    width = fields.integer("expert_feed_forward_length")
    dense = first_layers(fields.integer("leading_dense_block_count", 0), common["num_layers"])
    experts = Experts(
        kind=DeepseekExperts,
        num_experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        width=width,
        shared_width=fields.integer("expert_shared_count", 0) * width,
        dense_layers=dense,
        score="sigmoid" if gating == 2 else "softmax",
        groups=fields.integer("expert_group_count", 0) or 1,
        kept_groups=fields.integer("expert_group_used_count", 0) or 1,
        normalise=fields.flag("expert_weights_norm"),
        eps=SUM_EPS,
        factor=fields.number("expert_weights_scale", 1.0) or 1.0,
        correction=f"blk.{len(dense)}.exp_probs_b.bias" in shapes,
    )
    return DeepseekConfig(**common, **read_gguf(source, ALWAYS_PAIRS), experts=experts, num_extra_blocks=num_mtp)


def read_gguf(source: GGUFSource, pairs: Pairs) -> dict[str, Any]:
    """What all with latents read of GGUF metadata alike: their attention and norms."""
    fields, shapes = source.fields, source.shapes
    # With keys and values apart, the lengths of a key and a value are those of the latents.
    ending = "_mla" if fields.optional_integer("attention.key_length_mla") is not None else ""
    rope_dim, num_heads = fields.integer("rope.dimension_count"), fields.per_layer("attention.head_count")
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
    return {
        "intermediate_size": fields.per_layer("feed_forward_length"),
        "heads": LatentHeads(
            num_heads=num_heads,
            q_rank=fields.optional_integer("attention.q_lora_rank") if "blk.0.attn_q_a.weight" in shapes else None,
            rank=fields.integer("attention.kv_lora_rank"),
            nope_dim=fields.integer(f"attention.key_length{ending}") - rope_dim,
            rope_dim=rope_dim,
            value_dim=fields.optional_integer(f"attention.value_length{ending}")
            or equal_heads(fields.integer("embedding_length"), num_heads),
            is_split="blk.0.attn_k_b.weight" in shapes,
            pairs=pairs,
        ),
        "rms_norm_eps": changed.number("rms_norm_eps"),
        "rope_theta": changed.number("rope_theta"),
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in shapes,
    }


SUM_EPS = 1e-20
"""Added to the sum of weights that are normalised."""

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
GGUF_KEYS = frozenset(("rope_theta", "rope_scaling", "rms_norm_eps"))
_SIGMOID_KEYS = frozenset(("scoring_func", "topk_method", "norm_topk_prob", "rope_interleave"))

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    hf_keys=HF_KEYS | {"topk_method", "norm_topk_prob", "first_k_dense_replace"},
    read_hf=_hf_v2,
)
DEEPSEEK_V3 = Family(
    name="deepseek_v3",  # Kimi K2 names its class too
    architectures=("DeepseekV3ForCausalLM",),
    gguf=("deepseek2",),
    hf_keys=HF_KEYS | _SIGMOID_KEYS | {"first_k_dense_replace"},
    gguf_keys=GGUF_KEYS,
    read_hf=_hf_v3,
    read_gguf=_gguf,
)
GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    architectures=("Glm4MoeLiteForCausalLM",),
    hf_keys=HF_KEYS | _SIGMOID_KEYS | {"first_k_dense_replace", "mlp_layer_types"},
    read_hf=_hf_glm,
)
