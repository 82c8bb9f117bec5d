"""Where a text may be cut in two that are tokenised apart: the ids of both are those of the whole.

Owns the proof, read off the steps that a tokenizer declares. A place between two characters is safe if no step can take
both at once: then what stands before it is the same whatever follows, and the other way round. What is not understood
allows no cut. Never tokenises.

Of all pairs of characters those are looked at that texts have often: a Latin letter or a Chinese character before a
space, the end of a line or a Chinese punctuation mark. A regular expression cuts there if (1) no way through it takes
the first and then the second, and (2) it always takes the first. For (1) each part of it has a set of what it may begin
and end with and of pairs that it may take, larger than the truth where that is hard to know; for (2) there is a set of
what it surely takes alone, smaller than the truth. The like sets are Glushkov's ("The abstract theory of automata",
1961). Of a vocabulary without such expressions, no token may have the pair in it: then no merge joins the two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_KINDS = {"a": ("a", "z"), "A": ("A", "Z"), "汉": ("\u4e00", "\u9fa5"), " ": " ", "\n": "\n", "。": "。", "，": "，"}
"""Of characters; each stands for all from the first to the last of a range."""

_LEFT, _RIGHT = "aA汉", " \n。，"
_ALL = frozenset(_KINDS)
_NONE: frozenset[str] = frozenset()
_SPACES = frozenset(" \n")
_LETTERS = frozenset(_LEFT)

_PROPERTIES = {
    **dict.fromkeys(("L", "Letter"), _LETTERS),
    "Lu": frozenset("A"),
    "Ll": frozenset("a"),
    **dict.fromkeys(("Lo", "Han"), frozenset("汉")),
    **dict.fromkeys(("Lt", "Lm", "M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "Number"), _NONE),
    **dict.fromkeys(("S", "Sm", "Sc", "Sk", "So", "Pd", "Ps", "Pe", "Pc", "Pi", "Pf"), _NONE),
    **dict.fromkeys(("P", "Po"), frozenset("。，")),
    **dict.fromkeys(("Z", "Zs"), frozenset(" ")),
}
_CLASSES = {"s": _SPACES, "d": _NONE, "w": _LETTERS}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}

_QUANTIFIER = re.compile(r"(?:([?*+])|\{(\d*)(,?)(\d*)\})([?+]*)")

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What a ByteLevel step cuts by."""

_STEPS_AS_PATTERNS = {
    "Whitespace": r"\w+|[^\w\s]+",
    "WhitespaceSplit": r"\S+",
    "BertPreTokenizer": r"[^\s\p{P}]+|\p{P}",
}

_HARMLESS_EXPRESSIONS = (r"\A +| +\z", " {2,}")
"""That normalizers replace: spaces at both ends of a text, and where there are several."""

Pairs = frozenset[tuple[str, str]]


class _UnknownError(Exception):
    """Nothing can be said of it."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Of an expression. nullable: it may take nothing. first, last: what it may begin and end with. pairs: what it may
    take one after the other. sure: characters that it takes alone, wherever they stand."""

    nullable: bool = False
    first: frozenset[str] = _NONE
    last: frozenset[str] = _NONE
    pairs: Pairs = frozenset()
    sure: frozenset[str] = _NONE

    def then(self, other: _Part, is_greedy: bool) -> _Part:
        """is_greedy: what `self` has taken it does not give back."""
        kept = other.sure - self.first if is_greedy else other.sure
        sure = (kept if self.nullable else _NONE) | (self.sure if other.nullable else _NONE)
        return _Part(
            self.nullable and other.nullable,
            self.first | (other.first if self.nullable else _NONE),
            other.last | (self.last if other.nullable else _NONE),
            self.pairs | other.pairs | frozenset(product(self.last, other.first)),
            sure,
        )

    def either(self, other: _Part) -> _Part:
        return _Part(
            self.nullable or other.nullable,
            self.first | other.first,
            self.last | other.last,
            self.pairs | other.pairs,
            self.sure | other.sure,
        )

    def repeated(self, least: int, is_once: bool) -> _Part:
        again: Pairs = frozenset() if is_once else frozenset(product(self.last, self.first))
        sure = self.sure if least <= 1 else _NONE
        return _Part(self.nullable or least == 0, self.first, self.last, self.pairs | again, sure)


