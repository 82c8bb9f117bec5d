"""Qwen3.5 and 3.6, their dense models: gated DeltaNet in most layers, gated attention in every fourth.

Owns their configuration and names, also those inside a model that sees, whose text part is read and nothing else. A
gated DeltaNet keeps a matrix for each head of values, and the last inputs of its convolution, of each sequence.

Sources: Gated Delta Networks, arXiv 2412.06464; gated attention, arXiv 2505.06708; the models' code in Transformers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mooli.backends.base import Array, CacheLayer, DeltaSpec, Ops, RopeSpec, StateLayer, Weight
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models import llama, rope
from mooli.models.config import TensorSpec
from mooli.models.decoder import Names
from mooli.models.family import Family
from mooli.models.fields import Fields, GGUFSource, HFSource, check_range, short
from mooli.models.layer_kinds import check_attends, first_layers, gguf_attends, gguf_kv_heads, hf_attends
from mooli.models.layers import Attention, Mixer, Tensors, norm_tensors
from mooli.models.packer import Packer

_SEES = "Qwen3_5ForConditionalGeneration"
_ATTENDS_EVERY = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen35Config(llama.LlamaConfig):
    """Of a decoder of the family. attends: of each layer, whether it is attention. num_key_heads .. num_columns: of the
    DeltaNets. is_tiled: heads of values that share a head of keys lie apart, as in GGUF files. CheckpointError for a
    number out of its bounds."""

    norm_names: tuple[Names, ...] = (
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
    )
    attends: tuple[bool, ...] = ()
    rotary_dim: int = 64
    num_key_heads: int = 16
    num_value_heads: int = 32
    key_dim: int = 128
    value_dim: int = 128
    num_columns: int = 4
    is_tiled: bool = False

    def __post_init__(self) -> None:
        llama.LlamaConfig.__post_init__(self)
        check_range("linear_num_key_heads", self.num_key_heads, 1, 1024)
        check_range("linear_num_value_heads", self.num_value_heads, 1, 1024)
        check_range("linear_key_head_dim", self.key_dim, 1, 1024)
        check_range("linear_value_head_dim", self.value_dim, 1, 1024)
        check_range("linear_conv_kernel_dim", self.num_columns, 2, 16)
        check_range("rotary values of a head", self.rotary_dim, 2, self.head_dim)
        check_attends(self.attends, self.num_layers)
        if self.num_value_heads % self.num_key_heads:
            raise CheckpointError(
                f"{self.num_value_heads} heads of values on {self.num_key_heads} of keys: the first must be a multiple"
                " of the second"
            )

    @property
    def delta(self) -> DeltaSpec:
        heads, share = range(self.num_value_heads), self.num_value_heads // self.num_key_heads
        key_heads = tuple(head % self.num_key_heads if self.is_tiled else head // share for head in heads)
        return DeltaSpec(self.num_key_heads, self.key_dim, self.value_dim, key_heads)

    def tensors(self) -> dict[str, TensorSpec]:
        """Folders have the gains of norms less one, but for those of DeltaNets."""
        return {
            name: dataclasses.replace(spec, hf_offset=1.0)
            if name.endswith("norm.weight") and ".linear_attn." not in name
            else spec
            for name, spec in llama.LlamaConfig.tensors(self).items()
        }

    def mixer_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        if self.attends[layer]:
            return GatedAttention.tensors(f"{name}.self_attn", gguf, self)
        return GatedDeltaNet.tensors(f"{name}.linear_attn", gguf, self)

    def load_mixer(self, packer: Packer, ops: Ops, layer: int, name: str, rotation: RopeSpec | None) -> Mixer:
        if self.attends[layer]:
            return GatedAttention.load(packer, f"{name}.self_attn", ops, self, layer, rotation)
        return GatedDeltaNet.load(packer, f"{name}.linear_attn", ops, self)

    def projections(self, name: str, gguf: str) -> Tensors:
        """What a DeltaNet projects hidden states by."""
        hidden, heads = self.hidden_size, self.num_value_heads
        return {
            f"{name}.in_proj_qkv.weight": TensorSpec((self.delta.row_width, hidden), f"{gguf}.attn_qkv.weight"),
            f"{name}.in_proj_z.weight": TensorSpec((heads * self.value_dim, hidden), f"{gguf}.attn_gate.weight"),
            f"{name}.in_proj_b.weight": TensorSpec((heads, hidden), f"{gguf}.ssm_beta.weight"),
            f"{name}.in_proj_a.weight": TensorSpec((heads, hidden), f"{gguf}.ssm_alpha.weight"),
        }

    def load_projections(self, packer: Packer, name: str) -> tuple[Weight, Weight, Weight]:
        """To queries, keys and values; to z; to b and a."""
        qkv = packer.linear(f"{name}.in_proj_qkv")
        return qkv, packer.linear(f"{name}.in_proj_z"), packer.linear(f"{name}.in_proj_b", f"{name}.in_proj_a")

    def may_ignore(self, name: str) -> bool:
        # What sees, and what guesses tokens ahead.
        return llama.LlamaConfig.may_ignore(self, name) or name.startswith(("model.visual.", "mtp."))

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        spec, paged = self.delta, llama.LlamaConfig.cache_layers(self)
        state = StateLayer((self.num_columns - 1, spec.row_width), (spec.num_heads, spec.key_dim, spec.value_dim))
        return tuple(paged[layer] if attends else state for layer, attends in enumerate(self.attends))


@dataclass(frozen=True, slots=True)
class GatedAttention:
    """Attention whose result is multiplied by sigmoid(W_gate x)."""

    attention: Attention
    gate: Weight

    @staticmethod
    def tensors(name: str, gguf: str, config: Qwen35Config) -> Tensors:
        hidden, keys = config.hidden_size, config.num_kv_heads * config.head_dim
        queries = config.num_heads * config.head_dim
        return {
            f"{name}.q_proj.weight": TensorSpec((2 * queries, hidden), f"{gguf}.attn_q.weight"),
            f"{name}.k_proj.weight": TensorSpec((keys, hidden), f"{gguf}.attn_k.weight"),
            f"{name}.v_proj.weight": TensorSpec((keys, hidden), f"{gguf}.attn_v.weight"),
            f"{name}.o_proj.weight": TensorSpec((hidden, queries), f"{gguf}.attn_output.weight"),
            **norm_tensors(f"{name}.q_norm", f"{gguf}.attn_q_norm", config.head_dim),
            **norm_tensors(f"{name}.k_norm", f"{gguf}.attn_k_norm", config.head_dim),
        }

    @classmethod
    def load(
        cls, packer: Packer, name: str, ops: Ops, config: Qwen35Config, layer: int, rotary: RopeSpec | None
    ) -> GatedAttention:
        spec = config.attention_spec(layer)
        qkv, gate = packer.queries_and_gates(
            f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj", num_heads=config.num_heads
        )
        q_norm, k_norm = packer.vector(f"{name}.q_norm.weight"), packer.vector(f"{name}.k_norm.weight")
        o = packer.linear(f"{name}.o_proj")
        return cls(Attention(ops, spec, rotary, config.rms_norm_eps, qkv=qkv, q_norm=q_norm, k_norm=k_norm, o=o), gate)

    def mix(self, batch: Any, layer: int, x: Array) -> Array:
        ops = self.attention.ops
        return ops.sigmoid_mul(self.attention.mix(batch, layer, x), ops.linear(batch, x, self.gate))

    def output(self, batch: Any, mixed: Array, residual: Array | None = None) -> Array:
        return self.attention.output(batch, mixed, residual)


@dataclass(frozen=True, slots=True)
class GatedDeltaNet:
    """W_out (norm(delta rule(conv(W_qkv x))) * silu(W_z x))."""

    ops: Ops
    spec: DeltaSpec
    eps: float
    qkv: Weight
    conv: Weight
    gates: Weight
    decay: Weight
    z: Weight
    norm: Weight
    out: Weight

    @staticmethod
    def tensors(name: str, gguf: str, config: Qwen35Config) -> Tensors:
        hidden, heads, spec = config.hidden_size, config.num_value_heads, config.delta
        return {
            **config.projections(name, gguf),
            f"{name}.conv1d.weight": TensorSpec((spec.row_width, config.num_columns), f"{gguf}.ssm_conv1d.weight"),
            f"{name}.A_log": TensorSpec((heads,), f"{gguf}.ssm_a", hf_is_log=True),
            f"{name}.dt_bias": TensorSpec((heads,), f"{gguf}.ssm_dt.bias"),
            **norm_tensors(f"{name}.norm", f"{gguf}.ssm_norm", config.value_dim),
            f"{name}.out_proj.weight": TensorSpec((hidden, heads * config.value_dim), f"{gguf}.ssm_out.weight"),
        }

    @classmethod
    def load(cls, packer: Packer, name: str, ops: Ops, config: Qwen35Config) -> GatedDeltaNet:
        qkv, z, gates = config.load_projections(packer, name)
        return cls(
            ops,
            config.delta,
            config.rms_norm_eps,
            qkv=qkv,
            conv=packer.conv(f"{name}.conv1d"),
            gates=gates,
            decay=packer.delta(f"{name}.A_log", f"{name}.dt_bias"),
            z=z,
            norm=packer.vector(f"{name}.norm.weight"),
            out=packer.linear(f"{name}.out_proj"),
        )

    def mix(self, batch: Any, layer: int, x: Array) -> Array:
        """What each token takes from itself and those before it: (T, heads * value_dim)."""
        ops = self.ops
        qkv = ops.causal_conv(batch, layer, ops.linear(batch, x, self.qkv), self.conv)
        mixed = ops.delta_rule(batch, layer, qkv, ops.linear(batch, x, self.gates), self.decay, self.spec)
        return ops.gated_norm(mixed, ops.linear(batch, x, self.z), self.norm, self.eps)

    def output(self, batch: Any, mixed: Array, residual: Array | None = None) -> Array:
        return self.ops.linear(batch, mixed, self.out, residual=residual)


def _hf(source: HFSource) -> Qwen35Config:
    return Qwen35Config(**read_hf(text_source(source)))


def text_source(source: HFSource) -> HFSource:
    """The text part's values laid over those of a model that sees."""
    text = source.values.get("text_config", {})
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: text_config must be an object, got {short(text)}")
    return dataclasses.replace(source, values={**source.values, **text}) if text else source


