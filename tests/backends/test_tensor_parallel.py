"""Several ranks in the threads of one process: whatever the mix, they answer as one rank does each request alone."""

from __future__ import annotations

import contextlib
import queue
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from mooli.backends import create_backend
from mooli.backends.base import Backend, Limits
from mooli.backends.parallel import CommunicationError, ParallelBackend, RankGroup
from mooli.batch import ScheduleBatch, StepOutput
from mooli.cache.kv_cache import KVCache
from mooli.engine import rank_process
from mooli.engine.core import EngineCore
from mooli.errors import ConfigError
from mooli.models import registry
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.config import ModelConfig
from mooli.models.deepseek import DeepseekConfig, DeepseekExperts
from mooli.models.experts import Experts
from mooli.models.gpt_oss import GptOssExperts, SinkAttention
from mooli.models.llama import LlamaConfig
from mooli.models.mla import LatentHeads
from mooli.models.registry import create_model
from mooli.models.sharding import Place, part_checkpoint
from mooli.runner.model_runner import ModelRunner
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Request, SamplingParams
from toy_family import TOY, ToyConfig

PAGE_SIZE = 16
POOL_TOKENS = 640
MAX_TOKENS = 256
CLEAR = 1e-3
"""Requests with a greedy choice nearer than this to another are left out: rounding may decide them."""


def config(family: str, **changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        # An odd vocabulary, so that the last rank's part is padded.
        "vocab_size": 121, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    }  # fmt: skip
    return LlamaConfig(family=family, architecture=family, **(sizes | changes))


FAMILIES: dict[str, tuple[ModelConfig, int]] = {
    "llama, tied, biases on every layer": (
        config("llama", tie_word_embeddings=True, qkv_bias=True, o_bias=True, mlp_bias=True), 2,
    ),
    "mistral, window": (config("mistral", sliding_window=24), 2),
    "qwen2": (config("qwen2", qkv_bias=True), 2),
    "qwen3": (config("qwen3", qk_norm=True, num_kv_heads=4, num_layers=1), 4),
    "qwen2, key heads on two ranks each": (config("qwen2", qkv_bias=True, num_layers=1), 4),
    "qwen2 with experts and one that is shared": (
        LlamaConfig(
            family="qwen2_moe", architecture="Qwen2MoeForCausalLM", vocab_size=121, hidden_size=32,
            intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_position_embeddings=512,
            qkv_bias=True, experts=Experts(num_experts=6, top_k=2, width=16, shared_width=48, dense_layers=(1,)),
        ),
        2,
    ),
    "latents and experts": (
        DeepseekConfig(
            family="deepseek_v3", architecture="DeepseekV3ForCausalLM", vocab_size=121, hidden_size=32, num_layers=2,
            intermediate_size=64, max_position_embeddings=512, experts=Experts(
                kind=DeepseekExperts, num_experts=4, top_k=2, width=16, shared_width=32, dense_layers=(0,),
                correction=True, score="sigmoid", normalise=True, eps=1e-20, groups=2, kept_groups=1,
            ),
            heads=LatentHeads(num_heads=4, q_rank=24, rank=32, nope_dim=16, rope_dim=16, value_dim=24, bias=True),
        ),
        2,
    ),
    "gpt-oss: sinks, and experts with biases": (
        LlamaConfig(
            family="gpt_oss", architecture="GptOssForCausalLM", vocab_size=121, hidden_size=32, intermediate_size=16,
            num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_position_embeddings=512, qkv_bias=True,
            o_bias=True, windows=(24, 0), attention=SinkAttention,
            experts=Experts(kind=GptOssExperts, num_experts=6, top_k=2, width=16, score="chosen_softmax"),
        ),
        2,
    ),
    "a family that the package does not know": (
        ToyConfig(
            family="toy", architecture="ToyLM", vocab_size=121, hidden_size=32, num_layers=2, num_queries=4,
            num_kv_heads=2, width=64, has_bias=True, max_position_embeddings=512,
        ),
        2,
    ),
}  # fmt: skip


