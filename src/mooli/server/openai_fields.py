"""OpenAI's request fields in the native names, and which of them cannot be served.

Owns the lists of names, and the refusal of what would change the answer if it were left aside. Never starts a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.unsupported import Api, asked, names_of
from mooli.server.openai_types import GenerationBody
from mooli.server.routing import HttpError
from mooli.server.service import Service

COMMON_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
"""What both routes call arguments of the native side."""

UNSUPPORTED = frozenset(names_of(Api.OPENAI))

_SAMPLING_NAMES = {
    "min_tokens": "min_new_tokens",
    **{
        name: name
        for name in (
            "n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
            "repetition_penalty", "stop", "stop_token_ids", "no_stop_trim", "ignore_eos", "skip_special_tokens",
            "spaces_between_special_tokens", "stream_interval", "seed", "logit_bias",
        )
    },
}  # fmt: skip


def refuse_unsupported(given: Mapping[str, Any]) -> None:
    """Raise HttpError (400) naming the first field that asks for what is not served.

    All other names are left aside, as OpenAI's clients expect of newer fields. Some are known to mean nothing here:
    user, metadata, store, service_tier, prompt_cache_key, prompt_cache_retention, safety_identifier,
    parallel_tool_calls, verbosity, separate_reasoning, stream_reasoning.
    """
    name = asked(given, Api.OPENAI)
    if name is not None:
        raise HttpError(400, f"{name} is not supported by this server: leave it out", param=name)


def require_tokenizer(service: Service) -> Tokenizer:
    """Raises HttpError (400) where there is none."""
    if service.tokenizer is None:
        raise HttpError(400, "this server has no tokenizer: use /generate with input_ids")
    return service.tokenizer


def require_chat_template(service: Service) -> None:
    """Raises HttpError (400) where a conversation cannot be written down."""
    if require_tokenizer(service).chat_template is None:
        raise HttpError(400, "this model has no chat template: use /v1/completions or /generate", param="messages")


def sampling_params(body: GenerationBody) -> dict[str, Any]:
    """The fields that are given, under their native names. The length of the answer is not among them: its default
    belongs to the route."""
    given = {native: getattr(body, name) for name, native in _SAMPLING_NAMES.items()}
    return {native: value for native, value in given.items() if value is not None}


def cache_salt(body: GenerationBody) -> str | None:
    """What separates this request's cache from others'. SGLang's `extra_key` is another name for it.

    Raises HttpError (400) if both are given and differ.
    """
    if body.extra_key and body.cache_salt and body.extra_key != body.cache_salt:
        raise HttpError(400, "extra_key and cache_salt mean the same here and differ: give one", param="extra_key")
    return body.cache_salt or body.extra_key
