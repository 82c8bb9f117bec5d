"""Families with experts, each against Transformers in float32, on every backend and of every kind of file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
from test_llama_family import Golden
from tiny_families import SIZES, assert_near, check, logits_of, save, stacked_experts, write_gguf

from model_files import interleaved
from variants import VARIANTS, Variant, require

Tensors = dict[str, NDArray[np.float32]]


@dataclass
class Case:
    """A configuration, and how its GGUF files differ: `keys` of metadata, besides those that all have."""

    config: transformers.PreTrainedConfig
    arch: gguf.MODEL_ARCH
    keys: dict[str, Any] = field(default_factory=dict)


GGUF_KEYS: dict[str, Any] = {"feed_forward_length": 96, "expert_count": 8, "expert_used_count": 3}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 3.0,
}
CASES: dict[str, Case] = {
    "granitemoe": Case(
        transformers.GraniteMoeConfig(
            **SIZES, **GRANITE, intermediate_size=96, num_local_experts=8, num_experts_per_tok=3, rms_norm_eps=1e-3
        ),
        gguf.MODEL_ARCH.GRANITE_MOE,
        {
            "attention.layer_norm_rms_epsilon": 1e-3,
            "attention.scale": 0.3,
            "embedding_scale": 12.0,
            "residual_scale": 0.22,
            "logit_scale": 3.0,
        },
    ),
}


@pytest.fixture(scope="module", params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def golden(name: str, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return save(CASES[name].config, tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_agree_with_transformers(golden: Golden, variant: Variant) -> None:
    require(variant.backend)
    check(golden, variant)


def converted(name: str, tensors: Tensors) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """As converters have it, still under the names of folders."""
    for key, values in stacked_experts(tensors).items():
        if "granite" in name and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = SIZES["num_attention_heads" if "q_proj" in key else "num_key_value_heads"]
            yield key, interleaved(values, heads)
        elif key.endswith("input_linear.weight"):
            for part, projection in enumerate(("gate_proj", "up_proj")):
                stem = key.replace("block_sparse_moe.input_linear", f"mlp.experts.{projection}")
                yield stem, np.split(values, 2, axis=1)[part]
        else:
            yield key, values


@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
def test_a_gguf_file_gives_the_same_logits(tmp_path: Path, name: str, golden: Golden, backend_name: str) -> None:
    require(backend_name)
    case, variant = CASES[name], next(v for v in VARIANTS if v.backend == backend_name)
    write_gguf(tmp_path / "model.gguf", golden.folder, case.arch, GGUF_KEYS | case.keys, lambda it: converted(name, it))
    for actual, expected in zip(logits_of(tmp_path / "model.gguf", variant), golden.logits, strict=True):
        assert_near(actual, expected, variant)
