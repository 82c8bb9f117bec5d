"""Guessed tokens: where they come from, when there are none, and that only the number of steps depends on them."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from core_trials import Trial
from fake_engine import FakeEngine, says
from test_scheduler import Bench, request, spans

from mooli import ConfigError, EngineConfig
from mooli.cache.kv_cache import KVCache
from mooli.cache.radix_tree import token_key
from mooli.engine.build import draft_settings
from mooli.runner.fake import FakeRunner
from mooli.scheduler.drafts import FIRST_PAUSE, LONGEST_PAUSE, DraftRecord, DraftSettings, what_followed
from mooli.types import FIRST_CONTENT_ID

SETTINGS = DraftSettings(tokens_per_request=4, tokens_per_step=8, shortest_match=1, longest_match=12)


def followed(tokens: list[int], most: int = 3, shortest: int = 2, longest: int = 12) -> list[int]:
    return what_followed(np.array(tokens, np.int32), most, shortest, longest)


# -- what the request's own tokens had before --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),
        ([1, 2, 9, 1, 2, 8, 1, 2], [8, 1, 2]),  # the latest of equally long ones
        ([7, 1, 2, 9, 6, 1, 2, 8, 7, 1, 2], [9, 6, 1]),  # a longer one goes before a later one
        ([3, 2, 9, 1, 2], []),  # one token is not enough
        ([1, 1, 1], [1]),  # as far as known
        ([5, 6], []),
        ([5], []),
    ],
)
def test_a_guess_is_what_followed_the_longest_run_like_the_end(tokens: list[int], expected: list[int]) -> None:
    assert followed(tokens) == expected


def test_how_many_tokens_must_agree_and_how_many_are_compared_can_be_set() -> None:
    assert followed([3, 2, 9, 1, 2], shortest=1) == [9, 1, 2]
    assert followed([7, 1, 2, 9, 6, 1, 2, 8, 7, 1, 2], longest=2) == [8, 7, 1]
    assert followed([1, 2, 3, 4, 1, 2], shortest=3) == []


def test_a_guess_equals_a_search_by_hand() -> None:
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
        shortest, longest, most = rng.randint(1, 3), rng.randint(3, 6), rng.randint(1, 4)
        best: tuple[int, int] = (0, 0)
        for end in range(1, len(tokens)):
            alike = 0
            while alike < min(end, longest) and tokens[end - 1 - alike] == tokens[-1 - alike]:
                alike += 1
            best = max(best, (alike, end))
        alike, end = best
        expected = tokens[end : end + most] if alike >= shortest else []
        assert followed(tokens, most, shortest, longest) == expected


# -- what others had after the same tokens -----------------------------------------------------------------------------
class Tree:
    """A cache in which requests have run."""

    def __init__(self) -> None:
        self.cache = KVCache(num_pages=40, page_size=4)

    def run(self, tokens: list[int], namespace: str = "") -> None:
        key = token_key(np.array(tokens, np.int32))
        held = self.cache.open(self.cache.match(namespace, key, 0))
        assert self.cache.grow(held, len(tokens))
        self.cache.release(held, key)

    def following(self, tokens: list[int], num_tokens: int = 3, namespace: str = "") -> list[int]:
        key = token_key(np.array(tokens, np.int32))
        held = self.cache.open(self.cache.match(namespace, key, len(tokens) - 1))
        found = self.cache.following(held, key[held.num_shared * 16 :], num_tokens)
        self.cache.discard(held)
        self.cache.check([])
        return found


@pytest.mark.parametrize("length", range(1, 13))
def test_the_tree_knows_what_followed_wherever_a_request_stands(length: int) -> None:
    tree, tokens = Tree(), list(range(100, 112))
    tree.run(tokens)
    assert tree.following(tokens[:length], 5) == tokens[length : length + 5]
    assert tree.following([*tokens[: length - 1], 7], 5) == []


def test_the_tree_is_followed_through_nodes_the_way_used_last() -> None:
    tree, stem = Tree(), list(range(8))
    tree.run([*stem, 20, 21, 22, 23])
    tree.run([*stem, 30, 31])
    tree.run([*stem, 20, 21, 22, 23, 50])
    assert tree.following(stem[:6], 6) == [6, 7, 20, 21, 22, 23]
    tree.run([*stem, 30, 31, 32])
    assert tree.following(stem[:6], 6) == [6, 7, 30, 31, 32]
    assert tree.following([*stem, 20], 9) == [21, 22, 23, 50]


def test_content_that_followed_is_no_guess() -> None:
    tree, tokens = Tree(), list(range(8))
    tree.run([*tokens, 9, FIRST_CONTENT_ID, FIRST_CONTENT_ID + 1, 10])
    assert tree.following(tokens[:6], 6) == [6, 7, 9]
    assert tree.following([*tokens, 9], 6) == []
    assert tree.following([*tokens, 9, FIRST_CONTENT_ID, FIRST_CONTENT_ID + 1], 6) == [10]


def test_nothing_is_guessed_from_another_namespace_or_without_a_tree() -> None:
    tree = Tree()
    tree.run([1, 2, 3, 4, 5, 6], "theirs")
    assert tree.following([1, 2, 3], namespace="ours") == []
    assert tree.following([1, 2, 3], namespace="theirs") == [4, 5, 6]
    tree.cache = KVCache(40, 4, enabled=False)
    assert tree.following([1, 2, 3]) == []


# -- when it is worth it -----------------------------------------------------------------------------------------------
def test_a_request_whose_guesses_are_wrong_pauses_for_longer_and_longer_until_one_is_right() -> None:
    record, pauses = DraftRecord(), []
    for _ in range(60):
        record.learn(3, 0)
        if record.pause:
            pauses.append(record.pause)
    assert pauses[0] == FIRST_PAUSE and max(pauses) == LONGEST_PAUSE
    assert all(later == min(2 * one, LONGEST_PAUSE) for one, later in pairwise(pauses))
    record.learn(3, 3)
    assert record.next_pause == FIRST_PAUSE


def test_a_request_whose_guesses_are_right_one_time_in_two_does_not_pause() -> None:
    record = DraftRecord()
    for step in range(100):
        record.learn(3, step % 2)
        assert not record.pause
    assert record.counts.histogram == (50, 50) and record.counts.num_right == 50 and record.counts.num_proposed == 300


@pytest.mark.parametrize("sizes", [(1, 8, 1, 2), (2, 1, 1, 2), (2, 8, 0, 2), (2, 8, 3, 2)])
def test_settings_that_guess_nothing_are_refused(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError):
        DraftSettings(*sizes)


# -- steps -------------------------------------------------------------------------------------------------------------
def counting(context: list[int]) -> int:
    """A model that counts up to seven, again and again."""
    return (context[-1] + 1) % 8


def test_an_answer_that_repeats_itself_takes_fewer_steps_and_is_the_same() -> None:
    plain, guessing = Bench(next_token=counting), Bench(next_token=counting, drafts=SETTINGS)
    for bench in (plain, guessing):
        bench.add(request("a", [0, 1], 40))
        bench.run()
    assert guessing.tokens("a") == plain.tokens("a")
    assert len(plain.batches) == 40 and len(guessing.batches) < 20
    longest = max(len(out.new_token_ids) for out in guessing.outputs["a"])
    assert longest == 4 == max(batch.num_tokens for batch in guessing.batches[1:])


def test_a_row_with_guesses_samples_after_each_of_them_as_the_next_steps_would() -> None:
    bench = Bench(next_token=counting, drafts=SETTINGS)
    bench.add(request("a", [0, 1], 40, repetition_penalty=1.1, stop_token_ids=frozenset({700}), min_new_tokens=12))
    for _ in range(40):
        bench.step()
        batch, num_known = bench.batches[-1], int(bench.batches[-1].starts[0]) + 1
        if batch.num_tokens == 4 and num_known == 13:
            break
    assert batch.num_samples.tolist() == batch.lengths.tolist() == [4]
    assert batch.token_ids.tolist() == [(num_known - 1 + i) % 8 for i in range(4)]
    sampling = batch.sampling
    assert sampling.positions.tolist() == [num_known + i for i in range(4)]
    assert np.diff(sampling.history_indptr).tolist() == [num_known + i for i in range(4)]
    assert sampling.history_ids[-16:].tolist() == [i % 8 for i in range(16)]
    assert sampling.output_starts.tolist() == [2] * 4
    assert np.diff(sampling.bias_indptr).tolist() == [1, 0, 0, 0], "stopping is forbidden to the twelfth token alone"


def test_an_answer_that_is_asked_for_again_comes_from_the_tree() -> None:
    bench = Bench(drafts=SETTINGS, num_pages=64)
    bench.add(request("first", [5, 6, 7, 8, 9], 21))
    bench.run()
    before = len(bench.batches)
    bench.add(request("again", [5, 6, 7, 8, 9], 21))
    bench.run()
    assert bench.tokens("again") == bench.tokens("first")
    assert len(bench.batches) - before == 1 + 5, "the prompt, then four tokens a step"
    counts = bench.last("again").drafts
    assert counts is not None and counts.histogram == (0, 0, 0, 5) and counts.num_proposed == 15


@pytest.mark.parametrize(("per_step", "num_requests", "most"), [(8, 1, 4), (8, 2, 4), (8, 3, 3), (8, 8, 1), (4, 3, 2)])
def test_the_rows_of_a_step_share_what_a_step_may_have(per_step: int, num_requests: int, most: int) -> None:
    settings = DraftSettings(4, per_step, 1, 12)
    bench = Bench(next_token=counting, num_pages=200, max_running_requests=num_requests, drafts=settings)
    bench.add(*(request(f"r{i}", [0, 1], 40, namespace=str(i)) for i in range(num_requests)))
    bench.run()
    decode = [batch for batch in bench.batches if batch.starts.min() >= 2]
    assert max(batch.num_tokens for batch in decode) <= max(per_step, num_requests)
    assert max(batch.lengths.max() for batch in decode if batch.num_rows == num_requests) == most


def test_a_step_with_a_prompt_in_it_has_no_guesses() -> None:
    bench = Bench(next_token=counting, max_batch_tokens=8, drafts=SETTINGS)
    bench.add(request("stream", [0, 1], 60))
    for _ in range(8):
        bench.step()
    assert spans(bench.batches[-1])[0][1] > 1
    bench.add(request("long", list(range(100, 130)), 1))
    for _ in range(4):
        bench.step()
        assert spans(bench.batches[-1])[0][1] == 1


def test_guesses_take_no_pages_that_another_request_may_need() -> None:
    settings = DraftSettings(6, 30, 1, 12)
    tight = Bench(num_pages=22, page_size=1, next_token=counting, enabled=False, drafts=settings)
    tight.add(request("a", [0, 1], 10), request("b", [0, 1], 10))
    tight.run()
    assert tight.scheduler.counters.preemptions == 0
    assert tight.scheduler.counters.correct_drafts


def test_guesses_leave_each_running_request_the_page_of_its_next_token() -> None:
    settings = DraftSettings(6, 30, 1, 12)
    bench = Bench(num_pages=22, page_size=1, next_token=counting, enabled=False, drafts=settings)
    bench.add(request("a", [*range(8), 0, 1], 12), request("b", list(range(500, 506)), 12))
    bench.step()
    bench.step()
    assert bench.scheduler.last_step.draft_tokens == 2, "of four free pages two are for the next tokens"
    bench.step()
    assert bench.scheduler.counters.preemptions == 0
    assert bench.batches[-1].num_rows == 2


def test_a_wrong_guess_is_not_kept_in_the_cache() -> None:
    """Positions of wrong guesses are computed again, with what was sampled, before anybody can find them."""
    bench = Bench(page_size=1, next_token=lambda context: 50 + len(context) if context[-1] == 3 else counting(context))
    bench.scheduler = Bench(page_size=1, drafts=SETTINGS).scheduler
    bench.cache = bench.scheduler._cache
    prompt = [0, 1, 2, 3, 9, 0, 1, 2]
    bench.add(request("a", prompt, 12))
    bench.run()
    wrong = bench.scheduler.counters.proposed_drafts - bench.scheduler.counters.correct_drafts
    assert wrong > 0
    bench.add(request("b", [*prompt, *bench.tokens("a")], 3))
    plain = Bench(next_token=bench.runner.next_token)
    plain.add(request("b", [*prompt, *bench.tokens("a")], 3))
    for each in (bench, plain):
        each.run()
    assert bench.last("b").cached_tokens == len(prompt) + 11
    assert bench.tokens("b") == plain.tokens("b")


# -- endings in the middle of right guesses ----------------------------------------------------------------------------
@pytest.mark.parametrize("stop_id", range(8))
def test_a_stop_id_among_right_guesses_ends_the_request_there(stop_id: int) -> None:
    bench = Bench(next_token=counting, drafts=SETTINGS)
    bench.add(request("a", [0, 1], 60, min_new_tokens=30, stop_token_ids=frozenset({stop_id})))
    bench.run()
    plain = Bench(next_token=counting)
    plain.add(request("a", [0, 1], 60, min_new_tokens=30, stop_token_ids=frozenset({stop_id})))
    plain.run()
    assert bench.tokens("a") == plain.tokens("a")
    assert bench.last("a").finish == plain.last("a").finish
    assert bench.cache.num_tree_pages == plain.cache.num_tree_pages


@pytest.mark.parametrize("max_new_tokens", range(16, 24))
def test_the_longest_answer_is_reached_exactly(max_new_tokens: int) -> None:
    for limits in ({}, {"context_length": 2 + max_new_tokens}):
        bench = Bench(next_token=counting, drafts=SETTINGS, **limits)
        bench.add(request("a", [0, 1], None if limits else max_new_tokens))
        bench.run()
        assert len(bench.tokens("a")) == max_new_tokens
        assert bench.last("a").finish.to_dict() == {"type": "length", "length": max_new_tokens}
        assert bench.last("a").completion_tokens == max_new_tokens


def test_an_abort_while_guesses_are_verified_takes_none_of_them() -> None:
    bench = Bench(next_token=counting, drafts=SETTINGS)
    bench.add(request("a", [0, 1], 60))
    for _ in range(12):
        bench.step()
    before = bench.tokens("a")
    batch = bench.scheduler.schedule()
    assert batch is not None and batch.num_tokens == 4
    bench.scheduler.abort("a")
    (out,) = bench.scheduler.update(batch, bench.runner.execute(batch))
    bench.scheduler.check()
    assert (out.new_token_ids, out.finish.type) == ([], "abort")
    assert bench.cache.num_tree_pages == bench.cache.pages_for(2 + len(before))


def test_nan_after_a_wrong_guess_does_not_end_the_request_and_leaves_nothing_behind() -> None:
    def says_nine_after(context: list[int]) -> int:
        return 9 if len(context) == 13 else counting(context)

    bench = Bench(next_token=says_nine_after, drafts=SETTINGS)
    runner = FakeRunner(64, 4, 1000, next_token=says_nine_after)
    runner.gives_nan = lambda context: len(context) > 13 and context[13] != 9
    bench.runner = runner
    bench.add(request("a", [0, 1], 30))
    bench.run()
    plain = Bench(next_token=says_nine_after)
    plain.add(request("a", [0, 1], 30))
    plain.run()
    assert bench.tokens("a") == plain.tokens("a")
    assert bench.last("a").num_preemptions == 1, "its last page was filled with the guess and is given up"


def test_nan_after_right_guesses_ends_the_request_with_what_came_before_it() -> None:
    bench = Bench(next_token=counting, drafts=SETTINGS)
    bench.runner.gives_nan = lambda context: len(context) == 20
    bench.add(request("a", [0, 1], 30))
    bench.run()
    assert bench.last("a").finish.err_type == "NaNError"
    assert len(bench.tokens("a")) == 18
    assert bench.cache.num_tree_pages == 0


# -- trials ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_random_trials_have_right_and_wrong_guesses_and_endings_among_them() -> None:
    right = wrong = preempted = ended_inside = 0
    for seed in range(60):
        trial = Trial(seed)
        if trial.setting.drafts is None:
            continue
        trial.run(num_requests=6)
        counters = trial.scheduler.counters
        right += counters.correct_drafts
        wrong += counters.proposed_drafts - counters.correct_drafts
        preempted += counters.preemptions
        last = [outs[-1] for outs in trial.outputs.values()]
        ended_inside += sum(len(out.new_token_ids) > 1 for out in last)
    assert min(right, wrong) > 50 and preempted > 3 and ended_inside > 3


# -- the engine --------------------------------------------------------------------------------------------------------
TEXT = "abcabcabcabcabcabcabc"


@pytest.mark.parametrize("interval", [1, 5])
def test_streams_show_tokens_that_come_together(monkeypatch: pytest.MonkeyPatch, interval: int) -> None:
    engine = FakeEngine(monkeypatch)(says(TEXT), speculative_algorithm="NGRAM", stream_interval=interval)
    chunks = list(engine.generate("x>", {"max_new_tokens": 60, "temperature": 0}, stream=True))
    engine.shutdown()
    assert chunks[-1]["text"] == TEXT
    lengths = [0, *(chunk["meta_info"]["completion_tokens"] for chunk in chunks)]
    gaps = [later - earlier for earlier, later in pairwise(lengths)]
    assert max(gaps) > 1
    assert all(gap >= interval for gap in gaps[1:-1])


def test_a_stop_string_inside_tokens_that_come_together_cuts_the_text_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made = FakeEngine(monkeypatch)
    engine = made(says(TEXT + "!" + TEXT), speculative_algorithm="NGRAM")
    answer = engine.generate("x>", {"max_new_tokens": 60, "temperature": 0, "stop": "c!"})
    engine.shutdown()
    assert answer["text"] == TEXT[:-1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "c!"}


def test_the_answer_says_how_guesses_fared_in_the_words_of_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, Any]] = []
    for arguments in ({}, {"speculative_algorithm": "NGRAM"}):
        engine = FakeEngine(monkeypatch)(says(TEXT), **arguments)
        params = {"max_new_tokens": 60, "temperature": 0}
        answers.append(engine.generate("x>", params, return_logprob=True, top_logprobs_num=2))
        engine.shutdown()
    plain, guessed = answers
    assert guessed["output_ids"] == plain["output_ids"]
    assert guessed["meta_info"]["output_top_logprobs"] == plain["meta_info"]["output_top_logprobs"]
    assert not any(name.startswith("spec_") for name in plain["meta_info"])
    meta = guessed["meta_info"]
    histogram = meta["spec_correct_drafts_histogram"]
    assert meta["spec_verify_ct"] == sum(histogram) < len(TEXT)
    assert meta["spec_num_correct_drafts"] == sum(i * count for i, count in enumerate(histogram))
    assert meta["spec_accept_rate"] == meta["spec_num_correct_drafts"] / meta["spec_num_proposed_drafts"]
    assert meta["spec_accept_length"] == meta["completion_tokens"] / meta["spec_verify_ct"]


# -- arguments ---------------------------------------------------------------------------------------------------------
def config(**arguments: Any) -> EngineConfig:
    return EngineConfig.from_kwargs(model_path="m", **arguments)


@pytest.mark.parametrize(
    "name",
    [
        "speculative_num_draft_tokens",
        "speculative_ngram_min_match_window_size",
        "speculative_ngram_max_match_window_size",
    ],
)
@pytest.mark.parametrize("algorithm", [None, "none"])
def test_sizes_of_guesses_without_guesses_are_refused(name: str, algorithm: str | None) -> None:
    with pytest.raises(ConfigError, match=f"{name}=4 has no effect without speculative_algorithm='NGRAM'"):
        config(speculative_algorithm=algorithm, **{name: 4})


@pytest.mark.parametrize(
    ("said", "on_cpu", "elsewhere"), [(None, True, False), ("none", False, False), ("NGRAM", True, True)]
)
def test_tokens_are_guessed_by_default_where_the_backend_says_so(
    said: str | None, on_cpu: bool, elsewhere: bool
) -> None:
    asked = config(speculative_algorithm=said)
    assert (draft_settings(asked, "NGRAM") is not None) == on_cpu
    assert (draft_settings(asked) is not None) == elsewhere


@pytest.mark.parametrize("device", ["cuda", "npu", "torch"])
def test_guesses_are_refused_where_they_could_change_an_answer(device: str) -> None:
    with pytest.raises(ConfigError, match=r"speculative_algorithm='NGRAM' is not possible on device"):
        config(speculative_algorithm="NGRAM", device=device)


def test_other_algorithms_of_sglang_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"speculative_algorithm='EAGLE' is not possible; choose one of NGRAM, none"):
        config(speculative_algorithm="EAGLE")


@pytest.mark.parametrize(
    ("given", "window"), [((None, None), (2, 12)), ((20, None), (20, 20)), ((None, 1), (1, 1)), ((3, 5), (3, 5))]
)
def test_one_bound_of_the_match_moves_the_other_out_of_its_way(given: Any, window: tuple[int, int]) -> None:
    sizes = {"speculative_ngram_min_match_window_size": given[0], "speculative_ngram_max_match_window_size": given[1]}
    assert config(speculative_algorithm="NGRAM", **sizes).ngram_match_window == window


def test_bounds_of_the_match_that_exclude_each_other_are_refused() -> None:
    sizes = {"speculative_ngram_min_match_window_size": 5, "speculative_ngram_max_match_window_size": 3}
    with pytest.raises(ConfigError, match="=5 is more than"):
        config(speculative_algorithm="NGRAM", **sizes)
