"""POST /v1/completions over HTTP."""

from __future__ import annotations

import threading
import time

import pytest
from fake_engine import CONTEXT, EOS, says
from hypothesis import given, settings
from hypothesis import strategies as st
from live import LiveServer
from openai_raw import complete, complete_events, refusal, stream_choices

from mooli.frontend.infill import Infill

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def shared_server():
    """For requests that leave nothing behind."""
    server = LiveServer()
    yield server
    server.stop()


def usage(prompt: int, completion: int, cached: int = 0) -> dict:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt - cached},
        "reasoning_tokens": 0,
    }


# -- the answer --------------------------------------------------------------------------------------------------------
def test_an_answer_has_openai_s_shape(live):
    before = int(time.time())
    answer = complete(live(says("hello")), model="any", rid="mine")
    assert before <= answer.pop("created") <= time.time()
    assert answer == {
        "id": "mine",
        "object": "text_completion",
        "model": "any",
        "choices": [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop", "matched_stop": EOS}],
        "usage": usage(4, 6),
        "metadata": {"weight_version": "default"},
    }


def test_a_chunk_has_the_same_shape_without_usage(live):
    (chunk,) = complete_events(live(says("hi")), model="any", rid="mine", max_tokens=1)
    assert isinstance(chunk.pop("created"), int)
    assert chunk == {
        "id": "mine",
        "object": "text_completion",
        "model": "any",
        "choices": [{"index": 0, "text": "h", "logprobs": None, "finish_reason": "length", "matched_stop": None}],
    }


def test_without_a_model_name_the_served_one_is_told(live):
    assert complete(live(says("a"), engine={"served_model_name": "org/name"}))["model"] == "org/name"


@pytest.mark.parametrize("prompt", ["say>", ["say>"], [*b"say>"], [[*b"say>"]]], ids=["text", "texts", "ids", "lists"])
def test_a_prompt_may_come_in_four_forms(live, prompt):
    answer = complete(live(says("hello")), prompt)
    assert [choice["text"] for choice in answer["choices"]] == ["hello"]
    assert answer["usage"]["prompt_tokens"] == 4


def test_choices_of_several_prompts_stand_prompt_by_prompt_and_each_prompt_counts_once(live):
    server = live(lambda context: context[0])
    answer = complete(server, ["aaaa", "bb"], n=2, max_tokens=3)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "aaa"),
        (1, "aaa"),
        (2, "bbb"),
        (3, "bbb"),
    ]
    assert answer["usage"] == usage(6, 12)


def test_samples_differ_and_a_seed_brings_them_back(live):
    server = live()
    first = [choice["text"] for choice in complete(server, n=3, seed=5)["choices"]]
    assert len(set(first)) == 3
    assert [choice["text"] for choice in complete(server, n=3, seed=5)["choices"]] == first


