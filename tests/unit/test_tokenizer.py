"""Tokenizers: the ids of `transformers` for every family, odd input, threads, imports."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import (
    CONTROL,
    TEXTS,
    USER_DEFINED,
    gguf_metadata,
    trained_byte_level,
    write_folder,
)
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from mooli.errors import PromptError
from mooli.frontend.gguf_tokenizer import tokenizer_from_gguf
from mooli.frontend.tokenizer import Tokenizer, load_tokenizer

FAMILIES = [
    "gpt-2",
    "llama-bpe",
    "qwen2",
    "qwen35",
    "lfm2",
    "smollm",
    "starcoder",
    "tekken",
    "dbrx",
    "gpt-4o",
    "deepseek-llm",
    "deepseek-v3",
]


@pytest.fixture(
    scope="module", params=[(f, c) for f in FAMILIES for c in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def family(request, tmp_path_factory):
    """(transformers' tokenizer, ours from the folder, ours from GGUF metadata)"""
    name, control_first = request.param
    backend = trained_byte_level(name, control_first)
    folder = write_folder(tmp_path_factory.mktemp(name), backend)
    return (
        AutoTokenizer.from_pretrained(folder),
        load_tokenizer(folder),
        tokenizer_from_gguf(gguf_metadata(backend, name)),
    )


@pytest.fixture(scope="module")
def qwen():
    return tokenizer_from_gguf(gguf_metadata(trained_byte_level("qwen2"), "qwen2"))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ids_and_text_equal_those_of_transformers(family, text):
    reference, *ours = family
    for tokenizer in ours:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text, parse_special=False) == reference.encode(text, split_special_tokens=True)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids)


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40) | st.text(alphabet="a1 \n\r\t'sS漢é\u0301é٣", max_size=40))
def test_ids_of_random_text_equal_those_of_transformers(family, text):
    reference, *ours = family
    for tokenizer in ours:
        assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "smollm", "tekken"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_comes_back_as_it_was(name, text):
    tokenizer = tokenizer_from_gguf(gguf_metadata(trained_byte_level(name), name))
    for parse_special in (True, False):
        ids = tokenizer.encode(text, parse_special=parse_special)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from([*CONTROL, *USER_DEFINED, "<|", "|>", "im_end", " ", "a", "<"]), max_size=12))
def test_text_of_a_user_never_becomes_a_control_token(family, parts):
    text = "".join(parts)
    for tokenizer in family[1:]:
        ids = tokenizer.encode(text, parse_special=False)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


def test_a_control_token_that_the_vocabulary_must_write_as_itself_is_refused():
    backend = Backend(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0)], unk_id=0))
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("a", parse_special=False) == [2]
    with pytest.raises(PromptError, match="</s>"):
        tokenizer.encode("a</s>", parse_special=False)


# One token, odd input, threads, imports


def test_part_of_a_character_is_shown_as_a_replacement(qwen):
    ids = qwen.encode("\U0001f9ff")
    assert len(ids) > 1
    assert all(qwen.token_text(i) == "\ufffd" for i in ids)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
@pytest.mark.parametrize("parse_special", [True, False])
def test_lone_surrogates_are_an_error_of_the_prompt(qwen, text, parse_special):
    with pytest.raises(PromptError, match="Unicode"):
        qwen.encode(text, parse_special=parse_special)


@pytest.mark.parametrize("text", [None, 3, b"x", ["x"]])
def test_a_prompt_that_is_no_text_is_refused(qwen, text):
    with pytest.raises(PromptError, match="must be a str"):
        qwen.encode(text)


def test_ids_outside_the_vocabulary_decode_to_nothing(qwen):
    ids = qwen.encode("hi")
    assert qwen.decode([-1, *ids, 10**12, 2**32]) == "hi"
    assert qwen.decode(np.array(ids, np.int32)) == "hi"


def test_both_ways_to_read_special_tokens_can_be_used_at_once():
    tokenizer = tokenizer_from_gguf(gguf_metadata(trained_byte_level("qwen2"), "qwen2"))
    text = TEXTS["special"]
    modes = [True, False] * 100
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda mode: tokenizer.encode(text, parse_special=mode), modes))
    for mode, got in zip(modes, ids, strict=True):
        assert got == tokenizer.encode(text, parse_special=mode)
        assert tokenizer.special_ids.isdisjoint(got) != mode


def test_importing_costs_no_native_library():
    code = "import sys, mooli.frontend.tokenizer; sys.exit(bool({'tokenizers', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
