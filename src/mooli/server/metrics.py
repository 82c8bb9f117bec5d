"""The numbers a monitoring system reads at GET /metrics, under SGLang's names.

Owns what is counted, when, and how it is written for Prometheus. All counts are plain numbers that only the server's
event loop touches, put into Prometheus' form when somebody asks. Every rate can be had from counters that never go
down. Health checks, warm-up and scrapes are no traffic: they add to no count of requests or tokens.

Source: the Prometheus text exposition format; names, labels and buckets are those SGLang documents.
"""

from __future__ import annotations

import collections
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mooli.engine.facts import EngineFacts
from mooli.engine.messages import Outputs
from mooli.frontend.generation import Generation
from mooli.server.config import ServerConfig
from mooli.server.keys import KeyRing
from mooli.server.logs import GenThroughput
from mooli.server.routing import Access, Dialect, Incoming, Reply, Route

if TYPE_CHECKING:
    from mooli.server.service import Service

LATENCY_BUCKETS_S = (
    0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 200.0, 400.0,
)  # fmt: skip
REQUEST_BUCKETS_S = (*LATENCY_BUCKETS_S, 600.0, 1200.0, 1800.0, 2400.0)
TOKEN_BUCKETS_S = (
    0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040, 0.060, 0.080, 0.100, 0.200, 0.400,
    0.600, 0.800, 1.0, 2.0, 4.0, 6.0, 8.0,
)  # fmt: skip
LENGTH_BUCKETS = tuple(float(2**power) for power in range(4, 21))
"""Tokens of a prompt or an answer: 16 to a million."""

PROBES = ("/health", "/ready", "/ping", "/metrics")
"""Routes whose paths begin so are asked by machines that watch the server: they are no traffic."""

UNMATCHED = "unmatched"
"""Stands for all paths that no route has: a client may ask for any."""

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")
"""Any other is counted as OTHER: a client may send whatever word it likes."""

RENDER_PAUSE_S = 0.1
"""Between two renderings, of two milliseconds each: scrapes take no more than a fiftieth of the event loop."""

GIGABYTE = 10**9

CACHE_ENDS = (
    "none", "new", "diverged", "evicted", "namespace", "in_flight", "held_back", "no_state", "judged_slower",
    "load_failed", "disabled",
)  # fmt: skip
"""Why no more of a prompt was in the cache (docs/cache_reports.md)."""

Labels = dict[str, str]


class HttpMetrics:
    """Takes what happens on HTTP, and renders it: all that is counted where no model is.

    Not thread-safe: everything is called in the server's event loop.
    """

    def __init__(self) -> None:
        self._http = _HttpCounts()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._http)

    def http_request(self, endpoint: str, method: str) -> None:
        """A request has begun. endpoint: the path of its route as the route writes it, never as the client does;
        UNMATCHED if there is none."""
        if not endpoint.startswith(PROBES):
            self._http.requests[endpoint, _known(method)] += 1
            self._http.num_active += 1

    def http_response(self, endpoint: str, method: str, status: int) -> None:
        """The request has been answered, to its last byte or as far as the client took it."""
        if not endpoint.startswith(PROBES):
            self._http.responses[endpoint, str(status), _known(method)] += 1
            self._http.num_active -= 1

    def render(self) -> bytes:
        """Everything, in Prometheus' text form."""
        return generate_latest(self._registry)


class Metrics(HttpMetrics):
    """Takes what happens to calls (`mooli.server.service`) of one model too."""

    def __init__(self, model_name: str, facts: EngineFacts, config: ServerConfig, keys: KeyRing | None = None) -> None:
        super().__init__()
        self._requests = _RequestCounts(config)
        self._keys = keys
        self._engine = _EngineState(facts, config.decode_log_interval)
        self._registry.register(_Exposition(model_name, self._requests, self._engine))

    # -- of requests --
    def received(self, *, is_stream: bool, prompt_tokens: int) -> None:
        self._requests.num_open += 1

    def first_token(self, *, is_stream: bool, elapsed_s: float) -> None:
        self._requests.first_token_s[is_stream].observe(elapsed_s)

    def next_tokens(self, *, num_tokens: int, elapsed_s: float) -> None:
        self._requests.decode_tokens += num_tokens
        self._requests.between_tokens_s.observe(elapsed_s / num_tokens, num_tokens)

    def finished(self, generation: Generation, *, is_stream: bool, elapsed_s: float) -> None:
        self._requests.finished(generation, is_stream=is_stream, elapsed_s=elapsed_s)
        if self._keys is not None and self._keys.named(generation.request.client) is not None:
            self._requests.of_key[generation.request.client].add(generation)

    # -- of the engine --
    def step(self, report: Outputs) -> None:
        self._engine.step(report)

    @property
    def cache_hit_rate(self) -> float:
        """Share of all prompt tokens so far that came from the cache."""
        return self._requests.cache_hit_rate


