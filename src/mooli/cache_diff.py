"""`mooli cache diff A.json B.json`: what of one request's prompt the cache would find in another's, and why no more.

Owns how two bodies of a chat API become prompts without a model, and what is printed. Where they differ, and what that
is called, is `mooli.frontend.cache_report`'s, as on a server.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from mooli.config import EngineConfig
from mooli.errors import ChatTemplateError, ConfigError, RequestError
from mooli.frontend.cache_report import SHOWN_TOKENS, Asked, CacheExplainer, Told
from mooli.frontend.chat_encoding import encode_chat
from mooli.frontend.generation import Generation
from mooli.frontend.text_side import open_tokenizer
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.tool_messages import read_tools
from mooli.frontend.tool_prompt import for_template
from mooli.hub.locate import locate
from mooli.types import CacheEnd, Request, RequestOutput

MAX_ITEMS = 1_000_000
"""Of a body: it is a file of whoever asks."""


def run_diff(args: argparse.Namespace) -> int:
    """Print it. Exit status 1 where something of the first prompt is lost."""
    config = EngineConfig.from_kwargs(model_path=args.model, chat_template=args.chat_template)
    tokenizer = open_tokenizer(config, locate(args.model, needs_weights=False))
    if tokenizer is None or tokenizer.chat_template is None:
        raise ChatTemplateError(f"{args.model} has no chat template: give a file with one by --chat-template")
    report = report_of(tokenizer, *(_read(Path(name)) for name in (args.first, args.second)))
    if args.json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print("\n".join(_lines(report)))
    return 1 if report["lost_tokens"] else 0


def report_of(tokenizer: Tokenizer, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The report (`docs/cache_reports.md`) of the second of two bodies behind the first, in a cache that has nothing
    else, and the tokens of both as `prompt_tokens`. Raises RequestError for what is no body of a chat API."""
    explainer = CacheExplainer(tokenizer, "")
    prompts: list[list[int]] = []
    report: dict[str, Any] = {}
    for name, body in (("A", first), ("B", second)):
        told = told_of(body)
        ids = _ids(tokenizer, told)
        previous = "A" if prompts else None
        asked = Asked(name, "", model=str(body.get("model") or ""), previous_id=previous)
        inquiry = explainer.inquire(asked, len(ids), told)
        generation = Generation(Request(rid=name, prompt_ids=np.asarray(ids, dtype=np.int32)), tokenizer)
        generation.update(RequestOutput(name, cache_end=_end(prompts[0] if prompts else [], ids)))
        report = inquiry.report(generation) or {}
        prompts.append(ids)
    return {**report, "prompt_tokens": [len(ids) for ids in prompts]}


def _end(known: list[int], ids: list[int]) -> CacheEnd:
    """Where `ids` end in a cache that has `known`."""
    pairs = enumerate(zip(known, ids, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(known), len(ids)))
    if common >= len(ids) - 1:
        return CacheEnd(None, len(ids) - 1, len(ids) - 1)
    had = tuple(known[common : common + SHOWN_TOKENS])
    return CacheEnd("diverged" if had else "new", common, common, had=had)


def _ids(tokenizer: Tokenizer, told: Told) -> list[int]:
    template = tokenizer.chat_template
    if template is None:
        raise ChatTemplateError("the model has no chat template")
    messages, functions = for_template(template, told.messages, told.tools)
    return encode_chat(tokenizer, messages, tools=functions, **told.template_arguments)


# -- bodies ------------------------------------------------------------------------------------------------------------
def told_of(body: Mapping[str, Any]) -> Told:
    """The conversation of a body of /v1/chat/completions, /v1/messages or /v1/responses. Raises RequestError."""
    if "input" in body:
        return _of_responses(body)
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise RequestError("it has neither messages nor input: it must be the body of a chat request")
    if "system" in body or any(
        isinstance(tool, Mapping) and "input_schema" in tool for tool in body.get("tools") or ()
    ):
        return _of_anthropic(body)
    arguments = dict(body.get("chat_template_kwargs") or {})
    if body.get("reasoning_effort") is not None:
        from mooli.server.openai_chat import effort_arguments

        arguments = {**effort_arguments(body["reasoning_effort"], "reasoning_effort"), **arguments}
    return Told(messages, read_tools(body.get("tools"), body.get("tool_choice")), _open_end(arguments))


def _of_anthropic(body: Mapping[str, Any]) -> Told:
    import msgspec

    from mooli.server.anthropic import CountTokensBody, conversation
    from mooli.server.service import Service

    try:
        given = msgspec.convert({"model": "", **body}, CountTokensBody)
    except msgspec.ValidationError as exc:
        raise RequestError(f"it is no body of /v1/messages: {exc}") from None
    limits = cast(Service, SimpleNamespace(config=SimpleNamespace(max_request_items=MAX_ITEMS)))
    opened = conversation(given, limits)
    return Told(opened.messages, opened.tools, _open_end(opened.template_arguments, continues=opened.continues))


def _of_responses(body: Mapping[str, Any]) -> Told:
    from mooli.server.openai_chat import effort_arguments
    from mooli.server.responses_items import read_messages
    from mooli.server.responses_items import read_tools as read_offered

    items = body["input"]
    tools = read_offered(body.get("tools") or (), items, body.get("tool_choice"), parallel=True).tools
    effort = (body.get("reasoning") or {}).get("effort")
    arguments = {} if effort is None else effort_arguments(effort, "reasoning.effort")
    return Told(read_messages(items, body.get("instructions")), tools, _open_end(arguments))


def _open_end(arguments: Mapping[str, Any], *, continues: bool = False) -> dict[str, Any]:
    return {"add_generation_prompt": not continues, **arguments, "continue_final_message": continues}


def _read(path: Path) -> Mapping[str, Any]:
    """Raises ConfigError for what cannot be read, or is no object."""
    try:
        body = json.loads(sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} cannot be read as JSON: {exc}") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{path} holds a {type(body).__name__}: it must be one request, a JSON object")
    return cast(Mapping[str, Any], body.get("body") if isinstance(body.get("body"), dict) else body)


def _lines(report: Mapping[str, Any]) -> list[str]:
    first, second = report["prompt_tokens"]
    lines = [
        f"A has {first:,} tokens and B {second:,}: {report['matched_tokens']:,} of B's come from the cache behind A",
    ]
    if not report["lost_tokens"]:
        return [*lines, "nothing is lost: B only goes on"]
    lines.append(f"{report['lost_tokens']:,} tokens lost: {report['message'] or report['reason']}")
    if report["had"] is not None:
        lines += [f"  at token {report['divergence_index']}, A: {report['had']!r}", f"  {'':9} B: {report['has']!r}"]
    return [*lines, f"advice: {report['advice']}"] if report["advice"] else lines
