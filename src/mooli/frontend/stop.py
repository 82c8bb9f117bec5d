"""Stop strings over a stream of text pieces.

Owns the decision which text is safe to show and where a stop string ended the text. Never sees token ids, never decides
whether a request ends: it reports, the caller acts.

Which match counts: the stop string that is **complete first** in the text ends it, since a stream stops at the first
moment its text holds a stop string. When several are complete at the same character, the longest one counts (it starts
first). This depends on the text alone, never on how it was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

from mooli.errors import SamplingParamsError


class StopMatcher:
    """Watches the text of one sequence for stop strings.

    stops: stop strings, none empty; duplicates are harmless. Empty sequence: every piece passes through.
    trim: True cuts the text before the stop string, and so holds back an ending that could become one; False shows the
        text up to and including the stop string, and holds nothing back.

    Each stop string is followed by its Knuth-Morris-Pratt automaton, so the cost is one step a character and stop
    string, whatever the lengths and however the text is cut.

    Raises SamplingParamsError when a stop string is empty or not a str.
    """

    def __init__(self, stops: Sequence[str], *, trim: bool) -> None:
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise SamplingParamsError(f"stop must hold non-empty strings, got {stop!r}; remove it or fill it in")
        # Longest first: where several match at one character, the first found is the one to report.
        self._stops = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._borders = [_border_lengths(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._trim = trim
        self._held = ""
        self._matched: str | None = None
        self._num_pieces = 0

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._matched

    @property
    def num_pieces(self) -> int:
        """How many pushed pieces the shown text rests on: all so far, or, after a match, those up to and including the
        piece that completed the stop string. With one piece a token, `output_ids[:num_pieces]` ends at that token."""
        return self._num_pieces

    def push(self, piece: str) -> str:
        """Take the next piece of text (it may be empty) and return what can be shown now.

        After a match everything is ignored and "" returned.
        """
        if self._matched is not None:
            return ""
        self._num_pieces += 1
        if not self._stops:
            return piece
        for index, char in enumerate(piece):
            match = self._advance(char)
            if match is not None:
                self._matched = match
                text = self._held + piece[: index + 1]
                self._held = ""
                return text[: len(text) - len(match)] if self._trim else text
        if not self._trim:
            return piece
        text = self._held + piece
        shown = len(text) - max(self._states)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The text is over: return what was held back. "" after a match."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        match = None
        for index, stop in enumerate(self._stops):
            borders = self._borders[index]
            state = self._states[index]
            while state and stop[state] != char:
                state = borders[state - 1]
            if stop[state] == char:
                state += 1
            self._states[index] = state
            if state == len(stop) and match is None:
                match = stop
        return match


def _border_lengths(pattern: str) -> list[int]:
    """For every prefix of `pattern`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders
