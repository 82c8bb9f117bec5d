"""Calls as Gemma 4 and FunctionGemma write them: objects without quotes around keys, and marks around strings.

```text
<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>
```

Strings are raw between their marks. Read are also white space, keys and strings in quotes, and Python's words. The
parameters are written in the order of the alphabet, as the template sorts them.

Sources: the chat templates of the models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mooli.errors import GrammarError
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.calls import CallParser, Waiting, length_of_beginning
from mooli.frontend.wire_formats.tagged_calls import NAME
from mooli.lark import quoted
from mooli.raw_rules import Rules, free_text, says_only, string_text, takes_any, unknown_keys
from mooli.schemas import branches, target_of

_WORD = re.compile(r"[-+.\w]+")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_MAX_DEPTH = 64
_PLAIN_KEY = re.compile(r"[^\s{}\[\]:,\"<>]+")


@dataclass(frozen=True, slots=True)
class GemmaCalls:
    """opening, closing: around a call. mark: on both sides of a string."""

    name: str
    opening: str
    closing: str
    mark: str

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        return (self.opening, self.closing, self.mark)

    def triggers(self) -> tuple[str, ...]:
        return (self.opening,)

    def parser(self, tools: ToolSet) -> GemmaParser:
        return GemmaParser(self, tools)

    def calls_grammar(self, tools: ToolSet) -> str:
        rules = Rules()
        call = rules.add(" | ".join(rules.add(self._call(rules, tool)) for tool in tools.tools))
        more = f" ({quoted(self.opening)} {call})*" if tools.parallel else ""
        return "\n".join(
            [f"calls: {quoted(self.opening)} calls_after_trigger", f"calls_after_trigger: {call}{more}", *rules.lines]
        )

    def _call(self, rules: Rules, tool: Tool) -> str:
        root = tool.parameters or {}
        writer = _SchemaWriter(self.mark, rules, root, f"tool {tool.name}")
        found = [*branches(root, root)]
        if len(found) != 1 or found[0].get("type", "object") != "object":
            raise GrammarError(f"tool {tool.name}: its parameters are no object, as this model's calls need it")
        none = {} if takes_any(tool.parameters) else {"properties": {}, "additionalProperties": False}
        arguments = writer.object({**found[0], **none} if not found[0].get("properties") else found[0])
        return f"{quoted(f'call:{tool.name}')} {arguments} {quoted(self.closing)}"


class GemmaParser(CallParser):
    """One sequence. Values are told as JSON as they come."""

    def __init__(self, form: GemmaCalls, tools: ToolSet) -> None:
        self._form = form
        super().__init__(tools)

    def _read(self) -> Waiting[None]:
        form = self._form
        while (yield from self._text_until(form.opening)):
            behind = self._at
            yield from self._skip_spaces()
            name = ""
            if (yield from self._skip("call:")):
                yield from self._skip_spaces()
                name = yield from self._run_of(NAME)
                yield from self._skip_spaces()
            if not name or (yield from self._char()) != "{":
                self._tell_text(behind)
                continue
            self._tell_call(name)
            if not (yield from self._value()):
                yield from self._stream_broken(form.closing)
                continue
            behind = self._at
            yield from self._skip_spaces()
            if not (yield from self._skip(form.closing)):
                self._at = behind
            self._tell_end()

    def _value(self) -> Waiting[bool]:
        """Tell the value that comes next. Whether it is whole."""
        opened: list[str] = []
        """Brackets that are open."""
        may_close = is_key = False
        while True:
            char = yield from self._skip_spaces()
            if may_close and char == opened[-1]:
                self._at += 1
                opened.pop()
                self._tell_arguments(char)
            elif is_key:
                key = yield from self._key()
                if key is None:
                    return False
                self._tell_arguments(f"{key}: ")
                may_close = is_key = False
                continue
            elif char in ("{", "["):
                self._at += 1
                opened.append("}" if char == "{" else "]")
                self._tell_arguments(char)
                may_close, is_key = True, char == "{"
                continue
            elif not (yield from self._scalar(char)):
                return False
            if not opened:
                return True
            char = yield from self._skip_spaces()
            may_close = char == opened[-1]
            if char == ",":
                self._at += 1
                self._tell_arguments(", ")
                is_key = opened[-1] == "}"
            elif not may_close:
                return False

    def _key(self) -> Waiting[str | None]:
        """A key and its colon are read; it as JSON."""
        char = yield from self._char()
        if char == '"':
            key = yield from self._json_string()
        elif (yield from self._skip(self._form.mark)):
            key = yield from self._until(self._form.mark)
        else:
            start = self._at
            while (char := (yield from self._char())) and _PLAIN_KEY.fullmatch(char):
                self._at += 1
            key = self._text[start : self._at]
        yield from self._skip_spaces()
        if not key or not (yield from self._skip(":")):
            return None
        return json.dumps(key, ensure_ascii=False)

    def _scalar(self, char: str) -> Waiting[bool]:
        """Tell a string, a number or a word."""
        mark = self._form.mark
        if char == '"':
            return (yield from self._stream_json()) == "whole"
        if (yield from self._skip(mark)):
            self._tell_arguments('"')
            while True:
                start, place = self._at, self._text.find(mark, self._at)
                held = 0 if self._is_over else length_of_beginning(self._text[start:], (mark,))
                end = place if place >= 0 else len(self._text) - held
                self._at = end + (len(mark) if place >= 0 else 0)
                said = json.dumps(self._text[start:end], ensure_ascii=False)[1:-1]
                self._tell_arguments(said + ('"' if place >= 0 else ""))
                if place >= 0:
                    return True
                if not (yield from self._more()):
                    return False
        start = self._at
        while (char := (yield from self._char())) and _WORD.fullmatch(char):
            self._at += 1
        word = self._text[start : self._at]
        if not (_NUMBER.fullmatch(word) or word in _WORDS) or (not char and self._is_over):
            self._at = start
            return False
        self._tell_arguments(_WORDS.get(word, word))
        return True


@dataclass
class _SchemaWriter:
    """Writes a JSON schema as rules for values in this format. `root` is what its references are in."""

    mark: str
    rules: Rules
    root: Mapping[str, Any]
    where: str
    _by_reference: dict[str, str] = field(default_factory=dict)
    _any: str = ""
    _depth: int = 0

    def value(self, schema: Any) -> str:
        """An expression for a value."""
        if isinstance(schema, Mapping) and "type" not in schema:
            if says_only(schema, "$ref"):
                return self._reference(str(schema["$ref"]))
            for union in ("anyOf", "oneOf"):
                if says_only(schema, union) and schema[union]:
                    return f"({' | '.join(map(self.value, schema[union]))})"  # references in it stay such
        if self._depth > _MAX_DEPTH:
            raise GrammarError(f"{self.where}: its schema refers to itself beside other keywords, or is too deep")
        self._depth += 1
        told = self._alternatives(schema)
        self._depth -= 1
        return told

    def _alternatives(self, schema: Any) -> str:
        if schema is False:
            raise GrammarError(f"{self.where}: no value is possible")
        told = [self._branch(branch) for branch in branches(schema, self.root) if not branch.get("nullable")]
        if not told:
            raise GrammarError(f"{self.where}: no value is possible")
        return told[0] if len(told) == 1 else f"({' | '.join(told)})"

    def _reference(self, reference: str) -> str:
        if reference not in self._by_reference:
            target = target_of(reference, self.root)
            if target is None:
                raise GrammarError(f"{self.where}: $ref {reference!r} names nothing of its schema")
            name = self._by_reference[reference] = self.rules.add("")  # it may refer to itself
            self.rules.lines[int(name[1:])] += self.value(target)
        return self._by_reference[reference]

    def _branch(self, branch: Mapping[str, Any]) -> str:
        kind = branch.get("type")
        if "enum" in branch or "const" in branch:
            values = [branch["const"]] if "const" in branch else branch["enum"]
            words = [quoted(self._written(value)) for value in values if _has_type(value, kind)]
            if not words or unknown_keys(branch, {"enum", "const"}):
                raise GrammarError(f"{self.where}: an enum with {', '.join(branch)} cannot be enforced")
            return f"({' | '.join(words)})"
        if kind == "string":
            text = string_text(branch, self.mark, self.where)
            return f"{quoted(self.mark)} {self.rules.add(f'({text}) {quoted(self.mark)}', is_terminal=True)}"
        if kind == "array":
            return self._array(branch)
        if kind == "object":
            return self.object(branch)
        if kind is None:
            if "$ref" in branch:
                raise GrammarError(f"{self.where}: $ref {branch['$ref']!r} names nothing of the function's schema")
            if unknown_keys(branch, set()):
                raise GrammarError(f"{self.where}: a schema with {', '.join(branch)} needs a type")
            return self._anything()
        return self.rules.json(branch, self.root)

    def _array(self, branch: Mapping[str, Any]) -> str:
        if unknown := unknown_keys(branch, {"items", "minItems", "maxItems"}):
            raise GrammarError(f"{self.where}: {unknown} of an array cannot be enforced: leave it out")
        least, most = branch.get("minItems", 0), branch.get("maxItems")
        if most is not None and most < max(least, 1):
            if least:
                raise GrammarError(f"{self.where}: minItems {least} is more than maxItems {most}")
            return '"[]"'
        item = self.rules.add(self.value(branch.get("items", True)))
        more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        items = f"{item} {more}"
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def object(self, branch: Mapping[str, Any]) -> str:
        """An expression for an object with the properties of a schema, sorted."""
        if unknown := unknown_keys(branch, {"properties", "required", "additionalProperties"}):
            raise GrammarError(f"{self.where}: {unknown} of an object cannot be enforced: leave it out")
        properties, more = branch.get("properties") or {}, branch.get("additionalProperties", True)
        required = branch.get("required") or []
        if not properties and not required and more is not False:
            pair = f'/[A-Za-z_][A-Za-z0-9_]*/ ":" {self.rules.add(self.value(more))}'
            return f'"{{" ({pair} ("," {pair})*)? "}}"'
        properties = {**properties, **{name: more for name in required if name not in properties}}
        # From the last on: what follows once a property is there, and what while none is.
        behind = before = ""
        for name in sorted(properties, key=str.lower, reverse=True):
            if properties[name] is False and name not in required:
                continue
            if not _PLAIN_KEY.fullmatch(name):
                raise GrammarError(f"{self.where}: this model cannot write the name {name!r}")
            value = self.rules.add(self.value(properties[name]))
            pair = f"{quoted(name + ':')} {value}"
            if name in required:
                before = f"{pair} {behind}"
                behind = f'"," {pair} {behind}'
            else:
                before = f"({pair} {behind} | {before})" if before else f"({pair} {behind})?"
                behind = f'("," {pair})? {behind}'
            before, behind = self.rules.add(before), self.rules.add(behind)
        return f'"{{" {before} "}}"'

    def _anything(self) -> str:
        if not self._any:
            self._any = name = self.rules.add("")
            text = self.rules.add(f"{free_text(self.mark)} {quoted(self.mark)}", is_terminal=True)
            pair = f'/[A-Za-z_][A-Za-z0-9_]*/ ":" {name}'
            scalar = self.rules.json({"type": ["number", "boolean", "null"]}, {})
            self.rules.lines[int(name[1:])] += (
                f'{quoted(self.mark)} {text} | {scalar} | "[" ({name} ("," {name})*)? "]"'
                f' | "{{" ({pair} ("," {pair})*)? "}}"'
            )
        return self._any

    def _written(self, value: Any) -> str:
        """A value as the model writes it."""
        if isinstance(value, str):
            if self.mark in value:
                raise GrammarError(f"{self.where}: this model cannot write {value!r}")
            return self.mark + value + self.mark
        if isinstance(value, list):
            return f"[{','.join(map(self._written, value))}]"
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}:{self._written(value[key])}" for key in sorted(value, key=str.lower)) + "}"
        return json.dumps(value)


def _has_type(value: Any, kind: Any) -> bool:
    kinds = {"string": str, "array": list, "object": dict, "boolean": bool, "null": type(None)}
    if kind in ("integer", "number"):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind is None or isinstance(value, kinds.get(kind, object))


GEMMA_FORMATS: Mapping[str, GemmaCalls] = {
    form.name: form
    for form in (
        GemmaCalls("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>'),
        GemmaCalls("functiongemma", "<start_function_call>", "<end_function_call>", "<escape>"),
    )
}
"""By the names that `tool_call_parser` takes."""
