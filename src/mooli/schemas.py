"""What a JSON schema allows, as far as the type of a value: its alternatives, its types, what its references name.

Never checks a value, and never compiles a grammar.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

ANY_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})
STRING = frozenset({"string"})

_LOOSE_TYPES = {
    "str": "string", "text": "string", "varchar": "string", "char": "string", "enum": "string", "int": "integer",
    "long": "integer", "float": "number", "double": "number", "num": "number", "bool": "boolean", "dict": "object",
    "map": "object", "list": "array", "arr": "array", "tuple": "array", "none": "null",
}  # fmt: skip
"""Names of types that are none of JSON schema's, and are sent all the same."""

_MAX_REFS = 200

_KEYS_OF = {
    "string": {"pattern", "minLength", "maxLength", "format"},
    "integer number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "array": {"items", "prefixItems", "contains", "minItems", "maxItems", "uniqueItems"},
    "object": {"properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"},
}
"""Keywords that say nothing of values of other types."""


# -- what a schema allows ----------------------------------------------------------------------------------------------
def branches(
    schema: Any, root: Mapping[str, Any], depth: int = 0, seen: set[tuple[str, ...]] | None = None
) -> Iterator[dict[str, Any]]:
    """The alternatives of a schema, each with at most one type. A reference, a union, a list of types and `nullable`
    are taken apart; what stands beside them is in each alternative. What a reference names is an alternative once.

    root: the schema that references of `schema` are in. depth, seen: of its own recursion.
    """
    seen = set() if seen is None else seen
    if schema is True or schema is None:
        schema = {}
    if not isinstance(schema, Mapping) or depth > _MAX_REFS:
        return
    rest = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf", "oneOf", "nullable")}
    if schema.get("nullable") is True:
        yield {"type": "null", "nullable": True}
    if "$ref" in schema:
        target = target_of(schema["$ref"], root)
        if target is None:
            yield {"$ref": schema["$ref"]}
            return
        known = (schema["$ref"], *sorted(rest))
        if known not in seen:  # else unions of references to unions would be as many as their products
            seen.add(known)
            yield from branches({**target, **rest} if isinstance(target, Mapping) else target, root, depth + 1, seen)
        return
    for union in ("anyOf", "oneOf"):
        if isinstance(schema.get(union), list):
            for item in schema[union]:
                yield from branches({**rest, **item} if isinstance(item, Mapping) else item, root, depth + 1, seen)
            return
    if isinstance(rest.get("allOf"), list) and len(rest["allOf"]) == 1 and isinstance(rest["allOf"][0], Mapping):
        (item,) = rest.pop("allOf")
        yield from branches({**item, **rest}, root, depth + 1, seen)
        return
    kinds = rest.get("type")
    if isinstance(kinds, list):
        for kind in kinds:
            others = {key for name, keys in _KEYS_OF.items() if kind not in name.split() for key in keys}
            yield {key: value for key, value in {**rest, "type": kind}.items() if key not in others}
    elif kinds is None and ("enum" in rest or "const" in rest):
        values = [rest["const"]] if "const" in rest else rest["enum"]
        for kind in dict.fromkeys(map(_type_of, values)):
            yield {**rest, "type": kind}
    elif kinds is None and (left := _types_of_all(rest.get("allOf"), root, depth)) != ANY_TYPES:
        for kind in sorted(left):
            yield {**rest, "type": kind}
    else:
        yield rest


def _types_of_all(items: Any, root: Mapping[str, Any], depth: int) -> frozenset[str]:
    """What is left where a value must be of every one of these schemas."""
    left = ANY_TYPES
    for item in items if isinstance(items, list) else ():
        kinds = {branch.get("type") for branch in branches(item, root, depth + 1)}
        left &= ANY_TYPES if None in kinds else frozenset(map(type_named, kinds))
    return left


def target_of(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a local reference names in `root`; None for one that names nothing there."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    node: Any = root
    for step in reference[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and step.isdigit() and int(step) < len(node):
            node = node[int(step)]
        elif isinstance(node, Mapping) and step in node:
            node = node[step]
        else:
            return None
    return node


def types_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The types that a value may have; all, where the schema says none."""
    found: set[str] = set()
    for branch in branches(schema, root):
        kind = branch.get("type")
        if kind is None:
            return ANY_TYPES
        found.add(type_named(kind))
    return frozenset(found) or ANY_TYPES


def type_named(name: Any) -> str:
    if name in ANY_TYPES:
        return str(name)
    word = re.match(r"[a-z]*", str(name).lower())
    text = word[0] if word else ""
    return next((kind for loose, kind in _LOOSE_TYPES.items() if text.startswith(loose)), "string")


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def schema_of(parameters: Mapping[str, Any] | None, name: str) -> Any:
    """The schema of one parameter of a function; None where it says nothing of it."""
    if not parameters:
        return None
    properties = parameters.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    more = parameters.get("additionalProperties")
    return more if isinstance(more, Mapping) else None
