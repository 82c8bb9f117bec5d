"""Arguments and fields for what Mooli does not have: one list, of which each API takes the names that its clients know.

Owns the names, why each is refused, and the values that ask for nothing: what would be left aside in silence would
change the answer. Never looks at what exists here, and never words an error of HTTP.

Sources: SGLang's `Engine.generate`, /generate and sampling parameters; the API references of OpenAI and Anthropic; the
fields of servers that clients were also written for.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from mooli.errors import RequestError


class Api(enum.Flag):
    """Whose clients know a name."""

    ENGINE = enum.auto()
    """Of `Engine.generate`; a /generate body has its names too."""
    GENERATE = enum.auto()
    SAMPLING = enum.auto()
    OPENAI = enum.auto()
    ANTHROPIC = enum.auto()


_NATIVE = Api.ENGINE | Api.GENERATE

_LIST: Mapping[str, tuple[tuple[Api, str], ...]] = {
    "conversations have tools": ((Api.OPENAI, "tools tool_choice functions function_call"),),
    "tools are called by who sends the conversation": (
        (Api.OPENAI, "web_search_options"),
        (Api.ANTHROPIC, "mcp_servers container"),
    ),
    "how much to reason is said to a conversation's template": ((Api.OPENAI, "reasoning_effort reasoning"),),
    "only text is read and written": (
        (_NATIVE | Api.OPENAI, "image_data audio_data video_data"),
        (_NATIVE, "mm_hashes mm_content_hashes"),
        (Api.OPENAI, "modalities audio"),
    ),
    "a prompt is a text or token ids": (
        (Api.GENERATE | Api.OPENAI, "input_embeds"),
        (Api.OPENAI, "prompt_embeds documents"),
    ),
    "give ids to /generate, or to /v1/completions as the prompt": ((Api.OPENAI, "input_ids"),),
    "there are no adapters yet": ((_NATIVE | Api.OPENAI, "lora_path"), (Api.GENERATE, "lora_id")),
    "no code of a request's is run": (
        (_NATIVE | Api.OPENAI, "custom_logit_processor"),
        (Api.SAMPLING | Api.OPENAI, "custom_params"),
        (Api.OPENAI, "logits_processors chat_template"),
    ),
    "tokens are chosen one by one, by the sampling parameters": (
        (Api.SAMPLING | Api.OPENAI, "beam_width watermark"),
        (Api.OPENAI, "use_beam_search"),
    ),
    "use logit_bias": ((Api.OPENAI, "bad_words allowed_token_ids"),),
    "use stop, which takes texts": ((Api.SAMPLING | Api.OPENAI, "stop_regex"),),
    "the answer has no place for it": (
        (_NATIVE | Api.OPENAI, "return_hidden_states return_routed_experts"),
        (_NATIVE, "routed_experts_start_len"),
        (Api.GENERATE, "return_entropy"),
        (Api.OPENAI, "return_meta_info prompt_logprobs include_stop_str_in_output return_tokens_as_token_ids"),
    ),
    "cut the prompt before it is sent": ((Api.OPENAI, "truncate_prompt_tokens"),),
    "only what follows a prompt is made": ((Api.OPENAI, "suffix prediction"),),
    "send the whole conversation: its beginning is found in the cache": ((_NATIVE | Api.OPENAI, "session_params"),),
    "one engine computes a whole request": (
        (_NATIVE, "bootstrap_host bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank"),
        (_NATIVE, "data_parallel_rank kv_hints"),
    ),
    "nothing is traced": ((_NATIVE, "external_trace_header"),),
    "there is one speed": ((Api.ANTHROPIC, "speed"),),
}
"""Why, or what to do instead: who knows the names, and the names."""


@cache
def names_of(api: Api) -> Mapping[str, str]:
    """Name to why it is refused."""
    return {name: why for why, rows in _LIST.items() for apis, names in rows if api in apis for name in names.split()}


def asked(given: Mapping[str, Any], api: Api) -> str | None:
    """The first name of the list that `given` asks something of."""
    return next((name for name in names_of(api) if name in given and _asks(name, given[name], api)), None)


def refuse_unsupported(given: Mapping[str, Any], api: Api) -> None:
    """Raise RequestError for what is `asked`."""
    name = asked(given, api)
    if name is not None:
        raise RequestError(
            f"{name} is not supported by Mooli yet: leave it out", argument=name, advice=f"({names_of(api)[name]})"
        )


def _asks(name: str, value: Any, api: Api) -> bool:
    if value is None or _is_one_of(value, ([], {}, *_NOTHING.get(api, ()))):
        return False
    return name not in _NEUTRAL or not _NEUTRAL[name](value)


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    # The type is compared too: 0 == False, and neither stands for the other here.
    return any(type(value) is type(neutral) and value == neutral for neutral in values)


_NOTHING: Mapping[Api, tuple[Any, ...]] = {
    Api.ENGINE: ("",),
    Api.GENERATE: ("",),
    Api.SAMPLING: ("",),
    Api.OPENAI: ("", "none", False),
}
"""Values that ask for nothing, besides None and what is empty."""


def _values(*values: Any) -> Callable[[Any], bool]:
    return lambda value: _is_one_of(value, values)


_NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "return_hidden_states": _values(False),
    "return_routed_experts": _values(False),
    "return_entropy": _values(False),
    "routed_experts_start_len": _values(0),
    "beam_width": _values(1),
    "modalities": _values(["text"]),
    "custom_params": lambda value: isinstance(value, dict) and set(value) == {"thinking_budget"},
    "reasoning": _values({"enabled": False}, {"effort": "none"}),
    "tool_choice": _values("auto"),
    "speed": _values("standard"),
}
"""Values of one name that ask for nothing, or for what is done anyway."""
