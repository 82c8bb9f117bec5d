"""Families with multi-head latent attention against Transformers in float32, on tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from test_llama_family import PROMPTS, SIZES, Golden, Runnable, assert_same, opened
from test_moe_families import middle_error, rounds

from mooli.batch import PageCopy
from steps import Row
from variants import VARIANTS, Variant, require

MLA: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.2,
    "mscale_all_dim": 0.7,
}

CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "minicpm3": transformers.MiniCPM3Config(
        **MLA, scale_emb=7.0, scale_depth=1.1, dim_model_base=20, rms_norm_eps=1e-3
    ),
    "minicpm3-no-q-rank": transformers.MiniCPM3Config(
        **{**MLA, "q_lora_rank": None}, attention_bias=True, tie_word_embeddings=False, rope_parameters=YARN
    ),
}


MOE: dict[str, Any] = {
    **MLA,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.7,
    "tie_word_embeddings": False,
}
CONFIGS |= {
    "deepseek-v2-groups": transformers.DeepseekV2Config(
        **MOE, n_group=4, topk_group=2, topk_method="group_limited_greedy", first_k_dense_replace=1, rms_norm_eps=1e-4
    ),
    "deepseek-v2-lite": transformers.DeepseekV2Config(
        **{**MOE, "q_lora_rank": None}, first_k_dense_replace=1, rope_parameters={**YARN, "mscale": 0.7}
    ),
    "deepseek-v3": transformers.DeepseekV3Config(
        **MOE, n_group=4, topk_group=2, first_k_dense_replace=1, rope_parameters=YARN, attention_bias=True
    ),
    "deepseek-v3-halves": transformers.DeepseekV3Config(
        **MOE, n_group=1, topk_group=1, first_k_dense_replace=0, norm_topk_prob=False, rope_interleave=False
    ),
    "glm-4.7-flash": transformers.Glm4MoeLiteConfig(**MOE, mlp_layer_types=["sparse", "dense", "sparse"]),
}


def randomise(model: Any) -> None:
    """Everything in it, so that what is left out shows: fresh norms are all ones, and fresh biases all zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                values.normal_(0.0, 0.2)
            elif values.dim() == 1 and not name.endswith(("inv_freq", "embed_scale")):
                values.normal_(1.0 if "norm" in name else 0.0, 0.3)
            elif values.dim() > 1:
                # Routers are decided enough that a rounding seldom changes the choice.
                size = 3.0 if name.endswith("mlp.gate.weight") else 1.0
                values.normal_(0.0, size * values.shape[-1] ** -0.5)


def saved(config: transformers.PreTrainedConfig, folder: Any) -> Golden:
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    randomise(model)
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]
    model.save_pretrained(folder)
    return Golden(folder, logits)


WHOLE = ("minicpm3", "deepseek-v3")
"""On every backend and precision; the others where arithmetic differs."""

FEW = ("reference-float32", "cpu-float32", "cpu-bfloat16-int8", "torch-float32", "ascend-bfloat16")
PAIRS = [
    (name, variant)
    for name in CONFIGS
    for variant in VARIANTS
    if variant.kv_dtype != "int8" and (name in WHOLE or str(variant) in FEW)
]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Golden]:
    """By name, as they are wanted."""
    return {}


@pytest.fixture
def golden(name: str, made: dict[str, Golden], tmp_path_factory: pytest.TempPathFactory) -> Golden:
    if name not in made:
        made[name] = saved(CONFIGS[name], tmp_path_factory.mktemp(name))
    return made[name]


@pytest.fixture
def runnable(golden: Golden, variant: Variant) -> Iterator[Runnable]:
    require(variant.backend)
    with opened(golden.folder, variant) as made:
        yield made


@pytest.mark.parametrize(("name", "variant"), PAIRS, ids=str)
def test_logits_agree_with_transformers(runnable: Runnable, golden: Golden, variant: Variant) -> None:
    for prompt, expected in zip(PROMPTS, golden.logits, strict=True):
        actual = runnable.logits([Row(prompt, 0, runnable.pages.take(len(prompt)))])
        assert actual.shape == expected.shape
        if variant.backend == "reference":
            np.testing.assert_allclose(actual, expected, atol=1e-4)
        if not rounds(variant) or not has_experts(runnable):
            error = np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2))
            # Queries and values go through two products more than those of other attentions.
            assert error <= variant.model * 2.0
        elif len(prompt) > 1:  # a row may choose another expert where two are nearly equal
            assert middle_error(actual, expected) <= variant.model * 2.0


@pytest.mark.parametrize(("name", "variant"), PAIRS, ids=str)
def test_chunks_in_a_batch_and_behind_a_prefix_give_what_a_prompt_gives_whole(
    runnable: Runnable, variant: Variant
) -> None:
    prompt, page_size = PROMPTS[-1], runnable.page_size

    def check(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        if variant.exact_rows or not rounds(variant) or not has_experts(runnable):
            assert_same(actual, expected, variant)
        else:
            assert middle_error(actual, expected) <= variant.model

    first_pages, pages, others = (runnable.pages.take(len(prompt)) for _ in range(3))
    whole = runnable.logits([Row(prompt, 0, first_pages)])
    bounds = [0, 1, 3, 16, 39, len(prompt)]
    parts = []
    for begin, end in pairwise(bounds):
        rows = [Row(prompt[begin:end], begin, pages), Row(prompt[: begin + 1], 0, others)]
        parts.append(runnable.logits(rows)[: end - begin])
    check(np.concatenate(parts), whole)
    # Another sequence shares all but the last four tokens: whole pages as they are, the rest of a page by copy.
    shared = len(prompt) - 4
    full_pages, rest = divmod(shared, page_size)
    own = runnable.pages.take(len(prompt) - full_pages * page_size)
    if rest:
        runnable.backend.copy_pages([PageCopy(first_pages[full_pages], own[0], rest)])
    check(runnable.logits([Row(prompt[shared:], shared, first_pages[:full_pages] + own)]), whole[shared:])


def has_experts(runnable: Runnable) -> bool:
    return runnable.has_experts
