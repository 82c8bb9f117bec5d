"""`Engine.chat`'s conversations as calls of `generate`: their prompts, and what holds their answers to calls or a form.

Owns the meaning of its arguments. Never runs a request, and never reads an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mooli.errors import ChatTemplateError, RequestError
from mooli.frontend.cache_report import Told
from mooli.frontend.chat_encoding import encode_conversation
from mooli.frontend.inputs import Ids
from mooli.frontend.parts import WireFormat
from mooli.frontend.response_format import response_format_params
from mooli.frontend.text_memory import Encode
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.tool_forcing import tool_grammar
from mooli.frontend.tool_messages import read_tools
from mooli.frontend.tool_prompt import for_template
from mooli.frontend.tools import ToolSet


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Whoever makes one may have given values of other types.

    tools, tool_choice, parallel_tool_calls: as `mooli.frontend.tool_messages.read_tools` has them. response_format: as
    OpenAI has it. add_generation_prompt: the assistant begins a message. continue_final_message: the last message goes
    on instead. chat_template_kwargs: further names for the template.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None


def chat_call(
    tokenizer: Tokenizer,
    wire_format: WireFormat,
    messages: Any,
    options: ChatOptions,
    arguments: Mapping[str, Any],
    context_length: int,
    encode: Encode,
    take_up: Callable[[list[int]], Ids],
) -> tuple[dict[str, Any], WireFormat]:
    """Arguments of `GenerateCall` for a conversation or a list of them, and the format by which answers are read.

    wire_format: the model's. arguments: of `GenerateCall`, with `sampling_params`. encode: does what `tokenizer.encode`
    does. take_up: puts own answers of before into a prompt, in the tokens they were made of. Raises RequestError for
    what is wrong in them, and what `encode_conversation` raises.
    """
    for name in ("prompt", "input_ids"):
        if name in arguments:
            raise RequestError(f"chat makes the prompt of messages: leave out {name}", argument=name)
    tools = read_tools(options.tools, options.tool_choice, options.parallel_tool_calls)
    if tools is not None:
        wire_format = wire_format.with_tools(tools)
    if options.continue_final_message:
        wire_format = wire_format.continued
    is_batch = isinstance(messages, (list, tuple)) and bool(messages) and isinstance(messages[0], (list, tuple))
    conversations = messages if is_batch else [messages]
    read = [_ids(tokenizer, item, tools, options, context_length, encode) for item in conversations]
    ids: list[Ids] = [item if options.continue_final_message else take_up(item) for item in read]
    form = response_format_params(options.response_format)
    given = arguments.get("sampling_params")
    params: Any = [_params(item, form, tools, wire_format) for item in (given if isinstance(given, list) else [given])]
    call = {
        **arguments,
        "input_ids": ids if is_batch else ids[0],
        "sampling_params": params if isinstance(given, list) else params[0],
    }
    return call, wire_format


def told_of(messages: Any, options: ChatOptions) -> list[Told]:
    """What the template is told of a conversation, or of each of a list of them, that `chat_call` has taken."""
    tools = read_tools(options.tools, options.tool_choice, options.parallel_tool_calls)
    is_batch = isinstance(messages[0], (list, tuple))
    return [Told(item, tools, _template_arguments(options)) for item in (messages if is_batch else [messages])]


def _template_arguments(options: ChatOptions) -> dict[str, Any]:
    return {
        **(options.chat_template_kwargs or {}),
        "add_generation_prompt": options.add_generation_prompt and not options.continue_final_message,
        "continue_final_message": options.continue_final_message,
    }


def _ids(
    tokenizer: Tokenizer,
    messages: Any,
    tools: ToolSet | None,
    options: ChatOptions,
    context_length: int,
    encode: Encode,
) -> list[int]:
    template = tokenizer.chat_template
    if template is None:
        raise ChatTemplateError("the model has no chat template: give one with chat_template")
    is_list = isinstance(messages, (list, tuple))  # all else is the template's to refuse
    told, shown = for_template(template, messages, tools) if is_list else (messages, None)
    arguments = _template_arguments(options)
    return encode_conversation(tokenizer, told, shown, arguments, context_length=context_length, encode=encode)


def _params(given: Any, form: Mapping[str, Any], tools: ToolSet | None, wire_format: WireFormat) -> Any:
    """Sampling parameters with what a call or a form asks for over them. What is no mapping is refused later."""
    if given is not None and not isinstance(given, Mapping):
        return given
    return with_calls({**(given or {}), **form}, tools, wire_format)


def with_calls(params: Mapping[str, Any], tools: ToolSet | None, wire_format: WireFormat) -> dict[str, Any]:
    """Sampling parameters with what holds an answer to calls over them. Where a call is forced, a schema waits: agents
    say in every turn which form the last one has. Raises RequestError."""
    is_forced = tools is not None and tools.choice == "required"
    kept = {name: value for name, value in params.items() if not (is_forced and name == "json_schema")}
    return {**kept, **tool_grammar(wire_format, tools, kept)}
