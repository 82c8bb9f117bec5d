"""Values that a model writes as raw text between markers: what they are in JSON, and what a grammar lets them be.

Owns the reading of one value by the types that its schema allows, and the rules of Lark for one. Strings are written as
they are and all else as JSON, as chat templates write a history. Knows no format's markers, and never checks a value: a
text that is no JSON of its types becomes a string, for who called to judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from mooli.errors import GrammarError
from mooli.frontend.tools import Tool
from mooli.frontend.wire_formats.json_text import JsonScanner
from mooli.lark import json_of, quoted

ANY_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})
STRING = frozenset({"string"})

_LOOSE_TYPES = {
    "str": "string", "text": "string", "varchar": "string", "char": "string", "enum": "string", "int": "integer",
    "long": "integer", "float": "number", "double": "number", "num": "number", "bool": "boolean", "dict": "object",
    "map": "object", "list": "array", "arr": "array", "tuple": "array", "none": "null",
}  # fmt: skip
"""Names of types that are none of JSON schema's, and are sent all the same."""

_BEGUN_NUMBER = re.compile(r"-?\d*\.?\d*(?:[eE][-+]?\d*)?\s*")
_MAX_REFS = 32

_KEYS_OF = {
    "string": {"pattern", "minLength", "maxLength", "format"},
    "integer number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "array": {"items", "prefixItems", "contains", "minItems", "maxItems", "uniqueItems"},
    "object": {"properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"},
}
"""Keywords that say nothing of values of other types."""


