"""`mooncake`: replaying a trace of arrival times, lengths and shared blocks (Mooncake's JSON lines).

Owns turning a trace's records into prompts. A record has `timestamp` (ms), `input_length`, `output_length` (tokens) and
`hash_ids`: each id stands for a block of 512 tokens, and equal ids at the head of two records mean equal text.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from mooli.bench.conversations import chat_text
from mooli.bench.datasets import Dataset, DatasetOptions, MooncakeOptions, Randoms
from mooli.bench.errors import BenchmarkError
from mooli.bench.random_prompts import word_list
from mooli.bench.records import BenchRequest
from mooli.frontend.tokenizer import Tokenizer

BLOCK_TOKENS = 512

MIN_BLOCK_TOKENS = 8
"""Shorter blocks could be equal by chance, which would make sharing that the trace does not have."""

_HIS_PER_BLOCK = 128
_DEFAULT_OUTPUT_LEN = 256
_QUESTION = "Tell me a story based on this context."


def mooncake(options: DatasetOptions, tokenizer: Tokenizer, _: Randoms) -> Dataset:
    """One session a record, at its own time; its rounds are sent together, with made-up answers between them.

    Without a length factor the text is SGLang's: short blocks of "hi", whatever the trace's lengths are. With one,
    prompts and answers have the trace's lengths times the factor, and two prompts share as many blocks as before.

    Raises BenchmarkError when the trace is missing or a record is malformed.
    """
    check_factors(options.mooncake)
    file = _file(options)
    return replayed(read_trace(file, options.num_prompts), options, tokenizer, note=f"mooncake, {file}")


def check_factors(cake: MooncakeOptions) -> None:
    """Raise BenchmarkError for a slowdown, a length factor or a number of rounds that cannot be."""
    if not (math.isfinite(cake.slowdown_factor) and cake.slowdown_factor >= 0):
        raise BenchmarkError(f"--mooncake-slowdown-factor must be at least 0, got {cake.slowdown_factor}")
    factor = cake.length_factor
    if factor is not None and not (math.isfinite(factor) and round(BLOCK_TOKENS * factor) >= MIN_BLOCK_TOKENS):
        least = MIN_BLOCK_TOKENS / BLOCK_TOKENS
        raise BenchmarkError(f"--mooncake-length-factor must be a number of at least {least}, got {factor}")
    if cake.num_rounds < 1:
        raise BenchmarkError(f"--mooncake-num-rounds must be at least 1, got {cake.num_rounds}")


def replayed(
    trace: list[dict[str, Any]],
    options: DatasetOptions,
    tokenizer: Tokenizer,
    *,
    note: str,
    remarks: tuple[str, ...] = (),
) -> Dataset:
    """The requests of `trace`, records in the order of their times. Nothing else of `options` but `mooncake` and
    `is_chat` is looked at; its factors are taken as checked."""
    cake = options.mooncake
    first_ms = trace[0]["timestamp"] if trace else 0
    prompts = _Prompts(cake, tokenizer, is_chat=options.is_chat)
    requests = []
    for record in trace:
        at_s = (record["timestamp"] - first_ms) / 1000 * cake.slowdown_factor
        requests += prompts.rounds(record, at_s)
    return Dataset(requests=requests, note=note, remarks=remarks)


class _Prompts:
    def __init__(self, options: MooncakeOptions, tokenizer: Tokenizer, *, is_chat: bool) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._is_chat = is_chat
        self._factor = options.length_factor
        self._blocks: dict[Any, list[int]] = {}
        self._words: list[list[int]] = []

    def rounds(self, record: dict[str, Any], at_s: float) -> list[BenchRequest]:
        output_len = record["output_length"]
        if self._factor is not None:
            output_len = max(round(output_len * self._factor), 1)
        text = self._scaled_text(record) if self._factor is not None else self._sglang_text(record)
        if self._factor is not None and self._options.num_rounds == 1:
            # Exactly the trace's length: no template and no question around it.
            return [self._request(text, output_len, at_s)]
        messages: list[dict[str, Any]] = []
        requests = []
        for i in range(self._options.num_rounds):
            messages.append({"role": "user", "content": f"Round {i + 1}: {text}"})
            requests.append(self._request(self._prompt(messages), output_len, at_s))
            messages.append({"role": "assistant", "content": " ".join(["story"] * output_len)})
        return requests

    def _request(self, prompt: Any, output_len: int, at_s: float) -> BenchRequest:
        text = prompt if isinstance(prompt, str) else self._as_text(prompt)
        length = len(self._tokenizer.encode(text))
        return BenchRequest(prompt=prompt, prompt_len=length, output_len=output_len, arrival_s=at_s)

    def _prompt(self, messages: list[dict[str, Any]]) -> Any:
        return list(messages) if self._is_chat else self._as_text(messages)

    def _as_text(self, messages: list[dict[str, Any]]) -> str:
        if self._tokenizer.chat_template is not None:
            return chat_text(messages, self._tokenizer)
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)

    def _sglang_text(self, record: dict[str, Any]) -> str:
        block = " ".join(["hi"] * _HIS_PER_BLOCK)
        return "".join(f"{hash_id}{block}" for hash_id in record["hash_ids"]) + _QUESTION

    def _scaled_text(self, record: dict[str, Any]) -> str:
        factor = self._factor or 1.0
        ids = [token for hash_id in record["hash_ids"] for token in self._block(hash_id)]
        wanted = max(round(record["input_length"] * factor), 1)
        while len(ids) < wanted:
            # A record without ids for all of its length shares the rest with nobody.
            ids += self._block((record["timestamp"], len(ids)))
        return self._tokenizer.decode(ids[:wanted])

    def _block(self, hash_id: Any) -> list[int]:
        """The tokens of a block: words that follow from its id alone, so that equal ids are equal text everywhere."""
        if hash_id not in self._blocks:
            if not self._words:
                self._words = [self._tokenizer.encode(" " + w, add_special_tokens=False) for w in word_list()]
            size = round(BLOCK_TOKENS * (self._factor or 1.0))
            chance = random.Random(f"block {hash_id}")
            ids: list[int] = []
            while len(ids) < size:
                ids += chance.choice(self._words)
            self._blocks[hash_id] = ids[:size]
        return self._blocks[hash_id]


def _file(options: DatasetOptions) -> Path:
    """The trace: a file, or of a folder that holds several, the one of the workload."""
    if not options.path:
        raise BenchmarkError(
            "--dataset-name mooncake needs --dataset-path, a trace file or a folder of them; nothing is downloaded"
        )
    path = Path(options.path)
    default = MooncakeOptions().workload
    if path.is_dir():
        return path / f"{options.mooncake.workload}_trace.jsonl"
    if options.mooncake.workload != default:
        raise BenchmarkError("--mooncake-workload chooses a file of a folder, and --dataset-path is one file")
    return path


def read_trace(file: Path, num: int | None) -> list[dict[str, Any]]:
    """The first `num` records of a file, None for all, in the order of their times.

    Each has timestamp, hash_ids, input_length and output_length. Raises BenchmarkError.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise BenchmarkError(f"cannot read the trace {file}: {exc}") from exc
    records = [_record(line, f"{file}, record {i}") for i, line in enumerate(lines[:num], start=1)]
    return sorted(records, key=lambda record: float(record["timestamp"]))


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError as exc:
        raise BenchmarkError(f"{where} is not JSON: {exc}") from exc
    if not isinstance(data, dict) or not isinstance(data.get("timestamp"), (int, float)):
        raise BenchmarkError(f"{where} has no timestamp in milliseconds")
    hash_ids = data.get("hash_ids", [])
    output_length = data.get("output_length", _DEFAULT_OUTPUT_LEN)
    input_length = data.get("input_length", BLOCK_TOKENS * len(hash_ids) if isinstance(hash_ids, list) else None)
    if not isinstance(hash_ids, list) or not isinstance(output_length, int) or not isinstance(input_length, int):
        raise BenchmarkError(f"{where} needs hash_ids (a list), input_length and output_length (whole numbers)")
    return {
        "timestamp": data["timestamp"],
        "hash_ids": hash_ids,
        "input_length": input_length,
        "output_length": output_length,
    }
