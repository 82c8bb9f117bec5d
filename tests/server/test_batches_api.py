"""/v1/batches, driven by OpenAI's client: states, results, cancelling, expiry, and processes that end in the middle."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import openai
import pytest
from gate import Gate, wait_until

from mooli.errors import BatchError
from mooli.frontend.inputs import Caller
from mooli.server import batch_desk, file_store
from mooli.server.batch_desk import BatchDesk

ENDED = ("completed", "failed", "expired", "cancelled")

CHAT = "/v1/chat/completions"


def row(name: str, content: str, url: str = CHAT, **fields: Any) -> dict[str, Any]:
    what = {"messages": [{"role": "user", "content": content}]} if url == CHAT else {"prompt": content}
    if url == "/v1/responses":
        what = {"input": content}
    most = "max_output_tokens" if url == "/v1/responses" else "max_tokens"
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "fake", **what, most: 6, **fields}}


def rows(count: int, url: str = CHAT) -> list[dict[str, Any]]:
    return [row(f"row-{number}", f"question {number}", url) for number in range(count)]


def lines_of(items: list[Any]) -> bytes:
    return b"".join(item if isinstance(item, bytes) else json.dumps(item).encode() + b"\n" for item in items)


class Client:
    """OpenAI's client of one server, with what the tests do again and again."""

    def __init__(self, server: Any, key: str = "any") -> None:
        self.server = server
        self.openai = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    def begin(self, items: list[Any], endpoint: str = CHAT, **fields: Any) -> Any:
        sent = self.openai.files.create(file=("in.jsonl", lines_of(items)), purpose="batch")
        return self.openai.batches.create(
            input_file_id=sent.id, endpoint=endpoint, **{"completion_window": "24h", **fields}
        )

    def wait(self, batch_id: str) -> Any:
        wait_until(lambda: self.openai.batches.retrieve(batch_id).status in ENDED)
        return self.openai.batches.retrieve(batch_id)

    def lines(self, file_id: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.openai.files.content(file_id).content.splitlines()]


@pytest.fixture
def client_of() -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(server: Any, key: str = "any") -> Client:
        made.append(Client(server, key))
        return made[-1]

    yield make
    for client in made:
        client.openai.close()


@pytest.fixture
def start(live, tmp_path) -> Callable[..., Any]:
    """A server on the folder of the test, or another one."""

    def begin(folder: Path | None = None, **arguments: Any) -> Any:
        return live(batch_dir=str(folder or tmp_path / "batches"), **arguments)

    return begin


def counts(batch: Any) -> tuple[int, int, int]:
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


# -- a batch from its beginning to its end -----------------------------------------------------------------------------
@pytest.mark.parametrize("url", [CHAT, "/v1/completions", "/v1/responses"])
def test_openai_has_a_file_of_requests_answered(start, client_of, url):
    client = client_of(start())
    items = [*rows(5, url), row("twin", "question 3", url)]
    begun = client.begin(items, url, metadata={"for": "me"})
    assert (begun.object, begun.endpoint, begun.metadata) == ("batch", url, {"for": "me"})
    assert begun.expires_at == begun.created_at + 24 * 3600
    batch = client.wait(begun.id)
    assert (batch.status, counts(batch)) == ("completed", (6, 6, 0))
    assert batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.error_file_id is None and batch.errors is None
    answers = client.lines(batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [item["custom_id"] for item in items]
    assert all(answer["response"]["status_code"] == 200 and answer["error"] is None for answer in answers)
    assert len({answer["id"] for answer in answers}) == 6
    told = [answer["response"]["body"]["output" if "responses" in url else "choices"] for answer in answers]
    assert json.dumps(told[3]).replace(answers[3]["id"][10:34], "") == json.dumps(told[5]).replace(
        answers[5]["id"][10:34], ""
    ), "equal rows have equal answers"
    file = client.openai.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.expires_at) == ("batch_output", None)
    assert [item.id for item in client.openai.files.list(purpose="batch_output")] == [file.id]
    assert list(client.openai.batches.list()) == [batch]


