"""The comparison of engines: the work is exact, the turns are fair, and the figures follow from the samples."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from comparison.arithmetic import Target, against_best_peer, best_gauge, is_healthy, spread, targets
from comparison.child import EngineError
from comparison.results import EngineFacts, Results, Sample
from comparison.run import order
from comparison.timing import TurnTimes, check_work, figures
from comparison.workloads import SHAPES, Workload, make_workload

HEALTHY, SLOW = ({"ops_s": ops, "bytes_s": 30e9, "stolen_s": 0.0} for ops in (800e9, 400e9))


def work(name: str, **settings: float) -> Workload:
    return make_workload(name, SHAPES[name], seed=int(settings.get("seed", 0)), scale=settings.get("scale", 1.0))


def answers(workload: Workload, *, first_s: float = 0.5, end_s: float = 1.0) -> list[TurnTimes]:
    return [
        TurnTimes(conversation, turn, prompt_len, workload.output_len, 0.0, first_s, end_s)
        for conversation, turn, prompt_len in workload.expected()
    ]


@pytest.mark.parametrize(
    ("name", "lengths", "output_len", "at_once", "total"),
    [
        ("single", [512] * 3, 64, 1, 3 * 576),
        ("random", [512] * 16, 64, 16, 16 * 576),
        ("shared", [1056] * 32, 32, 32, 32 * 1088),
        ("multiturn", [256, 352, 448, 544] * 4, 32, 4, 4 * (1600 + 4 * 32)),
    ],
)
def test_a_workload_has_exact_lengths(name: str, lengths: list[int], output_len: int, at_once: int, total: int) -> None:
    workload = work(name)
    assert [prompt_len for _, _, prompt_len in workload.expected()] == lengths
    assert (workload.output_len, workload.at_once, workload.total_tokens()) == (output_len, at_once, total)
    assert workload.longest() == max(lengths) + output_len


def test_shared_prompts_share_their_beginning_within_a_group_and_nothing_else() -> None:
    prompts = [turns[0] for turns in work("shared").conversations]
    heads = Counter(tuple(prompt[:1024]) for prompt in prompts)
    assert sorted(heads.values()) == [16, 16]
    assert len({tuple(prompt[1024:]) for prompt in prompts}) == 32
    first, second = heads
    assert first[0] != second[0]


def test_other_workloads_share_nothing() -> None:
    for name in ("single", "random", "multiturn"):
        beginnings = [tuple(turns[0][:3]) for turns in work(name).conversations]
        assert len(set(beginnings)) == len(beginnings)


def test_every_round_is_new_and_the_same_round_the_same_for_all() -> None:
    assert work("random", seed=1).conversations == work("random", seed=1).conversations
    assert work("random", seed=1).conversations[0][0][:4] != work("random", seed=2).conversations[0][0][:4]
    assert work("random", seed=1).conversations[0][0][:4] != work("single", seed=1).conversations[0][0][:4]


def test_a_scaled_workload_keeps_its_structure() -> None:
    small = work("shared", scale=0.05)
    assert len(small.conversations) == 32
    assert sorted(Counter(tuple(turns[0][:51]) for turns in small.conversations).values()) == [16, 16]
    assert small.output_len == 2


def test_each_round_asks_every_engine_for_every_workload_one_after_the_other() -> None:
    turns = list(order(["a", "b", "c"], ["single", "random"], 3))
    assert len(turns) == len(set(turns)) == 18
    assert [variant for number, workload, variant in turns[:6]] == ["a", "b", "c", "b", "c", "a"]
    for begin in range(0, 18, 3):
        number, workload, _ = turns[begin]
        assert {turn[:2] for turn in turns[begin : begin + 3]} == {(number, workload)}


def test_every_engine_is_first_equally_often() -> None:
    turns = list(order(["a", "b", "c"], ["single"], 3))
    assert sorted(variant for _, _, variant in turns[::3]) == ["a", "b", "c"]


def test_figures_follow_their_formulas() -> None:
    workload = Workload("single", [[[1] * 10], [[2] * 10], [[3] * 10]], 5, 1)
    turns = [
        TurnTimes(0, 0, 10, 5, 0.0, 0.1, 0.5),
        TurnTimes(1, 0, 10, 5, 0.5, 0.8, 1.0),
        TurnTimes(2, 0, 10, 5, 1.0, 1.2, 2.0),
    ]
    found = figures(workload, turns)
    assert found["ttft_ms"] == pytest.approx(200)
    assert found["ms_per_token"] == pytest.approx(100)
    assert found["total_tok_s"] == pytest.approx(45 / 2.0)


def test_work_that_is_not_what_was_asked_is_refused() -> None:
    workload = work("multiturn")
    whole = answers(workload)
    check_work(workload, whole)
    short = replace(whole[-1], output_len=31)
    with pytest.raises(EngineError, match="answered 544 tokens with 31 instead of 544 with 32"):
        check_work(workload, [*whole[:-1], short])
    with pytest.raises(EngineError, match="did not answer turn 3 of conversation 3"):
        check_work(workload, whole[:-1])
    with pytest.raises(EngineError, match="more often"):
        check_work(workload, [*whole, whole[0]])


def test_a_spread_is_the_median_and_the_ends() -> None:
    found = spread([3.0, 1.0, 2.0])
    assert found is not None
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)
    assert spread([]) is None


def made(
    figures_by_variant: dict[str, list[float]], figure: str = "total_tok_s", **gauges: dict[str, float]
) -> Results:
    """Results of the workload "random" for variants "engine weights bits through"."""
    results = Results({}, {"rounds": 3}, "2030-01-01 00:00:00")
    variants = results.variants["qwen"] = {}
    for name, numbers in figures_by_variant.items():
        engine, weights, bits, through = name.split("|")
        variants[name] = EngineFacts(engine, weights, int(bits), through, "1")
        results.samples += [
            Sample("qwen", name, "random", number, HEALTHY, gauges.get(f"after_{number}", HEALTHY), {figure: value})
            for number, value in enumerate(numbers)
        ]
    return results


def goal(figure: str = "total_tok_s", low: int = 4, high: int = 16, bits: int = 4) -> Target:
    return Target("row", "random", figure, bits, low, high, 1.0, 2.0)


def test_a_ratio_is_taken_within_each_round() -> None:
    ratio = against_best_peer(
        made({"Mooli|int4|4|HTTP": [200, 300, 100], "llama.cpp|Q4_0|4|HTTP": [100, 100, 100]}), "qwen", goal()
    )
    assert ratio is not None
    assert (ratio.spread.median, ratio.spread.low, ratio.spread.high) == (2.0, 1.0, 3.0)
    assert (ratio.rounds, ratio.healthy) == (3, 3)


def test_a_round_that_one_of_both_did_not_finish_counts_for_none() -> None:
    ratio = against_best_peer(made({"Mooli|int4|4|HTTP": [200, 300], "llama.cpp|Q4_0|4|HTTP": [100]}), "qwen", goal())
    assert ratio is not None
    assert (ratio.spread.median, ratio.rounds) == (2.0, 1)


@pytest.mark.parametrize("figure", ["ttft_ms", "ms_per_token"])
def test_less_time_is_faster(figure: str) -> None:
    results = made({"Mooli|int4|4|HTTP": [50], "llama.cpp|Q4_0|4|HTTP": [100]}, figure)
    ratio = against_best_peer(results, "qwen", goal(figure))
    assert ratio is not None
    assert ratio.spread.median == 2.0


def test_the_best_peer_is_the_one_that_mooli_beats_least_like_compared_with_like() -> None:
    results = made(
        {
            "Mooli|int4|4|HTTP": [200],
            "Mooli|int4|4|in process": [400],
            "llama.cpp|Q4_0|4|HTTP": [150],
            "OpenVINO GenAI|Q4_0|4|in process": [350],
            "transformers|bfloat16|16|in process": [390],
        }
    )
    ratio = against_best_peer(results, "qwen", goal())
    assert ratio is not None
    assert (ratio.ours, ratio.theirs) == ("Mooli|int4|4|in process", "OpenVINO GenAI|Q4_0|4|in process")
    assert ratio.spread.median == pytest.approx(400 / 350)


def test_coarser_weights_are_not_compared_with() -> None:
    results = made({"Mooli|int8|8|HTTP": [200], "llama.cpp|Q4_0|4|HTTP": [180], "vLLM|bfloat16|16|HTTP": [100]})
    ratio = against_best_peer(results, "qwen", goal(low=8, bits=8))
    assert ratio is not None
    assert ratio.theirs == "vLLM|bfloat16|16|HTTP"
    assert against_best_peer(results, "qwen", goal(low=8, high=8, bits=8)) is None


def test_every_format_has_a_row_for_every_figure() -> None:
    rows = targets("qwen")
    assert len({row.title for row in rows}) == len(rows) == 15
    per_token = {row.bits: (row.low, row.high, row.must, row.aim) for row in rows if row.figure == "ms_per_token"}
    assert per_token[4] == (4, 4, 1.6, 2.2)
    assert per_token[8] == (8, 8, 1.4, 2.0)
    assert {row.must for row in targets("smollm2")} == {1.3, None}


def test_a_sample_is_healthy_when_both_gauges_are_near_the_best() -> None:
    results = made({"Mooli|int4|4|HTTP": [1, 1], "llama.cpp|Q4_0|4|HTTP": [1, 1]}, after_1=SLOW)
    assert best_gauge(results) == 800e9
    assert [is_healthy(sample, 800e9) for sample in results.samples] == [True, False, True, False]
    ratio = against_best_peer(results, "qwen", goal())
    assert ratio is not None
    assert (ratio.rounds, ratio.healthy) == (2, 1)
