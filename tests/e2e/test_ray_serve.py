"""Several replicas behind Ray Serve: answers, whose cache they find, replicas that die, come and go."""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from ray_cluster import PATIENCE_S, RayCluster, descendants
from server_process import ServerProcess, Stream, needs_demo, needs_proc, wait_until

pytestmark = [
    pytest.mark.whole_machine,
    pytest.mark.slow,
    needs_demo,
    needs_proc,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

REPLICA_TOKENS = 4096
NUM_GROUPS, NUM_QUESTIONS = 4, 4
SESSION = "x-session-id"


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Two replicas. Guessing is off, so that streams last."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    arguments = {
        "model_path": "demo",
        "num_threads": 1,
        "max_total_tokens": REPLICA_TOKENS,
        "speculative_algorithm": "none",
        "shutdown_timeout": 60,
        "replicas": 2,
        "head_chars": 512,
    }
    with RayCluster(port, arguments) as made:
        yield made


@pytest.fixture(scope="module")
def alone() -> Iterator[ServerProcess]:
    """One engine, with as much cache as two replicas."""
    flags = ("--num-threads", "1", "--max-total-tokens", str(2 * REPLICA_TOKENS), "--speculative-algorithm", "none")
    with ServerProcess(*flags) as server:
        yield server


def trace() -> list[str]:
    """Prompts of groups with a long head each, in an order without any."""
    heads = [f"Report {i} of the garden. " + f"Bed {i} has radishes and beans. " * 20 for i in range(NUM_GROUPS)]
    prompts = [f"{head}Question {i}: what grows?" for head in heads for i in range(NUM_QUESTIONS)]
    random.Random(7).shuffle(prompts)
    return prompts


def greedy(text: str, num_tokens: int, **fields: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    return {"text": text, "sampling_params": params, **fields}


def answers(
    http: httpx.Client, prompts: list[str], num_tokens: int, sessions: tuple[str, ...] = ("",), **fields: Any
) -> list[dict[str, Any]]:
    """One after the other. sessions: of the requests, in turns; "" for none."""
    found = []
    for prompt, session in zip(prompts, itertools.cycle(sessions), strict=False):
        headers = {SESSION: session} if session else {}
        answer = http.post("/generate", json=greedy(prompt, num_tokens, **fields), headers=headers)
        assert answer.status_code == 200, answer.text
        found.append(answer.json())
    return found


def cached_share(found: list[dict[str, Any]]) -> float:
    metas = [answer["meta_info"] for answer in found]
    return sum(meta["cached_tokens"] for meta in metas) / sum(meta["prompt_tokens"] for meta in metas)


def num_running(cluster: RayCluster) -> int:
    return sum(load["num_running_reqs"] for load in cluster.loads())


def flush(cluster: RayCluster) -> None:
    answer = cluster.http.post("/flush_cache?timeout=60", headers={"X-Mooli": "1"})
    assert answer.status_code == 200, answer.text


def sessions_of_each_replica(cluster: RayCluster) -> tuple[str, ...]:
    """A session for each of the replicas: that finds what another of the same replica has left in its cache."""
    prompt = "A session has its replica, and finds there what was said to it before, " * 4
    flush(cluster)
    answers(cluster.http, [prompt], 1, ("s0",))
    for i in range(1, 60):
        (found,) = answers(cluster.http, [prompt], 1, (f"s{i}",))
        if found["meta_info"]["cached_tokens"] == 0:
            return "s0", f"s{i}"
    raise AssertionError("60 sessions are all with one replica")


# -- answers -----------------------------------------------------------------------------------------------------------
def test_answers_are_those_of_one_engine_and_find_nearly_as_much_in_the_cache(cluster, alone):
    one = answers(alone.http, trace(), 6, return_logprob=True)
    in_turns = sessions_of_each_replica(cluster)
    flush(cluster)
    round_robin = answers(cluster.http, trace(), 6, in_turns, return_logprob=True)
    flush(cluster)
    by_head = answers(cluster.http, trace(), 6, return_logprob=True)
    for others in (by_head, round_robin):
        for mine, yours in zip(others, one, strict=True):
            assert mine["output_ids"] == yours["output_ids"]
            assert mine["meta_info"]["output_token_logprobs"] == yours["meta_info"]["output_token_logprobs"]
    assert cached_share(by_head) >= 1.25 * cached_share(round_robin)
    assert cached_share(by_head) >= cached_share(one) - 0.05


def test_every_api_answers_through_serve_as_without_it(cluster, alone):
    asking = {"model": "demo", "messages": [{"role": "user", "content": "Name a root."}], "temperature": 0}
    short = {"temperature": 0, "max_tokens": 12}
    asked: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/chat/completions", {**asking, "max_tokens": 12}, "choices"),
        ("/v1/completions", {"model": "demo", "prompt": "A root is", **short}, "choices"),
        ("/v1/messages", {**asking, "max_tokens": 12}, "content"),
        ("/api/chat", {**asking, "stream": False, "options": {"temperature": 0, "num_predict": 12}}, "message"),
    ]
    for path, body, shown in asked:
        mine, yours = (http.post(path, json=body) for http in (cluster.http, alone.http))
        assert mine.status_code == yours.status_code == 200, mine.text
        assert mine.json()[shown] == yours.json()[shown], path
    streams = [
        Stream(f"{url}/v1/chat/completions", {**asking, "max_tokens": 12, "stream": True})
        for url in (cluster.url, alone.url)
    ]
    mine_said, yours_said = ([event["choices"] for event in stream.events()] for stream in streams)

    def text(chunks: list[list[dict[str, Any]]]) -> str:
        return "".join(choice["delta"].get("content") or "" for choices in chunks for choice in choices)

    assert text(mine_said) == text(yours_said) != ""
    assert streams[0].text.endswith("data: [DONE]\n\n")


