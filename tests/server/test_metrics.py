"""GET /metrics, and the log lines that say how the server does."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_engine import NUM_PAGES, PAGE_SIZE, byte_tokenizer, fake_build, says
from prometheus_client.parser import text_string_to_metric_families

from mooli.config import EngineConfig
from mooli.engine.messages import Outputs
from mooli.frontend.generation import Generation
from mooli.frontend.inputs import GenerateCall
from mooli.frontend.text_side import input_rules
from mooli.scheduler.stats import StepStats
from mooli.server.app import ROUTES
from mooli.server.config import ServerConfig
from mooli.server.http_server import sd_notify
from mooli.server.logs import RequestLog, StepLog
from mooli.server.metrics import Metrics
from mooli.types import FinishReason, RequestOutput

FACTS = fake_build(EngineConfig.from_kwargs(model_path="fake")).facts

SGLANG_NAMES = [
    "num_running_reqs", "num_queue_reqs", "token_usage", "num_used_tokens", "kv_available_tokens",
    "kv_evictable_tokens", "kv_used_tokens", "max_total_num_tokens", "gen_throughput", "cache_hit_rate", "utilization",
    "context_len", "page_size", "num_pages", "weight_memory_usage_gb", "kv_cache_memory_usage_gb",
    "startup_time_seconds", "prompt_tokens_total", "generation_tokens_total", "cached_tokens_total",
    "num_requests_total", "num_aborted_requests_total", "evicted_tokens_total", "num_retracted_requests_total",
    "realtime_tokens_total", "time_to_first_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
    "inter_token_latency_seconds_bucket", "time_per_output_token_seconds_bucket", "prompt_tokens_histogram_bucket",
    "uncached_prompt_tokens_histogram_bucket", "generation_tokens_histogram_bucket", "http_requests_active",
    "spec_accept_length", "spec_accept_rate", "spec_verify_calls_total",
]  # fmt: skip


class Samples:
    """What /metrics says, as numbers."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum over all samples of that name with these labels."""
        found = [sample for sample in self.samples if sample.name == f"sglang:{name}"]
        return sum(sample.value for sample in found if labels.items() <= sample.labels.items())

    def counters(self) -> dict[str, float]:
        """Everything that only grows, by name and labels."""
        grows = [family for family in self.families.values() if family.type in ("counter", "histogram")]
        return {f"{s.name}{s.labels}": s.value for family in grows for s in family.samples}


def scrape(server: Any) -> Samples:
    return Samples(server.http.get("/metrics").text)


def scrape_at_rest(server: Any) -> Samples:
    """After what follows an answer has been done: a client may have it a moment before."""
    for _ in range(1000):
        samples = scrape(server)
        if samples("http_requests_active") == 0:
            return samples
    raise AssertionError("a request that has been answered is still counted as active")


def chat(server: Any, text: str, **body: Any) -> Any:
    message = {"role": "user", "content": text}
    return server.http.post("/v1/messages", json={"model": "m", "max_tokens": 50, "messages": [message], **body})


def a_generation(*, stop: str | None = None, **sampling: Any) -> Generation:
    tokenizer = byte_tokenizer()
    config = EngineConfig.from_kwargs(model_path="fake", random_seed=1)
    params = {"max_new_tokens": 9, "stop": stop, **sampling}
    request = input_rules(config, FACTS, tokenizer).prepare(GenerateCall("abcdef", params, rid="r")).requests[0]
    return Generation(request, tokenizer)


def a_report(step: int, *, generated: int = 0, running: int = 1, waiting: int = 0, **fields: int) -> Outputs:
    stats = {"running": running, "waiting": waiting, "generated_tokens": generated}
    return Outputs([], stats, StepStats(step=step, running=running, waiting=waiting, **fields))


# -- what is there ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SGLANG_NAMES)
def test_every_name_is_there_before_the_first_request(name):
    samples = Samples(Metrics("m", FACTS, ServerConfig()).render().decode())
    assert f"sglang:{name}" in {sample.name for sample in samples.samples}


def test_metrics_need_no_key_and_have_the_content_type_of_the_text_form(live):
    server = live(api_key="secret")
    server.http.headers.pop("Authorization")
    reply = server.http.get("/metrics")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain; version=")


def test_sizes_are_those_of_the_engine(live):
    samples = scrape(live())
    assert samples("num_pages") == NUM_PAGES and samples("page_size") == PAGE_SIZE
    assert samples("max_total_num_tokens") == samples("kv_available_tokens") == NUM_PAGES * PAGE_SIZE


