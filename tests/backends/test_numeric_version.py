"""Where the bits that a model leaves in KV pages change, so must `NUMERIC_VERSION`: kept pages would be misread."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from cpu_ops import LEVELS, cpu_backend

from mooli.backends.base import NUMERIC_VERSION, Limits
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.llama import LlamaConfig
from mooli.models.registry import create_model
from steps import Row, step, uniform_cache

CONFIG = LlamaConfig(
    family="qwen3",
    architecture="Qwen3ForCausalLM",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    qk_norm=True,
)
VERSION = 2
BITS = {
    # dtype, quantization, KV type: digests at the levels of scalar and of avx2
    ("float32", None, "float32"): ("4f3ecd792c3669ab", "ca5815458591d53e"),
    ("float16", None, "float16"): ("3f92451af57d00a8", "525e7cf30249a569"),
    ("bfloat16", None, "bfloat16"): ("7e000297ec0a8215", "7e000297ec0a8215"),
    ("float32", "int8", "int8"): ("ea1b39f6e626ec72", "e41ac4af06e83bdd"),
    ("float32", "int4", "float32"): ("63900d62f5bab4c1", "2d3718f52d17c0c1"),
}


def kv_bits(level: str, dtype: str, quantization: str | None, kv_dtype: str) -> str:
    """Digest of the pages of 75 tokens, computed in two steps."""
    with cpu_backend(level, dtype=dtype, quantization=quantization) as backend:
        model = create_model(CONFIG, DummyCheckpoint(CONFIG, seed=1), backend)
        backend.allocate(uniform_cache(3, 2, 32, 32, kv_dtype), 4, Limits(64, 1, 4))
        forward = backend.capture(model.forward)
        tokens = (np.arange(75) * 31 % CONFIG.vocab_size).tolist()
        for start in (0, 50):
            forward(backend.plan(step([Row(tokens[start : start + 50], start, [2, 0, 3])], 32)))
        return hashlib.sha256(backend.read_pages([2, 0, 3], 75)).hexdigest()[:16]


@pytest.mark.parametrize("level", ["scalar", "avx2", "neon"])
@pytest.mark.parametrize("kinds", BITS, ids=str)
def test_the_bits_of_pages_are_those_of_this_numeric_version(level: str, kinds: tuple[str, str | None, str]) -> None:
    if level not in LEVELS:
        pytest.skip(f"this processor has no {level}")
    found = kv_bits(level, *kinds)
    assert (found, NUMERIC_VERSION) == (BITS[kinds][level != "scalar"], VERSION), (
        f"KV pages of {kinds} have other bits than before: if that is meant, raise NUMERIC_VERSION in"
        " mooli/backends/base.py, and put it and the digests here"
    )
