"""The own tokens of earlier answers in the next turn's prompt: found by ids alone, the same text, apart by owner."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import numpy as np
import pytest
from fake_engine import EOS, _byte_alphabet
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mooli.frontend import own_answers
from mooli.frontend.own_answers import OwnAnswers
from mooli.frontend.tokenizer import Tokenizer
from mooli.types import Request

TURN = EOS + 1
AB, ABC = 258, 259


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, "ab" and "abc"; <eos> and <turn> are special."""
    alphabet = {char: byte for byte, char in enumerate(_byte_alphabet())}
    backend = Backend(
        models.BPE({**alphabet, "<eos>": EOS, "<turn>": TURN, "ab": AB, "abc": ABC}, [("a", "b"), ("ab", "c")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<eos>", "<turn>")])
    return Tokenizer(backend, eos_ids=[EOS])


def taken_up(answers: OwnAnswers, owner: str, ids: list[int]) -> list[int]:
    return answers.taken_up(owner, ids).tolist()


def read(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def request(ids: list[int], owner: str = "me") -> Request:
    prompt = np.asarray(ids, dtype=np.int32)
    return Request(rid="r", prompt_ids=prompt, eos_ids=frozenset([EOS]), namespace=owner)


def test_an_answer_that_is_read_otherwise_comes_back_as_it_was_written(tokenizer):
    answers = OwnAnswers(tokenizer)
    prompt = read(tokenizer, "<turn>u:q<turn>a:")
    answers.add(request(prompt), [*b"abc", AB, EOS])
    second = read(tokenizer, "<turn>u:q<turn>a:abcab<eos><turn>u:abc<turn>a:")
    assert ABC in second[: len(prompt) + 1]
    own = taken_up(answers, "me", second)
    assert own == [*prompt, *b"abc", AB, *second[len(prompt) + 2 :]] and own.count(ABC) == 1
    assert tokenizer.decode(own, skip_special_tokens=False) == tokenizer.decode(second, skip_special_tokens=False)
    # Another owner, another text, another beginning: nothing is known of these.
    assert taken_up(answers, "you", second) == second
    for text in ("<turn>u:q<turn>a:abcxab<eos>", "<turn>u:p<turn>a:abcab<eos>", "<turn>u:q<turn>a:abc"):
        ids = read(tokenizer, text)
        assert taken_up(answers, "me", ids) == ids


def test_an_answer_that_is_read_as_it_was_written_takes_no_room(tokenizer):
    answers = OwnAnswers(tokenizer)
    answers.add(request(read(tokenizer, "<turn>a:")), [ABC, *b"x", EOS])
    answers.add(request(read(tokenizer, "a:")), [*b"abc"])  # no turn
    answers.add(request(read(tokenizer, "<turn>a:")), [])
    answers.settle()
    assert not answers._answers and not answers._ends and len(answers._last) == 1


def test_what_only_looks_like_a_control_token_is_another_text(tokenizer):
    answers = OwnAnswers(tokenizer)
    typed = [TURN, *b"u:<eos>", TURN, *b"a:"]
    answers.add(request(typed), [*b"abc", EOS])
    control = [TURN, *b"u:", EOS, TURN, *b"a:", ABC, EOS]
    assert taken_up(answers, "me", control) == control
    assert taken_up(answers, "me", [*typed, ABC, EOS]) == [*typed, *b"abc", EOS]


def test_conversations_of_many_turns_keep_every_answers_tokens(tokenizer):
    """Against a model of the same that remembers all: what is computed again is only what is new."""
    rng = random.Random(5)
    answers = OwnAnswers(tokenizer)
    for _ in range(30):
        owner, text, cached = rng.choice(["me", "you"]), "", []
        for _ in range(6):
            text += f"<turn>u:{''.join(rng.choices('abcx', k=3))}<turn>a:"
            prompt = taken_up(answers, owner, read(tokenizer, text))
            assert prompt[: len(cached)] == cached
            assert tokenizer.decode(prompt, skip_special_tokens=False) == text
            said = rng.choices([*b"abcx", AB, ABC], k=rng.randrange(1, 9))
            answers.add(request(prompt, owner), [*said, EOS])
            text += tokenizer.decode(said) + "<eos>"
            cached = [*prompt, *said, EOS]


def test_what_is_remembered_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(own_answers, "MAX_ANSWERS", 3)
    monkeypatch.setattr(own_answers, "MAX_PROMPTS", 2)
    monkeypatch.setattr(own_answers, "MAX_ANSWER_TOKENS", 20)
    answers = OwnAnswers(tokenizer)
    for i in range(10):
        prompt = read(tokenizer, f"<turn>u:{i}<turn>a:")
        answers.add(request(prompt), [*b"abc", *b"x" * i, EOS])
        taken_up(answers, "me", read(tokenizer, f"<turn>u:{i}<turn>a:abc{'x' * i}<eos>"))
    answers.settle()
    assert len(answers._answers) == sum(answers._ends.values()) == 3 and len(answers._prompts) == 2
    assert answers._num_prompt_tokens == sum(map(len, answers._prompts.values()))
    answers.add(request(read(tokenizer, "<turn>a:")), [*b"abc" * 7])
    answers.settle()
    assert len(answers._answers) == 3, "too long"


def test_the_log_says_how_much_of_an_answer_a_template_has_changed(tokenizer, caplog):
    caplog.set_level(logging.DEBUG, logger="mooli")
    answers = OwnAnswers(tokenizer)
    prompt = read(tokenizer, "<turn>u:q<turn>a:")
    answers.add(request(prompt), [*b"abc|hm|yes", EOS])
    turn = read(tokenizer, "<turn>u:q<turn>a:abc|hm|yes<eos><turn>u:p<turn>a:")
    again = taken_up(answers, "me", turn)
    assert not caplog.records, "all of it is the same text"
    answers.add(request(again), [*b"abc|hm|no", EOS])
    taken_up(answers, "you", read(tokenizer, "<turn>u:q<turn>a:x<eos>"))
    assert not caplog.records
    taken_up(answers, "me", turn)
    assert not caplog.records, "it is asked for once more"
    answers.add(request(again), [*b"abc|hm|no", EOS])
    taken_up(answers, "me", read(tokenizer, "<turn>u:q<turn>a:abc|hm|yes<eos><turn>u:p<turn>a:no<eos>"))
    (record,) = caplog.records
    assert record.levelname == "INFO" and record.getMessage().startswith("9 of 11 tokens of an earlier answer")


def test_an_answer_that_cannot_be_read_is_let_go(tokenizer):
    answers = OwnAnswers(tokenizer)
    ids = read(tokenizer, "<turn>a:")
    answers.add(replace(request(ids), eos_ids=frozenset()), [0xC3, EOS])  # half a character is read as another one
    assert taken_up(answers, "me", [*ids, 0xC3, EOS]) == [*ids, 0xC3, EOS]
