"""Ollama's API, by its own client and by what others ask in its name."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from fake_engine import CONTEXT, EOS, says
from live import LiveServer
from wire_formats import BracketFormat

from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.infill import Infill
from mooli.frontend.wire_formats.choice import MessageFormat
from mooli.frontend.wire_formats.hermes import Hermes
from mooli.frontend.wire_formats.reasoning import REASONING_FORMATS

ollama = pytest.importorskip("ollama")

USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TEMPLATE = (
    "{{ tools | default([], true) | map(attribute='function') | map(attribute='name') | join(',') }};"
    "{% for m in messages %}{{ m.role[0] }}:{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}{% for c in m.tool_calls %}[{{ c.function.name }}:{{ c.function.arguments.items() | list }}]"
    "{% endfor %}{% if m.name %}<{{ m.name }}{% endif %}{{ '\n' }}{% endfor %}"
    "{{ [enable_thinking | default('-'), reasoning_effort | default('-')] | join(',') }}|"
)
"""Shows all that templates are told."""


@pytest.fixture
def client_of():
    """A client of a server, which is closed with the test."""
    made: list[Any] = []

    def make(server: Any) -> Any:
        made.append(ollama.Client(host=server.url))
        return made[-1]

    yield make
    for client in made:
        client.close()


# -- the model ---------------------------------------------------------------------------------------------------------
def test_the_client_lists_shows_and_sees_the_model_loaded(live, client_of):
    server = live(says("x"), engine={"served_model_name": "org/name"})
    client = client_of(server)
    (listed,) = client.list().models
    (loaded,) = client.ps().models
    shown = client.show("org/name")
    assert (listed.model, loaded.model, loaded.context_length) == ("org/name", "org/name", CONTEXT)
    assert listed.digest == loaded.digest and len(listed.digest) == 64
    assert (loaded.size, loaded.size_vram) == (0, 0)
    assert loaded.expires_at > datetime.now(timezone.utc) + timedelta(days=365)
    assert listed.modified_at == shown.modified_at <= datetime.now(timezone.utc)
    assert listed.details == loaded.details == shown.details
    assert shown.modelinfo["general.architecture"] == shown.details.family == "fake"
    assert shown.modelinfo["fake.context_length"] == CONTEXT
    assert shown.capabilities == ["completion", "tools"]
    assert "{% for m in messages %}" in shown.template


def test_sizes_and_types_are_told_as_ollama_tells_them(live):
    server = live(says("x"))
    server.service.client.facts = replace(
        server.service.facts, architecture="Qwen2ForCausalLM", num_parameters=494_032_768, weight_bytes=7,
        kv_cache_bytes=5, resolved_model_path="/models/org/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    )  # fmt: skip
    (listed,) = server.http.get("/api/tags").json()["models"]
    (loaded,) = server.http.get("/api/ps").json()["models"]
    assert listed["details"] == {
        "parent_model": "", "format": "gguf", "family": "qwen2", "families": ["qwen2"], "parameter_size": "494M",
        "quantization_level": "Q4_K_M",
    }  # fmt: skip
    assert (listed["size"], loaded["size"], loaded["size_vram"]) == (7, 12, 0)
    server.service.client.facts = replace(server.service.facts, quantization="int8", num_parameters=7_615_616_512)
    details = server.http.post("/api/show", json={"model": "x"}).json()["details"]
    assert (details["parameter_size"], details["quantization_level"]) == ("7.616B", "INT8")


def test_what_the_model_can_is_read_from_its_files(live):
    """Copilot shows a model only if it has tools."""
    server = live(says("x"))
    service = server.service
    service.wire_format = MessageFormat(REASONING_FORMATS["qwen3"], Hermes("hermes"))
    service.infill = Infill(1, 2, 3, False, None, None, frozenset(), frozenset())
    shown = server.http.post("/api/show", json={"model": "x"}).json()
    assert shown["capabilities"] == ["completion", "tools", "thinking", "insert"]
    assert server.http.get("/api/tags").json()["models"][0]["capabilities"] == shown["capabilities"]
    bare = live(says("x"), engine={"skip_tokenizer_init": True})
    shown = bare.http.post("/api/show", json={"model": "x"}).json()
    assert (shown["capabilities"], shown["template"]) == ([], "")


def test_what_clients_ask_first(live):
    """Of a server's address whether something answers; its version, which must be numbers: Copilot compares them."""
    server = live(says("x"))
    assert server.http.head("/").status_code == 200
    assert server.http.get("/").text.endswith(" is running")
    version = [int(number) for number in server.http.get("/api/version").json()["version"].split(".")]
    assert version >= [0, 6, 4]


