"""The public `Engine`, with everything real but the model: what goes in and what comes out."""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import signal
import sys
import threading
import time

import numpy as np
import pytest
from fake_engine import EOS, Gate, says

import mooli
from mooli.frontend import call, generation, inputs
from mooli.frontend.call import Bell
from mooli.frontend.generation import Generation
from mooli.frontend.inputs import GenerateCall
from mooli.frontend.stop import StopStrings
from mooli.link.thread import EngineLoop

GREEDY = {"temperature": 0}


# -- inputs and the shape of answers --


def test_one_prompt_gives_one_dict(make_engine):
    answer = make_engine(says("hello")).generate("say>", GREEDY)
    assert answer["text"] == "hello"
    assert answer["output_ids"] == [*b"hello", EOS]
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": EOS}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (4, 6, 0)
    assert meta["cached_tokens_details"] == {"device": 0, "host": 0}
    assert (meta["reasoning_tokens"], meta["num_retractions"], meta["weight_version"]) == (0, 0, "default")
    assert meta["e2e_latency"] > 0
    assert len(meta["id"]) == 32


@pytest.mark.parametrize("prompts", [["say>"], ["a>", "b>"]], ids=["of one", "of two"])
def test_a_list_of_prompts_gives_a_list(make_engine, prompts):
    answers = make_engine(says("x")).generate(prompts, GREEDY)
    assert [answer["text"] for answer in answers] == ["x"] * len(prompts)


@pytest.mark.parametrize("ids", [[1, 2, 62], (1, 2, 62), np.array([1, 2, 62])], ids=["list", "tuple", "array"])
def test_input_ids_stand_for_a_prompt(make_engine, ids):
    assert make_engine(says("x")).generate(input_ids=ids, sampling_params=GREEDY)["text"] == "x"


def test_lists_of_input_ids_are_a_batch(make_engine):
    answers = make_engine(says("x")).generate(input_ids=[[62], [1, 62]], sampling_params=GREEDY)
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [1, 2]


def test_sampling_params_may_be_one_for_each_prompt(make_engine):
    answers = make_engine(says("abc")).generate(["1>", "2>"], [{**GREEDY, "max_new_tokens": n} for n in (1, 2)])
    assert [answer["text"] for answer in answers] == ["a", "ab"]
    assert answers[0]["meta_info"]["finish_reason"] == {"type": "length", "length": 1}


def test_max_new_tokens_zero_only_fills_the_cache(make_engine):
    engine = make_engine(says("x"))
    answer = engine.generate("0123456789>", {"max_new_tokens": 0})
    assert (answer["text"], answer["output_ids"]) == ("", [])
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert engine.generate("0123456789>")["meta_info"]["cached_tokens"] == 10


def test_positional_arguments_have_sglangs_order():
    names = " ".join(inspect.signature(mooli.Engine.generate).parameters)
    assert names == (
        "self prompt sampling_params input_ids image_data audio_data video_data mm_hashes mm_content_hashes"
        " return_logprob logprob_start_len top_logprobs_num token_ids_logprob lora_path custom_logit_processor"
        " require_reasoning return_hidden_states return_routed_experts routed_experts_start_len stream bootstrap_host"
        " bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank kv_hints data_parallel_rank"
        " external_trace_header rid session_params priority session_id cache_salt no_store return_cache_report"
        " pin"
    )


# -- n --


def test_samples_are_grouped_by_prompt_and_each_has_its_own_id(make_engine):
    engine = make_engine()
    params = {"n": 3, "max_new_tokens": 5, "sampling_seed": 11, "ignore_eos": True}
    answers = engine.generate(["first", "second!"], params)
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [5, 5, 5, 7, 7, 7]
    assert len({answer["meta_info"]["id"] for answer in answers}) == 6
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 6
    assert [a["output_ids"] for a in engine.generate(["first", "second!"], params)] == [
        a["output_ids"] for a in answers
    ]
    alone = engine.generate("first", {**params, "n": 1})
    assert alone["output_ids"] == answers[0]["output_ids"]


