"""Tests of the tests: faults planted in the deciding column must be caught by the random trials."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from core_trials import Trial, run_trial

from mooli.batch import PageCopy, SamplingBatch, ScheduleBatch, TokenMasks
from mooli.cache.kv_cache import KVCache
from mooli.cache.radix_tree import TOKEN_BYTES, Insertion, Match, Node, RadixTree, token_key
from mooli.cache.request_pages import Admission, Given, RequestPages
from mooli.cache.states import States
from mooli.cache.turns import Turn
from mooli.scheduler import batch_builder
from mooli.scheduler import running as running_room
from mooli.scheduler.admission import AdmissionControl, PrefixWaits
from mooli.scheduler.batch_builder import BatchBuilder, Plan, Row
from mooli.scheduler.constraint import Constrained
from mooli.scheduler.drafts import Drafts
from mooli.scheduler.landing import Acceptance, Accepted, Landing, Sample
from mooli.scheduler.planning import Planner
from mooli.scheduler.request_state import RequestState
from mooli.scheduler.running import Running
from mooli.scheduler.scheduler import Scheduler
from mooli.types import FinishReason

pytestmark = pytest.mark.slow

MAX_TRIALS = 300

Plant = Callable[[pytest.MonkeyPatch], None]
Samples = list[tuple[Row, int]]
Masks = TokenMasks | None


def match_whole_prompt(patch: pytest.MonkeyPatch) -> None:
    """A prompt found whole in the cache leaves nothing to compute."""
    patch.setattr(RequestState, "match_limit", property(lambda state: state.num_tokens))


def logprob_start_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestState, "match_limit", property(lambda state: state.num_tokens - 1))


def no_lock(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RadixTree, "lock", lambda tree, node, below=None: None)
    patch.setattr(RadixTree, "unlock", lambda tree, node: tree._offer(node))


def leak_duplicate(patch: pytest.MonkeyPatch) -> None:
    original = RadixTree.insert

    def insert(tree: RadixTree, node: Node, key: bytes, pages: list[int]) -> Insertion:
        inserted = original(tree, node, key, pages)
        return Insertion(inserted.node, inserted.pages, [])

    patch.setattr(RadixTree, "insert", insert)


def leak_tail(patch: pytest.MonkeyPatch) -> None:
    original = KVCache.discard

    def discard(cache: KVCache, held: RequestPages) -> None:
        del held.pages[held.num_shared :]
        original(cache, held)

    patch.setattr(KVCache, "discard", discard)


def double_free(patch: pytest.MonkeyPatch) -> None:
    original = KVCache.discard

    def discard(cache: KVCache, held: RequestPages) -> None:
        last = held.pages[-1:]
        original(cache, held)
        cache._pool.free(last)

    patch.setattr(KVCache, "discard", discard)


def duplicate_not_switched(patch: pytest.MonkeyPatch) -> None:
    """The request goes on with its own page after that page was freed as a duplicate."""
    original = RadixTree.insert

    def insert(tree: RadixTree, node: Node, key: bytes, pages: list[int]) -> Insertion:
        inserted = original(tree, node, key, pages)
        return Insertion(inserted.node, list(pages), inserted.surplus)

    patch.setattr(RadixTree, "insert", insert)


def page_table_not_switched(patch: pytest.MonkeyPatch) -> None:
    """Pages switched on insertion do not reach the page table of the next step."""
    patch.setattr(BatchBuilder, "set_pages", lambda builder, req_index, pages, first=0: None)

    def grow_pages(builder: BatchBuilder, req_index: int, pages: list[int]) -> None:
        first = builder._num_pages[req_index]
        builder._page_table[req_index, first : len(pages)] = pages[first:]
        builder._num_pages[req_index] = len(pages)

    patch.setattr(BatchBuilder, "grow_pages", grow_pages)
    patch.setattr(PrefixWaits, "holds", lambda waits, state: False)  # duplicates are rare where requests wait


def page_table_not_cleared(patch: pytest.MonkeyPatch) -> None:
    """A request goes on with pages that the last one in its place had."""

    def leave(builder: BatchBuilder, req_index: int) -> None:
        builder._biases.pop(req_index, None)

    patch.setattr(BatchBuilder, "leave", leave)


def _patch_build(patch: pytest.MonkeyPatch, change: Callable[[ScheduleBatch], None]) -> None:
    original = BatchBuilder.build

    def build(builder: BatchBuilder, step: int, plan: Plan) -> ScheduleBatch:
        batch = original(builder, step, plan)
        change(batch)
        return batch

    patch.setattr(BatchBuilder, "build", build)


def position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    def change(batch: ScheduleBatch) -> None:
        batch.positions += np.repeat((batch.starts > 0).astype(np.int32), batch.lengths)

    _patch_build(patch, change)


def sample_position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    def change(batch: ScheduleBatch) -> None:
        batch.sampling.positions += 1

    _patch_build(patch, change)


def cow_not_done(patch: pytest.MonkeyPatch) -> None:
    _patch_build(patch, lambda batch: batch.copies.clear())


def cow_copies_too_little(patch: pytest.MonkeyPatch) -> None:
    def change(batch: ScheduleBatch) -> None:
        batch.copies = [PageCopy(copy.source, copy.target, copy.num_tokens - 1) for copy in batch.copies]

    _patch_build(patch, change)


def cow_copies_too_much(patch: pytest.MonkeyPatch) -> None:
    """One token more than matched is taken from the source and counted as computed."""
    original = KVCache.agreeing

    def match(cache: KVCache, namespace: str, key: bytes, max_tokens: int) -> Match:
        found = original(cache, namespace, key, max_tokens)
        has_room = found.head_tokens + 1 < cache.page_size
        if found.head_tokens and has_room and len(found.pages) * cache.page_size + found.head_tokens < max_tokens:
            found.head_tokens += 1
        return found

    patch.setattr(KVCache, "agreeing", match)


def cow_source_unlocked(patch: pytest.MonkeyPatch) -> None:
    """The page to copy from may be evicted, and written, in the step that copies it."""
    original = KVCache.open

    def open_unlocked(cache: KVCache, match: Match, given: Given | None = None) -> RequestPages:
        held = original(cache, match, given)
        cache.drop_copy_source(held)
        return held

    patch.setattr(KVCache, "open", open_unlocked)


def insert_uncomputed(patch: pytest.MonkeyPatch) -> None:
    """Pages reach the tree before their tokens are computed."""

    def share(running: Running, state: RequestState) -> None:
        held, page_size = state.pages, running._cache.page_size
        if held is None or held.node is None:
            return
        first, last = held.num_shared, min(state.num_tokens // page_size, len(held.pages))
        if last > first:
            running._cache.insert(held, token_key(state.tokens[first * page_size : last * page_size]))
            running._tables.set_pages(state.req_index, held.pages, first)

    patch.setattr(Running, "share_computed", share)


def insert_last_sampled_token(patch: pytest.MonkeyPatch) -> None:
    """An ended request leaves its last token in the tree, whose KV was never computed."""
    original = Running.leave

    def leave(running: Running, state: RequestState, *, keep: bool) -> None:
        held = state.pages
        if keep and held is not None:
            room = len(held.pages) * running._cache.page_size
            state.num_computed = min(state.num_tokens, room)
        original(running, state, keep=keep)

    patch.setattr(Running, "leave", leave)


def namespace_ignored(patch: pytest.MonkeyPatch) -> None:
    """Tenants share pages. Outputs stay the same, as the fake model has one KV for all."""
    original = KVCache.agreeing
    patch.setattr(KVCache, "agreeing", lambda cache, _, key, max_tokens: original(cache, "", key, max_tokens))


def failed_step_kept(patch: pytest.MonkeyPatch) -> None:
    """What a failed step should have computed is cached as if it had been."""
    original = Scheduler.fail

    def fail(scheduler: Scheduler, batch: ScheduleBatch, exc: BaseException) -> None:
        assert scheduler._in_flight is not None
        for row in scheduler._in_flight[1]:
            row.state.num_computed = row.start + row.length
        original(scheduler, batch, exc)

    def end(landing: Landing, state: RequestState, finish: object, out: object = None, *, keep: bool = True) -> None:
        original_end(landing, state, finish, out, keep=True)  # type: ignore[arg-type]

    original_end = Landing.end
    patch.setattr(Scheduler, "fail", fail)
    patch.setattr(Landing, "end", end)


def preempted_goes_on(patch: pytest.MonkeyPatch) -> None:
    """A preempted request resumes as if its pages were still its own."""
    original = AdmissionControl._admit

    def admit(admission: AdmissionControl, state: RequestState, plan: Plan, promised_pages: int) -> bool:
        admitted = original(admission, state, plan, promised_pages)
        if admitted and state.num_preemptions and plan.rows[-1].length > 1:
            row = plan.rows[-1]
            row.start, row.length = row.start + 1, row.length - 1
        return admitted

    patch.setattr(AdmissionControl, "_admit", admit)


def split_forgets_locks(patch: pytest.MonkeyPatch) -> None:
    original = RadixTree._split

    def split(tree: RadixTree, node: Node, num_pages: int) -> Node:
        upper = original(tree, node, num_pages)
        if upper is not node:
            upper.num_locks = 0
        return upper

    patch.setattr(RadixTree, "_split", split)


def match_ignores_end_of_span(patch: pytest.MonkeyPatch) -> None:
    """A child whose first page matches is taken whole."""
    original = RadixTree.match

    def match(tree: RadixTree, namespace: str, key: bytes, max_tokens: int) -> Match:
        found = original(tree, namespace, key, max_tokens)
        child = found.child
        limit = max_tokens * TOKEN_BYTES // tree._page_bytes
        if child is not None and found.child_pages and len(child.key) % tree._page_bytes == 0:
            more = child.pages[found.child_pages :]
            if more and len(found.pages) + len(more) <= limit:
                found.pages += more
                found.child_pages, found.head_tokens = len(child.pages), 0
        return found

    patch.setattr(RadixTree, "match", match)


def finishes_twice(patch: pytest.MonkeyPatch) -> None:
    original = Landing.end

    def end(landing: Landing, state: RequestState, finish: object, out: object = None, *, keep: bool = True) -> None:
        original(landing, state, finish, out, keep=keep)  # type: ignore[arg-type]
        if finish.type == "abort":  # type: ignore[attr-defined]
            landing.outputs.append(landing._output(state, finish))  # type: ignore[arg-type]

    patch.setattr(Landing, "end", end)


def waits_for_ever(patch: pytest.MonkeyPatch) -> None:
    """A request that waits for another's prefix goes on waiting after that one has ended."""

    def holds(waits: PrefixWaits, state: RequestState) -> bool:
        return state.leader is not None or original(waits, state)

    original = PrefixWaits.holds
    patch.setattr(PrefixWaits, "holds", holds)


