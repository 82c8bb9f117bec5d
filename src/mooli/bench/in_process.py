"""What the benchmarks share that run an engine in their own process.

Owns the engine's flags on their command lines, and showing that a model loads. Never starts an engine.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence

from mooli.bench.errors import BenchmarkError
from mooli.config import EngineConfig
from mooli.sglang_arguments import is_server_argument, is_sglang_argument

_RUNTIME = "there is no runtime besides the engine; a running server is measured by `mooli bench serving`"


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """The engine's arguments. SGLang's `--backend engine` is understood too."""
    EngineConfig.add_cli_args(parser, defaults={"log_level": "warning"})


def parse_words(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. Raises BenchmarkError for a flag that is not there; ends the program for --help."""
    args, unknown = parser.parse_known_args(list(argv))
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        flag = word.partition("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        if is_server_argument(name):
            raise BenchmarkError(f"{flag} is a flag of `mooli serve`: remove it")
        if is_sglang_argument(name):
            raise BenchmarkError(f"{flag} is known to SGLang but not supported by Mooli yet: remove it")
        close = difflib.get_close_matches(flag, list(parser._option_string_actions), n=1)
        raise BenchmarkError(f"there is no flag {flag}" + (f"; did you mean {close[0]}?" if close else ""))
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
