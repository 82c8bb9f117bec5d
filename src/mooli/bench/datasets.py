"""Where the prompts of a run come from: files of conversations, texts of chosen lengths, groups with a shared head.

Owns the choice among datasets, reading and filtering files of conversations (ShareGPT's JSON, JSON lines of the same,
OpenAI requests), cutting text and ids to length, and making groups up. Lengths are drawn as SGLang draws them, in the
same order from the same seed. Traces are in `traces`. Nothing is downloaded: a dataset is a file the user names, a file
that is in the Hugging Face cache already, or made here.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import random
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mooli.bench.errors import BenchmarkError, check_at_least
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
    from mooli.bench.traces import mooncake  # here, because that module builds on this one

    loaders: dict[str, Callable[[DatasetOptions, Tokenizer, Randoms], Dataset]] = {
        "sharegpt": sharegpt,
        "custom": custom,
        "openai": openai,
        "random": random_text,
        "random-ids": random_ids,
        "generated-shared-prefix": shared_prefix,
        "mooncake": mooncake,
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


# -- files of conversations --------------------------------------------------------------------------------------------

_ASSISTANT_SUFFIX = "Assistant:"
_MIN_FIXED_OUTPUT_LEN = 4
_DEFAULT_OPENAI_OUTPUT_LEN = 256
_NOT_PASSED_ON = ("messages", "max_tokens", "max_completion_tokens", "model", "stream", "stream_options")


def sharegpt(options: DatasetOptions, tokenizer: Tokenizer, randoms: Randoms) -> Dataset:
    """The first turn of each conversation is the prompt; the second says how long the answer is."""
    file = sharegpt_file(options)
    turns = first_turns(file)
    randoms.python.shuffle(turns)
    return Dataset(requests=_fitting(turns, options, tokenizer), note=f"ShareGPT, {file}")


def custom(options: DatasetOptions, tokenizer: Tokenizer, randoms: Randoms) -> Dataset:
    """JSON lines, each with `conversations` of at least two turns under `content` or `value`."""
    file = _needed_file(options)
    lines, num_bad = _json_lines(file)
    turns = [pair for line in lines if (pair := _two_turns(line)) is not None]
    randoms.python.shuffle(turns)
    return Dataset(
        requests=_fitting(turns, options, tokenizer),
        note=f"custom, {file}",
        remarks=_remarks(file, num_bad),
    )


def openai(options: DatasetOptions, tokenizer: Tokenizer, _: Randoms) -> Dataset:
    """JSON lines, each the body of a chat completion; all its keys but the model and the lengths are passed on."""
    if not options.is_chat:
        raise BenchmarkError(
            "--dataset-name openai holds chats: use --backend sglang-oai-chat, vllm-chat or lmdeploy-chat"
        )
    file = _needed_file(options)
    lines, num_bad = _json_lines(file)
    requests = []
    for line in lines[: options.num_prompts]:
        messages = line.get("messages")
        if not isinstance(messages, list) or not messages:
            continue
        wanted = line.get("max_tokens") or line.get("max_completion_tokens") or _DEFAULT_OPENAI_OUTPUT_LEN
        prompt_len = _chat_len(messages, tokenizer)
        if line.get("tools"):
            prompt_len += len(tokenizer.encode(json.dumps(line["tools"]), add_special_tokens=False))
        requests.append(
            BenchRequest(
                prompt=messages,
                prompt_len=prompt_len,
                output_len=options.sharegpt_output_len or int(wanted),
                extra_body={key: value for key, value in line.items() if key not in _NOT_PASSED_ON},
            )
        )
    return Dataset(requests=requests, note=f"openai, {file}", remarks=_remarks(file, num_bad))


def first_turns(file: Path) -> list[tuple[str, str]]:
    """The first two turns of each conversation of a ShareGPT file. Raises BenchmarkError when it is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise BenchmarkError(f"cannot read the dataset {file}: {exc.strerror}") from exc
    except ValueError as exc:
        raise BenchmarkError(f"the dataset {file} is not JSON: {exc}") from exc
    if not isinstance(data, list):
        raise BenchmarkError(f"the dataset {file} is not a list of conversations")
    return [pair for entry in data if (pair := _two_turns(entry)) is not None]


