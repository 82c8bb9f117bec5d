"""gpt-oss as the hub has it, its experts in MXFP4: against Transformers on the values that these stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from test_gpt_oss import CONFIG
from tiny_families import PROMPTS, assert_near, logits_of, save

import weight_formats as formats
from mooli.models.loader import open_model, stored_types
from mooli.tensor import TensorType
from variants import VARIANTS, Variant, require
from weight_formats import Floats


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Floats]]:
    """A folder, and the logits of all prompts."""
    folder = tmp_path_factory.mktemp("gpt-oss-mxfp4")
    save(CONFIG, folder)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    state = model.state_dict()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        # What is not quantised is (experts, inputs, outputs).
        written = formats.mxfp4(tensors.pop(name).numpy().swapaxes(1, 2))
        tensors |= {name + suffix: tensor.contiguous() for suffix, tensor in written.parts.items()}
        state[name] = torch.tensor(written.values.swapaxes(1, 2))
    model.load_state_dict(state)
    safetensors.torch.save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        return folder, [model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.dtype == "float32" and v.kv_dtype != "int8"], ids=str)
def test_logits_agree_with_transformers(quantised: tuple[Path, list[Floats]], variant: Variant) -> None:
    folder, expected = quantised
    require(variant.backend)
    for actual, wanted in zip(logits_of(folder, variant), expected, strict=True):
        if variant.backend == "cpu" or variant.quantization:  # activations of eight bits: a row may choose otherwise
            errors = np.sqrt(np.mean((actual - wanted) ** 2, axis=1) / np.mean(wanted**2, axis=1))
            assert np.median(errors) < 0.06
        else:
            assert_near(actual, wanted, variant)


def test_every_expert_keeps_its_four_bits(quantised: tuple[Path, list[Floats]]) -> None:
    folder, _ = quantised
    config, checkpoint = open_model(folder)
    experts = [name for name, spec in config.tensors().items() if ".experts." in name and len(spec.shape) == 2]
    assert {checkpoint.tensor(name).type for name in experts} == {TensorType.MXFP4}
    assert stored_types(folder, config) == dict.fromkeys(experts, TensorType.MXFP4)
    checkpoint.close()