class Group:
    """A model on `size` ranks, each a backend with a thread of its own but rank 0, which computes where it is asked."""

    def __init__(self, model: ModelConfig, size: int, folder: Path, **settings: Any) -> None:
        self._stores = iter(range(1000))
        self._folder = folder
        self.backends: list[Backend] = [None] * size  # type: ignore[list-item]
        self._runners: list[ModelRunner] = [None] * size  # type: ignore[list-item]
        self._steps: list[queue.SimpleQueue[bytes | None]] = [queue.SimpleQueue() for _ in range(size)]
        self._failed: list[BaseException] = []
        on_every_rank(size, lambda rank: self._open(model, rank, size, settings))
        self._threads = [threading.Thread(target=self._follow, args=(rank,)) for rank in range(1, size)]
        for thread in self._threads:
            thread.start()

    def _open(self, model: ModelConfig, rank: int, size: int, settings: dict[str, Any]) -> None:
        backend = create_backend("torch", dtype="float32", num_threads=1, **settings)
        self.backends[rank] = backend
        place = Place(rank, size)
        if size > 1:
            cast(ParallelBackend, backend).join(RankGroup(rank, size, self._folder / "store", timeout_s=60))
        made = create_model(
            model.part(place.size), part_checkpoint(model, DummyCheckpoint(model, seed=3), place), backend
        )
        spec = made.config.cache_spec(PAGE_SIZE, "float32")
        num_pages = POOL_TOKENS // PAGE_SIZE
        backend.allocate(spec, num_pages, Limits(MAX_TOKENS, 8, num_pages))
        self._runners[rank] = ModelRunner(made, backend, model.vocab_size)

    def execute(self, batch: ScheduleBatch) -> StepOutput:
        frame = rank_process.encode(rank_process.Step(batch))
        for steps in self._steps[1:]:
            steps.put(frame[4:])
        return self._runners[0].execute(batch)

    def _follow(self, rank: int) -> None:
        while (body := self._steps[rank].get()) is not None:
            self._runners[rank].execute(rank_process.decode(body, rank_process.ToRank).batch)

    def close(self) -> None:
        for steps in self._steps[1:]:
            steps.put(None)
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        for backend in self.backends:
            backend.close()


def on_every_rank(size: int, work: Callable[[int], None]) -> None:
    """Run `work(rank)` on a thread for each rank, and raise what the first one raises."""
    raised: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            work(rank)
        except BaseException as exc:
            raised.append(exc)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    if raised:
        raise raised[0]


