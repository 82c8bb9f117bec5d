"""What a constraint does to the requests that have one, and nothing to those that have none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_scheduler import VOCAB, Bench, request, spans

from constraints import Automaton, Bold, Even, NotTwice, Rule, RuleConstraint, Spelled
from mooli.errors import RequestError
from mooli.scheduler.constraint import Constraint, holds_no_other
from mooli.scheduler.drafts import DraftSettings, ForcedSettings
from mooli.types import FinishReason, Request

FORCED = ForcedSettings(tokens_per_request=8, tokens_per_step=12)
DRAFTS = DraftSettings(tokens_per_request=8, tokens_per_step=64, shortest_match=1, longest_match=4)


class Listed:
    """Allows one id at each place of the output, and ends after the last."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = token_ids

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        allowed = np.zeros(VOCAB, np.bool_)
        allowed[self.token_ids[len(output)]] = True
        return allowed

    def has_ended(self, output: Sequence[int]) -> bool:
        return len(output) == len(self.token_ids)


class Stuck(Even):
    """Allows nothing after `length` tokens, and does not say that it has ended."""

    def __init__(self, length: int) -> None:
        super().__init__(VOCAB)
        self.length = length

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        return super().allowed(output) if len(output) < self.length else np.zeros(VOCAB, np.bool_)


def by_rid(rules: dict[str, Rule]) -> Callable[[Request], Constraint | None]:
    return lambda request: RuleConstraint(rules[request.rid]) if request.rid in rules else None


def bench(rules: dict[str, Rule], **settings: Any) -> Bench:
    return Bench(constraints=by_rid(rules), **settings)


# -- what is sampled --------------------------------------------------------------------------------------------------
def test_only_what_is_allowed_is_sampled_and_rows_beside_it_are_as_they_would_be() -> None:
    free = Bench()
    free.add(request("other", [9, 8], 12))
    free.run()
    beside = bench({"even": Even(VOCAB), "twice": NotTwice(VOCAB)})
    beside.add(request("even", [1, 2, 3], 12), request("other", [9, 8], 12), request("twice", [5], 12))
    beside.run()
    assert beside.tokens("other") == free.tokens("other")
    assert len(beside.tokens("even")) == 12 and all(token % 2 == 0 for token in beside.tokens("even"))
    made = beside.tokens("twice")
    assert all(one != following for one, following in pairwise(made))


def test_steps_without_a_constrained_row_that_samples_have_no_masks() -> None:
    step = bench({"a": Even(VOCAB)}, max_batch_tokens=4)
    step.add(request("b", [5], 2))
    step.step()
    step.add(request("a", list(range(20)), 2))
    step.run()
    has_mask = [batch.sampling.masks is not None for batch in step.batches]
    assert has_mask == [False] * 6 + [True] * 2, "from the last chunk of its prompt on"


