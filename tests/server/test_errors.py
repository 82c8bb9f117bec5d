"""What clients are told when something went wrong, in each API's words."""

from __future__ import annotations

import logging

import pytest
from route_server import message_of, post

from mooli.errors import (
    ChatTemplateError,
    CheckpointError,
    ContextLengthError,
    EngineClosedError,
    EngineDeadError,
    PromptError,
    RequestError,
    RequestFailedError,
)
from mooli.server.routing import Dialect, HttpError, Reply


def raises(error: Exception):
    async def handler(service, request):
        raise error

    return handler


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (HttpError(404, "no such model"), 404),
        (HttpError(503, "full"), 503),
        (PromptError("empty"), 400),
        (ChatTemplateError("bad"), 400),
        (EngineDeadError("died"), 503),
        (EngineClosedError("closed"), 503),
        (RequestFailedError("failed"), 500),
        (ZeroDivisionError("secret"), 500),
        (CheckpointError("secret"), 500),
    ],
)
@pytest.mark.parametrize("dialect", list(Dialect))
def test_an_error_has_its_status(serve, error, status, dialect, caplog):
    caplog.set_level(logging.CRITICAL)
    server = serve(post("/fail", raises(error), dialect=dialect))
    answer = server.http.post("/fail")
    assert answer.status_code == status
    assert ("retry-after" in answer.headers) == (status == 503)
    shown = message_of(answer)
    assert shown == str(error) or (status == 500 and "secret" not in answer.text)


def test_an_openai_error_has_both_shapes(serve):
    error = HttpError(404, "no such model", param="model", code="model_not_found")
    answer = serve(post("/fail", raises(error), dialect=Dialect.OPENAI)).http.post("/fail")
    assert answer.json() == {
        "error": {
            "message": "no such model",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        },
        "object": "error",
        "message": "no such model",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


@pytest.mark.parametrize(("status", "kind"), [(400, "BadRequestError"), (500, "InternalServerError")])
def test_flat_types_are_sglangs(serve, status, kind):
    answer = serve(post("/fail", raises(HttpError(status, "x")), dialect=Dialect.OPENAI)).http.post("/fail")
    assert answer.json()["type"] == kind


def test_a_native_error_has_a_message_in_both_places(serve):
    answer = serve(post("/fail", raises(PromptError("empty")))).http.post("/fail")
    assert answer.json() == {
        "error": {
            "message": "empty",
            "type": "invalid_request_error",
            "param": None,
            "code": 400,
            "retryable": False,
        },
        "message": "empty",
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (415, "invalid_request_error"),
        (429, "rate_limit_error"),
        (503, "overloaded_error"),
        (500, "api_error"),
        (504, "api_error"),
    ],
)
def test_an_anthropic_error_has_the_type_of_its_status(serve, status, kind):
    answer = serve(post("/fail", raises(HttpError(status, "x")), dialect=Dialect.ANTHROPIC)).http.post("/fail")
    assert answer.json() == {"type": "error", "error": {"type": kind, "message": "x"}}


def test_too_long_a_prompt_has_openais_code(serve):
    server = serve(post("/fail", raises(ContextLengthError("too long")), dialect=Dialect.OPENAI))
    assert server.http.post("/fail").json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("dialect", "words"),
    [
        (Dialect.NATIVE, "it is too long"),
        (
            Dialect.OPENAI,
            "This model's maximum context length is 100 tokens. However, your messages resulted in at least 150 tokens."
            " Please reduce the length of the messages. This is about prompt 2.",
        ),
        (Dialect.ANTHROPIC, "prompt is too long: 150 tokens > 99 maximum"),
    ],
)
def test_too_long_a_prompt_is_told_in_the_words_of_each_api(serve, dialect, words):
    error = ContextLengthError(
        "it is too long", advice="Set a flag.", prompt_tokens=150, is_estimate=True, context_length=100, prompt_index=2
    )
    assert str(error) == "it is too long Set a flag."
    server = serve(post("/fail", raises(error), dialect=dialect, names={"input_ids": "messages"}))
    assert server.http.post("/fail").json()["error"]["message"] == words


def test_an_answer_that_is_too_long_is_told_as_anthropics_clients_read_it(serve):
    error = ContextLengthError("x", prompt_tokens=90, context_length=100, max_new_tokens=11)
    server = serve(post("/fail", raises(error), dialect=Dialect.ANTHROPIC))
    assert server.http.post("/fail").json()["error"]["message"] == (
        "input length and `max_tokens` exceed context limit: 90 + 11 > 100, decrease input length or `max_tokens` and"
        " try again"
    )


def test_an_error_has_the_names_of_its_route(serve):
    names = {"max_new_tokens": "max_tokens", "prompt": "text"}
    error = RequestError("max_new_tokens=5 of the prompt", argument="max_new_tokens", advice="Give it to the Engine.")
    shown = serve(post("/fail", raises(error), names=names)).http.post("/fail").json()["error"]
    assert (shown["message"], shown["param"]) == ("max_tokens=5 of the prompt", "max_tokens")
    error = PromptError("the prompt is empty", argument="prompt")
    shown = serve(post("/fail", raises(error), names=names)).http.post("/fail").json()["error"]
    assert (shown["message"], shown["param"]) == ("the prompt is empty", "text")


def test_a_bug_is_logged_and_not_shown(serve, caplog):
    server = serve(post("/fail", raises(ZeroDivisionError("a secret"))))
    answer = server.http.post("/fail")
    assert "secret" not in answer.text and "ZeroDivision" not in answer.text
    assert "a secret" in caplog.text


def test_a_long_message_is_cut(serve):
    assert len(serve(post("/fail", raises(PromptError("x" * 100_000)))).http.post("/fail").json()["message"]) < 3000


def test_an_answer_that_cannot_be_written_is_a_500(serve, caplog):
    async def handler(service, request) -> Reply:
        return Reply({"a": object()})

    caplog.set_level(logging.CRITICAL)
    assert serve(post("/reply", handler)).http.post("/reply").status_code == 500
