"""What travels between server and engine process: frames, errors by name, and what is not understood."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import numpy as np
import pytest
from engine_link import connected, request, submit, with_engine, within
from fake_engine import byte_tokenizer, fake_build
from hypothesis import given, settings
from hypothesis import strategies as st

from mooli.config import EngineConfig
from mooli.engine import messages, process
from mooli.engine.child import error_named, exit_words
from mooli.errors import EngineDeadError, EngineError, PromptError, RequestError
from mooli.frontend.inputs import MAX_SALT_CHARS, NOBODY, Caller, GenerateCall
from mooli.frontend.text_side import input_rules
from mooli.link.client import EngineClient
from mooli.link.link import copy_error
from mooli.scheduler.stats import StepStats
from mooli.types import FinishReason, Request, RequestOutput, TokenLogprobs


@pytest.fixture(autouse=True)
def quiet(caplog):
    """What is logged of planted faults is not worth showing."""
    caplog.set_level("CRITICAL", logger="mooli")


# -- frames -----------------------------------------------------------------------------------------------------------
SAMPLES = [
    messages.Progress("Loading", 1, 2),
    messages.Outputs(
        [
            RequestOutput("r", [1], FinishReason("stop", matched="x"), logprobs=[TokenLogprobs(1, -0.5, [(-1.0, 2)])]),
            RequestOutput("s", prompt_logprobs=[TokenLogprobs(3, None)], finish=FinishReason("stop", matched=7)),
        ],
        {"running": 1},
        StepStats(step=3),
    ),
    messages.Refused("r", "PromptError", "Füße"),
    messages.Reply(3, {"a": 1}),
    messages.Failed("ConfigError", ""),
]


@settings(deadline=None)
@given(st.data())
def test_a_stream_of_messages_may_be_cut_anywhere(data):
    stream = b"".join(map(messages.encode, SAMPLES))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    frames = messages.Frames(messages.ToServer)
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [message for piece in pieces for message in frames.push(piece)] == SAMPLES


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff\xff\xff\xff",
        b"\x01\x00\x00\x00\xc1",
        b"\x00\x00\x00\x00",
        messages.encode(messages.Stop()),
        b"\x04\x00\x00\x00\x94\xa1ab",
        messages.encode(SAMPLES[0])[:-1] + b"\xa0",
    ],
    ids=["too long", "no msgpack", "empty", "of the other direction", "unknown kind", "a wrong type"],
)
def test_what_is_no_message_is_an_error(bad):
    frames = messages.Frames(messages.ToServer)
    good = messages.encode(SAMPLES[0])
    read = frames.push(good + bad)
    assert next(read) == SAMPLES[0]
    with pytest.raises(EngineError, match="between server and engine"):
        next(read)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_make_anything_but_messages_or_an_error(data):
    try:
        for message in messages.Frames(messages.ToServer).push(data):
            assert isinstance(message, messages.Message)
    except EngineError:
        pass


# -- what a call may weigh ---------------------------------------------------------------------------------------------
def prepared(caller=NOBODY, **arguments):
    """Requests as a server's routes make them."""
    config = EngineConfig.from_kwargs(model_path="fake", random_seed=1)
    return (
        input_rules(config, fake_build(config).facts, byte_tokenizer())
        .prepare(GenerateCall(**arguments), caller)
        .requests
    )


HEAVY = {
    "stop": ["s" * 100] * 10,
    "logit_bias": {str(token_id): 1.0 for token_id in range(200)},
    "stop_token_ids": list(range(200)),
    "max_new_tokens": 1,
}


def test_what_the_prompts_of_a_call_share_is_sent_once():
    requests = prepared(
        prompt=["ab"] * 4000, sampling_params=HEAVY, cache_salt="s" * MAX_SALT_CHARS, return_logprob=True,
        token_ids_logprob=list(range(200)), caller=Caller("c" * 200, "t" * 200),
    )  # fmt: skip
    frame = messages.encode(messages.Submit.of((str(i), request) for i, request in enumerate(requests)))
    assert len(frame) < 4000 * 50 + 10_000
    assert b"ssss" not in frame
    (submit,) = messages.Frames(messages.ToEngine).push(frame)
    got = submit.to_requests()
    assert [request.rid for request in got] == [str(i) for i in range(4000)]
    assert [request.sampling.seed for request in got] == [request.sampling.seed for request in requests]
    assert got[-1].sampling == replace(requests[-1].sampling, stop=())
    assert got[-1].logprob_token_ids == requests[-1].logprob_token_ids
    assert len(got[-1].namespace) < 100


