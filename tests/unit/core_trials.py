"""Random trials of the deciding column with the fake runner: the checks that every schedule must pass.

Owns the generator of trials, the reference (each request alone, straight from the fake model, without pages or batches)
and the rules compared. `test_random_trials` runs it on the code as it is, `test_planted_bugs` on code with faults.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np

from constraints import Automaton, Bold, Even, NotTwice, Rule, RuleConstraint, Spelled
from mooli.batch import SamplingBatch, ScheduleBatch
from mooli.cache.kv_cache import KVCache
from mooli.cache.states import StateRoom
from mooli.engine.core import EngineCore
from mooli.errors import PromptError
from mooli.runner.fake import FakeRunner, fake_logits, logprob_row, recurrent_states, sample, stored_values
from mooli.scheduler.constraint import ConstraintMaker
from mooli.scheduler.disk_tier import DiskTier
from mooli.scheduler.drafts import DraftSettings, ForcedSettings
from mooli.scheduler.host_tier import HostTier
from mooli.scheduler.request_state import RequestState
from mooli.scheduler.scheduler import Scheduler
from mooli.types import FIRST_CONTENT_ID, FinishReason, Pin, Request, RequestOutput, SamplingParams, TokenLogprobs

VOCAB = 20

HABIT_LOGIT = 9.0
"""A little above what any other id can have: penalties and chance can break a habit."""


@dataclass
class Setting:
    """Everything about an engine that a trial varies.

    is_crowded: all requests come at once and want long outputs, so that pages run out while they run. whole_pages:
    cached prefixes are used by the page. drafts: tokens are guessed, and the model has habits that can be guessed.
    num_clients: whose the requests are, in turn. constrained: most requests have a constraint. forced: and what it
    forces is computed at once. background: two of three requests are in the background. num_snapshots: the model has
    recurrent states, so many of which are kept for others, at least after every `snapshot_pages` pages; None: it has
    none. retention_share: of the pool, for what requests pin.
    """

    page_size: int
    num_pages: int
    max_batch_tokens: int
    max_running_requests: int
    context_length: int
    policy: str
    enabled: bool
    mixed_prefill_tokens: int | None = None
    abort_rate: float = 0.0
    failure_rate: float = 0.0
    nan_rate: float = 0.0
    is_crowded: bool = False
    whole_pages: bool = False
    drafts: DraftSettings | None = None
    priorities: bool = False
    num_clients: int = 1
    constrained: bool = False
    forced: ForcedSettings | None = None
    background: bool = False
    num_snapshots: int | None = None
    snapshot_pages: int = 2
    retention_share: float = 0.0

    @property
    def states(self) -> StateRoom | None:
        if self.num_snapshots is None:
            return None
        num_tried = self.drafts.tokens_per_step if self.drafts else 0
        num_running = min(self.max_running_requests, self.max_batch_tokens % 100000)
        return StateRoom(num_running, num_tried, self.num_snapshots, self.snapshot_pages * self.page_size)

    def engine(
        self,
        runner: FakeRunner,
        constraints: ConstraintMaker | None = None,
        disk: Callable[[KVCache], DiskTier] | None = None,
        host: Callable[[KVCache], HostTier | None] | None = None,
    ) -> tuple[EngineCore, Scheduler, KVCache]:
        granularity = self.page_size if self.whole_pages else 1
        cache = KVCache(
            self.num_pages,
            self.page_size,
            self.enabled,
            match_granularity_tokens=granularity,
            states=self.states,
            retention_share=self.retention_share,
            clock=count(step=1000).__next__,
        )
        scheduler = Scheduler(
            cache,
            max_batch_tokens=self.max_batch_tokens,
            max_running_requests=self.max_running_requests,
            context_length=self.context_length,
            vocab_size=VOCAB,
            policy=self.policy,
            mixed_prefill_tokens=self.mixed_prefill_tokens,
            drafts=self.drafts,
            forced=self.forced,
            priorities=self.priorities,
            constraints=constraints,
        )
        below = None if host is None else host(cache)
        if below is not None:
            scheduler.attach_host(below)
        if disk is not None:
            scheduler.attach_disk(disk(cache))
        return EngineCore(scheduler, runner), scheduler, cache


def random_setting(rng: random.Random) -> Setting:
    """Pools from barely enough to roomy, so that eviction and preemption happen in many trials."""
    is_crowded = rng.random() < 0.25
    page_size = rng.choice([1, 2, 3, 4] if is_crowded else [1, 2, 3, 4, 8, 16, 32])
    pool_tokens = rng.choice([rng.randint(30, 50), rng.randint(50, 150)])
    return Setting(
        page_size=page_size,
        num_pages=max(2, pool_tokens // page_size + 1),
        max_batch_tokens=rng.choice([5, 16, -1] if is_crowded else [1, 2, 5, 16, 64, -1]),
        max_running_requests=8 if is_crowded else rng.choice([1, 2, 4, 8]),
        context_length=rng.choice([25, 60, 1000]),
        policy=rng.choice(["fcfs", "fcfs", "lpm"]),
        enabled=rng.random() < 0.85,
        mixed_prefill_tokens=rng.choice([None, 1, 3, 8]),
        abort_rate=rng.choice([0.0, 0.0, 0.1]),
        failure_rate=rng.choice([0.0, 0.0, 0.0, 0.05]),
        nan_rate=rng.choice([0.0, 0.0, 0.0, 0.02]),
        is_crowded=is_crowded,
        drafts=random_drafts(rng) if rng.random() < 0.4 else None,
    )


def random_drafts(rng: random.Random) -> DraftSettings:
    shortest = rng.choice([1, 1, 2])
    return DraftSettings(rng.choice([2, 4, 6]), rng.choice([4, 8, 30]), shortest, rng.choice([shortest, 5]))


def habit(context: list[int]) -> int | None:
    """What a model with habits says after two given tokens, most of the time; None where it has to think."""
    before, last = (context[-2] if len(context) > 1 else 0), context[-1]
    follows = before % 2 * 7 + last * 3 + 1
    return None if follows % 7 == 0 else follows % VOCAB


def random_request(rng: random.Random, rid: str, stems: list[list[int]], is_crowded: bool) -> Request:
    """A request that begins like others do: with a stem, part of one, or an earlier conversation."""
    stem = rng.choice(stems)
    prompt = stem[: rng.randint(0, len(stem))] if rng.random() < 0.4 else list(stem)
    prompt += [rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 3, 8]) if prompt else rng.randint(1, 8))]
    max_new_tokens = 20 if is_crowded else rng.choice([0, 1, 2, 4, 8, 12, 25, None if rng.random() < 0.1 else 3])
    is_plain, is_penalised = rng.random() < 0.6, rng.random() < 0.5
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=0 if is_plain or max_new_tokens is None else rng.randint(0, max_new_tokens),
        temperature=rng.choice([0.0, 0.0, 1.0]),
        top_k=-1 if is_plain else rng.choice([-1, 1, 5]),
        frequency_penalty=rng.choice([0.0, 0.5]) if is_penalised else 0.0,
        repetition_penalty=rng.choice([1.0, 1.3]) if is_penalised else 1.0,
        logit_bias=() if is_plain else ((3, 2.0), (5, -1.0)),
        seed=rng.randrange(-5, 1 << 63),
        stop_token_ids=frozenset(rng.sample(range(VOCAB), 0 if is_plain else 2)),
        ignore_eos=is_crowded or rng.random() < 0.3,
    )
    return Request(
        rid=rid,
        prompt_ids=np.array(prompt, np.int32),
        key_ids=content_key(prompt, rid),
        sampling=sampling,
        eos_ids=frozenset({rng.randrange(VOCAB)}),
        return_logprob=rng.random() < 0.2,
        logprob_start=rng.randrange(len(prompt)) if rng.random() < 0.15 else None,
        num_top_logprobs=rng.choice([0, 2]),
        logprob_token_ids=rng.choice([(), (1, 7)]),
        namespace=rng.choice(["", "", "tenant"]),
        priority=rng.choice([0, 0, 0, 1]),
        **random_wishes(rid, len(prompt)),
    )


def random_wishes(rid: str, num_tokens: int) -> dict[str, Any]:
    """What a request says of how long its pages are worth keeping; most say nothing. By the trials' clock a pin may end
    within a step or long after."""
    rng = random.Random(f"wishes {rid}")
    pins = tuple(
        Pin(rng.choice([1e-6, 1e-4, 1.0]), rng.choice([1, 1, 2, 9]), rng.choice([None, rng.randint(1, num_tokens)]))
        for _ in range(rng.choice([0, 0, 1, 2]))
    )
    session = rng.choice(["", "", "a", "b"])
    return {"pins": pins, "session": session, "previous": rng.choice(["", "a"]) if session else ""}


def content_key(prompt: list[int], rid: str) -> np.ndarray | None:
    """In one of four requests every 3 is the placeholder of one of two contents. Answers are the same either way."""
    content = random.Random(rid).randrange(8)
    if content > 1:
        return None
    key = np.array(prompt, np.int32)
    key[key == 3] = FIRST_CONTENT_ID + content
    return key


@dataclass
class Expected:
    """What a request gives when nothing disturbs it."""

    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None


def random_rule(seed: int, rid: str) -> Rule | None:
    """What a request of a constrained trial has to keep to; None for one in four."""
    rng = random.Random(f"{seed} {rid}")
    kind = rng.randrange(4)
    if kind < 2:
        seed, num_ends = rng.randrange(1000), rng.choice([0, 1, 2])
        return Spelled(VOCAB, seed) if rng.random() < 0.4 else Automaton(VOCAB, seed, num_ends)
    return rng.choice([Even(VOCAB), NotTwice(VOCAB)]) if kind == 2 else None


def reference(request: Request, setting: Setting, rule: Rule | None = None) -> Expected:
    """The request computed alone, by the meaning of its fields."""
    expected, params = Expected(), request.sampling
    prompt = request.prompt_ids.tolist()
    has_habits, has_states = setting.drafts is not None, setting.num_snapshots is not None
    logits_after = (
        [_logits(prompt[: i + 1], has_habits, has_states) for i in range(len(prompt))]
        if request.logprob_start is not None
        else []
    )
    if request.logprob_start is not None:
        expected.prompt_logprobs = [TokenLogprobs(prompt[request.logprob_start], None)] + [
            _logprobs(logits_after[i - 1], prompt[i], request) for i in range(request.logprob_start + 1, len(prompt))
        ]
    stops = frozenset() if params.ignore_eos else request.eos_ids | params.stop_token_ids
    longest = setting.context_length - len(prompt)
    if params.max_new_tokens is None:
        longest = min(longest, setting.num_pages * setting.page_size + 1 - len(prompt))
    else:
        longest = min(longest, params.max_new_tokens)
    while expected.finish is None:
        if len(expected.tokens) == longest:
            expected.finish = FinishReason("length", length=longest)
            break
        logits = _logits(prompt + expected.tokens, has_habits, has_states)
        early = stops if len(expected.tokens) < params.min_new_tokens else frozenset()
        if rule is not None:
            allowed = rule.allowed(expected.tokens)
            logits = np.where(allowed, logits, -np.inf)
            if set(np.flatnonzero(allowed)) <= early:
                early = frozenset()
        token = sample(logits, _sampling_of(params, prompt, expected.tokens, early), 0)
        expected.tokens.append(token)
        if request.return_logprob:
            expected.logprobs.append(_logprobs(logits, token, request))
        is_early = len(expected.tokens) <= params.min_new_tokens  # where nothing but a stop was allowed
        if (token in stops and not is_early) or (rule is not None and rule.has_ended(expected.tokens)):
            expected.finish = FinishReason("stop", matched=token)
    return expected


def _logits(context: list[int], has_habits: bool, has_states: bool) -> np.ndarray:
    values = stored_values(np.array(context, np.int32), np.arange(len(context), dtype=np.int32))
    logits = fake_logits(np.append(values, recurrent_states(values)[-1]) if has_states else values, VOCAB)
    favoured = habit(context) if has_habits else None
    if favoured is not None:
        logits[favoured] = HABIT_LOGIT
    return logits


def _logprobs(logits: np.ndarray, token: int, request: Request) -> TokenLogprobs:
    row = logprob_row(logits, token, request.num_top_logprobs, request.logprob_token_ids)
    return TokenLogprobs(token, row.logprob, row.top, row.chosen)


def _sampling_of(params: SamplingParams, prompt: list[int], output: list[int], banned: frozenset[int]) -> SamplingBatch:
    """The sampling inputs of one row, written down without the production code."""
    is_penalised = params.frequency_penalty != 0 or params.presence_penalty != 0 or params.repetition_penalty != 1
    history = prompt + output if is_penalised else []
    bias = [(i, v) for i, v in params.logit_bias if i not in banned] + [(i, -np.inf) for i in sorted(banned)]
    return SamplingBatch(
        temperature=np.array([params.temperature], np.float32),
        top_k=np.array([params.top_k], np.int32),
        top_p=np.array([params.top_p], np.float32),
        min_p=np.array([params.min_p], np.float32),
        frequency_penalty=np.array([params.frequency_penalty], np.float32),
        presence_penalty=np.array([params.presence_penalty], np.float32),
        repetition_penalty=np.array([params.repetition_penalty], np.float32),
        seeds=np.array([params.seed % (1 << 64)], np.uint64),
        positions=np.array([len(prompt) + len(output)], np.int64),
        history_ids=np.array(history, np.int32),
        history_indptr=np.array([0, len(history)], np.int32),
        output_starts=np.array([len(prompt) if history else 0], np.int32),
        bias_ids=np.array([i for i, _ in bias], np.int32),
        bias_values=np.array([v for _, v in bias], np.float32),
        bias_indptr=np.array([0, len(bias)], np.int32),
        num_top=np.array([-1], np.int32),
        logprob_token_ids=[()],
    )


class Trial:
    """One engine, some requests, and everything they put out."""

    disk: Callable[[KVCache], DiskTier] | None = None
    host: Callable[[KVCache], HostTier | None] | None = None
    """Make places for pages outside the pool; None for none."""

    def __init__(self, seed: int, setting: Setting | None = None) -> None:
        self.rng = random.Random(seed)
        self.setting = setting or replace(
            random_setting(self.rng),
            priorities=seed % 2 == 1,
            num_clients=1 + seed % 3,
            constrained=seed % 5 < 2,
            forced=ForcedSettings(1 + seed % 7, 1 + seed % 11) if seed % 4 else None,
            background=seed % 7 > 3,
            num_snapshots=(0, 1, 3, 9, 30)[seed % 5] if seed // 25 % 2 else None,
            snapshot_pages=1 + seed % 3,
            retention_share=(0.0, 0.3, 0.5, 1.0)[seed % 4],
        )
        stem_tokens = 2 * self.setting.page_size + 6
        self.stems = [[self.rng.randrange(VOCAB) for _ in range(self.rng.randint(0, stem_tokens))] for _ in range(3)]
        self.runner = FakeRunner(
            self.setting.num_pages,
            self.setting.page_size,
            VOCAB,
            raises=self._before_execute,
            next_token=habit if self.setting.drafts is not None else None,
            favoured_logit=HABIT_LOGIT,
            gives_nan=self._gives_nan if self.setting.nan_rate else None,
            num_states=self.setting.states.num_slots if self.setting.states else 0,
        )
        self.rules: dict[str, Rule | None] = {}
        self.seed = seed
        maker = self._constraint if self.setting.constrained else None
        self.core, self.scheduler, self.cache = self.setting.engine(self.runner, maker, self.disk, self.host)
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.ended_early: set[str] = set()
        self.page_namespace: dict[int, str] = {}
        self.running: set[tuple[str, int]] = set()
        """Who ran after the last step, with how often it had been preempted."""
        self.expects_errors = self.setting.failure_rate > 0 or self.setting.nan_rate > 0

    def run(self, num_requests: int) -> None:
        """Play the trial to its end. Raises AssertionError or EngineError where a rule does not hold."""
        num_steps = 0
        arrival_rate = 0.95 if self.setting.is_crowded else self.rng.choice([0.2, 0.5, 0.95])
        while num_requests or self.core.has_work:
            while num_requests and self.rng.random() < arrival_rate:
                num_requests -= 1
                self._add(f"r{num_requests}")
            if self.rng.random() < self.setting.abort_rate:
                self._end_one_early()
            for out in self.core.step():
                self._collect(out)
            self.core.check()
            self.running = self._now_running()
            num_steps += 1
            assert num_steps < 3000, "no progress"
        for rid, request in self.requests.items():
            self._compare(rid, request)
        assert self.core.flush_cache()
        assert self.cache.num_free == self.cache.num_pages, "pages are missing after everything has ended"
        if (states := self.cache.states) is not None:
            assert states.num_free == states.room.num_slots, "states are missing after everything has ended"

    def _add(self, rid: str) -> None:
        request = random_request(self.rng, rid, self.stems, self.setting.is_crowded)
        request.client = f"client {int(rid[1:]) % self.setting.num_clients}"
        request.is_background = self.setting.background and int(rid[1:]) % 3 > 0
        try:
            self.core.add(request)
        except PromptError:
            return
        self.requests[rid] = request
        self.outputs[rid] = []
        if self.rng.random() < 0.3:
            self.stems.append(request.prompt_ids.tolist())

    def _constraint(self, request: Request) -> RuleConstraint | None:
        rule = self.rules[request.rid] = random_rule(self.seed, request.rid)
        if rule is None:
            return None
        return Bold(rule) if len(self.rules) % 3 == 0 else RuleConstraint(rule)

    def _end_one_early(self) -> None:
        if not self.requests:
            return
        rid = self.rng.choice(list(self.requests))
        if self.core.abort(rid) if self.rng.random() < 0.5 else self.core.finish(rid, "\n"):
            self.ended_early.add(rid)

    def _waits(self, rid: str) -> bool:
        state = self.scheduler._states.get(rid)
        return state is not None and state.pages is None

    def _waiting_states(self) -> list[RequestState]:
        """Of requests that are not in the background."""
        return [s for s in self.scheduler._states.values() if s.pages is None and not s.is_background]

    def _is_held(self, state: RequestState) -> bool:
        return any(hold.holds(state) for hold in self.scheduler._admission.holds)

    def _now_running(self) -> set[tuple[str, int]]:
        return {(state.rid, state.num_preemptions) for state in self.scheduler._running.states}

    def _before_execute(self, batch: ScheduleBatch) -> Exception | None:
        """While a step is in flight the books must balance, and requests may be ended."""
        states = self.scheduler._running.states
        now = self._now_running()
        begun = [state for state in states if (state.rid, state.num_preemptions) not in self.running]
        gave_way = [self.requests[rid] for rid, _ in self.running - now if self._waits(rid)]
        if any(not request.is_background for request in gave_way):
            num_running = Counter(state.request.client for state in states if not state.is_background)
            assert all(state.is_background or num_running[state.request.client] == 1 for state in begun), (
                "a request of a client that has others running begins in the step in which one gave way"
            )
            assert not any(state.is_background for state in states), "a request gave way to one in the background"
        if any(state.is_background for state in begun):
            assert not gave_way, "a request begins in the background in a step in which one gave way"
            assert all(self._is_held(state) for state in self._waiting_states()), "it passes one that could begin"
        if batch.copies or self.rng.random() < 0.2:
            self.core.check()
        assert batch.num_tokens <= self.scheduler.max_batch_tokens
        assert not (self.setting.whole_pages and batch.copies), "part of a page is copied"
        self._check_namespaces(batch)
        if self.rng.random() < self.setting.abort_rate:
            self._end_one_early()
        return RuntimeError("planned failure") if self.rng.random() < self.setting.failure_rate else None

    def _check_namespaces(self, batch: ScheduleBatch) -> None:
        """What a row reads was written for its own namespace."""
        namespaces = {state.req_index: state.request.namespace for state in self.scheduler._running.states}
        for copy in batch.copies:
            self.page_namespace[copy.target] = self.page_namespace[copy.source]
        for row in range(batch.num_rows):
            namespace = namespaces[int(batch.req_indices[row])]
            start, end = int(batch.starts[row]), int(batch.starts[row] + batch.lengths[row])
            read_pages = -(-start // self.setting.page_size)
            written_pages = -(-end // self.setting.page_size)
            for index, page in enumerate(batch.page_table[row, :written_pages].tolist()):
                assert index >= read_pages or self.page_namespace.get(page) == namespace, "a foreign page is read"
                self.page_namespace[page] = namespace

    def _gives_nan(self, context: list[int]) -> bool:
        return self.rng.random() < self.setting.nan_rate

    def _collect(self, out: RequestOutput) -> None:
        before = self.outputs[out.rid]
        assert not before or before[-1].finish is None, f"{out.rid} goes on after its end"
        before.append(out)
        if out.finish is not None:
            done = [token for o in before for token in o.new_token_ids]
            self.stems.append(self.requests[out.rid].prompt_ids.tolist() + done)

    def _compare(self, rid: str, request: Request) -> None:
        outs, expected = self.outputs[rid], reference(request, self.setting, self.rules.get(rid))
        assert outs and outs[-1].finish is not None, f"{rid} never ended"
        finish = outs[-1].finish
        tokens = [token for out in outs for token in out.new_token_ids]
        logprobs = [entry for out in outs for entry in out.logprobs]
        lists = [out.prompt_logprobs for out in outs if out.prompt_logprobs is not None]
        assert outs[-1].completion_tokens == len(tokens)
        assert outs[-1].cached_tokens < max(1, len(request.prompt_ids))
        if finish.type == "error":
            assert self.expects_errors, f"{rid} failed: {finish.message}"
            assert finish.message and ("planned failure" in finish.message or "NaN" in finish.message)
        elif rid not in self.ended_early:
            assert (tokens, finish) == (expected.tokens, expected.finish), f"{rid} differs from the request run alone"
        assert tokens == expected.tokens[: len(tokens)]
        assert logprobs == expected.logprobs[: len(tokens)]
        assert lists == ([expected.prompt_logprobs] if lists or (expected.prompt_logprobs and tokens) else [])


def run_trial(seed: int) -> None:
    """Trial number `seed`."""
    trial = Trial(seed)
    trial.run(num_requests=8 if trial.setting.is_crowded else 6)