@pytest.fixture(autouse=True)
def _quick_turns() -> Iterator[None]:
    """Ranks wait for each other many times a step, and none must hold the interpreter while it does nothing."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@contextlib.contextmanager
def group(model: ModelConfig, size: int, folder: Path, **settings: Any) -> Iterator[Group]:
    made = Group(model, size, folder, **settings)
    try:
        yield made
    finally:
        made.close()


def requests() -> list[Request]:
    """Over common beginnings that end inside pages; greedy and drawn, penalised, with log-probabilities."""
    rng = random.Random(5)
    heads = [[rng.randrange(121) for _ in range(length)] for length in (0, 37, 70)]
    made = []
    for index in range(14):
        tail = [rng.randrange(121) for _ in range(30 if index % 6 == 0 else rng.choice([1, 3, 17]))]
        sampling = SamplingParams(
            # long outputs of short prompts are what a small pool has to preempt
            max_new_tokens=40 if index % 6 == 0 else rng.choice([1, 3, 6]),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_k=rng.choice([-1, 20]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            seed=index,
            ignore_eos=True,
        )
        made.append(
            Request(
                rid=str(index), prompt_ids=np.array(heads[index % 3] + tail, dtype=np.int32), sampling=sampling,
                return_logprob=True, logprob_start=0 if index % 8 == 0 else None, num_top_logprobs=2,
            )
        )  # fmt: skip
    return made


def core_on(runner: Group, *, pool_tokens: int, chunk: int, cache: KVCache | None = None) -> EngineCore:
    num_pages = pool_tokens // PAGE_SIZE
    scheduler = Scheduler(
        cache or KVCache(num_pages, PAGE_SIZE, enabled=False),
        max_batch_tokens=chunk,
        max_running_requests=8,
        context_length=pool_tokens,
        vocab_size=121,
    )
    return EngineCore(scheduler, runner)


Answer = tuple[list[int], list[Any], list[Any]]


def answers_of(core: EngineCore, wanted: list[Request], arrivals: random.Random | None = None) -> dict[str, Answer]:
    answers: dict[str, Answer] = {request.rid: ([], [], []) for request in wanted}
    pending = list(wanted)
    while pending or core.has_work:
        while pending and (arrivals is None or arrivals.random() < 0.6):
            core.add(pending.pop(0))
        for output in core.step():
            ids, logprobs, prompt = answers[output.rid]
            assert output.finish is None or output.finish.type == "length", output.finish
            ids += output.new_token_ids
            logprobs += output.logprobs
            prompt += output.prompt_logprobs or []
        core.check()
    return answers


def values(entries: list[Any]) -> list[Any]:
    return [None if entry.logprob is None else pytest.approx(entry.logprob, abs=1e-4) for entry in entries]


@pytest.mark.parametrize("name", FAMILIES)
def test_random_mixes_on_ranks_answer_as_one_rank_alone_and_cold(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.FAMILIES, TOY.name, TOY)
    model, size = FAMILIES[name]
    expected: dict[str, Answer] = {}
    with group(model, 1, tmp_path) as alone:
        for request in requests():
            answer = answers_of(core_on(alone, pool_tokens=POOL_TOKENS, chunk=MAX_TOKENS), [request])[request.rid]
            is_clear = all(entry.top[0][0] - entry.top[1][0] > CLEAR for entry in answer[1])
            if request.sampling.temperature > 0 or is_clear:
                expected[request.rid] = answer
    every = [request for request in requests() if request.rid in expected]
    long = [request for request in every if request.sampling.max_new_tokens == 40]
    assert len(every) >= 10 and len(long) >= 2
    rng = random.Random(11)
    cached = preempted = 0
    with group(model, size, tmp_path) as ranks:
        cache: KVCache | None = None
        for mix in range(4):
            wanted, pool_tokens = (long, 96) if mix == 3 else (rng.sample(every, rng.randint(3, 5)), POOL_TOKENS)
            if cache is None or cache.num_pages != pool_tokens // PAGE_SIZE:
                cache = KVCache(pool_tokens // PAGE_SIZE, PAGE_SIZE)  # otherwise warm from before
            core = core_on(ranks, pool_tokens=pool_tokens, chunk=rng.choice([7, 50, MAX_TOKENS]), cache=cache)
            answers = answers_of(core, wanted, rng)
            for request in wanted:
                message = f"request {request.rid} in mix {mix}"
                assert answers[request.rid][0] == expected[request.rid][0], message
                for mine, theirs in zip(answers[request.rid][1:], expected[request.rid][1:], strict=True):
                    assert [entry.logprob for entry in mine] == values(theirs), message
            stats = core.stats()
            cached += stats["cached_tokens"]
            preempted += stats["preemptions"]
    assert cached > 50, "the mixes must reuse what others computed"
    assert preempted, "the mixes must preempt"


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_part_of_the_weights_and_of_the_kv_cache(
    tmp_path: Path, size: int, quantization: str | None
) -> None:
    model = config("llama", num_kv_heads=4, vocab_size=128, hidden_size=64, intermediate_size=128, head_dim=32)
    norms = 4 * (2 * model.num_layers + 1) * model.hidden_size
    with group(model, 1, tmp_path, quantization=quantization) as alone:
        whole = alone.backends[0].weight_bytes() - norms
    with group(model, size, tmp_path, quantization=quantization) as ranks:
        for backend in ranks.backends:
            assert backend.weight_bytes() - norms == whole // size
            pool = getattr(backend, "pool")  # noqa: B009 - not in the protocol
            assert {layer.num_kv_heads for layer in pool.layers} == {4 // size}


def test_a_tied_head_is_one_table_on_every_rank(tmp_path: Path) -> None:
    tied, apart = config("llama", tie_word_embeddings=True), config("llama")
    with group(tied, 2, tmp_path) as one:
        (tmp_path / "store").unlink(missing_ok=True)
        with group(apart, 2, tmp_path) as two:
            table = -(-121 // 2) * 32 * 4
            assert [b.weight_bytes() + table for b in one.backends] == [b.weight_bytes() for b in two.backends]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_sums_and_gathers_are_the_same_on_every_rank(tmp_path: Path, dtype: torch.dtype) -> None:
    sums: dict[int, torch.Tensor] = {}
    gathered: dict[int, torch.Tensor] = {}

    def work(rank: int) -> None:
        backend: Any = create_backend("torch", num_threads=1)
        backend.join(RankGroup(rank, 3, tmp_path / "store", timeout_s=60))
        own = torch.arange(12, dtype=dtype).view(3, 4) * (rank + 1)
        gathered[rank] = backend.communicator.all_gather(own)
        sums[rank] = backend.communicator.all_reduce(own.clone())
        backend.close()

    on_every_rank(3, work)
    expected = torch.arange(12, dtype=dtype).view(3, 4)
    for rank in range(3):
        assert torch.equal(sums[rank], expected * 6)
        assert torch.equal(gathered[rank], torch.stack([expected, expected * 2, expected * 3]))
        assert sums[rank].dtype == dtype


def test_ranks_that_never_meet_are_an_error(tmp_path: Path) -> None:
    backend: Any = create_backend("torch", num_threads=1)
    with pytest.raises(CommunicationError, match="do not find each other"):
        backend.join(RankGroup(0, 2, tmp_path / "store", timeout_s=0.2))
    backend.close()


def test_backends_of_one_process_are_no_rank() -> None:
    with pytest.raises(ConfigError, match="tp_size=1"):
        create_backend("reference", rank=1)
