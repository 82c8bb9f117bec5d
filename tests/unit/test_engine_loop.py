"""The engine's thread: commands, delivery, errors and the end."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
import warnings

import numpy as np
import pytest

from mooli.cache.kv_cache import KVCache
from mooli.engine.core import EngineCore
from mooli.errors import EngineClosedError, EngineDeadError, EngineError, PromptError, RequestError
from mooli.link.thread import EngineLoop
from mooli.runner.fake import FakeRunner
from mooli.scheduler.scheduler import Scheduler
from mooli.types import FinishReason, Request, RequestOutput, SamplingParams

TIMEOUT_S = 20
REFUSED = 13
"""The prompt that `CountingCore` does not take."""


class CountingCore:
    """Gives each request one token a step until `length`. `gate` lets steps through one by one once it is set up."""

    def __init__(self, length=3, gate=None):
        self.length, self.gate = length, gate
        self.live: dict[str, int] = {}
        self.ending: list[RequestOutput] = []
        self.threads: set[int] = set()
        self.num_steps = 0

    def add(self, request):
        self.threads.add(threading.get_ident())
        if request.prompt_ids[0] == REFUSED:
            raise PromptError("no room")
        self.live[request.rid] = 0

    def abort(self, rid, message):
        return self._early(rid, FinishReason("abort"))

    def finish(self, rid, matched):
        return self._early(rid, FinishReason("stop", matched=matched))

    def _early(self, rid, finish):
        if self.live.pop(rid, None) is None:
            return False
        self.ending.append(RequestOutput(rid, finish=finish))
        return True

    @property
    def has_work(self):
        return bool(self.live or self.ending)

    def step(self):
        if self.gate is not None:
            assert self.gate.acquire(timeout=TIMEOUT_S)
        self.num_steps += 1
        outputs, self.ending = self.ending, []
        for rid in list(self.live):
            self.live[rid] += 1
            done = self.live[rid] == self.length
            finish = FinishReason("length", length=self.length) if done else None
            outputs.append(RequestOutput(rid, [self.live[rid]], finish))
            if done:
                del self.live[rid]
        return outputs


class BrokenCore(CountingCore):
    def step(self):
        raise ZeroDivisionError("planted")


@pytest.fixture
def make_loop():
    loops = []

    def make(core, **kwargs):
        loops.append(EngineLoop(core, None, **kwargs))
        return loops[-1]

    yield make
    for loop in loops:
        assert loop.close()


def request(rid):
    return Request(rid=rid, prompt_ids=np.array([REFUSED if rid == "refused" else 1], np.int32))


def submit(loop, *rids):
    """The queues that what happens to each request comes to."""
    return [queue for _, queue in opened(loop, *rids)]


def opened(loop, *rids):
    """Requests that were submitted, each with its queue."""
    pairs = [(request(rid), queue.Queue()) for rid in rids]
    loop.submit([item for item, _ in pairs], [q.put for _, q in pairs])
    return pairs


def until_finish(q):
    items = [q.get(timeout=TIMEOUT_S)]
    while isinstance(items[-1], RequestOutput) and items[-1].finish is None:
        items.append(q.get(timeout=TIMEOUT_S))
    return items


def test_every_request_gets_its_outputs_in_order_and_one_end(make_loop):
    loop = make_loop(CountingCore())
    for q in submit(loop, "a", "b"):
        items = until_finish(q)
        assert [item.new_token_ids for item in items] == [[1], [2], [3]]
        assert q.empty()
    assert loop.num_open == 0


def test_the_core_is_touched_by_one_thread_only(make_loop):
    core = CountingCore()
    loop = make_loop(core)
    callers = [threading.Thread(target=lambda i=i: until_finish(submit(loop, f"r{i}")[0])) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(TIMEOUT_S)
    assert len(core.threads) == 1
    assert threading.get_ident() not in core.threads


def test_requests_of_one_submit_start_in_the_same_step(make_loop):
    core = CountingCore(length=1)
    loop = make_loop(core)
    for q in submit(loop, *(f"r{i}" for i in range(50))):
        until_finish(q)
    assert core.num_steps == 1


def test_no_step_is_made_without_work(make_loop):
    core = CountingCore(length=2)
    loop = make_loop(core)
    until_finish(submit(loop, "a")[0])
    assert loop.call(lambda: core.num_steps) == 2
    assert loop.call(lambda: core.num_steps) == 2


def test_an_aborted_request_ends_with_abort(make_loop):
    gate = threading.Semaphore(0)
    loop = make_loop(CountingCore(length=10**6, gate=gate))
    (q,) = submit(loop, "a")
    gate.release()
    q.get(timeout=TIMEOUT_S)
    loop.abort(["a", "unknown"], "enough")
    gate.release(2)
    assert until_finish(q)[-1].finish.type == "abort"
    gate.release(10)


@pytest.mark.parametrize(
    "end", [lambda loop, a: loop.drop([a], "gone"), lambda loop, a: loop.finish(a, "stop")], ids=["drop", "finish"]
)
def test_an_id_can_be_used_again_at_once_and_the_old_end_does_not_reach_it(make_loop, end):
    gate = threading.Semaphore(0)
    core = CountingCore(length=3, gate=gate)
    loop = make_loop(core)
    ((first, _),) = opened(loop, "a")
    gate.release()
    end(loop, first)
    (q,) = submit(loop, "a")
    gate.release(10)
    items = until_finish(q)
    assert items[-1].finish.type == "length"
    assert [item.new_token_ids for item in items] == [[1], [2], [3]]


@pytest.mark.parametrize("end", ["drop", "finish"])
def test_an_end_that_comes_late_does_not_reach_a_later_request_of_the_id(make_loop, end):
    gate = threading.Semaphore(0)
    loop = make_loop(CountingCore(length=2, gate=gate))
    ((first, first_q),) = opened(loop, "a")
    commands, is_at_it, go_on = loop._commands, threading.Event(), threading.Event()

    class Slow:
        """The queue, where the thread that ends the first request is held up for long."""

        get = commands.get

        def put(self, command):
            if threading.current_thread() is ender:
                is_at_it.set()
                assert go_on.wait(TIMEOUT_S)
            commands.put(command)

    ender = threading.Thread(target=lambda: loop.drop([first], "gone") if end == "drop" else loop.finish(first, "x"))
    loop._commands = Slow()
    ender.start()
    assert is_at_it.wait(TIMEOUT_S)
    gate.release(2)
    assert eventually(lambda: loop.num_open == 0)
    (second_q,) = submit(loop, "a")
    go_on.set()
    ender.join(TIMEOUT_S)
    gate.release(10)
    assert [item.new_token_ids for item in until_finish(second_q)] == [[1], [2]]
    assert until_finish(first_q)[-1].finish.type == "length"


def test_ending_a_request_that_has_ended_does_not_reach_a_later_one_of_its_id(make_loop):
    gate = threading.Semaphore(0)
    loop = make_loop(CountingCore(length=2, gate=gate))
    ((first, q),) = opened(loop, "a")
    gate.release(2)
    until_finish(q)
    (later,) = submit(loop, "a")
    loop.drop([first], "gone")
    loop.finish(first, "x")
    gate.release(10)
    assert until_finish(later)[-1].finish.type == "length"


@pytest.mark.slow
def test_threads_that_use_one_id_hear_of_their_own_requests_only(make_loop):
    """Whoever ends one and whoever begins the next, in any order that the interpreter makes of it."""
    core = EngineCore(
        Scheduler(KVCache(64, 4), max_batch_tokens=64, max_running_requests=8, context_length=200, vocab_size=64),
        FakeRunner(64, 4, 64, next_token=lambda context: context[0]),
    )
    loop = make_loop(core)
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            first, second = marked(1, 3), marked(2, 40)
            loop.submit([first], [lambda item: None])
            dropper = threading.Thread(target=loop.drop, args=([first], "gone"))
            dropper.start()
            q = queue.Queue()
            while True:
                try:
                    loop.submit([second], [q.put])
                    break
                except RequestError:
                    assert second.rid == first.rid
            items = until_finish(q)
            dropper.join(TIMEOUT_S)
            assert [token_id for item in items for token_id in item.new_token_ids] == [2] * 40
    finally:
        sys.setswitchinterval(switch_interval)
    assert loop.num_open == 0


def marked(token_id, length):
    sampling = SamplingParams(max_new_tokens=length, temperature=0.0)
    return Request(rid="same", prompt_ids=np.array([token_id] * 5, np.int32), sampling=sampling)


def test_an_id_in_use_is_refused_and_nothing_of_that_call_starts(make_loop):
    gate = threading.Semaphore(0)
    core = CountingCore(gate=gate)
    loop = make_loop(core)
    submit(loop, "a")
    with pytest.raises(RequestError, match="still running"):
        submit(loop, "b", "a")
    assert loop.num_open == 1
    gate.release(10)


def test_a_request_the_core_refuses_gets_the_error_and_others_go_on(make_loop):
    loop = make_loop(CountingCore())
    refused, good = submit(loop, "refused", "good")
    assert isinstance(until_finish(refused)[0], PromptError)
    assert until_finish(good)[-1].finish.type == "length"


def test_a_sink_that_fails_ends_its_own_request_only(make_loop):
    core = CountingCore()
    loop = make_loop(core)
    good = queue.Queue()

    def bad(item):
        raise RuntimeError("the reader has gone")

    loop.submit([request("bad"), request("good")], [bad, good.put])
    assert until_finish(good)[-1].finish.type == "length"
    assert loop.num_open == 0
    assert loop.call(lambda: core.has_work) is False


class Panic(BaseException):
    """What a panic inside a library that is written in Rust is raised as: no Exception."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
