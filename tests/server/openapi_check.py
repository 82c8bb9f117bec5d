"""Whether a real answer fits what GET /openapi.json says of its route."""

from __future__ import annotations

import functools
import re
from typing import Any

import jsonschema

from mooli.server.app import API_ROUTES, document


@functools.cache
def shown() -> dict[str, Any]:
    return document(API_ROUTES)


@functools.cache
def path_of(path: str) -> str | None:
    """The documented path that `path` is of."""
    exact = [route.path for route in API_ROUTES if route.path == path]
    fitting = [route.path for route in API_ROUTES if re.fullmatch(re.sub(r"\{\w+(:path)?\}", ".+", route.path), path)]
    found = exact or sorted(fitting, key=len, reverse=True)
    return re.sub(r"\{(\w+):\w+\}", r"{\1}", found[0]) if found else None


@functools.cache
def validator(method: str, path: str, media_type: str) -> Any:
    """None where the document says nothing of such an answer."""
    documented = path_of(path)
    if documented is None:
        return None
    content = shown()["paths"][documented][method.lower()]["responses"]["200"].get("content", {})
    schema = next((value["schema"] for kind, value in content.items() if kind.split(";")[0] == media_type), None)
    if schema is None:
        return None
    if media_type == "text/event-stream":
        schema = schema["properties"]["data"]["contentSchema"]
    return jsonschema.Draft202012Validator({**schema, "components": shown()["components"]})


def check_answer(method: str, path: str, media_type: str, value: Any) -> None:
    """Raise AssertionError for a 200 that its document does not allow. value: the whole answer, or an event's data."""
    media_type = media_type.split(";")[0]
    method = "GET" if method == "HEAD" else method
    if path_of(path) is None:
        return
    found = validator(method, path, media_type)
    assert found is not None, f"{method} {path}: nothing is said of an answer as {media_type}"
    errors = [f"{error.json_path}: {error.message[:300]}" for error in found.iter_errors(value)]
    assert not errors, f"{method} {path} as {media_type}: {errors[:5]}"
