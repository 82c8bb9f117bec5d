"""How `select` compares its options, by the log-probabilities of their tokens.

Owns the three methods of SGLang, pure functions. Which tokens there are is the state's, what they weigh the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

OptionLogprobs = Sequence[Sequence[float]]
"""For each option, the log-probability of each of its tokens behind the text."""

ChoicesMethod = Callable[[OptionLogprobs, "OptionLogprobs | None"], list[float]]
"""Scores, the largest of which wins, of options behind the text, and of the same tokens without it where
`needs_unconditional` says so."""


def token_length_normalized(given: OptionLogprobs, alone: OptionLogprobs | None = None) -> list[float]:
    """The mean over an option's tokens, so that a long option is not worse for its length."""
    return [_mean(logprobs) for logprobs in given]


def greedy_token_selection(given: OptionLogprobs, alone: OptionLogprobs | None = None) -> list[float]:
    """Token by token, those that are the most likely stay, as in greedy decoding; an option that has ended goes on with
    its mean. The score is how many tokens it stayed, and 1 more for the one that is left."""
    length = max(map(len, given))
    rows = [[*logprobs, *[_mean(logprobs)] * (length - len(logprobs))] for logprobs in given]
    left, stayed = list(range(len(rows))), [0.0] * len(rows)
    for position in range(length):
        best = max(rows[i][position] for i in left)
        left = [i for i in left if rows[i][position] == best]
        for i in left:
            stayed[i] = position + 1.0
        if len(left) == 1:
            break
    stayed[left[0]] += 1.0
    return stayed


def unconditional_likelihood_normalized(given: OptionLogprobs, alone: OptionLogprobs | None = None) -> list[float]:
    """The mean of what the text adds to each token's log-probability, so that an option that is likely anywhere is not
    better for it."""
    if alone is None:
        raise ValueError("unconditional_likelihood_normalized needs the options' log-probabilities without the text")
    return [_mean([a - b for a, b in zip(*pair, strict=True)]) for pair in zip(given, alone, strict=True)]


def needs_unconditional(method: ChoicesMethod) -> bool:
    """Whether a method compares with the options alone."""
    return method is unconditional_likelihood_normalized


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
