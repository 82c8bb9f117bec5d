"""Traces of arrival times, lengths and shared blocks (Mooncake's JSON lines): read, made up, and turned into prompts.

A record has `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`: each id stands for a block of
512 tokens, and equal ids at the head of two records mean equal text.

Made-up traces have lengths and rates that are the averages of the traces of the Mooncake paper (FAST '25): 12,031
requests of conversations in an hour, 12,035 tokens in and 343 out; 23,608 requests of tools and agents, 8,596 in and
182 out. How prompts share their heads is Mooli's own model: see `Workload`. Never sends anything.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mooli.bench.datasets import Dataset, DatasetOptions, MooncakeOptions, Randoms, chat_text, word_list
from mooli.bench.errors import BenchmarkError, check_at_least
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
    cake = options.mooncake
    check_factors(cake.slowdown_factor, cake.length_factor, "--mooncake-slowdown-factor", "--mooncake-length-factor")
    check_at_least(("--mooncake-num-rounds", cake.num_rounds, 1))
    file = _trace_file(options)
    return replayed(read_trace(file, options.num_prompts), options, tokenizer, note=f"mooncake, {file}")


def check_factors(slowdown: float, length: float | None, slowdown_flag: str, length_flag: str) -> None:
    """Raise BenchmarkError for a slowdown or a length factor that cannot be."""
    if not (math.isfinite(slowdown) and slowdown >= 0):
        raise BenchmarkError(f"{slowdown_flag} must be a number of at least 0, got {slowdown}")
    if length is not None and not (math.isfinite(length) and round(BLOCK_TOKENS * length) >= MIN_BLOCK_TOKENS):
        raise BenchmarkError(
            f"{length_flag} must be a number of at least {MIN_BLOCK_TOKENS / BLOCK_TOKENS}, got {length}"
        )


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


def _trace_file(options: DatasetOptions) -> Path:
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


# -- made-up traces ----------------------------------------------------------------------------------------------------

_SIGMA = 0.6
"""Spread of lengths, which are log-normal; at 0.6 the median is 84 % of the mean."""

_LONGEST = 4.0
"""No length is more than this many times its mean, so that no request is out of all proportion."""

_NUM_OPEN = 32
"""Sessions that may go on: the latest ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths in tokens, rates in requests per second.

    Each request goes on with an open session with the probability `continuing`, else begins one. A session begins with
    one of `num_heads` common heads of `head_len` tokens (system prompt and tools; rank r is 1 / r as frequent as the
    first) and a text of its own; each later turn has all of the one before, its answer, and a new text.
    """

    request_rate: float
    output_len: float
    continuing: float
    head_len: int
    num_heads: int
    first_len: float
    later_len: float


WORKLOADS = {
    "conversation": Workload(
        request_rate=12031 / 3600,
        output_len=343,
        continuing=0.41,
        head_len=0,
        num_heads=1,
        first_len=11000,
        later_len=1500,
    ),
    "tool-agent": Workload(
        request_rate=23608 / 3600,
        output_len=182,
        continuing=0.4,
        head_len=6 * BLOCK_TOKENS,
        num_heads=16,
        first_len=4780,
        later_len=1200,
    ),
}


@dataclass(slots=True)
class _Session:
    """block_ids: of its whole blocks, as long as `num_tokens`."""

    block_ids: list[int]
    num_tokens: int
    output_len: int = 0


def synthetic_trace(workload: Workload, num: int, seed: int) -> list[dict[str, Any]]:
    """`num` records of timestamp (ms), input_length, output_length (tokens) and hash_ids; the same for the same seed.

    The averages hold over many requests; arrivals are a Poisson process.
    """
    return _Writer(workload, np.random.RandomState(seed)).records(num)


def possible_reuse(trace: Sequence[dict[str, Any]]) -> float:
    """Share of all prompt tokens, 0 to 1, that a cache without limits would have: blocks at the head of a prompt that
    an earlier prompt began with too."""
    nodes: dict[tuple[int, Any], int] = {}
    reused = total = 0
    for record in trace:
        node, num_shared, is_shared = 0, 0, True
        for block_id in record["hash_ids"]:
            is_shared = is_shared and (node, block_id) in nodes
            num_shared += is_shared
            node = nodes.setdefault((node, block_id), len(nodes) + 1)
        reused += min(num_shared * BLOCK_TOKENS, record["input_length"])
        total += record["input_length"]
    return reused / total if total else 0.0


class _Writer:
    def __init__(self, workload: Workload, generator: np.random.RandomState) -> None:
        self._workload = workload
        self._generator = generator
        self._num_ids = 0
        blocks = workload.head_len // BLOCK_TOKENS
        self._heads = [[self._new_id() for _ in range(blocks)] for _ in range(workload.num_heads)]
        weights = 1 / np.arange(1, workload.num_heads + 1)
        self._weights = weights / weights.sum()
        self._open: list[_Session] = []

    def records(self, num: int) -> list[dict[str, Any]]:
        gaps = self._generator.exponential(1000 / self._workload.request_rate, size=num)
        return [self._record(int(at_ms)) for at_ms in np.cumsum(gaps) - gaps[:1].sum()]

    def _record(self, at_ms: int) -> dict[str, Any]:
        workload = self._workload
        if self._open and self._generator.random_sample() < workload.continuing:
            session = self._open[self._generator.randint(len(self._open))]
            session.num_tokens += session.output_len + self._length(workload.later_len)
        else:
            head = self._heads[int(self._generator.choice(workload.num_heads, p=self._weights))]
            session = _Session(list(head), len(head) * BLOCK_TOKENS + self._length(workload.first_len))
            self._open = [*self._open[-_NUM_OPEN + 1 :], session]
        num_whole, rest = divmod(session.num_tokens, BLOCK_TOKENS)
        session.block_ids += [self._new_id() for _ in range(num_whole - len(session.block_ids))]
        session.output_len = self._length(workload.output_len)
        return {
            "timestamp": at_ms,
            "input_length": session.num_tokens,
            "output_length": session.output_len,
            # A block that is not full holds other tokens once the session goes on.
            "hash_ids": [*session.block_ids, *([self._new_id()] if rest else [])],
        }

    def _length(self, mean: float) -> int:
        drawn = self._generator.lognormal(math.log(mean) - _SIGMA**2 / 2, _SIGMA)
        return max(round(min(drawn, _LONGEST * mean)), 1)

    def _new_id(self) -> int:
        self._num_ids += 1
        return self._num_ids - 1
