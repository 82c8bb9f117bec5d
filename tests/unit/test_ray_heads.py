"""What of a body decides where a request goes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mooli.ray.heads import Heads, heads_of
from mooli.server.early_body import model_of

SYSTEM = "You are a gardener who answers in one sentence. " * 40
NUM = 256


def heads(_num: int = NUM, **body: Any) -> Heads:
    found = heads_of(json.dumps(body).encode(), _num)
    assert found is not None
    return found


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_a_conversation_keeps_its_heads_as_it_grows():
    opening = [{"role": "system", "content": "Be short."}, user("Which radish is red?")]
    later = [*opening, {"role": "assistant", "content": "Most are."}, user("And the others?")]
    assert heads(messages=opening) == heads(messages=later)


def test_conversations_behind_a_long_system_text_begin_alike():
    bodies = [{"messages": [{"role": "system", "content": SYSTEM}, user(f"Question {i}")]} for i in range(3)]
    found = [heads(**body) for body in bodies]
    assert len({one.begin for one in found}) == 1
    assert len({one.whole for one in found}) == 3


def test_short_conversations_begin_apart():
    assert heads(messages=[user("One")]).begin != heads(messages=[user("Two")]).begin


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"messages": [user("Hello")]}, {"messages": [user([{"type": "text", "text": "Hello"}])]}),
        ({"system": "S", "messages": [user("Hello")]}, {"system": [{"text": "S"}], "messages": [user("Hello")]}),
        ({"prompt": "Hello"}, {"prompt": ["Hello", "Another"]}),
        ({"text": "Hello"}, {"text": "Hello", "sampling_params": {"temperature": 0}, "stream": True}),
        ({"input_ids": [1, 2]}, {"input_ids": [[1, 2], [3]]}),
    ],
)
def test_the_same_prompt_written_in_another_way(one, other):
    assert heads(**one) == heads(**other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"text": "A"}, {"text": "B"}),
        ({"text": "A"}, {"text": "A", "cache_salt": "s"}),
        ({"text": "A", "cache_salt": "t"}, {"text": "A", "extra_key": "s"}),
        ({"messages": [user("A")]}, {"messages": [user("A")], "tools": [{"name": "f"}]}),
        ({"instructions": "X", "input": "A"}, {"instructions": "Y", "input": "A"}),
        ({"input_ids": [1, 23]}, {"input_ids": [12, 3]}),
    ],
)
def test_what_differs_where_a_cache_would_see_it(one, other):
    assert heads(**one).begin != heads(**other).begin


def test_long_texts_differ_behind_their_head_only_as_conversations():
    one, other = heads(text="x" * NUM + "a"), heads(text="x" * NUM + "b")
    assert one.begin == other.begin
    assert one.whole != other.whole


def test_tenants_are_apart():
    body = b'{"text": "A"}'
    assert heads_of(body, NUM, tenant="t") != heads_of(body, NUM, tenant="u")
    assert heads_of(body, NUM, session="s").session == "s"


def test_salt_of_one_tenant_is_not_anothers_name():
    one = heads_of(b'{"text": "A", "cache_salt": "b"}', NUM, tenant="a")
    other = heads_of(b'{"text": "A", "cache_salt": ""}', NUM, tenant="ab")
    assert one.begin != other.begin


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"model": "m"}',
        b'{"text": ""}',
        b'{"messages": []}',
        b"\xff\xfe",
        b'{"text": "\\ud800"',
        b"[" * 100_000,
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_cannot_be_read_has_no_heads(body):
    assert heads_of(body, NUM) is None


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [None]},
        {"messages": [{"role": 7, "content": {"text": 1}}]},
        {"messages": [{"content": [None, {"text": None}, 5]}]},
        {"messages": "not a list"},
        {"prompt": [[[]]]},
        {"prompt": {"a": 1}},
        {"text": 5},
        {"text": "A", "cache_salt": {"a": []}},
        {"text": "\ud800"},
    ],
)
def test_odd_bodies_have_some_heads_or_none(body):
    heads_of(json.dumps(body).encode(), NUM)
    heads_of(json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass"), NUM)


@pytest.mark.parametrize(
    ("body", "name"),
    [(b'{"model": "m"}', "m"), (b'{"model": 5}', ""), (b"{}", ""), (b"{", ""), (b'{"messages": []}', "")],
)
def test_the_model_that_a_body_asks_for(body, name):
    assert model_of(body) == name
