"""Whatever is sent, the server answers it, says what was wrong with it, and goes on with everything it had."""

from __future__ import annotations

import asyncio
import collections
import gc
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from live import LiveServer
from random_bodies import random_request
from schemathesis.checks import positive_data_acceptance
from schemathesis.generation import GenerationMode

from mooli.server.app import API_ROUTES, document

KEY = {"Authorization": "Bearer secret"}

NUM_BODIES = 10_000
NUM_CLIENTS = 24
MAX_GROWTH_MIB = 100
"""Of the whole process, tests included, between the second and the last quarter of the bodies."""


# -- by the document ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def documented_server() -> Iterator[LiveServer]:
    server = LiveServer(api_key="secret")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def api(documented_server) -> Any:
    return schemathesis.openapi.from_url(f"{documented_server.url}/openapi.json", headers=KEY)


def operations() -> list[Any]:
    """Each with data that fits the document; those that take any, also with data that does not. Not of what only says
    that it is not there (501), nor of what has no end: test_cache_routes.py reads the events, test_openapi.py compares
    them with the document, and a client that waits for the last one is sent away after half a minute."""
    found = []
    for path, methods in document(API_ROUTES)["paths"].items():
        for method, operation in methods.items():
            if operation["summary"].startswith("Not there") or (path, method) == ("/v1/cache/events", "get"):
                continue
            found.append(pytest.param(path, method, GenerationMode.POSITIVE))
            if "requestBody" in operation or "parameters" in operation:
                found.append(pytest.param(path, method, GenerationMode.NEGATIVE))
    return found


@pytest.mark.parametrize(("path", "method", "mode"), operations())
def test_answers_are_those_the_document_promises(documented_server, api, path, method, mode):
    operation = api[path][method]
    num_examples = 20 if operation.body else 3

    @settings(
        max_examples=num_examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def run(case) -> None:
        answer = case.call(headers=KEY)
        # What fits the types may still ask for too much: only that is left out.
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])

    run()
    documented_server.core.check()
    assert documented_server.http.get("/health_generate").status_code == 200


# -- at random ---------------------------------------------------------------------------------------------------------
@dataclass
class Answers:
    """How often each status came from each path, and what no answer may be."""

    counts: collections.Counter[tuple[str, int]] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)

    def take(self, path: str, body: bytes, status: int, headers: Any, text: str) -> None:
        self.counts[path, status] += 1
        problem = _problem(path, status, headers, text)
        if problem is not None:
            self.faults.append(f"{path} {body[:300]!r}: {problem}: {status} {text[:300]}")


LAST_EVENTS: dict[str, str | tuple[str, ...]] = {
    "/v1/messages": "event: message_stop\n",
    "/v1/responses": ("event: response.completed\n", "event: response.incomplete\n"),
}
"""How the last event of a stream begins, where it is no [DONE]."""


def _problem(path: str, status: int, headers: Any, text: str) -> str | None:
    """What is wrong with an answer, if anything."""
    media_type = headers["content-type"].partition(";")[0]
    if status == 200:
        if media_type == "text/event-stream":
            if '"error":{' in text:
                return "a stream that failed"
            last = text[text.rfind("\n\n", 0, -2) + 2 :]
            return None if last.startswith(LAST_EVENTS.get(path, "data: [DONE]")) else "a stream without an end"
        if media_type == "application/x-ndjson":
            return None if json.loads(text.splitlines()[-1]).get("done") else "lines without an end"
        if path != "/abort_request":
            json.loads(text)
        return None
    if media_type != "application/json":
        return "an error that is not JSON"
    error = json.loads(text)["error"]
    if not (error["message"] if isinstance(error, dict) else error):
        return "an error without a message"
    if status == 503:
        return None if "retry-after" in headers else "no word when to come again"
    return None if 400 <= status < 500 else "a server's error"


async def send_all(server: LiveServer, rng: random.Random, num_bodies: int, answers: Answers) -> None:
    numbers = iter(range(num_bodies))

    async def send_some(session: aiohttp.ClientSession) -> None:
        for _ in numbers:
            path, body = random_request(rng)
            headers = {"Content-Type": "application/json"}
            async with session.post(server.url + path, data=body, headers=headers) as answer:
                answers.take(path, body, answer.status, answer.headers, (await answer.read()).decode())

    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await asyncio.gather(*(send_some(session) for _ in range(NUM_CLIENTS)))


def memory_mib() -> float:
    gc.collect()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[LiveServer, Answers, list[float]]]:
    """A server that has been sent all random bodies, what it said, and the memory after each quarter of them."""
    server = LiveServer(engine={"max_running_requests": 16}, max_queued_requests=64)
    rng, answers, memory = random.Random(20), Answers(), []
    for _ in range(4):
        asyncio.run(send_all(server, rng, NUM_BODIES // 4, answers))
        memory.append(memory_mib() if Path("/proc/self/status").exists() else 0.0)
    yield server, answers, memory
    assert server.stop() == 0


def test_no_random_body_is_answered_wrongly(fuzzed):
    _, answers, _ = fuzzed
    assert not answers.faults, f"{len(answers.faults)} wrong answers, the first:\n" + "\n".join(answers.faults[:5])
    assert answers.counts.total() == NUM_BODIES


def test_random_bodies_reach_both_sides_of_each_route(fuzzed):
    """Bodies that are all refused at the door would show nothing."""
    _, answers, _ = fuzzed
    for path in {path for path, _ in answers.counts}:
        assert answers.counts[path, 200] > NUM_BODIES / 200, path
        assert answers.counts[path, 400] > NUM_BODIES / 200, path


def test_nothing_is_left_behind(fuzzed):
    server, _, _ = fuzzed
    (load,) = server.http.get("/v1/loads").json()["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"], load["num_used_tokens"]) == (0, 0, 0)
    (state,) = server.http.get("/server_info").json()["internal_states"]
    assert state["free_pages"] + state["tree_pages"] == state["total_pages"]
    assert state["requests"] == state["finished"]
    assert (server.service.num_active, server.service.client.num_open) == (0, 0)
    server.core.check()


def test_the_server_goes_on(fuzzed):
    server, _, _ = fuzzed
    body = {"text": "still there", "sampling_params": {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}}
    answer = server.http.post("/generate", json=body)
    assert answer.json()["meta_info"]["completion_tokens"] == 5
    assert server.http.get("/health_generate").status_code == 200
    assert server.http.post("/flush_cache", headers={"X-Mooli": "1"}).status_code == 200


def test_memory_does_not_grow_with_what_was_sent(fuzzed):
    _, _, memory = fuzzed
    assert memory[-1] - memory[1] < MAX_GROWTH_MIB, memory
