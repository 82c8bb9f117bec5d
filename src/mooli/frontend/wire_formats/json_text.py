"""JSON as a model writes it, character by character.

Owns where a value ends, and what of it is certain. Text goes through as it is: nothing is read into numbers and written
again, so that big integers and white space stay. Only what every reader of JSON would refuse, and what can mean one
thing, is written right: a raw line break in a string, an unknown escape, Python's True, False and None.

Source: RFC 8259.
"""

from __future__ import annotations

import json
import re
from typing import Literal

_SPACES = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_HALF_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_WORD = re.compile(r"[-+.0-9A-Za-z_]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")

_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_CLOSING = {"{": "}", "[": "]"}

_State = Literal["value", "first value", "key", "first key", "colon", "next", "string", "key string"]


class JsonScanner:
    """One JSON value in text that grows. It may be of any kind; a caller that wants an object looks for `{` first.

    is_over: the value is whole; what follows is not its. is_broken: it is no JSON, from the next character on.
    """

    def __init__(self) -> None:
        self.is_over = False
        self.is_broken = False
        self._state: _State = "value"
        self._open: list[str] = []

    def feed(self, text: str, *, is_last: bool = False) -> tuple[str, int]:
        """What is certain now, as JSON, and of how many characters of `text` it was made.

        What is left of `text` (half an escape, a number that may go on) is to be given again with what follows it.
        is_last: nothing follows, so that a number ends.
        """
        found: list[str] = []
        at = 0
        while at < len(text) and not self.is_over and not self.is_broken:
            step = self._string if self._state in ("string", "key string") else self._mark
            piece, end = step(text, at, is_last)
            if end == at and not self.is_over:
                break
            found.append(piece)
            at = end
        return "".join(found), at

    def _string(self, text: str, at: int, is_last: bool) -> tuple[str, int]:
        end = _PLAIN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing as well
        if end > at:
            return text[at:end], end
        char = text[at]
        if char == '"':
            if self._state == "key string":
                self._state = "colon"
            else:
                self._value_is_over()
            return char, at + 1
        if char != "\\":
            return json.dumps(char)[1:-1], at + 1
        escape = _ESCAPE.match(text, at)
        if escape:
            return escape[0], escape.end()
        return ("", at) if _HALF_ESCAPE.fullmatch(text, at) else ("\\\\", at + 1)

    def _mark(self, text: str, at: int, is_last: bool) -> tuple[str, int]:
        """White space, or what stands between strings."""
        end = _SPACES.match(text, at).end()  # type: ignore[union-attr]
        if end > at:
            return text[at:end], end
        char, state = text[at], self._state
        if self._open and char == _CLOSING[self._open[-1]] and state in ("next", "first key", "first value"):
            self._open.pop()
            self._value_is_over()
        elif char == "," and state == "next":
            self._state = "key" if self._open[-1] == "{" else "value"
        elif char == ":" and state == "colon":
            self._state = "value"
        elif char == '"' and state in ("key", "first key"):
            self._state = "key string"
        elif char == '"' and state in ("value", "first value"):
            self._state = "string"
        elif char in _CLOSING and state in ("value", "first value"):
            self._open.append(char)
            self._state = "first key" if char == "{" else "first value"
        elif state in ("value", "first value"):
            return self._word(text, at, is_last)
        else:
            self.is_broken = True
            return "", at
        return char, at + 1

    def _word(self, text: str, at: int, is_last: bool) -> tuple[str, int]:
        """A number or one of the three words, told when it is whole."""
        found = _WORD.match(text, at)
        if found is not None and found.end() == len(text) and not is_last:
            return "", at
        word = "" if found is None else found[0]
        if word not in _WORDS and not _NUMBER.fullmatch(word):
            self.is_broken = True
            return "", at
        self._value_is_over()
        return _WORDS.get(word, word), at + len(word)

    def _value_is_over(self) -> None:
        self.is_over = not self._open
        self._state = "next"
