"""GET /openapi.json."""

from __future__ import annotations

import re

import pytest
from openapi_check import check_answer

from mooli.server.answer_shapes import ANSWERS
from mooli.server.app import API_ROUTES, document
from mooli.server.routing import Access


@pytest.fixture(scope="module")
def paths():
    return document(API_ROUTES)["paths"]


def test_the_document_is_served(live):
    shown = live().http.get("/openapi.json")
    assert shown.status_code == 200
    assert shown.json() == document(API_ROUTES)


def test_every_route_is_in_the_document(paths):
    for route in API_ROUTES:
        operations = paths[re.sub(r":\w+\}", "}", route.path)]
        assert {method.lower() for method in route.methods} <= set(operations)


def test_operations_have_names_of_their_own(paths):
    names = [operation["operationId"] for operations in paths.values() for operation in operations.values()]
    assert len(names) == len(set(names))


def test_only_open_routes_need_no_key(paths):
    for route in API_ROUTES:
        for operation in paths[re.sub(r":\w+\}", "}", route.path)].values():
            assert (operation["security"] == []) == (route.access is Access.OPEN)


def test_bodies_name_a_schema_that_is_there():
    shown = document(API_ROUTES)
    schemas = shown["components"]["schemas"]
    for route in API_ROUTES:
        operation = shown["paths"][re.sub(r":\w+\}", "}", route.path)][route.methods[0].lower()]
        if route.reads_stream is not None:
            assert list(operation["requestBody"]["content"]) == [route.reads_stream]
        elif route.body is None:
            assert "requestBody" not in operation
        else:
            reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            assert reference.removeprefix("#/components/schemas/") in schemas


def test_values_in_paths_are_parameters(paths):
    assert paths["/v1/models/{model_id}"]["get"]["parameters"][0]["name"] == "model_id"


def test_every_route_says_what_it_answers_with(paths):
    refused = {"/api/embed", "/api/embeddings", "/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete"}
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert ("content" in operation["responses"]["200"]) == (path not in refused), f"{method} {path}"


def test_nothing_is_said_of_routes_that_are_not_there():
    assert {name.rpartition(" ")[2] for name in ANSWERS} == {route.path for route in API_ROUTES}


@pytest.mark.parametrize(
    ("method", "path", "media_type", "value"),
    [
        ("POST", "/tokenize", "application/json", {"tokens": [1], "count": "one", "max_model_len": 3}),
        ("POST", "/v1/chat/completions", "text/event-stream", {"object": "chat.completion.chunk"}),
        ("POST", "/v1/chat/completions", "text/event-stream", "[NEARLY DONE]"),
        ("GET", "/v1/cache/events", "text/event-stream", {"type": "missed", "seq": 1}),
        ("GET", "/v1/models/some/model", "application/json", {}),
        ("GET", "/v1/status", "text/html", ""),
    ],
)
def test_an_answer_of_another_shape_does_not_fit(method, path, media_type, value):
    with pytest.raises(AssertionError):
        check_answer(method, path, media_type, value)
    check_answer("POST", "/v1/chat/completions", "text/event-stream", "[DONE]")
