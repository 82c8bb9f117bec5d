"""Agents as their frameworks write them, against a real server: tools that must be called, results that come back,
answers of a form.

The model is far too small for an agent. What is asked of it here is valid by construction: calls that are forced,
answers that a schema holds, and values that come from a list.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, ConfigDict
from server_process import ServerProcess, needs_demo

pytestmark = [needs_demo, pytest.mark.slow]

KEY = "a-key-of-the-tests"
FLAGS = ("--api-key", KEY, "--random-seed", "1")
QUESTION = "What is the weather in Oslo?"
USER = {"role": "user", "content": QUESTION}
RESULT = '{"sky": "rain", "degrees": 7}'
GREEDY = {"temperature": 0}


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Oslo", "Paris", "Cairo"]
    unit: Literal["celsius", "fahrenheit"]


class Report(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sky: Literal["clear", "clouds", "rain"]
    is_warm: bool


FUNCTION = {"name": "get_weather", "description": "The weather of a city.", "parameters": Weather.model_json_schema()}
OTHER = {"name": "get_time", "description": "The time.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": function} for function in (FUNCTION, OTHER)]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def look_up(city: Literal["Oslo", "Paris", "Cairo"], unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather of a city.

    Args:
        city: where
        unit: of the temperature
    """
    return RESULT


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(*FLAGS) as started:
        yield started


# -- openai, chats -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


def chat(client: openai.OpenAI, messages: list[Any], **fields: Any) -> Any:
    fields = {"model": "demo", "temperature": 0, "max_tokens": 64, "parallel_tool_calls": False, **fields}
    return client.chat.completions.create(messages=messages, **fields)


