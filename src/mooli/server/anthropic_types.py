"""The bodies of the Messages API: fields, types, and what of them is not served.

Owns the way from such a body to a conversation for the chat template. A field whose effect Mooli does not have is
refused by its name, unless its value asks for nothing. Never tokenises and never generates.

Source: Anthropic's API reference, Messages and Count Message tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from mooli.frontend.unsupported import Api, asked
from mooli.server.json_body import check_count
from mooli.server.routing import HttpError, ModelName

Block = dict[str, Any]
"""A content block: an object with a `type`. Only {"type": "text", "text": …} is served."""

PART_SEPARATOR = "\n"
"""Between the blocks of a message, and between messages of one role that become one turn."""


class InputMessage(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class CountTokensBody(msgspec.Struct, kw_only=True):
    """What makes up a prompt."""

    model: ModelName
    messages: Annotated[list[InputMessage], msgspec.Meta(min_length=1)]
    system: str | list[Block] | None = None


class MessagesBody(CountTokensBody, kw_only=True):
    """A request for an answer. metadata and service_tier change nothing here, as their meaning has it."""

    max_tokens: Annotated[int, msgspec.Meta(ge=0)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def sampling_params(self) -> dict[str, Any]:
        """What the body says of sampling, in Mooli's names; `max_tokens` is left to who knows the prompt's length."""
        params: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "stop": self.stop_sequences}
        if self.top_k is not None:
            params["top_k"] = self.top_k or -1
        return {name: value for name, value in params.items() if value is not None}


def check_served(given: Mapping[str, Any]) -> None:
    """Raise HttpError (400) that names the field if one asks for what is not served."""
    name = asked(given, Api.ANTHROPIC)
    if name is not None:
        raise HttpError(400, f"{name} is not supported yet: leave it out.", param=name)


def conversation(body: CountTokensBody, max_items: int) -> tuple[list[dict[str, str]], bool]:
    """Messages for a chat template, and whether the last one is to be continued (it is the assistant's).

    Messages of one role in a row become one turn, as the API has it. Raises HttpError (400) for a block that is not
    text, and for more than `max_items` messages and blocks together.
    """
    blocks = [body.system, *(message.content for message in body.messages)]
    count = len(body.messages) + sum(len(content) for content in blocks if isinstance(content, list))
    check_count("messages", count, max_items)
    turns: list[tuple[str, list[str]]] = []
    if body.system:
        turns.append(("system", [_text(body.system, "system")]))
    for index, message in enumerate(body.messages):
        text = _text(message.content, f"messages[{index}].content")
        if turns and turns[-1][0] == message.role:
            turns[-1][1].append(text)
        else:
            turns.append((message.role, [text]))
    told = [{"role": role, "content": PART_SEPARATOR.join(texts)} for role, texts in turns]
    return told, told[-1]["role"] == "assistant"


def _text(content: str | Sequence[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    return PART_SEPARATOR.join(_block_text(block, f"{where}[{index}]") for index, block in enumerate(content))


def _block_text(block: Block, where: str) -> str:
    kind = block.get("type")
    if not isinstance(kind, str):
        raise HttpError(400, f"{where} has no type: a text is {{'type': 'text', 'text': …}}.", param=where)
    if kind != "text":
        raise HttpError(400, f"{where} is of type {kind[:40]!r}, but only text is supported yet.", param=where)
    text = block.get("text")
    if not isinstance(text, str):
        raise HttpError(400, f"{where}.text must be a string.", param=where)
    return text