@pytest.mark.parametrize("when", ["first", "last"])
def test_a_sink_that_has_failed_is_told_of_the_end_once(make_loop, kind, when):
    core = CountingCore()
    loop = make_loop(core)
    heard, good = queue.Queue(), queue.Queue()

    def fails(item):
        heard.put(item)
        if isinstance(item, RequestOutput) and (when == "first" or item.finish is not None):
            raise kind("a bug in the taker")

    loop.submit([request("bad"), request("good")], [fails, good.put])
    assert until_finish(good)[-1].finish.type == "length"
    assert loop.call(lambda: core.has_work) is False
    items = [heard.get(timeout=TIMEOUT_S) for _ in range(2 if when == "first" else 4)]
    assert isinstance(items[-1], EngineError)
    assert heard.empty()
    assert loop.num_open == 0
    (again,) = submit(loop, "bad")
    assert until_finish(again)[-1].finish.type == "length"


def test_sinks_that_fail_alike_are_shown_in_full_once(make_loop, caplog):
    loop = make_loop(CountingCore())

    def fails(item):
        raise RuntimeError("the reader has gone")

    loop.submit([request(f"r{i}") for i in range(20)], [fails] * 20)
    (last,) = submit(loop, "last")
    until_finish(last)
    told = [record for record in caplog.records if "its taker failed" in record.message]
    assert len(told) == 20
    assert sum(record.exc_info is not None for record in told) == 1