@pytest.mark.parametrize(
    ("fields", "text", "reason", "matched"),
    [
        ({}, "one two", "stop", EOS),
        ({"max_tokens": 3}, "one", "length", None),
        ({"max_tokens": 0}, "", "length", None),
        ({"stop": " t"}, "one", "stop", " t"),
        ({"stop": ["zz", " t"], "no_stop_trim": True}, "one t", "stop", " t"),
        ({"stop_token_ids": [ord("e")]}, "on", "stop", ord("e")),
        ({"stop_token_ids": [ord("e")], "ignore_eos": True, "max_tokens": 4}, "one ", "length", None),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_says_why_it_ended(live, fields, text, reason, matched, streams):
    server = live(says("one two"))
    choices = stream_choices(complete_events(server, **fields)) if streams else complete(server, **fields)["choices"]
    assert "".join(choice["text"] for choice in choices) == text
    assert (choices[-1]["finish_reason"], choices[-1]["matched_stop"]) == (reason, matched)
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


def test_an_aborted_answer_says_so(live):
    gate = threading.Event()
    server = live(lambda context: (gate.wait(20), ord("x"))[1] if len(context) > 6 else ord("x"))

    def abort() -> None:
        while not server.service.client.open_rids:
            time.sleep(0.001)
        server.loop.call_soon_threadsafe(server.service.client.abort, ["mine"], "no longer wanted")
        server.loop.call_soon_threadsafe(gate.set)

    thread = threading.Thread(target=abort)
    thread.start()
    answer = complete(server, rid="mine", max_tokens=100)
    thread.join()
    assert answer["choices"][0]["finish_reason"] == "abort"
    assert answer["usage"]["completion_tokens"] < 100


def test_ids_come_back_where_they_are_asked_for(live):
    server = live(says("hi"))
    (choice,) = complete(server, return_token_ids=True)["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([*b"say>"], [*b"hi", EOS])
    entries = stream_choices(complete_events(server, return_token_ids=True))
    assert entries[0]["prompt_token_ids"] == [*b"say>"]
    assert [token_id for entry in entries for token_id in entry["token_ids"]] == [*b"hi", EOS]
    assert not any("prompt_token_ids" in entry for entry in entries[1:])


# -- length ------------------------------------------------------------------------------------------------------------
def test_an_answer_has_16_tokens_unless_told_otherwise(live):
    server = live(lambda context: ord("x"))
    assert complete(server)["usage"]["completion_tokens"] == 16


def test_the_default_length_ends_where_the_context_ends(live):
    server = live(lambda context: ord("x"))
    answer = complete(server, "a" * (CONTEXT - 5))
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_operator_s_length_goes_before_the_default(live):
    server = live(lambda context: ord("x"), engine={"preferred_sampling_params": '{"max_new_tokens": 20}'})
    assert complete(server)["usage"]["completion_tokens"] == 20
    assert complete(server, max_tokens=3)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("fields", [{"prompt": "a" * CONTEXT}, {"prompt": "aaaa", "max_tokens": CONTEXT}])
@pytest.mark.parametrize("streams", [False, True])
def test_more_than_the_context_is_refused_with_the_code_that_agents_look_for(live, fields, streams):
    error = refusal(live(), PATH, {**fields, "stream": streams})
    assert (error["code"], error["param"], error["type"]) == (
        "context_length_exceeded",
        "prompt",
        "invalid_request_error",
    )
    assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens. However, you")


def test_too_long_a_prompt_is_told_in_the_words_clients_read(shared_server):
    opening = f"This model's maximum context length is {CONTEXT} tokens. However, "
    alone = refusal(shared_server, PATH, {"prompt": "a" * 300})["message"]
    assert alone == f"{opening}your prompt resulted in 300 tokens. Please reduce the length of the prompt."
    both = refusal(shared_server, PATH, {"prompt": "aaaa", "max_tokens": 125})["message"]
    assert both == (
        f"{opening}you requested 129 tokens (4 in the prompt, 125 in the completion)."
        " Please reduce the length of the prompt or completion."
    )
    batch = refusal(shared_server, PATH, {"prompt": ["a", "b" * 300]})["message"]
    assert batch == alone + " This is about prompt 1."


# -- echo and log-probabilities ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("prompt", ["sé>", [*"sé>".encode()]], ids=["text", "ids"])
def test_echo_puts_the_prompt_before_the_answer(live, prompt, streams):
    server = live(says("hello"))
    if streams:
        text = "".join(entry["text"] for entry in stream_choices(complete_events(server, prompt, echo=True)))
    else:
        text = complete(server, prompt, echo=True)["choices"][0]["text"]
    assert text == "sé>hello"


def test_each_prompt_of_a_batch_is_echoed_before_its_own_samples(live):
    answer = complete(live(lambda context: ord("x")), ["aa", "b"], n=2, max_tokens=1, echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["aax", "aax", "bx", "bx"]


def test_log_probabilities_have_the_legacy_shape(live):
    (choice,) = complete(live(says("hi")), logprobs=2, temperature=0)["choices"]
    logprobs = choice["logprobs"]
    assert list(logprobs) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert logprobs["tokens"] == ["h", "i", "<eos>"]
    assert logprobs["text_offset"] == [0, 1, 2]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values())


def test_the_sampled_token_is_among_the_alternatives_even_if_unlikely(live):
    server = live(says("hi"))
    (choice,) = complete(server, logprobs=1, logit_bias={"122": 1000}, max_tokens=1)["choices"]
    assert choice["text"] == "z"
    assert set(choice["logprobs"]["top_logprobs"][0]) == {"h", "z"}
    (choice,) = complete(server, logprobs=0, max_tokens=2)["choices"]
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [["h"], ["i"]]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_harness_can_score_prompts_given_as_ids(live, max_tokens):
    """As lm-evaluation-harness does: the context's log-probabilities are skipped, the continuation's added up."""
    prompts = [[*b"the cat"], [*b"a"]]
    answer = complete(live(), prompts, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert all(len(values) == len(prompt) + max_tokens for values in logprobs.values())
        assert logprobs["tokens"][: len(prompt)] == [chr(token_id) for token_id in prompt]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        for token, logprob, top in list(zip(*list(logprobs.values())[:3], strict=True))[1:]:
            assert logprob <= max(top.values())
            assert top[token] == logprob < 0
        if max_tokens:
            assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())


def test_echoed_log_probabilities_are_those_of_the_same_text_generated(live):
    server = live()
    generated = complete(server, [1, 2, 3], logprobs=1, max_tokens=4, temperature=0, return_token_ids=True)["choices"][
        0
    ]
    whole = [1, 2, 3, *generated["token_ids"]]
    scored = complete(server, whole, logprobs=1, max_tokens=0, echo=True)["choices"][0]
    assert scored["logprobs"]["token_logprobs"][3:] == pytest.approx(generated["logprobs"]["token_logprobs"])
    assert scored["logprobs"]["top_logprobs"][3:] == [pytest.approx(t) for t in generated["logprobs"]["top_logprobs"]]


@pytest.mark.parametrize("prompt", ["né<eos>b>", [*"né".encode(), EOS, *b"b>"]], ids=["text", "ids"])
def test_offsets_say_where_each_token_begins_in_the_text(live, prompt):
    (choice,) = complete(live(says("aüb")), prompt, echo=True, logprobs=0)["choices"]
    logprobs, text = choice["logprobs"], choice["text"]
    half = ["bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["tokens"] == ["n", *half, "<eos>", "b", ">", "a", "bytes:\\xc3", "bytes:\\xbc", "b", "<eos>"]
    # A special token has no place in a text made of ids, and one in a text that spells it.
    special = 0 if isinstance(prompt, list) else len("<eos>")
    assert text == ("néb>aüb" if isinstance(prompt, list) else "né<eos>b>aüb")
    rest = [offset + special for offset in (2, 3, 4, 5, 5, 6, 7)]
    assert logprobs["text_offset"] == [0, 1, 1, 2, *rest]
    assert [text[offset] for offset in logprobs["text_offset"][4:-1]] == [*"b>aüüb"]


def test_streamed_log_probabilities_together_are_those_of_the_whole(live):
    server = live()
    fields = {"echo": True, "logprobs": 3, "max_tokens": 12, "seed": 3, "stop": ["e", "t"]}
    whole = complete(server, "add>", **fields)["choices"][0]
    entries = stream_choices(complete_events(server, "add>", **fields))
    for name, values in whole["logprobs"].items():
        assert [value for entry in entries for value in entry["logprobs"][name]] == [
            pytest.approx(v) if isinstance(v, (float, dict)) else v for v in values
        ]


# -- streams -----------------------------------------------------------------------------------------------------------
def test_usage_comes_last_and_only_if_asked_for(live):
    server = live(says("hi"))
    assert not any("usage" in chunk for chunk in complete_events(server))
    assert all(chunk["choices"] for chunk in complete_events(server, stream_options={"include_usage": False}))
    *chunks, last = complete_events(server, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]) == ([], usage(4, 3, cached=3))
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


def test_the_operator_may_have_usage_told_to_all_who_do_not_object(live):
    server = live(says("hi"), stream_response_default_include_usage=True)
    assert complete_events(server)[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["choices"] for chunk in complete_events(server, stream_options={"include_usage": False}))


def test_continuous_usage_is_in_every_chunk(live):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = complete_events(live(says("hi")), ["a>", "bb>"], stream_options=options)
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        assert chunk["usage"]["prompt_tokens"] == 2 + choice["index"]
        written = chunk["usage"]["prompt_tokens"]
        assert chunk["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": written}
    last = [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1] if chunk["choices"][0]["finish_reason"]]
    assert last == [3, 3]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], usage(5, 6))


