"""The comparison's tables, files and messages, from results made up here."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import install_peers
from comparison.child import EngineError
from comparison.dialects import LlamaCpp, Native, Vllm
from comparison.quality import divergence, log_softmax, read_perplexity, write_base
from comparison.results import EngineFacts, Results, ResultsFileError, Sample, load_results
from comparison.table import (
    BEGIN,
    END,
    MarkersMissingError,
    aligned,
    engine_rows,
    short_block,
    target_rows,
    whole_text,
    with_block,
)

COMPARE = Path(install_peers.__file__).with_name("compare.py")
GAUGE = {"ops_s": 800e9, "bytes_s": 30e9, "stolen_s": 0.0}
MOOLI, PEER, LOST = "Mooli int4, HTTP", "llama.cpp Q4_0, HTTP", "vLLM bfloat16, HTTP"


@pytest.fixture
def results() -> Results:
    made = Results({"cpu": "Some Processor", "cores": 2}, {"rounds": 3, "threads": 2}, "2030-01-02 03:04:05")
    made.variants["qwen"] = {
        MOOLI: EngineFacts("Mooli", "int4", 4, "HTTP", "1.2", 0.7, 900_000_000),
        PEER: EngineFacts("llama.cpp", "Q4_0", 4, "HTTP", "b1", 1.0, 10**9),
        LOST: EngineFacts("vLLM", "bfloat16", 16, "HTTP", "9", error="ended with status 1: no platform"),
    }
    made.missing["OpenVINO GenAI"] = "not installed (make peers)"
    made.quality["qwen"] = {"Mooli int4": {"mean_kl": 0.0213, "worst_kl": 0.2, "same_top": 0.95}}
    for number, factor in enumerate((2.0, 2.5, 3.0)):
        for workload in ("single", "random", "shared"):
            for key, speed in ((MOOLI, factor), (PEER, 1.0)):
                figures = {"ttft_ms": 900 / speed, "ms_per_token": 20 / speed, "total_tok_s": 200 * speed, "wall_s": 1}
                made.samples.append(Sample("qwen", key, workload, number, GAUGE, GAUGE, figures))
    made.samples.append(Sample("qwen", PEER, "multiturn", 0, GAUGE, GAUGE, None, "took too long (more than 5 s)"))
    made.is_complete = True
    return made


def row(rows: list[list[str]], begins: str) -> list[str]:
    (found,) = [cells for cells in rows if cells[0] == begins]
    return found


def test_the_table_of_engines_has_medians_spreads_and_failures(results: Results) -> None:
    rows = engine_rows(results, "qwen")
    mooli, peer, lost = rows[1:]
    assert mooli[:5] == ["Mooli", "int4", "HTTP", "360 (300..450)", "8.00 (6.67..10.00)"]
    assert mooli[5:8] == ["500 (400..600)", "500 (400..600)", "–"]
    assert mooli[8:] == ["0.7", "0.90", "0.0213"]
    assert peer[7] == "failed"
    assert peer[-1] == "not measured"
    assert lost[3] == "–"


def test_the_table_of_targets_has_ratios_with_their_spread_and_both_values(results: Results) -> None:
    rows = target_rows(results, "qwen")
    found = row(rows, "random: total tok/s, int4")
    assert found[1:6] == ["2.50 (2.00..3.00)", "1.25", "1.6", "500 HTTP", "200 llama.cpp Q4_0"]
    assert found[6:] == ["0.0213 / not measured", "3 of 3"]
    assert row(rows, "random: total tok/s, int8")[5] == "no such peer ran"
    assert row(rows, "multiturn: total tok/s, int4")[5] == "no such peer ran"


def test_the_whole_text_names_every_failure_with_its_reason(results: Results) -> None:
    text = whole_text(results)
    for line in (
        "- OpenVINO GenAI: not installed (make peers)",
        f"- qwen, {LOST}: did not run: ended with status 1: no platform",
        f"- qwen, {PEER}, multiturn, round 1: took too long (more than 5 s)",
        "integer gauge 800..800 Gop/s, read 30.0..30.0 GB/s; 19 of 19 samples with a healthy gauge",
    ):
        assert line in text
    assert "DID NOT FINISH" not in text


def test_an_unfinished_run_and_a_slow_machine_are_said_loudly(results: Results) -> None:
    results.is_complete = False
    slow = {**GAUGE, "ops_s": 300e9}
    results.samples[1:] = [replace(sample, before=slow, after=slow) for sample in results.samples[1:]]
    text = whole_text(results)
    assert "THE RUN DID NOT FINISH" in text
    assert "MOST SAMPLES ARE NOT HEALTHY" in text


def test_columns_are_aligned() -> None:
    assert aligned([["a", "bb"], ["ccc", "d"]]) == "a    bb\n---  --\nccc  d"


def test_the_block_of_the_readme_is_a_table_of_the_rows_that_were_measured(results: Results) -> None:
    caption, _, table = short_block(results).partition("\n\n")
    said = " ".join(caption.splitlines())
    assert "2030-01-02, Some Processor, 2 threads, 3 rounds" in said
    assert "Mooli 1.2, llama.cpp b1" in said
    assert "vLLM" not in said
    lines = table.splitlines()
    assert lines[:2] == ["| | int4 | int8 |", "| --- | --- | --- |"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0].removeprefix("Qwen2.5-Coder-0.5B, ") for row in rows] == [
        "single: TTFT, ms",
        "single: ms per token",
        "random: tok/s",
        "shared: tok/s",
        "mean KL from float32",
    ]
    assert rows[2][1:] == ["**2.50 (2.00..3.00)** 500, 200 llama.cpp Q4_0", "–"]
    assert rows[4][1:] == ["Mooli int4 0.0213", "–"]


def test_only_what_is_between_the_markers_is_replaced() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_block(document, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert with_block(with_block(document, "a\nb"), "new") == with_block(document, "new")


@pytest.mark.parametrize("document", ["", BEGIN, f"{END}\n{BEGIN}"])
def test_a_document_without_markers_is_refused(document: str) -> None:
    with pytest.raises(MarkersMissingError, match="compare:begin"):
        with_block(document, "new")


def test_results_come_back_from_their_file(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    results.save(path)
    assert load_results(path) == results


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 0}', '{"schema": 1, "machine": {}}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ResultsFileError, match=r"results\.json"):
        load_results(path)


def test_the_command_makes_tables_of_a_file_and_updates_a_document(results: Results, tmp_path: Path) -> None:
    path, readme = tmp_path / "results.json", tmp_path / "README.md"
    results.save(path)
    readme.write_text(f"# T\n{BEGIN}\n{END}\n")
    command = [sys.executable, str(COMPARE), "--from", str(path), "--update"]
    done = subprocess.run([*command, "--document", str(readme)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == whole_text(results) + "\n"
    assert readme.read_text() == f"# T\n{BEGIN}\n{short_block(results)}\n{END}\n"


def test_each_dialect_asks_for_the_exact_length_and_reads_the_ids() -> None:
    native = Native()
    assert native.body([1, 2], 5)["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 5, "ignore_eos": True}
    assert native.new_ids({"output_ids": [4, 5, 6]}, 2) == [6]
    body = LlamaCpp().body([1, 2], 5)
    assert (body["prompt"], body["n_predict"], body["ignore_eos"]) == ([1, 2], 5, True)
    assert LlamaCpp().new_ids({"tokens": [4]}, 2) == [4]
    body = Vllm("m").body([1, 2], 5)
    assert (body["model"], body["max_tokens"], body["return_token_ids"]) == ("m", 5, True)
    assert Vllm("m").new_ids({"choices": [{"token_ids": [4, 5]}]}, 2) == [4, 5]
    assert Vllm("m").new_ids({"choices": [{"token_ids": None}]}, 2) == []


@pytest.mark.parametrize("dialect", [Native(), LlamaCpp(), Vllm("m")], ids=["native", "llama.cpp", "vllm"])
def test_an_error_in_a_stream_is_one(dialect: Native | LlamaCpp | Vllm) -> None:
    with pytest.raises(EngineError, match="out of memory"):
        dialect.new_ids({"error": {"message": "out of memory"}}, 0)


def test_a_divergence_is_the_mean_over_positions() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.25, 0.75]]))
    other = np.log(np.array([[0.5, 0.5], [0.75, 0.25]]))
    found = divergence(reference, other)
    assert found["mean_kl"] == pytest.approx((0 + 0.5 * np.log(3)) / 2)
    assert found["worst_kl"] == pytest.approx(0.5 * np.log(3))
    assert found["same_top"] == 0.5
    assert np.exp(log_softmax(np.array([[1.0, 2.0, 3.0]]))).sum() == pytest.approx(1.0)


def test_the_base_file_holds_the_tokens_and_the_probabilities_of_the_second_half(tmp_path: Path) -> None:
    ids = [5, 6, 7, 8, 9, 10]
    log_probs = log_softmax(np.random.default_rng(0).normal(0, 3, (2, 5)))
    write_base(tmp_path / "base", ids, log_probs)
    data = (tmp_path / "base").read_bytes()
    assert data[:8] == b"_logits_"
    assert struct.unpack_from("<Iii6i", data, 8) == (6, 5, 1, *ids)
    rows = data[8 + 12 + 24 :]
    assert len(rows) == 2 * (8 + 2 * 5 + 2)  # scale and least, values, made even
    for number in range(2):
        scale, low = struct.unpack_from("<ff", rows, number * 20)
        read = np.frombuffer(rows, "<u2", 5, number * 20 + 8) * scale + low
        np.testing.assert_allclose(read, log_probs[number], atol=1e-3)


def test_the_divergence_is_found_in_what_llama_perplexity_prints() -> None:
    said = "x\nMean    KLD:   0.012345 ±   0.000321\nMaximum KLD:   0.543210\nSame top p: 96.970 ± 1.7 %\n"
    assert read_perplexity(said) == {"mean_kl": 0.012345, "worst_kl": 0.54321, "same_top": pytest.approx(0.9697)}
    with pytest.raises(EngineError, match="no divergence"):
        read_perplexity("failed to decode")


def test_a_peer_that_cannot_be_installed_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    calls: list[str] = []

    def good(folder: Path, log: Path, jobs: int) -> str:
        calls.append("good")
        folder.mkdir()
        return "1.0"

    def bad(folder: Path, log: Path, jobs: int) -> str:
        calls.append("bad")
        install_peers.run([sys.executable, "-c", "import sys; sys.exit('ERROR: no such version')"], log=log)
        return "never"

    peers = {"a": ("Bad", bad), "b": ("Good", good)}
    reasons = install_peers.install_all(tmp_path, ["a", "b"], 1, peers)
    assert "ERROR: no such version" in reasons["Bad"]
    assert json.loads((tmp_path / "reasons.json").read_text()) == reasons
    assert (tmp_path / "b" / ".installed").read_text() == "1.0\n"
    install_peers.install_all(tmp_path, ["a", "b"], 1, peers)
    assert calls == ["bad", "good", "bad"]
