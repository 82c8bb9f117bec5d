"""Strings of GGUF metadata against Python's own: what is UTF-8, what they say, and how they are cut in two."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_files import string
from mooli.formats.gguf import StringArray

native = pytest.importorskip("mooli._gguf", exc_type=ImportError)


def num_good(texts: list[bytes]) -> int:
    """Of strings one behind the other, how many come before one that is not UTF-8."""
    ends = np.empty(len(texts), np.int64)
    data = np.frombuffer(b"".join(map(string, texts)), np.uint8)
    found: int = native.string_ends(data, 0, ends)
    assert ends[:found].tolist() == list(itertools.accumulate(len(string(text)) for text in texts[:found]))
    return found


def is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


EDGES = [
    *(0x00, 0x20, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xC3, 0xC4),
    *(0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF),
]


def few_bytes() -> Iterator[bytes]:
    """Every text of one or two bytes, and of three or four between whose values Unicode draws a line."""
    for length in (1, 2):
        yield from map(bytes, itertools.product(range(256), repeat=length))
    for length in (3, 4):
        yield from map(bytes, itertools.product(EDGES, repeat=length))


@pytest.mark.slow
def test_a_text_is_good_if_python_decodes_it() -> None:
    for text in few_bytes():
        assert num_good([text]) == is_utf8(text), text


@given(st.lists(st.one_of(st.binary(max_size=20), st.text(max_size=20).map(str.encode)), max_size=8))
def test_strings_are_good_up_to_the_first_that_is_not(texts: list[bytes]) -> None:
    assert num_good(texts) == len(list(itertools.takewhile(is_utf8, texts)))


def array_of(texts: list[str]) -> StringArray:
    ends = np.cumsum([len(string(text)) for text in texts], dtype=np.int64)
    return StringArray(b"".join(map(string, texts)), ends)


texts_of_all_widths = st.lists(
    st.one_of(
        st.text(st.sampled_from("ab Ġé\x00\x7f\x80ÿĀ߿ࠀ\uffff😀"), max_size=6),
        st.text(max_size=40),
    ),
    max_size=20,
)


@given(texts_of_all_widths)
def test_texts_are_those_of_the_file(texts: list[str]) -> None:
    array = array_of(texts)
    assert array.tolist() == texts
    assert [array[index] for index in range(len(texts))] == texts
    # The hash is of the bytes in memory: a text that is kept wider than it must be would not be found as a key.
    assert [hash(text) for text in array] == [hash(text) for text in texts]


@given(texts_of_all_widths)
def test_pairs_are_cut_at_the_first_space_that_is_not_the_first_character(texts: list[str]) -> None:
    expected = []
    for text in texts:
        at = text.find(" ", 1)
        if at < 0:
            break
        expected.append((text[:at], text[at + 1 :]))
    assert array_of(texts).pairs() == expected


def test_cutting_does_not_end_at_a_space_in_front() -> None:
    assert array_of(["  b", "a  ", "é x", " "]).pairs() == [(" ", "b"), ("a", " "), ("é", "x")]
