"""Tools and histories of OpenAI's chat shape: what is accepted, what a template is told, and which errors name what."""

from __future__ import annotations

from typing import Any

import pytest

from mooli.errors import RequestError
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.tool_messages import IMAGE_NOTE, MAX_ARGUMENT_VALUES, read_tools, template_messages, text_argument
from mooli.frontend.tool_prompt import for_template
from mooli.frontend.tools import ToolSet

F: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
G: dict[str, Any] = {"type": "function", "name": "g", "description": "Flat, as of newer APIs."}
TEXT = {"type": "custom", "custom": {"name": "write", "description": "Takes a text."}}


def names(tools: ToolSet | None) -> Any:
    return tools and (
        [tool.name for tool in tools.tools],
        tools.choice,
        [t["function"]["name"] for t in tools.for_template()],
    )


# -- tools -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (["f", "g"], "auto", ["f", "g"])),
        ("auto", (["f", "g"], "auto", ["f", "g"])),
        ({"type": "auto"}, (["f", "g"], "auto", ["f", "g"])),
        ("none", (["f", "g"], "none", ["f", "g"])),
        ("required", (["f", "g"], "required", ["f", "g"])),
        ("any", (["f", "g"], "required", ["f", "g"])),
        # Those that may be called are fewer, and the prompt stays what it is in every turn.
        ({"type": "function", "function": {"name": "g"}}, (["g"], "required", ["f", "g"])),
        ({"type": "function", "name": "g"}, (["g"], "required", ["f", "g"])),
        ({"name": "g"}, (["g"], "required", ["f", "g"])),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [F]}},
            (["f"], "auto", ["f", "g"]),
        ),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"name": "g"}]}, (["g"], "required", ["f", "g"])),
    ],
)  # fmt: skip
def test_a_choice_says_which_may_and_must_be_called(choice, expected):
    assert names(read_tools([F, G], choice)) == expected


@pytest.mark.parametrize(
    ("choice", "parallel"),
    [
        ({"type": "function", "function": {"name": "g"}}, False),
        ({"type": "tool", "name": "g"}, False),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"name": "g"}]}, True),
        ("required", True),
    ],
)
def test_a_function_that_is_chosen_by_its_name_is_called_once(choice, parallel):
    assert read_tools([F, G], choice).parallel is parallel
    assert not read_tools([F, G], choice, False).parallel


def test_tools_are_read_with_what_they_say():
    tools = read_tools([F, G, TEXT], parallel=False)
    assert tools is not None and not tools.parallel
    f, g, text = tools.tools
    assert (f.strict, f.parameters, g.strict, g.parameters, g.description) == (
        True, {"type": "object"}, False, None, "Flat, as of newer APIs.",
    )  # fmt: skip
    assert text.takes_text and text.parameters is not None and list(text.parameters["properties"]) == ["input"]
    assert g.for_template()["function"]["parameters"] == {"type": "object", "properties": {}}
    assert read_tools(None) is read_tools([], "none") is read_tools([], "auto") is None


