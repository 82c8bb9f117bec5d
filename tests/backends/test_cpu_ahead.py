"""Steps that other threads begin before they are planned: used where guessed right, without a trace elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cpu_ops import cpu_backend
from hypothesis import given, settings
from hypothesis import strategies as st

from mooli.backends.base import AttentionSpec
from mooli.batch import PageCopy
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.llama import LlamaConfig
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner
from steps import LIMITS, Row, step, uniform_cache

CONFIG = LlamaConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
PAGES = ([1, 2, 3], [4, 5, 6])
PROMPTS = ([5, 6, 7, 8, 9], list(range(30)))


@contextmanager
def model_runner(num_threads: int, page_size: int = 32) -> Iterator[tuple[ModelRunner, Any]]:
    with cpu_backend(num_threads=num_threads, quantization="int8") as backend:
        model = create_model(CONFIG, DummyCheckpoint(CONFIG), backend)
        backend.allocate(uniform_cache(3, 2, 16, page_size, "bfloat16"), 12, LIMITS)
        yield ModelRunner(model, backend, CONFIG.vocab_size), backend


class Requests:
    """Two greedy requests, each decoded a token a step. turned_by: how far behind their indices rotations are."""

    def __init__(self, runner: ModelRunner, page_size: int = 32) -> None:
        self.runner, self.page_size = runner, page_size
        self.turned_by: int | None = None
        self.tokens = [list(prompt) for prompt in PROMPTS]
        self.computed = [0, 0]

    def step(self, requests: list[int], *, may_begin_next: bool, copies: Sequence[PageCopy] = ()) -> list[int]:
        rows = [Row(self.tokens[i][self.computed[i] :], self.computed[i], PAGES[i]) for i in requests]
        batch = step(rows, self.page_size, copies=copies)
        batch.may_begin_next = may_begin_next
        if self.turned_by is not None:
            batch.rope_positions = np.maximum(batch.positions - np.int32(self.turned_by), 0)
        sampled = self.runner.execute(batch).token_ids.tolist()
        for i, token in zip(requests, sampled, strict=True):
            self.computed[i] = len(self.tokens[i])
            self.tokens[i].append(token)
        return sampled


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("page_size", [32, 64])
def test_a_step_that_has_begun_is_the_step_that_is_planned(num_threads: int, page_size: int) -> None:
    with model_runner(1, page_size) as (plain, _), model_runner(num_threads, page_size) as (runner, backend):
        expected, actual = Requests(plain, page_size), Requests(runner, page_size)
        for _ in range(40):
            expected.step([0, 1], may_begin_next=False)
            actual.step([0, 1], may_begin_next=True)
        assert actual.tokens == expected.tokens
        assert backend._device.num_begun_steps == (39 if num_threads > 1 else 0)


def test_a_step_that_has_begun_gives_each_layer_its_own_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(*, may_begin_next: bool) -> list[int]:
        with model_runner(2) as (runner, backend):
            attend = backend.ops.attend

            def windowed(batch: Any, layer: int, qkv: Any, spec: AttentionSpec) -> Any:
                return attend(batch, layer, qkv, replace(spec, window=(0, 8, 0)[layer]))

            monkeypatch.setattr(backend.ops, "attend", windowed)
            made = [index % 90 for index in range(140)]  # the window leaves out a whole block of keys
            computed = 0
            for _ in range(30):
                rows = [Row(made[at : at + 100], at, range(8)) for at in range(computed, len(made), 100)]
                for row in rows:
                    batch = step([row], 32)
                    batch.may_begin_next = may_begin_next and len(rows) == 1
                    sampled = runner.execute(batch).token_ids.tolist()
                computed = len(made)
                made += sampled
            assert backend._device.num_begun_steps == (28 if may_begin_next else 0)
            return made

    assert tokens(may_begin_next=True) == tokens(may_begin_next=False)


def test_a_step_that_has_begun_turns_by_its_own_positions() -> None:
    with model_runner(1) as (plain, _), model_runner(2) as (runner, backend):
        expected, actual = Requests(plain), Requests(runner)
        for number in range(12):
            for requests in (expected, actual):
                requests.turned_by = (3, 3, 3, 1)[number % 4]  # where it changes, nothing of what has begun counts
                requests.step([0, 1], may_begin_next=requests is actual)
        assert actual.tokens == expected.tokens
        assert backend._device.num_begun_steps == 6
        other = Requests(plain)
        for _ in range(12):
            other.step([0, 1], may_begin_next=False)
        assert other.tokens != expected.tokens


ACTIONS = st.lists(st.sampled_from(["both", "both", "first", "second", "copy", "use", "token"]), max_size=30)


@given(ACTIONS)
@settings(max_examples=30, deadline=None)
def test_a_step_that_has_begun_and_is_not_planned_leaves_no_trace(actions: list[str]) -> None:
    with model_runner(1) as (plain, _), model_runner(2) as (runner, backend):
        expected, actual = Requests(plain), Requests(runner)
        for requests in (expected, actual):
            requests.step([0, 1], may_begin_next=requests is actual)
            for action in actions:
                rows = {"first": [0], "second": [1]}.get(action, [0, 1])
                copies = [PageCopy(1, 9, 5)] if action == "copy" else []
                if action == "use" and requests is actual:
                    backend._device.gauge_dots(10)  # the threads are wanted for something else
                if action == "token":
                    requests.tokens[0][-1] = 3  # not what was sampled
                requests.step(rows, may_begin_next=requests is actual, copies=copies)
        assert actual.tokens == expected.tokens


def test_rows_without_a_page_for_their_next_token_do_not_begin() -> None:
    with model_runner(2) as (runner, backend):
        requests = Requests(runner)
        requests.tokens[0] = [index % 90 for index in range(96)]  # all that three pages hold
        requests.step([0], may_begin_next=True)
        requests.tokens[1] = [1, 2]
        requests.step([1], may_begin_next=True)
        requests.step([1], may_begin_next=True)
        assert backend._device.num_begun_steps == 1


def test_tokens_that_do_not_exist_and_another_number_of_rows_do_not_begin() -> None:
    with model_runner(2) as (runner, _):
        requests = Requests(runner)
        requests.step([0, 1], may_begin_next=False)
        tape = runner._forward._tape  # type: ignore[attr-defined]
        for ids in ([1], [1, 2, 3], [4, -1], []):
            assert not tape.begin_next(np.array(ids, np.int32))
        assert tape.begin_next(np.array([tokens[-1] for tokens in requests.tokens], np.int32))
        assert not tape.begin_next(np.array([1, 2], np.int32))  # one step ahead, not two


def test_a_tape_cannot_run_on_a_step_that_has_only_begun() -> None:
    with model_runner(2) as (runner, _):
        requests = Requests(runner)
        requests.step([0, 1], may_begin_next=True)
        with pytest.raises(ValueError, match="planned step"):
            runner._forward._tape.run(2)  # type: ignore[attr-defined]


def test_closing_while_a_step_has_begun() -> None:
    for _ in range(20):
        with model_runner(3) as (runner, _):
            Requests(runner).step([0, 1], may_begin_next=True)