def _known(method: str) -> str:
    return method if method in METHODS else "OTHER"


class _Histogram:
    """Counts of values up to each bound, above the last one, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        total, buckets = 0, []
        for bound, count in zip([*map(repr, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric(labels, buckets, self._sum)


class _RequestCounts:
    """What requests have asked for and got, counted where they are answered."""

    def __init__(self, config: ServerConfig) -> None:
        first, whole = config.bucket_time_to_first_token, config.bucket_e2e_request_latency
        between = config.bucket_inter_token_latency
        self.num_open = 0
        self.ended = dict.fromkeys((False, True), 0)
        self.prompt_tokens = dict.fromkeys((False, True), 0)
        self.generated_tokens = dict.fromkeys((False, True), 0)
        self.first_token_s = {key: _Histogram(_bounds(first, LATENCY_BUCKETS_S)) for key in (False, True)}
        self.latency_s = {key: _Histogram(_bounds(whole, REQUEST_BUCKETS_S)) for key in (False, True)}
        self.between_tokens_s = _Histogram(_bounds(between, TOKEN_BUCKETS_S))
        self.prompt_lengths = _Histogram(LENGTH_BUCKETS)
        self.uncached_lengths = _Histogram(LENGTH_BUCKETS)
        self.answer_lengths = _Histogram(LENGTH_BUCKETS)
        self.cached_tokens = self.loaded_tokens = self.host_tokens = 0
        self.cache_ends = collections.Counter(dict.fromkeys(CACHE_ENDS, 0))
        self.lost_tokens = collections.Counter(dict.fromkeys(CACHE_ENDS, 0))
        self.decode_tokens = 0
        self.aborted = 0
        self.of_key: collections.defaultdict[str, _KeyCounts] = collections.defaultdict(_KeyCounts)

    @property
    def cache_hit_rate(self) -> float:
        return self.cached_tokens / max(sum(self.prompt_tokens.values()), 1)

    @property
    def computed_prompt_tokens(self) -> int:
        return sum(self.prompt_tokens.values()) - self.cached_tokens

    def finished(self, generation: Generation, *, is_stream: bool, elapsed_s: float) -> None:
        finish, num_generated = generation.finish, len(generation.output_ids)
        self.num_open -= 1
        self.ended[is_stream] += 1
        self.latency_s[is_stream].observe(elapsed_s)
        if finish is None or finish.type == "abort":
            self.aborted += 1
        # A request that ended in the queue, or in the middle of its prompt, says nothing about the cache.
        if num_generated or (finish is not None and finish.type in ("stop", "length")):
            prompt, cached = generation.prompt_tokens, generation.cached_tokens
            self.prompt_tokens[is_stream] += prompt
            self.generated_tokens[is_stream] += num_generated
            self.cached_tokens += cached
            self.loaded_tokens += generation.loaded_tokens
            self.host_tokens += generation.host_tokens
            if (end := generation.cache_end) is not None:
                reason = (end.reason or "none").replace(" ", "_")
                self.cache_ends[reason] += 1
                self.lost_tokens[reason] += end.num_lost
            self.prompt_lengths.observe(prompt)
            self.uncached_lengths.observe(prompt - cached)
            self.answer_lengths.observe(num_generated)


class _KeyCounts:
    """What one key's holder has asked for and got."""

    def __init__(self) -> None:
        self.ended = self.prompt_tokens = self.generated_tokens = 0

    def add(self, generation: Generation) -> None:
        self.ended += 1
        self.prompt_tokens += generation.prompt_tokens
        self.generated_tokens += len(generation.output_ids)