@pytest.mark.parametrize(
    ("tools", "choice", "argument", "words"),
    [
        ({}, None, "tools", "must be a list"),
        ([F, 3], None, "tools", "tools[1] must be an object, not 3"),
        ([{"type": "web_search"}], None, "tools", "tools[0].type='web_search'"),
        ([{"type": "function", "function": 1}], None, "tools", "tools[0].function must be an object"),
        ([{"type": "function"}], None, "tools", "tools[0].name=null"),
        ([{"function": {"name": "a b"}}], None, "tools", "tools[0].function.name='a b'"),
        ([{"function": {"name": "a", "parameters": [1]}}], None, "tools", "function.parameters must be a JSON schema"),
        ([{"function": {"name": "a", "parameters": {"type": "string"}}}], None, "tools", "whose type is 'object'"),
        ([{"function": {"name": "a", "description": 1}}], None, "tools", "description must be a string"),
        ([{"function": {"name": "a", "strict": "yes"}}], None, "tools", "strict must be true or false"),
        ([F, F], None, "tools", "two functions of the name 'f'"),
        ([], "required", "tool_choice", "tools is empty"),
        ([], {"name": "f"}, "tool_choice", "tools is empty"),
        ([F], "sometimes", "tool_choice", "tool_choice='sometimes'"),
        ([F], 3, "tool_choice", "tool_choice=3"),
        ([F], {"name": "h"}, "tool_choice", "'h', which tools does not have"),
        ([F], {"type": "function"}, "tool_choice", "names no function"),
        ([F], {"type": "function", "function": "f"}, "tool_choice", "names no function"),
        ([F], {"type": "allowed_tools", "mode": "none", "tools": []}, "tool_choice", "must have a mode"),
        ([F], {"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice", "names no function"),
        ([F], {"type": "allowed_tools", "mode": "auto", "tools": ["f"]}, "tool_choice", "tools[0]"),
    ],
)
def test_a_tool_or_a_choice_that_is_wrong_is_named(tools, choice, argument, words):
    with pytest.raises(RequestError) as raised:
        read_tools(tools, choice)
    assert raised.value.argument is not None and raised.value.argument.startswith(argument)
    assert words in raised.value.message


@pytest.mark.parametrize(
    ("arguments", "text"),
    [('{"input": "a\\n\\u00e9"}', "a\né"), ('{"x": 1}', '{"x": 1}'), ('{"inp', '{"inp'), ("[1]", "[1]")],
)
def test_a_tool_that_takes_a_text_is_given_it(arguments, text):
    assert text_argument(arguments) == text


# -- messages ----------------------------------------------------------------------------------------------------------
def call(name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if call_id is None else {"id": call_id, **made}


def result(content: Any, call_id: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id, **more}


def calls(*made: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(made)}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ('{"a": 1, "b": [true, null, "é"]}', {"a": 1, "b": [True, None, "é"]}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ("{}", {}),
        ('{"n": 123456789012345678901234567890}', {"n": 123456789012345678901234567890}),
    ],
)
def test_arguments_become_an_object(given, told):
    message = calls(call("f", given, "1"))
    (read,) = template_messages([message])
    assert read["tool_calls"][0]["function"] == {"name": "f", "arguments": told}
    assert read["content"] == "" and message["tool_calls"][0]["function"]["arguments"] == given


@pytest.mark.parametrize(
    "arguments",
    ["[1]", "3", '"text"', "{a: 1}", '{"a": 1', '{"a": NaN}', "[" * 100_000, 3, "," * (MAX_ARGUMENT_VALUES + 1)],
)
def test_arguments_that_are_no_object_are_named(arguments):
    with pytest.raises(RequestError, match=r"messages\[1\]\.tool_calls\[1\]\.function\.arguments") as raised:
        template_messages([{"role": "user", "content": "x"}, calls(call("f", "{}"), call("f", arguments))])
    assert raised.value.argument == "messages" and len(raised.value.message) < 300


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "tool_calls": "f"}, "messages[0].tool_calls must be a list"),
        (calls("f"), "messages[0].tool_calls[0] must be an object"),
        (calls({"id": "1"}), "messages[0].tool_calls[0].function.name is missing"),
        (calls(call("", "{}")), "name is missing"),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": "x"}}, "messages[0].function_call"),
        ({"role": "user", "content": None}, "messages[0].content is missing"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]: a part of type 'image_url'"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]: a part of type 'str'"),
        ({"role": "user", "content": 3}, "messages[0].content must be a text or a list of parts"),
        (result([{"type": "text"}]), "messages[0].content[0].text must be a string"),
    ],
)
def test_a_message_that_is_wrong_is_named(message, words):
    with pytest.raises(RequestError) as raised:
        template_messages([message])
    assert raised.value.argument == "messages" and words in raised.value.message


