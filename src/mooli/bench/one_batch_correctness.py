"""`mooli bench one-batch --correctness-test`: the same answers whether prompts are computed whole or in parts.

Owns the two ways, what is printed of them, and the comparison. Never times anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mooli.bench.errors import BenchmarkError
from mooli.bench.one_batch_run import checked, greedy_request
from mooli.engine.core import EngineCore
from mooli.frontend.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is",
    "The capital of the United Kingdom is",
    "Today is a sunny day and I like",
)


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; empty lines are left out. Raises BenchmarkError."""
    try:
        prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise BenchmarkError(f"cannot read --prompt-filename {file}: {exc}") from exc
    if not prompts:
        raise BenchmarkError(f"--prompt-filename {file} holds no prompt")
    return prompts


def differing_answers(
    core: EngineCore,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    cut_len: int,
    output_len: int,
    say: Callable[[str], None],
) -> list[int]:
    """Answer each prompt alone and whole, then all together on their cached first `cut_len` tokens.

    Greedy, `output_len` tokens each. Returns the numbers of the prompts whose answers differ. Raises BenchmarkError for
    a prompt of no more than `cut_len` tokens, or a request that fails.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    say(f"input_ids={ids}")
    for prompt, prompt_ids in zip(prompts, ids, strict=True):
        if len(prompt_ids) <= cut_len:
            raise BenchmarkError(
                f"the prompt {prompt[:40]!r} has {len(prompt_ids)} tokens, which is not more than --cut-len {cut_len}"
            )
    whole = []
    for prompt_ids in ids:
        core.flush_cache()
        whole += _answers(core, [prompt_ids], output_len)
    core.flush_cache()
    _answers(core, [prompt_ids[:cut_len] for prompt_ids in ids], 1)
    in_parts = _answers(core, ids, output_len)
    for i, (prompt_ids, answer) in enumerate(zip(ids, in_parts, strict=True)):
        say(f"========== Prompt {i} ==========\n{tokenizer.decode([*prompt_ids, *answer])}\n")
    return [i for i, (one, other) in enumerate(zip(whole, in_parts, strict=True)) if one != other]


def _answers(core: EngineCore, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    answers: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        answers[f"prompt-{i}"] = []
        core.add(greedy_request(f"prompt-{i}", np.asarray(prompt, np.int32), num_tokens))
    while core.has_work:
        for output in checked(core.step()):
            answers[output.rid] += output.new_token_ids
    return list(answers.values())
