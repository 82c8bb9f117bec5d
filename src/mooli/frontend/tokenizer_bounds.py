"""What a tokenizer file can make of a text, before any text is given to it.

Owns two bounds, read off the steps that the file declares: how much longer a text can become on its way (a file of
three `Replace` that each make a thousand characters of one would need a billion times its memory), and how many
characters one token can stand for. Never tokenises.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mooli.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

MAX_GROWTH = 1024
"""Most characters that a file's own steps may make of one. Published ones stay below 40."""

_MAX_TOKEN_CHARS = 4096
_MAX_STEPS = 256
_MAX_ADDED_IDS = 1024
_MAX_AFFIX_CHARS = 64
_MAX_WORD_CHARS = 256
_MAX_ADDED_TOKENS = 1 << 18

_BYTE_LEVEL_CHARS = 4
"""A character has at most four bytes, and the byte-level alphabet writes each as a character."""

_LONGEST_IN_UNICODE = 18
"""Characters that Unicode's own compatibility forms make of one at most; tables of files repeat them."""

_MOST_COMPOSED = 4
"""Characters that Unicode's composition makes one of at most."""

_KEEPS_LENGTH = ("NFD", "NFKD", "Lowercase", "ByteLevel", "Prepend", "Digits", "Metaspace", "UnicodeScripts")
_COMPOSES = ("NFC", "NFKC")
_SPLITS = ("Split", "Punctuation")
_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")


@dataclass(frozen=True, slots=True)
class TextBounds:
    """growth: characters that one becomes at most, Unicode's forms and a byte-level alphabet not counted.
    ascii_chars_per_token, chars_per_token: characters of an ASCII text, of any text, that one token stands for at most;
    None where a text may shrink without end. skips_spaces: but for whitespace, of which a token may take any number.
    vanishing: characters that the vocabulary leaves out."""

    growth: float = 1.0
    ascii_chars_per_token: int | None = None
    chars_per_token: int | None = None
    skips_spaces: bool = False
    vanishing: str = ""


def check_file(file: Mapping[str, Any]) -> None:
    """Look at a tokenizer.json before the library does: loading it already sends its added tokens through its steps.

    Raises TokenizerError for steps that multiply texts or repeat them, and for more added tokens than a model has; any
    other error for what is no such file.
    """
    check_added_count(len(file.get("added_tokens") or ()))
    _check_growth([*_steps(file.get("normalizer")), *_steps(file.get("pre_tokenizer"))], "texts")
    _check_growth(_steps(file.get("decoder")), "answers")
    _check_added_ids(_steps(file.get("post_processor")))


def text_bounds(backend: tokenizers.Tokenizer, longest_token: int) -> TextBounds:
    """longest_token: characters of the longest token of the vocabulary.

    Raises TokenizerError for a vocabulary whose texts would take a memory or time beyond all measure.
    """
    check_longest(longest_token)
    _check_model(backend.model)
    steps = [step for part in (backend.normalizer, backend.pre_tokenizer) if part for step in _steps(_state(part))]
    growth, shrink = _growth(steps), _shrink(steps)
    vanishing = _vanishing(backend, steps)
    if shrink is None or vanishing is None:
        return TextBounds(growth)
    composed = _MOST_COMPOSED if any(step["type"] in _COMPOSES for step in steps) else 1
    longest = math.ceil(max(1, longest_token) * shrink)
    added = backend.get_added_tokens_decoder().values()
    skips_spaces = any(token.lstrip or token.rstrip for token in added)
    return TextBounds(growth, longest, longest * composed, skips_spaces, vanishing)


def check_longest(num_chars: int) -> None:
    """Raise TokenizerError for a token that no text should become of one id."""
    if num_chars > _MAX_TOKEN_CHARS:
        raise TokenizerError(
            f"the vocabulary has a token of {num_chars} characters; at most {_MAX_TOKEN_CHARS} are read"
        )


def check_added_count(count: int) -> None:
    """Raise TokenizerError for more added tokens than a model has: each is looked for in every text."""
    if count > _MAX_ADDED_TOKENS:
        raise TokenizerError(f"the tokenizer has {count} added tokens; at most {_MAX_ADDED_TOKENS} are read")


def _check_growth(steps: Iterable[dict[str, Any]], what: str) -> None:
    growth = _growth(steps)
    if growth > MAX_GROWTH:
        raise TokenizerError(
            f"the steps of the tokenizer can make {what} {growth:.3g} times as long; more than {MAX_GROWTH} times is"
            " refused, as no published model needs that. Fetch its tokenizer again from a source that you trust"
        )


