"""Families against Transformers in float32, on tiny random models of every kind of configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from mooli.backends import create_backend
from mooli.backends.base import Backend
from mooli.batch import PageCopy, PromptLogprobRows, StateCopy
from mooli.errors import UnsupportedModelError
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.config import ModelConfig
from mooli.models.family import Model
from mooli.models.llama import LlamaConfig
from mooli.models.loader import open_model
from mooli.models.registry import create_model
from steps import LIMITS, Pages, Row, step
from variants import VARIANTS, Variant, require

Floats = NDArray[np.float32]

VOCAB = 199
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GEMMA_SIZES = {**SIZES, "head_dim": 32, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied-mha": transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "llama-3-rope": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, head_dim=32),
    "llama-linear-rope": transformers.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "llama-biases": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=False),
    "mistral-window": transformers.MistralConfig(**SIZES, sliding_window=9, tie_word_embeddings=False),
    "qwen2-biases": transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2-tied-one-kv-head": transformers.Qwen2Config(
        **{**SIZES, "num_key_value_heads": 1}, tie_word_embeddings=True, rms_norm_eps=1e-4
    ),
    "qwen3-qk-norm": transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False),
    "qwen3-tied": transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "smollm3": transformers.SmolLM3Config(**SIZES, no_rope_layer_interval=2, tie_word_embeddings=False),
    "smollm3-biases": transformers.SmolLM3Config(**SIZES, no_rope_layers=[0, 1, 0], attention_bias=True, mlp_bias=True),
    "ernie": transformers.Ernie4_5Config(**SIZES, head_dim=32, use_bias=True),
    "granite": transformers.GraniteConfig(
        **SIZES,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.3,
        logits_scaling=3.0,
        rms_norm_eps=1e-3,
    ),
    "hunyuan": transformers.HunYuanDenseV1Config(
        **SIZES,
        head_dim=32,
        rope_parameters={"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0, "rope_theta": 10000.0},
    ),
    "gemma3-windows": transformers.Gemma3TextConfig(
        **GEMMA_SIZES,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=40,
    ),
    "gemma3-scaled-rope": transformers.Gemma3TextConfig(
        **GEMMA_SIZES,
        sliding_window=16,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        sliding_window_pattern=2,
    ),
    "lfm2": transformers.Lfm2Config(
        **SIZES, layer_types=["conv", "full_attention", "conv"], block_multiple_of=32, tie_word_embeddings=True
    ),
    "lfm2-biases": transformers.Lfm2Config(
        **SIZES,
        full_attn_idxs=[2],
        conv_bias=True,
        conv_L_cache=4,
        block_auto_adjust_ff_dim=False,
        tie_word_embeddings=False,
    ),
    "qwen3.5": transformers.Qwen3_5TextConfig(
        **SIZES,
        head_dim=32,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
    ),
}

PROMPTS = [np.random.default_rng(length).integers(0, VOCAB, length).tolist() for length in (1, 7, 40)]


@dataclass
class Golden:
    """A saved model, and Transformers' logits (len(prompt), VOCAB) for every prompt."""

    folder: Path
    logits: list[Floats]


