"""What a model is, in numbers: read from a Hugging Face config.json or from GGUF metadata, checked once, then trusted.

Owns the names, bounds and defaults of model hyper-parameters. Never reads a file and never looks at weights; the loader
does. Where a key is missing, the default is the one Transformers gives that family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mooli.backends.base import KVSpec
from mooli.errors import CheckpointError, ConfigError, UnsupportedModelError
from mooli.models.fields import Fields, check_range, number, short

FAMILIES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Hugging Face architecture name to family."""

GGUF_ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""GGUF architecture to the Hugging Face name; Mistral files call themselves llama."""

DTYPES = ("float32", "float16", "bfloat16")

_OVERRIDABLE_GGUF = frozenset(
    (
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rms_norm_eps",
        "sliding_window",
        "eos_token_id",
        "bos_token_id",
    )
)
_READ_FROM_HF = _OVERRIDABLE_GGUF | frozenset(
    (
        *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rope_parameters"),
        *("tie_word_embeddings", "attention_bias", "mlp_bias", "dtype", "torch_dtype", "use_sliding_window"),
        *("max_window_layers", "layer_types", "partial_rotary_factor", "quantization_config"),
    )
)
_END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
_CONTROL_TOKEN = 3
_MAX_EOS_IDS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for long contexts.

    type "linear": divided by `factor`. "llama3": long wavelengths divided by `factor`, short ones kept, a ramp between
    (Llama 3.1). "freq_factors": each divided by its own entry of `freq_factors`, head_dim / 2 of them (GGUF).
    """

    type: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    freq_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Hyper-parameters of a decoder of the Llama family. CheckpointError if any is out of its bounds.

    family: llama, mistral, qwen2 or qwen3; `architecture` is its Hugging Face class name.
    dtype: what the checkpoint was saved in (quantised GGUF files: bfloat16).
    sliding_window: each token attends to this many last positions, itself included, in every layer; None for all.
    eos_ids: every id that ends a sequence, the generation config's first. They may lie outside the vocabulary.
    """

    family: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    dtype: str = "float32"
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def __post_init__(self) -> None:
        check_range("vocab_size", self.vocab_size, 1, 2**24)
        check_range("hidden_size", self.hidden_size, 1, 2**17)
        check_range("intermediate_size", self.intermediate_size, 1, 2**20)
        check_range("num_layers", self.num_layers, 1, 1024)
        check_range("num_heads", self.num_heads, 1, 4096)
        check_range("num_kv_heads", self.num_kv_heads, 1, self.num_heads)
        check_range("head_dim", self.head_dim, 2, 1024)
        check_range("max_position_embeddings", self.max_position_embeddings, 1, 2**28)
        check_range("rms_norm_eps", self.rms_norm_eps, 1e-30, 1.0)
        check_range("rope_theta", self.rope_theta, 1e-3, 1e15)
        if self.sliding_window is not None:
            check_range("sliding_window", self.sliding_window, 1, 2**31)
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd: rotary embedding needs pairs")
        if self.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"checkpoint dtype {self.dtype!r} is not supported; supported: {', '.join(DTYPES)}"
            )
        if self.rope_scaling is not None:
            _check_scaling(self.rope_scaling, self.head_dim)

    def kv_spec(self, page_size: int, dtype: str) -> KVSpec:
        """What the layers keep of each token, in pages of `page_size`; of one rank, if this is its part."""
        return KVSpec(self.num_layers, self.num_kv_heads, self.head_dim, page_size, dtype)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """From the contents of config.json and, if there is one, generation_config.json.

        Raises UnsupportedModelError for a family or feature that is not implemented, CheckpointError for bad values.
        """
        architecture = _hf_architecture(config)
        family = FAMILIES[architecture]
        fields = Fields(config, "config.json")
        quantization = config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
            raise UnsupportedModelError(
                f"the checkpoint is quantised with {method!r}, which is not implemented; use the unquantised model"
                " (and quantization='int8' or 'int4') or a GGUF file"
            )
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedModelError(f"activation {activation!r} is not implemented; {family} models use silu")
        hidden_size = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        num_layers = fields.integer("num_hidden_layers")
        attention_bias = fields.flag("attention_bias") if family in ("llama", "qwen3") else False
        theta, scaling, partial = _hf_rope(config)
        if partial != 1.0:
            raise UnsupportedModelError(f"partial_rotary_factor {partial} is not implemented: whole heads are rotated")
        if family == "qwen3":
            head_dim = fields.integer("head_dim", 128)
        else:
            head_dim = fields.optional_integer("head_dim") or _head_dim(hidden_size, num_heads)
        bos_id = fields.optional_integer("bos_token_id", 1 if family in ("llama", "mistral") else None)
        eos = config.get("eos_token_id", 2 if family in ("llama", "mistral") else None)
        generation_eos = generation.get("eos_token_id") if generation else None
        return cls(
            family=family,
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.optional_integer("num_key_value_heads", 8 if family == "mistral" else None)
            or num_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=fields.integer("max_position_embeddings", 2048 if family == "llama" else 32768),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=fields.flag("mlp_bias") if family == "llama" else False,
            qk_norm=family == "qwen3",
            sliding_window=_hf_window(fields, family, num_layers),
            dtype=_hf_dtype(config),
            eos_ids=_merge_ids(_id_list(generation_eos, "generation_config.json"), _id_list(eos, "config.json")),
            bos_id=bos_id,
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
        *,
        freq_factors: tuple[float, ...] = (),
        dtype: str = "bfloat16",
        overrides: Mapping[str, Any] | None = None,
    ) -> ModelConfig:
        """From the metadata and the tensors' (rows, columns) of a GGUF file.

        `freq_factors` is the content of `rope_freqs.weight`, if the file has it. `overrides` uses Hugging Face names.
        """
        name = metadata.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError("the GGUF file has no general.architecture: it is not a language model")
        if name not in GGUF_ARCHITECTURES:
            raise _unknown_family(name, GGUF_ARCHITECTURES)
        family = FAMILIES[GGUF_ARCHITECTURES[name]]
        fields = Fields(metadata, "GGUF metadata", f"{name}.")
        if fields.integer("expert_count", 0):
            raise UnsupportedModelError(f"mixture of experts ({name}.expert_count) is not implemented")
        embedding = shapes.get("token_embd.weight")
        if embedding is None or len(embedding) != 2:
            raise CheckpointError("the GGUF file has no token_embd.weight of two dimensions")
        hidden_size = fields.integer("embedding_length")
        num_heads = fields.per_layer("attention.head_count")
        head_dim = fields.optional_integer("attention.key_length") or _head_dim(hidden_size, num_heads)
        if fields.integer("attention.value_length", head_dim) != head_dim:
            raise UnsupportedModelError("key and value heads of different length are not implemented")
        if fields.integer("rope.dimension_count", head_dim) != head_dim:
            raise UnsupportedModelError("partial rotary embedding is not implemented: whole heads are rotated")
        context_length = fields.integer("context_length")
        window = fields.optional_integer("attention.sliding_window")
        if family != "llama" and window is not None and window < context_length:
            raise UnsupportedModelError(f"a sliding window in a {family} GGUF file is not implemented")
        values: dict[str, Any] = {
            "max_position_embeddings": context_length,
            "rope_theta": fields.number("rope.freq_base", 10000.0),
            "rope_scaling": _gguf_scaling(fields, freq_factors),
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
            "sliding_window": window,
            "eos_token_id": _gguf_eos(metadata),
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        }
        if overrides:
            _check_override_names(overrides, _OVERRIDABLE_GGUF, "a GGUF model")
            values.update(overrides)
        changed = Fields(values, "GGUF metadata")
        scaling = values["rope_scaling"]
        return cls(
            family=family,
            architecture=GGUF_ARCHITECTURES[name],
            vocab_size=int(embedding[0]),
            hidden_size=hidden_size,
            intermediate_size=fields.per_layer("feed_forward_length"),
            num_layers=fields.integer("block_count"),
            num_heads=num_heads,
            num_kv_heads=fields.per_layer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=changed.number("rms_norm_eps"),
            rope_theta=changed.number("rope_theta"),
            rope_scaling=scaling if isinstance(scaling, RopeScaling) else _scaling(scaling, context_length),
            max_position_embeddings=changed.integer("max_position_embeddings"),
            tie_word_embeddings="output.weight" not in shapes,
            qkv_bias="blk.0.attn_q.bias" in shapes,
            o_bias="blk.0.attn_output.bias" in shapes,
            mlp_bias="blk.0.ffn_gate.bias" in shapes,
            qk_norm="blk.0.attn_q_norm.weight" in shapes,
            sliding_window=changed.optional_integer("sliding_window"),
            dtype=dtype,
            eos_ids=_id_list(values["eos_token_id"], "GGUF metadata"),
            bos_id=changed.optional_integer("bos_token_id"),
        )


def merge_hf_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json with `json_model_override_args` laid over it; nested objects are merged key by key.

    ConfigError for a key that no model reads: an override must not be ignored.
    """
    merged = dict(config)
    if overrides:
        _check_override_names(overrides, _READ_FROM_HF, "a Hugging Face model")
    for key, value in (overrides or {}).items():
        old = merged.get(key)
        merged[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _check_scaling(scaling: RopeScaling, head_dim: int) -> None:
    check_range("rope scaling factor", scaling.factor, 1e-6, 1e6)
    if scaling.type == "llama3":
        check_range("low_freq_factor", scaling.low_freq_factor, 1e-6, 1e6)
        check_range("high_freq_factor", scaling.high_freq_factor, scaling.low_freq_factor * (1 + 1e-9), 1e9)
        check_range("original_max_position_embeddings", scaling.original_max_position_embeddings, 1, 2**28)
    elif scaling.type == "freq_factors":
        if len(scaling.freq_factors) != head_dim // 2:
            raise CheckpointError(f"{len(scaling.freq_factors)} rope frequency factors for head_dim {head_dim}")
        for factor in scaling.freq_factors:
            check_range("rope frequency factor", factor, 1e-6, 1e9)
    elif scaling.type != "linear":
        raise UnsupportedModelError(f"rope scaling {scaling.type!r} is not implemented; implemented: linear, llama3")


def _unknown_family(name: str, supported: Mapping[str, str]) -> UnsupportedModelError:
    return UnsupportedModelError(f"model family {short(name)} is not implemented; implemented: {', '.join(supported)}")


def _check_override_names(overrides: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ConfigError(f"cannot override {', '.join(unknown)} of {what}; possible: {', '.join(sorted(known))}")


def _head_dim(hidden_size: int, num_heads: int) -> int:
    if num_heads < 1 or hidden_size % num_heads:
        raise CheckpointError(f"hidden size {hidden_size} is not a multiple of the number of heads {num_heads}")
    return hidden_size // num_heads


def _hf_architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, (list, tuple)) and names:
        if isinstance(names[0], str) and names[0] in FAMILIES:
            return str(names[0])
        raise _unknown_family(str(names[0])[:80], FAMILIES)
    for architecture, family in FAMILIES.items():
        if config.get("model_type") == family:
            return architecture
    if "model_type" not in config:
        raise CheckpointError("config.json has neither architectures nor model_type")
    raise _unknown_family(str(config["model_type"])[:80], FAMILIES)


def _hf_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float]:
    """(theta, scaling, partial rotary factor); `rope_parameters` is what `rope_scaling` and `rope_theta` became."""
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = config.get(key) or {}
        if not isinstance(part, Mapping):
            raise CheckpointError(f"config.json: {key} must be an object, got {short(part)}")
        rope.update(part)
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    trained = config.get("max_position_embeddings", 2048)
    return (
        number(theta, "config.json: rope_theta"),
        _scaling(rope, trained),
        number(partial, "config.json: partial_rotary_factor"),
    )


