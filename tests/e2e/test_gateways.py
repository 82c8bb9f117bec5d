"""SGLang's gateways in front of Mooli servers, as their packages are: smg and the older sglang-router."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from gateway_process import COMMANDS, GatewayProcess, grouped_trace, is_installed, servers, share_of_cached
from server_process import PATIENCE_S, ServerProcess, needs_demo, needs_proc, wait_until

pytestmark = [needs_demo, needs_proc, pytest.mark.whole_machine, pytest.mark.slow]

PICKER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "picker.yaml"

KEYS = {"gate": "sk-of-the-gateway", "ann": "sk-of-ann"}
KEYS_FILE = f"gate: {{key: {KEYS['gate']}, admin: true}}\nann: {{key: {KEYS['ann']}}}\n"


@pytest.fixture(scope="module")
def workers(tmp_path_factory) -> Iterator[list[ServerProcess]]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(KEYS_FILE)
    path.chmod(0o600)
    with servers(2, "--api-keys-file", str(path), "--random-seed", "1") as started:
        for worker in started:
            worker.http.headers["Authorization"] = f"Bearer {KEYS['gate']}"
        yield started


@pytest.fixture(scope="module", params=COMMANDS)
def package(request) -> str:
    if not is_installed(request.param):
        pytest.skip(f"{request.param} has no wheel for this platform, or is not installed (tests/requirements.txt)")
    return request.param


@pytest.fixture(scope="module")
def gateway(package, workers) -> Iterator[GatewayProcess]:
    """It follows the cache, and asks for a key."""
    with GatewayProcess(package, worker_urls=urls(workers), policy="cache_aware", api_key=KEYS["gate"]) as started:
        yield started


@pytest.fixture(scope="module")
def open_gateway(package, workers) -> Iterator[GatewayProcess]:
    """It takes turns, asks for no key, and is told of its workers while it runs."""
    with GatewayProcess(package, policy="round_robin") as started:
        for worker in workers:
            started.add(worker.url, api_key=KEYS["gate"])
        started.wait_for_workers(len(workers))
        yield started


def urls(workers: Sequence[ServerProcess]) -> list[str]:
    return [worker.url for worker in workers]


def num_answered(worker: ServerProcess, key: str = "gate") -> float:
    """Requests that a key's holder has had answered."""
    return metric(worker, f'mooli:key_requests_total{{key="{key}"}}')


def metric(worker: ServerProcess, sample: str) -> float:
    lines = worker.http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(sample))


def generate(http: httpx.Client, text: str, **params: Any) -> dict[str, Any]:
    answer = http.post("/generate", json={"text": text, "sampling_params": {"temperature": 0, **params}})
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- what a gateway finds out about a server ---------------------------------------------------------------------------
def test_servers_are_registered_as_http_workers_of_sglang(gateway, package, workers):
    found = {worker["url"]: worker for worker in gateway.workers()}
    assert set(found) == set(urls(workers))
    for worker in found.values():
        assert (worker["model_id"], worker["worker_type"], worker["is_healthy"]) == ("demo", "regular", True)
        assert worker["connection_mode"].lower() == "http"
        about = worker["labels"] if package == "smg" else worker["metadata"]
        assert (about["model_path"], about["tp_size"]) == ("demo", "1") and "LlamaForCausalLM" in about["architectures"]
        if package == "smg":
            assert worker["runtime_type"] == "sglang" and worker["status"] == "ready"
            assert (about["max_total_tokens"], about["context_length"]) == ("4096", "4096")
    assert [model["id"] for model in gateway.http.get("/v1/models").json()["data"]] == ["demo"]


def test_loads_of_all_workers_are_read(gateway, workers):
    def loads() -> bool:
        answer = gateway.http.get("/get_loads").json()
        shown = answer["loads"] if "loads" in answer else answer["workers"]
        # -1 and absence both mean that a worker has told nothing.
        return {load["worker"] for load in shown if load.get("load", 0) >= 0} == set(urls(workers))

    wait_until(loads, "both workers have told their load")


