"""Items and tools of the Responses API, and the parts of an answer as its events: pure functions, over all cuts."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from responses_stream import joined_responses

from mooli.errors import RequestError
from mooli.frontend.parts import Part
from mooli.frontend.tool_messages import template_messages
from mooli.server.responses_events import CustomInput, ResponseWriter
from mooli.server.responses_items import CalledTool, read_messages, read_tools, without_oldest


def call(name: str, call_id: str = "c1", arguments: str = '{"a": 1}', **fields: Any) -> dict[str, Any]:
    return {"type": "function_call", "name": name, "call_id": call_id, "arguments": arguments, **fields}


def function(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}, **fields}


def told(*items: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    messages = read_messages(list(items), instructions)
    template_messages(messages)  # whatever is told, chat templates can be
    return messages


# -- items -------------------------------------------------------------------------------------------------------------
def test_a_text_is_a_users_message():
    assert read_messages("hi", "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]


def test_what_systems_say_is_said_once_at_the_beginning_and_users_take_turns():
    parts = [{"type": "input_text", "text": "d"}, {"type": "input_text", "text": "e"}]
    assert told(
        {"type": "message", "role": "developer", "content": parts},
        {"role": "user", "content": "u"},
        {"role": "user", "content": [{"type": "input_text", "text": "v"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}]},
        {"role": "system", "content": "s"},
        {"role": "user", "content": "w"},
        instructions="i",
    ) == [
        {"role": "system", "content": "i\n\nd\ne\n\ns"},
        {"role": "user", "content": "u\n\nv"},
        {"role": "assistant", "content": "a\nno"},
        {"role": "user", "content": "w"},
    ]


def test_reasoning_words_and_calls_of_one_turn_are_one_message():
    items = [
        {"role": "user", "content": "u"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "why"}], "encrypted_content": "x"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        call("f", "c1"),
        {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "*** Begin"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
        {"type": "message", "role": "assistant", "content": "b"},
    ]
    assert told(*items) == [
        {"role": "user", "content": "u"},
        {
            "role": "assistant", "content": "a", "reasoning_content": "why",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"id": "c2", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "b", "reasoning_content": "so"},
    ]  # fmt: skip


def test_content_goes_before_its_summary_and_what_is_encrypted_says_nothing():
    both = {
        "type": "reasoning", "summary": [{"text": "short"}], "content": [{"text": "long"}, {"text": "er"}],
    }  # fmt: skip
    assert told(both) == [{"role": "assistant", "content": "", "reasoning_content": "long\ner"}]
    user = {"role": "user", "content": "u"}
    assert told(user, {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}) == [user]


@pytest.mark.parametrize("kind", ["web_search_call", "compaction", "local_shell_call", "item_of_tomorrow"])
def test_items_of_other_types_are_left_out(kind):
    assert told({"role": "user", "content": "u"}, {"type": kind, "id": "x"}) == [{"role": "user", "content": "u"}]


def test_in_the_place_of_what_is_no_text_the_model_reads_that_it_is_missing():
    (message,) = told({"role": "user", "content": [{"type": "input_text", "text": "see"}, {"type": "input_image"}]})
    assert message["content"] == "see\n[Left out: image. Only text can be read here.]"
    _, result = told(
        call("f"), {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_file", "file_id": "f"}]}
    )
    assert result["content"] == "[Left out: file. Only text can be read here.]"


@pytest.mark.parametrize("arguments", ["{", "[1]", '{"a": NaN}', "ls -l"])
def test_a_call_that_its_client_refused_can_be_told_again(arguments):
    (message,) = told(call("f", arguments=arguments))
    (said,) = message["tool_calls"]
    assert json.loads(said["function"]["arguments"]) == {"arguments": arguments}


def test_a_call_without_arguments_has_an_empty_object():
    assert told(call("f", arguments=""))[0]["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ({"type": "item_reference", "id": "msg_1"}, "input[0] names an item by its id"),
        ({"id": "msg_1"}, "input[0] names an item by its id"),
        ({"role": "tool", "content": "x"}, "input[0].role='tool'"),
        ({"role": "user", "content": 5}, "input[0].content must be"),
        ({"role": "user", "content": [5]}, "input[0].content must be"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text"),
        ({"role": "user", "content": [{"type": "input_file", "file_data": "x"}]}, "files are not read"),
        (call(""), "input[0].name"),
        (call("f", call_id=""), "input[0].call_id"),
        (call("f", arguments={"a": 1}), "input[0].arguments"),  # type: ignore[arg-type]
        ({"type": "function_call_output", "output": "x"}, "input[0].call_id"),
        ({"type": "reasoning", "content": "x"}, "input[0].content must be a list"),
    ],
)
def test_what_is_wrong_with_an_item_is_said_with_its_place(item, named):
    with pytest.raises(RequestError) as caught:
        read_messages([item], None)
    assert named in str(caught.value)


def test_the_oldest_turns_are_left_out_whole():
    result = {"type": "function_call_output", "call_id": "c1", "output": "x"}
    messages = told(
        {"role": "user", "content": "a" * 10}, call("f"), result, {"role": "user", "content": "b" * 10},
        {"role": "assistant", "content": "c" * 10}, {"role": "user", "content": "d"}, instructions="i",
    )  # fmt: skip
    assert without_oldest(messages, 0.0) == [messages[0], *messages[4:]]
    assert without_oldest(messages, 0.9) == without_oldest(messages, 1.0) == [messages[0], messages[-1]]
    assert without_oldest([messages[0], messages[-1]], 0.5) is None
    assert without_oldest(messages[-1:], 0.5) is None


# -- tools -------------------------------------------------------------------------------------------------------------
TOOLS = [
    function("f", description="F", strict=True),
    {"type": "web_search"},
    {"type": "namespace", "name": "ns", "description": "N", "tools": [function("g"), function("f"), {"type": "mcp"}]},
    {
        "type": "custom", "name": "patch", "description": "Changes files.",
        "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'},
    },
    {"type": "tool_of_tomorrow", "name": 7},
    {"type": "function", "function": {"name": "nested", "description": "As in chats"}},
]  # fmt: skip


def test_functions_namespaces_and_custom_tools_are_offered_and_others_left_out():
    offered = read_tools(TOOLS, "hi", None, parallel=False)
    tools = offered.tools
    assert tools is not None and (tools.choice, tools.parallel) == ("auto", False)
    assert [tool.name for tool in tools.tools] == ["f", "ns__g", "ns__f", "patch", "nested"]
    assert [tool.strict for tool in tools.tools] == [True, False, False, False, False]
    patch = tools.named("patch")
    assert patch is not None and patch.parameters is not None and patch.parameters["required"] == ["input"]
    assert patch.description == 'Changes files.\n\ninput must match this lark grammar:\nstart: "x"'
    assert offered.called == {
        "f": CalledTool("f"),
        "ns__g": CalledTool("g", "ns"),
        "ns__f": CalledTool("f", "ns"),
        "patch": CalledTool("patch", is_custom=True),
        "nested": CalledTool("nested"),
    }


def test_items_bring_tools_too_and_a_name_that_comes_again_is_the_later_one():
    items = [
        {"type": "additional_tools", "role": "developer", "tools": [function("late"), function("f", description="2")]},
        {"type": "tool_search_output", "call_id": "c", "tools": [TOOLS[2]]},
    ]
    tools = read_tools([function("f", description="1")], items, None, parallel=True).tools
    assert tools is not None
    assert [(tool.name, tool.description) for tool in tools.tools] == [
        ("f", "2"), ("late", ""), ("ns__g", ""), ("ns__f", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        ("none", "none", ["f", "ns__g", "ns__f", "patch", "nested"]),
        ("required", "required", ["f", "ns__g", "ns__f", "patch", "nested"]),
        ({"type": "function", "name": "g"}, "required", ["ns__g"]),
        ({"type": "function", "name": "f", "namespace": "ns"}, "required", ["ns__f"]),
        ({"type": "function", "function": {"name": "nested"}}, "required", ["nested"]),
        ({"type": "custom", "name": "patch"}, "required", ["patch"]),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}, function("g")]}, "auto", ["ns__g"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [function("nested")]}, "required", ["nested"]),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}, "none", None),
    ],
)
def test_a_choice_is_of_tools_by_the_name_that_the_client_knows(choice, mode, names):
    tools = read_tools(TOOLS, "hi", choice, parallel=True).tools
    assert tools is not None and tools.choice == mode
    assert tools.parallel is (choice == "none" or choice == "required" or choice["type"] == "allowed_tools")
    assert names is None or [tool.name for tool in tools.tools] == names


def test_without_functions_there_is_nothing_to_call():
    assert read_tools([{"type": "web_search"}], "hi", "auto", parallel=True).tools is None


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        (TOOLS, {"type": "function", "name": "unknown"}),
        (TOOLS, {"type": "web_search_preview"}),
        (TOOLS, "sometimes"),
        ([{"type": "web_search"}], "required"),
        ([{"type": "function"}], None),
        ([function("f", parameters=[])], None),
        ([function("a b")], None),
    ],
)
def test_a_choice_that_cannot_be_followed_is_refused(tools, choice):
    with pytest.raises(RequestError) as caught:
        read_tools(tools, "hi", choice, parallel=True)
    assert "tool" in str(caught.value)


# -- the text of a custom tool -----------------------------------------------------------------------------------------
CUSTOM_INPUTS = [
    ('{"input": "a\\n\\"b\\" \\\\"}', 'a\n"b" \\'),
    ('{ "input" : "\\u00e9\\ud83d\\ude00"}', "é😀"),
    ('{"input": "\\ud83dx\\udc00\\u12zz\\q"}', "\ufffdx\ufffd\\u12zz\\q"),
    ('{"input": "", "why": "x"}', ""),
    ('{"why": 1, "input": "a\\ud800"}', "a\ufffd"),
    ('{"patch": "the one text"}', "the one text"),
    ('"bare"', "bare"),
    ('{"x": 1}', '{"x": 1}'),
    ("no JSON", "no JSON"),
]


@pytest.mark.parametrize(("written", "text"), CUSTOM_INPUTS)
def test_a_custom_tools_text_is_the_same_over_all_cuts(written, text):
    for first, second in itertools.combinations_with_replacement(range(len(written) + 1), 2):
        custom = CustomInput()
        pieces = [custom.push(piece) for piece in (written[:first], written[first:second], written[second:])]
        assert "".join(pieces) + custom.flush() == text, (first, second)
        assert custom.is_whole is (written != "no JSON")


def test_it_grows_and_what_is_cut_short_is_not_whole():
    custom = CustomInput()
    assert [custom.push(piece) for piece in ('{"input": "a', "b\\", "nc\\ud8", "3d")] == ["a", "b", "\nc", ""]
    assert custom.flush() == "" and not custom.is_whole


# -- events ------------------------------------------------------------------------------------------------------------
PARTS = [
    Part("reasoning", "hm"), Part("reasoning", ""), Part("text", ""), Part("text", "I will"), Part("text", " look"),
    Part("call_begin", "ns__g", call=0, call_id="call_a"), Part("arguments", '{"a"', call=0),
    Part("arguments", ": 1}", call=0), Part("call_end", call=0), Part("text", ""),
    Part("call_begin", "patch", call=1, call_id="call_b"), Part("arguments", '{"input": "x\\', call=1),
    Part("arguments", 'ny"}', call=1), Part("call_end", call=1),
    Part("call_begin", "f", call=2, call_id="call_c"), Part("call_end", call=2),
]  # fmt: skip


def written(parts: list[Part], *, is_cut: bool = False, as_summary: bool = False) -> list[dict[str, Any]]:
    called = {"ns__g": CalledTool("g", "ns"), "patch": CalledTool("patch", is_custom=True), "f": CalledTool("f")}
    writer = ResponseWriter("resp_0", {"model": "m"}, called, as_summary=as_summary)
    writer.begin()
    for part in parts:
        writer.add(part, ["lp"] if part.kind == "text" else [])
    writer.end({"output_tokens": 1}, is_cut=is_cut)
    return json.loads(json.dumps(writer.take()))


def test_parts_become_items_in_their_order():
    response = joined_responses(written(PARTS))
    assert response["status"] == "completed"
    reasoning, message, g, patch, f = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "I will look" and len(message["content"][0]["logprobs"]) == 3
    assert (g["type"], g["name"], g["namespace"], g["call_id"]) == ("function_call", "g", "ns", "call_a")
    assert (g["arguments"], g["status"]) == ('{"a": 1}', "completed")
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "patch", "x\ny")
    assert (f["arguments"], "namespace" in f) == ("{}", False)
    assert [item["id"].partition("_")[0] for item in response["output"]] == ["rs", "msg", "fc", "ctc", "fc"]


def test_a_clients_summary_is_the_reasoning():
    response = joined_responses(written(PARTS, as_summary=True))
    assert response["output"][0]["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert "content" not in response["output"][0]


@pytest.mark.parametrize("length", range(len(PARTS) + 1))
def test_whatever_is_cut_short_has_its_events_and_says_so(length):
    events = written(PARTS[:length], is_cut=True)
    response = joined_responses(events)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"]
    last = response["output"][-1]
    assert last["status"] == ("completed" if PARTS[max(length - 1, 0)].kind == "call_end" else last["status"])


def test_a_call_that_ends_in_its_arguments_is_incomplete_whatever_the_answer():
    for parts in (PARTS[5:7], PARTS[10:12]):
        response = joined_responses(written(parts))
        assert (response["status"], response["output"][0]["status"]) == ("completed", "incomplete")


def test_an_answer_without_words_has_an_empty_message():
    (message,) = joined_responses(written([Part("text", "")]))["output"]
    assert message["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": ["lp"]}]


def test_what_failed_has_only_items_that_were_finished():
    writer = ResponseWriter("resp_0", {}, {})
    writer.begin()
    for part in PARTS[:7]:
        writer.add(part)
    writer.fail("server_error", "Oh.", {})
    response = joined_responses(json.loads(json.dumps(writer.take())))
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": "Oh."})
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