@pytest.fixture(scope="session", params=list(CONFIGS))
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return golden_of(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


def golden_of(config: transformers.PreTrainedConfig, folder: Path) -> Golden:
    """A random model, saved to the folder."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh norms are all ones and fresh biases all zeros, which would hide that they are used.
            if parameter.dim() == 1:
                is_less_by_one = "Gemma" in type(model).__name__ or "Qwen3_5" in type(model).__name__
                is_gain = "norm" in name and (not is_less_by_one or "linear_attn" in name)
                parameter.normal_(1.0 if is_gain else 0.0, 0.3)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
        logits = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]
    model.save_pretrained(folder)
    return Golden(folder, logits)


class Runnable:
    """A model on a backend with its pool allocated."""

    def __init__(self, model: Model, backend: Backend, kv_dtype: str) -> None:
        config = model.config
        self.backend = backend
        self.page_size = backend.default_page_size
        spec = config.cache_spec(self.page_size, kv_dtype)
        self.has_states = bool(spec.state_layers)
        self.has_experts = any(".experts." in name for name in config.tensors())
        backend.allocate(spec, 32, replace(LIMITS, num_states=34 if self.has_states else 0))
        self.pages = Pages(32, self.page_size)
        self._forward = backend.capture(model.forward)
        self._logits = backend.capture(model.logits)

    def logits(self, rows: list[Row]) -> Floats:
        """(T, VOCAB) of all tokens of a step. The state of a row is in the slot of its first page's number."""
        if self.has_states:
            rows = [row if row.state >= 0 else replace(row, state=row.pages[0]) for row in rows]
        else:
            rows = [replace(row, state=-1, saves=()) for row in rows]
        batch = step(rows, self.page_size)
        batch.prompt_logprobs = [PromptLogprobRows(0, 0, batch.token_ids)]  # no row is left out
        planned = self.backend.plan(batch)
        hidden = self._forward(planned)
        everything = np.arange(batch.num_tokens, dtype=np.int32)
        parts = []
        for begin in range(0, batch.num_tokens, LIMITS.max_rows):
            taken = self.backend.take_rows(planned, hidden, everything[begin : begin + LIMITS.max_rows])
            parts.append(np.array(self.backend.to_host(self._logits(*taken)), dtype=np.float32))
        return np.concatenate(parts)


@contextmanager
def opened(folder: Path, variant: Variant) -> Iterator[Runnable]:
    backend = create_backend(variant.backend, dtype=variant.dtype, quantization=variant.quantization)
    try:
        config, checkpoint = open_model(folder)
        try:
            model = create_model(config, checkpoint, backend)
        finally:
            checkpoint.close()
        yield Runnable(model, backend, variant.kv_dtype)
    finally:
        backend.close()


@pytest.fixture(scope="session", params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    require(request.param.backend)
    return request.param


@pytest.fixture
def runnable(golden: Golden, variant: Variant) -> Iterator[Runnable]:
    with opened(golden.folder, variant) as made:
        yield made


def assert_same(actual: Floats, expected: Floats, variant: Variant, num_sums: int = 1) -> None:
    """Equal to the bit where the backend promises it, else within the rounding of its activations.
    num_sums: in so many places of a layer the order in which numbers are added depends on the batch."""
    if variant.exact_rows:
        np.testing.assert_array_equal(actual, expected)
    elif variant.embed == 0:
        np.testing.assert_allclose(actual, expected, atol=2e-5 * num_sums)
    else:
        error = np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2))
        assert error <= variant.model


def test_logits_agree_with_transformers(runnable: Runnable, golden: Golden, variant: Variant) -> None:
    for prompt, expected in zip(PROMPTS, golden.logits, strict=True):
        actual = runnable.logits([Row(prompt, 0, runnable.pages.take(len(prompt)))])
        assert actual.shape == expected.shape
        if variant.backend == "reference":
            np.testing.assert_allclose(actual, expected, atol=1e-4)
        error = np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2))
        # Where three projections or more are multiplied, so are their errors.
        assert error <= variant.model * (2.0 if runnable.has_states else 1.0)


def test_a_prompt_in_chunks_gives_what_it_gives_whole(
    runnable: Runnable, variant: Variant, every: tuple[tuple[int, ...], ...] = ((13, 26), (16, 32), (1, 2, 3, 39))
) -> None:
    prompt = PROMPTS[-1]
    whole = runnable.logits([Row(prompt, 0, runnable.pages.take(len(prompt)))])
    for cuts in every:
        pages = runnable.pages.take(len(prompt))
        bounds = [0, *cuts, len(prompt)]
        parts = [runnable.logits([Row(prompt[a:b], a, pages)]) for a, b in pairwise(bounds)]
        # The chunks of a recurrence are cut where the steps are, on backends that compute it in chunks.
        assert_same(np.concatenate(parts), whole, variant, num_sums=2 if runnable.has_states else 1)


