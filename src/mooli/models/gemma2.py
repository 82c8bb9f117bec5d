"""Gemma 2: Gemma 3's layers without norms of queries and keys, but with caps on scores and logits.

Owns its configuration. Every second layer has a window; all are rotated alike.

Source: Gemma 2 technical report, arXiv 2408.00118.
"""

from __future__ import annotations

from mooli.errors import UnsupportedModelError
from mooli.models import rope
from mooli.models.family import Family
from mooli.models.fields import GGUFSource, HFSource, check_range, short
from mooli.models.gemma import GemmaConfig, GemmaModel, rounded
from mooli.models.windows import hf_windows, windows_but_every

_FULL_EVERY = 2
_27B_LAYERS = 46
"""GGUF files do not say that this one divides scores by another number than the root of a head's length."""


def _hf(source: HFSource) -> GemmaConfig:
    fields, values = source.fields, source.values
    common = source.common(max_position_embeddings=8192, bos_id=2, eos_id=1)
    activation = values.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise UnsupportedModelError(f"activation {short(activation)} is not implemented; Gemma uses gelu_pytorch_tanh")
    for name in ("use_bidirectional_attention", "attention_bias"):
        if values.get(name):
            raise UnsupportedModelError(f"{name}={short(values[name])} is not implemented for Gemma 2")
    if not fields.flag("tie_word_embeddings", True):
        raise UnsupportedModelError("tie_word_embeddings=false is not implemented for Gemma 2")
    theta, scaling = rope.hf_rope(values)
    if scaling is not None:
        raise UnsupportedModelError(f"rope scaling {scaling.type!r} is not implemented for Gemma 2")
    divisor = fields.number("query_pre_attn_scalar", 256)
    check_range("query_pre_attn_scalar", divisor, 1e-6, 1e9)
    caps = {
        name: 0.0 if name in values and values[name] is None else fields.number(name, usual) for name, usual in _CAPS
    }
    return GemmaConfig(
        **common,
        intermediate_size=fields.integer("intermediate_size", 9216),
        num_heads=fields.integer("num_attention_heads", 8),
        num_kv_heads=fields.integer("num_key_value_heads", 4),
        head_dim=fields.integer("head_dim", 256),
        scale=divisor**-0.5,
        embedding_scale=rounded(common["hidden_size"] ** 0.5, common["dtype"]),
        windows=hf_windows(source, fields.integer("sliding_window", 4096), _FULL_EVERY),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        local_rope_theta=theta,
        qk_norm=False,
        attention_cap=caps["attn_logit_softcapping"],
        logit_cap=caps["final_logit_softcapping"],
    )


_CAPS = (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
"""Their names in both kinds of files, and what they are where a config.json does not say."""


def _gguf(source: GGUFSource) -> GemmaConfig:
    fields = source.fields
    common = source.common()
    num_heads, num_layers = fields.per_layer("attention.head_count"), common["num_layers"]
    head_dim = fields.integer("attention.key_length")
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("key and value heads of different length are not implemented")
    if "output.weight" in source.shapes:
        raise UnsupportedModelError("a head apart from the embedding is not implemented for Gemma 2")
    if rope.gguf_scaling(fields, source.freq_factors) is not None:
        raise UnsupportedModelError("rope scaling is not implemented for Gemma 2")
    changed = source.overridden(
        {
            "rope_theta": fields.number("rope.freq_base", 1e4),
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
            "sliding_window": fields.integer("attention.sliding_window", 4096),
        }
    )
    return GemmaConfig(
        **common,
        intermediate_size=fields.per_layer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=fields.per_layer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        scale=(common["hidden_size"] / num_heads if num_layers == _27B_LAYERS else head_dim) ** -0.5,
        embedding_scale=common["hidden_size"] ** 0.5,
        windows=windows_but_every(_FULL_EVERY, changed.integer("sliding_window"), num_layers),
        rms_norm_eps=changed.number("rms_norm_eps"),
        rope_theta=changed.number("rope_theta"),
        local_rope_theta=changed.number("rope_theta"),
        qk_norm=False,
        attention_cap=fields.number("attn_logit_softcapping", 0.0),
        logit_cap=fields.number("final_logit_softcapping", 0.0),
    )


GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    gguf=("gemma2",),
    hf_keys=frozenset(
        (
            *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
            *("hidden_activation", "query_pre_attn_scalar", "tie_word_embeddings", "attention_bias"),
            *("sliding_window", "sliding_window_pattern", "layer_types", "use_bidirectional_attention"),
            *(name for name, _ in _CAPS),
        )
    )
    | rope.HF_KEYS,
    gguf_keys=frozenset(("rope_theta", "rms_norm_eps", "sliding_window")),
    read_hf=_hf,
    read_gguf=_gguf,
    model=GemmaModel,
)
