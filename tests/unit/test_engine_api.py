"""The public `Engine`, with everything real but the model: what goes in, what comes out, what is refused."""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import threading
import time

import numpy as np
import pytest
from fake_engine import CONTEXT, EOS, VOCAB_SIZE, FakeEngine, says

import mooli
from mooli import (
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    PromptError,
    RequestError,
    RequestFailedError,
    SamplingParamsError,
    UnknownArgumentError,
    UnknownSamplingParamError,
)

GREEDY = {"temperature": 0}


@pytest.fixture
def make_engine(monkeypatch):
    make = FakeEngine(monkeypatch)
    yield make
    for engine in make.engines:
        engine.shutdown()


@pytest.fixture
def check_balanced(make_engine):
    """After every test that uses it: nothing runs, and every page is free or in the tree."""
    yield
    engine = make_engine.engines[-1]
    deadline = time.monotonic() + 20
    while engine._loop.call(lambda: make_engine.core.has_work) and time.monotonic() < deadline:
        time.sleep(0.01)
    engine._loop.call(make_engine.core.check)
    stats = engine.get_server_info()["internal_states"][0]
    assert (stats["running"], stats["waiting"], stats["used_pages"]) == (0, 0, 0)
    assert engine._loop.num_open == 0
    assert engine.flush_cache().success


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
        " external_trace_header rid session_params priority session_id cache_salt"
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


# -- what is refused, while the engine goes on --