def _scaling(rope: Mapping[str, Any] | None, max_position_embeddings: Any) -> RopeScaling | None:
    if rope is not None and not isinstance(rope, Mapping):
        raise CheckpointError(f"rope_scaling must be an object, got {short(rope)}")
    kind = (rope or {}).get("rope_type") or (rope or {}).get("type") or "default"
    if not rope or kind == "default":
        return None
    fields = Fields(rope, "rope parameters")
    if kind == "linear":
        return RopeScaling(type="linear", factor=fields.number("factor"))
    if kind == "llama3":
        trained = rope.get("original_max_position_embeddings") or max_position_embeddings
        return RopeScaling(
            type="llama3",
            factor=fields.number("factor"),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
            original_max_position_embeddings=Fields({"original": trained}, "rope parameters").integer("original"),
        )
    raise UnsupportedModelError(f"rope scaling {short(kind)} is not implemented; implemented: linear, llama3")


def _hf_window(fields: Fields, family: str, num_layers: int) -> int | None:
    window = fields.optional_integer("sliding_window", 4096 if family != "llama" else None)
    if family == "llama" or window is None:
        return None
    if family == "mistral":
        return window
    if not fields.flag("use_sliding_window"):
        return None
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", 28)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(min(num_layers, 1024))]
    if not isinstance(kinds, list) or any(not isinstance(kind, str) for kind in kinds):
        raise CheckpointError(f"config.json: layer_types must be a list of names, got {short(kinds)}")
    if set(kinds) <= {"full_attention"}:
        return None
    if set(kinds) == {"sliding_attention"}:
        return window
    raise UnsupportedModelError("a sliding window in only some of the layers is not implemented")


