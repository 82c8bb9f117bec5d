"""How long a prompt is to be kept, as each dialect says it, and what of it reaches the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import says
from live import LiveServer

from mooli.scheduler.scheduler import Scheduler
from mooli.types import Pin, Request

LONG = "A head that is always the same. "
FIRST, SECOND = "user: one", "user: two"
SHORT = {"type": "ephemeral"}
ENGINE = {"context_length": 700, "cache_retention_share": 1.0}
HOUR = {"type": "ephemeral", "ttl": "1h"}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    server = LiveServer(says("Hi", after="assistant: "), engine=ENGINE, enable_response_store=True)
    yield server
    server.stop()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests as the engine got them."""
    requests: list[Request] = []
    add = Scheduler.add

    def noted(scheduler: Scheduler, request: Request) -> None:
        requests.append(request)
        add(scheduler, request)

    monkeypatch.setattr(Scheduler, "add", noted)
    return requests


def text(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **fields}


def chat(*contents: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


WHOLE, HEAD = None, len("system: " + LONG.strip())

ASKED: list[tuple[str, dict[str, Any], list[tuple[float, int | None]]]] = [
    ("/generate", {"text": "a>", "pin": {"ttl": "5m"}}, [(300, WHOLE)]),
    ("/generate", {"text": "a>", "pin": [{"seconds": 1.5, "tokens": 1}, {"ttl": "2h"}]}, [(1.5, 1), (7200, WHOLE)]),
    ("/v1/completions", {"prompt": "a>", "pin": {"seconds": 9}}, [(9, WHOLE)]),
    ("/v1/completions", {"prompt": "a>", "prompt_cache_retention": "24h"}, [(86400, WHOLE)]),
    ("/v1/completions", {"prompt": "a>", "prompt_cache_retention": "in_memory"}, []),
    ("chat", {"messages": chat("a")}, []),
    ("chat", {"messages": chat("a"), "prompt_cache_options": {"ttl": "12h"}}, [(43200, WHOLE)]),
    ("chat", {"messages": chat("a"), "prompt_cache_options": {"mode": "explicit", "ttl": "12h"}}, []),
    (
        "chat",
        {
            "messages": chat([text("one", prompt_cache_breakpoint={"mode": "explicit", "ttl": "12h"})], "b", "c"),
            "prompt_cache_options": {"ttl": "30m"},
            "pin": {"seconds": 7, "weight": 3},
        },
        [(1800, WHOLE), (43200, len(FIRST)), (7, WHOLE)],
    ),
    (
        "chat",
        {"messages": chat([text("one", prompt_cache_breakpoint={"mode": "explicit"})], "b", "c")},
        [(1800, len(FIRST))],
    ),
    ("responses", {"input": "a", "prompt_cache_options": {"ttl": "30m"}}, [(1800, WHOLE)]),
    (
        "responses",
        {
            "instructions": LONG,
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "one", "prompt_cache_breakpoint": {"mode": "explicit"}},
                        {"type": "input_text", "text": "more"},
                    ],
                },
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
        },
        [(1800, len(f"system: {LONG}\n{FIRST}\nmore"))],
    ),
    ("messages", {"messages": chat("a"), "cache_control": SHORT}, [(300, WHOLE)]),
    ("messages", {"messages": chat([text("a", cache_control=SHORT)]), "system": LONG}, [(300, WHOLE)]),
    ("messages", {"messages": chat("a"), "system": [text(LONG, cache_control=HOUR)]}, [(3600, HEAD)]),
    (
        "messages",
        {
            "messages": chat([text("a"), text("b", cache_control=SHORT)]),
            "system": [text(LONG, cache_control=HOUR)],
        },
        [(300, WHOLE), (3600, HEAD)],
    ),
    (
        "messages",
        {
            "messages": chat([text("one", cache_control=HOUR)], "x", [text("a", cache_control=HOUR)]),
            "system": [text(LONG, cache_control=SHORT)],
        },
        [(3600, WHOLE)],
    ),
]


@pytest.mark.parametrize(("route", "body", "expected"), ASKED)
def test_what_each_dialect_asks_for(
    server: LiveServer, seen: list[Request], route: str, body: dict[str, Any], expected: list[tuple[float, int | None]]
) -> None:
    ask(server, route, body)
    (request,) = seen
    assert [(pin.seconds, pin.num_tokens) for pin in request.pins] == expected


PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


def ask(server: LiveServer, route: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    limits = {
        "/generate": {"sampling_params": {"max_new_tokens": 2}},
        "messages": {"max_tokens": 2, "model": "m"},
        "responses": {"max_output_tokens": 2},
    }
    path = PATHS.get(route, route)
    reply = server.http.post(path, json={**limits.get(route, {"max_tokens": 2}), **body})
    assert reply.status_code == status, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


@pytest.mark.parametrize(
    ("route", "body", "named"),
    [
        ("chat", {"messages": chat("a"), "prompt_cache_retention": "7d"}, "prompt_cache_retention"),
        ("chat", {"messages": chat("a"), "prompt_cache_options": {"ttl": "soon"}}, "prompt_cache_options"),
        ("chat", {"messages": chat("a"), "prompt_cache_options": {"mode": "never"}}, "prompt_cache_options"),
        ("chat", {"messages": chat([text("a", prompt_cache_breakpoint=1)])}, "prompt_cache_breakpoint"),
        ("chat", {"messages": chat("a"), "pin": {"seconds": -1}}, "pin"),
        ("responses", {"input": "a", "prompt_cache_retention": "7d"}, "prompt_cache_retention"),
        ("messages", {"messages": chat("a"), "cache_control": {"type": "for ever"}}, "cache_control"),
        (
            "messages",
            {"messages": chat("a"), "system": [text("b", cache_control={"type": "ephemeral", "ttl": "9d"})]},
            "system[0].cache_control.ttl",
        ),
    ],
)
def test_a_wrong_wish_is_refused_by_its_name(server: LiveServer, route: str, body: dict[str, Any], named: str) -> None:
    assert named in str(ask(server, route, body, 400)["error"])


def test_names_of_conversations_and_priorities_reach_the_engine(server: LiveServer, seen: list[Request]) -> None:
    ask(server, "/generate", {"text": ["a>", "b>"], "session_id": ["s", "t"]})
    ask(server, "chat", {"messages": chat("a"), "session_id": "u", "priority": 7, "pin": {"seconds": 5}})
    first = ask(server, "responses", {"input": "a"})["id"]
    second = ask(server, "responses", {"input": "b", "previous_response_id": first})["id"]
    ask(server, "responses", {"input": "b", "store": False})
    names = [(request.session, request.previous) for request in seen]
    assert names == [("s", ""), ("t", ""), ("u", ""), (first, ""), (second, first), ("", "")]
    assert seen[2].pins == (Pin(5.0, 7, None),), "without a weight of its own, the priority"


def test_what_is_retained_is_told(server: LiveServer) -> None:
    before = server.http.get("/server_info").json()["internal_states"][0]["retained_pages"]
    ask(server, "/generate", {"text": "kept for long: 0123456789>", "pin": {"ttl": "1h"}})
    stats = server.http.get("/server_info").json()["internal_states"][0]
    assert stats["retained_pages"] == before + 7, "27 tokens, in pages of four"
    tree = server.http.get("/v1/cache/tree").json()
    assert tree["pages"]["retained"] == stats["retained_pages"]
    assert sum(node["pages"] for node in tree["nodes"] if node.get("retained")) == stats["retained_pages"]
    assert "mooli:kv_retained_tokens" in server.http.get("/metrics").text