def test_the_application_tells_of_all_its_replicas(cluster):
    assert [card["id"] for card in cluster.http.get("/v1/models").json()["data"]] == ["demo"]
    assert [load["dp_rank"] for load in cluster.loads()] == [0, 1]
    names = {load["replica"] for load in cluster.loads()}
    metrics = cluster.http.get("/metrics").text
    assert all(f'sglang:num_running_reqs{{replica="{name}"' in metrics for name in names)
    assert len(cluster.http.get("/server_info").json()["internal_states"]) == 2
    assert cluster.http.get("/health/ready").status_code == 200
    for load in cluster.loads():
        named = cluster.http.get("/v1/loads", headers={"x-mooli-replica": load["replica"]})
        assert [each["dp_rank"] for each in named.json()["loads"]] == [0]
        assert load["replica"] in cluster.http.get("/metrics").text
    assert cluster.http.get("/v1/loads", headers={"x-mooli-replica": "nobody"}).status_code == 404
    wrong = cluster.http.post("/generate", json={"text": 5})
    assert wrong.status_code == 400
    assert "text" in wrong.json()["message"]
    assert cluster.http.get("/nowhere").json()["error"]["code"] == "unknown_url"


# -- ends --------------------------------------------------------------------------------------------------------------
def test_a_client_that_leaves_ends_its_request_in_the_engine(cluster):
    stream = Stream(f"{cluster.url}/generate", greedy("Once upon a time", 3000, stream=True))
    wait_until(lambda: num_running(cluster) == 1, "it runs")
    stream.leave()
    wait_until(lambda: num_running(cluster) == 0, "it has ended")


@pytest.mark.parametrize("what", ["actor", "engine"])
def test_when_a_replica_dies_nothing_is_lost_that_had_not_begun(cluster, alone, what):
    wait_until(lambda: len(cluster.loads()) == 2, "both replicas answer")
    prompts = [f"Story {i} of a garden:" for i in range(8)]
    expected = [answer["output_ids"] for answer in answers(alone.http, prompts, 40)]
    with ThreadPoolExecutor(len(prompts)) as waiting, httpx.Client(timeout=PATIENCE_S, headers={SESSION: "s"}) as http:
        streams = [
            Stream(f"{cluster.url}/generate", greedy(prompt, 900, stream=True), headers={SESSION: "s"})
            for prompt in prompts[:3]
        ]
        whole = [waiting.submit(http.post, f"{cluster.url}/generate", json=greedy(prompt, 40)) for prompt in prompts]
        wait_until(
            lambda: num_running(cluster) > len(streams) or all(future.done() for future in whole), "others run too"
        )
        busiest = max(cluster.loads(), key=lambda load: load["num_running_reqs"])
        victim = cluster.actor(busiest["replica"])
        os.kill(victim if what == "actor" else descendants(victim)[0], signal.SIGKILL)
        found = [future.result() for future in whole]
    assert [answer.status_code for answer in found] == [200] * len(prompts), [answer.text for answer in found]
    assert [answer.json()["output_ids"] for answer in found] == expected
    for stream in streams:
        message = stream.events()[-1]["error"]["message"]
        assert "has ended" in message or "SIGKILL" in message
        assert stream.text.endswith("data: [DONE]\n\n")
    wait_until(lambda: busiest["replica"] not in {load["replica"] for load in cluster.loads()}, "it is gone")
    wait_until(lambda: len(cluster.loads()) == 2, "there is another replica")


def test_replicas_come_and_go_without_an_error(cluster):
    stop = threading.Event()
    failures: list[str] = []

    def ask(number: int) -> int:
        with httpx.Client(base_url=cluster.url, timeout=PATIENCE_S) as http:
            for count in itertools.count(1):
                answer = http.post("/generate", json=greedy(f"Client {number}, {count % 5}:", 8))
                if answer.status_code != 200:
                    failures.append(answer.text)
                if stop.is_set():
                    return count
        return 0

    with ThreadPoolExecutor(2) as clients:
        asking = [clients.submit(ask, number) for number in range(2)]
        streams = [Stream(f"{cluster.url}/generate", greedy(f"Tale {i}", 300, stream=True)) for i in range(3)]
        try:
            for count in (1, 3, 1):
                cluster.deploy(engine=count)
                wait_until(lambda count=count: len(cluster.loads()) == count, f"{count} replicas answer")
        finally:
            stop.set()
        assert all(future.result() > 0 for future in asking)
    assert failures == []
    for stream in streams:
        assert stream.events()[-1]["meta_info"]["completion_tokens"] == 300