def test_gauges_that_an_endpoint_picker_reads_are_those_of_a_running_server(workers):
    """Names from the manifests; llm-d's picker divides its index into pages by them."""
    config = yaml.safe_load(PICKER.read_text(encoding="utf-8"))
    (extractor,) = [plugin for plugin in config["plugins"] if plugin["type"] == "core-metrics-extractor"]
    (engine,) = extractor["parameters"]["engineConfigs"]
    info = workers[0].http.get("/server_info").json()
    page_size, num_pages = (
        metric(workers[0], f"{engine[name]}{{") for name in ("cacheBlockSizeSpec", "cacheNumBlocksSpec")
    )
    assert page_size * num_pages == info["max_total_num_tokens"] and page_size == info["page_size"]
    busy = ("queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec")
    assert [metric(workers[0], f"{engine[name]}{{") for name in busy] == [0, 0, 0]


# -- answers -----------------------------------------------------------------------------------------------------------
GREEDY = {"temperature": 0, "max_new_tokens": 12}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "sampling_seed": 7, "max_new_tokens": 12}
CHAT = {"model": "demo", "max_tokens": 12, "temperature": 0}
REQUESTS = {
    "text": ("/generate", {"text": "The capital of France is", "sampling_params": GREEDY}),
    "seeded": ("/generate", {"text": "Once upon a time", "sampling_params": SAMPLED}),
    "ids": ("/generate", {"input_ids": [504, 3575, 282], "return_logprob": True, "sampling_params": GREEDY}),
    "chat": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "Name a fruit."}]}),
    "log-probabilities": (
        "/v1/chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 2},
    ),
    "regex": (
        "/v1/chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": "Two digits"}], "regex": "[0-9]{2} [a-z]{3}"},
    ),
    "completion": ("/v1/completions", {"model": "demo", "prompt": "One, two,", "max_tokens": 12, "temperature": 0}),
}


def substance(answer: dict[str, Any]) -> Any:
    """What the model said; ids, times and the state of the cache left out."""
    if "choices" in answer:
        return answer["choices"], answer["usage"]["completion_tokens"]
    meta = answer["meta_info"]
    return answer["text"], answer["output_ids"], meta["finish_reason"], meta.get("output_token_logprobs")


def streamed(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    """The same of a stream, put together. It has to end as streams do."""
    with http.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    if "text" in events[-1]:
        last = events[-1]
        return last["text"], last["output_ids"], last["meta_info"]["finish_reason"]
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
    return text, choices[-1]["finish_reason"]


@pytest.mark.parametrize("name", [name for name in REQUESTS if name != "regex"])
def test_an_answer_is_that_of_one_server(open_gateway, workers, name):
    path, body = REQUESTS[name]
    expected = substance(workers[0].http.post(path, json=body).json())
    before = [num_answered(worker) for worker in workers]
    replies = [open_gateway.http.post(path, json=body) for _ in workers]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert [substance(reply.json()) for reply in replies] == [expected, expected]
    assert [num_answered(worker) for worker in workers] == [count + 1 for count in before]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_stream_is_that_of_one_server(gateway, workers, name):
    path, body = REQUESTS[name]
    assert streamed(gateway.http, path, body) == streamed(workers[0].http, path, body)


def test_an_error_of_a_server_reaches_the_client_as_it_is(gateway, workers):
    body = {**CHAT, "messages": [{"role": "user", "content": "long " * 5000}]}
    direct = workers[0].http.post("/v1/chat/completions", json=body)
    answer = gateway.http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()) == (direct.status_code, direct.json())
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_prompts_with_one_head_go_where_it_is_cached(gateway, open_gateway, workers):
    """An odd number of groups, so that turns alone never bring a group back to its worker each time."""
    shares = {}
    trace = grouped_trace(5, 4, head_words=60)
    for name, through in (("turns", open_gateway), ("cache", gateway)):
        for worker in workers:
            assert worker.http.post("/flush_cache", headers={"X-Mooli": "1"}).status_code == 200
        metas = [generate(through.http, prompt.text, max_new_tokens=2)["meta_info"] for prompt in trace]
        shares[name] = share_of_cached(metas)
    assert shares["cache"] >= 1.25 * shares["turns"] > 0.25


