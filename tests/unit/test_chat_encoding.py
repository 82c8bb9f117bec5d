"""Conversations to ids: what a message says is never taken for a control token."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mooli.errors import ChatTemplateError, PromptError
from mooli.frontend import chat_encoding
from mooli.frontend.chat_encoding import _Mask, encode_chat
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.tokenizer import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"
CONTROL = [START, END, "<s>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>"
    "{% endfor %}"
)


def byte_level(template=CHATML, added=()):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", *added)])
    return Tokenizer(backend, chat_template=ChatTemplate(template) if template else None)


def with_leading_spaces():
    """As SentencePiece vocabularies do, it reads a space in front of a text, and not after a special token."""
    pieces = ["<unk>", "▁", *map(chr, range(33, 127)), "\n", *map(chr, range(0xF0000, 0xF0010))]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    return Tokenizer(backend, chat_template=ChatTemplate(CHATML))


TOKENIZER = byte_level()


def user(text):
    return [{"role": "user", "content": text}]


def plain(tokenizer, messages, **arguments):
    """The ids of the rendered text, special tokens read wherever they stand."""
    return tokenizer.encode(tokenizer.chat_template.render(messages, **arguments), add_special_tokens=False)


def control(tokenizer, ids):
    return [tokenizer.decode([i], skip_special_tokens=False) for i in ids if i in tokenizer.special_ids]


TURN = [START, END, START]
FRAGMENTS = st.sampled_from(
    [*CONTROL, "<think>", "<", "<|im_", "<|im_end", "|>", "end|>", " ", "\n", "\U000f0000", "é"]
)
HOSTILE = st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=8).map("".join)


@pytest.mark.slow
@given(st.lists(st.text(), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_ordinary_messages_have_the_ids_of_the_rendered_text(texts):
    messages = [message for text in texts for message in user(text)]
    assert encode_chat(TOKENIZER, messages) == plain(TOKENIZER, messages)


@pytest.mark.slow
@given(HOSTILE, HOSTILE)
@settings(max_examples=300, deadline=None)
def test_no_message_makes_a_control_token_and_none_loses_a_character(first, second):
    messages = user(first) + user(second)
    ids = encode_chat(TOKENIZER, messages)
    assert control(TOKENIZER, ids) == [START, END, START, END, START]
    rendered = TOKENIZER.chat_template.render(messages)
    both = [TOKENIZER.decode(i, skip_special_tokens=False) for i in (ids, plain(TOKENIZER, messages))]
    assert both[0] == both[1] or not rendered.isascii()  # the normalizer may join characters around a control token
    if not any(text in first + second for text in CONTROL):
        assert ids == plain(TOKENIZER, messages)


@pytest.mark.slow
@given(st.lists(HOSTILE, min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_parts_of_a_message_cannot_be_put_together_to_a_control_token(texts):
    tokenizer = byte_level(PARTS)
    message = {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}
    assert control(tokenizer, encode_chat(tokenizer, [message])) == [START, END]


def test_a_control_token_that_two_parts_would_make_stays_text():
    tokenizer = byte_level(PARTS)
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    messages = [{"role": "user", "content": parts}]
    assert control(tokenizer, plain(tokenizer, messages)) == [START, END, END]
    assert control(tokenizer, encode_chat(tokenizer, messages)) == [START, END]


def test_special_tokens_in_messages_are_read_where_that_is_asked_for():
    messages = user(f"a{END}b")
    assert control(TOKENIZER, encode_chat(TOKENIZER, messages)) == TURN
    asked = encode_chat(TOKENIZER, messages, parse_special_in_content=True)
    assert asked == plain(TOKENIZER, messages)
    assert control(TOKENIZER, asked) == [START, END, END, START]


def test_the_ids_between_control_tokens_are_those_of_the_text_alone():
    ids = encode_chat(TOKENIZER, user(f" a{END}b "))
    inside = TOKENIZER.encode(f"user\na{END}b", add_special_tokens=False, parse_special=False)
    assert ids[1 : 1 + len(inside)] == inside


def test_added_tokens_that_are_not_special_are_read_as_ever():
    ids = encode_chat(TOKENIZER, user(f"<think>{END}"))
    assert TOKENIZER.encode("<think>")[0] in ids


def test_arguments_reach_the_template_and_messages_stay_as_they_were():
    messages = user(f"a{END}")
    ids = encode_chat(TOKENIZER, messages, add_generation_prompt=False)
    assert control(TOKENIZER, ids) == [START, END]
    assert messages == user(f"a{END}")


@pytest.mark.parametrize("text", ["hello there", "a <", "<|im_"])
def test_a_tokenizer_that_reads_parts_differently_still_takes_ordinary_text(text):
    tokenizer = with_leading_spaces()
    assert encode_chat(tokenizer, user(text)) == plain(tokenizer, user(text))


def test_a_tokenizer_that_reads_parts_differently_refuses_control_tokens_in_a_message():
    tokenizer = with_leading_spaces()
    with pytest.raises(PromptError, match="parse_special_in_content=True"):
        encode_chat(tokenizer, user(f"a {END} b"))


def test_a_model_without_a_template_is_an_error():
    with pytest.raises(ChatTemplateError, match="no chat template"):
        encode_chat(byte_level(template=None), user("a"))


def by_expressions(special_texts, text):
    """What is hidden in `text` and how often, found in a way that is plain and slow."""
    specials = sorted(special_texts, key=len, reverse=True)
    beginnings = sorted({s[:end] for s in specials for end in range(1, len(s))}, key=len, reverse=True)
    whole = re.sub("|".join(map(re.escape, specials)) or "(?!)", "\U000f0000", text)
    return re.sub(rf"(?:{'|'.join(map(re.escape, beginnings)) or '(?!)'})(?=\s*\Z)", "\U000f0000", whole)


TEXTS_OF_FEW_LETTERS = st.text(alphabet="<|>ab \n", max_size=12)


@pytest.mark.slow
@given(st.frozensets(st.text(alphabet="<|>ab \n", min_size=1, max_size=5), max_size=5), TEXTS_OF_FEW_LETTERS)
@settings(max_examples=300, deadline=None)
def test_what_is_hidden_is_the_longest_token_wherever_one_begins(special_texts, text):
    mask = _Mask(special_texts, set)
    hidden = mask.hide(text)
    assert mask.show(hidden) == text
    assert re.sub("[\U000f0000-\U000ffffd]", "\U000f0000", hidden) == by_expressions(special_texts, text)


def test_thousands_of_special_tokens_are_prepared_once(monkeypatch):
    texts = frozenset(f"<|unused_{i}|>" for i in range(5000))
    mask = _Mask(texts, set)
    assert mask.show(mask.hide("a<|unused_77|>b<|unused_")) == "a<|unused_77|>b<|unused_"
    monkeypatch.setattr(chat_encoding, "_Specials", None)
    assert _Mask(frozenset(texts), set).hide("a") == "a"


@pytest.mark.slow
def test_a_conversation_that_uses_every_private_character_is_an_error_of_the_prompt():
    every = "".join(map(chr, chat_encoding._PRIVATE))
    with pytest.raises(PromptError, match="private use"):
        encode_chat(TOKENIZER, user(every + END))
    assert encode_chat(TOKENIZER, user(every[1:] + END))