def test_rows_are_answered_as_the_route_itself_answers_them(start, client_of):
    client = client_of(start())
    items = [row(str(number), f"question {number}", temperature=0) for number in range(3)]
    batch = client.wait(client.begin(items).id)
    for item, answer in zip(items, client.lines(batch.output_file_id), strict=True):
        live = client.openai.chat.completions.create(**item["body"]).model_dump()
        body = answer["response"]["body"]
        assert body["choices"][0]["message"]["content"] == live["choices"][0]["message"]["content"]
        assert body["usage"]["total_tokens"] == live["usage"]["total_tokens"]
        assert body.keys() <= live.keys() | {"metadata", "sglext"}


def test_one_bad_row_stops_no_other(start, client_of):
    client = client_of(start())
    items = [row("good", "a"), row("too much", "b", top_p=7), row("too long", "x" * 500), row("good 2", "c")]
    batch = client.wait(client.begin(items).id)
    assert (batch.status, counts(batch)) == ("completed", (4, 2, 2))
    assert [answer["custom_id"] for answer in client.lines(batch.output_file_id)] == ["good", "good 2"]
    hot, long = client.lines(batch.error_file_id)
    assert (hot["custom_id"], hot["response"]["status_code"]) == ("too much", 400)
    assert "top_p" in hot["response"]["body"]["error"]["message"]
    assert long["response"]["body"]["error"]["code"] == "context_length_exceeded"


def test_where_all_rows_fail_there_is_no_output(start, client_of):
    client = client_of(start())
    batch = client.wait(client.begin([row("a", "b", top_p=7)]).id)
    assert (batch.status, counts(batch), batch.output_file_id) == ("completed", (1, 0, 1), None)


def test_a_file_that_is_no_batch_is_told_of_line_by_line(start, client_of):
    client = client_of(start())
    items = [
        row("a", "1"), b"{not json\n", b"\n", row("a", "2"), row("b", "3", "/v1/completions"), row("", "4"),
        {"custom_id": "c"}, row("d", "5", stream=True), {**row("e", "6"), "method": "GET"},
    ]  # fmt: skip
    batch = client.wait(client.begin(items).id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at is not None
    assert [(error.line, error.code) for error in batch.errors.data] == [
        (2, "invalid_json"), (4, "duplicate_custom_id"), (5, "mismatched_url"), (6, "invalid_request"),
        (7, "missing_field"), (8, "invalid_request"), (9, "invalid_method"),
    ]  # fmt: skip
    empty = client.wait(client.begin([b"\n\n"]).id)
    assert (empty.status, empty.errors.data[0].code) == ("failed", "empty_file")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"endpoint": "/v1/embeddings"}, "not supported yet"),
        ({"endpoint": "/v1/models"}, "has no batches"),
        ({"completion_window": "31d"}, "completion_window='31d'"),
        ({"completion_window": "soon"}, "must be 24h"),
        ({"completion_window": "0h"}, "must be 24h"),
        ({"metadata": {str(number): "" for number in range(17)}}, "17 pairs"),
        ({"metadata": {"a": "x" * 513}}, "too long"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
    ],
)
def test_a_wrong_request_makes_no_batch(start, client_of, fields, words):
    client = client_of(start())
    with pytest.raises(openai.BadRequestError, match=words):
        client.begin(rows(1), **fields)
    assert list(client.openai.batches.list()) == []


def test_a_batch_needs_a_file_of_its_owners(start, client_of):
    client = client_of(start())
    batch = client.wait(client.begin(rows(1), output_expires_after={"anchor": "created_at", "seconds": 7200}).id)
    output = client.openai.files.retrieve(batch.output_file_id)
    assert output.expires_at == output.created_at + 7200
    for file_id, words in [("file-" + "0" * 24, "No such File"), (output.id, "purpose 'batch_output'")]:
        with pytest.raises(openai.BadRequestError, match=words):
            client.openai.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")


def test_batches_are_listed_by_the_page(start, client_of):
    client = client_of(start())
    made = [client.begin(rows(1)).id for _ in range(5)]
    assert [batch.id for batch in client.openai.batches.list(limit=2)] == made[::-1]
    page = client.openai.batches.list(limit=2, after=made[3])
    assert ([batch.id for batch in page.data], page.has_more) == ([made[2], made[1]], True)
    for wrong in ({"limit": 101}, {"after": "batch_x"}):
        with pytest.raises(openai.BadRequestError):
            client.openai.batches.list(**wrong)
    with pytest.raises(openai.NotFoundError):
        client.openai.batches.retrieve("batch_x")
    for batch_id in made:
        assert client.wait(batch_id).status == "completed"


