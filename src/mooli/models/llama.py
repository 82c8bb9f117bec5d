"""The Llama family: Llama (SmolLM2 too), Mistral, Qwen2 and Qwen2.5, Qwen3, SmolLM3, ERNIE 4.5, openPangu-Embedded. One
decoder with grouped-query attention; each is a declaration below.

Owns the configuration of such a decoder, which other families take too, and how these are read. What differs between
them (biases, norms of queries and keys, a window, rope scaling, layers without rotation, a tied head) is a field.

Sources: LLaMA, arXiv 2302.13971; Mistral 7B, arXiv 2310.06825; Qwen2, arXiv 2407.10671; Qwen3, arXiv 2505.09388; layers
without rotation: arXiv 2501.18795; ERNIE 4.5 technical report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mooli.backends.base import AttentionSpec, CacheLayer, Ops, PagedLayer, RopeSpec
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import rope
from mooli.models.decoder import DecoderConfig
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, equal_heads, short
from mooli.models.layer_kinds import check_windows
from mooli.models.layers import ALWAYS_PAIRS, NO_PAIRS, PAIRS_IN_GGUF, Attention, Mixer, Pairs, Tensors
from mooli.models.packer import Packer
from mooli.models.rope import RopeScaling

_UNROTATED_EVERY = 4
"""Of so many layers of SmolLM3, the last is not rotated where nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Of a decoder with grouped-query attention. CheckpointError if a number is out of its bounds.

    attention: of which kind. attention_multiplier: of scores; None for one over the root of head_dim. sliding_window:
    each token attends to this many last positions, itself included, in every layer; None for all. windows: the same of
    each layer, 0 for all, where layers differ. unrotated: layers whose queries and keys are not rotated. rotary_dim: so
    many first values of a head are rotated; 0 for all. pairs: see `Pairs`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention: type[Attention] = Attention
    attention_multiplier: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    windows: tuple[int, ...] = ()
    unrotated: tuple[int, ...] = ()
    rotary_dim: int = 0
    pairs: Pairs = NO_PAIRS

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        check_range("num_heads", self.num_heads, 1, 4096)
        check_range("num_kv_heads", self.num_kv_heads, 1, self.num_heads)
        check_range("head_dim", self.head_dim, 2, 1024)
        if self.attention_multiplier is not None:
            check_range("attention_multiplier", self.attention_multiplier, 1e-6, 1e6)
        if self.sliding_window is not None:
            check_range("sliding_window", self.sliding_window, 1, 2**31)
        if self.windows:
            check_windows(self.windows, self.num_layers)
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd: rotary embedding needs pairs")
        check_range("rotary values of a head", self.rotary_dim, 0, self.head_dim)
        if self.rotary_dim % 2:
            raise CheckpointError(f"{self.rotary_dim} rotary values of a head: rotary embedding needs pairs")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rotary_dim or self.head_dim)

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else self.sliding_window or 0

    def attention_spec(self, layer: int) -> AttentionSpec:
        scale = self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier
        return AttentionSpec(self.num_heads, self.num_kv_heads, self.head_dim, scale, self.window(layer))

    def rotation(self) -> RopeSpec:
        return rope.rope_spec(self.rotary_dim or self.head_dim, self.rope_theta, self.rope_scaling)

    def rotations(self) -> tuple[RopeSpec | None, ...]:
        rotation = self.rotation()
        return tuple(None if layer in self.unrotated else rotation for layer in range(self.num_layers))

    def mixer_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        return self.attention.tensors(
            f"{name}.self_attn",
            gguf,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            qk_norm=self.qk_norm,
            pairs=self.pairs,
        )

    def load_mixer(self, packer: Packer, ops: Ops, layer: int, name: str, rotation: RopeSpec | None) -> Mixer:
        spec, eps = self.attention_spec(layer), self.rms_norm_eps
        return self.attention.load(packer, f"{name}.self_attn", ops, spec, rotation, eps, qk_norm=self.qk_norm)

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        return tuple(PagedLayer(self.num_kv_heads, self.head_dim, self.window(n)) for n in range(self.num_layers))

    def shares(self, size: int) -> dict[str, Any]:
        heads, kv_heads = self.num_heads // size, max(1, self.num_kv_heads // size)
        return DecoderConfig.shares(self, size) | {"num_heads": heads, "num_kv_heads": kv_heads}