def _state(part: Any) -> Any:
    return json.loads(part.__getstate__())


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder in order, sequences taken apart."""
    found = [] if part is None else list(_flat(part))
    if len(found) > _MAX_STEPS:
        raise TokenizerError(f"a part of the tokenizer has {len(found)} steps; at most {_MAX_STEPS} are read")
    return found


def _flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if step["type"] != "Sequence":
        yield step
        return
    for name in _PARTS:
        for part in step.get(name, ()):
            yield from _flat(part)


def _growth(steps: Iterable[dict[str, Any]]) -> float:
    growth = 1.0
    is_byte_level = False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            # Once it is how such vocabularies work; again and again it doubles what is no ASCII each time.
            growth *= _BYTE_LEVEL_CHARS if is_byte_level else 1
            is_byte_level = True
        elif kind == "Replace":
            growth *= _replaced(step)
        elif kind == "Prepend":
            growth *= 1 + len(step["prepend"])
        elif kind == "Precompiled":
            growth *= max(1.0, _longest_of_table(step["precompiled_charsmap"]) / _LONGEST_IN_UNICODE)
        elif kind == "BertNormalizer":
            growth *= 3  # spaces around Chinese characters
        elif kind in ("WordPiece", "BPEDecoder"):
            growth *= 2
    return growth


def _replaced(step: dict[str, Any]) -> float:
    pattern, content = step["pattern"], len(step["content"])
    if "String" in pattern:
        return max(1.0, content / max(1, len(pattern["String"])))
    return 1.0 + content  # an expression may match between any two characters


def _longest_of_table(encoded: str) -> int:
    """Longest replacement in SentencePiece's table: a trie behind its size, then texts with a zero after each."""
    try:
        data = base64.b64decode(encoded)
        return max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")))
    except (ValueError, binascii.Error) as exc:
        raise TokenizerError(f"the character table of the normalizer is damaged: {exc}") from exc


def _shrink(steps: Iterable[dict[str, Any]]) -> float | None:
    """Characters, not counting Unicode's composition, that the steps make one of at most; None if there is no limit."""
    shrink = 1.0
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and step["content"] and "String" in step["pattern"]:
            shrink *= max(1.0, len(step["pattern"]["String"]) / len(step["content"]))
        elif kind in _SPLITS:
            if step.get("behavior") == "Removed":
                return None
        elif kind not in _KEEPS_LENGTH and kind not in _COMPOSES:
            return None
    return shrink


def _vanishing(backend: tokenizers.Tokenizer, steps: Iterable[dict[str, Any]]) -> str | None:
    """Characters that become no token and no part of one; None where others may be left out, or taken together as
    unknown."""
    from tokenizers import models

    if not isinstance(backend.model, models.BPE):
        return None
    if not any(step["type"] == "ByteLevel" for step in steps):
        bytes_as_tokens = (f"<0x{byte:02X}>" for byte in range(256))
        has_all = backend.model.byte_fallback and all(backend.token_to_id(t) is not None for t in bytes_as_tokens)
        return "" if has_all else None
    # A vocabulary lacks the bytes that its training texts did not have. A character of several bytes is still seen by
    # those after its first.
    missing = {byte for char, byte in byte_level_alphabet().items() if backend.token_to_id(char) is None}
    if not missing.isdisjoint(range(0x80, 0xC0)):
        return None
    vanishing = "".join(map(chr, sorted(byte for byte in missing if byte < 0x80)))
    made = "".join(step["content"] for step in steps if step["type"] == "Replace")
    return vanishing if set(made).isdisjoint(vanishing) else None


def byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table): printable Latin-1 characters
    stand for themselves, the others are counted up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update((chr(0x100 + index), byte) for index, byte in enumerate(others))
    return alphabet


def _check_added_ids(steps: Iterable[dict[str, Any]]) -> None:
    """Begin and end tokens are a few, and the text comes once."""
    num_ids, num_texts = 0, 1
    for step in steps:
        if step["type"] != "TemplateProcessing":
            continue
        counts = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
        pieces = step["single"]
        num_texts *= max(1, sum("Sequence" in piece for piece in pieces))
        num_ids += sum(counts.get(piece["SpecialToken"]["id"], 0) for piece in pieces if "SpecialToken" in piece)
    if num_texts > 1 or num_ids > _MAX_ADDED_IDS:
        raise TokenizerError(
            f"the post-processor of the tokenizer writes each text {num_texts} times and {num_ids} tokens beside it;"
            f" once and at most {_MAX_ADDED_IDS} are read"
        )


def _check_model(model: Any) -> None:
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        affix = getattr(model, name, None) or ""
        if len(affix) > _MAX_AFFIX_CHARS:
            raise TokenizerError(
                f"{name} of the tokenizer has {len(affix)} characters; at most {_MAX_AFFIX_CHARS} are read"
            )
    word = getattr(model, "max_input_chars_per_word", 0) or 0
    if word > _MAX_WORD_CHARS:
        raise TokenizerError(
            f"max_input_chars_per_word of the tokenizer is {word}; at most {_MAX_WORD_CHARS} are read, as the time"
            " that a word takes grows with its cube"
        )