def test_models_are_not_managed_and_nothing_is_embedded(live, client_of):
    client = client_of(live(says("x")))
    for ask in (
        lambda: client.pull("m"), lambda: list(client.pull("m", stream=True)), lambda: client.delete("m"),
        lambda: client.copy("m", "n"), lambda: client.create("m", from_="n"),
    ):  # fmt: skip
        with pytest.raises(ollama.ResponseError, match="the one model that it was started with") as raised:
            ask()
        assert raised.value.status_code == 501
    for ask in (lambda: client.embed("m", "text"), lambda: client.embeddings("m", "text")):
        with pytest.raises(ollama.ResponseError, match="no embeddings") as raised:
            ask()
        assert raised.value.status_code == 501


# -- chats -------------------------------------------------------------------------------------------------------------
class Brackets(BracketFormat):
    calls = Hermes("hermes")

    @property
    def continued(self) -> Brackets:
        return self


class Scripted(LiveServer):
    """A server whose template is TEMPLATE, and whose model says `words`. prompts: what came to the model."""

    def __init__(self, words: str, **arguments: Any) -> None:
        self.words = words
        self.prompts: list[str] = []
        super().__init__(self._next_token, **arguments)
        self.service.tokenizer.chat_template = ChatTemplate(TEMPLATE)

    def _next_token(self, context: list[int]) -> int | None:
        text = bytes(token_id for token_id in context if token_id < EOS).decode(errors="ignore")
        if text.endswith("|"):
            self.prompts.append(text)
        return says(self.words, after="|")(context)


@pytest.fixture(scope="module")
def scripted() -> Iterator[Scripted]:
    """For tests that leave nothing behind. It reasons and calls in `BracketFormat`."""
    server = Scripted("", engine={"context_length": 500})
    server.service.wire_format = Brackets()
    yield server
    server.stop()


@pytest.fixture
def ask(scripted):
    """ask(path, words, **body): what the server answers, whose model says `words`."""

    def send(path: str, words: str = "yes", **body: Any) -> Any:
        scripted.prompts.clear()
        scripted.words = words
        start = {"messages": USER} if path == "/api/chat" else {"prompt": "hi"}
        reply = scripted.http.post(path, json={"stream": False, **start, **body})
        return reply.json() if reply.status_code == 200 else (reply.status_code, reply.json()["error"])

    return send


@pytest.fixture
def client(scripted, client_of):
    scripted.prompts.clear()
    return client_of(scripted)


def test_the_client_chats_whole_and_in_a_stream(scripted, client):
    scripted.words = "héllo"
    whole = client.chat("any", USER)
    assert (whole.model, whole.message.role, whole.message.content) == ("any", "assistant", "héllo")
    assert (whole.done, whole.done_reason, whole.message.thinking, whole.message.tool_calls) == (
        True, "stop", None, None,
    )  # fmt: skip
    assert (whole.prompt_eval_count, whole.eval_count) == (len(scripted.prompts[0]), len("héllo".encode()) + 1)
    assert min(whole.load_duration, whole.prompt_eval_duration, whole.eval_duration) > 0
    assert whole.total_duration >= whole.load_duration + whole.prompt_eval_duration + whole.eval_duration - 3
    *parts, last = list(client.chat("any", USER, stream=True))
    assert "".join(part.message.content for part in parts) == "héllo"
    assert (last.done, last.message.content, last.eval_count) == (True, "", whole.eval_count)
    assert datetime.fromisoformat(last.created_at.replace("Z", "+00:00")) <= datetime.now(timezone.utc)
    assert scripted.prompts == [";u:hi\n-,-|"] * 2


def test_a_stream_is_lines_of_json_unless_it_is_not_wanted(scripted):
    scripted.words = "ab"
    with scripted.http.stream("POST", "/api/chat", json={"messages": USER}) as reply:
        assert reply.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in reply.iter_lines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    reply = scripted.http.post("/api/chat", json={"messages": USER, "stream": False})
    assert reply.headers["content-type"] == "application/json"


