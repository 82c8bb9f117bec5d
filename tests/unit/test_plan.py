"""The arithmetic of `mooli plan`, by hand for a model that everybody knows, and the command."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_files import small_gguf
from modelslim_folder import quantised, write
from mooli import ConfigError, cli
from mooli.backends import create_backend
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.loader import open_model
from mooli.models.registry import create_model, read_hf_config
from mooli.plan import parse_memory, plan_memory, read_model, weight_bytes
from mooli.tensor import TensorType
from steps import uniform_cache
from variants import simulated_npu

GIB = 2**30

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 152064,
}
SMALL = {
    **QWEN_7B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 320,
    "head_dim": 16,
}


def kv_bytes_per_token(config, dtype, tp=1):
    return plan_memory(config, 2**45, kv_cache_dtype=dtype, tp=tp).kv_bytes_per_token


@pytest.fixture(scope="module")
def qwen():
    return read_hf_config(QWEN_7B)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return tmp_path


def test_a_7b_model_takes_two_bytes_a_parameter(qwen):
    parameters = 7_615_616_512
    vectors = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584  # norms and biases, which are kept in four bytes
    line_beyond_the_end = 64 * (28 * 4 + 1)  # of each linear weight
    assert weight_bytes(qwen, "bfloat16") == 2 * parameters + 2 * vectors + line_beyond_the_end


def test_a_token_takes_a_key_and_a_value_in_every_layer(qwen):
    assert kv_bytes_per_token(qwen, "bfloat16") == 2 * 28 * 4 * 128 * 2
    assert kv_bytes_per_token(qwen, "float32") == 2 * kv_bytes_per_token(qwen, "float16")


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_keys_and_values_of_eight_bits_take_what_the_cpu_backend_allocates(qwen, head_dim):
    config = dataclasses.replace(qwen, head_dim=head_dim)
    spec = uniform_cache(config.num_layers, config.num_kv_heads, head_dim, page_size=32, dtype="int8")
    backend = create_backend("cpu", num_threads=1)
    assert kv_bytes_per_token(config, "int8") * 32 == backend.kv_bytes_per_page(spec)
    small, large = (
        plan_memory(config, 16 << 30, mem_fraction_static=0.6, quantization="int8", kv_cache_dtype=dtype).num_tokens
        for dtype in ("auto", "int8")
    )
    assert large > small > 0


def test_eight_bit_keys_on_an_npu_are_refused(qwen):
    with pytest.raises(ConfigError, match="only on a CPU"):
        plan_memory(qwen, 64 << 30, device="ascend", kv_cache_dtype="int8")


def test_nine_tenths_of_a_card_of_64_gib(qwen):
    plan = plan_memory(qwen, 64 * GIB, mem_fraction_static=0.9)
    assert plan.num_tokens == int((0.9 * 64 * GIB - plan.weight_bytes) // (57344 * 32)) * 32
    assert plan.kv_cache_bytes + plan.weight_bytes <= 0.9 * 64 * GIB
    assert plan.requests[32768] == plan.num_tokens // 32768
    assert plan.memory_bytes == plan.weight_bytes + plan.kv_cache_bytes + plan.left_bytes


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_weights_are_those_that_the_cpu_backend_packs(quantization, is_tied):
    config = read_hf_config({**SMALL, "tie_word_embeddings": is_tied})
    backend = create_backend("cpu", dtype="bfloat16", quantization=quantization, num_threads=1)
    try:
        create_model(config, DummyCheckpoint(config), backend)
        assert weight_bytes(config, "bfloat16", quantization=quantization) == backend.weight_bytes()
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("device", "dtype", "quantization"),
    [
        ("ascend", "bfloat16", None),
        ("ascend", "bfloat16", "int8"),
        ("ascend", "float16", "int8"),
        ("torch", "float32", None),
        ("torch", "float32", "int8"),
    ],
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_weights_are_those_that_the_backend_of_the_device_holds(device, dtype, quantization, is_tied):
    config = read_hf_config({**SMALL, "tie_word_embeddings": is_tied})
    with simulated_npu():
        backend = create_backend(device, dtype=dtype, quantization=quantization)
        create_model(config, DummyCheckpoint(config), backend)
        actual = backend.weight_bytes()
        backend.close()
    planned = weight_bytes(config, dtype, device=device, quantization=quantization)
    assert planned == actual


def test_int8_on_an_npu_is_a_byte_a_weight_and_a_scale_a_row(qwen):
    plan = plan_memory(qwen, 61 * GIB, device="ascend", quantization="int8")
    rows = 28 * (3584 + 2 * 512 + 3584 + 2 * 18944 + 3584)
    linears = 28 * 3584 * (3584 + 2 * 512 + 3584 + 3 * 18944)
    norms, biases = 28 * 2 * 3584 + 3584, 28 * (3584 + 2 * 512)
    assert plan.weight_bytes == linears + 4 * rows + 2 * 2 * 152064 * 3584 + 4 * norms + 2 * biases


@pytest.mark.slow
def test_what_the_device_cannot_quantise_to_is_refused_as_its_backend_does(qwen):
    with pytest.raises(ConfigError) as planned:
        plan_memory(qwen, 61 * GIB, device="ascend", quantization="int4")
    with simulated_npu(), pytest.raises(ConfigError) as made:
        create_backend("ascend", quantization="int4")
    assert str(planned.value) == str(made.value)
    with pytest.raises(ConfigError, match="float32"):
        plan_memory(qwen, 61 * GIB, device="ascend", quantization="int8", dtype="float32")


def test_more_requests_run_on_an_npu_unless_it_is_told_otherwise(qwen):
    cpu, npu = plan_memory(qwen, 800 * GIB), plan_memory(qwen, 800 * GIB, device="ascend")
    assert (cpu.num_tokens, npu.num_tokens) == (48 * 32768, 64 * 32768)


@pytest.mark.slow
def test_a_quantised_checkpoint_is_counted_as_its_description_says(tmp_path):
    tensors, description = quantised()
    config, types = read_model(str(write(tmp_path, tensors, description)))
    with simulated_npu():
        backend = create_backend("ascend")
        opened, checkpoint = open_model(tmp_path)
        create_model(opened, checkpoint, backend)
        actual = backend.weight_bytes()
        checkpoint.close()
        backend.close()
    plan = plan_memory(config, GIB, device="ascend", stored_types=types)
    assert plan.weight_bytes == actual
    assert plan.quantization == "int8"
    assert plan_memory(config, GIB, stored_types=types).weight_bytes < plan_memory(config, GIB).weight_bytes


def test_a_gguf_file_becomes_floats_on_an_npu(qwen):
    types = {"model.layers.0.mlp.down_proj.weight": TensorType.Q4_0}
    plan = plan_memory(qwen, 61 * GIB, device="ascend", stored_types=types)
    assert plan == plan_memory(qwen, 61 * GIB, device="ascend")


def test_two_devices_hold_half_each_but_for_the_norms(qwen):
    one, two = weight_bytes(qwen, "bfloat16"), weight_bytes(qwen, "bfloat16", tp=2)
    assert one / 2 < two < one / 2 * 1.001
    assert kv_bytes_per_token(qwen, "bfloat16", tp=2) * 2 == kv_bytes_per_token(qwen, "bfloat16")


def test_key_heads_that_are_too_few_are_on_several_devices():
    config = read_hf_config({**SMALL, "num_attention_heads": 8, "num_key_value_heads": 2})
    assert kv_bytes_per_token(config, "bfloat16", tp=8) == kv_bytes_per_token(config, "bfloat16", tp=2)


@pytest.mark.parametrize("tp", [0, 3, 56])
def test_heads_that_cannot_be_shared_out_are_refused(qwen, tp):
    with pytest.raises(ConfigError, match=f"tp_size={tp}"):
        plan_memory(qwen, 64 * GIB, tp=tp)


def test_a_model_that_does_not_fit_says_what_is_lacking(qwen):
    plan = plan_memory(qwen, 12 * GIB)
    assert plan.num_tokens == 0
    assert "the weights take 14.19 GiB" in (plan.problem or "")
    assert plan_memory(qwen, 12 * GIB, quantization="int8").problem is None


def test_types_of_a_gguf_file_are_kept_where_nothing_else_is_asked(qwen):
    types = {"model.embed_tokens.weight": TensorType.Q8_0}
    kept = plan_memory(qwen, 64 * GIB, stored_types=types)
    assert kept.dtype == "file"
    assert plan_memory(qwen, 64 * GIB).weight_bytes - kept.weight_bytes == 152064 * 3584 * 30 // 32
    assert plan_memory(qwen, 64 * GIB, stored_types=types, dtype="float16").dtype == "float16"


@pytest.mark.parametrize(
    "wrong",
    [{"mem_fraction_static": 0.0}, {"mem_fraction_static": 1.5}, {"context_length": 1}, {"context_length": 40000}],
)
def test_numbers_that_mean_nothing_are_refused(qwen, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        plan_memory(qwen, 64 * GIB, **wrong)


@pytest.mark.parametrize("text", ["64GiB", "64Gi", " 64 GiB ", "65536Mi", str(64 * GIB)])
def test_memory_is_read_as_people_write_it(text):
    assert parse_memory(text) == 64 * GIB


@pytest.mark.parametrize("text", ["", "GiB", "64 parsecs", "1e9GiB", "B", "nan"])
def test_memory_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="--memory"):
        parse_memory(text)


@pytest.mark.slow
@given(
    memory=st.integers(1, 2**41),
    fraction=st.none() | st.floats(0.01, 1.0),
    tp=st.sampled_from([1, 2, 4]),
    quantization=st.sampled_from([None, "int8", "int4"]),
    context=st.none() | st.integers(2, 32768),
)
def test_what_is_planned_always_fits(qwen, memory, fraction, tp, quantization, context):
    plan = plan_memory(
        qwen, memory, tp=tp, quantization=quantization, mem_fraction_static=fraction, context_length=context
    )
    assert (plan.problem is None) == (plan.num_tokens > 0)
    if plan.problem is None:
        assert plan.left_bytes >= 0
        assert plan.requests[plan.context_length] >= 1
        counts = list(plan.requests.values())
        assert counts == sorted(counts, reverse=True)


def test_the_command_prints_the_arithmetic(folder, capsys):
    command = ["plan", "--model", str(folder), "--memory", "64GiB", "--mem-fraction-static", "0.9"]
    assert cli.main([*command, "--backend", "ascend"]) == 0
    assert "(ascend)" in capsys.readouterr().out
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "57,344 bytes a token" in out
    assert "(cpu)" in out
    assert "32,768 tokens: 24" in out
    assert cli.main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["requests"]["32768"] == 24
    assert plan["problem"] is None


def test_a_config_alone_is_enough_and_a_model_too_large_ends_with_one(folder, capsys):
    assert cli.main(["plan", "--memory", "8GiB", str(folder / "config.json")]) == 1
    assert "It does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        ["--memory", "64GiB"],
        ["FOLDER", "--memory", "64GiB", "--model", "FOLDER"],
        ["--model", "/nowhere", "--memory", "64GiB"],
        ["--model", "FOLDER", "--memory", "much"],
        ["--model", "FOLDER", "--memory", "64GiB", "--tp", "3"],
        ["--model", "FOLDER", "--memory", "64GiB", "--context-length", "x"],
        ["--model", "FOLDER", "--memory", "64GiB", "--device", "npu", "--quantization", "int4"],
    ],
)
def test_a_question_without_an_answer_is_an_error_of_one_line(folder, capsys, wrong):
    assert cli.main(["plan", *[word.replace("FOLDER", str(folder)) for word in wrong]]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_gguf_file_that_is_no_whole_model_is_an_error(tmp_path, capsys):
    (tmp_path / "x.gguf").write_bytes(small_gguf())
    assert cli.main(["plan", "--model", str(tmp_path / "x.gguf"), "--memory", "1GiB"]) == 2