# -- keys --------------------------------------------------------------------------------------------------------------
def test_a_gateway_with_a_key_asks_for_it_and_opens_its_workers(gateway, workers):
    body = {**CHAT, "messages": [{"role": "user", "content": "Hello"}]}
    for headers in ({}, {"Authorization": "Bearer sk-wrong"}):
        answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE_S)
        assert answer.status_code == 401
    assert gateway.http.post("/v1/chat/completions", json=body).status_code == 200
    kept = "This will be forgotten, and so will all else."
    assert [generate(worker.http, kept, max_new_tokens=1)["text"] != "" for worker in workers] == [True, True]
    flushed = gateway.http.post("/flush_cache")
    assert (flushed.status_code, flushed.json()["workers_flushed"]) == (200, len(workers)), flushed.text
    assert [generate(worker.http, kept)["meta_info"]["cached_tokens"] for worker in workers] == [0, 0]


def test_whose_key_counts_behind_a_gateway_without_one(open_gateway, package, workers):
    """smg hands on what a client sends as a bearer; sglang-router puts the worker's key in its place."""

    def all_answered(key: str) -> float:
        return sum(num_answered(worker, key) for worker in workers)

    before = {key: all_answered(key) for key in KEYS}
    body = {"text": "Who asks?", "sampling_params": {"max_new_tokens": 1}}
    for headers in ({"Authorization": f"Bearer {KEYS['ann']}"}, {}):
        assert open_gateway.http.post("/generate", json=body, headers=headers).status_code == 200
    new = {key: all_answered(key) - before[key] for key in KEYS}
    assert new == ({"ann": 1, "gate": 1} if package == "smg" else {"ann": 0, "gate": 2})


# -- a worker leaves ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def staying() -> Iterator[ServerProcess]:
    """The worker that is always there."""
    with servers(1) as (started,):
        yield started


@pytest.fixture
def leaving() -> Iterator[ServerProcess]:
    with servers(1) as (started,):
        yield started


