"""transformers' `generate` in bfloat16 on a folder of weights, in process: static batches of equal lengths.

It has no queue: turns of all conversations go in step, and a turn computes its whole prompt.

    python transformers_worker.py FOLDER NUM_THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from protocol import Ledger, serve


class FirstToken(transformers.StoppingCriteria):
    """Stops nothing: notes when it was first asked, which is after the first token."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.at_s = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.at_s = self.at_s or self._clock()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load() -> tuple[dict[str, Any], Callable[[Ledger], None]]:
    torch.set_num_threads(int(sys.argv[2]))
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    model.eval()

    def answer(ledger: Ledger, batch: list[int]) -> list[int]:
        """Run the next turn of all of `batch`; those that go on."""
        prompts = torch.tensor([ledger.prompt(conversation) for conversation in batch])
        sent_s = ledger.now()
        first = FirstToken(ledger.now)
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=ledger.output_len,
                min_new_tokens=ledger.output_len,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([first]),
            )
        end_s = ledger.now()
        ids = out[:, prompts.shape[1] :].tolist()
        return [
            conversation
            for conversation, row in zip(batch, ids, strict=True)
            if ledger.answered(conversation, row, sent_s, first.at_s, end_s)
        ]

    def run(ledger: Ledger) -> None:
        while True:
            batch = []
            while len(batch) < ledger.at_once and (fresh := ledger.begin()) is not None:
                batch.append(fresh)
            if not batch:
                return
            while batch:
                batch = answer(ledger, batch)

    return {"version": transformers.__version__, "torch": torch.__version__}, run


if __name__ == "__main__":
    serve(load)
