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


class StopStrings:
    """The stop strings of one or more sequences, none empty; duplicates are harmless.

    Each is followed by its Knuth-Morris-Pratt automaton, so the cost is one step a character and stop string, whatever
    the lengths and however the text is cut. An automaton grows as text reaches it: one that no text begins like takes
    neither time nor memory.

    Raises SamplingParamsError when a stop string is empty or not a str.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise SamplingParamsError(f"stop must hold non-empty strings, got {stop!r}; remove it or fill it in")
        # Longest first: where several match at one character, the first found is the one to report.
        self.texts = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._borders: list[list[int]] = [[] for _ in self.texts]

    def next_state(self, index: int, state: int, char: str) -> int:
        """How much of string `index` the text ends with, after `state` characters of it and then `char`."""
        stop, borders = self.texts[index], self._borders[index]
        while state and stop[state] != char:
            state = borders[state - 1]
        if stop[state] == char:
            state += 1
            if state > len(borders):
                _add_border(stop, borders)
        return state


class StopMatcher:
    """Watches the text of one sequence for stop strings; with none, every piece passes through.

    trim: True cuts the text before the stop string, and so holds back an ending that could become one; False shows the
        text up to and including the stop string, and holds nothing back.
    """

    def __init__(self, stops: StopStrings, *, trim: bool) -> None:
        self._stops = stops
        self._states = [0] * len(stops.texts)
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
        if not self._states:
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
        self._states = [0] * len(self._states)
        return held

    def _advance(self, char: str) -> str | None:
        match = None
        for index, stop in enumerate(self._stops.texts):
            state = self._states[index] = self._stops.next_state(index, self._states[index], char)
            if state == len(stop) and match is None:
                match = stop
        return match


def _add_border(pattern: str, borders: list[int]) -> None:
    """`borders` has for every prefix of `pattern` the length of its longest proper prefix that is also its suffix: add
    it for the next longer prefix."""
    index = len(borders)
    length = borders[-1] if borders else 0
    while length and pattern[index] != pattern[length]:
        length = borders[length - 1]
    borders.append(length + 1 if index and pattern[index] == pattern[length] else 0)
