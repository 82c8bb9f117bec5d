"""The message that answers a conversation, as it grows: OpenAI's shape, to be appended to the conversation.

Owns how parts become one. Never waits, and never changes a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mooli.frontend.generation import Generation
from mooli.frontend.parts import PartReader, WireFormat, parser_for
from mooli.frontend.tokenizer import Tokenizer


class ChatMessage:
    """Of one sequence. Not thread-safe. wire_format: how the model writes reasoning and calls; the sequence's text must
    show its marker tokens. on_end: called once, when the message has been read to its end."""

    def __init__(
        self,
        generation: Generation,
        wire_format: WireFormat,
        tokenizer: Tokenizer,
        on_end: Callable[[Generation], None] = lambda _: None,
    ) -> None:
        self._generation = generation
        self._on_end: Callable[[Generation], None] | None = on_end
        self._reader = PartReader(generation, parser_for(wire_format, generation.request, tokenizer))
        self._texts = {"text": "", "reasoning": ""}
        self._calls: list[tuple[str, str]] = []
        self._arguments: list[str] = []

    @property
    def num_reasoning_tokens(self) -> int:
        return self._reader.num_reasoning_tokens

    def so_far(self) -> dict[str, Any]:
        """{"role", "content"}, and where there are some "reasoning_content" and "tool_calls", whose arguments are JSON.
        The content beside calls may be None."""
        for part in self._reader.take():
            if part.kind in self._texts:
                self._texts[part.kind] += part.text
            elif part.kind == "call_begin":
                self._calls.append((part.call_id, part.text))
                self._arguments.append("")
            elif part.kind == "arguments":
                self._arguments[-1] += part.text
        if self._reader.is_over and self._on_end is not None:
            self._on_end(self._generation)
            self._on_end = None
        message: dict[str, Any] = {"role": "assistant", "content": self._texts["text"] or (None if self._calls else "")}
        if self._texts["reasoning"]:
            message["reasoning_content"] = self._texts["reasoning"]
        if self._calls:
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for (call_id, name), arguments in zip(self._calls, self._arguments, strict=True)
            ]
        return message