def bias_not_lifted(patch: pytest.MonkeyPatch) -> None:
    """Stopping ids stay forbidden after `min_new_tokens`."""
    original = BatchBuilder.enter

    def enter(builder: BatchBuilder, state: RequestState) -> None:
        original(builder, state)
        bias = builder._biases.get(state.req_index)
        if bias is not None:
            bias.always = bias.early

    patch.setattr(BatchBuilder, "enter", enter)


def wrong_drafts_taken(patch: pytest.MonkeyPatch) -> None:
    """What was sampled after a draft is taken without looking whether the draft was right."""
    original = Acceptance.take

    def take(acceptance: Acceptance, row: Row, samples: list[Sample]) -> Accepted:
        row.drafts = [token_id for token_id, _ in samples[:-1]]
        return original(acceptance, row, samples)

    patch.setattr(Acceptance, "take", take)


def wrong_drafts_counted_as_computed(patch: pytest.MonkeyPatch) -> None:
    """What the step stored for wrong drafts counts as the KV of what was sampled instead."""
    original = Acceptance.take

    def take(acceptance: Acceptance, row: Row, samples: list[Sample]) -> Accepted:
        accepted = original(acceptance, row, samples)
        row.state.num_computed = max(row.state.num_computed, row.start + row.length - 1)
        return accepted

    patch.setattr(Acceptance, "take", take)


