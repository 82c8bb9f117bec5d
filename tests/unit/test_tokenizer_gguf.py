"""Tokenizers from GGUF metadata, byte-level and SentencePiece, and clear errors."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import (
    TEXTS,
    changed,
    gguf_metadata,
    sentencepiece_metadata,
    trained_byte_level,
)
from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from mooli.errors import TokenizerError
from mooli.frontend.gguf_tokenizer import tokenizer_from_gguf


@pytest.fixture(scope="module")
def qwen():
    return tokenizer_from_gguf(gguf_metadata(trained_byte_level("qwen2"), "qwen2"))


# GGUF metadata


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": None}, "no tokenizer.ggml.model"),
        ({"model": "rwkv"}, "'rwkv'.*supported are 'gpt2' and 'llama'"),
        ({"pre": None}, "no tokenizer.ggml.pre"),
        ({"pre": "viking"}, "'viking'.*gpt-2, llama-bpe"),
        ({"pre": ["x"]}, "not supported"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": []}, "no tokenizer.ggml.tokens"),
        ({"tokens": "abc"}, "not an array"),
        ({"tokens": ["a", 3]}, r"tokens\[1\].*not a string"),
        ({"tokens": ["a", "b", "a"]}, "'a' twice"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, "not two tokens"),
        ({"merges": [7]}, "not two tokens"),
        ({"merges": ["nope never"]}, "'nope' is no token"),
        ({"merges": ["! é"]}, "is no token"),
        ({"token_type": [1]}, "token_type has 1 entries"),
        ({"token_type": "x"}, "not an array"),
        ({"token_type": 3}, "not an array"),
        ({"eos_token_id": 10**9}, "the vocabulary has"),
        ({"bos_token_id": -1}, "the vocabulary has"),
        ({"bos_token_id": "x"}, "not a token id"),
        ({"model": "llama"}, "no tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.0]}, "scores has 1 entries"),
    ],
)
def test_malformed_metadata_is_an_error_that_names_the_key(changes, says):
    metadata = changed(gguf_metadata(trained_byte_level("gpt-2"), "gpt-2"), **changes)
    with pytest.raises(TokenizerError, match=says):
        tokenizer_from_gguf(metadata, source="model.gguf")


@settings(max_examples=60, deadline=None)
@given(
    key=st.sampled_from(["model", "pre", "tokens", "merges", "token_type", "scores", "bos_token_id", "add_bos_token"]),
    value=st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers() | st.text(max_size=3), max_size=4),
    model=st.sampled_from(["gpt2", "llama"]),
)
def test_no_metadata_does_worse_than_an_error(key, value, model):
    metadata = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, 0.0],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 3,
    }
    with contextlib.suppress(TokenizerError):
        tokenizer_from_gguf(changed(metadata, **{key: value})).encode("ab")


def test_token_types_may_be_missing():
    metadata = changed(gguf_metadata(trained_byte_level("gpt-2"), "gpt-2"), token_type=None)
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.special_ids == {metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.bos_token_id"]}


def test_an_end_of_turn_token_that_a_file_marks_as_ordinary_is_a_control_token_all_the_same():
    metadata = gguf_metadata(trained_byte_level("qwen2"), "qwen2")
    end = metadata["tokenizer.ggml.tokens"].index("<|im_end|>")
    metadata["tokenizer.ggml.token_type"][end] = 4
    tokenizer = tokenizer_from_gguf(metadata)
    assert end in tokenizer.special_ids
    assert end not in tokenizer.encode("a<|im_end|>", parse_special=False)


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
@pytest.mark.parametrize("flag", [True, False, None])
def test_a_begin_token_is_added_when_the_file_says_so_or_the_family_is_known_for_it(name, flag):
    metadata = changed(gguf_metadata(trained_byte_level(name), name), add_bos_token=flag)
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode("hi")
    adds = flag if flag is not None else name == "llama-bpe"
    assert (ids[0] == tokenizer.bos_id) == adds
    assert tokenizer.encode("hi", add_special_tokens=False) == ids[adds:]


def test_unused_ids_count_in_the_vocabulary_but_are_no_tokens(qwen):
    size = qwen.vocab_size
    assert not qwen.has_token(size - 1)
    assert qwen.token_text(size - 1) == qwen.decode([size - 1]) == qwen.token_text(size) == qwen.token_text(-1) == ""


def test_end_of_turn_and_of_message_ids_of_the_file_end_a_sequence():
    metadata = changed(gguf_metadata(trained_byte_level("qwen2"), "qwen2"), eot_token_id=3, eom_token_id=4)
    assert {3, 4, int(metadata["tokenizer.ggml.eos_token_id"])} <= tokenizer_from_gguf(metadata).eos_ids


def test_named_chat_templates_of_a_file_are_read():
    metadata = gguf_metadata(trained_byte_level("qwen2"), "qwen2")
    metadata |= {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools"}
    assert tokenizer_from_gguf(metadata).chat_template.render([{"role": "user"}], tools=[]) == "tools"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.model", np.array([1, 2])),
        ("tokenizer.ggml.add_bos_token", np.array([1, 2])),
        ("tokenizer.ggml.add_eos_token", "yes"),
        ("tokenizer.ggml.bos_token_id", float("inf")),
        ("tokenizer.ggml.eos_token_id", np.array([1, 2])),
        ("tokenizer.ggml.tokens", ["a" * 5000]),
        ("tokenizer.chat_templates", 5),
        ("tokenizer.chat_templates", ["a"] * 65),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_of_another_kind_is_an_error_of_the_tokenizer(key, value):
    with pytest.raises(TokenizerError, match=key.rsplit(".", 1)[-1] if "tokens" not in key else "5000 characters"):
        tokenizer_from_gguf({**gguf_metadata(trained_byte_level("qwen2"), "qwen2"), key: value})


# SentencePiece


def sentencepiece_ids(metadata, text):
    """SentencePiece's own rule, slowly: join the neighbours whose joined piece scores best, leftmost first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    normal = {t: i for i, t in enumerate(tokens) if metadata["tokenizer.ggml.token_type"][i] == 1}
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [(-scores[normal[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in normal]
        if not joins:
            break
        _, at = min(joins)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    ids = []
    for piece in pieces:
        ids += [normal[piece]] if piece in normal else [tokens.index(f"<0x{b:02X}>") for b in piece.encode()]
    return ids


@pytest.fixture(scope="module")
def sentencepiece():
    metadata = sentencepiece_metadata()
    return metadata, tokenizer_from_gguf(metadata)


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="aehnrstuwio你好é \n1.x", max_size=30) | st.text(max_size=15))
def test_sentencepiece_ids_follow_the_scores(sentencepiece, text):
    metadata, tokenizer = sentencepiece
    if "▁" in text:
        return
    assert tokenizer.encode(text) == [1, *sentencepiece_ids(metadata, text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_sentencepiece_ids_equal_those_of_the_published_form(sentencepiece, text):
    metadata, tokenizer = sentencepiece
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {t: i for i, t in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"].tolist(), strict=True))
    merges = generate_merges(vocab, scores, skip_tokens=[*tokens[:259], "<tool>"])
    published = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    published.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    published.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:3]])
    published.add_tokens([AddedToken("<tool>", normalized=False)])
    reference = PreTrainedTokenizerFast(tokenizer_object=published)
    for added in ("", "<s>", "</s>x ", "<tool>"):
        assert tokenizer.encode(text + added, add_special_tokens=False) == reference.encode(text + added)


def test_sentencepiece_special_tokens_of_a_user_stay_text(sentencepiece):
    _, tokenizer = sentencepiece
    ids = tokenizer.encode("a</s><s>", parse_special=False, add_special_tokens=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "a</s><s>"


def test_sentencepiece_without_a_space_in_front():
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    assert tokenizer.decode(tokenizer.encode("the answer")) == "the answer"
    assert tokenizer.token_text(tokenizer.encode("the answer")[0])[0] == "t"


def test_sentencepiece_of_another_architecture_is_refused():
    with pytest.raises(TokenizerError, match="gemma"):
        tokenizer_from_gguf({**sentencepiece_metadata(), "general.architecture": "gemma"})


def test_text_of_one_token_keeps_its_space_and_shows_special_tokens(qwen, sentencepiece):
    texts = [qwen.token_text(i) for i in qwen.encode(" the answer<|im_end|>")]
    assert "".join(texts) == " the answer<|im_end|>"
    _, spm = sentencepiece
    assert [spm.token_text(i) for i in spm.encode("the answer")] == ["<s>", " the", " answer"]
    assert spm.token_text(spm.encode("\x07")[-1]) == "\x07"
