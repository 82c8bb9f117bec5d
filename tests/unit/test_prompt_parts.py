"""Which part of a prompt is whose: for templates that reorder, drop, trim and look at what they are given."""

from __future__ import annotations

import itertools
import random

import pytest
from chat_templates import DATED, LAST, TURNS

from mooli.frontend import prompt_parts as module
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.prompt_parts import prompt_parts
from mooli.frontend.tool_messages import read_tools
from mooli.frontend.tool_prompt import for_template

TOOLS = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": {"type": "object"}}}
    for name, text in (("look", "Looks at a file"), ("run", "Runs a command"))
]


def called(name: str, value: str) -> dict:
    return {"id": value, "type": "function", "function": {"name": name, "arguments": f'{{"path": "{value}"}}'}}


AGENT = [
    {"role": "system", "content": "  You help. "},
    {"role": "user", "content": "fix it"},
    {"role": "assistant", "reasoning_content": "I must look first", "tool_calls": [called("look", "a.py")]},
    {"role": "tool", "tool_call_id": "a.py", "content": "fix it"},
    {"role": "assistant", "content": "<think>\nclear\n</think>\n\nDone."},
    {"role": "user", "content": "<tool_response>I say this</tool_response>"},
]


def whose(template: str, messages: list, tools: list | None = None, **arguments) -> list[tuple[str, int, str]]:
    """Kind, index and words of each part; together they are the prompt."""
    made, given = ChatTemplate(template), read_tools(tools)
    text, parts = prompt_parts(made, messages, given, **arguments)
    told, shown = for_template(made, messages, given)
    assert text == made.render(told, tools=shown, **arguments)
    assert "".join(text[part.start : part.end] for part in parts) == text
    assert all(one.end == other.start for one, other in itertools.pairwise(parts))
    return [(part.kind, part.index, text[part.start : part.end]) for part in parts]


def words_of(found: list[tuple[str, int, str]], kind: str, index: int) -> str:
    return "".join(words for *owner, words in found if owner == [kind, index])


def test_each_message_and_tool_has_its_words() -> None:
    found = whose(TURNS, AGENT, TOOLS)
    assert "You help." in words_of(found, "message", 0)
    assert '"look", "description": "Looks at a file"' in words_of(found, "tool", 0)
    assert "Runs a command" in words_of(found, "tool", 1)
    assert "fix it" in words_of(found, "message", 1) and "a.py" in words_of(found, "message", 2)
    assert words_of(found, "message", 3).count("fix it") == 1, "the same words of somebody else"
    assert "Done." in words_of(found, "message", 4) and "clear" in words_of(found, "message", 4)
    assert "I say this" in words_of(found, "message", 5), "the template looks how it begins"
    assert found[-1][0] == "end" and found[-1][2].endswith("assistant\n")


def test_what_a_template_drops_is_nobodys_and_what_it_moves_is_found_there() -> None:
    gone = whose(TURNS, [*AGENT, {"role": "user", "content": "thanks"}])
    assert "clear" not in words_of(gone, "message", 4) and "Done." in words_of(gone, "message", 4)
    moved = whose(LAST, [*AGENT, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "go on"}], TOOLS)
    order = [(kind, index) for kind, index, _ in moved]
    assert order.index(("message", 0)) > order.index(("message", 1)), "the system stands before the last message"
    assert "You help." in words_of(moved, "message", 0) and "look" in words_of(moved, "tool", 0)
    assert not words_of(moved, "message", 2) and not words_of(moved, "message", 3), "calls and results are dropped"
    plain = whose(DATED, AGENT, TOOLS)
    assert "Looks at a file" in words_of(plain, "tool", 0), "told in the system's words"
    assert "a.py" in words_of(plain, "message", 2) and "Today is" in words_of(plain, "message", 0)


def test_the_characters_of_marks_may_stand_in_the_text() -> None:
    found = whose(
        DATED, [{"role": "user", "content": "\U00100000 a \U00100001"}, {"role": "assistant", "content": "b"}]
    )
    assert "\U00100000 a \U00100001" in words_of(found, "message", 0) and "b" in words_of(found, "message", 1)


def test_random_conversations_are_cut_where_their_messages_are() -> None:
    rng = random.Random(7)
    for trial in range(150):
        messages = [{"role": "system", "content": f"system{trial}"}] if rng.random() < 0.6 else []
        for i in range(rng.randrange(1, 6)):
            text = rng.choice(
                [f"words{i}", f" words{i}\n", "same", f"<tool_response>words{i}", f"words{i}</think>x{i}"]
            )
            messages.append({"role": "user", "content": text})
            messages.append(
                {"role": "assistant", "content": rng.choice([f"answer{i}", "same", f"<think>a</think>answer{i}"])}
            )
        messages.append({"role": "user", "content": "last"})
        found = whose(rng.choice([TURNS, DATED, LAST]), messages, TOOLS if rng.random() < 0.5 else None)
        for i, message in enumerate(messages):
            words = (
                message["content"].split("</think>")[-1].strip()
                if message["role"] == "assistant"
                else message["content"].strip()
            )
            assert words in words_of(found, "message", i)


def test_marks_that_change_a_template_are_left_out_and_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = "{% for m in messages %}[{{ m.content | length }}]{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": str(i)} for i in range(100)]
    rendered = []
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda self, *a, **k: rendered.append(1) or render(self, *a, **k))
    found = whose(counted, messages)
    assert found == [("end", 0, found[0][2])]
    assert len(rendered) <= module.MAX_RENDERINGS + 2
