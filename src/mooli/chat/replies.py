"""Who answers in a conversation: an engine in this process, or a server over HTTP.

Owns what both have in common, `Replier`, and how each says what it has: pieces of reasoning and of text as they come,
and the figures. Never prints, and never keeps a conversation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, cast

from mooli.answers import Figures
from mooli.errors import EngineError, RequestError, RequestFailedError
from mooli.frontend.call import Stream
from mooli.frontend.chat_encoding import encode_chat
from mooli.frontend.engine import Engine
from mooli.lang.endpoint import HttpChunks, RuntimeEndpoint

Messages = Sequence[Mapping[str, Any]]


class Piece(NamedTuple):
    """What is new of an answer."""

    kind: Literal["reasoning", "text"]
    text: str


@dataclass(slots=True)
class Reply:
    """One answer, as it grows. Whoever reads it asks for `Replier.pieces`."""

    text: str = ""
    reasoning: str = ""
    figures: Figures = field(default_factory=Figures)

    def grow_to(self, kind: Literal["reasoning", "text"], whole: str) -> Iterator[Piece]:
        """The answer's text, or its reasoning, is `whole` by now: what is new."""
        before = self.text if kind == "text" else self.reasoning
        if len(whole) > len(before) and whole.startswith(before):
            if kind == "text":
                self.text = whole
            else:
                self.reasoning = whole
            yield Piece(kind, whole[len(before) :])


class Replier(Protocol):
    """Who answers."""

    model: str
    context_length: int | None
    """In tokens, of prompt and answer; None where it is not known."""

    def num_tokens(self, messages: Messages) -> int | None:
        """Of the prompt that `messages` make; None where that cannot be told.

        Raises RequestError or ChatTemplateError where they make none."""
        ...

    def pieces(self, messages: Messages, params: Mapping[str, Any], reply: Reply) -> Iterator[Piece]:
        """The answer to `messages`, as it comes; `reply` has all of it at any time. Closing the iterator ends it.

        params: sampling parameters by their native names. Raises RequestError for what is wrong in the request,
        RequestFailedError where it is not answered to the end.
        """
        ...

    def close(self) -> None: ...


class EngineReplier:
    """An engine in this process, which is this object's from now on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.model = engine.server_args.model_path
        self.context_length: int | None = engine.get_server_info()["context_length"]

    def num_tokens(self, messages: Messages) -> int | None:
        return len(encode_chat(self._engine.tokenizer_manager.tokenizer, messages))

    def pieces(self, messages: Messages, params: Mapping[str, Any], reply: Reply) -> Iterator[Piece]:
        began = time.perf_counter()
        chunks = cast(Stream, self._engine.chat([dict(message) for message in messages], params, stream=True))
        try:
            for chunk in chunks:
                meta, message = chunk["meta_info"], chunk["message"]
                yield from reply.grow_to("reasoning", message.get("reasoning_content") or "")
                yield from reply.grow_to("text", message["content"] or "")
                elapsed_s = time.perf_counter() - began
                reply.figures.saw(meta["prompt_tokens"], meta["cached_tokens"], meta["completion_tokens"], elapsed_s)
                finish = meta["finish_reason"]
                if finish is not None:
                    reply.figures.finish = finish["type"]
                    if finish["type"] == "error":
                        raise RequestFailedError(finish["message"])
        finally:
            chunks.close()

    def close(self) -> None:
        self._engine.shutdown()


_OPENAI_NAMES = {"max_new_tokens": "max_tokens"}
"""Sampling parameters that OpenAI's route calls otherwise."""


class ServerReplier:
    """A server that speaks OpenAI's API: a Mooli, or another."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        """model: one that the server lists; None takes the first. Raises ConfigError for a URL that is none,
        EngineError where no such server answers, RequestError where it has no such model."""
        self._endpoint = RuntimeEndpoint(url, api_key)
        entry = served_model(self._endpoint, model)
        self.model = str(entry["id"])
        length = entry.get("max_model_len")
        self.context_length = length if isinstance(length, int) else None

    def num_tokens(self, messages: Messages) -> int | None:
        try:
            count = self._endpoint.post("/tokenize", {"model": self.model, "messages": list(messages)}).get("count")
        except (RequestError, EngineError):  # a server of another kind; if something is wrong, the answer tells
            return None
        return count if isinstance(count, int) else None

    def pieces(self, messages: Messages, params: Mapping[str, Any], reply: Reply) -> Iterator[Piece]:
        began = time.perf_counter()
        body = {
            "model": self.model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **{_OPENAI_NAMES.get(name, name): value for name, value in params.items()},
        }
        chunks = self._endpoint.stream("/v1/chat/completions", body)
        try:
            yield from self._read(chunks, began, reply)
        finally:
            chunks.close()

    def _read(self, chunks: HttpChunks, began: float, reply: Reply) -> Iterator[Piece]:
        for chunk in chunks:
            if "error" in chunk:
                error = chunk["error"]
                raise RequestFailedError(str(error.get("message", error) if isinstance(error, dict) else error))
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or {}
                yield from reply.grow_to("reasoning", reply.reasoning + (delta.get("reasoning_content") or ""))
                yield from reply.grow_to("text", reply.text + (delta.get("content") or ""))
                reply.figures.finish = choice.get("finish_reason") or reply.figures.finish
            usage = chunk.get("usage")
            if usage:
                details = usage.get("prompt_tokens_details") or {}
                cached = details.get("cached_tokens") or 0
                elapsed_s = time.perf_counter() - began
                if usage.get("completion_tokens") or reply.figures.first_token_s is not None:
                    reply.figures.saw(usage["prompt_tokens"], cached, usage["completion_tokens"], elapsed_s)

    def close(self) -> None:
        pass


def served_model(endpoint: RuntimeEndpoint, model: str | None) -> dict[str, Any]:
    """The entry of /v1/models for `model`, or of the first. Raises EngineError where the server has none, or not it."""
    try:
        answer = endpoint.get("/v1/models")
    except json.JSONDecodeError:
        answer = {}
    entries = [entry for entry in _items(answer) if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    for entry in entries:
        if model in (None, entry["id"]):
            return entry
    names = ", ".join(entry["id"] for entry in entries) or "no model"
    raise EngineError(f"{endpoint.base_url} does not serve {model}: it has {names}")


def _items(answer: Any) -> list[Any]:
    """Of a list as OpenAI's API gives them; [] for anything else."""
    items = answer.get("data") if isinstance(answer, dict) else None
    return items if isinstance(items, list) else []
