"""With recurrent layers, experts and sinks too the answer depends neither on the cache nor on guesses, to the bit, on
the CPU.

60 random mixes of each family, on tiny models with random weights: batch, chunk, cold and warm, preempted, guesses,
runs that constraints force, and so little room for snapshots that most are given up again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_bit_equal import requests, run

from constraints import Automaton, Bold, Even, Rule, RuleConstraint, Spelled
from mooli.backends import create_backend
from mooli.backends.base import Limits
from mooli.cache.kv_cache import KVCache
from mooli.cache.states import StateRoom
from mooli.engine.core import EngineCore
from mooli.models.loader import open_model
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner
from mooli.scheduler.drafts import DraftSettings, ForcedSettings
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Request

PAGE_SIZE, NUM_PAGES, MAX_TOKENS, MAX_ROWS, MOST_TRIED = 32, 64, 256, 8, 16
MOST_SNAPSHOTS, NUM_MIXES, VOCAB = 40, 60, 512

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "lfm2": {
        "architectures": ["Lfm2ForCausalLM"],
        "num_hidden_layers": 5,
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "num_hidden_layers": 3,
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 40,
    },
    "qwen3.5": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "num_hidden_layers": 4,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
    },
    "granite 4": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


@dataclass(frozen=True)
class TinyModel:
    runner: ModelRunner
    rules: list[Rule]
    has_states: bool

    def room(self, num_snapshots: int) -> StateRoom | None:
        return StateRoom(MAX_ROWS, MOST_TRIED, num_snapshots, 2 * PAGE_SIZE) if self.has_states else None

    def core(
        self, cache: KVCache, chunk: int, drafts: DraftSettings | None, forced: ForcedSettings | None
    ) -> EngineCore:
        return EngineCore(
            Scheduler(
                cache,
                max_batch_tokens=chunk,
                max_running_requests=min(MAX_ROWS, chunk),
                context_length=cache.num_pages * PAGE_SIZE,
                vocab_size=VOCAB,
                drafts=drafts,
                forced=forced,
                constraints=self._constraint,
            ),
            self.runner,
        )

    def _constraint(self, request: Request) -> RuleConstraint | None:
        index = int(request.rid)
        if index % 3 != 2:
            return None
        rule = self.rules[index // 3 % len(self.rules)]
        return Bold(rule) if index % 2 else RuleConstraint(rule)


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps({**SIZES, **CONFIGS[request.param]}))
    backend = create_backend("cpu", num_threads=2)
    config, checkpoint = open_model(folder, load_format="dummy")
    built = create_model(config, checkpoint, backend)
    spec = config.cache_spec(PAGE_SIZE, "bfloat16")
    has_states = bool(spec.state_layers)
    num_states = MAX_ROWS + MOST_TRIED + MOST_SNAPSHOTS if has_states else 0
    backend.allocate(spec, NUM_PAGES, Limits(MAX_TOKENS, MAX_ROWS, NUM_PAGES, num_states))
    rules: list[Rule] = [Even(VOCAB), Spelled(VOCAB, 1, 100), Automaton(VOCAB, 1)]
    yield TinyModel(ModelRunner(built, backend, VOCAB), rules, has_states)
    backend.close()


def test_random_mixes_answer_as_each_request_alone_and_cold(model: TinyModel) -> None:
    every = requests(VOCAB)
    alone = {}
    for request in every:
        cold = KVCache(NUM_PAGES, PAGE_SIZE, states=model.room(0))
        alone[request.rid] = run(model.core(cold, MAX_TOKENS, None, None), [request])[request.rid]

    long = [r for r in every if r.sampling.max_new_tokens == 75]
    draw = random.Random(11)
    cached = preempted = right = proposed = forced_tokens = dropped = 0
    cache: KVCache | None = None
    for mix in range(NUM_MIXES):
        wanted, num_pages = draw.sample(every, draw.randint(1, 4)), draw.choice([8, NUM_PAGES])
        if mix % 10 == 0:  # too many pages wanted at once: somebody has to give way
            wanted, num_pages = draw.sample(long, 3), 5
        if cache is None or cache.num_pages != num_pages or draw.random() < 0.4:
            snapshots = draw.choice([0, 1, 2, 3, MOST_SNAPSHOTS])
            cache = KVCache(num_pages, PAGE_SIZE, draw.random() < 0.85, states=model.room(snapshots))
        chunk = draw.choice([4, 20, 50, MAX_TOKENS])
        drafts = DraftSettings(*((4, 8, 2, 12) if mix % 4 == 1 else (8, 16, 1, 3))) if mix % 2 else None
        forced = ForcedSettings(1 + mix % 12, 5 + mix % 30) if mix % 3 else None
        before = 0 if cache.states is None else cache.states.num_dropped
        core = model.core(cache, chunk, drafts, forced)
        answers = run(core, wanted, draw)
        for request in wanted:
            assert answers[request.rid] == alone[request.rid], f"request {request.rid} in mix {mix}"
        stats = core.stats()
        cached += stats["cached_tokens"]
        preempted += stats["preemptions"]
        right += stats["correct_drafts"]
        proposed += stats["proposed_drafts"]
        forced_tokens += stats["forced_tokens"]
        dropped += 0 if cache.states is None else cache.states.num_dropped - before
    assert cached > 3 * NUM_MIXES, "the mixes must reuse what others computed"
    assert right > NUM_MIXES and proposed > right, "the mixes must have right guesses, and wrong ones"
    assert preempted >= NUM_MIXES // 20, "the mixes must preempt"
    assert forced_tokens > NUM_MIXES // 2, "the mixes must have forced runs"
    assert not model.has_states or dropped > NUM_MIXES // 4, "snapshots must make room for others"