def check_silu(source: HFSource) -> None:
    """Raise UnsupportedModelError for a config.json with another activation."""
    activation = source.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"activation {short(activation)} is not implemented; {source.family} models use silu"
        )


def read_hf(source: HFSource, common: dict[str, Any], **own: Any) -> dict[str, Any]:
    """What all read of a config.json alike. common: what `source.common` read; own: what they read otherwise."""
    fields = source.fields
    check_silu(source)
    num_heads = fields.integer("num_attention_heads")
    theta, scaling = rope.hf_rope(source.values)
    alike: dict[str, Any] = {
        "intermediate_size": fields.integer("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": fields.optional_integer("num_key_value_heads") or num_heads,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
    }
    if "head_dim" not in own:
        alike["head_dim"] = fields.optional_integer("head_dim") or equal_heads(common["hidden_size"], num_heads)
    return {**common, **alike, **own}


def _hf_llama(source: HFSource) -> LlamaConfig:
    bias = source.fields.flag("attention_bias")
    common = source.common(max_position_embeddings=2048, bos_id=1, eos_id=2)
    own: dict[str, Any] = {"mlp_bias": source.fields.flag("mlp_bias"), "pairs": PAIRS_IN_GGUF}
    return LlamaConfig(**read_hf(source, common, qkv_bias=bias, o_bias=bias, **own))


def _hf_smollm3(source: HFSource) -> LlamaConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=32768, bos_id=128000, eos_id=128001)
    if fields.flag("use_sliding_window") and fields.optional_integer("sliding_window") is not None:
        raise UnsupportedModelError("a sliding window in only some of the layers is not implemented")
    rotated = source.values.get("no_rope_layers")
    if rotated is None:
        every = fields.integer("no_rope_layer_interval", _UNROTATED_EVERY)
        check_range("no_rope_layer_interval", every, 1, 1024)
        unrotated = tuple(range(every - 1, min(common["num_layers"], 1024), every))
    elif not isinstance(rotated, list) or len(rotated) != common["num_layers"] or not set(rotated) <= {0, 1}:
        raise CheckpointError(f"config.json: no_rope_layers must be a list of 0 and 1, got {short(rotated)}")
    else:
        unrotated = tuple(index for index, is_rotated in enumerate(rotated) if not is_rotated)
    bias = fields.flag("attention_bias")
    own: dict[str, Any] = {
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 4) or fields.integer("num_attention_heads"),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
        "rope_theta": rope.hf_rope({"rope_theta": 2e6, **source.values})[0],
        "mlp_bias": fields.flag("mlp_bias"),
        "unrotated": unrotated,
        "pairs": PAIRS_IN_GGUF,
    }
    return LlamaConfig(**read_hf(source, common, qkv_bias=bias, o_bias=bias, **own))


def _hf_ernie(source: HFSource) -> LlamaConfig:
    fields, bias = source.fields, source.fields.flag("use_bias")
    common = source.common(max_position_embeddings=131072, bos_id=1, eos_id=2)
    own: dict[str, Any] = {
        "head_dim": fields.integer("head_dim", 128),
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 2) or fields.integer("num_attention_heads"),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "rope_theta": rope.hf_rope({"rope_theta": 5e5, **source.values})[0],
        "mlp_bias": bias,
        "pairs": ALWAYS_PAIRS,
    }
    return LlamaConfig(**read_hf(source, common, qkv_bias=bias, o_bias=bias, **own))