# -- what a schema allows ----------------------------------------------------------------------------------------------
def branches(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Iterator[dict[str, Any]]:
    """The alternatives of a schema, each with at most one type. A reference, a union, a list of types and `nullable`
    are taken apart; what stands beside them is in each alternative.

    root: the schema that references of `schema` are in.
    """
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
        yield from branches({**target, **rest} if isinstance(target, Mapping) else target, root, depth + 1)
        return
    for union in ("anyOf", "oneOf"):
        if isinstance(schema.get(union), list):
            for item in schema[union]:
                yield from branches({**rest, **item} if isinstance(item, Mapping) else item, root, depth + 1)
            return
    if isinstance(rest.get("allOf"), list) and len(rest["allOf"]) == 1 and isinstance(rest["allOf"][0], Mapping):
        (item,) = rest.pop("allOf")
        yield from branches({**item, **rest}, root, depth + 1)
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
    else:
        yield rest


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
        found.add(_type_named(kind))
    return frozenset(found) or ANY_TYPES


def _type_named(name: Any) -> str:
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


# -- from raw text to JSON ---------------------------------------------------------------------------------------------
class RawValue:
    """One value as it comes. A string is told piece by piece, as soon as nothing else can become of it; all other
    values when they are over."""

    def __init__(self, types: frozenset[str]) -> None:
        self._types = types
        self._others = types - STRING
        self._pieces: list[str] = []
        self._is_told = False
        """That it is a string: its first quote."""
        self._waits = bool(self._others)

    def push(self, text: str) -> str:
        """The JSON that is certain now."""
        self._pieces.append(text)
        if self._waits and not ("string" in self._types and self._is_string()):
            return ""
        self._waits = False
        return self._string()

    def end(self) -> str:
        """The rest: nothing follows."""
        text = "".join(self._pieces)
        if self._waits:
            told = as_json(text.strip(), self._others if "string" in self._types else ANY_TYPES)
            if told is not None:
                return told
        return self._string() + ('"' if self._is_told else '""')

    def rest(self) -> str:
        """What was held of a value that is cut short."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def _string(self) -> str:
        text = "".join(self._pieces)
        self._pieces.clear()
        if not text:
            return ""
        quote = "" if self._is_told else '"'
        self._is_told = True
        return quote + json.dumps(text, ensure_ascii=False)[1:-1]

    def _is_string(self) -> bool:
        """Whether what has come can become no JSON of another type."""
        if len(self._pieces) > 1 and self._pieces[0][:1] in ("{", "["):
            return False  # for ever: it is not looked through again
        text = "".join(self._pieces).lstrip()
        self._pieces = [text] if text[:1] in ("{", "[") else self._pieces
        if not text:
            return False
        others = self._others
        if (text[0] == "{" and "object" in others) or (text[0] == "[" and "array" in others):
            return False
        word = text.rstrip()
        words = [*(("true", "false", "True", "False") if "boolean" in others else ())]
        words += ["null", "None"] if "null" in others else []
        if any(known.startswith(word) for known in words):
            return False
        return not (others & {"integer", "number"} and _BEGUN_NUMBER.fullmatch(text))


def as_json(text: str, allowed: frozenset[str]) -> str | None:
    """`text` as JSON, if it is a value of the types `allowed`, with its digits as they are."""
    scanner = JsonScanner()
    told, end = scanner.feed(text, is_last=True)
    if not scanner.is_over or scanner.is_broken or text[end:].strip():
        return None
    kinds = {"{": "object", "[": "array", '"': "string", "n": "null", "t": "boolean", "f": "boolean"}
    kind = kinds.get(told[0]) or ("number" if set(told) & set(".eE") else "integer")
    return told if kind in allowed or (kind == "integer" and "number" in allowed) else None


# -- what a grammar lets it be -----------------------------------------------------------------------------------------
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


def parameters_of(tool: Tool) -> list[tuple[str, Any, bool]]:
    """The parameters of a function in the order of its schema: name, schema, and whether it is required. Where the
    schema says nothing of them (`takes_any`) there are none.

    Raises GrammarError for a schema that is no plain object's: each parameter stands for itself in raw formats.
    """
    root = tool.parameters or {}
    where = f"tool {tool.name}"
    found = [*branches(root, root)]
    if len(found) != 1 or _type_named(found[0].get("type", "object")) != "object":
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


def takes_any(tool: Tool) -> bool:
    """Whether its schema lets arguments have any names. One with `properties`, even none, does not: models write no
    others."""
    schema = tool.parameters
    return (
        schema is not None
        and not set(schema) & {"properties", "$ref", "required"}
        and (schema.get("additionalProperties", True) is not False)
    )


@dataclass
class Rules:
    """Rules of Lark, each under a name of its own."""

    lines: list[str] = field(default_factory=list)

    def add(self, body: str, *, is_terminal: bool = False) -> str:
        """The name of a new rule."""
        name = f"{'V' if is_terminal else 'r'}{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def json(self, schema: Any, root: Mapping[str, Any]) -> str:
        """A rule for JSON of `schema`, whose references are in `root`."""
        return self.add(json_of(with_references(schema, root)))

    def value(self, schema: Any, root: Mapping[str, Any], close: str, end: str, where: str) -> str:
        """An expression for a raw value and the text `end` behind it, in which is the marker `close`: a string has that
        nowhere in itself. where: names the parameter in an error.

        Raises GrammarError for what cannot be enforced, with its place.
        """
        texts, others = self._told_apart(schema, root, close, where)
        kinds = types_of(schema, root) - STRING
        if not texts:
            return f"{self.json(schema, root)} {quoted(end)}"
        if texts == [free_text(close)] and all(map(_is_any, others)):
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
        expressions += [f"{self.json(branch, root)} {quoted(end)}" for branch in others]
        return f"({' | '.join(expressions)})"

    def told_value(
        self, schema: Any, root: Mapping[str, Any], close: str, end: str, where: str, marks: tuple[str, str]
    ) -> str:
        """As `value`, where a mark before it says whether it is a string (the first of `marks`) or JSON."""
        texts, others = self._told_apart(schema, root, close, where)
        told = []
        if texts:
            lexeme = _lexeme([*map("({})".format, texts)], end)
            told.append(f"{quoted(marks[0])} {self.add(lexeme, is_terminal=True)}")
        told += [f"{quoted(marks[1])} {self.json(branch, root)} {quoted(end)}" for branch in others]
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
                kind = _type_named(branch["type"])
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
    """What a string must not be, for `RawValue` not to take it for a value of the other types."""
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
    return f"({' | '.join(texts)}) {quoted(end)}"


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
