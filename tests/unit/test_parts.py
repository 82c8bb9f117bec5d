"""Parts of a message: whatever the cut into tokens, steps and readings, joined they are the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from fake_engine import EOS, byte_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from wire_formats import BracketFormat, ThinkFormat

from mooli.frontend.generation import Generation
from mooli.frontend.parts import PLAIN_TEXT, Part, PartReader, WireFormat, parser_for
from mooli.types import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprobs

TOKENIZER = byte_tokenizer()


def a_generation(prompt: str = "say>", **sampling) -> Generation:
    ids = np.array([*prompt.encode()], np.int32)
    params = SamplingParams(temperature=0.0, **sampling)
    return Generation(Request(rid="r", prompt_ids=ids, sampling=params, return_logprob=True), TOKENIZER)


def outputs(ids: Iterable[int]) -> Iterator[RequestOutput]:
    """One for each token, ended by EOS."""
    for token_id in [*ids, EOS]:
        finish = FinishReason("stop", matched=EOS) if token_id == EOS else None
        yield RequestOutput("r", [token_id], finish, logprobs=[TokenLogprobs(token_id, -1.0)])


def reader_of(generation: Generation, wire_format: WireFormat = PLAIN_TEXT, **options) -> PartReader:
    return PartReader(generation, parser_for(wire_format, generation.request, TOKENIZER), **options)


def cuts_of(length: int) -> Iterator[list[int]]:
    """All ways to read a sequence: after which of its tokens. After the last always."""
    for mask in range(2 ** (length - 1)):
        yield [i for i in range(length) if i == length - 1 or mask >> i & 1]


def read(text: bytes, readings: Iterable[int], wire_format: WireFormat = PLAIN_TEXT, **sampling) -> list[list[Part]]:
    """What each reading takes, of a sequence that says `text`."""
    generation = a_generation(**sampling)
    reader = reader_of(generation, wire_format)
    taken = []
    for i, output in enumerate(outputs(text)):
        generation.update(output)
        if i in readings:
            taken.append(reader.take())
    return taken


def joined(taken: Iterable[Iterable[Part]]) -> list[Part]:
    """As one reading would have it. Tokens go with their part."""
    whole: list[Part] = []
    for part in (part for parts in taken for part in parts):
        last = whole[-1] if whole else None
        if last is not None and (last.kind, last.call) == (part.kind, part.call):
            whole[-1] = Part(
                part.kind, last.text + part.text, last.num_tokens + part.num_tokens, part.call, last.call_id,
                last.token_ids + part.token_ids, last.logprobs + part.logprobs,
            )  # fmt: skip
        else:
            whole.append(part)
    return whole


def words(parts: Iterable[Part]) -> list[tuple[str, str]]:
    return [(part.kind, part.text) for part in parts]


TEXTS = {
    "plain": (PLAIN_TEXT, "aé<b>é".encode(), {}),
    "half a character at the end": (PLAIN_TEXT, b"ab\xc3", {}),
    "a stop string that does not come": (PLAIN_TEXT, b"a<b<<b", {"stop": ("<bc", "<<bb")}),
    "reasoning": (BracketFormat(), "a(mé)b[".encode(), {}),
    "two calls": (BracketFormat(), b"(m)[f:1][g:2]", {}),
    "reasoning that does not end": (BracketFormat(), b"a(mm", {}),
    "a stop string in a call": (BracketFormat(), b"a[f:12]b]", {"stop": ("2]",)}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("wire_format", "text", "sampling"), TEXTS.values(), ids=TEXTS)
def test_all_ways_to_read_a_sequence_join_to_the_same(wire_format, text, sampling):
    """Tokens are bytes, so these are also all ways to cut characters."""
    num_tokens = len(text) + 1
    whole = read(text, [num_tokens - 1], wire_format, **sampling)[0]
    assert (whole[0].kind, whole[-1].kind) == ("begin", "end")
    token_ids = [token_id for part in whole for token_id in part.token_ids]
    assert token_ids == [*text, EOS][: len(token_ids)]
    assert [item.token_id for part in whole for item in part.logprobs] == token_ids
    for readings in cuts_of(num_tokens):
        taken = read(text, readings, wire_format, **sampling)
        assert joined(taken) == whole, readings
        for parts in taken:
            assert all(len(part.token_ids) == part.num_tokens for part in parts)
            assert all((a.kind, a.call) != (b.kind, b.call) for a, b in itertools.pairwise(parts))


def test_what_a_sequence_says_in_parts():
    assert words(read("aé".encode(), [3])[0]) == [("begin", ""), ("text", "aé"), ("end", "")]
    (parts,) = read(b"(m)t[f:1][g:23]", [15], BracketFormat())
    assert [(part.kind, part.text, part.call, bytes(i % EOS for i in part.token_ids)) for part in parts[1:-1]] == [
        ("reasoning", "m", 0, b"(m)"), ("text", "t", 0, b"t"),
        ("call_begin", "f", 0, b"[f:"), ("arguments", "1", 0, b"1"), ("call_end", "", 0, b"]"),
        ("call_begin", "g", 1, b"[g:"), ("arguments", "23", 1, b"23"), ("call_end", "", 1, b"]"),
        ("text", "", 0, b"\0"),  # the token that ended it
    ]  # fmt: skip


@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "<thi", "a", "é", "<", ">"]), max_size=8).map("".join),
    cuts=st.sets(st.integers(0, 64)),
    starts_inside=st.booleans(),
)
@example(text="<think>m</think>t", cuts=set(), starts_inside=False)
def test_markers_of_many_tokens_are_found_whatever_the_cut(text, cuts, starts_inside):
    prompt = "assistant: <think>" if starts_inside else "assistant: "
    generations = [a_generation(prompt), a_generation(prompt)]
    readers = [reader_of(generation, ThinkFormat()) for generation in generations]
    streamed = []
    for i, output in enumerate(outputs(text.encode())):
        for generation in generations:
            generation.update(output)
        if i in cuts or output.finish is not None:
            streamed.append(readers[0].take())
    whole = readers[1].take()
    assert joined(streamed) == whole
    assert readers[0].num_reasoning_tokens == readers[1].num_reasoning_tokens
    expected = naive(text, starts_inside)
    assert [(kind, said) for kind, said in words(whole)[1:-1] if said] == expected


def naive(text: str, is_reasoning: bool) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    while text:
        said, marker, text = text.partition("</think>" if is_reasoning else "<think>")
        kind = "reasoning" if is_reasoning else "text"
        if said and is_reasoning and found and found[-1][0] == kind:  # both markers between belong to it
            found[-1] = (kind, found[-1][1] + said)
        elif said:
            found.append((kind, said))
        is_reasoning = is_reasoning != bool(marker)
    return found


def test_both_markers_count_as_reasoning():
    generation = a_generation()
    reader = reader_of(generation, ThinkFormat())
    for output in outputs(b"a<think>mm</think>b"):
        generation.update(output)
    reader.take()
    assert reader.num_reasoning_tokens == len("<think>mm</think>")


# -- when something is taken -------------------------------------------------------------------------------------------
def taken_after(text: bytes, *, sampling=None, **options) -> list[list[str]]:
    """After each token, what is taken."""
    generation = a_generation(**(sampling or {}))
    reader = reader_of(generation, **options)
    taken = []
    for output in outputs(text):
        generation.update(output)
        taken.append([part.text if part.kind == "text" else part.kind for part in reader.take()])
    return taken


def test_the_first_token_is_shown_at_once_then_every_interval():
    assert taken_after(b"abcdef", stream_interval=3) == [["begin", "a"], [], [], ["bcd"], [], [], ["ef", "end"]]
    of_request = taken_after(b"abcd", stream_interval=3, sampling={"stream_interval": 2})
    assert of_request == [["begin", "a"], [], ["bc"], [], ["d", "end"]]


def test_half_a_character_is_worth_a_taking_only_where_tokens_are_shown():
    text = "éa".encode()
    assert taken_after(text, shows_tokens=True) == [["begin", ""], ["é"], ["a"], ["", "end"]]
    assert taken_after(text, shows_tokens=False) == [[], ["begin", "é"], ["a"], ["", "end"]]


def test_after_the_end_nothing_is_taken():
    generation = a_generation()
    reader = reader_of(generation)
    assert reader.take() == [] and not reader.is_over
    for output in outputs(b"a"):
        generation.update(output)
    assert words(reader.take()) == [("begin", ""), ("text", "a"), ("end", "")]
    assert reader.is_over and reader.take() == []


def test_readers_of_one_sequence_have_cursors_of_their_own():
    generation = a_generation()
    fast, slow = reader_of(generation), reader_of(generation, BracketFormat())
    for output in outputs(b"a(b)"):
        generation.update(output)
        fast.take()
    assert fast.take() == []
    assert words(slow.take()) == [("begin", ""), ("text", "a"), ("reasoning", "b"), ("text", ""), ("end", "")]


def test_text_lengths_say_which_token_brought_which_text():
    generation = a_generation(stop=("<b>",))
    for output in outputs("é<ba".encode()):
        generation.update(output)
    assert (generation.text, generation.text_lengths) == ("é<ba", [0, 1, 0, 0, 3, 0])
