"""OpenAI's `response_format` as a sampling parameter.

Owns its types and where each has its schema. Never checks a schema: `mooli.grammar` does.

Source: OpenAI API reference, chat; SGLang's `structural_tag`; llama.cpp's place of the schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mooli.errors import RequestError


def response_format_params(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The sampling parameter by which an answer is held to it; {} for text. A schema is always enforced, whatever
    `strict` says; llama.cpp has it one level up. Raises RequestError."""
    if not given:
        return {}
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": given.get("schema") or {"type": "object"}}
    if kind == "json_schema":
        inner = given.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        schema = given.get("schema") if schema is None else schema
        if schema is None:
            raise RequestError("response_format.json_schema.schema is missing", argument="response_format")
        # `{}` and `true` allow any JSON, and are no absence of a schema.
        return {"json_schema": json.dumps(schema) if isinstance(schema, (dict, bool)) else schema}
    if kind == "structural_tag":
        return {"structural_tag": {name: value for name, value in given.items() if name != "type"}}
    raise RequestError(
        f"response_format.type={str(kind)[:80]!r} is not one of text, json_object, json_schema, structural_tag",
        argument="response_format",
    )
