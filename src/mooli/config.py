"""Every engine argument: its name, default, meaning, choices and checks. The one source for keywords and flags.

Owns `EngineConfig` and how values reach it: from keywords (`from_kwargs`) or from a command line (`add_cli_args`,
`from_cli_args`). Names and meanings are those of SGLang's server arguments, plus a few of our own. An argument that
would do nothing is refused. Never looks at the machine, a model or a backend: defaults that depend on them are None
here and settled in `mooli.engine.build`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mooli.errors import ConfigError, UnknownArgumentError
from mooli.sglang_arguments import asks_for_nothing, is_sglang_argument

logger = logging.getLogger(__name__)

DTYPES = {
    "auto": "auto",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
"""Accepted spelling to the name used from here on."""

DEVICES = {
    "auto": "auto",
    "cpu": "cpu",
    "cuda": "cuda",
    "gpu": "cuda",
    "npu": "ascend",
    "ascend": "ascend",
    "reference": "reference",
}
"""Accepted `device` and `backend` to our backend's name. "auto" is settled by `EngineConfig.backend_name`."""

KERNELS = ("auto", "native", "ascend")
"""`attention_backend` and `sampling_backend`: each device has one implementation, `ascend` is the one of NPUs."""

SIZE_SUFFIXES = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30,
}  # fmt: skip


