"""Progress in words: one line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io

import pytest

from mooli.hub.pull import PullProgress, duration, size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (282_000, "282 kB"), (15_230_000, "15.2 MB"), (15.23e9, "15.23 GB")],
)
def test_sizes_have_the_unit_that_fits(count: float, words: str) -> None:
    assert size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_durations_have_the_units_that_fit(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_terminal_has_one_line_with_bytes_speed_and_time_left() -> None:
    terminal, clock, said = Terminal(), Clock(), []
    progress = PullProgress("a/b", 100_000_000, said.append, stream=terminal, clock=clock)
    clock.now_s += 2
    progress.count(20_000_000)
    progress.end()
    assert terminal.getvalue() == "\r\x1b[Ka/b: 20.0 MB of 100.0 MB, 10.0 MB/s, 8 s left\r\x1b[K"
    assert said == []


def test_elsewhere_there_is_a_line_every_half_minute() -> None:
    stream, clock, said = io.StringIO(), Clock(), []
    progress = PullProgress("a/b", 100_000_000, said.append, stream=stream, clock=clock)
    for _ in range(61):
        clock.now_s += 1
        progress.count(1_000_000)
    progress.end()
    assert said == [
        "a/b: 30.0 MB of 100.0 MB, 1.0 MB/s, 1 min 10 s left",
        "a/b: 60.0 MB of 100.0 MB, 1.0 MB/s, 40 s left",
    ]
    assert stream.getvalue() == ""


def test_bytes_that_are_thrown_away_are_taken_back() -> None:
    terminal, clock = Terminal(), Clock()
    progress = PullProgress("a/b", 1000, print, stream=terminal, clock=clock)
    progress.count(500)
    clock.now_s += 1
    progress.count(-500)
    assert "a/b: 0 B of 1 kB" in terminal.getvalue()
    assert "left" not in terminal.getvalue()
