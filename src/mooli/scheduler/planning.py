"""The second room of the scheduler: a step is planned.

Owns how many tokens each running request gets, who gives way where pages are too few, what is computed before it is
sampled (a run that a constraint forces, a guess), and how long a step may be that streams wait for. Never ends a
request and never sees what a step computed. The order in which a step is filled is that of `scheduler.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mooli.cache.kv_cache import KVCache
from mooli.cache.request_pages import RequestPages
from mooli.scheduler.admission import AdmissionControl, Waiting
from mooli.scheduler.batch_builder import Plan
from mooli.scheduler.drafts import Drafts, ForcedSettings
from mooli.scheduler.request_state import RequestState
from mooli.scheduler.running import Running
from mooli.scheduler.speed import PromptSpeed
from mooli.scheduler.stats import StepStats


@dataclass(slots=True, eq=False)
class Planner:
    """Plans steps of up to `max_batch_tokens`; with `drafts`, guesses are verified where a step is small; with
    `forced`, runs that constraints force are computed at once."""

    cache: KVCache
    waiting: Waiting
    background: Waiting
    running: Running
    admission: AdmissionControl
    max_batch_tokens: int
    drafts: Drafts | None
    forced: ForcedSettings | None = None
    prompts_waited: bool = False
    """The step planned last had nothing for prompts in progress."""

    def plan(self, mixed_prefill_tokens: int) -> Plan:
        """The next step; without rows if nothing can run. mixed_prefill_tokens: what prompts get beside streams."""
        plan = Plan(self.max_batch_tokens, self.max_batch_tokens, max(1, mixed_prefill_tokens // 4))
        self._continue_running(plan, mixed_prefill_tokens)
        have_begun = not self.waiting
        # Who just gave way would take the pages back.
        if self.waiting and plan.num_preempted == plan.num_background_preempted:
            have_begun = self.admission.admit_waiting(plan)
        if plan.rows:
            self._compute_ahead(plan)
        self._add_background(plan, mixed_prefill_tokens, may_begin=have_begun)
        if self.cache.states is None:
            plan.may_begin_next = self._may_begin_next(plan)
        else:  # a step that has begun and is not the next one would have overwritten states
            self._place_states(plan)
        return plan

    def _add_background(self, plan: Plan, mixed_prefill_tokens: int, *, may_begin: bool) -> None:
        """Requests in the background, behind all others. Beside others they have a small part of a step, for which
        those wait; and steps of their own are no longer than another may have to wait when it comes."""
        running = self.running.of_class(True)
        if not running and not self.background:
            return
        is_alone = not plan.rows and not self.waiting
        ones = [state for state in running if state.num_missing == 1]
        most = mixed_prefill_tokens if is_alone else max(1, mixed_prefill_tokens // BACKGROUND_PART)
        if is_alone:  # one token each is what makes a step worth while
            self._continue(ones, plan)
        kept = max(0, plan.tokens_left - most)
        plan.tokens_left -= kept
        if not is_alone:
            self._continue(ones, plan)
        more = [state for state in running if state.num_missing > 1]
        self._continue(self.background.by_turn(more, running), plan)
        if may_begin and not plan.num_preempted:
            self.admission.admit_background(plan)
        plan.tokens_left += kept
        if is_alone and plan.rows:
            self._compute_ahead(plan)

    def _compute_ahead(self, plan: Plan) -> None:
        if self.forced is not None:
            self._add_forced(self.forced, plan)
        if self.drafts is not None:
            self._add_drafts(self.drafts, plan)

    def _place_states(self, plan: Plan) -> None:
        for row in plan.rows:
            held = row.state.pages
            if held is not None:
                num_tried = len(row.drafts) - row.num_forced
                row.states = self.cache.begin_step(held, row.start, row.length, num_tried)

    def _continue_running(self, plan: Plan, mixed_prefill_tokens: int) -> None:
        one_missing: list[RequestState] = []
        more_missing: list[RequestState] = []
        running = self.running.of_class(False)
        for state in running:
            (one_missing if state.num_tokens - state.num_computed == 1 else more_missing).append(state)
        self._continue(one_missing, plan)
        # Streams wait for this step, and what else it computes is their gap; or another client may come while it runs.
        if plan.rows or self.waiting.has_known_several:
            plan.tokens_left = min(plan.tokens_left, mixed_prefill_tokens)
        if self.waiting:
            # Every second step, so that a stream of newcomers does not hold up the prompts in progress.
            kept = plan.tokens_left // 2 if more_missing and self.prompts_waited else 0
            self.admission.admit_newcomers(plan, kept)
        before = plan.tokens_left
        if more_missing:
            self._continue(self.waiting.by_turn(more_missing, running), plan)
        self.prompts_waited = bool(more_missing) and plan.tokens_left >= before

    def _continue(self, states: list[RequestState], plan: Plan) -> None:
        page_size = self.cache.page_size
        for state in states:
            held = state.pages
            if held is None:  # preempted for one before it
                continue
            if not plan.tokens_left:
                break
            has_page = len(held.pages) * page_size > state.num_computed
            length = 1 if has_page and state.num_missing == 1 else self._make_room(state, held, plan)
            if length:
                plan.add(state, length)

    def _make_room(self, state: RequestState, held: RequestPages, plan: Plan) -> int:
        """Get pages for as many of the missing tokens as possible, at the cost of requests of lower rank if for none.

        Returns for how many; 0 means that the request must wait for those of higher rank.
        """
        while (room := self.cache.room(held, state.num_computed)) <= 0:
            victim = self.running.states[-1]
            if victim is state:
                return 0
            self.admission.give_way(victim, plan)
        length = min(state.num_missing, room, plan.most_for(state))
        if length < state.num_missing:
            length = self.cache.cut(state.num_computed, length)
        self.running.grow(state, held, state.num_computed + length)
        return length

    def _add_forced(self, forced: ForcedSettings, plan: Plan) -> None:
        """Have rows that sample go on with what their constraints force, the first token of an answer included.

        In any step, but after all else: such a token costs its row now or later, and now it needs no step of its own.
        """
        tokens_left = min(plan.tokens_left, forced.tokens_per_step)
        for row in plan.rows:
            state = row.state
            held, constrained = state.pages, state.constrained
            if constrained is None or held is None or not row.samples:
                continue
            most = min(tokens_left, forced.tokens_per_request, self._room_for_drafts(state, held))
            run = constrained.forced(most) if most > 0 else []
            if run:
                self.running.grow(state, held, state.num_tokens + len(run))
                plan.add_drafts(row, run)
                row.num_forced = len(run)
                tokens_left -= len(run)

    def _room_for_drafts(self, state: RequestState, held: RequestPages) -> int:
        """How many tokens a request may have computed before they are sampled: the token after the last of them may be
        its last, and only pages are taken that nobody else could need in the next step."""
        spare_pages = max(0, self.cache.num_available - len(self.running.states))
        room = (len(held.pages) + spare_pages) * self.cache.page_size
        return min(state.max_tokens - 1, room) - state.num_tokens

    def _add_drafts(self, drafts: Drafts, plan: Plan) -> None:
        """Have the rows verify guesses, behind what is forced, where all continue outputs and together are few."""
        rows = plan.rows
        tokens_left = min(plan.tokens_left, drafts.settings.tokens_per_step - sum(row.length for row in rows))
        if self.cache.states is not None:
            tokens_left = min(tokens_left, self.cache.states.room.num_tried)
        if tokens_left < 1 or not all(row.continues_output for row in rows):
            return
        for index, row in enumerate(rows):
            state, held = row.state, row.state.pages
            if held is None:
                continue
            run = row.drafts
            most = min(-(-tokens_left // (len(rows) - index)), self._room_for_drafts(state, held) - len(run))
            tokens, key_ids = state.tokens, state.key_ids
            if run:
                ahead = np.array(run, np.int32)
                tokens, key_ids = np.concatenate([tokens, ahead]), np.concatenate([key_ids, ahead])
            guesses = drafts.propose(tokens, key_ids, held, state.drafts, most)
            if guesses and state.constrained is not None:
                guesses = state.constrained.cut([*run, *guesses])[len(run) :]
            if guesses:
                self.running.grow(state, held, state.num_tokens + len(run) + len(guesses))
                plan.add_drafts(row, guesses)
                tokens_left -= len(guesses)

    def _may_begin_next(self, plan: Plan) -> bool:
        """Whether the next step is most likely this one's rows with one token more each: no request begins, waits for a
        prompt or ends by its length. Gets them the page for that token a step early, if nobody else could need it."""
        running = self.running
        waits = bool(self.waiting or self.background)
        if len(plan.rows) < len(running.states) or (waits and running.free_indices):
            return False
        cache = self.cache
        spare_pages = cache.num_available - len(running.states)
        for row in plan.rows:
            state, held, num_tokens = row.state, row.state.pages, row.start + row.length + 1
            if held is None or row.num_samples != 1 or num_tokens >= state.max_tokens:
                return False
            missing = cache.pages_for(num_tokens) - len(held.pages)
            if missing > 0:
                spare_pages -= missing
                if spare_pages < 0:
                    return False
                running.grow(state, held, num_tokens)
        return True


BACKGROUND_PART = 8
"""Of the tokens that prompts get beside streams, requests in the background get one in so many beside any others."""

STEP_S = 0.15
"""How long a step may be that streams wait for: a slow reader's pace of seven tokens a second."""


class Pace:
    """How many prompt tokens a step may take while streams wait for it, from the measured speed of prompts.

    A stream's gap is the length of the step beside it. Tokens are what a scheduler counts, milliseconds what a reader
    of a stream feels, and between them lies the speed of this machine with this model, which is known after the first
    prompts. least, most: bounds of the number, in tokens. Until a prompt has been measured it is `least`.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._speed = PromptSpeed(most)

    def learn(self, step: StepStats, seconds: float) -> None:
        """A step has taken `seconds`."""
        self._speed.learn(step, seconds)

    @property
    def prefill_tokens(self) -> int:
        return max(self._least, min(self._most, int(self._speed.tokens_per_s * STEP_S)))
