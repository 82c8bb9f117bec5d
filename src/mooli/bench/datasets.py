"""Where the prompts of a run come from.

Owns the choice among datasets and what they have in common. Nothing is downloaded: a dataset is a file the user names,
a file that is in the Hugging Face cache already, or made here.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mooli.bench.errors import BenchmarkError
from mooli.bench.records import BenchRequest
from mooli.frontend.tokenizer import Tokenizer

REFUSED_DATASETS = {
    "mmmu": "it needs images",
    "image": "it needs images",
    "longbench_v2": "it is not read here; write its prompts to a file for --dataset-name custom or openai",
    "speed-bench": "it is not read here; write its prompts to a file for --dataset-name custom or openai",
    "agentic-trace": "it is not read here; write its prompts to a file for --dataset-name custom or openai",
}

_SHAREGPT_REPOSITORY = "datasets--anon8231489123--ShareGPT_Vicuna_unfiltered"
_SHAREGPT_FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixOptions:
    """`generated-shared-prefix`; lengths in tokens."""

    num_groups: int = 64
    prompts_per_group: int = 16
    system_prompt_len: int = 2048
    question_len: int = 128
    output_len: int = 256
    range_ratio: float = 1.0
    num_turns: int = 1
    fast_prepare: bool = False
    send_routing_key: bool = False
    ordered: bool = False
    group_distribution: str = "uniform"
    zipf_alpha: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeOptions:
    """`mooncake`. length_factor: None takes SGLang's text, which has its own lengths."""

    workload: str = "conversation"
    slowdown_factor: float = 1.0
    num_rounds: int = 1
    length_factor: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetOptions:
    """What to send; lengths in tokens. is_chat: requests go to a chat route."""

    name: str = "sharegpt"
    path: str = ""
    num_prompts: int = 1000
    sharegpt_output_len: int | None = None
    sharegpt_context_len: int | None = None
    random_input_len: int = 1024
    random_output_len: int = 1024
    random_range_ratio: float = 0.0
    prompt_suffix: str = ""
    apply_chat_template: bool = False
    tokenize_prompt: bool = False
    is_chat: bool = False
    shared_prefix: SharedPrefixOptions = field(default_factory=SharedPrefixOptions)
    mooncake: MooncakeOptions = field(default_factory=MooncakeOptions)


@dataclass(frozen=True, slots=True)
class Randoms:
    """The two sources of chance of a run, seeded as SGLang's client seeds the libraries' own."""

    python: random.Random
    numpy: np.random.RandomState

    @staticmethod
    def seeded(seed: int) -> Randoms:
        return Randoms(random.Random(seed), np.random.RandomState(seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """note: in a few words, where the prompts are from. remarks: what the user should know besides."""

    requests: list[BenchRequest]
    note: str
    remarks: tuple[str, ...] = ()


def load_dataset(options: DatasetOptions, tokenizer: Tokenizer, randoms: Randoms) -> Dataset:
    """The requests of a run, in the order they are sent.

    Raises BenchmarkError for a dataset that is refused, has no file, cannot be read, or holds nothing to send.
    """
    # Here, because those modules build on this one.
    from mooli.bench import conversations, mooncake, random_prompts, shared_prefix

    loaders: dict[str, Callable[[DatasetOptions, Tokenizer, Randoms], Dataset]] = {
        "sharegpt": conversations.sharegpt,
        "custom": conversations.custom,
        "openai": conversations.openai,
        "random": random_prompts.random_text,
        "random-ids": random_prompts.random_ids,
        "generated-shared-prefix": shared_prefix.shared_prefix,
        "mooncake": mooncake.mooncake,
    }
    if options.name in REFUSED_DATASETS:
        raise BenchmarkError(f"--dataset-name {options.name}: {REFUSED_DATASETS[options.name]}")
    if options.name not in loaders:
        raise BenchmarkError(f"there is no dataset {options.name!r}; choose one of {', '.join(loaders)}")
    if options.num_prompts < 1:
        raise BenchmarkError(f"--num-prompts must be at least 1, got {options.num_prompts}")
    dataset = loaders[options.name](options, tokenizer, randoms)
    if not dataset.requests:
        raise BenchmarkError(f"the dataset {options.name} ({dataset.note}) has no prompt that fits the arguments")
    return dataset


def check_file(options: DatasetOptions) -> None:
    """Raise BenchmarkError for a dataset whose file is not named or not there, before a run needs anything else."""
    if options.path and not Path(options.path).exists():
        raise BenchmarkError(f"--dataset-path {options.path}: there is no such file")
    if options.name == "sharegpt":
        sharegpt_file(options)
    elif options.name in ("custom", "openai", "mooncake") and not options.path:
        raise BenchmarkError(f"--dataset-name {options.name} needs --dataset-path FILE")


def sharegpt_file(options: DatasetOptions) -> Path:
    """The file that is named, else the one in the cache. Raises BenchmarkError if there is none."""
    file = Path(options.path) if options.path else sharegpt_in_cache()
    if file is None:
        raise BenchmarkError(
            "--dataset-name sharegpt, the default, needs its file: `--dataset-name random` needs none; or give"
            f" --dataset-path FILE ({_SHAREGPT_FILE}; nothing is downloaded here)"
        )
    return file


def random_lengths(full_len: int, range_ratio: float, num: int, randoms: Randoms) -> list[int]:
    """`num` whole numbers, uniform in [max(int(full_len * range_ratio), 1), full_len], both ends included.

    Raises BenchmarkError for a ratio outside 0 to 1.
    """
    if not 0 <= range_ratio <= 1:
        raise BenchmarkError(f"a range ratio must be from 0 to 1, got {range_ratio}")
    if full_len <= 0:
        return [0] * num
    lengths = randoms.numpy.randint(max(int(full_len * range_ratio), 1), full_len + 1, size=num)
    return [int(length) for length in lengths]


def usable_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that stand for ordinary tokens: unused entries and special tokens are left out."""
    special = tokenizer.special_ids
    return [i for i in range(tokenizer.vocab_size) if i not in special and tokenizer.has_token(i)]


def sharegpt_in_cache() -> Path | None:
    """The ShareGPT file of the local Hugging Face cache, where SGLang's client keeps it; None if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    root = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    found = sorted((root / _SHAREGPT_REPOSITORY / "snapshots").glob(f"*/{_SHAREGPT_FILE}"))
    return found[-1] if found else None
