"""Engine arguments: names, aliases, spellings, checks, and the flags made from them."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import pytest

from mooli import ConfigError, EngineConfig, UnknownArgumentError
from mooli.arguments import parse_size


def config(**kwargs):
    return EngineConfig.from_kwargs(**{"model_path": "m", **kwargs})


def test_only_the_model_is_needed():
    assert config() == EngineConfig(model_path="m")


def test_a_missing_model_is_named():
    with pytest.raises(ConfigError, match="model_path is missing"):
        EngineConfig.from_kwargs()


@pytest.mark.parametrize(
    "kwargs",
    [{"model": "x"}, {"model_path": "x"}],
)
def test_the_model_has_two_names(kwargs):
    assert EngineConfig.from_kwargs(**kwargs).model_path == "x"


def test_one_argument_under_two_names_is_refused():
    with pytest.raises(ConfigError, match="given twice"):
        config(tp=1, tp_size=1)


@pytest.mark.parametrize(
    ("given", "name"),
    [("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16"), ("auto", "auto")],
)
def test_dtypes_have_several_spellings(given, name):
    assert config(dtype=given).dtype == name


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("ascend", "ascend"),
        ("npu", "ascend"),
        ("cuda", "cuda"),
        ("gpu", "cuda"),
        ("cpu", "cpu"),
        ("auto", "cpu"),
        ("reference", "reference"),
    ],
)
def test_backend_is_a_shorthand_for_device(backend, device):
    assert config(backend=backend).backend_name == device


def test_device_wins_over_backend_with_a_warning(caplog):
    with caplog.at_level("WARNING", logger="mooli"):  # an engine of another test may have set another level
        assert config(backend="ascend", device="cpu").backend_name == "cpu"
    assert "wins over" in caplog.text


def test_same_device_and_backend_is_no_conflict(caplog):
    assert config(backend="ascend", device="npu").backend_name == "ascend"
    assert caplog.text == ""


def test_the_documented_way_to_ascend_works():
    assert config(device="npu", attention_backend="ascend").backend_name == "ascend"
    assert config(attention_backend="ascend").backend_name == "ascend"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "int8"}, "choose one of auto"),
        ({"page_size": "16"}, "of type int, got '16'"),
        ({"page_size": True}, "of type int"),
        ({"page_size": 0}, "the least is 1"),
        ({"disable_radix_cache": 1}, "of type bool"),
        ({"mem_fraction_static": float("nan")}, "finite"),
        ({"mem_fraction_static": 1.5}, "too large"),
        ({"mem_fraction_static": 0}, "too small"),
        ({"context_length": "8 apples"}, "not a number like"),
        ({"context_length": [1]}, "whole number"),
        ({"chunked_prefill_size": 0}, "computes nothing"),
        ({"tp_size": 2}, "use tp_size=1"),
        ({"tp_size": 2, "device": "reference"}, "use tp_size=1"),
        ({"tp_size": 65, "device": "torch"}, "the most is 64"),
        ({"dp": 2}, "use dp_size=1"),
        ({"backend": "tpu"}, "not a backend"),
        ({"backend": 3}, "not a backend"),
        ({"attention_backend": "triton"}, "leave this argument out"),
        ({"device": "cpu", "attention_backend": "ascend"}, "needs device='npu'"),
        ({"json_model_override_args": "{"}, "not valid JSON"),
        ({"json_model_override_args": "[1]"}, "must be a JSON object"),
        ({"preferred_sampling_params": 3}, "JSON object"),
        ({"served_model_name": "a:b"}, "must not contain"),
        ({"quantization": "awq"}, "int8"),
        ({"quantization": "modelslim"}, "quantised already, by msmodelslim too, needs no such argument"),
        ({"log_level": "loud"}, "choose one of debug"),
        ({"model_path": 3}, "of type str"),
        ({"model_path": None}, "missing"),
        ({"random_seed": -1}, "too small"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_with_what_is_possible(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        config(**kwargs)


def test_an_unknown_argument_is_a_type_error_naming_the_nearest():
    with pytest.raises(UnknownArgumentError, match="did you mean dtype") as raised:
        config(dtyp="auto")
    assert isinstance(raised.value, TypeError)


def test_an_argument_only_sglang_has_is_refused_as_such():
    with pytest.raises(UnknownArgumentError, match="known to SGLang but not supported"):
        config(enable_lora=True)


@pytest.mark.parametrize(
    "kwargs",
    [{"enable_lora": False}, {"lora_paths": None}, {"pp_size": 1}, {"disable_cuda_graph": True}],
    ids=str,
)
def test_an_argument_only_sglang_has_may_be_left_off_explicitly(kwargs):
    assert config(**kwargs) == config()


@pytest.mark.parametrize(
    "kwargs", [{"pp_size": True}, {"pp_size": 2}, {"api_key": 0}, {"disable_cuda_graph": 1}], ids=str
)
def test_what_only_looks_like_off_is_refused(kwargs):
    with pytest.raises(UnknownArgumentError):
        config(**kwargs)


@pytest.mark.parametrize(
    ("text", "value"),
    [("8192", 8192), ("8k", 8000), ("8Ki", 8192), ("1M", 10**6), ("1.5k", 1500), ("2gi", 2**31), (" 3 K ", 3000)],
)
def test_sizes_have_suffixes(text, value):
    assert parse_size(text) == value
    assert config(context_length=text).context_length == value


@pytest.mark.parametrize("text", ["", "k", "1kk", "1.5", "0x10", "1e3"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="number"):
        parse_size(text)


def test_numpy_numbers_and_paths_are_taken(tmp_path):
    made = config(model_path=tmp_path, page_size=np.int64(16), mem_fraction_static=1)
    assert (made.model_path, made.page_size, made.mem_fraction_static) == (str(tmp_path), 16, 1.0)


def test_json_arguments_may_be_dicts():
    made = config(preferred_sampling_params={"top_p": 0.5}, json_model_override_args={"rope_theta": 5.0})
    assert made.preferred_sampling == {"top_p": 0.5}
    assert made.model_overrides == {"rope_theta": 5.0}


def parse(*argv):
    parser = argparse.ArgumentParser()
    EngineConfig.add_cli_args(parser)
    return EngineConfig.from_cli_args(parser.parse_args(argv), log_level="info")


def test_flags_are_the_arguments_with_dashes():
    made = parse("--model", "m", "--tp", "1", "--context-length", "4Ki", "--disable-radix-cache", "--backend", "npu")
    assert made == config(context_length=4096, disable_radix_cache=True, device="npu", log_level="info")


def test_a_given_flag_wins_over_the_commands_default():
    assert parse("--model-path", "m").log_level == "info"
    assert parse("--model-path", "m", "--log-level", "debug").log_level == "debug"


def test_every_argument_has_a_flag_and_help():
    parser = argparse.ArgumentParser()
    EngineConfig.add_cli_args(parser)
    text = parser.format_help()
    for item in dataclasses.fields(EngineConfig):
        assert f"--{item.name.replace('_', '-')}" in text
        assert item.metadata["help"]


def test_a_bad_size_on_the_command_line_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as raised:
        parse("--model-path", "m", "--context-length", "many")
    assert raised.value.code == 2
    assert "not a number like" in capsys.readouterr().err


@pytest.mark.parametrize("given", [None, "none"])
def test_no_quantization_can_be_said_in_words(given):
    assert EngineConfig.from_kwargs(model_path="demo", quantization=given).quantization is None


@pytest.mark.parametrize("kwargs", [{}, {"device": "cpu"}, {"device": "reference"}], ids=str)
def test_a_kv_cache_of_eight_bits_is_possible_on_the_cpu(kwargs):
    assert config(kv_cache_dtype="int8", **kwargs).kv_cache_dtype == "int8"


@pytest.mark.parametrize("device", ["torch", "cuda", "npu"])
def test_a_kv_cache_of_eight_bits_is_refused_elsewhere(device):
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int8'.*(torch|cuda|ascend) backend"):
        config(kv_cache_dtype="int8", device=device)


@pytest.mark.parametrize("dtype", ["fp8_e5m2", "fp8_e4m3", "fp4_e2m1"])
def test_the_kv_cache_types_of_other_engines_are_refused_with_a_hint(dtype):
    with pytest.raises(ConfigError, match=f"kv_cache_dtype='{dtype}'.*int8"):
        config(kv_cache_dtype=dtype)