def drafts_left_out_of_the_history(patch: pytest.MonkeyPatch) -> None:
    """Penalties and `min_new_tokens` do not see the drafts before the token."""
    original = BatchBuilder._sampling

    def sampling(builder: BatchBuilder, samples: Samples, indices: np.ndarray, masks: Masks) -> SamplingBatch:
        batch = original(builder, [(row, 0) for row, _ in samples], indices, masks)
        batch.positions = original(builder, samples, indices, masks).positions
        return batch

    patch.setattr(BatchBuilder, "_sampling", sampling)


def drafts_drawn_at_one_position(patch: pytest.MonkeyPatch) -> None:
    """All tokens sampled in a row get the random number of its first."""
    original = BatchBuilder._sampling

    def sampling(builder: BatchBuilder, samples: Samples, indices: np.ndarray, masks: Masks) -> SamplingBatch:
        batch = original(builder, samples, indices, masks)
        batch.positions = original(builder, [(row, 0) for row, _ in samples], indices, masks).positions
        return batch

    patch.setattr(BatchBuilder, "_sampling", sampling)


def draft_pages_not_grown(patch: pytest.MonkeyPatch) -> None:
    """Drafts are stored past the pages that the request has."""
    original = Planner._add_drafts

    def add_drafts(planner: Planner, drafts: Drafts, plan: Plan) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Running, "grow", lambda *arguments: None)
            original(planner, drafts, plan)

    patch.setattr(Planner, "_add_drafts", add_drafts)