def completion(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def completed(http: httpx.Client, prompt: str, max_tokens: int) -> str:
    answer = http.post("/v1/completions", json=completion(prompt, max_tokens))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


class Reader:
    """Reads a completion's stream on a thread of its own. cause: why it ended early, None if it is complete."""

    def __init__(self, http: httpx.Client, prompt: str, max_tokens: int) -> None:
        self.text = ""
        self.num_pieces = 0
        self.cause: str | None = "it has not ended"
        self._http = http
        self._body = {**completion(prompt, max_tokens), "stream": True}
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with self._http.stream("POST", "/v1/completions", json=self._body) as reply:
                if reply.status_code != 200:
                    self.cause = reply.read().decode()
                    return
                for line in reply.iter_lines():
                    self._take(line)
        except httpx.HTTPError as exc:
            self.cause = repr(exc)
        finally:
            self._has_begun.set()

    def _take(self, line: str) -> None:
        if not line.startswith("data: {"):
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.cause = event["error"]["message"]
            return
        (choice,) = event["choices"]
        self.text += choice["text"]
        self.num_pieces += 1
        if choice["finish_reason"] is not None:
            self.cause = None
        self._has_begun.set()

    def begun(self) -> Reader:
        """When the first piece of its text is there."""
        assert self._has_begun.wait(PATIENCE_S), "the stream has not begun"
        assert self.num_pieces, self.cause
        return self

    def ended(self) -> Reader:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the stream has not ended"
        return self


NEVER_DONE = 3000
"""Tokens of an answer that takes longer than a test."""


@contextlib.contextmanager
def stopped_engine(worker: ServerProcess) -> Iterator[int]:
    """The engine of a server stands still, so that what it has begun does not end; its process."""
    pid = worker.engine_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def stopped_in(worker: ServerProcess, begin: Callable[[], Reader]) -> Iterator[tuple[Reader, Callable[[], None]]]:
    """A stream that has begun, and whose engine stands still before it has ended; what makes it go on."""
    for _ in range(20):
        reader = begin()
        with contextlib.ExitStack() as stop:
            stop.enter_context(stopped_engine(worker))
            if open_requests(worker) == 1:
                yield reader, stop.close
                return
    raise AssertionError("every stream has ended before the engine could be stopped")


def open_requests(worker: ServerProcess) -> float:
    return metric(worker, "mooli:num_open_reqs ")


THINGS = ["ships", "birds", "towns", "nuts"]


def test_a_killed_worker_loses_no_request_before_its_first_token_and_is_taken_back(package, leaving, staying):
    with GatewayProcess(package, worker_urls=[leaving.url], policy="round_robin") as gateway:
        begun = Reader(gateway.http, "A story of a king:", NEVER_DONE).begun()
        with stopped_engine(leaving), ThreadPoolExecutor(len(THINGS)) as pool:
            gateway.add(staying.url)
            gateway.wait_for_workers(2)
            waiting = [Reader(gateway.http, f"A poem of {name}:", 8) for name in THINGS]
            plain = [pool.submit(completed, gateway.http, f"A list of {name}:", 8) for name in THINGS]
            wait_until(lambda: open_requests(leaving) == 1 + len(THINGS), "half of the requests are at each worker")
            os.killpg(leaving.pid, signal.SIGKILL)
            answers = [answer.result(PATIENCE_S) for answer in plain]
        assert answers == [completed(staying.http, f"A list of {name}:", 8) for name in THINGS]
        expected = [completed(staying.http, f"A poem of {name}:", 8) for name in THINGS]
        assert [(reader.ended().cause, reader.text) for reader in waiting] == [(None, text) for text in expected]

        # What had begun cannot be begun again elsewhere: smg writes why into the stream, sglang-router breaks it off.
        says = "Stream error" if package == "smg" else "without sending complete message body"
        assert says in str(begun.ended().cause)
        assert completed(staying.http, "A story of a king:", begun.num_pieces + 8).startswith(begun.text)

        wait_until(lambda: gateway.healthy() == {staying.url}, "the gateway has noticed")
        with ServerProcess("--num-threads", "1", port=leaving.port) as again:
            wait_until(lambda: gateway.healthy() == {staying.url, again.url}, "the gateway takes it back")
            assert len({completed(gateway.http, "And now?", 2) for _ in range(4)}) == 1
            assert metric(again, "sglang:num_requests_total") > 0


def test_an_engine_that_dies_ends_its_streams_with_the_cause_and_others_go_elsewhere(package, leaving, staying):
    with GatewayProcess(package, worker_urls=[leaving.url], policy="round_robin") as gateway:
        begun = Reader(gateway.http, "A story of a cat:", NEVER_DONE).begun()
        with stopped_engine(leaving) as engine, ThreadPoolExecutor(2) as pool:
            gateway.add(staying.url)
            gateway.wait_for_workers(2)
            plain = [pool.submit(completed, gateway.http, f"A list of {name}:", 4) for name in THINGS[:2]]
            wait_until(lambda: open_requests(leaving) == 2, "a request waits at the worker")
            os.kill(engine, signal.SIGKILL)
            answers = [answer.result(PATIENCE_S) for answer in plain]
        assert answers == [completed(staying.http, f"A list of {name}:", 4) for name in THINGS[:2]]
        assert "engine process" in str(begun.ended().cause)
        assert leaving.exit_status() == 1


def test_a_draining_worker_finishes_its_streams_and_new_requests_go_elsewhere(package, leaving, staying):
    with (
        GatewayProcess(package, worker_urls=[leaving.url], policy="round_robin") as gateway,
        stopped_in(leaving, lambda: Reader(gateway.http, "A story of the sea:", 96).begun()) as (begun, go_on),
    ):
        gateway.add(staying.url)
        gateway.wait_for_workers(2)
        leaving.signal(signal.SIGTERM)
        wait_until(lambda: "requests that have 25 s to finish: 1" in leaving.log, "the worker drains")
        answers = [completed(gateway.http, f"Meanwhile {name}", 2) for name in THINGS]
        go_on()
        assert (begun.ended().cause, begun.text) == (None, completed(staying.http, "A story of the sea:", 96))
        assert leaving.exit_status() == 0
        assert answers == [completed(staying.http, f"Meanwhile {name}", 2) for name in THINGS]
