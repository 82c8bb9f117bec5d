"""Grammars of values that a model writes as raw text between markers: rules of Lark for each.

Owns what of a schema can be enforced on raw text, and the words of its refusal. A rule allows only what is read back as
a value of the schema: where a string could be read as something else, it may not be that.

Source: llguidance's syntax document.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from mooli.errors import GrammarError
from mooli.lark import json_of, quoted
from mooli.schemas import ANY_TYPES, STRING, branches, target_of, type_named, types_of

_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
_DATE = r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:[zZ]|[-+](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = r"[a-zA-Z0-9](?:[-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[tT]{_TIME}",
    "duration": r"P(?:[0-9]+W|(?:[0-9]+Y)?[0-9]+M(?:[0-9]+D)?|[0-9]+Y|[0-9]+D|(?:[0-9]+D)?T[0-9]+[HMS])",
    "email": rf"[a-zA-Z0-9!#$%&'*+=?^_{{|}}~-]+(?:\.[a-zA-Z0-9!#$%&'*+=?^_{{|}}~-]+)*@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    "uri": r"[a-zA-Z][a-zA-Z0-9+.-]*:[a-zA-Z0-9._~:\/?#\[\]@!$&'()*+,;=%-]+",
}

_ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$id",
    "$schema", "$anchor", "$defs", "definitions", "contentEncoding", "contentMediaType", "x-guidance", "type",
})  # fmt: skip
_STRING_KEYS = _ANNOTATIONS | frozenset({
    "enum", "const", "pattern", "minLength", "maxLength", "format",
})  # fmt: skip
_PLAIN_KEYS = _ANNOTATIONS - {"type"}
_KNOWN_KEYS = frozenset({
    "allOf", "not", "if", "then", "else", "properties", "patternProperties", "additionalProperties", "required",
    "minProperties", "maxProperties", "propertyNames", "dependentRequired", "dependentSchemas", "dependencies",
    "unevaluatedProperties", "items", "prefixItems", "contains", "minItems", "maxItems", "uniqueItems",
    "unevaluatedItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf",
    "oneOf", "$ref",
})  # fmt: skip


def parameters_of(parameters: Mapping[str, Any] | None, where: str) -> list[tuple[str, Any, bool]]:
    """The parameters of a function in the order of its schema: name, schema, and whether it is required. Where the
    schema says nothing of them (`takes_any`) there are none. where: names the function in an error.

    Raises GrammarError for a schema that is no plain object's: each parameter stands for itself in raw formats.
    """
    root = parameters or {}
    found = [*branches(root, root)]
    if len(found) != 1 or type_named(found[0].get("type", "object")) != "object":
        raise GrammarError(f"{where}: its parameters are no object with properties, as this model's calls need it")
    schema = found[0]
    if unknown := unknown_keys(schema, {"properties", "required", "additionalProperties"}):
        raise GrammarError(f"{where}: {unknown} of all parameters cannot be enforced: leave it out")
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    more = schema.get("additionalProperties", True)
    told = [
        (name, item, name in required) for name, item in properties.items() if item is not False or name in required
    ]
    return told + [(name, more, True) for name in required if name not in properties]


def takes_any(schema: Mapping[str, Any] | None) -> bool:
    """Whether its schema lets arguments have any names. One with `properties`, even none, does not: models write no
    others."""
    return (
        schema is not None
        and not set(schema) & {"properties", "$ref", "required"}
        and (schema.get("additionalProperties", True) is not False)
    )


@dataclass
class Rules:
    """Rules of Lark, each under a name of its own, which has `mark` in it."""

    lines: list[str] = field(default_factory=list)
    mark: str = ""

    def add(self, body: str, *, is_terminal: bool = False) -> str:
        """The name of a new rule."""
        name = f"{'V' if is_terminal else 'r'}{self.mark}{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def json(self, schema: Any, root: Mapping[str, Any]) -> str:
        """A rule for JSON of `schema`, whose references are in `root`."""
        return self.add(json_of(with_references(schema, root)))

    def value(
        self,
        schema: Any,
        root: Mapping[str, Any],
        close: str,
        end: str,
        where: str,
        also: frozenset[str] = frozenset(),
    ) -> str:
        """An expression for a raw value and what is behind it, `end` as Lark, in which is the marker `close`: a string
        has that nowhere in itself. where: names the parameter in an error. also: types that the value may have beside
        those of `schema`, written elsewhere: no string is read as one.

        Raises GrammarError for what cannot be enforced, with its place.
        """
        texts, others = self._told_apart(schema, root, close, where)
        kinds = (types_of(schema, root) | also) - STRING
        if not texts:
            return f"{self.json(schema, root)} {end}"
        if texts == [free_text(close)] and all(map(_is_any, others)) and not also:
            return self.add(_lexeme(texts, end), is_terminal=True)
        is_plain = [text == free_text(close) or text.startswith('("') for text in texts]
        texts = [
            text + (_not_read_as(kinds) if plain else _not_begun_as(kinds))
            for text, plain in zip(texts, is_plain, strict=True)
        ]
        words = {"null": '"null"', "boolean": '("true" | "false")'}
        told = [words[branch["type"]] for branch in others if _is_any(branch) and branch["type"] in words]
        others = [branch for branch in others if not (_is_any(branch) and branch["type"] in words)]
        if any(branch["type"] in ("integer", "number") for branch in others):
            # Which of two lexemes it becomes is known by its first character only.
            texts = [rf"{text} & ~/\s*[-0-9](?s:.*)/" for text in texts]
        expressions = [self.add(_lexeme([*map("({})".format, texts), *told], end), is_terminal=True)]
        expressions += [f"{self.json(branch, root)} {end}" for branch in others]
        return f"({' | '.join(expressions)})"

    def told_value(
        self,
        schema: Any,
        root: Mapping[str, Any],
        close: str,
        end: str,
        where: str,
        says: Sequence[tuple[str, frozenset[str]]],
    ) -> str:
        """As `value`, where a mark before it says of which types it is: the first of `says` that has it."""
        texts, others = self._told_apart(schema, root, close, where)

        def mark(kind: str) -> str:
            return quoted(next(text for text, types in says if kind in types))

        told = []
        if texts:
            lexeme = _lexeme([*map("({})".format, texts)], end)
            told.append(f"{mark('string')} {self.add(lexeme, is_terminal=True)}")
        told += [f"{mark(branch['type'])} {self.json(branch, root)} {end}" for branch in others]
        return f"({' | '.join(told)})"

    def _told_apart(
        self, schema: Any, root: Mapping[str, Any], close: str, where: str
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Terminals for what a string may be, and schemas, each of one type, for all else."""
        if schema is False:
            raise GrammarError(f"{where}: no value is possible")
        texts: list[str] = []
        others: list[dict[str, Any]] = []
        for branch in branches(schema, root):
            if branch.get("nullable"):
                continue  # it is read, and no word of JSON schema
            if "type" in branch:
                kind = type_named(branch["type"])
                if kind == "string":
                    texts.append(string_text(branch, close, where))
                else:
                    others.append({**branch, "type": kind})
            elif _is_any(branch):
                texts.append(free_text(close))
                others += [{**branch, "type": kind} for kind in sorted(ANY_TYPES - STRING)]
            else:
                if "$ref" in branch:
                    raise GrammarError(f"{where}: $ref {branch['$ref']!r} names nothing of the function's schema")
                raise GrammarError(f"{where}: a schema with {_first_key(branch)} needs a type beside it")
        if not texts and not others:
            raise GrammarError(f"{where}: no value is possible")
        return texts, others


