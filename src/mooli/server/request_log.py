"""One line in the log for each request that begins and each that ends, as far as the operator wants to know.

Owns what `--log-requests-level` shows and how `--log-requests-format` writes it. Never sees keys or headers, and never
writes a text other than quoted: nobody can forge a log line with a prompt.
"""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from typing import Any, TypeVar

from mooli.frontend.call import Listener
from mooli.frontend.generation import Generation
from mooli.frontend.tokenizer import Tokenizer
from mooli.logs import log_object
from mooli.server.config import ServerConfig
from mooli.server.request_id import REQUEST_ID
from mooli.types import SamplingParams

logger = logging.getLogger(__name__)

SHOWN_CHARS = 2048
"""Of a prompt and of an answer at level 2."""

PARAMETERS, CUT_TEXTS, WHOLE_TEXTS = 1, 2, 3
"""The levels from which on there are sampling parameters, the heads of texts, and whole texts."""

_DEFAULTS = SamplingParams()

Shown = TypeVar("Shown", str, "list[int]")


class RequestLog(Listener):
    """See the module docstring. Without a tokenizer, prompts are shown as token ids."""

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer | None = None) -> None:
        self._level = config.log_requests_level
        self._is_json = config.log_requests_format == "json"
        self._tokenizer = tokenizer
        self._request_ids: dict[str, str] = {}
        """Of the HTTP requests, by the `rid` of what is open of them: it ends outside of their tasks."""

    def started(self, generation: Generation) -> None:
        rid, request_id = generation.rid, REQUEST_ID.get()
        self._request_ids[rid] = request_id
        said: dict[str, Any] = {"rid": rid, "request_id": request_id, "prompt_tokens": generation.prompt_tokens}
        if generation.request.client:
            said["client"] = generation.request.client
        if self._level >= PARAMETERS:
            said["sampling_params"] = _not_default(generation.request.sampling)
        if self._level >= CUT_TEXTS:
            said["prompt"] = self._prompt(generation)
        self._write("received", said)

    def finished(self, generation: Generation, elapsed_s: float) -> None:
        """Without a reason its client left, or the engine has died."""
        reason = {"type": "abort"} if generation.finish is None else generation.finish.to_dict()
        said: dict[str, Any] = {
            "rid": generation.rid,
            "request_id": self._request_ids.pop(generation.rid, ""),
            "prompt_tokens": generation.prompt_tokens,
            "cached_tokens": generation.cached_tokens,
            "completion_tokens": len(generation.output_ids),
            "finish": reason["type"],
            **{name: reason[name] for name in ("matched", "message") if name in reason},
            "latency_s": round(elapsed_s, 6),
        }
        if self._level >= CUT_TEXTS:
            is_text = self._tokenizer is not None
            said["output"] = self._cut(generation.text) if is_text else self._cut(generation.output_ids)
        self._write("finished", said)

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

    def _write(self, event: str, said: dict[str, Any]) -> None:
        if self._is_json:
            log_object(logger, {"event": event, **said})
        else:
            words = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in said.items())
            logger.info("request %s: %s", event, words)


def _not_default(sampling: SamplingParams) -> dict[str, Any]:
    """What of it differs from a request that says nothing."""
    given = {item.name: getattr(sampling, item.name) for item in fields(sampling)}
    return {name: _plain(value) for name, value in given.items() if value != getattr(_DEFAULTS, name)}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value
