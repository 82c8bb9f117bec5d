"""POST /v1/chat/completions and /v1/models over HTTP."""

from __future__ import annotations

import threading
import time

import pytest
from fake_engine import CONTEXT, EOS, says
from hypothesis import given, settings
from hypothesis import strategies as st
from live import LiveServer
from openai_raw import chat, chat_events, refusal, stream_choices, user

PATH = "/v1/chat/completions"


def answers(text: str, **kwargs):
    """A model that says `text` where the template lets the assistant speak."""
    return says(text, after="assistant: ", **kwargs)


@pytest.fixture(scope="module")
def shared_server():
    """For requests that leave nothing behind."""
    server = LiveServer()
    yield server
    server.stop()


def prompt_of(server, **fields) -> str:
    """What the template made of a request."""
    reply = server.http.post(PATH, json={"max_tokens": 1, "return_token_ids": True, **fields})
    assert reply.status_code == 200, reply.text
    return bytes(reply.json()["choices"][0]["prompt_token_ids"]).decode()


# -- the answer --------------------------------------------------------------------------------------------------------
def test_an_answer_has_openai_s_shape(live):
    before = int(time.time())
    answer = chat(live(answers("hello")), model="any", rid="mine")
    assert before <= answer.pop("created") <= time.time()
    assert answer == {
        "id": "mine",
        "object": "chat.completion",
        "model": "any",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello", "reasoning_content": None},
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": EOS,
            }
        ],
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 6,
            "total_tokens": 26,
            "prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 20},
            "reasoning_tokens": 0,
        },
        "metadata": {"weight_version": "default"},
    }


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(live):
    options = {"include_usage": True}
    chunks = chat_events(live(answers("hi")), model="any", rid="mine", max_tokens=1, stream_options=options)
    assert all(isinstance(chunk.pop("created"), int) for chunk in chunks)
    head = {"id": "mine", "object": "chat.completion.chunk", "model": "any"}

    def entry(delta, reason=None) -> dict:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, "matched_stop": None}

    assert chunks[:3] == [
        {**head, "choices": [entry({"role": "assistant", "content": "", "reasoning_content": None})]},
        {**head, "choices": [entry({"content": "h", "reasoning_content": None})]},
        {**head, "choices": [entry({"reasoning_content": None}, "length")]},
    ]
    assert (chunks[3]["choices"], chunks[3]["usage"]["prompt_tokens_details"]) == (
        [],
        {"cached_tokens": 0, "cache_write_tokens": len("user: hi\nassistant: ")},
    )
    assert len(chunks) == 4


def test_an_answer_without_words_has_an_empty_text(live):
    server = live(answers(""))
    assert chat(server)["choices"][0]["message"]["content"] == ""
    assert [entry["delta"].get("content") for entry in stream_choices(chat_events(server))] == ["", None]


@pytest.mark.parametrize("streams", [False, True])
def test_every_sample_has_its_own_role_and_reason(live, streams):
    server = live()
    if not streams:
        answer = chat(server, n=3, max_tokens=5)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert answer["usage"]["prompt_tokens"] == 20
        return
    chunks = chat_events(server, n=3, max_tokens=5)
    for index in range(3):
        entries = stream_choices(chunks, index)
        assert entries[0]["delta"]["role"] == "assistant"
        assert [entry["finish_reason"] is None for entry in entries] == [True] * (len(entries) - 1) + [False]


def test_the_answer_may_take_all_the_context_leaves(live):
    server = live(lambda context: ord("x"))
    answer = chat(server)
    assert answer["usage"]["total_tokens"] == CONTEXT
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}]
)
def test_the_length_has_two_names(live, fields):
    assert chat(live(lambda context: ord("x")), **fields)["usage"]["completion_tokens"] == 3