def read_hf(source: HFSource) -> dict[str, Any]:
    """What dense models and those with experts read alike."""
    fields, values = source.fields, dict(source.values)
    if fields.flag("attention_bias"):
        raise UnsupportedModelError(f"biases of attention are not implemented for {source.family} models")
    common = source.common(max_position_embeddings=32768)
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    factor = values.get("partial_rotary_factor", 0.25)
    if isinstance(given, dict):
        factor = given.get("partial_rotary_factor", factor)
        # The sections are of positions in pictures; those of text are all the same.
        values["rope_parameters"] = {
            key: value for key, value in given.items() if not key.startswith(("mrope", "partial"))
        }
    partial = Fields({"factor": factor}, "config.json: partial_rotary_").number("factor")
    check_range("partial_rotary_factor", partial, 0.0, 1.0)
    head_dim = fields.integer("head_dim", 256)
    values = {**values, "rope_scaling": None, "partial_rotary_factor": None}
    theta, scaling = rope.hf_rope(values)
    own: dict[str, Any] = {
        "head_dim": head_dim,
        "qk_norm": True,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attends": _attends(fields, common["num_layers"]),
        "rotary_dim": int(head_dim * partial),
        "num_key_heads": fields.integer("linear_num_key_heads", 16),
        "num_value_heads": fields.integer("linear_num_value_heads", 32),
        "key_dim": fields.integer("linear_key_head_dim", 128),
        "value_dim": fields.integer("linear_value_head_dim", 128),
        "num_columns": fields.integer("linear_conv_kernel_dim", 4),
        "prefix": "model.language_model." if source.architecture.endswith("ForConditionalGeneration") else "model.",
    }
    return llama.read_hf(dataclasses.replace(source, values=values), common, **own)


