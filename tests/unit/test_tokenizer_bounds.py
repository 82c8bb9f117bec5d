"""What a tokenizer's file may ask for, and what a text may cost before it is known to be too long."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import time

import numpy as np
import pytest
from made_tokenizers import CONTROL, TEXTS, gguf_metadata, sentencepiece_metadata, trained_byte_level, write_folder
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from model_files import demo_path
from mooli.errors import ContextLengthError, PromptError, TokenizerError
from mooli.frontend import tokenizer_bounds
from mooli.frontend.chat_encoding import encode_chat
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.gguf_tokenizer import tokenizer_from_gguf
from mooli.frontend.inputs import GenerateCall, InputRules
from mooli.frontend.tokenizer import Tokenizer, load_tokenizer
from mooli.frontend.tokenizer_bounds import byte_level_alphabet

FOLD = "a" * 1000


def folder_with(tmp_path, **parts):
    """A model folder whose tokenizer.json has these parts."""
    write_folder(tmp_path, trained_byte_level("gpt-2"))
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    for name, part in parts.items():
        content[name] = part(content[name]) if callable(part) else part
    file.write_text(json.dumps(content))
    return tmp_path


def state(part):
    return json.loads(part.__getstate__())


def charsmap(*texts):
    """A table of replacements as SentencePiece writes it, with an empty trie."""
    return base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"".join(t.encode() + b"\0" for t in texts)).decode()


GROWING = {
    "three replaces": normalizers.Sequence([normalizers.Replace("a", FOLD)] * 3),
    "an expression": normalizers.Sequence([normalizers.Replace(Regex(""), FOLD)] * 2),
    "doubling": normalizers.Sequence([normalizers.Replace("a", "aa")] * 30),
    "in sequences": normalizers.Sequence([normalizers.Sequence([normalizers.Replace("a", FOLD)])] * 2),
    "prepended": normalizers.Prepend("a" * 5000),
    "bytes of bytes": normalizers.Sequence([normalizers.ByteLevel()] * 30),
    "no end of steps": normalizers.Sequence([normalizers.NFC()] * 1000),
}


@pytest.mark.parametrize("normalizer", GROWING.values(), ids=GROWING)
def test_a_file_that_multiplies_texts_is_refused_before_it_is_loaded(tmp_path, normalizer, monkeypatch):
    # A token that the library would send through these steps while it loads.
    added = [{"id": 900, "content": "a" * 99, "normalized": True, "special": False}]
    folder = folder_with(
        tmp_path, normalizer=state(normalizer), added_tokens=lambda tokens: [*tokens, {**tokens[0], **added[0]}]
    )
    monkeypatch.setattr(Backend, "from_buffer", None)
    with pytest.raises(TokenizerError, match=r"times as long|1000 steps"):
        load_tokenizer(folder)


def test_a_table_of_long_replacements_is_refused(tmp_path):
    precompiled = {"type": "Precompiled", "precompiled_charsmap": charsmap("x", "y" * 30_000)}
    with pytest.raises(TokenizerError, match="times as long"):
        load_tokenizer(folder_with(tmp_path, normalizer=precompiled))


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("decoder", state(decoders.Sequence([decoders.Replace("a", FOLD)] * 3)), "answers .* times as long"),
        ("post_processor", lambda _: template("$A " * 100), "each text 100 times"),
        ("post_processor", lambda _: template("<|endoftext|> " * 2000 + "$A"), "2000 tokens beside"),
        ("pre_tokenizer", state(pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 30)), "times as long"),
        ("model", lambda model: {**model, "end_of_word_suffix": "#" * 1000}, "end_of_word_suffix"),
        (
            "model",
            {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": "##"}
            | {"max_input_chars_per_word": 10**9},
            "max_input_chars_per_word",
        ),
        ("model", lambda model: {**model, "vocab": {**model["vocab"], "x" * 5000: 899}}, "token of 5000 characters"),
        ("normalizer", {"pattern": {"String": "a"}, "content": "b"}, "tokenizer.json failed"),
        ("normalizer", [], "tokenizer.json failed"),
        ("added_tokens", 5, "tokenizer.json failed"),
    ],
)
def test_other_parts_of_the_file_are_bounded_too(tmp_path, part, value, says):
    with pytest.raises(TokenizerError, match=says):
        load_tokenizer(folder_with(tmp_path, **{part: value}))


def template(single):
    return state(processors.TemplateProcessing(single=single.strip(), special_tokens=[("<|endoftext|>", 0)]))


def test_a_key_that_is_there_twice_cannot_hide_a_part(tmp_path):
    file = write_folder(tmp_path, trained_byte_level("gpt-2")) / "tokenizer.json"
    text = file.read_text().rstrip().removesuffix("}")
    file.write_text(text + ', "normalizer": ' + json.dumps(state(GROWING["three replaces"])) + "}")
    with pytest.raises(TokenizerError, match="duplicate key 'normalizer'"):
        load_tokenizer(tmp_path)


def test_more_added_tokens_than_a_model_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_bounds, "_MAX_ADDED_TOKENS", 100)
    declared = {str(i): {"content": f"<{i}>"} for i in range(101)}
    folder = write_folder(tmp_path, trained_byte_level("gpt-2"), added_tokens_decoder=declared)
    with pytest.raises(TokenizerError, match="added tokens"):
        load_tokenizer(folder)


def test_added_tokens_are_added_in_groups(tmp_path):
    backend = trained_byte_level("gpt-2")
    size = backend.get_vocab_size()
    declared = {str(size + i): {"content": f"<{i}>", "special": i < 500} for i in range(1000)}
    folder = write_folder(tmp_path, backend, added_tokens_decoder=declared)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == size + 1000
    assert tokenizer.encode("<7><700>") == [size + 7, size + 700]
    assert {size + 7}.isdisjoint(tokenizer.encode("<7>", parse_special=False))


PUBLISHED = {
    "llama 2": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "gemma": normalizers.Replace(" ", "▁"),
    "albert": normalizers.Sequence(
        [
            normalizers.Replace("``", '"'),
            normalizers.Replace("''", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    ),
    "xlm-r": normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), "▁")]),
    "bert": normalizers.BertNormalizer(),
    "clip": normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]),
    "nfkc": normalizers.NFKC(),
    "qwen": normalizers.NFC(),
}


@pytest.mark.parametrize("normalizer", PUBLISHED.values(), ids=PUBLISHED)
def test_published_normalizers_are_loaded_and_texts_of_a_million_characters_are_taken(tmp_path, normalizer):
    tokenizer = load_tokenizer(folder_with(tmp_path, normalizer=state(normalizer)))
    assert tokenizer.encode("a b")
    assert tokenizer._max_chars >= 1_000_000


# What goes wrong later


class Panic(BaseException):
    """As the library's own, which is no Exception."""


