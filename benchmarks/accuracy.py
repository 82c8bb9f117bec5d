"""How far packed weights are from the model they came from: mean KL divergence over 1,000 positions of real text.

The reference is the file's own weights dequantised to float32 and computed in NumPy. Prints, for each model and each
format, the mean and worst KL(reference || packed) in nats and how often the most likely token is the same; then a
greedy continuation, for a person to judge. `--kv-cache-dtype` names the types of KV cache to do this with.

    python benchmarks/accuracy.py [--models smollm2,qwen,gemma,coder]     coder takes 10 GB of memory
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import numpy as np
from loaded import PAGE_SIZE, REAL_MODELS, Loaded, real_model

from mooli.batch import PromptLogprobRows
from mooli.frontend.tokenizer import load_tokenizer

POSITIONS = 1000
"""Prose, instructions, code, SQL, JSON. With 200, which of two ways is better was chance (docs/log/kernels.md)."""
ROWS = 50
"""Positions whose distributions are in memory in float64 at one time: Gemma has 262,144 tokens."""

PROMPT = "The three laws of motion say that"
FORMATS = [("as in the file", "auto", None), ("int8", "auto", "int8"), ("int4 (int8 head)", "auto", "int4")]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def all_logits(loaded: Loaded, ids: np.ndarray) -> np.ndarray:
    """Logits (positions, vocab) of one prompt."""
    pages = list(range(-(-len(ids) // PAGE_SIZE)))
    batch = loaded.step([(0, len(ids), pages)], ids)
    batch.prompt_logprobs = [PromptLogprobRows(0, 0, batch.token_ids)]  # no row is left out
    planned = loaded.backend.plan(batch)
    hidden = loaded.forward(planned)
    blocks = []
    for begin in range(0, len(ids), 32):
        rows = np.arange(begin, min(begin + 32, len(ids)), dtype=np.int32)
        logits = loaded.logits(*loaded.backend.take_rows(planned, hidden, rows))
        blocks.append(loaded.backend.to_host(logits).copy())
    return np.concatenate(blocks)[:, : loaded.config.vocab_size]


def greedy(loaded: Loaded, ids: list[int], count: int) -> list[int]:
    pages, start, out = list(range(8)), 0, list(ids)
    for _ in range(count):
        step = loaded.step([(start, len(out) - start, pages)], np.array(out[start:]))
        start = len(out)
        out.append(int(loaded.runner.execute(step).token_ids[0]))
    return out[len(ids) :]


def distances(reference: np.ndarray, packed: np.ndarray) -> tuple[np.ndarray, float]:
    """KL(reference || packed) of each position, and the share of positions with the same most likely token."""
    kl = []
    for begin in range(0, len(reference), ROWS):
        whole, other = (log_softmax(logits[begin : begin + ROWS]) for logits in (reference, packed))
        kl.append((np.exp(whole) * (whole - other)).sum(axis=-1))
    return np.concatenate(kl), float((reference.argmax(-1) == packed.argmax(-1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", default="smollm2,qwen,gemma", help=f"of {', '.join(REAL_MODELS)}, and GGUF files; commas between"
    )
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["bfloat16"])
    args = parser.parse_args()
    text = (Path(__file__).parent / "text.txt").read_text()
    for name, path in map(real_model, args.models.split(",")):
        tokenizer = load_tokenizer(path)
        ids = np.array(tokenizer.encode(text)[:POSITIONS])
        reference = all_logits(Loaded(path, "reference", num_pages=40, max_tokens=POSITIONS), ids)
        print(f"{name}, {len(ids)} positions")
        for (label, dtype, quantization), kv_cache_dtype in product(FORMATS, args.kv_cache_dtype):
            loaded = Loaded(
                path,
                "cpu",
                dtype=dtype,
                quantization=quantization,
                kv_cache_dtype=kv_cache_dtype,
                num_pages=40,
                max_tokens=POSITIONS,
            )
            kl, same = distances(reference, all_logits(loaded, ids))
            what = f"{label}, KV {kv_cache_dtype}"
            print(f"  {what:<32} mean KL {kl.mean():.5f}  worst {kl.max():.4f}  same top token {same:.1%}")
            continuation = tokenizer.decode(greedy(loaded, tokenizer.encode(PROMPT), 24))
            print(f"      {PROMPT}{continuation!r}")


if __name__ == "__main__":
    main()
