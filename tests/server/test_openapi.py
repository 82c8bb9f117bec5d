"""GET /openapi.json."""

from __future__ import annotations

import re

import pytest

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
        if route.body is None:
            assert "requestBody" not in operation
        else:
            reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            assert reference.removeprefix("#/components/schemas/") in schemas


def test_values_in_paths_are_parameters(paths):
    assert paths["/v1/models/{model_id}"]["get"]["parameters"][0]["name"] == "model_id"
