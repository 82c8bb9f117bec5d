"""Every engine argument: its name, default, meaning, choices and checks. The one source for keywords and flags.

Owns `EngineConfig`. Names and meanings are those of SGLang's server arguments, plus a few of our own. An argument that
would do nothing is refused. Never looks at the machine, a model or a backend: defaults that depend on them are None
here and settled in `mooli.engine.build`. What a server needs besides is in `mooli.server.config`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mooli.arguments import Arguments, argument, parse_object
from mooli.errors import ConfigError, UnknownArgumentError
from mooli.sglang_arguments import HINTS, REASONS, asks_for_nothing, is_server_argument, is_sglang_argument

logger = logging.getLogger(__name__)

DEMO = "demo"
"""The `model_path` of the demo model, which is a Python package of its own."""

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
    "torch": "torch",
}
"""Accepted `device` and `backend` to our backend's name. "auto" is settled by `EngineConfig.backend_name`."""


@dataclass(frozen=True, slots=True)
class Ability:
    """What a backend can do of that which arguments ask for: it is known by the backend's name, before it is loaded.

    has_ranks: it computes one model in several processes. has_int8_kv: it keeps keys and values in 8 bits.
    verifies_guesses: several tokens of a row are computed by the kernels of one, so that a guess changes no answer.
    has_host_tier: its KV cache may have memory of the host below it, which is not the same memory already.
    """

    has_ranks: bool = False
    has_int8_kv: bool = False
    verifies_guesses: bool = False
    has_host_tier: bool = False


ABILITIES = {
    "cpu": Ability(has_int8_kv=True, verifies_guesses=True),
    "reference": Ability(has_int8_kv=True, verifies_guesses=True),
    "torch": Ability(has_ranks=True, has_host_tier=True),
    "cuda": Ability(has_ranks=True, has_host_tier=True),
    "ascend": Ability(has_ranks=True, has_host_tier=True),
}
"""By our backend's name."""

KERNELS = ("auto", "native", "ascend")
"""`attention_backend` and `sampling_backend`: each device has one implementation, `ascend` is the one of NPUs."""

REASONING_PARSERS = (
    "apertus2509", "cohere_command4", "deepseek-r1", "deepseek-v3", "deepseek-v4", "deepseek-v41", "dots", "gemma4",
    "gigachat35", "glm45", "gpt-oss", "granite_thinking_parser", "hunyuan", "interns1", "kimi", "kimi_k2",
    "kimi_k3", "ling3", "mimo", "minimax", "minimax-m3", "mistral", "nanbeige", "nemotron_3", "openpangu",
    "poolside_v1", "qwen3", "qwen3-thinking", "step3", "step3p5",
)  # fmt: skip
"""Names of `reasoning_parser`, all but one of them SGLang's. What they mean is in `mooli.frontend.wire_formats`."""

TOOL_CALL_PARSERS = (
    "deepseekv3", "deepseekv31", "deepseekv32", "deepseekv4", "deepseekv41", "dots", "functiongemma", "gemma4",
    "gigachat35", "glm", "glm45", "glm47", "gpt-oss", "granite", "hermes", "hunyuan", "hunyuan_a13b", "iquest_q1",
    "json_list", "kimi_k2", "kimi_k3", "lfm2", "ling3", "llama3", "mimo", "minimax-m2", "minimax-m3", "mistral",
    "openpangu", "pangu", "poolside_v1", "pythonic", "qwen", "qwen25", "qwen3_coder", "spark25", "step3", "step3p5",
    "trinity",
)  # fmt: skip
"""Names of `tool_call_parser`, most of them SGLang's. What they mean is in `mooli.frontend.wire_formats`."""

RESPONSE_TEMPLATE = "response_template"
"""`reasoning_parser` and `tool_call_parser`: what the model's own tokenizer_config.json says under this name."""

GRAMMAR_BACKENDS = ("llguidance", "xgrammar", "outlines", "none")
"""`grammar_backend`: SGLang's names. All mean llguidance but the last."""

NGRAM_DRAFT_TOKENS, NGRAM_MIN_MATCH, NGRAM_MAX_MATCH = 4, 2, 12
"""Defaults of `speculative_num_draft_tokens` and of the `speculative_ngram_*_match_window_size`."""

RETENTION_SHARE = 0.25
"""Default of `cache_retention_share`."""

KV_CACHE_AUTO, KV_CACHE_NONE = "auto", "none"
"""Values of `kv_cache_dir`: the user's cache folder, and nowhere."""

