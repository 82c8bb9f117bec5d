"""Answers of a backend as they grow, and what of them a choice is made by.

Owns that growing chunks and chunks of what is new become the same. Never waits.
"""

from __future__ import annotations

from typing import Any

from mooli.errors import RequestFailedError

_LISTS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")


class Growing:
    """One answer. A chunk has everything so far, or what is new: then it has fewer ids than it counts tokens."""

    def __init__(self) -> None:
        self.text = ""
        self.output_ids: list[int] = []
        self.meta_info: dict[str, Any] = {}

    def take(self, chunk: dict[str, Any]) -> None:
        """Raises RequestFailedError for a request that has failed or was refused."""
        meta, ids = chunk["meta_info"], chunk.get("output_ids") or []
        finish = meta["finish_reason"]
        if finish is not None and finish["type"] in ("error", "abort"):
            raise RequestFailedError(f"request {meta.get('id')} ended with {finish['type']}: {finish.get('message')}")
        if self.output_ids and len(ids) < meta["completion_tokens"]:
            for name in _LISTS:
                if name in self.meta_info:
                    meta[name] = self.meta_info[name] + meta.get(name, [])
            self.text += chunk["text"]
            self.output_ids = self.output_ids + ids
        else:
            self.text, self.output_ids = chunk["text"], ids
        self.meta_info = {**self.meta_info, **meta}


def option_logprobs(meta_info: dict[str, Any], count: int) -> list[float]:
    """Log-probabilities of the last `count` tokens of a prompt."""
    entries = meta_info["input_token_logprobs"]
    return [float(entry[0]) for entry in entries[len(entries) - count :]]
