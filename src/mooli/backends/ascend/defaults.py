"""Sizes that an NPU starts with when nobody says otherwise. Numbers alone: `mooli plan` reads them without torch.

Owns the numbers. They are those that SGLang starts with on such cards, up to 32 GB and up to 64 GB; not measured by us.
"""

from __future__ import annotations

GIB = 2**30

MAX_RUNNING_REQUESTS = 64
"""The largest decode step that is captured as a graph; larger ones are launched operation by operation."""

CHUNKED_PREFILL_SIZE = 8192
"""Tokens of a step; a whole number of pages, as prompts go on at their edges."""

SMALL_CHUNKED_PREFILL_SIZE = 4096
SMALL_MEMORY_BYTES = 32 * GIB
"""Cards with no more memory than this take SMALL_CHUNKED_PREFILL_SIZE: activations grow with a step's tokens."""


def chunked_prefill_size(total_bytes: int) -> int:
    """Tokens of a step on a card with this much memory."""
    return CHUNKED_PREFILL_SIZE if total_bytes > SMALL_MEMORY_BYTES else SMALL_CHUNKED_PREFILL_SIZE
