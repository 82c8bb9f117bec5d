"""Clients that leave: what they asked for ends at the next step, and what was computed of it stays in the cache."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time

import pytest
from route_server import Connection, json_request

PROMPT = "the quick brown fox jumps over the lazy dog"
ENDLESS = {"max_new_tokens": 500, "ignore_eos": True, "temperature": 0}
LONG = {"engine": {"context_length": 600}}

MESSAGES = [{"role": "user", "content": PROMPT}]
BODIES = [
    ("/generate", {"text": PROMPT, "sampling_params": ENDLESS}),
    ("/generate", {"text": [PROMPT, "two"], "sampling_params": {**ENDLESS, "n": 2, "max_new_tokens": 140}}),
    ("/v1/completions", {"model": "m", "prompt": PROMPT, "max_tokens": 500, "ignore_eos": True}),
    ("/v1/chat/completions", {"model": "m", "messages": MESSAGES, "max_tokens": 500, "ignore_eos": True}),
    ("/v1/messages", {"model": "m", "messages": MESSAGES, "max_tokens": 500}),
    ("/v1/responses", {"input": PROMPT, "max_output_tokens": 500}),
]


def says_x(context: list[int]) -> int:
    """So slowly that no answer here ends by itself before a test has looked at it, on the slowest machine."""
    time.sleep(0.05)
    return ord("x")


class Hurry:
    """Says x as slowly until it is told to hurry."""

    def __init__(self) -> None:
        self._is_told = threading.Event()

    def __call__(self, context: list[int]) -> int:
        self._is_told.wait(0.05)
        return ord("x")

    def now(self) -> None:
        self._is_told.set()


def request(path: str, body: dict) -> bytes:
    return json_request(path, json.dumps(body).encode())


def stats(server) -> dict:
    """Of the engine, between two steps."""
    asked = asyncio.run_coroutine_threadsafe(server.service.client.ask("stats", 120), server.loop)
    return asked.result(120)


def wait_until_running(server, count: int) -> None:
    while stats(server)["running"] < count:
        time.sleep(0.005)


def wait_until_idle(server) -> None:
    while server.service.num_active or server.service.client.num_open or any(_open(server)):
        time.sleep(0.005)
    server.core.check()


def _open(server) -> tuple[int, int]:
    found = stats(server)
    return found["running"], found["waiting"]


def connect(server) -> Connection:
    return Connection(server.http_server.port)


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_running_request_ends_with_its_client(live, path, body, stream):
    server = live(says_x, **LONG)
    with connect(server) as client:
        client.send(request(path, {**body, "stream": stream}))
        if stream:
            client.read_until(b"\n\n")
        wait_until_running(server, 1)
    wait_until_idle(server)
    assert server.http.get("/health_generate").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_computed_stays_in_the_cache(live, stream):
    server = live(says_x, **LONG)
    with connect(server) as client:
        client.send(request("/generate", {"text": PROMPT, "sampling_params": ENDLESS, "stream": stream}))
        wait_until_running(server, 1)
    wait_until_idle(server)
    again = {"text": PROMPT + "x", "sampling_params": {**ENDLESS, "max_new_tokens": 1}}
    assert server.http.post("/generate", json=again).json()["meta_info"]["cached_tokens"] >= len(PROMPT) - 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_waiting_request_ends_with_its_client(live, stream):
    server = live(says_x, engine={"context_length": 600, "max_running_requests": 1})
    with connect(server) as first, connect(server) as second:
        first.send(request("/generate", {"text": "one", "sampling_params": ENDLESS, "stream": True}))
        wait_until_running(server, 1)
        second.send(request("/generate", {"text": "two", "sampling_params": ENDLESS, "stream": stream}))
        while not stats(server)["waiting"]:
            time.sleep(0.005)
        second.close()
        while stats(server)["waiting"]:
            time.sleep(0.005)
        assert stats(server)["running"] == 1
    wait_until_idle(server)


def test_others_go_on_when_a_client_leaves(live):
    hurry = Hurry()
    server = live(hurry, **LONG)
    answers = []
    body = {"text": "stays", "sampling_params": {**ENDLESS, "max_new_tokens": 300}}
    staying = threading.Thread(target=lambda: answers.append(server.http.post("/generate", json=body).json()))
    staying.start()
    with connect(server) as client:
        client.send(request("/generate", {"text": "leaves", "sampling_params": ENDLESS, "stream": True}))
        wait_until_running(server, 2)
    hurry.now()
    staying.join(60)
    assert answers[0]["text"] == "x" * 300
    wait_until_idle(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_over_its_time_ends(live, stream):
    server = live(says_x, request_timeout=2, **LONG)
    answer = server.http.post("/generate", json={"text": "a", "sampling_params": ENDLESS, "stream": stream})
    assert answer.status_code == (200 if stream else 504)
    assert "longer than 2 s" in answer.text
    wait_until_idle(server)


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/generate", {"text": "a", "sampling_params": ENDLESS}, "data: [DONE]\n\n"),
        ("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 500, "ignore_eos": True}, "data: [DONE]\n\n"),
        ("/v1/messages", {"model": "m", "messages": MESSAGES, "max_tokens": 500}, "}}\n\n"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 500}, "}}\n\n"),
    ],
)
def test_a_stream_is_told_that_the_engine_died(live, path, body, last):
    server = live(says_x, **LONG)
    text = ""
    with server.http.stream("POST", path, json={**body, "stream": True}) as answer:
        for piece in answer.iter_text():
            if not text:
                server.engine_process.kill()
            text += piece
    assert '"error":{' in text and "engine" in text and text.endswith(last)


def test_many_clients_that_leave_at_any_moment_leave_nothing_behind(live):
    """Whole and half requests, streams and not, of every route, left before, in or behind the answer."""
    server = live(lambda context: ord("x"), engine={"context_length": 200, "max_running_requests": 4})
    chances = random.Random(7)

    def leave_again_and_again(seed: int) -> None:
        chances = random.Random(seed)
        for _ in range(25):
            path, body = chances.choice(BODIES)
            limit = "max_new_tokens" if path == "/generate" else "max_tokens"
            body = {**body, "stream": chances.random() < 0.5, limit: 60}
            if path == "/generate":
                body["sampling_params"] = {"max_new_tokens": chances.choice([1, 20, 60])}
            data = request(path, body)
            with connect(server) as client, contextlib.suppress(OSError):
                client.send(data if chances.random() < 0.8 else data[: chances.randrange(len(data))])
                client.socket.settimeout(chances.choice([0.001, 0.01, 0.05]))
                for _ in range(chances.randrange(3)):
                    client.socket.recv(chances.choice([1, 100, 10_000]))

    threads = [threading.Thread(target=leave_again_and_again, args=(chances.random(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    wait_until_idle(server)
    answer = server.http.post("/generate", json={"text": PROMPT, "sampling_params": {"max_new_tokens": 3}})
    assert answer.json()["text"] == "xxx"
    assert server.http.post("/flush_cache", headers={"X-Mooli": "1"}).status_code == 200
    assert stats(server)["used_pages"] == 0
