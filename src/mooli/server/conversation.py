"""What every dialect's conversation goes through: from messages and tools to ids, sampling and a reader's format.

Owns the order of it: what of the request is checked, what the template is told, how calls are forced, and by which
format the answer is read. A dialect writes its request in OpenAI's chat shape, and what it gets in its own. Never knows
a dialect's body, and never words an error of HTTP: it raises RequestError, whose `argument` is "messages", "tools",
"tool_choice" or "response_format"; a route's `names` say what its clients call these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mooli.frontend.cache_report import Told
from mooli.frontend.chat import with_calls
from mooli.frontend.inputs import Ids
from mooli.frontend.parts import WireFormat
from mooli.frontend.retention import Mark, Place
from mooli.frontend.tool_forcing import reasoning_ahead
from mooli.frontend.tools import ToolSet
from mooli.server.service import Service


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What is asked, in OpenAI's chat shape.

    messages: mappings as `mooli.frontend.tool_messages.template_messages` takes them: `role`; `content`, a text, parts
        or None; of the assistant `tool_calls` ({"id", "type", "function": {"name", "arguments"}}, arguments as JSON or
        as an object), `reasoning_content`; of a result (role "tool") `tool_call_id`, `name`. At least one.
    tools: as `mooli.frontend.tool_messages.read_tools` reads them; None where there are none. With the choice "none"
        the model hears of none, and nothing in its answer is read as a call.
    template_arguments: further names for the template, such as `enable_thinking`. The server's own
        (`--chat-template-kwargs`) lie under them. `add_generation_prompt` may be among them.
    continues: the last message, the assistant's, is gone on with.
    tells_reasoning_apart: False reads reasoning as text, its markers too.
    owner: whose texts of before need not be tokenised again, and whose own answers are gone on with in the tokens they
        were made of (`Service.owner_of`); None: nobody's.
    marks: up to where the prompt is to be kept for a time.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: ToolSet | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False
    tells_reasoning_apart: bool = True
    owner: str | None = None
    marks: Sequence[Mark] = ()


class OpenedConversation(NamedTuple):
    """input_ids: the prompt. sampling_params: for `GenerateCall`. wire_format: for `Service.start`, and by which
    `parser_for(wire_format, …)` reads each answer."""

    input_ids: Ids
    sampling_params: dict[str, Any]
    wire_format: WireFormat


async def open_conversation(
    service: Service, conversation: Conversation, sampling_params: Mapping[str, Any]
) -> OpenedConversation:
    """The prompt of a conversation and how its answer is sampled and read.

    sampling_params: what the request says, under native names; without `max_new_tokens` the answer may take what the
    context leaves. The model's own defaults are laid under them, and what forces a call over them: then a schema does
    not count.

    Raises RequestError for what is wrong in messages or tools, or where there is no template; what
    `Service.encode_chat` raises.
    """
    ids = await prompt_ids(service, conversation, takes_up=not conversation.continues)
    wire_format = service.wire_format
    if not conversation.tells_reasoning_apart:
        wire_format = wire_format.without_reasoning
    if conversation.tools is not None:
        wire_format = wire_format.with_tools(conversation.tools)
    if conversation.continues:
        wire_format = wire_format.continued
    params = service.chat_sampling(sampling_params)
    if "max_new_tokens" not in params and "max_new_tokens" not in service.engine_config.preferred_sampling:
        params["max_new_tokens"] = None
    params = with_calls(params, conversation.tools, wire_format)
    if service.tokenizer is not None:
        # Also where the answer is read as plain text: the model reasons all the same.
        reasons = service.wire_format.continued if conversation.continues else service.wire_format
        params.update(reasoning_ahead(reasons, ids, service.tokenizer))
    return OpenedConversation(ids, params, wire_format)


async def prompt_ids(service: Service, conversation: Conversation, *, takes_up: bool = False) -> Ids:
    """The ids of a conversation alone, up to where the assistant goes on. takes_up: with the own ids of its owner's
    answers. Raises as `open_conversation`."""
    return await service.encode_chat(
        conversation.messages,
        conversation.tools,
        _template_arguments(service, conversation),
        owner=conversation.owner,
        takes_up=takes_up,
    )


def told_of(service: Service, conversation: Conversation) -> Told:
    """What the template is told of it: for a report on the cache."""
    return Told(conversation.messages, conversation.tools, _template_arguments(service, conversation))


MAX_MARKS = 4
"""Of a request; the last ones count, as with both APIs that have marks."""


async def pins_of(
    service: Service, marks: Sequence[Mark], conversation: Conversation | None = None, *, own: Any = None
) -> Any:
    """For `GenerateCall.pin`; None where nothing is asked for. conversation: as it was told, for marks inside it.
    own: the field `pin` of a body, unchecked.

    A mark that a later one covers for as long says nothing more. So where a conversation marks its last message, as
    agents do, nothing has to be counted.
    """
    if not marks:
        return own
    last = None if conversation is None else Place("message", len(conversation.messages) - 1)
    longest = max((mark.seconds for mark in marks if mark.place in (None, last)), default=0.0)
    pins: list[Any] = [{"seconds": longest}] if longest else []
    inside = [(mark.place, mark.seconds) for mark in marks if mark.place is not None and mark.place != last]
    for place, seconds in sorted(inside, key=lambda item: item[0].order, reverse=True):
        if seconds > longest and conversation is not None and len(pins) < MAX_MARKS:
            longest = seconds
            num_tokens = await service.prefix_tokens(told_of(service, conversation), place)
            pins.append({"seconds": seconds, "tokens": num_tokens})
    return pins if own is None else [*pins, *(own if isinstance(own, list) else [own])]


def _template_arguments(service: Service, conversation: Conversation) -> dict[str, Any]:
    return {
        **service.config.chat_template_kwargs,
        "add_generation_prompt": not conversation.continues,
        **conversation.template_arguments,
        "continue_final_message": conversation.continues,
    }
