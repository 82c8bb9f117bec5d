"""Which wire format a model has: its reasoning and its calls, put together.

Owns SGLang's names for formats of calls, the rules by which one is found when none is named, and the order of the two
parsers: reasoning is read first, and what it calls text is read for calls. Knows no format's inside.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mooli.config import RESPONSE_TEMPLATE, EngineConfig
from mooli.errors import ConfigError, TokenizerError
from mooli.frontend.parts import PLAIN_TEXT, Parser, WireFormat
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.tools import ToolSet
from mooli.frontend.wire_formats.calls import CallFormat
from mooli.frontend.wire_formats.gemma import GEMMA_FORMATS
from mooli.frontend.wire_formats.harmony import Harmony, HarmonyCalls
from mooli.frontend.wire_formats.headed_json import HEADED_FORMATS, Hunyuan
from mooli.frontend.wire_formats.hermes import Hermes
from mooli.frontend.wire_formats.json_block import JsonBlock
from mooli.frontend.wire_formats.json_list import JsonList
from mooli.frontend.wire_formats.llama3 import Llama3
from mooli.frontend.wire_formats.minimax_m3 import MinimaxM3
from mooli.frontend.wire_formats.mistral import Mistral
from mooli.frontend.wire_formats.pythonic import Pythonic
from mooli.frontend.wire_formats.reasoning import (
    PANGU,
    REASONING_FORMATS,
    TOLD_BY_MARKERS,
    KimiK3,
    PassedOn,
    ReasoningPair,
)
from mooli.frontend.wire_formats.response_template import (
    ResponseTemplate,
    TemplateCalls,
    TemplateFormat,
    read_response_template,
)
from mooli.frontend.wire_formats.tagged_calls import TAGGED_FORMATS
from mooli.types import Reasoning

logger = logging.getLogger(__name__)

_FORMATS: tuple[CallFormat, ...] = (
    HarmonyCalls(),
    Hermes("hermes"),
    Hermes("qwen"),
    Hermes("qwen25"),
    Hermes("trinity", ignored=("<think>", "</think>")),
    JsonBlock("granite", ("<|tool_call|>", "<tool_call>")),
    JsonBlock("openpangu", ("<|tool_call_start|>",), "<|tool_call_end|>"),
    JsonBlock("pangu", ("[unused11]",), "[unused12]"),
    JsonList(),
    Llama3(),
    MinimaxM3(),
    Mistral(),
    Pythonic("lfm2", "<|tool_call_start|>", "<|tool_call_end|>"),
    Pythonic("pythonic", "<|python_start|>", "<|python_end|>", is_bare=True),
)

CALL_FORMATS: Mapping[str, CallFormat] = {
    **{call_format.name: call_format for call_format in _FORMATS},
    **TAGGED_FORMATS,
    **HEADED_FORMATS,
    **GEMMA_FORMATS,
}
"""By the names that `tool_call_parser` takes."""

_SUFFIXED = re.compile(r"<tool_calls(:[^<>\s]+)>")

_ENDED_BY_CALLS = ("qwen3", "glm45", "kimi_k2")
"""Formats whose models begin calls in their reasoning, without closing it. Of SGLang's parsers these three end it."""

_WRITTEN_IN_REASONING = ("trinity",)
"""Formats of calls that models write there, whatever their reasoning is called."""