def test_the_input_may_be_deleted_meanwhile(start, client_of):
    with Gate() as gate:
        client = client_of(start(runner={"raises": gate}))
        begun = client.begin(rows(3))
        client.openai.files.delete(begun.input_file_id)
        gate.open()
        assert counts(client.wait(begun.id)) == (3, 3, 0)


# -- beside live requests ----------------------------------------------------------------------------------------------
def test_whoever_comes_is_answered_before_a_batch_that_runs(start, client_of):
    """The batch takes 600 steps. Each request has some, of which it needs four."""
    with Gate() as gate, ThreadPoolExecutor(1) as thread:
        server = start(runner={"raises": gate})
        client = client_of(server)
        begun = client.begin([row(f"{number}", f"{number}", max_tokens=60) for number in range(40)])
        wait_until(lambda: server.service.num_background == 4)  # half of those that may run
        for _ in range(3):
            gate.close()
            asked = {"model": "m", "prompt": "hi", "max_tokens": 2}
            answer = thread.submit(client.openai.completions.create, **asked)
            wait_until(lambda: server.service.num_active == 5)
            for _ in range(60):
                gate.let()
                if wait([answer], 0.05).done:
                    break
            assert answer.result(120).usage.completion_tokens == 2
            assert client.openai.batches.retrieve(begun.id).status == "in_progress"
        client.openai.batches.cancel(begun.id)
        gate.open()
        assert client.wait(begun.id).status == "cancelled"


def test_rows_take_nobodys_place_in_the_queue(start, client_of):
    with Gate() as gate:
        server = start(
            runner={"raises": gate}, engine={"max_running_requests": 2}, max_queued_requests=1, max_batch_rows=8
        )
        client = client_of(server)
        begun = client.begin(rows(20))
        wait_until(lambda: server.service.num_background == 8)
        assert server.service.client.num_open >= server.service.max_open
        gate.open()
        assert client.openai.completions.create(model="m", prompt="a", max_tokens=2).usage.completion_tokens == 2
        assert counts(client.wait(begun.id)) == (20, 20, 0)


# -- the end that it was not meant to have -----------------------------------------------------------------------------
def held(start, client_of, gate: Gate, num_done: int = 3, count: int = 12, **arguments: Any) -> tuple[Client, Any]:
    """A batch of which some rows are done, and which stands still."""
    server = start(runner={"raises": gate}, **{"max_batch_rows": 1, **arguments})
    server.service.batches._look_s = 0.01
    client = client_of(server)
    begun = client.begin(rows(count))
    while client.openai.batches.retrieve(begun.id).request_counts.completed < num_done:
        gate.let()
    gate.close()
    return client, begun


def test_a_cancelled_batch_keeps_what_was_answered(start, client_of):
    with Gate() as gate:
        client, begun = held(start, client_of, gate)
        cancelled = client.openai.batches.cancel(begun.id)
        assert cancelled.status in ("cancelling", "cancelled")
        gate.open()
        batch = client.wait(begun.id)
        total, completed, failed = counts(batch)
        assert batch.status == "cancelled" and batch.cancelling_at <= batch.cancelled_at
        assert (total, completed + failed) == (12, 12) and 3 <= completed < 12
        done = [answer["custom_id"] for answer in client.lines(batch.output_file_id)]
        left = client.lines(batch.error_file_id)
        assert sorted([*done, *(answer["custom_id"] for answer in left)]) == sorted(i["custom_id"] for i in rows(12))
        assert {answer["error"]["code"] for answer in left} == {"batch_cancelled"}
        with pytest.raises(openai.BadRequestError, match="it is cancelled"):
            client.openai.batches.cancel(begun.id)
        client.openai.completions.create(model="m", prompt="the engine goes on", max_tokens=1)


def test_a_batch_that_waits_for_another_is_cancelled_at_once(start, client_of):
    with Gate() as gate:
        client, begun = held(start, client_of, gate)
        second = client.begin(rows(2))
        assert second.status == "validating"
        batch = client.openai.batches.cancel(second.id)
        assert (batch.status, batch.output_file_id) == ("cancelled", None)
        gate.open()
        assert client.wait(begun.id).status == "completed"


