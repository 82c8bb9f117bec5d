"""Sampling parameters: defaults, limits, spellings and errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mooli import SamplingParamsError, UnknownSamplingParamError
from mooli.frontend.sampling import parse_sampling_params, sample_params
from mooli.types import TOP_K_ALL, SamplingParams


def parse(preferred=None, **params):
    return parse_sampling_params(params, vocab_size=100, next_seed=itertools.count(1000).__next__, preferred=preferred)


def test_nothing_given_is_the_documented_defaults():
    assert parse() == SamplingParams(seed=1000)
    assert parse_sampling_params(None, vocab_size=100, next_seed=lambda: 0) == SamplingParams(seed=0)


def test_null_is_the_default_except_for_the_length():
    made = parse(temperature=None, stop=None, n=None, logit_bias=None, stop_token_ids=None, max_new_tokens=None)
    assert made == SamplingParams(seed=1000, max_new_tokens=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 0),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.1),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.0),
        ("max_new_tokens", True),
        ("min_new_tokens", -1),
        ("n", 0),
        ("n", 129),
        ("ignore_eos", 1),
        ("no_stop_trim", "yes"),
        ("stop", 3),
        ("stop", [3]),
        ("stop", ""),
        ("stop", ["x"] * 33),
        ("stop", "x" * 5000),
        ("stop_token_ids", 3),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [100]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1.0]),
        ("logit_bias", [1]),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: "much"}),
        ("sampling_seed", 2**63),
        ("seed", 1.0),
        ("stream_interval", 0),
        ("stop_regex", ["a"]),
        ("beam_width", 4),
        ("custom_params", {"a": 1}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(SamplingParamsError, match=name):
        parse(**{name: value})


@pytest.mark.parametrize("count", [1024, 1025])
def test_stop_ids_and_biases_are_limited_in_number(count):
    for name, value in [("stop_token_ids", list(range(count))), ("logit_bias", dict.fromkeys(range(count), 1.0))]:
        arguments = {"vocab_size": 5000, "next_seed": lambda: 0}
        if count <= 1024:
            assert len(getattr(parse_sampling_params({name: value}, **arguments), name)) == count
        else:
            with pytest.raises(SamplingParamsError, match=f"{name} has 1025"):
                parse_sampling_params({name: value}, **arguments)


def test_min_new_tokens_cannot_exceed_max_new_tokens():
    with pytest.raises(SamplingParamsError, match="min_new_tokens=9 is more than max_new_tokens=8"):
        parse(min_new_tokens=9, max_new_tokens=8)


@pytest.mark.parametrize(
    ("name", "hint"), [("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("zzz", "there are")]
)
def test_an_unknown_name_is_a_type_error_with_a_hint(name, hint):
    with pytest.raises(UnknownSamplingParamError, match=hint) as raised:
        parse(**{name: 1})
    assert isinstance(raised.value, TypeError)


def test_params_must_be_a_dict():
    with pytest.raises(SamplingParamsError, match="must be a dict"):
        parse_sampling_params([1], vocab_size=100, next_seed=lambda: 0)


@pytest.mark.parametrize("name", ["json_schema", "regex", "ebnf", "stop_regex", "custom_params"])
def test_what_is_not_supported_may_be_unset(name):
    assert parse(**{name: None}) == parse()
    assert parse(**{name: ""}) == parse()


def test_a_tiny_temperature_is_greedy():
    assert parse(temperature=1e-7).temperature == 0.0
    assert parse(temperature=1e-5).temperature == 1e-5


@pytest.mark.parametrize(("name", "value"), [("temperature", 1e308), ("repetition_penalty", 1e-300)])
def test_extreme_values_stay_what_a_float32_can_divide_by(name, value):
    with np.errstate(all="raise"):
        logits = np.array([-1e4, 1e4], np.float32) / np.float32(getattr(parse(**{name: value}), name))
    assert np.isfinite(logits).all()


def test_a_top_k_of_the_whole_vocabulary_is_none():
    assert parse(top_k=100).top_k == TOP_K_ALL
    assert parse(top_k=99).top_k == 99


def test_one_stop_string_may_stand_alone():
    assert parse(stop="end").stop == ("end",)
    assert parse(stop=["a", "b"]).stop == ("a", "b")


def test_numpy_values_and_string_keys_are_taken():
    made = parse(
        temperature=np.float32(0.5), top_k=np.int64(3), logit_bias={"7": -1, 8: 2.5}, stop_token_ids=np.array([1, 2])
    )
    assert (made.temperature, made.top_k) == (0.5, 3)
    assert dict(made.logit_bias) == {7: -1.0, 8: 2.5}
    assert made.stop_token_ids == {1, 2}


def test_seed_has_two_names_that_must_agree():
    assert parse(seed=5).seed == parse(sampling_seed=5).seed == parse(seed=5, sampling_seed=5).seed == 5
    with pytest.raises(SamplingParamsError, match="differ"):
        parse(seed=5, sampling_seed=6)


def test_negative_seeds_become_unsigned():
    assert parse(seed=-1).seed == 2**64 - 1


def test_unset_seeds_come_from_the_stream():
    seeds = itertools.count(3)
    drawn = [parse_sampling_params({}, vocab_size=9, next_seed=seeds.__next__).seed for _ in range(2)]
    assert drawn == [3, 4]


def test_the_first_of_n_samples_keeps_the_seed_and_the_others_differ():
    params = parse(seed=5)
    seeds = [sample_params(params, i).seed for i in range(128)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 128
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert sample_params(parse(seed=6), 1).seed not in seeds


def test_preferred_params_lie_under_the_requests_own():
    made = parse(preferred={"temperature": 0.2, "top_p": 0.3}, top_p=0.9)
    assert (made.temperature, made.top_p) == (0.2, 0.9)