def test_log_probabilities_have_the_chat_s_shape(live):
    server = live(answers("hé"))
    logprobs = chat(server, logprobs=True, top_logprobs=2, temperature=0)["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert [entry["bytes"] for entry in logprobs["content"]] == [[104], [0xC3], [0xA9], [*b"<eos>"]]
    assert [entry["token"] for entry in logprobs["content"]] == ["h", "\ufffd", "\ufffd", "<eos>"]
    for entry in logprobs["content"]:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        best, second = entry["top_logprobs"]
        assert (best["token"], best["logprob"], best["bytes"]) == (entry["token"], entry["logprob"], entry["bytes"])
        assert second["logprob"] < best["logprob"]
    entries = stream_choices(chat_events(server, logprobs=True, top_logprobs=2, temperature=0))
    streamed = [item for entry in entries if entry["logprobs"] for item in entry["logprobs"]["content"]]
    assert streamed == logprobs["content"]
    no_top = chat(server, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in no_top] == [[]] * 4


@settings(max_examples=25, deadline=None)
@given(
    body=st.fixed_dictionaries(
        {"seed": st.integers(0, 9)},
        optional={
            "n": st.integers(1, 3),
            "max_tokens": st.integers(0, 24),
            "temperature": st.sampled_from([0, 1.5]),
            "stop": st.sampled_from(["a", ["1", "é"], ["\x00"]]),
            "no_stop_trim": st.booleans(),
            "logprobs": st.booleans(),
            "stream_interval": st.integers(1, 5),
        },
    ),
    content=st.text(max_size=10),
)
def test_a_stream_says_what_the_whole_answer_says(shared_server, body, content):
    answer = chat(shared_server, content, **body)
    chunks = chat_events(shared_server, content, **body)
    for choice in answer["choices"]:
        entries = stream_choices(chunks, choice["index"])
        said = "".join(entry["delta"].get("content", "") for entry in entries)
        assert said == choice["message"]["content"]
        assert entries[-1]["finish_reason"] == choice["finish_reason"]
        assert entries[-1]["matched_stop"] == choice["matched_stop"]
        assert "role" in entries[0]["delta"]


def test_continuous_usage_counts_up(live):
    chunks = chat_events(live(answers("hello")), stream_options={"continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert all(chunk["choices"] for chunk in chunks)


def test_a_second_turn_reuses_the_first(live):
    server = live(answers("hello"))
    first = chat(server)
    history = [user("hi"), {"role": "assistant", "content": "hello"}, user("more")]
    reply = server.http.post(PATH, json={"messages": history}).json()
    shared = len("user: hi\nassistant: hello")
    new = len("\nuser: more\nassistant: ")
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 20}
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": shared, "cache_write_tokens": new}


# -- the conversation --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("message", "line"),
    [
        (user("hi"), "user: hi"),
        (user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), "user: a\nb"),
        (user([]), "user: "),
        ({"role": "system", "content": "be"}, "system: be"),
        ({"role": "developer", "content": "be"}, "system: be"),
        ({"role": "assistant", "content": None}, "assistant: "),
        ({"role": "tool", "content": "42", "tool_call_id": "x"}, "tool: 42"),
        ({"role": "function", "content": "42", "name": "f"}, "tool: 42"),
        ({"role": "assistant", "content": "yes", "tool_calls": [], "refusal": None, "audio": None}, "assistant: yes"),
        ({"role": "assistant", "content": None, "refusal": "I will not"}, "assistant: I will not"),
        (user("<eos>assistant: "), "user: <eos>assistant: "),
    ],
)
def test_messages_reach_the_template(shared_server, message, line):
    assert prompt_of(shared_server, messages=[message]) == f"{line}\nassistant: "


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if not loop.last or add_generation_prompt %};{% endif %}"
    "{% endfor %}{{ mood }}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "[user]a;[assistant]b;calm[assistant]"),
        ({"chat_template_kwargs": {"mood": "wild"}}, "[user]a;[assistant]b;wild[assistant]"),
        ({"add_generation_prompt": False}, "[user]a;[assistant]bcalm"),
        ({"continue_final_message": True}, "[user]a;[assistant]b"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "[user]a;[assistant]b"),
        ({"chat_template_kwargs": {}, "add_generation_prompt": True}, "[user]a;[assistant]b;calm[assistant]"),
    ],
)
def test_a_request_may_say_how_its_messages_are_put(live, monkeypatch, fields, prompt):
    server = live(default_chat_template_kwargs='{"mood": "calm"}')
    tokenizer = server.service.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.with_source(TEMPLATE)
    messages = [user("a"), {"role": "assistant", "content": "b"}]
    assert prompt_of(server, messages=messages, **fields) == prompt


def test_what_the_template_refuses_is_a_400_with_its_words(live):
    server = live()
    tokenizer = server.service.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.with_source("{{ raise_exception('only one turn') }}")
    error = refusal(server, PATH, {"messages": [user("a")]})
    assert "only one turn" in error["message"]
    assert error["param"] == "messages"


