"""Answers of a given form over HTTP: each API's words for it, streams, and refusals."""

from __future__ import annotations

import json

import pytest
from live import LiveServer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
NO_SCHEMA = {"type": "object", "properties": {"a": {"uniqueItems": True}}}
WORDS = "uniqueItems cannot be enforced (at #/properties/a/uniqueItems)"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    server = LiveServer()
    yield server
    server.stop()


def is_right(text):
    value = json.loads(text)
    return set(value) == {"name", "ok"} and isinstance(value["ok"], bool) and len(value["name"]) <= 6


def posted(server, path, **body):
    prompt = {"messages": [{"role": "user", "content": "a"}]} if path == CHAT else {"prompt": "a"}
    answer = server.http.post(path, json={"max_tokens": 100, "temperature": 1.5, **prompt, **body})
    return answer.status_code, answer.json()


def texts(server, path, **body):
    status, answer = posted(server, path, **body)
    assert status == 200, answer
    return [choice["message"]["content"] if path == CHAT else choice["text"] for choice in answer["choices"]]


def events(server, path, **body):
    with server.http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_native_route_takes_sampling_parameters_stream_and_not(server):
    params = {"json_schema": json.dumps(SCHEMA), "max_new_tokens": 100, "temperature": 1.5}
    answer = server.http.post("/generate", json={"text": "a", "sampling_params": params}).json()
    assert is_right(answer["text"])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": ord("}")}
    assert is_right(events(server, "/generate", text="a", sampling_params=params)[-1]["text"])


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": False}}},
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
        {"json_schema": json.dumps(SCHEMA)},
        {"guided_json": SCHEMA},
        {"structured_outputs": {"json": SCHEMA, "regex": None}},
        {"response_format": {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": SCHEMA}}},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
def test_every_way_to_give_a_schema(server, path, fields):
    assert all(map(is_right, texts(server, path, n=2, **fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "x|yz"},
        {"ebnf": 'root ::= "x" | "yz"'},
        {"grammar": 'root ::= "x" | "yz"'},
        {"guided_regex": "x|yz"},
        {"guided_choice": ["x", "yz"]},
        {"guided_grammar": 'start: "x" | "yz"'},
        {"structured_outputs": {"choice": ["x", "yz"]}},
        {"structural_tag": {"format": {"type": "regex", "pattern": "x|yz"}}},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
def test_every_way_to_give_another_language(server, fields):
    assert set(texts(server, CHAT, **fields)) <= {"x", "yz"}


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_a_message_of_anthropic_s_api_has_the_format_of_its_output(server, name):
    form = {"type": "json_schema", "schema": SCHEMA}
    body = {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": "a"}]}
    answer = server.http.post(
        "/v1/messages", json={**body, name: {"format": form} if name == "output_config" else form}
    )
    (block,) = answer.json()["content"]
    assert is_right(block["text"])


def test_any_object_is_an_object(server):
    (text,) = texts(server, CHAT, max_tokens=60, response_format={"type": "json_object"})
    assert text.startswith("{")


def test_a_chat_is_streamed_to_its_last_character(server):
    fields = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 100, "json_schema": SCHEMA}
    chunks = events(server, CHAT, **fields)
    assert is_right("".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks))
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/generate"])
def test_what_cannot_be_enforced_is_a_400_that_says_why(server, path, stream):
    if path == "/generate":
        body = {"text": "a", "sampling_params": {"json_schema": json.dumps(NO_SCHEMA)}, "stream": stream}
        answer = server.http.post(path, json=body)
    else:
        prompt = {"messages": [{"role": "user", "content": "a"}]} if path == CHAT else {"prompt": "a"}
        answer = server.http.post(path, json={**prompt, "json_schema": NO_SCHEMA, "stream": stream})
    assert answer.status_code == 400
    assert WORDS in answer.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"json_schema": "{"}, "json_schema is not valid JSON"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar say what the answer is held to"),
        ({"regex": "a\0"}, "NUL"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "schema is missing"),
        ({"response_format": {"type": "yaml"}}, "'yaml'"),
        ({"guided_choice": ["a", ""]}, "guided_choice must be a list of texts"),
        ({"json_schema": "[" * 2000}, "json_schema is not valid JSON"),
        ({"json_schema": '{"items":' * 200 + "{}" + "}" * 200}, "deeper than 128"),
        ({"regex": "a" * 70_000}, "70000 characters"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_with_the_request_itself_is_a_400(server, fields, words):
    status, answer = posted(server, CHAT, **fields)
    assert status == 400
    assert words in json.dumps(answer)
