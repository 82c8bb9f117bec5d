"""POST /generate: what goes in and comes out, against `Engine.generate` and SGLang's documented shapes."""

from __future__ import annotations

import json

import pytest
from fake_engine import EOS, NUM_PAGES, FakeEngine, says
from gate import Gate, wait_until
from live import LiveServer
from route_server import Connection, json_request

PROMPT_LOGPROBS = {"return_logprob": True, "logprob_start_len": 0}
GREEDY = {"temperature": 0, "max_new_tokens": 20}
FOREVER = {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True}
VOLATILE = ("id", "e2e_latency", "response_sent_to_client_ts")


def generate(server, **body):
    reply = server.http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refusal(server, **body):
    """The message of a request that must be refused with 400."""
    reply = server.http.post("/generate", json=body)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]["message"]


def events(server, **body):
    """The chunks of a stream, which must begin well and end with [DONE]."""
    reply = server.http.post("/generate", json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    *pieces, done, nothing = reply.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces]


def lasting(answer):
    """An answer without what differs each time; JSON has no tuples."""
    answers = answer if isinstance(answer, list) else [answer]
    for item in answers:
        for name in VOLATILE:
            del item["meta_info"][name]
    return json.loads(json.dumps(answer))


@pytest.fixture
def engine(monkeypatch):
    make = FakeEngine(monkeypatch)
    yield make
    for started in make.engines:
        started.shutdown()


# -- the same as the engine's ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "say>"},
        {"prompt": "say>", "sampling_params": GREEDY},
        {"prompt": ["say>"], "sampling_params": GREEDY},
        {"prompt": ["a>", "bc>", "a>"], "sampling_params": [GREEDY, {"max_new_tokens": 1}, GREEDY]},
        {"input_ids": [104, 105, 62], "sampling_params": GREEDY},
        {"input_ids": [[104, 62], [105, 106, 62]], "sampling_params": GREEDY},
        {"prompt": "say>", "sampling_params": {"n": 2, "temperature": 1.0, "max_new_tokens": 5, "ignore_eos": True}},
        {"prompt": ["a>", "b>"], "sampling_params": {"n": 2, "max_new_tokens": 3, "sampling_seed": 5}},
        {"prompt": "say>", "sampling_params": {**GREEDY, "stop": ["llo"]}},
        {"prompt": "say>", "sampling_params": {**GREEDY, "stop_token_ids": [108], "no_stop_trim": True}},
        {"prompt": "say>", "sampling_params": {**FOREVER, "logit_bias": {"65": 200.0}}},
        {"prompt": "say>", **PROMPT_LOGPROBS, "top_logprobs_num": 2, "sampling_params": GREEDY},
        {"prompt": ["a>", "b>"], "return_logprob": [True, False], "sampling_params": GREEDY},
        {"prompt": "say>", **PROMPT_LOGPROBS, "token_ids_logprob": [1, 2], "sampling_params": {"max_new_tokens": 0}},
        {"prompt": "say>", "priority": -3, "cache_salt": "s", "sampling_params": {"max_new_tokens": None}},
    ],
    ids=lambda arguments: " ".join(arguments),
)  # fmt: skip
def test_the_answer_is_the_engines(live, engine, arguments):
    """Cold and, the second time, from the cache."""
    server, reference = live(says("hello")), engine(says("hello"))
    body = {"text" if name == "prompt" else name: value for name, value in arguments.items()}
    for _ in range(2):
        assert lasting(generate(server, **body)) == lasting(reference.generate(**arguments))