def test_a_prompt_of_many_samples_is_sent_once():
    requests = prepared(input_ids=[7] * 100, sampling_params={"n": 128, "max_new_tokens": 1})
    frame = messages.encode(messages.Submit.of((str(i), request) for i, request in enumerate(requests)))
    assert len(frame) < 128 * 40 + 1000
    (submit,) = messages.Frames(messages.ToEngine).push(frame)
    assert {tuple(request.prompt_ids.tolist()) for request in submit.to_requests()} == {(7,) * 100}


def test_each_request_keeps_what_is_its_own():
    given = [{"max_new_tokens": 3, "stop": "x", "seed": 5}, {"temperature": 0.5}, {"temperature": 0.5}]
    requests = prepared(
        prompt=["a", "bcd", "bcd"], sampling_params=given, return_logprob=[True, True, False],
        logprob_start_len=[0, 1, None], top_logprobs_num=[4, 0, None],
    )  # fmt: skip
    # The second stands for content, and the third has its prompt and no content.
    requests[1].key_ids = np.array([2**30 + 5] * len(requests[1].prompt_ids), np.int32)
    requests[2].prompt_ids = requests[1].prompt_ids
    (submit,) = messages.Frames(messages.ToEngine).push(
        messages.encode(messages.Submit.of((request.rid, request) for request in requests))
    )
    assert [got.key_ids is None for got in submit.to_requests()] == [True, False, True]
    for sent, got in zip(requests, submit.to_requests(), strict=True):
        assert got.prompt_ids.tolist() == sent.prompt_ids.tolist()
        for name in Request.__slots__:
            if name == "key_ids" and sent.key_ids is not None:
                assert got.key_ids is not None and got.key_ids.tolist() == sent.key_ids.tolist()
            elif name not in ("prompt_ids", "sampling"):
                assert getattr(got, name) == getattr(sent, name), name
        assert got.sampling == replace(sent.sampling, stop=())


def test_thousands_of_prompts_with_a_large_salt_go_over_the_link():
    async def test(client: EngineClient) -> None:
        requests = prepared(prompt=["ab"] * 4000, sampling_params=HEAVY, cache_salt="s" * MAX_SALT_CHARS)
        takers = submit(client, *requests)
        for taker in takers:
            await taker.ended.wait()
        assert {taker.finish.type for taker in takers} <= {"length", "stop"}
        assert client.is_alive

    with_engine(test)


def test_a_frame_that_is_too_large_is_refused_before_it_is_sent(monkeypatch):
    async def test() -> None:
        client, theirs = await connected()
        theirs.setblocking(False)
        with theirs:
            theirs.recv(1 << 20)  # how it was started
            monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 2000)
            with pytest.raises(RequestError, match=r"too large: \d+ bytes are more than the 2000"):
                submit(client, request("a"), request("b", [5] * 500))
            assert client.num_open == 0
            await asyncio.sleep(0)
            with pytest.raises(BlockingIOError):
                theirs.recv(1)
            submit(client, request("a"))
            assert client.is_alive
            await client.close()

    asyncio.run(within(test()))


def test_outputs_that_are_too_large_for_a_frame_go_in_several(monkeypatch):
    frames, core = stepped(monkeypatch, 2000, [answer_of(f"r{i}", num_tokens=50) for i in range(30)])
    assert [output.rid for message in frames for output in message.outputs] == [f"r{i}" for i in range(30)]
    assert len(frames) > 1
    assert core.aborted == []


