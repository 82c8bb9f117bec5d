"""`python3 -m mooli.launch_server`, under which SGLang's scripts start a server; `mooli serve` does the same.

Owns nothing but the name: the rest is `mooli.server.command`.
"""

import sys

from mooli.entry import run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_PROGRAM = "python3 -m mooli.launch_server"


def main(argv: "Sequence[str] | None" = None) -> int:
    """Serve until a signal comes; the exit status. Usage errors end the program with status 2."""
    from mooli.arguments import CommandParser
    from mooli.server.command import add_server_args, serve
    from mooli.sglang_arguments import unknown_argument

    words = list(sys.argv[1:] if argv is None else argv)
    parser = CommandParser(prog=_PROGRAM, description="Serve a model over HTTP; without one, the demo model.")
    add_server_args(parser)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(unknown_argument(unknown, parser))
    return serve(args, [*_PROGRAM.split(), *words])


if __name__ == "__main__":
    run(main)
