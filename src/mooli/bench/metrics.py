"""What a run amounts to.

Owns the formulas. Pure: records in, numbers out; what each number means stands in `FORMULAS`, which `--explain` prints.
The definitions are those of SGLang's `bench_serving`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mooli.bench.errors import BenchmarkError
from mooli.bench.records import RequestRecord

FORMULAS = """\
Times are taken on the client, by a monotonic clock: t_send just before a request's connection is opened, t_i when the
bytes that complete the i-th piece of its answer arrive. Only successful requests count, but for the SLO shares.

E2E latency     t_last - t_send; t_last is the end mark of a stream, or the body of an answer that is not streamed.
TTFT            t_first - t_send; first is the first piece with text (reasoning and tool calls are text). An answer
                without any text has its latency as TTFT.
TPOT            (latency - TTFT) / (output tokens - 1), for each request of more than one output token.
ITL             /generate: the gap between two pieces divided by the tokens the second brought (from completion_tokens),
                counted once for each of those tokens. OpenAI routes: the gaps between pieces as they are; when the
                server reports speculative decoding, divided by the retokenised length of the piece, as above.
Output tokens   usage or meta_info of the server; what was asked for where it says nothing (a note tells so).
Retokenized     what this client's tokenizer makes of the answers: a cross-check, used for no rate.
Input tokens    as the dataset counts its prompts; later turns of a conversation as the server counts them.
Duration        from the first request sent to the last answer complete, the tail included.
Throughput      requests, input tokens, output tokens or both, divided by the duration.
Concurrency     sum of latencies / duration.
Peak ...        the largest of 1-second buckets that begin with the first request: tokens that came in it, requests that
                were open in it.