def _is_any(branch: Mapping[str, Any]) -> bool:
    """Whether it says no more than a type."""
    return not unknown_keys(branch, set())


def string_text(branch: Mapping[str, Any], close: str, where: str) -> str:
    """A terminal for the raw text of a string."""
    if unknown := unknown_keys(branch, _STRING_KEYS):
        raise GrammarError(f"{where}: {unknown} beside a string cannot be enforced: leave it out")
    least, most = branch.get("minLength", 0), branch.get("maxLength")
    if "enum" in branch or "const" in branch:
        values = [branch["const"]] if "const" in branch else branch["enum"]
        words = [value for value in values if isinstance(value, str) and close not in value]
        words = [word for word in words if len(word) >= least and (most is None or len(word) <= most)]
        if not words:
            raise GrammarError(f"{where}: none of its strings can be written")
        return f"({' | '.join(map(quoted, words))})" if words != [""] else "/()/"
    terms = [free_text(close)]
    if "pattern" in branch:
        terms.append(f"/{_searched(branch['pattern'])}/")
    if "format" in branch:
        if branch["format"] not in _FORMATS:
            known = ", ".join(_FORMATS)
            raise GrammarError(f"{where}: format {branch['format']!r} cannot be enforced; choose one of {known}")
        terms.append(f"/{_FORMATS[branch['format']]}/")
    if least or most is not None:
        if most is not None and most < least:
            raise GrammarError(f"{where}: minLength {least} is more than maxLength {most}")
        terms.append(f"/(?s:.{{{least},{'' if most is None else most}}})/")
    return f"({' & '.join(terms)})"


def unknown_keys(branch: Mapping[str, Any], known: Set[str]) -> str:
    """The keywords that say what a value may be, other than `known`; "" for none."""
    return ", ".join(sorted(set(branch) & (_KNOWN_KEYS | _STRING_KEYS - _ANNOTATIONS) - known))