@pytest.mark.parametrize(("engine", "fields"), [({}, {"stream_interval": 4}), ({"stream_interval": 4}, {})])
def test_a_stream_interval_makes_fewer_and_larger_chunks(live, engine, fields):
    server = live(lambda context: ord("x"), engine=engine)
    texts = [entry["text"] for entry in stream_choices(complete_events(server, max_tokens=10, **fields))]
    assert "".join(texts) == "x" * 10
    assert len(texts) <= 4
    assert all(len(text) >= 4 for text in texts[1:-1])


def test_no_chunk_holds_half_a_character(live):
    texts = [entry["text"] for entry in stream_choices(complete_events(live(says("aé€" * 5)), max_tokens=40))]
    assert "".join(texts) == "aé€" * 5
    assert all(texts[:-1])


BODIES = st.fixed_dictionaries(
    {"seed": st.integers(0, 9)},
    optional={
        "n": st.integers(1, 3),
        "max_tokens": st.integers(0, 24),
        "temperature": st.sampled_from([0, 0.5, 1.5]),
        "stop": st.lists(st.sampled_from(["a", "1", "é", "ab", "\x00"]), max_size=3),
        "no_stop_trim": st.booleans(),
        "echo": st.booleans(),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "stream_interval": st.integers(1, 5),
        "logprobs": st.integers(0, 3),
        "top_k": st.sampled_from([-1, 1, 5]),
        "frequency_penalty": st.floats(-2, 2),
        "prompt": st.lists(st.lists(st.integers(0, 257), min_size=1, max_size=8), min_size=1, max_size=3),
    },
)


