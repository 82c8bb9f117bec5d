"""What a client is told when something went wrong: status, headers, and body or event in the words of each API.

Owns the way from an exception to an answer, in the names of the route's fields: the engine's side knows those of Python
(`mooli.errors.RequestError`). An exception nobody raised on purpose is never shown to a client: it may
hold paths, prompts of others, or internals. Never logs, never writes to a socket.

Sources: the API references of OpenAI, Anthropic and Ollama, errors; RFC 9110, status codes and Retry-After.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec

from mooli.errors import (
    BusyError,
    ChatTemplateError,
    ContextLengthError,
    EngineClosedError,
    EngineDeadError,
    EngineError,
    KeyBusyError,
    ModelsInUseError,
    MooliError,
    PromptError,
    QueueFullError,
    RequestError,
)
from mooli.server.routing import SSE_DONE, Dialect, HttpError, json_line, sse

RETRY_AFTER_S = 1
"""Of 429 and 503 that say nothing else."""

INTERNAL = "Internal server error. The server's log says what happened."

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""Coding agents look for this code, and for the words beside it, to shorten their history."""

MAX_MESSAGE_CHARS = 2000
"""Messages quote what was sent, which may be long."""

_BUSY: Mapping[type[MooliError], tuple[int, str]] = {
    QueueFullError: (HTTPStatus.SERVICE_UNAVAILABLE, "queue_full"),
    KeyBusyError: (HTTPStatus.TOO_MANY_REQUESTS, "key_busy"),
    ModelsInUseError: (HTTPStatus.SERVICE_UNAVAILABLE, "models_in_use"),
}
"""Status and code."""

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong, in no API's words. param: the field that is wrong. code: a word for programs. headers: that the
    answer must carry."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def problem_of(error: Exception, dialect: Dialect, names: Mapping[str, str]) -> Problem:
    """The problem an exception stands for, in a dialect's words and a route's names. One that is not Mooli's own
    becomes a 500 that tells nothing."""
    if isinstance(error, RequestError) and not isinstance(error, HttpError):
        error = in_names(error, dialect, names)
    if isinstance(error, HttpError):
        status, param, code = error.status_code, error.param, error.code
        wait_s = error.retry_after_s
    elif isinstance(error, BusyError):
        (status, code), param, wait_s = _BUSY[type(error)], None, error.retry_after_s
    else:
        status, param, code, wait_s = _status_of(error), None, None, None
    if wait_s is None and status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        wait_s = RETRY_AFTER_S
    message = str(error) if is_for_client(error) else INTERNAL
    if isinstance(error, ChatTemplateError):
        message, param = _renamed(message, names), names.get("input_ids")
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[:MAX_MESSAGE_CHARS] + "…"
    headers = {} if wait_s is None else {"Retry-After": str(wait_s)}
    if status == HTTPStatus.REQUEST_TIMEOUT:
        headers["Connection"] = "close"  # what comes later would be the rest of the request
    return Problem(status, message, param, code, headers)


def in_names(error: RequestError, dialect: Dialect, names: Mapping[str, str]) -> HttpError:
    """An error of the engine's side for a client who knows arguments by other `names`, without advice that only who
    holds the engine can follow. What is too long for the context is said in words that a dialect's clients look for."""
    prompt = names.get("input_ids", "prompt")
    param = error.argument and names.get(error.argument, error.argument)
    if isinstance(error, PromptError):
        param = param or names.get("input_ids")
    message, code = _renamed(error.message, names), None
    if isinstance(error, ContextLengthError):
        code = CONTEXT_LENGTH_EXCEEDED
        words = _TOO_LONG.get(dialect)
        if error.prompt_tokens is not None and error.context_length is not None and words is not None:
            message = words(error, prompt, error.prompt_tokens, error.context_length)
    return HttpError(error.status_code, message, param=param, code=code)


def _renamed(message: str, names: Mapping[str, str]) -> str:
    # "prompt" is a word of English as well.
    arguments = [name for name in names if name != "prompt"]
    return re.sub(rf"\b({'|'.join(arguments)})\b", lambda match: names[match[0]], message) if arguments else message


def _openai_too_long(error: ContextLengthError, prompt: str, num_tokens: int, context_length: int) -> str:
    about = "at least " if error.is_estimate else ""
    which = "" if error.prompt_index is None else f" This is about prompt {error.prompt_index}."
    opening = f"This model's maximum context length is {context_length} tokens. However, "
    if error.max_new_tokens is None:
        return (
            f"{opening}your {prompt} resulted in {about}{num_tokens} tokens. Please reduce the length of the {prompt}."
            f"{which}"
        )
    return (
        f"{opening}you requested {num_tokens + error.max_new_tokens} tokens ({num_tokens} in the {prompt},"
        f" {error.max_new_tokens} in the completion). Please reduce the length of the {prompt} or completion.{which}"
    )


