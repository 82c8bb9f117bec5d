"""The flags of `mooli plan`, named as the engine's.

Owns what may be said of a plan. Apart from `plan`, so that --help reads no model and imports nothing that does.
"""

from __future__ import annotations

import argparse

from mooli.arguments import add_model_word
from mooli.config import DEVICES, DTYPES

DEVICE_NAMES = {name: kind for name, kind in DEVICES.items() if kind != "reference"} | {"auto": "cpu"}
"""What `--device` takes to the backend that is counted for."""

KV_CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")


def add_plan_args(parser: argparse.ArgumentParser) -> None:
    """The flags of `mooli plan`, named as the engine's."""
    add_model_word(parser, "--model")
    parser.add_argument("--model", "--model-path", help="Model folder, GGUF file, config.json or model name.")
    parser.add_argument(
        "--memory",
        required=True,
        help="Memory of one device that programs can use, such as 61GiB (what an Ascend card of 64 GB reports).",
    )
    parser.add_argument(
        "--device",
        "--backend",
        default="auto",
        choices=tuple(DEVICE_NAMES),
        help="What computes, as weights take different room: a CPU (the default), PyTorch, a GPU or an NPU.",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=tuple(DTYPES), help="Default: the checkpoint's; bfloat16 on GPUs and NPUs."
    )
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "int4"), help="Default: none.")
    parser.add_argument(
        "--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES, help="Default: that of the computation."
    )
    parser.add_argument("--tp", "--tp-size", type=int, default=1, help="Devices that share the model. Default: 1.")
    parser.add_argument("--context-length", help="Longest text, prompt and answer together. Default: the model's.")
    parser.add_argument("--mem-fraction-static", type=float, help="Share of the memory for weights and KV cache.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