def _argument(
    default: Any,
    kind: str,
    text: str,
    *,
    choices: Sequence[str | None] | None = None,
    low: float | None = None,
    high: float | None = None,
    aliases: Sequence[str] = (),
) -> Any:
    """A field with what keyword checks and argparse need. `kind`: str, int, size, float, bool or json."""
    metadata = {"kind": kind, "help": text, "choices": choices, "low": low, "high": high, "aliases": tuple(aliases)}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Arguments of one engine, checked. Build it with `from_kwargs`, which also understands aliases and suffixes.

    Raises ConfigError for a value that cannot be used, naming the argument, the value and what is possible.
    """

    model_path: str = _argument(
        dataclasses.MISSING, "str", "Model folder, GGUF file or model name.", aliases=("model",)
    )
    tokenizer_path: str | None = _argument(None, "str", "Folder or file of the tokenizer; default: the model's own.")
    skip_tokenizer_init: bool = _argument(
        False, "bool", "Load no tokenizer: prompts are input_ids and answers are output_ids only."
    )
    load_format: str = _argument(
        "auto",
        "str",
        "Format of the weights; dummy makes random ones.",
        choices=("auto", "safetensors", "gguf", "dummy"),
    )
    trust_remote_code: bool = _argument(
        False,
        "bool",
        "Accepted for compatibility. Code from a model folder is never run, so there is nothing to trust.",
    )
    json_model_override_args: str = _argument("{}", "json", "JSON object laid over the model's config.json.")
    context_length: int | None = _argument(
        None,
        "size",
        "Longest prompt and answer together, in tokens; default: the model's, if the pool holds it.",
        low=2,
    )
    dtype: str = _argument("auto", "str", "Type of weights that are not quantised.", choices=tuple(DTYPES))
    quantization: str | None = _argument(
        None,
        "str",
        "Quantise weights while loading, group-wise; none: as the files have them.",
        choices=(None, "none", "int8", "int4"),
    )
    kv_cache_dtype: str = _argument(
        "auto", "str", "Type of the KV cache.", choices=("auto", "float32", "float16", "bfloat16", "bf16")
    )
    device: str | None = _argument(
        None, "str", "Device to run on; default: the best one present.", choices=(None, *DEVICES)
    )
    attention_backend: str | None = _argument(
        None, "str", "Attention kernels; every device has one implementation.", choices=(None, *KERNELS)
    )
    sampling_backend: str | None = _argument(
        None, "str", "Sampling kernels; every device has one implementation.", choices=(None, *KERNELS)
    )
    num_threads: int | None = _argument(
        None, "int", "Threads of the CPU backend; default: the cores this process may use.", low=1, high=1024
    )
    tp_size: int = _argument(
        1, "int", "Devices that share one model; only 1 so far.", low=1, aliases=("tp", "tensor_parallel_size")
    )
    dp_size: int = _argument(
        1, "int", "Copies of the model; only 1 so far.", low=1, aliases=("dp", "data_parallel_size")
    )
    mem_fraction_static: float | None = _argument(
        None, "float", "Share of the free memory that weights and KV cache may take together.", low=0.01, high=1.0
    )
    max_total_tokens: int | None = _argument(None, "size", "Tokens the KV cache holds; default: from memory.", low=1)
    max_running_requests: int | None = _argument(
        None,
        "int",
        "Requests computed at the same time; default: 48, fewer if the KV cache is small.",
        low=1,
        high=65536,
    )
    chunked_prefill_size: int | None = _argument(
        None, "int", "Tokens of one step at most; -1: a whole prompt in one step. Default: by device.", low=-1
    )
    page_size: int | None = _argument(None, "int", "Tokens in a KV cache page; default: by device.", low=1, high=1024)
    disable_radix_cache: bool = _argument(False, "bool", "Share no computed prefix between requests.")
    schedule_policy: str = _argument(
        "fcfs", "str", "Order of waiting requests: arrival (fcfs) or longest cached prefix first (lpm).",
        choices=("fcfs", "lpm"),
    )  # fmt: skip
    random_seed: int | None = _argument(
        None, "int", "Seed of requests that bring none; default: drawn at start.", low=0, high=2**63 - 1
    )
    served_model_name: str | None = _argument(None, "str", "Name of the model in answers; default: model_path.")
    stream_interval: int = _argument(1, "int", "Tokens between two chunks of a stream.", low=1)
    incremental_streaming_output: bool = _argument(
        False, "bool", "Chunks of a stream hold what is new instead of everything so far.", aliases=("stream_output",)
    )
    chat_template: str | None = _argument(
        None, "str", "File with a Jinja chat template, or the template itself; default: the model's."
    )
    preferred_sampling_params: str | None = _argument(
        None, "json", "JSON object of sampling parameters used where a request names none."
    )
    allow_auto_truncate: bool = _argument(
        False, "bool", "Cut prompts and answers that are too long (the start is kept) instead of refusing them."
    )
    log_level: str = _argument(
        "error", "str", "Least severe level that is logged.", choices=("debug", "info", "warning", "error", "critical")
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_value(item, getattr(self, item.name))
        for name in ("tp_size", "dp_size"):
            if getattr(self, name) != 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is not possible yet: use {name}=1. One engine already uses every"
                    " core of the CPU (see num_threads)."
                )
        if self.chunked_prefill_size == 0:
            raise ConfigError("chunked_prefill_size=0 computes nothing: use a positive number, or -1 for no chunking")
        for name in ("attention_backend", "sampling_backend"):
            if getattr(self, name) == "ascend" and self.backend_name != "ascend":
                raise ConfigError(f"{name}='ascend' needs device='npu', not device={self.device!r}")
        if self.served_model_name is not None and ":" in self.served_model_name:
            raise ConfigError(f"served_model_name={self.served_model_name!r} must not contain ':'")

    @property
    def backend_name(self) -> str:
        """Our name of the backend that was asked for: cpu, reference, cuda or ascend."""
        if self.device in (None, "auto"):
            return "ascend" if "ascend" in (self.attention_backend, self.sampling_backend) else "cpu"
        return DEVICES[self.device]

    @property
    def model_overrides(self) -> dict[str, Any]:
        """`json_model_override_args`, parsed."""
        return _parse_object("json_model_override_args", self.json_model_override_args)

    @property
    def preferred_sampling(self) -> dict[str, Any]:
        """`preferred_sampling_params`, parsed."""
        return _parse_object("preferred_sampling_params", self.preferred_sampling_params or "{}")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """From keywords as users write them: aliases, `backend=`, sizes as "8k", spellings of dtypes.

        Raises UnknownArgumentError (a TypeError too) for a name that is not an argument, ConfigError for a bad value.
        """
        fields = {item.name: item for item in dataclasses.fields(cls)}
        names = {alias: item.name for item in fields.values() for alias in item.metadata["aliases"]}
        values: dict[str, Any] = {}
        backend = kwargs.pop("backend", None)
        for given, value in kwargs.items():
            name = names.get(given, given)
            if name not in fields:
                _refuse_unknown(given, value, [*fields, *names, "backend"])
                continue
            if name in values:
                raise ConfigError(f"{name} is given twice, once as {given}: give it once")
            values[name] = _convert(fields[name], value)
        if not values.get("model_path"):
            raise ConfigError("model_path is missing: give a model folder, a GGUF file, a model name or 'demo'")
        if backend is not None:
            _apply_backend(backend, values)
        return cls(**values)

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser, *, defaults: Mapping[str, Any] | None = None) -> None:
        """Add a flag for every argument, and `--backend`. `defaults` replaces defaults for this command.

        No flag has an argparse default, so that `from_cli_args` knows which were given.
        """
        group = parser.add_argument_group("engine")
        for item in dataclasses.fields(cls):
            meta = item.metadata
            flags = [f"--{name.replace('_', '-')}" for name in (item.name, *meta["aliases"])]
            options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": meta["help"]}
            default = (defaults or {}).get(item.name, item.default)
            if meta["kind"] == "bool":
                group.add_argument(*flags, action="store_true", **options)
                continue
            if default not in (None, dataclasses.MISSING):
                options["help"] += f" Default: {str(default).replace('%', '%%')}."
            if meta["choices"] is not None:
                options["choices"] = [choice for choice in meta["choices"] if choice is not None]
            options["type"] = _CLI_TYPES[meta["kind"]]
            options["metavar"] = None if meta["choices"] is not None else meta["kind"].upper()
            group.add_argument(*flags, **options)
        group.add_argument(
            "--backend",
            default=argparse.SUPPRESS,
            help="Shorthand for --device: auto, cpu, reference, cuda, ascend (npu).",
        )

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace, **defaults: Any) -> EngineConfig:
        """From a namespace parsed with `add_cli_args`; flags that were not given come from `defaults`."""
        names = [item.name for item in dataclasses.fields(cls)] + ["backend"]
        given = {name: getattr(args, name) for name in names if hasattr(args, name)}
        return cls.from_kwargs(**{**defaults, **given})

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name."""
        return dataclasses.asdict(self)


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