@settings(max_examples=30, deadline=None)
@given(body=BODIES)
def test_a_stream_says_what_the_whole_answer_says(shared_server, body):
    body = {"prompt": "say>", **body}
    answer = complete(shared_server, **body)
    chunks = complete_events(shared_server, **body, stream_options={"include_usage": True})
    for choice in answer["choices"]:
        entries = stream_choices(chunks, choice["index"])
        assert "".join(entry["text"] for entry in entries) == choice["text"]
        assert entries[-1]["finish_reason"] == choice["finish_reason"]
        assert entries[-1]["matched_stop"] == choice["matched_stop"]
    for name in ("prompt_tokens", "completion_tokens"):
        assert chunks[-1]["usage"][name] == answer["usage"][name]


# -- the cache ---------------------------------------------------------------------------------------------------------
def test_cached_tokens_are_told_and_salts_keep_requests_apart(live):
    server = live(says("hi"))

    def cached(**fields) -> int:
        return complete(server, "a long prompt>", **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached() == 0
    assert cached() == 13
    assert cached(cache_salt="mine") == 0
    assert cached(extra_key="mine") == 13
    assert cached(cache_salt="mine", extra_key="mine") == 13
    assert refusal(server, PATH, {"prompt": "a", "cache_salt": "x", "extra_key": "y"})["param"] == "extra_key"


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "prompt 1"),
        ({"prompt": [[1], []]}, "prompt", "empty"),
        ({"prompt": ["a", 1]}, "prompt", "mixes"),
        ({"prompt": [1, [2]]}, "prompt", "mixes"),
        ({"prompt": [1, 258]}, "prompt", "prompt[1] is 258"),
        ({"prompt": [True]}, "prompt", "prompt[0]"),
        ({"prompt": None}, "prompt", "prompt"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens=-1"),
        ({"max_tokens": "5"}, "max_tokens", "int"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "max_tokens=4"),
        ({"min_tokens": 17}, "min_tokens", "16"),
        ({"temperature": -1}, "temperature", "temperature=-1"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "top_p=0"),
        ({"top_k": 0}, "top_k", "top_k=0"),
        ({"min_p": 2}, "min_p", "min_p=2"),
        ({"frequency_penalty": 3}, "frequency_penalty", "frequency_penalty=3"),
        ({"presence_penalty": -3}, "presence_penalty", "presence_penalty=-3"),
        ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty=0"),
        ({"n": 0}, "n", "n=0"),
        ({"n": 10_000_000}, "n", "n=10000000"),
        ({"stop": ""}, "stop", "stop has a string of 0 characters"),
        ({"stop": ["a"] * 33}, "stop", "33"),
        ({"stop_token_ids": [258]}, "stop_token_ids", "258"),
        ({"logit_bias": {"258": 1}}, "logit_bias", "258"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias"),
        ({"logprobs": 129}, "logprobs", "logprobs=129"),
        ({"logprobs": -1}, "logprobs", "logprobs=-1"),
        ({"logprobs": 10**6}, "logprobs", "128"),
        ({"best_of": 3}, "best_of", "best_of=3"),
        ({"best_of": 3, "n": 2}, "best_of", "best_of=3"),
        ({"rid": ""}, "rid", "rid"),
        ({"rid": ["a", "a"], "prompt": ["x", "y"]}, "rid", "twice"),
        ({"stream_interval": 0}, "stream_interval", "stream_interval=0"),
        ({"seed": 2**70}, "seed", "seed"),
        ({"suffix": "end"}, "suffix", "suffix is not supported by this model: its vocabulary has no tokens for"),
        ({"suffix": "end", "prompt": [1, 2]}, "suffix", "suffix needs one prompt that is a text"),
        ({"suffix": "end", "prompt": ["a", "b"]}, "suffix", "nor several"),
        ({"suffix": "end", "echo": True}, "echo", "echo and suffix exclude each other"),
        ({"tools": [{}]}, "tools", "tools is not supported"),
    ],
)
def test_what_is_wrong_is_refused_and_named(shared_server, fields, param, words):
    error = refusal(shared_server, PATH, {"prompt": "a", **fields})
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", ["a", ["a"]])
def test_a_suffix_is_put_behind_the_middle_in_the_models_own_tokens(live, prompt):
    """What the model writes to end a middle is not told."""
    server = live(says("mid\x04more", after="\x03"))
    server.service.infill = Infill(1, 2, 3, False, None, None, frozenset({1, 2, 3, 4}), frozenset())
    choice = complete(server, prompt=prompt, suffix="b", max_tokens=20, return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == [1, *b"a", 2, *b"b", 3]
    assert (choice["text"], choice["finish_reason"], choice["matched_stop"]) == ("mid", "stop", 4)
    chat = {"messages": [{"role": "user", "content": "a"}], "suffix": "b"}
    assert server.http.post("/v1/chat/completions", json=chat).status_code == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1},
        {"best_of": 2, "n": 2},
        {"suffix": None},
        {"suffix": ""},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"a_field_of_the_future": {"x": 1}},
        {"max_tokens": None, "temperature": None, "n": None, "stop": None, "logprobs": None, "stream": None},
        {"stop": [], "logit_bias": {}, "stop_token_ids": []},
        {"priority": 3, "min_p": 0.1, "top_k": -1, "repetition_penalty": 1.1, "spaces_between_special_tokens": False},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_what_changes_nothing_is_accepted(shared_server, fields):
    assert len(complete(shared_server, **fields)["choices"]) == (fields.get("n") or 1)