_EMPTY = _Part(nullable=True)


def _one_of(may: frozenset[str], sure: frozenset[str]) -> _Part:
    return _Part(False, may, may, frozenset(), sure)


class _Expression:
    """Reads what of regular expressions pre-tokenizers are written in."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self.part = self._alternatives(ignores_case=False)
        if self._at < len(pattern):
            raise _UnknownError

    def _peek(self, num_chars: int = 1) -> str:
        return self._text[self._at : self._at + num_chars]

    def _take(self, num_chars: int = 1) -> str:
        taken = self._peek(num_chars)
        if len(taken) < num_chars:
            raise _UnknownError
        self._at += num_chars
        return taken

    def _alternatives(self, *, ignores_case: bool) -> _Part:
        found = self._sequence(ignores_case)
        while self._peek() == "|":
            self._take()
            found = found.either(self._sequence(ignores_case))
        return found

    def _sequence(self, ignores_case: bool) -> _Part:
        whole, previous, is_greedy = _EMPTY, _EMPTY, False
        while self._peek() not in ("", "|", ")"):
            if self._peek(6) == r"(?!\S)":
                # It looks at one character behind a space: never at what stands behind a letter.
                if previous.nullable or not previous.last <= _SPACES:
                    raise _UnknownError
                self._take(6)
                whole = _Part(whole.nullable, whole.first, whole.last, whole.pairs)
                continue
            atom, holds = self._quantified(ignores_case)
            whole = whole.then(atom, is_greedy)
            is_greedy = is_greedy or holds
            previous = atom
        return whole

    def _quantified(self, ignores_case: bool) -> tuple[_Part, bool]:
        """An atom as often as it may come, and whether it keeps what it has taken."""
        atom = self._atom(ignores_case)
        found = _QUANTIFIER.match(self._text, self._at)
        if found is None:
            return atom, False
        self._at = found.end()
        sign, low, comma, high, suffix = found.groups()
        least = {"?": 0, "*": 0, "+": 1}[sign] if sign else int(low or 0)
        is_once = sign == "?" or (not sign and (high if comma else low) in ("0", "1"))
        return atom.repeated(least, is_once and not suffix), "+" in suffix

    def _atom(self, ignores_case: bool) -> _Part:
        char = self._take()
        if char == "(":
            if self._peek() == "?":
                head = self._take(2)
                if head == "?i":
                    ignores_case = True
                    head = self._take()
                if head not in ("?:", ":"):
                    raise _UnknownError
            inside = self._alternatives(ignores_case=ignores_case)
            if self._take() != ")":
                raise _UnknownError
            return inside
        if char == "[":
            return _one_of(*self._class())
        if char == "\\":
            found = self._escaped()
            return _one_of(*(_range(found, found) if isinstance(found, str) else found))
        if char == ".":
            return _one_of(_ALL, _NONE)
        if char in "^$*+?{}":
            raise _UnknownError
        if ignores_case and char.isalpha():
            return _one_of(frozenset("aA"), _NONE)
        return _one_of(*_range(char, char))

    def _class(self) -> tuple[frozenset[str], frozenset[str]]:
        """What it may match, and what it matches all of."""
        is_negated = self._peek() == "^"
        if is_negated:
            self._take()
        may = sure = _NONE
        while (char := self._take()) != "]":
            if char == "[" or (char == "&" and self._peek() == "&"):
                raise _UnknownError
            found: str | tuple[frozenset[str], frozenset[str]] = self._escaped() if char == "\\" else char
            if isinstance(found, str) and self._peek() == "-" and self._peek(2) != "-]":
                self._take()
                end = self._take()
                last = self._escaped() if end == "\\" else end
                if not isinstance(last, str) or last < found:
                    raise _UnknownError
                found = _range(found, last)
            elif isinstance(found, str):
                found = _range(found, found)
            may, sure = may | found[0], sure | found[1]
        return (_ALL - sure, _ALL - may) if is_negated else (may, sure)

    def _escaped(self) -> str | tuple[frozenset[str], frozenset[str]]:
        char = self._take()
        if char in "pP":
            end = self._text.find("}", self._at)
            name = self._text[self._at + 1 : end]
            if self._peek() != "{" or end < 0 or name.lstrip("^") not in _PROPERTIES:
                raise _UnknownError
            self._at = end + 1
            kinds = _PROPERTIES[name.lstrip("^")]
            kinds = _ALL - kinds if (char == "P") != name.startswith("^") else kinds
            return kinds, kinds
        if char.lower() in _CLASSES:
            kinds = _CLASSES[char.lower()]
            kinds = _ALL - kinds if char.isupper() else kinds
            return kinds, kinds
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char.isalnum():
            raise _UnknownError
        return char


def _range(first: str, last: str) -> tuple[frozenset[str], frozenset[str]]:
    """The kinds of which some characters lie there, and those of which all do."""
    may = frozenset(name for name, kind in _KINDS.items() if first <= kind[-1] and kind[0] <= last)
    return may, frozenset(name for name in may if first <= _KINDS[name][0] and _KINDS[name][-1] <= last)


@dataclass(slots=True)
class _Proof:
    """left, right: characters that normalizers leave alone. joined: pairs that a step may take at once. cut: what comes
    before a cut if the pair is not joined. writes_spaces: as "▁"."""

    left: frozenset[str] = _LETTERS
    right: frozenset[str] = frozenset(_RIGHT)
    joined: set[tuple[str, str]] = field(default_factory=set)
    cut: frozenset[str] = _NONE
    writes_spaces: bool = False


def safe_cuts(backend: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """Finds the characters before which a text may be cut; None where nothing is known of any.

    What follows a cut must be tokenised with an "a" before it, whose ids are left out: steps that only happen at the
    beginning of a text (a space put before it, say) do not happen there.
    """
    from tokenizers import models

    proof = _Proof()
    model = backend.model
    if getattr(model, "dropout", None):
        return None
    try:
        for step in _steps(backend.normalizer):
            _normalized(proof, step)
        steps = _steps(backend.pre_tokenizer)
        is_written = any(step["type"] in ("ByteLevel", "Metaspace") for step in steps[:-1])
        if is_written:  # what comes behind sees other characters
            return None
        for step in steps:
            _pre_tokenized(proof, step)
    except _UnknownError:
        return None
    _added(proof, backend)
    if isinstance(model, models.BPE) and not any(step["type"] == "ByteLevel" for step in steps):
        pairs = _kept_by_merges(proof, backend, model)
    else:
        pairs = set()
    pairs |= set(product(proof.cut, _RIGHT))
    pairs = {pair for pair in pairs if pair[0] in proof.left and pair[1] in proof.right} - proof.joined
    pairs = {pair for pair in pairs if ("a", pair[1]) in pairs}
    if not pairs:
        return None
    ways = []
    for left in sorted({left for left, _ in pairs}):
        rights = "".join(right for right in _RIGHT if (left, right) in pairs)
        first, last = _KINDS[left]
        ways.append(f"(?<=[{first}-{last}])[{rights}]")
    return re.compile("|".join(ways))


def _steps(part: Any) -> list[dict[str, Any]]:
    """In order, sequences taken apart."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    steps = []
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting[:0] = step.get("normalizers") or step.get("pretokenizers") or []
        else:
            steps.append(step)
    return steps