def test_rows_in_a_batch_give_what_they_give_alone(runnable: Runnable, variant: Variant) -> None:
    prompt = PROMPTS[-1]
    pages = [runnable.pages.take(len(prompt)) for _ in range(4)]
    whole = runnable.logits([Row(prompt, 0, pages[0])])
    runnable.logits([Row(prompt[:39], 0, pages[1]), Row(prompt[:20], 0, pages[2])])
    mixed = runnable.logits(
        [Row(prompt[39:], 39, pages[1]), Row(prompt[20:33], 20, pages[2]), Row(prompt[:9], 0, pages[3])]
    )
    assert_same(mixed, np.concatenate([whole[39:], whole[20:33], whole[:9]]), variant)


def test_a_cached_prefix_gives_what_computing_it_gives(runnable: Runnable, variant: Variant) -> None:
    prompt, page_size = PROMPTS[-1], runnable.page_size
    first_pages, shared = runnable.pages.take(len(prompt)), len(prompt) - 4
    whole = runnable.logits([Row(prompt, 0, first_pages, saves=((7, 33), (shared, 32)))])
    # Another sequence shares all but the last four tokens: whole pages as they are, the rest of a page by copy.
    full_pages, rest = divmod(shared, page_size)
    own = runnable.pages.take(len(prompt) - full_pages * page_size)
    if rest:
        runnable.backend.copy_pages([PageCopy(first_pages[full_pages], own[0], rest)])
    if runnable.has_states:
        runnable.backend.copy_states([StateCopy(33, own[0]), StateCopy(32, own[0])])
    cached = runnable.logits([Row(prompt[shared:], shared, first_pages[:full_pages] + own, state=own[0])])
    assert_same(cached, whole[shared:], variant)


def test_kept_states_are_those_after_their_tokens(runnable: Runnable, variant: Variant) -> None:
    if not runnable.has_states:
        pytest.skip("the family has no recurrent layers")
    prompt, pages = PROMPTS[-1], runnable.pages.take(len(PROMPTS[-1]))
    whole = runnable.logits([Row(prompt, 0, pages)])
    # Guesses behind a prompt, of which a part is right; and beside it another row, of one token.
    wrong = [prompt[20], (prompt[21] + 1) % VOCAB, (prompt[22] + 1) % VOCAB]
    other = runnable.pages.take(3)
    runnable.logits([Row(prompt[:19], 0, pages), Row(prompt[:2], 0, other)])
    runnable.logits(
        [
            Row([prompt[19], *wrong], 19, pages, saves=((1, 30), (2, 31), (3, 32))),
            Row(prompt[2:3], 2, other),
        ]
    )
    rest = runnable.logits([Row(prompt[21:], 21, pages, state=31)])
    assert_same(rest, whole[21:], variant)


def test_progress_is_told_from_nothing_to_everything(golden: Golden) -> None:
    config, checkpoint = open_model(golden.folder)
    told: list[tuple[int, int]] = []
    create_model(config, checkpoint, create_backend("reference"), lambda done, total: told.append((done, total)))
    checkpoint.close()
    total = len(config.tensors())
    assert told[0] == (0, total) and told[-1] == (total, total)
    assert len(told) > config.num_layers
    assert all(before[0] < after[0] and after[1] == total for before, after in pairwise(told))


class RecordingCheckpoint(DummyCheckpoint):
    """Counts how many tensors are in use at one time and which were released."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.in_use: set[str] = set()
        self.released: set[str] = set()
        self.most_in_use = 0

    def tensor(self, name: str) -> Any:
        self.in_use.add(name)
        self.most_in_use = max(self.most_in_use, len(self.in_use))
        return super().tensor(name)

    def release(self, name: str) -> None:
        self.in_use.remove(name)
        self.released.add(name)


def test_each_tensor_is_released_once_it_is_packed(golden: Golden) -> None:
    config, checkpoint = open_model(golden.folder)
    checkpoint.close()
    recording = RecordingCheckpoint(config)
    create_model(config, recording, create_backend("reference"))
    assert recording.in_use == set()
    assert recording.released == set(recording.names())
    assert recording.most_in_use <= 6  # q, k, v and their biases


def test_a_family_without_a_class_is_refused() -> None:
    config = LlamaConfig(
        family="gpt9",
        architecture="Gpt9ForCausalLM",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
    )
    with pytest.raises(UnsupportedModelError, match=r"'gpt9'.*llama, mistral, qwen2, qwen3, smollm3"):
        create_model(config, DummyCheckpoint(config), create_backend("reference"))
