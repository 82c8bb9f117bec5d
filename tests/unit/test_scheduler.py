"""What the scheduler decides: who runs, in which order, with how many tokens, and when it ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from mooli.batch import ScheduleBatch
from mooli.cache.kv_cache import KVCache
from mooli.cache.match_end import MatchEnd
from mooli.errors import ConfigError, EngineError, PromptError, RequestError
from mooli.runner.fake import FakeRunner
from mooli.scheduler.admission import head_start
from mooli.scheduler.request_state import RequestState
from mooli.scheduler.scheduler import Scheduler
from mooli.types import FIRST_CONTENT_ID, Request, RequestOutput, SamplingParams

VOCAB = 1000


def request(rid: str, prompt: list[int], max_new_tokens: int | None = 4, **fields: Any) -> Request:
    params = {name: fields.pop(name) for name in list(fields) if name in SamplingParams.__dataclass_fields__}
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, **params)
    return Request(rid=rid, prompt_ids=np.array(prompt, np.int32), sampling=sampling, **fields)


class Bench:
    """A scheduler with a fake runner, stepped by hand."""

    def __init__(
        self, num_pages: int = 64, page_size: int = 4, enabled: bool = True, next_token: Any = None, **settings: Any
    ) -> None:
        defaults = {"max_batch_tokens": 64, "max_running_requests": 8, "context_length": 200, "vocab_size": VOCAB}
        self.cache = KVCache(num_pages, page_size, enabled)
        self.scheduler = Scheduler(self.cache, **{**defaults, **settings})
        self.runner = FakeRunner(num_pages, page_size, VOCAB, next_token=next_token)
        self.batches: list[ScheduleBatch] = []
        self.outputs: dict[str, list[RequestOutput]] = {}

    def add(self, *requests: Request) -> None:
        for each in requests:
            self.scheduler.add(each)

    def step(self) -> list[RequestOutput]:
        batch = self.scheduler.schedule()
        if batch is None:
            outs = self.scheduler.take_outputs()
        else:
            self.batches.append(batch)
            outs = self.scheduler.update(batch, self.runner.execute(batch))
        self.scheduler.check()
        for out in outs:
            self.outputs.setdefault(out.rid, []).append(out)
        return outs

    def run(self, limit: int = 500) -> None:
        for _ in range(limit):
            if not self.scheduler.has_requests and not self.scheduler.has_outputs:
                return
            self.step()
        raise AssertionError("no end")

    def tokens(self, rid: str) -> list[int]:
        return [token for out in self.outputs[rid] for token in out.new_token_ids]

    def last(self, rid: str) -> RequestOutput:
        return self.outputs[rid][-1]

    @property
    def num_computed(self) -> int:
        return self.scheduler.counters.computed_tokens


def spans(batch: ScheduleBatch) -> list[tuple[int, int]]:
    return list(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True))


# -- rows -------------------------------------------------------------------------------------------------------------
def test_a_batch_lays_out_tokens_positions_slots_and_pages() -> None:
    bench = Bench()
    bench.add(request("a", [7, 8, 9, 10, 11]), request("b", [5, 6]))
    bench.step()
    batch = bench.batches[0]
    assert batch.token_ids.tolist() == [7, 8, 9, 10, 11, 5, 6]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.num_samples.tolist() == [1, 1]
    first, second, other = batch.page_table[0, 0], batch.page_table[0, 1], batch.page_table[1, 0]
    assert batch.slots.tolist() == [first * 4 + i for i in range(4)] + [second * 4, other * 4, other * 4 + 1]
    assert batch.page_table.shape == (2, 2)
    assert batch.page_table[1, 1] == -1
    for array, dtype in [(batch.token_ids, np.int32), (batch.slots, np.int32), (batch.page_table, np.int32)]:
        assert array.dtype == dtype
    assert batch.positions.dtype == np.int32


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_samples() -> None:
    bench = Bench(max_batch_tokens=5)
    bench.add(request("a", list(range(12)), 1))
    bench.run()
    assert [spans(batch) for batch in bench.batches] == [[(0, 5)], [(5, 5)], [(10, 2)]]
    assert [batch.num_samples.tolist() for batch in bench.batches] == [[0], [0], [1]]


# -- content, which the cache knows by other ids than the model ------------------------------------------------------
PICTURE = [*range(6), *[9] * 8, *range(20, 26)]  # 9 is the placeholder


def with_picture(rid: str, picture: int, max_new_tokens: int = 4, **fields: Any) -> Request:
    """PICTURE, whose placeholders are those of one of several pictures."""
    key = np.array(PICTURE, np.int32)
    key[6:14] = FIRST_CONTENT_ID + 1000 * picture + np.arange(8)
    return request(rid, PICTURE, max_new_tokens, key_ids=key, **fields)


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_equal_tokens_of_different_content_share_nothing_from_there_on(together: bool) -> None:
    bench = Bench()
    for each in (with_picture("a", 1), with_picture("b", 2), with_picture("c", 1), request("d", PICTURE)):
        bench.add(each)
        if not together:
            bench.run()
    bench.run()
    assert [bench.last(rid).cached_tokens for rid in "abcd"] == [0, 6, 19, 6]
    # The model sees the same tokens, so that the answers are one.
    assert len({tuple(bench.tokens(rid)) for rid in "abcd"}) == 1
    assert all(batch.token_ids.max() < VOCAB for batch in bench.batches)


def test_an_answer_to_content_is_found_again_after_preemption_and_by_who_asks_more() -> None:
    bench = Bench(num_pages=12, max_batch_tokens=32)
    bench.add(with_picture("a", 1, 20), with_picture("b", 2, 20))
    bench.run()
    assert bench.last("a").num_preemptions + bench.last("b").num_preemptions > 0
    assert bench.tokens("a") == bench.tokens("b")
    said = bench.tokens("b")
    longer = with_picture("c", 2)
    longer.prompt_ids = np.array([*PICTURE, *said, 7], np.int32)
    assert longer.key_ids is not None
    longer.key_ids = np.concatenate([longer.key_ids, longer.prompt_ids[len(PICTURE) :]])
    bench.add(longer)
    bench.run()
    assert bench.last("c").cached_tokens == len(PICTURE) + len(said) - 1


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ([0, 1, 2], "one for each of 4"),
        ([0, 1, 2, 4], r"key_ids\[3\]=4 is neither the token id 3"),
        ([0, 1, 2, -(2**31)], "neither"),
        ([0, 1, 2, FIRST_CONTENT_ID - 1], "neither"),
    ],
    ids=["too few", "another token's", "negative", "between"],
)
def test_a_key_that_is_neither_the_tokens_own_nor_contents_is_refused(key: list[int], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        Bench().add(request("a", [0, 1, 2, 3], key_ids=np.array(key, np.int32)))
    with pytest.raises(PromptError, match="int64"):
        Bench().add(request("a", [0, 1], key_ids=np.array([0, 1], np.int64)))


def test_minus_one_means_prompts_are_not_cut() -> None:
    bench = Bench(max_batch_tokens=-1)
    bench.add(request("a", list(range(150)), 1))
    bench.run()
    assert [spans(batch) for batch in bench.batches] == [[(0, 150)]]


def test_running_streams_get_their_token_in_every_step_whatever_prompts_arrive() -> None:
    bench = Bench(num_pages=200, max_batch_tokens=8)
    bench.add(request("stream", [1, 2], 10))
    bench.step()
    bench.add(request("long", list(range(100, 160)), 1), request("other", list(range(200, 260)), 1))
    for _ in range(9):
        bench.step()
    assert len(bench.tokens("stream")) == 10
    assert all(batch.num_tokens == 8 for batch in bench.batches[1:])


def test_prompts_get_less_of_a_step_that_streams_wait_for() -> None:
    bench = Bench(num_pages=200, max_batch_tokens=32, mixed_prefill_tokens=6)
    bench.add(request("stream", [1, 2], 4))
    bench.step()
    bench.add(request("long", list(range(100, 200)), 1))
    for _ in range(4):
        bench.step()
    assert [batch.num_tokens for batch in bench.batches[1:]] == [7, 7, 7, 32]


def test_a_started_prompt_is_continued_before_another_is_admitted() -> None:
    bench = Bench(max_batch_tokens=8)
    bench.add(request("a", list(range(12)), 1), request("b", list(range(100, 112)), 1))
    bench.run()
    assert [spans(batch) for batch in bench.batches] == [[(0, 8)], [(8, 4), (0, 4)], [(4, 8)]]


def test_a_step_goes_on_if_the_next_one_will_have_the_same_requests_with_a_token_more() -> None:
    bench = Bench()
    bench.add(request("a", [1, 2, 3], max_new_tokens=9), request("b", [4], max_new_tokens=9))
    for _ in range(8):
        bench.step()
    for batch, following in zip(bench.batches, bench.batches[1:], strict=False):
        assert batch.may_begin_next
        assert spans(following) == [(start + length, 1) for start, length in spans(batch)]
    bench.step()  # its tokens are the last
    assert not bench.batches[-1].may_begin_next
    assert not bench.scheduler.has_requests


def test_a_step_does_not_go_on_beside_a_request_that_is_not_yet_in_it() -> None:
    bench = Bench(max_batch_tokens=4)
    bench.add(request("a", [1, 2], max_new_tokens=20))
    bench.step()
    bench.add(request("b", [1, 5, 6, 7, 8, 9], max_new_tokens=20))
    bench.step()
    bench.step()
    assert [batch.may_begin_next for batch in bench.batches] == [True, False, True]
    assert spans(bench.batches[1]) == [(2, 1), (0, 3)]


def test_a_step_does_not_go_on_while_a_request_that_could_run_waits() -> None:
    bench = Bench(max_batch_tokens=2)
    bench.add(request("a", [1, 2], max_new_tokens=20), request("b", [3], max_new_tokens=20))
    bench.add(request("c", [4], max_new_tokens=20))
    bench.step()
    bench.step()
    assert [batch.may_begin_next for batch in bench.batches] == [False, True]  # two run, and no more can


def test_a_page_is_taken_early_only_if_nobody_else_could_need_it() -> None:
    roomy = Bench(num_pages=3, enabled=False)
    roomy.add(request("a", [1, 2, 3], max_new_tokens=9))
    for _ in range(2):
        roomy.step()
    assert [batch.may_begin_next for batch in roomy.batches] == [True, True]
    assert (roomy.batches[-1].page_table >= 0).sum() == 2
    narrow = Bench(num_pages=2, enabled=False)
    narrow.add(request("a", [1, 2, 3], max_new_tokens=4))
    for _ in range(2):
        narrow.step()
    assert [batch.may_begin_next for batch in narrow.batches] == [True, False]
    narrow.run()
    assert len(narrow.tokens("a")) == 4


def test_no_more_run_at_a_time_than_allowed() -> None:
    bench = Bench(max_running_requests=2)
    bench.add(*(request(f"r{i}", [i], 3) for i in range(6)))
    bench.run()
    assert max(batch.num_rows for batch in bench.batches) == 2


def test_each_running_request_gets_a_token_even_with_a_budget_of_one() -> None:
    bench = Bench(max_batch_tokens=1)
    bench.add(*(request(f"r{i}", [i, i + 1], 3) for i in range(4)))
    bench.run()
    assert all(batch.num_tokens == 1 for batch in bench.batches)


# -- reuse ------------------------------------------------------------------------------------------------------------
def test_a_finished_request_serves_the_next_by_token_not_by_page() -> None:
    bench = Bench()
    bench.add(request("a", list(range(10)), 1))
    bench.run()
    bench.add(request("b", [*range(10), 50, 51], 1))
    bench.run()
    assert bench.last("b").cached_tokens == 10
    assert spans(bench.batches[-1]) == [(10, 2)]
    (copy,) = bench.batches[-1].copies
    assert copy.num_tokens == 2
    assert copy.target == bench.batches[-1].page_table[0, 2]


def test_a_prompt_that_is_cached_whole_computes_its_last_token() -> None:
    bench = Bench()
    bench.add(request("a", list(range(8)), 2))
    bench.run()
    bench.add(request("b", list(range(8)), 2))
    bench.run()
    assert bench.last("b").cached_tokens == 7
    assert bench.tokens("a") == bench.tokens("b")


def test_output_is_reused_by_the_next_turn() -> None:
    bench = Bench()
    bench.add(request("a", list(range(6)), 6))
    bench.run()
    bench.add(request("b", [*range(6), *bench.tokens("a"), 77], 1))
    bench.run()
    assert bench.last("b").cached_tokens == 11, "all but the last token, which was never computed"


def test_a_prefix_that_several_requests_share_is_computed_once() -> None:
    bench = Bench(max_batch_tokens=-1)
    shared = list(range(40))
    bench.add(*(request(f"r{i}", [*shared, 100 + i], 1) for i in range(5)))
    bench.run()
    assert bench.num_computed == 41 + 4
    assert [batch.num_rows for batch in bench.batches] == [1, 4]


def test_followers_wait_until_the_whole_shared_prefix_is_there() -> None:
    bench = Bench(max_batch_tokens=8)
    shared = list(range(40))
    bench.add(*(request(f"r{i}", [*shared, 100 + i], 1) for i in range(3)))
    bench.run()
    assert bench.num_computed == 41 + 2


def test_a_follower_is_not_looked_up_again_before_its_whole_prefix_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(max_batch_tokens=10)
    bench.cache.match_granularity_tokens = 4  # so that each step has two tokens left, for which others are tried
    bench.add(request("leader", list(range(80)), 1), request("follower", list(range(80)), 1))
    bench.step()
    bench.step()
    looked_up = 0
    match = bench.cache.agreeing

    def counted(namespace: str, key: bytes, max_tokens: int) -> Any:
        nonlocal looked_up
        looked_up += 1
        return match(namespace, key, max_tokens)

    monkeypatch.setattr(bench.cache, "agreeing", counted)
    for _ in range(6):
        bench.step()
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (1, 1)
    assert looked_up == 0
    bench.run()
    assert bench.last("follower").cached_tokens == 76


def test_waiting_for_a_prefix_does_not_hold_up_others() -> None:
    bench = Bench(max_batch_tokens=64)
    bench.add(request("a", list(range(20)), 1), request("same", list(range(20)), 1), request("other", [500, 501], 1))
    bench.step()
    assert spans(bench.batches[0]) == [(0, 20), (0, 2)]


def test_followers_go_on_when_their_leader_is_aborted() -> None:
    bench = Bench(max_batch_tokens=8)
    bench.add(request("leader", list(range(40)), 1), request("follower", list(range(40)), 1))
    bench.step()
    bench.scheduler.abort("leader")
    bench.run()
    assert bench.last("follower").cached_tokens == 8


class Preparing:
    """A `Hold`: something outside prepares requests, and those that it has not done yet wait."""

    reason = "being prepared"

    def __init__(self, *rids: str) -> None:
        self.rids = set(rids)
        self.told: list[str] = []

    def begin_step(self, running: Iterable[RequestState]) -> None:
        self.told = [state.rid for state in running]

    def holds(self, state: RequestState) -> bool:
        return state.rid in self.rids

    def began(self, state: RequestState) -> None:
        self.told.append(state.rid)


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_one_rule_admits_requests_whatever_the_reason_they_wait_for(policy: str) -> None:
    hold = Preparing("slow")
    bench = Bench(holds=[hold], policy=policy)
    slow, same = request("slow", list(range(20)), 9), request("same", list(range(20)), 1)
    bench.add(slow, request("other", [500, 501], 30), same)
    bench.step()
    assert spans(bench.batches[0]) == [(0, 2), (0, 20)], "who is held does not hold up others"
    assert hold.told == ["other", "same"]
    waiting = bench.scheduler._states["slow"]
    assert (waiting.waited_for, waiting.pages) == ("being prepared", None)
    hold.rids.clear()
    bench.step()
    assert waiting.pages is not None and waiting.num_found == 19
    assert waiting.match_end == MatchEnd(19, None)
    bench.run()


def test_what_a_request_waited_for_is_known() -> None:
    bench = Bench()
    bench.add(request("leader", list(range(20)), 9), request("follower", list(range(20)), 9))
    bench.step()
    follower = bench.scheduler._states["follower"]
    assert (follower.waited_for, follower.match_end) == ("in flight", None)
    bench.step()
    assert (follower.num_found, follower.match_end) == (19, MatchEnd(19, None))


def test_nothing_runs_while_all_that_wait_are_held_and_they_can_be_ended() -> None:
    hold = Preparing("a", "b")
    bench = Bench(holds=[hold])
    bench.add(request("a", [1, 2, 3], 1), request("b", [1, 2, 3], 1))
    assert bench.scheduler.schedule() is None
    assert bench.scheduler.abort("a")
    assert [out.rid for out in bench.step()] == ["a"]
    hold.rids.clear()
    bench.run()
    assert bench.last("b").finish.type == "length"  # type: ignore[union-attr]


@pytest.mark.parametrize("enabled", [True, False])
def test_namespaces_and_a_disabled_cache_share_nothing(enabled: bool) -> None:
    bench = Bench(enabled=enabled)
    names = ["x", "y"] if enabled else ["x", "x"]
    for rid, namespace in zip("ab", names, strict=True):
        bench.add(request(rid, list(range(20)), 2, namespace=namespace))
        bench.run()
    assert bench.last("b").cached_tokens == 0
    assert bench.tokens("a") == bench.tokens("b")


# -- order ------------------------------------------------------------------------------------------------------------
def finish_order(bench: Bench) -> list[str]:
    order: list[str] = []
    for _ in range(500):
        if not bench.scheduler.has_requests:
            return order
        order += [out.rid for out in bench.step() if out.finish is not None]
    raise AssertionError("no end")


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_larger_priority_goes_first_and_equals_by_arrival(policy: str) -> None:
    bench = Bench(max_running_requests=1, policy=policy, priorities=True)
    priorities = {"a": 0, "b": 5, "c": 0, "d": 5, "e": -1}
    bench.add(*(request(rid, [ord(rid)], 1, priority=p) for rid, p in priorities.items()))
    assert finish_order(bench) == ["b", "d", "a", "c", "e"]


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_priorities_are_ignored_unless_they_are_to_count(policy: str) -> None:
    bench = Bench(num_pages=10, page_size=2, policy=policy)
    bench.add(request("first", [1, 2, 3], 14), request("urgent", [4, 5, 6], 14, priority=9))
    bench.run()
    assert (bench.last("first").num_preemptions, bench.last("urgent").num_preemptions) == (0, 1)
    bench = Bench(max_running_requests=1, policy=policy)
    bench.add(*(request(rid, [ord(rid)], 1, priority=ord(rid)) for rid in "abc"))
    assert finish_order(bench) == ["a", "b", "c"]


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_a_request_is_overtaken_only_as_long_as_a_priority_is_worth(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mooli.scheduler.admission.PRIORITY_TOKENS", 30)
    bench = Bench(max_running_requests=1, policy=policy, priorities=True, enabled=False)
    bench.add(request("first", [1], 1))
    bench.step()
    bench.add(request("low", [2], 1))
    came_at = bench.num_computed
    number, overtook = 0, []
    while "low" not in bench.outputs:
        number += 1
        overtook.append(bench.num_computed - came_at)
        bench.add(request(f"high{number}", [7, 8, 9, 10], 1, priority=3))
        bench.step()
        assert number < 200, "the low one starves"
    assert head_start(3) == 60
    assert 60 <= max(overtook) <= 60 + 2 * 4


def test_a_larger_priority_has_a_larger_head_start_that_stays_bounded() -> None:
    starts = [head_start(priority) for priority in (-(2**31) + 1, -10, -1, 0, 1, 2, 10, 2**31 - 1)]
    assert starts == sorted(set(starts))
    assert starts[3] == 0
    assert starts[-1] <= 31 * starts[4]


def test_longest_prefix_first_uses_what_is_cached_before_it_is_evicted() -> None:
    bench = Bench(max_running_requests=1, policy="lpm")
    bench.add(request("warm", list(range(40)), 1))
    bench.run()
    bench.add(request("cold", list(range(500, 520)), 1), request("hit", [*range(40), 99], 1))
    assert finish_order(bench) == ["hit", "cold"]


@pytest.mark.parametrize("prefix_tokens", [8, 25, 60])
@pytest.mark.parametrize("hits_per_step", [1, 3])
def test_no_hit_overtakes_a_cold_request_that_has_waited_longer_than_the_hit_is_worth(
    prefix_tokens: int, hits_per_step: int
) -> None:
    bench = Bench(num_pages=200, max_running_requests=1, policy="lpm")
    prefix = list(range(prefix_tokens))
    bench.add(request("warm", prefix, 1))
    bench.run()
    cold_since = bench.num_computed
    bench.add(request("cold", [700, 701], 1))
    came_at: dict[str, int] = {}
    for _ in range(10 * prefix_tokens):
        if "cold" in bench.outputs:
            break
        for _ in range(hits_per_step):
            rid = f"hit{len(came_at)}"
            came_at[rid] = bench.num_computed
            bench.add(request(rid, [*prefix, 100 + len(came_at) % 500], 1))
        bench.step()
    assert "cold" in bench.outputs, "it starves"
    overtook = [rid for rid in bench.outputs if rid.startswith("hit")]
    assert overtook, "hits do go first for a while"
    assert max(came_at[rid] for rid in overtook) <= cold_since + prefix_tokens


def test_an_unknown_policy_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match="fcfs, lpm"):
        Bench(policy="random")


@pytest.mark.parametrize(
    "setting",
    [{"max_batch_tokens": 0}, {"max_running_requests": 0}, {"context_length": 0}, {"mixed_prefill_tokens": 0}],
)
def test_sizes_that_cannot_work_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Bench(**setting)


# -- pages run out ----------------------------------------------------------------------------------------------------
def test_the_latest_request_gives_way_and_resumes_with_the_same_output() -> None:
    alone, crowded = Bench(), Bench(num_pages=10, page_size=2)
    for bench in (alone, crowded):
        bench.add(request("first", [1, 2, 3], 14), request("second", [4, 5, 6], 14))
        bench.run()
    assert crowded.last("second").num_preemptions >= 1
    assert crowded.last("first").num_preemptions == 0
    for rid in ("first", "second"):
        assert crowded.tokens(rid) == alone.tokens(rid)
    assert crowded.last("second").cached_tokens == 0, "counted at the first admission"


def test_the_lowest_priority_gives_way_before_the_latest() -> None:
    bench = Bench(num_pages=10, page_size=2, priorities=True)
    bench.add(request("low", [1, 2, 3], 14), request("high", [4, 5, 6], 14, priority=1))
    bench.run()
    assert bench.last("high").num_preemptions == 0
    assert bench.last("low").num_preemptions >= 1


def test_nobody_takes_the_place_of_a_preempted_request() -> None:
    bench = Bench(num_pages=10, page_size=2, max_running_requests=2, policy="lpm")
    bench.add(request("a", [1, 2, 3], 14), request("b", [4, 5, 6], 14), request("small", [7, 8], 2))
    while "small" not in bench.outputs:
        bench.step()
    assert bench.scheduler.counters.preemptions == 1
    assert bench.last("a").finish is not None, "b and the small one wait for the pages of a, b first"


def test_a_preempted_request_goes_on_before_an_older_one_that_never_ran() -> None:
    bench = Bench(num_pages=13, page_size=4, max_batch_tokens=6, max_running_requests=2)
    bench.cache.match_granularity_tokens = 4  # so that the prompt leaves tokens to others
    shared = list(range(40))
    bench.add(request("leader", shared, 4))
    bench.step()
    bench.add(request("twin", [*shared, 500], 1), request("later", [7, 8], 30))
    for _ in range(60):
        if bench.scheduler.counters.preemptions:
            break
        bench.step()
    assert bench.scheduler.num_waiting == 2
    began: list[str] = []
    for _ in range(60):
        bench.step()
        began += [state.rid for state in bench.scheduler._running.states if state.rid not in ("leader", *began)]
    assert began == ["later", "twin"]


def test_the_oldest_request_gets_a_token_in_every_step_however_crowded() -> None:
    bench = Bench(num_pages=12, page_size=1, max_batch_tokens=8)
    bench.add(*(request(f"r{i}", [i], 11) for i in range(6)))
    for _ in range(11):
        bench.step()
    assert len(bench.tokens("r0")) == 11
    bench.run()


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
@pytest.mark.parametrize("enabled", [True, False], ids=["cached", "uncached"])
def test_a_crowd_does_not_spend_its_time_on_giving_way(policy: str, enabled: bool) -> None:
    """Eight of these run at a time and have pages for five."""
    bench = Bench(num_pages=64, page_size=4, policy=policy, enabled=enabled)
    bench.add(*(request(f"r{i}", [i] * 20, 40) for i in range(24)))
    bench.run(220)
    needed = 24 * (20 + 40 - 1)
    assert bench.num_computed <= 1.3 * needed
    assert bench.scheduler.counters.preemptions <= 24


def test_admission_leaves_room_for_those_that_run() -> None:
    bench = Bench(num_pages=6, page_size=4)
    bench.add(request("a", list(range(8)), 8))
    bench.step()
    bench.add(request("b", list(range(50, 62)), 4))
    bench.step()
    assert bench.scheduler.num_waiting == 1, "four pages are left: three for the prompt, none for its output"
    bench.run()
    assert bench.scheduler.counters.preemptions == 0


def test_the_page_to_copy_from_is_given_up_where_the_pool_is_just_large_enough() -> None:
    bench = Bench(num_pages=1, page_size=8)
    bench.add(request("a", [1, 2, 3], 2))
    bench.run()
    bench.add(request("b", [1, 2, 3, 9, 9, 9, 9], 1))
    bench.run()
    assert bench.last("b").finish is not None
    assert bench.last("b").cached_tokens == 0


def test_a_request_that_fills_the_pool_to_the_last_slot_runs() -> None:
    bench = Bench(num_pages=5, page_size=4)
    bench.add(request("a", list(range(10)), 11))
    bench.run()
    assert len(bench.tokens("a")) == 11


# -- the end ----------------------------------------------------------------------------------------------------------
def counting(context: list[int]) -> int:
    """A model that says the next number."""
    return context[-1] + 1


def test_a_stop_token_ends_a_request_and_is_part_of_its_output() -> None:
    bench = Bench(next_token=counting)
    bench.add(request("a", [1], 20, eos_ids=frozenset({5})), request("b", [1], 20, stop_token_ids=frozenset({4})))
    bench.run()
    assert bench.tokens("a") == [2, 3, 4, 5]
    assert bench.last("a").finish.to_dict() == {"type": "stop", "matched": 5}
    assert bench.last("b").finish.to_dict() == {"type": "stop", "matched": 4}


def test_ignore_eos_ignores_all_stop_ids() -> None:
    bench = Bench(next_token=counting)
    bench.add(request("a", [1], 6, eos_ids=frozenset({3}), stop_token_ids=frozenset({4}), ignore_eos=True))
    bench.run()
    assert bench.tokens("a") == [2, 3, 4, 5, 6, 7]
    assert bench.last("a").finish.to_dict() == {"type": "length", "length": 6}


def test_stop_ids_are_forbidden_until_min_new_tokens() -> None:
    bench = Bench(next_token=lambda context: 9)
    bench.add(request("a", [1], 20, eos_ids=frozenset({9}), min_new_tokens=3, logit_bias=((9, 5.0), (8, 1.0))))
    bench.run()
    tokens = bench.tokens("a")
    assert 9 not in tokens[:3]
    assert tokens[3:] == [9]
    first, last = bench.batches[0].sampling, bench.batches[-1].sampling
    assert dict(zip(first.bias_ids.tolist(), first.bias_values.tolist(), strict=True)) == {9: -np.inf, 8: 1.0}
    assert dict(zip(last.bias_ids.tolist(), last.bias_values.tolist(), strict=True)) == {9: 5.0, 8: 1.0}


def test_no_new_tokens_means_the_prompt_is_computed_and_nothing_sampled() -> None:
    bench = Bench()
    bench.add(request("a", list(range(8)), 0))
    (out,) = bench.step()
    assert (out.new_token_ids, out.finish.to_dict()) == ([], {"type": "length", "length": 0})
    assert len(bench.batches[0].sampling) == 0
    assert bench.cache.num_tree_pages == 2


@pytest.mark.parametrize(("max_new_tokens", "expected"), [(100, 10), (None, 10)])
def test_the_context_length_ends_a_request(max_new_tokens: int | None, expected: int) -> None:
    bench = Bench(context_length=15)
    bench.add(request("a", list(range(5)), max_new_tokens))
    bench.run()
    assert bench.last("a").finish.to_dict() == {"type": "length", "length": expected}


def test_without_max_new_tokens_a_small_pool_ends_a_request() -> None:
    bench = Bench(num_pages=4, page_size=4)
    bench.add(request("a", list(range(5)), None))
    bench.run()
    assert bench.last("a").finish.to_dict() == {"type": "length", "length": 12}


def test_an_aborted_request_leaves_what_it_computed() -> None:
    bench = Bench()
    bench.add(request("a", list(range(10)), 50))
    bench.step()
    bench.step()
    assert bench.scheduler.abort("a", "client left")
    bench.run()
    assert bench.last("a").finish.to_dict()["message"] == "client left"
    bench.add(request("b", [*range(10), 99], 1))
    bench.run()
    assert bench.last("b").cached_tokens == 10


def test_a_waiting_request_can_be_aborted() -> None:
    bench = Bench(max_running_requests=1)
    bench.add(request("a", [1], 5), request("b", [2], 5))
    bench.step()
    bench.scheduler.abort("b")
    bench.run()
    assert (bench.last("b").finish.type, bench.last("b").completion_tokens) == ("abort", 0)
    assert len(bench.tokens("a")) == 5


def test_a_stop_string_ends_a_request_as_stop() -> None:
    bench = Bench()
    bench.add(request("a", [1], 50))
    bench.step()
    assert bench.scheduler.finish("a", "\n\n")
    bench.run()
    assert bench.last("a").finish.to_dict() == {"type": "stop", "matched": "\n\n"}


def test_a_request_ended_while_its_step_is_in_flight_ends_once_and_keeps_its_first_reason() -> None:
    bench = Bench()
    bench.add(request("a", [1], 1))
    batch = bench.scheduler.schedule()
    assert bench.scheduler.finish("a", "x")
    assert not bench.scheduler.abort("a")
    (out,) = bench.scheduler.update(batch, bench.runner.execute(batch))
    assert (out.finish.type, out.new_token_ids) == ("stop", [])


def test_ending_what_is_not_there_is_answered_with_false() -> None:
    bench = Bench()
    assert not bench.scheduler.abort("nobody")
    assert not bench.scheduler.finish("nobody", "x")


# -- what a request carries -------------------------------------------------------------------------------------------
def test_histories_are_carried_only_for_rows_with_penalties() -> None:
    bench = Bench()
    bench.add(request("plain", [1, 2, 3], 3), request("penalised", [4, 5], 3, repetition_penalty=1.2))
    bench.step()
    bench.step()
    sampling = bench.batches[1].sampling
    assert sampling.history_indptr.tolist() == [0, 0, 3]
    assert sampling.history_ids.tolist() == [4, 5, *bench.tokens("penalised")[:1]]
    assert sampling.output_starts.tolist() == [0, 2]


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("start", [0, 3, 9])
def test_prompt_logprobs_are_complete_and_come_once_with_the_first_token(chunk: int, start: int) -> None:
    bench = Bench(max_batch_tokens=chunk)
    prompt = list(range(20, 30))
    bench.add(request("warm", prompt, 1))
    bench.run()
    bench.add(
        request("a", prompt, 3, logprob_start=start, return_logprob=True, num_top_logprobs=2, logprob_token_ids=(7,))
    )
    bench.run()
    first, *rest = bench.outputs["a"]
    assert [entry.token_id for entry in first.prompt_logprobs] == prompt[start:]
    assert first.prompt_logprobs[0].logprob is None
    assert all(len(entry.top) == 2 and len(entry.chosen) == 1 for entry in first.prompt_logprobs[1:])
    assert all(out.prompt_logprobs is None for out in rest)
    assert first.cached_tokens <= start
    assert [len(out.logprobs) for out in bench.outputs["a"]] == [1, 1, 1]


def test_a_seed_may_be_negative() -> None:
    bench = Bench()
    bench.add(request("a", [1], 1, seed=-1))
    bench.run()
    assert bench.batches[0].sampling.seeds.tolist() == [2**64 - 1]


# -- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("a", []), "empty"),
        (request("a", [1, VOCAB]), "1000 of the prompt is outside the vocabulary of 1000"),
        (request("a", [-1]), "-1 of the prompt is outside"),
        (request("a", list(range(200))), "200 tokens, which leaves no room in the context of 200"),
        (request("a", list(range(40)), 30), "needs 18 KV pages of 4 tokens, and the pool has 16"),
        (request("a", list(range(70)), None), "needs 18 KV pages"),
    ],
    ids=["empty", "id too large", "id negative", "too long for the context", "too long for the pool", "prompt alone"],
)
def test_a_prompt_that_can_never_run_is_refused_with_numbers(bad: Request, message: str) -> None:
    bench = Bench(num_pages=16)
    with pytest.raises(PromptError, match=message):
        bench.add(bad)
    assert not bench.scheduler.has_requests


@pytest.mark.parametrize("start", [-1, 3])
def test_a_logprob_start_outside_the_prompt_is_refused(start: int) -> None:
    with pytest.raises(RequestError, match="outside the prompt of 3 tokens"):
        Bench().add(request("a", [1, 2, 3], logprob_start=start))


def test_a_rid_in_use_is_refused() -> None:
    bench = Bench()
    bench.add(request("a", [1]))
    with pytest.raises(RequestError, match="another rid"):
        bench.add(request("a", [2]))


def test_a_step_must_be_answered_before_the_next() -> None:
    bench = Bench()
    bench.add(request("a", [1]))
    batch = bench.scheduler.schedule()
    with pytest.raises(EngineError, match="called again"):
        bench.scheduler.schedule()
    bench.scheduler.update(batch, bench.runner.execute(batch))
    with pytest.raises(EngineError, match="not the step"):
        bench.scheduler.update(batch, bench.runner.execute(batch))


@pytest.mark.parametrize(("granularity", "expected"), [(1, [(0, 10), (10, 3)]), (4, [(0, 8), (8, 5)])])
def test_chunks_begin_where_a_match_could_end(granularity: int, expected: list[tuple[int, int]]) -> None:
    bench = Bench(max_batch_tokens=10)
    bench.cache.match_granularity_tokens = granularity
    bench.add(request("a", list(range(13)), max_new_tokens=1))
    bench.run()
    assert [spans(batch)[0] for batch in bench.batches] == expected


def test_a_chunk_shorter_than_the_granularity_is_taken_as_it_is() -> None:
    bench = Bench(max_batch_tokens=3)
    bench.cache.match_granularity_tokens = 4
    bench.add(request("a", list(range(8)), max_new_tokens=1))
    bench.run()
    assert [spans(batch)[0] for batch in bench.batches] == [(0, 3), (3, 1), (4, 3), (7, 1)]


def test_the_error_of_a_request_without_numbers_names_the_type() -> None:
    bench = Bench(computed_in="float16")
    bench.runner = FakeRunner(64, 4, VOCAB, gives_nan=lambda context: True)
    bench.add(request("a", [1, 2, 3]))
    bench.run()
    assert bench.last("a").finish.message.endswith("or infinity, computed in float16")


def test_nan_in_its_own_tokens_drops_nothing_that_others_had_computed() -> None:
    bench = Bench()
    base = list(range(40))
    bench.add(request("trusted", base, 1))
    bench.run()
    bench.runner.gives_nan = lambda context: context[-1] == 999
    bench.add(request("bad", [*base, *range(50, 70), 999], 1))
    bench.run()
    assert bench.last("bad").finish.err_type == "NaNError"
    bench.add(request("after", [*base, *range(50, 71)], 1))
    bench.run()
    assert (bench.last("after").finish.type, bench.last("after").cached_tokens) == ("length", 40)


def test_nan_drops_what_the_request_computed_before_it_was_preempted_too() -> None:
    bench = Bench(num_pages=10, page_size=2)
    bench.runner.gives_nan = lambda context: context[0] == 4 and len(context) == 16
    bench.add(request("first", [1, 2, 3], 14), request("second", [4, 5, 6], 14))
    bench.run()
    second = bench.last("second")
    assert (second.finish.err_type, second.num_preemptions) == ("NaNError", 1)
    bench.add(request("again", [4, 5, 6], 1))
    bench.run()
    assert bench.last("again").cached_tokens == 0