def begins_without_a_page(patch: pytest.MonkeyPatch) -> None:
    """A step may be begun whose tokens have no page."""
    original = Planner._may_begin_next

    def may_begin_next(planner: Planner, plan: Plan) -> bool:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Running, "grow", lambda *arguments: None)
            return original(planner, plan)

    patch.setattr(Planner, "_may_begin_next", may_begin_next)


def begun_tokens_counted_as_computed(patch: pytest.MonkeyPatch) -> None:
    """What a step had begun with is taken for done."""
    original = Running.leave

    def leave(running: Running, state: RequestState, *, keep: bool) -> None:
        if state.pages is not None and keep and len(state.pages.pages) * running._cache.page_size >= state.num_tokens:
            state.num_computed = state.num_tokens
        original(running, state, keep=keep)

    patch.setattr(Running, "leave", leave)


def stop_ids_seen_only_at_the_end(patch: pytest.MonkeyPatch) -> None:
    """An output goes on behind a stopping id if the tokens after it come in the same step."""
    original = Acceptance.take

    def take(acceptance: Acceptance, row: Row, samples: list[Sample]) -> Accepted:
        stop_ids, row.state.stop_ids = row.state.stop_ids, frozenset() if row.drafts else row.state.stop_ids
        accepted = original(acceptance, row, samples)
        row.state.stop_ids = stop_ids
        return accepted

    patch.setattr(Acceptance, "take", take)


def admits_beside_a_preemption(patch: pytest.MonkeyPatch) -> None:
    """Who has just given way may take its pages back at once."""
    original = Planner._continue_running

    def continue_running(planner: Planner, plan: Plan, mixed_prefill_tokens: int) -> None:
        original(planner, plan, mixed_prefill_tokens)
        if planner.waiting and plan.num_preempted:
            planner.admission.admit_waiting(plan)

    patch.setattr(Planner, "_continue_running", continue_running)


def masks_of_the_last_step(patch: pytest.MonkeyPatch) -> None:
    """A batch made from the last one keeps its masks."""
    original = BatchBuilder._next

    def following(builder: BatchBuilder, step: int, plan: Plan, last: ScheduleBatch) -> ScheduleBatch:
        batch = original(builder, step, plan, last)
        batch.sampling.masks = last.sampling.masks
        return batch

    patch.setattr(BatchBuilder, "_next", following)