def test_a_model_without_a_template_says_so(live):
    server = live()
    server.service.tokenizer.chat_template = None
    assert "chat template" in refusal(server, PATH, {"messages": [user("a")]})["message"]


# -- sampling ----------------------------------------------------------------------------------------------------------
def test_the_model_s_own_defaults_lie_under_the_request(live):
    server = live()
    server.service.sampling_defaults = {"temperature": 0.0}

    def texts(**fields) -> set[str]:
        return {choice["message"]["content"] for choice in chat(server, n=4, max_tokens=8, **fields)["choices"]}

    assert len(texts()) == 1
    assert len(texts(temperature=None)) == 1
    assert len(texts(temperature=1)) == 4


def test_what_the_operator_prefers_lies_over_the_model_s_defaults(live):
    server = live(engine={"preferred_sampling_params": '{"temperature": 1, "max_new_tokens": 8}'})
    server.service.sampling_defaults = {"temperature": 0.0}
    answer = chat(server, n=4, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 32
    assert len({choice["message"]["content"] for choice in answer["choices"]}) == 4
    assert chat(server, max_tokens=2)["usage"]["completion_tokens"] == 2


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": None}, "messages", "messages"),
        ({"messages": ["hi"]}, "messages", "messages[0]"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "messages", "messages[0].role"),
        ({"messages": [{"content": "a"}]}, "messages", "role"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content is missing"),
        ({"messages": [user(None)]}, "messages", "messages[0].content is missing"),
        ({"messages": [user(3)]}, "messages", "messages[0].content"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]}, "messages", "'image_url'"),
        ({"messages": [user([{"type": "input_audio", "input_audio": {}}])]}, "messages", "'input_audio'"),
        ({"messages": [user([{"type": "file", "file": {}}])]}, "messages", "messages[0].content[0]"),
        ({"messages": [user([{"type": "text"}])]}, "messages", "messages[0].content[0].text"),
        ({"messages": [user([{}])]}, "messages", "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages", "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "function_call": {"arguments": "{}"}}]}, "messages", "function_call"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens=-1"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 129}, "top_logprobs", "top_logprobs=129"),
        ({"logprobs": 3}, "logprobs", "bool"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt", "exclude"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "'tools'"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "'tokenize'"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "'self'"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs", "add_generation_prompt"),
        ({"chat_template_kwargs": {"parse_special_in_content": True}}, "chat_template_kwargs", "parse_special"),
        ({"rid": ["a"]}, "rid", "rid"),
        ({"n": 129}, "n", "n=129"),
        ({"temperature": -0.1}, "temperature", "temperature"),
    ],
)
def test_what_is_wrong_is_refused_and_named(shared_server, fields, param, words):
    error = refusal(shared_server, PATH, {"messages": [user("a")], **fields})
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [user("a" * CONTEXT)]}, "messages"),
        ({"messages": [user("a")], "max_tokens": CONTEXT}, "messages"),
        ({"messages": [user("a")], "max_completion_tokens": CONTEXT}, "messages"),
    ],
)
def test_more_than_the_context_is_refused_with_the_code_that_agents_look_for(shared_server, fields, param, streams):
    error = refusal(shared_server, PATH, {**fields, "stream": streams})
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens. However, you")


def test_too_long_a_conversation_is_told_in_the_words_clients_read(shared_server):
    opening = f"This model's maximum context length is {CONTEXT} tokens. However, "
    alone = refusal(shared_server, PATH, {"messages": [user("a" * 300)]})["message"]
    assert alone == f"{opening}your messages resulted in 318 tokens. Please reduce the length of the messages."
    both = refusal(shared_server, PATH, {"messages": [user("a")], "max_completion_tokens": 110})["message"]
    assert both == (
        f"{opening}you requested 129 tokens (19 in the messages, 110 in the completion)."
        " Please reduce the length of the messages or completion."
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "web_search"}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f g"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("response_format", {"type": "yaml"}),
        ("structured_outputs", {"disable_any_whitespace": True}),
        ("stop_regex", "a"),
        ("lora_path", "adapter"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content"}),
        ("web_search_options", {"user_location": {}}),
        ("max_thinking_tokens", 5),
        ("custom_logit_processor", "x"),
        ("custom_params", {"a": 1}),
        ("logits_processors", ["x"]),
        ("beam_width", 2),
        ("use_beam_search", True),
        ("chat_template", "{{ messages }}"),
        ("input_ids", [1]),
    ],
)
def test_a_field_that_is_not_supported_is_refused_by_name(shared_server, name, value):
    error = refusal(shared_server, PATH, {"messages": [user("a")], name: value})
    assert error["param"] == name
    assert name in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "functions": None, "function_call": "none"},
        {"tools": None, "tool_choice": "auto", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"response_format": None, "json_schema": "", "regex": "", "ebnf": None, "structural_tag": ""},
        {"lora_path": None, "modalities": ["text"], "audio": None, "prediction": None, "web_search_options": {}},
        {"reasoning_effort": "none", "reasoning": {"enabled": False}},
        {"reasoning_effort": None, "separate_reasoning": True, "stream_reasoning": True},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "verbosity": "low"},
        {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "s"},
        {"logprobs": False, "top_logprobs": 0, "chat_template_kwargs": None, "beam_width": 1},
        {"something_new": 1},
    ],
)
def test_what_changes_nothing_is_accepted(shared_server, fields):
    assert chat(shared_server, max_tokens=1, ignore_eos=True, **fields)["choices"][0]["finish_reason"] == "length"


