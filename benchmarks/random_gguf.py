"""Writes a GGUF file of a llama model with random weights of one stored type, to measure what that type costs.

Shapes are those of Llama 3.1 8B, cut in layers, unless said otherwise. Mooli (`benchmarks/kernels.py --models FILE`)
and llama.cpp (`llama-bench -m FILE`) read the same file. It has no vocabulary, so neither makes text of it.

    python benchmarks/random_gguf.py out.gguf --type IQ4_NL [--layers 4] [--hidden 4096] [--width 14336]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

from mooli.tensor import BLOCK, GGUF_TYPES, TensorType, row_bytes

HALVES = {
    TensorType.Q2_K: (80, 82),
    TensorType.Q3_K: (108,),
    TensorType.Q4_1: (0, 2),
    TensorType.Q4_K: (0, 2),
    TensorType.Q5_1: (0, 2),
    TensorType.Q5_K: (0, 2),
    TensorType.Q6_K: (208,),
}
"""Where a block has its float16 scales; the others begin with one."""


def random_rows(kind: TensorType, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (rows, row_bytes): any codes, under scales that keep what they multiply finite."""
    blocks = rng.integers(0, 256, (rows * columns // BLOCK[kind][0], BLOCK[kind][1]), dtype=np.uint8)
    if kind == TensorType.MXFP4:
        blocks[:, 0] = 119
    else:
        for offset in HALVES.get(kind, (0,)):
            scales = rng.uniform(-0.001, 0.001, len(blocks)).astype("<f2")
            blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, row_bytes(kind, columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = [kind.name for kind in GGUF_TYPES if kind not in (TensorType.F32, TensorType.F16, TensorType.BF16)]
    parser.add_argument("path", type=Path)
    parser.add_argument("--type", choices=kinds, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=14336, help="of the MLP")
    parser.add_argument("--vocabulary", type=int, default=32000)
    arguments = parser.parse_args()
    kind, hidden, width = TensorType[arguments.type], arguments.hidden, arguments.width
    head_dim, kv_heads = 128, 8
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(arguments.path, "llama")
    writer.add_block_count(arguments.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(hidden // head_dim)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(arguments.vocabulary)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int) -> None:
        data = random_rows(kind, rows, columns, rng)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind.name])

    def add_gain(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))

    add("token_embd", arguments.vocabulary, hidden)
    for layer in range(arguments.layers):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            add_gain(f"{block}.{norm}")
        add(f"{block}.attn_q", hidden, hidden)
        add(f"{block}.attn_k", kv_heads * head_dim, hidden)
        add(f"{block}.attn_v", kv_heads * head_dim, hidden)
        add(f"{block}.attn_output", hidden, hidden)
        add(f"{block}.ffn_gate", width, hidden)
        add(f"{block}.ffn_up", width, hidden)
        add(f"{block}.ffn_down", hidden, width)
    add_gain("output_norm")
    add("output", arguments.vocabulary, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
