"""What all formats of tool calls have in common: the seam that one module a format fills.

Owns the protocol and nothing that a single model does. A format finds calls in the text of an answer whose reasoning is
told apart already, and says in a grammar how its model writes them.
"""

from __future__ import annotations

from typing import Protocol

from mooli.frontend.parts import Parser
from mooli.frontend.tools import ToolSet


class CallFormat(Protocol):
    """How a model writes calls of functions into its text."""

    @property
    def name(self) -> str:
        """As `--tool-call-parser` knows it."""
        ...

    @property
    def marker_tokens(self) -> tuple[str, ...]:
        """Texts that the parser looks for. Where one is a special token, its text is shown to the parser, and a grammar
        may write it."""
        ...

    def parser(self, tools: ToolSet) -> Parser:
        """For the text of one sequence, behind its reasoning: parts text, call_begin, arguments, call_end."""
        ...

    def calls_grammar(self, tools: ToolSet) -> str:
        """Rules of Lark (llguidance's) whose rule `calls` is one call, or with `tools.parallel` one or more, exactly as
        the model writes them, with each function's schema enforced; up to the end of the message."""
        ...

    def triggers(self) -> tuple[str, ...]:
        """Texts that only a call begins with. Up to one of them text is free where calls are not forced."""
        ...
