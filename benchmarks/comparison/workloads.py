"""The four workloads that engines are compared on.

Owns their lengths and which tokens are shared. Never talks to an engine.

A workload is a number of conversations. Turn t of a conversation sends all that was said before (the earlier prompts
and the engine's own answers) and then that turn's new tokens: prompts have exact lengths whatever was answered.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FIRST_ID, END_ID = 1_000, 40_000
"""Token ids are drawn from this range, which has ordinary text and no control tokens in the vocabularies compared."""

MIN_OUTPUT_LEN = 2
"""A time per token needs two."""


@dataclass(frozen=True)
class Shape:
    """What a workload is at full scale; lengths in tokens.

    groups: of conversations that begin with the same `shared_len` tokens.
    at_once: how many conversations are in progress together.
    """

    conversations: int
    at_once: int
    new_len: int
    output_len: int
    turns: int = 1
    later_len: int = 0
    groups: int = 0
    shared_len: int = 0


SHAPES = {
    "single": Shape(conversations=3, at_once=1, new_len=512, output_len=64),
    "random": Shape(conversations=16, at_once=16, new_len=512, output_len=64),
    "shared": Shape(conversations=32, at_once=32, new_len=32, output_len=32, groups=2, shared_len=1024),
    "multiturn": Shape(conversations=4, at_once=4, new_len=256, output_len=32, turns=4, later_len=64),
}

WARM_UP = Shape(conversations=1, at_once=1, new_len=32, output_len=4)


@dataclass(frozen=True)
class Workload:
    """conversations[c][t]: the new token ids of turn t."""

    name: str
    conversations: list[list[list[int]]]
    output_len: int
    at_once: int

    def expected(self) -> Iterator[tuple[int, int, int]]:
        """(conversation, turn, prompt length) of every request."""
        for index, turns in enumerate(self.conversations):
            length = 0
            for turn, new_ids in enumerate(turns):
                length += len(new_ids)
                yield index, turn, length
                length += self.output_len

    def total_tokens(self) -> int:
        """Prompt and answer tokens of all requests: what throughput counts, reused or not."""
        return sum(prompt_len + self.output_len for _, _, prompt_len in self.expected())

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(prompt_len for _, _, prompt_len in self.expected()) + self.output_len


def make_workload(name: str, shape: Shape, *, seed: int, scale: float = 1.0) -> Workload:
    """A workload of `shape` with all lengths multiplied by `scale`.

    Two of different seed or name share no beginnings, so that nothing is ever found in a cache by accident.
    """
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])

    def ids(length: int) -> list[int]:
        return [int(value) for value in random.integers(FIRST_ID, END_ID, scaled(length, scale))]

    heads = [ids(shape.shared_len) for _ in range(shape.groups)]
    conversations = []
    for index in range(shape.conversations):
        first = heads[index % shape.groups] if heads else []
        turns = [[*first, *ids(shape.new_len)], *(ids(shape.later_len) for _ in range(1, shape.turns))]
        conversations.append(turns)
    output_len = max(MIN_OUTPUT_LEN, scaled(shape.output_len, scale))
    return Workload(name=name, conversations=conversations, output_len=output_len, at_once=shape.at_once)


def scaled(length: int, scale: float) -> int:
    return max(1, round(length * scale))