class Failing:
    def __init__(self, backend, error):
        self._backend, self._error = backend, error

    def __getattr__(self, name):
        if name in ("encode", "encode_batch", "encode_batch_fast", "decode", "decode_batch"):

            def fail(*_, **__):
                raise self._error

            return fail
        return getattr(self._backend, name)


@pytest.mark.parametrize("error", [Panic("over"), ValueError("over"), Exception("over")], ids=repr)
def test_whatever_the_library_raises_is_an_error_of_ours(error):
    tokenizer = Tokenizer(Failing(trained_byte_level("gpt-2"), error))
    with pytest.raises(PromptError, match="over"):
        tokenizer.encode("a")
    marker, own_ids = tokenizer._marker_backend()
    tokenizer._marker_backend = lambda: (Failing(marker, error), own_ids)
    with pytest.raises(PromptError, match="over"):
        tokenizer.special_spans(next(iter(tokenizer.special_texts)))
    for ids in ([5], [5] * 1000):
        with pytest.raises(TokenizerError, match="over"):
            tokenizer.decode(ids)


def test_interrupting_is_not_an_error_of_the_prompt():
    tokenizer = Tokenizer(Failing(trained_byte_level("gpt-2"), KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")
    with pytest.raises(KeyboardInterrupt):
        tokenizer.decode([5])


def test_an_expression_that_never_ends_ends_in_an_error():
    backend = trained_byte_level("gpt-2")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated")
    with pytest.raises(PromptError, match="cannot read the text"):
        Tokenizer(backend).encode("a" * 60 + "c")


def test_a_vocabulary_that_lacks_what_it_needs_is_an_error_of_the_prompt():
    with pytest.raises(PromptError, match="cannot read the text"):
        Tokenizer(Backend(models.Unigram([("a", 0.0)]))).encode("b")


def test_a_text_that_its_steps_make_too_long_is_refused(tmp_path):
    grows = normalizers.Replace("b", "c" * 900)
    tokenizer = load_tokenizer(folder_with(tmp_path, normalizer=state(grows)))
    assert tokenizer.encode("b")
    with pytest.raises(PromptError, match="characters"):
        tokenizer.encode("b" * 10_000)


def test_what_an_error_quotes_of_a_file_is_cut(tmp_path):
    with pytest.raises(TokenizerError) as info:
        load_tokenizer(folder_with(tmp_path, normalizer={"type": "x" * 100_000}))
    assert len(str(info.value)) < 2000


def test_an_id_of_more_than_31_bits_is_an_error_of_the_prompt(tmp_path):
    backend = Backend(models.BPE({"a": 2**31}, []))
    rules = InputRules(
        encoder=Tokenizer(backend),
        vocab_size=10,
        context_length=100,
        eos_ids=frozenset(),
        namespace="",
        next_seed=lambda: 0,
        preferred={},
    )
    with pytest.raises(PromptError, match="gave id 2147483648"):
        rules.prepare(GenerateCall(prompt="a"))


# How many tokens there are at least


def least_is_right(tokenizer, texts):
    for text in texts:
        least = tokenizer.least_tokens(text)
        assert least <= len(tokenizer.encode(text, add_special_tokens=False)), text[:80]
        assert least <= len(tokenizer.encode(text, add_special_tokens=False, parse_special=False)), text[:80]


LONG = ["e\u0301" * 3000, "가" * 3000, " " * 5000, "\n" * 999, "a" * 5000, "<|im_end|>   " * 500, "\U0001f9ff" * 500]
LONG += [jamo * 1000 for jamo in ("\u1112\u1161\u11ab", "\u1fb3\u0342", "u\u031b\u0323")]


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "qwen35", "smollm", "tekken"])
def test_no_text_has_fewer_tokens_than_is_said(tmp_path, name):
    for tokenizer in (
        load_tokenizer(write_folder(tmp_path, trained_byte_level(name))),
        tokenizer_from_gguf(gguf_metadata(trained_byte_level(name), name)),
    ):
        least_is_right(tokenizer, [*TEXTS.values(), *LONG])
        assert tokenizer.least_tokens("word " * 10_000) > 100


