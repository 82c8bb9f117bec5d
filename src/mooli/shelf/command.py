"""What is on the shelf and what runs: `mooli list`, `show`, `rm`, `ps`, `stop`.

Owns what is printed of both. Which models there are says `mooli.hub.shelf`, which servers `running_servers`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from mooli.config import EngineConfig
from mooli.engine.pool_size import kv_type
from mooli.engine.weight_sizes import sizes_of
from mooli.errors import ConfigError, ModelNotFoundError, MooliError
from mooli.frontend.tokenizer import load_tokenizer
from mooli.frontend.wire_formats.choice import open_wire_format
from mooli.hub.locate import resolve
from mooli.hub.shelf import KeptModel, kept_model, kept_models, remove
from mooli.hub.short_names import expand, short_names
from mooli.models.loader import open_model
from mooli.plan import weight_bytes
from mooli.server.running_servers import RunningServer, running_servers, servers_folder

_CONTEXT = 4096
"""Tokens for which `show` says what a conversation takes."""

_POLL_S = 0.1


# -- models ------------------------------------------------------------------------------------------------------------
def list_models(args: argparse.Namespace) -> int:
    """What is here, or which short names there are."""
    kept = kept_models()
    if args.available:
        names = sorted(short_names())
        here = {model.name for model in kept}
        known = [(name, expand(name), "here" if expand(name) in here else "") for name in names]
        if args.json:
            print(json.dumps([dict(zip(("name", "means", "state"), row, strict=True)) for row in known], indent=2))
        else:
            _print_table(("NAME", "MEANS", ""), known)
        return 0
    short = {expand(name): name for name in sorted(short_names(), reverse=True)}
    if args.json:
        print(json.dumps([_as_dict(model) | {"short_name": short.get(model.name)} for model in kept], indent=2))
        return 0
    rows = [(model.name, short.get(model.name, ""), _size(model.size_bytes), _ago(model.changed_s)) for model in kept]
    _print_table(("NAME", "SHORT NAME", "SIZE", "CHANGED"), rows)
    if not kept:
        print("No model is here yet: `mooli run qwen2.5:0.5b` fetches one.", file=sys.stderr)
    return 0


def show(args: argparse.Namespace) -> int:
    """What a model is, what it can do and what it takes."""
    facts = model_facts(args.model)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {share}" for key, share in value.items())
        elif name.endswith("_bytes"):
            value = _size(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        print(f"{name.removesuffix('_bytes').replace('_', ' '):<26}{'none' if value is None else value}")
    return 0


def model_facts(model: str) -> dict[str, Any]:
    """Of a model that is on this machine. Raises any ModelError."""
    try:
        path = resolve(model)
    except ModelNotFoundError as exc:
        raise ModelNotFoundError(f"{exc}. `mooli list` shows what is here") from exc
    config, checkpoint = open_model(path)
    try:
        kinds: Counter[str] = Counter()
        for name, spec in config.tensors().items():
            if name in checkpoint:
                kinds[checkpoint.tensor(name).type.name] += prod(spec.shape)
    finally:
        checkpoint.close()
    num_parameters = sum(kinds.values())
    tokenizer = load_tokenizer(path)
    wire_format = open_wire_format(EngineConfig.from_kwargs(model_path=str(path)), tokenizer)
    sizes = sizes_of("cpu", "auto", None)
    page_size = sizes.default_page_size
    kv_dtype = kv_type("auto", "auto", sizes.auto_dtype)
    kv_bytes = sizes.kv_bytes_per_page(config.part(1).cache_spec(page_size, kv_dtype)) * -(-_CONTEXT // page_size)
    loaded = weight_bytes(config, "auto", stored_types=_stored(path, config))
    has_template = tokenizer.chat_template is not None
    return {
        "name": model,
        "path": str(path),
        "architecture": config.architecture,
        "parameters": num_parameters,
        "weights": {kind: f"{100 * count / num_parameters:.2g} %" for kind, count in kinds.most_common()},
        "vocabulary": tokenizer.vocab_size,
        "context_length": config.max_position_embeddings,
        "chat_template": has_template,
        "tools": None if not has_template or wire_format.calls is None else wire_format.calls.name,
        "reasoning": wire_format.name if has_template else None,
        "file_bytes": _file_bytes(path),
        "loaded_bytes": loaded,
        f"kv_cache_of_{_CONTEXT}_tokens_bytes": kv_bytes,
    }


def _stored(path: Path, config: Any) -> Any:
    from mooli.models.loader import stored_types

    return stored_types(path, config)


def _file_bytes(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def rm(args: argparse.Namespace) -> int:
    """Remove models from the caches, one after the other. Raises ModelNotFoundError before the first is removed."""
    models = [kept_model(name) for name in args.models]
    used = {_resolved(model): server for server in running_servers(servers_folder()) for model in server.models}
    for model in models:
        server = used.get(model.path.resolve())
        if server is not None:
            raise ConfigError(f"{model.name} is served at {server.url}: `mooli stop {server.pid}` first")
    for model in models:
        if not args.yes and not _agrees(model):
            print(f"{model.name} stays.", file=sys.stderr)
            continue
        print(f"{model.name} is removed: {_size(remove(model))}", file=sys.stderr)
    return 0


def _resolved(model: str) -> Path | None:
    try:
        return resolve(model).resolve()
    except (MooliError, OSError):
        return None


def _agrees(model: KeptModel) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError(f"remove {model.name} from {model.home}? Say so with --yes")
    try:
        print(f"Remove {model.name} ({_size(model.size_bytes)}) from {model.home}? [y/N] ", end="", file=sys.stderr)
        sys.stderr.flush()
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False


# -- servers -----------------------------------------------------------------------------------------------------------
def ps(args: argparse.Namespace) -> int:
    """The servers that run."""
    servers = running_servers(servers_folder())
    if args.json:
        print(
            json.dumps([dataclasses.asdict(server) | {"memory_bytes": _memory(server)} for server in servers], indent=2)
        )
        return 0
    rows = [
        (server.model, str(server.pid), server.url, _size(_memory(server)), _ago(server.started_s))
        for server in servers
    ]
    _print_table(("MODEL", "PID", "URL", "MEMORY", "SINCE"), rows)
    if not servers:
        print("No server runs: `mooli serve MODEL` starts one.", file=sys.stderr)
    return 0


def stop(args: argparse.Namespace) -> int:
    """Have servers finish what they answer, and end. 1 if one is still at it after --wait."""
    servers = running_servers(servers_folder())
    chosen = servers if args.all else _chosen(servers, args.server)
    for server in chosen:
        os.kill(server.pid, signal.SIGTERM)
    deadline = time.monotonic() + args.wait
    left = set(chosen)
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        left &= set(running_servers(servers_folder()))
    for server in chosen:
        state = "still answers; the same once more ends it at once" if server in left else "has ended"
        print(f"{server.model} (pid {server.pid}) {state}", file=sys.stderr)
    return 1 if left else 0


def _chosen(servers: Sequence[RunningServer], wanted: str | None) -> list[RunningServer]:
    there = ", ".join(f"{server.model} (pid {server.pid}, {server.url})" for server in servers) or "none"
    if wanted is None:
        if len(servers) != 1:
            raise ConfigError(f"which server? There are: {there}")
        return list(servers)
    chosen = [server for server in servers if wanted in (str(server.pid), server.url, server.model, *server.models)]
    if not chosen:
        raise ConfigError(f"no server of yours is {wanted}; there are: {there}")
    return chosen


def _memory(server: RunningServer) -> int:
    """Bytes that a server and its children hold; 0 where the system does not tell."""
    held, pids = 0, [server.pid]
    while pids:
        pid = pids.pop()
        process = Path(f"/proc/{pid}")
        try:
            lines = (process / "status").read_text().splitlines()
            pids += map(int, (process / "task" / str(pid) / "children").read_text().split())
        except OSError:
            continue
        held += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    return held


# -- words -------------------------------------------------------------------------------------------------------------
def _as_dict(model: KeptModel) -> dict[str, Any]:
    values = dataclasses.asdict(model)
    return values | {"path": str(model.path), "home": str(model.home)}


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    for row in [heads, *rows]:
        print("  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip())


def _size(num_bytes: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes /= 1000
        del units[0]
    return f"{num_bytes:.3g} {units[0]}"


def _ago(since_s: float) -> str:
    seconds = max(0.0, time.time() - since_s)
    for unit, length_s in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"
