"""Throughput in this process, on the fake runner: what is generated, counted, printed and refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import EOS, FakeEngine

import mooli.bench_offline_throughput
from mooli import cli
from mooli.bench import offline
from mooli.bench.datasets import Randoms, load_dataset
from mooli.bench.errors import BenchmarkError
from mooli.bench.offline import GenerationSpeed, main, measure_offline, offline_table, parse_offline_arguments
from mooli.errors import ConfigError

RANDOM = ["--model-path", "fake", "--dataset-name", "random", "--random-range-ratio", "1"]
SHORT = [*RANDOM, "--random-input", "20", "--random-output", "5", "--num-prompts", "6"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    return FakeEngine(monkeypatch)


def result_of(argv: list[str], file: Path) -> dict[str, Any]:
    assert main([*argv, "--result-filename", str(file)]) == 0
    return json.loads(file.read_text().splitlines()[-1])  # type: ignore[no-any-return]


def test_a_run_prints_sglangs_table_and_appends_its_keys(
    fake: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.jsonl"
    assert cli.main(["bench", "offline", *SHORT, "--result-filename", str(file)]) == 0
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert table[0] == "====== Offline Throughput Benchmark Result ======="
    assert [row[:40].strip() for row in table[1:11]] == [
        "Backend:", "Successful requests:", "Benchmark duration (s):", "Total input tokens:",
        "Total generated tokens:", "Last generation throughput (tok/s):", "Request throughput (req/s):",
        "Input token throughput (tok/s):", "Output token throughput (tok/s):", "Total token throughput (tok/s):",
    ]  # fmt: skip
    assert table[11] == "=" * 50
    result = json.loads(file.read_text())
    assert list(result)[:10] == [
        "backend", "successful_requests", "total_latency", "total_input_tokens", "total_output_tokens",
        "last_gen_throughput", "request_throughput", "input_throughput", "output_throughput", "total_throughput",
    ]  # fmt: skip
    assert (result["successful_requests"], result["total_input_tokens"], result["total_output_tokens"]) == (6, 120, 30)
    assert (result["dataset_name"], result["seed"], result["failures"]) == ("random", 1, [])


def test_rates_are_tokens_and_requests_over_the_time_of_the_whole_batch(fake: FakeEngine) -> None:
    options = parse_offline_arguments(SHORT)
    engine = fake()
    dataset = load_dataset(options.data, engine.tokenizer_manager.tokenizer, Randoms.seeded(1))
    times = itertools.count(step=4.0)
    result = measure_offline(engine, dataset, options, clock=lambda: next(times))
    assert result["total_latency"] == 4.0
    assert (result["request_throughput"], result["input_throughput"]) == (1.5, 30.0)
    assert (result["output_throughput"], result["total_throughput"]) == (7.5, 37.5)
    assert "Output token throughput (tok/s):         7.50" in offline_table(result)


def test_the_warm_up_comes_first_and_leaves_nothing_in_the_cache(fake: FakeEngine, tmp_path: Path) -> None:
    warm = result_of(SHORT, tmp_path / "out")["cache_hit_rate_pct"]
    assert fake.core.stats()["requests"] == 12
    cold = result_of([*SHORT, "--skip-warmup"], tmp_path / "out")["cache_hit_rate_pct"]
    assert fake.core.stats()["requests"] == 6
    assert warm == cold < 10  # of chance: letters are tokens here


def test_groups_that_share_a_prefix_have_a_hit_rate(fake: FakeEngine, tmp_path: Path) -> None:
    argv = ["--model", "fake", "--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "1"]
    argv += ["--gsp-prompts-per-group", "4", "--gsp-system-prompt-len", "16", "--gsp-question-len", "3"]
    result = result_of([*argv, "--gsp-output-len", "2", "--max-running-requests", "1"], tmp_path / "out")
    assert result["successful_requests"] == 4
    assert result["cache_hit_rate_pct"] > 30


def test_prompts_may_be_sent_as_ids(fake: FakeEngine, tmp_path: Path) -> None:
    result = result_of([*SHORT, "--tokenize-prompt"], tmp_path / "out")
    assert result["total_input_tokens"] == 120
    assert fake.core.stats()["prompt_tokens"] == 120 + 6 * 64  # the warm-up fills half of the context


def test_answers_end_by_themselves_only_if_asked_to(fake: FakeEngine, tmp_path: Path) -> None:
    fake.runner_options = {"next_token": lambda context: EOS}
    assert result_of(SHORT, tmp_path / "out")["total_output_tokens"] == 30
    assert result_of([*SHORT, "--disable-ignore-eos"], tmp_path / "out")["total_output_tokens"] == 6


def test_extra_parameters_are_laid_over_each_requests(fake: FakeEngine, tmp_path: Path) -> None:
    result = result_of([*SHORT, "--extra-request-body", '{"max_new_tokens": 2}'], tmp_path / "out")
    assert result["total_output_tokens"] == 12


def test_requests_that_fail_end_with_1_and_are_not_counted(
    fake: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = itertools.count()
    fake.runner_options = {"gives_nan": lambda context: next(calls) == 0}
    file = tmp_path / "out"
    assert main([*SHORT, "--skip-warmup", "--result-filename", str(file)]) == 1
    assert capsys.readouterr().err.startswith("mooli bench offline: error: 1 of 6 requests failed: ")
    result = json.loads(file.read_text())
    assert (result["successful_requests"], result["total_input_tokens"]) == (5, 100)
    assert result["failures"][0]["count"] == 1


def test_a_prompt_that_does_not_fit_is_one_line_and_1(fake: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--random-input", "500"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mooli bench offline: error: ") and error.count("\n") == 1


def test_the_last_speed_is_that_between_the_last_two_looks() -> None:
    class Counting:
        tokens = 0

        def get_server_info(self) -> dict[str, Any]:
            return {"internal_states": [{"generated_tokens": self.tokens}]}

    engine, times = Counting(), iter([0.0, 1.0, 3.0])
    speed = GenerationSpeed(engine, lambda: next(times))  # type: ignore[arg-type]
    assert speed.last_tokens_per_s is None
    for engine.tokens in (5, 100, 160):
        speed._look()
    assert speed.last_tokens_per_s == 30.0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset-name", "openai"], "--dataset-name openai"),
        (["--dataset-name", "mooncake"], "use `mooli bench replay`"),
        (["--dataset-name", "mmmu"], "it needs images"),
        (["--backend", "runtime"], "--backend runtime"),
        (["--profile"], "--profile"),
        (["--do-not-exit"], "--do-not-exit"),
        (["--gsp-num-groups", "3"], "belongs to --dataset-name generated-shared-prefix"),
        (["--dataset-name", "generated-shared-prefix", "--gsp-num-turns", "2"], "--gsp-num-turns: later turns"),
        (["--skip-tokenizer-init"], "--skip-tokenizer-init"),
        (["--stream-interval", "4"], "nothing is streamed"),
        (["--num-prompts", "0"], "--num-prompts must be"),
        (["--extra-request-body", "[]"], "must be a JSON object"),
        (["--enable-lora"], "known to SGLang but not supported"),
        (["--port", "3"], "is a flag of `mooli serve`"),
        (["--random-inputt", "3"], "did you mean --random-input-len"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_in_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BenchmarkError, match=words):
        parse_offline_arguments(["--model-path", "fake", *flags])
    assert main(["--model-path", "fake", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_must_be_named_and_a_device_may_be() -> None:
    with pytest.raises(ConfigError, match="model_path is missing"):
        parse_offline_arguments([])
    assert parse_offline_arguments([*RANDOM, "--backend", "reference"]).engine.backend_name == "reference"
    assert parse_offline_arguments([*RANDOM, "--backend", "engine"]).engine.backend_name == "cpu"


def test_sglangs_name_of_the_module_leads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "main", lambda: 7)
    assert mooli.bench_offline_throughput.main() == 7
