"""The public `Engine`, with everything real but the model: threads, event loops, failures, start and end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
from fake_engine import Gate, says

import mooli
import mooli.frontend.engine as engine_module
from mooli import (
    CheckpointError,
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    PromptError,
    RequestFailedError,
    TokenizerError,
)

GREEDY = {"temperature": 0}


# -- threads and asyncio --


@pytest.mark.usefixtures("check_balanced")
def test_many_threads_may_generate_at_once(make_engine):
    engine = make_engine(says("abcdefgh"), max_running_requests=3)
    texts = {}

    def work(i):
        texts[i] = [engine.generate(f"{i}>", {**GREEDY, "max_new_tokens": i + 1})["text"] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == {i: ["abcdefgh"[: i + 1]] * 3 for i in range(8)}


def test_generate_works_inside_a_running_event_loop(make_engine):
    engine = make_engine(says("abc"))

    async def cell():
        assert engine.generate("say>", GREEDY)["text"] == "abc"
        return [chunk["text"] for chunk in engine.generate("say>", GREEDY, stream=True)][-1]

    assert asyncio.run(cell()) == "abc"


@pytest.mark.usefixtures("check_balanced")
def test_async_generate_gives_what_generate_gives(make_engine):
    engine = make_engine(says("abc"))

    async def main():
        one, several = await asyncio.gather(
            engine.async_generate("say>", GREEDY), engine.async_generate(["a>", "b>"], sampling_params=GREEDY)
        )
        stream = await engine.async_generate("say>", GREEDY, stream=True)
        return one, several, [chunk async for chunk in stream]

    one, several, chunks = asyncio.run(main())
    assert one["text"] == "abc"
    assert [answer["text"] for answer in several] == ["abc", "abc"]
    assert chunks[-1]["text"] == "abc"
    assert chunks[-1]["meta_info"]["finish_reason"]["type"] == "stop"


def test_async_generate_refuses_what_generate_refuses(make_engine):
    engine = make_engine()
    with pytest.raises(PromptError):
        asyncio.run(engine.async_generate(""))
    with pytest.raises(TypeError, match="unexpected"):
        asyncio.run(engine.async_generate("a", temperature=1))


@pytest.mark.usefixtures("check_balanced")
@pytest.mark.parametrize("is_stream", [False, True], ids=["answer", "stream"])
def test_cancelling_a_task_aborts_its_requests(make_engine, is_stream):
    gate = Gate()
    engine = make_engine(says("x" * 120, then=None), runner_options={"raises": gate})

    async def read():
        result = await engine.async_generate("say>", {"max_new_tokens": 100}, stream=is_stream)
        async for _ in result:
            pass

    async def main():
        task = asyncio.create_task(read())
        await asyncio.to_thread(gate.entered.wait, 20)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert engine._loop.num_open == 0
    gate.is_open.set()
    stats = engine.get_server_info()["internal_states"][0]
    assert stats["generated_tokens"] <= 2


@pytest.mark.usefixtures("check_balanced")
def test_closing_an_asynchronous_stream_aborts(make_engine):
    engine = make_engine(says("x" * 120, then=None))

    async def main():
        stream = await engine.async_generate("say>", {"max_new_tokens": 100}, stream=True)
        await stream.__anext__()
        await stream.aclose()
        return [chunk async for chunk in stream]

    assert asyncio.run(main()) == []
    assert engine._loop.num_open == 0


@pytest.mark.usefixtures("check_balanced")
def test_an_event_loop_that_goes_away_leaves_nothing_running(make_engine):
    gate = Gate()
    engine = make_engine(says("x" * 120, then=None), runner_options={"raises": gate})

    async def main():
        return await engine.async_generate("say>", {"max_new_tokens": 100}, stream=True)

    stream = asyncio.run(main())
    gate.is_open.set()
    deadline = time.monotonic() + 20
    while engine._loop.num_open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine._loop.num_open == 0
    del stream


# -- failures --


def fails_on(text):
    def raises(batch):
        return MemoryError("planted") if set(text.encode()) & set(batch.token_ids.tolist()) else None

    return raises


@pytest.mark.usefixtures("check_balanced")
def test_a_request_whose_step_fails_raises_and_the_engine_goes_on(make_engine):
    engine = make_engine(says("fine"), runner_options={"raises": fails_on("!")})
    with pytest.raises(RequestFailedError, match="planted"):
        engine.generate("bad!>", GREEDY)
    assert engine.generate("say>", GREEDY)["text"] == "fine"


def test_in_a_batch_or_stream_a_failed_request_says_so_in_its_answer(make_engine):
    engine = make_engine(says("fine"), runner_options={"raises": fails_on("!")}, max_running_requests=1)
    answers = engine.generate(["a>", "bad!>", "b>"], GREEDY)
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["stop", "error", "stop"]
    assert "planted" in answers[1]["meta_info"]["finish_reason"]["message"]
    assert [chunk["meta_info"]["finish_reason"]["type"] for chunk in engine.generate("!", stream=True)] == ["error"]


@pytest.mark.usefixtures("check_balanced")
def test_nan_ends_one_request_only(make_engine):
    engine = make_engine(says("fine"), runner_options={"gives_nan": lambda context: ord("!") in context})
    answers = engine.generate(["a>", "!>"], GREEDY)
    assert answers[0]["text"] == "fine"
    assert "NaN" in answers[1]["meta_info"]["finish_reason"]["message"]


def test_when_the_engine_dies_every_caller_gets_the_cause(make_engine):
    engine = make_engine(says("x"))
    make_engine.core.step = lambda: 1 / 0
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="division by zero") as raised:
            engine.generate("say>")
        assert isinstance(raised.value.__cause__, ZeroDivisionError)


# -- life --


def test_a_tokenizer_that_cannot_be_read_ends_the_loading_of_weights(make_engine, monkeypatch):
    def open_tokenizer(config, path):
        raise TokenizerError("no tokenizer here")

    def build(config, path, *, tokenizer_vocab_size, progress):
        for done in range(2000):
            progress("Loading weights", done, 2000)
            time.sleep(0.01)
        raise AssertionError("all weights were loaded first")

    monkeypatch.setattr(engine_module, "open_tokenizer", open_tokenizer)
    monkeypatch.setattr(engine_module, "build_engine", build)
    with pytest.raises(TokenizerError, match="no tokenizer here"):
        make_engine()


def test_the_tokenizer_is_read_beside_the_weights_and_not_before(make_engine, monkeypatch):
    opened = threading.Event()

    def open_tokenizer(config, path):
        opened.set()

    def build(config, path, *, tokenizer_vocab_size, progress):
        assert not opened.wait(0.05)
        progress("Loading weights", 0, 1)
        assert opened.wait(60)
        raise CheckpointError("no weights here")

    monkeypatch.setattr(engine_module, "open_tokenizer", open_tokenizer)
    monkeypatch.setattr(engine_module, "build_engine", build)
    with pytest.raises(CheckpointError, match="no weights here"):
        make_engine()


def test_weights_that_cannot_be_loaded_wait_for_the_tokenizer_and_are_told(make_engine, monkeypatch):
    def build(config, path, *, tokenizer_vocab_size, progress):
        raise CheckpointError("no weights here")

    monkeypatch.setattr(engine_module, "build_engine", build)
    with pytest.raises(CheckpointError, match="no weights here"):
        make_engine()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mooli-tokenizer")]


def test_shutdown_may_be_called_twice_and_nothing_works_after_it(make_engine):
    engine = make_engine(says("x"))
    engine.shutdown()
    engine.shutdown()
    for use in (
        lambda: engine.generate("say>"),
        lambda: engine.generate("say>", stream=True),
        lambda: asyncio.run(engine.async_generate("say>")),
        engine.flush_cache,
        engine.get_server_info,
    ):
        with pytest.raises(EngineClosedError):
            use()


def test_shutdown_ends_what_is_running(make_engine):
    gate = Gate()
    engine = make_engine(says("x"), runner_options={"raises": gate})
    caught = []

    def work():
        try:
            engine.generate("say>")
        except EngineClosedError as exc:
            caught.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    assert gate.entered.wait(20)
    threading.Timer(0.05, gate.is_open.set).start()
    engine.shutdown()
    thread.join(20)
    assert len(caught) == 1


def test_leaving_a_with_block_shuts_down_and_lets_errors_through(make_engine):
    with pytest.raises(KeyError), make_engine(says("x")) as engine:
        raise KeyError
    with pytest.raises(EngineClosedError):
        engine.generate("say>")


def test_an_engine_that_is_dropped_stops_its_thread(make_engine):
    engine = make_engine()
    thread = engine._loop._thread
    make_engine.engines.clear()
    del engine
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_flush_cache_forgets_prefixes_but_not_while_requests_run(make_engine):
    gate = Gate()
    engine = make_engine(says("x"), runner_options={"raises": gate})
    gate.is_open.set()
    engine.generate("0123456789>", GREEDY)
    gate.is_open.clear()
    gate.entered.clear()
    stream = engine.generate("0123456789>", GREEDY, stream=True)
    assert gate.entered.wait(20)
    threading.Timer(0.05, gate.is_open.set).start()
    first = engine.flush_cache()
    list(stream)
    assert (first.success, "running" in first.message) == (False, True)
    assert engine.flush_cache().success
    assert engine.generate("0123456789>", GREEDY)["meta_info"]["cached_tokens"] == 0


def test_infos_say_what_the_engine_is(make_engine):
    engine = make_engine(served_model_name="radish")
    info = engine.get_server_info()
    assert info["max_total_num_tokens"] == 800
    assert info["random_seed"] == 7
    assert info["version"] == mooli.__version__
    assert info["internal_states"][0]["running"] == 0
    assert engine.get_model_info()["served_model_name"] == "radish"
    assert engine.get_model_info()["is_generation"] is True
    assert engine.tokenizer_manager.tokenizer.encode("a") == [97]


def test_a_chat_template_can_be_given_as_text_or_file(make_engine, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("file:{{ messages[0].content }}")
    for given, rendered in (("text:{{ messages[0].content }}", "text:hi"), (str(file), "file:hi")):
        template = make_engine(chat_template=given).tokenizer_manager.tokenizer.chat_template
        assert template.render([{"role": "user", "content": "hi"}]) == rendered
    with pytest.raises(ConfigError, match="neither a template nor a file"):
        make_engine(chat_template="missing.jinja")
