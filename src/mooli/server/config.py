"""Every argument of the HTTP server that is not the engine's: its name, default, meaning and checks.

Owns `ServerConfig` and its warnings. Names and meanings are those of SGLang's server arguments where it has them; the
limits on what clients may cost are our own. Never opens a socket, and never reads what the files hold that it names.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.arguments import Arguments, argument, parse_object
from mooli.errors import ConfigError

_LEAST_S = 0.001
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
SENDABLE = re.compile(r"[!-~]+")
"""A key that clients can send."""

_HOST_NAME = re.compile(r"[a-zA-Z0-9_.-]+|\*")

_ORIGIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/?#\s,]+")


def _buckets(of: str) -> Any:
    return argument(
        None, "floats", f"Upper bounds of the buckets, in seconds, of the histogram of {of}; default: built in.",
        low=1e-6,
    )  # fmt: skip


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(item for part in (text or "").split(",") if (item := part.strip()))


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Arguments):
    """Arguments of one server, checked. Build it with `from_kwargs`. Times are in seconds.

    Raises ConfigError for a value that cannot be used, naming the argument, the value and what is possible.
    """

    OWNER: ClassVar[str] = "server"

    host: str = argument("127.0.0.1", "str", "Address to listen on; 0.0.0.0: all of IPv4.", subject="address")
    port: int = argument(30000, "int", "Port to listen on; 0: a free one, which the log names.", low=0, high=65535)
    fastapi_root_path: str = argument("", "str", "Path under which a proxy shows this server, such as /llm.")
    ssl_keyfile: str | None = argument(None, "str", "File with the private key: serve HTTPS.", subject="TLS")
    ssl_certfile: str | None = argument(None, "str", "File with the certificate and its chain.")
    ssl_ca_certs: str | None = argument(None, "str", "File with the authorities that client certificates need.")
    ssl_keyfile_password: str | None = argument(None, "str", "Password of the private key.", is_secret=True)
    api_key: str | None = argument(
        None,
        "str",
        "Key that clients must send; default: that in MOOLI_API_KEY, or anybody may call. Who can list this machine's"
        " processes can read it here.",
        subject="access",
        is_secret=True,
    )
    admin_api_key: str | None = argument(
        None,
        "str",
        "Key for what changes the server; default: that in MOOLI_ADMIN_API_KEY, or the API key.",
        is_secret=True,
    )
    api_keys_file: str | None = argument(
        None,
        "str",
        "YAML file with several keys, their names, tenants and limits, instead of the two above; SIGHUP has it read"
        " again.",
    )
    cors_allow_origins: str | None = argument(
        None, "str", "Web pages that may call: origins with commas between, or *. Default: those of this server."
    )
    allowed_hosts: str | None = argument(
        None,
        "str",
        "Names by which a server without a key may be called, with commas between, or *: any. Addresses, localhost and"
        " this machine's own name always may; beyond the loopback interface private names too.",
    )
    max_queued_requests: int = argument(
        4096, "int", "Sequences that may wait; more are answered with 503.", low=1, subject="limits"
    )
    max_concurrent_requests: int = argument(
        8192, "int", "HTTP requests in progress; more are answered with 429.", low=1
    )
    max_body_bytes: int = argument(32 * 2**20, "size", "Longest body of a request, in bytes.", low=1024)
    max_body_values: int = argument(
        500_000, "int", "Most numbers, texts, lists and objects in the body of a request.", low=64
    )
    max_request_items: int = argument(
        4096,
        "int",
        "Most prompts, messages with their parts, entries of template arguments, texts to tokenize or lists of tokens"
        " in one request.",
        low=1,
    )
    max_stop_chars: int = argument(
        4 * 2**20, "size", "Characters of all stop strings of a request, each sequence's counted.", low=1
    )
    max_header_bytes: int = argument(
        32 * 2**10, "size", "Longest head of a request, in bytes.", low=1024, high=16 * 2**20
    )
    request_timeout: float | None = argument(
        None, "float", "Seconds a request may take, from its head to its end; default: no limit.", low=_LEAST_S
    )
    keep_alive_timeout: float = argument(75.0, "float", "Seconds a connection may be idle.", low=1)
    read_timeout: float = argument(
        30.0, "float", "Seconds a client has for the head of a request, and again for its body.", low=_LEAST_S
    )
    write_timeout: float = argument(
        60.0, "float", "Seconds after which a client that takes nothing, or too little, is cut off.", low=_LEAST_S
    )
    shutdown_timeout: float = argument(
        25.0, "float", "Seconds that running requests have to finish after SIGTERM.", low=_LEAST_S
    )
    watchdog_timeout: float = argument(
        300.0, "float", "Seconds one step of the engine may take before the server gives it up.", low=_LEAST_S
    )
    no_page: bool = argument(False, "bool", "Serve no page for browsers at / and /docs, the API alone.")
    skip_server_warmup: bool = argument(False, "bool", "Be ready without having answered a first request.")
    sampling_defaults: str = argument(
        "model",
        "str",
        "Sampling parameters of a chat that names none: the model's, or OpenAI's.",
        choices=("model", "openai"),
        subject="answers",
    )
    default_chat_template_kwargs: str = argument(
        "{}", "json", "JSON object with arguments of the chat template, for chats that bring none."
    )
    stream_response_default_include_usage: bool = argument(
        False, "bool", "End OpenAI streams with the usage, asked for or not."
    )
    enable_response_store: bool = argument(
        False, "bool", "Keep what /v1/responses answers, in memory, for clients that go on from a response's id."
    )
    response_store_bytes: int = argument(
        64 * 2**20, "size", "Most bytes of kept responses; those used least recently are let go.", low=2**16
    )
    models: str | None = argument(
        None,
        "str",
        "Several models instead of one: MODEL or NAME=MODEL with commas between, or a folder of models. Each is loaded"
        " when a request names it first, in an engine process of its own.",
        subject="several models",
    )
    model_idle_timeout: float = argument(
        300.0, "float", "Seconds without a request after which a model of --models is ended; 0: never.", low=0
    )
    max_loaded_models: int | None = argument(
        None, "int", "Models of --models that are loaded at a time; default: as many as there is memory for.", low=1
    )
    batch_dir: str | None = argument(
        None,
        "str",
        "Folder for the files and batches of clients (/v1/files, /v1/batches), which outlive the server; default:"
        " neither is taken.",
        subject="batches",
    )
    max_file_bytes: int = argument(200 * 2**20, "size", "Longest file that a client may send, in bytes.", low=1024)
    max_files: int = argument(1000, "int", "Most files of one tenant, results of batches counted.", low=1)
    max_files_bytes: int = argument(
        8 * 2**30, "size", "Most bytes of all files of one tenant, results of batches counted.", low=1024
    )
    max_batch_rows: int | None = argument(
        None,
        "int",
        "Rows of batches that the engine has at a time; default: half as many as requests may run.",
        low=1,
    )
    log_level_http: str | None = argument(
        None,
        "str",
        "Log level of the HTTP server, whose lines of info are one for each request; default: these, and warnings.",
        choices=(None, *_LOG_LEVELS),
        subject="logs",
    )
    log_requests: bool = argument(False, "bool", "Log each sequence that the engine gets, and its end.")
    log_requests_level: int = argument(
        2, "int", "How much of a request: 0 no texts and parameters, 1 no texts, 2 texts cut short, 3 all.",
        low=0, high=3,
    )  # fmt: skip
    log_requests_format: str = argument(
        "text", "str", "How requests are logged; json: each line is an object.", choices=("text", "json")
    )
    decode_log_interval: int = argument(40, "int", "Decode steps between two lines about them.", low=1)
    enable_metrics: bool = argument(
        True, "bool", "Accepted for compatibility: /metrics is always there.", subject="metrics"
    )
    enable_cache_report: bool = argument(
        True, "bool", "Accepted for compatibility: cached tokens are always reported in the usage."
    )
    bucket_time_to_first_token: tuple[float, ...] | None = _buckets("times to the first token")
    bucket_inter_token_latency: tuple[float, ...] | None = _buckets("times between tokens")
    bucket_e2e_request_latency: tuple[float, ...] | None = _buckets("times of whole requests")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.host or self.host != self.host.strip():
            raise ConfigError(f"host={self.host!r} is no address: use 127.0.0.1, 0.0.0.0, ::1 or a name")
        if self.fastapi_root_path and not re.fullmatch(r"(/[\w.~-]+)+", self.fastapi_root_path):
            raise ConfigError(
                f"fastapi_root_path={self.fastapi_root_path!r} is no path: begin it with / and end it without"
            )
        self._check_keys()
        self._check_tls()
        self._check_models()
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"cors_allow_origins: {origin!r} is no origin: use * or scheme://host:port without a path"
                )
        for host in self.host_names:
            if not _HOST_NAME.fullmatch(host):
                raise ConfigError(f"allowed_hosts: {host!r} is no name: use * or host names without scheme and port")
        for name in ("bucket_time_to_first_token", "bucket_inter_token_latency", "bucket_e2e_request_latency"):
            bounds = getattr(self, name)
            if bounds is not None and (not bounds or list(bounds) != sorted(set(bounds))):
                raise ConfigError(f"{name}={list(bounds)} must be at least one number, each larger than the one before")

    @classmethod
    def _convert(cls, item: dataclasses.Field[Any], value: Any) -> Any:
        is_list = item.name in ("cors_allow_origins", "allowed_hosts") and isinstance(value, list)
        if is_list and all(isinstance(one, str) for one in value):
            return ",".join(value)  # from a file
        return super()._convert(item, value)

    def _check_keys(self) -> None:
        for name in ("api_key", "admin_api_key"):
            key = getattr(self, name)
            if key is not None and not SENDABLE.fullmatch(key):
                raise ConfigError(
                    f"{name} is empty, or holds a space or a character outside ASCII: no client could send it;"
                    " leave it out for none"
                )
            if key is not None and self.api_keys_file is not None:
                raise ConfigError(
                    f"api_keys_file and {name} (or MOOLI_{name.upper()}) are given: put the key into the file, an"
                    " admin's with admin: true, or leave the file out"
                )

    def _check_tls(self) -> None:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            missing = "ssl_keyfile" if self.ssl_keyfile is None else "ssl_certfile"
            raise ConfigError(f"{missing} is missing: HTTPS needs ssl_keyfile and ssl_certfile together")
        for name in ("ssl_ca_certs", "ssl_keyfile_password"):
            if getattr(self, name) is not None and self.ssl_keyfile is None:
                raise ConfigError(f"{name} needs ssl_keyfile and ssl_certfile: without them HTTP is served")
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            if path is not None and not os.path.isfile(path):
                raise ConfigError(f"{name}={path!r} is no file")

    def _check_models(self) -> None:
        if self.models is None:
            for name in ("model_idle_timeout", "max_loaded_models"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ConfigError(f"{name} is for several models: give them with models, or leave it out")
            return
        for name, what in (("batch_dir", "batches"), ("enable_response_store", "kept responses")):
            if getattr(self, name):
                raise ConfigError(
                    f"models and {name} are given: {what} are kept for one model; serve it alone, or leave one of the"
                    " two out"
                )

    @property
    def cors_origins(self) -> tuple[str, ...]:
        """`cors_allow_origins` as a list; empty if there are none."""
        return _listed(self.cors_allow_origins)

    @property
    def host_names(self) -> tuple[str, ...]:
        """`allowed_hosts` as a list; empty if there are none."""
        return _listed(self.allowed_hosts)

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """`default_chat_template_kwargs`, parsed."""
        return parse_object("default_chat_template_kwargs", self.default_chat_template_kwargs)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server. A name other than localhost counts as reachable."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def warnings(self) -> list[str]:
        """What whoever starts the server should know of these arguments. Holds no key."""
        found = []
        if not self.is_loopback and self.api_key is None and self.api_keys_file is None:
            found.append(
                f"host {self.host} can be reached from other machines and there is no api_key: anybody there may use"
                " this server. Give --api-key (or MOOLI_API_KEY), or listen on 127.0.0.1."
            )
        if self.api_key is not None and self.admin_api_key == self.api_key:
            found.append("admin_api_key is the same as api_key: every client may call the administrative routes")
        if self.response_store_bytes != type(self).response_store_bytes and not self.enable_response_store:
            found.append("response_store_bytes has no effect without enable_response_store")
        for name in ("max_file_bytes", "max_files", "max_files_bytes", "max_batch_rows"):
            if getattr(self, name) != getattr(type(self), name) and self.batch_dir is None:
                found.append(f"{name} has no effect without batch_dir")
        for name in ("enable_metrics", "enable_cache_report"):
            if not getattr(self, name):
                found.append(f"{name}=False has no effect: it is always on")
        return found