def _attends(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    every, kinds = fields.integer("full_attention_interval", _ATTENDS_EVERY), fields.values.get("layer_types")
    check_range("full_attention_interval", every, 1, 1024)
    if kinds is not None:
        return hf_attends(kinds, ("full_attention",), ("linear_attention",))
    return tuple((layer + 1) % every == 0 for layer in first_layers(num_layers, num_layers))


def _gguf(source: GGUFSource) -> Qwen35Config:
    return Qwen35Config(**read_gguf(source, source.fields.per_layer("feed_forward_length")))


def read_gguf(source: GGUFSource, intermediate_size: int) -> dict[str, Any]:
    """The same of GGUF metadata."""
    fields, shapes = source.fields, source.shapes
    common = source.common()
    num_layers = common["num_layers"] - fields.integer("nextn_predict_layers", 0)
    num_heads = fields.per_layer("attention.head_count")
    head_dim = fields.integer("attention.key_length")
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("key and value heads of different length are not implemented")
    num_value_heads, inner = fields.integer("ssm.time_step_rank"), fields.integer("ssm.inner_size")
    check_range("ssm.time_step_rank", num_value_heads, 1, 1024)
    changed = source.overridden(
        {
            "rope_theta": fields.number("rope.freq_base", 10000.0),
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        }
    )
    return {
        **common,
        "num_layers": num_layers,
        "intermediate_size": intermediate_size,
        "num_heads": num_heads,
        "num_kv_heads": gguf_kv_heads(fields, num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": changed.number("rms_norm_eps"),
        "rope_theta": changed.number("rope_theta"),
        "rope_scaling": rope.gguf_scaling(fields, source.freq_factors),
        "tie_word_embeddings": "output.weight" not in shapes,
        "qk_norm": True,
        "attends": gguf_attends(source, num_layers),
        "rotary_dim": fields.integer("rope.dimension_count", head_dim),
        "num_key_heads": fields.integer("ssm.group_count"),
        "num_value_heads": num_value_heads,
        "key_dim": fields.integer("ssm.state_size"),
        "value_dim": inner // num_value_heads,
        "num_columns": fields.integer("ssm.conv_kernel"),
        "is_tiled": True,
        "num_extra_blocks": common["num_layers"] - num_layers,
    }


HF_KEYS = llama.HF_KEYS | frozenset(
    (
        *("text_config", "attention_bias", "partial_rotary_factor", "layer_types", "full_attention_interval"),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
        "linear_conv_kernel_dim",
    )
)
GGUF_KEYS = frozenset(("rope_theta", "rms_norm_eps"))

QWEN3_5 = Family(
    name="qwen3_5_text",
    architectures=("Qwen3_5ForCausalLM", _SEES),
    gguf=("qwen35",),
    hf_keys=HF_KEYS,
    gguf_keys=GGUF_KEYS,
    read_hf=_hf,
    read_gguf=_gguf,
)
