"""What stands in a region of a message, as a value: JSON, tags, lines or plain words.

Owns the kinds of content that a model's `response_template` names, and the shape (`transform`) that their values are
put in. Knows neither where regions begin nor what their values are for. Source: the documentation of `transformers`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from mooli.frontend.wire_formats.growing_pattern import GrowingPattern

MAX_CONTENT_CHARS = 1 << 17
"""Of a region whose content is more than words: what is longer is none."""

Content = Callable[[str], Any]
"""From text to a value. Raises ValueError or RecursionError for a text that is none."""

_WHOLE = re.compile(r"\{(\w+(?:\.\w+)*)\}")
_MAX_DEPTH = 16


def content_of(kind: Any, arguments: Any) -> Content:
    """The reader of one kind of content. Raises ValueError for a kind or for arguments that are not read here."""
    return _content_of(kind, {} if arguments is None else arguments, 0)


def _content_of(kind: Any, arguments: Any, depth: int) -> Content:
    if not isinstance(arguments, dict):
        raise ValueError(f"content_args={arguments!r} is no table")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"content={kind!r} is not read here, only {', '.join(_KINDS)}")
    known, make = _KINDS[kind]
    unknown = arguments.keys() - known
    if unknown:
        raise ValueError(f"content_args of content={kind!r} has {', '.join(sorted(map(str, unknown)))}")
    if depth > _MAX_DEPTH:
        raise ValueError(f"value_parser is nested more than {_MAX_DEPTH} deep")
    return make(arguments, depth)


def is_stripped(arguments: Mapping[str, Any]) -> bool:
    """Whether white space around words is left out."""
    return bool(arguments.get("strip", True))


def _text(arguments: Mapping[str, Any], depth: int) -> Content:
    return str.strip if is_stripped(arguments) else str


def _bool(arguments: Mapping[str, Any], depth: int) -> Content:
    return lambda text: text.strip().lower() in ("true", "1")


def _json(arguments: Mapping[str, Any], depth: int) -> Content:
    """`unquoted_keys`: keys may be bare words. `string_delims`: pairs of texts that strings stand between.
    `allow_non_json`: a text that is no JSON is a string."""
    delimiters = arguments.get("string_delims") or []
    is_list = isinstance(delimiters, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in delimiters)
    if not is_list or not all(isinstance(text, str) and text for pair in delimiters for text in pair):
        raise ValueError(f"string_delims={delimiters!r} is no list of pairs of texts")
    closing_of: dict[str, str] = dict(reversed(delimiters))
    kinds = [*map(re.escape, closing_of), r'"(?:\\.|[^"\\])*"?']
    if arguments.get("unquoted_keys"):
        kinds.append(r"(?<=[{,])(?P<before>\s*)(?P<key>\w+)(?P<after>\s*):")
    pattern = re.compile("|".join(kinds), re.DOTALL) if len(kinds) > 1 else None

    def rewritten(pattern: re.Pattern[str], text: str) -> str:
        """As JSON has it. Each character is looked at once: what is not closed is closed nowhere."""
        found: list[str] = []
        at = 0
        while (match := pattern.search(text, at)) is not None:
            found.append(text[at : match.start()])
            closing, at = closing_of.get(match[0]), match.end()
            groups = match.groupdict()
            if closing is not None:
                end = text.find(closing, at)
                if end < 0:
                    return text
                found.append(json.dumps(text[at:end]))
                at = end + len(closing)
            elif groups.get("key") is not None:
                found.append(f'{groups["before"]}"{groups["key"]}"{groups["after"]}:')
            else:
                found.append(match[0])
        return "".join([*found, text[at:]])

    def read(text: str) -> Any:
        try:
            return json.loads(text if pattern is None else rewritten(pattern, text), parse_constant=_refuse)
        except (ValueError, RecursionError):
            if arguments.get("allow_non_json"):
                return text.strip()
            raise

    return read


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


_VALUE = re.compile(r"(.*)\(\?P<value>(?:\.|\[\\s\\S\])([*+])\?\)(.+)", re.DOTALL)
"""Of a pattern of tags: what stands before a value, whether it may be empty, and what stands behind."""


def _tags(arguments: Mapping[str, Any], depth: int) -> Content:
    """`tag_pattern` has groups `key` and then `value`, any characters up to what follows. `merge_duplicates`: values of
    one key are a list."""
    source = arguments.get("tag_pattern")
    if not isinstance(source, str):
        raise ValueError("content_args has no tag_pattern")
    taken_apart = _VALUE.fullmatch(source)
    if taken_apart is None:
        raise ValueError(f"tag_pattern={source!r} has no (?P<value>.*?) with something behind it")
    # Apart, so that no text takes longer than it has characters.
    before, behind = GrowingPattern(taken_apart[1]), GrowingPattern(taken_apart[3])
    if before.names != ("key",) or behind.names or not behind.least_chars or not before.least_chars:
        raise ValueError(f"tag_pattern={source!r} is not a tag with a group named key, a value and an end")
    least = taken_apart[2] == "+"
    value_of = _value_parser(arguments, depth)
    merges = bool(arguments.get("merge_duplicates"))

    def read(text: str) -> dict[str, Any]:
        found: dict[str, list[Any]] = {}
        at = 0
        while (head := before.search(text, at, is_last=True)) is not None and head.match is not None:
            start = head.match.end()
            tail = behind.search(text, start + least, is_last=True)
            if tail is None or tail.match is None:
                break
            if head.match["key"] is not None:
                found.setdefault(head.match["key"], []).append(value_of(text[start : tail.start]))
            at = tail.match.end()
        return {key: values if merges and len(values) > 1 else values[-1] for key, values in found.items()}

    return read


def _lines(arguments: Mapping[str, Any], depth: int) -> Content:
    line_end, between = arguments.get("line_sep", "\n"), arguments.get("kv_sep", ":")
    if not all(isinstance(text, str) and text for text in (line_end, between)):
        raise ValueError("line_sep and kv_sep must be texts")
    value_of = _value_parser(arguments, depth)
    strip = _text(arguments, depth)

    def read(text: str) -> dict[str, Any]:
        pairs = (line.partition(between) for line in text.split(line_end) if between in line)
        return {strip(key): value_of(strip(value)) for key, _, value in pairs}

    return read


def _value_parser(arguments: Mapping[str, Any], depth: int) -> Content:
    inner = arguments.get("value_parser")
    if inner is None:
        return str
    if not isinstance(inner, dict) or inner.keys() - {"name", "args"}:
        raise ValueError(f"value_parser={inner!r} is no table of name and args")
    return _content_of(inner.get("name", "text"), inner.get("args", {}), depth + 1)


_STRIP = frozenset({"strip"})
_KINDS: Mapping[str, tuple[frozenset[str], Callable[[Mapping[str, Any], int], Content]]] = {
    "text": (_STRIP, _text),
    "int": (_STRIP, lambda arguments, depth: int),
    "float": (_STRIP, lambda arguments, depth: float),
    "bool": (_STRIP, _bool),
    "json": (frozenset({"unquoted_keys", "string_delims", "allow_non_json", "strip"}), _json),
    "xml-inline": (frozenset({"tag_pattern", "value_parser", "merge_duplicates"}), _tags),
    "kv-lines": (frozenset({"line_sep", "kv_sep", "value_parser", "strip"}), _lines),
}


# -- shapes ------------------------------------------------------------------------------------------------------------
def check_transform(transform: Any, names: frozenset[str] | None, depth: int = 0) -> None:
    """Raise ValueError unless each text of `transform` is a plain one or one whole placeholder. names: what a
    placeholder may begin with; None where only the content will tell."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"transform is nested more than {_MAX_DEPTH} deep")
    if isinstance(transform, (dict, list)):
        for value in transform.values() if isinstance(transform, dict) else transform:
            check_transform(value, names, depth + 1)
    elif isinstance(transform, str) and _WHOLE.search(transform):
        whole = _WHOLE.fullmatch(transform)
        if whole is None:
            raise ValueError(f"transform has {transform!r}, a placeholder with words beside it")
        root = whole[1].partition(".")[0]
        if names is not None and root not in names:
            raise ValueError(f"transform has {transform!r}, which is none of {', '.join(sorted(names))}")


def transformed(transform: Any, scope: Mapping[str, Any]) -> Any:
    """`transform` with its placeholders filled. Raises ValueError for one that `scope` has nothing for."""
    if isinstance(transform, dict):
        return {key: transformed(value, scope) for key, value in transform.items()}
    if isinstance(transform, list):
        return [transformed(value, scope) for value in transform]
    whole = _WHOLE.fullmatch(transform) if isinstance(transform, str) else None
    if whole is None:
        return transform
    value: Any = scope
    for key in whole[1].split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"there is no {whole[1]}")
        value = value[key]
    return value