def _normalized(proof: _Proof, step: dict[str, Any]) -> None:
    kind = step["type"]
    if kind in ("NFKC", "NFKD"):  # they write wide commas as others
        proof.right -= frozenset("。，")
    elif kind == "BertNormalizer":  # it puts spaces around Chinese characters
        proof.left -= frozenset("汉")
    elif kind == "Replace":
        pattern, content = step["pattern"], step["content"]
        if pattern == {"String": " "} and content == "▁":
            proof.writes_spaces = True
        elif "String" in pattern:
            if not pattern["String"] or any(_range(char, char)[0] for char in pattern["String"]):
                raise _UnknownError
        elif pattern["Regex"] not in _HARMLESS_EXPRESSIONS or proof.writes_spaces:
            raise _UnknownError
    elif kind not in ("NFC", "NFD", "Lowercase", "StripAccents", "Prepend", "Strip"):
        raise _UnknownError


def _pre_tokenized(proof: _Proof, step: dict[str, Any]) -> None:
    kind = step["type"]
    if kind == "Split" and "String" in step["pattern"]:
        if step["pattern"]["String"] != " " or not proof.writes_spaces:
            raise _UnknownError
    elif kind == "Split":
        if step["behavior"] not in ("Isolated", "Removed"):
            raise _UnknownError
        _cut_by(proof, step["pattern"]["Regex"])
    elif kind == "ByteLevel":
        if step["use_regex"]:
            _cut_by(proof, _GPT2_SPLIT)
    elif kind in _STEPS_AS_PATTERNS:
        _cut_by(proof, _STEPS_AS_PATTERNS[kind])
    elif kind == "Metaspace":
        if step["replacement"] != "▁":
            raise _UnknownError
        proof.writes_spaces = True
        if step.get("split", True):
            proof.cut |= _LETTERS
            proof.joined |= set(product(_LEFT, frozenset(_RIGHT) - {" "}))
    elif kind != "Digits" and (kind != "Punctuation" or step["behavior"] != "Isolated"):
        raise _UnknownError


