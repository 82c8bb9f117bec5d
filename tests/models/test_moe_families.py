"""Families with experts against Transformers in float32, on tiny random models, of every kind of file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from test_llama_family import PROMPTS, SIZES, Golden, Runnable, assert_same, opened

from steps import Row
from variants import VARIANTS, Variant, require

MOE: dict[str, Any] = {**SIZES, "num_experts_per_tok": 3, "tie_word_embeddings": False}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **MOE, head_dim=32, num_experts=8, moe_intermediate_size=48, norm_topk_prob=True, mlp_only_layers=[1]
    ),
    "qwen3-moe-step": transformers.Qwen3MoeConfig(
        **MOE, num_experts=6, moe_intermediate_size=32, decoder_sparse_step=2, attention_bias=True
    ),
    "qwen2-moe": transformers.Qwen2MoeConfig(
        **MOE, num_experts=8, moe_intermediate_size=32, shared_expert_intermediate_size=96
    ),
    "olmoe": transformers.OlmoeConfig(**{**MOE, "intermediate_size": 48}, num_experts=8, attention_bias=True),
    "mixtral": transformers.MixtralConfig(**MOE, num_local_experts=6, sliding_window=9),
}


def made(name: str, folder: Path) -> Golden:
    """A model with random weights, whose routers are decided enough that a rounding seldom changes the choice."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[name], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in key else 0.0, 0.3)
            else:
                size = 3.0 if key.endswith(("mlp.gate.weight", "router.weight")) else 1.0
                parameter.normal_(0.0, size * parameter.shape[-1] ** -0.5)
        logits = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]
    model.save_pretrained(folder)
    return Golden(folder, logits)


@pytest.fixture(scope="session", params=list(CONFIGS))
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session", params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    require(request.param.backend)
    return request.param


@pytest.fixture
def runnable(golden: Golden, variant: Variant) -> Iterator[Runnable]:
    with opened(golden.folder, variant) as opened_model:
        yield opened_model


def rounds(variant: Variant) -> bool:
    """Then a row may choose another expert where two are nearly equal: of most rows the logits are near, not of all."""
    return variant.embed > 0 or variant.linear > 1e-5 or variant.kv_dtype != "float32"


def middle_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Of rows, relative to all of them."""
    errors = np.sqrt(np.mean((actual - expected) ** 2, axis=1))
    return float(np.median(errors) / np.sqrt(np.mean(expected**2)))


def whole(runnable: Runnable, prompt: list[int]) -> NDArray[np.float32]:
    return runnable.logits([Row(prompt, 0, runnable.pages.take(len(prompt)))])


def test_logits_agree_with_transformers(runnable: Runnable, golden: Golden, variant: Variant) -> None:
    for prompt, expected in zip(PROMPTS, golden.logits, strict=True):
        actual = whole(runnable, prompt)
        assert actual.shape == expected.shape
        if not rounds(variant):
            np.testing.assert_allclose(actual, expected, atol=1e-4)
        elif len(prompt) > 1:
            assert middle_error(actual, expected) <= variant.model * 2


def test_rows_in_chunks_and_in_a_batch_give_what_they_give_alone(runnable: Runnable, variant: Variant) -> None:
    prompt = PROMPTS[-1]
    expected = whole(runnable, prompt)
    pages = [runnable.pages.take(len(prompt)) for _ in range(3)]
    first = runnable.logits([Row(prompt[:13], 0, pages[0]), Row(prompt[:39], 0, pages[1])])
    mixed = runnable.logits(
        [Row(prompt[13:30], 13, pages[0]), Row(prompt[39:], 39, pages[1]), Row(prompt[:9], 0, pages[2])]
    )
    for actual, rows in ((first, [*range(13), *range(39)]), (mixed, [*range(13, 30), 39, *range(9)])):
        if variant.exact_rows or not rounds(variant):
            assert_same(actual, expected[rows], variant)
        else:
            assert middle_error(actual, expected[rows]) <= variant.model
