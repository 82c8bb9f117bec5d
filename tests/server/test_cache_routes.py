"""What can be seen of a server that works: the tree, its changes, open requests, the last hour, the log's end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_engine import NUM_PAGES, PAGE_SIZE, says
from gate import Gate, wait_until
from live import LiveServer

from mooli.server import cache_feed
from mooli.server.activity import Activity, _percentiles
from mooli.server.cache_feed import View, _Watcher
from mooli.server.logs import LogTail

GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


def generate(server: Any, text: str, **fields: Any) -> dict[str, Any]:
    reply = server.http.post("/generate", json={"text": text, "sampling_params": GREEDY, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


class Watching:
    """An open stream of events. applied: the tree as the events before have made it."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.events: list[dict[str, Any]] = []

    def next(self) -> dict[str, Any]:
        for line in self._lines:
            if line.startswith("data: "):
                self.events.append(json.loads(line.removeprefix("data: ")))
                return self.events[-1]
        raise AssertionError("the stream has ended")

    def until(self, condition: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
        """Read on until what has come fulfils `condition`; all of it."""
        while not condition(self.events):
            self.next()
        return self.events

    def happened(self, events: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        return [item for event in events or self.events for item in event.get("happened", [])]


@contextlib.contextmanager
def watching(server: Any, path: str = "/v1/cache/events", **options: Any) -> Iterator[Watching]:
    with server.http.stream("GET", path, **options) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        watch = Watching(reply.iter_lines())
        assert watch.next()["type"] == "hello"
        yield watch


def is_ended(events: list[dict[str, Any]], *rids: str) -> bool:
    ended = {item["id"] for event in events for item in event.get("happened", []) if item["what"] == "ended"}
    return ended >= set(rids)


# -- the tree ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def server(live):
    return live(says("hello"))


@pytest.fixture(scope="module")
def refuser():
    """One server for what is refused."""
    server = LiveServer(says("hello"))
    yield server
    server.stop()


def tree_of(server: Any, query: str = "", **options: Any) -> dict[str, Any]:
    reply = server.http.get(f"/v1/cache/tree{query}", **options)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_an_empty_tree(server):
    tree = tree_of(server)
    assert tree["page_size"] == PAGE_SIZE
    assert tree["pages"] == {
        "total": NUM_PAGES, "free": NUM_PAGES, "cached": 0, "evictable": 0, "retained": 0, "in_use": 0,
            "evicted": 0,
    }  # fmt: skip
    assert "nodes" not in tree and "more" not in tree


def test_the_tree_has_the_spans_that_requests_have_left(server):
    generate(server, "abcdefgh-one>")
    generate(server, "abcdefgh-two>")
    tree = tree_of(server)
    nodes = {node["id"]: node for node in tree["nodes"]}
    (namespace,) = tree["namespaces"]
    assert namespace["name"] == "default"
    (top,) = [node for node in nodes.values() if "parent" not in node]
    assert (top["start"], top["tokens"], top["pages"]) == (0, 8, 2)
    below = [node for node in nodes.values() if node.get("parent") == top["id"]]
    assert len(below) == 2
    assert all(node["start"] == 8 and node["namespace"] == namespace["id"] and "locks" not in node for node in below)
    assert all(0 <= node["idle_s"] < 600 for node in nodes.values())
    assert sum(node["pages"] for node in nodes.values()) == tree["pages"]["cached"]


def test_the_tree_comes_in_parts_of_the_size_that_is_asked_for(server):
    for first in "abcdefg":
        generate(server, f"{first}>")
    whole = tree_of(server)["nodes"]
    found, query, num_parts = [], "?limit=3", 0
    while query:
        part = tree_of(server, query)
        assert len(part["nodes"]) <= 3
        found += part["nodes"]
        query = f"?limit=3&after={part['after']}" if part.get("more") else ""
        num_parts += 1
    assert [node["id"] for node in found] == [node["id"] for node in whole]
    assert num_parts == 3


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "after=-1", "after=1.5", "limit=" + "9" * 30])
def test_numbers_that_are_none_are_refused(refuser, query):
    reply = refuser.http.get(f"/v1/cache/tree?{query}")
    assert reply.status_code == 400
    assert query.split("=")[0] in reply.json()["error"]["message"]


