"""Folders of msmodelslim: what their int8 weights stand for, and what is refused, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelslim_folder import CONFIG, FloatCheckpoint, Tensors, made_static, quantised, write
from mooli.backends.dequant import dequantize, with_scales_in_groups
from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.loader import open_model
from mooli.models.modelslim import described_types
from mooli.tensor import TensorType

Q_PROJ = "model.layers.0.self_attn.q_proj"
O_PROJ = "model.layers.0.self_attn.o_proj"
DOWN = "model.layers.0.mlp.down_proj.weight"


def test_int8_weights_come_with_a_scale_for_each_row(tmp_path: Path) -> None:
    tensors, description = quantised()
    config, checkpoint = open_model(write(tmp_path, tensors, description))
    weight = checkpoint.tensor(f"{Q_PROJ}.weight")
    assert config.dtype == "float32"
    assert weight.type == TensorType.I8
    np.testing.assert_array_equal(weight.data.view(np.int8), tensors[f"{Q_PROJ}.weight"])
    np.testing.assert_array_equal(weight.scales, tensors[f"{Q_PROJ}.weight_scale"][:, 0])
    checkpoint.close()


def test_what_is_float_stays_float(tmp_path: Path) -> None:
    _, checkpoint = open_model(write(tmp_path, *quantised()))
    assert checkpoint.tensor(DOWN).type == TensorType.F32
    checkpoint.close()


def test_what_belongs_to_a_weight_has_no_name_of_its_own(tmp_path: Path) -> None:
    _, checkpoint = open_model(write(tmp_path, *quantised()))
    assert set(checkpoint.names()) == set(CONFIG.tensors())
    checkpoint.close()


@pytest.mark.parametrize("is_float16", [False, True], ids=["float scales", "scales as int64"])
def test_static_layers_give_back_the_weights_and_biases_they_were_made_of(tmp_path: Path, is_float16: bool) -> None:
    tensors, description = quantised()
    meant = FloatCheckpoint(dict(tensors))
    steps = {name: scale[:, 0] * 0.0625 for name, scale in tensors.items() if name.endswith("weight_scale")}
    made_static(tensors, description, is_float16=is_float16)
    _, checkpoint = open_model(write(tmp_path, tensors, description))
    for name in CONFIG.tensors():
        actual, expected = dequantize(checkpoint.tensor(name)), dequantize(meant.tensor(name))
        if name.endswith(".bias"):
            assert (np.abs(actual - expected) <= 0.51 * steps[name.removesuffix("bias") + "weight_scale"]).all()
        else:
            np.testing.assert_allclose(actual, expected, rtol=3e-7)
        checkpoint.release(name)
    checkpoint.close()


def test_one_scale_for_a_row_becomes_one_for_every_group_with_the_same_codes(tmp_path: Path) -> None:
    _, checkpoint = open_model(write(tmp_path, *quantised()))
    weight = checkpoint.tensor(f"{Q_PROJ}.weight")
    grouped = with_scales_in_groups(weight)
    assert grouped.type == TensorType.Q8_0
    np.testing.assert_allclose(dequantize(grouped), dequantize(weight), rtol=2**-11)
    checkpoint.close()


def test_types_are_known_from_the_description_alone(tmp_path: Path) -> None:
    types = described_types(write(tmp_path, *quantised()) / "quant_model_description.json")
    assert types[f"{Q_PROJ}.weight"] == TensorType.I8
    assert DOWN not in types
    assert len(types) == 13


Change = Callable[[Tensors, dict[str, Any]], Any]


def as_float(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].astype(np.float32)


WRONG: dict[str, tuple[Change, type[Exception], str]] = {
    "an unknown type": (
        lambda t, d: d.update({f"{Q_PROJ}.weight": "W4A8_DYNAMIC"}),
        UnsupportedModelError,
        r"q_proj.weight is 'W4A8_DYNAMIC'.*FLOAT, W8A8_DYNAMIC and W8A8.*quantization='int8'",
    ),
    "a type that is no text": (
        lambda t, d: d.update({f"{Q_PROJ}.weight": 8}),
        UnsupportedModelError,
        "q_proj.weight is 8",
    ),
    "a quantised cache": (
        lambda t, d: d.update({"fa_quant_type": "FAQuant"}),
        UnsupportedModelError,
        "fa_quant_type is 'FAQuant'.*KV cache",
    ),
    "a quantised embedding": (
        lambda t, d: d.update({"model.embed_tokens.weight": "W8A8_DYNAMIC"}),
        UnsupportedModelError,
        "quantised embedding",
    ),
    "no scale": (
        lambda t, d: t.pop(f"{Q_PROJ}.weight_scale"),
        CheckpointError,
        r"q_proj.weight_scale is missing",
    ),
    "no weight": (lambda t, d: t.pop(f"{Q_PROJ}.weight"), CheckpointError, "there is no such tensor"),
    "float where int8 is said": (
        lambda t, d: as_float(t, f"{Q_PROJ}.weight"),
        CheckpointError,
        "it is F32 of shape .*not of one model",
    ),
    "int8 where float is said": (
        lambda t, d: d.update({f"{Q_PROJ}.weight": "FLOAT"}),
        CheckpointError,
        "says that .*q_proj.weight is FLOAT, and it is int8",
    ),
    "int8 that is not named": (
        lambda t, d: d.pop(f"{Q_PROJ}.weight"),
        CheckpointError,
        "does not name .*q_proj.weight, and it is int8",
    ),
    "no description": (lambda t, d: d.clear(), CheckpointError, "names no weight"),
    "a shifted norm": (
        lambda t, d: t.update({"model.norm.bias": np.zeros(64, np.float32)}),
        CheckpointError,
        "model.norm.bias has no place",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_before_a_weight_is_read(tmp_path: Path, wrong: str) -> None:
    change, error, message = WRONG[wrong]
    tensors, description = quantised()
    change(tensors, description)
    with pytest.raises(error, match=message):
        open_model(write(tmp_path, tensors, description))


def test_two_descriptions_are_refused(tmp_path: Path) -> None:
    write(tmp_path, *quantised())
    (tmp_path / "quant_model_description_w8a8.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"description_w8a8.json.*keep one"):
        open_model(tmp_path)


WRONG_NUMBERS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "too few scales": (f"{Q_PROJ}.weight_scale", lambda v: v[:-1], r"shape \[63, 1\] instead of \[64\]"),
    "a negative scale": (f"{Q_PROJ}.weight_scale", lambda v: -v, "no scales"),
    "NaN": (f"{Q_PROJ}.weight_scale", lambda v: v * np.float32(np.nan), "no scales"),
    "weights off centre": (f"{Q_PROJ}.weight_offset", lambda v: v + 1, "off centre"),
}


@pytest.mark.parametrize("wrong", WRONG_NUMBERS)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, wrong: str) -> None:
    name, change, message = WRONG_NUMBERS[wrong]
    tensors, description = quantised()
    tensors[name] = np.asarray(change(tensors[name]))
    _, checkpoint = open_model(write(tmp_path, tensors, description))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        checkpoint.tensor(f"{Q_PROJ}.weight")
    checkpoint.close()


WRONG_STATIC: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a bias without a place": (f"{O_PROJ}.quant_bias", lambda v: v + 50, "holds a bias, for which .* no place"),
    "an input scale of zero": (f"{O_PROJ}.input_scale", lambda v: v * 0, "input_scale is zero"),
    "a scale too many": (f"{O_PROJ}.input_scale", lambda v: np.repeat(v, 2), r"shape \[2\] instead of \[1\]"),
}


@pytest.mark.parametrize("wrong", WRONG_STATIC)
def test_static_numbers_that_cannot_be_are_refused(tmp_path: Path, wrong: str) -> None:
    name, change, message = WRONG_STATIC[wrong]
    tensors, description = quantised()
    made_static(tensors, description)
    tensors[name] = np.asarray(change(tensors[name]), tensors[name].dtype)
    _, checkpoint = open_model(write(tmp_path, tensors, description))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        checkpoint.tensor(f"{O_PROJ}.weight")
    checkpoint.close()
