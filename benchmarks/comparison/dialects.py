"""How each server is asked for a greedy answer of exact length to token ids, and where its stream says the ids.

Owns paths, bodies and the reading of one event. Never opens a connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from comparison.child import EngineError


class Dialect(Protocol):
    """path: of the streaming route. health: of a route that answers 200 when the server is ready."""

    path: str
    health: str

    def body(self, prompt: Sequence[int], output_len: int) -> dict[str, Any]: ...

    def new_ids(self, event: dict[str, Any], known: int) -> list[int]:
        """The ids that `event` adds to the `known` ones before it. Raises EngineError when it tells of a failure."""
        ...


class Native:
    """Mooli's /generate (SGLang's native route): each event repeats all ids."""

    path, health = "/generate", "/health"

    def body(self, prompt: Sequence[int], output_len: int) -> dict[str, Any]:
        sampling = {"temperature": 0.0, "max_new_tokens": output_len, "ignore_eos": True}
        return {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}

    def new_ids(self, event: dict[str, Any], known: int) -> list[int]:
        _refuse_error(event)
        return list(event.get("output_ids", []))[known:]


class LlamaCpp:
    """llama.cpp's /completion with `return_tokens`: each event has its own ids.

    A token whose text ends inside a character has no event. The last event counts it, and another id stands in its
    place at the end, which costs a following turn what the server could have reused from there on.
    """

    path, health = "/completion", "/health"

    def body(self, prompt: Sequence[int], output_len: int) -> dict[str, Any]:
        return {
            "prompt": list(prompt),
            "n_predict": output_len,
            "ignore_eos": True,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "cache_prompt": True,
            "return_tokens": True,
            "stream": True,
        }

    def new_ids(self, event: dict[str, Any], known: int) -> list[int]:
        _refuse_error(event)
        ids = list(event.get("tokens", []))
        lacking = event.get("tokens_predicted", 0) - known - len(ids) if event.get("stop") else 0
        return ids + [0] * lacking


class Vllm:
    """vLLM's /v1/completions with `return_token_ids`: each event has its own ids. model: as the server names it."""

    path, health = "/v1/completions", "/health"

    def __init__(self, model: str) -> None:
        self._model = model

    def body(self, prompt: Sequence[int], output_len: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": output_len,
            "ignore_eos": True,
            "temperature": 0.0,
            "return_token_ids": True,
            "stream": True,
        }

    def new_ids(self, event: dict[str, Any], known: int) -> list[int]:
        _refuse_error(event)
        return [token for choice in event.get("choices", []) for token in choice.get("token_ids") or []]


def _refuse_error(event: dict[str, Any]) -> None:
    if event.get("error"):
        raise EngineError(f"answered with an error: {str(event['error'])[:200]}")