def _hf_dtype(config: Mapping[str, Any]) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(value).removeprefix("torch.")


def _id_list(value: Any, source: str) -> tuple[int, ...]:
    entries = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if len(entries) > _MAX_EOS_IDS:  # they go to the engine with every request
        raise CheckpointError(f"{source} has {len(entries)} eos_token_id; at most {_MAX_EOS_IDS} are read")
    return tuple(Fields({"eos_token_id": entry}, source).integer("eos_token_id") for entry in entries)


def _merge_ids(*lists: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token_id for ids in lists for token_id in ids))


def _gguf_scaling(fields: Fields, freq_factors: tuple[float, ...]) -> RopeScaling | None:
    kind = fields.values.get(fields.prefix + "rope.scaling.type", "linear")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return RopeScaling(type="freq_factors", freq_factors=freq_factors) if freq_factors else None
    if freq_factors:
        raise UnsupportedModelError(f"rope_freqs.weight together with rope scaling {short(kind)} is not implemented")
    if kind != "linear":
        raise UnsupportedModelError(f"rope scaling {short(kind)} is not implemented; implemented: linear, llama3")
    return RopeScaling(type="linear", factor=factor)


def _gguf_eos(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids the file names as ending, then control tokens that end a turn by their well-known text.

    GGUF has one eos where generation_config.json often lists several; without the others a chat model runs on.
    """
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ids = _id_list([value for value in named if value is not None], "GGUF metadata")
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, Sequence) or not isinstance(kinds, (list, np.ndarray)) or len(kinds) != len(tokens):
        return _merge_ids(ids)
    control = np.flatnonzero(np.asarray(kinds) == _CONTROL_TOKEN)
    return _merge_ids(ids, tuple(i for i in control.tolist() if tokens[i] in _END_OF_TURN))
