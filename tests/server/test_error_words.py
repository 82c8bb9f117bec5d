"""Errors speak of the fields that the client knows, on every route; never of Python, nor of what operators can do."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fake_engine import CONTEXT, VOCAB_SIZE, says
from live import LiveServer
from openai_raw import refusal, user

PYTHON = re.compile(
    r"True|False|None|\bdict\b|\bstr\b|of type|allow_auto_truncate|context_length\b|max_total_tokens"
    r"|skip_tokenizer_init|parse_special|chat_template\b"
)

LONG = [97] * (CONTEXT + 1)

BAD_SAMPLING: list[tuple[str, Any]] = [
    ("temperature", -1), ("temperature", "hot"), ("top_p", 0), ("top_p", 2), ("top_k", 0), ("min_p", 2),
    ("frequency_penalty", 3), ("presence_penalty", -3), ("repetition_penalty", 0), ("n", 0), ("n", 10**6),
    ("stop", [""]), ("stop", ["x"] * 33), ("stop", ["x" * 5000]), ("stop_token_ids", [VOCAB_SIZE]),
    ("stop_token_ids", [0] * 2000), ("logit_bias", {"999": 1}), ("logit_bias", {"x": 1}), ("logit_bias", {"1": 1e99}),
    ("max_new_tokens", -1), ("max_new_tokens", CONTEXT), ("min_new_tokens", -1), ("seed", 2**64),
    ("stream_interval", 0), ("ignore_eos", 1), ("no_stop_trim", "yes"), ("skip_special_tokens", 0),
]  # fmt: skip
"""Values that are refused, by their names in Python."""

OPENAI_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
ANTHROPIC_NAMES = {"max_new_tokens": "max_tokens", "stop": "stop_sequences"}
ANTHROPIC_FIELDS = ("temperature", "top_p", "top_k", "stop", "max_new_tokens")


@pytest.fixture(scope="module")
def server():
    server = LiveServer(says("x"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def bare_server():
    """Without a tokenizer."""
    server = LiveServer(says("x"), engine={"skip_tokenizer_init": True})
    yield server
    server.stop()


@pytest.mark.parametrize(("name", "value"), BAD_SAMPLING, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_openai_routes_name_their_own_fields(server, path, name, value):
    field = OPENAI_NAMES.get(name, name)
    start = {"prompt": "a"} if path == "/v1/completions" else {"messages": [user("a")]}
    error = refusal(server, path, {**start, field: value})
    is_too_long = error["code"] == "context_length_exceeded"
    assert error["param"] == (next(iter(start)) if is_too_long else field)
    assert not PYTHON.search(error["message"]) and "new_tokens" not in error["message"]
    assert field in error["message"] or is_too_long


@pytest.mark.parametrize(("name", "value"), BAD_SAMPLING, ids=lambda value: str(value)[:20])
def test_generate_names_what_is_in_its_sampling_parameters(server, name, value):
    error = refusal(server, "/generate", {"text": "a", "sampling_params": {name: value}})
    assert error["param"] in (name, None)
    assert name in error["message"] and not PYTHON.search(error["message"])


@pytest.mark.parametrize(
    ("name", "value"), [case for case in BAD_SAMPLING if case[0] in ANTHROPIC_FIELDS], ids=lambda value: str(value)[:20]
)
def test_the_messages_route_names_its_own_fields(server, name, value):
    field = ANTHROPIC_NAMES.get(name, name)
    body = {"model": "m", "messages": [user("a")], "max_tokens": 5, field: value}
    if name == "top_k" or value == CONTEXT:
        assert server.http.post("/v1/messages", json=body).status_code == 200  # both mean something here
        return
    message = refusal(server, "/v1/messages", body)["message"]
    assert field in message and not PYTHON.search(message) and "new_tokens" not in message
    assert not re.search(r"\bstop\b", message)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generate", {"text": ""}, "text"),
        ("/generate", {"text": "a" * 300}, None),
        ("/generate", {"input_ids": LONG}, None),
        ("/generate", {"input_ids": [-1]}, "input_ids"),
        ("/generate", {"text": ["a", "b"], "rid": ["x"]}, "rid"),
        ("/generate", {"text": "a", "rid": ["x"]}, "rid"),
        ("/generate", {"text": "a", "rid": "x" * 300}, "rid"),
        ("/generate", {"text": "a", "priority": 2**40}, "priority"),
        ("/generate", {"text": "a", "cache_salt": "x" * 5000}, "cache_salt"),
        ("/generate", {"text": "a", "top_logprobs_num": 5}, "return_logprob"),
        ("/generate", {"text": "a", "return_logprob": True, "top_logprobs_num": 10**6}, "top_logprobs_num"),
        ("/generate", {"text": "a", "return_logprob": True, "logprob_start_len": 7}, "logprob_start_len"),
        ("/generate", {"text": "a", "sampling_params": {"max_length": 5}}, "sampling_params"),
        ("/generate", {"text": "a", "lora_path": "x"}, "lora_path"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": "a", "logprobs": 10**6}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "rid": ""}, "rid"),
        ("/v1/completions", {"prompt": "a", "cache_salt": "x" * 5000}, "cache_salt"),
        ("/v1/chat/completions", {"messages": [user("a")], "logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": [user("a")], "max_completion_tokens": -1}, "max_completion_tokens"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/messages", {"model": "m", "messages": [user("a" * 300)], "max_tokens": 1}, None),
        ("/tokenize", {"messages": []}, None),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_an_error_names_its_field_and_nothing_of_python(server, path, body, param):
    error = refusal(server, path, body)
    assert error.get("param") == param
    assert not PYTHON.search(error["message"]), error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a"}),
        ("/generate", {"input_ids": [1], "sampling_params": {"stop": "x"}}),
        ("/generate", {"input_ids": [1], "return_logprob": True, "return_text_in_logprobs": True}),
        ("/v1/completions", {"prompt": [1]}),
        ("/v1/chat/completions", {"messages": [user("a")]}),
        ("/v1/messages", {"model": "m", "messages": [user("a")], "max_tokens": 1}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_without_a_tokenizer_clients_hear_what_they_can_send(bare_server, path, body):
    message = refusal(bare_server, path, body)["message"]
    assert "tokenizer" in message and not PYTHON.search(message)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [user("a")]}),
        ("/v1/messages", {"model": "m", "messages": [user("a")], "max_tokens": 1}),
        ("/tokenize", {"messages": [user("a")]}),
    ],
)
def test_without_a_chat_template_clients_hear_of_other_routes(server, path, body, monkeypatch):
    monkeypatch.setattr(server.service.tokenizer, "chat_template", None)
    message = refusal(server, path, body)["message"]
    assert "/v1/completions" in message and not PYTHON.search(message.replace("chat template", ""))


def test_a_request_that_the_engine_refuses_late_is_told_in_the_same_names(live):
    """A prompt that no pool can hold is found by the scheduler."""
    server = live(says("x"), engine={"context_length": 4000})
    for path, body, name in [
        ("/v1/completions", {"prompt": "a", "max_tokens": 3000}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [user("a")], "max_tokens": 3000}, "max_tokens"),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 3000}}, "max_new_tokens"),
    ]:
        for stream in (False, True):
            message = refusal(server, path, {**body, "stream": stream})["message"]
            assert f"{name} is 3000" in message