def _needed_file(options: DatasetOptions) -> Path:
    if not options.path:
        raise BenchmarkError(f"--dataset-name {options.name} needs --dataset-path FILE")
    return Path(options.path)


def _json_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and how many lines were none."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise BenchmarkError(f"cannot read the dataset {file}: {exc}") from exc
    objects = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects, len(lines) - len(objects)


def _remarks(file: Path, num_bad: int) -> tuple[str, ...]:
    return (f"{num_bad} lines of {file} are no JSON objects and were left out",) if num_bad else ()


def _two_turns(entry: Any) -> tuple[str, str] | None:
    turns = entry.get("conversations") or entry.get("conversation") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        return None
    first, second = (turn.get("content", turn.get("value", "")) for turn in turns[:2])
    return (first, second) if isinstance(first, str) and isinstance(second, str) else None


def _fitting(turns: Iterable[tuple[str, str]], options: DatasetOptions, tokenizer: Tokenizer) -> list[BenchRequest]:
    """Requests of those pairs that are neither too short nor too long, as many as are wanted."""
    fixed = options.sharegpt_output_len
    if fixed is not None and fixed < _MIN_FIXED_OUTPUT_LEN:
        raise BenchmarkError(f"--sharegpt-output-len must be at least {_MIN_FIXED_OUTPUT_LEN}, got {fixed}")
    requests: list[BenchRequest] = []
    for said, answered in turns:
        if len(requests) == options.num_prompts:
            break
        prompt = said
        if options.prompt_suffix:
            prompt = said.removesuffix(_ASSISTANT_SUFFIX) + options.prompt_suffix + _ASSISTANT_SUFFIX
        if options.apply_chat_template:
            prompt = chat_text([{"role": "user", "content": prompt}], tokenizer)
        prompt_len = len(tokenizer.encode(prompt))
        output_len = len(tokenizer.encode(answered)) if fixed is None else fixed
        if prompt_len < 2 or output_len < 2:
            continue
        if options.sharegpt_context_len and prompt_len + output_len > options.sharegpt_context_len:
            continue
        requests.append(BenchRequest(prompt=prompt, prompt_len=prompt_len, output_len=output_len))
    return requests