def test_a_server_without_a_tokenizer_points_to_the_native_route(live):
    error = refusal(live(engine={"skip_tokenizer_init": True}), PATH, {"prompt": [1, 2]})
    assert "/generate" in error["message"]


def test_the_details_of_cached_tokens_are_those_of_all_prompts(live):
    server = live(says("hello"))
    fields = {"prompt": ["0123456789>", "abcdefghij>"], "return_cached_tokens_details": True, "n": 2}
    complete(server, **fields)
    answer = complete(server, **fields)
    num_cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert num_cached == 20
    assert answer["sglext"] == {"cached_tokens_details": {"device": num_cached, "host": 0}}
    assert complete_events(server, **fields)[-1]["sglext"] == answer["sglext"]
    del fields["return_cached_tokens_details"]
    assert not any("sglext" in chunk for chunk in [complete(server, **fields), *complete_events(server, **fields)])


def test_long_prompts_are_echoed_by_another_thread(live, monkeypatch):
    server = live(says("hello"))
    tokenizer = server.service.tokenizer
    decode, names = tokenizer.decode, []

    def noting(ids, **fields):
        if len(ids) == len(prompts[0]):
            names.append(threading.current_thread().name)
        return decode(ids, **fields)

    prompts = [[*b"0123456789>"] * 9] * 50
    monkeypatch.setattr(tokenizer, "decode", noting)
    answer = complete(server, prompts, echo=True, max_tokens=1)
    assert [choice["text"][:-1] for choice in answer["choices"]] == ["0123456789>" * 9] * 50
    complete(server, prompts[0], echo=True, max_tokens=1)
    *many, one = names
    assert len(many) == 50 and one == server._thread.name and one not in many


# -- failures ----------------------------------------------------------------------------------------------------------
def fails_after(length: int) -> dict:
    return {"gives_nan": lambda context: len(context) > length and context[0] == ord("b")}


@pytest.mark.parametrize("prompt", ["bad>", ["good>", "bad>"]])
def test_a_sequence_that_fails_makes_the_answer_a_500(live, prompt):
    server = live(lambda context: ord("x"), runner=fails_after(6))
    reply = server.http.post(PATH, json={"prompt": prompt, "max_tokens": 9})
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    assert complete(server, "good>", max_tokens=3)["choices"][0]["text"] == "xxx"


def test_a_sequence_that_fails_ends_its_stream_with_an_error(live):
    seen = threading.Event()
    server = live(lambda context: ord("x"), runner={"gives_nan": lambda context: len(context) > 6 and seen.wait(20)})
    body = {"prompt": "bad>", "max_tokens": 9, "stream": True}
    with server.http.stream("POST", PATH, json=body) as reply:
        assert reply.status_code == 200
        pieces = reply.iter_text()
        first = next(pieces)
        seen.set()
        events = (first + "".join(pieces)).strip().split("\n\n")
    assert '"text":"x' in events[0]
    assert '"error"' in events[-2]
    assert events[-1] == "data: [DONE]"


def test_a_stream_that_fails_before_its_first_token_has_its_own_status(live):
    server = live(lambda context: ord("x"), runner=fails_after(0))
    assert server.http.post(PATH, json={"prompt": "bad>", "stream": True}).status_code == 500