@dataclass(frozen=True, slots=True)
class MessageFormat:
    """Reasoning, then text with calls.

    calls: how they are written. fallback: how those are that are forced, of a model without a format of its own, or
    whose format can only be read. tools: of the conversation; without any, no calls are looked for.
    """

    without_calls: WireFormat
    calls: CallFormat | None
    fallback: CallFormat | None = None
    tools: ToolSet | None = None

    @property
    def name(self) -> str | None:
        return self.without_calls.name

    @property
    def prompt_tail_tokens(self) -> int:
        return self.without_calls.prompt_tail_tokens

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        calls = () if self.calls is None or self.tools is None else self.calls.marker_tokens
        return (*self.without_calls.marker_tokens, *calls)

    @property
    def continued(self) -> MessageFormat:
        return replace(self, without_calls=self.without_calls.continued)

    @property
    def without_reasoning(self) -> MessageFormat:
        return replace(self, without_calls=PLAIN_TEXT)

    def with_tools(self, tools: ToolSet) -> MessageFormat:
        if not tools.tools or tools.choice == "none":
            return replace(self, tools=None)
        forced = self.fallback if tools.choice == "required" else None
        own = None if forced is not None and isinstance(self.calls, TemplateCalls) else self.calls
        return replace(self, tools=tools, calls=own or forced)

    def reasoning_ahead(self, prompt_tail: str) -> Reasoning | None:
        found = self.without_calls.reasoning_ahead(prompt_tail)
        return None if found is None else replace(found, calls_end_it=self._do_calls_end_reasoning)

    @property
    def _do_calls_end_reasoning(self) -> bool:
        reasoning = self.without_calls
        if self.calls is None or isinstance(reasoning, Harmony):
            return True
        return reasoning.name in _ENDED_BY_CALLS or self.calls.name in _WRITTEN_IN_REASONING

    def parser(self, prompt_tail: str) -> Parser:
        reasoning = self.without_calls
        if self.calls is None or self.tools is None:
            return reasoning.parser(prompt_tail)
        if isinstance(reasoning, ReasoningPair) and self._do_calls_end_reasoning:
            markers = tuple(text for text in self.calls.triggers() if text in self.calls.marker_tokens)
            reasoning = replace(reasoning, ended_by=markers)
        elif isinstance(reasoning, Harmony):
            reasoning = replace(reasoning, passes_calls=isinstance(self.calls, HarmonyCalls))
        elif isinstance(reasoning, TemplateFormat):
            if isinstance(self.calls, TemplateCalls):
                return reasoning.with_tools(self.tools).parser(prompt_tail)
            reasoning = replace(reasoning, keeps_rest=True)
        calls = self.calls.parser(self.tools)
        return calls if reasoning is PLAIN_TEXT else PassedOn(reasoning.parser(prompt_tail), calls)


# -- which one a model has ---------------------------------------------------------------------------------------------
def open_wire_format(config: EngineConfig, tokenizer: Tokenizer | None) -> WireFormat:
    """The one that `config.reasoning_parser` and `config.tool_call_parser` name; for "auto" the model's own
    `response_template`, or else the one whose markers its chat template has, or its vocabulary. `PLAIN_TEXT` without a
    tokenizer.

    Raises ConfigError where `response_template` is named and the model has none, TokenizerError where it cannot be
    read.
    """
    if tokenizer is None:
        return PLAIN_TEXT
    fallback = None if config.tool_call_parser == "none" else JsonList()
    template = _response_template(config, tokenizer)
    reasoning: WireFormat | None = None
    calls: CallFormat | None = None
    if template is not None:
        markers = tuple(sorted(text for text in tokenizer.special_texts if any(text in one for one in template.texts)))
        if config.reasoning_parser in ("auto", RESPONSE_TEMPLATE):
            reasoning = TemplateFormat(template, markers)
        # A chat template that cannot tell of tools has them told of in another format.
        is_told = template.has_calls and (tokenizer.chat_template is None or tokenizer.chat_template.has_tools)
        if config.tool_call_parser == RESPONSE_TEMPLATE or (config.tool_call_parser == "auto" and is_told):
            calls = TemplateCalls(template, markers)
    return MessageFormat(
        reasoning or _reasoning_of(config.reasoning_parser, tokenizer),
        calls or _calls_of(config.tool_call_parser, tokenizer),
        fallback,
    )


def _response_template(config: EngineConfig, tokenizer: Tokenizer) -> ResponseTemplate | None:
    """The one that is to be read. One that nobody names and that cannot be read is told of in the log."""
    names = {"reasoning_parser": config.reasoning_parser, "tool_call_parser": config.tool_call_parser}
    named = [argument for argument, name in names.items() if name == RESPONSE_TEMPLATE]
    if tokenizer.response_template is None:
        if named:
            raise ConfigError(
                f"{named[0]}={RESPONSE_TEMPLATE!r} is not possible: the model's tokenizer_config.json has none; leave"
                " it out, or name a format"
            )
        return None
    if not named and "auto" not in names.values():
        return None
    try:
        return read_response_template(tokenizer.response_template)
    except TokenizerError as exc:
        if named:
            raise TokenizerError(f"{named[0]}={RESPONSE_TEMPLATE!r} is not possible: {exc}") from exc
        logger.warning(
            "the model's response_template is left aside, and its chat template says how messages are read: %s", exc
        )
        return None


