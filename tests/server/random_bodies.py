"""Random requests: good bodies of every route that does work, most of them spoilt in one or more places."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Rng = random.Random
Container = dict[str, Any] | list[Any]

STRINGS = (
    "", " ", "a", "hello>", "<eos>", "<mark>", "\x00", "\ud800", "\u202e\ufeff", "日本語のテキスト", "👩‍👩‍👧‍👦" * 3,
    "e\u0301" * 20, "x" * 127, "y" * 3000, "null", "true", "-1", "1e999", "../../etc/passwd", "{{ 7 * 7 }}",
    "'; drop table x; --", "data: [DONE]\n\n", "\r\nRetry-After: 1",
)  # fmt: skip
NUMBERS = (
    0, -0.0, 1, -1, 2, 7, 127, 128, 129, 255, 256, 257, 258, 10**4, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63),
    10**30, 10**400, 0.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"),
)  # fmt: skip
UNKNOWN = ("tools", "functions", "response_format", "json_schema", "image_data", "lora_path", "suffix", "x", "", "é")
"""Names of fields that no good body here has."""


def random_request(rng: Rng) -> tuple[str, bytes]:
    """A path, and a body for it as it goes over the wire."""
    path, make = rng.choice(ROUTES)
    body: Any = make(rng)
    if rng.random() < 0.65:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            _spoil(rng, body)
    if rng.random() < 0.02:
        body = _value(rng, 0)
    # What JSON does not have (NaN, a lone surrogate) is sent as it would be by a careless client.
    data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return path, _spoil_bytes(rng, data) if rng.random() < 0.04 else data


# -- good bodies -------------------------------------------------------------------------------------------------------
def _text(rng: Rng) -> str:
    return rng.choice(["hello", "a prompt that many have", "héllo wörld", f"number {rng.randrange(1000)}", "x"])


def _ids(rng: Rng) -> list[int]:
    return [rng.randrange(256) for _ in range(rng.randint(1, 12))]


def _some(rng: Rng, options: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """A few of the fields."""
    return {name: make() for name, make in options.items() if rng.random() < 0.2}


def _sampling(rng: Rng, length_name: str) -> dict[str, Any]:
    return {
        length_name: rng.choice([0, 1, 1, 2, 3, 8]) if length_name != "max_tokens" else rng.choice([1, 1, 2, 3, 8]),
        **_some(rng, {
            "temperature": lambda: rng.choice([0, 0.7, 1.0, 2.0]), "top_p": lambda: rng.choice([0.1, 0.9, 1]),
            "top_k": lambda: rng.choice([-1, 1, 5]), "min_p": lambda: rng.random(),
            "frequency_penalty": lambda: rng.uniform(-2, 2), "presence_penalty": lambda: rng.uniform(-2, 2),
            "repetition_penalty": lambda: rng.uniform(0.5, 2), "n": lambda: rng.choice([1, 2, 3]),
            "stop": lambda: rng.choice(["a", ["b", "cd"], []]), "stop_token_ids": lambda: _ids(rng),
            "ignore_eos": lambda: True, "skip_special_tokens": lambda: False, "no_stop_trim": lambda: True,
            "logit_bias": lambda: {str(rng.randrange(256)): rng.uniform(-5, 5)},
        }),
    }  # fmt: skip


def _generate(rng: Rng) -> dict[str, Any]:
    prompts: dict[str, Callable[[], Any]] = {"text": lambda: _text(rng), "input_ids": lambda: _ids(rng)}
    name = rng.choice(list(prompts))
    size = rng.choice([None, None, None, 1, 3])
    return {
        name: prompts[name]() if size is None else [prompts[name]() for _ in range(size)],
        "sampling_params": _sampling(rng, "max_new_tokens"),
        **_some(rng, {
            "stream": lambda: True, "return_logprob": lambda: True, "logprob_start_len": lambda: rng.choice([-1, 0, 2]),
            "top_logprobs_num": lambda: rng.choice([0, 1, 5]), "token_ids_logprob": lambda: [1, 2],
            "rid": lambda: f"r{rng.randrange(30)}", "return_text_in_logprobs": lambda: True, "priority": lambda: 1,
            "cache_salt": lambda: rng.choice("ab"), "return_prompt_token_ids": lambda: True,
        }),
    }  # fmt: skip


def _openai(rng: Rng) -> dict[str, Any]:
    return {
        **_sampling(rng, "max_tokens"),
        **_some(rng, {
            "stream": lambda: True, "stream_options": lambda: {"include_usage": True}, "model": lambda: "m",
            "seed": lambda: rng.randrange(2**31), "user": lambda: "me", "min_tokens": lambda: 1,
            "return_token_ids": lambda: True, "rid": lambda: f"r{rng.randrange(30)}",
        }),
    }  # fmt: skip


def _completions(rng: Rng) -> dict[str, Any]:
    prompt = rng.choice([_text(rng), _ids(rng), [_text(rng), _text(rng)], [_ids(rng), _ids(rng)]])
    extra = _some(rng, {"echo": lambda: True, "logprobs": lambda: rng.choice([0, 1, 5]), "best_of": lambda: 1})
    return {"prompt": prompt, **_openai(rng), **extra}


def _messages(rng: Rng) -> list[dict[str, Any]]:
    turns = ["user", "assistant"] * 2
    first = [{"role": "system", "content": "be"}] if rng.random() < 0.2 else []
    return first + [
        {"role": role, "content": rng.choice([_text(rng), [{"type": "text", "text": _text(rng)}]])}
        for role in turns[: rng.choice([1, 1, 3])]
    ]


def _chat(rng: Rng) -> dict[str, Any]:
    extra = _some(rng, {
        "logprobs": lambda: True, "top_logprobs": lambda: rng.choice([0, 2]), "max_completion_tokens": lambda: 4,
        "chat_template_kwargs": lambda: {"x": 1}, "continue_final_message": lambda: False, "tools": list,
    })  # fmt: skip
    return {"messages": _messages(rng), **_openai(rng), **extra}


def _anthropic(rng: Rng) -> dict[str, Any]:
    turns = [message for message in _messages(rng) if message["role"] != "system"]
    return {
        "model": "m", "messages": turns, "max_tokens": rng.choice([1, 1, 2, 8]),
        **_some(rng, {
            "system": lambda: rng.choice(["be", [{"type": "text", "text": "be"}]]), "stream": lambda: True,
            "temperature": lambda: rng.random(), "top_k": lambda: 3, "top_p": lambda: 0.5,
            "stop_sequences": lambda: ["a"], "metadata": lambda: {"user_id": "me"},
        }),
    }  # fmt: skip


def _ollama(rng: Rng, start: dict[str, Any]) -> dict[str, Any]:
    options = _some(rng, {
        "num_predict": lambda: rng.choice([-1, 0, 1, 3]), "temperature": lambda: rng.random(), "top_k": lambda: 0,
        "stop": lambda: rng.choice(["a", ["b"]]), "seed": lambda: -1, "num_ctx": lambda: 4096,
    })  # fmt: skip
    return {
        **start, "options": {"num_predict": 2, **options},
        **_some(rng, {
            "model": lambda: "m", "stream": lambda: False, "format": lambda: rng.choice(["json", {}]),
            "logprobs": lambda: True, "top_logprobs": lambda: 2, "keep_alive": lambda: rng.choice([0, "5m"]),
            "think": lambda: False,
        }),
    }  # fmt: skip


def _ollama_chat(rng: Rng) -> dict[str, Any]:
    turns = [{**message, "content": _text(rng)} for message in _messages(rng)]
    return _ollama(rng, {"messages": turns, **_some(rng, {"tools": list})})


def _ollama_generate(rng: Rng) -> dict[str, Any]:
    extra = _some(rng, {"raw": lambda: True, "system": lambda: "be", "images": list, "suffix": lambda: ""})
    return _ollama(rng, {"prompt": _text(rng), **extra})


def _responses(rng: Rng) -> dict[str, Any]:
    function = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    items = [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": _text(rng)},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": _text(rng)}]},
    ]
    return {
        "input": rng.choice([_text(rng), _messages(rng), [*_messages(rng), *items[: rng.randint(0, 3)]]]),
        "max_output_tokens": rng.choice([1, 1, 2, 8]),
        **_some(rng, {
            "stream": lambda: True, "instructions": lambda: "be", "temperature": lambda: rng.random(),
            "top_p": lambda: 0.5, "tools": lambda: [function, {"type": "web_search"}], "tool_choice": lambda: "none",
            "include": lambda: ["message.output_text.logprobs"], "top_logprobs": lambda: rng.choice([0, 2]),
            "reasoning": lambda: {"effort": "low", "summary": "auto"}, "store": lambda: False, "model": lambda: "m",
        }),
    }  # fmt: skip


def _tokenize(rng: Rng) -> dict[str, Any]:
    given = rng.choice([{"prompt": _text(rng)}, {"prompt": [_text(rng)] * 2}, {"messages": _messages(rng)}])
    return {**given, **_some(rng, {"add_special_tokens": lambda: False})}


def _detokenize(rng: Rng) -> dict[str, Any]:
    return {"tokens": rng.choice([_ids(rng), [_ids(rng)] * 2]), **_some(rng, {"skip_special_tokens": lambda: False})}


def _abort(rng: Rng) -> dict[str, Any]:
    return {"rid": rng.choice([f"r{rng.randrange(30)}", ["r1", "r2"]])}


ROUTES: tuple[tuple[str, Callable[[Rng], dict[str, Any]]], ...] = (
    ("/generate", _generate),
    ("/generate", _generate),
    ("/v1/completions", _completions),
    ("/v1/completions", _completions),
    ("/v1/chat/completions", _chat),
    ("/v1/chat/completions", _chat),
    ("/v1/messages", _anthropic),
    ("/v1/messages", _anthropic),
    ("/v1/responses", _responses),
    ("/v1/responses", _responses),
    ("/v1/messages/count_tokens", _anthropic),
    ("/api/chat", _ollama_chat),
    ("/api/generate", _ollama_generate),
    ("/tokenize", _tokenize),
    ("/detokenize", _detokenize),
    ("/abort_request", _abort),
)


# -- spoiling ----------------------------------------------------------------------------------------------------------
def _spoil(rng: Rng, body: Any) -> None:
    """Change something somewhere in `body`, as often as not to another value of the same type."""
    container = rng.choice(_containers(body))
    keys: list[Any] = list(container) if isinstance(container, dict) else list(range(len(container)))
    kind = rng.random()
    if kind < 0.8 and keys:
        key = rng.choice(keys)
        container[key] = _like(rng, container[key]) if kind < 0.45 else _value(rng, 0)
    elif kind < 0.9 and keys:
        del container[rng.choice(keys)]
    elif isinstance(container, dict):
        container[rng.choice(UNKNOWN)] = _value(rng, 0)
    else:
        container.insert(rng.randint(0, len(container)), _value(rng, 0))


def _like(rng: Rng, value: Any) -> Any:
    if isinstance(value, str):
        return rng.choice(STRINGS)
    if isinstance(value, float):
        return rng.choice([number for number in NUMBERS if isinstance(number, float)])
    if isinstance(value, int) and not isinstance(value, bool):
        return rng.choice(NUMBERS)
    return _value(rng, 0)


def _containers(value: Any) -> list[Container]:
    if not isinstance(value, (dict, list)):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(found for item in inner for found in _containers(item))]


def _value(rng: Rng, depth: int) -> Any:
    kind = rng.random()
    if kind < 0.15:
        return rng.choice([None, True, False, [], {}])
    if kind < 0.45:
        return rng.choice(NUMBERS)
    if kind < 0.75 or depth > 3:
        return rng.choice(STRINGS)
    if kind < 0.77:
        return _deep(rng)
    if kind < 0.79:
        return [rng.choice([1, "a", None])] * rng.choice([33, 200, 5000])
    if kind < 0.9:
        return [_value(rng, depth + 1) for _ in range(rng.randint(1, 3))]
    names = ("type", "text", "content", "role", "65", "include_usage", "x")
    return {rng.choice(names): _value(rng, depth + 1) for _ in range(rng.randint(1, 3))}


def _deep(rng: Rng) -> Any:
    value: Any = 1
    is_list = rng.random() < 0.5
    for _ in range(rng.choice([20, 200, 400])):
        value = [value] if is_list else {"a": value}
    return value


def _spoil_bytes(rng: Rng, data: bytes) -> bytes:
    """No JSON any more, most of the time."""
    at = rng.randrange(len(data) + 1)
    return rng.choice([
        lambda: b"", lambda: data[:at], lambda: data[:at] + bytes([rng.randrange(256)]) + data[at:],
        lambda: b"[" * 100_000, lambda: b'{"a":' * 20_000 + b"1" + b"}" * 20_000, lambda: data + data,
        lambda: b"\xff\xfe" + data, lambda: data.decode("utf-8", "replace").encode("utf-16"),
    ])()  # fmt: skip
