"""Static batches on an engine core, on the fake runner: what each step computes, and the figures that follow."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import byte_tokenizer, fake_build

import mooli.bench_one_batch
from mooli import EngineConfig, cli
from mooli.bench import one_batch
from mooli.bench.errors import BenchmarkError
from mooli.bench.one_batch import (
    BatchTiming,
    greedy_request,
    main,
    parse_one_batch_arguments,
    random_prompts,
    time_batch,
    timing_lines,
    timing_object,
    why_impossible,
)
from mooli.engine.build import BuiltEngine
from mooli.errors import ConfigError


def built(**options: Any) -> BuiltEngine:
    return fake_build(EngineConfig.from_kwargs(model_path="fake"), **options)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Engines of the command are fakes; the result is what the runner is made with."""
    runner_options: dict[str, Any] = {}
    monkeypatch.setattr(one_batch, "locate", lambda path, **_: Path(path))
    monkeypatch.setattr(one_batch, "open_tokenizer", lambda config, path: byte_tokenizer())
    monkeypatch.setattr(one_batch, "build_engine", lambda config, path, progress: fake_build(config, **runner_options))
    monkeypatch.chdir(tmp_path)
    return runner_options


@pytest.mark.parametrize(("batch_size", "input_len", "output_len"), [(1, 7, 1), (3, 21, 6), (5, 40, 9), (8, 4, 2)])
def test_no_prompt_is_computed_beside_answers_and_all_go_on_in_each_step(
    batch_size: int, input_len: int, output_len: int
) -> None:
    engine = built()
    lengths: list[list[int]] = []
    execute = engine.core._runner.execute

    def watched(batch: Any) -> Any:
        lengths.append(batch.lengths.tolist())
        return execute(batch)

    engine.core._runner.execute = watched  # type: ignore[method-assign]
    times = itertools.count()
    prompts = random_prompts(batch_size, input_len, engine.facts.vocab_size, 1)
    timing = time_batch(engine.core, prompts, output_len, lambda: float(next(times)))
    decode = lengths[len(lengths) - (output_len - 1) :]
    assert decode == [[1] * batch_size] * (output_len - 1)
    prefill = lengths[: len(lengths) - (output_len - 1)]
    assert sum(itertools.chain(*prefill)) == batch_size * input_len
    assert timing.decode_s == [1.0] * (output_len - 1)
    engine.core.check()


def test_the_answers_are_those_of_one_request() -> None:
    """Going on from the cache changes no token: the batch computes what an engine gives that is asked once."""
    engine, (prompt,) = built(), random_prompts(1, 13, 258, 2)
    seen: list[int] = []
    execute = engine.core._runner.execute

    def watched(batch: Any) -> Any:
        output = execute(batch)
        seen.extend(np.asarray(output.token_ids).tolist())
        return output

    engine.core._runner.execute = watched  # type: ignore[method-assign]
    time_batch(engine.core, [prompt], 6, float)
    in_parts = list(seen)
    seen.clear()
    engine.core.flush_cache()
    engine.core.add(greedy_request("whole", prompt, 6))
    while engine.core.has_work:
        engine.core.step()
    assert in_parts == seen and len(seen) == 6


def test_each_run_begins_with_an_empty_cache() -> None:
    engine = built()
    prompts = random_prompts(2, 20, 258, 1)
    for _ in range(2):
        before = engine.core.stats()["computed_tokens"]
        time_batch(engine.core, prompts, 1, float)
        assert engine.core.stats()["computed_tokens"] - before == 40


def test_the_lines_and_keys_are_those_of_sglang() -> None:
    timing = BatchTiming(
        batch_size=4, input_len=100, output_len=8, prefill_s=2.0, decode_s=[0.5, 0.1, 0.2, 0.4, 0.3, 0.2, 0.3]
    )
    assert timing_lines(timing, log_decode_step=6) == [
        "Prefill. latency: 2.00000 s, throughput:    200.00 token/s",
        "Decode 0. Batch size: 4, latency: 0.50000 s, throughput:      8.00 token/s",
        "Decode 1. Batch size: 4, latency: 0.10000 s, throughput:     40.00 token/s",
        "Decode 2. Batch size: 4, latency: 0.20000 s, throughput:     20.00 token/s",
        "Decode 3. Batch size: 4, latency: 0.40000 s, throughput:     10.00 token/s",
        "Decode 4. Batch size: 4, latency: 0.30000 s, throughput:     13.33 token/s",
        "Decode 6. Batch size: 4, latency: 0.30000 s, throughput:     13.33 token/s",
        "Decode.  median latency: 0.30000 s, median throughput:     13.33 token/s",
        "Total. latency:  4.000 s, throughput:    108.00 token/s",
    ]
    assert timing_object(timing, "mine") == pytest.approx(
        {
            "run_name": "mine",
            "batch_size": 4,
            "input_len": 100,
            "output_len": 8,
            "prefill_latency": 2.0,
            "prefill_throughput": 200.0,
            "median_decode_latency": 0.3,
            "median_decode_throughput": 4 / 0.3,
            "total_latency": 4.0,
            "overall_throughput": 108.0,
        }
    )


def test_answers_of_one_token_have_no_decode_figures() -> None:
    timing = BatchTiming(batch_size=1, input_len=10, output_len=1, prefill_s=1.0, decode_s=[])
    assert not any(line.startswith("Decode") for line in timing_lines(timing, log_decode_step=1))
    assert "median_decode_latency" not in timing_object(timing, "r")


