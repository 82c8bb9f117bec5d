"""What is sent and what came back.

Owns `BenchRequest` and `RequestRecord`. Times are seconds of the client's monotonic clock. Never computes a statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Message = dict[str, Any]

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or the messages of a chat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One request of a dataset, or one conversation of several turns.

    prompt: of the first turn.
    prompt_len: tokens of `prompt` as the dataset counts them.
    output_len: tokens to ask for, in every turn.
    later_turns: what the user says after each answer; the server's own answers go in between.
    arrival_s: when to send, from the start of the run; None leaves it to the request rate.
    extra_body: keys for the request's body, over those given for all.
    """

    prompt: Prompt
    prompt_len: int
    output_len: int
    later_turns: tuple[str, ...] = ()
    arrival_s: float | None = None
    routing_key: str | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What one HTTP request brought.

    index: of its `BenchRequest` in the dataset; turn: 0 for the first of a conversation.
    start_s: when it was sent. ttft_s and latency_s count from there.
    send_delay_s: from then until it was on the wire: connecting, and this client's own work.
    itl_s: gaps between tokens as the API's rule has them (`--explain`).
    chunk_texts: the new text of each piece after the first, one to a gap where an API says nothing of token counts.
    output_len: tokens as the server counts them, else what was asked for (`is_output_len_reported` is False then).
    server_prompt_tokens, cached_tokens: as the server says; None where it does not.
    error: empty when `success`. interrupted: cut off by the user, neither a success nor a failure.
    """

    index: int = 0
    turn: int = 0
    prompt_len: int = 0
    start_s: float = 0.0
    send_delay_s: float = 0.0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    chunk_texts: list[str] = field(default_factory=list)
    generated_text: str = ""
    output_len: int = 0
    is_output_len_reported: bool = False
    server_prompt_tokens: int | None = None
    cached_tokens: int | None = None
    cached_tokens_details: dict[str, Any] | None = None
    success: bool = False
    interrupted: bool = False
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None for an answer of one token."""
        return (self.latency_s - self.ttft_s) / (self.output_len - 1) if self.output_len > 1 else None
