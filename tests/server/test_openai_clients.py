"""The clients people use, as they are, against the OpenAI routes."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from fake_engine import CONTEXT, says
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]


@pytest.fixture
def server(live):
    return live(lambda context: SPEAK(context) or COMPLETE(context), api_key="secret")


SPEAK = says("hello you", after="assistant: ")
COMPLETE = says("hello you", after=">")


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as made:
        yield made


# -- openai ------------------------------------------------------------------------------------------------------------
def test_openai_lists_and_finds_the_model(client):
    (model,) = client.models.list()
    assert (model.id, model.owned_by, model.max_model_len) == ("fake", "mooli", CONTEXT)
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("another")
    assert raised.value.code == "model_not_found"


def test_openai_sees_too_long_a_prompt_in_its_words(client):
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is \d+ tokens. However, ") as raised:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * CONTEXT}])
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")


def test_openai_reads_where_cached_tokens_came_from(client):
    extra = {"return_cached_tokens_details": True}
    answer = client.chat.completions.create(model="m", messages=MESSAGES, extra_body=extra)
    assert answer.sglext == {"cached_tokens_details": {"device": 0, "host": 0}}


def test_openai_chats(client):
    answer = client.chat.completions.create(model="m", messages=MESSAGES, temperature=0, seed=1, user="me")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello you")
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 10
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.model == "m"


def test_openai_streams_a_chat(client):
    options = {"include_usage": True}
    with client.chat.completions.create(model="m", messages=MESSAGES, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == "hello you"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 10)


def test_openai_s_stream_helper_puts_the_answer_together(client):
    with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        answer = stream.get_final_completion()
    assert "".join(deltas) == answer.choices[0].message.content == "hello you"
    assert answer.choices[0].finish_reason == "stop"


def test_openai_reads_log_probabilities(client):
    answer = client.chat.completions.create(
        model="m", messages=MESSAGES, logprobs=True, top_logprobs=3, max_completion_tokens=2, temperature=0
    )
    assert [entry.token for entry in answer.choices[0].logprobs.content] == ["h", "e"]
    assert [len(entry.top_logprobs) for entry in answer.choices[0].logprobs.content] == [3, 3]
    completion = client.completions.create(model="m", prompt="say>", logprobs=1, max_tokens=2, echo=True, temperature=0)
    logprobs = completion.choices[0].logprobs
    assert logprobs.tokens == [*"say>he"]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.text_offset == [0, 1, 2, 3, 4, 5]


def test_openai_gets_samples_and_extras(client):
    answer = client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        n=2,
        stop=["you"],
        frequency_penalty=0.1,
        logit_bias={"65": -1},
        extra_body={"top_k": 5, "min_p": 0.0, "chat_template_kwargs": {"x": 1}, "priority": 1, "cache_salt": "a"},
    )
    assert [choice.message.content for choice in answer.choices] == ["hello ", "hello "]
    assert [choice.matched_stop for choice in answer.choices] == ["you", "you"]


def test_openai_completes_texts_and_ids(client):
    answer = client.completions.create(model="m", prompt=["a>", "b>"], max_tokens=5)
    assert [choice.text for choice in answer.choices] == ["hello", "hello"]
    answer = client.completions.create(model="m", prompt=[*b"say>"], max_tokens=5)
    assert answer.choices[0].text == "hello"
    with client.completions.create(model="m", prompt="say>", max_tokens=9, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "hello you"


def test_openai_shows_the_raw_answer(client):
    raw = client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.content == "hello you"


@pytest.mark.parametrize("streams", [False, True])
def test_openai_raises_what_went_wrong(client, streams):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=CONTEXT, stream=streams)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="tools") as raised:
        tools = [{"type": "function", "function": {"name": "f g", "parameters": {}}}]
        client.chat.completions.create(model="m", messages=MESSAGES, tools=tools, stream=streams)
    assert (raised.value.param, raised.value.type) == ("tools", "invalid_request_error")


def test_openai_raises_what_went_wrong_in_the_middle_of_a_stream(live):
    server = live(lambda context: ord("x"), runner={"gives_nan": lambda context: len(context) > 8})
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
        pytest.raises(openai.APIError, match="failed"),
        client.completions.create(model="m", prompt="say>", stream=True) as stream,
    ):
        list(stream)


def test_openai_without_the_key_is_turned_away(server):
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_async_openai_runs_many_at_once(server):
    async def run() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=i + 1) for i in range(9))
            )
            stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            async with stream:
                said = [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
            return [answer.choices[0].message.content for answer in answers], "".join(said)

    contents, said = asyncio.run(run())
    assert contents == ["hello you"[: i + 1] for i in range(9)]
    assert said == "hello you"


# -- langchain ---------------------------------------------------------------------------------------------------------
def langchain_arguments(server, **clients) -> dict:
    return {"base_url": f"{server.url}/v1", "api_key": "secret", "model": "m", "max_retries": 0, **clients}


@pytest.fixture
def langchain(server):
    with httpx.Client() as client:
        yield ChatOpenAI(**langchain_arguments(server, http_client=client), stream_usage=True, temperature=0)


def test_langchain_invokes(langchain):
    answer = langchain.invoke([SystemMessage("be"), HumanMessage("hi"), AIMessage("so?"), HumanMessage("say")])
    assert answer.content == "hello you"
    assert answer.usage_metadata["output_tokens"] == 10
    assert answer.usage_metadata["input_token_details"]["cache_read"] == 0
    assert answer.response_metadata["finish_reason"] == "stop"


def test_langchain_streams_with_usage(langchain):
    whole = None
    for chunk in langchain.stream("hi"):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == "hello you"
    assert whole.usage_metadata["output_tokens"] == 10
    assert whole.response_metadata["finish_reason"] == "stop"


def test_langchain_batches_and_binds(langchain):
    answers = langchain.bind(stop=[" "]).batch(["a", "b", "c"])
    assert [answer.content for answer in answers] == ["hello"] * 3


def test_langchain_awaits(server):
    async def run() -> tuple[str, str]:
        async with httpx.AsyncClient() as client:
            model = ChatOpenAI(**langchain_arguments(server, http_async_client=client))
            answer = await model.ainvoke("hi")
            pieces = [chunk.content async for chunk in model.astream("hi")]
            return answer.content, "".join(pieces)

    assert asyncio.run(run()) == ("hello you", "hello you")


def test_langchain_completes(server):
    with httpx.Client() as client:
        model = OpenAI(**langchain_arguments(server, http_client=client), max_tokens=9)
        assert model.invoke("say>") == "hello you"
        assert "".join(model.stream("say>")) == "hello you"
        assert [row[0].text for row in model.generate(["a>", "b>"]).generations] == ["hello you"] * 2