def _hf_pangu(source: HFSource) -> LlamaConfig:
    fields = source.fields
    common = source.common(max_position_embeddings=32768, bos_id=1, eos_id=45892)
    bias = fields.flag("bias") or fields.flag("attention_bias")
    own: dict[str, Any] = {"rms_norm_eps": fields.number("rms_norm_eps", 1e-5), "mlp_bias": fields.flag("mlp_bias")}
    return LlamaConfig(**read_hf(source, common, qkv_bias=bias, o_bias=bias, **own))


def _hf_mistral(source: HFSource) -> LlamaConfig:
    fields = source.fields
    kv_heads = fields.optional_integer("num_key_value_heads", 8) or fields.integer("num_attention_heads")
    common = source.common(max_position_embeddings=32768, bos_id=1, eos_id=2)
    window = fields.optional_integer("sliding_window", 4096)
    return LlamaConfig(**read_hf(source, common, num_kv_heads=kv_heads, sliding_window=window))


def _hf_qwen2(source: HFSource) -> LlamaConfig:
    common = source.common(max_position_embeddings=32768)
    return LlamaConfig(**read_hf(source, common, qkv_bias=True, sliding_window=_hf_qwen_window(source.fields)))


def _hf_qwen3(source: HFSource) -> LlamaConfig:
    fields, bias = source.fields, source.fields.flag("attention_bias")
    common = source.common(max_position_embeddings=32768)
    own: dict[str, Any] = {"head_dim": fields.integer("head_dim", 128), "sliding_window": _hf_qwen_window(fields)}
    return LlamaConfig(**read_hf(source, common, qkv_bias=bias, o_bias=bias, qk_norm=True, **own))


def _hf_qwen_window(fields: Fields) -> int | None:
    """The window of every layer. UnsupportedModelError for one in only some of the layers."""
    window = fields.optional_integer("sliding_window", 4096)
    if window is None or not fields.flag("use_sliding_window"):
        return None
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first, num_layers = fields.integer("max_window_layers", 28), fields.integer("num_hidden_layers")
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(min(num_layers, 1024))]
    if not isinstance(kinds, list) or any(not isinstance(kind, str) for kind in kinds):
        raise CheckpointError(f"config.json: layer_types must be a list of names, got {short(kinds)}")
    if set(kinds) <= {"full_attention"}:
        return None
    if set(kinds) == {"sliding_attention"}:
        return window
    raise UnsupportedModelError("a sliding window in only some of the layers is not implemented")


def _gguf(source: GGUFSource) -> LlamaConfig:
    return LlamaConfig(**read_gguf(source))


def _gguf_llama(source: GGUFSource) -> LlamaConfig:
    return LlamaConfig(**read_gguf(source, has_window=True), pairs=PAIRS_IN_GGUF)  # Mistral's files are of these


def _gguf_paired(source: GGUFSource) -> LlamaConfig:
    return LlamaConfig(**read_gguf(source), pairs=PAIRS_IN_GGUF)


def _gguf_smollm3(source: GGUFSource) -> LlamaConfig:
    unrotated = tuple(range(_UNROTATED_EVERY - 1, source.fields.integer("block_count"), _UNROTATED_EVERY))
    return LlamaConfig(**read_gguf(source), pairs=PAIRS_IN_GGUF, unrotated=unrotated)