def test_the_text_of_a_node(server):
    generate(server, "abcdefgh-one>")
    generate(server, "abcdefgh-two>")
    nodes = tree_of(server)["nodes"]
    texts = {}
    for node in nodes:
        shown = server.http.get(f"/v1/cache/nodes/{node['id']}").json()
        assert (shown["id"], shown["start"], shown["tokens"]) == (node["id"], node["start"], node["tokens"])
        assert not shown["is_cut"]
        texts[node["start"], shown["text"]] = node
    assert {text[:5] for _, text in texts} == {"abcde", "-one>", "-two>"}
    (top,) = [node for node in nodes if "parent" not in node]
    cut = server.http.get(f"/v1/cache/nodes/{top['id']}?max_tokens=3").json()
    assert (cut["text"], cut["is_cut"], cut["tokens"]) == ("abc", True, 8)


@pytest.mark.parametrize("node", ["0", "999999", "x", "-1", "²", "9" * 40])
def test_a_node_that_is_not_there(refuser, node):
    reply = refuser.http.get(f"/v1/cache/nodes/{node}")
    assert reply.status_code == 404
    assert "evicted" in reply.json()["error"]["message"]


def test_a_salted_text_is_shown_to_who_knows_the_salt(server):
    generate(server, "secret>", cache_salt="mine")
    tree = tree_of(server)
    (node,) = tree["nodes"]
    assert tree["namespaces"][0]["name"] not in ("default", "")
    path = f"/v1/cache/nodes/{node['id']}"
    assert server.http.get(path).status_code == 404
    assert server.http.get(f"{path}?cache_salt=other").status_code == 404
    assert server.http.get(f"{path}?cache_salt=mine").json()["text"].startswith("secret>")


def test_nothing_is_noted_when_nobody_looks_any_more(server):
    generate(server, "abc>")
    tree_of(server)
    with watching(server) as watch:
        assert server.core._scheduler._cache.watch.is_attached
        generate(server, "abd>")
        watch.until(lambda events: len(events) > 1)
    wait_until(lambda: not server.core._scheduler._cache.watch.is_attached)
    assert server.service.cache_feed._running is None
    assert server.service.activity._happened is None
    assert server.service.activity._by_name == {}


# -- who shares a prompt -----------------------------------------------------------------------------------------------
def test_where_a_prompt_is_found(server):
    generate(server, "abcdefgh-one>")
    reply = server.http.post("/v1/cache/find", json={"prompt": "abcdefgh-other"})
    assert reply.status_code == 200
    found = reply.json()
    assert (found["tokens"], found["found_tokens"]) == (14, 10)
    assert found["miss"] == {"reason": "diverged", "tokens": 10}
    assert found["path"] == [node["id"] for node in tree_of(server)["nodes"]]
    by_ids = server.http.post("/v1/cache/find", json={"input_ids": list(b"abcdefgh-other")}).json()
    assert by_ids == found
    salted = server.http.post("/v1/cache/find", json={"prompt": "abcd", "cache_salt": "x"}).json()
    assert salted["miss"]["reason"] == "namespace"
    assert (salted["path"], salted["namespace"]) == ([], None)


def test_a_conversation_is_found_as_its_request_finds_it(server):
    messages = [{"role": "user", "content": "tell me>"}]
    server.http.post("/v1/chat/completions", json={"model": "x", "messages": messages, "max_tokens": 3})
    found = server.http.post("/v1/cache/find", json={"messages": messages}).json()
    assert found["found_tokens"] == found["tokens"] > 8
    assert found["miss"] is None


def test_who_runs_in_a_prompt(live):
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate})
        body = {"text": "abcdefgh>", "rid": "mine", "sampling_params": {**GREEDY, "max_new_tokens": 50}, "stream": True}
        gate.let()
        with server.http.stream("POST", "/generate", json=body):
            asking = threading.Thread(target=lambda: results.append(find(server)))
            results: list[Any] = []
            asking.start()
            while asking.is_alive():
                gate.let()  # questions are answered between two steps
                asking.join(0.01)
            assert results[0]["requests"] == ["mine"]


def find(server: Any) -> Any:
    return server.http.post("/v1/cache/find", json={"prompt": "abcdef"}).json()