def test_labels_are_sglangs():
    samples = Samples(Metrics('a "name"\n', FACTS, ServerConfig()).render().decode())
    model = {"model_name": 'a "name"\n', "engine_type": "unified"}
    (running,) = samples.families["sglang:num_running_reqs"].samples
    assert running.labels == {**model, "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
    (aborted,) = samples.families["sglang:num_aborted_requests"].samples
    assert aborted.labels == model


# -- what is counted -------------------------------------------------------------------------------------------------
def test_requests_are_counted_with_their_tokens(live):
    server = live(says("Hello", after="assistant: "))
    usage = [chat(server, "Hi").json()["usage"], chat(server, "Hi").json()["usage"]]
    chat(server, "Hi", stream=True)
    samples = scrape(server)
    prompt = usage[0]["input_tokens"]
    cached = usage[1]["cache_read_input_tokens"]
    assert cached > 0
    assert samples("num_requests_total", is_streaming="false") == 2
    assert samples("num_requests_total", is_streaming="true") == 1
    assert samples("prompt_tokens_total") == 3 * prompt
    assert samples("cached_tokens_total", cache_source="device") == 2 * cached
    assert samples("generation_tokens_total") == 3 * 6
    assert samples("cache_hit_rate") == pytest.approx(2 * cached / (3 * prompt))
    assert samples("realtime_tokens_total", mode="prefill_cache") == 2 * cached
    assert samples("realtime_tokens_total", mode="prefill_compute") == 3 * prompt - 2 * cached
    assert samples("realtime_tokens_total", mode="decode") == 3 * 5
    assert samples("time_to_first_token_seconds_count") == samples("e2e_request_latency_seconds_count") == 3
    assert samples("inter_token_latency_seconds_count") == samples("time_per_output_token_seconds_count") == 3 * 5
    assert samples("prompt_tokens_histogram_sum") == 3 * prompt
    assert samples("uncached_prompt_tokens_histogram_sum") == 3 * prompt - 2 * cached
    assert samples("generation_tokens_histogram_sum") == 3 * 6


def test_pages_of_the_cache_balance(live):
    server = live(says("Hello", after="assistant: "))
    chat(server, "Hi")
    samples = scrape(server)
    assert samples("kv_evictable_tokens") > 0 and samples("num_used_tokens") == samples("kv_used_tokens") == 0
    assert samples("kv_evictable_tokens") + samples("kv_available_tokens") == NUM_PAGES * PAGE_SIZE


def test_health_checks_and_scrapes_change_no_counter(live):
    server = live(says("Hello", after="assistant: "))
    chat(server, "Hi")
    before = scrape_at_rest(server).counters()
    probes = [route.path for route in ROUTES if route.path.startswith(("/health", "/ready"))]
    assert "/health_generate" in probes
    for path in [*probes, "/metrics"]:
        assert server.http.get(path).status_code == 200
    assert scrape(server).counters() == before
    assert sum(before.values()) > 0


def test_http_requests_are_counted_by_the_path_of_their_route(live):
    server = live(says("Hello", after="assistant: "))
    chat(server, "Hi")
    chat(server, "Hi", max_tokens="many")
    for name in ("one", "two"):
        server.http.get(f"/v1/models/{name}")
    server.http.get("/no/such/path/as/this")
    samples = scrape_at_rest(server)
    assert samples("http_requests_total", endpoint="/v1/messages", method="POST") == 2
    assert samples("http_responses_total", endpoint="/v1/messages", status_code="200") == 1
    assert samples("http_responses_total", endpoint="/v1/messages", status_code="400") == 1
    assert samples("http_requests_total", endpoint="/v1/models/{model_id:path}") == 2
    assert samples("http_responses_total", endpoint="unmatched", status_code="404", method="GET") == 1
    templates = {route.path for route in ROUTES} | {"unmatched"}
    seen = {sample.labels["endpoint"] for sample in samples.samples if "endpoint" in sample.labels}
    assert seen <= templates


def test_a_method_of_the_clients_own_making_is_counted_as_other():
    metrics = Metrics("m", FACTS, ServerConfig())
    for method in ("BREW", "WHEN"):
        metrics.http_request("/x", method)
        metrics.http_response("/x", method, 405)
    samples = Samples(metrics.render().decode())
    assert samples("http_requests_total", method="OTHER") == samples("http_responses_total", status_code="405") == 2
    assert samples("http_requests_active") == 0


@pytest.mark.parametrize(
    ("finish", "aborted", "prompts"),
    [
        (None, 1, 0),
        (FinishReason("abort", message="m"), 1, 0),
        (FinishReason("error", message="m"), 0, 0),
        (FinishReason("length", length=0), 0, 1),
        (FinishReason("stop", matched=256), 0, 1),
    ],
)
def test_a_request_without_a_token_counts_as_a_prompt_only_if_it_was_computed(finish, aborted, prompts):
    metrics = Metrics("m", FACTS, ServerConfig())
    generation = a_generation()
    if finish is not None:
        generation.update(RequestOutput("r", finish=finish, prompt_tokens=6))
    metrics.received(is_stream=False, prompt_tokens=6)
    metrics.finished(generation, is_stream=False, elapsed_s=0.5)
    samples = Samples(metrics.render().decode())
    assert samples("num_requests_total") == 1 and samples("num_aborted_requests_total") == aborted
    assert samples("prompt_tokens_total") == 6 * prompts
    assert samples("e2e_request_latency_seconds_sum") == 0.5


def test_open_requests_are_those_received_and_not_ended():
    metrics = Metrics("m", FACTS, ServerConfig())
    metrics.received(is_stream=True, prompt_tokens=6)
    metrics.received(is_stream=True, prompt_tokens=6)
    metrics.finished(a_generation(), is_stream=True, elapsed_s=1.0)
    samples = Samples(metrics.render().decode())
    assert samples.families["mooli:num_open_reqs"].samples[0].value == 1


def test_buckets_hold_what_is_at_most_their_bound_and_can_be_chosen():
    config = ServerConfig.from_kwargs(bucket_inter_token_latency=[0.1, 0.5])
    metrics = Metrics("m", FACTS, config)
    metrics.next_tokens(num_tokens=1, elapsed_s=0.1)
    metrics.next_tokens(num_tokens=4, elapsed_s=0.8)
    metrics.next_tokens(num_tokens=1, elapsed_s=3.0)
    samples = Samples(metrics.render().decode())
    counts = {bound: samples("inter_token_latency_seconds_bucket", le=bound) for bound in ("0.1", "0.5", "+Inf")}
    assert counts == {"0.1": 1, "0.5": 5, "+Inf": 6}
    assert samples("inter_token_latency_seconds_sum") == pytest.approx(3.9)


def test_the_engines_counters_come_from_its_last_report():
    metrics = Metrics("m", FACTS, ServerConfig())
    stats = {
        "running": 4, "waiting": 3, "used_pages": 50, "free_pages": 100, "evictable_pages": 50, "evicted_pages": 7,
        "preemptions": 2, "generated_tokens": 9, "host_total_tokens": 40, "host_used_tokens": 30,
        "host_loaded_tokens": 8, "host_saved_tokens": 35, "host_dropped_tokens": 5,
        "failed_loads": 1, "host_failed_loads": 2,
    }  # fmt: skip
    metrics.step(Outputs([], stats, StepStats(step=1)))
    samples = Samples(metrics.render().decode())
    assert samples("num_running_reqs") == 4 and samples("num_queue_reqs") == 3
    assert samples("token_usage") == 0.25 and samples("utilization") == 0.5
    assert samples("evicted_tokens_total") == 7 * PAGE_SIZE and samples("num_retracted_requests_total") == 2
    assert samples("hicache_host_total_tokens") == 40 and samples("hicache_host_used_tokens") == 30
    assert samples("load_back_tokens_total") == 8 and samples("hicache_backup_tokens_total") == 35
    assert samples("hicache_dropped_tokens_total") == 5 and samples("hicache_load_failures_total") == 3


def test_cached_tokens_are_counted_by_where_they_were():
    metrics, generation = Metrics("m", FACTS, ServerConfig()), a_generation()
    finish = FinishReason("length", length=1)
    generation.update(RequestOutput("a", [5], finish, prompt_tokens=9, cached_tokens=8, loaded_tokens=3, host_tokens=4))
    metrics.finished(generation, is_stream=False, elapsed_s=1.0)
    samples = Samples(metrics.render().decode())
    for source, count in {"device": 1, "host": 4, "storage": 3}.items():
        assert samples("cached_tokens_total", cache_source=source) == count


# -- the log lines of steps ------------------------------------------------------------------------------------------
class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def step_lines(caplog: pytest.LogCaptureFixture, reports: list[Outputs]) -> tuple[StepLog, list[str]]:
    """What is logged of `reports`, which are half a second apart, with a line for every second decode step."""
    caplog.set_level(logging.INFO, "mooli.server.steps")
    clock = Clock()
    log = StepLog(FACTS, 2, clock=clock)
    for report in reports:
        clock.now_s += 0.5
        log.step(report)
    return log, caplog.messages


def test_a_prompt_is_logged_as_sglang_does(caplog):
    prompt = a_report(1, waiting=2, prefill_rows=1, prefill_tokens=512, cached_tokens=64, used_pages=20)
    _, lines = step_lines(caplog, [prompt])
    assert lines == [
        "Prefill batch, #new-seq: 1, #new-token: 512, #cached-token: 64, token usage: 0.10, #running-req: 0, "
        "#queue-req: 2"
    ]


def test_every_so_many_decode_steps_are_logged_with_their_rate(caplog):
    first = a_report(1, generated=2, running=2, prefill_rows=2, used_pages=30)
    steps = [a_report(2 + i, generated=4 + 2 * i, running=2, decode_rows=2, used_pages=30) for i in range(4)]
    log, lines = step_lines(caplog, [first, *steps])
    decode = (
        "Decode batch, #running-req: 2, #token: 120, token usage: 0.15, gen throughput (token/s): 4.00, #queue-req: 0"
    )
    assert lines[1:] == [decode, decode] and lines[0].startswith("Prefill batch, #new-seq: 2")
    assert log.last_gen_throughput == 4.0


def test_the_line_says_how_guessed_tokens_fared_since_the_last_one(caplog):
    reports = [a_report(1 + i, generated=3 * i, decode_rows=1) for i in range(5)]
    for i, report in enumerate(reports):
        report.stats.update(verify_steps=i, proposed_drafts=4 * i, correct_drafts=2 * i)
    _, lines = step_lines(caplog, reports)
    assert ["accept len: 3.00, accept rate: 0.50, gen throughput" in line for line in lines] == [True, True]


def test_nothing_runs_at_no_tokens_per_second_and_a_pause_is_not_part_of_a_rate(caplog):
    steps = [a_report(1 + i, generated=i, decode_rows=1) for i in range(5)]
    pause = a_report(5, generated=4, running=0, decode_rows=1)
    log, _ = step_lines(caplog, [*steps, pause])
    assert log.last_gen_throughput == 0.0
    caplog.clear()
    again = [a_report(6 + i, generated=4 + i, decode_rows=1) for i in range(3)]
    log, _ = step_lines(caplog, [*steps, *[pause] * 10, *again])
    assert log.last_gen_throughput == 2.0


def test_a_report_without_a_step_is_not_logged_again(caplog):
    prompt = a_report(1, prefill_rows=1, prefill_tokens=5)
    _, lines = step_lines(caplog, [prompt, prompt])
    assert len(lines) == 1


def test_a_server_logs_its_steps(live, caplog):
    caplog.set_level(logging.INFO, "mooli.server.steps")
    server = live(says("Hello", after="assistant: "), decode_log_interval=2)
    chat(server, "Hi")
    kinds = [line.partition(",")[0] for line in caplog.messages]
    assert "Prefill batch" in kinds and "Decode batch" in kinds


# -- the log of requests ---------------------------------------------------------------------------------------------
def request_lines(caplog: pytest.LogCaptureFixture, **config: Any) -> list[str]:
    caplog.set_level(logging.INFO, "mooli.server.requests")
    log = RequestLog(ServerConfig.from_kwargs(**config), byte_tokenizer())
    generation = a_generation(stop="z", temperature=0.25)
    log.started(generation)
    generation.update(RequestOutput("r", new_token_ids=list(b"a\nb"), cached_tokens=2, prompt_tokens=6))
    generation.update(RequestOutput("r", finish=FinishReason("length", length=3), cached_tokens=2, prompt_tokens=6))
    log.finished(generation, 0.25)
    return caplog.messages


@pytest.mark.parametrize(
    ("level", "has_params", "has_text"), [(0, False, False), (1, True, False), (2, True, True), (3, True, True)]
)
def test_the_level_says_how_much_of_a_request_is_logged(caplog, level, has_params, has_text):
    received, finished = map(json.loads, request_lines(caplog, log_requests_level=level, log_requests_format="json"))
    assert received["time"] <= finished["time"] and "request_id" in received and "request_id" in finished
    assert received["event"] == "received" and received["rid"] == finished["rid"] == "r"
    assert finished["prompt_tokens"] == 6 and finished["cached_tokens"] == 2 and finished["completion_tokens"] == 3
    assert finished["finish"] == "length" and finished["latency_s"] == 0.25
    assert ("sampling_params" in received) == has_params
    assert received.get("prompt") == ("abcdef" if has_text else None)
    assert finished.get("output") == ("a\nb" if has_text else None)
    assert received.get("sampling_params") == (
        {"max_new_tokens": 9, "temperature": 0.25, "seed": received["sampling_params"]["seed"], "stop": ["z"]}
        if has_params
        else None
    )


@pytest.mark.parametrize(
    ("finish", "logged"),
    [
        (None, {"finish": "abort"}),
        (FinishReason("abort", message="by hand"), {"finish": "abort", "message": "by hand"}),
        (FinishReason("error", message="NaN"), {"finish": "error", "message": "NaN"}),
        (FinishReason("stop", matched="z"), {"finish": "stop", "matched": "z"}),
    ],
)
def test_the_log_says_how_a_request_ended(caplog, finish, logged):
    caplog.set_level(logging.INFO, "mooli.server.requests")
    generation = a_generation()
    if finish is not None:
        generation.update(RequestOutput("r", finish=finish, prompt_tokens=6))
    RequestLog(ServerConfig.from_kwargs(log_requests_format="json")).finished(generation, 1.0)
    line = json.loads(caplog.messages[0])
    assert {name: line.get(name) for name in logged} == logged


def test_the_lines_of_a_request_have_the_id_of_its_http_request(live, caplog):
    caplog.set_level(logging.INFO, "mooli.server.requests")
    server = live(says("Hello", after="assistant: "), log_requests=True, log_requests_format="json")
    body = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
    server.http.post("/v1/messages", json=body, headers={"X-Request-Id": "mine"})
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "mooli.server.requests"]
    assert [line["event"] for line in lines] == ["received", "finished"]
    assert {line["request_id"] for line in lines} == {"mine"} and lines[0]["rid"] == lines[1]["rid"] != "mine"


