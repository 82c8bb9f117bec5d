"""The runner: what it asks of a backend and in which order, and a whole generation against the reference backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mooli.backends.base import SampleResult
from mooli.backends.reference import ReferenceBackend
from mooli.batch import PageCopy, PromptLogprobRows, ScheduleBatch
from mooli.errors import ConfigError
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.llama import LlamaConfig
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner
from steps import LIMITS, Choice, Row, step, uniform_cache

VOCAB = 61
PAGE_SIZE = 4
CONFIG = LlamaConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


class RecordingBackend(ReferenceBackend):
    """The reference, with the order of calls and the number of rows in each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.captured: list[str] = []

    def capture(self, function: Any) -> Any:
        self.captured.append(function.__name__)

        def recorded(planned: Any, *hidden: Any) -> Any:
            rows = len(hidden[0]) if hidden else len(planned.token_ids)
            assert planned.tokens is None or len(planned.tokens) == rows
            self.calls.append(f"{function.__name__} {rows}")
            return function(planned, *hidden)

        return recorded

    def copy_pages(self, copies: Any) -> None:
        self.calls.append(f"copy {len(copies)}")
        super().copy_pages(copies)

    def plan(self, batch: ScheduleBatch) -> Any:
        self.calls.append("plan")
        return super().plan(batch)

    def sample(self, logits: Any, sampling: Any, vocab_size: int) -> SampleResult:
        assert len(logits) == len(sampling)
        self.calls.append(f"sample {len(sampling)}")
        return super().sample(logits, sampling, vocab_size)

    def logprobs(self, logits: Any, target_ids: Any, *rest: Any) -> Any:
        self.calls.append(f"logprobs {len(target_ids)}")
        return super().logprobs(logits, target_ids, *rest)


class Setup:
    """A small random model on a recording backend."""

    def __init__(self, max_logit_rows: int = 32, vocab_size: int = VOCAB) -> None:
        self.backend = RecordingBackend()
        self.model = create_model(CONFIG, DummyCheckpoint(CONFIG), self.backend)
        self.backend.allocate(uniform_cache(2, 2, 8, PAGE_SIZE, "float32"), 40, LIMITS)
        self.runner = ModelRunner(self.model, self.backend, vocab_size, max_logit_rows)

    def all_logits(self, token_ids: list[int], pages: list[int]) -> Any:
        batch = step([Row(token_ids, 0, pages)], PAGE_SIZE)
        planned = self.backend.plan(batch)
        return self.model.logits(planned, self.model.forward(planned))


def test_functions_are_captured_once_when_the_runner_is_made() -> None:
    setup = Setup()
    for _ in range(3):
        setup.runner.execute(step([Row([1, 2], 0, [0])], PAGE_SIZE))
    assert setup.backend.captured == ["forward", "logits"]


def test_copies_come_before_the_plan_and_the_forward_pass() -> None:
    setup = Setup()
    setup.runner.execute(step([Row([1, 2], 0, [0])], PAGE_SIZE))
    setup.backend.calls.clear()
    setup.runner.execute(step([Row([3], 2, [1])], PAGE_SIZE, copies=[PageCopy(0, 1, 2)]))
    assert setup.backend.calls == ["copy 1", "plan", "forward 1", "logits 1", "sample 1"]


def test_rows_that_do_not_sample_cost_no_logits() -> None:
    setup = Setup()
    output = setup.runner.execute(step([Row([1, 2, 3], 0, [0], samples=False)], PAGE_SIZE))
    assert setup.backend.calls == ["plan", "forward 3"]
    assert output.token_ids.dtype == np.int32
    assert (len(output.token_ids), output.logprobs, output.prompt_logprobs) == (0, [], [])


def test_a_step_of_copies_alone_computes_nothing() -> None:
    setup = Setup()
    batch = step([Row([], 0, [0], samples=False)], PAGE_SIZE, copies=[PageCopy(0, 1, 2)])
    assert setup.runner.execute(batch).token_ids.tolist() == []
    assert setup.backend.calls == ["copy 1"]


def test_tokens_come_from_the_last_token_of_each_row_that_samples() -> None:
    setup = Setup()
    rows = [
        Row([5, 6, 7], 0, [0]),
        Row([8, 9], 0, [1], samples=False),
        Row([10], 0, [2]),
        Row([11, 12, 13, 14, 15], 0, [3, 4]),
    ]
    output = setup.runner.execute(step(rows, PAGE_SIZE))
    expected = [setup.all_logits(list(row.token_ids), list(row.pages))[-1].argmax() for row in rows if row.samples]
    assert output.token_ids.tolist() == expected
    assert output.logprobs == [None, None, None]


def test_a_row_samples_after_as_many_of_its_last_tokens_as_it_is_to() -> None:
    setup = Setup(max_logit_rows=2)
    rows = [Row([5, 6, 7, 8], 0, [0], samples=3), Row([9, 10], 0, [1], samples=0), Row([11, 12], 0, [2], samples=2)]
    batch = step(rows, PAGE_SIZE)
    assert batch.sampling_tokens.tolist() == [1, 2, 3, 6, 7]
    output = setup.runner.execute(batch)
    logits = [setup.all_logits(list(row.token_ids), list(row.pages)) for row in rows]
    assert output.token_ids.tolist() == [*logits[0].argmax(axis=1)[1:], *logits[2].argmax(axis=1)]