def test_reasoning_is_apart(scripted, client):
    scripted.words = "(hm)yes"
    message = client.chat("any", USER, think=True).message
    assert (message.thinking, message.content) == ("hm", "yes")
    parts = [part.message for part in client.chat("any", USER, think="high", stream=True)]
    assert "".join(part.thinking or "" for part in parts) == "hm"
    assert "".join(part.content for part in parts) == "yes"
    generated = client.generate("any", "hi", think=False)
    assert (generated.thinking, generated.response) == ("hm", "yes")
    told = [prompt.partition("\n")[2] for prompt in scripted.prompts]
    assert told == ["True,-|", "True,high|", "False,-|"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_calls_have_objects_as_arguments_and_come_back_with_their_results(scripted, client, is_stream):
    scripted.words = '(hm)[weather:{"city": "Oslo", "n": 123456789012345678901234567890}][now:]'
    answer = client.chat("any", USER, tools=[WEATHER], stream=is_stream)
    messages = [part.message for part in answer] if is_stream else [answer.message]
    calls = [call for message in messages for call in message.tool_calls or ()]
    assert [(call.function.name, dict(call.function.arguments)) for call in calls] == [
        ("weather", {"city": "Oslo", "n": 123456789012345678901234567890}), ("now", {}),
    ]  # fmt: skip
    assert scripted.prompts == ["weather;u:hi\n-,-|"]
    scripted.words = "cold"
    said = {"role": "assistant", "thinking": "hm", "content": "", "tool_calls": calls[:1]}
    result = {"role": "tool", "tool_name": "weather", "content": "-3"}
    assert client.chat("any", [*USER, said, result], tools=[WEATHER]).message.content == "cold"
    history = "a:(hm)[weather:[('city', 'Oslo'), ('n', 123456789012345678901234567890)]]\nt:-3<weather\n"
    assert scripted.prompts[1] == f"weather;u:hi\n{history}-,-|"


def test_calls_are_read_as_the_model_writes_them(live, client_of):
    """In Hermes's form, which is the one of a model whose template knows no tools."""
    words = 'so:\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    server = live(says(words, after="assistant: "), engine={"context_length": 1200})
    client = client_of(server)
    message = client.chat("m", USER, tools=[WEATHER]).message
    (call,) = message.tool_calls
    assert (message.content.strip(), call.function.name, call.function.arguments) == (
        "so:", "weather", {"city": "Oslo"},
    )  # fmt: skip
    assert client.chat("m", USER).message.content == words


def test_a_call_that_is_cut_is_none(ask):
    answer = ask("/api/chat", '[weather:{"city": "Oslo"}]', tools=[WEATHER], options={"num_predict": 15})
    assert "tool_calls" not in answer["message"]
    assert answer["done_reason"] == "length"


def test_the_last_message_of_the_assistant_is_gone_on_with(scripted, ask):
    scripted.service.tokenizer.chat_template = ChatTemplate("{% for m in messages %}{{ m.content }}|{% endfor %}")
    try:
        answer = ask("/api/chat", "b", messages=[*USER, {"role": "Assistant", "content": "a|"}])
    finally:
        scripted.service.tokenizer.chat_template = ChatTemplate(TEMPLATE)
    assert (answer["message"]["content"], scripted.prompts) == ("b", ["hi|a|"])


def test_logprobs_are_told_token_by_token(client, scripted):
    scripted.words = "(m)é"
    whole = client.chat("any", USER, logprobs=True, top_logprobs=2)
    assert [entry.token for entry in whole.logprobs[:3]] == ["(", "m", ")"]
    assert len(whole.logprobs) == whole.eval_count and len(whole.logprobs[0].top_logprobs) == 2
    parts = list(client.generate("any", "hi", logprobs=True, stream=True))
    assert sum(len(part.logprobs or ()) for part in parts) == whole.eval_count


# -- generate ----------------------------------------------------------------------------------------------------------
def test_generate_puts_a_prompt_in_the_template_unless_it_is_raw(scripted, client):
    scripted.words = "yes"
    assert client.generate("any", "hi", system="be").response == "yes"
    assert client.generate("any", "hi|", raw=True).response == "yes"
    assert "".join(part.response for part in client.generate("any", "hi", stream=True)) == "yes"
    assert scripted.prompts == [";s:be\nu:hi\n-,-|", "hi|", ";u:hi\n-,-|"]
    scripted.words = "(m)[f:{}]"
    assert client.generate("any", "hi|", raw=True).response == "(m)[f:{}]"


def test_generate_fills_in_what_comes_before_a_suffix(live, client_of):
    server = live(says("mid\x04more", after="\x03"))
    server.service.infill = Infill(1, 2, 3, False, None, None, frozenset({1, 2, 3, 4}), frozenset())
    answer = client_of(server).generate("any", "a", suffix="b")
    assert (answer.response, answer.done_reason, answer.prompt_eval_count) == ("mid", "stop", 5)


def test_a_model_without_a_template_has_the_prompt_as_it_is(live):
    server = live(says("yes"))
    server.service.tokenizer.chat_template = None
    body = {"prompt": "hi>", "stream": False}
    assert server.http.post("/api/generate", json=body).json()["response"] == "yes"
    for path, more in (("/api/generate", {"system": "be"}), ("/api/chat", {"messages": USER})):
        reply = server.http.post(path, json={**body, **more})
        assert reply.status_code == 400 and "no chat template" in reply.json()["error"]


@pytest.mark.parametrize("keep_alive", [None, "", 0, "0", "0s", "0.0m", "5m", "0.5h", -1, 300])
def test_without_words_nothing_is_made(ask, client, keep_alive):
    reason = "unload" if keep_alive in (0, "0", "0s", "0.0m") else "load"
    chatted = client.chat("any", keep_alive=keep_alive)
    assert (chatted.done, chatted.done_reason, chatted.message.content) == (True, reason, "")
    generated = client.generate("any", keep_alive=keep_alive)
    assert (generated.done, generated.done_reason, generated.response) == (True, reason, "")


# -- options -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def sampled(scripted, monkeypatch):
    """What a request is sampled with: sampled(options, **body)."""
    calls: list[Any] = []
    prepare = scripted.service.prepare

    async def noting(call: Any, *rest: Any) -> Any:
        calls.append(call)
        return await prepare(call, *rest)

    monkeypatch.setattr(scripted.service, "prepare", noting)

    def send(options: Any, **body: Any) -> dict[str, Any]:
        reply = scripted.http.post("/api/chat", json={"messages": USER, "stream": False, "options": options, **body})
        assert reply.status_code == 200, reply.text
        return {name: value for name, value in calls[-1].sampling_params.items() if value is not None}

    return send


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"temperature": 0, "top_p": 0.5, "min_p": 0.1}, {"temperature": 0, "top_p": 0.5, "min_p": 0.1}),
        ({"top_k": 0}, {"top_k": -1}),
        ({"seed": 5, "repeat_penalty": 1.1}, {"sampling_seed": 5, "repetition_penalty": 1.1}),
        ({"seed": -1}, {}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1, "frequency_penalty": -1}),
        ({"stop": ["a", ""]}, {"stop": ["a"]}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"num_predict": 7}, {"max_new_tokens": 7}),
        ({"num_predict": -1}, {}),
        ({"num_predict": 10**6}, {"max_new_tokens": 500 - len(";u:hi\n-,-|")}),
        ({"num_ctx": 8192, "mirostat": 2, "num_gpu": 99, "typical_p": 0.7, "of_the_future": [1]}, {}),
    ],
)
def test_options_are_sampling_parameters_over_ollamas_own_defaults(sampled, options, params):
    assert sampled(options) == {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "n": 1, **params}


