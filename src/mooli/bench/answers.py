"""Reading answers: what each piece of a stream says, and the times that follow from when it came.

Owns the rules of time to first token, gaps and latency, one reader to an API. Never touches the network or a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mooli.bench.backends import Api
from mooli.bench.records import RequestRecord


class AnswerError(Exception):
    """The server ended the answer with an error; the message is its own."""


class Answer:
    """Fills a record piece by piece. `record.start_s` must be set.

    A piece is a parsed event of a stream, or the whole body of an answer that is not streamed.
    """

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.is_finished = False
        self._last_token_s: float | None = None
        self._num_pieces = 0

    def piece(self, data: Any, at_s: float) -> None:
        """Take one piece that came at `at_s`. Raises AnswerError if it is an error."""
        if not isinstance(data, Mapping):
            raise AnswerError(f"the server sent {str(data)[:200]!r} where an object belongs")
        if data.get("error") or data.get("object") == "error":
            raise AnswerError(error_message(data))
        self._num_pieces += 1
        self.record.latency_s = at_s - self.record.start_s
        self._read(data, at_s)

    def done(self, at_s: float) -> None:
        """The mark that ends a stream came at `at_s`."""
        self.is_finished = True
        self.record.latency_s = at_s - self.record.start_s

    def close(self) -> None:
        """Nothing more comes. Raises AnswerError unless the answer came whole."""
        if not self._num_pieces:
            raise AnswerError("the server sent an empty answer")
        if not self.is_finished:
            raise AnswerError(f"the answer broke off after {self._num_pieces} pieces")
        record = self.record
        if self._last_token_s is None:
            # Nothing but tokens without a text came: the earliest that anybody could see is the end.
            record.ttft_s = record.latency_s
        record.success = True

    def _read(self, data: Mapping[str, Any], at_s: float) -> None:
        raise NotImplementedError

    def _first_token(self, at_s: float) -> None:
        self.record.ttft_s = at_s - self.record.start_s
        self._last_token_s = at_s

    def _finish(self, reason: Any) -> None:
        kind = reason.get("type") if isinstance(reason, Mapping) else reason
        if kind in ("abort", "error"):
            said = reason.get("message") if isinstance(reason, Mapping) else None
            raise AnswerError(f"the server ended the request with {kind}" + (f": {said}" if said else ""))
        if kind is not None:
            self.is_finished = True


class NativeAnswer(Answer):
    """`/generate`: every piece holds the whole text so far and how many tokens that is."""

    def __init__(self, record: RequestRecord) -> None:
        super().__init__(record)
        self._num_tokens = 0

    def _read(self, data: Mapping[str, Any], at_s: float) -> None:
        record = self.record
        meta = _mapping(data.get("meta_info"))
        text = data.get("text")
        if isinstance(text, str) and text:
            record.generated_text = text
        count = meta.get("completion_tokens")
        if isinstance(count, int):
            record.output_len, record.is_output_len_reported = count, True
        # A server without a tokenizer sends ids and no text at all.
        if text or (text is None and data.get("output_ids")):
            num_tokens = count if isinstance(count, int) else self._num_tokens + 1
            self._tokens(num_tokens, at_s)
        if isinstance(meta.get("prompt_tokens"), int):
            record.server_prompt_tokens = meta["prompt_tokens"]
        if isinstance(meta.get("cached_tokens"), int):
            record.cached_tokens = meta["cached_tokens"]
        if isinstance(meta.get("cached_tokens_details"), Mapping):
            record.cached_tokens_details = dict(meta["cached_tokens_details"])
        self._finish(meta.get("finish_reason"))

    def _tokens(self, num_tokens: int, at_s: float) -> None:
        new = num_tokens - self._num_tokens
        if self._last_token_s is None:
            self._first_token(at_s)
        elif new > 0:
            self.record.itl_s += [(at_s - self._last_token_s) / new] * new
            self._last_token_s = at_s
        self._num_tokens = max(num_tokens, self._num_tokens)


class OpenAIAnswer(Answer):
    """Completions and chats: every piece holds new text; token counts come once, at the end."""

    def _read(self, data: Mapping[str, Any], at_s: float) -> None:
        record = self.record
        choices = data.get("choices")
        choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
        text = _choice_text(choice)
        if text:
            if self._last_token_s is None:
                self._first_token(at_s)
            else:
                record.itl_s.append(at_s - self._last_token_s)
                record.chunk_texts.append(text)
                self._last_token_s = at_s
            record.generated_text += text
        self._usage(_mapping(data.get("usage")))
        details = _mapping(data.get("sglext")).get("cached_tokens_details")
        if isinstance(details, Mapping):
            record.cached_tokens_details = dict(details)
        self._finish(choice.get("finish_reason"))

    def _usage(self, usage: Mapping[str, Any]) -> None:
        record = self.record
        if isinstance(usage.get("completion_tokens"), int):
            record.output_len, record.is_output_len_reported = usage["completion_tokens"], True
        if isinstance(usage.get("prompt_tokens"), int):
            record.server_prompt_tokens = usage["prompt_tokens"]
        cached = _mapping(usage.get("prompt_tokens_details")).get("cached_tokens")
        if isinstance(cached, int):
            record.cached_tokens = cached


def answer_reader(api: Api, record: RequestRecord) -> Answer:
    """A reader of that API's answers into `record`."""
    return NativeAnswer(record) if api is Api.NATIVE else OpenAIAnswer(record)


def error_message(data: Any) -> str:
    """The words of an error body, whichever of the usual shapes it has."""
    if isinstance(data, Mapping):
        for key in ("error", "message", "detail"):
            if data.get(key):
                return error_message(data[key])
    return " ".join(str(data).split())[:500]


def _choice_text(choice: Mapping[str, Any]) -> str:
    """All that a choice adds for a reader: text, reasoning, the arguments of tool calls."""
    if "text" in choice:
        return choice["text"] or ""
    message = _mapping(choice.get("delta") or choice.get("message"))
    # Some servers send the reasoning under both names.
    parts = [message.get("reasoning_content") or message.get("reasoning"), message.get("content")]
    for call in message.get("tool_calls") or ():
        function = _mapping(_mapping(call).get("function"))
        parts += [function.get("name"), function.get("arguments")]
    return "".join(part for part in parts if isinstance(part, str))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
