"""The packages people use, as they are, against a real server with the demo model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import anthropic
import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from server_process import ServerProcess, needs_demo

from mooli import Engine

pytestmark = needs_demo

KEY = "a-key-of-the-tests"
FLAGS = ("--api-key", KEY, "--random-seed", "1")
CAPITAL = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0}
"""In Anthropic's extra_body: newer versions of its package have no argument for it."""
TOPICS = ["radishes", "the sea", "a king", "numbers", "Paris", "trees", "a cat", "music"]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(*FLAGS) as started:
        yield started


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def claude(server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, content: str = QUESTION[0]["content"], **fields):
    fields = {"model": "demo", "temperature": 0, "max_tokens": 24, **fields}
    return client.chat.completions.create(messages=[{"role": "user", "content": content}], **fields)


def said(chunks) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


# -- the same engine ---------------------------------------------------------------------------------------------------
def test_greedy_text_is_that_of_the_engine_in_a_script(client, claude):
    prompts = [CAPITAL, *(f"A short text about {topic}:" for topic in TOPICS[:2])]
    greedy = {"temperature": 0, "max_new_tokens": 24}
    with Engine(model_path="demo", max_total_tokens=4096, random_seed=1) as engine:
        texts = [answer["text"] for answer in engine.generate(prompts, greedy)]
        tokenizer = engine.tokenizer_manager.tokenizer
        rendered = tokenizer.chat_template.render(QUESTION)
        answer = engine.generate(input_ids=tokenizer.encode(rendered, add_special_tokens=False), sampling_params=greedy)
    served = client.completions.create(model="demo", prompt=prompts, temperature=0, max_tokens=24)
    assert [choice.text for choice in served.choices] == texts
    assert chat(client).choices[0].message.content == answer["text"]
    message = claude.messages.create(model="demo", max_tokens=24, messages=QUESTION, extra_body=GREEDY)
    assert message.content[0].text == answer["text"]
    assert len({*texts, answer["text"]}) == 4


def test_streams_beside_each_other_say_what_each_says_alone(client, server):
    alone = {topic: chat(client, f"Tell me about {topic}.").choices[0].message.content for topic in TOPICS}
    assert len(set(alone.values())) == len(TOPICS)

    async def read(async_client: openai.AsyncOpenAI, topic: str) -> str:
        messages = [{"role": "user", "content": f"Tell me about {topic}."}]
        stream = await async_client.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=24, stream=True
        )
        return said([chunk async for chunk in stream])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as async_client:
            return await asyncio.gather(*(read(async_client, topic) for topic in TOPICS))

    assert dict(zip(TOPICS, asyncio.run(run()), strict=True)) == alone


# -- openai ------------------------------------------------------------------------------------------------------------
def test_openai_lists_the_model(client):
    (model,) = client.models.list()
    assert (model.id, model.max_model_len) == ("demo", 4096)


