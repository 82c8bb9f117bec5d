"""The first moments of a process that is Mooli's own: a command, or a child of one.

Owns what must be so before anything else is imported: no code of the current folder runs, the three standard
descriptors are open, and Ctrl-C ends the process with status 130 and without a traceback. Never imports anything but
what Python has loaded already, until the current folder is left. `import mooli` does nothing of this.
"""

# No `from __future__` and no `typing` here: both are files, which the current folder may have too.
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def run(main: "Callable[[], int]") -> "NoReturn":
    """Be a process whose work is `main`, which imports what it needs itself; ends with its status."""
    try:
        leave_current_folder()
        fill_standard_descriptors()
        if sys.stderr is None:  # `print` would write to standard output instead
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the program
        _end_at_interrupt()
        status = main()
    except KeyboardInterrupt:
        status = INTERRUPTED
    finally:
        _end_at_interrupt()  # asyncio leaves Python's own handler behind, which would show a traceback
    sys.exit(status)


def leave_current_folder() -> None:
    """`python -m` puts the current folder before all others, where a model's folder may hold a `json.py`.

    Folders that PYTHONPATH names stay, and with `python -P` there is nothing to do.
    """
    if getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
        return
    try:
        here = os.getcwd()
    except OSError:  # it has been removed, and Python has not taken it either
        return
    if sys.path[:1] in ([here], [""]):
        del sys.path[0]


def fill_standard_descriptors() -> None:
    """Whoever starts a process with a standard descriptor closed gives its number to the next socket, into which
    everything then prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, which is this one. Children shall have it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


class Interruptible:
    """A block in which Ctrl-C raises KeyboardInterrupt, as there is something to end or to keep.

    Elsewhere it ends the process of a command at once: raised while modules are imported, it comes out as their error.
    In a process that is not Mooli's own nothing changes.
    """

    def __enter__(self) -> None:
        import signal

        self._is_ours = signal.getsignal(signal.SIGINT) is _end_process
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        import signal

        if self._is_ours:
            signal.signal(signal.SIGINT, _end_process)


def _end_at_interrupt() -> None:
    import signal

    # A shell starts jobs in the background with the signal ignored: so it stays.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_process)


def _end_process(number: int, frame: "Any") -> None:
    os._exit(INTERRUPTED)
