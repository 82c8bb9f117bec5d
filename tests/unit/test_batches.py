"""Batches: what a row must be, their order, that no kill loses or doubles one, and that results are the same bytes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from mooli.batches.order import RowIndex
from mooli.batches.output import Journal, ResultFiles, settled
from mooli.batches.rows import MAX_VALUES, order_key, parse_row, seeded
from mooli.batches.runner import Batch, Progress, Retries
from mooli.errors import BatchError, EngineDeadError, RowError

CREATED = 1_700_000_000
SETTINGS = {"model": "fake"}


def chat(custom_id, text, **body):
    messages = [{"role": "user", "content": text}]
    return {
        "custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": messages, **body},
    }  # fmt: skip


def completion(custom_id, prompt, **body):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, **body}}


class Model:
    """Answers a row with its text, after some turns of the loop; ids, times and cached tokens are never the same twice.

    answers: instead, by text; what can be raised is raised. seen: the texts, in the order in which they came.
    """

    def __init__(self, answers=None, seed=0):
        self.answers = answers or {}
        self.seen = []
        self.bodies = []
        self.running = self.most_running = 0
        self._random = random.Random(seed)

    async def send(self, url, body):
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        self.seen.append(text)
        self.bodies.append(body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for _ in range(self._random.randrange(4)):
                await asyncio.sleep(0)
        finally:
            self.running -= 1
        answer = self.answers.get(text, 200)
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, BaseException):
            raise answer
        if answer != 200:
            return answer, {"error": {"message": f"no {text}"}}
        return 200, {
            "id": f"chatcmpl-{self._random.getrandbits(128):032x}",
            "created": self._random.randrange(10**9),
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text.upper()}}],
            "usage": {
                "prompt_tokens": 10, "completion_tokens": 3,
                "prompt_tokens_details": {"cached_tokens": self._random.randrange(10)},
            },
        }  # fmt: skip


class Folder:
    """A batch in a folder of its own, to be run as often as one likes."""

    def __init__(self, path: Path, rows=(), text=None):
        self.path = path
        path.mkdir(exist_ok=True)
        self.source, self.journal = path / "in.jsonl", path / "out.jsonl.journal"
        self.files = ResultFiles(path / "out.jsonl", path / "out.errors.jsonl")
        self.source.write_text("".join(json.dumps(row) + "\n" for row in rows) if text is None else text)

    def open(self, **options):
        return Batch(self.source, self.journal, self.files, **options)

    def run(self, model, *, settings=SETTINGS, max_concurrency=4, **options):
        """To its end; the progress. No pause takes any time."""

        async def run():
            with self.open() as batch:
                if batch.num_pending:
                    batch.begin(settings, CREATED)
                    wait = options.pop("wait", lambda pause_s: asyncio.sleep(0))
                    await batch.run(model.send, max_concurrency=max_concurrency, wait=wait, **options)
                batch.finish()
                return batch.progress

        return asyncio.run(run())

    @property
    def lines(self):
        return [json.loads(line) for line in self.files.output.read_text().splitlines()]

    @property
    def errors(self):
        return [json.loads(line) for line in self.files.errors.read_text().splitlines()]

    @property
    def results(self):
        return [path.read_bytes() if path.exists() else None for path in (self.files.output, self.files.errors)]


# -- rows --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("no JSON", "invalid_json", "not JSON"),
        ("[" * 100_000, "invalid_json", "nested too deeply"),
        ('{"custom_id": "\udcff"}', "invalid_json", "not JSON"),
        ("[1]", "invalid_request", "must be a JSON object"),
        ("{}", "missing_field", "custom_id is missing"),
        ({"custom_id": 7}, "invalid_request", "custom_id must be a text, not 7"),
        ({"custom_id": ""}, "invalid_request", "custom_id is empty"),
        ({"custom_id": "x" * 513}, "invalid_request", "513 characters"),
        ({"custom_id": "a", "url": "/v1/completions"}, "missing_field", "method is missing"),
        ({"custom_id": "a", "method": "GET"}, "invalid_method", "method='GET' must be POST"),
        ({"custom_id": "a", "method": "POST", "url": "/v1/embeddings"}, "unsupported_url", "not supported yet"),
        ({"custom_id": "a", "method": "POST", "url": "http://x"}, "invalid_url", "url='http://x' is none of"),
        ({"custom_id": "a", "method": "POST", "url": "/v1/completions"}, "missing_field", "body is missing"),
        (completion("a", "x", stream=True), "invalid_request", "no streams"),
        ("[" + "0," * MAX_VALUES + "0,0]", "too_many_values", str(MAX_VALUES)),
    ],
)
def test_a_line_that_is_wrong_is_told_why(line, code, words):
    raw = line if isinstance(line, str) else json.dumps(line)
    with pytest.raises(RowError, match=words) as raised:
        parse_row(raw.encode("utf-8", "surrogateescape"))
    assert raised.value.code == code


def test_a_text_with_many_commas_is_one_value():
    assert parse_row(json.dumps(completion("a", "," * (MAX_VALUES + 1))).encode()).custom_id == "a"


def test_every_line_that_is_wrong_has_its_line_in_the_error_file_and_the_others_are_answered(tmp_path):
    good, again = chat("a", "one"), chat("a", "two")
    text = f"\ufeff\n{json.dumps(good)}\r\n\n  \nnot JSON\n{json.dumps(again)}\n" + json.dumps(
        {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {}}
    )
    folder = Folder(tmp_path, text=text)
    progress = folder.run(Model())
    assert (progress.total, progress.done, progress.failed) == (4, 4, 3)
    assert [line["custom_id"] for line in folder.lines] == ["a"]
    found = [(line["custom_id"], line["error"]["code"], line["error"]["line"]) for line in folder.errors]
    assert found == [(None, "invalid_json", 5), (None, "duplicate_custom_id", 6), ("e", "unsupported_url", 7)]
    assert "that of line 2" in folder.errors[1]["error"]["message"]
    assert {line["response"] for line in folder.errors} == {None}


def test_a_line_that_is_too_long_is_not_kept_and_costs_no_other(tmp_path):
    long = json.dumps(completion("b", "x" * 3_000_000))
    folder = Folder(tmp_path, text=f"{json.dumps(chat('a', 'one'))}\n{long}\n{json.dumps(chat('c', 'three'))}\n{long}")
    with RowIndex(folder.source, max_line_bytes=1000) as index:
        assert (index.num_rows, index.num_refused) == (4, 2)
        refused = [(item.line, item.code) for item in index.results(failed=True)]
        names = [placed.row.custom_id for group in index.groups() for placed in index.rows_of(group)]
    assert refused == [(2, "line_too_long"), (4, "line_too_long")]
    assert sorted(names) == ["a", "c"]


def test_rows_of_the_same_body_are_answered_once_and_each_has_its_line(tmp_path):
    rows = [chat("a", "same"), chat("b", "other"), chat("c", "same"), completion("d", "same")]
    rows.append({**chat("e", "same"), "body": dict(reversed(chat("e", "same")["body"].items()))})
    folder, model = Folder(tmp_path, rows), Model()
    progress = folder.run(model)
    assert Counter(model.seen) == {"same": 2, "other": 1}
    assert (progress.done, progress.sent, progress.prompt_tokens) == (5, 3, 30)
    assert [line["custom_id"] for line in folder.lines] == ["a", "b", "c", "d", "e"]
    bodies = [line["response"]["body"] for line in folder.lines]
    assert bodies[0]["choices"] == bodies[2]["choices"] == bodies[4]["choices"]
    assert len({body["id"] for body in bodies}) == 5


def test_a_seed_is_of_what_a_row_asks_for_and_one_that_is_given_stays(tmp_path):
    rows = [chat("a", "one"), chat("b", "two"), chat("c", "three", seed=7)]
    seeds = []
    for order in (rows, rows[::-1]):
        folder, model = Folder(tmp_path / str(len(seeds)), order), Model()
        folder.run(model, seed=1)
        seeds.append({body["messages"][0]["content"]: body["seed"] for body in model.bodies})
    assert seeds[0] == seeds[1]
    assert seeds[0]["three"] == 7
    assert len(set(seeds[0].values())) == 3
    assert seeded({}, b"work", 1) != seeded({}, b"work", 2)
    folder, model = Folder(tmp_path / "as they are", rows), Model()
    folder.run(model)
    assert [body.get("seed") for body in model.bodies].count(None) == 2


# -- order -------------------------------------------------------------------------------------------------------------
def longest_common(one, other):
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("head_chars", [10, 900, 5000])
def test_rows_come_by_what_their_prompts_share(tmp_path, head_chars):
    rng = random.Random(head_chars)
    heads = ["".join(rng.choices("abc ", k=head_chars)) for _ in range(8)]
    parts = [f"{head} part {part} " + "x" * 600 for head in heads for part in range(3)]
    rows = [chat(str(number), f"{part} {number}") for number, part in enumerate(parts * 4)]
    rng.shuffle(rows)
    model = Model()
    Folder(tmp_path, rows).run(model, max_concurrency=1)
    assert len(model.seen) == len(rows)
    walked = [text.rsplit(" ", 1)[0] for text in model.seen]
    assert sum(one != other for one, other in itertools.pairwise(walked)) == len(parts) - 1
    by_head = [text[:head_chars] for text in model.seen]
    assert sum(one != other for one, other in itertools.pairwise(by_head)) == len(heads) - 1


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/responses"])
def test_what_comes_first_in_a_prompt_counts_first(url):
    def key(turns, **body):
        name = "messages" if url == "/v1/chat/completions" else "input"
        return order_key(parse_row(json.dumps({**chat("a", ""), "url": url, "body": {name: turns, **body}}).encode()))

    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}
    longer = [system, user, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    assert key(longer).startswith(key([system, user]))
    assert key([system, user]).startswith(key([system]))
    tools = [{"type": "function", "name": "f"}]
    assert longest_common(key([system], tools=tools), key([user], tools=tools)) > longest_common(
        key([system], tools=tools), key([system])
    )
    assert not key([system], cache_salt="x").startswith(key([system]))


def test_keys_of_long_prompts_are_short():
    row = parse_row(json.dumps(completion("a", "x" * 1_000_000)).encode())
    assert len(order_key(row)) < 40_000
    ids = parse_row(json.dumps(completion("a", [1, 2, 3])).encode())
    more = parse_row(json.dumps(completion("a", [1, 2, 3, 4])).encode())
    assert order_key(more).startswith(order_key(ids))


# -- failures ----------------------------------------------------------------------------------------------------------
def test_one_row_that_fails_stops_no_other_and_stands_in_the_error_file(tmp_path):
    rows = [chat(str(number), f"text {number}") for number in range(20)]
    answers = {"text 3": 400, "text 5": ConnectionResetError("reset"), "text 7": 503, "text 9": 500}
    folder = Folder(tmp_path, rows)
    progress = folder.run(Model(answers), retries=Retries(attempts=3))
    assert (progress.done, progress.failed, progress.retried) == (20, 4, 4)
    assert [line["custom_id"] for line in folder.lines] == [str(n) for n in range(20) if n not in (3, 5, 7, 9)]
    by_id = {line["custom_id"]: line for line in folder.errors}
    assert list(by_id) == ["3", "5", "7", "9"]
    assert by_id["3"]["response"]["status_code"] == 400
    assert by_id["3"]["response"]["body"] == {"error": {"message": "no text 3"}}
    assert by_id["3"]["error"] is None
    assert by_id["5"]["response"] is None
    assert by_id["5"]["error"] == {"code": "connection_failed", "message": "no answer came: reset"}
    assert by_id["7"]["response"]["status_code"] == 503


def test_a_row_is_sent_again_with_longer_and_longer_pauses(tmp_path):
    pauses = []

    async def wait(pause_s):
        pauses.append(pause_s)

    answers = {"one": [429, ConnectionRefusedError("refused"), asyncio.TimeoutError(), 503, 200]}
    folder = Folder(tmp_path, [chat("a", "one")])
    progress = folder.run(Model(answers), wait=wait, retries=Retries(attempts=5, first_s=1, longest_s=4))
    assert (progress.failed, progress.retried) == (0, 4)
    for pause_s, most_s in zip(pauses, [1, 2, 4, 4], strict=True):
        assert most_s / 2 <= pause_s <= most_s


def test_a_server_that_is_gone_ends_the_run_and_fails_no_row(tmp_path):
    rows = [chat(str(number), f"text {number}") for number in range(30)]
    gone = {f"text {number}": ConnectionRefusedError("refused") for number in range(30)}
    folder = Folder(tmp_path, rows)
    model = Model(gone)
    with pytest.raises(
        BatchError, match=r"no row is answered any more.*each sent 2 times.*refused.*run the same again"
    ):
        folder.run(model, retries=Retries(attempts=2), max_concurrency=2)
    assert len(set(model.seen)) < 15
    assert folder.run(Model()).already == 0
    assert not folder.files.errors.exists()
    small = Folder(tmp_path / "small", rows[:2])
    with pytest.raises(BatchError, match="no row is answered"):
        small.run(Model({"text 0": 503, "text 1": 503}), retries=Retries(attempts=2))


def test_rows_that_break_every_connection_fail_if_others_are_still_answered(tmp_path):
    rows = [chat(str(number), f"text {number:02}") for number in range(60)]
    bad = {f"text {number:02}": ConnectionResetError("reset") for number in (*range(10, 30), *range(57, 60))}
    folder = Folder(tmp_path, rows)
    with folder.open() as batch:  # nothing but these is left
        batch.begin(SETTINGS, CREATED)
        with pytest.raises(EngineDeadError):
            asyncio.run(batch.run(Model({**bad, "text 10": EngineDeadError("")}).send, max_concurrency=1))
    progress = folder.run(Model(bad), retries=Retries(attempts=2), max_concurrency=1)
    assert (progress.already, progress.done, progress.failed) == (10, 60, 23)
    assert [line["custom_id"] for line in folder.errors] == [text.split()[1].lstrip("0") for text in bad]


def test_a_server_that_goes_while_the_last_rows_run_fails_none_of_them(tmp_path):
    rows = [chat(str(number), f"text {number:02}") for number in range(20)]
    folder, gone = Folder(tmp_path, rows), ConnectionRefusedError("refused")
    answers = {"text 00": [200, gone], **{f"text {number:02}": [200, gone] for number in range(1, 17)}}
    answers |= {f"text {number:02}": gone for number in range(17, 20)}
    with pytest.raises(BatchError, match=r"3 in a row"):
        folder.run(Model(answers), retries=Retries(attempts=2), max_concurrency=1)
    assert folder.run(Model()).already == 17


@pytest.mark.parametrize("then", ["answers", "waits"])
def test_a_run_that_is_cancelled_ends_though_a_sender_takes_that_for_something_else(tmp_path, monkeypatch, then):
    monkeypatch.setattr("mooli.batches.runner.CANCEL_AGAIN_S", 0.01)
    folder = Folder(tmp_path, [chat(str(number), f"text {number}") for number in range(20)])
    model, sent = Model(), []

    async def send(url, body):
        sent.append(body)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        if then == "waits":
            await asyncio.Event().wait()
        return await model.send(url, body)

    async def run():
        with folder.open() as batch:
            batch.begin(SETTINGS, CREATED)
            running = asyncio.ensure_future(batch.run(send, max_concurrency=2))
            while len(sent) < 2:
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.wait([running], timeout=60)
            assert running.cancelled()
            return batch.progress.done

    assert asyncio.run(run()) == (2 if then == "answers" else 0)
    assert len(sent) == 2


def test_an_engine_that_dies_ends_the_run_with_its_cause_and_keeps_what_is_there(tmp_path):
    rows = [chat(str(number), f"text {number:02}") for number in range(20)]
    folder = Folder(tmp_path, rows)
    with pytest.raises(EngineDeadError, match="the cause"):
        folder.run(Model({"text 10": EngineDeadError("the cause")}), max_concurrency=1)
    model = Model()
    assert folder.run(model).already == 10
    assert sorted(model.seen) == [f"text {number:02}" for number in range(10, 20)]


# -- what is kept ------------------------------------------------------------------------------------------------------
ROWS = [chat(f"row {number}", f"head {number % 5} text {number % 23}") for number in range(60)]


def whole(path):
    folder = Folder(path, ROWS)
    folder.run(Model({"head 1 text 6": 400}))
    return folder


def test_a_run_that_is_cut_anywhere_goes_on_and_ends_with_the_same_bytes(tmp_path):
    expected = whole(tmp_path / "whole").results
    assert None not in expected
    folder, rng = Folder(tmp_path / "cut", ROWS), random.Random(3)
    num_cuts = 0
    while not folder.files.output.exists():
        stop_at = rng.randrange(8)

        class Stop(Exception):
            pass

        def look(progress: Progress, stop_at=stop_at):
            if progress.done - progress.already > stop_at:
                raise Stop

        try:
            folder.run(Model({"head 1 text 6": 400}, seed=rng.random()), on_progress=look)
        except Stop:
            num_cuts += 1
            written = folder.journal.read_bytes()
            folder.journal.write_bytes(written[: len(written) - rng.choice([0, 0, 1, 30, 500])])
    assert num_cuts > 5
    assert folder.results == expected
    assert not folder.journal.exists()
    assert sorted(path.name for path in folder.path.iterdir()) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]


def test_a_journal_may_be_torn_at_any_byte(tmp_path):
    folder = Folder(tmp_path, ROWS[:3])
    expected = None
    with folder.open() as batch:
        batch.begin(SETTINGS, CREATED)
        asyncio.run(batch.run(Model().send, max_concurrency=2))
        written = folder.journal.read_bytes()
        batch.finish()
        expected = folder.results
    for length in range(0, len(written), 61):
        folder.journal.write_bytes(written[:length])
        folder.run(Model(seed=length))
        assert folder.results == expected, length


def test_a_row_that_was_changed_is_answered_again_and_one_that_was_added_too(tmp_path):
    folder = Folder(tmp_path, [chat("a", "one"), chat("b", "two")])
    with folder.open() as batch:
        batch.begin(SETTINGS, CREATED)
        asyncio.run(batch.run(Model().send, max_concurrency=1))
    Folder(tmp_path, [chat("c", "three"), chat("b", "two"), chat("a", "other")])
    model = Model()
    assert folder.run(model).already == 1
    assert sorted(model.seen) == ["other", "three"]
    texts = [line["response"]["body"]["choices"][0]["message"]["content"] for line in folder.lines]
    assert texts == ["THREE", "TWO", "OTHER"]


def test_answers_of_two_settings_are_not_mixed(tmp_path):
    folder = Folder(tmp_path, ROWS)
    with pytest.raises(EngineDeadError):
        folder.run(Model({"head 3 text 3": EngineDeadError("")}))
    with pytest.raises(BatchError, match=r"was begun with model='fake', and this is 'other'.*--overwrite"):
        folder.run(Model(), settings={"model": "other"})
    with folder.open(anew=True) as batch:
        assert batch.progress.already == 0
        batch.begin({"model": "other"}, CREATED)


def test_two_processes_do_not_write_one_batch(tmp_path):
    folder = Folder(tmp_path, ROWS)
    with folder.open(), pytest.raises(BatchError, match="another process writes"):
        folder.open()
    folder.open().close()


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    folder = Folder(tmp_path, ROWS)
    for text in ("my notes", "my notes\n", '{"journal": "mine"}\n', '{"journal":99,"created":0,"settings":{}}\n'):
        folder.journal.write_text(text)
        with pytest.raises(BatchError, match=r"no journal|another version"):
            folder.open()
        assert folder.journal.read_text() == text


@pytest.mark.parametrize("what", ["absent", "folder"])
def test_an_input_that_is_no_file_is_told_and_leaves_nothing_behind(tmp_path, what):
    folder = Folder(tmp_path)
    folder.source.unlink()
    if what == "folder":
        folder.source.mkdir()
    with pytest.raises(BatchError, match="no file"):
        folder.open()
    assert not folder.journal.exists()


def test_an_input_that_changes_meanwhile_ends_the_run(tmp_path):
    folder = Folder(tmp_path, ROWS)
    with folder.open() as batch:
        batch.begin(SETTINGS, CREATED)
        folder.source.write_text("x" * folder.source.stat().st_size)
        with pytest.raises(BatchError, match="was changed while"):
            asyncio.run(batch.run(Model().send, max_concurrency=1))


def test_a_full_disk_ends_the_run_and_what_is_kept_is_whole(tmp_path, monkeypatch):
    expected = whole(tmp_path / "whole").results
    folder = Folder(tmp_path / "full", ROWS)
    left, write = [3000], os.write

    def full(number, data):
        if len(data) > left[0]:
            if left[0] < 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            data = data[: left[0]]  # the system takes what fits
        left[0] -= len(data)
        return write(number, data)

    model = Model({"head 1 text 6": 400})
    with monkeypatch.context() as patch:
        patch.setattr("mooli.batches.output.os.write", full)
        with pytest.raises(BatchError, match=r"No space left on device\. What was written before is kept"):
            folder.run(model)
    assert folder.journal.read_bytes().endswith(b"\n")
    folder.run(model)
    assert folder.results == expected


def test_results_that_cannot_be_written_leave_the_journal(tmp_path, monkeypatch):
    folder = Folder(tmp_path, ROWS)

    def fails(number):
        raise OSError(errno.EIO, "Input/output error")

    with folder.open() as batch:
        batch.begin(SETTINGS, CREATED)
        asyncio.run(batch.run(Model().send, max_concurrency=4))
        with monkeypatch.context() as patch:
            patch.setattr("mooli.batches.output.os.fsync", fails)
            with pytest.raises(BatchError, match="Input/output error"):
                batch.finish()
    model = Model()
    assert folder.run(model).already == 60
    assert not model.seen
    assert len(folder.lines) == 60


def test_rows_without_an_answer_can_be_given_up(tmp_path):
    folder = Folder(tmp_path, ROWS)
    with folder.open() as batch:
        with pytest.raises(BatchError, match="60 rows have no answer yet"):
            batch.finish()
        batch.begin(SETTINGS, CREATED)
        batch.give_up("batch_expired", "its time was up")
        batch.finish()
    assert [line["custom_id"] for line in folder.errors] == [row["custom_id"] for row in ROWS]
    assert folder.errors[0]["error"] == {"code": "batch_expired", "message": "its time was up"}


def test_a_file_without_rows_has_results_without_lines(tmp_path):
    folder = Folder(tmp_path, text="\n\n")
    assert folder.run(Model()).total == 0
    assert folder.results == [b"", None]
    assert not folder.journal.exists()


def test_no_more_rows_are_sent_at_a_time_than_allowed(tmp_path):
    model = Model()
    Folder(tmp_path, ROWS).run(model, max_concurrency=5)
    assert model.most_running == 5


# -- what is settled ---------------------------------------------------------------------------------------------------
def test_what_was_drawn_is_replaced_and_what_says_something_stays():
    item_id, call_id = "fc_0123456789abcdef0123456789abcdef", "call_0123456789abcdef01234567"
    body = {
        "id": "resp_0123456789abcdef0123456789abcdef", "created_at": 5, "completed_at": None,
        "output": [
            {"type": "function_call", "id": item_id, "call_id": call_id},
            {"type": "function_call", "id": "fc_1", "call_id": "functions.search:0"},
        ],
        "metadata": {"id": call_id},
        "usage": {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0}},
    }  # fmt: skip
    one, other = settled(body, "a" * 32, 9), settled(body, "b" * 32, 9)
    assert one["id"] == "resp_" + "a" * 32
    assert (one["created_at"], one["completed_at"]) == (9, None)
    assert one["usage"] == {"input_tokens": 3, "input_tokens_details": {}}
    assert one["output"][1] == body["output"][1]
    ids = {value for item in (one["output"][0], other["output"][0]) for value in (item["id"], item["call_id"])}
    assert len(ids) == 4
    assert not ids & {item_id, call_id}
    assert all(value.startswith(("fc_", "call_")) for value in ids)
    assert one["metadata"] == body["metadata"]
    again = json.loads(json.dumps(body).replace(call_id, "call_" + "f" * 24).replace("0123", "9876"))
    again["metadata"] = body["metadata"]
    assert settled(again, "a" * 32, 9) == one
    assert settled("no object", "a", 9) == "no object"
    odd = {"usage": None, "choices": [None, {"message": {"tool_calls": [None]}}], "output": "x"}
    assert settled(odd, "a", 9) == odd


def test_calls_of_a_chat_are_renamed_alike():
    call = {"id": "call_0123456789abcdef01234567", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = {"id": "x", "choices": [{"message": {"role": "assistant", "tool_calls": [call, {**call, "id": "y"}]}}]}
    calls = settled(body, "c" * 32, 0)["choices"][0]["message"]["tool_calls"]
    assert calls[0]["id"].startswith("call_cccc")
    assert calls[1]["id"] == "y"


def test_a_journal_that_is_let_go_by_one_is_made_anew_by_the_next(tmp_path):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.begin({}, 1)
        journal.remove()
    assert not path.exists()
    with Journal(path) as journal:
        assert journal.settings is None
    assert not path.exists()