def test_n_of_a_single_prompt_gives_a_list_that_shares_the_prompt(make_engine):
    prompt = "p" * 60
    answers = make_engine(says("x")).generate(prompt, {"n": 3, "max_new_tokens": 2})
    assert len(answers) == 3
    assert sorted(answer["meta_info"]["cached_tokens"] for answer in answers)[1:] == [59, 59]


def test_unset_seeds_follow_the_engines_random_seed(make_engine):
    params = {"max_new_tokens": 8, "ignore_eos": True}
    first, second = (make_engine(random_seed=3) for _ in range(2))
    ids = [first.generate("x", params)["output_ids"] for _ in range(2)]
    assert ids == [second.generate("x", params)["output_ids"] for _ in range(2)]
    assert ids[0] != ids[1]
    assert make_engine(random_seed=4).generate("x", params)["output_ids"] != ids[0]


# -- streams --


def test_chunks_hold_everything_so_far(make_engine):
    chunks = list(make_engine(says("abc")).generate("say>", GREEDY, stream=True))
    assert all(b["text"].startswith(a["text"]) for a, b in itertools.pairwise(chunks))
    assert all(chunk["meta_info"]["finish_reason"] is None for chunk in chunks[:-1])
    assert chunks[-1]["text"] == "abc"
    assert chunks[-1]["output_ids"] == [*b"abc", EOS]
    assert "index" not in chunks[0]


RICH = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "token_ids_logprob": [5]}
GROWING = ("output_token_logprobs",)
ONCE = (
    "input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs", "output_top_logprobs",
    "output_token_ids_logprobs",
)  # fmt: skip


def test_what_may_be_long_is_in_the_last_of_growing_chunks_only(make_engine):
    engine = make_engine(says("abc"))
    whole = engine.generate("say>", GREEDY, **RICH)["meta_info"]
    *before, last = [chunk["meta_info"] for chunk in engine.generate("say>", GREEDY, stream=True, **RICH)]
    for name in (*GROWING, *ONCE):
        assert last[name] == whole[name]
    assert [len(meta["output_token_logprobs"]) for meta in before] == [meta["completion_tokens"] for meta in before]
    assert [meta[name] for meta in before for name in ONCE] == [[]] * len(ONCE) * len(before)


def test_incremental_chunks_hold_each_entry_once(make_engine):
    whole = make_engine(says("abc")).generate("say>", GREEDY, **RICH)["meta_info"]
    engine = make_engine(says("abc"), incremental_streaming_output=True)
    metas = [chunk["meta_info"] for chunk in engine.generate("say>", GREEDY, stream=True, **RICH)]
    for name in (*GROWING, *ONCE):
        assert [entry for meta in metas for entry in meta[name]] == whole[name]
    assert metas[0]["input_token_logprobs"] == whole["input_token_logprobs"]


def test_incremental_chunks_are_disjoint(make_engine):
    engine = make_engine(says("añb👍c"), incremental_streaming_output=True)
    chunks = list(engine.generate("say>", GREEDY, stream=True, return_logprob=True))
    assert "".join(chunk["text"] for chunk in chunks) == "añb👍c"
    assert [i for chunk in chunks for i in chunk["output_ids"]] == [*"añb👍c".encode(), EOS]
    assert sum(len(chunk["meta_info"]["output_token_logprobs"]) for chunk in chunks) == len("añb👍c".encode()) + 1
    assert "�" not in "".join(chunk["text"] for chunk in chunks)


@pytest.mark.parametrize("of_request", [False, True], ids=["engine", "request"])
def test_stream_interval_is_the_least_number_of_tokens_between_chunks(make_engine, of_request):
    params = {**GREEDY, "max_new_tokens": 20} | ({"stream_interval": 5} if of_request else {})
    engine = make_engine(says("x" * 50), stream_interval=1 if of_request else 5)
    sizes = [len(chunk["output_ids"]) for chunk in engine.generate("say>", params, stream=True)]
    assert sizes[-1] == 20
    assert all(b - a >= 5 for a, b in itertools.pairwise(sizes[:-1]))


