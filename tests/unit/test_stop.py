"""Stop strings: what is shown, what is held back, and that the cut of the text into pieces never matters."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooli.errors import SamplingParamsError
from mooli.frontend.stop import StopMatcher, StopStrings


def naive(text: str, stops: list[str], trim: bool) -> tuple[str, str | None, int]:
    """Shown text, stop string, and end of the match in the whole text, by trying every end."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)] if trim else text[:end], stop, end
    return text, None, len(text)


def run(pieces: list[str], stops: list[str], trim: bool) -> tuple[str, str | None, int]:
    matcher = StopMatcher(StopStrings(stops), trim=trim)
    shown = "".join([matcher.push(piece) for piece in pieces]) + matcher.flush()
    return shown, matcher.matched, matcher.num_pieces


def cut(text: str, cuts: set[int]) -> list[str]:
    edges = [0, *sorted(c for c in cuts if c <= len(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


# Two letters, so that stop strings overlap with themselves and with each other most of the time.
letters = st.text(alphabet="ab", max_size=14)
stop_lists = st.lists(st.text(alphabet="ab", min_size=2, max_size=6), max_size=3)


@given(text=letters, stops=stop_lists, cuts=st.sets(st.integers(0, 14)), trim=st.booleans())
def test_any_cut_of_the_text_gives_what_the_whole_text_gives(text, stops, cuts, trim):
    pieces = cut(text, cuts)
    shown, matched, num_pieces = run(pieces, stops, trim)
    expected, stop, end = naive(text, stops, trim)
    assert (shown, matched) == (expected, stop)
    if stop is not None:
        assert len("".join(pieces[: num_pieces - 1])) < end <= len("".join(pieces[:num_pieces]))


@given(text=letters, stops=stop_lists, cuts=st.sets(st.integers(0, 14)))
def test_text_shown_early_is_never_part_of_a_stop_string(text, stops, cuts):
    matcher = StopMatcher(StopStrings(stops), trim=True)
    shown = ""
    for piece in cut(text, cuts):
        shown += matcher.push(piece)
        assert naive(text, stops, trim=True)[0].startswith(shown)


@given(text=letters, stops=stop_lists)
def test_no_more_is_held_back_than_the_longest_possible_beginning_of_a_stop_string(text, stops):
    matcher = StopMatcher(StopStrings(stops), trim=True)
    shown = matcher.push(text)
    if matcher.matched is None:
        held = text[len(shown) :]
        beginnings = [text[i:] for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in stops)]
        assert held == max(beginnings, key=len, default="")


def test_a_stop_string_may_span_many_pieces():
    assert run(["Hello <", "|im", "_e", "nd|", "> more", "never"], ["<|im_end|>"], True) == ("Hello ", "<|im_end|>", 5)


def test_without_trim_the_stop_string_is_shown_and_nothing_is_held_back():
    matcher = StopMatcher(StopStrings(["END"]), trim=False)
    assert [matcher.push(p) for p in ["a E", "N", "D tail", "x"]] == ["a E", "N", "D", ""]
    assert matcher.matched == "END"


def test_the_stop_string_complete_first_wins():
    assert run(["abcd"], ["abcd", "bc"], True)[:2] == ("a", "bc")


def test_of_stop_strings_complete_together_the_longest_wins():
    assert run(["xab"], ["b", "ab"], True)[:2] == ("x", "ab")


def test_a_false_start_is_shown_when_the_text_is_over():
    assert run(["one\n", "\n"], ["\n\n\n"], True)[:2] == ("one\n\n", None)


@pytest.mark.parametrize(("text", "stop"), [("aaab", "aab"), ("ababac", "abac"), ("\n\n\n#", "\n\n#")])
def test_a_stop_string_is_found_inside_its_own_false_start(text, stop):
    assert run(list(text), [stop], True)[:2] == (text[: -len(stop)], stop)


def test_pieces_after_a_match_are_not_counted():
    matcher = StopMatcher(StopStrings(["!"]), trim=True)
    assert [matcher.push(p) for p in ["a", "b!", "c", "!"]] == ["a", "b", "", ""]
    assert (matcher.num_pieces, matcher.flush()) == (2, "")


@pytest.mark.parametrize("stops", [[""], ["a", ""], [7]])
def test_an_empty_stop_string_is_refused(stops):
    with pytest.raises(SamplingParamsError, match="non-empty"):
        StopStrings(stops)
