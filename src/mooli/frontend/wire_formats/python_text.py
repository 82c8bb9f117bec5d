"""Keyword arguments of a Python call as JSON, character by character.

Owns where the arguments end, and what of them is certain. Literals only: texts, numbers, True, False, None (and JSON's
words for them), lists, tuples, and dicts with keys that are texts. Never evaluates anything.

Source: the Python Language Reference, chapter 2.
"""

from __future__ import annotations

import json
import re
from typing import Literal

_SPACES = re.compile(r"\s*")
_NAME = re.compile(r"[^\W\d]\w*")
_STARS = re.compile(r"\*\*\s*\{")
_HALF_STARS = re.compile(r"\*{1,2}\s*")
_WORD = re.compile(r"[-+.\w]+")
_NUMBER = re.compile(r"(-?)0*([0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_OTHER_BASE = re.compile(r"(-?)(0[xX][0-9a-fA-F]{1,64}|0[oO][0-7]{1,64}|0[bB][01]{1,256})")
_PLAIN = re.compile(r"[^\"'\\\x00-\x1f]+")
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|[^xuU0-7])", re.DOTALL)
_LONGEST_ESCAPE = 10

_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {
    "n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\n": "",
    "\\": "\\", "'": "'", '"': '"',
}  # fmt: skip

_Inside = Literal["call", "**", "{", "[", "("]
_CLOSING: dict[_Inside, str] = {"call": ")", "**": "}", "{": "}", "[": "]", "(": ")"}
_JSON_CLOSING: dict[_Inside, str] = {"call": "}", "**": "", "{": "}", "[": "]", "(": "]"}


