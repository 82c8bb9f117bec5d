"""Families with multi-head latent attention against Transformers in float32, on tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_llama_family import PROMPTS, SIZES, Golden, Runnable, assert_same, opened

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


def saved(config: transformers.PreTrainedConfig, folder: Any) -> Golden:
    """A random model in `folder`, everything in it random."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                values.normal_(0.0, 0.2)
            elif values.dim() == 1 and not name.endswith(("inv_freq", "embed_scale")):
                # Fresh norms are all ones and fresh biases all zeros, which would hide that they are used.
                values.normal_(1.0 if "norm" in name else 0.0, 0.3)
            elif values.dim() > 1:
                values.normal_(0.0, values.shape[-1] ** -0.5)
        logits = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]
    model.save_pretrained(folder)
    return Golden(folder, logits)


@pytest.fixture(scope="session", params=list(CONFIGS))
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return saved(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session", params=[v for v in VARIANTS if v.kv_dtype != "int8"], ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    require(request.param.backend)
    return request.param


@pytest.fixture
def runnable(golden: Golden, variant: Variant) -> Iterator[Runnable]:
    with opened(golden.folder, variant) as made:
        yield made


def test_logits_agree_with_transformers(runnable: Runnable, golden: Golden, variant: Variant) -> None:
    for prompt, expected in zip(PROMPTS, golden.logits, strict=True):
        actual = runnable.logits([Row(prompt, 0, runnable.pages.take(len(prompt)))])
        assert actual.shape == expected.shape
        if variant.backend == "reference":
            np.testing.assert_allclose(actual, expected, atol=1e-4)
        error = np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2))
        # Queries and values go through two products more than those of other attentions.
        assert error <= variant.model * 2.0


def test_chunks_in_a_batch_and_behind_a_prefix_give_what_a_prompt_gives_whole(
    runnable: Runnable, variant: Variant
) -> None:
    prompt, page_size = PROMPTS[-1], runnable.page_size
    first_pages, pages, others = (runnable.pages.take(len(prompt)) for _ in range(3))
    whole = runnable.logits([Row(prompt, 0, first_pages)])
    bounds = [0, 1, 3, 16, 39, len(prompt)]
    parts = []
    for begin, end in pairwise(bounds):
        rows = [Row(prompt[begin:end], begin, pages), Row(prompt[: begin + 1], 0, others)]
        parts.append(runnable.logits(rows)[: end - begin])
    assert_same(np.concatenate(parts), whole, variant)
    # Another sequence shares all but the last four tokens: whole pages as they are, the rest of a page by copy.
    shared = len(prompt) - 4
    full_pages, rest = divmod(shared, page_size)
    own = runnable.pages.take(len(prompt) - full_pages * page_size)
    if rest:
        runnable.backend.copy_pages([PageCopy(first_pages[full_pages], own[0], rest)])
    cached = runnable.logits([Row(prompt[shared:], shared, first_pages[:full_pages] + own)])
    assert_same(cached, whole[shared:], variant)