def test_the_text_form_keeps_one_line_for_each_event(caplog):
    received, finished = request_lines(caplog)
    assert received.startswith('request received: rid="r" request_id="" prompt_tokens=6') and '"abcdef"' in received
    assert "\n" not in finished and r'output="a\nb"' in finished


@pytest.mark.parametrize(("level", "shown"), [(2, 2048), (3, 5000)])
def test_long_texts_are_cut_below_the_highest_level(caplog, level, shown):
    caplog.set_level(logging.INFO, "mooli.server.requests")
    config = ServerConfig.from_kwargs(log_requests_level=level, log_requests_format="json")
    generation = a_generation()
    generation.text = "x" * 5000
    RequestLog(config, byte_tokenizer()).finished(generation, 1.0)
    assert len(json.loads(caplog.messages[0])["output"]) == shown


def test_without_a_tokenizer_the_log_shows_ids(caplog):
    caplog.set_level(logging.INFO, "mooli.server.requests")
    RequestLog(ServerConfig.from_kwargs(log_requests_format="json")).started(a_generation())
    assert json.loads(caplog.messages[0])["prompt"] == list(b"abcdef")


def test_a_server_logs_its_requests_without_its_keys(live, caplog):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, "mooli.server.requests")
    server = live(says("Hello", after="assistant: "), log_requests=True, log_requests_level=3, api_key="very-secret")
    chat(server, "Hi")
    lines = [record.getMessage() for record in caplog.records if record.name == "mooli.server.requests"]
    assert len(lines) == 2 and "Hello" in lines[1]
    assert "very-secret" not in caplog.text


# -- systemd ---------------------------------------------------------------------------------------------------------
def test_systemd_is_told_over_its_socket(monkeypatch, tmp_path: Path):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert sd_notify("READY=1")
        assert listener.recv(100) == b"READY=1"


def test_systemd_is_told_over_an_abstract_socket(monkeypatch):
    name = f"mooli-test-{os.getpid()}-{threading.get_ident()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        assert sd_notify("STOPPING=1")
        assert listener.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("address", [None, "", "/no/such/socket", "vsock:2:1"])
def test_without_systemd_nothing_is_told_and_nothing_fails(monkeypatch, address):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not sd_notify("READY=1")
