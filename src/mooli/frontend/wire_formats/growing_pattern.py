"""Regular expressions over text that grows: whether there is a match, there is none, or it is not known yet.

Owns one question that Python's `re` has no answer to: what a pattern would find if more text came. Each pattern is
written a second time, so that a way to read it which comes to the end of the text is a match there; such a match has no
group. The order in which ways are tried is the same, so that what is certain is what `re` finds in the whole text.

Only patterns whose matching is bounded are taken: a repetition without an end ends at `MAX_REPEAT`, and a repeated
group repeats nothing inside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_PATTERN_CHARS = 400
MAX_REPEAT = 256
_MAX_OPEN_REPEATS = 3
_MAX_WRITTEN_CHARS = 1 << 16

_REPEAT = re.compile(r"\*|\+|\?|\{(\d*)(?:(,)(\d*))?\}")
_CHAR_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[dDsSwWnrtfv]|[^a-zA-Z0-9])", re.DOTALL)
_PLAIN = re.compile(r"[^\\.^$*+?{}\[\]|()]|\{(?!\d*(?:,\d*)?\})|[}\]]", re.DOTALL)
_SET = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_NEVER = "(?!)"


@dataclass(frozen=True, slots=True)
class Found:
    """match: None while it is not known whether there is one at `start`; with `start` at the end there is none yet."""

    start: int
    match: re.Match[str] | None


class GrowingPattern:
    """One pattern, in which a dot is any character.

    Raises ValueError, with the reason, for a pattern that is none or is not taken.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise ValueError(f"a pattern has {len(pattern)} characters; at most {MAX_PATTERN_CHARS} are taken")
        try:
            re.compile(pattern, re.DOTALL)
            node = _Reader(pattern).all()
            written = node.growing("()")
            if len(written) > _MAX_WRITTEN_CHARS:
                raise ValueError("it has too many alternatives")
            self._whole = re.compile(node.named, re.DOTALL)
            self._growing = re.compile(written, re.DOTALL)
        except (re.error, RecursionError, OverflowError, ValueError) as exc:
            raise ValueError(f"the pattern {pattern!r} is not possible: {exc}") from exc
        self.least_chars = node.least
        self.names = tuple(self._whole.groupindex)

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> GrowingPattern:
        """One of several texts, the longest that is there. Raises ValueError."""
        return cls("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))

    def last_end(self, text: str) -> int | None:
        """Where the last match in `text` ends; None if there is none."""
        return max((match.end() for match in self._whole.finditer(text)), default=None)

    def search(self, text: str, start: int, *, is_last: bool) -> Found | None:
        """The first match from `start` on, or the first place where there may be one; None if there is none and, with
        `is_last`, nothing follows."""
        if is_last:
            match = self._whole.search(text, start)
            return None if match is None else Found(match.start(), match)
        begun = self._growing.search(text, start)
        if begun is None:
            return None
        is_certain = begun.lastindex is not None
        return Found(begun.start(), self._whole.match(text, begun.start()) if is_certain else None)


# -- patterns, written a second time -----------------------------------------------------------------------------------
class _Node:
    """A piece of a pattern. named: itself. plain: without groups. ends: its beginnings that come to the end of the text
    and want more. least: characters of its shortest match. repeats: there is a repetition in it."""

    named: str
    plain: str
    ends: str
    least: int
    repeats: bool

    def growing(self, rest: str) -> str:
        """This and then `rest`, which is written so already."""
        return f"(?:{self.ends}|{self.plain}{rest})"


class _Text(_Node):
    """Characters or sets of them, in a row."""

    def __init__(self, chars: Sequence[str]) -> None:
        self.named = self.plain = "".join(chars)
        self.least, self.repeats = len(chars), False
        beginnings = ["".join(chars[:end]) + r"\Z" for end in range(len(chars))]
        self.ends = f"(?:{'|'.join(beginnings)})"


class _Edge(_Node):
    """What matches no character. ends: where what follows decides."""

    def __init__(self, pattern: str, ends: str, *, repeats: bool = False) -> None:
        self.named = self.plain = pattern
        self.ends, self.least, self.repeats = ends, 0, repeats


class _Row(_Node):
    def __init__(self, items: Sequence[_Node]) -> None:
        self._items = items
        self.named = "".join(item.named for item in items)
        self.plain = "".join(item.plain for item in items)
        self.least = sum(item.least for item in items)
        self.repeats = any(item.repeats for item in items)
        self.ends = _NEVER
        for item in reversed(items):
            self.ends = f"(?:{item.ends}|{item.plain}{self.ends})"

    def growing(self, rest: str) -> str:
        for item in reversed(self._items):
            rest = item.growing(rest)
            if len(rest) > _MAX_WRITTEN_CHARS:
                raise ValueError("it has too many alternatives")
        return rest


class _Group(_Node):
    """Alternatives; opening: the group's own, "" for a whole pattern."""

    def __init__(self, rows: Sequence[_Row], opening: str) -> None:
        self._rows = rows
        named = "|".join(row.named for row in rows)
        self.named = f"{opening}{named})" if opening else named
        self.plain = f"(?:{'|'.join(row.plain for row in rows)})"
        self.ends = f"(?:{'|'.join(row.ends for row in rows)})"
        self.least = min(row.least for row in rows)
        self.repeats = any(row.repeats for row in rows)

    def growing(self, rest: str) -> str:
        return f"(?:{'|'.join(row.growing(rest) for row in self._rows)})"


class _Repeated(_Node):
    def __init__(self, item: _Node, low: int, high: int, lazy: str) -> None:
        self._item, self._lazy = item, lazy
        self.named = f"{item.named}{{{low},{high}}}{lazy}"
        self.plain = f"{item.plain}{{{low},{high}}}{lazy}"
        self.ends = f"(?:{item.plain}{{0,{high - 1}}}{lazy}{item.ends})" if high else _NEVER
        self.least = item.least * low
        self.repeats = True

    def growing(self, rest: str) -> str:
        # What would repeat once more comes first, or behind all that goes on without.
        ways = [self.ends, f"{self.plain}{rest}"]
        return f"(?:{'|'.join(reversed(ways) if self._lazy else ways)})"


class _Reader:
    """Python's syntax, but for what looks back."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._num_open = 0

    def all(self) -> _Group:
        group = _Group(self._rows(), "")
        if self._at < len(self._pattern):
            raise ValueError("a parenthesis is closed that is not open")
        if self._num_open > _MAX_OPEN_REPEATS:
            raise ValueError(f"it has {self._num_open} repetitions without an end; at most {_MAX_OPEN_REPEATS} may be")
        return group

    def _rows(self) -> list[_Row]:
        rows = [self._row()]
        while self._pattern.startswith("|", self._at):
            self._at += 1
            rows.append(self._row())
        return rows

    def _row(self) -> _Row:
        items: list[_Node] = []
        chars: list[str] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            item = self._char() or self._item()
            repeat = _REPEAT.match(self._pattern, self._at)
            if repeat is None and isinstance(item, str):
                chars.append(item)
                continue
            items += [_Text(chars)] if chars else []
            chars = []
            node = _Text([item]) if isinstance(item, str) else item
            items.append(node if repeat is None else self._repeated(node, repeat))
        return _Row([*items, *([_Text(chars)] if chars else [])])

    def _char(self) -> str | None:
        """One character, as the pattern writes it, or a set."""
        for kind in (_PLAIN, _CHAR_ESCAPE, _SET):
            found = kind.match(self._pattern, self._at)
            if found is not None:
                self._at = found.end()
                return found[0]
        if self._pattern[self._at] == ".":
            self._at += 1
            return "."
        return None

    def _item(self) -> _Node:
        """A group or an edge. Raises ValueError for all else."""
        for edge, ends in ((r"\Z", r"\Z"), (r"\b", r"\Z"), (r"\B", r"\Z"), ("$", r"(?=\n?\Z)")):
            if self._pattern.startswith(edge, self._at):
                self._at += len(edge)
                return _Edge(edge, ends)
        opening = re.compile(r"\((?:\?(?:[:=!]|P<\w+>))?(?!\?)").match(self._pattern, self._at)
        if opening is None:
            raise ValueError(f"{self._pattern[self._at : self._at + 4]!r} is not read here")
        self._at = opening.end()
        group = _Group(self._rows(), "(?:" if opening[0] == "(" else opening[0])
        self._at += 1
        if opening[0] in ("(?=", "(?!"):
            if "?P<" in group.named:
                raise ValueError("a named group stands in what is only looked at")
            return _Edge(group.named, group.ends, repeats=group.repeats)
        return group

    def _repeated(self, item: _Node, repeat: re.Match[str]) -> _Repeated:
        self._at = repeat.end()
        lazy = "?" if self._pattern.startswith("?", self._at) else ""
        self._at += len(lazy)
        if self._pattern.startswith("+", self._at):
            raise ValueError("a possessive repetition is not read here")
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(repeat[0], (int(repeat[1] or 0), None))
        if repeat[0].startswith("{"):
            high = low if not repeat[2] else int(repeat[3]) if repeat[3] else None
        self._num_open += high is None
        high = MAX_REPEAT if high is None else high
        if high > MAX_REPEAT or low > high:
            raise ValueError(f"it repeats something {max(low, high)} times; at most {MAX_REPEAT} are taken")
        if item.repeats and high > 1:
            raise ValueError("a repetition stands in a repetition")
        if isinstance(item, _Edge):
            raise ValueError("what matches no character is repeated")
        return _Repeated(item, low, high, lazy)