class PythonScanner:
    """The keyword arguments of one call, from behind its `(`, as one JSON object. `**{…}` is one as well.

    is_over: the `)` is read. is_broken: what comes next is no literal.
    """

    def __init__(self) -> None:
        self.is_over = False
        self.is_broken = False
        self._open: list[_Inside] = ["call"]
        self._state: Literal["item", "value", "separator", "next", "text"] = "item"
        """What may come: an item or the end; a value behind a key; what follows a key; what follows an item; more of a
        text."""
        self._before_item = "{"
        """JSON that waits for what comes next: a comma may be the last."""
        self._quote = ""
        self._is_raw = self._is_key = False

    def feed(self, text: str, *, is_last: bool = False) -> tuple[str, int]:
        """As `mooli.frontend.wire_formats.json_text.JsonScanner` has it."""
        found: list[str] = []
        at = 0
        while at < len(text) and not self.is_over and not self.is_broken:
            step = self._text if self._state == "text" else self._mark
            piece, end = step(text, at, is_last)
            if end == at:
                break
            found.append(piece)
            at = end
        return "".join(found), at

    # -- between texts
    def _mark(self, text: str, at: int, is_last: bool) -> tuple[str, int]:
        end = _SPACES.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing as well
        if end > at:
            return "", end
        char, inside, state = text[at], self._open[-1], self._state
        if char == _CLOSING[inside] and state in ("item", "next"):
            return self._close(), at + 1
        if char == "," and state == "next":
            self._state, self._before_item = "item", ", "
            return "", at + 1
        if char == ("=" if inside == "call" else ":") and state == "separator":
            self._state = "value"
            return ": ", at + 1
        if state == "item" and inside == "call":
            return self._keyword(text, at, is_last)
        if state in ("item", "value"):
            return self._value(text, at, is_last)
        return self._broken(at)

    def _broken(self, at: int) -> tuple[str, int]:
        self.is_broken = True
        return "", at

    def _item(self, json_text: str) -> str:
        before, self._before_item = self._before_item, ""
        return before + json_text

    def _close(self) -> str:
        closed = self._open.pop()
        is_empty = self._state == "item" and self._before_item == "{"
        self.is_over = not self._open
        if closed == "**":
            self._state = "item" if is_empty else "next"
            return ""
        said = self._item("") if is_empty else ""
        self._state, self._before_item = "next", ""
        return said + _JSON_CLOSING[closed]

    def _keyword(self, text: str, at: int, is_last: bool) -> tuple[str, int]:
        name = _NAME.match(text, at)
        if name is not None:
            if name.end() == len(text) and not is_last:
                return "", at
            self._state = "separator"
            return self._item(json.dumps(name[0], ensure_ascii=False)), name.end()
        stars = _STARS.match(text, at)
        if stars is not None:
            self._open.append("**")
            return "", stars.end()
        return ("", at) if _HALF_STARS.fullmatch(text, at) else self._broken(at)

    def _value(self, text: str, at: int, is_last: bool) -> tuple[str, int]:
        self._is_key = self._state == "item" and self._open[-1] in ("{", "**")
        char = text[at]
        if char in "\"'":
            return self._begin_text(text, at, is_last, is_raw=False)
        if self._is_key:
            return self._broken(at)
        if char in "{[(":
            self._open.append("{" if char == "{" else "[" if char == "[" else "(")
            said = self._item("{" if char == "{" else "[")
            self._state = "item"
            return said, at + 1
        word = _WORD.match(text, at)
        if word is None:
            return self._broken(at)
        end = word.end()
        if end == len(text) and not is_last:
            return "", at
        if word[0] in ("r", "R", "u", "U") and text[end : end + 1] in ("'", '"'):
            said, behind = self._begin_text(text, end, is_last, is_raw=word[0] in "rR")
            return said, at if behind == end else behind
        literal = _WORDS.get(word[0]) or _number(word[0])
        if literal is None:
            return self._broken(at)
        self._state = "next"
        return self._item(literal), end

    # -- texts
    def _begin_text(self, text: str, at: int, is_last: bool, *, is_raw: bool) -> tuple[str, int]:
        char, three = text[at], text[at : at + 3]
        if len(three) < 3 and three == char * len(three) and not is_last:
            return "", at
        self._quote = three if three == char * 3 else char
        self._is_raw = is_raw
        self._state = "text"
        return self._item('"'), at + len(self._quote)

    def _text(self, text: str, at: int, is_last: bool) -> tuple[str, int]:
        plain = _PLAIN.match(text, at)
        if plain is not None:
            return plain[0], plain.end()
        char, quote = text[at], self._quote
        if text.startswith(quote, at):
            self._state = "separator" if self._is_key else "next"
            return '"', at + len(quote)
        if char in "\"'":
            is_open = len(text) - at < len(quote) and quote.startswith(text[at:]) and not is_last
            return ("", at) if is_open else ('\\"' if char == '"' else char, at + 1)
        if char != "\\":
            return _json_chars(char), at + 1
        if self._is_raw:
            return (_json_chars(text[at : at + 2]), at + 2) if at + 1 < len(text) else ("", at)
        return self._escape(text, at, is_last)

    def _escape(self, text: str, at: int, is_last: bool) -> tuple[str, int]:
        found = _ESCAPE.match(text, at)
        if found is None:
            return ("", at) if len(text) - at < _LONGEST_ESCAPE and not is_last else self._broken(at)
        kind, end = found[0][1], found.end()
        if kind in "01234567":
            if end == len(text) and end - at < 4 and not is_last:
                return "", at  # there may be another digit
            return _json_chars(chr(int(found[0][1:], 8))), end
        if kind not in "xuU":
            return _json_chars(_ESCAPES.get(kind, found[0])), end
        code = int(found[0][2:], 16)
        if code > 0x10FFFF:
            return self._broken(at)
        # Two halves of a pair are one character in JSON too.
        return f"\\u{code:04x}" if 0xD800 <= code < 0xE000 else _json_chars(chr(code)), end


def _json_chars(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _number(word: str) -> str | None:
    """A number as JSON writes it, digit for digit; None if it is none."""
    word = word.replace("_", "").removeprefix("+")
    other = _OTHER_BASE.fullmatch(word)
    if other is not None:
        return other[1] + str(int(other[2], 0))
    found = _NUMBER.fullmatch(word)
    if found is None or not re.match(r"-?\.?[0-9]", word):
        return None
    sign, whole, fraction, exponent = found.groups(default="")
    return f"{sign}{whole or '0'}{fraction + '0' if fraction == '.' else fraction}{exponent}"
