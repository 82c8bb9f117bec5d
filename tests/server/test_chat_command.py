"""`mooli run` and `mooli chat` with a server: found at the usual address or named, and what goes wrong there."""

from __future__ import annotations

import codecs
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import FakeEngine, says

from mooli import cli
from mooli.chat import command, keyboard

ANSWER = says("answer", after="assistant: ")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*argv, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        status = cli.main([*argv])
        return status, *capsys.readouterr()

    return run


def test_run_goes_through_the_server_that_has_the_model(run, live, monkeypatch):
    server = live(ANSWER)
    monkeypatch.setattr(command, "USUAL_ADDRESS", ("127.0.0.1", server.http_server.port))
    status, out, err = run("run", "fake", "say", "it")
    assert (status, out) == (0, "answer\n")
    assert f"answered by the server at {server.url}" in err
    assert "[7 tokens" in err or "[6 tokens" in err
    assert "prompt 24 tokens, 0 from the cache" in err


def test_run_loads_the_model_where_the_server_has_another(run, live, monkeypatch):
    FakeEngine(monkeypatch).runner_options = {"next_token": ANSWER, "raises": None}
    server = live(ANSWER)
    monkeypatch.setattr(command, "USUAL_ADDRESS", ("127.0.0.1", server.http_server.port))
    status, out, err = run("run", "another", "hi", "--temperature", "0")
    assert (status, out) == (0, "answer\n")
    assert "another: ready in" in err


def test_run_takes_all_of_a_pipe_as_one_question_and_chat_each_line(run, live):
    server = live(ANSWER)
    assert run("run", "fake", "--url", server.url, stdin="a\nb\n")[1] == "answer\n"
    assert run("chat", "fake", "--url", server.url, stdin="a\nb\n")[1] == "answer\nanswer\n"


def test_a_conversation_with_a_server_is_reused_by_its_cache_and_trimmed_to_its_context(run, live):
    server = live(ANSWER)
    lines = "".join(f"question {n} of some length\n" for n in range(4))
    status, out, err = run("chat", "--url", server.url, "--temperature", "0", stdin=lines)
    assert (status, out) == (0, "answer\n" * 4)
    assert "the context of 128 tokens is full: the oldest" in err
    cached = [int(found) for found in re.findall(r"(\d+) from the cache", err)]
    assert cached[0] == 0 and cached[1] > 0


