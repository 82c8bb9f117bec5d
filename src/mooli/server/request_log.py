"""One line in the log for each request that begins and each that ends, as far as the operator wants to know.

Owns what `--log-requests-level` shows and how `--log-requests-format` writes it. Never sees keys or headers, and never
writes a text other than quoted: nobody can forge a log line with a prompt.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any, TypeVar

from mooli.frontend.generation import Generation
from mooli.frontend.tokenizer import Tokenizer
from mooli.server.config import ServerConfig

logger = logging.getLogger(__name__)

SHOWN_CHARS = 2048
"""Of a prompt and of an answer at level 2."""

PARAMETERS, CUT_TEXTS, WHOLE_TEXTS = 1, 2, 3
"""The levels from which on there are sampling parameters, the heads of texts, and whole texts."""

Shown = TypeVar("Shown", str, "list[int]")


class RequestLog:
    """See the module docstring. Without a tokenizer, prompts are shown as token ids."""

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer | None = None) -> None:
        self._level = config.log_requests_level
        self._is_json = config.log_requests_format == "json"
        self._tokenizer = tokenizer

    def started(self, generation: Generation) -> None:
        """A request is on its way to the engine."""
        fields: dict[str, Any] = {"rid": generation.rid, "prompt_tokens": generation.prompt_tokens}
        if generation.request.client:
            fields["client"] = generation.request.client
        if self._level >= PARAMETERS:
            fields["sampling_params"] = _plain(asdict(generation.request.sampling))
        if self._level >= CUT_TEXTS:
            fields["prompt"] = self._prompt(generation)
        self._write("received", fields)

    def finished(self, generation: Generation, latency_s: float) -> None:
        """It has ended. finish None: its client left, or the engine has died."""
        fields: dict[str, Any] = {
            "rid": generation.rid,
            "prompt_tokens": generation.prompt_tokens,
            "cached_tokens": generation.cached_tokens,
            "completion_tokens": len(generation.output_ids),
            "finish": None if generation.finish is None else generation.finish.to_dict(),
            "latency_s": round(latency_s, 6),
        }
        if self._level >= CUT_TEXTS:
            is_text = self._tokenizer is not None
            fields["output"] = self._cut(generation.text) if is_text else self._cut(generation.output_ids)
        self._write("finished", fields)

    def _prompt(self, generation: Generation) -> str | list[int]:
        ids = generation.request.prompt_ids
        if self._level < WHOLE_TEXTS:
            ids = ids[:SHOWN_CHARS]  # no text that is shown has more tokens than characters
        shown: list[int] = ids.tolist()
        if self._tokenizer is None:
            return shown
        return self._cut(self._tokenizer.decode(shown, skip_special_tokens=False))

    def _cut(self, text: Shown) -> Shown:
        return text if self._level >= WHOLE_TEXTS else text[:SHOWN_CHARS]

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        if self._is_json:
            logger.info("%s", json.dumps({"event": event, **fields}))
        else:
            words = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())
            logger.info("request %s: %s", event, words)


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in parameters.items()}
