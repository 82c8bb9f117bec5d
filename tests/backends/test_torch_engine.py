"""Whole engines on the torch backend: whatever the mix, every request gets the tokens the reference gives it alone."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_graphs import SimulatedGraphBackend

from mooli import Engine
from mooli.backends import create_backend
from mooli.backends.base import Backend, Limits
from mooli.cache.kv_cache import KVCache
from mooli.engine.core import EngineCore
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.llama import LlamaConfig
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Request, RequestOutput, SamplingParams, TokenLogprobs

CONFIG = LlamaConfig(
    family="qwen2",
    architecture="Qwen2ForCausalLM",
    vocab_size=120,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qkv_bias=True,
    max_position_embeddings=512,
)
POOL_TOKENS = 640
MAX_TOKENS = 256
CLEAR = 1e-3
"""Requests with a greedy choice nearer than this to another are left out: rounding may decide them."""

Answer = tuple[list[int], list[TokenLogprobs], list[TokenLogprobs] | None]


@dataclass
class Built:
    """The tiny model on a backend."""

    runner: ModelRunner
    page_size: int

    def core(self, *, pool_tokens: int, chunk: int, cache: KVCache | None = None, enabled: bool = True) -> EngineCore:
        num_pages = pool_tokens // self.page_size
        scheduler = Scheduler(
            cache or KVCache(num_pages, self.page_size, enabled),
            max_batch_tokens=chunk,
            max_running_requests=8,
            context_length=num_pages * self.page_size,
            vocab_size=CONFIG.vocab_size,
        )
        return EngineCore(scheduler, self.runner)


def built(backend: Backend, page_size: int) -> Built:
    model = create_model(CONFIG, DummyCheckpoint(CONFIG, seed=3), backend)
    spec = CONFIG.cache_spec(page_size, "float32")
    num_pages = POOL_TOKENS // page_size
    backend.allocate(spec, num_pages, Limits(MAX_TOKENS, 8, num_pages))
    return Built(ModelRunner(model, backend, CONFIG.vocab_size), page_size)


def requests() -> list[Request]:
    """Over three common beginnings that end inside pages; greedy and drawn, penalised, with log-probabilities."""
    rng = random.Random(5)
    heads = [[rng.randrange(CONFIG.vocab_size) for _ in range(length)] for length in (0, 37, 70)]
    made = []
    for index in range(24):
        tail = [rng.randrange(CONFIG.vocab_size) for _ in range(rng.choice([1, 3, 17, 30]))]
        sampling = SamplingParams(
            # long outputs of short prompts are what a small pool has to preempt
            max_new_tokens=75 if index % 6 == 0 else rng.choice([1, 4, 9]),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([-1, 20]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            seed=index,
        )
        made.append(
            Request(
                rid=str(index),
                prompt_ids=np.array(heads[index % 3] + tail, dtype=np.int32),
                sampling=sampling,
                return_logprob=True,
                logprob_start=0 if index % 8 == 0 else None,
                num_top_logprobs=2,
            )
        )
    return made


def run(core: EngineCore, wanted: list[Request], arrivals: random.Random | None = None) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    pending = list(wanted)
    while pending or core.has_work:
        while pending and (arrivals is None or arrivals.random() < 0.6):
            core.add(pending.pop(0))
        for output in core.step():
            _collect(answers, output)
        core.check()
    return answers


def _collect(answers: dict[str, Answer], output: RequestOutput) -> None:
    ids, logprobs, prompt = answers.get(output.rid, ([], [], None))
    answers[output.rid] = (ids + output.new_token_ids, logprobs + output.logprobs, output.prompt_logprobs or prompt)


def is_clear(answer: Answer) -> bool:
    return all(entry.top[0][0] - entry.top[1][0] > CLEAR for entry in answer[1])


@pytest.fixture(scope="module")
def alone() -> Iterator[list[tuple[Request, Answer]]]:
    """Each request with the reference's answer to it alone and cold."""
    backend = create_backend("reference")
    reference = built(backend, 16)
    answers = []
    for request in requests():
        core = reference.core(pool_tokens=POOL_TOKENS, chunk=MAX_TOKENS, enabled=False)
        answers.append((request, run(core, [request])[request.rid]))
    yield [(r, answer) for r, answer in answers if r.sampling.temperature > 0 or is_clear(answer)]
    backend.close()


