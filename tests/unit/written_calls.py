"""How models write calls whose arguments are raw text between tags, JSON behind a name, or Gemma's: a writer for each,
which knows none of the parsers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Calls = Sequence[tuple[str, Mapping[str, Any]]]


def _raw(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _type(value: Any) -> str:
    names = {str: "string", bool: "boolean", list: "array", dict: "object", type(None): "null"}
    return names.get(type(value), "number")


def _pairs(arguments: Mapping[str, Any], pair: str) -> str:
    return "".join(
        pair.replace("{key}", key)
        .replace("{value}", _raw(value))
        .replace("{says}", str(isinstance(value, str)).lower())
        .replace("{type}", _type(value))
        for key, value in arguments.items()
    )


def tagged(head: str, pair: str, tail: str, between: str = "\n", section: tuple[str, str] = ("", "")) -> Callable:
    def write(calls: Calls) -> str:
        told = [
            head.replace("{name}", name).replace("{N}", str(i)) + _pairs(arguments, pair) + tail
            for i, (name, arguments) in enumerate(calls, 1)
        ]
        return section[0] + between.join(told) + section[1]

    return write


def in_json(call: str, between: str = "\n", section: tuple[str, str] = ("", "")) -> Callable:
    def write(calls: Calls) -> str:
        told = [
            call.replace("{name}", name)
            .replace("{N}", str(i))
            .replace("{json}", json.dumps(arguments, ensure_ascii=False))
            for i, (name, arguments) in enumerate(calls, 3)
        ]
        return section[0] + between.join(told) + section[1]

    return write


def gemma(opening: str, closing: str, mark: str) -> Callable:
    def value(item: Any) -> str:
        if isinstance(item, str):
            return mark + item + mark
        if isinstance(item, list):
            return f"[{','.join(map(value, item))}]"
        if isinstance(item, dict):
            return "{" + ",".join(f"{key}:{value(each)}" for key, each in item.items()) + "}"
        return json.dumps(item)

    return lambda calls: "".join(f"{opening}call:{name}{value(arguments)}{closing}" for name, arguments in calls)


def nested(calls: Calls) -> str:
    mark = "]<]minimax[>["

    def value(item: Any) -> str:
        pairs = [("item", each) for each in item] if isinstance(item, list) else item
        if isinstance(pairs, dict):
            pairs = [*item.items()]
        if not isinstance(pairs, list):
            return _raw(item)
        return "".join(f"{mark}<{key}>{value(each)}{mark}</{key}>" for key, each in pairs)

    told = [f'{mark}<invoke name="{name}">{value(arguments)}{mark}</invoke>\n' for name, arguments in calls]
    return f"{mark}<tool_call>\n{''.join(told)}{mark}</tool_call>"


QWEN = tagged(
    "<tool_call>\n<function={name}>\n", "<parameter={key}>\n{value}\n</parameter>\n", "</function>\n</tool_call>"
)
GLM = ("<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n", "</tool_call>")


GLM45 = tagged("<tool_call>{name}\n", *GLM)


def invoke(block: str) -> Callable:
    return tagged(
        '<invoke name="{name}">\n',
        '<parameter name="{key}">{value}</parameter>\n',
        "</invoke>",
        section=(f"<{block}>\n", f"\n</{block}>"),
    )


def dsml(block: str, mark: str) -> Callable:
    return tagged(
        f'<{mark}invoke name="{{name}}">\n',
        f'<{mark}parameter name="{{key}}" string="{{says}}">{{value}}</{mark}parameter>\n',
        f"</{mark}invoke>",
        section=(f"<{mark}{block}>\n", f"\n</{mark}{block}>"),
    )


WRITTEN: Mapping[str, Callable[[Calls], str]] = {
    "qwen3_coder": QWEN,
    "step3p5": QWEN,
    "mimo": tagged(
        "<tool_call>\n<function={name}>\n", "<parameter={key}>{value}</parameter>\n", "</function>\n</tool_call>"
    ),
    "minimax-m2": invoke("minimax:tool_call"),
    "minimax-m3": nested,
    "dots": invoke("dots_function_call"),
    "glm": GLM45,
    "glm45": GLM45,
    "ling3": GLM45,
    "poolside_v1": GLM45,
    "spark25": tagged("<tool_call>{name}\n", GLM[0].replace("key>\n", "key>"), GLM[1]),
    "iquest_q1": tagged(
        "<iquest_tool_call>{name}",
        "<arg_key>{key}</arg_key><arg_value>{value}</arg_value>",
        "</iquest_tool_call>",
        between="",
    ),
    "glm47": tagged(
        "<tool_call>{name}", "<arg_key>{key}</arg_key><arg_value>{value}</arg_value>", "</tool_call>", between=""
    ),
    "hunyuan": tagged("<tool_call>{name}<tool_sep>\n", *GLM, section=("<tool_calls>\n", "\n</tool_calls>")),
    "hunyuan_a13b": in_json('{"name": "{name}", "arguments": {json}}', ", ", ("<tool_calls>[", "]</tool_calls>")),
    "deepseekv32": dsml("function_calls", "｜DSML｜"),
    "deepseekv4": dsml("tool_calls", "｜DSML｜"),
    "deepseekv41": dsml("calls", "｜DSML｜ "),
    "gigachat35": dsml("tool_calls", "｜GCML｜"),
    "step3": tagged(
        '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{name}">\n',
        '<steptml:parameter name="{key}">{value}</steptml:parameter>\n',
        "</steptml:invoke><｜tool_call_end｜>",
        section=("<｜tool_calls_begin｜>\n", "\n<｜tool_calls_end｜>"),
    ),
    "kimi_k3": tagged(
        '<|open|>call tool="{name}" index="{N}"<|sep|>',
        '<|open|>argument key="{key}" type="{type}"<|sep|>{value}<|close|>argument<|sep|>',
        "<|close|>call<|sep|>",
        between="",
        section=("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
    ),
    "deepseekv3": in_json(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json}\n```<｜tool▁call▁end｜>",
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    "deepseekv31": in_json(
        "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json}<｜tool▁call▁end｜>",
        "",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    "kimi_k2": in_json(
        "<|tool_call_begin|>functions.{name}:{N}<|tool_call_argument_begin|>{json}<|tool_call_end|>",
        "",
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    "gemma4": gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
    "functiongemma": gemma("<start_function_call>", "<end_function_call>", "<escape>"),
}
