"""What the benchmarks have in common as processes, and on their command lines.

Owns Ctrl-C, where text goes, and exit statuses: 0 when all requests succeeded, 1 when some failed or the run could not
be made, 2 for arguments that cannot be used, 130 after Ctrl-C. Results go to standard output, progress and errors to
standard error. Owns too the engine's flags of the benchmarks that run one in their own process. Never starts an engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mooli.bench.errors import BenchmarkError
from mooli.config import EngineConfig
from mooli.entry import INTERRUPTED
from mooli.errors import MooliError
from mooli.sglang_arguments import unknown_argument

if TYPE_CHECKING:
    from mooli.bench.metrics import Metrics


def ended(program: str, work: Callable[[], int]) -> int:
    """The exit status of `work`, or of what it raises; errors are one line that begins with `program`."""
    try:
        return work()
    except MooliError as exc:
        return fail(program, exc, status=1)
    except KeyboardInterrupt:  # before or after the part that listens for it
        return INTERRUPTED
    except BrokenPipeError:
        # A reader that leaves, `head` for example, has what it wanted; flushing at exit would fail again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def status(program: str, metrics: Metrics, *, is_interrupted: bool, is_server_gone: bool) -> int:
    """The exit status of a run that ended. Says in one line what went wrong, if anything did."""
    if is_interrupted:
        print(f"{program}: stopped by Ctrl-C after {metrics.num_completed} answers", file=sys.stderr)
        return INTERRUPTED
    if is_server_gone:
        return fail(program, f"the server is gone: {metrics.failures[0][0]}", status=1)
    if metrics.num_failed:
        reason, count = metrics.failures[0]
        shown = reason if count == metrics.num_failed else f"{reason} ({count} times), and others"
        return fail(program, f"{metrics.num_failed} of {metrics.num_sent} requests failed: {shown}", status=1)
    return 0


@contextlib.contextmanager
def stopping_on_ctrl_c() -> Iterator[asyncio.Event]:
    """The first Ctrl-C sets the event, which ends the run and keeps what finished; a second one ends the program."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def first() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, first)
    except (NotImplementedError, ValueError, RuntimeError):  # no such signals here, or not the main thread
        yield stop
        return
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def say(line: str) -> None:
    """Print one line of a result."""
    print(line, flush=True)


def fail(program: str, error: object, *, status: int) -> int:
    """Print one line about what went wrong, and return `status`."""
    print(f"{program}: error: {error}", file=sys.stderr)
    return status


# -- an engine in this process -----------------------------------------------------------------------------------------

_RUNTIME = "there is no runtime besides the engine; a running server is measured by `mooli bench serving`"


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """The engine's arguments. SGLang's `--backend engine` is understood too."""
    EngineConfig.add_cli_args(parser, defaults={"log_level": "warning"})


def parse_words(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. Raises BenchmarkError for a flag that is not there; ends the program for --help."""
    args, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise BenchmarkError(unknown_argument(unknown, parser))
    return args


def engine_config(args: argparse.Namespace, without_effect: Mapping[str, str]) -> EngineConfig:
    """The engine that a command line asks for.

    without_effect: arguments that would change nothing here, each with the reason. Raises BenchmarkError for them,
    ConfigError for a value that cannot be.
    """
    if getattr(args, "backend", None) == "runtime":
        raise BenchmarkError(f"--backend runtime: {_RUNTIME}")
    if getattr(args, "backend", None) == "engine":
        del args.backend
    for name in EngineConfig.given_in(args):
        if name in without_effect:
            raise BenchmarkError(f"--{name.replace('_', '-')}: {without_effect[name]}")
    return EngineConfig.from_cli_args(args, log_level="warning")


def refuse_given(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, why: str) -> None:
    """Raise BenchmarkError, with `why`, if a flag has another value than its default."""
    if getattr(args, name) != parser.get_default(name):
        raise BenchmarkError(f"--{name.replace('_', '-')}: {why}")


def show_loading(stage: str, done: int, total: int) -> None:
    """One changing line on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\x1b[K{stage} {100 * done // max(total, 1)}%", end=end, file=sys.stderr, flush=True)
