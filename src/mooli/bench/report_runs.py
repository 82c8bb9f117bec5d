"""Runs as the report reads them, out of lines of JSON.

Owns reading result files and checking what stands in them: a file may come from anywhere. Numbers that are absent or no
numbers are None. Never draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.bench.errors import BenchmarkError

Floats = NDArray[np.float64]

MAX_RUNS = 6
"""More colours cannot be told apart."""

MAX_LABEL_LEN = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """What each request did, one entry to a request. Times in seconds, starts from the start of the run.

    start_s: None where the file does not say. cached, prompt_tokens: NaN where the server did not say.
    """

    indices: list[int]
    turns: list[int]
    start_s: Floats | None
    ttft_s: Floats
    latency_s: Floats
    itl_s: list[Floats]
    input_lens: Floats
    output_lens: Floats
    cached: Floats
    prompt_tokens: Floats
    errors: list[str]
    texts: list[str]
    succeeded: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.errors)

    def samples_ms(self, name: str) -> Floats:
        """All values of "ttft", "itl", "tpot" or "e2e_latency", of the requests that succeeded, in milliseconds."""
        done = self.succeeded
        if name == "itl":
            gaps = [gaps for gaps, ok in zip(self.itl_s, done, strict=True) if ok]
            return np.concatenate(gaps) * 1000 if gaps else np.empty(0)
        if name == "tpot":
            several = done & (self.output_lens > 1)
            return (self.latency_s - self.ttft_s)[several] / (self.output_lens[several] - 1) * 1000
        return (self.ttft_s if name == "ttft" else self.latency_s)[done] * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run. label: how the page calls it. result: its line of JSON. requests: None without details.

    remarks: what the reader of the page should know about the file.
    """

    label: str
    result: Mapping[str, Any]
    requests: Requests | None
    remarks: tuple[str, ...] = field(default=())

    def number(self, *keys: str) -> float | None:
        """The number under `keys`, each inside the one before; None where there is none."""
        value: Any = self.result
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return finite(value)

    @property
    def hit_rate_pct(self) -> float | None:
        rate = self.number("cache_hit_rate_pct")
        return rate if rate is not None else self.number("cache_report", "cache_hit_rate_pct")

    def text(self, key: str) -> str | None:
        value = self.result.get(key)
        return value if isinstance(value, str) and value else None

    def seconds_list(self, key: str) -> Floats | None:
        """The list under `key`, one number to a second; None where there is none."""
        value = self.result.get(key)
        if not isinstance(value, list) or not value or any(finite(item) is None for item in value):
            return None
        return np.asarray(value, dtype=np.float64)


