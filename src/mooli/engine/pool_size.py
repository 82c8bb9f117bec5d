"""How many pages the KV pool gets, and how many recurrent states there is room for, from numbers alone.

Owns the rule that both fit the memory and leave the machine usable. Never measures memory and never allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

from mooli.cache.states import StateRoom
from mooli.errors import ConfigError, OutOfMemoryError

GIB = 2**30
FREE_SHARE = 0.1
"""With no `mem_fraction_static`, at least this share of what was available, and at least one GiB, is left free."""

POOL_SHARE = 0.5
"""With no `mem_fraction_static`, the pool takes at most this share of what the weights leave."""

SNAPSHOT_SHARE = 0.125
"""Of what pool and states take together, what snapshots of states get where nothing else is said."""

RUNNING_SHARE = 0.5
"""Of the same, what the states of running requests may take; where that is too little for all, fewer run."""

LEAST_SNAPSHOTS = 8
"""However small a pool is that was asked for in tokens."""

LEAST_SNAPSHOT_TOKENS, PAGES_OVER_STATES = 256, 4
"""The state of a long prompt is kept every so many tokens; or, if that is more, whenever their pages have taken four
times as much memory as a state."""

DRAFT_STEP_TOKENS = 8
"""A step takes draft tokens up to this many tokens: int8 kernels wait for memory up to about eight rows, int4 up to
four, and so verify drafts in the time of one token."""

LEAST_TOKENS = 256
"""A pool that holds fewer tokens than this (or than the context, if that is shorter) serves nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolNeeds:
    """What decides the size of the pool. Bytes of memory, tokens of text.

    available_bytes: free when the engine started, before weights. weight_bytes: of the packed weights.
    model_context: the longest sequence of the model; `context_length`: what the user asked for, or None.
    max_total_tokens: the user's own size of the pool; memory then has no say but that it must fit.
    claimed_bytes: what other engines will still take, and so was not available.
    state_bytes: of one recurrent state, 0 for models without. num_tried: states that a step keeps after guesses.
    snapshot_share: see SNAPSHOT_SHARE.
    """

    available_bytes: int
    weight_bytes: int
    bytes_per_page: int
    page_size: int
    model_context: int
    max_running_requests: int
    context_length: int | None = None
    mem_fraction_static: float | None = None
    max_total_tokens: int | None = None
    claimed_bytes: int = 0
    state_bytes: int = 0
    num_tried: int = 0
    snapshot_share: float | None = None


