"""`mooli cache diff`: two bodies of any chat API, no model, and what a server would say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TURNS
from test_cache_report import history, made_tokenizer, said

from mooli import cache_diff
from mooli.errors import ConfigError, RequestError

TOKENIZER = made_tokenizer(TURNS)


def changed(body: dict[str, Any], *more: dict[str, Any], system: str | None = None) -> dict[str, Any]:
    messages = [dict(message) for message in [*body["messages"], *more]]
    if system is not None:
        messages[0]["content"] = system
    return {**body, "messages": messages}


def test_it_says_what_a_server_would_say() -> None:
    first = history()
    goes_on = changed(first, said("assistant", "ok"), said("user", "next"))
    report = cache_diff.report_of(TOKENIZER, first, goes_on)
    assert (report["reason"], report["lost_tokens"], report["previous_id"]) == ("new", 0, "A")
    other = changed(goes_on, system="You are an agent. Today is 2026-12-02. The folder is /home/a.")
    report = cache_diff.report_of(TOKENIZER, goes_on, other)
    assert report["message"] == "the system prompt: it was edited (near '2026-12-02')"
    assert report["matched_tokens"] + report["lost_tokens"] == report["prompt_tokens"][1] - 1
    effort = {**goes_on, "chat_template_kwargs": {"enable_thinking": False}}
    assert cache_diff.report_of(TOKENIZER, first, effort)["reason"] == "new"


def test_bodies_of_all_three_apis_are_read() -> None:
    tools = [{"name": "look", "description": "Looks", "input_schema": {"type": "object"}}]
    calls = [{"type": "tool_use", "id": "c", "name": "look", "input": {"path": "a"}}]
    result = [{"type": "tool_result", "tool_use_id": "c", "content": "text"}]
    turns = [said("user", "go"), {"role": "assistant", "content": calls}, {"role": "user", "content": result}]
    first = {"model": "m", "system": "Be brief.", "messages": turns, "tools": tools}
    second = json.loads(json.dumps(first))
    second["messages"][2]["content"][0]["content"] = "another text"
    report = cache_diff.report_of(TOKENIZER, first, second)
    assert report["reason"] == "diverged" and "(tool): it was edited" in report["message"]
    functions = [{"type": "function", "name": "look", "description": "Looks", "parameters": {"type": "object"}}]
    body = {"input": [{"role": "user", "content": "go"}], "instructions": "Be brief.", "tools": functions}
    report = cache_diff.report_of(TOKENIZER, body, {**body, "tools": [{**functions[0], "description": "Looks well"}]})
    assert report["message"] == "tool look is described otherwise"
    for wrong in ({"prompt": "a"}, {"system": 3, "messages": [said("user", "a")]}):
        with pytest.raises(RequestError):
            cache_diff.told_of(wrong)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_diff, "locate", lambda name, needs_weights: tmp_path)
    monkeypatch.setattr(cache_diff, "open_tokenizer", lambda config, path: TOKENIZER)

    def run(first: Any, second: Any, *, as_json: bool = False) -> int:
        for name, body in (("a", first), ("b", second)):
            (tmp_path / name).write_text(body if isinstance(body, str) else json.dumps(body))
        names = {"first": str(tmp_path / "a"), "second": str(tmp_path / "b")}
        return cache_diff.run_diff(argparse.Namespace(model="demo", chat_template=None, json=as_json, **names))

    return run


def test_the_command_prints_it_and_its_status_tells(run, capsys) -> None:
    first = history()
    assert run(first, {"custom_id": "1", "body": first}) == 0
    assert "nothing is lost" in capsys.readouterr().out
    second = changed(first)
    second["messages"][3]["content"] = "all: nothing"
    assert run(first, second) == 1
    out = capsys.readouterr().out
    assert "tokens lost: message 3 (tool): it was edited" in out and "A: 'build\\n" in out and "advice: " in out
    assert run(first, second, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["reason"] == "diverged"
    for broken in ("{", "[1]"):
        with pytest.raises(ConfigError):
            run(broken, first)