def test_what_the_models_files_say_lies_over_ollamas_defaults(scripted, sampled, monkeypatch):
    monkeypatch.setattr(scripted.service, "sampling_defaults", {"temperature": 0.3})
    assert sampled({}) == {"temperature": 0.3, "top_k": 40, "top_p": 0.9, "n": 1}
    assert sampled({"temperature": 0.4})["temperature"] == 0.4


SCHEMA = {
    "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False,
}  # fmt: skip


def test_a_format_holds_the_answer_to_it(live, client_of):
    client = client_of(live())
    for ask, text_of in (
        (lambda form: client.chat("m", USER, format=form), lambda answer: answer.message.content),
        (lambda form: client.generate("m", "hi", format=form), lambda answer: answer.response),
    ):
        assert set(json.loads(text_of(ask(SCHEMA)))) == {"ok"}
    with pytest.raises(ollama.ResponseError, match="uniqueItems cannot be enforced") as raised:
        client.chat("m", USER, format={"uniqueItems": True})
    assert raised.value.status_code == 400


def test_any_json_object_is_a_format(sampled):
    for form, schema in (("json", '{"type": "object"}'), (SCHEMA, json.dumps(SCHEMA)), ("", None), (None, None)):
        assert sampled({"num_predict": 0}, format=form).get("json_schema") == schema


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/api/chat", {"options": {"temperature": -1}}, "temperature=-1"),
        ("/api/chat", {"options": {"repeat_penalty": 0}}, "repeat_penalty=0"),
        ("/api/chat", {"options": {"temperature": "hot"}}, "options.temperature"),
        ("/api/chat", {"top_logprobs": 1000, "logprobs": True}, "top_logprobs=1000"),
        ("/api/chat", {"format": "yaml"}, "format='yaml' is neither 'json' nor a JSON schema"),
        ("/api/chat", {"think": "a lot"}, "think='a lot' is none of true, false, low, medium, high, max"),
        ("/api/chat", {"messages": [{"role": "user", "images": ["aGk="]}]}, "messages[0].images is not supported"),
        ("/api/chat", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role='robot'"),
        ("/api/chat", {"messages": [{"content": "x"}]}, "missing required field role"),
        ("/api/chat", {"messages": [*USER, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0]"),
        ("/api/chat", {"tools": [{"type": "function"}]}, "tools[0]"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x" * 600}]}, "context length is 500"),
        ("/api/generate", {"images": ["aGk="]}, "images is not supported"),
        ("/api/generate", {"template": "{{ .Prompt }}"}, "template is not supported"),
        ("/api/generate", {"context": [1, 2]}, "send the whole conversation to /api/chat"),
        ("/api/generate", {"raw": True, "system": "x"}, "raw mode does not support template, system, or context"),
        ("/api/generate", {"suffix": "x"}, "suffix is not supported by this model"),
        ("/api/generate", {"raw": True, "prompt": "x" * 600}, "context length is 500"),
    ],
)
def test_what_is_wrong_is_an_error_in_ollamas_shape(ask, path, body, words):
    status, message = ask(path, **body)
    assert status == 400 and words in message, message
    assert not {"max_new_tokens", "repetition_penalty"} & set(message.split("="))


def test_a_model_that_does_not_reason_is_not_asked_to(live, client_of):
    client = client_of(live(says("x", after="assistant: ")))
    with pytest.raises(ollama.ResponseError, match="'m' does not support thinking"):
        client.chat("m", USER, think=True)
    assert client.chat("m", USER, think=False).message.content == "x"


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_an_error_in_a_stream_is_its_last_line(live, client_of, path):
    has_begun = threading.Event()

    def raises(batch: Any) -> Exception | None:
        if max(batch.positions) < 40:
            return None
        has_begun.wait(120)  # the client has seen a part: what fails before is answered with a status
        return RuntimeError("the pool burst")

    server = live(says("y" * CONTEXT, after="assistant: ", then=None), runner={"raises": raises})
    with server.http.stream("POST", path, json={"messages": USER, "prompt": "hi"}) as reply:
        assert reply.status_code == 200
        lines = reply.iter_lines()
        first = json.loads(next(lines))
        has_begun.set()
        rest = [json.loads(line) for line in lines]
    assert first["done"] is False
    assert list(rest[-1]) == ["error"] and "failed" in rest[-1]["error"]
    client = client_of(server)
    with pytest.raises(ollama.ResponseError, match="failed"):
        list(client.chat("m", USER, stream=True))


# -- in the order of clients -------------------------------------------------------------------------------------------
def test_open_webui_asks_version_tags_ps_and_chats(scripted):
    scripted.words = "yes"
    http = scripted.http
    assert http.get("/api/version").json()["version"]
    (model,) = [item["model"] for item in http.get("/api/tags").json()["models"]]
    assert [item["model"] for item in http.get("/api/ps").json()["models"]] == [model]
    body = {
        "model": model, "messages": [{"role": "user", "content": "hi", "images": []}], "stream": True, "tools": [],
        "options": {"num_ctx": 4096, "temperature": 0.2, "num_keep": 24, "repeat_last_n": 64}, "keep_alive": "5m",
    }  # fmt: skip
    with http.stream("POST", "/api/chat", json=body) as reply:
        lines = [json.loads(line) for line in reply.iter_lines()]
    assert "".join(line["message"]["content"] for line in lines) == "yes"
    assert lines[-1]["done_reason"] == "stop" and lines[-1]["eval_count"] == 4


def test_copilot_asks_what_the_model_can_and_chats_in_openais_way(scripted):
    scripted.words = '[weather:{"city": "Oslo"}]'
    http = scripted.http
    version = http.get("/api/version").json()["version"]
    assert all(part.isdigit() for part in version.split(".")) and tuple(map(int, version.split("."))) >= (0, 6, 4)
    (model,) = [item["model"] for item in http.get("/api/tags").json()["models"]]
    shown = http.post("/api/show", json={"model": model}).json()
    architecture = shown["model_info"]["general.architecture"]
    assert "tools" in shown["capabilities"]
    assert shown["model_info"][f"{architecture}.context_length"] == 500
    body = {"model": model, "messages": USER, "tools": [WEATHER], "tool_choice": "auto"}
    (choice,) = http.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