def read_gguf(
    source: GGUFSource,
    *,
    has_window: bool = False,
    is_partial: bool = False,
    has_experts: bool = False,
    theta: float = 10000.0,
) -> dict[str, Any]:
    """What all read of a GGUF file alike: what has a bias or a norm is seen by its tensors.

    has_window: whether the family may have a window in all layers; is_partial: whether it may rotate parts of heads;
    has_experts: whether it may have experts; theta: the rotary base where the file does not say.
    """
    fields, shapes = source.fields, source.shapes
    if fields.integer("expert_count", 0) and not has_experts:
        raise UnsupportedModelError(f"mixture of experts ({source.name}.expert_count) is not implemented")
    common = source.common()
    num_heads = fields.per_layer("attention.head_count")
    head_dim = fields.optional_integer("attention.key_length") or equal_heads(common["hidden_size"], num_heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("key and value heads of different length are not implemented")
    rotary_dim = fields.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim and not is_partial:
        raise UnsupportedModelError("partial rotary embedding is not implemented: whole heads are rotated")
    trained = fields.integer("context_length")
    window = fields.optional_integer("attention.sliding_window") or None
    if not (has_window or source.name == LLAMA.name) and window is not None and window < trained:
        raise UnsupportedModelError(f"a sliding window in a {source.family} GGUF file is not implemented")
    changed = source.overridden(
        {
            "rope_theta": fields.number("rope.freq_base", theta),
            "rope_scaling": rope.gguf_scaling(fields, source.freq_factors),
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
            "sliding_window": window,
        }
    )
    scaling = changed.values["rope_scaling"]
    return {
        **common,
        "intermediate_size": fields.per_layer("feed_forward_length"),
        "num_heads": num_heads,
        "num_kv_heads": fields.per_layer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": changed.number("rms_norm_eps"),
        "rope_theta": changed.number("rope_theta"),
        "rotary_dim": rotary_dim % head_dim,
        "rope_scaling": scaling if isinstance(scaling, RopeScaling) else rope.read_scaling(scaling, trained),
        "tie_word_embeddings": "output.weight" not in shapes,
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
        "o_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "qk_norm": "blk.0.attn_q_norm.weight" in shapes,
        "sliding_window": changed.optional_integer("sliding_window"),
    }


HF_KEYS = rope.HF_KEYS | frozenset(
    (
        *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
        "tie_word_embeddings",
    )
)
_QWEN_WINDOW_KEYS = frozenset(("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"))
GGUF_KEYS = frozenset(("rope_theta", "rope_scaling", "rms_norm_eps", "sliding_window"))

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    gguf=("llama",),
    hf_keys=HF_KEYS | {"attention_bias", "mlp_bias"},
    gguf_keys=GGUF_KEYS,
    read_hf=_hf_llama,
    read_gguf=_gguf_llama,
)
MISTRAL = Family(
    name="mistral",  # its GGUF files call themselves llama
    architectures=("MistralForCausalLM",),
    hf_keys=HF_KEYS | {"sliding_window"},
    read_hf=_hf_mistral,
)
QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    gguf=("qwen2",),
    hf_keys=HF_KEYS | _QWEN_WINDOW_KEYS,
    gguf_keys=GGUF_KEYS,
    read_hf=_hf_qwen2,
    read_gguf=_gguf,
)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    gguf=("qwen3",),
    hf_keys=HF_KEYS | _QWEN_WINDOW_KEYS | {"attention_bias"},
    gguf_keys=GGUF_KEYS,
    read_hf=_hf_qwen3,
    read_gguf=_gguf,
)
SMOLLM3 = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    gguf=("smollm3",),
    hf_keys=HF_KEYS
    | {
        "attention_bias",
        "mlp_bias",
        "no_rope_layers",
        "no_rope_layer_interval",
        "use_sliding_window",
        "sliding_window",
    },
    gguf_keys=GGUF_KEYS,
    read_hf=_hf_smollm3,
    read_gguf=_gguf_smollm3,
)
ERNIE4_5 = Family(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    gguf=("ernie4_5",),
    hf_keys=HF_KEYS | {"use_bias"},
    gguf_keys=GGUF_KEYS,
    read_hf=_hf_ernie,
    read_gguf=_gguf_paired,
)
PANGU_EMBEDDED = Family(
    name="PanguEmbedded",
    architectures=("PanguEmbeddedForCausalLM",),
    gguf=("pangu-embedded",),
    hf_keys=HF_KEYS | {"bias", "attention_bias", "mlp_bias"},
    gguf_keys=GGUF_KEYS,
    read_hf=_hf_pangu,
    read_gguf=_gguf,
)
