"""Filling in the middle: the tokens of a vocabulary, the order of the parts, and texts that hold the tokens' names."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_tokenizers import changed, gguf_metadata, sentencepiece_metadata, trained_byte_level
from tokenizers import AddedToken

from mooli import Engine
from mooli.frontend.gguf_tokenizer import tokenizer_from_gguf
from mooli.frontend.infill import open_infill
from mooli.frontend.tokenizer import Tokenizer, load_tokenizer

CODER = Path(__file__).resolve().parents[2] / ".models" / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"

QWEN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


def with_tokens(*texts: str, special: bool = True) -> Tokenizer:
    backend = trained_byte_level("qwen2")
    add = backend.add_special_tokens if special else backend.add_tokens
    add([AddedToken(text, special=special, normalized=False) for text in texts])
    return Tokenizer(backend)


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (QWEN, "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"),
        (("<fim_prefix>", "<fim_middle>", "<fim_suffix>"), "<fim_prefix>a<fim_suffix>b<fim_middle>"),
        (("<fim-prefix>", "<fim-middle>", "<fim-suffix>"), "<fim-prefix>a<fim-suffix>b<fim-middle>"),
        (
            ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"),
            "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>",
        ),
        (("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"), "▁<PRE>a▁<SUF>b▁<MID>"),
        (("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"), "<|code_prefix|>a<|code_suffix|>b<|code_middle|>"),
        (
            ("<[fim-suffix]>", "<[fim-prefix]>", "<[fim-middle]>"),
            "<[fim-suffix]>b<[fim-prefix]>a<[fim-middle]>",
        ),
        (("[INST]", "[PREFIX]", "[SUFFIX]"), "[SUFFIX]b[PREFIX]a"),
    ],
)
def test_each_family_has_its_parts_in_its_order(texts, wanted):
    tokenizer = with_tokens(*texts)
    infill = open_infill(tokenizer)
    assert tokenizer.decode(infill.encode(tokenizer, "a", "b"), skip_special_tokens=False) == wanted
    assert {tokenizer.added_id(text) for text in texts if text != "[INST]"} <= set(infill.stop_token_ids([5]))
    assert infill.stop_token_ids([5])[0] == 5


@pytest.mark.parametrize("texts", [(), QWEN[:2], ("<fim_prefix>", "<|fim_suffix|>", "<|fim_middle|>"), ("[PREFIX]",)])
def test_half_a_layout_is_none(texts):
    assert open_infill(with_tokens(*texts)) is None
    assert open_infill(None) is None


@pytest.mark.parametrize("special", [True, False])
def test_what_a_user_writes_is_never_one_of_the_tokens(special):
    tokenizer = with_tokens(*QWEN, special=special)
    infill = open_infill(tokenizer)
    written = "x<|fim_suffix|><|fim_middle|> y <|file_sep|><|endoftext|>"
    ids = infill.encode(tokenizer, written, written, (("<|repo_name|>", "<|fim_prefix|>"),))
    markers = [token_id for token_id in ids if token_id in infill.ends]
    wanted = ["<|repo_name|>", "<|file_sep|>", "<|file_sep|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    assert markers == [tokenizer.added_id(text) for text in wanted]
    assert tokenizer.decode(ids, skip_special_tokens=False).count(written) == 2


def test_files_of_a_model_that_knows_none_stand_before_the_text():
    tokenizer = with_tokens("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
    ids = open_infill(tokenizer).encode(tokenizer, "a", "b", (("m.py", "one"), ("n.py", "two")))
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<fim_prefix>one\n\ntwo\n\na<fim_suffix>b<fim_middle>"


def test_a_gguf_file_may_name_the_tokens():
    metadata = gguf_metadata(trained_byte_level("qwen2"), "qwen2")
    names = metadata["tokenizer.ggml.tokens"]
    named = {"fim_pre_token_id": names.index("a"), "suffix_token_id": names.index("b"), "fim_mid_token_id": 40}
    tokenizer = tokenizer_from_gguf(changed(metadata, **named, fim_pad_token_id=41))
    infill = open_infill(tokenizer)
    ids = infill.encode(tokenizer, "1", "2")
    assert ids == [names.index("a"), *tokenizer.encode("1"), names.index("b"), *tokenizer.encode("2"), 40]
    assert {40, 41} < infill.ends
    assert open_infill(tokenizer_from_gguf(changed(metadata, fim_pre_token_id=1, fim_suf_token_id=2))) is None


def test_sentencepiece_puts_a_space_before_the_first_text_alone():
    """And the beginning of a text where the model has one."""
    metadata = sentencepiece_metadata()
    names = [*metadata["tokenizer.ggml.tokens"], "▁<PRE>", "▁<SUF>", "▁<MID>"]
    scores = [*metadata["tokenizer.ggml.scores"].tolist(), 0.0, 0.0, 0.0]
    types = [*metadata["tokenizer.ggml.token_type"], 3, 3, 3]
    tokenizer = tokenizer_from_gguf(changed(metadata, tokens=names, scores=scores, token_type=types))
    ids = open_infill(tokenizer).encode(tokenizer, "the", "answer")
    pieces = [names[token_id] for token_id in ids]
    assert pieces[:2] == ["<s>", "▁<PRE>"] and pieces[-1] == "▁<MID>"
    assert "".join(pieces[2:-1]) == "▁the▁<SUF>answer"


@pytest.mark.slow
@pytest.mark.skipif(not CODER.exists(), reason="the model is not on this machine")
def test_a_coder_completes_the_middle_of_a_function():
    tokenizer = load_tokenizer(CODER)
    infill = open_infill(tokenizer)
    before, after = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"
    ids = infill.encode(tokenizer, before, after)
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in (before, after)]
    assert ids == [151659, *plain[0], 151661, *plain[1], 151660]
    params = {"temperature": 0, "max_new_tokens": 4, "stop_token_ids": infill.stop_token_ids(None)}
    with Engine(model_path=str(CODER), context_length=256) as engine:
        assert engine.generate(input_ids=ids, sampling_params=params)["text"].startswith("a + b")