def test_ctrl_c_in_the_middle_of_a_submit_leaves_what_drop_can_end(make_loop):
    core = CountingCore(length=10**6)
    loop = make_loop(core)
    commands = loop._commands

    class Interrupted:
        get = commands.get

        def put(self, command):
            commands.put(command)
            loop._commands = commands
            raise KeyboardInterrupt

    loop._commands = Interrupted()
    mine = request("a")
    with pytest.raises(KeyboardInterrupt):
        loop.submit([mine], [lambda item: None])
    loop.drop([mine], "gone")
    assert loop.call(lambda: None) is None
    assert eventually(lambda: not loop.call(lambda: core.has_work))
    assert loop.num_open == 0


def test_call_runs_on_the_engines_thread_and_hands_back_result_and_error(make_loop):
    loop = make_loop(CountingCore())
    assert loop.call(threading.get_ident) != threading.get_ident()
    with pytest.raises(KeyError, match="planted"):
        loop.call(lambda: {}["planted"])
    assert loop.is_alive


def test_when_the_core_dies_every_request_gets_the_cause(make_loop):
    loop = make_loop(BrokenCore())
    for q in submit(loop, "a", "b"):
        (error,) = until_finish(q)
        assert isinstance(error, EngineDeadError)
        assert isinstance(error.__cause__, ZeroDivisionError)
    for use in (lambda: submit(loop, "c"), lambda: loop.call(lambda: 1)):
        with pytest.raises(EngineDeadError, match="planted") as raised:
            use()
        assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_start_hook_runs_first_on_the_engines_thread(make_loop):
    seen = []
    loop = make_loop(CountingCore(), on_thread_start=lambda: seen.append(threading.get_ident()))
    assert seen == [loop.call(threading.get_ident)]


