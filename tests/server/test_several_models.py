"""`mooli serve --models`: which request goes to which model, what needs none, and how they come and go."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest
from fake_engine import byte_tokenizer, fake_build, says
from live import EngineThread

from mooli.config import EngineConfig
from mooli.engine import messages
from mooli.errors import CheckpointError, ConfigError, OutOfMemoryError
from mooli.link.client import EngineClient
from mooli.server.bring_up import make_service, watch
from mooli.server.config import ServerConfig
from mooli.server.http_server import HttpServer
from mooli.server.keys import KeyRing
from mooli.server.several_models import SeveralModels, named_models


class Several:
    """A server of made-up models `a`, `b`, …, in a thread. Each says its own name. room: how many fit."""

    def __init__(self, names, *, room=9, **server):
        self.config = ServerConfig.from_kwargs(
            **{"port": 0, "skip_server_warmup": True, "models": ",".join(names), **server}
        )
        self.names, self.room = names, room
        self.loads: list[str] = []
        self.engines: dict[str, EngineClient] = {}
        self.fails: dict[str, Exception] = {}
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(60)
        self.url = f"http://127.0.0.1:{self.server.port}"
        headers = {"Authorization": f"Bearer {self.config.api_key}"} if self.config.api_key else {}
        self.http = httpx.Client(base_url=self.url, timeout=60, headers=headers)

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        self.served = SeveralModels(self.config, KeyRing(self.config), self.names, self._start, watch)
        self.server = HttpServer(self.served)
        self.status = await self.server.run(on_started=self._started.set)

    async def _start(self, name):
        self.loads.append(name)
        if name in self.fails:
            raise self.fails[name]
        if sum(engine.is_alive for engine in self.engines.values()) >= self.room:
            raise OutOfMemoryError(f"no room for {name}")
        config = EngineConfig.from_kwargs(model_path=name, served_model_name=name, random_seed=7)
        ours, theirs = socket.socketpair()
        process = EngineThread(
            theirs, lambda *_: fake_build(config, next_token=says(f"I am {name}.", after="assistant: "))
        )
        client = await EngineClient.connect(messages.Start({}, name, "warning"), process, ours)
        self.engines[name] = client
        return make_service(self.config, config, client, byte_tokenizer(), started_s=0.0), client

    def chat(self, model, text="hi", **fields):
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
        return self.http.post("/v1/chat/completions", json=body | ({} if model is None else {"model": model}))

    def stop(self):
        self.http.close()
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.drain)
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.status


@pytest.fixture
def several():
    servers = []

    def start(*names, **options):
        servers.append(Several(names, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def content(answer):
    return answer.json()["choices"][0]["message"]["content"]


def test_each_request_goes_to_the_model_it_names_which_is_loaded_once(several):
    server = several("a", "b")
    assert server.http.get("/health").status_code == 200 and server.loads == []
    assert content(server.chat("b")) == "I am b."
    assert content(server.chat("a")) == "I am a."
    assert content(server.chat("b:latest")) == "I am b."
    assert server.loads == ["b", "a"]
    assert content(server.chat(None)) == "I am a."  # the first, where several are loaded
    generated = server.http.post("/generate", json={"text": "assistant: ", "model": "b"}).json()
    assert generated["text"] == "I am b."
    native = server.http.post("/tokenize?model=b", json={"prompt": "abc"})
    assert native.json()["count"] == 3
    answer = server.http.post("/api/chat", json={"model": "b", "messages": [{"role": "user", "content": "x"}]})
    assert json.loads(answer.text.splitlines()[0])["model"] == "b"


def test_a_request_without_a_model_takes_the_one_that_is_loaded(several):
    server = several("a", "b")
    assert content(server.chat("b")) == "I am b."
    assert content(server.chat(None)) == "I am b."
    assert server.loads == ["b"]


def test_streams_come_as_they_are_made(several):
    server = several("a")
    body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "stream": True, "temperature": 0}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 3


def test_a_model_that_is_not_there_is_404_in_each_dialects_words(several):
    server = several("a")
    answer = server.chat("nope")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "this server has 'a'" in answer.json()["error"]["message"]
    message = {"model": "nope", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
    answer = server.http.post("/v1/messages", json=message)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    assert server.loads == []


def test_lists_show_all_models_and_load_none(several):
    server = several("a", "b")
    cards = server.http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["a", "b"] and "max_model_len" not in cards[0]
    assert [entry["name"] for entry in server.http.get("/api/tags").json()["models"]] == ["a", "b"]
    assert server.http.get("/api/ps").json() == {"models": []}
    counts = server.http.get("/metrics").text
    assert 'sglang:http_requests_total{endpoint="/v1/models",method="GET"} 1.0' in counts.splitlines()
    assert "model_name" not in counts
    assert server.http.get("/v1/models/b").json()["id"] == "b"
    assert server.http.get("/v1/models/c").status_code == 404
    assert server.http.get("/").status_code == 200
    assert "/v1/chat/completions" in server.http.get("/openapi.json").json()["paths"]
    assert server.http.get("/nothing").status_code == 404
    assert server.loads == []
    server.chat("a")
    server.chat("b")
    assert server.http.get("/v1/models").json()["data"][0]["max_model_len"] == 128
    assert [entry["name"] for entry in server.http.get("/api/ps").json()["models"]] == ["a", "b"]
    metrics = server.http.get("/metrics").text
    assert metrics.count("# HELP sglang:num_running_reqs ") == 1
    samples = [line.rpartition(" ")[0] for line in metrics.splitlines() if not line.startswith("#")]
    assert len(samples) == len(set(samples)), "Prometheus refuses a sample that comes twice"
    assert "mooli:num_open_reqs 0.0" in metrics.splitlines()
    for line in (
        'sglang:http_requests_total{endpoint="/v1/chat/completions",method="POST"} 2.0',
        'sglang:http_responses_total{endpoint="/v1/chat/completions",method="POST",status_code="200"} 2.0',
        'sglang:http_responses_total{endpoint="unmatched",method="GET",status_code="404"} 1.0',
        "sglang:http_requests_active 0.0",
    ):
        assert line in metrics.splitlines(), "requests are counted once, whichever model answers them"
    assert {'model_name="a"', 'model_name="b"'} <= set(metrics.replace("{", ",").replace("}", ",").split(","))
    anthropic = server.http.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert [card["id"] for card in anthropic["data"]] == ["a", "b"]


def test_without_a_key_nothing_is_loaded_nor_read(several):
    server = several("a", api_key="secret")
    with httpx.Client(base_url=server.url, timeout=60) as stranger:
        assert stranger.post("/v1/chat/completions", json={"model": "a", "messages": []}).status_code == 401
        assert stranger.get("/v1/models").status_code == 401
        assert stranger.get("/health").status_code == 200
    assert server.loads == []
    assert content(server.chat("a")) == "I am a."


def test_the_idlest_makes_room_and_what_cannot_be_loaded_says_why(several):
    server = several("a", "b", "broken", room=1)
    server.fails["broken"] = CheckpointError("a file of it is cut off")
    assert content(server.chat("a")) == "I am a."
    assert content(server.chat("b")) == "I am b."
    assert not server.engines["a"].is_alive
    answer = server.chat("broken")
    assert answer.status_code == 503 and "a file of it is cut off" in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "model_not_loaded"
    assert content(server.chat("b")) == "I am b."
    assert server.loads == ["a", "b", "b", "broken"]


def test_a_model_in_use_is_not_ended_for_another(several):
    server = several("a", "b", room=1)
    gate = threading.Event()
    first = threading.Event()

    async def hold():
        async with server.served.models.lease("a"):
            first.set()
            while not gate.is_set():
                await asyncio.sleep(0.005)

    held = asyncio.run_coroutine_threadsafe(hold(), server.loop)
    assert first.wait(60)
    answer = server.chat("b")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "models_in_use"
    assert "a are in use" in answer.json()["error"]["message"] and "retry-after" in answer.headers
    gate.set()
    held.result(60)
    assert content(server.chat("b")) == "I am b."


def test_an_engine_that_dies_is_loaded_again_and_the_server_stays(several):
    server = several("a")
    assert content(server.chat("a")) == "I am a."
    server.loop.call_soon_threadsafe(server.engines["a"].kill, "planted")
    deadline = time.monotonic() + 60
    while server.engines["a"].is_alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert content(server.chat("a")) == "I am a."
    assert server.loads == ["a", "a"]


def test_idle_models_are_ended(several):
    server = several("a", model_idle_timeout=0.05)
    assert content(server.chat("a")) == "I am a."
    deadline = time.monotonic() + 60
    while server.engines["a"].is_alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.engines["a"].is_alive
    assert content(server.chat("a")) == "I am a."


def test_who_watches_a_model_neither_loads_it_nor_keeps_it(several):
    server = several("a", "b", room=1)
    for path in ("/v1/cache/tree", "/v1/status", "/v1/cache/events"):
        refused = server.http.get(f"{path}?model=a")
        assert refused.status_code == 503
        assert "'a' is not loaded" in refused.json()["error"]["message"]
    assert server.loads == []
    assert content(server.chat("a")) == "I am a."
    with server.http.stream("GET", "/v1/cache/events?model=a") as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))
        assert json.loads(next(lines)[6:])["type"] == "hello"
        assert server.http.get("/v1/cache/tree?model=a").json()["nodes"]
        assert content(server.chat("b")) == "I am b."
        assert [json.loads(line[6:])["type"] for line in lines][-1] == "closed"
    assert server.http.get("/v1/status?model=b").json()["model"] == "b"
    assert set(server.loads) == {"a", "b"}


def test_draining_takes_no_new_work_and_ends_all_engines(several):
    server = several("a", "b")
    server.chat("a")
    server.chat("b")
    assert server.stop() == 0
    assert not any(engine.is_alive for engine in server.engines.values())


def test_models_are_named_by_a_list_or_by_a_folder(tmp_path):
    config = EngineConfig.from_kwargs(model_path="demo", dtype="float32")
    named = named_models(" demo , Qwen/Qwen3-0.6B,", config)
    assert named_models("qwen2.5:0.5b,small=smollm2:135m", config)["qwen2.5:0.5b"].model_path == "qwen2.5:0.5b"
    assert {name: one.model_path for name, one in named.items()} == {
        "demo": "demo",
        "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B",
    }
    assert all((one.served_model_name or one.model_path) == name for name, one in named.items())
    assert all(one.dtype == "float32" for one in named.values())
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    assert list(named_models(str(tmp_path), config)) == ["folder", "m"]
    assert {name: one.model_path for name, one in named_models("a=demo, b = demo", config).items()} == {
        "a": "demo",
        "b": "demo",
    }
    for nothing in ("", ",", str(tmp_path / "folder"), "a=demo,a=x", "=demo", "a="):
        with pytest.raises(ConfigError, match="--models"):
            named_models(nothing, config)


@pytest.mark.parametrize("fields", [{"batch_dir": "x"}, {"enable_response_store": True}])
def test_what_belongs_to_one_model_is_refused_beside_several(fields):
    with pytest.raises(ConfigError, match="kept for one model"):
        ServerConfig.from_kwargs(models="a,b", **fields)
    with pytest.raises(ConfigError, match="is for several models"):
        ServerConfig.from_kwargs(max_loaded_models=2)
