"""gpt-oss: experts in every layer, windows in every other, and a sink in each head.

Owns its configuration and names. Experts have biases and a clamped gate; folders have those of a layer in two tensors,
the rows of gate and up projection in turn. The router's softmax is over the chosen experts alone.

Sources: gpt-oss model card, arXiv 2508.10925, and the model's code in Transformers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.base import Array, AttentionSpec, Ops, PagedLayer, RopeSpec, Weight
from mooli.backends.routing import RouteSpec
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import llama, rope
from mooli.models.config import ROWS, Split, TensorSpec
from mooli.models.experts import SparseMLP
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, short
from mooli.models.layers import Attention, Tensors
from mooli.models.packer import Packer
from mooli.models.qwen_moe import MoeConfig
from mooli.models.stacks import Stacked

WINDOWED, FULL = "sliding_attention", "full_attention"

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Of a config.json that says nothing."""

_LIMIT, _ALPHA = 7.0, 1.702
"""The numbers of `clamped_swiglu`."""


@dataclass(frozen=True, slots=True)
class SinkAttention(Attention):
    """Attention in which each head sees something first that has a score of its own, and no value."""

    sinks: Weight = None

    @classmethod
    def tensors(cls, name: str, gguf: str, *, num_heads: int, **sizes: Any) -> Tensors:
        heads = Split(ROWS, num_heads, "attention heads")
        sinks = {f"{name}.sinks": TensorSpec((num_heads,), f"{gguf}.attn_sinks.weight", heads)}
        return Attention.tensors(name, gguf, num_heads=num_heads, **sizes) | sinks

    @classmethod
    def load(
        cls,
        packer: Packer,
        name: str,
        ops: Ops,
        spec: AttentionSpec,
        rope: RopeSpec | None,
        eps: float,
        *,
        qk_norm: bool,
    ) -> SinkAttention:
        plain = Attention.load(packer, name, ops, spec, rope, eps, qk_norm=qk_norm)
        parts = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        return cls(**parts, sinks=packer.vector(f"{name}.sinks"))

    def mix(self, batch: Any, layer: int, x: Array) -> Array:
        qkv = self._rotated(batch, self._normed(self.ops.linear(batch, x, self.qkv)))
        return self.ops.attend(batch, layer, qkv, self.spec, self.sinks)


class GptOssExperts(SparseMLP):
    """Other names, and stacks of another order."""

    __slots__ = ()
    router_name: ClassVar[str] = "router"

    @classmethod
    def hf_stacks(cls, name: str, kind: str, part: int, expert: int, num_experts: int) -> tuple[Stacked, ...]:
        if part == 2:
            whole, where = f"{name}.down_proj", Stacked("", expert, num_experts)
        else:
            whole, where = f"{name}.gate_up_proj", Stacked("", expert, num_experts, part, 2, interleaved=True)
        if kind == "bias":
            return (dataclasses.replace(where, name=f"{whole}_bias"),)
        # In MXFP4 they are (outputs, inputs), otherwise the other way about.
        in_four_bits = dataclasses.replace(where, name=f"{whole}_blocks")
        return dataclasses.replace(where, name=whole, is_transposed=True), in_four_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class GptOssConfig(MoeConfig):
    """Of a decoder of the family. windows: for each layer how many last positions a token attends to, itself included;
    0 for all. CheckpointError for a number out of its bounds."""

    attention: ClassVar[type[Attention]] = SinkAttention
    sparse: ClassVar[type[SparseMLP]] = GptOssExperts
    gguf_mlp_norm: ClassVar[str] = "post_attention_norm"

    windows: tuple[int, ...]

    def __post_init__(self) -> None:
        MoeConfig.__post_init__(self)
        if len(self.windows) != self.num_layers:
            raise CheckpointError(f"{len(self.windows)} kinds of layers for {self.num_layers} layers")
        for window in self.windows:
            check_range("sliding_window", window, 0, 2**31)

    @property
    def route(self) -> RouteSpec:
        return RouteSpec(num_experts=self.num_experts, top_k=self.top_k, score="chosen_softmax")

    def mlp_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        return self.sparse.tensors(
            f"{name}.{self.module}",
            gguf,
            hidden_size=self.hidden_size,
            num_experts=self.num_experts,
            width=self.expert_width,
            bias=True,
            router_bias=True,
        )

    def cache_layers(self) -> tuple[PagedLayer, ...]:
        return tuple(PagedLayer(self.num_kv_heads, self.head_dim, window) for window in self.windows)