def test_a_start_hook_that_fails_is_the_cause_of_death(make_loop):
    def fail():
        raise OSError("cannot pin")

    loop = make_loop(CountingCore(), on_thread_start=fail)
    with pytest.raises(EngineDeadError, match="cannot pin"):
        loop.call(lambda: 1)


def test_close_ends_open_requests_and_waiting_calls():
    gate = threading.Semaphore(0)
    loop = EngineLoop(CountingCore(length=10**6, gate=gate), None)
    (q,) = submit(loop, "a")
    closer = threading.Thread(target=loop.close)
    closer.start()
    gate.release()
    closer.join(TIMEOUT_S)
    assert isinstance(until_finish(q)[-1], EngineClosedError)
    with pytest.raises(EngineClosedError):
        submit(loop, "b")
    with pytest.raises(EngineClosedError):
        loop.call(lambda: 1)
    assert loop.close()


def test_close_from_the_engines_own_thread_does_not_wait_for_itself():
    loop = EngineLoop(CountingCore(), None)
    assert loop.call(loop.close) is False
    assert loop.close()


def test_nothing_is_kept_of_requests_that_were_dropped(make_loop):
    gate = threading.Semaphore(0)
    core = CountingCore(length=10**6, gate=gate)
    loop = make_loop(core)
    for i in range(20):
        ((dropped, _),) = opened(loop, f"r{i}")
        loop.drop([dropped], "gone")
    gate.release(100)
    assert loop.num_open == 0
    assert loop.call(lambda: None) is None
    assert eventually(lambda: not loop.call(lambda: core.has_work))


def test_a_forked_child_gets_an_error_and_the_parent_goes_on(make_loop):
    loop = make_loop(CountingCore())
    uses = [lambda: submit(loop, "a"), lambda: loop.call(lambda: 1), loop.check_process]
    silent = [lambda: loop.drop([mine], "gone"), lambda: loop.finish(mine, "x"), lambda: loop.abort(["open"], "enough")]
    ((mine, held),) = opened(loop, "open")

    def in_child():
        told = []
        for use in uses:
            with pytest.raises(EngineClosedError, match="forked") as raised:
                use()
            told.append(str(raised.value))
        for use in silent:
            use()
        assert not loop.is_alive
        assert loop.close() is False

    # Held by a thread that does not exist in the child, as a lock is that was taken at the moment of the fork.
    taken, release = threading.Event(), threading.Event()

    def hold():
        with loop._sinks.lock:
            taken.set()
            release.wait(TIMEOUT_S)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(TIMEOUT_S)
    status = run_in_fork(in_child)
    release.set()
    holder.join()
    assert status == 0
    assert until_finish(held)[-1].finish.type == "length"
    assert loop.call(lambda: 1) == 1


def run_in_fork(function):
    """Exit status of a forked child that runs `function`; a child that hangs is killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks beside threads, which this is about
        pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TIMEOUT_S)
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def eventually(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()