def contents(messages: list[Any]) -> list[Any]:
    return [(m.get("content"), m.get("tool_call_id"), m.get("name")) for m in template_messages(messages)[1:]]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([result("b", "2"), result("a", "1")], [("a", "1", "f"), ("b", "2", "g")]),
        ([result("b", "2")], [("b", "2", "g")]),
        ([], []),
        (
            [result("b", "2"), result("a", "1"), result("more", "1")],
            [("a", "1", "f"), ("more", "1", "f"), ("b", "2", "g")],
        ),
        ([result("?", "9"), result("a", "1")], [("a", "1", "f"), ("?", "9", None)]),
        ([result("b", None, name="g"), result("a", None, name="f")], [("a", "1", "f"), ("b", "2", "g")]),
        ([result("a"), result("b")], [("a", "1", "f"), ("b", "2", "g")]),
        (
            [result("b", "2"), {"role": "user", "content": "x"}, result("a", "1")],
            [("b", "2", "g"), ("x", None, None), ("a", "1", None)],
        ),
    ],
)  # fmt: skip
def test_results_stand_in_the_order_of_their_calls(results, expected):
    assert contents([calls(call("f", "{}", "1"), call("g", "{}", "2")), *results]) == expected


def test_ids_that_repeat_belong_to_the_calls_before_them():
    turn = [calls(call("f", "{}", "0"), call("g", "{}", "0")), result("a", "0"), result("b", "0")]
    assert contents(turn) == [("a", "0", "f"), ("b", "0", "g")]
    again = template_messages([*turn, calls(call("h", "{}", "0")), result("c", "0")])
    assert (again[-1]["content"], again[-1]["name"]) == ("c", "h")


def test_older_names_and_parts_are_told_in_the_new_ones():
    text = {"type": "text", "text": "seen"}
    read = template_messages(
        [
            {"role": "developer", "content": "be"},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
            {"role": "function", "name": "f", "content": "42"},
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "w", "input": "x"}}]},
            result([text, {"type": "image_url", "image_url": {"url": "data:"}}], "1"),
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "r"}, {"type": "refusal", "refusal": "no"}],
            },
        ]
    )
    assert [message["role"] for message in read] == ["system", "assistant", "tool", "assistant", "tool", "assistant"]
    assert read[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert read[3]["tool_calls"][0]["function"] == {"name": "w", "arguments": {"input": "x"}}
    assert read[4]["content"] == f"seen\n{IMAGE_NOTE}"
    assert (read[5]["content"], read[5]["reasoning_content"]) == ("no", "r")


# -- templates ---------------------------------------------------------------------------------------------------------
TURN = [
    {"role": "user", "content": "q"},
    {**calls(call("f", '{"a": "é"}', "1"), call("f", "{}", "2")), "content": "hm"},
    result("A", "1"),
    result("B", "2"),
    {"role": "user", "content": "and"},
]


def test_a_template_that_knows_tools_is_told_of_them():
    template = ChatTemplate("{{ tools }}{{ messages[1].tool_calls }}")
    messages, tools = for_template(template, TURN, read_tools([F, G]))
    assert tools is not None and [tool["function"]["name"] for tool in tools] == ["f", "g"]
    assert messages == template_messages(TURN)
    assert for_template(template, TURN, read_tools([F], "none"))[1] is None


def test_one_that_knows_none_has_them_in_its_messages():
    template = ChatTemplate("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
    messages, tools = for_template(template, TURN, read_tools([F, G]))
    assert tools is None and [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert '"name": "f"' in messages[0]["content"] and '"name": "g"' in messages[0]["content"]
    assert messages[2]["content"] == (
        'hm\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    )
    both = "<tool_response>\nA\n</tool_response>\n<tool_response>\nB\n</tool_response>\nand"
    assert messages[3]["content"] == both
    system = for_template(template, [{"role": "system", "content": "Be."}, *TURN], read_tools([F]))[0]
    assert system[0]["content"].startswith("Be.\n\n") and len(system) == 4
    # Without tools and calls, messages are the template's affair as ever.
    alone, _ = for_template(template, [result("42")], None)
    assert alone[0]["role"] == "tool"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if messages[0]['content'] is none %}null{% endif %}", "null"),
        ("{% if messages[0].content is not none %}[{{ messages[0].content }}]{% endif %}", ""),
        ("[{{ messages[0].content | trim }}]", "[]"),
    ],
)
def test_the_content_beside_calls_is_null_where_a_template_asks_for_that(template, text):
    assert ChatTemplate(template).render(template_messages([calls(call("f", "{}"))])) == text