def _cut_by(proof: _Proof, pattern: str) -> None:
    if proof.writes_spaces:
        raise _UnknownError
    part = _Expression(pattern).part
    if part.nullable:  # where it matches nothing, a character is left out
        raise _UnknownError
    proof.joined |= part.pairs
    proof.cut |= part.sure


def _added(proof: _Proof, backend: tokenizers.Tokenizer) -> None:
    """Added tokens are looked for before all else, and some take spaces beside them, or none beside letters."""
    for token in backend.get_added_tokens_decoder().values():
        text = token.content
        if token.single_word and (token.normalized or _range(text[0], text[0])[0] & frozenset(_RIGHT)):
            proof.right = _NONE
        for i, char in enumerate(text):
            left = _range(char, char)[0] & _LETTERS
            follows = text[i + 1 : i + 2]
            is_space = follows.isspace() or (not follows and token.rstrip)
            right = _SPACES if is_space else (_range(follows, follows)[0] if follows else _NONE)
            proof.joined |= set(product(left, right))


def _kept_by_merges(proof: _Proof, backend: tokenizers.Tokenizer, model: Any) -> set[tuple[str, str]]:
    """Pairs that no token has in it. A character without a token must not become one with others that have none."""
    if model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix:
        return set()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    has_all_bytes = model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    kinds = [kind for kind in _LEFT if has_all_bytes or _all_known(vocabulary, *_KINDS[kind])]
    pieces = "\0".join(vocabulary)
    space = "▁" if proof.writes_spaces else " "
    return {
        (left, right)
        for left, right in product(kinds, _RIGHT)
        if not re.search(f"[{_KINDS[left][0]}-{_KINDS[left][-1]}]{space if right == ' ' else right}", pieces)
    }


def _all_known(vocabulary: Iterable[str], first: str, last: str) -> bool:
    return all(chr(code) in vocabulary for code in range(ord(first), ord(last) + 1))
