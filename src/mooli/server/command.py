"""The command line of the server: its flags, what they mean together, and the life of a command.

Owns what `mooli serve` and `python3 -m mooli.launch_server` have in common: flags of the engine, of the server, and
those of SGLang that are only known by name; `--config`, what is warned of or refused, how a command line is shown
without its secrets; the exit status and the one line on standard error of a server that cannot start. What a server
does is in `mooli.server.launch`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mooli.arguments import REDACTED, add_model_word, flags_of, group_titled, model_word
from mooli.config import ABILITIES, DEMO, HOST_TIER, KV_CACHE_AUTO, NO_HOST_TIER, EngineConfig
from mooli.entry import INTERRUPTED
from mooli.errors import ConfigError, EngineError, MooliError, UnknownArgumentError
from mooli.logs import report_error
from mooli.server.config import ServerConfig
from mooli.sglang_arguments import (
    HINT_VALUES,
    HINTS,
    LISTS,
    REASONS,
    REFUSED,
    SWITCHES,
    asks_for_nothing,
    is_sglang_argument,
)

DEFAULTS: dict[str, Any] = {"model_path": DEMO, "log_level": "info", "kv_cache_dir": KV_CACHE_AUTO}
"""Defaults of engine arguments that a server has other than `Engine`."""

_SUBJECTS = (
    "model", "several models", "address", "access", "TLS", "device", "weights and numbers", "memory and batching",
    "KV cache on disk", "limits", "answers", "batches", "logs", "metrics",
)  # fmt: skip
"""Order of the help."""

_SECRETS = flags_of(*(item.name for item in dataclasses.fields(ServerConfig) if item.metadata["is_secret"]))


@dataclass(frozen=True, slots=True)
class ServerArguments:
    """A command line, read. warnings: arguments that are accepted and have no effect."""

    server: ServerConfig
    engine: EngineConfig
    warnings: tuple[str, ...]


def add_server_args(parser: argparse.ArgumentParser, *, takes_model: bool = False) -> None:
    """Add every flag of the server commands, grouped by subject. takes_model: a bare first word is the model.

    SGLang's other flags are there too, unseen: they take the values they have in SGLang, and count when a flag is
    abbreviated, so that a command line means the same.
    """
    parser.usage = f"%(prog)s {'[MODEL] ' if takes_model else ''}[FLAG ...]"
    for subject in _SUBJECTS:
        group_titled(parser, subject)
    if takes_model:
        add_model_word(parser, "--model-path")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with arguments by name; what the command line says wins over it."
    )
    EngineConfig.add_cli_args(parser, defaults=DEFAULTS)
    ServerConfig.add_cli_args(parser)
    for action in parser._actions:
        if action.dest in HINT_VALUES and action.choices is not None:
            action.metavar = "{" + ",".join(action.choices) + "}"
            action.choices = [*action.choices, *HINT_VALUES[action.dest][0]]
    for name in sorted({*HINTS, *REFUSED}):
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if name in SWITCHES:
            options["action"] = "store_true"
        elif name in LISTS:
            options["nargs"] = "*"
        parser.add_argument(*flags_of(name), **options)


def read_server_args(args: argparse.Namespace) -> ServerArguments:
    """From a namespace parsed with `add_server_args`, and the file that its --config names.

    Raises ConfigError for a value or a file that cannot be used, UnknownArgumentError for what is refused.
    """
    given = _given(args)
    warnings = [_decide(f"--{name.replace('_', '-')}", name, _typed(value)) for name, value in _only_sglang(vars(args))]
    if args.config is not None:
        from_file, file_warnings = _from_file(args.config)
        warnings += file_warnings
        if given.keys() & {"device", "backend"}:  # two names of one thing
            from_file = {name: value for name, value in from_file.items() if name not in ("device", "backend")}
        given = from_file | given
    for name, (values, why) in HINT_VALUES.items():
        if isinstance(given.get(name), str) and given[name] in values:
            warnings.append(f"{flags_of(name)[0]} {given.pop(name)} has no effect in Mooli: {why}")
    server_names = {item.name for item in dataclasses.fields(ServerConfig)}
    server = {name: value for name, value in given.items() if name in server_names}
    engine = {name: value for name, value in given.items() if name not in server_names}
    hosted = {name: engine.pop(name) for name in HOST_TIER if name in engine}
    config = EngineConfig.from_kwargs(**{**DEFAULTS, **engine})
    if ABILITIES[config.backend_name].has_host_tier:
        config = EngineConfig.from_kwargs(**{**DEFAULTS, **engine, **hosted})
    else:  # what is asked for is so: a command line for another device serves here too
        flags = [flags_of(name)[0] for name, value in hosted.items() if value]
        warnings += [f"{flag} has no effect on device {config.backend_name!r}: {NO_HOST_TIER}" for flag in flags]
    return ServerArguments(
        ServerConfig.from_kwargs(**server),
        config,
        tuple(warning for warning in warnings if warning is not None),
    )


def redacted(argv: Sequence[str]) -> list[str]:
    """A command line that may be shown: the values of keys and passwords are hidden, abbreviated flags included."""
    shown: list[str] = []
    hides_next = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        is_secret = len(flag) > 2 and any(secret.startswith(flag) for secret in _SECRETS)
        shown.append(REDACTED if hides_next else f"{flag}={REDACTED}" if is_secret and equals else word)
        hides_next = is_secret and not equals and not hides_next
    return shown


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Which arguments of ours the command line gives."""
    given = EngineConfig.given_in(args) | ServerConfig.given_in(args)
    model = model_word(args, "--model-path", given.get("model_path"))
    return given if model is None else {**given, "model_path": model}


