"""Content blocks of Anthropic's messages, as turns in the shape that all dialects share.

Owns what is read of each type of block, and what is refused of it by name. Never knows a whole request.

Source: Anthropic's API reference, Messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mooli.server.routing import HttpError

Block = dict[str, Any]
"""A content block: an object with a `type`. Texts are served; of the assistant's reasoning too (a signature is left
aside, as none is given out) and calls (`tool_use`); of the user's what they returned (`tool_result`)."""

PART_SEPARATOR = "\n"
"""Between the blocks of a message, and between messages of one role that become one turn."""


def add_turn(turns: list[dict[str, Any]], turn: dict[str, Any]) -> None:
    """As one with the last turn where both are of one role."""
    last = turns[-1] if turns else None
    if last is None or last["role"] != turn["role"]:
        turns.append(turn)
        return
    for name in ("content", "reasoning_content"):
        texts = [value[name] for value in (last, turn) if name in value]
        if texts:
            last[name] = PART_SEPARATOR.join(texts)
    if "tool_calls" in turn:
        last["tool_calls"] = [*last.get("tool_calls", ()), *turn["tool_calls"]]


_OF_OTHERS = ("server_tool_use", "mcp_tool_use", "_tool_result")
"""How types of blocks end that tell of tools which Anthropic's servers call."""


def assistant_turn(content: str | Sequence[Block], where: str) -> dict[str, Any]:
    """A turn. What Anthropic's own tools did, and returned, is left aside."""
    blocks = content if isinstance(content, str) else [
        block for block in content if not str(block.get("type")).endswith(_OF_OTHERS)
    ]  # fmt: skip
    turn: dict[str, Any] = {
        "role": "assistant",
        "content": PART_SEPARATOR.join(texts_of(blocks, where, "text", beside=("thinking", "tool_use"))),
    }
    reasoning = [] if isinstance(blocks, str) else texts_of(blocks, where, "thinking", beside=("text", "tool_use"))
    if reasoning:
        turn["reasoning_content"] = PART_SEPARATOR.join(reasoning)
    calls = []
    for index, block in enumerate(() if isinstance(content, str) else content):
        if block.get("type") == "tool_use":
            name, given, at = block.get("name"), block.get("input"), f"{where}[{index}]"
            if not isinstance(name, str) or not name or not isinstance(given, (dict, type(None))):
                raise HttpError(400, f"{at} must have a name and an input, which is an object.", param="messages")
            function = {"name": name, "arguments": given or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
    if calls:
        turn["tool_calls"] = calls
    return turn


def results_of(content: str | Sequence[Block], where: str) -> list[dict[str, Any]]:
    """What tools returned, each as a message. What is no text is a note: the model may know what it asked for."""
    found = []
    for index, block in enumerate(() if isinstance(content, str) else content):
        if block.get("type") != "tool_result":
            continue
        said = block.get("content")
        if isinstance(said, list):
            texts = [_result_text(item, f"{where}[{index}].content[{i}]") for i, item in enumerate(said)]
            said = PART_SEPARATOR.join(texts)
        if not isinstance(said, (str, type(None))):
            raise HttpError(400, f"{where}[{index}].content must be a string or blocks.", param="messages")
        said = said or ""
        if block.get("is_error") and "error" not in said[:20].lower():
            said = f"Error: {said}"
        found.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": said})
    return found


def _result_text(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise HttpError(400, f"{where} has no type: a text is {{'type': 'text', 'text': …}}.", param="messages")
    if kind != "text":
        return f"[{kind[:40]}]"
    if not isinstance(block.get("text"), str):
        raise HttpError(400, f"{where}.text must be a string.", param="messages")
    return str(block["text"])


def texts_of(content: str | Sequence[Block], where: str, wanted: str, beside: Sequence[str] = ()) -> list[str]:
    """The texts of the blocks of type `wanted`. Raises HttpError for a type that is neither that nor in `beside`."""
    if isinstance(content, str):
        return [content]
    texts = []
    for index, block in enumerate(content):
        at, kind = f"{where}[{index}]", block.get("type")
        if not isinstance(kind, str):
            raise HttpError(400, f"{at} has no type: a text is {{'type': 'text', 'text': …}}.", param=at)
        if kind == wanted:
            if not isinstance(block.get(kind), str):
                raise HttpError(400, f"{at}.{kind} must be a string.", param=at)
            texts.append(block[kind])
        elif kind not in beside:
            raise HttpError(400, f"{at} is of type {kind[:40]!r}, but only text is supported yet.", param=at)
    return texts
