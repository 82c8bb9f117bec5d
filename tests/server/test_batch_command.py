"""`mooli batch`: what it writes, what it says, how it ends; at an engine of its own and at a server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from fake_engine import byte_tokenizer, fake_build, says
from live import EngineThread

from mooli import cli
from mooli.batch_run import _Show, duration_words
from mooli.batches.runner import Progress
from mooli.engine import messages
from mooli.frontend.text_side import with_seed
from mooli.link.client import EngineClient
from mooli.server.bring_up import make_service


def row(custom_id, url, **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}}


def rows(count=9):
    """Of each kind of request, greedy."""
    found = []
    for number in range(count):
        asked = [{"role": "user", "content": f"question {number}"}]
        kinds = [
            ("/v1/chat/completions", {"messages": asked, "max_tokens": 8}),
            ("/v1/completions", {"prompt": f"prompt {number}>", "max_tokens": 8}),
            ("/v1/responses", {"input": f"input {number}", "max_output_tokens": 8}),
        ]
        url, body = kinds[number % 3]
        found.append(row(f"row {number}", url, temperature=0, **body))
    return found


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALLED = row(
    "call", "/v1/chat/completions", temperature=0, max_tokens=64, tools=TOOLS, tool_choice="required",
    messages=[{"role": "user", "content": "look"}],
)  # fmt: skip


@pytest.fixture
def batch(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder of its own, with a fake model where it starts one; gives (status, what it said).

    Options: rows to be written first, next_token and raises of the fake model, env.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "5")
    for name in ("OPENAI_API_KEY", "MOOLI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    runner, started, services = {}, [], []

    async def start_service(config, engine_config, argv, started_s, child, keys):
        ours, theirs = socket.socketpair()
        engine = EngineThread(theirs, lambda *_: fake_build(engine_config, **runner))
        client = await EngineClient.connect(messages.Start({}, "fake", "warning"), engine, ours)
        started.append(engine)
        services.append(make_service(config, with_seed(engine_config), client, byte_tokenizer(), started_s=0.0))
        return services[-1], client

    monkeypatch.setattr("mooli.server.bring_up.start_service", start_service)
    monkeypatch.setattr("mooli.engine.child.EngineChild", contextlib.nullcontext)
    monkeypatch.setattr("mooli.batch_run.set_up_logging", lambda level: None)

    def run(*words, rows=None, next_token=None, raises=None, env=None):
        runner.clear()
        runner.update(next_token=next_token or says("answer", after="assistant: "), raises=raises)
        if rows is not None:
            (tmp_path / "in.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
        with monkeypatch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            status = cli.main(["batch", "in.jsonl", "-o", "out.jsonl", *words])
        out, err = capsys.readouterr()
        assert out == ""
        return status, err

    run.folder, run.started, run.services = tmp_path, started, services
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_the_server_in_the_order_of_the_input(batch, live):
    status, said = batch(rows=rows())
    assert status == 0
    assert "9 rows to answer" in said and "9 rows, 9 of them in" in said
    found = lines(batch.folder / "out.jsonl")
    assert [line["custom_id"] for line in found] == [f"row {number}" for number in range(9)]
    assert not (batch.folder / "out.errors.jsonl").exists()
    assert not (batch.folder / "out.jsonl.journal").exists()
    server = live(says("answer", after="assistant: "))
    for item, line in zip(rows(), found, strict=True):
        asked = server.http.post(item["url"], json=item["body"]).json()
        body = line["response"]["body"]
        assert line["response"]["status_code"] == 200
        assert body.keys() == asked.keys()
        assert body.get("choices") == asked.get("choices")
        texts = [[item["content"][0]["text"] for item in one.get("output", ())] for one in (body, asked)]
        assert texts[0] == texts[1]


def test_rows_at_a_server_have_the_same_bytes(batch, live):
    def next_token(context):
        is_call = b"look" in bytes(token for token in context if token < 256)
        text = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>' if is_call else "answer"
        return says(text, after="assistant: ")(context)

    parser = ("--tool-call-parser", "hermes", "--context-length", "700")
    assert batch(*parser, rows=[*rows(), CALLED], next_token=next_token)[0] == 0
    expected = (batch.folder / "out.jsonl").read_bytes()
    server = live(next_token, api_key="secret", engine={"tool_call_parser": "hermes", "context_length": 700})
    for url in (server.url, f"{server.url}/v1/"):
        status, said = batch("--url", url, "--api-key", "secret", "--overwrite")
        assert status == 0
        assert (batch.folder / "out.jsonl").read_bytes() == expected
        assert "secret" not in said
    assert batch("--url", server.url, "--overwrite", env={"OPENAI_API_KEY": "secret"})[0] == 0
    call = lines(batch.folder / "out.jsonl")[-1]["response"]["body"]["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] == "look"


def test_rows_without_a_seed_are_drawn_the_same_in_any_order_and_company(batch):
    drawn = [
        row(f"row {number}", "/v1/completions", prompt=f"{number}>", max_tokens=8, temperature=5, n=2)
        for number in range(8)
    ]
    anything = {"next_token": lambda context: None}
    assert batch("--max-concurrency", "1", rows=drawn, **anything)[0] == 0
    expected = {line["custom_id"]: line for line in lines(batch.folder / "out.jsonl")}
    assert len({line["response"]["body"]["choices"][0]["text"] for line in expected.values()}) > 4
    assert batch("--overwrite", rows=drawn[::-1], **anything)[0] == 0
    assert {line["custom_id"]: line for line in lines(batch.folder / "out.jsonl")} == expected
    assert batch("--overwrite", "--random-seed", "1", **anything)[0] == 0
    assert {line["custom_id"]: line for line in lines(batch.folder / "out.jsonl")} != expected


def test_rows_that_fail_are_told_and_make_the_status_1(batch):
    bad = [row("empty", "/v1/chat/completions", messages=[]), row("other", "/v1/embeddings", input="x")]
    status, said = batch(rows=[*rows(3), *bad])
    assert status == 1
    assert "rows that failed: 2, in out.errors.jsonl" in said
    assert len(lines(batch.folder / "out.jsonl")) == 3
    errors = lines(batch.folder / "out.errors.jsonl")
    assert errors[0]["response"]["status_code"] == 400
    assert errors[1]["error"]["code"] == "unsupported_url"


def test_what_is_done_is_done_without_an_engine(batch):
    bad = [*rows(3), row("empty", "/v1/chat/completions", messages=[])]
    assert batch(rows=bad)[0] == 1
    before = (batch.folder / "out.jsonl").stat().st_mtime_ns
    status, said = batch()
    assert (status, len(batch.started)) == (1, 1)
    assert "there already, with all 4 rows: nothing is left to do" in said
    assert (batch.folder / "out.jsonl").stat().st_mtime_ns == before
    assert batch(rows=[])[0] == 2  # of these rows there are no results
    assert batch("--overwrite")[0] == 0
    assert (batch.folder / "out.jsonl").read_text() == ""


@pytest.mark.parametrize("change", [lambda found: found[:2], lambda found: [*found, *rows(4)[3:]], lambda found: []])
def test_results_of_other_rows_are_not_written_over(batch, change):
    assert batch(rows=rows(3))[0] == 0
    expected = (batch.folder / "out.jsonl").read_bytes()
    status, said = batch(rows=change(rows(3)))
    assert status == 2
    assert "is not of these rows: give another --output, or --overwrite" in said
    assert (batch.folder / "out.jsonl").read_bytes() == expected
    assert batch("--overwrite")[0] == 0


def interrupting(after):
    """Answers, and has Ctrl-C pressed once, at the step of that number."""
    count = [0]

    def raises(step):
        count[0] += 1
        if count[0] == after:
            os.kill(os.getpid(), signal.SIGINT)

    return raises


def test_ctrl_c_keeps_what_is_there_and_the_same_command_goes_on(batch):
    many = rows(60)
    assert batch(rows=many)[0] == 0
    expected = (batch.folder / "out.jsonl").read_bytes()
    (batch.folder / "out.jsonl").unlink()
    status, said = batch("--max-concurrency", "2", raises=interrupting(30))
    assert status == 130
    assert "interrupted" in said
    assert "of 60 rows are done, and kept in out.jsonl.journal: the same command goes on from there" in said
    kept = lines(batch.folder / "out.jsonl.journal")[1:]
    assert 0 < len(kept) < 60
    status, said = batch()
    assert status == 0
    assert f"{len(kept)} of 60 rows are done already" in said
    assert (batch.folder / "out.jsonl").read_bytes() == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_batch_does_not_go_on_with_another_engine(batch):
    assert batch("--max-concurrency", "2", rows=rows(60), raises=interrupting(30))[0] == 130
    kept = (batch.folder / "out.jsonl.journal").read_bytes()
    status, said = batch("--served-model-name", "other")
    assert status == 2
    assert "was begun with model='demo', and this is 'other'" in said
    assert (batch.folder / "out.jsonl.journal").read_bytes() == kept


def test_an_engine_that_dies_ends_the_run_with_its_cause(batch):
    count = [0]

    def raises(step):
        count[0] += 1
        if count[0] == 30:
            batch.started[-1].kill()

    status, said = batch("--max-concurrency", "2", rows=rows(60), raises=raises)
    assert status == 1
    assert "mooli: error: the engine" in said
    assert "the same command goes on from there" in said
    assert batch()[0] == 0
    assert len(lines(batch.folder / "out.jsonl")) == 60


def test_an_engine_that_hangs_ends_the_run(batch, monkeypatch):
    monkeypatch.setattr("mooli.server.bring_up.PING_INTERVAL_S", 0.05)
    ended, count = threading.Event(), [0]

    def raises(step):
        count[0] += 1
        if count[0] == 30:
            assert ended.wait(60)

    try:
        status, said = batch("--watchdog-timeout", "0.5", rows=rows(60), raises=raises)
    finally:
        ended.set()
    assert status == 1
    assert "gave no sign for 0.5 s" in said
    assert "the same command goes on from there" in said


def test_no_row_is_read_in_the_light_of_what_was_answered_before(batch):
    assert batch(rows=rows(2))[0] == 0
    assert batch.services[-1].own_answers is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-concurrency", "0"], "--max-concurrency=0 is too small"),
        (["--api-key", "x"], "--api-key has no effect without --url"),
        (["--url", "localhost:1"], "must begin with http:// or https://"),
        (["--url", "http://x", "--model-path", "demo"], "--model-path has no effect with --url"),
        (["--url", "http://x", "--sampling-defaults", "openai"], "--sampling-defaults has no effect with --url"),
        (["--skip-tokenizer-init"], "--skip-tokenizer-init: the rows are texts"),
        (["--stream-interval", "2"], "a batch has no streams"),
        (["--tp", "2"], "use tp_size=1"),
        (["-o", "in.jsonl"], "would be written over"),
        (["-o", "no/out.jsonl"], "there is no folder 'no'"),
        (["-o", "."], "is a folder"),
        (["--default-chat-template-kwargs", "[]"], "must be a JSON object"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_begun(batch, words, message):
    status, said = batch(*words, rows=rows(2))
    assert status == 2
    assert message in said
    assert said.startswith("mooli: error: ") and said.count("\n") == 1
    assert sorted(path.name for path in batch.folder.iterdir()) == ["in.jsonl"]


def test_an_input_that_is_not_there_is_told(batch):
    status, said = batch()
    assert (status, said) == (2, "mooli: error: there is no file 'in.jsonl'\n")


def test_a_server_that_is_not_there_is_told(batch):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nobody listens
        status, said = batch("--url", f"http://127.0.0.1:{held.getsockname()[1]}", rows=rows(2))
    assert status == 2
    assert "there is no server at http://127.0.0.1" in said and "check --url" in said
    assert not (batch.folder / "out.jsonl.journal").exists()


def test_a_key_that_is_refused_ends_the_batch_and_fails_no_row(batch, live):
    server = live(api_key="secret")
    for key in ([], ["--api-key", "other"]):
        status, said = batch("--url", server.url, *key, rows=rows(2))
        assert status == 2
        assert "refuses the key: HTTP 401" in said
    assert batch("--url", server.url, "--api-key", "secret")[0] == 0


def test_a_server_that_goes_meanwhile_ends_the_batch_and_the_same_command_goes_on(batch, live, monkeypatch):
    monkeypatch.setattr("mooli.batches.runner.Retries.pause_s", lambda retries, attempt: 0.0)
    answer, count = says("answer", after="assistant: "), [0]

    def raises(step):
        count[0] += 1
        if count[0] == 40:
            server.engine_process.kill()

    server = live(answer, runner={"raises": raises})
    status, said = batch("--url", server.url, "--max-concurrency", "2", rows=rows(60))
    assert status == 1
    assert "no row is answered any more" in said
    assert "the same command goes on from there" in said
    port = server.http_server.port
    server.stop()
    status, said = batch("--url", live(answer, port=port).url)
    assert status == 0
    assert len(lines(batch.folder / "out.jsonl")) == 60


def test_what_a_server_says_that_is_no_json_is_kept_as_text(batch):
    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        body = b"<html>\xff" if head.startswith(b"POST") else b"{}"
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    ready, ports, stop, loop = threading.Event(), [], asyncio.Event(), asyncio.new_event_loop()

    async def serve():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            ports.append(server.sockets[0].getsockname()[1])
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        status, _ = batch("--url", f"http://127.0.0.1:{ports[0]}", rows=rows(2))
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()
    assert status == 1
    (first, _) = lines(batch.folder / "out.errors.jsonl")
    assert first["response"] == {
        "status_code": 404, "request_id": first["response"]["request_id"], "body": "<html>\ufffd",
    }  # fmt: skip


def test_help_imports_nothing_of_what_the_command_does():
    code = "from mooli import cli\nimport sys\ntry: cli.main(['batch', '--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'asyncio', 'sqlite3', 'msgspec', 'numpy', 'aiohttp', 'mooli.batches'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--max-concurrency" in done.stdout and "--mem-fraction-static" in done.stdout


# -- what is said ------------------------------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream):
    """What a batch of 100 rows says on `stream`, a second a row."""
    now = [0.0]
    show, progress = _Show(stream, lambda: now[0]), Progress(total=100, done=10, already=10)
    show.began(90, "by nobody")
    for _ in range(25):
        now[0] += 1
        progress.done += 1
        progress.sent += 1
        progress.prompt_tokens += 10
        progress.cached_tokens += 5
        progress.completion_tokens += 20
        show.progress(progress)
    progress.failed = 2
    show.summary(progress)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def test_a_terminal_has_one_line_that_changes():
    said = shown(Terminal())
    first, bars, last = said.rstrip("\n").split("\n")
    assert first == "90 rows to answer, by nobody"
    assert bars.count("\r") == 25
    assert bars.rpartition("\r")[2] == (
        "[########................] 35/100 rows, 1.0 rows/s, 20 tokens/s, 50% cached, 1 min 5 s left"
    )
    assert last == (
        "100 rows, 25 of them in 25 s, 25 computed; 250 prompt tokens, 50% of them from the cache, 500 generated"
    )


def test_a_narrow_terminal_has_a_line_that_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    bars = shown(Terminal()).split("\n")[1].split("\r")[1:]
    assert {len(bar) for bar in bars} == {39}


def test_a_reader_that_leaves_ends_no_batch():
    class Left(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    assert shown(Left()) == ""


def test_elsewhere_there_is_a_line_now_and_then():
    said = shown(io.StringIO()).splitlines()
    assert said[1:3] == [
        "20/100 rows, 1.0 rows/s, 20 tokens/s, 50% cached, 1 min 20 s left",
        "30/100 rows, 1.0 rows/s, 20 tokens/s, 50% cached, 1 min 10 s left",
    ]
    assert len(said) == 4


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.4, "3 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (18740, "5 h 12 min")]
)
def test_durations_are_said_in_words(seconds, words):
    assert duration_words(seconds) == words
