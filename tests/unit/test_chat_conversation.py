"""A conversation of the command line: what still fits, its file, what is typed, what Markdown is finished."""

from __future__ import annotations

import json
import random

import pytest

from mooli.chat.conversation import Conversation, ConversationFileError
from mooli.chat.keyboard import _joined
from mooli.chat.replies import Piece, Reply
from mooli.chat.screen import MarkdownScreen, finished_blocks
from mooli.errors import RequestError


def talked(turns: int, length: int = 10) -> Conversation:
    conversation = Conversation("be brief")
    for turn in range(turns):
        conversation.messages.append({"role": "user", "content": f"{turn}" * length})
        conversation.messages.append({"role": "assistant", "content": "a" * length})
    conversation.messages.append({"role": "user", "content": "last"})
    return conversation


def count(messages):
    return sum(len(message["content"]) for message in messages)


@pytest.mark.parametrize("seed", range(20))
def test_the_oldest_turns_are_left_out_until_the_rest_fits(seed):
    rng = random.Random(seed)
    conversation = talked(rng.randrange(1, 30), rng.randrange(1, 40))
    context = rng.randrange(60, 900)
    before = conversation.heard()
    left_out = conversation.fit(context, count)
    heard = conversation.heard()
    room = context - context // 4
    assert heard[0] == {"role": "system", "content": "be brief"}
    assert heard[-1]["content"] == "last"
    assert heard[1:] == before[1 + 2 * left_out :]
    assert (left_out == 0) == (count(before) <= room)
    if left_out and len(heard) > 2:  # room for turns to come, and not one turn fewer than that takes
        assert count(heard) <= room * 0.75
    if left_out > 1:
        assert count(before[:1] + before[1 + 2 * (left_out - 1) :]) > room * 0.75
    assert conversation.fit(context, count) == 0


def test_where_the_context_or_the_count_is_not_known_nothing_is_left_out():
    assert talked(50).fit(None, count) == 0
    assert talked(50).fit(100, lambda messages: None) == 0


def test_taking_back_removes_the_last_question_and_its_answer():
    conversation = talked(1)
    assert conversation.take_back() == "last"
    assert conversation.take_back() == "0" * 10
    assert conversation.messages == []
    assert conversation.take_back() is None


def test_settings_are_checked_when_they_are_made():
    conversation = Conversation()
    conversation.set("temperature", "0.5")
    conversation.set("stop", '["x"]')
    with pytest.raises(RequestError, match="temperature"):
        conversation.set("temperature", "-3")
    with pytest.raises(RequestError):
        conversation.set("tempreature", "1")
    conversation.set("stop", "")
    assert conversation.settings == {"temperature": 0.5}


def test_what_is_saved_is_loaded_again(tmp_path):
    conversation = talked(2)
    conversation.messages[1] |= {"reasoning_content": "hm", "cut": "length"}
    conversation.settings = {"temperature": 0}
    path = tmp_path / "talk.json"
    conversation.save(path, "demo")
    assert path.stat().st_mode & 0o077 == 0
    loaded = Conversation()
    loaded.load(path)
    assert loaded == conversation
    assert all("cut" not in message for message in loaded.heard())
    assert [entry.name for entry in tmp_path.iterdir()] == ["talk.json"]


def test_messages_as_openai_has_them_are_loaded_too(tmp_path):
    path = tmp_path / "m.json"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for content in (messages, {"messages": messages}):
        path.write_text(json.dumps(content))
        loaded = Conversation()
        loaded.load(path)
        assert (loaded.system, loaded.messages) == ("s", messages[1:])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[[[[" * 3000,
        "3",
        '{"messages": 3}',
        '[{"role": "tool", "content": "x"}]',
        '[{"role": "user", "content": ["parts"]}]',
        '[{"role": "user"}]',
        '{"messages": [], "settings": {"temperature": -1}}',
        '{"messages": [], "system": 3}',
        '{"messages": [], "mooli_chat": 99}',
    ],
)
def test_a_file_that_is_no_conversation_is_refused_and_changes_nothing(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    conversation = talked(1)
    with pytest.raises(ConversationFileError, match=r"bad\.json"):
        conversation.load(path)
    assert conversation == talked(1)


def test_a_place_that_cannot_be_written_or_read_is_an_error_of_ours(tmp_path):
    for act in (lambda path: talked(1).save(path, "m"), Conversation().load):
        with pytest.raises(ConversationFileError):
            act(tmp_path / "no" / "such.json")


# -- what is typed -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["one", " two "], ["one", "two"]),
        (['"""a', " b", 'c"""', "d"], ["a\n b\nc", "d"]),
        (['"""', "a", "", "b", '"""'], ["a\n\nb"]),
        (['"""in one line"""'], ["in one line"]),
        (['say """x""" please'], ['say """x""" please']),
        (['"""never', "closed"], ["never\nclosed"]),
        ([], []),
    ],
)
def test_quotes_join_lines(lines, messages):
    assert list(_joined(iter(lines))) == messages


# -- Markdown ----------------------------------------------------------------------------------------------------------
TEXT = """# Title

A paragraph with `code`
over two lines.

```python
x = 1

y = 2
```

| a | b |
|---|---|
| 1 | 2 |

~~~~
```

~~~
still code
~~~~

end"""


def test_blocks_are_finished_at_empty_lines_outside_of_code():
    done = TEXT[: finished_blocks(TEXT)]
    assert done.endswith("~~~~\n\n")
    assert finished_blocks("```\na\n\nb\n") == 0
    for cut in range(len(TEXT)):  # what is finished stays so, whatever comes
        end = finished_blocks(TEXT[:cut])
        assert end <= finished_blocks(TEXT)
        assert TEXT[:end].count("```python") == TEXT[:end].count("y = 2")


def test_markdown_is_drawn_once_for_good_whatever_the_pieces(capsys):
    rich = pytest.importorskip("rich.console")
    shown = set()
    for size in (1, 3, 17, len(TEXT)):
        console = rich.Console(record=True, width=60, force_terminal=False)
        screen = MarkdownScreen(console)
        for at in range(0, len(TEXT), size):
            screen.show(Piece("text", TEXT[at : at + size]))
        screen.end()
        shown.add("\n".join(line.rstrip() for line in console.export_text().splitlines() if line.strip()))
    assert len(shown) == 1
    (text,) = shown
    assert "Title" in text and "y = 2" in text and "|---|" not in text


def test_a_reply_gives_what_is_new_and_nothing_where_a_text_was_taken_back():
    reply = Reply()
    assert list(reply.grow_to("text", "ab")) == [("text", "ab")]
    assert list(reply.grow_to("text", "abc")) == [("text", "c")]
    assert list(reply.grow_to("text", "ab")) == []
    assert list(reply.grow_to("reasoning", "r")) == [("reasoning", "r")]
    assert (reply.text, reply.reasoning) == ("abc", "r")