def _bounds(given: Sequence[float] | None, default: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(bound) for bound in (default if given is None else given))


class _HttpCounts(Collector):
    def __init__(self) -> None:
        self.requests: collections.Counter[tuple[str, str]] = collections.Counter()
        self.responses: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.num_active = 0

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "sglang:http_requests", "HTTP requests, health checks and scrapes left out.", labels=["endpoint", "method"]
        )
        for (endpoint, method), count in self.requests.items():
            requests.add_metric([endpoint, method], count)
        yield requests
        responses = CounterMetricFamily(
            "sglang:http_responses", "Answers by their status.", labels=["endpoint", "status_code", "method"]
        )
        for (endpoint, status, method), count in self.responses.items():
            responses.add_metric([endpoint, status, method], count)
        yield responses
        yield GaugeMetricFamily("sglang:http_requests_active", "HTTP requests in progress.", self.num_active)


class _EngineState:
    """The engine's last report, and what was settled when it was built."""

    def __init__(self, facts: EngineFacts, interval: int) -> None:
        self.facts = facts
        self._throughput = GenThroughput(interval)
        self._stats: dict[str, int] = {"free_pages": facts.num_pages}

    def step(self, report: Outputs) -> None:
        self._stats = report.stats
        self._throughput.step(report)

    @property
    def gen_throughput(self) -> float:
        return self._throughput.tokens_per_s

    def count(self, name: str) -> int:
        return self._stats.get(name, 0)

    def tokens(self, name: str) -> int:
        """A number of pages, as tokens."""
        return self.count(name) * self.facts.page_size

    @property
    def accept_length(self) -> float:
        steps = self.count("verify_steps")
        return 1 + self.count("correct_drafts") / steps if steps else 0.0

    @property
    def token_usage(self) -> float:
        return self.count("used_pages") / max(self.facts.num_pages, 1)

    @property
    def utilization(self) -> float:
        return max(self.token_usage, self.count("running") / self.facts.max_running_requests)


