"""Rows of a Ray dataset and an engine that is made up: what is asked, in which order, and what becomes of errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mooli.errors import ConfigError, EngineDeadError, PromptError
from mooli.ray import dataset

pyarrow = pytest.importorskip("pyarrow")

HEADS = ["Cats purr. ", "Ants work. ", "Bees hum. "]


class FakeEngine:
    """Answers with the prompt in capitals, and keeps what it was asked for."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.asked: list[Any] = []

    def get_server_info(self) -> dict[str, Any]:
        return {"max_running_requests": 1}

    async def async_generate(self, prompt: Any, params: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((prompt, params))
        if prompt == "dead":
            raise EngineDeadError("the engine has died")
        if prompt == "long":
            raise PromptError("the prompt is too long")
        meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 1}
        return {"text": str(prompt).upper(), "meta_info": meta}

    async def async_chat(self, messages: Any, params: dict[str, Any]) -> dict[str, Any]:
        return await self.async_generate(json.dumps(messages), params)


@pytest.fixture
def answers(monkeypatch):
    """What becomes of rows, and what the engine was asked for."""
    monkeypatch.setattr("mooli.frontend.engine.Engine", FakeEngine)

    def run(rows: list[dict[str, Any]], *, seed: int = 0, **asks: Any) -> tuple[list[dict[str, Any]], list[Any]]:
        given = {"prompt": None, "messages": None, "sampling_params": None, **asks}
        worker = dataset.BlockAnswers(dataset._Asks.read(**given), {"random_seed": seed})
        table = worker(pyarrow.Table.from_pylist(rows))
        return table.to_pylist(), worker._engine.asked

    return run


def test_rows_keep_their_place_and_are_asked_by_their_prompts(answers):
    rows = [{"q": f"{HEADS[i % 3]}{i}"} for i in range(9)]
    found, asked = answers(rows, prompt="q")
    assert [row["generated_text"] for row in found] == [row["q"].upper() for row in rows]
    assert [prompt for prompt, _ in asked] == sorted(row["q"] for row in rows)


def test_what_is_wrong_with_a_row_is_told_in_it_alone(answers):
    rows = [{"q": "a"}, {"q": "long"}, {"q": None}, {"q": "b"}]
    found, _ = answers(rows, prompt="q")
    assert [row["generated_text"] for row in found] == ["A", None, None, "B"]
    assert [row["error"] and row["error"].partition(":")[0] for row in found] == [
        None, "PromptError", "RequestError", None,
    ]  # fmt: skip
    assert all(row["prompt_tokens"] == (None if row["error"] else 3) for row in found)


def test_errors_of_the_users_functions_are_told_in_the_row_too(answers):
    found, _ = answers([{"n": 1}, {"n": 0}], prompt=lambda row: f"{1 / row['n']}")
    assert found[0]["generated_text"] == "1.0" and found[1]["error"].startswith("ZeroDivisionError")
    found, _ = answers([{"n": 1}], prompt="question")
    assert found[0]["error"] == "KeyError: 'question'"


def test_an_engine_that_is_gone_is_no_error_of_a_row(answers):
    with pytest.raises(EngineDeadError):
        answers([{"q": "a"}, {"q": "dead"}, {"q": "z"}], prompt="q")


def test_a_block_without_rows_has_the_columns_too(monkeypatch):
    monkeypatch.setattr("mooli.frontend.engine.Engine", FakeEngine)
    table = pyarrow.table({"q": pyarrow.array([], pyarrow.string())})
    worker = dataset.BlockAnswers(
        dataset._Asks.read(prompt="q", messages=None, sampling_params=None), {"random_seed": 0}
    )
    made = worker(table)
    assert made.num_rows == 0 and made.column_names == ["q", *dataset.COLUMNS]
    kinds = [str(made.schema.field(name).type) for name in dataset.COLUMNS]
    assert kinds == [str(pyarrow.type_for_alias(kind)) for kind in dataset.COLUMNS.values()]


def test_a_column_that_is_there_already_is_not_written_over(answers):
    with pytest.raises(ConfigError, match="'error'"):
        answers([{"q": "a", "error": "mine"}], prompt="q")


def test_messages_may_be_json_and_lose_the_nulls_that_arrow_adds(answers):
    said = [{"role": "user", "content": "Hi", "tool_calls": None}]
    plain = [{"role": "user", "content": "Hi"}]
    _, asked = answers([{"m": said}], messages="m")
    assert json.loads(asked[0][0]) == plain
    _, asked = answers([{"m": json.dumps(plain)}], messages="m")
    assert json.loads(asked[0][0]) == plain
    found, _ = answers([{"m": "no JSON"}], messages="m")
    assert found[0]["error"].startswith("JSONDecodeError")


def test_a_seed_is_of_what_a_row_asks_for_and_of_nothing_else(answers):
    def seeds(rows: list[dict[str, Any]], seed: int = 0, **params: Any) -> dict[str, int]:
        _, asked = answers(rows, seed=seed, prompt="q", sampling_params=params)
        return {prompt: given["sampling_seed"] for prompt, given in asked}

    alone = seeds([{"q": "a"}])["a"]
    together = seeds([{"q": "b", "id": 2}, {"q": "a", "id": 9}])
    assert together["a"] == alone != together["b"] and 0 <= alone < 2**31
    assert seeds([{"q": "a"}], seed=1)["a"] != alone
    assert seeds([{"q": "a"}], temperature=0.5)["a"] != alone
    assert seeds([{"q": "a"}], sampling_seed=7)["a"] == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "a", "messages": "b"}, "not both"),
        ({}, "needs prompt"),
        ({"prompt": 3}, "3 is neither"),
        ({"prompt": "a", "sampling_params": "hot"}, "'hot' is neither"),
        ({"prompt": "a", "sampling_params": {"n": 3}}, "n=3"),
    ],
)
def test_what_cannot_be_asked_is_said_at_once(arguments, words):
    with pytest.raises(ConfigError, match=words):
        dataset._Asks.read(**{"prompt": None, "messages": None, "sampling_params": None, **arguments})
