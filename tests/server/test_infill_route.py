"""POST /infill, as editors send it to llama.cpp's server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fake_engine import says
from live import LiveServer

from mooli.frontend.infill import Infill

BODY = {"input_prefix": "a\n", "input_suffix": "z", "prompt": "b", "n_predict": 20, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """For tests that leave nothing behind."""
    made = LiveServer(says("mid\x04more", after="\x03"))
    made.service.infill = Infill(1, 2, 3, False, 5, 6, frozenset({1, 2, 3, 4, 5, 6}), frozenset())
    yield made
    made.stop()


def test_the_middle_is_told_with_how_long_it_took(server):
    answer = server.http.post("/infill", json=BODY).json()
    timings = answer.pop("timings")
    assert answer == {
        "index": 0, "content": "mid", "tokens": [], "id_slot": -1, "stop": True, "model": "fake",
        "tokens_predicted": 4, "tokens_evaluated": 7, "tokens_cached": 11, "truncated": False, "stop_type": "eos",
        "stopping_word": "",
    }  # fmt: skip
    assert timings["cache_n"] + timings["prompt_n"] == 7 and timings["predicted_n"] == 4
    assert min(timings["prompt_ms"], timings["predicted_ms"], timings["predicted_per_second"]) > 0


def test_a_stream_ends_with_the_same(server):
    reply = server.http.post("/infill", json={**BODY, "stream": True, "stop": ["d"]})
    events = [json.loads(line.removeprefix("data: ")) for line in reply.text.splitlines() if line]
    assert "".join(event["content"] for event in events) == "mi"
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert (events[-1]["stop_type"], events[-1]["stopping_word"]) == ("word", "d")


def test_an_editor_asks_for_the_fields_it_reads_and_warms_the_cache(server):
    """As llama.vim does: its ring of other texts goes ahead of the prompt, with nothing to predict."""
    extra = [{"filename": "m.py", "text": "one"}, {"text": "two"}]
    sent = {**BODY, "input_extra": extra, "samplers": ["top_k", "infill"], "cache_prompt": True, "t_max_predict_ms": 1}
    warm = {**sent, "n_predict": 0, "response_fields": [""]}
    assert server.http.post("/infill", json=warm).json() == {}
    fields = ["content", "timings/prompt_n", "timings/cache_n", "truncated", "tokens_evaluated", "none/there"]
    answer = server.http.post("/infill", json={**sent, "n_predict": -1, "response_fields": fields}).json()
    assert list(answer) == fields[:-1]
    assert answer["content"] == "mid" and answer["timings/cache_n"] > 0
    texts = ["repository\n", "m.py\none\n", "file\ntwo\n", "middle\n", "a\nb", "z"]
    assert answer["tokens_evaluated"] == sum(map(len, texts)) + 7


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"input_prefix": "x" * 300}, "maximum context length is 128 tokens"),
        ({"input_prefix": 1}, "input_prefix"),
        ({"input_extra": ["x"]}, "input_extra[0]"),
        ({"stop": [""]}, "stop has a string of 0 characters"),
    ],
)
def test_what_is_wrong_is_named(server, fields, words):
    reply = server.http.post("/infill", json={**BODY, **fields})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text


def test_a_model_that_does_not_fill_in_says_so(live):
    reply = live(says("x")).http.post("/infill", json=BODY)
    assert reply.status_code == 400
    assert (
        "not supported by this model: its vocabulary has no tokens for filling in" in reply.json()["error"]["message"]
    )