@pytest.mark.parametrize(
    "body",
    [
        {}, {"prompt": "a", "input_ids": [1]}, {"prompt": ""}, {"input_ids": []}, {"input_ids": [-1]},
        {"input_ids": [10**6]}, {"input_ids": [2**40]}, {"prompt": "a" * 200}, {"messages": []}, {"prompt": 3},
        {"messages": [{"role": "user", "content": "a"}], "tools": [3]}, {"prompt": "a", "cache_salt": "s" * 5000},
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(refuser, body):
    assert refuser.http.post("/v1/cache/find", json=body).status_code == 400
    assert refuser.http.get("/v1/cache/tree").status_code == 200


# -- events ------------------------------------------------------------------------------------------------------------
def test_a_request_is_followed_from_its_beginning_to_its_end(server):
    with watching(server) as watch:
        generate(server, "abcdefgh-one>", rid="one")
        generate(server, "abcdefgh-two>", rid="two")
        events = watch.until(lambda events: is_ended(events, "one", "two"))
        steps = [(item["what"], item["id"]) for item in watch.happened()]
        assert [what for what, rid in steps if rid == "one"] == ["received", "began", "first_token", "ended"]
        assert [what for what, rid in steps if rid == "two"] == ["received", "began", "first_token", "ended"]
        began = {item["id"]: item for item in watch.happened() if item["what"] == "began"}
        assert began["one"]["miss"] == {"reason": "namespace", "tokens": 0}
        assert (began["two"]["cached_tokens"], began["two"]["prompt_tokens"]) == (9, 13)
        assert began["two"]["miss"] == {"reason": "diverged", "tokens": 9}
        ended = {item["id"]: item for item in watch.happened() if item["what"] == "ended"}
        assert (ended["two"]["reason"], ended["two"]["output_tokens"], ended["two"]["cached_tokens"]) == (
            "length",
            4,
            9,
        )
        assert [event["seq"] for event in events] == list(range(len(events)))
        times = [item["at"] for item in watch.happened()]
        assert times == sorted(times)


def test_who_applies_the_events_has_the_tree(server):
    generate(server, "abcdefgh-zero>")
    with watching(server) as watch:
        tree = tree_of(server)
        for word in ("one", "two", "three"):
            generate(server, f"abcdefgh-{word}>", rid=word)
        watch.until(lambda events: is_ended(events, "one", "two", "three"))
        # What a request leaves as it ends may be told after its end: then it comes with the next look.
        while without_times(applied(watch.events, tree)) != without_times(by_number(tree_of(server))):
            watch.next()
        assert watch.events[-1].get("pages", tree["pages"])["total"] == NUM_PAGES


def last_requests(events: list[dict[str, Any]]) -> list[Any] | None:
    """The open requests as they were told last."""
    return next((event["requests"] for event in reversed(events) if event.get("requests") is not None), None)


def by_number(tree: dict[str, Any]) -> dict[int, Any]:
    return {node["id"]: node for node in tree["nodes"]}


def applied(events: list[dict[str, Any]], tree: dict[str, Any]) -> dict[int, Any]:
    """The nodes after these events, from a tree that was asked for among them."""
    nodes = by_number(tree)
    for event in events:
        if event["type"] == "changes" and event["version"] > tree["version"]:
            nodes |= {node["id"]: node for node in event.get("nodes", [])}
            for number in event.get("removed", []):
                nodes.pop(number, None)
    return nodes


def without_times(nodes: dict[int, Any]) -> dict[int, Any]:
    return {number: {**node, "idle_s": 0} for number, node in nodes.items()}


def test_what_makes_room_is_told(live):
    server = live(says("x"), engine={"context_length": 128})
    with watching(server) as watch:
        for number in range(40):
            generate(server, f"{number:03}" * 30 + ">", rid=f"r{number}")
        events = watch.until(lambda events: any(event.get("evicted") for event in events))
        spans = [span for event in events for span in event.get("evicted", [])]
        assert all(span["pages"] == -(-span["tokens"] // PAGE_SIZE) for span in spans)
        pages = [event["pages"]["evicted"] for event in events if "pages" in event]
        assert max(pages) > 0


def test_open_requests_are_told_with_their_progress(live):
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate})
        with watching(server) as watch:
            results: list[Any] = []
            body = {"sampling_params": {**GREEDY, "max_new_tokens": 6}}
            asking = threading.Thread(target=lambda: results.append(generate(server, "abc>", rid="mine", **body)))
            asking.start()
            while asking.is_alive():
                # Questions are answered between two steps: each step is one that somebody asks about.
                if server.service.client._sinks._questions:
                    gate.let()
                asking.join(0.01)
            gate.open()
            watch.until(lambda events: any(event.get("requests") for event in events))
            seen = next(event["requests"][0] for event in watch.events if event.get("requests"))
            assert (seen["id"], seen["prompt_tokens"], seen["max_output_tokens"]) == ("mine", 4, 6)
            events = watch.until(lambda events: is_ended(events, "mine") and last_requests(events) == [])
            running = [item for event in events for item in event.get("requests") or [] if item["state"] == "running"]
            assert [item["output_tokens"] for item in running] == sorted(item["output_tokens"] for item in running)
            assert results


def test_several_watch_and_each_hears_all(server):
    with watching(server) as one, watching(server) as other:
        generate(server, "abc>", rid="mine")
        for watch in (one, other):
            watch.until(lambda events: is_ended(events, "mine"))
    with watching(server) as late:
        generate(server, "abd>", rid="late")
        late.until(lambda events: is_ended(events, "late"))
        assert not is_ended(late.events, "mine")


def test_no_more_watch_than_may(server, monkeypatch):
    monkeypatch.setattr(cache_feed, "MOST_WATCHERS", 1)
    with watching(server):
        refused = server.http.get("/v1/cache/events")
        assert refused.status_code == 503
        assert "others watch" in refused.json()["error"]["message"]


def test_a_stream_ends_with_its_server(live):
    server = live(says("x"))
    with watching(server) as watch:
        server.loop.call_soon_threadsafe(server.http_server.drain)
        watch.until(lambda events: events[-1]["type"] == "closed")
        assert "shutting down" in watch.events[-1]["message"]
    assert server.stop() == 0


def test_a_stream_says_why_it_ends_where_the_engine_has_died(live):
    server = live(says("x"))
    with watching(server) as watch:
        server.engine_process.kill()
        watch.until(lambda events: events[-1]["type"] == "closed")
        assert "engine" in watch.events[-1]["message"]


def test_what_was_noted_and_given_up_is_said(server, monkeypatch):
    with watching(server) as watch:
        asked = asyncio.run_coroutine_threadsafe(server.service.client.ask("unwatch", 60), server.loop)
        asked.result(60)
        watch.until(lambda events: any(event["type"] == "missed" for event in events))
        generate(server, "abc>", rid="mine")
        watch.until(lambda events: is_ended(events, "mine"))
        assert tree_of(server)["nodes"]


def test_a_slow_reader_loses_events_and_is_told_how_many(monkeypatch):
    monkeypatch.setattr(cache_feed, "MOST_UNREAD_BYTES", 100)
    watcher = _Watcher()
    for _ in range(3):
        watcher.put(b"data: {}\n\n")
    assert watcher.take(3) == b"data: {}\n\n" * 3
    for _ in range(12):
        watcher.put(b"data: {}\n\n")
    told = watcher.take(15)
    assert told.startswith(b'data: {"type":"missed","seq":15,"count":11}\n\n')
    assert told.count(b"data: {}\n\n") == 1
    assert watcher.take(15) == b""


def test_the_engine_is_asked_less_often_where_its_answer_costs_more():
    """A hundredth of its time at most."""
    asked: list[float] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()

        class CostlyLink:
            async def ask(self, question: str, timeout_s: float, **details: Any) -> Any:
                if question == "changes":
                    asked.append(loop.time())
                    return {
                        "version": 1, "is_complete": True, "nodes": [], "removed": [], "dropped": [], "roots": {},
                        "began": [], "requests": [], "stats": dict.fromkeys(STATS, 0), "cost_s": 0.004,
                    }  # fmt: skip
                return {"version": 0}

        feed = cache_feed.CacheFeed(
            CostlyLink(),
            Activity(lambda rid: rid),
            cache_feed.Names(str, str),
            tokens_per_s=lambda: 0.0,
            is_draining=lambda: len(asked) >= 3,
        )
        async for _ in feed.watch(View()):
            pass

    asyncio.run(asyncio.wait_for(run(), 60))
    assert all(later - earlier >= 0.35 for earlier, later in itertools.pairwise(asked))


STATS = (
    "total_pages", "free_pages", "tree_pages", "evictable_pages", "retained_pages", "used_pages", "evicted_pages",
)  # fmt: skip


# -- tenants -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def shared(live, tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("ann: {key: key-of-ann}\nbob: {key: key-of-bob}\nboss: {key: key-of-boss, admin: true}\n")
    path.chmod(0o600)
    server = live(says("hello"), api_keys_file=str(path))
    for name in ("ann", "bob"):
        reply = server.http.post(
            "/generate", json={"text": f"text of {name}>", "sampling_params": GREEDY}, headers=key_of(name)
        )
        assert reply.status_code == 200
    return server


def key_of(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{name}"}


def test_each_tenant_sees_its_own_tree_and_an_administrator_all(shared):
    own = tree_of(shared, headers=key_of("ann"))
    assert [item["name"] for item in own["namespaces"]] == ["tenant ann"]
    whole = tree_of(shared, headers=key_of("boss"))
    assert sorted(item["name"] for item in whole["namespaces"]) == ["tenant ann", "tenant bob"]
    assert len(whole["nodes"]) > len(own["nodes"])
    assert shared.http.get("/v1/cache/tree").status_code == 401


def test_texts_of_others_are_not_shown(shared):
    for node in tree_of(shared, headers=key_of("boss"))["nodes"]:
        path = f"/v1/cache/nodes/{node['id']}"
        texts = {name: shared.http.get(path, headers=key_of(name)) for name in ("ann", "bob", "boss")}
        assert texts["boss"].status_code == 200
        assert sorted(texts[name].status_code for name in ("ann", "bob")) == [200, 404]
        (shown,) = [texts[name].json()["text"] for name in ("ann", "bob") if texts[name].status_code == 200]
        assert shown == texts["boss"].json()["text"]


def test_prompts_of_others_are_not_found(shared):
    body = {"prompt": "text of bob>"}
    own = shared.http.post("/v1/cache/find", json=body, headers=key_of("bob")).json()
    other = shared.http.post("/v1/cache/find", json=body, headers=key_of("ann")).json()
    assert own["found_tokens"] == 12
    assert other["found_tokens"] == 8  # what its own begins with


def test_events_of_others_are_not_told(shared):
    with (
        watching(shared, headers=key_of("ann")) as ann,
        watching(shared, headers=key_of("bob")) as bob,
        watching(shared, headers=key_of("boss")) as boss,
    ):
        for name, salt in (("ann", None), ("bob", None), ("ann", "salt")):
            rid = f"{name}-{salt}"
            body = {"text": f"more of {name}>", "sampling_params": GREEDY, "rid": rid, "cache_salt": salt}
            assert shared.http.post("/generate", json=body, headers=key_of(name)).status_code == 200
        boss.until(lambda events: is_ended(events, "ann-None", "bob-None", "ann-salt"))
        ann.until(lambda events: is_ended(events, "ann-None", "ann-salt"))
        bob.until(lambda events: is_ended(events, "bob-None"))
        assert {item["id"] for item in ann.happened()} == {"ann-None", "ann-salt"}
        assert {item["id"] for item in bob.happened()} == {"bob-None"}
        for watch, names in ((ann, {"tenant ann"}), (bob, {"tenant bob"})):
            assert {item["name"] for event in watch.events for item in event.get("namespaces", [])} == names
        names = {item["name"] for event in boss.events for item in event.get("namespaces", [])}
        assert {"tenant ann", "tenant bob"} < names and len(names) == 3


# -- now ---------------------------------------------------------------------------------------------------------------
def test_the_status_of_a_server(server):
    generate(server, "abcdefgh-one>")
    generate(server, "abcdefgh-two>")
    status = server.http.get("/v1/status").json()
    assert (status["model"], status["running"], status["waiting"], status["requests"]) == ("fake", 0, 0, [])
    assert status["cache"] == {"prompt_tokens": 26, "cached_tokens": 9, "hit_rate": 9 / 26}
    hour = status["last_hour"]
    assert (hour["requests"], hour["prompt_tokens"], hour["cached_tokens"], hour["output_tokens"]) == (2, 26, 9, 8)
    assert (hour["first_token_s"]["count"], hour["gap_s"]["count"]) == (2, 6)
    assert hour["first_token_s"]["p50"] <= hour["first_token_s"]["p99"]
    assert status["pages"]["total"] == NUM_PAGES
    assert status["uptime_s"] >= 0 and status["is_draining"] is False


def test_the_status_tells_of_open_requests(live):
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate})
        body = {"text": "abc>", "rid": "mine", "sampling_params": {**GREEDY, "max_new_tokens": 50}, "stream": True}
        gate.let()
        with server.http.stream("POST", "/generate", json=body):
            results: list[Any] = []
            asking = threading.Thread(target=lambda: results.append(server.http.get("/v1/status").json()))
            asking.start()
            while asking.is_alive():
                gate.let()
                asking.join(0.01)
            (shown,) = results[0]["requests"]
            assert (shown["id"], shown["state"], shown["prompt_tokens"]) == ("mine", "running", 4)
            assert shown["first_token_s"] > 0
            assert results[0]["running"] == 1


def test_percentiles_of_the_last_hour_are_right_to_a_few_hundredths():
    now = [3600.0 * 5]
    activity = Activity(lambda rid: None, clock=lambda: now[0])
    activity.next_tokens(10, 900.0)
    now[0] += 3600
    for number in range(1, 1001):
        activity.next_tokens(1, number / 1000)
        if number % 20 == 0:
            now[0] += 60
    gaps = activity.last_hour().gap_s
    assert gaps.count == 1000
    for found, true in ((gaps.p50, 0.5), (gaps.p90, 0.9), (gaps.p95, 0.95), (gaps.p99, 0.99)):
        assert found == pytest.approx(true, rel=0.05)
    now[0] += 3600
    assert activity.last_hour().gap_s.count == 0
    none = _percentiles([])
    assert (none.count, none.p50) == (0, None)


# -- the log -----------------------------------------------------------------------------------------------------------
LOCAL = {"X-Mooli": "1"}


def test_the_end_of_the_log(live):
    server = live(says("x"), api_key="user-key-1", admin_api_key="admin-key-1")
    with server.service.log_tail.attached():
        logging.getLogger("mooli.test").warning("first, with %s in it", "admin-key-1")
        logging.getLogger("mooli.test").warning("second " + "x" * 10_000)
        assert server.http.get("/v1/logs").status_code == 401
        admin = {"Authorization": "Bearer admin-key-1"}
        shown = server.http.get("/v1/logs", headers=admin).json()
    assert shown["lines"][0]["text"] == "first, with *** in it"
    assert shown["lines"][0]["level"] == "WARNING"
    assert len(shown["lines"][1]["text"]) < 5000
    assert shown["last"] == 2 and shown["missed"] == 0
    later = server.http.get("/v1/logs?after=1", headers=admin).json()
    assert [line["seq"] for line in later["lines"]] == [2]
    one = server.http.get("/v1/logs?limit=1", headers=admin).json()
    assert ([line["seq"] for line in one["lines"]], one["missed"]) == ([2], 1)


def test_without_keys_the_log_is_for_this_machine_alone(live):
    assert live(says("x")).http.post("/v1/logs", headers=LOCAL).status_code == 200
    assert live(says("x")).http.get("/v1/logs").status_code == 403
    refused = live(says("x"), host="0.0.0.0").http.post("/v1/logs", headers=LOCAL)
    assert refused.status_code == 403
    assert "--admin-api-key" in refused.json()["error"]["message"]


def test_the_tail_is_bounded_and_ends_with_its_server():
    tail = LogTail(["secret"], most=3)
    logger = logging.getLogger("mooli.test.tail")
    with tail.attached():
        for number in range(5):
            logger.warning("line %d", number)
    logger.warning("nobody keeps this")
    assert [line.text for line in tail.lines(0, 10)] == ["line 2", "line 3", "line 4"]
    assert tail.num_lines == 5
