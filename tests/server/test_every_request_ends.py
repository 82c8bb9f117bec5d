"""Whatever raises while a request is served: it ends once, its client is told, and nobody else notices."""

from __future__ import annotations

import json

import pytest
from fake_engine import says
from gate import wait_until

from mooli.frontend.generation import Generation
from mooli.server.logs import RequestLog
from mooli.server.metrics import Metrics

GREEDY = {"temperature": 0, "max_new_tokens": 20}


class Panic(BaseException):
    """What a panic inside a library that is written in Rust is raised as: no Exception."""


@pytest.fixture(params=[RuntimeError, Panic])
def unlucky(request, monkeypatch):
    """From the second token on, the text of every prompt that begins with "!" cannot be made."""
    update = Generation.update

    def failing(self, output):
        if chr(self.request.prompt_ids[0]) == "!" and self.output_ids:
            raise request.param("what no client may read")
        return update(self, output)

    monkeypatch.setattr(Generation, "update", failing)


def is_balanced(server):
    wait_until(lambda: not server.service.num_active)
    wait_until(lambda: not server.core.has_work)
    stats = server.core.stats()
    assert (stats["running"], stats["waiting"], stats["used_pages"]) == (0, 0, 0)
    assert (server.service.num_active, server.service.client.num_open) == (0, 0)
    return True


BODIES = {
    "/generate": {"text": "!>", "sampling_params": GREEDY},
    "/v1/completions": {"model": "fake", "prompt": "!>", "temperature": 0},
}


@pytest.mark.usefixtures("unlucky")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_text_that_cannot_be_made_ends_its_request_and_no_other(live, path, stream, caplog):
    server = live(says("hello"))
    for _ in range(3):
        reply = server.http.post(path, json={**BODIES[path], "stream": stream})
        # A stream has begun with 200 if its first piece was on the way before.
        assert reply.status_code == 500 or (stream and reply.status_code == 200)
        assert "its text could not be made" in reply.text
        assert "no client may read" not in reply.text
    good = server.http.post("/generate", json={"text": "say>", "sampling_params": GREEDY})
    assert good.json()["text"] == "hello"
    assert is_balanced(server)
    told = [record for record in caplog.records if "its text cannot be made" in record.message]
    assert len(told) == 3
    assert sum(record.exc_info is not None for record in told) == 1


@pytest.mark.usefixtures("unlucky")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_in_a_batch_the_others_get_their_answers(live, stream):
    server = live(says("hello"))
    body = {"text": ["a>", "!>", "b>"], "sampling_params": GREEDY, "stream": stream}
    reply = server.http.post("/generate", json=body)
    if stream:
        pieces = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n")[:-2]]
        last = {piece["index"]: piece for piece in pieces}
        answers = [last[index] for index in range(3)]
    else:
        answers = reply.json()
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["stop", "error", "stop"]
    assert [answers[0]["text"], answers[2]["text"]] == ["hello", "hello"]
    assert is_balanced(server)


@pytest.mark.parametrize("name", ["received", "first_token", "next_tokens", "finished", "step"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_metrics_that_fail_harm_no_request_and_say_so_once(live, monkeypatch, caplog, name, stream):
    def fails(*args, **kwargs):
        raise ZeroDivisionError("a bug in the metrics")

    monkeypatch.setattr(Metrics, name, fails)
    check_unharmed(live(says("hello")), stream, caplog)


@pytest.mark.parametrize("name", ["started", "finished"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_request_log_that_fails_harms_no_request_and_says_so_once(live, monkeypatch, caplog, name, stream):
    def fails(*args, **kwargs):
        raise ZeroDivisionError("a bug in the log")

    monkeypatch.setattr(RequestLog, name, fails)
    check_unharmed(live(says("hello"), log_requests=True), stream, caplog)


def check_unharmed(server, stream, caplog):
    for _ in range(3):
        reply = server.http.post("/generate", json={"text": "say>", "sampling_params": GREEDY, "stream": stream})
        assert reply.status_code == 200
        assert '"text":"hello"' in reply.text
    assert is_balanced(server)
    assert sum(record.exc_info is not None for record in caplog.records) == 1