Goodput         requests that met every objective / duration; attainment is their share of all requests sent.
Percentiles     linear interpolation between the nearest ranks (NumPy's default); std is the population's.
Hit rate        cached tokens / prompt tokens, both as the server reports them, over the requests that report both.
Send delay      from t_send until the request is on the wire: connecting, and this client's own work. It is part of the
                TTFT; a burst of many requests makes it long.
Cold, warm      warm: at least half of a request's prompt tokens came from the cache. cold: all others.
With a maximum concurrency, the wait for a place is in no latency. Warm-up requests are in no number.
"""

WARM_SHARE = 0.5

SLO_NAMES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """In milliseconds; all 0 when there is nothing to describe."""

    mean: float = 0.0
    median: float = 0.0
    std: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @staticmethod
    def of(seconds: Sequence[float]) -> Distribution:
        if not seconds:
            return Distribution()
        values = np.asarray(seconds, dtype=np.float64) * 1000
        median, p90, p95, p99 = (float(value) for value in np.percentile(values, [50, 90, 95, 99]))
        mean, std = float(values.mean()), float(values.std())
        return Distribution(mean=mean, median=median, std=std, p90=p90, p95=p95, p99=p99, max=float(values.max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """slos_ms: what was asked for. Shares are of all requests sent, 0 to 1."""

    slos_ms: dict[str, float]
    requests_per_s: float
    attainment: float
    attainment_by_metric: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """Tokens, as the server reports them. device, host and storage are None where it does not say where they were."""

    total_prompt_tokens: int
    total_cached_tokens: int
    device_cached_tokens: int | None
    host_cached_tokens: int | None
    storage_cached_tokens: int | None
    storage_backend: str | None

    @property
    def hit_rate_pct(self) -> float:
        return 100 * self.total_cached_tokens / self.total_prompt_tokens if self.total_prompt_tokens else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Numbers of one run; rates are per second."""

    duration_s: float
    num_sent: int
    num_completed: int
    num_failed: int
    num_interrupted: int
    total_input: int
    total_output: int
    total_output_retokenized: int
    num_output_lens_unreported: int
    request_throughput: float
    input_throughput: float
    output_throughput: float
    total_throughput: float
    concurrency: float
    accept_length: float | None
    peak_output_throughput: float
    peak_concurrent_requests: int
    output_tokens_per_second: list[int]
    requests_per_second: list[int]
    e2e_latency: Distribution
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    goodput: Goodput | None
    cache: CacheReport | None
    cold_ttft: Distribution | None
    warm_ttft: Distribution | None
    mean_send_delay_ms: float = 0.0
    num_cold: int = 0
    num_warm: int = 0
    failures: list[tuple[str, int]] = field(default_factory=list)


def calculate_metrics(
    records: Sequence[RequestRecord],
    duration_s: float,
    count_tokens: Callable[[str], int],
    *,
    accept_length: float | None = None,
    is_openai: bool = False,
    slos_ms: dict[str, float] | None = None,
) -> Metrics:
    """The numbers of `records`, measured over `duration_s`.

    count_tokens: of a text, without special tokens. accept_length: mean tokens a step that speculation gives.
    is_openai: the answers came by an OpenAI route, whose pieces do not say how many tokens they hold.
    slos_ms: objectives by name, of "ttft", "tpot" and "e2el".
    """
    done = [record for record in records if record.success]
    sent = [record for record in records if not record.interrupted]
    total_input = sum(record.prompt_len for record in done)
    total_output = sum(record.output_len for record in done)
    splits_pieces = is_openai and bool(accept_length and accept_length > 0)
    per_second, open_per_second = _buckets(done)
    cold, warm = _cold_and_warm(done)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    return Metrics(
        duration_s=duration_s,
        num_sent=len(sent),
        num_completed=len(done),
        num_failed=len(sent) - len(done),
        num_interrupted=len(records) - len(sent),
        total_input=total_input,
        total_output=total_output,
        total_output_retokenized=sum(count_tokens(record.generated_text) for record in done),
        num_output_lens_unreported=sum(not record.is_output_len_reported for record in done),
        request_throughput=len(done) * per_s,
        input_throughput=total_input * per_s,
        output_throughput=total_output * per_s,
        total_throughput=(total_input + total_output) * per_s,
        concurrency=sum(record.latency_s for record in done) * per_s,
        accept_length=accept_length,
        peak_output_throughput=float(max(per_second, default=0)),
        peak_concurrent_requests=max(open_per_second, default=0),
        output_tokens_per_second=per_second,
        requests_per_second=open_per_second,
        e2e_latency=Distribution.of([record.latency_s for record in done]),
        ttft=Distribution.of([record.ttft_s for record in done]),
        tpot=Distribution.of([tpot for record in done if (tpot := record.tpot_s) is not None]),
        itl=Distribution.of([gap for record in done for gap in _gaps(record, splits_pieces, count_tokens)]),
        goodput=_goodput(done, len(sent), duration_s, slos_ms) if slos_ms else None,
        cache=_cache_report(done),
        cold_ttft=Distribution.of([record.ttft_s for record in cold]) if cold or warm else None,
        warm_ttft=Distribution.of([record.ttft_s for record in warm]) if cold or warm else None,
        mean_send_delay_ms=Distribution.of([record.send_delay_s for record in done]).mean,
        num_cold=len(cold),
        num_warm=len(warm),
        failures=_failures(sent),
    )


def parse_slos(pairs: Sequence[str]) -> dict[str, float]:
    """`["ttft:500", "tpot:50"]` as a table, in milliseconds. Raises BenchmarkError for anything else."""
    slos: dict[str, float] = {}
    for pair in pairs:
        name, colon, text = pair.partition(":")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not colon or name not in SLO_NAMES or not (math.isfinite(value) and value > 0):
            raise BenchmarkError(
                f"--goodput takes objectives such as ttft:500 tpot:50 e2el:20000 in milliseconds above 0, got {pair!r}"
            )
        if name in slos:
            raise BenchmarkError(f"--goodput names {name} twice")
        slos[name] = value
    return slos


def _gaps(record: RequestRecord, splits_pieces: bool, count_tokens: Callable[[str], int]) -> list[float]:
    if not splits_pieces:
        return record.itl_s
    counts = [max(count_tokens(text), 1) for text in record.chunk_texts]
    return [gap / count for gap, count in zip(record.itl_s, counts, strict=True) for _ in range(count)]


def _buckets(done: Sequence[RequestRecord]) -> tuple[list[int], list[int]]:
    """Tokens that came and requests that were open, second by second from the first request on."""
    if not done:
        return [], []
    start_s = min(record.start_s for record in done)
    end_s = max(record.start_s + record.latency_s for record in done)
    num = math.ceil(end_s - start_s) + 1
    tokens, requests = np.zeros(num, dtype=np.int64), np.zeros(num, dtype=np.int64)
    for record in done:
        times = record.start_s - start_s + record.ttft_s + np.cumsum([0.0, *record.itl_s])
        np.add.at(tokens, np.minimum(times.astype(np.int64), num - 1), 1)
        first, last = record.start_s - start_s, record.start_s + record.latency_s - start_s
        requests[int(first) : int(last) + 1] += 1
    return tokens.tolist(), requests.tolist()


def _goodput(done: Sequence[RequestRecord], num_sent: int, duration_s: float, slos_ms: dict[str, float]) -> Goodput:
    met = {name: [_seconds(record, name) * 1000 <= limit_ms for record in done] for name, limit_ms in slos_ms.items()}
    num_good = sum(all(column) for column in zip(*met.values(), strict=True))
    share = 1 / num_sent if num_sent else 0.0
    return Goodput(
        slos_ms=slos_ms,
        requests_per_s=num_good / duration_s if duration_s > 0 else 0.0,
        attainment=num_good * share,
        attainment_by_metric={name: sum(column) * share for name, column in met.items()},
    )


def _seconds(record: RequestRecord, name: str) -> float:
    if name == "ttft":
        return record.ttft_s
    return record.latency_s if name == "e2el" else record.tpot_s or 0.0


def _cache_report(done: Sequence[RequestRecord]) -> CacheReport | None:
    known = [record for record in done if record.cached_tokens is not None and record.server_prompt_tokens is not None]
    if not known:
        return None
    details = [record.cached_tokens_details for record in known if record.cached_tokens_details is not None]

    def total(place: str) -> int | None:
        found = [detail[place] for detail in details if isinstance(detail.get(place), int)]
        return sum(found) if found else None

    storages = [str(detail["storage_backend"]) for detail in details if detail.get("storage_backend")]
    return CacheReport(
        total_prompt_tokens=sum(record.server_prompt_tokens or 0 for record in known),
        total_cached_tokens=sum(record.cached_tokens or 0 for record in known),
        device_cached_tokens=total("device"),
        host_cached_tokens=total("host"),
        storage_cached_tokens=total("storage"),
        storage_backend=storages[0] if storages else None,
    )


def _cold_and_warm(done: Sequence[RequestRecord]) -> tuple[list[RequestRecord], list[RequestRecord]]:
    groups: tuple[list[RequestRecord], list[RequestRecord]] = ([], [])
    for record in done:
        if record.cached_tokens is not None and record.server_prompt_tokens:
            groups[record.cached_tokens >= WARM_SHARE * record.server_prompt_tokens].append(record)
    return groups


def _failures(sent: Sequence[RequestRecord]) -> list[tuple[str, int]]:
    """Reasons with how often each came, the most frequent first; reasons that differ in numbers only are one."""
    counts: Counter[str] = Counter()
    words: dict[str, str] = {}
    for record in sent:
        if not record.success:
            reason = record.error or "no reason known"
            kind = re.sub(r"\d+|\b[0-9a-f]{8,}\b", "#", reason)
            words.setdefault(kind, reason)
            counts[kind] += 1
    return [(words[kind], count) for kind, count in counts.most_common()]