def masks_one_row_off(patch: pytest.MonkeyPatch) -> None:
    """Rows that sample nothing, or have no constraint, are not counted."""
    original = BatchBuilder._masks

    def masks(builder: BatchBuilder, rows: list[Row]) -> Masks:
        made = original(builder, rows)
        if made is not None:
            made.rows = np.sort(made.rows)[::-1].copy()
        return made

    patch.setattr(BatchBuilder, "_masks", masks)


def constraint_lost_by_preemption(patch: pytest.MonkeyPatch) -> None:
    original = AdmissionControl.preempt

    def preempt(admission: AdmissionControl, state: RequestState) -> None:
        original(admission, state)
        state.constrained = None

    patch.setattr(AdmissionControl, "preempt", preempt)


def constraint_never_ends(patch: pytest.MonkeyPatch) -> None:
    original = Constrained.advance

    def advance(constrained: Constrained, token_ids: list[int]) -> FinishReason | None:
        finish = original(constrained, token_ids)
        return None if finish is not None and finish.type == "stop" else finish

    patch.setattr(Constrained, "advance", advance)


def only_stop_banned_early(patch: pytest.MonkeyPatch) -> None:
    """`min_new_tokens` leaves nothing where a constraint allows nothing but a stopping id."""
    patch.setattr(batch_builder, "holds_no_other", lambda words, token_ids: False)


def drafts_masked_as_the_first(patch: pytest.MonkeyPatch) -> None:
    """All tokens sampled in a row get the mask of its first."""
    original = Constrained.masks

    def masks(constrained: Constrained, draft_ids: list[int], allowed: np.ndarray) -> bool:
        is_filled = original(constrained, draft_ids, allowed)
        allowed[:] = allowed[:1]
        return is_filled

    patch.setattr(Constrained, "masks", masks)


def drafts_not_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Constrained, "cut", lambda constrained, draft_ids: draft_ids)


def constraint_told_of_wrong_drafts(patch: pytest.MonkeyPatch) -> None:
    """A constraint moves with what was sampled after a wrong guess too."""
    original = Acceptance.take

    def take(acceptance: Acceptance, row: Row, samples: list[Sample]) -> Accepted:
        accepted = original(acceptance, row, samples)
        if row.state.constrained is not None and len(accepted.token_ids) < len(samples) and accepted.finish is None:
            row.state.constrained.advance([samples[-1][0]])
        return accepted

    patch.setattr(Acceptance, "take", take)


def background_passes_others(patch: pytest.MonkeyPatch) -> None:
    """What waits in the background begins though another request waits that could."""
    original = AdmissionControl.admit_waiting
    patch.setattr(AdmissionControl, "admit_waiting", lambda admission, plan: [original(admission, plan)] != [])


def background_keeps_its_rank(patch: pytest.MonkeyPatch) -> None:
    """The oldest goes first under lack of pages, in the background or not."""
    patch.setattr(running_room, "_rank", lambda state: state.rank[1:])


BUGS: list[Plant] = [
    background_passes_others,
    background_keeps_its_rank,
    masks_of_the_last_step,
    masks_one_row_off,
    constraint_lost_by_preemption,
    constraint_never_ends,
    only_stop_banned_early,
    admits_beside_a_preemption,
    match_whole_prompt,
    logprob_start_ignored,
    no_lock,
    leak_duplicate,
    leak_tail,
    double_free,
    duplicate_not_switched,
    page_table_not_switched,
    page_table_not_cleared,
    position_off_by_one,
    sample_position_off_by_one,
    cow_not_done,
    cow_copies_too_little,
    cow_copies_too_much,
    cow_source_unlocked,
    insert_uncomputed,
    insert_last_sampled_token,
    namespace_ignored,
    failed_step_kept,
    preempted_goes_on,
    split_forgets_locks,
    match_ignores_end_of_span,
    finishes_twice,
    waits_for_ever,
    bias_not_lifted,
    begins_without_a_page,
    begun_tokens_counted_as_computed,
]

DRAFT_BUGS: list[Plant] = [
    wrong_drafts_taken,
    wrong_drafts_counted_as_computed,
    drafts_left_out_of_the_history,
    drafts_drawn_at_one_position,
    draft_pages_not_grown,
    stop_ids_seen_only_at_the_end,
    drafts_masked_as_the_first,
    drafts_not_cut,
    constraint_told_of_wrong_drafts,
]


