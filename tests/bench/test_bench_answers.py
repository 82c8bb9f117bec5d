"""Reading answers piece by piece, and writing requests, in each API."""

from __future__ import annotations

from typing import Any

import pytest

from mooli.bench.apis import (
    BACKENDS,
    DONE,
    AnswerError,
    Api,
    EventStream,
    NativeAnswer,
    OpenAIAnswer,
    RequestOptions,
    error_message,
    request_body,
)
from mooli.bench.errors import BenchmarkError
from mooli.bench.records import BenchRequest, RequestRecord

REQUEST = BenchRequest(prompt="hi", prompt_len=2, output_len=7)


def body(
    backend: str, *, prompt: Any = "hi", salt: str | None = None, request: BenchRequest = REQUEST, **given: Any
) -> Any:
    options = RequestOptions(**given)
    return request_body(BACKENDS[backend], request, options, model="m", prompt=prompt, output_len=7, salt=salt)


def test_the_native_body_is_sglangs() -> None:
    assert body("sglang") == {
        "text": "hi",
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 7, "ignore_eos": True},
        "stream": True,
        "return_logprob": False,
        "logprob_start_len": -1,
    }
    assert body("sglang", prompt=[1, 2])["input_ids"] == [1, 2]


def test_the_completions_body_asks_for_the_servers_count_of_tokens() -> None:
    assert body("vllm", temperature=0.5, ignore_eos=False) == {
        "model": "m",
        "prompt": "hi",
        "best_of": 1,
        "max_tokens": 7,
        "ignore_eos": False,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_text_is_a_chat_of_one_message() -> None:
    assert body("sglang-oai-chat")["messages"] == [{"role": "user", "content": "hi"}]
    chat = [{"role": "system", "content": "s"}]
    assert body("lmdeploy-chat", prompt=chat)["messages"] == chat


@pytest.mark.parametrize(("backend", "prompt"), [("sglang", [{"role": "user"}]), ("vllm", [{}]), ("vllm-chat", [1, 2])])
def test_a_prompt_that_an_api_cannot_carry_is_refused(backend: str, prompt: Any) -> None:
    with pytest.raises(BenchmarkError, match="cannot go to"):
        body(backend, prompt=prompt)


def test_extra_keys_go_over_the_body_and_into_the_sampling_parameters() -> None:
    request = BenchRequest(prompt="hi", prompt_len=1, output_len=1, extra_body={"priority": 5})
    written = body("sglang", request=request, extra_body={"priority": 1, "sampling_params": {"top_k": 3}})
    assert written["priority"] == 5
    assert written["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 7, "ignore_eos": True, "top_k": 3}
    assert "sampling_params" not in body("vllm", extra_body={"top_k": 3})


def test_a_salt_goes_under_the_names_the_servers_know() -> None:
    assert body("vllm", salt="s")["cache_salt"] == "s"
    native = body("sglang", salt="s")
    assert (native["cache_salt"], native["extra_key"]) == ("s", "s")


def native_piece(text: str, count: int, finish: Any = None) -> dict[str, Any]:
    return {"text": text, "meta_info": {"completion_tokens": count, "prompt_tokens": 4, "finish_reason": finish}}


def test_native_gaps_are_shared_out_over_the_tokens_a_piece_brought() -> None:
    record = RequestRecord(start_s=10.0)
    answer = NativeAnswer(record)
    answer.piece(native_piece("", 1), 10.5)  # half a character: nothing to see yet
    answer.piece(native_piece("a", 2), 11.0)
    answer.piece(native_piece("abcd", 5), 11.6)
    answer.piece(native_piece("abcd", 5, {"type": "length"}), 11.7)
    answer.done(11.8)
    answer.close()
    assert (record.ttft_s, record.latency_s) == pytest.approx((1.0, 1.8))
    assert record.itl_s == pytest.approx([0.2, 0.2, 0.2])
    assert (record.generated_text, record.output_len, record.success) == ("abcd", 5, True)


def test_openai_gaps_are_those_of_pieces_with_text() -> None:
    record = RequestRecord(start_s=0.0)
    answer = OpenAIAnswer(record)
    answer.piece({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, 0.5)
    answer.piece({"choices": [{"delta": {"reasoning_content": "Hm", "reasoning": "Hm"}}]}, 1.0)
    answer.piece({"choices": [{"delta": {"content": "Yes"}}]}, 1.5)
    call = {"function": {"name": "f", "arguments": '{"a":1}'}}
    answer.piece({"choices": [{"delta": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}]}, 1.75)
    usage = {"completion_tokens": 9, "prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    answer.piece({"choices": [], "usage": usage, "sglext": {"cached_tokens_details": {"device": 2}}}, 1.8)
    answer.done(2.0)
    answer.close()
    assert (record.ttft_s, record.latency_s) == (1.0, 2.0)
    assert record.itl_s == [0.5, 0.25]
    assert record.generated_text == 'HmYesf{"a":1}'
    assert (record.output_len, record.server_prompt_tokens, record.cached_tokens) == (9, 3, 2)
    assert record.cached_tokens_details == {"device": 2}


def test_an_answer_without_a_text_has_its_latency_as_ttft() -> None:
    record = RequestRecord(start_s=0.0)
    answer = NativeAnswer(record)
    answer.piece(native_piece("", 1, {"type": "length"}), 0.25)
    answer.done(0.5)
    answer.close()
    assert (record.success, record.ttft_s, record.itl_s) == (True, 0.5, [])


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        ({"error": {"message": "out of memory", "code": 500}}, "out of memory"),
        ({"object": "error", "message": "no"}, "no"),
        (native_piece("a", 1, {"type": "abort", "message": "shutting down"}), "abort: shutting down"),
        ([1], "where an object belongs"),
    ],
)
def test_an_error_inside_an_answer_is_a_failure(piece: Any, words: str) -> None:
    with pytest.raises(AnswerError, match=words):
        NativeAnswer(RequestRecord()).piece(piece, 1.0)


def test_an_answer_that_breaks_off_is_a_failure() -> None:
    answer = OpenAIAnswer(RequestRecord())
    with pytest.raises(AnswerError, match="empty"):
        answer.close()
    answer.piece({"choices": [{"text": "a"}]}, 1.0)
    with pytest.raises(AnswerError, match="broke off after 1 pieces"):
        answer.close()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"error": {"message": "a\n b"}}, "a b"),
        ({"error": "a"}, "a"),
        ({"detail": [{"msg": "x"}]}, "[{'msg': 'x'}]"),
        ("plain", "plain"),
    ],
)
def test_the_words_of_an_error_are_found_in_every_usual_shape(data: Any, words: str) -> None:
    assert error_message(data) == words


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_events_are_whole_however_the_bytes_arrive(size: int) -> None:
    stream = EventStream()
    sent = b': comment\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:{"b":2}\n\ndata: [DONE]\n\ndata: rest'
    got = [payload for at in range(0, len(sent), size) for payload in stream.feed(sent[at : at + size])]
    assert got == [b'{"a": 1}', b'{"b":2}', DONE]
    assert stream.close() == [b"rest"]


def test_every_backend_has_its_path_and_port() -> None:
    assert {name: (backend.api, backend.default_port) for name, backend in BACKENDS.items()} == {
        "sglang": (Api.NATIVE, 30000),
        "sglang-native": (Api.NATIVE, 30000),
        "sglang-oai": (Api.COMPLETIONS, 30000),
        "sglang-oai-chat": (Api.CHAT, 30000),
        "vllm": (Api.COMPLETIONS, 8000),
        "vllm-chat": (Api.CHAT, 8000),
        "lmdeploy": (Api.COMPLETIONS, 23333),
        "lmdeploy-chat": (Api.CHAT, 23333),
    }
