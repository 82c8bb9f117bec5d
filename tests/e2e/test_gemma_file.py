"""Gemma 3 270M from its real file, where that was fetched: `python benchmarks/fetch_models.py .models gemma`."""

from __future__ import annotations

import pytest

import mooli
from model_files import GEMMA_PATH

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GEMMA_PATH.exists(), reason="python benchmarks/fetch_models.py .models gemma"),
]

PROMPT = [2, 818, 5279, 529, 7001, 563]
"""'The capital of France is' behind the token that begins a text."""

GREEDY = [506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030, 563, 506, 7488]
"""What Transformers goes on with, in float32."""


def test_greedy_tokens_are_those_of_transformers() -> None:
    engine = mooli.Engine(model_path=str(GEMMA_PATH), max_total_tokens=1024, log_level="warning")
    try:
        answer = engine.generate("The capital of France is", {"temperature": 0, "max_new_tokens": len(GREEDY)})
        assert answer["output_ids"] == GREEDY
        again = engine.generate(input_ids=PROMPT, sampling_params={"temperature": 0, "max_new_tokens": len(GREEDY)})
        assert again["text"] == answer["text"]
    finally:
        engine.shutdown()
