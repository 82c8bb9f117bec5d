"""What the commands that measure a server have in common as processes.

Owns Ctrl-C, where text goes, and exit statuses: 0 when all requests succeeded, 1 when some failed or the run could not
be made, 2 for arguments that cannot be used, 130 after Ctrl-C. Results go to standard output, progress and errors to
standard error. Never looks at a flag's meaning.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from mooli.bench.arguments import BenchOptions
from mooli.bench.datasets import Dataset, DatasetOptions, Randoms, load_dataset
from mooli.bench.metrics import Metrics
from mooli.bench.serving import measure, report
from mooli.errors import MooliError
from mooli.frontend.tokenizer import Tokenizer

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


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


async def measure_and_report(
    program: str,
    options: BenchOptions,
    load: Callable[[DatasetOptions, Tokenizer, Randoms], Dataset] = load_dataset,
) -> int:
    """One run against a server, its table and its line of JSON; the exit status. Raises BenchmarkError."""
    progress_out = sys.stderr if options.show_progress else None
    run = await measure(options, stopping=stopping_on_ctrl_c(), say=say, progress_out=progress_out, load=load)
    file = report(options, run, say)
    if file is not None:
        say(f"Result appended to {file}")
    return status(program, run.metrics, is_interrupted=run.load.is_interrupted, is_server_gone=run.load.is_server_gone)


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
