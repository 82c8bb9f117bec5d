"""What becomes of log lines: how they look, and what happens where nobody takes them."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mooli import logs
from mooli.logs import LOG_FORMAT, LineHandler, _LineFormatter, log_object


class Pipe:
    """A logger that writes into a pipe. `read` takes what is there."""

    def __init__(self, *, is_blocking: bool = True) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        os.set_blocking(self.write_end, is_blocking)
        handler = LineHandler(self.write_end)
        handler.setFormatter(_LineFormatter(LOG_FORMAT))
        self.logger = logging.Logger("test")
        self.logger.addHandler(handler)

    def read(self) -> str:
        said = b""
        try:
            while piece := os.read(self.read_end, 1 << 20):
                said += piece
        except BlockingIOError:
            pass
        return said.decode()

    def fill(self) -> None:
        """Until the pipe takes nothing more."""
        os.set_blocking(self.write_end, False)
        try:
            while True:
                os.write(self.write_end, b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(self.write_end, True)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    monkeypatch.setattr(logs, "PATIENCE_S", 0.001)
    pipe = Pipe()
    yield pipe
    os.close(pipe.read_end)
    os.close(pipe.write_end)


def test_a_line_has_time_level_and_name(pipe):
    pipe.logger.warning("it is %s: %s", "é", "\udc80")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING test: it is é: \\udc80\n", pipe.read())


def test_an_object_is_a_line_by_itself(pipe):
    log_object(pipe.logger, {"event": "answered", "text": 'a\nb"é'})
    line = pipe.read()
    assert line.endswith("}\n") and line.count("\n") == 1
    said = json.loads(line)
    assert said["text"] == 'a\nb"é' and re.fullmatch(r"[\d-]+T[\d:.]+\+00:00", said["time"])


def test_a_full_pipe_holds_nobody_up_and_says_later_what_was_lost(pipe, capfd):
    pipe.fill()
    for _ in range(1000):
        pipe.logger.warning("lost")
    assert set(pipe.read()) == {"x"}
    pipe.logger.warning("there again")
    loss, line = pipe.read().splitlines()
    assert loss == "WARNING mooli.logs: 1000 lines of the log could not be written"
    assert line.endswith("WARNING test: there again")
    pipe.logger.warning("and again")
    assert pipe.read().count("\n") == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux' /proc")
def test_a_pipe_that_another_process_fills_at_the_last_moment_holds_nobody_up(pipe):
    pipe.fill()
    (handler,) = pipe.logger.handlers
    handler._poll = SimpleNamespace(poll=lambda timeout_ms: True)
    pipe.logger.warning("lost")
    assert os.get_blocking(pipe.write_end)
    assert set(pipe.read()) == {"x"}


def test_a_line_that_was_cut_is_ended_before_the_next(pipe):
    pipe.logger.warning("y" * 1_000_000)
    cut = pipe.read()
    assert not cut.endswith("\n") and len(cut) >= 4096
    pipe.logger.warning("next")
    assert [line[-40:] for line in pipe.read().splitlines()][-1].endswith("WARNING test: next")


def test_a_long_line_is_whole_where_somebody_reads(pipe):
    pipe.logger.warning("y" * 20_000)
    assert pipe.read().endswith("y" * 20_000 + "\n")


def test_a_long_line_goes_into_a_file_in_one_piece(tmp_path, monkeypatch):
    pieces = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: pieces.append(len(data)) or write(descriptor, data))
    with open(tmp_path / "log", "wb") as file:
        logger = logging.Logger("test")
        logger.addHandler(LineHandler(file.fileno()))
        logger.warning("y" * 20_000)
    assert pieces == [20_001] and (tmp_path / "log").read_text() == "y" * 20_000 + "\n"


def test_a_pipe_that_nobody_reads_any_more_is_no_error(capfd):
    pipe = Pipe()
    os.close(pipe.read_end)
    for _ in range(100):
        pipe.logger.warning("lost")
    os.close(pipe.write_end)
    assert capfd.readouterr() == ("", "")


def test_a_pipe_that_refuses_instead_of_waiting_is_no_error(monkeypatch, capfd):
    monkeypatch.setattr(logs, "PATIENCE_S", 0.001)
    pipe = Pipe(is_blocking=False)
    pipe.fill()
    os.set_blocking(pipe.write_end, False)
    for _ in range(100):
        pipe.logger.warning("lost")
    pipe.read()
    pipe.logger.warning("there")
    assert "100 lines" in pipe.read()
    os.close(pipe.read_end)
    os.close(pipe.write_end)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' /dev/full")
def test_a_full_disk_is_no_error(capfd):
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        handler = LineHandler(descriptor)
        logger = logging.Logger("test")
        logger.addHandler(handler)
        for _ in range(100):
            logger.warning("lost")
    finally:
        os.close(descriptor)
    assert capfd.readouterr() == ("", "")


def test_a_reader_that_is_always_behind_holds_up_the_writer_for_a_small_share_of_the_time(pipe, monkeypatch):
    """Each line finds the pipe full, and is taken when it has waited: 100 lines in a second of other work."""
    now_s, waited_s = [0.0], [0.0]

    class Poll:
        def poll(self, timeout_ms: float) -> list[int]:
            if not timeout_ms:
                return []
            now_s[0] += timeout_ms / 1000
            waited_s[0] += timeout_ms / 1000
            return [1]

    monkeypatch.setattr(logs, "PATIENCE_S", 0.1)
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    handler = logs.LineHandler(pipe.write_end)
    handler._poll = Poll()
    for _ in range(100):
        now_s[0] += 0.01
        handler.emit(logging.makeLogRecord({"msg": "a line"}))
    assert 0.1 <= waited_s[0] <= 0.1 + 0.01 * now_s[0]
    assert pipe.read().count("a line") == 100