def state_not_copied(patch: pytest.MonkeyPatch) -> None:
    """A request that begins on a snapshot goes on from what its slot held before."""
    original = KVCache.admit

    def admit(cache: KVCache, *args: Any, **kwargs: Any) -> Admission | None:
        admission = original(cache, *args, **kwargs)
        return admission and replace(admission, state_copies=[])

    patch.setattr(KVCache, "admit", admit)


def pages_used_without_a_state(patch: pytest.MonkeyPatch) -> None:
    original = KVCache._usable

    def usable(cache: KVCache, match: Match) -> tuple[Match, int]:
        return match, original(cache, match)[1]

    patch.setattr(KVCache, "_usable", usable)


def state_of_wrong_drafts_kept(patch: pytest.MonkeyPatch) -> None:
    original = States.end_step

    def end_step(states: States, held: RequestPages, num_computed: int) -> bool:
        return original(states, held, held.state_tokens)

    patch.setattr(States, "end_step", end_step)


def snapshot_a_token_late(patch: pytest.MonkeyPatch) -> None:
    original = RadixTree.keep_state

    def keep_state(tree: RadixTree, node: Node, num_back: int, slot: int) -> bool:
        return original(tree, node, max(0, num_back - 1), slot)

    patch.setattr(RadixTree, "keep_state", keep_state)


def states_not_moved_by_a_split(patch: pytest.MonkeyPatch) -> None:
    original = RadixTree._move_states

    def move(tree: RadixTree, node: Node, states: dict[int, int], by: int) -> None:
        original(tree, node, states, max(0, by))

    patch.setattr(RadixTree, "_move_states", move)


def states_of_evicted_pages_leak(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RadixTree, "take_lost_states", lambda tree: [])


def snapshots_beyond_their_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(States, "make_room", lambda states: states.num_free > 1)


def state_freed_and_kept(patch: pytest.MonkeyPatch) -> None:
    original = KVCache.release

    def release(cache: KVCache, held: RequestPages, key: bytes, turn: Turn | None = None) -> None:
        slot = held.state
        original(cache, held, key, turn)
        if slot in cache._tree.snapshots:
            cache.states._slots.free([slot])

    patch.setattr(KVCache, "release", release)


STATE_BUGS: list[Plant] = [
    state_not_copied,
    pages_used_without_a_state,
    state_of_wrong_drafts_kept,
    snapshot_a_token_late,
    states_not_moved_by_a_split,
    states_of_evicted_pages_leak,
    snapshots_beyond_their_room,
    state_freed_and_kept,
]


def first_failing_trial(seeds: Iterable[int]) -> int | None:
    """The first seed whose trial fails, by whatever rule. A plant that no longer fits what it stands in for is not a
    fault that was found: TypeError is raised."""
    for seed in seeds:
        try:
            run_trial(seed)
        except TypeError:
            raise
        except Exception:
            return seed
    return None


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_random_trials_catch(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert first_failing_trial(range(MAX_TRIALS)) is not None, f"{plant.__name__} was not caught in {MAX_TRIALS} trials"


@pytest.mark.parametrize("plant", DRAFT_BUGS, ids=lambda plant: plant.__name__)
def test_random_trials_with_drafts_catch(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [seed for seed in range(4 * MAX_TRIALS) if Trial(seed).setting.drafts is not None]
    plant(monkeypatch)
    assert first_failing_trial(seeds) is not None, f"{plant.__name__} was not caught in {len(seeds)} trials"


@pytest.mark.parametrize("plant", STATE_BUGS, ids=lambda plant: plant.__name__)
def test_random_trials_with_recurrent_states_catch(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [seed for seed in range(2 * MAX_TRIALS) if Trial(seed).setting.num_snapshots is not None]
    plant(monkeypatch)
    assert first_failing_trial(seeds) is not None, f"{plant.__name__} was not caught in {len(seeds)} trials"
