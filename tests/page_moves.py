"""A sequence decoded by hand whose pages are carried off as bytes and brought back elsewhere.

Owns the driver that tests of backends and of the real model share. Never compares anything.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from mooli.backends.base import Backend
from mooli.batch import LogprobRow
from mooli.runner.model_runner import ModelRunner
from steps import Choice, Row, step

Answer = list[tuple[int, LogprobRow | None]]


@dataclass(frozen=True)
class Place:
    """A model on a backend with an allocated pool. max_tokens: of a step."""

    runner: ModelRunner
    backend: Backend
    page_size: int
    num_pages: int
    vocab_size: int
    max_tokens: int

    def decode(self, prompt: list[int], count: int, pages: list[int], moves: random.Random | None = None) -> Answer:
        """`count` sampled tokens with their log-probabilities, of a sequence that lies in `pages`.

        With `moves` it is read out of its pages now and then, others compute in them, and it goes on in other ones.
        """
        tokens, computed, answer = list(prompt), 0, Answer()
        while len(answer) < count:
            if moves is not None and computed and moves.random() < 0.5:
                pages = self._moved(computed, pages, moves)
            taken = tokens[computed : computed + self.max_tokens]
            computed += len(taken)
            is_last = computed == len(tokens)
            choice = Choice(temperature=0.7, seed=3, position=len(tokens), num_top=2)
            row = Row(taken, computed - len(taken), pages, samples=int(is_last))
            batch = step([row], self.page_size, choices=[choice] if is_last else [])
            batch.may_begin_next = is_last
            output = self.runner.execute(batch)
            if is_last:
                tokens.append(int(output.token_ids[0]))
                answer.append((tokens[-1], output.logprobs[0]))
        return answer

    def fill(self, pages: list[int], draw: random.Random) -> None:
        """Another sequence, as long as these pages are."""
        other = [draw.randrange(self.vocab_size) for _ in range(len(pages) * self.page_size)]
        for start in range(0, len(other), self.max_tokens):
            part = other[start : start + self.max_tokens]
            self.runner.execute(step([Row(part, start, pages, samples=0)], self.page_size))

    def _moved(self, num_tokens: int, pages: list[int], draw: random.Random) -> list[int]:
        held = pages[: -(-num_tokens // self.page_size)]
        data = self.backend.read_pages(held, num_tokens)
        free = np.setdiff1d(np.arange(self.num_pages), pages).tolist()
        new = draw.sample(free, len(pages))
        self.fill(new, draw)
        self.fill(pages, draw)
        self.backend.write_pages(new[: len(held)], data.tobytes() if draw.random() < 0.5 else data)
        return new