def test_the_meta_info_has_sglangs_keys(live):
    meta = generate(live(says("hello")), text="say>", rid="mine", sampling_params=GREEDY)["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "stop", "matched": EOS}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (4, 6, 0)
    assert meta["e2e_latency"] > 0
    assert {"weight_version", "num_retractions", "reasoning_tokens", "cached_tokens_details"} <= set(meta)


def test_put_is_post(live):
    reply = live(says("hello")).http.put("/generate", json={"text": "say>", "sampling_params": GREEDY})
    assert reply.json()["text"] == "hello"


def test_a_request_id_of_a_batch_is_numbered(live):
    answers = generate(live(says("hello")), text=["a>", "b>"], rid="mine", sampling_params=GREEDY)
    assert [answer["meta_info"]["id"] for answer in answers] == ["mine_0", "mine_1"]


def test_prompt_ids_are_returned_on_demand(live):
    server = live(says("hello"))
    assert generate(server, text="ab>", return_prompt_token_ids=True)["prompt_token_ids"] == [97, 98, 62]
    assert "prompt_token_ids" not in generate(server, text="ab>")


def test_texts_of_tokens_are_returned_on_demand(live):
    fields = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1, "token_ids_logprob": [65]}
    meta = generate(
        live(says("h")), text="ab>", return_text_in_logprobs=True, sampling_params=GREEDY, **fields
    )["meta_info"]  # fmt: skip
    assert [entry[1:] for entry in meta["input_token_logprobs"]] == [[97, "a"], [98, "b"], [62, ">"]]
    assert [entry[2] for entry in meta["output_token_logprobs"]] == ["h", "<eos>"]
    assert [entry[0][2] for entry in meta["output_top_logprobs"]] == ["h", "<eos>"]
    assert [entry[0][2] for entry in meta["output_token_ids_logprobs"]] == ["A", "A"]
    assert meta["input_top_logprobs"][0] is None


# -- streams -----------------------------------------------------------------------------------------------------------
def test_chunks_hold_everything_so_far(live):
    whole = "añb👍c"
    chunks = events(live(says(whole)), text="say>", sampling_params=GREEDY, return_logprob=True)
    assert chunks[-1]["text"] == whole
    assert chunks[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    for chunk in chunks:
        assert whole.startswith(chunk["text"])
        assert [*whole.encode(), EOS][: len(chunk["output_ids"])] == chunk["output_ids"]
        assert len(chunk["output_ids"]) == chunk["meta_info"]["completion_tokens"]
        assert len(chunk["meta_info"]["output_token_logprobs"]) == len(chunk["output_ids"])
    assert all(chunk["meta_info"]["finish_reason"] is None for chunk in chunks[:-1])


def test_long_lists_go_out_once_in_a_stream(live):
    server = live(says("x" * 60))
    body = {
        "text": "say>", "sampling_params": {**FOREVER, "max_new_tokens": 60}, "top_logprobs_num": 50,
        "token_ids_logprob": [1, 2], "return_prompt_token_ids": True, **PROMPT_LOGPROBS,
    }  # fmt: skip
    whole = generate(server, **body)
    chunks = events(server, **body)
    for name, entries in whole["meta_info"].items():
        if name.endswith("logprobs") and name != "output_token_logprobs":
            assert sum(len(chunk["meta_info"][name]) for chunk in chunks) == len(entries), name
            assert len(chunks[-1]["meta_info"][name]) == len(entries), name
    assert len(chunks[-1]["meta_info"]["output_token_logprobs"]) == 60
    assert [chunk for chunk in chunks if "prompt_token_ids" in chunk] == chunks[-1:]
    assert chunks[-1]["prompt_token_ids"] == whole["prompt_token_ids"]


def test_a_chunk_comes_with_each_token(live):
    with Gate() as gate:
        server = live(says("hey"), runner={"raises": gate})
        body = {"text": "say>", "sampling_params": GREEDY, "stream": True}
        seen = []
        gate.let()
        with server.http.stream("POST", "/generate", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    seen.append(json.loads(line.removeprefix("data: "))["text"])
                    gate.let()
        assert seen == ["h", "he", "hey", "hey"]


def test_incremental_chunks_are_disjoint(live):
    server = live(says("añb👍c"), engine={"incremental_streaming_output": True})
    chunks = events(server, text="say>", sampling_params=GREEDY, return_logprob=True)
    assert "".join(chunk["text"] for chunk in chunks) == "añb👍c"
    assert [i for chunk in chunks for i in chunk["output_ids"]] == [*"añb👍c".encode(), EOS]
    assert sum(len(chunk["meta_info"]["output_token_logprobs"]) for chunk in chunks) == len("añb👍c".encode()) + 1


def test_chunks_of_several_sequences_have_their_index(live):
    chunks = events(live(says("hey")), text=["a>", "b>"], sampling_params={**GREEDY, "n": 2})
    last = {chunk["index"]: chunk for chunk in chunks}
    assert sorted(last) == [0, 1, 2, 3]
    assert all(chunk["text"] == "hey" and chunk["meta_info"]["finish_reason"] for chunk in last.values())
    assert sum(chunk["meta_info"]["finish_reason"] is not None for chunk in chunks) == 4
    assert "index" not in events(live(says("hey")), text="a>", sampling_params=GREEDY)[0]


def test_a_stream_that_ends_with_its_prompt_has_one_chunk(live):
    (chunk,) = events(live(), text="ab>", sampling_params={"max_new_tokens": 0})
    assert chunk["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def test_a_client_that_leaves_ends_its_requests_and_their_prefix_stays(live):
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate})
        gate.let(2)
        body = {"text": "0123456789>", "sampling_params": FOREVER, "stream": True}
        with server.http.stream("POST", "/generate", json=body) as reply:
            next(reply.iter_lines())
        wait_until(lambda: not server.service.client.num_open)
        gate.open()
        again = generate(server, text="0123456789>!", sampling_params={"max_new_tokens": 1})
        assert again["meta_info"]["cached_tokens"] == 11


def test_a_client_that_leaves_before_a_whole_answer_ends_its_requests(live):
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate})
        body = json.dumps({"text": ["a>", "b>"], "sampling_params": FOREVER}).encode()
        with Connection(server.http_server.port) as connection:
            connection.send(json_request("/generate", body))
            wait_until(lambda: server.service.client.num_open == 2)
        wait_until(lambda: not server.service.client.num_open)


