"""A client of the Responses API that believes nothing: the order of the events, their ids and what they repeat."""

from __future__ import annotations

import json
from typing import Any

TEXTS = {
    "response.output_text": ("content", "text"),
    "response.reasoning_text": ("content", "text"),
    "response.reasoning_summary_text": ("summary", "text"),
    "response.function_call_arguments": ("", "arguments"),
    "response.custom_tool_call_input": ("", "input"),
}
"""By name of a text's events, the list of the item with its part ("" for none) and the field that grows."""

PARTS = {"response.content_part": "content", "response.reasoning_summary_part": "summary"}

ENDS = ("response.completed", "response.incomplete", "response.failed")


def responses_events(text: str) -> list[dict[str, Any]]:
    """Of a stream as it went over the wire: each event under its own name."""
    found = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def joined_responses(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The last event's response, which is what the events before it told of it, in the order that clients rely on."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    first, last = events[0]["response"], events[-1]["response"]
    assert events[-1]["type"] in ENDS and last["status"] == events[-1]["type"].removeprefix("response.")
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    output = _items(events[2:-1], is_whole=last["status"] != "failed")
    assert output == last["output"]
    assert len({item["id"] for item in output}) == len(output)
    changing = ("status", "output", "usage", "incomplete_details", "error")
    same = [{name: value for name, value in response.items() if name not in changing} for response in (first, last)]
    assert same[0] == same[1]
    return last


def _items(events: list[dict[str, Any]], *, is_whole: bool) -> list[dict[str, Any]]:
    """One item at a time, one part in it at a time. is_whole: what is begun is ended."""
    output: list[dict[str, Any]] = []
    item: dict[str, Any] | None = None
    is_open = {"part": False, "text": False}
    for event in events:
        kind = event["type"]
        assert event["output_index"] == len(output), event
        if kind == "response.output_item.added":
            assert item is None and event["item"]["status"] == "in_progress"
            item = json.loads(json.dumps(event["item"]))
            is_open = {"part": False, "text": "call" in item["type"]}
            continue
        assert item is not None, event
        if kind == "response.output_item.done":
            assert not any(is_open.values()), event
            assert event["item"]["status"] in ("completed", "incomplete")
            assert {**item, "status": event["item"]["status"]} == event["item"]
            output.append(event["item"])
            item = None
            continue
        assert event["item_id"] == item["id"], event
        name, _, step = kind.rpartition(".")
        if name in PARTS:
            parts = item[PARTS[name]]
            assert event.get("content_index", event.get("summary_index")) == 0
            if step == "added":
                assert parts == [] and not is_open["part"]
                parts.append(event["part"])
                is_open = {"part": True, "text": True}
            else:
                assert step == "done" and is_open == {"part": True, "text": False} and event["part"] == parts[0]
                is_open["part"] = False
            continue
        where, field = TEXTS[name]
        grows = item[where][0] if where else item
        assert is_open["text"], event
        if step == "delta":
            grows[field] += event["delta"]
            if "logprobs" in grows:
                grows["logprobs"] += event["logprobs"]
        else:
            assert step == "done" and event[field] == grows[field]
            is_open["text"] = False
    assert item is None or not is_whole
    return output