def test_chunks_of_several_requests_have_their_index(make_engine):
    last = {}
    for chunk in make_engine(says("abc")).generate(["a>", "b>"], {**GREEDY, "n": 2}, stream=True):
        last[chunk["index"]] = chunk
    assert sorted(last) == [0, 1, 2, 3]
    assert all(chunk["text"] == "abc" and chunk["meta_info"]["finish_reason"] for chunk in last.values())


@pytest.mark.usefixtures("check_balanced")
@pytest.mark.parametrize("how", ["close", "drop", "never read"])
def test_a_stream_nobody_reads_is_aborted(make_engine, how):
    engine = make_engine(says("x" * 100), max_running_requests=4)
    streams = [engine.generate("say>", {"max_new_tokens": 100, **GREEDY}, stream=True) for _ in range(6)]
    if how != "never read":
        for stream in streams[:3]:
            next(stream)
    if how == "close":
        for stream in streams:
            stream.close()
            assert list(stream) == []
    del streams
    if how != "close":
        stream = None
    gc.collect()


@pytest.mark.usefixtures("check_balanced")
def test_ctrl_c_while_a_stream_waits_ends_its_requests_although_the_traceback_keeps_it(make_engine):
    gate = Gate()
    engine = make_engine(says("x" * 100), runner_options={"raises": gate})
    stream = engine.generate("say>", {"max_new_tokens": 100, **GREEDY}, stream=True)
    with ctrl_c_in(Bell.wait) as sent, pytest.raises(KeyboardInterrupt) as kept:
        next(stream)
    assert sent.is_set()
    assert engine._loop.num_open == 0
    assert list(stream) == []
    gate.is_open.set()
    assert any(frame.frame.f_locals.get("self") is stream for frame in kept.traceback)


@pytest.mark.usefixtures("check_balanced")
def test_ctrl_c_while_an_answer_is_waited_for_ends_its_requests(make_engine):
    gate = Gate()
    engine = make_engine(says("x" * 100), runner_options={"raises": gate})
    with ctrl_c_in(Bell.wait), pytest.raises(KeyboardInterrupt):
        engine.generate(["a>", "b>"], {"max_new_tokens": 100, **GREEDY})
    assert engine._loop.num_open == 0
    gate.is_open.set()


