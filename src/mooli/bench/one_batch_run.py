"""Timing one static batch on an engine core: all prompts computed, then all answers token by token.

Owns the requests of a batch and the clock around the steps. Never prints and never reads a flag.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mooli.bench.errors import BenchmarkError
from mooli.engine.core import EngineCore
from mooli.engine.facts import EngineFacts
from mooli.types import Request, RequestOutput, SamplingParams

Ids = NDArray[np.int32]

_LARGEST_ID = 10_000
"""Prompts are drawn from the ids below, as SGLang's benchmark draws them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTiming:
    """Seconds. decode_s: one entry a step; each gives every answer of the batch its next token."""

    batch_size: int
    input_len: int
    output_len: int
    prefill_s: float
    decode_s: list[float]

    @property
    def median_decode_s(self) -> float | None:
        """None for answers of one token, which need no step of their own."""
        return statistics.median(self.decode_s) if self.decode_s else None

    @property
    def total_s(self) -> float:
        return self.prefill_s + sum(self.decode_s)


def random_prompts(batch_size: int, input_len: int, vocab_size: int, seed: int) -> list[Ids]:
    """Prompts that share nothing, the same for the same seed."""
    drawn = np.random.RandomState(seed).randint(0, min(vocab_size, _LARGEST_ID), (batch_size, input_len))
    return list(drawn.astype(np.int32))


def why_impossible(facts: EngineFacts, batch_size: int, input_len: int, output_len: int) -> str | None:
    """Why an engine cannot hold such a batch at once; None if it can."""
    length = input_len + output_len
    if length > facts.context_length:
        return f"{length} tokens are more than the context of {facts.context_length}"
    if batch_size > facts.max_running_requests:
        return f"at most {facts.max_running_requests} requests run at once"
    # The one page more is what a prompt that ends inside a page is copied to.
    wanted = batch_size * (-(-length // facts.page_size) + 1)
    if wanted > facts.num_pages:
        return f"it needs {wanted} KV pages of {facts.page_size} tokens, and there are {facts.num_pages}"
    return None


def time_batch(core: EngineCore, prompts: Sequence[Ids], output_len: int, clock: Callable[[], float]) -> BatchTiming:
    """Compute `output_len` tokens behind each of the prompts, which are all of one length, with an empty cache.

    Prompts are computed in the engine's own steps (`chunked_prefill_size`) until each has its first token. Answers go
    on from what the cache then holds, so that no prompt is computed beside them. Raises BenchmarkError when a request
    fails, or the batch does not stay together.
    """
    core.flush_cache()
    num, input_len = len(prompts), len(prompts[0])
    start_s = clock()
    first = _first_tokens(core, prompts)
    prefill_s = clock() - start_s
    decode_s: list[float] = []
    if output_len > 1:
        for i, (prompt, token_id) in enumerate(zip(prompts, first, strict=True)):
            core.add(greedy_request(f"decode-{i}", np.append(prompt, np.int32(token_id)), output_len - 1))
        for _ in range(output_len - 1):
            start_s = clock()
            outputs = checked(core.step())
            decode_s.append(clock() - start_s)
            if len(outputs) != num or any(
                len(output.new_token_ids) != 1 or output.cached_tokens != input_len for output in outputs
            ):
                raise BenchmarkError(
                    f"a batch of {num} x {input_len} tokens did not stay together: the KV cache is too small for it"
                )
    return BatchTiming(
        batch_size=num, input_len=input_len, output_len=output_len, prefill_s=prefill_s, decode_s=decode_s
    )


def _first_tokens(core: EngineCore, prompts: Sequence[Ids]) -> list[int]:
    for i, prompt in enumerate(prompts):
        core.add(greedy_request(f"prefill-{i}", prompt, 1))
    first: dict[str, int] = {}
    while core.has_work:
        for output in checked(core.step()):
            if output.new_token_ids:
                first[output.rid] = output.new_token_ids[0]
    return [first[f"prefill-{i}"] for i in range(len(prompts))]


def greedy_request(rid: str, prompt: Ids, num_tokens: int) -> Request:
    """A request for exactly `num_tokens` tokens, the likeliest each."""
    sampling = SamplingParams(max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return Request(rid=rid, prompt_ids=prompt, sampling=sampling)


def checked(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """`outputs`, unless one of them says that its request failed: then BenchmarkError is raised."""
    for output in outputs:
        if output.finish is not None and output.finish.type in ("error", "abort"):
            raise BenchmarkError(f"the engine ended a request with {output.finish.type}: {output.finish.message}")
    return outputs