class GptOssModel(llama.LlamaModel):
    """T tokens in a step, H hidden size."""

    def __init__(self, config: GptOssConfig, ops: Ops, packer: Packer) -> None:
        self.config = config
        self._ops = ops
        rotary = rope.rope_spec(config.head_dim, config.rope_theta, config.rope_scaling)
        self._embedding, self._head = llama.load_vocabulary(config, packer)
        self._layers = []
        for index, window in enumerate(config.windows):
            name = f"model.layers.{index}"
            spec = dataclasses.replace(llama.attention_spec(config, scale=config.head_dim**-0.5), window=window)
            attention = config.attention.load(
                packer, f"{name}.self_attn", ops, spec, rotary, config.rms_norm_eps, qk_norm=False
            )
            experts = config.sparse.load(
                packer, f"{name}.{config.module}", ops, config.route, activation="clamped_swiglu"
            )
            self._layers.append(llama.load_layer(name, attention, ops, packer, experts))
        self._norm = packer.vector("model.norm.weight")


def _windows(kinds: Any, window: int, num_layers: int) -> tuple[int, ...]:
    known = {FULL: 0, WINDOWED: window}
    if kinds is None:
        check_range("num_layers", num_layers, 1, 1024)
        kinds = [FULL if index % 2 else WINDOWED for index in range(num_layers)]
    if not isinstance(kinds, list) or any(not isinstance(kind, str) or kind not in known for kind in kinds):
        raise CheckpointError(f"config.json: layer_types must be a list of {', '.join(known)}, got {short(kinds)}")
    return tuple(known[kind] for kind in kinds)


def _hf(source: HFSource) -> GptOssConfig:
    fields, values = source.fields, source.values
    common = source.common(max_position_embeddings=131072)
    for name, expected in (("swiglu_limit", _LIMIT), ("swiglu_alpha", _ALPHA)):
        if fields.number(name, expected) != expected:
            raise UnsupportedModelError(f"{name} {short(values[name])} is not implemented; gpt-oss has {expected}")
    if not values.get("rope_parameters") and not values.get("rope_scaling"):
        values = {**values, "rope_parameters": _ROPE}
    theta, scaling = rope.hf_rope({"rope_theta": 150000.0, **values})
    bias = fields.flag("attention_bias", True)
    own: dict[str, Any] = {
        "intermediate_size": fields.integer("intermediate_size"),
        "head_dim": fields.integer("head_dim", 64),
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 8) or fields.integer("num_attention_heads"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": bias,
        "o_bias": bias,
        "windows": _windows(source.values.get("layer_types"), _window(fields), common["num_layers"]),
        "num_experts": fields.optional_integer("num_experts") or fields.integer("num_local_experts", 128),
        "top_k": fields.optional_integer("num_experts_per_tok") or fields.integer("experts_per_token", 4),
    }
    return GptOssConfig(**llama.read_hf(source, common, **own, expert_width=own["intermediate_size"]))


def _window(fields: Fields) -> int:
    """0 where layers that have one see all: `sliding_window` may be null."""
    return fields.optional_integer("sliding_window", 128) or 0


def _gguf(source: GGUFSource) -> GptOssConfig:
    fields = source.fields
    alike = llama.read_gguf(source, has_experts=True, has_window=True)
    window, scaling = alike["sliding_window"] or 0, alike["rope_scaling"]
    if scaling is not None and scaling.type == "yarn":
        scaling = dataclasses.replace(scaling, truncate=False)  # which files cannot say
    return GptOssConfig(
        **alike
        | {
            "sliding_window": None,
            "windows": _windows(None, window, alike["num_layers"]),
            "rope_scaling": scaling,
            "num_experts": fields.integer("expert_count"),
            "top_k": fields.integer("expert_used_count"),
            "expert_width": fields.integer("expert_feed_forward_length"),
        }
    )


GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    gguf=("gpt-oss",),
    hf_keys=llama.HF_KEYS
    | {
        *("swiglu_limit", "swiglu_alpha", "attention_bias", "layer_types", "sliding_window", "num_experts"),
        *("num_local_experts", "num_experts_per_tok", "experts_per_token"),
    },
    gguf_keys=llama.GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
    model=GptOssModel,
)
