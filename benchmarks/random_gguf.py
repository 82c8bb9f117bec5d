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

SCALES = {
    TensorType.Q4_0: ((0, 5),),
    TensorType.Q4_1: ((0, 9), (2, -1.2)),
    TensorType.Q5_0: ((0, 9),),
    TensorType.Q5_1: ((0, 18), (2, -1.2)),
    TensorType.Q8_0: ((0, 74),),
    TensorType.Q2_K: ((80, 16), (82, 16)),
    TensorType.Q3_K: ((108, 45),),
    TensorType.Q4_K: ((0, 320), (2, 43)),
    TensorType.Q5_K: ((0, 650), (2, 43)),
    TensorType.Q6_K: ((208, 1350),),
    TensorType.IQ4_NL: ((0, 70),),
    TensorType.IQ4_XS: ((0, 1300),),
}
"""Where a block has its float16 scales, and what random codes are about, in units of that scale."""


def random_rows(kind: TensorType, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (rows, row_bytes): any codes, under scales that keep what they multiply about as large as it was."""
    count, size = rows * columns // BLOCK[kind][0], columns**-0.5
    blocks = np.frombuffer(bytearray(rng.bytes(count * BLOCK[kind][1])), np.uint8).reshape(count, -1)
    if kind == TensorType.MXFP4:
        blocks[:, 0] = 127 + round(np.log2(size / 3))
    else:
        signs = rng.choice((-1.0, 1.0), count)
        for offset, spread in SCALES[kind]:
            blocks[:, offset : offset + 2] = (signs * size / spread).astype("<f2").view(np.uint8).reshape(-1, 2)
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
