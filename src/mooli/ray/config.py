"""What an application of Ray Serve may be told: arguments of engines and servers, and of their replicas.

Owns the reading of `serve run mooli.ray:app NAME=VALUE …` and of `args` in a Serve config file. One model's arguments
stand there as they are; several models are a list under `models`. Arguments that say how a server listens are refused:
Serve listens. Never imports Ray.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.arguments import Arguments, argument, nearest
from mooli.config import DEMO, EngineConfig
from mooli.errors import ConfigError, UnknownArgumentError
from mooli.ray.placement import Rules
from mooli.server.config import ServerConfig
from mooli.sglang_arguments import is_sglang_argument

_SERVES = {
    **dict.fromkeys(("host", "port"), "http_options of the Serve config file says where Serve listens"),
    **dict.fromkeys(
        ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_keyfile_password"),
        "http_options of the Serve config file has TLS",
    ),
    "fastapi_root_path": "route_prefix of the application is that path",
    **dict.fromkeys(
        ("max_header_bytes", "keep_alive_timeout", "write_timeout"), "connections are those of Serve's proxies"
    ),
    **dict.fromkeys(
        ("batch_dir", "max_batch_rows", "max_file_bytes", "max_files", "max_files_bytes"),
        "a folder of batches is one server's; `mooli batch --url` works with this application",
    ),
    **dict.fromkeys(
        ("model_idle_timeout", "max_loaded_models"), "each model has replicas of its own: see replicas and max_replicas"
    ),
}
"""Arguments of a server that would do nothing here, and why."""

MARGIN_S = 5.0
"""More than `shutdown_timeout`, until Serve kills a replica that does not end."""

_RULES = Rules()

APPLICATION = ("models", "ingress_replicas", "head_chars")


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig(Arguments):
    """How many replicas of a model there are, where, and who gets which request. Build it with `from_kwargs`."""

    OWNER: ClassVar[str] = "replica"

    replicas: int = argument(1, "int", "Replicas of the model; the least of them where max_replicas is given.", low=1)
    max_replicas: int | None = argument(None, "int", "Most replicas: Serve adds and removes them by load.", low=1)
    target_requests: float = argument(
        8.0, "float", "Requests a replica is to have where Serve adds and removes some.", low=0.1
    )
    npus: float = argument(0.0, "float", "Ascend NPUs of a replica, as Ray counts them.", low=0)
    gpus: float = argument(0.0, "float", "GPUs of a replica, as Ray counts them.", low=0)
    cpus: float | None = argument(
        None, "float", "Processors of a replica, as Ray counts them; default: num_threads, or 1.", low=0
    )
    routing: str = argument(
        "head", "str", "Who gets a request: the replica that has the head of its prompt, or each in turn.",
        choices=("head", "round_robin"),
    )  # fmt: skip
    spill_factor: float = argument(
        _RULES.spill_factor, "float", "A replica with so many times the mean is passed over.", low=1
    )
    spill_floor: int = argument(_RULES.spill_floor, "int", "Not below so many requests, though.", low=1)
    warm_up_s: float = argument(_RULES.warm_up_s, "float", "Seconds in which a new replica gets its full share.", low=0)
    warm_up_share: float = argument(
        _RULES.warm_up_share, "float", "Part of its share that it gets at once.", low=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas} is less than replicas={self.replicas}: raise it, or leave it out for"
                " a fixed number"
            )

    @property
    def rules(self) -> dict[str, Any]:
        """Of `mooli.ray.placement.Rules`, by name."""
        return {name: getattr(self, name) for name in ("spill_factor", "spill_floor", "warm_up_s", "warm_up_share")}


@dataclass(frozen=True, slots=True)
class Model:
    """One model of an application. name: as requests ask for it."""

    server: ServerConfig
    engine: EngineConfig
    replica: ReplicaConfig

    @property
    def name(self) -> str:
        return self.engine.served_model_name or self.engine.model_path


@dataclass(frozen=True, slots=True)
class ApplicationConfig:
    """ingress_replicas: processes that read bodies and choose replicas. head_chars: characters of a prompt by which a
    replica is chosen."""

    models: tuple[Model, ...]
    ingress_replicas: int = 1
    head_chars: int = 1024


def read_arguments(given: Mapping[str, Any]) -> ApplicationConfig:
    """From a command line, whose values are all words, or from a file.

    Raises ConfigError for a value that cannot be used, UnknownArgumentError for a name that is none.
    """
    own = {name: given[name] for name in APPLICATION if name in given}
    rest = {name: value for name, value in given.items() if name not in own}
    if "models" in own and rest:
        raise ConfigError(f"{', '.join(sorted(rest))} beside models: put what is one model's into its entry")
    entries = own.get("models", [rest])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError("models must be a list with the arguments of each model")
    models = tuple(_model(entry) for entry in entries)
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(f"two models are called {max(names, key=names.count)!r}: give one another served_model_name")
    if len({_keys(model.server) for model in models}) > 1:
        raise ConfigError("the models of one application have the same keys: give api_key, or the others, to all")
    return ApplicationConfig(
        models, _whole(own, "ingress_replicas", 1, 1, 1024), _whole(own, "head_chars", 1024, 1, 2**20)
    )


def _keys(server: ServerConfig) -> tuple[str | None, ...]:
    return server.api_key, server.admin_api_key, server.api_keys_file


def _whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = _typed("int", given.get(name, default))
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} must be a whole number from {low} to {high}")
    return value


def _model(given: Mapping[str, Any]) -> Model:
    kinds: tuple[type[Arguments], ...] = (ReplicaConfig, ServerConfig, EngineConfig)
    sorted_out: dict[type[Arguments], dict[str, Any]] = {kind: {} for kind in kinds}
    fields = [{item.name: item for item in dataclasses.fields(kind)} for kind in kinds]
    known = {**EngineConfig.names(), **ServerConfig.names(), **ReplicaConfig.names()}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name in _SERVES:
            raise ConfigError(f"{name} has no effect under Ray Serve: {_SERVES[name]}; remove it")
        if name not in known and name not in ("backend",) and not is_sglang_argument(name):
            raise UnknownArgumentError(f"there is no argument {key!r}{nearest(name, [*known, *APPLICATION])}")
        owner = next((i for i, own in enumerate(fields) if known.get(name) in own), len(kinds) - 1)
        item = fields[owner].get(known.get(name, ""))
        sorted_out[kinds[owner]][name] = value if item is None else _typed(item.metadata["kind"], value)
    server = ServerConfig.from_kwargs(**sorted_out[ServerConfig])
    engine = EngineConfig.from_kwargs(**{"model_path": DEMO, **sorted_out[EngineConfig]})
    replica = ReplicaConfig.from_kwargs(**sorted_out[ReplicaConfig])
    if server.enable_response_store and max(replica.replicas, replica.max_replicas or 1) > 1:
        raise ConfigError(
            "enable_response_store keeps responses in one replica, and the next request may go to another: use one"
            " replica, or send the conversation with each request"
        )
    return Model(server, engine, replica)


def _typed(kind: str, value: Any) -> Any:
    """A word of a command line as what an argument of this kind takes; what is none stays a word, and is refused."""
    if not isinstance(value, str):
        return value
    if kind == "bool":
        return {"true": True, "false": False}.get(value.lower(), value)
    if kind == "int" and re.fullmatch(r"-?\d+", value):
        return int(value)
    try:
        return float(value) if kind == "float" else value
    except ValueError:
        return value