def _cli_size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


_CLI_TYPES: dict[str, Callable[[str], Any]] = {"str": str, "json": str, "int": int, "size": _cli_size, "float": float}


def _convert(item: dataclasses.Field[Any], value: Any) -> Any:
    """What a user wrote, in the field's own type where that loses nothing. Checks are `_check_value`'s."""
    kind = item.metadata["kind"]
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
    if kind == "json" and isinstance(value, Mapping):
        return json.dumps(dict(value))
    if kind == "str" and hasattr(value, "__fspath__"):
        return str(value)
    if item.name == "dtype" and isinstance(value, str):
        return DTYPES.get(value, value)
    if item.name == "kv_cache_dtype" and value == "bf16":
        return "bfloat16"
    if item.name == "quantization" and value == "none":  # a flag cannot say None
        return None
    if item.name == "device" and isinstance(value, str):
        return re.sub(r":\d+$", "", value)  # cuda:0
    return value


_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str, "json": str, "int": int, "size": int, "float": (int, float), "bool": bool,
}  # fmt: skip


def _check_value(item: dataclasses.Field[Any], value: Any) -> None:
    meta, name = item.metadata, item.name
    if value is None and item.default is None:
        return
    kind: str = meta["kind"]
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
        wanted = {"size": "a whole number or a string like '8k'", "json": "a JSON object"}.get(kind, f"of type {kind}")
        raise ConfigError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}")
    if meta["choices"] is not None and value not in meta["choices"]:
        hint = ""
        if name in ("attention_backend", "sampling_backend"):
            hint = " Mooli has one implementation for each device: leave this argument out."
        choices = ", ".join(str(choice) for choice in meta["choices"] if choice is not None)
        raise ConfigError(f"{name}={value!r} is not possible; choose one of {choices}.{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} must be a finite number")
    if meta["low"] is not None and value < meta["low"]:
        raise ConfigError(f"{name}={value!r} is too small: the least is {meta['low']}")
    if meta["high"] is not None and value > meta["high"]:
        raise ConfigError(f"{name}={value!r} is too large: the most is {meta['high']}")
    if kind == "json":
        _parse_object(name, str(value))


def _parse_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{name} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object, got {text!r}")
    return value


def _apply_backend(backend: Any, values: dict[str, Any]) -> None:
    """`backend=` is a shorthand for `device=`. An explicit `device` wins over it."""
    if not isinstance(backend, str) or backend not in DEVICES:
        raise ConfigError(
            f"backend={backend!r} is not a backend of Mooli; choose one of {', '.join(DEVICES)}."
            " Attention and sampling kernels are not chosen apart from the device."
        )
    if values.get("device") is None:
        values["device"] = backend
    elif DEVICES.get(values["device"]) != DEVICES[backend]:
        logger.warning("device=%r wins over backend=%r", values["device"], backend)


def _refuse_unknown(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise for a name that is no argument, unless it is SGLang's and its value asks for nothing."""
    if is_sglang_argument(name):
        if asks_for_nothing(name, value):
            return
        raise UnknownArgumentError(f"{name} is known to SGLang but not supported by Mooli yet: remove {name}={value!r}")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(sorted(known))}"
    raise UnknownArgumentError(f"there is no engine argument {name!r}{hint}")