def test_logits_of_many_rows_are_made_in_blocks_and_change_nothing() -> None:
    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(0, VOCAB, 1 + i % 3).tolist(), 0, [i], samples=i != 4) for i in range(11)]
    choices = [
        Choice(
            temperature=float(i % 2),
            seed=i,
            position=3 * i,
            prompt=range(i),
            output=range(i, 2 * i),
            repetition_penalty=1.5,
            presence_penalty=0.3 * i,
            bias={i: 2.0, 20 + i: -1.0} if i % 3 else {},
            allowed={i, 3 * i, 4 * i + 1} if i % 3 == 1 else None,
            num_top=i - 3 if i % 3 else -1,
            logprob_token_ids=(i,),
        )
        for i in range(10)
    ]
    batch = step(rows, PAGE_SIZE, choices=choices)
    blocks, whole = Setup(max_logit_rows=4), Setup()
    in_blocks, at_once = blocks.runner.execute(batch), whole.runner.execute(batch)
    assert [call for call in blocks.backend.calls if call.startswith("sample")] == ["sample 4", "sample 4", "sample 2"]
    assert [call for call in whole.backend.calls if call.startswith("sample")] == ["sample 10"]
    assert in_blocks.token_ids.tolist() == at_once.token_ids.tolist()
    for one, other, choice in zip(in_blocks.logprobs, at_once.logprobs, choices, strict=True):
        assert (one is None) == (other is None) == (choice.num_top < 0)
        if one is not None and other is not None:
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [i for _, i in one.top] == [i for _, i in other.top]
            assert len(one.top) == min(choice.num_top, VOCAB if choice.allowed is None else len(choice.allowed))
            assert [i for _, i in one.chosen] == list(choice.logprob_token_ids)


def test_prompt_log_probabilities_are_of_the_targets_and_bounded_in_rows() -> None:
    setup = Setup(max_logit_rows=5)
    first, second = list(range(3, 6)), list(range(20, 34))
    wanted = [
        PromptLogprobRows(row=1, first_token=3, target_ids=np.array(second[1:], dtype=np.int32), num_top=2),
        PromptLogprobRows(row=0, first_token=1, target_ids=np.array([5], dtype=np.int32), token_ids=(9, 1)),
    ]
    rows = [Row(first, 0, [0]), Row(second, 0, [1, 2, 3, 4], samples=False)]
    output = setup.runner.execute(step(rows, PAGE_SIZE, prompt_logprobs=wanted))
    assert setup.backend.calls[4:] == [
        *("logits 5", "logprobs 5", "logits 5", "logprobs 5", "logits 3", "logprobs 3"),
        *("logits 1", "logprobs 1"),
    ]

    def log_softmax(token_ids: list[int], pages: list[int]) -> Any:
        logits = setup.all_logits(token_ids, pages).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    expected = log_softmax(second, [1, 2, 3, 4])
    long, short = output.prompt_logprobs
    assert len(long) == 13
    for index, entry in enumerate(long):
        assert entry.logprob == pytest.approx(expected[index, second[index + 1]], abs=1e-4)
        assert [i for _, i in entry.top] == np.argsort(-expected[index])[:2].tolist()
        assert entry.chosen == []
    expected = log_softmax(first, [0])
    assert short[0].logprob == pytest.approx(expected[1, 5], abs=1e-4)
    assert short[0].top == []
    assert [i for _, i in short[0].chosen] == [9, 1]


def test_ids_beyond_the_vocabulary_of_a_padded_head_are_never_sampled() -> None:
    setup = Setup(vocab_size=7)
    rows = [Row([i], 0, [i % 40]) for i in range(20)]
    output = setup.runner.execute(step(rows, PAGE_SIZE, choices=[Choice(temperature=5.0, seed=i) for i in range(20)]))
    assert output.token_ids.max() < 7
    assert len(set(output.token_ids.tolist())) > 1


def test_nan_ends_its_own_row_only() -> None:
    setup = Setup()
    # The second row reads position 0 of a page where nothing was ever stored.
    output = setup.runner.execute(step([Row([1], 0, [0]), Row([2], 1, [1]), Row([3], 0, [2])], PAGE_SIZE))
    assert output.token_ids[1] == -1
    assert output.token_ids[0] >= 0
    assert output.token_ids[2] >= 0


@pytest.mark.parametrize("together", [1, 3], ids=["one by one", "three sequences"])
def test_generating_step_by_step_is_generating_from_the_whole_text(together: int) -> None:
    setup = Setup()
    texts = [[i, i + 7, 2 * i + 1] for i in range(together)]
    pages = [list(range(4 * i, 4 * i + 4)) for i in range(together)]
    computed = [0] * together
    for _ in range(8):
        rows = [Row(text[done:], done, own) for text, done, own in zip(texts, computed, pages, strict=True)]
        computed = [len(text) for text in texts]
        for text, token_id in zip(texts, setup.runner.execute(step(rows, PAGE_SIZE)).token_ids.tolist(), strict=True):
            text.append(token_id)
    for text in texts:
        logits = setup.all_logits(text[:-1], [30, 31, 32])
        assert logits[2:].argmax(axis=1).tolist() == text[3:]


def test_at_least_one_row_of_logits_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"max_logit_rows.*0"):
        Setup(max_logit_rows=0)


def test_closing_the_runner_closes_the_backend() -> None:
    setup = Setup()
    setup.runner.close()
    assert setup.backend.ops.kv == []
