"""How many tokens of a conversation's prompt come up to the end of one of its messages or tools.

Owns the way to find out, for who wants a beginning of a prompt kept, and a bounded memory of what was found: a head
that comes with every request is rendered and read once. The number is what it was when that beginning was first seen;
it may be a token off where the template joins two words there.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from mooli.errors import MooliError
from mooli.frontend.cache_report import Told
from mooli.frontend.prompt_parts import prompt_parts
from mooli.frontend.retention import Place
from mooli.frontend.tokenizer import Tokenizer

MAX_LENGTHS = 1024


class PrefixLengths:
    """Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._lengths: OrderedDict[bytes, int | None] = OrderedDict()

    def up_to(self, told: Told, place: Place) -> int | None:
        """Tokens of the prompt up to there; None where that cannot be told."""
        key = _digest(told, place)
        with self._lock:
            if key in self._lengths:
                self._lengths.move_to_end(key)
                return self._lengths[key]
        length = self._find(told, place)
        with self._lock:
            self._lengths[key] = length
            if len(self._lengths) > MAX_LENGTHS:
                self._lengths.popitem(last=False)
        return length

    def _find(self, told: Told, place: Place) -> int | None:
        template = self._tokenizer.chat_template
        if template is None:
            return None
        try:
            text, parts = prompt_parts(template, told.messages, told.tools, **told.template_arguments)
            ends = [part.end for part in parts if (part.kind, part.index) == (place.kind, place.index)]
            if not ends:
                return None
            return len(self._tokenizer.encode(text[: max(ends)], add_special_tokens=False)) or None
        except MooliError:
            return None


def _digest(told: Told, place: Place) -> bytes:
    """Of all that stands before the end of `place`, and how it is told."""
    messages: Sequence[Any] = told.messages[: place.index + 1] if place.kind == "message" else told.messages[:1]
    tools = [] if told.tools is None else told.tools.for_template()
    data = json.dumps([place.kind, place.index, messages, tools, dict(told.template_arguments)], default=str)
    return hashlib.blake2b(data.encode("utf-8", "surrogatepass"), digest_size=16).digest()