def test_it_holds_for_byte_fallback_and_for_tokens_that_take_the_spaces_around_them(tmp_path):
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata())
    least_is_right(tokenizer, [*TEXTS.values(), *LONG])
    assert tokenizer.least_tokens("word " * 10_000) > 100
    backend = trained_byte_level("gpt-2")
    backend.add_special_tokens([AddedToken("<x>", special=True, normalized=False, lstrip=True, rstrip=True)])
    tokenizer = load_tokenizer(write_folder(tmp_path, backend))
    assert len(tokenizer.encode("<x>" + " " * 5000)) == 1
    least_is_right(tokenizer, ["<x>" + " " * 5000, *TEXTS.values(), *LONG])
    assert tokenizer.least_tokens("word " * 10_000) > 100


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", normalizers.Strip()),
        ("normalizer", normalizers.Replace("a", "")),
        ("normalizer", normalizers.Replace(Regex("a+"), "a")),
        ("normalizer", normalizers.StripAccents()),
        ("pre_tokenizer", pre_tokenizers.Whitespace()),
        ("pre_tokenizer", pre_tokenizers.Split("a", "removed")),
    ],
)
def test_where_text_may_vanish_nothing_is_said(tmp_path, part, value):
    tokenizer = load_tokenizer(folder_with(tmp_path, **{part: state(value)}))
    assert tokenizer.least_tokens("a" * 100_000) == 0


def test_characters_that_a_vocabulary_leaves_out_are_not_counted():
    alphabet = byte_level_alphabet()
    vocab = {
        char: index for index, (char, byte) in enumerate(alphabet.items()) if byte not in (4, 0xF1, 0xC0, ord("z"))
    }
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(backend, bounds=tokenizer_bounds.text_bounds(backend, 1))
    assert tokenizer.encode("\x04z") == []
    least_is_right(tokenizer, ["\x04zzz" * 1000, "a\x04z" * 1000, "\U00040000" * 1000, *TEXTS.values(), *LONG])
    assert tokenizer.least_tokens("a\x04z" * 1000) == 1000
    backend.normalizer = normalizers.Replace("a", "z")
    assert tokenizer_bounds.text_bounds(backend, 1).chars_per_token is None
    del vocab[next(char for char, byte in alphabet.items() if byte == 0x80)]
    backend.model, backend.normalizer = models.BPE(vocab, []), normalizers.NFC()
    assert tokenizer_bounds.text_bounds(backend, 1).chars_per_token is None


