"""Conversations of several rounds: what is sent, when, and what it amounts to by round."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Script, ScriptedServer

import mooli.bench.multiturn_flags as flags_module
from mooli import cli
from mooli.bench.client import UnreachableError
from mooli.bench.errors import BenchmarkError
from mooli.bench.multiturn import RateRun, main, measure_rates, report
from mooli.bench.multiturn_flags import parse_multiturn_arguments
from mooli.bench.multiturn_load import Conversation, Pace, converse_under_load, make_conversations, pace
from mooli.bench.records import RequestRecord
from mooli.frontend.tokenizer import Tokenizer


def command(port: int, tokenizer: Path, file: Path, *flags: str) -> list[str]:
    return [
        "--host", "127.0.0.1", "--port", str(port), "--model-path", str(tokenizer), "--log-file", str(file),
        "--num-clients", "2", "--num-rounds", "3", "--request-length", "8", "--output-length", "3",
        "--disable-auto-run", "--request-rate", "inf", "--disable-tqdm", *flags,
    ]  # fmt: skip


def measured(
    scripts: list[Script], tokenizer: Path, tmp_path: Path, *flags: str
) -> tuple[RateRun, ScriptedServer, dict[str, Any], list[str]]:
    """One run against a scripted server, one request at a time; also its line of JSON and what it said."""
    runs: list[RateRun] = []
    said: list[str] = []

    async def scenario() -> ScriptedServer:
        async with ScriptedServer(scripts, concurrency=1) as server:
            port = int(server.url.rsplit(":", 1)[1])
            argv = command(port, tokenizer, tmp_path / "out", "--max-parallel", "1", *flags)
            options = parse_multiturn_arguments(argv)

            def keep(run: RateRun) -> bool:
                runs.append(run)
                report(options, run, said.append)
                return True

            stopping = contextlib.nullcontext(asyncio.Event())
            await measure_rates(options, stopping=stopping, say=said.append, keep=keep, clock=server.clock)
            return server

    server = asyncio.run(scenario())
    return runs[0], server, json.loads((tmp_path / "out").read_text()), said


def answer(ttft_s: float, prompt_tokens: int, cached_tokens: int | None = 0, text: str = "abc") -> Script:
    pieces = [(ttft_s, text[0], 1), *((0.01, char, 1) for char in text[1:])]
    return Script(pieces=pieces, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)


FIFO = ("--ready-queue-policy", "fifo")


def test_each_request_holds_the_whole_conversation_so_far(tokenizer_path: Path, tmp_path: Path) -> None:
    scripts = [answer(0.1, 8, text="one"), answer(0.1, 20, text="two"), answer(0.1, 30, text="six")]
    _, server, _, _ = measured(
        scripts, tokenizer_path, tmp_path, "--num-clients", "1", "--sub-question-input-length", "5"
    )
    first, second, third = (body["text"] for _, body, _ in server.sent)
    assert len(first) == 8
    assert second.startswith(first + "one") and len(second) == 8 + 3 + 5
    assert third.startswith(second + "two") and len(third) == 16 + 3 + 5
    assert {body["sampling_params"]["max_new_tokens"] for _, body, _ in server.sent} == {3}


def test_a_chat_route_gets_messages(tokenizer_path: Path, tmp_path: Path) -> None:
    scripts = [answer(0.1, 8, text="one"), answer(0.1, 20, text="two")]
    flags = ("--num-clients", "1", "--num-rounds", "2", "--api-format", "openai")
    _, server, _, _ = measured(scripts, tokenizer_path, tmp_path, *flags)
    path, body, _ = server.sent[1]
    assert path == "/v1/chat/completions"
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][:2] == [*server.sent[0][1]["messages"], {"role": "assistant", "content": "one"}]


def test_ttft_and_hit_rate_are_those_of_each_round(tokenizer_path: Path, tmp_path: Path) -> None:
    scripts = [
        answer(0.4, 10), answer(0.6, 10), answer(0.1, 20, 10), answer(0.3, 20, 14), answer(0.2, 30, 24),
        answer(0.2, 30, 27),
    ]  # fmt: skip
    run, server, result, said = measured(scripts, tokenizer_path, tmp_path, *FIFO)
    rounds = result["round"]
    assert [rounds[f"round_{i}"]["average_ttft"] for i in range(3)] == pytest.approx([0.5, 0.2, 0.2])
    assert [rounds[f"round_{i}"]["cache_hit_rate"] for i in range(3)] == pytest.approx([0.0, 0.6, 0.85])
    assert [rounds[f"round_{i}"]["average_uncached_len"] for i in range(3)] == pytest.approx([10, 8, 4.5])
    assert [rounds[f"round_{i}"]["request_count"] for i in range(3)] == [2, 2, 2]
    summary = result["summary"]
    assert summary["total_requests"] == 6
    assert summary["average_ttft"] == pytest.approx(0.3)
    assert summary["average_latency"] == pytest.approx(0.32)
    assert summary["cache_hit_rate"] == pytest.approx(75 / 120)
    assert summary["average_prompt_len"] == 20 and summary["average_output_len"] == 3
    assert summary["throughput"] == pytest.approx(6 / run.load.duration_s)
    assert server.asked.count("/flush_cache?timeout=60") == 1
    shown = "\n".join(said)
    for words in (
        "Performance metrics summary:",
        "  Total requests: 6 at inf requests per second",
        "  Average TTFT: 0.30",
        "  Cache Hit Rate: 0.625000",
        "  Round 1: Average TTFT = 0.200s, Cache Hit Rate = 0.600000 (2 requests;",
    ):
        assert words in shown


def test_a_server_that_says_nothing_of_its_cache_has_no_hit_rate(tokenizer_path: Path, tmp_path: Path) -> None:
    scripts = [answer(0.1, 10, None) for _ in range(2)]
    _, _, result, said = measured(scripts, tokenizer_path, tmp_path, "--num-rounds", "1")
    assert result["summary"]["cache_hit_rate"] is None
    assert "  Cache Hit Rate: not reported" in "\n".join(said)


def test_conversations_have_rounds_of_both_bounds_and_the_seed_says_all(tokenizer: Tokenizer) -> None:
    flags = ["--num-clients", "40", "--min-rounds", "2", "--max-rounds", "4", "--request-length", "5"]
    options = parse_multiturn_arguments(flags)
    made = make_conversations(options, tokenizer)
    assert {len(conversation.questions) for conversation in made} == {2, 3, 4}
    assert make_conversations(options, tokenizer) == made
    assert make_conversations(parse_multiturn_arguments([*flags, "--seed", "2"]), tokenizer) != made
    assert len({conversation.questions[0] for conversation in made}) == 40


def conversations(num: int, num_rounds: int) -> list[Conversation]:
    return [Conversation(index=i, questions=["q"] * num_rounds, history="q", prompt_len=1) for i in range(num)]


def played(made: list[Conversation], how: Pace, *, fails: tuple[int, ...] = ()) -> tuple[list[tuple[int, int]], int]:
    """(conversation, round) in the order sent, and how many were open at once at most. fails: conversations that do."""
    sent: list[tuple[int, int]] = []
    open_now, most = 0, 0

    async def send(conversation: Conversation, records: list[RequestRecord]) -> bool:
        nonlocal open_now, most
        sent.append((conversation.index, conversation.round_index))
        records.append(RequestRecord(index=conversation.index, turn=conversation.round_index, success=True))
        open_now += 1
        most = max(most, open_now)
        for _ in range(3 + conversation.index):
            await asyncio.sleep(0)
        open_now -= 1
        conversation.round_index += 1
        return conversation.index not in fails

    async def scenario() -> Any:
        return await converse_under_load(made, send, how, clock=lambda: 0.0, stop=asyncio.Event(), records=[])

    load = asyncio.run(scenario())
    assert load.num_unsent == sum(len(one.questions) for one in made) - len(sent)
    return sent, most


def plain_pace(**changes: Any) -> Pace:
    given = {"max_parallel": 3, "request_rate": float("inf"), "distribution": "poisson", "policy": "fifo"}
    return pace(**{**given, "has_round_barrier": False, "seed": 1, **changes})


def test_all_rounds_are_sent_in_order_with_so_many_at_once() -> None:
    sent, most = played(conversations(7, 3), plain_pace())
    assert sorted(sent) == [(i, r) for i in range(7) for r in range(3)]
    for i in range(7):
        assert [r for index, r in sent if index == i] == [0, 1, 2]
    assert most == 3


def test_the_queue_gives_the_one_that_waited_longest_or_any() -> None:
    assert [i for i, _ in played(conversations(6, 1), plain_pace())[0]] == list(range(6))
    order = [i for i, _ in played(conversations(6, 1), plain_pace(policy="random"))[0]]
    assert sorted(order) == list(range(6)) and order != list(range(6))


def test_a_barrier_keeps_the_rounds_apart() -> None:
    sent, _ = played(conversations(5, 3), plain_pace(has_round_barrier=True))
    assert [r for _, r in sent] == [0] * 5 + [1] * 5 + [2] * 5
    without, _ = played(conversations(5, 3), plain_pace())
    assert [r for _, r in without] != [0] * 5 + [1] * 5 + [2] * 5


def test_a_conversation_that_fails_ends_and_the_others_go_on() -> None:
    sent, _ = played(conversations(3, 3), plain_pace(), fails=(1,))
    assert [index for index, _ in sent].count(1) == 1
    assert len(sent) == 7


@pytest.mark.parametrize(("distribution", "most"), [("poisson", None), ("uniform", 0.5)])
def test_gaps_have_the_mean_that_the_rate_says(distribution: str, most: float | None) -> None:
    how = plain_pace(request_rate=4.0, distribution=distribution)
    gaps = [how.gap_s() for _ in range(20_000)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.25, rel=0.03)
    assert min(gaps) >= 0
    if most is not None:
        assert max(gaps) <= most
    assert plain_pace().gap_s() == 0


def test_a_server_that_is_gone_ends_the_run() -> None:
    async def send(conversation: Conversation, records: list[RequestRecord]) -> bool:
        records.append(RequestRecord(index=conversation.index, error="refused"))
        raise UnreachableError("refused")

    async def scenario() -> Any:
        made = conversations(60, 2)
        return await converse_under_load(made, send, plain_pace(), clock=lambda: 0.0, stop=asyncio.Event(), records=[])

    load = asyncio.run(scenario())
    assert load.is_server_gone and not load.is_interrupted
    assert load.num_unsent >= 60


def test_a_good_run_ends_with_0_and_a_line_of_json(
    serve: Any, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, file = serve(), tmp_path / "out"
    assert cli.main(["bench", "multiturn", *command(server.port, tokenizer_path, file, "--tag", "t")]) == 0
    out = capsys.readouterr().out
    assert "Running with specified request rate..." in out and "All requests completed" in out
    result = json.loads(file.read_text())
    assert list(result)[:4] == ["timestamp", "tag", "summary", "round"]
    assert (result["tag"], result["summary"]["total_requests"], result["failed"]) == ("t", 6, 0)
    assert len(server.bodies) == 6


def test_the_report_shows_each_request_and_the_figures_of_the_run(
    serve: Any, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, file = tmp_path / "report.html", tmp_path / "out"
    assert main(command(serve().port, tokenizer_path, file, "--report", str(page))) == 0
    assert f"Report written to {page}" in capsys.readouterr().out
    text, result = page.read_text(), json.loads(file.read_text())
    shown = re.findall(r'<data [^>]*data-key="mean_ttft_ms"[^>]*>', text)
    (ttft_ms,) = {float(tag.split('value="')[1].split('"')[0]) for tag in shown}
    assert ttft_ms == pytest.approx(1000 * result["summary"]["average_ttft"])
    assert "Timeline" in text and "conversations of" in text
    assert "ttfts" not in result


def test_without_a_rate_many_are_tried_each_from_an_empty_cache(
    serve: Any, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flags_module.AUTO_RATES[0] == 16 and flags_module.AUTO_RATES[-1] == 1
    monkeypatch.setattr(flags_module, "AUTO_RATES", (900.0, 800.0))
    server, file = serve(), tmp_path / "out"
    argv = command(server.port, tokenizer_path, file)
    argv = [word for word in argv if word not in ("--disable-auto-run", "--request-rate", "inf")]
    assert main(argv) == 0
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert [result["summary"]["request_rate"] for result in results] == [900.0, 800.0]
    assert server.num_flushes == 2
    texts = [sorted(body["text"] for body in half) for half in (server.bodies[:6], server.bodies[6:])]
    assert texts[0] == texts[1]


def test_failures_end_with_1_and_keep_what_finished(
    serve: Any, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda number, body: (400, {"error": {"message": "too long"}}) if number == 2 else None)
    file = tmp_path / "out"
    assert main(command(server.port, tokenizer_path, file, "--max-parallel", "1")) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("mooli bench multiturn: error: 1 of ")
    assert "HTTP 400: too long" in captured.err
    assert json.loads(file.read_text())["failed"] == 1


def test_ctrl_c_keeps_what_finished_and_ends_with_130(
    serve: Any, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()

    def interrupt(number: int, body: dict[str, Any]) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
            over.wait(20)

    file = tmp_path / "out"
    try:
        argv = command(serve(interrupt).port, tokenizer_path, file, "--max-parallel", "1")
        assert main(argv) == 130
    finally:
        over.set()
    assert capsys.readouterr().err == "mooli bench multiturn: stopped by Ctrl-C after 3 answers\n"
    result = json.loads(file.read_text())
    assert (result["summary"]["total_requests"], result["interrupted"], result["unsent"]) == (3, 1, 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--request-rate", "3"], "belongs to --disable-auto-run"),
        (["--disable-auto-run", "--request-rate", "0"], "--request-rate must be above 0"),
        (["--disable-auto-run", "--request-rate", "inf", "--distribution", "uniform"], "--distribution says nothing"),
        (["--num-clients", "0"], "--num-clients must be at least 1"),
        (["--num-rounds", "3", "--min-rounds", "2", "--max-rounds", "4"], "--num-rounds says nothing"),
        (["--min-rounds", "5", "--max-rounds", "4"], "--min-rounds 5 is more than --max-rounds 4"),
        (["--lora-path", "x"], "--lora-path"),
        (["--api-format", "openai", "--backend", "vllm"], "not both"),
        (["--backend", "vllm"], "give --disable-auto-run"),
        (["--disable-random-sample", "--dataset-path", "x"], "reads no file"),
        (["--report", "x.html"], "--report shows one run"),
        (["--disable-auto-run", "--report", "no/such/folder/x.html"], "in a folder that exists"),
        (["--base-url", "ftp://x"], "must begin with http"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_in_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BenchmarkError, match=words):
        parse_multiturn_arguments(flags)
    assert main(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_defaults_are_those_of_sglang() -> None:
    options = parse_multiturn_arguments([])
    assert (options.num_clients, options.max_parallel, options.request_len, options.output_len) == (256, 128, 512, 64)
    assert (options.min_rounds, options.max_rounds, options.question_len, options.seed) == (5, 5, 512, 1)
    assert (options.distribution, options.ready_queue_policy, len(options.rates)) == ("poisson", "random", 13)
    assert options.target.base_url == "http://localhost:30000"
    assert str(options.log_file) == "performance_metrics.jsonl"
