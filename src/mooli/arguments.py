"""How arguments are declared, and how values reach them: from keywords or from a command line.

Owns `argument`, `Arguments` and the reading of sizes. A subclass of `Arguments` declares fields, and each field brings
its meaning, choices and limits along, so that keywords, flags, their help and their checks have one source. Never knows
what an argument is for.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, TypeVar

from mooli.errors import ConfigError, UnknownArgumentError

SIZE_SUFFIXES = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30,
}  # fmt: skip

REDACTED = "********"
"""What is shown of a secret."""

_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str, "json": str, "int": int, "size": int, "float": (int, float), "floats": tuple, "bool": bool,
}  # fmt: skip

_WANTED = {
    "size": "a whole number or a string like '8k'", "json": "a JSON object", "floats": "a list of numbers",
}  # fmt: skip

A = TypeVar("A", bound="Arguments")


def argument(
    default: Any,
    kind: str,
    text: str,
    *,
    choices: Sequence[str | None] | None = None,
    choices_hint: str = "",
    spellings: Mapping[str, Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    aliases: Sequence[str] = (),
    subject: str | None = None,
    is_secret: bool = False,
) -> Any:
    """A field with what keyword checks and argparse need.

    kind: str, int, size, float, floats (a list), bool or json (an object). spellings: other ways to write a value.
    choices_hint: what to add where a choice is refused. subject: the heading in the help that begins with this field.
    is_secret: its value is never shown.
    """
    metadata = {
        "kind": kind,
        "help": text,
        "choices": choices,
        "choices_hint": choices_hint,
        "spellings": spellings or {},
        "low": low,
        "high": high,
        "aliases": tuple(aliases),
        "subject": subject,
        "is_secret": is_secret,
    }
    if default is dataclasses.MISSING:
        return field(metadata=metadata, repr=not is_secret)
    return field(default=default, metadata=metadata, repr=not is_secret)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Base of checked arguments. Build a subclass with `from_kwargs`, which understands aliases and spellings too.

    Raises ConfigError for a value that cannot be used, naming the argument, the value and what is possible.
    """

    OWNER: ClassVar[str] = ""
    """Whose arguments these are, as messages say it: "engine", "server"."""
    SHORTHANDS: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Keywords that are no field, with their subject and help: `from_kwargs` turns them into some."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_value(item, getattr(self, item.name))

    @classmethod
    def names(cls) -> dict[str, str]:
        """Every name that `from_kwargs` takes, with the field (or shorthand) that it stands for."""
        items = dataclasses.fields(cls)
        own = {item.name: item.name for item in items} | {name: name for name in cls.SHORTHANDS}
        return own | {alias: item.name for item in items for alias in item.metadata["aliases"]}

    @classmethod
    def from_kwargs(cls: type[A], **kwargs: Any) -> A:
        """From keywords as users write them: aliases, sizes as "8k", other spellings.

        Raises UnknownArgumentError (a TypeError too) for a name that is not an argument, ConfigError for a bad value.
        """
        return cls(**cls._values(kwargs))

    @classmethod
    def _values(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """What was given, by field and in the field's type."""
        fields = {item.name: item for item in dataclasses.fields(cls)}
        names = cls.names()
        values: dict[str, Any] = {}
        for key, value in given.items():
            name = names.get(key, key)
            if name not in fields:
                cls._refuse_unknown(key, value)
                continue
            if name in values:
                raise ConfigError(f"{name} is given twice, once as {key}: give it once")
            values[name] = cls._convert(fields[name], value)
        return values

    @classmethod
    def _convert(cls, item: dataclasses.Field[Any], value: Any) -> Any:
        """What a user wrote, in the field's own type where that loses nothing. Checks are `_check_value`'s."""
        return _convert(item, value)

    @classmethod
    def _refuse_unknown(cls, name: str, value: Any) -> None:
        """Raise UnknownArgumentError for a name that is no field, or return where that does no harm."""
        raise UnknownArgumentError(f"there is no {cls.OWNER} argument {name!r}{nearest(name, list(cls.names()))}")

    @classmethod
    def add_cli_args(
        cls,
        parser: argparse.ArgumentParser,
        *,
        defaults: Mapping[str, Any] | None = None,
        hidden: Collection[str] = (),
    ) -> None:
        """Add a flag for every argument, grouped by subject. `defaults` replaces defaults in the help of this command,
        which does not show those that are `hidden`.

        No flag has an argparse default, so that `from_cli_args` knows which were given.
        """
        group = None
        for item in dataclasses.fields(cls):
            subject = item.metadata["subject"]
            if group is None or subject is not None:
                group = group_titled(parser, subject or cls.OWNER)
            default = (defaults or {}).get(item.name, item.default)
            options = _flag_options(item, default)
            if item.name in hidden:
                options["help"] = argparse.SUPPRESS
            group.add_argument(*flags_of(item.name, *item.metadata["aliases"]), **options)
        for name, (subject, text) in cls.SHORTHANDS.items():
            group_titled(parser, subject).add_argument(*flags_of(name), default=argparse.SUPPRESS, help=text)

    @classmethod
    def from_cli_args(cls: type[A], args: argparse.Namespace, **defaults: Any) -> A:
        """From a namespace parsed with `add_cli_args`; flags that were not given come from `defaults`."""
        return cls.from_kwargs(**{**defaults, **cls.given_in(args)})

    @classmethod
    def given_in(cls, args: argparse.Namespace) -> dict[str, Any]:
        """Which of the arguments a command line gave, with their values."""
        names = [*(item.name for item in dataclasses.fields(cls)), *cls.SHORTHANDS]
        return {name: getattr(args, name) for name in names if hasattr(args, name)}

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name. A secret that is set reads `REDACTED`."""
        values = dataclasses.asdict(self)
        for item in dataclasses.fields(self):
            if item.metadata["is_secret"] and values[item.name] is not None:
                values[item.name] = REDACTED
        return values


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def add_model_word(parser: argparse.ArgumentParser, flag: str) -> None:
    """Let a word of the command line say what `flag` says, as every command takes its model; `model_word` reads it."""
    parser.add_argument(
        "positional_model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help=f"The same as {flag}."
    )


def model_word(args: argparse.Namespace, flag: str, flagged: str | None) -> str | None:
    """The model of a command line: the word, or what the flag says; None for neither. Raises ConfigError for both."""
    word: str | None = getattr(args, "positional_model", None)
    if word is not None and flagged is not None:
        raise ConfigError(f"the model is given twice, as {word!r} and with {flag}: give it once")
    return flagged if word is None else word


def group_titled(parser: argparse.ArgumentParser, title: str) -> Any:
    """The group of flags with this heading in the parser's help, made if there is none yet."""
    groups = parser._action_groups
    return next((group for group in groups if group.title == title), None) or parser.add_argument_group(title)


def flags_of(*names: str) -> list[str]:
    """Names as flags: `max_total_tokens` is `--max-total-tokens`."""
    return [f"--{name.replace('_', '-')}" for name in names]


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about a name that is not `known`: the nearest one, or all."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(sorted(known))}"


def parse_size(text: str) -> int:
    """A whole number with an optional suffix: 8k = 8,000, 8Ki = 8,192, 1.5M = 1,500,000. ValueError otherwise."""
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*([A-Za-z]{0,2})\s*", text)
    factor = SIZE_SUFFIXES.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a number like 8192, 8k or 8Ki")
    value = float(match[1]) * factor if "." in match[1] else int(match[1]) * factor
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def parse_object(name: str, text: str) -> dict[str, Any]:
    """The JSON object in an argument's text. Raises ConfigError naming the argument."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{name} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object, got {text!r}")
    return value


def _cli_size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


_CLI_TYPES: dict[str, Callable[[str], Any]] = {
    "str": str, "json": str, "int": int, "size": _cli_size, "float": float, "floats": float,
}  # fmt: skip


def _flag_options(item: dataclasses.Field[Any], default: Any) -> dict[str, Any]:
    meta = item.metadata
    options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": meta["help"]}
    if meta["kind"] == "bool":
        return options | {"action": "store_true"}
    if default not in (None, "", dataclasses.MISSING):
        options["help"] += f" Default: {str(default).replace('%', '%%')}."
    if meta["choices"] is not None:
        options["choices"] = [choice for choice in meta["choices"] if choice is not None]
    options["type"] = _CLI_TYPES[meta["kind"]]
    options["metavar"] = None if meta["choices"] is not None else meta["kind"].upper()
    if meta["kind"] == "floats":
        options |= {"nargs": "+", "metavar": "FLOAT"}
    return options


def _convert(item: dataclasses.Field[Any], value: Any) -> Any:
    kind, spellings = item.metadata["kind"], item.metadata["spellings"]
    if isinstance(value, str) and value in spellings:
        return spellings[value]
    if kind == "size" and isinstance(value, str):
        try:
            return parse_size(value)
        except ValueError as exc:
            raise ConfigError(f"{item.name}: {exc}") from exc
    if kind in ("int", "size") and not isinstance(value, (bool, int)):
        try:
            return operator.index(value)  # NumPy integers
        except TypeError:
            return value
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind == "floats" and isinstance(value, list):
        return tuple(float(one) if isinstance(one, int) and not isinstance(one, bool) else one for one in value)
    if kind == "json" and isinstance(value, Mapping):
        try:
            return json.dumps(dict(value))
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"{item.name} must be a JSON object: {exc}") from exc
    if kind == "str" and hasattr(value, "__fspath__"):
        return str(value)
    return value


def _check_value(item: dataclasses.Field[Any], value: Any) -> None:
    meta, name = item.metadata, item.name
    if value is None and item.default is None:
        return
    kind: str = meta["kind"]
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
        shown = "a value" if meta["is_secret"] else repr(value)
        raise ConfigError(
            f"{name} must be {_WANTED.get(kind, f'of type {kind}')}, got {shown} of type {type(value).__name__}"
        )
    if meta["choices"] is not None and value not in meta["choices"]:
        choices = ", ".join(str(choice) for choice in meta["choices"] if choice is not None)
        raise ConfigError(f"{name}={value!r} is not possible; choose one of {choices}.{meta['choices_hint']}")
    if kind == "json":
        parse_object(name, str(value))
    numbers: Any = value if kind == "floats" else (value,) if kind in ("int", "size", "float") else ()
    for number in numbers:
        _check_number(item, number)


def _check_number(item: dataclasses.Field[Any], value: Any) -> None:
    meta, name = item.metadata, item.name
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a list of numbers, got {value!r} in it")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} must be a finite number")
    if meta["low"] is not None and value < meta["low"]:
        raise ConfigError(f"{name}={value!r} is too small: the least is {meta['low']}")
    if meta["high"] is not None and value > meta["high"]:
        raise ConfigError(f"{name}={value!r} is too large: the most is {meta['high']}")
