"""Why a prompt was not in the cache, over HTTP: reports, Anthropic's and OpenAI's diagnostics, and who is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from fake_engine import says
from live import LiveServer

PADDING = "These words make the prompt long enough. "


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """Conversations of different tests have nothing in common but their beginning."""
    server = LiveServer(says("Hi", after="assistant: "), engine={"context_length": 700})
    yield server
    server.stop()


def turns(name: str, *more: tuple[str, str], system: str = "") -> list[dict[str, str]]:
    first = [("system", system)] if system else []
    said = [*first, ("user", f"{name}: {PADDING}"), *more]
    return [{"role": role, "content": content} for role, content in said]


def report_of(server: LiveServer, messages: list[dict[str, str]], **body: Any) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": 4, "return_cache_report": True, **body}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    report: dict[str, Any] = answer.json()["sglext"]["cache_report"]
    return {**report, "id": answer.json()["id"]}


def test_a_chat_is_told_what_was_lost_and_where(server) -> None:
    first = report_of(server, turns("one", system="Today is 2026-12-01."))
    assert first["lost_tokens"] == 0 and first["previous_id"] is None
    more = (("assistant", "Hi"), ("user", "go on"))
    went_on = report_of(server, turns("one", *more, system="Today is 2026-12-01."))
    assert (went_on["reason"], went_on["lost_tokens"], went_on["previous_id"]) == ("new", 0, first["id"])
    changed = report_of(server, turns("one", *more, system="Today is 2026-12-02."))
    assert (changed["reason"], changed["previous_id"]) == ("diverged", went_on["id"])
    assert changed["message"] == "the system prompt: it was edited (near '2026-12-02')"
    assert changed["divergence_index"] == changed["matched_tokens"] == len("system: Today is 2026-12-0")
    assert (changed["had"][0], changed["has"][0]) == ("1", "2") and len(changed["had"]) == 16
    assert changed["lost_tokens"] > len(PADDING)


def test_a_stream_has_the_report_at_its_end_and_who_does_not_ask_has_none(server) -> None:
    body = {"messages": turns("two"), "max_tokens": 4, "stream": True, "return_cache_report": True}
    lines = server.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    reports = [chunk["sglext"]["cache_report"] for chunk in chunks if "sglext" in chunk]
    assert len(reports) == 1 and reports[0]["reason"] == "new"
    silent = server.http.post("/v1/chat/completions", json={"messages": turns("two"), "max_tokens": 4}).json()
    assert "sglext" not in silent
    completed = server.http.post(
        "/v1/completions", json={"prompt": "a new text", "max_tokens": 2, "return_cache_report": True}
    ).json()
    assert completed["sglext"]["cache_report"]["reason"] in ("new", "diverged")


def test_generate_has_it_in_meta_info_for_each_prompt(server) -> None:
    texts = ["generate one " + PADDING, "generate two " + PADDING]
    body = {"sampling_params": {"max_new_tokens": 2}, "return_cache_report": True}
    first = server.http.post("/generate", json={**body, "text": texts}).json()
    assert all(answer["meta_info"]["cache_report"]["matched_tokens"] < len(texts[0]) for answer in first)
    again = server.http.post("/generate", json={**body, "text": texts[0]}).json()["meta_info"]
    assert again["cache_report"] == {
        "reason": "none", "matched_tokens": again["cached_tokens"], "lost_tokens": 0, "divergence_index": None,
        "message": None, "had": None, "has": None, "previous_id": None, "advice": None,
    }  # fmt: skip
    salted = server.http.post("/generate", json={**body, "text": texts[0], "cache_salt": "s"}).json()["meta_info"]
    assert (salted["cache_report"]["reason"], salted["cache_report"]["had"]) == ("namespace", None)
    refused = server.http.post("/generate", json={"text": "a", "return_cache_report": "yes"})
    assert refused.status_code == 400


def test_another_salt_is_named_and_shows_nothing_of_the_first(server) -> None:
    report_of(server, turns("three"), cache_salt="a")
    report = report_of(server, turns("three"), cache_salt="b")
    assert (report["reason"], report["had"], report["has"]) == ("namespace", None, None)
    assert report["lost_tokens"] > len(PADDING) and "cache_salt" in report["advice"]


def test_the_metrics_count_by_reason(server) -> None:
    report_of(server, turns("four"))
    report_of(server, turns("four"))
    text = server.http.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("mooli:cache_match_ends_total")]
    assert any('reason="none"' in line for line in lines) and any('reason="diverged"' in line for line in lines)


# -- Anthropic's client ------------------------------------------------------------------------------------------------
def test_anthropic_diagnostics(server) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0) as client:

        def send(messages: list[dict[str, Any]], previous: str | None, **body: Any) -> anthropic.types.Message:
            return client.messages.create(
                **{"model": "m", "max_tokens": 4, "messages": messages, **body},
                diagnostics={"previous_message_id": previous},
            )

        tools = [{"name": "look", "description": "Looks", "input_schema": {"type": "object"}}]
        more = (("assistant", "Hi"), ("user", "go on"))
        first = send(turns("five"), None, system="Be brief.", tools=tools)
        assert first.diagnostics is None
        went_on = send(turns("five", *more), first.id, system="Be brief.", tools=tools)
        assert went_on.diagnostics is None

        def reason(messages: list[dict[str, Any]], previous: str, **body: Any) -> Any:
            body = {"system": "Be brief.", "tools": tools, **body}
            found = send(messages, previous, **body).diagnostics
            assert found is not None and found.cache_miss_reason is not None
            return found.cache_miss_reason

        changed = reason(turns("five", ("assistant", "Ho"), ("user", "go on")), went_on.id)
        assert changed.type == "messages_changed" and changed.cache_missed_input_tokens > 0
        assert reason(turns("five", *more), went_on.id, system="Be long.").type == "system_changed"
        assert reason(turns("five", *more), went_on.id, model="n").type == "model_changed"
        renamed = [{**tools[0], "description": "Looks closely"}]
        assert reason(turns("five", *more), went_on.id, tools=renamed).type == "tools_changed"
        assert reason(turns("five", *more), "msg_none").type == "previous_message_not_found"
        with client.messages.stream(
            model="m",
            max_tokens=4,
            messages=turns("six"),
            system="Be brief.",
            diagnostics={"previous_message_id": went_on.id},
        ) as stream:
            found = stream.get_final_message().diagnostics
        assert found is not None and found.cache_miss_reason.type == "tools_changed", "there are none any more"


def test_what_is_marked_to_be_cached_is_counted_as_written(server) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0) as client:
        system = [{"type": "text", "text": "seven " + PADDING, "cache_control": {"type": "ephemeral"}}]
        usages = [
            client.messages.create(model="m", max_tokens=4, messages=turns("seven"), system=system).usage
            for _ in range(2)
        ]
        whole = client.messages.count_tokens(model="m", messages=turns("seven"), system=system).input_tokens
        for usage in usages:
            assert usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens == whole
        assert usages[0].cache_creation_input_tokens > len(PADDING) and usages[0].input_tokens == 0
        assert usages[1].cache_creation_input_tokens == 1 and usages[1].cache_read_input_tokens == whole - 1
        plain = client.messages.create(model="m", max_tokens=4, messages=turns("eight")).usage
        assert plain.cache_creation_input_tokens == 0 and plain.input_tokens > 0


# -- OpenAI's client ---------------------------------------------------------------------------------------------------
def test_openai_prompt_cache_diagnostics(server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:

        def send(text: str, previous: str | None, **body: Any) -> openai.types.responses.Response:
            options = {} if previous is None else {"comparison_response_id": previous}
            return client.responses.create(
                **{"model": "m", "max_output_tokens": 4, "input": text + PADDING, **body}, prompt_cache_options=options
            )

        first = send("nine", None)
        assert first.prompt_cache_diagnostics is None and first.prompt_cache_options.mode == "implicit"
        again = send("nine", first.id)
        assert again.prompt_cache_diagnostics.type == "cache_hit"
        assert again.prompt_cache_options.comparison_response_id == first.id
        for body, reason in (
            ({"input": "ten" + PADDING}, "input_changed"),
            ({"instructions": "Be brief."}, "input_changed"),
            ({"model": "n"}, "model_changed"),
            ({"extra_body": {"cache_salt": "z"}}, "prompt_cache_key_changed"),
            ({"tools": [{"type": "function", "name": "look", "parameters": {}}]}, "tools_changed"),
        ):
            found = send("nine", first.id, **body).prompt_cache_diagnostics
            assert (found.type, found.reason) == ("cache_miss", reason)
            assert found.cache_missed_tokens >= 0 and found.comparison_reusable_tokens >= 0
        assert send("nine", "resp_none").prompt_cache_diagnostics.type == "comparison_response_not_found"
        assert client.responses.create(model="m", input="nine").prompt_cache_diagnostics is None
        events = list(
            client.responses.create(
                model="m",
                input="nine" + PADDING,
                stream=True,
                prompt_cache_options={"comparison_response_id": first.id},
            )
        )
        assert events[0].response.prompt_cache_diagnostics.type == "cache_hit"