@pytest.mark.usefixtures("check_balanced")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("place", ["EngineLoop.submit", "Call.__init__", "Stream.__init__"])
def test_ctrl_c_while_a_call_begins_leaves_nothing_running(make_engine, monkeypatch, place, stream):
    """At the end of each of these, with the traceback kept."""
    engine = make_engine(says("x" * 100))
    owner, name = place.split(".")
    owner = {"EngineLoop": EngineLoop, "Call": call.Call, "Stream": call.Stream}[owner]
    method = getattr(owner, name)

    def interrupted(*args, **kwargs):
        method(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        if place == "Stream.__init__" and not stream:
            engine.generate("say>", GREEDY)
            return
        with pytest.raises(KeyboardInterrupt) as kept:
            engine.generate("say>", {"max_new_tokens": 100, **GREEDY}, stream=stream)
    assert eventually(lambda: not engine._loop.call(lambda: make_engine.core.has_work))
    assert engine._loop.num_open == 0
    assert kept.traceback


@pytest.mark.usefixtures("check_balanced")
def test_an_exception_in_the_body_of_a_loop_ends_the_stream_that_only_the_loop_had(make_engine):
    engine = make_engine(says("x" * 100))

    def read():
        for _ in engine.generate("say>", {"max_new_tokens": 100, **GREEDY}, stream=True):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        read()
    assert engine._loop.num_open == 0
    assert kept.traceback


@pytest.mark.usefixtures("check_balanced")
def test_a_stream_that_is_closed_late_does_not_end_a_later_request_of_its_id(make_engine):
    gate = Gate()
    engine = make_engine(says("abc"), runner_options={"raises": gate})
    first = engine.generate("say>", GREEDY, rid="mine", stream=True)
    gate.is_open.set()
    assert eventually(lambda: engine._loop.num_open == 0)  # it has ended, and nobody has read that
    gate.is_open.clear()
    second = engine.generate("say>", GREEDY, rid="mine", stream=True)
    first.close()
    gate.is_open.set()
    assert list(second)[-1]["text"] == "abc"


@contextlib.contextmanager
def ctrl_c_in(function):
    """Ctrl-C once this thread is inside `function`."""
    reader, sent = threading.get_ident(), threading.Event()

    def is_inside():
        frame = sys._current_frames()[reader]
        return frame.f_code is function.__code__

    def send():
        if eventually(is_inside):
            sent.set()
            signal.pthread_kill(reader, signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    yield sent
    sender.join()


def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_a_stream_keeps_its_engine_alive(make_engine):
    stream = make_engine(says("abc")).generate("say>", GREEDY, stream=True)
    make_engine.engines.clear()
    gc.collect()
    assert list(stream)[-1]["text"] == "abc"


# -- how it stops --


@pytest.mark.usefixtures("check_balanced")
@pytest.mark.parametrize(
    ("params", "text", "matched"),
    [
        ({"stop": "cde"}, "ab", "cde"),
        ({"stop": ["zz", "fg", "de"]}, "abc", "de"),
        ({"stop": "cde", "no_stop_trim": True}, "abcde", "cde"),
        ({"stop_token_ids": [ord("d")]}, "abc", ord("d")),
        ({"stop_token_ids": [ord("d")], "no_stop_trim": True}, "abcd", ord("d")),
        ({"stop": "d", "stop_token_ids": [ord("d")], "no_stop_trim": True}, "abcd", "d"),
        ({"stop": "nowhere"}, "abcdefgh", EOS),
    ],
    ids=str,
)
def test_what_stops_the_text_is_named_and_trimmed(make_engine, params, text, matched):
    answer = make_engine(says("abcdefgh")).generate("say>", {**GREEDY, **params})
    assert answer["text"] == text
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}


def test_output_ids_end_with_the_token_that_completes_the_stop_string(make_engine):
    answer = make_engine(says("abcdefgh")).generate("say>", {**GREEDY, "stop": "cd"}, return_logprob=True)
    assert answer["output_ids"] == [*b"abcd"]
    assert answer["meta_info"]["completion_tokens"] == 4
    assert len(answer["meta_info"]["output_token_logprobs"]) == 4


def test_a_stream_never_shows_the_beginning_of_a_stop_string(make_engine):
    chunks = list(make_engine(says("ab---c---d")).generate("say>", {**GREEDY, "stop": "---d"}, stream=True))
    assert all("ab---c".startswith(chunk["text"]) for chunk in chunks)
    assert chunks[-1]["text"] == "ab---c"


def test_what_was_held_back_for_a_stop_string_is_shown_at_the_end(make_engine):
    assert make_engine(says("ab--")).generate("say>", {**GREEDY, "stop": "---"})["text"] == "ab--"


def test_half_a_character_at_the_end_becomes_a_replacement_character(make_engine):
    answer = make_engine(says("a👍")).generate("say>", {**GREEDY, "max_new_tokens": 3})
    assert answer["text"] == "a\ufffd"


def test_special_tokens_are_shown_on_demand(make_engine):
    engine = make_engine(says("a", then=257), runner_options={})
    params = {**GREEDY, "max_new_tokens": 2}
    assert engine.generate("say>", params)["text"] == "a"
    assert engine.generate("say>", {**params, "skip_special_tokens": False})["text"] == "a<mark>"


def test_ignore_eos_goes_on_to_the_length(make_engine):
    answer = make_engine(says("a")).generate("say>", {**GREEDY, "ignore_eos": True, "max_new_tokens": 9})
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 9}


@pytest.mark.usefixtures("check_balanced")
def test_a_text_that_cannot_be_made_ends_its_request_and_no_other(make_engine, monkeypatch, caplog):
    update = Generation.update

    def failing(self, output):
        if self.request.prompt_ids[0] == ord("!") and self.output_ids:
            raise ZeroDivisionError("a bug in the text work")
        return update(self, output)

    monkeypatch.setattr(Generation, "update", failing)
    engine = make_engine(says("x" * 30))
    with pytest.raises(mooli.RequestFailedError, match="a bug in the text work") as raised:
        engine.generate("!>", {**GREEDY, "max_new_tokens": 30})
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    answers = engine.generate(["a>", "!>", "!!>"], {**GREEDY, "max_new_tokens": 30})
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["length", "error", "error"]
    last = list(engine.generate("!>", {**GREEDY, "max_new_tokens": 30}, stream=True))[-1]
    assert last["meta_info"]["finish_reason"]["err_type"] == "ZeroDivisionError"
    assert sum(record.exc_info is not None for record in caplog.records) == 3  # one for each call