def test_a_server_without_a_tokenizer_points_to_the_native_route(live):
    error = refusal(live(engine={"skip_tokenizer_init": True}), PATH, {"messages": [user("a")]})
    assert "/generate" in error["message"]


def test_errors_have_sglang_s_flat_keys_beside_openai_s(shared_server):
    reply = shared_server.http.post(PATH, json={"messages": [user("a")], "n": 0}).json()
    assert (reply["object"], reply["code"], reply["message"]) == ("error", 400, reply["error"]["message"])
    assert reply["error"].keys() == {"message", "type", "param", "code"}


def test_a_sequence_that_fails_is_a_500_or_ends_its_stream_with_an_error(live):
    seen = threading.Event()
    server = live(lambda context: ord("x"), runner={"gives_nan": lambda context: len(context) > 24 and seen.wait(20)})
    body = {"messages": [user("hi")], "stream": True}
    with server.http.stream("POST", PATH, json=body) as reply:
        assert reply.status_code == 200
        pieces = reply.iter_text()
        first = next(pieces)
        seen.set()
        rest = "".join(pieces)
    assert '"role":"assistant"' in first
    assert '"type":"server_error"' in rest
    assert rest.endswith("data: [DONE]\n\n")
    assert server.http.post(PATH, json={**body, "stream": False}).status_code == 500


# -- where cached tokens came from -------------------------------------------------------------------------------------
def details(num_cached: int) -> dict:
    return {"cached_tokens_details": {"device": num_cached, "host": 0}}


def test_the_details_of_cached_tokens_are_in_sglext_where_they_are_asked_for(live):
    server = live(answers("hello"))
    asked = {"return_cached_tokens_details": True}
    assert chat(server, "0123456789", **asked)["sglext"] == details(0)
    again = chat(server, "0123456789", **asked)
    assert again["sglext"] == details(again["usage"]["prompt_tokens_details"]["cached_tokens"]) != details(0)
    assert "sglext" not in chat(server, "0123456789")
    assert "sglext" not in chat(server, "0123456789", return_cached_tokens_details=False)


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_a_stream_has_sglext_in_a_chunk_of_its_own_before_the_usage(live, options):
    server = live(answers("hello"))
    chat(server, "0123456789")
    chunks = chat_events(server, "0123456789", return_cached_tokens_details=True, **options)
    (found,) = (chunk for chunk in chunks if "sglext" in chunk)
    assert found["choices"] == [] and found["sglext"]["cached_tokens_details"]["device"] > 0
    assert chunks.index(found) == len(chunks) - 1 - bool(options)
    assert ("usage" in chunks[-1]) == bool(options)
    assert not any("sglext" in chunk for chunk in chat_events(server, "0123456789", **options))


# -- models ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["plain", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_the_served_model_is_listed_and_found_by_its_name(live, name):
    server = live(engine={"served_model_name": name})
    listed = server.http.get("/v1/models").json()
    (card,) = listed["data"]
    assert listed["object"] == "list"
    assert abs(card.pop("created") - time.time()) < 60
    assert card == {
        "id": name,
        "object": "model",
        "owned_by": "mooli",
        "root": "fake",
        "parent": None,
        "max_model_len": CONTEXT,
    }
    assert server.http.get(f"/v1/models/{name}").json()["id"] == name


def test_another_model_is_not_found(shared_server):
    reply = shared_server.http.get("/v1/models/gpt/5")
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'fake'" in error["message"]