def _from_file(path: str) -> tuple[dict[str, Any], list[str | None]]:
    """Arguments in a file, by field, and the warnings about the others."""
    names = EngineConfig.names() | ServerConfig.names()
    values: dict[str, Any] = {}
    warnings: list[str | None] = []
    # Here: YAML takes 20 ms of every start, and few servers have such a file.
    from mooli.server.config_file import read_mapping

    for key, value in read_mapping("--config", path, holds="arguments to values").items():
        if not isinstance(key, str):
            raise ConfigError(f"--config {path}: there is no argument {key!r}")
        name = key.replace("-", "_")
        if is_sglang_argument(name):
            warnings.append(_decide(f"{key} in {path}", name, value))
            continue
        if name not in names:
            close = difflib.get_close_matches(name, list(names), n=1)
            hint = f"; did you mean {close[0].replace('_', '-') if '-' in key else close[0]}?" if close else ""
            raise UnknownArgumentError(f"{path}: there is no argument {key!r}{hint}")
        if names[name] in values:
            raise ConfigError(f"{path}: {names[name]} is given twice, once as {key}: give it once")
        values[names[name]] = value
    return {name: value for name, value in values.items() if value is not None}, warnings


def _only_sglang(given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in given.items() if is_sglang_argument(name)]


def _decide(where: str, name: str, value: Any) -> str | None:
    """The warning about an argument that only SGLang has. Raises UnknownArgumentError for one that is refused."""
    if name in HINTS:
        return None if value in (None, False) else f"{where} has no effect in Mooli: {HINTS[name]}"
    if asks_for_nothing(name, value):
        return None
    why = f" ({REASONS[name]})" if name in REASONS else ""
    raise UnknownArgumentError(f"{where} is known to SGLang but not supported by Mooli yet{why}: remove it")


def _typed(value: Any) -> Any:
    """A word of the command line as the number it may be."""
    try:
        return int(value) if isinstance(value, str) else value
    except ValueError:
        return value


def serve(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Serve what a command line says that was parsed with `add_server_args`; the exit status. command: that line."""
    try:
        arguments = read_server_args(args)
        for warning in arguments.warnings:
            print(f"mooli: warning: {warning}", file=sys.stderr)
        if arguments.server.models is not None:
            return _serve_several(arguments, arguments.server.models, command)
        from mooli.engine.child import EngineChild  # not for --help

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


def _serve_several(arguments: ServerArguments, models: str, command: Sequence[str]) -> int:
    if arguments.engine.model_path != DEMO or arguments.engine.served_model_name is not None:
        raise ConfigError("--models names all models of the server: leave out --model-path and --served-model-name")
    from mooli.server import launch
    from mooli.server.several_models import named_models

    return launch.run_several(
        arguments.server, named_models(models, arguments.engine), arguments.engine, redacted(command)
    )
