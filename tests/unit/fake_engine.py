"""An `Engine` on the fake runner: everything is real but the model and its files."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import mooli.frontend.engine as engine_module
import mooli.frontend.text_side as text_side_module
from mooli import Engine
from mooli.cache.kv_cache import KVCache
from mooli.engine.build import BuiltEngine, draft_settings
from mooli.engine.core import EngineCore
from mooli.engine.facts import EngineFacts
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.tokenizer import Tokenizer
from mooli.grammar.compiler import Grammars
from mooli.runner.fake import FakeRunner
from mooli.scheduler.drafts import ForcedSettings
from mooli.scheduler.scheduler import Scheduler

EOS = 256
VOCAB_SIZE = 258
CONTEXT = 128
PAGE_SIZE = 4
NUM_PAGES = 200


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def byte_tokenizer(template: str | dict[str, str] = TEMPLATE, markers: Sequence[str] = ()) -> Tokenizer:
    """Id = byte, as a byte-level tokenizer has it; 256 ends a text, 257 is a special token without a meaning. markers:
    special tokens too, from 258 on."""
    alphabet = _byte_alphabet()
    backend = Backend(models.BPE({char: byte for byte, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<eos>", "<mark>", *markers)])
    return Tokenizer(backend, eos_ids=[EOS], chat_template=ChatTemplate(template))


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte (GPT-2's table)."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = [b for b in range(256) if b not in shown]
    table = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [table[b] for b in range(256)]


def says(text: str, *, after: str = ">", then: int | None = EOS):
    """A `next_token` that goes on with `text` behind the last `after`, token by token, then with `then`."""
    ids = [*text.encode(), *([] if then is None else [then])]

    def next_token(context: list[int]) -> int | None:
        written = bytes(token_id if token_id < 256 else 0 for token_id in context)
        start = written.rfind(after.encode())
        position = len(written) - start - len(after)
        return ids[position] if start >= 0 and position < len(ids) else None

    return next_token


def fake_build(config, **runner_options) -> BuiltEngine:
    """What `build_engine` returns, around a `FakeRunner`."""
    runner = FakeRunner(NUM_PAGES, PAGE_SIZE, VOCAB_SIZE, **runner_options)
    max_running_requests, step_tokens = config.max_running_requests or 8, config.chunked_prefill_size or 32
    grammars = Grammars(VOCAB_SIZE)
    scheduler = Scheduler(
        KVCache(NUM_PAGES, PAGE_SIZE, enabled=not config.disable_radix_cache, retention_share=config.retention_share),
        max_batch_tokens=step_tokens,
        max_running_requests=max_running_requests,
        context_length=config.context_length or CONTEXT,
        vocab_size=VOCAB_SIZE,
        policy=config.schedule_policy,
        priorities=config.enable_priority_scheduling,
        drafts=draft_settings(config),
        forced=ForcedSettings(),
        constraints=grammars.constraint_of,
    )
    facts = EngineFacts(
        resolved_model_path="fake",
        architecture="Fake",
        vocab_size=VOCAB_SIZE,
        eos_ids=(EOS, 99999),
        model_context_length=CONTEXT,
        context_length=config.context_length or CONTEXT,
        dtype="auto",
        kv_cache_dtype="float32",
        quantization=None,
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        max_total_num_tokens=NUM_PAGES * PAGE_SIZE,
        max_running_requests=max_running_requests,
        chunked_prefill_size=step_tokens,
        weight_bytes=0,
        kv_cache_bytes=0,
        load_time_s=0.0,
        cache_namespace="fake",
        speculative_algorithm=config.speculative_algorithm,
        backend={},
    )
    return BuiltEngine(EngineCore(scheduler, runner, grammars=grammars), None, facts, lambda: None, lambda: None)


class FakeEngine:
    """Makes engines; holds what the last one is made of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.core: EngineCore
        self.runner: FakeRunner
        self.runner_options: dict = {}
        monkeypatch.setattr(engine_module, "locate", lambda path, **_: Path(path))
        monkeypatch.setattr(text_side_module, "load_tokenizer", lambda path: byte_tokenizer())
        monkeypatch.setattr(engine_module, "build_engine", self._build)
        self.engines: list[Engine] = []

    def __call__(self, next_token=None, *, runner_options=None, **kwargs) -> Engine:
        self.runner_options = {"next_token": next_token, **(runner_options or {})}
        engine = Engine(model_path="fake", **{"random_seed": 7, **kwargs})
        self.engines.append(engine)
        return engine

    def _build(self, config, model_path, *, tokenizer_vocab_size, progress) -> BuiltEngine:
        built = fake_build(config, **self.runner_options)
        self.core, self.runner = built.core, built.core._runner
        return built


class Gate:
    """Holds the runner's steps until opened, so that a request is surely running."""

    def __init__(self):
        self.is_open = threading.Event()
        self.entered = threading.Event()

    def __call__(self, batch):
        self.entered.set()
        assert self.is_open.wait(120)