def test_stop_strings_are_made_once_a_call_and_grow_with_the_text(make_engine, monkeypatch):
    made = []
    monkeypatch.setattr(generation, "StopStrings", lambda stops: made.append(StopStrings(stops)) or made[-1])
    stop = ["xy" + "z" * 4000, "q" * 4096]
    answers = make_engine(says("axxyb")).generate(["1>", "2>", "3>"], {**GREEDY, "n": 2, "stop": stop})
    assert [answer["text"] for answer in answers] == ["axxyb"] * 6
    assert [stops.texts for stops in made] == [[stop[1], stop[0]]]
    assert [len(borders) for borders in made[0]._borders] == [0, 2]


def test_parameters_given_for_all_prompts_are_looked_at_once_and_seeds_are_drawn_for_each(make_engine, monkeypatch):
    parsed = []
    parse = inputs.parse_sampling_params
    monkeypatch.setattr(inputs, "parse_sampling_params", lambda *args, **kw: parsed.append(1) or parse(*args, **kw))
    rules = make_engine()._rules
    ids = list(range(100))
    shared = rules.prepare(
        GenerateCall(prompt=["a"] * 50, sampling_params={}, return_logprob=True, token_ids_logprob=ids)
    ).requests
    assert len(parsed) == 1
    assert len({request.sampling.seed for request in shared}) == 50
    assert len({id(request.logprob_token_ids) for request in shared}) == 1
    seeded = rules.prepare(GenerateCall(prompt=["a"] * 50, sampling_params={"sampling_seed": 5})).requests
    assert {request.sampling.seed for request in seeded} == {5}
    own = rules.prepare(GenerateCall(prompt=["a", "b", "c"], sampling_params=[{"seed": 5}, {}, {"seed": 5}])).requests
    assert [request.sampling.seed == 5 for request in own] == [True, False, True]


# -- log-probabilities --


def test_logprobs_have_the_documented_shapes(make_engine):
    meta = make_engine(says("abc")).generate(
        "say>", GREEDY, return_logprob=True, logprob_start_len=1, top_logprobs_num=2, token_ids_logprob=[5, 6, 7]
    )["meta_info"]
    assert [entry[1:] for entry in meta["input_token_logprobs"]] == [(i, None) for i in b"ay>"]
    assert meta["input_token_logprobs"][0][0] is None
    assert all(logprob < 0 for logprob, _, _ in meta["input_token_logprobs"][1:])
    assert [entry[1] for entry in meta["output_token_logprobs"]] == [*b"abc", EOS]
    assert meta["output_token_logprobs_length"] == 4
    assert [None if e is None else len(e) for e in meta["input_top_logprobs"]] == [None, 2, 2]
    assert [[i for _, i, _ in e] for e in meta["output_token_ids_logprobs"]] == [[5, 6, 7]] * 4
    assert meta["input_token_ids_logprobs"][0] is None
    for (logprob, token_id, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert top[0][:2] == (logprob, token_id)


def test_logprobs_of_the_output_only_are_the_default(make_engine):
    meta = make_engine(says("ab")).generate("say>", GREEDY, return_logprob=True)["meta_info"]
    assert meta["input_token_logprobs"] == []
    assert "input_top_logprobs" not in meta
    assert "output_token_logprobs" not in make_engine(says("ab")).generate("say>", GREEDY)["meta_info"]


def test_logprob_arguments_may_be_one_for_each_prompt(make_engine):
    answers = make_engine(says("a")).generate(
        ["1>", "2>"], GREEDY, return_logprob=[True, False], top_logprobs_num=[3, 0], token_ids_logprob=[[1], None]
    )
    assert len(answers[0]["meta_info"]["output_top_logprobs"][0]) == 3
    assert "output_token_logprobs" not in answers[1]["meta_info"]