def test_openai_calls_a_tool_and_goes_on_with_its_result(client):
    first = chat(client, [USER], tools=TOOLS, tool_choice=NAMED)
    message = first.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert Weather.model_validate_json(call.function.arguments)
    assert not message.content
    history = [USER, message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    second = chat(client, history, tools=TOOLS)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    assert second.choices[0].message.content or second.choices[0].message.tool_calls
    last = chat(client, history, tools=TOOLS, tool_choice="none").choices[0].message
    assert last.content
    assert last.tool_calls is None


def test_openai_must_call_one_of_several_tools(client):
    choice = chat(client, [USER], tools=TOOLS, tool_choice="required").choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    if call.function.name == "get_weather":
        assert Weather.model_validate_json(call.function.arguments)
    else:
        assert call.function.name == "get_time"
        assert isinstance(json.loads(call.function.arguments), dict)


def test_openai_may_call_several_tools_at_once(client):
    choice = chat(client, [USER], tools=[TOOLS[0]], tool_choice="required", parallel_tool_calls=True).choices[0]
    calls = choice.message.tool_calls
    assert len({call.id for call in calls}) == len(calls) >= 1
    for call in calls if choice.finish_reason == "tool_calls" else calls[:-1]:
        assert Weather.model_validate_json(call.function.arguments)


def test_openai_streams_the_call_of_the_whole_answer(client):
    (whole,) = chat(client, [USER], tools=TOOLS, tool_choice=NAMED).choices[0].message.tool_calls
    chunks = list(chat(client, [USER], tools=TOOLS, tool_choice=NAMED, stream=True))
    deltas = [delta for chunk in chunks for choice in chunk.choices for delta in choice.delta.tool_calls or ()]
    assert [delta.function.name for delta in deltas if delta.function.name] == ["get_weather"]
    assert [bool(delta.id) for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert "".join(delta.function.arguments or "" for delta in deltas) == whole.function.arguments


def test_openai_s_own_helpers_parse_tools_and_answers(client):
    tool = openai.pydantic_function_tool(Weather)
    fields = {"model": "demo", "messages": [USER], **GREEDY, "max_tokens": 64}
    forced = client.chat.completions.parse(**fields, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    (call,) = forced.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    whole = client.chat.completions.parse(**fields, response_format=Report)
    assert isinstance(whole.choices[0].message.parsed, Report)
    with client.chat.completions.stream(**fields, response_format=Report) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.parsed == whole.choices[0].message.parsed
    assert {"content.delta", "content.done"} <= kinds


def test_openai_gets_calls_and_an_answer_of_a_form_in_one_conversation(client):
    form = {"type": "json_schema", "json_schema": {"name": "report", "schema": Report.model_json_schema()}}
    first = chat(client, [USER], tools=TOOLS, tool_choice=NAMED, response_format=form).choices[0].message
    (call,) = first.tool_calls
    assert Weather.model_validate_json(call.function.arguments)
    history = [USER, first, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    last = chat(client, history, tools=TOOLS, tool_choice="none", response_format=form).choices[0].message
    assert Report.model_validate_json(last.content)


# -- openai, responses -------------------------------------------------------------------------------------------------
FLAT = [{"type": "function", **function} for function in (FUNCTION, OTHER)]
RESPONSE = {"model": "demo", "temperature": 0, "max_output_tokens": 64, "store": False, "parallel_tool_calls": False}


def test_openai_responses_call_a_tool_and_go_on_with_its_result(client):
    said = [{"role": "user", "content": QUESTION}]
    choice = {"type": "function", "name": "get_weather"}
    first = client.responses.create(**RESPONSE, input=said, tools=FLAT, tool_choice=choice)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert Weather.model_validate_json(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    history = [*said, *first.output, result]
    second = client.responses.create(**RESPONSE, input=history, tools=FLAT)
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
    assert {item.type for item in second.output} <= {"message", "function_call"}
    assert client.responses.create(**RESPONSE, input=history, tools=FLAT, tool_choice="none").output_text


def test_openai_responses_stream_the_call_of_the_whole_answer(client):
    fields = {**RESPONSE, "input": QUESTION, "tools": FLAT, "tool_choice": "required"}
    (whole,) = [item for item in client.responses.create(**fields).output if item.type == "function_call"]
    with client.responses.stream(**fields) as stream:
        events = list(stream)
        final = stream.get_final_response()
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == whole.arguments
    assert [(item.name, item.arguments) for item in final.output] == [(whole.name, whole.arguments)]


def test_openai_responses_answer_in_the_form_that_is_asked_for(client):
    fields = {**RESPONSE, "instructions": "Report.", "input": QUESTION, "text_format": Report}
    whole = client.responses.parse(**fields)
    assert isinstance(whole.output_parsed, Report)
    with client.responses.stream(**fields) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_parsed == whole.output_parsed
    assert text == whole.output_text


# -- anthropic ---------------------------------------------------------------------------------------------------------
CLAUDE_TOOLS = [
    {"name": one["name"], "description": one["description"], "input_schema": one["parameters"]}
    for one in (FUNCTION, OTHER)
]
MESSAGE = {"model": "demo", "max_tokens": 64, "extra_body": GREEDY}
"""temperature is in the body: newer versions of the package have no argument for it."""
FORCED = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}


@pytest.fixture(scope="module")
def claude(server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


def test_anthropic_calls_a_tool_and_goes_on_with_its_result(claude):
    first = claude.messages.create(**MESSAGE, messages=[USER], tools=CLAUDE_TOOLS, tool_choice=FORCED)
    (use,) = [block for block in first.content if block.type == "tool_use"]
    assert (use.name, first.stop_reason) == ("get_weather", "tool_use")
    assert Weather.model_validate(use.input)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": RESULT}
    history = [USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = claude.messages.create(**MESSAGE, messages=history, tools=CLAUDE_TOOLS, tool_choice={"type": "none"})
    assert second.content[0].text


def test_anthropic_streams_the_call_of_the_whole_answer(claude):
    choice = {"type": "any", "disable_parallel_tool_use": True}
    fields = {**MESSAGE, "messages": [USER], "tools": CLAUDE_TOOLS[:1], "tool_choice": choice}
    whole = claude.messages.create(**fields)
    with claude.messages.stream(**fields) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == final.content[-1].input
    assert [(block.name, block.input) for block in final.content] == [
        (block.name, block.input) for block in whole.content
    ]
    assert final.stop_reason == whole.stop_reason == "tool_use"


def test_anthropic_answers_in_the_form_that_is_asked_for(claude):
    answer = claude.messages.parse(**MESSAGE, messages=[USER], output_format=Report)
    assert isinstance(answer.parsed_output, Report)


def test_anthropic_s_tool_runner_runs_the_tool(claude):
    called = []

    @anthropic.beta_tool
    def get_weather(city: Literal["Oslo", "Paris", "Cairo"]) -> str:
        """The weather of a city."""
        called.append(city)
        return RESULT

    runner = claude.beta.messages.tool_runner(
        **MESSAGE, messages=[USER], tools=[get_weather], tool_choice=FORCED, max_iterations=2, thread=False
    )
    messages = list(runner)
    assert [message.stop_reason for message in messages] == ["tool_use", "tool_use"]
    assert len(called) >= 1


# -- ollama ------------------------------------------------------------------------------------------------------------
OLLAMA_OPTIONS = {"temperature": 0, "num_predict": 48}


@pytest.fixture(scope="module")
def llama(server) -> Iterator[Any]:
    import ollama

    with ollama.Client(host=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as made:
        yield made


def test_ollama_lists_and_shows_the_model(llama):
    assert [model.model for model in llama.list().models] == ["demo"]
    assert [model.model for model in llama.ps().models] == ["demo"]
    shown = llama.show("demo")
    assert {"completion", "tools"} <= set(shown.capabilities)
    assert shown.modelinfo["llama.context_length"] == 4096


def test_ollama_chats_and_generates_whole_and_in_streams(llama):
    said = {"model": "demo", "messages": [USER], "options": OLLAMA_OPTIONS}
    whole = llama.chat(**said)
    pieces = list(llama.chat(**said, stream=True))
    assert "".join(piece.message.content for piece in pieces) == whole.message.content
    assert (pieces[-1].done, pieces[-1].eval_count) == (True, whole.eval_count)
    asked = {"model": "demo", "prompt": QUESTION, "options": OLLAMA_OPTIONS}
    text = llama.generate(**asked).response
    assert "".join(piece.response for piece in llama.generate(**asked, stream=True)) == text
    assert text


def test_ollama_answers_in_the_form_that_is_asked_for(llama):
    form = Report.model_json_schema()
    answer = llama.chat("demo", [USER], format=form, options=OLLAMA_OPTIONS)
    assert Report.model_validate_json(answer.message.content)
    answer = llama.generate("demo", QUESTION, format="json", options=OLLAMA_OPTIONS)
    assert answer.response.startswith("{")


def test_ollama_calls_a_tool_and_goes_on_with_its_result(llama):
    """No field of Ollama's forces a call. A history of calls makes the next one certain."""
    history: list[Any] = []
    for city in ("Paris", "Cairo", "Paris", "Cairo"):
        call = {"function": {"name": "look_up", "arguments": {"city": city, "unit": "celsius"}}}
        history += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_name": "look_up", "content": RESULT},
            {"role": "assistant", "content": "It rains."},
        ]
    said = [*history, USER]
    answer = llama.chat("demo", said, tools=[look_up], options=OLLAMA_OPTIONS)
    (call,) = answer.message.tool_calls
    assert (call.function.name, dict(call.function.arguments)) == ("look_up", {"city": "Oslo", "unit": "celsius"})
    result = {"role": "tool", "tool_name": "look_up", "content": RESULT}
    last = llama.chat("demo", [*said, answer.message, result], tools=[look_up], options=OLLAMA_OPTIONS)
    assert last.message.content


# -- openai-agents -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("api", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
def test_openai_agents_run_a_tool_and_report(server, api):
    import agents

    agents.set_tracing_disabled(True)  # traces would go to OpenAI
    cities = []

    @agents.function_tool(is_enabled=lambda context, agent: not cities)
    def get_weather(city: Literal["Oslo", "Paris", "Cairo"]) -> str:
        """The weather of a city."""
        cities.append(city)
        return RESULT

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
            model = getattr(agents, api)(model="demo", openai_client=client)
            settings = agents.ModelSettings(temperature=0, max_tokens=512)  # an answer that is cut short is an error
            plain = agents.Agent(name="Talker", model=model, model_settings=settings)
            assert (await agents.Runner.run(plain, "Say hello.")).final_output
            settings = replace(settings, max_tokens=64, tool_choice="required", parallel_tool_calls=False)
            agent = agents.Agent(
                name="Forecaster",
                instructions="Look the weather up, then report it.",
                model=model,
                model_settings=settings,
                tools=[get_weather],
                output_type=Report,
            )
            whole = await agents.Runner.run(agent, QUESTION, max_turns=6)
            called = list(cities)
            cities.clear()
            streamed = agents.Runner.run_streamed(agent, QUESTION, max_turns=6)
            kinds = {event.type async for event in streamed.stream_events()}
        return whole.final_output, streamed.final_output, kinds, called

    whole, streamed, kinds, called = asyncio.run(run())
    assert isinstance(whole, Report)
    assert streamed == whole
    assert {"raw_response_event", "run_item_stream_event"} <= kinds
    assert len(cities) == 1
    assert called == cities


# -- pydantic-ai -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("api", ["chat", "responses", "anthropic"])
def test_pydantic_ai_runs_a_tool_and_reports(server, api):
    from pydantic_ai import Agent, ModelSettings, RunContext
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    cities = []

    def get_weather(city: Literal["Oslo", "Paris", "Cairo"]) -> str:
        """The weather of a city."""
        cities.append(city)
        return RESULT

    def settings(context: RunContext) -> ModelSettings:
        choice = ["get_weather"] if context.run_step == 1 else ["final_result"]
        return ModelSettings(temperature=0, max_tokens=64, parallel_tool_calls=False, tool_choice=choice)

    async def run(model: Any) -> Any:
        talker = Agent(model, model_settings=ModelSettings(temperature=0, max_tokens=24))
        text = (await talker.run(QUESTION)).output
        async with talker.run_stream(QUESTION) as stream:
            assert "".join([piece async for piece in stream.stream_text(delta=True)]) == text
        return await Agent(model, output_type=Report, tools=[get_weather], model_settings=settings).run(QUESTION)

    async def run_with_client() -> Any:
        options: Any = {"api_key": KEY, "max_retries": 0, "timeout": 120}
        if api == "anthropic":
            async with anthropic.AsyncAnthropic(base_url=server.url, **options) as client:
                return await run(AnthropicModel("demo", provider=AnthropicProvider(anthropic_client=client)))
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", **options) as client:
            kind = OpenAIChatModel if api == "chat" else OpenAIResponsesModel
            return await run(kind("demo", provider=OpenAIProvider(openai_client=client)))

    assert isinstance(asyncio.run(run_with_client()).output, Report)
    assert len(cities) == 1


# -- litellm -----------------------------------------------------------------------------------------------------------
of_litellm = pytest.mark.filterwarnings("ignore:Items .* on TypedDict class:UserWarning")
"""Pydantic, of types of some provider of litellm's."""


@pytest.fixture(scope="module")
def litellm() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch its list of prices as it is imported
    import litellm as package

    return package


@of_litellm
@pytest.mark.parametrize("route", ["openai", "anthropic", "ollama_chat"])
def test_litellm_completes_and_streams(litellm, server, route):
    base = f"{server.url}/v1" if route == "openai" else server.url
    fields = {"model": f"{route}/demo", "api_base": base, "api_key": KEY, "max_tokens": 24, **GREEDY}
    whole = litellm.completion(messages=[USER], **fields)
    text = whole.choices[0].message.content
    stream = litellm.completion(messages=[USER], stream=True, **fields)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    assert text


@of_litellm
@pytest.mark.parametrize("route", ["openai", "anthropic"])
def test_litellm_calls_a_tool_and_goes_on_with_its_result(litellm, server, route):
    base = f"{server.url}/v1" if route == "openai" else server.url
    fields = {"model": f"{route}/demo", "api_base": base, "api_key": KEY, "max_tokens": 64, "tools": TOOLS, **GREEDY}
    fields["parallel_tool_calls"] = False
    message = litellm.completion(messages=[USER], tool_choice=NAMED, **fields).choices[0].message
    (call,) = message.tool_calls
    assert Weather.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    last = litellm.completion(messages=[USER, message.model_dump(), result], tool_choice="none", **fields)
    assert last.choices[0].message.content


@of_litellm
@pytest.mark.parametrize("route", ["openai", "ollama_chat"])
def test_litellm_answers_in_the_form_that_is_asked_for(litellm, server, route):
    base = f"{server.url}/v1" if route == "openai" else server.url
    fields = {"model": f"{route}/demo", "api_base": base, "api_key": KEY, "max_tokens": 64, **GREEDY}
    answer = litellm.completion(messages=[USER], response_format=Report, **fields)
    assert Report.model_validate_json(answer.choices[0].message.content)


# -- langchain ---------------------------------------------------------------------------------------------------------
def test_langchain_binds_tools_and_answers_in_a_form(server):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key=KEY, model="demo", temperature=0, max_tokens=64)
    bound = model.bind_tools([Weather], tool_choice="Weather", parallel_tool_calls=False)
    messages: list[Any] = [HumanMessage(QUESTION)]
    first = bound.invoke(messages)
    (call,) = first.tool_calls
    assert Weather.model_validate(call["args"])
    result = ToolMessage(RESULT, tool_call_id=call["id"])
    assert model.bind_tools([Weather], tool_choice="none").invoke([*messages, first, result]).content
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Report, method=method).invoke(QUESTION), Report)
