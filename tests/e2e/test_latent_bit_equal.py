"""With latents in the cache, and experts beside them, answers depend on nothing but their request, to the bit, on the
CPU: 60 random mixes of batch, chunk, cold and warm, preempted, guesses, and runs that constraints force."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_bit_equal import requests, run
from test_recurrent_bit_equal import MAX_ROWS, MAX_TOKENS, NUM_PAGES, PAGE_SIZE, VOCAB, TinyModel

from constraints import Automaton, Even, Spelled
from mooli.backends import create_backend
from mooli.backends.base import Limits
from mooli.cache.kv_cache import KVCache
from mooli.models.loader import open_model
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner
from mooli.scheduler.drafts import DraftSettings, ForcedSettings

NUM_MIXES = 60
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 4096,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    folder: Path = tmp_path_factory.mktemp("deepseek")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    backend = create_backend("cpu", num_threads=2)
    config, checkpoint = open_model(folder, load_format="dummy")
    built = create_model(config, checkpoint, backend)
    backend.allocate(config.cache_spec(PAGE_SIZE, "bfloat16"), NUM_PAGES, Limits(MAX_TOKENS, MAX_ROWS, NUM_PAGES))
    rules = [Even(VOCAB), Spelled(VOCAB, 1, 100), Automaton(VOCAB, 1)]
    yield TinyModel(ModelRunner(built, backend, VOCAB), rules, has_states=False)
    backend.close()


def test_random_mixes_answer_as_each_request_alone_and_cold(model: TinyModel) -> None:
    every = requests(VOCAB)
    alone = {}
    for request in every:
        cold = KVCache(NUM_PAGES, PAGE_SIZE)
        alone[request.rid] = run(model.core(cold, MAX_TOKENS, None, None), [request])[request.rid]

    long = [r for r in every if r.sampling.max_new_tokens == 75]
    draw = random.Random(12)
    cached = preempted = proposed = forced_tokens = 0
    cache: KVCache | None = None
    for mix in range(NUM_MIXES):
        wanted, num_pages = draw.sample(every, draw.randint(1, 4)), draw.choice([8, NUM_PAGES])
        if mix % 10 == 0:  # too many pages wanted at once: somebody has to give way
            wanted, num_pages = draw.sample(long, 3), 5
        if cache is None or cache.num_pages != num_pages or draw.random() < 0.4:
            cache = KVCache(num_pages, PAGE_SIZE, draw.random() < 0.85)
        drafts = DraftSettings(*((4, 8, 2, 12) if mix % 4 == 1 else (8, 16, 1, 3))) if mix % 2 else None
        forced = ForcedSettings(1 + mix % 12, 5 + mix % 30) if mix % 3 else None
        core = model.core(cache, draw.choice([4, 20, 50, MAX_TOKENS]), drafts, forced)
        answers = run(core, wanted, draw)
        for request in wanted:
            assert answers[request.rid] == alone[request.rid], f"request {request.rid} in mix {mix}"
        stats = core.stats()
        cached += stats["cached_tokens"]
        preempted += stats["preemptions"]
        proposed += stats["proposed_drafts"]
        forced_tokens += stats["forced_tokens"]
    assert cached > 3 * NUM_MIXES, "the mixes must reuse what others computed"
    assert proposed > NUM_MIXES, "the mixes must have guesses"
    assert preempted >= NUM_MIXES // 20, "the mixes must preempt"
    assert forced_tokens > NUM_MIXES // 2, "the mixes must have forced runs"
