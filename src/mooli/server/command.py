"""What the server commands do once their line is parsed: say what has no effect, serve, and say why it could not.

Owns the exit status and the one line on standard error of a server that cannot start. Never reads a flag's meaning:
that is `mooli.server.flags`'; what a server does is in `mooli.server.launch`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mooli.engine.child import EngineChild
from mooli.entry import INTERRUPTED
from mooli.errors import EngineError, MooliError
from mooli.logs import report_error
from mooli.server.flags import read_server_args, redacted


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
        report_error(exc)
    except OSError as exc:
        report_error(EngineError(f"the server has ended: {exc}"))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 2