class _Exposition(Collector):
    """Writes the counts of a model down as Prometheus' families."""

    def __init__(self, model_name: str, requests: _RequestCounts, engine: _EngineState) -> None:
        self._requests = requests
        self._engine = engine
        self._model: Labels = {"model_name": model_name, "engine_type": "unified"}
        self._rank: Labels = {**self._model, "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}

    def collect(self) -> Iterator[Metric]:
        yield from self._engine_gauges()
        yield from self._engine_counters()
        yield from self._request_counters()
        yield from self._request_histograms()

    def _engine_gauges(self) -> Iterator[Metric]:
        engine, facts = self._engine, self._engine.facts
        gauges: list[tuple[str, str, float]] = [
            ("num_running_reqs", "Requests being computed.", engine.count("running")),
            ("num_queue_reqs", "Requests waiting in the engine.", engine.count("waiting")),
            ("token_usage", "Share of the KV cache that running requests hold.", engine.token_usage),
            ("utilization", "The larger of token_usage and running to possible requests.", engine.utilization),
            ("num_used_tokens", "Tokens of the KV cache that running requests hold.", engine.tokens("used_pages")),
            ("kv_used_tokens", "Tokens of the KV cache that running requests hold.", engine.tokens("used_pages")),
            ("kv_available_tokens", "Tokens of the KV cache that hold nothing.", engine.tokens("free_pages")),
            (
                "kv_evictable_tokens",
                "Tokens of the KV cache that hold prefixes nobody uses now.",
                engine.tokens("evictable_pages"),
            ),
            ("max_total_num_tokens", "Tokens the KV cache can hold.", facts.max_total_num_tokens),
            (
                "hicache_host_total_tokens",
                "Tokens that the host's memory below the KV cache can hold; 0 where there is none.",
                engine.count("host_total_tokens"),
            ),
            ("hicache_host_used_tokens", "Tokens that are there.", engine.count("host_used_tokens")),
            ("gen_throughput", "Generated tokens per second; 0 while nothing runs.", engine.gen_throughput),
            (
                "cache_hit_rate",
                "Share of all prompt tokens since the start that came from the cache; for a shorter time, divide the"
                " rates of cached_tokens_total and prompt_tokens_total.",
                self._requests.cache_hit_rate,
            ),
            (
                "spec_accept_length",
                "Tokens a step that continued a request's output, since the start; 0 where none are guessed.",
                engine.accept_length,
            ),
            (
                "spec_accept_rate",
                "Share of the guessed tokens so far that were right.",
                engine.count("correct_drafts") / max(engine.count("proposed_drafts"), 1),
            ),
            ("context_len", "Longest prompt and answer together, in tokens.", facts.context_length),
            ("page_size", "Tokens of a KV cache page.", facts.page_size),
            ("num_pages", "Pages of the KV cache.", facts.num_pages),
            ("weight_memory_usage_gb", "Memory of the weights, in 10^9 bytes.", facts.weight_bytes / GIGABYTE),
            ("kv_cache_memory_usage_gb", "Memory of the KV cache, in 10^9 bytes.", facts.kv_cache_bytes / GIGABYTE),
        ]
        for name, text, value in gauges:
            yield self._gauge(name, text, value, self._rank)
        text = "Tokens of the KV cache that requests asked to keep, and whose time is not over."
        retained = GaugeMetricFamily("mooli:kv_retained_tokens", text, labels=list(self._rank))
        retained.add_metric(list(self._rank.values()), engine.tokens("retained_pages"))
        yield retained
        startup: Labels = {**self._rank, "phase": "load_model"}
        yield self._gauge("startup_time_seconds", "Seconds to build the engine.", facts.load_time_s, startup)

    def _engine_counters(self) -> Iterator[Metric]:
        engine = self._engine
        evicted, preempted = engine.tokens("evicted_pages"), engine.count("preemptions")
        yield self._counter("evicted_tokens", "Tokens dropped from the cache to make room.", evicted, self._rank)
        verified = engine.count("verify_steps")
        yield self._counter("spec_verify_calls", "Steps of requests that could verify guesses.", verified, self._rank)
        for name, text, *stats in (
            ("prefetched_tokens", "Tokens of the KV cache loaded from disk.", "loaded_tokens"),
            ("backuped_tokens", "Tokens of the KV cache handed to the disk.", "stored_tokens"),
            ("load_back_tokens", "Tokens copied back from the host's memory.", "host_loaded_tokens"),
            ("hicache_backup_tokens", "Tokens copied to the host's memory.", "host_saved_tokens"),
            ("hicache_dropped_tokens", "Tokens dropped there to make room.", "host_dropped_tokens"),
            (
                "hicache_load_failures",
                "Requests that began without what is in the host's memory or on disk: it did not come, or not in time.",
                "failed_loads",
                "host_failed_loads",
            ),
            (
                "hicache_load_skipped",
                "Requests that began without what is there: loading would have taken longer.",
                "slower_loads",
                "host_slower_loads",
            ),
        ):
            yield self._counter(name, text, sum(map(engine.count, stats)), self._rank)
        yield self._counter("num_retracted_requests", "Requests put back in the queue.", preempted, self._rank)

    def _request_counters(self) -> Iterator[Metric]:
        counts = self._requests
        for name, text, values in (
            ("prompt_tokens", "Tokens of prompts.", counts.prompt_tokens),
            ("generation_tokens", "Tokens of answers.", counts.generated_tokens),
            ("num_requests", "Requests that have ended, in whatever way.", counts.ended),
        ):
            family = CounterMetricFamily(f"sglang:{name}", text, labels=[*self._model, "is_streaming"])
            for is_stream, value in values.items():
                family.add_metric([*self._model.values(), _word(is_stream)], value)
            yield family
        cached = CounterMetricFamily(
            "sglang:cached_tokens",
            "Tokens of prompts that came from the cache, by where they were: on the device, in the host's memory below"
            " it, or on disk.",
            labels=[*self._model, "cache_source"],
        )
        on_device = counts.cached_tokens - counts.loaded_tokens - counts.host_tokens
        cached.add_metric([*self._model.values(), "device"], on_device)
        cached.add_metric([*self._model.values(), "host"], counts.host_tokens)
        cached.add_metric([*self._model.values(), "storage"], counts.loaded_tokens)
        yield cached
        for name, text, by_reason in (
            ("cache_match_ends", "Requests by why no more of their prompt was in the cache.", counts.cache_ends),
            (
                "cache_lost_tokens",
                "Tokens of prompts that the cache had, or nearly had, and that are computed again, by why.",
                counts.lost_tokens,
            ),
        ):
            family = CounterMetricFamily(f"mooli:{name}", text, labels=[*self._model, "reason"])
            for reason, value in by_reason.items():
                family.add_metric([*self._model.values(), reason], value)
            yield family
        yield self._counter(
            "num_aborted_requests",
            "Requests that were ended early, by their client or by an administrator.",
            counts.aborted,
            self._model,
        )
        tokens = CounterMetricFamily(
            "sglang:realtime_tokens",
            "Tokens by what they cost. Those of answers are counted as they come, those of prompts when their request"
            " has ended.",
            labels=[*self._rank, "mode"],
        )
        tokens.add_metric([*self._rank.values(), "prefill_compute"], counts.computed_prompt_tokens)
        tokens.add_metric([*self._rank.values(), "prefill_cache"], counts.cached_tokens)
        tokens.add_metric([*self._rank.values(), "decode"], counts.decode_tokens)
        yield tokens
        text = "Requests received and not ended: running, queued, or on the way to or from the engine."
        yield GaugeMetricFamily("mooli:num_open_reqs", text, counts.num_open)
        if counts.of_key:
            yield from self._key_families(counts.of_key)

    @staticmethod
    def _key_families(of_key: Mapping[str, _KeyCounts]) -> Iterator[Metric]:
        for name, text, values in (
            ("key_requests", "Requests that have ended", {key: of.ended for key, of in of_key.items()}),
            ("key_prompt_tokens", "Tokens of prompts", {key: of.prompt_tokens for key, of in of_key.items()}),
            ("key_generation_tokens", "Tokens of answers", {key: of.generated_tokens for key, of in of_key.items()}),
        ):
            family = CounterMetricFamily(f"mooli:{name}", f"{text}, by the name of their key.", labels=["key"])
            for key, value in values.items():
                family.add_metric([key], value)
            yield family

    def _request_histograms(self) -> Iterator[Metric]:
        counts = self._requests
        for name, text, by_stream in (
            ("time_to_first_token_seconds", "From a request's start to its first token.", counts.first_token_s),
            ("e2e_request_latency_seconds", "From a request's start to its end.", counts.latency_s),
        ):
            family = HistogramMetricFamily(f"sglang:{name}", text, labels=[*self._model, "is_streaming"])
            for is_stream, histogram in by_stream.items():
                histogram.add_to(family, [*self._model.values(), _word(is_stream)])
            yield family
        for name, text, histogram in (
            ("inter_token_latency_seconds", "From one token of an answer to the next.", counts.between_tokens_s),
            (
                "time_per_output_token_seconds",
                "The older name of inter_token_latency_seconds.",
                counts.between_tokens_s,
            ),
            ("prompt_tokens_histogram", "Tokens of a prompt.", counts.prompt_lengths),
            ("uncached_prompt_tokens_histogram", "Tokens of a prompt not in the cache.", counts.uncached_lengths),
            ("generation_tokens_histogram", "Tokens of an answer.", counts.answer_lengths),
        ):
            family = HistogramMetricFamily(f"sglang:{name}", text, labels=list(self._model))
            histogram.add_to(family, list(self._model.values()))
            yield family

    @staticmethod
    def _gauge(name: str, text: str, value: float, labels: Labels) -> Metric:
        family = GaugeMetricFamily(f"sglang:{name}", text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    @staticmethod
    def _counter(name: str, text: str, value: float, labels: Labels) -> Metric:
        family = CounterMetricFamily(f"sglang:{name}", text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family


def _word(is_stream: bool) -> str:
    return "true" if is_stream else "false"


async def get_metrics(service: Service, request: Incoming) -> Reply:
    async def render() -> bytes:
        return service.metrics.render()

    text = await service.shared("metrics", render, pause_s=RENDER_PAUSE_S).result()
    return Reply(text, media_type=CONTENT_TYPE_LATEST)


ROUTES = (
    Route(
        path="/metrics",
        methods=("GET",),
        handler=get_metrics,
        access=Access.OPEN,
        dialect=Dialect.NATIVE,
        summary="Counters, gauges and histograms in Prometheus' text form.",
    ),
)