# -- requests that fail ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "either text or input_ids"),
        ({"text": "a", "input_ids": [1]}, "not both"),
        ({"text": 5}, "text"),
        ({"text": ["a", None]}, "text"),
        ({"text": []}, "empty"),
        ({"text": ""}, "empty"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [[1], []]}, "prompt 1: input_ids is empty"),
        ({"input_ids": [1, "2"]}, "input_ids"),
        ({"input_ids": [1, [2]]}, "input_ids"),
        ({"input_ids": [-1]}, "input_ids[0] is -1"),
        ({"input_ids": [2**70]}, "input_ids"),
        ({"text": "a" * 500}, "context length is 128"),
        ({"input_ids": [5] * 500}, "context length is 128"),
        ({"text": "a", "sampling_params": []}, "sampling_params"),
        ({"text": "a", "sampling_params": "greedy"}, "sampling_params"),
        ({"text": "a", "sampling_params": {"temprature": 1}}, "did you mean temperature"),
        ({"text": "a", "sampling_params": {"max_tokens": 1}}, "did you mean max_new_tokens"),
        ({"text": "a", "sampling_params": {"temperature": "hot"}}, "temperature"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"text": "a", "sampling_params": {"top_p": 0}}, "top_p"),
        ({"text": "a", "sampling_params": {"n": 0}}, "n=0"),
        ({"text": "a", "sampling_params": {"n": 10**6}}, "n=1000000"),
        ({"text": "a", "sampling_params": {"stop": ["x"] * 33}}, "stop"),
        ({"text": "a", "sampling_params": {"stop_token_ids": [10**6]}}, "stop_token_ids"),
        ({"text": "a", "sampling_params": {"logit_bias": {"999": 1}}}, "logit_bias"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 1000}}, "max_new_tokens"),
        ({"text": "a", "sampling_params": {"json_schema": "{"}}, "json_schema"),
        ({"text": "a", "sampling_params": {"regex": "(a"}}, "regex"),
        ({"text": "a", "rid": ["x"]}, "rid"),
        ({"text": "a", "rid": ""}, "rid"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
        ({"text": "a", "stream": "yes"}, "stream"),
        ({"text": "a", "return_logprob": 1}, "return_logprob"),
        ({"text": "a", "top_logprobs_num": 5}, "return_logprob"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 10**6}, "top_logprobs_num"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 7}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "token_ids_logprob": [-1]}, "token_ids_logprob"),
        ({"text": ["a", "b"], "return_logprob": True, "token_ids_logprob": [[1], 2]}, "token_ids_logprob"),
        ({"text": ["a", "b"], "return_logprob": [True]}, "return_logprob"),
        ({"text": ["a", "b"], "return_logprob": True, "sampling_params": {"n": 2}, "top_logprobs_num": [1, 2]}, "n=2"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": 1}]}, "n must be the same"),
        ({"text": "a", "priority": 2**70}, "priority"),
        ({"text": "a", "priority": 1.5}, "priority"),
        ({"text": "a", "cache_salt": 7}, "cache_salt"),
        ({"text": "a", "cache_salt": "x", "extra_key": "y"}, "cache_salt and extra_key"),
        ({"text": "a", "image_data": "cat.png"}, "image_data"),
        ({"text": "a", "lora_path": "adapter"}, "lora_path"),
        ({"text": "a", "input_embeds": [[0.5]]}, "input_embeds"),
        ({"text": "a", "session_params": {"id": "x"}}, "session_params"),
        ({"text": "a", "session_id": "x" * 257}, "session_id"),
        ({"text": ["a", "b"], "session_id": "x"}, "session_id"),
        ({"text": "a", "session_id": "x", "sampling_params": {"n": 2}}, "session_id"),
        *(
            ({"text": "a", "pin": pin}, "pin")
            for pin in (
                {},
                {"ttl": "5 minutes"},
                {"ttl": "25h"},
                {"seconds": 0},
                {"seconds": True},
                {"seconds": 5, "ttl": "5m"},
                {"seconds": 5, "weight": 0},
                {"seconds": 5, "tokens": 0.5},
                {"seconds": 5, "owner": "me"},
                [{"seconds": 5}] * 9,
            )
        ),
        ({"text": "a", "return_hidden_states": True}, "return_hidden_states"),
        ({"text": "a", "custom_logit_processor": "x"}, "custom_logit_processor"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_a_wrong_request_is_refused_in_words_and_the_server_goes_on(greeter, body, words):
    for stream in ({}, {"stream": True}):
        assert words in refusal(greeter, **{**stream, **body})
    assert not greeter.service.client.num_open
    assert generate(greeter, text="say>", sampling_params=GREEDY)["text"] == "hello"


@pytest.fixture(scope="module")
def greeter():
    """One server for all that it refuses."""
    server = LiveServer(says("hello"))
    yield server
    server.stop()


@pytest.mark.parametrize(
    "body",
    [
        {"image_data": None, "lora_path": None, "return_hidden_states": False, "routed_experts_start_len": 0},
        {"image_data": [], "session_params": {}, "return_routed_experts": False, "logprob_start_len": -1},
        {"return_logprob": None, "top_logprobs_num": None, "priority": None, "rid": None, "sampling_params": None},
        {"no_such_field": {"deep": [1, 2]}, "routing_key": "x", "modalities": ["text"], "log_metrics": False},
        {"cache_salt": "x", "extra_key": "x"},
        {"cache_salt": "", "extra_key": "x"},
        {"sampling_params": {"json_schema": None, "regex": "", "beam_width": 1, "stop": None, "seed": None}},
    ],
    ids=lambda body: " ".join(body),
)
def test_fields_that_ask_for_nothing_are_left_aside(greeter, body):
    assert generate(greeter, text="say>", **body)["text"] == "hello"


def test_extra_key_is_another_name_for_cache_salt(live):
    server = live()

    def cached(**fields):
        answer = generate(server, text="0123456789>", sampling_params={"max_new_tokens": 1}, **fields)
        return answer["meta_info"]["cached_tokens"]

    assert [cached(cache_salt="a"), cached(extra_key="a"), cached(extra_key="b"), cached()] == [0, 10, 0, 0]


def test_a_salt_has_a_limit_and_none_stays_in_the_engine(live):
    server = live()
    params = {"max_new_tokens": 1}
    for name in ("cache_salt", "extra_key"):
        assert "4096" in refusal(server, text="ab>", sampling_params=params, **{name: "s" * 2**23})
    generate(server, text=["ab>"] * 16, sampling_params=params, cache_salt="s" * 4096)
    (namespace,) = server.core._scheduler._cache._tree._roots
    assert len(namespace) < 100


def test_long_stop_strings_for_many_sequences_are_refused(live):
    server = live()
    params = {"stop": ["a" * 4096] * 32, "max_new_tokens": 1}
    words = refusal(server, text=["a"] * 400, sampling_params=params)
    assert "stop has strings of 52428800 characters" in words
    assert len(generate(server, text=["a"] * 8, sampling_params=params)) == 8
    strict = live(max_stop_chars=10)
    assert "stop has strings of 12 characters" in refusal(strict, text="a", sampling_params={"n": 4, "stop": ["abc"]})
    generate(strict, text="a", sampling_params={"n": 3, "stop": ["abc"], "max_new_tokens": 1})


def test_too_many_sequences_are_refused_before_anything_is_done_for_them(live):
    server = live(max_queued_requests=8)  # and eight that run
    assert "16" in refusal(server, text=["a"] * 17)
    assert "16" in refusal(server, text=["a"] * 2, sampling_params={"n": 9})
    assert "16" in refusal(server, input_ids=[[1]] * 4096)
    assert len(generate(server, text=["a"] * 8, sampling_params={"n": 2, "max_new_tokens": 1})) == 16


def test_a_full_queue_is_503(live):
    with Gate() as gate:
        server = live(
            says("x" * 100), runner={"raises": gate}, engine={"max_running_requests": 1}, max_queued_requests=1
        )
        body = {"text": "a>", "sampling_params": FOREVER, "stream": True}
        gate.let()
        with server.http.stream("POST", "/generate", json={**body, "text": ["a>", "b>"]}) as reply:
            lines = reply.iter_lines()  # to drop it would be to leave
            next(lines)
            full = server.http.post("/generate", json=body)
            assert (full.status_code, full.headers["retry-after"]) == (503, "1")
            assert full.json()["error"]["retryable"] is True


def test_an_id_in_use_is_refused_and_free_again_afterwards(live):
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate})
        gate.let()
        body = {"text": "a>", "rid": "mine", "sampling_params": FOREVER, "stream": True}
        with server.http.stream("POST", "/generate", json=body) as reply:
            lines = reply.iter_lines()  # to drop it would be to leave
            next(lines)
            assert "'mine'" in refusal(server, text="b", rid="mine")
        gate.open()
        wait_until(lambda: not server.service.client.num_open)
        assert generate(server, text="a>", rid="mine", sampling_params={"max_new_tokens": 1})["text"] == "x"