def finite(value: Any) -> float | None:
    """`value` when it is a number that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def read_runs(files: Sequence[Path], *, all_lines: bool) -> list[Run]:
    """The runs of those result files: the last line of each, or all lines.

    Raises BenchmarkError for a file that cannot be read or is no result file, and for more than MAX_RUNS runs.
    """
    runs = []
    for file in files:
        lines = _lines(file)
        chosen = lines if all_lines else lines[-1:]
        for number, line in chosen:
            remarks: tuple[str, ...] = ()
            if len(lines) > len(chosen):
                remarks = (f"{file.name} holds {len(lines)} runs; this is the last one (--all-lines shows all)",)
            runs.append(run_of(_result(file, number, line), file.stem, place=f"{file}, line {number}", remarks=remarks))
    if len(runs) > MAX_RUNS:
        raise BenchmarkError(f"a report shows at most {MAX_RUNS} runs side by side, these files hold {len(runs)}")
    return runs


def run_of(result: Mapping[str, Any], name: str, *, place: str, remarks: tuple[str, ...] = ()) -> Run:
    """A run out of its line of JSON. name: its label when it has no tag. place: of the line, for errors.

    Raises BenchmarkError for a line that is not of a measurement.
    """
    tag = result.get("tag")
    label = tag if isinstance(tag, str) and tag.strip() else name
    if finite(result.get("duration")) is None or finite(result.get("mean_ttft_ms")) is None:
        raise BenchmarkError(f"{place}: not a result of bench_serving: it has no duration or no mean_ttft_ms")
    requests = _requests(result, place)
    run = Run(label=label[:MAX_LABEL_LEN], result=result, requests=requests, remarks=remarks)
    return Run(label=run.label, result=result, requests=requests, remarks=(*remarks, *_disagreements(run)))


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise BenchmarkError(f"{file} cannot be read: {reason}") from exc
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise BenchmarkError(f"{file} is empty")
    return lines


def _result(file: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise BenchmarkError(f"{file}, line {number}: not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise BenchmarkError(f"{file}, line {number}: not a JSON object")
    return value


def _requests(result: Mapping[str, Any], place: str) -> Requests | None:
    """The lists of --output-details. Only those SGLang writes too must be there."""
    if "ttfts" not in result or "errors" not in result:
        return None
    errors = ["" if error is None else str(error) for error in _list(result, "errors", place)]
    num = len(errors)

    def listed(key: str) -> list[Any] | None:
        if result.get(key) is None:
            return None
        values = _list(result, key, place)
        if len(values) != num:
            raise BenchmarkError(f"{place}: {key} has {len(values)} entries, errors has {num}")
        return values

    def numbers(key: str, missing: float) -> Floats:
        found = [finite(value) for value in listed(key) or [None] * num]
        return np.asarray([missing if value is None else value for value in found], dtype=np.float64)

    gaps = [
        np.asarray([gap for item in (row if isinstance(row, list) else ()) if (gap := finite(item)) is not None])
        for row in listed("itls") or [[]] * num
    ]
    ttfts = numbers("ttfts", 0.0)
    sums = ttfts + np.asarray([float(row.sum()) for row in gaps], dtype=np.float64)
    latencies = numbers("latencies", math.nan)
    latencies = np.where(np.isnan(latencies), sums, latencies)
    output_lens = numbers("output_lens", 0.0)
    indices, turns = numbers("request_indices", math.nan), numbers("turns", 0.0)
    return Requests(
        indices=[position if math.isnan(value) else int(value) for position, value in enumerate(indices)],
        turns=[int(turn) for turn in turns],
        start_s=numbers("start_times", 0.0) if result.get("start_times") is not None else None,
        ttft_s=ttfts,
        latency_s=latencies,
        itl_s=gaps,
        input_lens=numbers("input_lens", 0.0),
        output_lens=output_lens,
        cached=numbers("cached_tokens", math.nan),
        prompt_tokens=numbers("server_prompt_tokens", math.nan),
        errors=errors,
        texts=[text if isinstance(text, str) else "" for text in listed("generated_texts") or [""] * num],
        succeeded=np.asarray([not error for error in errors], dtype=np.bool_) & ((output_lens > 0) | (latencies > 0)),
    )


def _list(result: Mapping[str, Any], key: str, place: str) -> list[Any]:
    value = result[key]
    if not isinstance(value, list):
        raise BenchmarkError(f"{place}: {key} is not a list")
    return value


def _disagreements(run: Run) -> tuple[str, ...]:
    """Says where the requests of a file do not give the figures of its summary: then a curve and its marks differ."""
    if run.requests is None:
        return ()
    remarks = []
    for name in ("ttft", "itl", "tpot", "e2e_latency"):
        said, values = run.number(f"mean_{name}_ms"), run.requests.samples_ms(name)
        found = float(values.mean()) if len(values) else 0.0
        if said is not None and abs(found - said) > 0.005 * max(said, found, 0.1):
            remarks.append(
                f"the requests listed in the file have a mean {name} of {found:.2f} ms, its summary says {said:.2f} ms:"
                " the curve is of the requests, the marks are of the summary"
            )
    return tuple(remarks)