def test_openai_streams_the_text_of_the_whole_answer(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert said(chunks) == whole.choices[0].message.content
    finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert finish == [whole.choices[0].finish_reason]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openai_sees_what_came_from_the_cache(client):
    content = "This prompt is asked twice, and the second time it is known."
    first, second = (chat(client, content).usage for _ in range(2))
    assert first.prompt_tokens == second.prompt_tokens
    assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens - 1
    assert first.prompt_tokens_details.cached_tokens < second.prompt_tokens_details.cached_tokens
    assert first.total_tokens == first.prompt_tokens + first.completion_tokens


def test_openai_gets_the_same_samples_for_the_same_seed(client):
    def sample(seed: int) -> list[str]:
        answer = chat(client, "Invent a word.", temperature=1.0, seed=seed, n=3)
        return [choice.message.content for choice in answer.choices]

    first = sample(11)
    assert sample(11) == first
    assert sample(12) != first
    assert len(set(first)) > 1


def test_openai_stops_at_a_string(client):
    text = chat(client).choices[0].message.content
    stop = text[5:9]
    choice = chat(client, stop=[stop, "never said"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text[: text.index(stop)], "stop")
    stream = chat(client, stop=stop, stream=True)
    assert said(stream) == text[: text.index(stop)]


def test_openai_s_echo_and_log_probabilities_belong_to_the_text(client):
    answer = client.completions.create(model="demo", prompt=CAPITAL, echo=True, logprobs=2, max_tokens=4, temperature=0)
    choice = answer.choices[0]
    assert choice.text.startswith(CAPITAL)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert len(choice.logprobs.tokens) == answer.usage.total_tokens
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    for token, top in zip(choice.logprobs.tokens[-4:], choice.logprobs.top_logprobs[-4:], strict=True):
        assert max(top, key=top.get) == token


def test_openai_reads_log_probabilities_of_a_chat(client):
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=6)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token
        assert len(entry.top_logprobs) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_openai_raises_the_error_that_fits(client, server, stream):
    with pytest.raises(openai.BadRequestError) as too_long:
        chat(client, "word " * 5000, stream=stream)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        chat(client, temperature=-1, stream=stream)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="tools"):
        chat(client, tools=[{"type": "function", "function": {"name": "two words"}}], stream=stream)
    impossible = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="nothing"):
        chat(client, response_format=impossible, stream=stream)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        chat(stranger, stream=stream)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_openai_may_leave_in_the_middle_of_a_stream(client):
    stream = chat(client, max_tokens=1000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert chat(client).choices[0].message.content


# -- anthropic ---------------------------------------------------------------------------------------------------------
def test_anthropic_streams_the_text_of_the_whole_answer(claude):
    fields = {"model": "demo", "max_tokens": 24, "messages": QUESTION, "system": "Be brief.", "extra_body": GREEDY}
    whole = claude.messages.create(**fields)
    with claude.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_anthropic_counts_cached_tokens_apart(claude):
    fields = {"model": "demo", "messages": [{"role": "user", "content": "A question that comes a second time."}]}
    count = claude.messages.count_tokens(**fields).input_tokens
    first, second = (claude.messages.create(**fields, max_tokens=4).usage for _ in range(2))
    assert first.input_tokens + first.cache_read_input_tokens == count
    assert (second.input_tokens, second.cache_read_input_tokens) == (1, count - 1)


def test_anthropic_stops_at_a_sequence(claude):
    fields = {"model": "demo", "max_tokens": 24, "messages": QUESTION, "extra_body": GREEDY}
    text = claude.messages.create(**fields).content[0].text
    message = claude.messages.create(**fields, stop_sequences=[text[5:9]])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", text[5:9])
    assert message.content[0].text == text[: text.index(text[5:9])]


def test_anthropic_raises_the_error_that_fits(claude, server):
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        claude.messages.create(
            model="demo", max_tokens=4, messages=QUESTION, tools=[{"name": "f", "input_schema": {"type": "list"}}]
        )
    with pytest.raises(anthropic.BadRequestError) as too_long:
        claude.messages.create(model="demo", max_tokens=4, messages=[{"role": "user", "content": "word " * 5000}])
    assert too_long.value.body["error"]["type"] == "invalid_request_error"
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(model="demo", max_tokens=4, messages=QUESTION)


# -- langchain ---------------------------------------------------------------------------------------------------------
def test_langchain_chats_streams_and_batches(client, server):
    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key=KEY, model="demo", temperature=0, max_tokens=24)
    messages = [HumanMessage(QUESTION[0]["content"])]
    expected = chat(client).choices[0].message.content
    answer = model.invoke(messages)
    assert answer.content == expected
    assert answer.usage_metadata["input_token_details"]["cache_read"] == answer.usage_metadata["input_tokens"] - 1
    assert "".join(chunk.content for chunk in model.stream(messages)) == expected
    assert [reply.content for reply in model.batch([messages, messages])] == [expected, expected]
    assert asyncio.run(model.ainvoke([SystemMessage("Be brief."), *messages])).content


def test_langchain_completes(client, server):
    model = OpenAI(base_url=f"{server.url}/v1", api_key=KEY, model="demo", temperature=0, max_tokens=12)
    expected = client.completions.create(model="demo", prompt=CAPITAL, temperature=0, max_tokens=12).choices[0].text
    assert model.invoke(CAPITAL) == expected