def fails_on(text):
    def raises(batch):
        return ValueError("planted") if ord(text) in batch.token_ids.tolist() else None

    return raises


def test_a_request_whose_step_fails_is_an_error_and_the_server_goes_on(live):
    server = live(says("hello"), runner={"raises": fails_on("!")})
    reply = server.http.post("/generate", json={"text": "!>"})
    assert reply.status_code == 500
    assert "planted" in reply.json()["error"]["message"]
    (chunk,) = events(server, text="!>")
    assert chunk["meta_info"]["finish_reason"]["type"] == "error"
    assert generate(server, text="say>", sampling_params=GREEDY)["text"] == "hello"


def test_in_a_batch_a_failed_request_says_so_itself(live):
    def nan(context):
        return 33 in context

    answers = generate(live(says("hello"), runner={"gives_nan": nan}), text=["a>", "!>", "b>"], sampling_params=GREEDY)
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["stop", "error", "stop"]
    assert "NaN" in answers[1]["meta_info"]["finish_reason"]["message"]
    assert answers[2]["text"] == "hello"


def test_when_the_engine_dies_open_requests_are_told_the_cause(live):
    body = {"text": "a>", "sampling_params": FOREVER, "stream": True}
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate})
        gate.let()
        with server.http.stream("POST", "/generate", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.engine_process.kill()
            gate.open()
            rest = [line for line in lines if line]
        assert "engine process" in json.loads(rest[-2].removeprefix("data: "))["error"]["message"]
        assert rest[-1] == "data: [DONE]"


# -- without a tokenizer -----------------------------------------------------------------------------------------------
def test_without_a_tokenizer_ids_go_in_and_out(live):
    server = live(says("hi"), engine={"skip_tokenizer_init": True})
    answer = generate(server, input_ids=[97, 62], sampling_params=GREEDY)
    assert answer["output_ids"] == [104, 105, EOS]
    assert "text" not in answer
    assert "input_ids" in refusal(server, text="a")
    assert "tokenizer" in refusal(server, input_ids=[1], return_logprob=True, return_text_in_logprobs=True)


def test_nothing_is_left_behind(live):
    server = live(says("hello"), runner={"raises": fails_on("!")})
    for body in ({"text": "a>"}, {"text": ["a>", "!>"]}, {"text": "b>", "stream": True}, {"text": "!"}):
        server.http.post("/generate", json={"sampling_params": {"n": 2, "max_new_tokens": 4}, **body})
    stats = server.core.stats()
    assert (stats["running"], stats["waiting"], stats["used_pages"]) == (0, 0, 0)
    assert stats["free_pages"] + stats["tree_pages"] == NUM_PAGES
    server.core.check()
