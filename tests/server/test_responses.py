"""POST /v1/responses on a whole server: OpenAI's client and LangChain's, the request of a coding agent, and errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from fake_engine import CONTEXT, EOS, says
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from live import LiveServer
from openai_raw import refusal
from responses_stream import joined_responses, responses_events
from wire_formats import BracketFormat

from mooli.frontend.chat_template import ChatTemplate

PATH = "/v1/responses"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}:{{ c.function.arguments | tojson }}]"
    "{% endfor %}{{ '\n' }}{% endfor %}{% for t in tools or [] %}{{ t.function.name }},{% endfor %}"
    "{{ enable_thinking | default('') }}|"
)
TOOL = {
    "type": "function", "name": "look", "description": "Looks.", "strict": False,
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}  # fmt: skip

ANSWERS = {
    "plain": "hello",
    "weather": '(hm)Let me see.[look:{"at":"Oslo"}]',
    "both": '[look:{"at":"Oslo"}][look:{"at":"Rome"}]',
    "spaced": '[mcp__files__read:{"at":"a"}]',
    "patch": '[patch:{"input":"*** Begin\\nx"}]',
    "It is warm.": "Warm.",
}
"""What is answered, by how what was last said ends."""


class Agent(LiveServer):
    """Answers by ANSWERS. prompts: what came to the model."""

    def __init__(self, **options: Any) -> None:
        self.prompts: list[str] = []
        super().__init__(self._next, engine={"context_length": 700}, **options)
        self.service.wire_format = BracketFormat()
        self.service.tokenizer.chat_template = ChatTemplate(TEMPLATE)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0)

    def _next(self, context: list[int]) -> int | None:
        text = bytes(token_id for token_id in context if token_id < EOS).decode(errors="replace")
        prompt, _, said = text.rpartition("|")
        if not said:
            self.prompts.append(prompt)
        last = prompt.rpartition("\n")[0]  # behind it are the names of tools
        answer = next((answer for end, answer in ANSWERS.items() if last.endswith(end)), "?")
        ids = [*answer.encode(), EOS]
        return ids[len(said.encode())]

    def stop(self) -> int:
        self.openai.close()
        return super().stop()

    def create(self, **body: Any) -> Any:
        self.prompts.clear()
        return self.openai.responses.create(**{"model": "m", "temperature": 0, **body})


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    """A server for tests that leave nothing behind."""
    server = Agent()
    yield server
    server.stop()


def streamed(server: LiveServer, **body: Any) -> dict[str, Any]:
    """The last response of a stream whose every event has been looked at."""
    reply = server.http.post(PATH, json={"model": "m", "temperature": 0, "stream": True, **body})
    assert reply.status_code == 200, reply.text
    return joined_responses(responses_events(reply.text))


# -- OpenAI's client ---------------------------------------------------------------------------------------------------
def test_a_text_is_answered(agent):
    response = agent.create(input="plain", instructions="Be.", metadata={"a": "b"}, user="me", store=True)
    assert agent.prompts == ["s:Be.\nu:plain\n"]
    assert (response.output_text, response.status, response.error) == ("hello", "completed", None)
    assert (response.model, response.metadata, response.instructions) == ("m", {"a": "b"}, "Be.")
    assert (response.store, response.truncation, response.tools) == (False, "disabled", [])
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (len("s:Be.\nu:plain\n|"), 6)
    assert usage.total_tokens == usage.input_tokens + 6
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert usage.input_tokens_details.cache_write_tokens == usage.input_tokens


def test_the_beginning_of_a_conversation_is_found_in_the_cache(agent):
    agent.create(input="a long question that was asked before: plain")
    again = agent.create(input="a long question that was asked before: plain")
    assert again.usage.input_tokens_details.cached_tokens > 30


def test_the_tokens_of_a_prompt_are_counted(agent):
    body = {"input": [{"role": "user", "content": "weather"}], "tools": [TOOL], "instructions": "Be."}
    counted = agent.openai.responses.input_tokens.count(model="m", **body)
    assert counted.input_tokens == len("s:Be.\nu:weather\nlook,|") == agent.create(**body).usage.input_tokens


def test_a_stream_has_every_event_in_order(agent):
    response = streamed(agent, input="weather", tools=[TOOL])
    kinds = [item["type"] for item in response["output"]]
    assert kinds == ["reasoning", "message", "function_call"]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == len("(hm)")
    whole = agent.http.post(PATH, json={"model": "m", "temperature": 0, "input": "weather", "tools": [TOOL]}).json()
    for answer in (whole, response):
        for item in answer["output"]:
            item.pop("id"), item.pop("call_id", None)
    assert whole["output"] == response["output"]
    assert set(whole) == set(response)


def test_openais_helper_reads_a_stream(agent):
    with agent.openai.responses.stream(model="m", input="weather", tools=[TOOL], temperature=0) as stream:
        events = list(stream)
        response = stream.get_final_response()
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == response.output_text == "Let me see."
    assert json.loads(response.output[2].arguments) == {"at": "Oslo"}
    assert response.output[0].content[0].text == "hm"


def test_a_call_and_its_result(agent):
    first = agent.create(input="weather", tools=[TOOL])
    call = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments), call.status) == (
        "function_call", "look", {"at": "Oslo"}, "completed",
    )  # fmt: skip
    assert call.call_id.startswith("call_")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It is warm."}
    second = agent.create(input=[{"role": "user", "content": "weather"}, *first.output, result], tools=[TOOL])
    assert agent.prompts == ['u:weather\na:(hm)Let me see.[look:{"at": "Oslo"}]\nt:It is warm.\nlook,']
    assert second.output_text == "Warm."


def test_two_calls_of_one_answer(agent):
    response = streamed(agent, input="both", tools=[TOOL])
    calls = [(item["name"], item["arguments"]) for item in response["output"]]
    assert calls == [("look", '{"at":"Oslo"}'), ("look", '{"at":"Rome"}')]
    assert len({item["call_id"] for item in response["output"]}) == 2


def test_a_tool_in_a_namespace_is_called_by_both_names(agent):
    namespace = {
        "type": "namespace", "name": "mcp__files", "description": "Files.", "tools": [{**TOOL, "name": "read"}],
    }  # fmt: skip
    response = streamed(agent, input="spaced", tools=[namespace])
    call = response["output"][0]
    assert (call["namespace"], call["name"]) == ("mcp__files", "read")
    result = {
        "type": "function_call_output",
        "call_id": call["call_id"],
        "output": [{"type": "input_text", "text": "x"}],
    }
    agent.create(input=[{"role": "user", "content": "spaced"}, call, result], tools=[namespace])
    assert agent.prompts == ['u:spaced\na:[mcp__files__read:{"at": "a"}]\nt:x\nmcp__files__read,']


def test_a_custom_tool_is_called_with_a_text(agent):
    tool = {"type": "custom", "name": "patch", "description": "Changes files."}
    with agent.openai.responses.stream(model="m", input="patch", tools=[tool], temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "response.custom_tool_call_input.delta"]
        (call,) = stream.get_final_response().output
    assert (call.type, call.name, call.input) == ("custom_tool_call", "patch", "*** Begin\nx")
    assert "".join(deltas) == call.input
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
    agent.create(input=[{"role": "user", "content": "patch"}, call, result], tools=[tool])
    assert agent.prompts == ['u:patch\na:[patch:{"input": "*** Begin\\nx"}]\nt:done\npatch,']


def test_reasoning_is_shown_as_the_summary_that_was_asked_for(agent):
    body = {"input": "weather", "tools": [TOOL], "reasoning": {"effort": "high", "summary": "auto"}}
    response = streamed(agent, **body)
    assert response["output"][0]["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert response["reasoning"] == {"effort": "high", "summary": "auto"}
    agent.create(**body)
    assert agent.prompts == ["u:weather\nlook,True"]


def test_log_probabilities_are_those_of_the_words(agent):
    response = agent.create(input="weather", tools=[TOOL], include=["message.output_text.logprobs"], top_logprobs=2)
    words = response.output[1].content[0]
    assert "".join(item.token for item in words.logprobs) == words.text
    assert {len(item.top_logprobs) for item in words.logprobs} == {2}


def test_what_does_not_fit_is_incomplete(agent):
    for response in (agent.create(input="weather", tools=[TOOL], max_output_tokens=20),):
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert response.output[-1].status == "incomplete"
    response = streamed(agent, input="weather", tools=[TOOL], max_output_tokens=30)
    assert (response["status"], response["output"][-1]["type"]) == ("incomplete", "function_call")
    assert response["output"][-1]["status"] == "incomplete"


def test_a_length_beyond_the_context_is_no_error(agent):
    assert agent.create(input="plain", max_output_tokens=32000).output_text == "hello"


@pytest.fixture(scope="module")
def drawn() -> Iterator[LiveServer]:
    """A server whose model says anything at all that it may."""
    server = LiveServer(engine={"context_length": 400, "tool_call_parser": "hermes", "random_seed": 5})
    server.service.tokenizer.chat_template = ChatTemplate(TEMPLATE)
    yield server
    server.stop()


POINT = {"type": "object", "properties": {"x": {"enum": ["é", 1]}}, "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"find", "go", "write"}),
        ({"type": "function", "name": "go"}, {"go"}),
        ({"type": "custom", "name": "write"}, {"write"}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "find"}]}, {"find"}),
    ],
)
def test_a_call_that_is_forced_is_of_its_tools_schema(drawn, choice, names):
    tools = [
        {"type": "function", "name": "find", "parameters": POINT},
        {"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "go", "parameters": POINT}]},
        {"type": "custom", "name": "write"},
    ]
    asked = {
        "input": "a",
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_output_tokens": 300,
    }
    for seed in range(3):
        response = streamed(drawn, **asked, temperature=0.7, seed=seed)
        assert response["output"][0]["type"] in ("function_call", "custom_tool_call"), response
        (call,) = response["output"]
        assert call["name"] in names and call.get("namespace", "ns") == "ns"
        if call["type"] == "function_call":
            assert json.loads(call["arguments"])["x"] in ("é", 1)


def test_a_form_beside_a_forced_call_is_for_a_later_answer(drawn):
    tools = [{"type": "function", "name": "find", "parameters": POINT}]
    form = {"format": {"type": "json_schema", "name": "n", "schema": POINT}}
    asked = {"input": "a", "tools": tools, "text": form, "max_output_tokens": 100, "seed": 1}
    assert streamed(drawn, **asked, tool_choice="required")["output"][0]["name"] == "find"
    (item,) = streamed(drawn, **asked, tool_choice="none")["output"]
    assert json.loads(item["content"][0]["text"])["x"] in ("é", 1)


class Weather(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=4)
    is_warm: bool


def test_openais_client_parses_what_a_schema_made(live):
    server = live(engine={"context_length": 400})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        response = client.responses.parse(model="m", input="a", text_format=Weather, temperature=1.5)
        assert isinstance(response.output_parsed, Weather)
        asked = client.responses.create(
            model="m", input="a", text={"format": {"type": "json_object"}, "verbosity": "low"}
        )
    assert asked.text.verbosity == "low"
    assert asked.status == "incomplete" or isinstance(json.loads(asked.output_text), dict)


@pytest.mark.parametrize("length", [200, 3000])
def test_a_conversation_that_is_too_long_loses_its_oldest_turns_where_it_may(agent, length):
    turns = [
        {"role": role, "content": f"{name} " + name * length}
        for name in "abcd" for role in ("user", "assistant")
    ]  # fmt: skip
    body = {"input": [*turns, {"role": "user", "content": "plain"}], "instructions": "Be."}
    response = agent.create(**body, truncation="auto")
    assert response.output_text == "hello"
    (prompt,) = agent.prompts
    assert prompt.startswith("s:Be.\nu:") and prompt.endswith("u:plain\n")
    assert ("u:d" in prompt, "u:a" in prompt) == (length == 200, False)
    assert refusal(agent, PATH, body)["code"] == "context_length_exceeded"
    alone = {"input": "x" * 3000, "truncation": "auto"}
    assert refusal(agent, PATH, alone)["code"] == "context_length_exceeded"


# -- a coding agent ----------------------------------------------------------------------------------------------------
def test_the_request_of_a_coding_agent(agent):
    """The shape of what Codex CLI sends, and the three events that it lives on."""
    message = [{"type": "input_text", "text": "."}]
    body = {
        "model": "gpt", "stream": True, "store": False, "tool_choice": "auto", "parallel_tool_calls": False,
        "reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "0f",
        "client_metadata": {"x": "y"}, "temperature": 0,
        "input": [
            {"type": "message", "role": "developer", "content": message},
            {"type": "message", "role": "developer", "content": message},
            {"type": "message", "role": "user", "content": message},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather"}]},
        ],
        "tools": [
            TOOL, {"type": "web_search", "external_web_access": False},
            {"type": "namespace", "name": "agents", "description": "", "tools": [{**TOOL, "name": "wait"}]},
        ],
    }  # fmt: skip
    events = responses_events(agent.http.post(PATH, json=body).text)
    joined_responses(events)
    created = next(event for event in events if event["type"] == "response.created")
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert created["response"]["id"] == events[-1]["response"]["id"]
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call"]
    assert done[0]["summary"] and done[0]["encrypted_content"] is None
    assert events[-1]["type"] == "response.completed"
    assert {"input_tokens", "output_tokens", "total_tokens"} <= set(events[-1]["response"]["usage"])
    result = {"type": "function_call_output", "call_id": done[-1]["call_id"], "output": "It is warm."}
    agent.prompts.clear()
    again = responses_events(agent.http.post(PATH, json={**body, "input": [*body["input"], *done, result]}).text)
    assert again[-1]["response"]["output"][0]["content"][0]["text"] == "Warm."
    assert agent.prompts == [
        's:.\n\n.\nu:.\n\nweather\na:(hm)Let me see.[look:{"at": "Oslo"}]\nt:It is warm.\nlook,agents__wait,'
    ]
    cached = again[-1]["response"]["usage"]["input_tokens_details"]["cached_tokens"]
    assert cached >= len("s:.\n\n.\nu:.\n\nweather\n")


def test_unknown_fields_and_values_break_nobody(agent):
    extra = {
        "background": False, "truncation": "auto", "service_tier": "flex", "max_tool_calls": 3, "moderation": None,
        "stream_options": {"include_obfuscation": False}, "context_management": [{"type": "compaction"}],
        "safety_identifier": "x", "tomorrow": {"a": 1}, "previous_response_id": None, "conversation": None,
        "tools": [{"type": "mcp"}],
    }  # fmt: skip
    response = streamed(agent, input="plain", **extra)
    assert response["output"][0]["content"][0]["text"] == "hello" and response["truncation"] == "auto"


# -- LangChain ---------------------------------------------------------------------------------------------------------
def test_langchain_speaks_it(agent):
    chat = ChatOpenAI(
        model="m", base_url=f"{agent.url}/v1", api_key="-", use_responses_api=True, temperature=0, max_retries=0
    )
    function = {name: TOOL[name] for name in ("name", "description", "parameters")}
    with_tools = chat.bind_tools([{"type": "function", "function": function}])
    messages: list[Any] = [HumanMessage("weather")]
    for answer in (with_tools.invoke(messages), sum_of(with_tools.stream(messages))):
        (call,) = answer.tool_calls
        assert (call["name"], call["args"], answer.text) == ("look", {"at": "Oslo"}, "Let me see.")
    messages += [answer, ToolMessage("It is warm.", tool_call_id=call["id"])]
    assert with_tools.invoke(messages).text == "Warm."


def sum_of(chunks: Any) -> AIMessage:
    chunks = list(chunks)
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined = joined + chunk
    return joined


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"not": {}}}}}, "text.format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 200}, "top_logprobs"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(agent, body, param):
    error = refusal(agent, PATH, {"model": "m", "input": "plain", **body})
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert param is None or param.partition("[")[0].rpartition(".")[2] in error["message"]


def test_too_long_a_conversation_is_said_in_words_that_agents_look_for(agent):
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is \d+ tokens. However, ") as raised:
        agent.create(input="x" * 800, stream=True)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "input")


def test_what_fails_at_once_has_a_status(live):
    server = live(runner={"raises": lambda batch: RuntimeError("the pool burst")})
    for stream in (False, True):
        reply = server.http.post(PATH, json={"input": "a", "stream": stream})
        assert reply.status_code == 500


def test_a_stream_that_fails_ends_with_its_event(live):
    has_begun = threading.Event()

    def raises(batch: Any) -> Exception | None:
        if max(batch.positions) < 40:
            return None
        has_begun.wait(120)  # the client has seen a part: what fails before is answered with a status
        return RuntimeError("the pool burst")

    server = live(says("y" * CONTEXT, after="assistant: ", then=None), runner={"raises": raises})
    with server.http.stream("POST", PATH, json={"input": "hi", "stream": True}) as reply:
        assert reply.status_code == 200
        pieces = reply.iter_text()
        text = next(pieces)
        has_begun.set()
        text += "".join(pieces)
    response = joined_responses(responses_events(text))
    assert (response["status"], response["error"]["code"], response["output"]) == ("failed", "server_error", [])