def chat_text(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """A chat as the text of a prompt. The begin token is left out: the server adds it.

    Raises BenchmarkError when the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise BenchmarkError("the tokenizer has no chat template; leave out --apply-chat-template")
    text = tokenizer.chat_template.render(messages)
    begin = tokenizer.special_tokens.get("bos_token")
    return text.replace(begin, "") if begin else text


def _chat_len(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> int:
    if tokenizer.chat_template is not None:
        return len(tokenizer.encode(tokenizer.chat_template.render(messages), add_special_tokens=False))
    return len(tokenizer.encode("\n".join(str(message.get("content", "")) for message in messages)))


# -- chosen lengths ----------------------------------------------------------------------------------------------------


def random_text(options: DatasetOptions, tokenizer: Tokenizer, randoms: Randoms) -> Dataset:
    """ShareGPT's prompts, shuffled, repeated or cut to length; without the file, words drawn from a list of ours."""
    input_lens, output_lens = _lengths(options, tokenizer, randoms)
    file = Path(options.path) if options.path else sharegpt_in_cache()
    if file is not None:
        ids = _from_conversations(file, input_lens, tokenizer, randoms)
        return _dataset(options, ids, output_lens, tokenizer, note=f"random, text of {file}")
    ids = _from_words(input_lens, tokenizer, randoms)
    return _dataset(
        options,
        ids,
        output_lens,
        tokenizer,
        note="random, words from Mooli's own list",
        remarks=("no ShareGPT file was given: the prompts are words drawn from a list in the package",),
    )


def random_ids(options: DatasetOptions, tokenizer: Tokenizer, randoms: Randoms) -> Dataset:
    """Token j of request i is (offset_i + i + j) mod vocabulary, with an offset drawn for each request."""
    if options.path:
        raise BenchmarkError("--dataset-name random-ids reads no file; leave out --dataset-path or use random")
    input_lens, output_lens = _lengths(options, tokenizer, randoms)
    vocab_size = _plain_vocab_size(tokenizer)
    offsets = randoms.numpy.randint(0, vocab_size, size=options.num_prompts)
    ids = [
        [(int(offset) + i + j) % vocab_size for j in range(length)]
        for i, (offset, length) in enumerate(zip(offsets, input_lens, strict=True))
    ]
    return _dataset(options, ids, output_lens, tokenizer, note="random-ids")


def _lengths(options: DatasetOptions, tokenizer: Tokenizer, randoms: Randoms) -> tuple[list[int], list[int]]:
    """Input and output lengths; a text is shorter by what the server's tokenizer puts around it."""
    if options.random_input_len < 1 or options.random_output_len < 1:
        raise BenchmarkError("--random-input-len and --random-output-len must be at least 1")
    num, ratio = options.num_prompts, options.random_range_ratio
    input_lens = random_lengths(options.random_input_len, ratio, num, randoms)
    output_lens = random_lengths(options.random_output_len, ratio, num, randoms)
    if not options.tokenize_prompt:
        num_added = len(tokenizer.encode("", add_special_tokens=True))
        input_lens = [max(length - num_added, 1) for length in input_lens]
    return input_lens, output_lens


def _dataset(
    options: DatasetOptions,
    ids: list[list[int]],
    output_lens: list[int],
    tokenizer: Tokenizer,
    *,
    note: str,
    remarks: tuple[str, ...] = (),
) -> Dataset:
    requests = [
        BenchRequest(
            prompt=prompt if options.tokenize_prompt else tokenizer.decode(prompt, skip_special_tokens=False),
            prompt_len=len(prompt),
            output_len=output_len,
        )
        for prompt, output_len in zip(ids, output_lens, strict=False)
    ]
    if len(requests) < options.num_prompts:
        remarks += (f"there are {len(requests)} prompts, fewer than the {options.num_prompts} asked for",)
    return Dataset(requests=requests, note=note, remarks=remarks)


def _from_conversations(file: Path, input_lens: list[int], tokenizer: Tokenizer, randoms: Randoms) -> list[list[int]]:
    turns = first_turns(file)
    randoms.python.shuffle(turns)
    prompts: list[list[int]] = []
    for said, _ in turns:
        if len(prompts) == len(input_lens):
            break
        ids = tokenizer.encode(said, add_special_tokens=False)
        if ids:
            length = input_lens[len(prompts)]
            prompts.append((ids * -(-length // len(ids)))[:length])
    return prompts


def _from_words(input_lens: list[int], tokenizer: Tokenizer, randoms: Randoms) -> list[list[int]]:
    # A word is tokenised once, with the space before it: text is cut at spaces first, so that the words of a sentence
    # are the same tokens.
    words = [tokenizer.encode(" " + word, add_special_tokens=False) for word in word_list()]
    prompts = []
    for length in input_lens:
        ids: list[int] = []
        while len(ids) < length:
            ids += randoms.python.choice(words)
        prompts.append(ids[:length])
    return prompts


def word_list() -> list[str]:
    """About a thousand short English words."""
    file = importlib.resources.files("mooli.bench").joinpath("words.txt")
    return file.read_text(encoding="utf-8").split()


def _plain_vocab_size(tokenizer: Tokenizer) -> int:
    """Ids up to the last ordinary token; the special and unused ones behind it would be odd prompts."""
    size = tokenizer.vocab_size
    while size > 1 and (size - 1 in tokenizer.special_ids or not tokenizer.has_token(size - 1)):
        size -= 1
    return size


# -- groups with a shared head -----------------------------------------------------------------------------------------


def shared_prefix(options: DatasetOptions, tokenizer: Tokenizer, randoms: Randoms) -> Dataset:
    """num_groups * prompts_per_group conversations; `--num-prompts` says nothing here.

    Raises BenchmarkError for counts below 1, a distribution that does not fit its parameter, and several turns on a
    route that takes no chat.
    """
    gsp = options.shared_prefix
    _check(gsp, is_chat=options.is_chat)
    num = gsp.num_groups * gsp.prompts_per_group
    system_lens = random_lengths(gsp.system_prompt_len, gsp.range_ratio, gsp.num_groups, randoms)
    question_lens = np.asarray(random_lengths(gsp.question_len, gsp.range_ratio, num * gsp.num_turns, randoms))
    output_lens = random_lengths(gsp.output_len, gsp.range_ratio, num, randoms)
    ids = usable_ids(tokenizer)

    def text(length: int) -> str:
        return tokenizer.decode(randoms.python.choices(ids, k=length), skip_special_tokens=False)

    systems = [text(length) for length in system_lens]
    run = secrets.token_hex(4)
    requests = []
    for i, group in enumerate(_groups(gsp, randoms)):
        lens = question_lens[i * gsp.num_turns : (i + 1) * gsp.num_turns]
        first, *later = (text(int(length)) for length in lens)
        prompt = f"{systems[group]}\n\n{first}"
        drawn_len = system_lens[group] + int(lens[0])
        requests.append(
            BenchRequest(
                prompt=prompt,
                # Random tokens written as text are not the same tokens when read again.
                prompt_len=drawn_len if gsp.fast_prepare else len(tokenizer.encode(prompt)),
                output_len=output_lens[i],
                later_turns=tuple(later),
                routing_key=f"{run}_{group}" if gsp.send_routing_key else None,
            )
        )
    if not gsp.ordered:
        randoms.python.shuffle(requests)
    remarks = []
    if gsp.fast_prepare:
        remarks.append("input tokens are those drawn, not those of the text (--gsp-fast-prepare)")
    if options.num_prompts not in (num, DatasetOptions().num_prompts):
        remarks.append(f"--num-prompts says nothing here: groups and prompts per group make {num} prompts")
    note = f"generated-shared-prefix, {gsp.num_groups} groups of {gsp.prompts_per_group}"
    if gsp.group_distribution == "zipf":
        note = f"generated-shared-prefix, {num} prompts over {gsp.num_groups} groups, zipf {gsp.zipf_alpha:g}"
    return Dataset(requests=requests, note=note, remarks=tuple(remarks))


def _groups(gsp: SharedPrefixOptions, randoms: Randoms) -> list[int]:
    """The group of each prompt: all alike, or drawn with weights 1 / rank**alpha, rank starting at 1."""
    num = gsp.num_groups * gsp.prompts_per_group
    if gsp.group_distribution == "uniform":
        return [i // gsp.prompts_per_group for i in range(num)]
    weights = np.arange(1, gsp.num_groups + 1, dtype=np.float64) ** -(gsp.zipf_alpha or 1.0)
    return [int(group) for group in np.sort(randoms.numpy.choice(gsp.num_groups, size=num, p=weights / weights.sum()))]


def _check(gsp: SharedPrefixOptions, *, is_chat: bool) -> None:
    check_at_least(
        ("--gsp-num-groups", gsp.num_groups, 1),
        ("--gsp-prompts-per-group", gsp.prompts_per_group, 1),
        ("--gsp-system-prompt-len", gsp.system_prompt_len, 1),
        ("--gsp-question-len", gsp.question_len, 1),
        ("--gsp-output-len", gsp.output_len, 1),
        ("--gsp-num-turns", gsp.num_turns, 1),
    )
    alpha = gsp.zipf_alpha
    if gsp.group_distribution == "zipf" and not (alpha is not None and math.isfinite(alpha) and alpha > 0):
        raise BenchmarkError(
            f"--gsp-group-distribution zipf needs --gsp-zipf-alpha, a finite number above 0, got {alpha}"
        )
    if gsp.group_distribution == "uniform" and alpha is not None:
        raise BenchmarkError("--gsp-zipf-alpha belongs to --gsp-group-distribution zipf")
    if gsp.num_turns > 1 and not is_chat:
        raise BenchmarkError(
            "--gsp-num-turns above 1 needs a chat: --backend sglang-oai-chat, vllm-chat or lmdeploy-chat"
        )
