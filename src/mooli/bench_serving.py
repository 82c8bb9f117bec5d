"""`python3 -m mooli.bench_serving`: measure a running server, with SGLang's flags and SGLang's table.

Owns nothing but the name and the order: arguments, then the run. `mooli bench serving` is the same.
"""

import sys

from mooli.entry import run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_PROGRAM = "mooli.bench_serving"


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run the command and return the exit status."""
    import asyncio

    from mooli.bench.arguments import parse_arguments
    from mooli.bench.command import ended, fail
    from mooli.bench.datasets import check_file
    from mooli.bench.errors import BenchmarkError
    from mooli.bench.metrics import FORMULAS
    from mooli.bench.serving import measure_and_report

    try:
        options = parse_arguments(sys.argv[1:] if argv is None else argv)
        if not options.explain:
            check_file(options.data)
    except BenchmarkError as exc:
        return fail(_PROGRAM, exc, status=2)
    if options.explain:
        print(FORMULAS, end="")
        return 0
    return ended(_PROGRAM, lambda: asyncio.run(measure_and_report(_PROGRAM, options)))


if __name__ == "__main__":
    run(main)
