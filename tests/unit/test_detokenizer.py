"""Streams of text: whole characters only, and together exactly what decoding everything gives."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mooli.frontend.detokenizer import IncrementalDetokenizer
from mooli.frontend.tokenizer import Tokenizer

WORDS = ["the", " answer", "你", "好", " é", "\n\n", "👍", "\u200d", "\ufffd", "  ", "."]


def with_special(backend):
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<tool> ", special=False, normalized=False)])
    return Tokenizer(backend, vocab_size=backend.get_vocab_size() + 3)


def byte_level():
    """256 bytes, then words and pieces of words that cut characters in two."""
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [spelling.pre_tokenize_str(word)[0][0] for word in WORDS]
    pieces = [p for word in spelled for p in (word, word[:2], word[1:], word[-2:]) if p]
    tokens = list(dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces]))
    backend = Backend(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    backend.pre_tokenizer, backend.decoder = spelling, decoders.ByteLevel()
    return with_special(backend)


def sentencepiece():
    """Byte-fallback tokens first, and the leading space stripped, as Llama 2 does."""
    words = ["▁", "▁▁", *(word.replace(" ", "▁") for word in WORDS), "▁x"]
    tokens = list(dict.fromkeys(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *words]))
    vocab = {t: i for i, t in enumerate(tokens)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return with_special(backend)


def metaspace():
    words = ["▁the", "▁x", "y", "▁", "▁answer"]
    backend = Backend(models.BPE({t: i for i, t in enumerate(words)}, []))
    backend.decoder = decoders.Metaspace()
    return with_special(backend)


KINDS = {"byte level": byte_level(), "sentencepiece": sentencepiece(), "metaspace": metaspace()}


def cut(ids, cuts):
    edges = [0, *sorted(c for c in cuts if c <= len(ids)), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


def random_ids(tokenizer):
    anything = st.integers(0, tokenizer.vocab_size + 2)
    words = st.integers(max(0, tokenizer.vocab_size - 30), tokenizer.vocab_size - 1)
    characters = st.sampled_from(["👩\u200d👩", "你", "é", "a "]).map(str.encode)
    spelled = characters.map(lambda raw: [i for b in raw for i in ids_of_byte(tokenizer, b)])
    return st.lists(st.lists(anything | words, min_size=1, max_size=3) | spelled, max_size=10).map(
        lambda groups: list(itertools.chain(*groups))
    )


def ids_of_byte(tokenizer, byte):
    if tokenizer.is_byte_level:
        return [next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([byte]))]
    return [byte + 1] if tokenizer.is_byte_fallback(byte + 1) else []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=250, deadline=None)
@given(data=st.data(), skip=st.booleans(), cuts=st.sets(st.integers(0, 40)))
def test_the_pieces_are_together_the_whole_text(kind, data, skip, cuts):
    tokenizer = KINDS[kind]
    ids = data.draw(random_ids(tokenizer))
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join([stream.push(piece) for piece in cut(ids, cuts)]) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
@pytest.mark.parametrize("text", ["👩\u200d👩\u200d👧 你好 é", "x你y好z", "flag 🇨🇭!"])
def test_no_half_character_is_ever_shown(kind, text):
    tokenizer = KINDS[kind]
    stream = IncrementalDetokenizer(tokenizer)
    ids = [i for byte in text.encode() for i in ids_of_byte(tokenizer, byte)]
    shown = ""
    for token_id in ids:
        shown += stream.push([token_id])
        assert text.startswith(shown)
    assert shown + stream.flush() == text


def test_byte_level_characters_are_shown_as_soon_as_they_are_whole():
    tokenizer = KINDS["byte level"]
    stream = IncrementalDetokenizer(tokenizer)
    shown = [stream.push(ids_of_byte(tokenizer, byte)) for byte in "é你".encode()]
    assert shown == ["", "é", "", "", "你"]


def test_a_run_of_fallback_bytes_is_shown_when_it_is_over():
    tokenizer = KINDS["sentencepiece"]
    stream = IncrementalDetokenizer(tokenizer)
    run = [i for byte in "你好".encode() for i in ids_of_byte(tokenizer, byte)]
    word = next(i for i in range(257, tokenizer.vocab_size) if tokenizer.token_text(i) == "the")
    assert [stream.push([i]) for i in run] == [""] * 6
    assert stream.push([word]) == "你好the"


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_an_unfinished_character_is_shown_as_a_replacement_at_the_end(kind):
    tokenizer = KINDS[kind]
    stream = IncrementalDetokenizer(tokenizer)
    assert stream.push(ids_of_byte(tokenizer, 0xF0)) == ""
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_a_token_does_not_grow_with_the_text(kind, monkeypatch):
    tokenizer = KINDS[kind]
    lengths = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: lengths.append(len(ids)) or decode(ids, **options))
    stream = IncrementalDetokenizer(tokenizer)
    word = tokenizer.vocab_size - 8
    assert tokenizer.has_token(word)
    for _ in range(300):
        stream.push([word])
    assert max(lengths, default=0) <= 16


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_to_put_spaces_between_special_tokens_give_the_same_text(kind):
    tokenizer = KINDS[kind]
    special = min(tokenizer.special_ids)
    texts = set()
    for spaces in (True, False):
        stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=False, spaces_between_special_tokens=spaces)
        texts.add(stream.push([special, special]) + stream.flush())
        texts.add(tokenizer.decode([special, special], skip_special_tokens=False, spaces_between_special_tokens=spaces))
    assert len(texts) == 1
