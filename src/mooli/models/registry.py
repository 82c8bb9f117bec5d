"""The model families that are implemented: which of them a file is of, its configuration, and its model.

Owns the list. A family is added by a module of its own and one entry here; nothing else names one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mooli.backends.base import Backend
from mooli.errors import CheckpointError, ConfigError, UnsupportedModelError
from mooli.models import (
    deepseek,
    ernie_moe,
    gemma,
    glm,
    glm4_moe,
    gpt_oss,
    granite,
    granite_hybrid,
    hunyuan,
    lfm2,
    llama,
    minicpm,
    minicpm3,
    minimax,
    ministral,
    olmo,
    olmoe,
    pangu,
    phi,
    qwen3_5,
    qwen3_5_moe,
    qwen_moe,
)
from mooli.models.checkpoint import Checkpoint
from mooli.models.config import ModelConfig
from mooli.models.family import Family, Model
from mooli.models.fields import GGUF_KEYS, HF_KEYS, GGUFSource, HFSource, short
from mooli.models.packer import Packer

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN2,
        llama.QWEN3,
        llama.SMOLLM3,
        llama.ERNIE4_5,
        llama.PANGU_EMBEDDED,
        ministral.MINISTRAL3,
        gemma.GEMMA2,
        ernie_moe.ERNIE4_5_MOE,
        gemma.GEMMA3,
        glm.GLM4,
        granite.GRANITE,
        granite.GRANITE_MOE,
        granite.GRANITE_MOE_SHARED,
        granite_hybrid.GRANITE_HYBRID,
        hunyuan.HUNYUAN,
        hunyuan.HUNYUAN_MOE,
        lfm2.LFM2,
        lfm2.LFM2_MOE,
        minicpm3.MINICPM3,
        minicpm.MINICPM,
        olmo.OLMO2,
        olmo.OLMO3,
        olmoe.OLMOE,
        phi.PHI3,
        deepseek.DEEPSEEK_V2,
        deepseek.DEEPSEEK_V3,
        deepseek.GLM4_MOE_LITE,
        pangu.PANGU_ULTRA_MOE,
        qwen3_5.QWEN3_5,
        qwen3_5_moe.QWEN3_5_MOE,
        qwen3_5_moe.QWEN3_NEXT,
        qwen_moe.QWEN3_MOE,
        qwen_moe.QWEN2_MOE,
        qwen_moe.MIXTRAL,
        gpt_oss.GPT_OSS,
        glm4_moe.GLM4_MOE,
        minimax.MINIMAX_M2,
    )
}
"""By the name that `ModelConfig.family` has."""


def read_hf_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None, *, context: int | None = None
) -> ModelConfig:
    """From the contents of config.json and, if there is one, generation_config.json.

    context: the longest sequence that there will be, in tokens; None: as long as the model allows.
    Raises UnsupportedModelError for a family or feature that is not implemented, CheckpointError for bad values.
    """
    family, architecture = _hf_family(config)
    return family.read_hf(HFSource(family.name, architecture, config, generation or {}, context))


def merge_hf_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json with `json_model_override_args` laid over it; nested objects are merged key by key.

    ConfigError for a key that the family does not read: an override must not be ignored.
    """
    merged = dict(config)
    for key, value in (overrides or {}).items():
        old = merged.get(key)
        merged[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    if overrides:
        family, _ = _hf_family(merged)
        _check_override_names(overrides, HF_KEYS | family.hf_keys, f"a Hugging Face model of family {family.name}")
    return merged


def read_gguf_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    *,
    vectors: Mapping[str, tuple[float, ...]] | None = None,
    dtype: str = "bfloat16",
    overrides: Mapping[str, Any] | None = None,
    context: int | None = None,
) -> ModelConfig:
    """From the metadata and the tensors' (rows, columns) of a GGUF file.

    vectors, context: as `GGUFSource` has them. `overrides` uses Hugging Face names.
    Raises ConfigError for an override that is not possible, and what `read_hf_config` raises.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError("the GGUF file has no general.architecture: it is not a language model")
    # Those that ask for something besides come first.
    for family in sorted(FAMILIES.values(), key=lambda family: family.gguf_with is None):
        has_more = family.gguf_with is None or metadata.get(f"{name}.{family.gguf_with}")
        if name in family.gguf and has_more and family.read_gguf is not None:
            _check_override_names(overrides or {}, GGUF_KEYS | family.gguf_keys, "a GGUF model")
            architecture = family.architectures[0]
            source = GGUFSource(
                family.name, architecture, name, metadata, shapes, vectors or {}, dtype, overrides or {}, context
            )
            return family.read_gguf(source)
    raise _unknown_family(name, dict.fromkeys(known for family in FAMILIES.values() for known in family.gguf))


def create_model(
    config: ModelConfig,
    checkpoint: Checkpoint,
    backend: Backend,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model of `config.family`, every weight packed and each tensor released as soon as it is.

    `progress(done, total)` is called before the first tensor, and whenever tensors have been packed. Names and shapes
    were checked when the checkpoint was opened (`mooli.models.checkpoint.check_tensors`).
    Raises UnsupportedModelError for a family that is not implemented.
    """
    family = FAMILIES.get(config.family)
    if family is None:
        raise _unknown_family(config.family, FAMILIES)
    packer = Packer(config, checkpoint, backend, progress)
    model = family.model(config, backend.ops, packer)
    packer.finish()
    return model


def _hf_family(config: Mapping[str, Any]) -> tuple[Family, str]:
    """The family that a config.json names, and the class name, which may be left out."""
    names = config.get("architectures")
    implemented = {name: family for family in FAMILIES.values() for name in family.architectures}
    if isinstance(names, (list, tuple)) and names:
        if isinstance(names[0], str) and names[0] in implemented:
            return implemented[names[0]], names[0]
        raise _unknown_family(str(names[0])[:80], implemented)
    if "model_type" not in config:
        raise CheckpointError("config.json has neither architectures nor model_type")
    for family in FAMILIES.values():
        if config["model_type"] == family.name:
            return family, family.architectures[0]
    raise _unknown_family(str(config["model_type"])[:80], implemented)


def _unknown_family(name: str, implemented: Iterable[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model family {short(name)} is not implemented; implemented: {', '.join(implemented)} (docs/models.md)"
    )


def _check_override_names(overrides: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ConfigError(f"cannot override {', '.join(unknown)} of {what}; possible: {', '.join(sorted(known))}")