def test_lines_of_json_are_answered_by_lines_of_json(run, live, tmp_path):
    server = live(ANSWER)
    lines = ["plain", '"quoted\\ntext"', '{"content": "object"}', "{", '{"content": 3}', "x" * 500]
    status, out, _ = run("chat", "--url", server.url, "--json", "--max-new-tokens", "3", stdin="\n".join(lines))
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 2
    assert [answer.get("content") for answer in answers] == ["ans", "ans", "ans", None, None, None]
    assert answers[0]["finish_reason"] == "length"
    assert answers[0]["usage"]["completion_tokens"] == 3
    assert ["error" in answer for answer in answers] == [False] * 3 + [True] * 3
    assert "128 tokens" in answers[5]["error"]["message"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "name a model"),
        (["chat", "--url", "nonsense"], "is no address of a server"),
        (["chat", "--url", "http://127.0.0.1:1"], "cannot be reached"),
        (["chat", "other", "--url", "URL"], "does not serve other: it has fake"),
        (["chat", "--url", "URL", "--page-size", "8"], "--page-size: with --url that is for the server to say"),
        (["chat", "fake", "--api-key", "k"], "--api-key: no server is talked to here"),
        (["chat", "fake", "--url", "URL", "--file", "/no/such"], "/no/such cannot be read"),
        (["chat", "fake", "--url", "URL", "--load", "/no/such"], "/no/such cannot be read"),
        (["chat", "fake", "hi", "--url", "URL", "--top-p", "7"], "top_p"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line_and_status_2(run, live, words, message):
    server = live(ANSWER)
    status, out, err = run(*(word.replace("URL", server.url) for word in words))
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("mooli: error: ") and message in last


def test_a_server_that_asks_for_a_key_gets_it(run, live):
    server = live(ANSWER, api_key="secret")
    assert run("run", "fake", "hi", "--url", server.url, "--api-key", "secret")[1] == "answer\n"
    status, _, err = run("run", "fake", "hi", "--url", server.url)
    assert status == 2 and "401" in err


def test_files_go_with_the_question(run, live, tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("the note")
    seen = []
    server = live(lambda context: seen.append(bytes(context)) or 256)
    run("run", "fake", "what?", "--file", str(path), "--url", server.url)
    assert seen[0] == b"user: the note\n\nwhat?\nassistant: "


def test_commands_of_a_conversation(run, live, tmp_path):
    server = live(ANSWER)
    talk, note = tmp_path / "talk.json", tmp_path / "note.txt"
    note.write_text("noted")
    lines = [
        *("one", "/retry", "/set temperature 0", "/set top_p 7", "/set", "/system be brief", f"/file {note}"),
        *("two", f"/save {talk}", "/reset", "/retry", f"/load {talk}", "/load /no/such", "/save", "/nonsense", "/exit"),
    ]
    status, out, err = run("chat", "--url", server.url, stdin="\n".join(lines))
    assert (status, out) == (0, "answer\n" * 3)
    kept = json.loads(talk.read_text())
    assert [message["content"] for message in kept["messages"]] == ["one", "answer", "noted\n\ntwo", "answer"]
    assert (kept["system"], kept["settings"]) == ("be brief", {"temperature": 0})
    for words in (
        *("temperature = 0", "top_p", "system message is set", "5 characters", "4 messages are in"),
        *("is forgotten", "nothing to answer again", "4 messages are loaded", "/no/such cannot be read"),
        *("/save needs a file", "There is no /nonsense"),
    ):
        assert words in err


# -- in a terminal -----------------------------------------------------------------------------------------------------
class Terminal:
    """A command in a pseudo terminal of its own."""

    def __init__(self, *words: str, home: Path) -> None:
        self.output = ""
        self._seen = 0
        self._text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in two reads
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "HOME": str(home), "XDG_STATE_HOME": str(home), "TERM": "xterm", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mooli", *words],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True, close_fds=True,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, words: str) -> None:
        """Wait for `words`, behind those waited for before."""
        deadline = time.monotonic() + 60
        while words not in self.output[self._seen :]:
            if not self._read(deadline):
                raise AssertionError(f"{words!r} has not come:\n{self.output[self._seen :]}\nafter\n{self.output}")
        self._seen = self.output.index(words, self._seen) + len(words)

    def end(self) -> int:
        while self._read(time.monotonic() + 60):
            pass
        status = self.process.wait(60)
        os.close(self._ours)
        return status

    def close(self) -> None:
        """Whatever has happened: the process ends."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
        try:
            data = os.read(self._ours, 65536) if ready else b""
        except OSError:  # the other end is closed
            data = b""
        self.output += self._text.decode(data)
        return bool(data)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_a_conversation_in_a_terminal_takes_lines_and_quotes_and_keeps_its_history(live, tmp_path, request):
    server = live(ANSWER)
    terminal = Terminal("chat", "--url", server.url, home=tmp_path)
    request.addfinalizer(terminal.close)
    terminal.until("> ")
    terminal.type("first question\r")
    terminal.until("[7 tokens")
    terminal.until("> ")
    terminal.type('"""a\r')
    terminal.until("… ")
    terminal.type('b"""\r')
    terminal.until("[7 tokens")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    history = (tmp_path / "mooli" / "chat_history").read_text()
    assert "first question" in history
    assert (tmp_path / "mooli" / "chat_history").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        (["one", KeyboardInterrupt, "two", KeyboardInterrupt, KeyboardInterrupt, "three"], ["one", "two"]),
        ([KeyboardInterrupt, KeyboardInterrupt, "one"], []),
        (['"""a', KeyboardInterrupt, "one", EOFError, "two"], ["one"]),
    ],
)
def test_ctrl_c_takes_back_what_is_typed_and_twice_leaves(monkeypatch, capsys, typed, taken):
    """As Python's `input` tells of it."""
    keys = iter(typed)

    def read(prompt):
        key = next(keys)
        if not isinstance(key, str):
            raise key
        return key

    monkeypatch.setattr("builtins.input", read)
    assert list(keyboard._typed()) == taken
    assert "Ctrl-C again" in capsys.readouterr().err


@pytest.mark.slow
def test_an_answer_in_a_terminal_is_drawn_as_markdown(live, tmp_path):
    pytest.importorskip("rich")
    server = live(says("# Head\n\n**bold** text\n", after="assistant: "))
    terminal = Terminal("run", "fake", "hi", "--url", server.url, home=tmp_path)
    assert terminal.end() == 0
    assert (
        "Head" in terminal.output and "# Head" not in terminal.output and "**" not in terminal.output.split("Head")[-1]
    )
    plain = Terminal("run", "fake", "hi", "--url", server.url, "--plain", home=tmp_path)
    assert plain.end() == 0
    assert "# Head" in plain.output and "**bold**" in plain.output