def test_a_real_file_says_how_many_there_are_at_least():
    path = demo_path()
    if path is None:
        pytest.skip("the demo model is not here")
    tokenizer = load_tokenizer(path)
    least_is_right(tokenizer, [*TEXTS.values(), *LONG])
    assert tokenizer.least_tokens("word " * 10_000) > 100


def test_nothing_is_said_where_all_unknown_is_one_token():
    backend = Backend(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True))
    assert Tokenizer(backend).least_tokens("b" * 100_000) == 0


class CountingEncoder:
    def __init__(self, tokenizer):
        self._tokenizer, self.num_calls = tokenizer, 0

    def encode(self, text):
        self.num_calls += 1
        return self._tokenizer.encode(text)

    def least_tokens(self, text):
        return self._tokenizer.least_tokens(text)


def test_a_prompt_that_no_context_holds_is_refused_without_tokenising(tmp_path):
    encoder = CountingEncoder(load_tokenizer(write_folder(tmp_path, trained_byte_level("qwen2"))))
    rules = InputRules(
        encoder=encoder,
        vocab_size=10_000,
        context_length=100,
        eos_ids=frozenset(),
        namespace="",
        next_seed=lambda: 0,
        preferred={},
    )
    with pytest.raises(ContextLengthError, match=r"500000 characters, which are at least \d+ tokens"):
        rules.prepare(GenerateCall(prompt="word " * 100_000))
    with pytest.raises(ContextLengthError, match=r"prompt 1: the prompt has"):
        rules.prepare(GenerateCall(prompt=["a", "word " * 100_000]))
    assert encoder.num_calls == 1
    assert len(rules.prepare(GenerateCall(prompt="word")).requests) == 1
    cut = InputRules(
        encoder=encoder,
        vocab_size=10_000,
        context_length=100,
        eos_ids=frozenset(),
        namespace="",
        next_seed=lambda: 0,
        preferred={},
        allow_auto_truncate=True,
    )
    assert len(cut.prepare(GenerateCall(prompt="word " * 10_000)).requests[0].prompt_ids) == 99


def test_a_conversation_that_no_context_holds_is_refused_without_tokenising(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(write_folder(tmp_path, trained_byte_level("qwen2")))
    tokenizer.chat_template = ChatTemplate("{{ messages[0].content }}")
    messages = [{"role": "user", "content": "word " * 10_000}]
    whole = encode_chat(tokenizer, messages)
    assert encode_chat(tokenizer, messages, context_length=len(whole) + 1) == whole
    monkeypatch.setattr(tokenizer, "encode", None)
    with pytest.raises(ContextLengthError, match="at least"):
        encode_chat(tokenizer, messages, context_length=50)


# One text on one thread, and others beside it


@pytest.mark.parametrize("work", ["encode", "special_spans", "decode"])
def test_other_threads_go_on_while_a_long_text_is_worked_on(tmp_path, work):
    tokenizer = load_tokenizer(write_folder(tmp_path, trained_byte_level("qwen2")))
    text = CONTROL[0] + "some words and 123 numbers " * 12_000
    ids = tokenizer.encode(text)
    argument = ids * 4 if work == "decode" else text
    interval, turns, seen = sys.getswitchinterval(), [0], []

    def long_work():
        before = turns[0]
        getattr(tokenizer, work)(argument)
        seen.append(turns[0] - before)

    # So nobody is made to hand over the interpreter: whoever has it keeps it until it lets go by itself.
    sys.setswitchinterval(1000)
    try:
        for _ in range(10):
            thread = threading.Thread(target=long_work)
            thread.start()
            while thread.is_alive():
                turns[0] += 1
                time.sleep(0)
            if seen[-1]:
                break
    finally:
        sys.setswitchinterval(interval)
    assert max(seen) > 0


def test_ids_are_those_of_the_single_functions_of_the_library(tmp_path):
    backend = trained_byte_level("qwen2")
    tokenizer = load_tokenizer(write_folder(tmp_path, backend))
    for text in (*TEXTS.values(), *LONG):
        encoding = backend.encode(text)
        assert tokenizer.encode(text) == encoding.ids
        ids = encoding.ids * 30
        assert tokenizer.decode(ids) == backend.decode(ids)
        special = [
            (i, *place) for i, place in zip(encoding.ids, encoding.offsets, strict=True) if i in tokenizer.special_ids
        ]
        assert tokenizer.special_spans(text) == special
    assert tokenizer.decode(np.array(ids, np.int32)) == backend.decode(ids)


def test_the_library_is_told_to_start_no_threads(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, trained_byte_level("gpt-2"))
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    load_tokenizer(folder)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    load_tokenizer(folder)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
