"""Texts, bytes and offsets of single tokens where a vocabulary is not byte-level."""

from __future__ import annotations

import asyncio
import json
import math
import threading

import numpy as np
import pytest
from fake_engine import byte_tokenizer, says
from gate import Gate
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from mooli.frontend.tokenizer import Tokenizer
from mooli.server import work
from mooli.server.openai import LOWEST
from mooli.server.openai_chat import chat_logprobs
from mooli.server.openai_completions import LegacyLogprobs, legacy_text
from mooli.server.work import TextThreads
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


LOGPROBS = {"logprobs": 3, "echo": True, "max_tokens": 9, "temperature": 0}
CHAT_LOGPROBS = {"logprobs": True, "top_logprobs": 3, "max_tokens": 9, "temperature": 0}
NATIVE_LOGPROBS = {
    "return_logprob": True, "top_logprobs_num": 3, "logprob_start_len": 0, "return_text_in_logprobs": True,
    "sampling_params": {"max_new_tokens": 9, "temperature": 0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["say>", "or>"], "rid": ["a", "b"], **LOGPROBS}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "say>"}], "rid": "a", **CHAT_LOGPROBS}),
        ("/generate", {"text": ["say>", "or>"], "rid": ["a", "b"], **NATIVE_LOGPROBS}),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_many_log_probabilities_are_written_by_another_thread_and_the_same(live, monkeypatch, path, body, is_stream):
    server = live(says("hello"))
    token_text, threads = Tokenizer.token_text, set()

    def noting(self, token_id):
        """Each shape has the texts of its tokens."""
        threads.add(threading.current_thread().name.rpartition("_")[0])
        return token_text(self, token_id)

    def lists() -> list:
        """Of each sequence, the log-probabilities in the order of its tokens."""
        server.http.post("/flush_cache", headers={"X-Mooli": "1"}).raise_for_status()
        reply = server.http.post(path, json={**body, "stream": is_stream})
        assert reply.status_code == 200, reply.text
        pieces = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        return logprobs_of(pieces if is_stream else [reply.json()])

    monkeypatch.setattr(Tokenizer, "token_text", noting)
    here = lists()
    assert threads and "mooli-long-text" not in threads
    monkeypatch.setattr(work, "LONG_TEXT_CHARS", 1)
    assert lists() == here and here
    assert "mooli-long-text" in threads


def logprobs_of(pieces: list) -> list:
    """From whole answers or chunks, cut wherever: by sequence, lists put together or the last of growing ones."""
    found: dict[int, list] = {}
    for piece in pieces:
        for place, item in enumerate(piece if isinstance(piece, list) else piece.get("choices", [piece])):
            index = item.get("index", place)
            if "meta_info" in item:
                names = [name for name in item["meta_info"] if "logprobs" in name]
                found[index] = [item["meta_info"][name] for name in names]
            elif item["logprobs"]:
                shown = item["logprobs"]
                tokens = shown.get("content") or [*zip(*(shown[name] for name in sorted(shown)), strict=True)]
                found[index] = found.get(index, []) + tokens
    return [found[index] for index in sorted(found)]


def test_a_sequence_that_ends_while_another_is_written_has_one_last_chunk(live, monkeypatch):
    run = TextThreads.run

    async def when_all_have_ended(self, num_chars, function):
        if server.service.client.num_open:  # so it is no prompt but an answer
            gate.open()
        while server.service.client.num_open:
            await asyncio.sleep(0.001)
        return await run(self, num_chars, function)

    monkeypatch.setattr(TextThreads, "run", when_all_have_ended)
    with Gate() as gate:
        server = live(says("hello"), runner={"raises": gate})
        params = [{"max_new_tokens": 1, "temperature": 0}, {"max_new_tokens": 5, "temperature": 0}]
        body = {"text": ["a>", "b>"], **NATIVE_LOGPROBS, "sampling_params": params, "stream": True}
        gate.let()
        reply = server.http.post("/generate", json=body)
    pieces = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    assert [piece["text"] for piece in pieces if piece["meta_info"]["finish_reason"] is not None] == ["h", "hello"]