BAD_CALLS = {
    "no prompt": ({}, PromptError),
    "prompt and ids": ({"prompt": "a", "input_ids": [1]}, PromptError),
    "empty prompt": ({"prompt": ""}, PromptError),
    "an empty prompt in a batch": ({"prompt": ["a", ""]}, PromptError),
    "empty batch": ({"prompt": []}, PromptError),
    "a prompt of the wrong type": ({"prompt": 3}, PromptError),
    "bytes": ({"prompt": b"abc"}, PromptError),
    "a lone surrogate": ({"prompt": "\ud800"}, PromptError),
    "empty ids": ({"input_ids": []}, PromptError),
    "ids with an empty list": ({"input_ids": [[1], []]}, PromptError),
    "an id outside the vocabulary": ({"input_ids": [1, VOCAB_SIZE]}, PromptError),
    "a negative id": ({"input_ids": [-1]}, PromptError),
    "a huge id": ({"input_ids": [10**30]}, PromptError),
    "an id that is a float": ({"input_ids": [1.5]}, PromptError),
    "an id that is a bool": ({"input_ids": [True]}, PromptError),
    "ids that are a string": ({"input_ids": "abc"}, PromptError),
    "ids that are an array of no dimension": ({"input_ids": np.array(3)}, PromptError),
    "ids that hold an array of no dimension": ({"input_ids": [[1], np.array(3)]}, PromptError),
    "ids of different depth": ({"input_ids": [[1], 2]}, PromptError),
    "prompt too long": ({"prompt": "x" * CONTEXT}, PromptError),
    "prompt and answer too long": ({"prompt": "x", "sampling_params": {"max_new_tokens": CONTEXT}}, PromptError),
    "an unknown sampling parameter": ({"prompt": "a", "sampling_params": {"heat": 1}}, UnknownSamplingParamError),
    "NaN temperature": ({"prompt": "a", "sampling_params": {"temperature": float("nan")}}, SamplingParamsError),
    "params of the wrong type": ({"prompt": "a", "sampling_params": "hot"}, SamplingParamsError),
    "a list of params for one prompt": ({"prompt": "a", "sampling_params": [{}]}, RequestError),
    "too few params": ({"prompt": ["a", "b"], "sampling_params": [{}]}, RequestError),
    "different n": ({"prompt": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, RequestError),
    "too few rids": ({"prompt": ["a", "b"], "rid": ["x"]}, RequestError),
    "the same rid twice": ({"prompt": ["a", "b"], "rid": ["x", "x"]}, RequestError),
    "a rid of the wrong type": ({"prompt": "a", "rid": 3}, RequestError),
    "an empty rid": ({"prompt": "a", "rid": ""}, RequestError),
    "an image": ({"prompt": "a", "image_data": "x.png"}, RequestError),
    "a LoRA": ({"prompt": "a", "lora_path": "x"}, RequestError),
    "hidden states": ({"prompt": "a", "return_hidden_states": True}, RequestError),
    "stream of the wrong type": ({"prompt": "a", "stream": "yes"}, RequestError),
    "logprobs that nothing asks for": ({"prompt": "a", "top_logprobs_num": 3}, RequestError),
    "logprobs from beyond the prompt": ({"prompt": "a", "return_logprob": True, "logprob_start_len": 1}, RequestError),
    "a million top logprobs": ({"prompt": "a", "return_logprob": True, "top_logprobs_num": 10**6}, RequestError),
    "a logprob id outside": ({"prompt": "a", "return_logprob": True, "token_ids_logprob": [999]}, RequestError),
    "logprob ids that are no list": ({"prompt": "a", "return_logprob": True, "token_ids_logprob": 3}, RequestError),
    "return_logprob of the wrong type": ({"prompt": "a", "return_logprob": 1}, RequestError),
    "logprob lists with n": (
        {"prompt": ["a"], "return_logprob": [True], "sampling_params": {"n": 2}},
        RequestError,
    ),
    "a salt of the wrong type": ({"prompt": "a", "cache_salt": 3}, RequestError),
    "a priority of the wrong type": ({"prompt": "a", "priority": "high"}, RequestError),
}


@pytest.mark.usefixtures("check_balanced")
@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_refused_and_the_engine_goes_on(make_engine, name):
    arguments, error = BAD_CALLS[name]
    engine = make_engine(says("fine"))
    with pytest.raises(error) as raised:
        engine.generate(**arguments)
    assert isinstance(raised.value, ValueError)
    assert engine.generate("say>", GREEDY)["text"] == "fine"


def test_the_message_for_a_long_prompt_has_the_numbers_and_what_to_do(make_engine):
    with pytest.raises(PromptError, match=r"prompt 1: the prompt has 200 tokens .* is 128.*allow_auto_truncate"):
        make_engine().generate(["a", "x" * 200])


def test_an_answer_of_unset_length_takes_what_the_context_leaves(make_engine):
    engine = make_engine(says("y" * CONTEXT))
    assert engine.generate("x" * 99 + ">", GREEDY)["meta_info"]["completion_tokens"] == CONTEXT - 100
    assert engine.generate(">", {**GREEDY, "max_new_tokens": None})["meta_info"]["completion_tokens"] == CONTEXT - 1


def test_long_prompts_are_cut_on_demand(make_engine):
    engine = make_engine(allow_auto_truncate=True)
    meta = engine.generate("x" * 500, {"max_new_tokens": 50, "ignore_eos": True})["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (CONTEXT - 1, 1)
    meta = engine.generate("x" * 100, {"max_new_tokens": 50, "min_new_tokens": 40})["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (100, CONTEXT - 100)


def test_unsupported_arguments_may_have_their_default(make_engine):
    engine = make_engine(says("x"))
    answer = engine.generate("say>", GREEDY, image_data=None, return_hidden_states=False, routed_experts_start_len=0)
    assert answer["text"] == "x"


def test_an_unknown_engine_argument_is_refused(make_engine):
    with pytest.raises(UnknownArgumentError):
        make_engine(modl="x")


def test_server_args_stand_for_keywords(make_engine):
    engine = mooli.Engine(server_args={"model_path": "fake", "dtype": "half"})
    assert engine.server_args.dtype == "float16"
    assert mooli.Engine(server_args=engine.server_args).server_args.random_seed == engine.server_args.random_seed
    for bad in ({"server_args": 3}, {"server_args": {"model_path": "x"}, "dtype": "half"}):
        with pytest.raises(ConfigError):
            mooli.Engine(**bad)


def test_without_a_tokenizer_ids_go_in_and_out(make_engine):
    engine = make_engine(says("x"), skip_tokenizer_init=True)
    answer = engine.generate(input_ids=[62], sampling_params={**GREEDY, "max_new_tokens": 1})
    assert answer["output_ids"] == [ord("x")]
    assert "text" not in answer
    for bad in ({"prompt": "a"}, {"input_ids": [1], "sampling_params": {"stop": "x"}}):
        with pytest.raises(RequestError, match="skip_tokenizer_init"):
            engine.generate(**bad)


# -- ids, salts, preferred values --


def test_request_ids_are_kept_or_numbered(make_engine):
    engine = make_engine(says("x"))

    def ids(*args, **kwargs):
        answers = engine.generate(*args, **kwargs)
        return [a["meta_info"]["id"] for a in (answers if isinstance(answers, list) else [answers])]

    assert ids("a>", rid="r") == ["r"]
    assert ids(["a>", "b>"], rid="r") == ["r_0", "r_1"]
    assert ids(["a>", "b>"], rid=["p", "q"]) == ["p", "q"]
    assert ids("a>", {"n": 2}, rid="r") == ["r_0", "r_1"]


def test_a_request_id_in_use_is_refused(make_engine):
    gate = Gate()
    engine = make_engine(says("x" * 120, then=None), runner_options={"raises": gate})
    stream = engine.generate("say>", {**GREEDY, "max_new_tokens": 100}, stream=True, rid="r")
    with pytest.raises(RequestError, match="still running"):
        engine.generate("say>", rid="r")
    stream.close()
    gate.is_open.set()
    assert engine.generate("say>", {**GREEDY, "max_new_tokens": 1}, rid="r")["text"] == "x"


def test_a_salt_keeps_prefixes_apart(make_engine):
    engine = make_engine(says("x"))
    cached = [
        engine.generate("0123456789>", GREEDY, cache_salt=salt)["meta_info"]["cached_tokens"]
        for salt in (None, "a", "b", "a", None, "")
    ]
    assert cached == [0, 0, 0, 10, 10, 10]


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"temprature": 1}, {"stop": [""]}], ids=str)
def test_preferred_sampling_params_that_are_wrong_are_refused_at_the_start(make_engine, bad):
    with pytest.raises(ConfigError, match="preferred_sampling_params: "):
        make_engine(says("x"), preferred_sampling_params=bad)


def test_preferred_sampling_params_may_leave_the_length_to_the_request(make_engine):
    engine = make_engine(says("abc"), preferred_sampling_params={"min_new_tokens": 200, "temperature": 0})
    assert engine.generate("say>", {"min_new_tokens": 0})["text"] == "abc"


def test_preferred_sampling_params_apply_where_a_request_names_none(make_engine):
    engine = make_engine(says("abc"), preferred_sampling_params={"max_new_tokens": 1, "temperature": 0})
    assert engine.generate("say>")["text"] == "a"
    assert engine.generate("say>", {"max_new_tokens": 2})["text"] == "ab"


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


class Gate:
    """Holds the runner's steps until opened, so that a request is surely running."""

    def __init__(self):
        self.is_open = threading.Event()
        self.entered = threading.Event()

    def __call__(self, batch):
        self.entered.set()
        assert self.is_open.wait(20)


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