def test_every_combination_has_its_line_of_json(
    fake: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model-path", "fake", "--batch", "1", "3", "--input-len", "8", "16", "--output-len", "2", "4"]
    assert cli.main(["bench", "one-batch", *argv, "--run-name", "mine"]) == 0
    out = capsys.readouterr().out
    assert "max_total_num_tokens=800" in out and out.count("Prefill. latency: ") == 8
    results = [json.loads(line) for line in (tmp_path / "result.jsonl").read_text().splitlines()]
    assert [(one["batch_size"], one["input_len"], one["output_len"]) for one in results] == [
        *itertools.product((1, 3), (8, 16), (2, 4))
    ]
    assert {one["run_name"] for one in results} == {"mine"}


def test_what_does_not_fit_is_skipped_and_said(fake: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model-path", "fake", "--batch-size", "1", "8", "--input-len", "100", "500", "--output-len", "8"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "skipping (8, 100, 8): it needs 224 KV pages of 4 tokens, and there are 200" in out
    assert "skipping (1, 500, 8): 508 tokens are more than the context of 128" in out
    assert out.count("Prefill. latency: ") == 1
    assert main(["--model-path", "fake", "--input-len", "500"]) == 1
    assert "nothing was measured" in capsys.readouterr().err


def test_a_batch_of_more_requests_than_run_at_once_is_impossible() -> None:
    facts = built().facts
    assert why_impossible(facts, 8, 10, 5) is None
    assert "at most 8 requests" in str(why_impossible(facts, 9, 10, 5))


def test_the_engine_runs_as_many_requests_as_the_largest_batch_has() -> None:
    options = parse_one_batch_arguments(["--model", "m", "--batch-size", "4", "70"])
    assert options.engine.max_running_requests == 70
    given = parse_one_batch_arguments(["--model", "m", "--batch-size", "70", "--max-running-requests", "9"])
    assert given.engine.max_running_requests == 9


def test_a_request_that_fails_is_one_line_and_1(fake: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    fake["gives_nan"] = lambda context: len(context) > 10
    assert main(["--model-path", "fake", "--input-len", "8", "--output-len", "6"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mooli bench one-batch: error: the engine ended a request with error: ")
    assert error.count("\n") == 1


def test_answers_are_the_same_whole_and_in_parts(fake: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model-path", "fake", "--correct", "--output-len", "5"]) == 0
    out = capsys.readouterr().out
    assert "input_ids=[[84, 104, 101, " in out
    assert "========== Prompt 2 ==========\nToday is a sunny day and I like" in out
    assert "The answers are the same" in out


def test_answers_that_differ_are_named_and_end_with_1(
    fake: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A first prompt\n\nAnd a second one\n")
    asked = itertools.count()
    fake["next_token"] = lambda context: next(asked) % 200 if bytes(context[:3]) == b"And" else 65
    argv = ["--model-path", "fake", "--correctness-test", "--prompt-filename", str(prompts), "--cut-len", "3"]
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert "========== Prompt 1 ==========" in captured.out
    assert captured.err.endswith("the answer differs: prompt 1\n")


def test_a_prompt_must_be_longer_than_the_cut(
    fake: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abcd")
    assert main(["--model-path", "fake", "--correctness-test", "--prompt-filename", str(prompts)]) == 1
    assert "'abcd' has 4 tokens, which is not more than --cut-len 4" in capsys.readouterr().err
    assert main(["--model-path", "fake", "--correctness-test", "--prompt-filename", str(tmp_path / "no")]) == 1
    assert "cannot read --prompt-filename" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--profile"], "--profile: no profiler"),
        (["--profile-activities", "CPU"], "--profile-activities: no profiler"),
        (["--cut-len", "5"], "belongs to --correctness-test"),
        (["--prompt-filename", "x"], "belongs to --correctness-test"),
        (["--correctness-test", "--batch-size", "2"], "belongs to the timing of batches"),
        (["--correctness-test", "--output-len", "2", "3"], "one length"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--input-len", "8", "-1"], "--input-len must be at least 1"),
        (["--disable-radix-cache"], "--disable-radix-cache: answers go on"),
        (["--tokenizer-path", "x"], "--tokenizer-path: no text"),
        (["--stream-interval", "2"], "nothing is streamed"),
        (["--speculative-algorithm", "NGRAM"], "nothing is guessed"),
        (["--disable-cuda-graph"], "known to SGLang but not supported"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_in_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BenchmarkError, match=words):
        parse_one_batch_arguments(["--model-path", "fake", *flags])
    assert main(["--model-path", "fake", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_defaults_are_those_of_sglang_and_a_model_must_be_named() -> None:
    options = parse_one_batch_arguments(["--model-path", "m"])
    assert (options.batch_sizes, options.input_lens, options.output_lens) == ((1,), (1024,), (16,))
    assert (options.run_name, str(options.result_file), options.cut_len) == ("default", "result.jsonl", 4)
    with pytest.raises(ConfigError, match="model_path is missing"):
        parse_one_batch_arguments([])


def test_sglangs_name_of_the_module_leads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_batch, "main", lambda: 7)
    assert mooli.bench_one_batch.main() == 7


@pytest.mark.parametrize("kind", ["serving", "multiturn", "replay", "offline", "one-batch"])
def test_every_benchmark_is_a_command_with_help_of_its_own(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", kind, "--help"])
    assert ended.value.code == 0
    name = "python3 -m mooli.bench_serving" if kind == "serving" else f"mooli bench {kind}"
    assert capsys.readouterr().out.startswith(f"usage: {name} ")
