"""Token ids to text, a few at a time.

Owns the promise of a stream: never half a character, and the pieces together are exactly `tokenizer.decode` of all ids,
however the ids were cut. Never looks at stop strings and never decides whether a sequence ends.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mooli.frontend.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"

_MAX_UNCLEAR_TOKENS = 8
"""How long a trailing U+FFFD is held back where the decoder does not tell bytes from text. No character has more bytes
than four, so a longer run is not one in the making."""


class IncrementalDetokenizer:
    """The text of one growing sequence. Not thread-safe; make one a sequence.

    The cost of a push is that of its own tokens, not of the sequence so far:
    - byte-level tokenizers: the bytes of each token go through a streaming UTF-8 decoder;
    - others (SentencePiece): a window of the tokens shown last and the new ones is decoded twice, without and with the
      new ones, and the difference is the new text. Byte-fallback tokens are held back until their run is over, because
      one bad byte later in a run changes how its decoder writes the whole run.

    shown_ids: special tokens that are not skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        if shown_ids:
            self._skipped -= shown_ids
        self._spaces = spaces_between_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._shown: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens and return the text that is now certain and was not returned before."""
        if self._utf8 is not None:
            skipped, token_bytes = self._skipped, self._tokenizer.token_bytes
            return self._utf8.decode(b"".join([token_bytes(i) for i in ids if i not in skipped]))
        # Ids that add no text must not stand alone in the window: a decoder that strips the first space of a text would
        # then strip one in the middle.
        self._pending += [i for i in ids if i not in self._skipped and self._tokenizer.has_token(i)]
        if not self._pending or self._tokenizer.is_byte_fallback(self._pending[-1]):
            return ""
        return self._show_pending(final=False)

    def flush(self) -> str:
        """The sequence is over: return what was held back, an incomplete character as U+FFFD."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        return self._show_pending(final=True) if self._pending else ""

    def _show_pending(self, *, final: bool) -> str:
        window = self._decode(self._shown + self._pending)
        if not final and window.endswith(_REPLACEMENT) and len(self._pending) < _MAX_UNCLEAR_TOKENS:
            return ""
        text = window[len(self._decode(self._shown)) :]
        self._shown, self._pending = self._pending, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=self._spaces)
