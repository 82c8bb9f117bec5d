"""Why a request found no more in the cache: traffic is made with a known cause, and the engine must name it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mooli.cache.evicted import EvictedPages
from mooli.cache.kv_cache import KVCache
from mooli.cache.states import StateRoom
from mooli.engine.core import EngineCore
from mooli.runner.fake import FakeRunner
from mooli.scheduler.scheduler import Scheduler
from mooli.types import CacheEnd, Request, SamplingParams

VOCAB = 1000
PAGE = 4


class Traffic:
    """An engine of its own, requests one after the other, and prompts that have nothing in common."""

    def __init__(self, rng: random.Random, num_pages: int = 64, *, enabled: bool = True, snapshots: int | None = None):
        states = None if snapshots is None else StateRoom(4, 0, snapshots, 4 * PAGE)
        self.rng = rng
        self.cache = KVCache(num_pages, PAGE, enabled, states=states)
        self.scheduler = Scheduler(
            self.cache, max_batch_tokens=64, max_running_requests=4, context_length=256, vocab_size=VOCAB
        )
        slots = 0 if states is None else states.num_slots
        self.core = EngineCore(self.scheduler, FakeRunner(num_pages, PAGE, VOCAB, num_states=slots))
        self.ends: dict[str, CacheEnd] = {}
        self._num = 0

    def prompt(self, low: int = 3, high: int = 40) -> list[int]:
        """It begins with a token of its own."""
        self._num += 1
        return [self._num, *(self.rng.randrange(500, VOCAB) for _ in range(self.rng.randint(low, high) - 1))]

    def add(self, prompt: list[int], *, namespace: str = "", max_new_tokens: int = 0, start: int | None = None) -> str:
        self._num += 1
        rid = f"r{self._num}"
        self.core.add(
            Request(
                rid=rid,
                prompt_ids=np.array(prompt, np.int32),
                sampling=SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, temperature=0.0),
                namespace=namespace,
                logprob_start=start,
                return_logprob=start is not None,
                wants_cache_end=True,
            )
        )
        return rid

    def step(self) -> None:
        for output in self.core.step():
            if output.cache_end is not None:
                assert output.rid not in self.ends, "it is said once"
                self.ends[output.rid] = output.cache_end
        self.core.check()

    def ask(self, prompt: list[int], **options) -> CacheEnd:
        """The request alone, to its end."""
        rid = self.add(prompt, **options)
        while self.core.has_work:
            self.step()
        return self.ends[rid]

    def other_than(self, token: int) -> int:
        return 500 + (token - 500 + self.rng.randrange(1, 499)) % 500


def _new(traffic: Traffic) -> None:
    known = traffic.prompt()
    traffic.ask(known)
    end = traffic.ask([*known, *traffic.prompt()[1:]])
    assert (end.reason, end.num_tokens, end.num_lost, end.had) == ("new", len(known), 0, ())
    assert traffic.ask(traffic.prompt()).num_tokens == 0


def _diverged(traffic: Traffic) -> None:
    known = traffic.prompt(low=6)
    traffic.ask(known)
    at = traffic.rng.randrange(1, len(known) - 1)
    asked = [*known[:at], traffic.other_than(known[at]), *traffic.prompt()]
    end = traffic.ask(asked)
    assert (end.reason, end.num_tokens, end.num_matched) == ("diverged", at, at)
    assert end.had == tuple(known[at : at + 16]), "what stood there"


def _none(traffic: Traffic) -> None:
    known = traffic.prompt(low=5)
    traffic.ask(known)
    end = traffic.ask(known[: traffic.rng.randint(2, len(known))])
    assert (end.reason, end.num_lost) == (None, 0)


def _evicted(traffic: Traffic) -> None:
    known = traffic.prompt(low=3 * PAGE + 1, high=40)
    traffic.ask(known)
    if traffic.rng.random() < 0.5:  # what they have in common stays in use by others
        for _ in range(3):
            traffic.ask([*known[:PAGE], *traffic.prompt(low=3, high=8)])
    num_asked = 0
    while len(traffic.cache.agreeing("", _key(known), len(known)).pages) == len(known) // PAGE:
        traffic.ask(traffic.prompt(low=30, high=50))
        num_asked += 1
        assert num_asked < 20, "the pool is small"
    there = len(traffic.cache.agreeing("", _key(known), len(known)).pages) * PAGE
    end = traffic.ask(known)
    most = min(len(known) // PAGE * PAGE, len(known) - 1)
    assert (end.reason, end.num_tokens, end.num_lost) == ("evicted", there, most - there)
    assert end.evicted_s is not None and end.unused_s is not None and end.evicted_s >= 0 and end.unused_s >= 0


def _namespace(traffic: Traffic) -> None:
    known = traffic.prompt()
    traffic.ask(known)
    end = traffic.ask(known, namespace=f"salt {traffic.rng.random()}")
    assert (end.reason, end.num_tokens, end.had) == ("namespace", 0, ())


def _in_flight(traffic: Traffic) -> None:
    """What has not filled a page of a request that runs is not there for others."""
    known = traffic.prompt(low=10)
    whole = len(known) // PAGE * PAGE
    beyond = traffic.rng.randrange(1, PAGE)
    known = known[:whole] + [traffic.rng.randrange(500, VOCAB) for _ in range(beyond)]
    first = traffic.add(known, max_new_tokens=40)
    for _ in range(traffic.rng.randrange(2)):
        traffic.step()
    end = traffic.ask([*known, 1, 2, 3])
    assert (end.reason, end.num_tokens, end.num_lost) == ("in flight", whole, beyond)
    assert traffic.ends[first].reason in ("new", "namespace")


def _held_back(traffic: Traffic) -> None:
    known = traffic.prompt(low=8)
    traffic.ask(known)
    start = traffic.rng.randrange(0, len(known) - 2)
    end = traffic.ask(known, start=start)
    assert (end.reason, end.num_tokens, end.num_lost) == ("held back", start, len(known) - 1 - start)


CAUSES = (_new, _diverged, _none, _evicted, _namespace, _in_flight, _held_back)


@pytest.mark.parametrize("seed", range(8))
def test_the_cause_is_named_whatever_came_before(seed: int) -> None:
    rng = random.Random(seed)
    traffic = Traffic(rng, rng.choice([40, 64]))
    for _ in range(40):
        rng.choice(CAUSES)(traffic)
    assert traffic.core.stats()["requests"] == len(traffic.ends), "every request is told, once"


def test_a_cache_that_is_off_and_states_that_are_not_there() -> None:
    traffic = Traffic(random.Random(1), enabled=False)
    assert traffic.ask(traffic.prompt()).reason == "disabled"
    traffic = Traffic(random.Random(2), snapshots=0)
    known = traffic.prompt(low=9)
    traffic.ask(known)
    end = traffic.ask(known)
    assert (end.reason, end.num_tokens, end.num_lost) == ("no state", 0, len(known) - 1)


def test_who_does_not_ask_is_shown_no_token() -> None:
    traffic = Traffic(random.Random(3))
    known = traffic.prompt(low=8)
    traffic.ask(known)
    traffic.core.add(Request(rid="silent", prompt_ids=np.array([*known[:5], 1, 2], np.int32)))
    while traffic.core.has_work:
        traffic.step()
    assert traffic.ends["silent"] == CacheEnd("diverged", 5, 5)


def test_what_was_evicted_is_remembered_up_to_a_bound_and_what_was_flushed_is_not() -> None:
    rng = random.Random(4)
    traffic = Traffic(rng, 16)
    memory = EvictedPages(traffic.cache.digests, most_pages=5)
    traffic.cache._evicted_pages = memory
    prompts = [traffic.prompt(low=20, high=40) for _ in range(12)]
    for prompt in prompts:
        traffic.ask(prompt)
        assert len(memory) <= 5
    assert traffic.ask(prompts[0]).reason == "new", "that is long ago"
    traffic = Traffic(rng)
    known = traffic.prompt()
    traffic.ask(known)
    assert traffic.core.flush_cache()
    assert traffic.ask(known).reason == "namespace"


def _key(ids: list[int]) -> bytes:
    return np.array(ids, ">i4").tobytes()
