"""Folders that other tools quantised: every weight is what its format says, and models compute with it everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray

import weight_formats as formats
from mooli.backends import create_backend
from mooli.backends.base import Limits
from mooli.backends.dequant import dequantize
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.formats.safetensors import SafetensorsFolder
from mooli.models.loader import open_model, stored_types
from mooli.models.quantized.folder import QuantizedFolder, take_format
from mooli.models.registry import create_model
from mooli.plan import weight_bytes
from mooli.tensor import TensorType
from steps import Pages, Row, step
from variants import require, simulated_npu
from weight_formats import Floats, Written

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPT = np.random.default_rng(1).integers(0, VOCAB, 37).tolist()


def compressed(kind: str, name: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": kind, "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Format:
    """What config.json says, how a weight is written, what it becomes, and by how much its values may be off: rounding,
    of the value itself, and of the row's largest scale."""

    config: dict[str, Any]
    write: Callable[[Floats], Written]
    type: TensorType
    rounding: float = 0.0
    of_scale: float = 0.0


HALF, BF16 = 2.0**-11, 2.0**-8
FORMATS = {
    "awq": Format(
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
        formats.awq,
        TensorType.Q4_1,
        of_scale=16 * HALF,
    ),
    "gptq": Format(
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
        formats.gptq,
        TensorType.Q4_0,
    ),
    "gptq-v2": Format(
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"},
        lambda w: formats.gptq(w, 4, 64, is_symmetric=False, less=0),
        TensorType.Q4_1,
        of_scale=16 * HALF,
    ),
    "gptq-whole-rows": Format(
        {"quant_method": "gptq", "bits": 4, "group_size": -1}, lambda w: formats.gptq(w, 4, -1), TensorType.Q4_0
    ),
    "gptq-8": Format(
        {"quant_method": "gptq", "bits": 8, "group_size": 32}, lambda w: formats.gptq(w, 8), TensorType.Q8_0
    ),
    "gptq-8-asymmetric": Format(
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False},
        lambda w: formats.gptq(w, 8, is_symmetric=False),
        TensorType.BF16,
        rounding=BF16,
    ),
    "gptq-2": Format(
        {"quant_method": "gptq", "bits": 2, "group_size": 32, "sym": False},
        lambda w: formats.gptq(w, 2, is_symmetric=False),
        TensorType.Q4_0,
    ),
    "gptq-groups-of-16": Format(
        {"quant_method": "gptq", "bits": 4, "group_size": 16}, lambda w: formats.gptq(w, 4, 16), TensorType.BF16, BF16
    ),
    "pack": Format(
        compressed("int", "pack-quantized", num_bits=4, strategy="group", group_size=32),
        formats.pack_quantized,
        TensorType.Q4_0,
    ),
    "pack-asymmetric": Format(
        compressed("int", "pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=False),
        lambda w: formats.pack_quantized(w, 4, 64, is_symmetric=False),
        TensorType.Q4_1,
        of_scale=16 * HALF,
    ),
    "pack-channels": Format(
        compressed("int", "pack-quantized", num_bits=4, strategy="channel"),
        lambda w: formats.pack_quantized(w, 4, -1, dtype=torch.float16),
        TensorType.Q4_0,
    ),
    "pack-8": Format(
        compressed("int", "pack-quantized", num_bits=8, strategy="group", group_size=32),
        lambda w: formats.pack_quantized(w, 8),
        TensorType.Q8_0,
    ),
    "int": Format(
        compressed("int", "int-quantized", num_bits=8, strategy="channel"), formats.int_quantized, TensorType.I8
    ),
    "int-asymmetric": Format(
        compressed("int", "int-quantized", num_bits=8, strategy="channel", symmetric=False),
        lambda w: formats.int_quantized(w, is_symmetric=False),
        TensorType.BF16,
        rounding=BF16,
    ),
    "float": Format(
        compressed("float", "float-quantized", num_bits=8, strategy="channel"),
        lambda w: formats.float8(w, "channel"),
        TensorType.BF16,
        rounding=BF16,
    ),
    "float-tensor": Format(
        compressed("float", "naive-quantized", num_bits=8, strategy="tensor"),
        lambda w: formats.float8(w, "tensor"),
        TensorType.BF16,
        rounding=BF16,
    ),
    "float-block": Format(
        compressed("float", "float-quantized", num_bits=8, strategy="block", block_structure=[48, 48]),
        lambda w: formats.float8(w, "block", 48),
        TensorType.BF16,
        rounding=BF16,
    ),
    "fp8-block": Format(
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 48], "activation_scheme": "dynamic"},
        lambda w: formats.float8(w, "block", 48, "weight_scale_inv"),
        TensorType.BF16,
        rounding=BF16,
    ),
    "fp8-tensor": Format(
        {"quant_method": "fp8", "activation_scheme": "static"},
        lambda w: formats.float8(w, "tensor"),
        TensorType.BF16,
        rounding=BF16,
    ),
    "fbgemm": Format(
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]},
        lambda w: formats.float8(w, "channel"),
        TensorType.BF16,
        rounding=BF16,
    ),
}

