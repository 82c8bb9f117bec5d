"""Granite 4: Mamba-2 in most layers and attention in the others, with or without experts, beside an MLP of all tokens.

Owns its configuration and names. Multipliers are Granite 3's (`mooli.models.granite`). A Mamba-2 layer keeps a matrix
for each head, and the last inputs of its convolution, of each sequence.

Sources: Mamba-2, arXiv 2405.21060; the Granite 4 models' configuration and code in Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.backends.base import Array, CacheLayer, DeltaSpec, Ops, RopeSpec, StateLayer, Weight
from mooli.errors import UnsupportedModelError
from mooli.models import granite, llama
from mooli.models.config import TensorSpec
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range, equal_heads, short
from mooli.models.layer_kinds import MAX_LAYERS, check_attends, gguf_attends, gguf_kv_heads, hf_attends
from mooli.models.layers import PAIRS_IN_GGUF, GatedMLP, Mixer, Tensors, norm_tensors
from mooli.models.packer import Packer
from mooli.models.stacks import Rows

ATTENTION = ("attention", "full_attention")
MAMBA = ("mamba", "linear_attention")
"""What layers are called, in published files and by Transformers 5."""


@dataclass(frozen=True, slots=True)
class Mamba:
    """W_out (norm(scan(conv(W_xbc x)) * silu(W_z x))). Of one projection in the files these are rows."""

    parts: ClassVar[tuple[str, ...]] = ("z", "x", "b", "c", "dt")
    """Of the projection in, in the order of the files; the middle three go through the convolution."""

    ops: Ops
    spec: DeltaSpec
    eps: float
    z: Weight
    cbx: Weight
    dt: Weight
    conv: Weight
    scan: Weight
    norm: Weight
    out: Weight

    @classmethod
    def tensors(cls, name: str, gguf: str, config: GraniteHybridConfig) -> Tensors:
        hidden, inner, heads = config.hidden_size, config.mamba_heads * config.mamba_head_dim, config.mamba_heads
        states = config.num_groups * config.state_size
        sizes = dict(zip(cls.parts, (inner, inner, states, states, heads), strict=True))
        tensors = _rows(f"{name}.in_proj.weight", f"{gguf}.ssm_in.weight", sizes, hidden)
        mixed = {part: sizes[part] for part in cls.parts[1:4]}
        tensors |= _rows(f"{name}.conv1d.weight", f"{gguf}.ssm_conv1d.weight", mixed, config.num_columns)
        if config.conv_bias:
            tensors |= _rows(f"{name}.conv1d.bias", f"{gguf}.ssm_conv1d.bias", mixed)
        return {
            **tensors,
            f"{name}.A_log": TensorSpec((heads,), f"{gguf}.ssm_a", hf_is_log=True),
            f"{name}.dt_bias": TensorSpec((heads,), f"{gguf}.ssm_dt.bias"),
            f"{name}.D": TensorSpec((heads,), f"{gguf}.ssm_d"),
            **norm_tensors(f"{name}.norm", f"{gguf}.ssm_norm", inner),
            f"{name}.out_proj.weight": TensorSpec((hidden, inner), f"{gguf}.ssm_out.weight"),
        }

    @classmethod
    def load(cls, packer: Packer, name: str, ops: Ops, config: GraniteHybridConfig) -> Mamba:
        mixed = ("c", "b", "x")  # queries, keys and values of the scan
        return cls(
            ops,
            config.scan,
            config.rms_norm_eps,
            z=packer.linear(f"{name}.in_proj.z"),
            cbx=packer.linear(*(f"{name}.in_proj.{part}" for part in mixed)),
            dt=packer.linear(f"{name}.in_proj.dt"),
            conv=packer.conv(*(f"{name}.conv1d.{part}" for part in mixed)),
            scan=packer.scan(f"{name}.A_log", f"{name}.dt_bias", f"{name}.D"),
            norm=packer.vector(f"{name}.norm.weight"),
            out=packer.linear(f"{name}.out_proj"),
        )

    def mix(self, batch: Any, layer: int, x: Array) -> Array:
        """What each token takes from itself and those before it: (T, heads * head_dim)."""
        ops = self.ops
        cbx = ops.causal_conv(batch, layer, ops.linear(batch, x, self.cbx), self.conv)
        mixed = ops.scan(batch, layer, cbx, ops.linear(batch, x, self.dt), self.scan, self.spec)
        return ops.rms_norm(ops.silu_mul(mixed, ops.linear(batch, x, self.z)), self.norm, self.eps)

    def output(self, batch: Any, mixed: Array, residual: Array | None = None) -> Array:
        return self.ops.linear(batch, mixed, self.out, residual=residual)


def _rows(whole: str, gguf: str, sizes: dict[str, int], *columns: int) -> Tensors:
    """Tensors that files have one behind the other, as the rows of one."""
    module, kind = whole.rsplit(".", 1)
    tensors, first, total = {}, 0, sum(sizes.values())
    for part, size in sizes.items():
        tensors[f"{module}.{part}.{kind}"] = TensorSpec(
            (size, *columns),
            f"{gguf.rsplit('.', 1)[0]}.{part}.{kind}",
            hf_stacks=(Rows(whole, first, size, total),),
            gguf_stacks=(Rows(gguf, first, size, total),),
        )
        first += size
    return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class GraniteHybridConfig(llama.LlamaConfig):
    """Of a decoder of the family. attends: of each layer, whether it is attention. mamba_heads .. conv_bias: of the
    others. intermediate_size: of the MLP that all tokens go through, where there are no experts beside it.
    CheckpointError for a number out of its bounds."""

    mlp: ClassVar[type[GatedMLP]] = granite.GraniteSharedMLP

    attends: tuple[bool, ...] = ()
    mamba_heads: int = 128
    mamba_head_dim: int = 64
    state_size: int = 256
    num_groups: int = 1
    num_columns: int = 4
    conv_bias: bool = True

    def __post_init__(self) -> None:
        llama.LlamaConfig.__post_init__(self)
        check_range("mamba_n_heads", self.mamba_heads, 1, 4096)
        check_range("mamba_d_head", self.mamba_head_dim, 1, 1024)
        check_range("mamba_d_state", self.state_size, 1, 1024)
        check_range("mamba_d_conv", self.num_columns, 2, 16)
        check_attends(self.attends, self.num_layers)
        if self.num_groups != 1:
            raise UnsupportedModelError(
                f"Mamba layers with states in {self.num_groups} groups (mamba_n_groups) are not implemented"
            )

    @property
    def scan(self) -> DeltaSpec:
        return DeltaSpec(self.num_groups, self.state_size, self.mamba_head_dim, (0,) * self.mamba_heads)

    def mixer_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        if self.attends[layer]:
            return llama.LlamaConfig.mixer_tensors(self, layer, name, gguf)
        return Mamba.tensors(f"{name}.mamba", gguf, self)

    def load_mixer(self, packer: Packer, ops: Ops, layer: int, name: str, rotation: RopeSpec | None) -> Mixer:
        if self.attends[layer]:
            return llama.LlamaConfig.load_mixer(self, packer, ops, layer, name, rotation)
        return Mamba.load(packer, f"{name}.mamba", ops, self)

    def cache_layers(self) -> tuple[CacheLayer, ...]:
        spec = self.scan
        state = StateLayer((self.num_columns - 1, spec.row_width), (spec.num_heads, spec.key_dim, spec.value_dim))
        paged = llama.LlamaConfig.cache_layers(self)
        return tuple(paged[layer] if attends else state for layer, attends in enumerate(self.attends))


def _hf(source: HFSource) -> GraniteHybridConfig:
    fields, values = source.fields, source.values
    for name in ("mamba_proj_bias", "mlp_bias"):
        if fields.flag(name):
            raise UnsupportedModelError(f"{name} is not implemented for granitemoehybrid models")
    limit = values.get("time_step_limit")
    if limit is not None and limit not in _NO_LIMITS:
        raise UnsupportedModelError(f"limits of time steps (time_step_limit {short(limit)}) are not implemented")
    position = values.get("position_embedding_type")
    if position not in (None, "nope", "rope"):
        raise UnsupportedModelError(f"position_embedding_type {short(position)} is not implemented")
    heads = fields.integer("mamba_n_heads", 128)
    check_range("mamba_n_heads", heads, 1, 4096)
    inner = fields.integer("mamba_expand", 2) * fields.integer("hidden_size")
    given = values.get("mamba_d_head", "auto")
    num_experts = fields.optional_integer("num_local_experts", 8) or 0
    alike = granite.read_hf(source)
    shared_width, mixture = fields.integer("shared_intermediate_size", 1024), None
    if num_experts:
        top_k = fields.integer("num_experts_per_tok", 2)
        mixture = granite.experts(num_experts, top_k, alike["intermediate_size"], shared_width)
    own: dict[str, Any] = {
        "intermediate_size": shared_width,
        "experts": mixture,
        "unrotated": () if position == "rope" else tuple(range(min(alike["num_layers"], MAX_LAYERS))),
        "attends": hf_attends(values.get("layer_types") or values.get("layers_block_type"), ATTENTION, MAMBA),
        "mamba_heads": heads,
        "mamba_head_dim": inner // heads if given == "auto" else fields.integer("mamba_d_head"),
        "state_size": fields.integer("mamba_d_state", 256),
        "num_groups": fields.integer("mamba_n_groups", 1),
        "num_columns": fields.integer("mamba_d_conv", 4),
        "conv_bias": fields.flag("mamba_conv_bias", True),
    }
    return GraniteHybridConfig(**alike | own)


_NO_LIMITS: tuple[Any, ...] = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
"""Of time steps, as they are written."""


def _gguf(source: GGUFSource) -> GraniteHybridConfig:
    fields, shapes = source.fields, source.shapes
    common = source.common()
    num_layers, num_heads = common["num_layers"], fields.per_layer("attention.head_count")
    attends = gguf_attends(source, num_layers)
    changed = source.overridden(
        {
            "rope_theta": fields.number("rope.freq_base", 10000.0),
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        }
    )
    heads, inner = fields.integer("ssm.time_step_rank"), fields.integer("ssm.inner_size")
    check_range("ssm.time_step_rank", heads, 1, 4096)
    width, num_experts = fields.per_layer("feed_forward_length"), fields.integer("expert_count", 0)
    shared_width, mixture = fields.integer("expert_shared_feed_forward_length", width), None
    if num_experts:
        mixture = granite.experts(num_experts, fields.integer("expert_used_count"), width, shared_width)
    return GraniteHybridConfig(
        **common,
        **granite.gguf_multipliers(source),
        intermediate_size=shared_width,
        experts=mixture,
        num_heads=num_heads,
        num_kv_heads=gguf_kv_heads(fields, num_heads),
        head_dim=fields.optional_integer("attention.key_length") or equal_heads(common["hidden_size"], num_heads),
        rms_norm_eps=changed.number("rms_norm_eps"),
        rope_theta=changed.number("rope_theta"),
        tie_word_embeddings="output.weight" not in shapes,
        pairs=PAIRS_IN_GGUF,
        attends=attends,
        unrotated=() if fields.flag("rope.scaling.finetuned") else tuple(range(num_layers)),
        mamba_heads=heads,
        mamba_head_dim=inner // heads,
        state_size=fields.integer("ssm.state_size"),
        num_groups=fields.integer("ssm.group_count"),
        num_columns=fields.integer("ssm.conv_kernel"),
        conv_bias=any(name.endswith(".ssm_conv1d.bias") for name in shapes),
    )


GRANITE_HYBRID = Family(
    name="granitemoehybrid",
    architectures=("GraniteMoeHybridForCausalLM",),
    gguf=("granitehybrid",),
    hf_keys=llama.HF_KEYS
    | granite.MULTIPLIERS.keys()
    | frozenset(
        (
            *("attention_bias", "mlp_bias", "layer_types", "layers_block_type", "position_embedding_type"),
            *("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv", "mamba_expand"),
            *("mamba_conv_bias", "mamba_proj_bias", "time_step_limit", "shared_intermediate_size"),
            *("num_local_experts", "num_experts_per_tok"),
        )
    ),
    gguf_keys=frozenset(("rope_theta", "rms_norm_eps")) | granite.MULTIPLIERS.keys(),
    read_hf=_hf,
    read_gguf=_gguf,
)
