"""What the server commands do once their line is parsed: say what has no effect, serve, and say why it could not.

Owns the exit status and the one line on standard error of a server that cannot start. Never reads a flag's meaning:
that is `mooli.server.flags`'; what a server does is in `mooli.server.launch`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mooli.engine.child import EngineChild
from mooli.errors import EngineError, MooliError
from mooli.server.flags import read_server_args, redacted

INTERRUPTED = 130
"""Exit status after Ctrl-C before the server runs, as shells have it."""


def serve(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Serve what a command line says that was parsed with `add_server_args`; the exit status. command: that line."""
    try:
        arguments = read_server_args(args)
        for warning in arguments.warnings:
            print(f"mooli: warning: {warning}", file=sys.stderr)
        with EngineChild() as child:  # it comes up while the next line does its work
            from mooli.server import launch  # asyncio and the HTTP stack: not for a command line that is wrong

            return launch.run(arguments.server, arguments.engine, redacted(command), child)
    except MooliError as exc:
        return _report(exc)
    except OSError as exc:
        return _report(EngineError(f"the server has ended: {exc}"))
    except KeyboardInterrupt:
        return INTERRUPTED


def _report(exc: MooliError) -> int:
    print(f"mooli: error: {' '.join(str(exc).split())}", file=sys.stderr)
    return 2