def _reasoning_of(name: str, tokenizer: Tokenizer) -> WireFormat:
    if name == "none":
        return PLAIN_TEXT
    hunyuan, suffix = REASONING_FORMATS["hunyuan"], _suffix_of(tokenizer)
    if suffix and name in ("auto", "hunyuan") and isinstance(hunyuan, ReasoningPair):
        opening, closing = (f"{mark.removesuffix('>')}{suffix}>" for mark in (hunyuan.opening, hunyuan.closing))
        return replace(hunyuan, opening=opening, closing=closing)
    if name != "auto":
        return REASONING_FORMATS[name]
    template = "" if tokenizer.chat_template is None else tokenizer.chat_template.source
    if "[unused9]" in template:  # openPangu's turns; the markers are names that other vocabularies have as well
        return PANGU
    for has in (template.__contains__, tokenizer.has_added_token):
        for wire_format in TOLD_BY_MARKERS:
            if all(map(has, _markers_of(wire_format))):
                return wire_format
    return PLAIN_TEXT


def _suffix_of(tokenizer: Tokenizer) -> str:
    """What all of Hunyuan's markers end with in this model's vocabulary: ":opensource", say; mostly nothing."""
    found = (_SUFFIXED.fullmatch(text) for text in tokenizer.added_texts)
    return next((match[1] for match in found if match), "")


def _markers_of(wire_format: Harmony | ReasoningPair) -> tuple[str, ...]:
    """Those by which it is told from the others."""
    if isinstance(wire_format, Harmony):
        return ("<|channel|>",)
    return wire_format.marker_tokens if isinstance(wire_format, KimiK3) else wire_format.marker_tokens[-1:]


_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gemma4", ("<|channel>",)),
    ("gpt-oss", ("<|channel|>",)),
    ("kimi_k3", ("<|open|>", "<|close|>", "<|sep|>")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minimax-m3", ("]<]minimax[>[",)),
    ("minimax-m2", ("<minimax:tool_call>",)),
    ("deepseekv41", ("<\uff5cDSML\uff5c calls>",)),
    ("deepseekv4", ("<\uff5cDSML\uff5ctool_calls>",)),
    ("deepseekv32", ("<\uff5cDSML\uff5cfunction_calls>",)),
    ("deepseekv3", ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "```json")),
    ("deepseekv31", ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581sep\uff5c>")),
    ("openpangu", ("[unused9]", "<|tool_call_start|>")),
    ("pangu", ("[unused9]", "[unused11]")),
    ("lfm2", ("<|tool_call_start|>",)),
    ("gigachat35", ("<\uff5cGCML\uff5ctool_calls>",)),
    ("glm47", ("[gMASK]<sop>", "</arg_key><arg_value>")),
    ("glm47", ("[gMASK]<sop>", "'<tool_call>' + ")),
    ("glm45", ("[gMASK]<sop>",)),
    ("hunyuan", ("<tool_calls>", "<tool_sep>")),
    ("hunyuan_a13b", ("<tool_calls>",)),
    ("step3", ("<steptml:invoke",)),
    ("dots", ("<dots_function_call>",)),
    ("iquest_q1", ("<iquest_tool_call>",)),
    ("functiongemma", ("<start_function_call>",)),
    ("glm45", ("<arg_key>", "<arg_value>")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("pythonic", ("<|python_start|>",)),
    ("llama3", ("<|python_tag|>",)),
    ("granite", ("<|tool_call|>",)),
    ("qwen", ("<tool_call>",)),
)
"""Names, and what a model's template has that writes so, or else its vocabulary, where families keep older markers. The
first of which all is there is the one."""


def _tells_of_tools(tokenizer: Tokenizer) -> bool:
    return tokenizer.chat_template is None or tokenizer.chat_template.has_tools


def _calls_of(name: str, tokenizer: Tokenizer) -> CallFormat | None:
    if name == "none":
        return None
    suffix = _suffix_of(tokenizer)
    form = CALL_FORMATS["hunyuan" if name == "auto" else name]
    if suffix and isinstance(form, Hunyuan) and (name != "auto" or _tells_of_tools(tokenizer)):
        return form.with_suffix(suffix)
    if name != "auto":
        return form
    template = "" if tokenizer.chat_template is None else tokenizer.chat_template.source_with_tools
    if not _tells_of_tools(tokenizer):
        return CALL_FORMATS["hermes"]  # so its conversations are told of tools: `mooli.frontend.tool_prompt`
    in_template = template.__contains__
    for has in (in_template, lambda marker: in_template(marker) or tokenizer.has_added_token(marker)):
        for rule, markers in _RULES:
            if all(map(has, markers)):
                return CALL_FORMATS.get(rule)
    return None
