"""The engine's core on the simulated NPU: in any mix, each request gets the tokens the reference gives it alone."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from mooli.backends import create_backend
from mooli.backends.ascend.paths import PAGE_SIZE
from mooli.backends.base import Backend, Limits
from mooli.cache.kv_cache import KVCache
from mooli.engine.core import EngineCore
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.llama import LlamaConfig
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Request, SamplingParams
from variants import simulated_npu

CONFIG = LlamaConfig(
    family="qwen2",
    architecture="Qwen2ForCausalLM",
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qkv_bias=True,
    max_position_embeddings=1024,
)
POOL_PAGES = 10
MAX_TOKENS = 512
MIXES = 100
"""For each of two profiles."""

CLEAR = 0.02
"""Requests with a greedy choice nearer than this to another are left out: rounding to 16 bits may decide them."""


@pytest.fixture(autouse=True)
def _simulated() -> Iterator[None]:
    with simulated_npu():
        yield


class Built:
    """The tiny model on a backend."""

    def __init__(self, backend: Backend, dtype: str) -> None:
        model = create_model(CONFIG, DummyCheckpoint(CONFIG, seed=3), backend)
        spec = CONFIG.cache_spec(PAGE_SIZE, dtype)
        backend.allocate(spec, POOL_PAGES, Limits(MAX_TOKENS, 8, POOL_PAGES))
        self.backend = backend
        self._runner = ModelRunner(model, backend, CONFIG.vocab_size)

    def core(self, cache: KVCache, chunk: int = MAX_TOKENS, mixed: int | None = None) -> EngineCore:
        scheduler = Scheduler(
            cache,
            max_batch_tokens=chunk,
            max_running_requests=6,
            context_length=cache.num_pages * PAGE_SIZE,
            vocab_size=CONFIG.vocab_size,
            mixed_prefill_tokens=mixed,
        )
        return EngineCore(scheduler, self._runner)


def requests() -> list[Request]:
    """Prompts over common beginnings that end inside a page, at its end and behind it. Greedy."""
    rng = random.Random(5)
    heads = [[rng.randrange(CONFIG.vocab_size) for _ in range(length)] for length in (0, 40, 128, 200)]
    made = []
    for index in range(40):
        tail = [rng.randrange(CONFIG.vocab_size) for _ in range(rng.choice([1, 3, 30, 84, 90]))]
        prompt = np.array(heads[index % 4] + tail, dtype=np.int32)
        sampling = SamplingParams(max_new_tokens=rng.choice([1, 2, 4]), temperature=0.0)
        made.append(
            Request(rid=str(index), prompt_ids=prompt, sampling=sampling, return_logprob=True, num_top_logprobs=2)
        )
    return made


def run(core: EngineCore, wanted: list[Request], arrivals: random.Random | None = None) -> dict[str, list[int]]:
    """Ids by request; none of a request whose choices were not clear."""
    answers: dict[str, list[int]] = {request.rid: [] for request in wanted}
    unclear = set()
    pending = list(wanted)
    while pending or core.has_work:
        while pending and (arrivals is None or arrivals.random() < 0.6):
            core.add(pending.pop(0))
        for output in core.step():
            assert output.finish is None or output.finish.type != "error", output.finish
            answers[output.rid] += output.new_token_ids
            unclear |= {output.rid for entry in output.logprobs if entry.top[0][0] - entry.top[1][0] < CLEAR}
        core.check()
    return {rid: ids for rid, ids in answers.items() if arrivals is not None or rid not in unclear}


@pytest.fixture(scope="module")
def alone() -> Iterator[list[tuple[Request, list[int]]]]:
    """Each request that is decided clearly, with the reference's answer to it alone and cold."""
    backend = create_backend("reference")
    reference = Built(backend, "float32")
    answers = []
    for request in requests():
        ids = run(reference.core(KVCache(POOL_PAGES, PAGE_SIZE, False)), [request])
        answers += [(request, ids[request.rid])] if ids else []
    yield answers
    backend.close()


@pytest.mark.parametrize(("profile", "dtype"), [("8.2", "float16"), ("8.5", "float16")])
def test_random_mixes_answer_as_the_reference_alone_and_cold(
    alone: list[tuple[Request, list[int]]], monkeypatch: pytest.MonkeyPatch, profile: str, dtype: str
) -> None:
    monkeypatch.setenv("MOOLI_SIMULATE_ASCEND", profile)
    expected = {request.rid: ids for request, ids in alone}
    assert len(expected) >= 15
    backend = create_backend("ascend", dtype=dtype)
    model, granularity = Built(backend, dtype), backend.match_granularity_tokens
    assert granularity == (PAGE_SIZE if profile == "8.2" else 1)
    rng = random.Random(11)
    cached = 0
    cache: KVCache | None = None
    for mix in range(MIXES):
        wanted = rng.sample([request for request, _ in alone], rng.randint(1, 3))
        if cache is None or rng.random() < 0.1:
            num_pages = rng.choice([5, POOL_PAGES])
            cache = KVCache(num_pages, PAGE_SIZE, rng.random() < 0.9, match_granularity_tokens=granularity)
        core = model.core(cache, rng.choice([60, 200, MAX_TOKENS]), rng.choice([None, 50, 128]))
        answers = run(core, wanted, rng)
        for request in wanted:
            assert answers[request.rid] == expected[request.rid], f"request {request.rid} in mix {mix}"
        cached += core.stats()["cached_tokens"]
    assert cached > 1000, "the mixes must reuse what others computed"
    assert cached % granularity == 0
    backend.close()


def test_requests_that_outgrow_the_pool_give_way_and_go_on_as_before() -> None:
    """Two answers over two pages' edges each, in a pool that holds one and a half."""
    wanted = [
        Request(
            rid=str(index),
            prompt_ids=np.array([(7 * i + index) % CONFIG.vocab_size for i in range(126)], dtype=np.int32),
            sampling=SamplingParams(max_new_tokens=133, temperature=0.0),
        )
        for index in range(2)
    ]
    backend = create_backend("ascend", dtype="float16")
    model = Built(backend, "float16")
    # Side by side in a pool that holds both.
    expected = run(model.core(KVCache(POOL_PAGES, PAGE_SIZE, False)), wanted, random.Random(0))
    core = model.core(KVCache(4, PAGE_SIZE, match_granularity_tokens=PAGE_SIZE))
    assert run(core, wanted, random.Random(1)) == expected
    assert core.stats()["preemptions"] > 0
    backend.close()
