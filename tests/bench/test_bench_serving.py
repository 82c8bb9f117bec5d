"""A whole run against a scripted server: the numbers are those that follow from the script."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Script, ScriptedServer, options, run, script_order

from mooli.bench.errors import BenchmarkError
from mooli.bench.serving import measure, report

TOLERANCE_S = 1e-6
STREAMING_BACKENDS = [
    "sglang", "sglang-native", "sglang-oai", "sglang-oai-chat", "vllm", "vllm-chat", "lmdeploy", "lmdeploy-chat",
]  # fmt: skip


def some_scripts(num: int, *, seed: int = 3) -> list[Script]:
    chance = random.Random(seed)
    scripts = []
    for i in range(num):
        pieces = [(chance.uniform(0.05, 0.4), "ab", 2)]
        pieces += [(chance.uniform(0.001, 0.2), "c" * n, n) for n in (1, 3, 1, 2)[: chance.randint(1, 4)]]
        cached = (0, 9)[i % 2]
        scripts.append(Script(pieces=pieces, end_s=chance.uniform(0, 0.01), prompt_tokens=10 + i, cached_tokens=cached))
    return scripts


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation, written without NumPy."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def expected_times(script: Script, *, is_native: bool) -> dict[str, Any]:
    """What the definitions make of a script."""
    ttft = script.pieces[0][0]
    gaps = [gap / tokens for gap, _, tokens in script.pieces[1:] for _ in range(tokens)]
    if not is_native:
        gaps = [gap for gap, _, _ in script.pieces[1:]]
    latency = sum(gap for gap, _, _ in script.pieces) + script.end_s
    tpot = (latency - ttft) / (script.num_tokens - 1)
    return {"ttft": ttft, "itl": gaps, "latency": latency, "tpot": tpot}


@pytest.mark.parametrize("backend", STREAMING_BACKENDS)
def test_every_number_follows_from_the_times_of_the_pieces(
    backend: str, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = some_scripts(7)
    file = tmp_path / "out.jsonl"
    flags = ["--backend", backend, "--output-details", "--output-file", str(file)]
    measured, server, _ = run(scripts, tokenizer_path, *flags)
    given = options(server.url, tokenizer_path, "--num-prompts", "7", *flags)
    report(given, measured, print)
    result = json.loads(file.read_text())

    is_native = backend in ("sglang", "sglang-native")
    expected = [expected_times(scripts[i], is_native=is_native) for i in script_order(measured, server)]
    assert result["ttfts"] == pytest.approx([e["ttft"] for e in expected], abs=TOLERANCE_S)
    assert result["latencies"] == pytest.approx([e["latency"] for e in expected], abs=TOLERANCE_S)
    for itl, one in zip(result["itls"], expected, strict=True):
        assert itl == pytest.approx(one["itl"], abs=TOLERANCE_S)
    for name, values in (
        ("ttft", [e["ttft"] for e in expected]),
        ("e2e_latency", [e["latency"] for e in expected]),
        ("tpot", [e["tpot"] for e in expected]),
        ("itl", [gap for e in expected for gap in e["itl"]]),
    ):
        ms = [value * 1000 for value in values]
        assert result[f"mean_{name}_ms"] == pytest.approx(statistics.fmean(ms), abs=1e-3)
        assert result[f"median_{name}_ms"] == pytest.approx(statistics.median(ms), abs=1e-3)
        assert result[f"std_{name}_ms"] == pytest.approx(statistics.pstdev(ms), abs=1e-3)
        for percent in (90, 95, 99):
            assert result[f"p{percent}_{name}_ms"] == pytest.approx(percentile(ms, percent), abs=1e-3)
    duration = max(e["latency"] for e in expected)
    tokens = sum(script.num_tokens for script in scripts)
    assert result["duration"] == pytest.approx(duration, abs=TOLERANCE_S)
    assert result["completed"] == 7
    assert result["total_output_tokens"] == tokens
    assert result["output_throughput"] == pytest.approx(tokens / duration)
    assert result["request_throughput"] == pytest.approx(7 / duration)
    assert result["concurrency"] == pytest.approx(sum(e["latency"] for e in expected) / duration)
    assert f"{'Mean TTFT (ms):':<40} {result['mean_ttft_ms']:<10.2f}\n" in capsys.readouterr().out


def test_a_request_that_waits_for_a_place_has_not_begun(tokenizer_path: Path) -> None:
    scripts = [Script(pieces=[(0.5, "a", 1), (0.5, "b", 1)]) for _ in range(4)]
    measured, _, _ = run(scripts, tokenizer_path, "--max-concurrency", "2", concurrency=2)
    assert [record.ttft_s for record in measured.load.records] == pytest.approx([0.5] * 4)
    assert measured.metrics.duration_s == pytest.approx(2.0)
    assert measured.metrics.concurrency == pytest.approx(2.0)


@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "sglang-oai-chat"])
def test_an_answer_that_is_not_streamed_has_its_latency_as_ttft(backend: str, tokenizer_path: Path) -> None:
    scripts = [Script(pieces=[(0.5, "hello", 4)], end_s=0.25)]
    measured, server, _ = run(scripts, tokenizer_path, "--backend", backend, "--disable-stream")
    (record,) = measured.load.records
    assert (record.ttft_s, record.latency_s) == pytest.approx((0.75, 0.75))
    assert (record.generated_text, record.output_len) == ("hello", 4)
    assert "stream_options" not in server.sent[0][1]


def test_the_tokens_of_the_server_count_and_not_those_asked_for(tokenizer_path: Path) -> None:
    measured, _, _ = run([Script(pieces=[(0.1, "a", 1), (0.2, "bc", 2)])], tokenizer_path, "--backend", "vllm")
    assert measured.metrics.total_output == 3
    assert measured.metrics.tpot.mean == pytest.approx(100.0)
    assert measured.notes == () or all("token count" not in note for note in measured.notes)


def test_a_server_that_counts_no_tokens_is_taken_at_what_was_asked_and_that_is_said(tokenizer_path: Path) -> None:
    script = Script(pieces=[(0.1, "a", 1), (0.2, "b", 1)], counts_tokens=False)
    measured, _, _ = run([script], tokenizer_path, "--backend", "vllm")
    assert measured.metrics.total_output == 5
    assert any("without a token count" in note for note in measured.notes)


def test_failures_are_counted_by_reason_and_leave_the_numbers_alone(tokenizer_path: Path) -> None:
    good = Script(pieces=[(0.25, "a", 1), (0.5, "b", 1)])
    scripts = [
        good,
        Script(status=400, body={"error": {"message": "too long: 17 tokens"}}),
        Script(status=400, body={"object": "error", "message": "too long: 99 tokens"}),
        Script(pieces=[(0.1, "x", 1)], error_event={"error": {"message": "out of memory", "code": 500}}),
        Script(pieces=[(0.1, "x", 1)], breaks_off=True),
        good,
    ]
    measured, _, _ = run(scripts, tokenizer_path, "--max-concurrency", "1", concurrency=1)
    assert measured.metrics.num_completed == 2
    assert measured.metrics.num_failed == 4
    assert measured.metrics.failures[0] == ("HTTP 400: too long: 17 tokens", 2)
    others = {reason for reason, _ in measured.metrics.failures[1:]}
    assert "out of memory" in others
    assert any("broke off" in reason for reason in others)
    assert measured.metrics.ttft.mean == pytest.approx(250)


def test_what_the_server_reused_is_split_into_cold_and_warm(tokenizer_path: Path) -> None:
    cold = Script(pieces=[(0.8, "a", 1)], prompt_tokens=100, cached_tokens=10)
    warm = Script(pieces=[(0.1, "a", 1)], prompt_tokens=100, cached_tokens=90)
    measured, _, _ = run([cold, warm, warm], tokenizer_path, "--max-concurrency", "1", concurrency=1)
    metrics = measured.metrics
    assert (metrics.num_cold, metrics.num_warm) == (1, 2)
    assert metrics.cold_ttft is not None and metrics.cold_ttft.mean == pytest.approx(800)
    assert metrics.warm_ttft is not None and metrics.warm_ttft.mean == pytest.approx(100)
    assert metrics.cache is not None and metrics.cache.hit_rate_pct == pytest.approx(190 / 3)


@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "vllm-chat"])
def test_forcing_misses_gives_every_request_a_salt_of_its_own(backend: str, tokenizer_path: Path) -> None:
    scripts = [Script(pieces=[(0.1, "a", 1)], cached_tokens=3) for _ in range(3)]
    measured, server, _ = run(scripts, tokenizer_path, "--backend", backend, "--force-miss")
    _, other, _ = run(scripts, tokenizer_path, "--backend", backend, "--force-miss")
    salts = [body["cache_salt"] for _, body, _ in server.sent + other.sent]
    assert len(set(salts)) == 6
    assert any("in spite of --force-miss" in note for note in measured.notes)


def test_a_conversation_sends_the_servers_own_answers_back(tokenizer_path: Path) -> None:
    scripts = [Script(pieces=[(0.1, f"answer {i}", 8)], prompt_tokens=30 + i) for i in range(3)]
    gsp = [
        "--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "1", "--gsp-prompts-per-group", "1",
        "--gsp-num-turns", "3", "--gsp-system-prompt-len", "8", "--gsp-question-len", "4", "--gsp-output-len", "8",
    ]  # fmt: skip
    measured, server, _ = run(scripts, tokenizer_path, "--backend", "sglang-oai-chat", *gsp, concurrency=1)
    assert [record.turn for record in measured.load.records] == [0, 1, 2]
    last = [message["role"] for message in server.sent[2][1]["messages"]]
    assert last == ["user", "assistant", "user", "assistant", "user"]
    assert server.sent[2][1]["messages"][3]["content"] == "answer 1"
    assert measured.load.records[2].prompt_len == 32
    assert measured.metrics.num_completed == 3


def test_warm_up_repeats_the_first_request_for_a_short_answer_and_is_in_no_number(tokenizer_path: Path) -> None:
    scripts = [Script(pieces=[(0.1, "a", 1)]) for _ in range(4)]
    flags = ("--warmup-requests", "2", "--num-prompts", "2", "--random-output-len", "100")
    measured, server, _ = run(scripts, tokenizer_path, *flags, concurrency=1)
    lengths = [body["sampling_params"]["max_new_tokens"] for _, body, _ in server.sent]
    assert lengths == [32, 32, 100, 100]
    assert server.sent[0][1]["text"] == server.sent[1][1]["text"]
    assert measured.metrics.num_completed == 2


def test_a_warm_up_in_which_all_fail_ends_the_run_with_the_servers_reason(tokenizer_path: Path) -> None:
    scripts = [Script(status=400, body={"error": "no such model"})]
    with pytest.raises(BenchmarkError, match="all warm-up requests failed: HTTP 400: no such model"):
        run(scripts, tokenizer_path, "--warmup-requests", "1")


def test_the_cache_is_flushed_between_warm_up_and_run(tokenizer_path: Path) -> None:
    _, server, _ = run([Script(pieces=[(0.1, "a", 1)])], tokenizer_path, "--flush-cache", "--flush-cache-timeout", "7")
    assert "/flush_cache?timeout=7" in server.asked


def test_a_cache_that_cannot_be_flushed_ends_the_run(tokenizer_path: Path) -> None:
    def refuse(server: ScriptedServer) -> None:
        server.flush_status = 400

    with pytest.raises(BenchmarkError, match="did not flush"):
        run([Script()], tokenizer_path, "--flush-cache", prepare=refuse)


def test_speculation_splits_the_gaps_of_openai_pieces_by_their_tokens(tokenizer_path: Path) -> None:
    def speculate(server: ScriptedServer) -> None:
        server.server_info["internal_states"] = [{"avg_spec_accept_length": 2.5}]

    scripts = [Script(pieces=[(0.1, "a", 1), (0.3, "bcd", 3)])]
    measured, _, _ = run(scripts, tokenizer_path, "--backend", "sglang-oai", prepare=speculate)
    assert measured.metrics.accept_length == 2.5
    assert measured.metrics.itl.mean == pytest.approx(100)


def test_stopping_keeps_what_finished(tokenizer_path: Path) -> None:
    async def scenario() -> Any:
        stop = asyncio.Event()
        async with ScriptedServer([Script(pieces=[(0.1, "a", 1)]) for _ in range(9)], concurrency=1) as server:

            def say(line: str) -> None:
                if "--- request 1" in line:
                    stop.set()

            flags = ("--num-prompts", "9", "--max-concurrency", "1", "--print-requests")
            given = options(server.url, tokenizer_path, *flags)
            stopping = contextlib.nullcontext(stop)
            return await measure(given, stopping=stopping, say=say, progress_out=None, clock=server.clock)

    measured = asyncio.run(scenario())
    assert measured.load.is_interrupted
    assert measured.metrics.num_completed in (2, 3)
    assert measured.metrics.num_failed == 0
    assert measured.load.num_unsent >= 5


def test_a_server_that_is_gone_ends_the_run_early(tokenizer_path: Path) -> None:
    async def scenario() -> Any:
        async with ScriptedServer([Script(pieces=[(0.1, "a", 1)])]) as server:

            def say(line: str) -> None:
                if "--- request 0" in line:
                    server._server.close()

            flags = ("--num-prompts", "500", "--max-concurrency", "1", "--print-requests")
            given = options(server.url, tokenizer_path, *flags)
            stopping = contextlib.nullcontext(asyncio.Event())
            return await measure(given, stopping=stopping, say=say, progress_out=None, clock=server.clock)

    measured = asyncio.run(scenario())
    assert measured.load.is_server_gone
    assert not measured.load.is_interrupted
    assert measured.metrics.num_completed == 1
    assert measured.load.num_unsent > 400
    assert measured.metrics.failures[0][0].startswith("cannot connect to 127.0.0.1")


def test_a_wrong_port_is_one_clear_line(tokenizer_path: Path) -> None:
    async def scenario() -> None:
        given = options("http://127.0.0.1:9", tokenizer_path, "--ready-check-timeout-sec", "0")
        stopping = contextlib.nullcontext(asyncio.Event())
        await measure(given, stopping=stopping, say=print, progress_out=None)

    with pytest.raises(BenchmarkError, match=r"no server at http://127.0.0.1:9: .*check --host and --port"):
        asyncio.run(scenario())


def test_the_tokenizer_is_the_servers_where_the_user_names_none(tokenizer_path: Path) -> None:
    async def scenario() -> Any:
        async with ScriptedServer([Script(pieces=[(0.1, "a", 1)])]) as server:
            server.models = [{"id": str(tokenizer_path)}]
            given = options(server.url, tokenizer_path, "--num-prompts", "1")
            given = dataclasses.replace(given, tokenizer=None)
            stopping = contextlib.nullcontext(asyncio.Event())
            return await measure(given, stopping=stopping, say=print, progress_out=None, clock=server.clock)

    assert asyncio.run(scenario()).tokenizer_place == str(tokenizer_path)
