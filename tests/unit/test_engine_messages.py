"""What travels between server and engine process: frames, errors by name, and what is not understood."""

from __future__ import annotations

import asyncio

import pytest
from engine_link import connected, request, submit, within
from hypothesis import given, settings
from hypothesis import strategies as st

from mooli.engine import messages
from mooli.engine.client import copy_error
from mooli.engine.endings import error_named, exit_words
from mooli.errors import EngineDeadError, EngineError, PromptError
from mooli.scheduler.stats import StepStats
from mooli.types import FinishReason, RequestOutput, TokenLogprobs


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