def test_an_output_that_is_too_large_for_a_frame_ends_its_request_only(monkeypatch):
    answers = [answer_of("small", 1), answer_of("large", 5000), answer_of("other", 1)]
    frames, core = stepped(monkeypatch, 2000, answers)
    told = [message for message in frames if isinstance(message, messages.Outputs)]
    assert [output.rid for message in told for output in message.outputs] == ["small", "other"]
    (refused,) = [message for message in frames if isinstance(message, messages.Refused)]
    assert (refused.name, refused.error) == ("large", "RequestError")
    assert "log-probabilities" in refused.message
    assert core.aborted == ["large"]


def answer_of(rid, num_tokens):
    return RequestOutput(rid, [7] * num_tokens)


def stepped(monkeypatch, max_frame_bytes, outputs):
    """What the engine process says after a step with `outputs`, and the core."""

    class Core:
        has_work, last_step = True, StepStats(step=1)

        def __init__(self):
            self.aborted = []

        def step(self):
            return outputs

        def stats(self):
            return {"running": 1}

        def abort(self, rid):
            self.aborted.append(rid)

    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", max_frame_bytes)
    near, far = socket.socketpair()
    with near, far:
        core = Core()
        assert process.take_turn(process.Wire(far), core, wait=False)
        return list(messages.Frames(messages.ToServer).push(near.recv(1 << 20))), core


def test_a_long_answer_goes_out_while_the_next_step_is_computed():
    near, far = socket.socketpair()
    long = messages.encode(messages.Outputs([answer_of("long", 1_000_000)], {}, StepStats()))
    received = bytearray()

    class Core:
        has_work, last_step = True, StepStats()

        def __init__(self):
            self.answers = [answer_of("long", 1_000_000), answer_of("next", 1)]

        def step(self):
            while len(self.answers) == 1 and len(received) < len(long):  # the second step
                received.extend(near.recv(1 << 20))
            return [self.answers.pop(0)]

        def stats(self):
            return {}

    with near, far:
        near.settimeout(60)
        wire, core = process.Wire(far), Core()
        for _ in range(2):
            assert process.take_turn(wire, core, wait=False)
        wire.drain()
        received.extend(near.recv(1 << 20))
    outputs = [output for message in messages.Frames(messages.ToServer).push(received) for output in message.outputs]
    assert [(output.rid, len(output.new_token_ids)) for output in outputs] == [("long", 1_000_000), ("next", 1)]


@pytest.mark.parametrize("bad", [b"\xff\xff\xff\xff", messages.encode(messages.Ready({"no": "facts"}))])
def test_an_engine_that_is_not_understood_is_ended(bad):
    async def test() -> None:
        client, theirs = await connected()
        with theirs:
            (taker,) = submit(client, request("a"))
            theirs.sendall(bad)
            await taker.ended.wait()
            assert isinstance(taker.end, EngineDeadError)
            assert "not understood" in str(taker.end)
            assert not client.is_alive
            await client.close()

    asyncio.run(within(test()))


def test_last_words_are_heard_although_a_write_fails_first():
    async def test() -> None:
        client, theirs = await connected()
        (taker,) = submit(client, request("a"))  # the first, so its name in the engine is "0"
        last = [RequestOutput("0", [5], FinishReason("length", length=1))]
        theirs.sendall(messages.encode(messages.Outputs(last, {}, StepStats())))
        theirs.sendall(messages.encode(messages.Failed("OutOfMemoryError", "planted")))
        theirs.close()
        (late,) = submit(client, request("b"))  # written before the loop reads: a broken pipe
        await late.ended.wait()
        assert taker.finish.type == "length"
        assert "planted" in str(late.end)
        await client.close()

    asyncio.run(within(test()))


def test_errors_travel_by_name():
    assert isinstance(error_named("PromptError", "x"), PromptError)
    for name in ("KeyError", "MooliError.__init__", "annotations", ""):
        assert isinstance(error_named(name, "x"), EngineDeadError)
    error = EngineDeadError("why")
    assert copy_error(error) is not error
    assert str(copy_error(error)) == "why"


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit status 0"), (3, "exit status 3"), (-11, "SIGSEGV"), (-9, "run out of memory"), (-250, "unknown")],
)
def test_an_exit_status_is_told_in_words(status, words):
    assert words in exit_words(status)