def test_a_mask_has_a_row_for_each_token_of_a_constrained_row_and_none_for_others() -> None:
    step = bench({"a": Even(VOCAB)}, next_token=lambda context: 8, drafts=DRAFTS)
    step.add(request("a", [2, 8, 8, 8, 8], 9), request("b", [3, 8, 8, 8], 9))
    step.step()
    step.step()
    batch = step.batches[1]
    masks = batch.sampling.masks
    assert masks is not None and batch.num_samples.min() > 1
    num_a, num_b = batch.num_samples.tolist()
    assert masks.rows.tolist() == [*range(num_a), *[-1] * num_b]
    assert masks.allowed.shape == (num_a, -(-VOCAB // 32)) and masks.allowed.dtype == np.uint32
    assert masks.ids_of(0, VOCAB).tolist() == Even(VOCAB).allowed([]).tolist()  # type: ignore[union-attr]
    assert masks.ids_of(num_a, VOCAB) is None
    assert not masks.ids_of(0, 1024)[VOCAB:].any(), "what a constraint says of ids that do not exist is cleared"  # type: ignore[index]


def test_samples_of_one_prompt_have_constraints_of_their_own() -> None:
    made: list[RuleConstraint] = []

    def maker(request: Request) -> RuleConstraint:
        made.append(RuleConstraint(Automaton(VOCAB, 3)))
        return made[-1]

    step = Bench(constraints=maker)
    step.add(*(request(f"sample {i}", [1, 2, 3], 10, seed=i) for i in range(3)))
    step.run()
    assert [constraint.output for constraint in made] == [step.tokens(f"sample {i}") for i in range(3)]


def test_a_step_may_still_begin_before_its_masks_are_known() -> None:
    """They restrict what is sampled at the end of the step, and nothing that is computed before."""
    step = bench({"a": NotTwice(VOCAB)})
    step.add(request("a", [1, 2, 3], 9), request("b", [4], 9))
    for _ in range(8):
        step.step()
    assert all(batch.may_begin_next for batch in step.batches)
    made = step.tokens("a")
    for batch, before in zip(step.batches[1:], made, strict=False):
        masks = batch.sampling.masks
        assert masks is not None
        assert np.flatnonzero(~masks.ids_of(0, VOCAB)).tolist() == [before], "each step has the mask of its own place"  # type: ignore[operator]


# -- guesses ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_guesses_are_cut_where_the_constraint_does_not_allow_them(allowed: int) -> None:
    step = bench({"a": Listed(*[8] * (1 + allowed), 7, *[8] * 9)}, next_token=lambda context: 8, drafts=DRAFTS)
    step.add(request("a", [1, 8, 8, 8, 8, 8, 9, 1], 9))
    step.step()
    step.step()
    assert step.batches[1].num_samples.tolist() == [1 + allowed]
    assert step.tokens("a") == [8] * (1 + allowed) + [7], "and what comes instead is sampled in the same step"


def test_no_guess_reaches_the_end_of_a_constraint() -> None:
    step = bench({"a": Listed(8, 8, 8)}, next_token=lambda context: 8, drafts=DRAFTS)
    step.add(request("a", [2, 8, 8, 8, 8, 8, 8], 9))
    step.run()
    assert step.tokens("a") == [8, 8, 8]
    assert [batch.num_samples.tolist() for batch in step.batches] == [[1], [2]]
    assert step.last("a").finish == FinishReason("stop", matched=8)


def mostly_in_turn(context: list[int]) -> int:
    return (5, 6, 9)[len(context) % 3 if len(context) % 7 else 0]


def test_a_wrong_guess_leaves_no_trace_in_the_constraint() -> None:
    """The constraint itself proves it: it fails if it is told of a token that does not follow."""
    rules: dict[str, Rule] = {"a": NotTwice(VOCAB)}
    answers = []
    for drafts in (None, DRAFTS):
        step = bench(rules, next_token=mostly_in_turn, drafts=drafts)
        step.add(request("a", [5, 6, 9, 5, 6, 9, 5, 6], 40))
        step.run()
        answers.append((step.tokens("a"), step.last("a").finish))
        if drafts is not None:
            assert 0 < step.scheduler.counters.correct_drafts < step.scheduler.counters.proposed_drafts
    assert answers[0] == answers[1]


# -- forced runs -------------------------------------------------------------------------------------------------------
class Joined:
    """Ids at places of the output that are fixed, and anything between; nothing ends it."""

    def __init__(self, **at: int) -> None:
        self.at = {int(place[1:]): token_id for place, token_id in at.items()}

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        only = self.at.get(len(output))
        return np.ones(VOCAB, np.bool_) if only is None else np.arange(VOCAB) == only

    def has_ended(self, output: Sequence[int]) -> bool:
        return False


def num_tokens_a_step(step: Bench, rid: str = "a") -> list[int]:
    return [len(out.new_token_ids) for out in step.outputs[rid]]


def test_what_is_forced_comes_in_one_step_with_the_token_after_it_from_the_first_of_an_answer_on() -> None:
    rule = Joined(p0=3, p1=4, p2=5, p5=6, p6=7)
    plain, forced = bench({"a": rule}), bench({"a": rule}, forced=FORCED)
    for step in (plain, forced):
        step.add(request("a", [1, 2, 3], 10, return_logprob=True, num_top_logprobs=2))
        step.run()
    assert num_tokens_a_step(plain) == [1] * 10
    assert num_tokens_a_step(forced) == [4, 1, 3, 1, 1]
    assert forced.tokens("a") == plain.tokens("a")
    logprobs = [[entry for out in step.outputs["a"] for entry in out.logprobs] for step in (plain, forced)]
    assert logprobs[0] == logprobs[1] and len(logprobs[0]) == 10
    assert forced.last("a").completion_tokens == 10 and forced.last("a").finish == FinishReason("length", length=10)
    assert forced.scheduler.counters.forced_tokens == 5 == forced.scheduler.counters.generated_tokens - 5


def test_forced_runs_take_nothing_from_requests_without_a_constraint() -> None:
    plain, forced = bench({"a": Spelled(VOCAB, 1)}), bench({"a": Spelled(VOCAB, 1)}, forced=FORCED)
    for step in (plain, forced):
        step.add(request("b", [9, 8], 12), request("a", [1, 2, 3], 40))
        step.run()
    assert forced.tokens("b") == plain.tokens("b") and num_tokens_a_step(forced, "b") == [1] * 12
    assert forced.tokens("a") == plain.tokens("a") and max(num_tokens_a_step(forced)) == 8


def test_a_forced_run_is_cut_by_its_settings_and_by_what_the_step_has_left() -> None:
    rules: dict[str, Rule] = {"a": Listed(*range(30)), "b": Listed(*range(30))}
    step = bench(rules, forced=FORCED)
    step.add(request("a", [1], 40), request("b", [2], 40))
    step.step()
    assert spans(step.batches[0]) == [(0, 9), (0, 5)], "eight of one request, twelve of a step"
    step.run()
    assert step.tokens("a") == step.tokens("b") == list(range(30))
    beside = bench(rules, forced=FORCED, mixed_prefill_tokens=3)
    beside.add(request("c", [7], 40))
    beside.step()
    beside.add(request("a", [1], 40))
    beside.step()
    assert beside.batches[1].lengths.tolist() == [1, 3], "streams wait for it no longer than for a prompt"


def test_a_prompt_in_chunks_goes_on_with_what_is_forced_where_it_ends() -> None:
    step = bench({"a": Listed(*range(6))}, forced=FORCED, max_batch_tokens=8)
    step.add(request("a", list(range(20, 32)), 40))
    step.run()
    assert [spans(batch)[0] for batch in step.batches] == [(0, 8), (8, 8), (16, 1)]
    assert [batch.num_samples.tolist() for batch in step.batches] == [[0], [5], [1]]
    assert step.tokens("a") == list(range(6))


def test_a_forced_run_ends_before_the_length_does_and_before_the_constraint_does() -> None:
    step = bench({"a": Listed(*range(6)), "b": Listed(*range(6))}, forced=FORCED)
    step.add(request("a", [1], 4), request("b", [1], 40, ignore_eos=True))
    step.run()
    assert (step.tokens("a"), step.last("a").finish) == ([0, 1, 2, 3], FinishReason("length", length=4))
    assert (step.tokens("b"), step.last("b").finish) == (list(range(6)), FinishReason("stop", matched=5))
    assert [batch.lengths.tolist() for batch in step.batches] == [[4, 6]], "no token is computed that cannot count"


@pytest.mark.parametrize(("min_new_tokens", "expected"), [(0, [4, 6]), (2, [4, 6, 7])])
def test_a_stop_in_a_forced_run_stops_as_it_does_without(min_new_tokens: int, expected: list[int]) -> None:
    for forced in (None, FORCED):
        step = bench({"a": Listed(4, 6, 7, 8)}, forced=forced)
        stops = frozenset({6, 7})
        step.add(request("a", [1], 20, stop_token_ids=stops, min_new_tokens=min_new_tokens))
        step.run()
        assert (step.tokens("a"), step.last("a").finish) == (expected, FinishReason("stop", matched=expected[-1]))


def test_preempted_requests_go_on_with_what_is_forced() -> None:
    rules: dict[str, Rule] = {rid: Spelled(VOCAB, seed) for seed, rid in enumerate("abc")}
    roomy, tight = bench(rules), bench(rules, forced=FORCED, num_pages=12, enabled=False)
    for step in (roomy, tight):
        step.add(*(request(rid, [1, 2, 3, ord(rid)], 36) for rid in rules))
        step.run()
    assert tight.scheduler.counters.preemptions and tight.scheduler.counters.forced_tokens > 30
    assert {rid: tight.tokens(rid) for rid in rules} == {rid: roomy.tokens(rid) for rid in rules}


def test_a_request_can_be_ended_while_a_forced_run_is_computed() -> None:
    step = bench({"a": Listed(*range(30))}, forced=FORCED)
    step.add(request("a", [1, 2], 40))
    step.step()
    batch = step.scheduler.schedule()
    assert batch is not None and batch.num_tokens == 9
    assert step.scheduler.abort("a")
    outs = step.scheduler.update(batch, step.runner.execute(batch))
    step.scheduler.check()
    assert [(out.finish and out.finish.type, out.new_token_ids) for out in outs] == [("abort", [])]
    step.add(request("again", [1, 2, *range(12)], 1))
    step.run()
    assert step.last("again").cached_tokens == 11, "what was known counts, the run does not"


def test_guesses_go_on_behind_a_forced_run_and_are_counted_apart() -> None:
    """The model counts to seven for ever. Of that the constraint forces two ids, and a third that is another."""
    settings = DraftSettings(4, 64, 1, 12)
    step = bench(
        {"a": Joined(p5=5, p6=6, p12=7)}, next_token=lambda ids: (ids[-1] + 1) % 8, drafts=settings, forced=FORCED
    )
    step.add(request("a", [*range(8), *range(8)], 18))
    step.run()
    assert step.tokens("a") == [*range(8), *range(4), 7, *range(5)]
    assert num_tokens_a_step(step) == [1, 4, 6, 2, 4, 1], "three guesses, three behind two forced, one before the 7"
    counters, drafts = step.scheduler.counters, step.last("a").drafts
    assert (counters.proposed_drafts, counters.correct_drafts, counters.forced_tokens) == (10, 10, 2)
    assert drafts is not None and drafts.histogram == (1, 1, 0, 3)


def test_what_is_taken_for_forced_and_is_not_costs_time_alone() -> None:
    answers = []
    for maker in (RuleConstraint, Bold):
        step = Bench(constraints=lambda request, maker=maker: maker(Spelled(VOCAB, 1)), forced=FORCED)  # type: ignore[misc]
        step.add(request("a", [1, 2, 3], 40))
        step.run()
        answers.append((step.tokens("a"), step.last("a").finish))
        computed = step.num_computed
    assert answers[0] == answers[1] and computed > 3 + len(answers[0][0]) - 1


# -- the end ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_request_stops_with_its_constraint(ignore_eos: bool) -> None:
    step = bench({"a": Listed(4, 6, 2)})
    step.add(request("a", [1], 20, ignore_eos=ignore_eos, eos_ids=frozenset({2})))
    step.run()
    assert (step.tokens("a"), step.last("a").finish) == ([4, 6, 2], FinishReason("stop", matched=2))


def test_an_output_that_is_complete_at_its_longest_has_stopped() -> None:
    step = bench({"complete": Listed(4, 6, 2), "cut": Listed(4, 6, 2)})
    step.add(request("complete", [1], 3), request("cut", [1], 2))
    step.run()
    assert step.last("complete").finish == FinishReason("stop", matched=2)
    assert step.last("cut").finish == FinishReason("length", length=2)


def test_a_stopping_id_ends_a_request_before_its_constraint_does() -> None:
    step = bench({"a": Listed(4, 6, 2)})
    step.add(request("a", [1], 20, stop_token_ids=frozenset({6})))
    step.run()
    assert (step.tokens("a"), step.last("a").finish) == ([4, 6], FinishReason("stop", matched=6))


def test_min_new_tokens_bans_no_stop_that_is_all_that_may_follow() -> None:
    step = bench({"only": Listed(4, 2), "even": Even(VOCAB)}, next_token=lambda context: 2)
    step.add(
        *(request(rid, [1], 9, min_new_tokens=5, eos_ids=frozenset({2})) for rid in ("only", "even")),
    )
    step.run()
    assert (step.tokens("only"), step.last("only").finish) == ([4, 2], FinishReason("stop", matched=2))
    assert 2 not in step.tokens("even")[:5] and step.tokens("even")[5:] == [2]


# -- what fails -------------------------------------------------------------------------------------------------------
def check_failure(step: Bench, rid: str, num_tokens: int, words: str) -> None:
    finish = step.last(rid).finish
    assert finish is not None
    assert (finish.type, finish.status_code, finish.err_type) == ("error", 500, "ConstraintError")
    assert words in (finish.message or "")
    assert len(step.tokens(rid)) == step.last(rid).completion_tokens == num_tokens


@pytest.mark.parametrize("length", [0, 1, 4])
def test_where_nothing_is_allowed_the_request_ends_and_others_go_on(length: int) -> None:
    free = Bench()
    free.add(request("b", [4, 5], 9))
    free.run()
    step = bench({"a": Stuck(length)})
    step.add(request("a", [1, 2, 3], 9), request("b", [4, 5], 9))
    step.run()
    check_failure(step, "a", length, "allows no token")
    assert step.tokens("b") == free.tokens("b")
    step.add(request("again", [1, 2, 3, 4], 1))
    step.run()
    assert step.last("again").cached_tokens == 3, "what was computed for it stays cached"


class Breaks(RuleConstraint):
    """Raises in the method `where`, once the output has two tokens."""

    def __init__(self, where: str) -> None:
        super().__init__(Even(VOCAB))
        self.where = where

    def _may_break(self, where: str) -> None:
        if self.where == where and len(self.output) >= 2:
            raise MemoryError("states of the automaton")

    @property
    def has_ended(self) -> bool:
        self._may_break("has_ended")
        return False

    def num_allowed(self, draft_ids: Sequence[int]) -> int:
        self._may_break("num_allowed")
        return super().num_allowed(draft_ids)

    def forced(self, most: int) -> list[int]:
        self._may_break("forced")
        return []

    def mask(self, draft_ids: Sequence[int], allowed: NDArray[np.uint32]) -> None:
        where, self.where = self.where, ""
        super().mask(draft_ids, allowed)
        self.where = where
        self._may_break("mask")

    def advance(self, token_ids: Sequence[int]) -> None:
        where, self.where = self.where, ""
        super().advance(token_ids)
        self.where = where
        self._may_break("advance")


@pytest.mark.parametrize("where", ["has_ended", "num_allowed", "forced", "mask", "advance"])
def test_a_constraint_that_fails_ends_its_request_alone(where: str) -> None:
    step = Bench(
        constraints=lambda request: Breaks(where) if request.rid == "a" else None,
        next_token=lambda context: 8,
        drafts=DraftSettings(2, 64, 1, 4),
        forced=FORCED,
    )
    step.add(request("a", [1, 8], 9), request("b", [4, 8], 9))
    step.run()
    check_failure(step, "a", 3, "MemoryError: states of the automaton")
    assert len(step.tokens("b")) == 9


def test_a_constraint_that_cannot_be_made_refuses_the_request() -> None:
    def maker(request: Request) -> Constraint | None:
        if request.rid == "wrong":
            raise RequestError("no such grammar")
        return None

    step = Bench(constraints=maker)
    with pytest.raises(RequestError, match="no such grammar"):
        step.add(request("wrong", [1]))
    step.add(request("right", [1]))
    step.run()
    assert len(step.tokens("right")) == 4 and step.scheduler.counters.requests == 1


def test_ending_a_constrained_request_at_any_moment() -> None:
    for moment in range(6):
        step = bench({"a": Automaton(VOCAB, 5)}, max_batch_tokens=4)
        step.add(request("a", list(range(9)), 9), request("b", [4], 9))
        for _ in range(moment):
            step.step()
        assert step.scheduler.abort("a")
        step.run()
        assert step.last("a").finish is not None and step.last("a").finish.type == "abort"  # type: ignore[union-attr]
        assert len(step.tokens("b")) == 9


@pytest.mark.parametrize(
    ("words", "ids", "expected"),
    [
        ([4, 0], {2}, True),
        ([4, 0], {2, 40, 7}, True),
        ([4, 1], {2}, False),
        ([5, 1], {0, 2, 32, 1000}, True),
        ([0, 0], set(), True),
        ([1, 0], set(), False),
    ],
)
def test_whether_a_mask_holds_nothing_but_some_ids(words: list[int], ids: set[int], expected: bool) -> None:
    given = np.array(words, np.uint32)
    assert holds_no_other(given, frozenset(ids)) == expected
    assert given.tolist() == words
