"""JSON schemas drawn from a seed, for what must hold of any schema, and grammars that are made to cost much.

Owns what is drawn: objects in objects, references (also to themselves), enums, bounds, patterns, formats and unions;
and schemas with a keyword that cannot be enforced. Depends on nothing but the random numbers given.
"""

from __future__ import annotations

import json
import random
from typing import Any

Schema = dict[str, Any]

NAMES = ("name", "unit", "first_name", "created_at", "max-results", "tags", "größe", "is_open", "a", "n", "$id_", "x y")
WORDS = ("celsius", "fahrenheit", "low", "high", "été", 'a"b', "x\\y", "<tool_call>", "", "null", "北京")
PATTERNS = ("^[a-c]{2,4}$", "^x[0-9]y$", "^(on|off)$", "^[A-Z]{3}-[0-9]{2}$", "[0-9]", '^[^"\\\\]{1,6}$')
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
REFUSED: tuple[tuple[str, Schema], ...] = (
    ("not", {"not": {"type": "null"}}),
    ("uniqueItems", {"type": "array", "uniqueItems": True, "maxItems": 2}),
    ("if", {"if": {"type": "null"}, "then": True}),
    ("contains", {"type": "array", "contains": {"type": "null"}, "maxItems": 2}),
    ("propertyNames", {"type": "object", "propertyNames": {"maxLength": 2}}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("spam", {"type": "string", "format": "spam"}),
    ("look-around", {"type": "string", "pattern": "(?=a)b"}),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
)
"""Schemas that cannot be kept to, with a word that a refusal has to say."""


class Writer:
    """Draws one schema. definitions: those that it refers to so far."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.definitions: dict[str, Schema] = {}

    def schema(self, depth: int = 0) -> Schema:
        kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format", "multiple"]
        if depth < 3:
            kinds += [
                "object",
                "object",
                "object",
                "array",
                "tuple",
                "any_of",
                "one_of",
                "types",
                "ref",
                "all_of",
                "map",
            ]
        made: Schema = getattr(self, "_" + self.rng.choice(kinds))(depth)
        if self.rng.random() < 0.1:
            made = {**made, "description": "as the user says", "title": "x"}
        return made

    def _string(self, depth: int) -> Schema:
        least = self.rng.randrange(3)
        return {"type": "string", "minLength": least, "maxLength": least + self.rng.randrange(1, 8)}

    def _integer(self, depth: int) -> Schema:
        low = self.rng.randrange(-500, 500)
        return {"type": "integer", self.rng.choice(["minimum", "exclusiveMinimum"]): low, "maximum": low + 60}

    def _number(self, depth: int) -> Schema:
        return {"type": "number", "minimum": self.rng.choice([0, -1.5, 100]), "exclusiveMaximum": 1000.25}

    def _boolean(self, depth: int) -> Schema:
        return {"type": "boolean"}

    def _null(self, depth: int) -> Schema:
        return {"type": "null"}

    def _enum(self, depth: int) -> Schema:
        if self.rng.random() < 0.5:
            return {"type": "string", "enum": self.rng.sample(WORDS, 3)}
        return {"enum": self.rng.sample(["é", 1, None, [1], True, {"k": 2.5}, -7], 3)}

    def _const(self, depth: int) -> Schema:
        return {"const": self.rng.choice(["x", 0, {"k": [None]}, "a long text that is always the same"])}

    def _pattern(self, depth: int) -> Schema:
        return {"type": "string", "pattern": self.rng.choice(PATTERNS), "maxLength": 8}

    def _format(self, depth: int) -> Schema:
        return {"type": "string", "format": self.rng.choice(FORMATS)}

    def _multiple(self, depth: int) -> Schema:
        return {"type": "integer", "multipleOf": self.rng.choice([2, 5, 10]), "minimum": 0, "maximum": 100}

    def _object(self, depth: int) -> Schema:
        names = self.rng.sample(NAMES, self.rng.randrange(1, 5))
        return {
            "type": "object",
            "properties": {name: self.schema(depth + 1) for name in names},
            "required": [name for name in names if self.rng.random() < 0.7],
            "additionalProperties": False,
        }

    def _map(self, depth: int) -> Schema:
        return {
            "type": "object",
            "properties": {"n": self._integer(depth)},
            "additionalProperties": self.schema(depth + 2),
            "required": ["n"],
        }

    def _array(self, depth: int) -> Schema:
        least = self.rng.randrange(2)
        return {"type": "array", "items": self.schema(depth + 1), "minItems": least, "maxItems": least + 2}

    def _tuple(self, depth: int) -> Schema:
        items = [self.schema(depth + 1) for _ in range(self.rng.randrange(1, 4))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.schema(depth + 1) for _ in range(self.rng.randrange(2, 4))]}

    def _one_of(self, depth: int) -> Schema:
        """Told apart by a constant."""
        return {"oneOf": [self._tagged(kind, depth) for kind in self.rng.sample(("circle", "square", "line"), 2)]}

    def _tagged(self, kind: str, depth: int) -> Schema:
        return {
            "type": "object",
            "properties": {"kind": {"const": kind}, "value": self.schema(depth + 1)},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }

    def _types(self, depth: int) -> Schema:
        return {"type": self.rng.sample(["null", "boolean", "integer", "string"], 2), "maximum": 9, "maxLength": 5}

    def _all_of(self, depth: int) -> Schema:
        return {"allOf": [{"type": "integer", "minimum": self.rng.randrange(9)}, {"maximum": 20}]}

    def _ref(self, depth: int) -> Schema:
        if self.definitions and self.rng.random() < 0.5:
            return {"$ref": f"#/$defs/{self.rng.choice(sorted(self.definitions))}"}
        name = f"d{len(self.definitions)}"
        self.definitions[name] = {}
        made = self.schema(depth + 1)
        if self.rng.random() < 0.3:
            made = _tree(name, made)
        elif made == {"$ref": f"#/$defs/{name}"} or "$ref" in made:
            made = {"type": "boolean"}
        self.definitions[name] = made
        return {"$ref": f"#/$defs/{name}"}


def _tree(name: str, value: Schema) -> Schema:
    """A value, and at most two of the same below it."""
    below = {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 2}
    return {
        "type": "object",
        "properties": {"value": value, "below": below},
        "required": ["value"],
        "additionalProperties": False,
    }


def random_schema(rng: random.Random) -> Schema:
    """A schema that has values, and short ones."""
    writer = Writer(rng)
    root = writer._object(0) if rng.random() < 0.7 else writer.schema()
    return {"$defs": writer.definitions, **root} if writer.definitions else root


def refused_schema(rng: random.Random) -> tuple[str, Schema]:
    """A word that its refusal must have, and a schema with something in it that cannot be kept to."""
    word, inner = rng.choice(REFUSED)
    names = rng.sample(NAMES, 2)
    properties = {names[0]: random_schema(random.Random(rng.random())), names[1]: inner}
    properties[names[0]].pop("$defs", None)
    if "$ref" in json.dumps(properties[names[0]]):
        properties[names[0]] = {"type": "null"}
    return word, {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def hostile_grammars() -> dict[str, dict[str, Any]]:
    """By name: sampling parameters with a grammar that is small to send and made to be much work."""
    many = {f"property_{i}": {"type": "string"} for i in range(2000)}
    kinds = [{"type": "object", "properties": {f"k{i}": {"const": i}}, "required": [f"k{i}"]} for i in range(500)]
    below = [{"$ref": f"#/$defs/d{i + 1}"} for i in range(60)]
    levels = {
        f"d{i}": {"anyOf": [{"type": "array", "items": ref}, {"type": "object", "additionalProperties": ref}]}
        for i, ref in enumerate(below)
    }
    deep = {"$defs": {**levels, "d60": {"type": "null"}}, "$ref": "#/$defs/d0"}
    return {
        "repeats of repeats": {"regex": "(a{1000}){1000}"},
        "9,000 words": {"regex": "|".join(f"w{i:05d}" for i in range(9000))},
        "enum of 20,000": {"json_schema": {"enum": [f"value {i}" for i in range(20_000)]}},
        "2,000 properties": {"json_schema": {"type": "object", "properties": many}},
        "union of 500": {"json_schema": {"anyOf": kinds}},
        "60 levels": {"json_schema": deep},
        "one of many ends": {"regex": "(.{0,50}a.{0,50}b){0,20}"},
        "ambiguous": {"ebnf": 'start: s\ns: s s | "a" | "b" s "b" |'},
    }
