"""Texts, bytes and offsets of single tokens where a vocabulary is not byte-level."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fake_engine import byte_tokenizer
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from mooli.frontend.tokenizer import Tokenizer
from mooli.server.logprob_shapes import LOWEST, LegacyLogprobs, chat_logprobs, legacy_text
from mooli.types import Request, TokenLogprobs

PIECES = ["<unk>", "<0xC3>", "<0xA9>", "▁a", "b"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    """As SentencePiece has it: a mark for the space before a word, and single bytes for what has no token."""
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(PIECES)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return Tokenizer(backend)


def entries(*ids: int) -> list[TokenLogprobs]:
    return [TokenLogprobs(token_id, -1.0) for token_id in ids]


def test_a_token_keeps_its_space_and_a_lone_byte_has_no_bytes_to_tell(tokenizer):
    content = chat_logprobs(tokenizer, entries(3, 4, 1))["content"]
    assert [(entry["token"], entry["bytes"]) for entry in content] == [(" a", [32, 97]), ("b", [98]), ("\ufffd", None)]


def test_offsets_follow_the_text_that_the_tokens_make_together(tokenizer):
    request = Request(rid="r", prompt_ids=np.array([5, 3, 4, 1, 2, 4], np.int32))
    shapes = LegacyLogprobs(tokenizer, request, echoed=tokenizer.decode([5, 3, 4, 1, 2, 4]))
    # "abéb": the character of two bytes is whole only with the token behind it.
    assert shapes.prompt(entries(5, 3, 4, 1, 2, 4))["text_offset"] == [0, 0, 1, 2, 2, 2]
    assert shapes.more(entries(3, 4))["text_offset"] == [4, 5]


def test_what_json_cannot_write_is_a_very_low_number():
    tokenizer = byte_tokenizer()
    item = TokenLogprobs(97, -math.inf, top=[(-0.5, 98), (-math.inf, 97)])
    (entry,) = chat_logprobs(tokenizer, [item])["content"]
    assert [entry["logprob"], *[top["logprob"] for top in entry["top_logprobs"]]] == [LOWEST, -0.5, LOWEST]
    shapes = LegacyLogprobs(tokenizer, Request(rid="r", prompt_ids=np.array([1], np.int32)), echoed=None)
    assert shapes.more([item])["top_logprobs"] == [{"b": -0.5, "a": LOWEST}]


def test_halves_of_characters_stay_apart():
    tokenizer = byte_tokenizer()
    assert [legacy_text(tokenizer, token_id) for token_id in (0xC3, 0xA9, 0x61, 256)] == [
        "bytes:\\xc3",
        "bytes:\\xa9",
        "a",
        "<eos>",
    ]
