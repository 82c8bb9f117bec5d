"""The command as a user runs it: what it prints, what it leaves behind, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from plain_server import Answer

from mooli.bench import offline
from mooli.bench.records import RequestRecord
from mooli.bench.watching import EventLoopLag, Progress
from mooli.bench_serving import main


def command(port: int, tokenizer: Path, file: Path, *flags: str) -> list[str]:
    return [
        "--host", "127.0.0.1", "--port", str(port), "--tokenizer", str(tokenizer), "--dataset-name", "random",
        "--random-input", "8", "--random-output", "3", "--num-prompts", "6", "--output-file", str(file), *flags,
    ]  # fmt: skip


def test_a_good_run_prints_the_table_appends_a_line_and_ends_with_0(
    serve: Any, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, file = serve(), tmp_path / "out.jsonl"
    for _ in range(2):
        assert main(command(server.port, tokenizer_path, file, "--tag", "mine", "--plot-throughput")) == 0
    out = capsys.readouterr().out
    assert "============ Serving Benchmark Result ============" in out
    assert f"{'Successful requests:':<40} 6         \n" in out
    assert "Output tokens per second" in out
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert list(first)[:9] == [
        "tag", "backend", "dataset_name", "request_rate", "max_concurrency", "sharegpt_output_len", "random_input_len",
        "random_output_len", "random_range_ratio",
    ]  # fmt: skip
    assert (first["tag"], first["completed"], first["failed"], first["seed"]) == ("mine", 6, 0, 42)
    assert first["server_info"] == {"version": "0.0.1"}
    assert first["total_input_tokens"] == second["total_input_tokens"]
    assert first["client"]["machine"]["cores"] >= 1
    assert first["client"]["mean_send_delay_ms"] > 0
    assert "ttfts" not in first


def test_the_file_is_named_as_sglang_names_it(
    serve: Any, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = command(serve().port, tokenizer_path, tmp_path / "x")
    del argv[argv.index("--output-file") : argv.index("--output-file") + 2]
    assert main(argv) == 0
    (file,) = tmp_path.glob("*.jsonl")
    assert file.name.startswith("sglang_") and file.name.endswith("_6_8_3.jsonl")


def test_failed_requests_end_with_1_and_one_line_and_keep_what_finished(
    serve: Any, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda number, body: (400, {"error": {"message": "too long"}}) if number in (2, 4) else None)
    file = tmp_path / "out.jsonl"
    assert main(command(server.port, tokenizer_path, file, "--disable-tqdm")) == 1
    captured = capsys.readouterr()
    assert captured.err == "mooli.bench_serving: error: 2 of 6 requests failed: HTTP 400: too long\n"
    assert "  2 x HTTP 400: too long" in captured.out
    assert json.loads(file.read_text())["completed"] == 4


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda number, body: (400, {"error": "bad"}), "all warm-up requests failed: HTTP 400: bad"),
        (lambda number, body: (401, {"error": "Unauthorized"}), "HTTP 401: Unauthorized"),
    ],
)
def test_a_run_that_cannot_begin_is_one_line_and_1(
    serve: Any, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: Answer, words: str
) -> None:
    assert main(command(serve(answer).port, tokenizer_path, tmp_path / "out", "--disable-tqdm")) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_not_there_is_one_line_and_1(
    tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can have the port
        flags = ("--ready-check-timeout-sec", "0")
        assert main(command(taken.getsockname()[1], tokenizer_path, tmp_path / "out", *flags)) == 1
    error = capsys.readouterr().err
    assert error.startswith("mooli.bench_serving: error: there is no server at http://127.0.0.1:")
    assert error.count("\n") == 1


def test_ctrl_c_prints_what_finished_and_ends_with_130(
    serve: Any, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()

    def interrupt(number: int, body: dict[str, Any]) -> None:
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
            over.wait(20)

    before = signal.getsignal(signal.SIGINT)
    file = tmp_path / "out.jsonl"
    flags = ("--max-concurrency", "1", "--disable-tqdm", "--output-details")
    try:
        assert main(command(serve(interrupt).port, tokenizer_path, file, *flags)) == 130
    finally:
        over.set()
    captured = capsys.readouterr()
    assert f"{'Successful requests:':<40} 3         \n" in captured.out
    assert f"{'Cut off by the user:':<40} 1" in captured.out
    assert captured.err == "mooli.bench_serving: stopped by Ctrl-C after 3 answers\n"
    result = json.loads(file.read_text())
    assert (result["completed"], result["interrupted"], result["unsent"]) == (3, 1, 2)
    assert result["is_interrupted"] and result["errors"][-1] == "cut off by the user"
    assert signal.getsignal(signal.SIGINT) is before


def test_the_key_of_the_environment_is_sent(
    serve: Any, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    server = serve()
    assert main(command(server.port, tokenizer_path, tmp_path / "out", "--header", "X=1")) == 0
    assert set(server.keys) == {"Bearer sk-1"}


def test_the_formulas_are_printed_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--explain"]) == 0
    out = capsys.readouterr().out
    assert "TPOT            (latency - TTFT) / (output tokens - 1)" in out


def test_arguments_that_cannot_be_used_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--backend", "trt"]) == 2
    assert capsys.readouterr().err.startswith("mooli.bench_serving: error: --backend trt: ")


def test_a_result_that_cannot_be_written_is_said_after_the_table(
    serve: Any, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(serve().port, tokenizer_path, tmp_path / "no" / "folder.jsonl", "--disable-tqdm")) == 1
    captured = capsys.readouterr()
    assert "Serving Benchmark Result" in captured.out
    assert "cannot be written" in captured.err


def test_a_tokenizer_that_is_not_there_says_where_it_looked(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(serve().port, tmp_path / "missing", tmp_path / "out", "--disable-tqdm")
    assert main(argv) == 1
    assert f"--tokenizer {tmp_path / 'missing'}: there is no folder" in capsys.readouterr().err
    del argv[argv.index("--tokenizer") : argv.index("--tokenizer") + 2]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "no tokenizer found (plain: " in error and "Give --tokenizer" in error


def test_progress_counts_answers_failures_and_the_rate_of_tokens() -> None:
    records = [
        RequestRecord(success=True, ttft_s=1.0, itl_s=[0.1] * 9),
        RequestRecord(error="x"),
        RequestRecord(ttft_s=1.0),
    ]
    progress = Progress(records, 8, None)
    start = progress._start_s
    assert progress.line(start + 2.2) == "[#####               ] 2/8  1 failed  1 open  5 tok/s  00:02"
    records[2].itl_s += [0.1] * 40
    assert "20 tok/s" in progress.line(start + 4.2)


def test_a_busy_event_loop_is_noticed() -> None:
    async def scenario() -> float:
        async with EventLoopLag() as lag:
            await asyncio.sleep(0.03)
            end = asyncio.get_running_loop().time() + 0.1
            while asyncio.get_running_loop().time() < end:
                pass
            await asyncio.sleep(0.03)
        return lag.load().max_lag_ms

    assert asyncio.run(scenario()) > 50


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--dataset-name sharegpt, the default, needs its file: `--dataset-name random` needs none"),
        (["--dataset-name", "custom"], "--dataset-name custom needs --dataset-path FILE"),
        (["--dataset-path", "missing.json"], "--dataset-path missing.json: there is no such file"),
    ],
    ids=["default", "no file named", "no such file"],
)
@pytest.mark.parametrize("run", [main, offline.main], ids=["serving", "offline"])
def test_a_data_set_without_its_file_is_said_before_a_server_is_waited_for_or_a_model_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Any, flags: list[str],
    words: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr("mooli.bench.serving.open_session")
    monkeypatch.delattr("mooli.bench.offline.Engine")
    assert run([*flags, *(["--model-path", "none"] if run is offline.main else [])]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