every_format = pytest.mark.parametrize("name", list(FORMATS))


def save(folder: Path) -> transformers.PreTrainedModel:
    """A tiny random llama with gains and biases that are not ones and zeros."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attention_bias=True, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.PreTrainedModel]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, save(folder)


@pytest.fixture
def folder(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    """The tiny model, to be quantised."""
    return Path(shutil.copytree(saved[0], tmp_path / "model"))


def quantised(folder: Path, name: str) -> dict[str, Floats]:
    form = FORMATS[name]
    return formats.quantise_folder(folder, form.config, lambda _, weight: form.write(weight))


@every_format
def test_weights_are_what_the_format_says(folder: Path, name: str) -> None:
    form = FORMATS[name]
    values = quantised(folder, name)
    assert len(values) == 14
    config, checkpoint = open_model(folder)
    for weight, expected in values.items():
        raw = checkpoint.tensor(weight)
        assert (raw.type, raw.shape, checkpoint.shape(weight)) == (form.type, expected.shape, expected.shape)
        actual = dequantize(raw)
        if form.rounding or form.of_scale:
            largest = np.abs(expected).max(axis=1, keepdims=True)  # of seven steps or more
            error = np.abs(actual - expected)
            assert (error <= form.rounding * np.abs(expected) + form.of_scale * largest / 7).all()
        else:
            np.testing.assert_array_equal(actual, expected)
        checkpoint.release(weight)
    checkpoint.close()
    types = stored_types(folder, config)
    assert types == dict.fromkeys(values, form.type)


def logits_of(folder: Path, backend_name: str, dtype: str = "float32") -> NDArray[np.float32]:
    backend = create_backend(backend_name, dtype=dtype)
    try:
        config, checkpoint = open_model(folder)
        model = create_model(config, checkpoint, backend)
        checkpoint.close()
        expected_bytes = None
        if backend_name != "reference":
            types = stored_types(folder, config)
            expected_bytes = weight_bytes(config, dtype, device=backend_name, stored_types=types)
        page_size = backend.default_page_size
        backend.allocate(config.cache_spec(page_size, dtype), 8, Limits(64, 8, 8))
        assert expected_bytes in (None, backend.weight_bytes())
        batch = step([Row(PROMPT, 0, Pages(8, page_size).take(len(PROMPT)), len(PROMPT))], page_size)
        planned = backend.plan(batch)
        hidden = backend.capture(model.forward)(planned)
        taken = backend.take_rows(planned, hidden, batch.sampling_tokens)
        return np.array(backend.to_host(backend.capture(model.logits)(*taken)), np.float32)
    finally:
        backend.close()


@pytest.fixture(scope="module", params=["awq", "gptq", "gptq-8", "pack-asymmetric", "int", "fp8-block"])
def computed(
    request: pytest.FixtureRequest,
    saved: tuple[Path, transformers.PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Floats]:
    """A quantised folder, and the logits of Transformers on the values that are read of it."""
    plain, model = saved
    folder = Path(shutil.copytree(plain, tmp_path_factory.mktemp(request.param) / "model"))
    form = FORMATS[request.param]
    names = formats.quantise_folder(folder, form.config, lambda _, weight: form.write(weight))
    _, checkpoint = open_model(folder)
    state = model.state_dict()
    state |= {name: torch.tensor(dequantize(checkpoint.tensor(name))) for name in names}
    checkpoint.close()
    model.load_state_dict(state)
    with torch.no_grad():
        return folder, model(torch.tensor([PROMPT])).logits[0].numpy()


@pytest.mark.parametrize(("backend", "bound"), [("reference", 1e-5), ("cpu", 0.06), ("torch", 1e-5), ("ascend", 0.06)])
def test_models_compute_with_them_on_every_backend(computed: tuple[Path, Floats], backend: str, bound: float) -> None:
    folder, expected = computed
    require(backend)
    if backend == "ascend":
        with simulated_npu():
            actual = logits_of(folder, backend, "bfloat16")
    else:
        actual = logits_of(folder, backend)
    assert actual.shape == expected.shape
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    assert error <= bound


def test_some_layers_may_be_left_as_they_are(folder: Path) -> None:
    config = FORMATS["gptq"].config | {"modules_to_not_convert": ["model.layers.0"]}
    values = formats.quantise_folder(
        folder, config, lambda module, weight: None if ".0." in module else formats.gptq(weight)
    )
    assert len(values) == 7
    opened, checkpoint = open_model(folder)
    assert checkpoint.tensor("model.layers.0.mlp.up_proj.weight").type == TensorType.F32
    assert checkpoint.tensor("model.layers.1.mlp.up_proj.weight").type == TensorType.Q4_0
    checkpoint.close()
    assert stored_types(folder, opened) == dict.fromkeys(values, TensorType.Q4_0)


def test_groups_of_layers_may_differ(folder: Path) -> None:
    weights = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config = compressed("int", "pack-quantized", num_bits=4, strategy="group", group_size=32)
    config["config_groups"]["eight"] = {"targets": ["re:.*down_proj$"], "weights": {**weights, "num_bits": 8}}
    config["ignore"] += ["re:.*[.]q_proj"]
    values = formats.quantise_folder(
        folder,
        config,
        lambda module, weight: (
            None if "q_proj" in module else formats.pack_quantized(weight, 8 if "down_proj" in module else 4)
        ),
    )
    opened, checkpoint = open_model(folder)
    types = {name: TensorType.Q8_0 if "down_proj" in name else TensorType.Q4_0 for name in values}
    assert {name: checkpoint.tensor(name).type for name in values} == types == stored_types(folder, opened)
    for name, expected in values.items():
        np.testing.assert_array_equal(dequantize(checkpoint.tensor(name)), expected)
    checkpoint.close()


def test_scales_of_activations_and_biases_of_zeros_are_no_part_of_the_model(folder: Path) -> None:
    quantised(folder, "float")
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.ones(1)
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(128)
    safetensors.torch.save_file(tensors, path)
    open_model(folder)[1].close()
    tensors["model.layers.0.mlp.up_proj.bias"][5] = 1
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"up_proj\.bias has no place"):
        open_model(folder)


def test_experts_of_mxfp4_are_rows_of_one_tensor_with_nothing_rounded(tmp_path: Path) -> None:
    experts = np.random.default_rng(2).standard_normal((3, 64, 96)).astype(np.float32)
    written = formats.mxfp4(experts)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = {name + suffix: tensor for suffix, tensor in written.parts.items()}
    safetensors.torch.save_file(parts | {name + "_bias": torch.ones(3, 64)}, tmp_path / "model.safetensors")
    weight_format = take_format({"quantization_config": {"quant_method": "mxfp4"}})
    assert weight_format is not None
    folder = QuantizedFolder(SafetensorsFolder(tmp_path), weight_format, ())
    assert set(folder.names()) == {name + "_blocks", name + "_bias"}
    info, raw = folder.info(name + "_blocks"), folder.tensor(name + "_blocks")
    assert (info.matrix_shape, info.readable_type()) == ((192, 96), TensorType.MXFP4)
    np.testing.assert_array_equal(dequantize(raw), written.values.reshape(192, 96))
    assert folder.tensor(name + "_blocks") is raw  # each expert asks for all
    second = raw.take_rows(np.arange(64, 128))
    np.testing.assert_array_equal(dequantize(second), written.values[1])
    assert np.corrcoef(written.values.ravel(), experts.ravel())[0, 1] > 0.98
    folder.release(name + "_blocks")
    folder.close()


# ---------------------------------------------------------------- refused


def changed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(changes)


def in_group(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(changes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gptq",
            changed(quant_method="bitsandbytes"),
            "quantised with 'bitsandbytes', which is not read; read are awq",
        ),
        ("gptq", changed(bits=3), "GPTQ with 3 bits is not read"),
        ("gptq", changed(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
        ("gptq", changed(dynamic={"+:.*": {"bits": 8}}), r"settings of its own for some layers \(dynamic\)"),
        ("awq", changed(version="gemv"), "AWQ of version 'gemv'"),
        ("pack", changed(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not read"),
        ("pack", changed(sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights"),
        ("pack", changed(transform_config={"config_groups": {"R1": {}}}), "rotations"),
        ("pack", in_group(num_bits=3), "'int' weights of 3 bits are not read"),
        ("float", in_group(strategy="token"), "a scale for each 'token' are not read"),
        ("pack", changed(ignore=["re:(a+)+$"]), "without repeated groups"),
        ("pack", changed(ignore=["re:" + "a*" * 5]), "4 repetitions are read"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    folder: Path, name: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    config = json.loads(json.dumps(FORMATS[name].config))
    change(config)
    formats.quantise_folder(folder, config, lambda _, weight: FORMATS[name].write(weight))
    with pytest.raises(UnsupportedModelError, match=message):
        open_model(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pack", changed(ignore=["re:.*down_proj"]), "down_proj is quantised, and quantization_config says that it is"),
        ("pack", changed(config_groups={}), "has no config_groups"),
        ("pack", changed(ignore=["re:("]), "which is none"),
        ("pack", in_group(type="float", num_bits=8, strategy="channel"), "is stored as int, and .* says float"),
        ("gptq", changed(group_size=48), "which are not whole groups of 48"),
        ("gptq", changed(modules_to_not_convert="lm_head"), "modules_to_not_convert must be a list"),
        ("fp8-block", changed(weight_block_size=[128]), "a block is .*, not two lengths"),
        ("fp8-block", changed(weight_block_size=[16, 16]), r"weight_scale_inv has shape \[2, 2\], which is none of"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_an_error(
    folder: Path, name: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    config = json.loads(json.dumps(FORMATS[name].config))
    change(config)
    formats.quantise_folder(folder, config, lambda _, weight: FORMATS[name].write(weight))
    with pytest.raises(CheckpointError, match=message):
        _, checkpoint = open_model(folder)
        checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")


def tampered(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    new = change(tensors.pop(name))
    safetensors.torch.save_file(tensors if new is None else tensors | {name: new}, path)


LAYER = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize(
    ("name", "part", "change", "error", "message"),
    [
        ("gptq", "scales", lambda t: None, CheckpointError, "up_proj.scales is missing beside the rest"),
        ("gptq", "scales", lambda t: t[:1], CheckpointError, r"scales has shape \[1, 128\] instead of \[2, 128\]"),
        ("gptq", "scales", lambda t: t * torch.nan, CheckpointError, "no scales: infinite or NaN"),
        ("gptq", "qzeros", lambda t: t + 1, CheckpointError, "said to be symmetric, and has zeros that are not 8"),
        ("gptq", "g_idx", lambda t: t.flip(0), UnsupportedModelError, r"by importance \(desc_act\)"),
        ("gptq", "qweight", lambda t: t.long(), CheckpointError, "no matrix of int32"),
        ("pack", "weight_scale", lambda t: None, CheckpointError, "weight_scale is missing"),
        ("pack", "weight_shape", lambda t: t * 2, CheckpointError, "does not hold 256 x 128 codes"),
        ("pack", "weight_packed", lambda t: t.to(torch.uint8), UnsupportedModelError, "int32 words and int8 matrices"),
        ("fp8-block", "weight_scale_inv", lambda t: None, CheckpointError, "its scales .*_inv are missing"),
        ("fp8-block", "weight", lambda t: t.to(torch.float8_e5m2), UnsupportedModelError, "F8_E5M2; of eight-bit"),
    ],
)
def test_parts_that_are_missing_or_of_another_shape_are_named(
    folder: Path, name: str, part: str, change: Any, error: type[Exception], message: str
) -> None:
    quantised(folder, name)
    tampered(folder, LAYER + part, change)
    with pytest.raises(error, match=message):
        _, checkpoint = open_model(folder)
        checkpoint.tensor(LAYER + "weight")


def test_columns_in_groups_by_importance_are_refused_in_compressed_tensors_too(folder: Path) -> None:
    quantised(folder, "pack")
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[LAYER + "weight_g_idx"] = torch.arange(64, dtype=torch.int32).flip(0) // 32
    safetensors.torch.save_file(tensors, path)
    _, checkpoint = open_model(folder)
    with pytest.raises(UnsupportedModelError, match=r"by importance \(actorder\)"):
        checkpoint.tensor(LAYER + "weight")
    checkpoint.close()


def test_a_folder_where_nothing_is_quantised_is_not_what_its_config_says(folder: Path) -> None:
    formats.quantise_folder(folder, FORMATS["gptq"].config, lambda *_: None)
    with pytest.raises(CheckpointError, match="is quantised with GPTQ, and no tensor is"):
        open_model(folder)
