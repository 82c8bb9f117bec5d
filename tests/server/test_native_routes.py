"""Native routes beside /generate: who is served, how busy it is, health, cache, aborts, tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import CONTEXT, NUM_PAGES, PAGE_SIZE, VOCAB_SIZE, says
from gate import Gate, wait_until
from live import LiveServer

from mooli.server import native_control
from mooli.server.routing import Reply
from mooli.version import __version__

FOREVER = {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True}
PROBES = ("/health", "/health/live", "/health/ready", "/ready", "/health_generate", "/ping")


@pytest.fixture(scope="module")
def greeter():
    """One server for questions that change nothing."""
    server = LiveServer(says("hello"))
    yield server
    server.stop()


def events_of(reply):
    """The JSON of each event of a stream that is being read."""
    for line in reply.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def stream(server, **body):
    body = {"text": "a>", "sampling_params": FOREVER, "stream": True, **body}
    return server.http.stream("POST", "/generate", json=body)


@dataclass
class Streaming:
    """A server in the middle of a stream: `first` of its events has come, `events` are the others. `gate` holds the
    engine before each step."""

    server: LiveServer
    gate: Gate
    first: dict[str, Any]
    events: Iterator[dict[str, Any]]


@pytest.fixture
def streaming(live):
    """`with streaming(settings, **body) as run:` a stream is open, of a server with these settings."""

    @contextlib.contextmanager
    def start(settings=None, **body):
        with Gate() as gate:
            server = live(says("x" * 100), runner={"raises": gate}, **(settings or {}))
            gate.let()
            with stream(server, **body) as reply:
                events = events_of(reply)
                yield Streaming(server, gate, next(events), events)

    return start


# -- who is served -----------------------------------------------------------------------------------------------------
def test_the_root_says_that_the_server_runs(greeter):
    reply = greeter.http.get("/")
    assert (reply.status_code, reply.text) == (200, "Mooli is running")


def test_model_info_has_an_older_name(live):
    server = live(engine={"served_model_name": "radish"})
    info = server.http.get("/model_info").json()
    assert info == server.http.get("/get_model_info").json()
    assert (info["model_path"], info["tokenizer_path"], info["served_model_name"]) == ("fake", "fake", "radish")
    assert (info["is_generation"], info["architectures"], info["max_model_len"]) == (True, ["Fake"], CONTEXT)


def test_server_info_has_arguments_facts_and_counters(live):
    server = live(says("hello"), engine={"schedule_policy": "lpm"})
    server.http.post("/generate", json={"text": "say>"})
    info = server.http.get("/server_info").json()
    assert (info["version"], info["model_path"], info["schedule_policy"]) == (__version__, "fake", "lpm")
    assert info["max_total_num_tokens"] == NUM_PAGES * PAGE_SIZE
    assert {"launch_command", "startup_time", "host", "max_queued_requests"} <= set(info)
    (state,) = info["internal_states"]
    assert state["memory_usage"]["token_capacity"] == NUM_PAGES * PAGE_SIZE
    assert state["effective_max_running_requests_per_dp"] == 8
    assert state["last_gen_throughput"] >= 0
    assert (state["finished"], state["generated_tokens"], state["running"]) == (1, 6, 0)
    assert set(server.http.get("/get_server_info").json()) == set(info)


def test_server_info_never_shows_a_key(live):
    server = live(api_key="key-of-users", admin_api_key="key-of-admins")
    assert "key-of" not in server.http.get("/server_info").text


# -- how busy ----------------------------------------------------------------------------------------------------------
def test_loads_show_what_runs_and_what_waits(live):
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate}, engine={"max_running_requests": 1})
        gate.let(2)
        with stream(server, text=["0123456789>", "b>"]) as reply:
            events = events_of(reply)
            while next(events)["meta_info"]["completion_tokens"] < 2:
                pass
            loads = server.http.get("/v1/loads").json()  # the engine hangs in a step: the numbers are the last ones
            by_rank = server.http.get("/get_load").json()
        gate.open()
    (load,) = loads["loads"]
    assert (load["dp_rank"], load["num_running_reqs"], load["num_waiting_reqs"]) == (0, 1, 1)
    # pages of four: of the prompt and the first token, and of the next, which is taken a step early
    assert load["num_used_tokens"] == 16
    assert load["num_total_tokens"] == load["num_used_tokens"] + len("b>")
    assert load["token_usage"] == load["num_used_tokens"] / load["max_total_num_tokens"]
    assert load["utilization"] == 1.0
    assert by_rank == [{"dp_rank": 0, "num_reqs": 2, "num_waiting_reqs": 1, "num_tokens": load["num_total_tokens"]}]
    assert load["queues"]["waiting"] == 1
    assert load["memory"]["token_capacity"] == NUM_PAGES * PAGE_SIZE
    assert (load["spec"], load["lora"], load["disagg"]) == (None, None, None)
    assert (loads["version"], loads["accelerator"], loads["num_accelerators"]) == (__version__, "cpu", 1)


def test_a_server_that_guesses_tokens_says_how_they_fared(live):
    server = live(says("ab" * 20), engine={"speculative_algorithm": "NGRAM"})
    body = {"text": "x>", "sampling_params": {"temperature": 0, "max_new_tokens": 60}}
    meta = server.http.post("/generate", json=body).json()["meta_info"]
    assert meta["spec_accept_length"] > 1 and meta["spec_verify_ct"] < 20
    (state,) = server.http.get("/server_info").json()["internal_states"]
    (load,) = server.http.get("/v1/loads").json()["loads"]
    assert state["avg_spec_accept_length"] == load["spec"]["accept_length"] > 1
    assert load["spec"]["accept_rate"] == meta["spec_accept_rate"]


def test_nothing_is_used_when_nothing_runs(live):
    server = live(says("hello"))
    for text in ("a>", "ab>", "a>"):
        server.http.post("/generate", json={"text": text})
    (load,) = server.http.get("/v1/loads").json()["loads"]
    assert load["num_used_tokens"] == load["num_total_tokens"] == load["num_running_reqs"] == load["token_usage"] == 0
    assert load["cache_hit_rate"] == pytest.approx(2 / 7)


@pytest.mark.parametrize(
    ("include", "sections"),
    [
        ("core", set()),
        ("memory", {"memory"}),
        ("core,queues", {"queues"}),
        ("all", {"memory", "spec", "lora", "disagg", "queues"}),
    ],
)
def test_loads_have_the_sections_asked_for(greeter, include, sections):
    (load,) = greeter.http.get("/v1/loads", params={"include": include}).json()["loads"]
    assert set(load) & {"memory", "spec", "lora", "disagg", "queues"} == sections
    assert ("num_running_reqs" in load) == ("core" in include or include == "all")


def test_loads_can_be_written_for_prometheus(greeter):
    parser = pytest.importorskip("prometheus_client.parser")
    reply = greeter.http.get("/v1/loads", params={"format": "prometheus", "dp_rank": "0"})
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in parser.text_string_to_metric_families(reply.text)}
    (sample,) = families["sglang:max_total_num_tokens"].samples
    assert (sample.labels, sample.value) == ({"dp_rank": "0"}, NUM_PAGES * PAGE_SIZE)


@pytest.mark.parametrize("query", ["include=cores", "format=xml", "dp_rank=1"])
def test_loads_refuse_what_there_is_not(greeter, query):
    reply = greeter.http.get(f"/v1/loads?{query}")
    assert reply.status_code == 400
    assert query.split("=")[0] in reply.json()["error"]["message"]


# -- health ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PROBES)
def test_a_healthy_server_says_nothing(greeter, path):
    reply = greeter.http.get(path)
    assert (reply.status_code, reply.content) == (200, b"")


def test_health_checks_need_no_key_but_ping_does(live):
    server = live(api_key="secret")
    without_key = {"headers": {"Authorization": ""}}
    assert {server.http.get(path, **without_key).status_code for path in PROBES if path != "/ping"} == {200}
    assert server.http.get("/ping", **without_key).status_code == 401
    assert server.http.get("/ping").status_code == 200


def test_health_checks_are_not_counted(live):
    server = live(says("hello"))
    before = server.http.get("/metrics").text
    for path in PROBES[:-1]:
        server.http.get(path)
    after = server.http.get("/metrics").text
    assert lines_of(after, "num_requests", "generation_tokens", "prompt_tokens") == lines_of(
        before, "num_requests", "generation_tokens", "prompt_tokens"
    )


def lines_of(metrics, *names):
    lines = [line for line in metrics.splitlines() if line.startswith(tuple(f"sglang:{name}_total" for name in names))]
    assert lines
    return lines


def test_a_busy_engine_is_healthy(streaming):
    """It answers nothing in the middle of a long step."""
    with streaming() as run:
        assert [run.server.http.get(path).status_code for path in PROBES[:4]] == [200] * 4


def test_an_engine_that_is_silent_for_too_long_is_not_healthy(streaming):
    with streaming() as run:
        run.server.service.client.last_sign_s -= run.server.config.watchdog_timeout + 5
        for path in PROBES:
            reply = run.server.http.get(path)
            assert reply.status_code == 503
            assert "no sign" in reply.text


def test_any_sign_of_the_engine_shows_that_it_generates(streaming):
    with streaming() as run:
        answers = []
        probe = threading.Thread(target=lambda: answers.append(run.server.http.get("/health_generate").status_code))
        probe.start()
        wait_until(lambda: run.server.service.client.num_open == 2)
        run.gate.let()  # of the stream: the probe's request waits for the next step
        probe.join()
    assert answers == [200]


def test_an_engine_that_does_not_generate_is_not_healthy(live, monkeypatch):
    monkeypatch.setattr(native_control, "GENERATE_LIMIT_S", 0.2)
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate})
        reply = server.http.get("/health_generate")
        assert reply.status_code == 503
        assert "within 0.2 s" in reply.text
        gate.open()
        wait_until(lambda: not server.service.client.num_open)


def test_an_engine_that_fails_at_every_step_is_not_healthy(live):
    reply = live(runner={"raises": lambda batch: ValueError("planted")}).http.get("/health_generate")
    assert reply.status_code == 503
    assert "planted" in reply.text


def test_a_health_check_leaves_nothing_behind(live):
    server = live(says("hello"))
    server.http.get("/health_generate")
    assert not server.service.client.num_open
    server.core.check()


def test_a_dead_engine_is_not_healthy(live):
    server = live()
    server.engine_process.kill()
    wait_until(lambda: server.service.client.error)
    for path in PROBES:
        reply = server.http.get(path)
        assert reply.status_code == 503
        assert "engine process" in reply.text


def test_a_server_that_drains_is_alive_but_takes_nothing(streaming):
    with streaming() as run:
        run.server.service.is_draining = True
        assert run.server.http.get("/health/live").status_code == 200
        for path in ("/health", "/ready", "/health/ready", "/health_generate"):
            reply = run.server.http.get(path)
            assert (reply.status_code, reply.text) == (503, "the server is shutting down\n")
        run.server.service.is_draining = False


def test_a_full_queue_is_not_ready_but_healthy(streaming):
    settings = {"engine": {"max_running_requests": 1}, "max_queued_requests": 1}
    with streaming(settings, text=["a>", "b>"]) as run:
        http = run.server.http
        assert "full" in http.get("/ready").text
        assert http.get("/ready").status_code == http.get("/health/ready").status_code == 503
        assert http.get("/health").status_code == http.get("/health_generate").status_code == 200


# -- the cache ---------------------------------------------------------------------------------------------------------
def cached_tokens(server, text="0123456789>"):
    body = {"text": text, "sampling_params": {"max_new_tokens": 1}}
    return server.http.post("/generate", json=body).json()["meta_info"]["cached_tokens"]


NO_PAGE = {"headers": {"X-Mooli": "1"}}


@pytest.mark.parametrize(
    ("method", "server_arguments", "request_arguments"),
    [
        ("GET", {"api_key": "key"}, {}),
        ("POST", {"api_key": "key"}, {}),
        ("POST", {"api_key": "key"}, {"data": {"form": 1}}),
        ("POST", {}, NO_PAGE),
        ("POST", {}, {"json": {}}),
    ],
)
def test_flush_cache_forgets_prefixes(live, method, server_arguments, request_arguments):
    server = live(**server_arguments)
    cached_tokens(server)
    assert cached_tokens(server) == 10
    reply = server.http.request(method, "/flush_cache", **request_arguments)
    assert reply.status_code == 200
    assert reply.text.startswith("Cache flushed.")
    assert cached_tokens(server) == 0
    assert server.core.stats()["tree_pages"] == 3


def test_flush_cache_refuses_while_something_runs(streaming):
    with streaming() as run, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(run.server.http.post, "/flush_cache", **NO_PAGE)

        def is_answered_after_a_step() -> bool:
            run.gate.let()  # the engine answers between two steps
            return asked.done()

        wait_until(is_answered_after_a_step)
        answer = asked.result()
        assert answer.status_code == 400
        assert "not flushed" in answer.text


def test_flush_cache_can_wait_until_nothing_runs(streaming):
    with streaming() as run:
        flushed = []
        http = run.server.http
        waiter = threading.Thread(target=lambda: flushed.append(http.post("/flush_cache?timeout=30", **NO_PAGE).text))
        waiter.start()
        run.gate.open()
        assert list(run.events)[-1]["meta_info"]["finish_reason"]["type"] == "length"
        waiter.join()
    assert flushed[0].startswith("Cache flushed.")


@pytest.mark.parametrize("timeout", ["-1", "soon", "nan", "inf", "600.5", "1e300"])
def test_flush_cache_refuses_a_timeout_that_is_none_or_too_long(greeter, timeout):
    reply = greeter.http.post("/flush_cache", params={"timeout": timeout}, **NO_PAGE)
    assert reply.status_code == 400
    assert "no number of seconds from 0 to 600" in reply.json()["error"]["message"]


def test_however_many_wait_for_a_flush_the_engine_is_asked_as_often(greeter, monkeypatch):
    """Each of three waits three times as long between two questions."""
    waits, asked, clock = [], [], [0.0]

    async def ask(service, question) -> bool:
        asked.append(question)
        await real_sleep(0)
        return len(asked) > 9

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real_sleep(0)

    async def three() -> list[Reply]:
        request = SimpleNamespace(query={"timeout": "60"})
        return await asyncio.gather(*(native_control.flush_cache(greeter.service, request) for _ in range(3)))

    real_sleep = asyncio.sleep
    monkeypatch.setattr(native_control, "ask", ask)
    monkeypatch.setattr(native_control, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(native_control, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    assert [reply.status for reply in asyncio.run(three())] == [200] * 3
    assert waits == pytest.approx([0.15] * 9)
    assert greeter.service.num_flushing == 0


# -- aborts ------------------------------------------------------------------------------------------------------------
def run_and_abort(streaming, abort, **body):
    """What became of each request of a call that was aborted after its first token: rid to finish_reason."""
    with streaming(**body) as run:
        answer = run.server.http.post("/abort_request", json=abort)
        run.gate.open()
        ends = {event["meta_info"]["id"]: event for event in [run.first, *run.events]}
    assert answer.status_code == 200, answer.text
    assert run.server.core.stats()["used_pages"] == 0
    return {rid: event["meta_info"]["finish_reason"] for rid, event in ends.items()}


@pytest.mark.parametrize("abort", [{"rid": "mine"}, {"rid": ["other", "mine"]}, {"abort_all": True}])
def test_an_aborted_request_ends_with_abort(streaming, abort):
    finish = run_and_abort(streaming, abort, rid="mine")["mine"]
    assert finish["type"] == "abort"
    assert "/abort_request" in finish["message"]
    assert finish["status_code"] is None


@pytest.mark.parametrize(
    ("rid", "aborted"),
    [
        ("mine", {"mine_0_0", "mine_0_1", "mine_1_0", "mine_1_1"}),
        ("mine_1", {"mine_1_0", "mine_1_1"}),
        ("mine_1_0", {"mine_1_0"}),
        ("min", set()),
        ("mine_", set()),
    ],
)
def test_the_id_of_a_call_ends_all_that_was_made_from_it(streaming, rid, aborted):
    ends = run_and_abort(
        streaming, {"rid": rid}, text=["a>", "b>"], rid="mine", sampling_params={**FOREVER, "n": 2, "max_new_tokens": 8}
    )
    assert len(ends) == 4
    assert {name for name, finish in ends.items() if finish["type"] == "abort"} == aborted


def test_an_abort_of_a_whole_answer_returns_what_there_is(live):
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate})
        answers = []
        body = {"text": "a>", "rid": "mine", "sampling_params": FOREVER}
        waiter = threading.Thread(target=lambda: answers.append(server.http.post("/generate", json=body)))
        waiter.start()
        gate.let(2)
        wait_until(lambda: server.service.last_stats and server.service.last_stats["steps"] == 2)
        server.http.post("/abort_request", json={"rid": "mine"})
        gate.open()
        waiter.join()
        assert answers[0].status_code == 200
        assert answers[0].json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert answers[0].json()["text"].startswith("xx")


def test_an_unknown_id_is_no_error(greeter):
    assert greeter.http.post("/abort_request", json={"rid": "nobody"}).status_code == 200


@pytest.mark.parametrize("body", [{}, {"rid": ""}, {"rid": None}, {"rid": 5}, {"abort_all": "yes"}, {"rid": []}])
def test_an_abort_of_nothing_is_refused(greeter, body):
    assert greeter.http.post("/abort_request", json=body).status_code == 400


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/flush_cache"), ("POST", "/flush_cache"), ("POST", "/abort_request")]
)
def test_what_changes_the_server_needs_the_admin_key(live, method, path):
    server = live(api_key="user", admin_api_key="admin")
    body = {"json": {"rid": "x"}} if path == "/abort_request" else {}
    for key, status in (("user", 401), ("admin", 200)):
        headers = {"Authorization": f"Bearer {key}"}
        assert server.http.request(method, path, headers=headers, **body).status_code == status


# -- tokens ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_tokenize_gives_ids_and_their_number(greeter, path):
    assert greeter.http.post(path, json={"prompt": "ab", "model": "any"}).json() == {
        "tokens": [97, 98],
        "count": 2,
        "max_model_len": CONTEXT,
    }
    assert greeter.http.post(path, json={"prompt": ["ab", ""]}).json() == {
        "tokens": [[97, 98], []],
        "count": [2, 0],
        "max_model_len": CONTEXT,
    }


def test_tokenize_reads_a_conversation_as_the_chat_route_does(live):
    server = live(says("ok", after="assistant: "))
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi <eos>"}]}]
    tokens = server.http.post("/tokenize", json={"messages": messages}).json()
    chat = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 5}).json()
    assert tokens["tokens"] == list(b"user: hi <eos>\nassistant: ")
    assert chat["usage"]["prompt_tokens"] == tokens["count"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt or messages"),
        ({"prompt": "a", "messages": []}, "not both"),
        ({"prompt": 5}, "prompt"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "role"),
        ({"messages": []}, "message"),
        ({"prompt": "a", "chat_template_kwargs": {"b": 1}}, "chat_template_kwargs belongs to messages"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt belongs to messages"),
        ({"prompt": ["a"], "continue_final_message": True}, "continue_final_message belongs to messages"),
        (
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            "add_special_tokens belongs to a prompt",
        ),
    ],
)
def test_tokenize_refuses_what_it_cannot_read(greeter, body, words):
    reply = greeter.http.post("/tokenize", json=body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_detokenize_gives_the_text(greeter, path):
    def text(**body):
        return greeter.http.post(path, json=body).json()["text"]

    assert text(tokens=[*"aé".encode(), 256]) == "aé"
    assert text(tokens=[97, 256], skip_special_tokens=False) == "a<eos>"
    assert text(tokens=[[97], [98, 99]]) == ["a", "bc"]
    assert text(tokens=[]) == ""
    assert text(tokens=[97] * 5000) == "a" * 5000


@pytest.mark.parametrize("tokens", [[VOCAB_SIZE], [-1], [2**70], [[1], 2], [1, [2]], "ab", [1.5], None])
def test_detokenize_refuses_what_is_no_id(greeter, tokens):
    reply = greeter.http.post("/detokenize", json={"tokens": tokens})
    assert reply.status_code == 400
    assert "tokens" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_without_a_tokenizer_there_is_nothing_to_tokenize(live, path):
    server = live(engine={"skip_tokenizer_init": True})
    reply = server.http.post(path, json={"prompt": "a", "tokens": [1]})
    assert reply.status_code == 400
    assert "tokenizer" in reply.json()["error"]["message"]


def test_long_texts_do_not_hold_up_the_others(greeter):
    """They are tokenised on another thread, and the ids are the same."""
    text = "añ" * 5000
    tokens = greeter.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert tokens == list(text.encode())
    assert greeter.http.post("/detokenize", json={"tokens": tokens}).json()["text"] == text
