"""Calls as MiniMax M3 writes them: parameters are tags, objects and lists are tags in these, and a mark is before each.

```text
]<]minimax[>[<tool_call>
]<]minimax[>[<invoke name="f">]<]minimax[>[<city>Oslo]<]minimax[>[</city>]<]minimax[>[</invoke>
]<]minimax[>[</tool_call>
```

A value is raw text up to the next mark with an end tag, whatever its name, or else tags: of a list they are all `item`.
What a value is says the schema (`raw_values`); where that says nothing, tags that begin with an `item` are a list. A
value of nothing is a text where it may be one, or else an empty list, or an empty object.

Sources: MiniMax's guide to tool calls; the chat template of the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mooli.errors import GrammarError
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.calls import CallParser, Waiting, length_of_beginning
from mooli.frontend.wire_formats.raw_values import RawValue
from mooli.frontend.wire_formats.tagged_calls import NAME
from mooli.lark import quoted
from mooli.raw_rules import Rules, free_text, parameters_of, says_only, takes_any, unknown_keys
from mooli.schemas import ANY_TYPES, branches, schema_of, target_of, type_named, types_of

_MARK = "]<]minimax[>["
_SECTION, _SECTION_END = f"{_MARK}<tool_call>", f"{_MARK}</tool_call>"
_INVOKE, _INVOKE_END = f'{_MARK}<invoke name="', f"{_MARK}</invoke>"
_TAG, _END_TAG = f"{_MARK}<", f"{_MARK}</"
_BANNED = "<]minimax[>["
"""Of the mark, what a forced text has not: its first character is in it once."""

_PLAIN_KEY = re.compile(r"[^\s<>/\"'=\[\]]+")
_ANY_KEY = "/[A-Za-z_][A-Za-z0-9_]*/"
_ANY_END = f'{quoted(_END_TAG)} {_ANY_KEY} ">"'
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class MinimaxM3:
    """See the module."""

    name = "minimax-m3"
    marker_tokens = (_MARK, "<tool_call>", "</tool_call>")

    def triggers(self) -> tuple[str, ...]:
        return (_SECTION,)

    def parser(self, tools: ToolSet) -> MinimaxM3Parser:
        return MinimaxM3Parser(tools)

    def calls_grammar(self, tools: ToolSet) -> str:
        rules = Rules()
        call = rules.add(" | ".join(rules.add(self._call(rules, tool)) for tool in tools.tools))
        more = f" ({call})*" if tools.parallel else ""
        return "\n".join(
            [
                f"calls: {quoted(_SECTION)} calls_after_trigger",
                f'calls_after_trigger: "\\n" {call}{more} {quoted(_SECTION_END)}',
                *rules.lines,
            ]
        )

    def _call(self, rules: Rules, tool: Tool) -> str:
        writer = _SchemaWriter(rules, tool.parameters or {}, f"tool {tool.name}")
        told = [
            writer.pair(key, schema, is_required)
            for key, schema, is_required in parameters_of(tool.parameters, writer.where)
        ]
        if takes_any(tool.parameters):
            told = [f"({writer.any_pair((tool.parameters or {}).get('additionalProperties', True))})*"]
        return " ".join([quoted(f'{_INVOKE}{tool.name}">'), *told, quoted(_INVOKE_END + "\n")])


class MinimaxM3Parser(CallParser):
    """One sequence."""

    def _read(self) -> Waiting[None]:
        while entry := (yield from self._text_until(_SECTION, _INVOKE)):
            behind = self._at
            name = yield from self._head(entry)
            if name:
                yield from self._call_of(name)
            else:
                self._tell_text(behind)

    def _head(self, entry: str) -> Waiting[str]:
        """The name of a function, up to the tag behind it, which is not read; "" if they do not follow."""
        if entry == _SECTION:
            yield from self._skip_spaces()
            if not (yield from self._skip(_INVOKE)):
                return ""
        name = yield from self._run_of(NAME)
        if not name or not (yield from self._skip('">')):
            return ""
        yield from self._skip_spaces()
        start = self._at
        has_tag = yield from self._skip(_TAG, _INVOKE_END, _SECTION_END)
        self._at = start
        return name if has_tag else ""

    def _call_of(self, name: str) -> Waiting[None]:
        tool = self._tools.named(name)
        root = (None if tool is None else tool.parameters) or {}
        self._tell_call(name)
        before = "{"
        while True:
            yield from self._skip_spaces()
            start = self._at
            tag = yield from self._skip(_TAG, _INVOKE, _INVOKE_END, _SECTION_END)
            if tag != _TAG:
                break
            key = yield from self._key()
            if key is None:
                yield from self._stream_broken(_INVOKE_END, _SECTION_END)
                return
            self._tell_arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            if not (yield from self._value(_child_of(root, root, key), root, 0)):
                yield from self._stream_broken(_INVOKE_END, _SECTION_END)
                return
            before = ", "
        if not tag:
            return
        self._at = start if tag == _INVOKE else self._at
        self._tell_arguments("}" if before == ", " else "{}")
        behind = self._at
        yield from self._skip_spaces()
        if not (tag == _INVOKE_END and (yield from self._skip(_SECTION_END))):
            self._at = behind
        self._tell_end()

    def _key(self) -> Waiting[str | None]:
        """The name in a tag, and its end; None if there is none."""
        start = self._at
        key = yield from self._until(">")
        if key is not None and _PLAIN_KEY.fullmatch(key):
            return key
        self._at = start
        return None

    def _value(self, schema: Any, root: Mapping[str, Any], depth: int) -> Waiting[bool]:
        """Tell a value up to behind its end tag. Whether that came."""
        types = ANY_TYPES if schema is None else types_of(schema, root)
        start = self._at
        yield from self._skip_spaces()
        if (yield from self._skip(_TAG, _END_TAG)) == _TAG and depth < _MAX_DEPTH:
            return (yield from self._tags(types, schema, root, depth))
        self._at = start
        return (yield from self._raw(types))

    def _tags(self, types: frozenset[str], schema: Any, root: Mapping[str, Any], depth: int) -> Waiting[bool]:
        """A list or an object, from behind the mark and the bracket of its first tag on."""
        key = yield from self._key()
        if key is None:
            return False
        is_list = key == "item" and "array" in types
        before = "[" if is_list else "{"
        while True:
            name = "" if is_list else f"{json.dumps(key, ensure_ascii=False)}: "
            self._tell_arguments(before + name)
            before = ", "
            child = _child_of(schema, root, None if is_list else key)
            if not (yield from self._value(child, root, depth + 1)):
                return False
            yield from self._skip_spaces()
            tag = yield from self._skip(_TAG, _END_TAG)
            key = (yield from self._key()) if tag else None
            if key is None:
                return False
            if tag == _END_TAG:
                self._tell_arguments("]" if is_list else "}")
                return True

    def _raw(self, types: frozenset[str]) -> Waiting[bool]:
        value, is_empty = RawValue(types), True
        while True:
            start, place = self._at, self._text.find(_END_TAG, self._at)
            held = 0 if self._is_over or place >= 0 else length_of_beginning(self._text[start:], (_END_TAG,))
            self._at = place if place >= 0 else len(self._text) - held
            said, is_empty = self._text[start : self._at], is_empty and self._at == start
            if place < 0:
                self._tell_arguments(value.push(said))
                self._text, self._at = self._text[self._at :], 0
                if not (yield from self._more()):
                    self._tell_arguments(value.rest())
                    return False
                continue
            self._at += len(_END_TAG)
            told = value.push(said)
            key = yield from self._key()
            if key is None:
                self._tell_arguments(told + value.rest())
                return False
            self._tell_arguments(_nothing(types) if is_empty else told + value.end())
            return True


def _nothing(types: frozenset[str]) -> str:
    """What a value of no text is."""
    return next((text for kind, text in (("string", '""'), ("array", "[]"), ("object", "{}")) if kind in types), '""')


def _child_of(schema: Any, root: Mapping[str, Any], key: str | None) -> Any:
    """The schema of what is `key` in a value, or an item of it for None; None where nothing says it."""
    for branch in branches(schema, root):
        found = branch.get("items") if key is None else schema_of(branch, key)
        if found is not None:
            return found
    return None


@dataclass
class _SchemaWriter:
    """Writes a JSON schema as rules for values in this format. `root` is what its references are in."""

    rules: Rules
    root: Mapping[str, Any]
    where: str
    _by_reference: dict[tuple[str, str], str] = field(default_factory=dict)
    _any: str = ""
    _depth: int = 0

    def pair(self, key: str, schema: Any, is_required: bool) -> str:
        """An expression for a value between its tags."""
        if not _PLAIN_KEY.fullmatch(key):
            raise GrammarError(f"{self.where}, parameter {key}: this model cannot write the name {key!r}")
        told = f"{quoted(f'{_TAG}{key}>')} {self.value(schema, quoted(f'{_END_TAG}{key}>'), key)}"
        return told if is_required else f"({told})?"

    def any_pair(self, schema: Any) -> str:
        """The same of any name, which its end tag does not repeat."""
        return f'{quoted(_TAG)} {_ANY_KEY} ">" {self.value(schema, _ANY_END, "additionalProperties")}'

    def value(self, schema: Any, end: str, key: str) -> str:
        """The name of a rule for a value and its end tag, of which `end` is an expression."""
        reference = schema["$ref"] if isinstance(schema, Mapping) and says_only(schema, "$ref") else None
        known = (str(reference), end)
        if reference is not None and known in self._by_reference:
            return self._by_reference[known]
        if self._depth > _MAX_DEPTH:
            raise GrammarError(f"{self.where}, parameter {key}: its schema refers to itself beside other keywords")
        name = self.rules.add("")
        if reference is not None:
            if target_of(reference, self.root) is None:
                raise GrammarError(f"{self.where}, parameter {key}: $ref {reference!r} names nothing of its schema")
            self._by_reference[known] = name  # it may refer to itself
        self._depth += 1
        self.rules.lines[int(name[1:])] += self._alternatives(schema, end, key)
        self._depth -= 1
        return name

    def _alternatives(self, schema: Any, end: str, key: str) -> str:
        where = f"{self.where}, parameter {key}"
        found = [branch for branch in branches(schema, self.root) if not branch.get("nullable")]
        if schema is False or not found:
            raise GrammarError(f"{where}: no value is possible")
        if any("type" not in branch and not unknown_keys(branch, set()) for branch in found):
            return self._anything(end)
        kinds = [type_named(branch.get("type")) for branch in found]
        raw = [branch for branch, kind in zip(found, kinds, strict=True) if kind not in ("array", "object")]
        also = frozenset(kinds) & {"array", "object"}
        told = [self.rules.value({"anyOf": raw}, self.root, _BANNED, end, where, also)] if raw else []
        for kind in sorted(also):
            if kinds.count(kind) > 1:
                raise GrammarError(f"{where}: of a union with more than one {kind} it cannot be told which is meant")
            # Where a value of nothing is read as something else, it is none of these.
            may_be_empty = "string" not in kinds and (kind == "array" or "array" not in kinds)
            branch = found[kinds.index(kind)]
            if kind == "array":
                told.append(f"{self._array(branch, where, may_be_empty)} {end}")
                continue
            properties = branch.get("properties") or {}
            if "array" in kinds and ("item" in properties or not properties):
                raise GrammarError(f"{where}: an object that may have an item cannot be told from an array")
            told.append(f"{self._object(branch, where, may_be_empty)} {end}")
        return " | ".join(told)

    def _array(self, branch: Mapping[str, Any], where: str, may_be_empty: bool) -> str:
        if unknown := unknown_keys(branch, {"items", "minItems", "maxItems"}):
            raise GrammarError(f"{where}: {unknown} of an array cannot be enforced: leave it out")
        least, most = branch.get("minItems", 0), branch.get("maxItems")
        least = least if may_be_empty else max(least, 1)
        if most is not None and most < least:
            raise GrammarError(f"{where}: it has at least {least} items, more than maxItems {most}")
        if most == 0:
            return ""
        item = self.value(branch.get("items", True), quoted(f"{_END_TAG}item>"), "items")
        return f"({quoted(f'{_TAG}item>')} {item}){{{least},{'' if most is None else most}}}"

    def _object(self, branch: Mapping[str, Any], where: str, may_be_empty: bool) -> str:
        if unknown := unknown_keys(branch, {"properties", "required", "additionalProperties"}):
            raise GrammarError(f"{where}: {unknown} of an object cannot be enforced: leave it out")
        properties, more = branch.get("properties") or {}, branch.get("additionalProperties", True)
        required: Sequence[str] = branch.get("required") or []
        if not properties and not required and more is not False:
            return f"({self.any_pair(more)}){'*' if may_be_empty else '+'}"
        properties = {**properties, **{name: more for name in required if name not in properties}}
        names = [name for name, item in properties.items() if item is not False or name in required]
        pairs = [self.rules.add(self.pair(name, properties[name], True)) for name in names]
        marks = ["" if name in required else "?" for name in names]
        if may_be_empty or "" in marks:
            return " ".join(pair + mark for pair, mark in zip(pairs, marks, strict=True))
        if not pairs:
            raise GrammarError(f"{where}: an empty object cannot be told from the other types")
        firsts = [" ".join([pairs[i], *(f"{pair}?" for pair in pairs[i + 1 :])]) for i in range(len(pairs))]
        return f"({' | '.join(firsts)})"

    def _anything(self, end: str) -> str:
        """A text, or tags of any names."""
        if not self._any:
            self._any = self.rules.add("")
            self.rules.lines[int(self._any[1:])] += self._any_value(_ANY_END)
        return self._any_value(end)

    def _any_value(self, end: str) -> str:
        text = self.rules.add(f"{free_text(_BANNED)} {end}", is_terminal=True)
        return f'{text} | ({quoted(_TAG)} {_ANY_KEY} ">" {self._any})+ {end}'
