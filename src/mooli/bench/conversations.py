"""Prompts from files of conversations: ShareGPT's JSON, JSON lines of the same, and OpenAI requests.

Owns reading and filtering those files. Never makes a prompt up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mooli.bench.datasets import Dataset, DatasetOptions, Randoms, sharegpt_file
from mooli.bench.errors import BenchmarkError
from mooli.bench.records import BenchRequest
from mooli.frontend.tokenizer import Tokenizer

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