def state_room(needs: PoolNeeds) -> StateRoom | None:
    """How many recurrent states there is room for beside the pool; None for models without."""
    if not needs.state_bytes:
        return None
    budget = max(0, _budget_bytes(needs))
    affordable = int(RUNNING_SHARE * budget) // needs.state_bytes - needs.num_tried
    snapshot_bytes = (SNAPSHOT_SHARE if needs.snapshot_share is None else needs.snapshot_share) * budget
    if needs.max_total_tokens is not None:
        share = snapshot_bytes / max(1, budget)
        wanted = share * (needs.max_total_tokens // needs.page_size) * needs.bytes_per_page
        snapshot_bytes = min(snapshot_bytes, max(wanted, LEAST_SNAPSHOTS * needs.state_bytes if share else 0))
    every = PAGES_OVER_STATES * needs.state_bytes * needs.page_size // needs.bytes_per_page
    return StateRoom(
        num_running=max(1, min(needs.max_running_requests, affordable)),
        num_tried=needs.num_tried,
        # More than pages would be of no use.
        num_snapshots=min(int(snapshot_bytes) // needs.state_bytes, budget // needs.bytes_per_page),
        every_tokens=_pages(max(LEAST_SNAPSHOT_TOKENS, every), needs.page_size) * needs.page_size,
    )


def _states_bytes(needs: PoolNeeds) -> int:
    room = state_room(needs)
    return 0 if room is None else room.num_slots * needs.state_bytes


def num_pool_pages(needs: PoolNeeds) -> int:
    """Pages of the KV pool.

    Raises OutOfMemoryError if memory does not hold the pool that was asked for or the least useful one, ConfigError if
    `context_length` and `max_total_tokens` contradict each other.
    """
    context = needs.context_length or needs.model_context
    budget = _budget_bytes(needs) - _states_bytes(needs)
    affordable = max(0, budget) // needs.bytes_per_page
    if needs.max_total_tokens is not None:
        wanted = needs.max_total_tokens // needs.page_size
        if wanted < 1:
            raise ConfigError(
                f"max_total_tokens={needs.max_total_tokens} is less than one page of {needs.page_size} tokens"
            )
        if needs.context_length is not None and needs.context_length > wanted * needs.page_size:
            raise ConfigError(
                f"context_length={needs.context_length} does not fit in max_total_tokens={needs.max_total_tokens}:"
                " raise the one or lower the other"
            )
        if needs.mem_fraction_static is None:
            left = needs.available_bytes - needs.weight_bytes - _states_bytes(needs)
            affordable = max(0, left) // needs.bytes_per_page
        if wanted > affordable:
            raise _too_little(needs, wanted, affordable, "max_total_tokens")
        return wanted
    useful = needs.max_running_requests * _pages(context, needs.page_size)
    least = _pages(needs.context_length or min(context, LEAST_TOKENS), needs.page_size)
    if affordable < least:
        raise _too_little(needs, least, affordable, "context_length" if needs.context_length else None)
    if needs.mem_fraction_static is not None:
        return affordable
    return min(affordable, useful)


def kv_type(kv_cache_dtype: str, dtype: str, computed_in: str | None) -> str:
    """The type of keys and values: what was asked for; else that of the computation, which is `computed_in` where the
    backend chooses it; else two bytes."""
    if kv_cache_dtype != "auto":
        return kv_cache_dtype
    if dtype != "auto":
        return dtype
    return "float32" if computed_in == "float32" else "bfloat16"


def context_for(needs: PoolNeeds, num_pages: int) -> int:
    """The longest sequence the engine serves: the model's or the user's limit, if the pool holds it."""
    return min(needs.context_length or needs.model_context, num_pages * needs.page_size)


def _budget_bytes(needs: PoolNeeds) -> int:
    """Bytes that pool and states may take. May be negative."""
    left = needs.available_bytes - needs.weight_bytes
    if needs.mem_fraction_static is not None:
        return int(needs.mem_fraction_static * needs.available_bytes) - needs.weight_bytes
    kept_free = max(GIB, int(FREE_SHARE * needs.available_bytes))
    return min(int(POOL_SHARE * left), left - kept_free)


def _pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def _too_little(needs: PoolNeeds, wanted: int, affordable: int, cause: str | None) -> OutOfMemoryError:
    tokens = wanted * needs.page_size
    holds = f"memory holds {affordable * needs.page_size}" if affordable else "memory holds none"
    advice = []
    if cause is not None:
        advice.append(f"lower {cause}")
    if needs.mem_fraction_static is not None and needs.mem_fraction_static < 1:
        advice.append(f"raise mem_fraction_static (now {needs.mem_fraction_static})")
    elif needs.mem_fraction_static is None and cause != "max_total_tokens":
        advice.append("set mem_fraction_static to let the engine take more of the memory")
    advice.append("use quantization='int8' or 'int4', a smaller model, or free some memory")
    states = f" and recurrent states {_gib(_states_bytes(needs))}" if needs.state_bytes else ""
    claimed = f" ({_gib(needs.claimed_bytes)} more are other engines')" if needs.claimed_bytes else ""
    return OutOfMemoryError(
        f"a KV cache of {tokens} tokens needs {_gib(wanted * needs.bytes_per_page)}, but {holds}:"
        f" {_gib(needs.available_bytes)} were available{claimed} and the weights take {_gib(needs.weight_bytes)}"
        f"{states}."
        f" What to do: {'; '.join(advice)}."
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
