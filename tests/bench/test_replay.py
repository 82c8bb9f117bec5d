"""Replays: traces that are made up, what scaling keeps, and the command as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mooli import cli
from mooli.bench.datasets import DatasetOptions, MooncakeOptions
from mooli.bench.errors import BenchmarkError
from mooli.bench.replay import main, parse_replay_arguments
from mooli.bench.traces import WORKLOADS, possible_reuse, replayed, synthetic_trace
from mooli.frontend.tokenizer import Tokenizer


def record(at_ms: int, hash_ids: list[int], input_length: int, output_length: int = 32) -> dict[str, Any]:
    return {
        "timestamp": at_ms, "hash_ids": hash_ids, "input_length": input_length, "output_length": output_length,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "input_len", "output_len", "per_hour", "reuse"),
    [("conversation", 12_035, 343, 12_031, 0.39), ("tool-agent", 8_596, 182, 23_608, 0.59)],
)
def test_a_synthetic_trace_has_the_averages_of_the_published_one(
    name: str, input_len: float, output_len: float, per_hour: float, reuse: float
) -> None:
    trace = synthetic_trace(WORKLOADS[name], 4000, seed=1)
    mean = {key: sum(one[key] for one in trace) / len(trace) for key in ("input_length", "output_length")}
    assert mean["input_length"] == pytest.approx(input_len, rel=0.03)
    assert mean["output_length"] == pytest.approx(output_len, rel=0.03)
    assert len(trace) / trace[-1]["timestamp"] * 3_600_000 == pytest.approx(per_hour, rel=0.05)
    assert possible_reuse(trace) == pytest.approx(reuse, abs=0.03)


def test_a_synthetic_trace_follows_from_its_seed() -> None:
    workload = WORKLOADS["tool-agent"]
    assert synthetic_trace(workload, 50, seed=3) == synthetic_trace(workload, 50, seed=3)
    assert synthetic_trace(workload, 50, seed=3) != synthetic_trace(workload, 50, seed=4)


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_blocks_of_a_synthetic_trace_cover_its_lengths_and_times_never_go_back(name: str) -> None:
    trace = synthetic_trace(WORKLOADS[name], 300, seed=1)
    for one in trace:
        assert len(one["hash_ids"]) == -(-one["input_length"] // 512)
        assert len(set(one["hash_ids"])) == len(one["hash_ids"])
    times = [one["timestamp"] for one in trace]
    assert times[0] == 0 and times == sorted(times)


def test_only_blocks_at_the_head_count_as_reusable() -> None:
    trace = [record(0, [1, 2], 1024), record(1, [1, 3], 1024), record(2, [9, 2], 1024), record(3, [1, 2], 700)]
    assert possible_reuse(trace) == pytest.approx((512 + 700) / (3 * 1024 + 700))


@pytest.mark.parametrize("factor", [1.0, 1 / 16, 1 / 64])
def test_a_length_factor_keeps_what_prompts_share(tokenizer: Tokenizer, factor: float) -> None:
    trace = [record(0, [1, 2, 3], 1500), record(500, [1, 2, 7], 1300), record(900, [5], 512)]
    data = DatasetOptions(mooncake=MooncakeOptions(length_factor=factor, slowdown_factor=2.0))
    requests = replayed(trace, data, tokenizer, note="n").requests
    ids = [tokenizer.encode(str(request.prompt)) for request in requests]
    assert [len(one) for one in ids] == [round(one["input_length"] * factor) for one in trace]
    block = round(512 * factor)
    assert ids[0][: 2 * block] == ids[1][: 2 * block]
    assert ids[0][2 * block : 3 * block] != ids[1][2 * block : 3 * block]
    assert ids[2][:block] != ids[0][:block]
    assert [request.arrival_s for request in requests] == [0.0, 1.0, 1.8]
    assert requests[0].output_len == max(round(32 * factor), 1)


def command(port: int, tokenizer: Path, file: Path, *flags: str) -> list[str]:
    return [
        "--host", "127.0.0.1", "--port", str(port), "--tokenizer", str(tokenizer), "--output-file", str(file),
        "--disable-tqdm", "--slowdown", "0", *flags,
    ]  # fmt: skip


def test_a_synthetic_replay_needs_no_file_and_begins_with_an_empty_cache(
    serve: Any, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, file = serve(), tmp_path / "out.jsonl"
    flags = ("--synthetic", "conversation", "--max-requests", "4", "--length-factor", "0.03125", "--seed", "5")
    assert main(command(server.port, tokenizer_path, file, *flags, "--save-trace", str(tmp_path / "t.jsonl"))) == 0
    out = capsys.readouterr().out
    assert "Prompts: synthetic conversation, 4 requests, lengths x 0.03125, times x 0, reusable " in out
    assert f"{'Traffic request rate:':<40} trace" in out
    result = json.loads(file.read_text())
    assert (result["completed"], result["dataset_name"], result["num_prompts"]) == (4, "mooncake", 4)
    saved = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert saved == synthetic_trace(WORKLOADS["conversation"], 4, seed=5)
    assert result["total_input_tokens"] == sum(round(one["input_length"] / 32) for one in saved)
    assert server.num_flushes == 1


def test_a_trace_file_is_replayed_as_far_as_it_fits(
    serve: Any, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, trace = serve(), tmp_path / "trace.jsonl"
    records = [record(10, [1], 512), record(0, [1, 2], 1024), record(20, [3], 400), record(30, [4], 100)]
    trace.write_text("\n".join(json.dumps(one) for one in records))
    flags = ("--trace", str(trace), "--max-requests", "3", "--length-factor", "0.0625", "--context-length", "40")
    assert cli.main(["bench", "replay", *command(server.port, tokenizer_path, tmp_path / "o", *flags)]) == 0
    out = capsys.readouterr().out
    assert "note: 1 of 3 requests are left out: longer than 40 tokens" in out
    assert json.loads((tmp_path / "o").read_text())["completed"] == 2


def test_without_a_route_that_empties_the_cache_the_first_prompt_is_not_sent_twice(
    tokenizer_path: Path,
) -> None:
    trace = ["--trace", "t", "--tokenizer", str(tokenizer_path)]
    vllm = parse_replay_arguments([*trace, "--backend", "vllm"]).bench
    assert (vllm.flush_cache, vllm.warmup_requests) == (False, 0)
    asked = parse_replay_arguments([*trace, "--backend", "vllm", "--warmup-requests", "2"]).bench
    assert asked.warmup_requests == 2
    sglang = parse_replay_arguments(trace).bench
    assert (sglang.flush_cache, sglang.warmup_requests) == (True, 1)


def test_lengths_are_the_traces_own_unless_it_is_made_up() -> None:
    assert parse_replay_arguments(["--trace", "t"]).length_factor == 1.0
    synthetic = parse_replay_arguments(["--synthetic", "tool-agent"])
    assert (synthetic.length_factor, synthetic.max_requests) == (1 / 16, 100)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--request-rate", "3"], "use --slowdown"),
        (["--num-prompts", "3"], "use --max-requests"),
        (["--dataset-path", "x"], "use --trace"),
        (["--dataset-pat=x"], "use --trace"),
        (["--mooncake-length-factor", "1"], "use --length-factor"),
        (["--random-input-len", "3"], "follow from its trace"),
        (["--gsp-num-turns", "3"], "follow from its trace"),
        (["--slowdown", "-1"], "--slowdown must be"),
        (["--length-factor", "0.001"], "--length-factor must be a number of at least 0.015625"),
        (["--length-factor", "nan"], "--length-factor must be"),
        (["--max-requests", "0"], "--max-requests must be at least 1"),
        (["--save-trace", "x"], "belongs to --synthetic"),
        (["--backend", "trt"], "--backend trt"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_in_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BenchmarkError, match=words):
        parse_replay_arguments(["--trace", "t", *flags])
    assert main(["--trace", "t", *flags]) == 2
    assert capsys.readouterr().err.startswith("mooli bench replay: error: ")


def test_a_trace_that_is_not_there_or_holds_nothing_that_fits_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", str(tmp_path / "no.jsonl")]) == 1
    assert "cannot read the trace" in capsys.readouterr().err
    assert main(["--synthetic", "conversation", "--context-length", "1"]) == 1
    assert "no request that fits" in capsys.readouterr().err
