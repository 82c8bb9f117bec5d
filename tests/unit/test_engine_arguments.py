"""The public `Engine`, with everything real but the model: what is refused, and what settings and names do."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from fake_engine import CONTEXT, VOCAB_SIZE, Gate, says

import mooli
from mooli import (
    ConfigError,
    PromptError,
    RequestError,
    SamplingParamsError,
    UnknownArgumentError,
    UnknownSamplingParamError,
)
from mooli.frontend.inputs import GenerateCall
from mooli.frontend.unsupported import Api, asked, names_of

GREEDY = {"temperature": 0}


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
    "an array with an id outside the vocabulary": ({"input_ids": np.array([1, VOCAB_SIZE])}, PromptError),
    "an array of bools": ({"input_ids": np.array([True])}, PromptError),
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
    "no_store of the wrong type": ({"prompt": "a", "no_store": 1}, RequestError),
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


# -- one list of what there is not --


def test_every_argument_that_is_refused_says_why_and_no_other_is_in_the_list(make_engine):
    names = [item.name for item in fields(GenerateCall)]
    known = {
        "prompt", "sampling_params", "input_ids", "return_logprob", "logprob_start_len", "top_logprobs_num",
        "token_ids_logprob", "stream", "rid", "priority", "cache_salt", "no_store", "return_cache_report",
        "require_reasoning", "pin", "session_id",
    }  # fmt: skip
    assert set(names) - known == set(names_of(Api.ENGINE))
    engine = make_engine(says("x"))
    for name, why in names_of(Api.ENGINE).items():
        with pytest.raises(RequestError) as raised:
            engine.generate("say>", **{name: "something"})
        assert raised.value.argument == name
        assert raised.value.message == f"{name} is not supported by Mooli yet: leave it out"
        assert str(raised.value) == f"{raised.value.message} ({why})"


@pytest.mark.parametrize("stream", [False, True])
def test_an_argument_that_does_not_exist_is_a_type_error(make_engine, stream):
    engine = make_engine()
    with pytest.raises(TypeError, match="unexpected keyword argument 'promt'"):
        engine.generate(promt="x", stream=stream)


NOTHING = {
    Api.ENGINE: [{"lora_path": ""}, {"routed_experts_start_len": 0}, {"kv_hints": {}}],
    Api.GENERATE: [{"return_entropy": False}, {"lora_path": []}],
    Api.SAMPLING: [{"beam_width": 1}, {"stop_regex": ""}, {"watermark": None}],
    Api.OPENAI: [{"tool_choice": "auto"}, {"use_beam_search": False}, {"reasoning_effort": "none"}],
    Api.ANTHROPIC: [{"mcp_servers": []}, {"speed": "standard"}],
}
SOMETHING = {
    Api.ENGINE: [{"routed_experts_start_len": False}, {"lora_path": False}],
    Api.GENERATE: [{"input_embeds": [[1.0]]}, {"return_entropy": True}],
    Api.SAMPLING: [{"beam_width": 2}, {"stop_regex": "none"}],
    Api.OPENAI: [{"tool_choice": "required"}, {"web_search_options": {"user_location": {}}}],
    Api.ANTHROPIC: [{"mcp_servers": ""}, {"speed": "fast"}],
}


@pytest.mark.parametrize("api", NOTHING)
def test_what_asks_for_nothing_is_accepted_and_all_else_named(api):
    for given in NOTHING[api]:
        assert asked(given, api) is None
    for given in SOMETHING[api]:
        assert asked({"text": "x", **given}, api) == next(iter(given))


def test_reasoning_is_counted_where_it_is_required(make_engine):
    engine = make_engine(says("<think>a</think>b", after="|"), reasoning_parser="qwen3")
    assert engine.get_model_info()["reasoning_parser"] == "qwen3"
    answer = engine.generate("say|", GREEDY, require_reasoning=True)
    assert (answer["text"], answer["meta_info"]["reasoning_tokens"]) == ("<think>a</think>b", len("<think>a</think>"))
    assert engine.generate("say>", GREEDY)["meta_info"]["reasoning_tokens"] == 0
    with pytest.raises(RequestError, match="require_reasoning must be True or False, not 1"):
        engine.generate("say>", require_reasoning=1)


def test_reasoning_cannot_be_required_of_a_model_of_which_none_is_known(make_engine):
    with pytest.raises(RequestError, match=r"nothing is known of reasoning.*start with reasoning_parser") as raised:
        make_engine(says("x")).generate("say>", require_reasoning=True)
    assert raised.value.argument == "require_reasoning"
