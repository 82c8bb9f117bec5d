"""Engines on a checkpoint of msmodelslim: on every backend the greedy tokens of the float model it stands for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelslim_folder import CONFIG, FloatCheckpoint, made_static, quantised, write
from mooli import Engine
from mooli.backends import create_backend
from mooli.backends.base import Limits
from mooli.cache.kv_cache import KVCache
from mooli.engine.core import EngineCore
from mooli.models.loader import open_model
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Request, SamplingParams

CLEAR = 0.1
"""Prompts with a greedy choice nearer than this to another are left out: rounding to 8 bits may decide them."""

NEW_TOKENS = 4


def prompts() -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(CONFIG.vocab_size) for _ in range(rng.choice([3, 9, 140]))] for _ in range(24)]


@pytest.fixture(scope="module")
def meant() -> list[tuple[list[int], list[int]]]:
    """Prompts that are decided clearly, with the float model's answers on the reference backend."""
    backend = create_backend("reference")
    model = create_model(CONFIG, FloatCheckpoint(quantised()[0]), backend)
    spec = CONFIG.cache_spec(16, "float32")
    backend.allocate(spec, 32, Limits(256, 1, 32))
    runner = ModelRunner(model, backend, CONFIG.vocab_size)
    answers = []
    for prompt in prompts():
        scheduler = Scheduler(
            KVCache(32, 16), max_batch_tokens=256, max_running_requests=1, context_length=512, vocab_size=64
        )
        core = EngineCore(scheduler, runner)
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
        core.add(
            Request(
                rid="a",
                prompt_ids=np.array(prompt, np.int32),
                sampling=sampling,
                return_logprob=True,
                num_top_logprobs=2,
            )
        )
        ids: list[int] = []
        margins: list[float] = []
        while core.has_work:
            for output in core.step():
                ids += output.new_token_ids
                margins += [entry.top[0][0] - entry.top[1][0] for entry in output.logprobs]
        if min(margins) > CLEAR:
            answers.append((prompt, ids))
    backend.close()
    assert len(answers) >= 5
    return answers


def answers_of(folder: Path, wanted: list[list[int]], **settings: Any) -> list[list[int]]:
    engine = Engine(
        model_path=str(folder),
        skip_tokenizer_init=True,
        max_total_tokens=2048,
        context_length=256,
        log_level="warning",
        **settings,
    )
    try:
        outputs = engine.generate(
            input_ids=wanted, sampling_params={"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        )
        return [output["output_ids"] for output in outputs]
    finally:
        engine.shutdown()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_tokens_are_those_of_the_float_model(
    meant: list[tuple[list[int], list[int]]], tmp_path: Path, backend_name: str, kind: str
) -> None:
    tensors, description = quantised()
    if kind == "static":
        made_static(tensors, description)
    folder = write(tmp_path, tensors, description)
    actual = answers_of(folder, [prompt for prompt, _ in meant], backend=backend_name)
    assert actual == [ids for _, ids in meant]


def test_what_is_float_is_quantised_where_int8_is_asked_for_and_what_is_int8_is_kept(tmp_path: Path) -> None:
    backend = create_backend("torch", quantization="int8")
    config, checkpoint = open_model(write(tmp_path, *quantised()))
    create_model(config, checkpoint, backend)
    kinds = backend.describe()["weight_kinds"]
    assert kinds["I8 as int8 in groups of 32"] == 13
    assert kinds["F32 as int8 in groups of 32"] == 2  # one layer and the head
    backend.close()
    checkpoint.close()