def _anthropic_too_long(error: ContextLengthError, prompt: str, num_tokens: int, context_length: int) -> str:
    """Word for word: Anthropic's clients read the numbers, ask for less or shorten the conversation, and try again."""
    if error.max_new_tokens is not None:
        sum_of_both = f"{num_tokens} + {error.max_new_tokens} > {context_length}"
        return (
            f"input length and `max_tokens` exceed context limit: {sum_of_both}, decrease input length or `max_tokens`"
            " and try again"
        )
    # At least one token is for the answer.
    return f"prompt is too long: {num_tokens} tokens > {context_length - 1} maximum"


_TOO_LONG = {Dialect.OPENAI: _openai_too_long, Dialect.ANTHROPIC: _anthropic_too_long}
"""Of dialects whose clients look for words of their own."""


def is_for_client(error: Exception) -> bool:
    """Whether the message was written for who sent the request. Others may hold paths or what others sent."""
    return isinstance(error, (RequestError, BusyError, ChatTemplateError, EngineError))


def _status_of(error: Exception) -> int:
    if isinstance(error, RequestError):
        return error.status_code
    if isinstance(error, ChatTemplateError):
        return 400
    if isinstance(error, (EngineDeadError, EngineClosedError)):
        return 503
    return 500


def error_body(dialect: Dialect, problem: Problem) -> dict[str, Any]:
    """The JSON body of an error answer.

    OpenAI's own shape is nested; SGLang's keys are beside it, for clients made for SGLang.
    """
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(problem.status) or (
            "invalid_request_error" if _is_clients(problem) else "api_error"
        )
        return {"type": "error", "error": {"type": kind, "message": problem.message}}
    if dialect is Dialect.OLLAMA:
        return {"error": problem.message}
    if dialect is Dialect.OPENAI:
        return {
            "error": _openai_error(problem),
            "object": "error",
            "message": problem.message,
            "type": _sglang_type(problem.status),
            "param": problem.param,
            "code": problem.status,
        }
    return {"error": _native_error(problem), "message": problem.message}


def error_event(dialect: Dialect, problem: Problem) -> bytes:
    """What ends a stream that has begun: the error, and the end mark of APIs that have one."""
    if dialect is Dialect.ANTHROPIC:
        return sse(error_body(dialect, problem), event="error")
    if dialect is Dialect.OLLAMA:
        return json_line(error_body(dialect, problem))
    error = _openai_error(problem) if dialect is Dialect.OPENAI else _native_error(problem)
    return sse({"error": error}) + SSE_DONE


def json_reply(status: int, content: Any, headers: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two ASGI messages of a whole JSON answer."""
    body = msgspec.json.encode(content)
    return reply_messages(status, body, "application/json", headers)


def reply_messages(
    status: int, body: bytes, media_type: str, headers: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two ASGI messages of a whole answer."""
    pairs = [(b"content-type", media_type.encode("latin-1")), (b"content-length", b"%d" % len(body))]
    pairs += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    start = {"type": "http.response.start", "status": status, "headers": pairs}
    return start, {"type": "http.response.body", "body": body, "more_body": False}


def error_reply(dialect: Dialect, problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two ASGI messages of an error answer."""
    return json_reply(problem.status, error_body(dialect, problem), problem.headers)


def _openai_error(problem: Problem) -> dict[str, Any]:
    kind = "invalid_request_error" if _is_clients(problem) else "server_error"
    if problem.status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    return {"message": problem.message, "type": kind, "param": problem.param, "code": problem.code}


def _native_error(problem: Problem) -> dict[str, Any]:
    return {
        "message": problem.message,
        "type": "invalid_request_error" if _is_clients(problem) else "server_error",
        "param": problem.param,
        "code": problem.status,
        "retryable": problem.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE),
    }


def _sglang_type(status: int) -> str:
    """BadRequestError, InternalServerError, …"""
    try:
        words = HTTPStatus(status).phrase.title()
    except ValueError:
        words = "Bad Request" if status < 500 else "Internal Server"
    name = "".join(letter for letter in words if letter.isalpha())
    return name if name.endswith("Error") else f"{name}Error"


def _is_clients(problem: Problem) -> bool:
    return problem.status < 500