def test_a_batch_expires_with_what_was_answered(start, client_of):
    with Gate() as gate:
        client, begun = held(start, client_of, gate)
        desk: BatchDesk = client.server.service.batches
        desk.files.clock = lambda: begun.created_at + 24 * 3600 + 1.0
        wait_until(lambda: client.openai.batches.retrieve(begun.id).status != "in_progress")
        gate.open()
        batch = client.wait(begun.id)
        assert batch.status == "expired" and batch.expired_at >= batch.expires_at
        left = client.lines(batch.error_file_id)
        assert {answer["error"]["code"] for answer in left} == {"batch_expired"}
        assert len(client.lines(batch.output_file_id)) + len(left) == 12


# -- keys --------------------------------------------------------------------------------------------------------------
def test_a_batch_is_its_tenants_and_runs_as_its_key(start, client_of, tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("ann: {key: a, max_sequences: 2}\neve: {key: e}\n")
    keys.chmod(0o600)
    with Gate() as gate:
        server = start(api_keys_file=str(keys), runner={"raises": gate})
        ann, eve = client_of(server, "a"), client_of(server, "e")
        seen, prepare = [], server.service.prepare

        async def noted(call: Any, caller: Any) -> Any:
            seen.append(caller)
            return await prepare(call, caller)

        server.service.prepare = noted
        begun, other = ann.begin(rows(9)), eve.begin(rows(2))
        wait_until(lambda: server.service.num_background == 4)
        assert Counter(seen) == {Caller("ann", "ann", True): 2, Caller("eve", "eve", True): 2}
        server.service.prepare = prepare
        gate.open()
        # What it has in the background takes nothing of what the key may have.
        ann.openai.completions.create(model="m", prompt=["a", "b"], max_tokens=1)
        assert ann.wait(begun.id).status == eve.wait(other.id).status == "completed"
        assert list(eve.openai.batches.list()) == [eve.openai.batches.retrieve(other.id)]
        for call in (eve.openai.batches.retrieve, eve.openai.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                call(begun.id)
        with pytest.raises(openai.BadRequestError, match="No such File"):
            eve.openai.batches.create(input_file_id=begun.input_file_id, endpoint=CHAT, completion_window="24h")


def test_a_batch_whose_key_is_gone_fails(start, client_of, tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("ann: {key: a, tenant: team}\nbob: {key: b, tenant: team}\n")
    keys.chmod(0o600)
    with Gate() as gate:
        server = start(api_keys_file=str(keys), runner={"raises": gate})
        begun = client_of(server, "a").begin(rows(3))
        wait_until(lambda: server.service.num_background)
        server.loop.call_soon_threadsafe(server.http_server.drain)
        gate.open()
        server.stop()
    keys.write_text("bob: {key: b, tenant: team}\n")
    batch = client_of(start(api_keys_file=str(keys)), "b").wait(begun.id)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "key_gone")


# -- processes that end in the middle ----------------------------------------------------------------------------------
def outcome(client: Client, batch_id: str) -> dict[str, Any]:
    """All that a batch came to, times left out."""
    batch = client.wait(batch_id)
    files = [client.openai.files.content(name).content for name in (batch.output_file_id, batch.error_file_id) if name]
    assert len(list(client.openai.files.list(purpose="batch_output"))) == len(files), "no file is there twice"
    return {"status": batch.status, "counts": counts(batch), "files": files}


@pytest.mark.parametrize("end", ["drained", "engine killed"])
def test_the_next_server_goes_on_where_this_one_ended(start, client_of, end):
    with Gate() as gate:
        client, begun = held(start, client_of, gate)
        if end == "drained":
            client.server.loop.call_soon_threadsafe(client.server.http_server.drain)
            gate.open()
            assert client.server.stop() == 0
        else:
            client.server.engine_process.kill()
            gate.open()
            wait_until(lambda: not client.server._thread.is_alive())
            assert client.server.status == 1
    again = client_of(start())
    got = outcome(again, begun.id)
    assert got["status"] == "completed" and got["counts"] == (12, 12, 0)
    names = [json.loads(line)["custom_id"] for line in got["files"][0].splitlines()]
    assert names == [item["custom_id"] for item in rows(12)]


@pytest.mark.slow
def test_whenever_a_process_is_killed_the_results_are_the_same_bytes(start, client_of, tmp_path, monkeypatch):
    """What is on disk around each write of a state, and at random moments, is what a killed process leaves."""
    left: list[Path] = []

    def look(name: str) -> None:
        copy = tmp_path / f"left-{len(left)}-{name}"
        shutil.copytree(tmp_path / "batches", copy, ignore_dangling_symlinks=True)
        left.append(copy)

    def write(path: Path, value: Any) -> None:
        look("before")
        file_store_write(path, value)
        look("after")

    file_store_write = file_store.write_whole
    settle, finish = file_store.FileStore._settle, batch_desk.Batch.finish

    def settled(self: Any, path: Path, stored: Any) -> None:
        look("unsettled")
        settle(self, path, stored)

    def finished(self: Any) -> None:
        finish(self)
        look("finished")

    items = [*rows(10), row("bad", "x", top_p=7)]
    with Gate() as gate:
        client = client_of(start(runner={"raises": gate}, max_batch_rows=2))
        monkeypatch.setattr(file_store, "write_whole", write)
        monkeypatch.setattr(batch_desk, "write_whole", write)
        monkeypatch.setattr(file_store.FileStore, "_settle", settled)
        monkeypatch.setattr(batch_desk.Batch, "finish", finished)
        begun = client.begin(items)
        wait_until(lambda: client.server.service.num_background)
        rng = random.Random(5)
        for _ in range(4):
            gate.let(rng.randrange(1, 8))
            look("running")
        gate.open()
        wanted = outcome(client, begun.id)
        client.server.stop()
    monkeypatch.undo()
    assert wanted["status"] == "completed" and wanted["counts"] == (11, 10, 1)
    with_batch = [path for path in left if any((path / "batches").glob("*.json"))]
    assert len(with_batch) > 12
    for path in with_batch:
        server = start(path)
        assert outcome(client_of(server), begun.id) == wanted, path.name
        assert not any((path / "batches").glob("batch_*/*")), path.name
        server.stop()


def test_a_torn_last_answer_is_answered_again(start, client_of, tmp_path):
    with Gate() as gate:
        client, begun = held(start, client_of, gate)
        client.server.loop.call_soon_threadsafe(client.server.http_server.drain)
        gate.open()
        client.server.stop()
    journal = tmp_path / "batches" / "batches" / begun.id / "journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    (journal.parent.parent / "batch_torn.json").write_bytes(b'{"id": "batch_')
    got = outcome(client_of(start()), begun.id)
    assert got["counts"] == (12, 12, 0) and len(got["files"][0].splitlines()) == 12


def test_a_disk_that_is_full_for_a_while_loses_nothing(start, client_of, monkeypatch):
    server = start()
    server.service.batches._look_s = 0.01
    failures = []
    finish = batch_desk.Batch.finish

    def fails_twice(self: Any) -> None:
        if len(failures) < 2:
            failures.append(1)
            raise BatchError("the disk is full")
        finish(self)

    monkeypatch.setattr(batch_desk.Batch, "finish", fails_twice)
    client = client_of(server)
    got = outcome(client, client.begin(rows(4)).id)
    assert (got["status"], got["counts"], len(failures)) == ("completed", (4, 4, 0), 2)


def test_a_batch_that_was_begun_with_another_model_waits_for_it(start, client_of, tmp_path):
    with Gate() as gate:
        client, begun = held(start, client_of, gate)
        client.server.loop.call_soon_threadsafe(client.server.http_server.drain)
        gate.open()
        client.server.stop()
    other = start(engine={"served_model_name": "other"})
    client = client_of(other)
    wait_until(lambda: begun.id in other.service.batches._asked)
    assert client.openai.batches.retrieve(begun.id).status == "in_progress"
    assert client.openai.batches.cancel(begun.id).status == "cancelling"
    batch = client.wait(begun.id)
    assert batch.status == "cancelled" and batch.request_counts.completed >= 3


def test_an_owner_has_only_so_many_open_batches(start, client_of, monkeypatch):
    monkeypatch.setattr(batch_desk, "MOST_OPEN", 2)
    monkeypatch.setattr(batch_desk, "MOST_ENDED", 1)
    with Gate() as gate:
        client, begun = held(start, client_of, gate)
        second = client.begin(rows(1))
        with pytest.raises(openai.BadRequestError, match="2 batches that have not ended"):
            client.begin(rows(1))
        gate.open()
        client.wait(begun.id)
        client.wait(second.id)
        third = client.begin(rows(1))
        assert [batch.id for batch in client.openai.batches.list()] == [third.id, second.id]