HICACHE_RATIO, HICACHE_WRITE_POLICY = 2.0, "write_through"
"""Defaults of the arguments of these names: SGLang's."""

HOST_TIER = ("enable_hierarchical_cache", "hicache_ratio", "hicache_size", "hicache_write_policy")
"""The arguments about memory of the host below the KV cache."""

NO_HOST_TIER = (
    "the KV cache lies in the host's memory already, and has no second place there; give it more with"
    " mem_fraction_static or max_total_tokens"
)
"""Why they have no effect on some devices."""

_SPECULATIVE = (
    "speculative_num_draft_tokens",
    "speculative_ngram_min_match_window_size",
    "speculative_ngram_max_match_window_size",
)

_DEVICE_SUBJECT = "device"
_ONE_IMPLEMENTATION = " Mooli has one implementation for each device: leave this argument out."


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Arguments):
    """Arguments of one engine, checked. Build it with `from_kwargs`, which also understands aliases and suffixes.

    Raises ConfigError for a value that cannot be used, naming the argument, the value and what is possible.
    """

    OWNER: ClassVar[str] = "engine"
    SHORTHANDS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "backend": (_DEVICE_SUBJECT, "Shorthand for --device: auto, cpu, reference, cuda, ascend (npu)."),
    }

    model_path: str = argument(
        dataclasses.MISSING, "str", "Model folder, GGUF file or model name.", aliases=("model",), subject="model"
    )
    tokenizer_path: str | None = argument(None, "str", "Folder or file of the tokenizer; default: the model's own.")
    skip_tokenizer_init: bool = argument(
        False, "bool", "Load no tokenizer: prompts are input_ids and answers are output_ids only."
    )
    load_format: str = argument(
        "auto",
        "str",
        "Format of the weights; dummy makes random ones.",
        choices=("auto", "safetensors", "gguf", "dummy"),
    )
    trust_remote_code: bool = argument(
        False,
        "bool",
        "Accepted for compatibility. Code from a model folder is never run, so there is nothing to trust.",
    )
    json_model_override_args: str = argument("{}", "json", "JSON object laid over the model's config.json.")
    context_length: int | None = argument(
        None,
        "size",
        "Longest prompt and answer together, in tokens; default: the model's, if the pool holds it.",
        low=2,
    )
    dtype: str = argument(
        "auto",
        "str",
        "Type of weights that are not quantised.",
        choices=tuple(DTYPES),
        spellings=DTYPES,
        subject="weights and numbers",
    )
    quantization: str | None = argument(
        None,
        "str",
        "Quantise weights while loading, group-wise; none: as the files have them.",
        choices=(None, "none", "int8", "int4"),
        spellings={"none": None},  # a flag cannot say None
        choices_hint=" A checkpoint that is quantised already, by msmodelslim too, needs no such argument.",
    )
    kv_cache_dtype: str = argument(
        "auto",
        "str",
        "Type of the KV cache; int8 takes a little more than half the memory of bfloat16, on the CPU alone.",
        choices=("auto", "float32", "float16", "bfloat16", "bf16", "int8"),
        spellings={"bf16": "bfloat16"},
        choices_hint=" For a cache of eight bits a value there is int8, on the CPU.",
    )
    device: str | None = argument(
        None,
        "str",
        "Device to run on; default: the best one present.",
        choices=(None, *DEVICES),
        subject=_DEVICE_SUBJECT,
    )
    attention_backend: str | None = argument(
        None,
        "str",
        "Attention kernels; every device has one implementation.",
        choices=(None, *KERNELS),
        choices_hint=_ONE_IMPLEMENTATION,
    )
    sampling_backend: str | None = argument(
        None,
        "str",
        "Sampling kernels; every device has one implementation.",
        choices=(None, *KERNELS),
        choices_hint=_ONE_IMPLEMENTATION,
    )
    grammar_backend: str | None = argument(
        None,
        "str",
        "What holds answers to a grammar: llguidance, whatever it is called; none refuses such requests.",
        choices=(None, *GRAMMAR_BACKENDS),
    )
    num_threads: int | None = argument(
        None, "int", "Threads of the CPU backend; default: the cores this process may use.", low=1, high=1024
    )
    tp_size: int = argument(
        1,
        "int",
        "Devices that share one model, a process each: cuda, npu, or torch on the CPU.",
        low=1,
        high=64,
        aliases=("tp", "tensor_parallel_size"),
    )
    dp_size: int = argument(
        1, "int", "Copies of the model; only 1 so far.", low=1, aliases=("dp", "data_parallel_size")
    )
    mem_fraction_static: float | None = argument(
        None,
        "float",
        "Share of the free memory that weights and KV cache may take together.",
        low=0.01,
        high=1.0,
        subject="memory and batching",
    )
    state_cache_fraction: float | None = argument(
        None,
        "float",
        "Share of the KV cache's memory for kept states of models with recurrent layers; default: 0.125.",
        low=0.0,
        high=0.9,
    )
    max_total_tokens: int | None = argument(None, "size", "Tokens the KV cache holds; default: from memory.", low=1)
    max_running_requests: int | None = argument(
        None,
        "int",
        "Requests computed at the same time; default: by device, fewer if the KV cache is small.",
        low=1,
        high=65536,
    )
    chunked_prefill_size: int | None = argument(
        None, "int", "Tokens of one step at most; -1: a whole prompt in one step. Default: by device.", low=-1
    )
    page_size: int | None = argument(None, "int", "Tokens in a KV cache page; default: by device.", low=1, high=1024)
    disable_radix_cache: bool = argument(False, "bool", "Share no computed prefix between requests.")
    cache_retention_share: float | None = argument(
        None,
        "float",
        "Share of the KV cache that requests may have kept beyond their last use (pins, cache_control, ttl); 0: none."
        f" Default: {RETENTION_SHARE}.",
        low=0.0,
        high=1.0,
    )
    kv_events_config: str | None = argument(
        None, "json", "JSON object: publish over ZMQ which pages the cache has, for routers; {} has the defaults."
    )
    schedule_policy: str = argument(
        "fcfs", "str", "Order of waiting requests: arrival (fcfs) or longest cached prefix first (lpm).",
        choices=("fcfs", "lpm"),
    )  # fmt: skip
    enable_priority_scheduling: bool = argument(
        False, "bool", "Let requests of larger priority go first; those that wait make up for it with time."
    )
    kv_cache_dir: str | None = argument(
        None,
        "str",
        "Folder to keep the KV cache in, so that it survives a restart; auto: in the user's cache folder; none:"
        " nowhere. Default: none, and auto of servers.",
        subject="KV cache on disk",
    )
    kv_cache_max_bytes: int = argument(
        16 * 2**30, "size", "Bytes in that folder at most, of all models together.", low=2**20
    )
    kv_cache_min_free_bytes: int = argument(
        4 * 2**30, "size", "Bytes of the disk that stay free for others: with fewer, nothing is added.", low=0
    )
    kv_cache_ttl: int = argument(
        7 * 24 * 3600, "int", "Seconds after its last use that something is kept there; 0: for ever.", low=0
    )
    kv_cache_key_file: str | None = argument(
        None,
        "str",
        "File with a key of 32 bytes or more, by which what is kept there is encrypted. Default: it is not.",
    )
    enable_hierarchical_cache: bool = argument(
        False,
        "bool",
        "Keep what leaves the KV cache of a device in the host's memory.",
        aliases=("enable_hicache",),
    )
    hicache_ratio: float | None = argument(
        None,
        "float",
        f"Tokens kept there for one that the device holds; default: {HICACHE_RATIO:g}.",
        low=0.01,
        high=1000,
    )
    hicache_size: float | None = argument(
        None, "float", "Memory for them in GB (10^9 bytes), instead of hicache_ratio; 0: by the ratio.", low=0
    )
    hicache_write_policy: str | None = argument(
        None,
        "str",
        "What is copied there: all (write_through), what was found again (write_through_selective), or what is"
        f" evicted, when it is (write_back); default: {HICACHE_WRITE_POLICY}.",
        choices=(None, "write_through", "write_through_selective", "write_back"),
    )
    hicache_storage_backend: str | None = argument(
        None,
        "str",
        "SGLang's name for a KV cache on disk: file is kv_cache_dir, auto unless that is given.",
        choices=(None, "file"),
        choices_hint=" The others of SGLang are not supported by Mooli yet.",
    )
    speculative_algorithm: str | None = argument(
        None,
        "str",
        "Guess tokens and verify several in a step; NGRAM: those that followed the same tokens before; default: NGRAM"
        " on the cpu, none elsewhere.",
        choices=(None, "NGRAM", "none"),
        choices_hint=" The others of SGLang are not supported by Mooli yet.",
        subject="guessed tokens",
    )
    speculative_num_draft_tokens: int | None = argument(
        None,
        "int",
        f"Tokens computed for one request in a step at most, its known one included; default: {NGRAM_DRAFT_TOKENS}.",
        low=2,
        high=64,
    )
    speculative_ngram_min_match_window_size: int | None = argument(
        None,
        "int",
        f"Tokens at the end that must have come before for a guess; default: {NGRAM_MIN_MATCH}.",
        low=1,
        high=64,
    )
    speculative_ngram_max_match_window_size: int | None = argument(
        None,
        "int",
        f"Tokens at the end that are compared, to find the place most like it; default: {NGRAM_MAX_MATCH}.",
        low=1,
        high=64,
    )
    random_seed: int | None = argument(
        None,
        "int",
        "Seed of requests that bring none; default: drawn at start.",
        low=0,
        high=2**63 - 1,
        subject="answers",
    )
    served_model_name: str | None = argument(None, "str", "Name of the model in answers; default: model_path.")
    stream_interval: int = argument(1, "int", "Tokens between two chunks of a stream.", low=1)
    incremental_streaming_output: bool = argument(
        False, "bool", "Chunks of a stream hold what is new instead of everything so far.", aliases=("stream_output",)
    )
    chat_template: str | None = argument(
        None, "str", "File with a Jinja chat template, or the template itself; default: the model's."
    )
    reasoning_parser: str = argument(
        "auto",
        "str",
        "How the model marks its reasoning, which is then told apart from the answer; auto: by its response_template,"
        " chat template and vocabulary.",
        choices=("auto", "none", *REASONING_PARSERS, RESPONSE_TEMPLATE),
    )
    tool_call_parser: str = argument(
        "auto",
        "str",
        "How the model writes calls of tools; auto: by its response_template, chat template and vocabulary; none: no"
        " calls are found.",
        choices=("auto", "none", *TOOL_CALL_PARSERS, RESPONSE_TEMPLATE),
    )
    preferred_sampling_params: str | None = argument(
        None, "json", "JSON object of sampling parameters used where a request names none."
    )
    allow_auto_truncate: bool = argument(
        False, "bool", "Cut prompts and answers that are too long (the start is kept) instead of refusing them."
    )
    log_level: str = argument(
        "error",
        "str",
        "Least severe level that is logged.",
        choices=("debug", "info", "warning", "error", "critical"),
        subject="logs",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dp_size != 1:
            raise ConfigError(
                f"dp_size={self.dp_size} is not possible yet: use dp_size=1, and a server for each copy of the model"
            )
        ability = ABILITIES[self.backend_name]
        if self.tp_size != 1 and not ability.has_ranks:
            raise ConfigError(
                f"tp_size={self.tp_size} is not possible on device {self.backend_name!r}, where one process already"
                " uses every core (see num_threads): use tp_size=1, or device='cuda' or 'npu' with several cards"
            )
        self._check_kv_cache_dir()
        self._check_host_tier(ability)
        if self.chunked_prefill_size == 0:
            raise ConfigError("chunked_prefill_size=0 computes nothing: use a positive number, or -1 for no chunking")
        self._check_speculation()
        if self.disable_radix_cache and self.cache_retention_share is not None:
            raise ConfigError(
                f"cache_retention_share={self.cache_retention_share} has no effect with disable_radix_cache:"
                " give one of them"
            )
        if self.kv_cache_dtype == "int8" and not ability.has_int8_kv:
            able = " and ".join(name for name, other in ABILITIES.items() if other.has_int8_kv)
            raise ConfigError(
                f"kv_cache_dtype='int8' is not possible on the {self.backend_name} backend, only on {able}:"
                " leave it out"
            )
        for name in ("attention_backend", "sampling_backend"):
            if getattr(self, name) == "ascend" and self.backend_name != "ascend":
                raise ConfigError(f"{name}='ascend' needs device='npu', not device={self.device!r}")
        if self.served_model_name is not None and ":" in self.served_model_name:
            raise ConfigError(f"served_model_name={self.served_model_name!r} must not contain ':'")

    def _check_kv_cache_dir(self) -> None:
        if self.kv_cache_dir in (None, KV_CACHE_AUTO, KV_CACHE_NONE):
            return
        if self.disable_radix_cache:
            raise ConfigError(
                f"kv_cache_dir={self.kv_cache_dir!r} has no effect with disable_radix_cache: give one of them"
            )

    def _check_host_tier(self, ability: Ability) -> None:
        given = next((name for name in HOST_TIER if getattr(self, name) not in (None, False, 0)), None)
        if given is None:
            return
        value = f"{given}={getattr(self, given)!r}"
        if not ability.has_host_tier:
            raise ConfigError(f"{value} has no effect on device {self.backend_name!r}: {NO_HOST_TIER}")
        if not self.enable_hierarchical_cache:
            raise ConfigError(f"{value} has no effect without enable_hierarchical_cache: give both or neither")
        if self.disable_radix_cache:
            raise ConfigError(f"{value} has no effect with disable_radix_cache: give one of them")
        if self.tp_size > 1:
            raise ConfigError(
                f"{value} is not possible with tp_size={self.tp_size} yet, as each process has pages of its own: leave"
                " it out"
            )

    def _check_speculation(self) -> None:
        if self.speculative_algorithm in (None, "none"):
            for name in _SPECULATIVE:
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name}={getattr(self, name)} has no effect without speculative_algorithm='NGRAM':"
                        " give both or neither"
                    )
        elif not ABILITIES[self.backend_name].verifies_guesses:
            raise ConfigError(
                f"speculative_algorithm={self.speculative_algorithm!r} is not possible on device {self.backend_name!r}:"
                " there a guess is verified by other kernels than those of a single token, so that answers could"
                " change; use device='cpu', or leave it out"
            )
        shortest, longest = self.ngram_match_window
        if shortest > longest:
            raise ConfigError(
                f"speculative_ngram_min_match_window_size={shortest} is more than"
                f" speculative_ngram_max_match_window_size={longest}: lower it"
            )

    @property
    def retention_share(self) -> float:
        """Of the KV cache, that requests may have retained."""
        return RETENTION_SHARE if self.cache_retention_share is None else self.cache_retention_share

    @property
    def ngram_match_window(self) -> tuple[int, int]:
        """Tokens at the end of a request that must have come before for a guess, and that are compared."""
        shortest, longest = self.speculative_ngram_min_match_window_size, self.speculative_ngram_max_match_window_size
        if shortest is None:
            shortest = min(NGRAM_MIN_MATCH, longest or NGRAM_MIN_MATCH)
        return shortest, longest or max(NGRAM_MAX_MATCH, shortest)

    @property
    def backend_name(self) -> str:
        """Our name of the backend that was asked for: cpu, reference, cuda or ascend."""
        if self.device in (None, "auto"):
            return "ascend" if "ascend" in (self.attention_backend, self.sampling_backend) else "cpu"
        return DEVICES[self.device]

    @property
    def model_overrides(self) -> dict[str, Any]:
        """`json_model_override_args`, parsed."""
        return parse_object("json_model_override_args", self.json_model_override_args)

    @property
    def preferred_sampling(self) -> dict[str, Any]:
        """`preferred_sampling_params`, parsed."""
        return parse_object("preferred_sampling_params", self.preferred_sampling_params or "{}")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """From keywords as users write them: aliases, `backend=`, sizes as "8k", spellings of dtypes.

        Raises UnknownArgumentError (a TypeError too) for a name that is not an argument, ConfigError for a bad value.
        """
        backend = kwargs.pop("backend", None)
        values = cls._values(kwargs)
        if not values.get("model_path"):
            raise ConfigError("model_path is missing: give a model folder, a GGUF file, a model name or 'demo'")
        if backend is not None:
            _apply_backend(backend, values)
        return cls(**values)

    @classmethod
    def _convert(cls, item: dataclasses.Field[Any], value: Any) -> Any:
        if item.name == "device" and isinstance(value, str):
            return re.sub(r":\d+$", "", value)  # cuda:0
        if item.name in ("reasoning_parser", "tool_call_parser") and value is None:
            return "none"
        return super()._convert(item, value)

    @classmethod
    def _refuse_unknown(cls, name: str, value: Any) -> None:
        """Nothing is wrong with a name that Mooli's engine lacks where its value asks for nothing."""
        if is_server_argument(name):
            if value is None or value is False:
                return
            raise UnknownArgumentError(
                f"{name} is an argument of the server, not of the engine: remove it, or give it to `mooli serve`"
            )
        if is_sglang_argument(name):
            if asks_for_nothing(name, value):
                return
            reason = HINTS.get(name) or REASONS.get(name)
            why = "" if reason is None else f" ({reason})"
            raise UnknownArgumentError(
                f"{name} is known to SGLang but not supported by Mooli yet{why}: remove {name}={value!r}"
            )
        super()._refuse_unknown(name, value)


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