def assert_same(actual: Answer, expected: Answer, message: str) -> None:
    assert actual[0] == expected[0], message
    for mine, theirs in ((actual[1], expected[1]), (actual[2] or [], expected[2] or [])):
        assert [entry.logprob for entry in mine] == [
            None if entry.logprob is None else pytest.approx(entry.logprob, abs=1e-4) for entry in theirs
        ], message


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("page_size", [1, 16, 128], ids=lambda size: f"pages-of-{size}")
def test_random_mixes_answer_as_the_reference_alone_and_cold(
    alone: list[tuple[Request, Answer]], page_size: int, graphs: bool
) -> None:
    expected = {request.rid: answer for request, answer in alone}
    every = [request for request, _ in alone]
    long = [request for request in every if request.sampling.max_new_tokens == 75]
    assert len(every) >= 18 and len(long) >= 2
    backend = SimulatedGraphBackend(dtype="float32") if graphs else create_backend("torch", dtype="float32")
    model = built(backend, page_size)
    rng = random.Random(11)
    cached = preempted = 0
    # The longest request needs 110 tokens; two of the long ones do not fit beside each other in the small pool.
    small = max(144, 2 * page_size)
    cache: KVCache | None = None
    for mix in range(12 if graphs else 20):
        wanted, pool_tokens = rng.sample(every, rng.randint(2, 5)), POOL_TOKENS
        if mix % 5 == 0:
            wanted, pool_tokens = long[:3], small
        if cache is None or cache.num_pages != pool_tokens // page_size or rng.random() < 0.2:
            cache = KVCache(pool_tokens // page_size, page_size, rng.random() < 0.85)  # otherwise warm from before
        core = model.core(pool_tokens=pool_tokens, chunk=rng.choice([4, 20, 50, MAX_TOKENS]), cache=cache)
        answers = run(core, wanted, rng)
        for request in wanted:
            assert_same(answers[request.rid], expected[request.rid], f"request {request.rid} in mix {mix}")
        stats = core.stats()
        cached += stats["cached_tokens"]
        preempted += stats["preemptions"]
    assert cached > 300, "the mixes must reuse what others computed"
    # No request outgrows a page of 128, so none has to give way to another there.
    assert preempted or page_size == 128, "the mixes must preempt"
    if isinstance(backend, SimulatedGraphBackend):
        assert len(backend.recorder.replays) > 200
    backend.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's configuration without weights."""
    made = tmp_path_factory.mktemp("tiny")
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (made / "config.json").write_text(json.dumps(config))
    return made


def generated(folder: Path, device: str, **settings: Any) -> tuple[list[list[int]], list[int], dict[str, Any]]:
    """Answers to the same prompts twice, how much of the second time was cached, and what the engine says of itself."""
    prompts = [[5, 6, 7, 8] * 10, [9, 10, 11], [5, 6, 7, 8] * 9 + [1, 2]]
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    with Engine(
        model_path=str(folder), load_format="dummy", skip_tokenizer_init=True, device=device, max_total_tokens=1024,
        dtype="float32", random_seed=1, **settings,
    ) as engine:  # fmt: skip
        first = engine.generate(input_ids=prompts, sampling_params=params)
        again = engine.generate(input_ids=prompts, sampling_params=params)
        assert [a["output_ids"] for a in first] == [a["output_ids"] for a in again]
        cached = [answer["meta_info"]["cached_tokens"] for answer in again]
        return [answer["output_ids"] for answer in first], cached, engine.get_server_info()


@pytest.mark.parametrize("settings", [{}, {"page_size": 1}, {"page_size": 128}, {"chunked_prefill_size": 7}], ids=str)
def test_an_engine_answers_as_on_the_reference_and_reuses_its_cache(folder: Path, settings: dict[str, Any]) -> None:
    expected, _, _ = generated(folder, "reference")
    actual, cached, info = generated(folder, "torch", **settings)
    assert actual == expected
    # All but a prompt's last token, wherever pages end.
    assert cached == [39, 2, 37]
    assert info["backend"]["backend"] == "torch"