def free_text(close: str) -> str:
    """A terminal for any text without the marker, whose first character is in it only once.

    It is spelled out, and no complement: whether an intersection with one can still be met is a search without end.
    """
    first, behind = escaped(close[0]), ""
    for char in reversed(close[1:]):
        # What may stand behind `first` and the characters before this one, up to the next `first`.
        going_on = f"|{escaped(char)}{behind}" if behind else ""
        behind = f"(?:[^{escaped(char)}{first}][^{first}]*{going_on})?"
    return f"/[^{first}]*(?:{first}{behind})*/"


def _not_read_as(kinds: frozenset[str]) -> str:
    """What a string must not be, for a reader not to take it for a value of the other types."""
    texts = [r"\{(?s:.*)"] if "object" in kinds else []
    texts += [r"\[(?s:.*)"] if "array" in kinds else []
    texts += ["true|false|True|False"] if "boolean" in kinds else []
    texts += ["null|None"] if "null" in kinds else []
    texts += [_NUMBER] if kinds & {"integer", "number"} else []
    return "".join(rf" & ~/\s*(?:{text})\s*/" for text in texts)


def _not_begun_as(kinds: frozenset[str]) -> str:
    """The same by the first character alone, for texts of which more is asked: with a complement beside that the
    compiler would search for what can still be met."""
    if not kinds:
        return ""
    chars = r"\s"
    for kind, begins in (("object", r"\{"), ("array", r"\["), ("boolean", "tTfF"), ("null", "nN")):
        chars += begins if kind in kinds else ""
    chars += "0-9-" if kinds & {"integer", "number"} else ""
    return f" & /(?:[^{chars}](?s:.*))?/"


def _lexeme(texts: list[str], end: str) -> str:
    return f"({' | '.join(texts)}) {end}"


def _searched(pattern: Any) -> str:
    """A pattern that is looked for, as one of the whole text."""
    items = _alternatives(str(pattern))
    if len(items) > 1:  # anchors belong to one of them alone
        return f"(?:{'|'.join(map(_searched, items))})"
    (text,) = items
    is_begun, is_ended = text.startswith("^"), re.search(r"(?<!\\)(?:\\\\)*\$$", text) is not None
    text = text[1:] if is_begun else text
    text = text[:-1] if is_ended else text
    text = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", text)
    return ("" if is_begun else "(?s:.*)") + f"(?:{text})" + ("" if is_ended else "(?s:.*)")


def _alternatives(pattern: str) -> list[str]:
    """The alternatives of a regular expression, outside of all its groups and classes."""
    items, depth, is_class, start, at = [], 0, False, 0, 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif is_class:
            is_class = char != "]"
        elif char == "[":
            is_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            items.append(pattern[start:at])
            start = at + 1
        at += 1
    return [*items, pattern[start:]]


def says_only(schema: Mapping[str, Any], *keys: str) -> bool:
    """Whether it has one of `keys`, and nothing beside it but annotations."""
    return any({key} == set(schema) - _ANNOTATIONS for key in keys)


def _first_key(branch: Mapping[str, Any]) -> str:
    return next((key for key in branch if key not in _PLAIN_KEYS), "no type")


def with_references(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` with all of `root` that it refers to, as a document of its own."""
    definitions: dict[str, Any] = {}
    names: dict[str, str] = {}

    def carried(node: Any, is_data: bool = False) -> Any:
        if is_data:
            return node
        if isinstance(node, list):
            return [carried(item) for item in node]
        if not isinstance(node, Mapping):
            return node
        told: dict[str, Any] = {}
        for key, value in node.items():
            if key in ("$defs", "definitions", "x-guidance"):
                continue
            if key == "$ref" and isinstance(value, str):
                if value not in names:
                    names[value] = f"d{len(names)}"
                    target = target_of(value, root)
                    if target is None:
                        raise GrammarError(f"$ref {value!r} names nothing of the function's schema")
                    definitions[names[value]] = carried(target)
                told[key] = f"#/$defs/{names[value]}"
            elif key == "properties" and isinstance(value, Mapping):
                told[key] = {name: carried(item) for name, item in value.items()}
            else:
                told[key] = carried(value, key in ("enum", "const", "default", "examples"))
        return told

    document: dict[str, Any] = carried({} if schema is True or schema is None else schema)
    return {**document, "$defs": definitions} if definitions else document


def escaped(text: str) -> str:
    """A text in a regular expression of Lark."""
    return re.sub(r"([^\w\s<>\"':;=,｜▁])", r"\\\1", text).replace("\n", "\\n")
