"""The functions that a conversation may call, and whether it must.

Owns plain data that dialects make of their requests, and what a chat template and a wire format read of it. Never calls
a function, and never writes a grammar: a wire format does, in the way its model writes calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ToolChoice = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class Tool:
    """parameters: the JSON schema of its arguments, an object's. strict: whoever sent it wants its arguments to match
    that schema even where calls are free; where a call is forced they always do. takes_text: its client knows no
    arguments but one text (OpenAI's custom tools); for the model it is a function with the argument `input`."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    takes_text: bool = False

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: OpenAI's shape."""
        function: dict[str, Any] = {"name": self.name, "description": self.description}
        function["parameters"] = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolSet:
    """tools: in the order of the request; of a named choice that one alone, and then choice is "required".
    parallel: one message may have several calls. shown: what the prompt tells of, where that is more than may be
    called now: the same prompt from turn to turn is found in the cache."""

    tools: tuple[Tool, ...]
    choice: ToolChoice = "auto"
    parallel: bool = True
    shown: tuple[Tool, ...] | None = None

    def named(self, name: str) -> Tool | None:
        return next((tool for tool in self.tools if tool.name == name), None)

    def for_template(self) -> list[dict[str, Any]]:
        """Of all that is shown."""
        return [tool.for_template() for tool in (self.tools if self.shown is None else self.shown)]
