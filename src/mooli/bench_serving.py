"""`python3 -m mooli.bench_serving`: measure a running server, with SGLang's flags and SGLang's table.

Owns the process: exit status, Ctrl-C, and where text goes. The table goes to standard output, progress and errors to
standard error. Exit status: 0 when all requests succeeded, 1 when some failed or the run could not be made, 2 for
arguments that cannot be used, 130 after Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence

from mooli.bench.arguments import BenchOptions, parse_arguments
from mooli.bench.errors import BenchmarkError
from mooli.bench.metrics import FORMULAS
from mooli.bench.serving import Measurement, measure, report
from mooli.errors import MooliError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    try:
        options = parse_arguments(sys.argv[1:] if argv is None else argv)
    except BenchmarkError as exc:
        return _fail(exc, status=2)
    if options.explain:
        print(FORMULAS, end="")
        return 0
    try:
        return asyncio.run(_run(options))
    except MooliError as exc:
        return _fail(exc, status=1)
    except KeyboardInterrupt:  # before or after the part that listens for it
        return INTERRUPTED
    except BrokenPipeError:
        # A reader that leaves, `head` for example, has what it wanted; flushing at exit would fail again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


async def _run(options: BenchOptions) -> int:
    progress_out = sys.stderr if options.show_progress else None
    run = await measure(options, stopping=_stopping_on_ctrl_c(), say=_say, progress_out=progress_out)
    file = report(options, run, _say)
    if file is not None:
        _say(f"Result appended to {file}")
    return _status(run)


def _status(run: Measurement) -> int:
    """Say in one line what went wrong, if anything did."""
    metrics = run.metrics
    if run.load.is_interrupted:
        print(f"mooli.bench_serving: stopped by Ctrl-C after {metrics.num_completed} answers", file=sys.stderr)
        return INTERRUPTED
    if run.load.is_server_gone:
        return _fail(f"the server is gone: {metrics.failures[0][0]}", status=1)
    if metrics.num_failed:
        reason, count = metrics.failures[0]
        shown = reason if count == metrics.num_failed else f"{reason} ({count} times), and others"
        return _fail(f"{metrics.num_failed} of {metrics.num_sent} requests failed: {shown}", status=1)
    return 0


@contextlib.contextmanager
def _stopping_on_ctrl_c() -> Iterator[asyncio.Event]:
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


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(error: object, *, status: int) -> int:
    print(f"mooli.bench_serving: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
