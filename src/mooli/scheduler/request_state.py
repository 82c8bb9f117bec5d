"""One request while the engine has it.

Owns its token ids, how far they are computed and what was collected for its output. Never decides when it runs or ends.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mooli.batch import LogprobRow
from mooli.cache.match_end import MatchEnd, MissReason
from mooli.cache.radix_tree import token_key
from mooli.cache.request_pages import Given, RequestPages
from mooli.cache.turns import Turn
from mooli.scheduler.constraint import Constrained
from mooli.scheduler.drafts import DraftRecord
from mooli.types import CacheEnd, FinishReason, Request, TokenLogprobs


class RequestState:
    """A request, waiting (`pages` is None) or running.

    num_tokens: prompt and what was sampled. num_computed: how many of them have their KV stored; it chases num_tokens.
    max_tokens: num_tokens at which the request ends with `length`.
    arrival: position in the order of arrival. rank: smaller goes first, and is preempted last; all in the background
    come after all others.
    due: where it came, in tokens computed by anybody, less the head start of its priority; 0, and head_start None,
    where priorities do not count.
    num_found: tokens that were in the cache when it began to run, this time.
    loaded_tokens, host_tokens: of `cached_tokens`, those that came from disk, or out of the host's memory, for it; all
    are -1 before it first runs.
    drafts: how the guesses at its next tokens have fared.
    given: what it gave to the tree, preempted or not.
    match_end: where it ended in the cache when it began to run, and why. cache_end: the same of the first time, to be
    said with its next output. waited_for: what held it last (see `Hold`).
    constrained: what its output must keep to; None for a request that is free. It stands after the last token.
    leader: the running request that now computes a prefix this one waits for, until it has `leader_pages` in the tree.
    """

    __slots__ = (
        "_buffer",
        "_key",
        "_key_buffer",
        "arrival",
        "cache_end",
        "cached_tokens",
        "constrained",
        "drafts",
        "due",
        "enqueued_at",
        "given",
        "head_start",
        "host_tokens",
        "is_background",
        "leader",
        "leader_pages",
        "loaded_tokens",
        "match_end",
        "max_tokens",
        "next_prompt_logprob",
        "num_computed",
        "num_found",
        "num_preemptions",
        "num_prompt_tokens",
        "num_tokens",
        "pages",
        "pending_finish",
        "prompt_logprobs",
        "rank",
        "req_index",
        "request",
        "stop_ids",
        "waited_for",
    )

    def __init__(
        self, request: Request, arrival: int, max_tokens: int, enqueued_at: int, head_start: int | None = None
    ) -> None:
        prompt = request.prompt_ids
        params = request.sampling
        self.request = request
        self.arrival = arrival
        self.head_start = head_start
        self.due = 0 if head_start is None else enqueued_at - head_start
        self.is_background = request.is_background
        self.rank = (self.is_background, self.due, arrival)
        self.max_tokens = max_tokens
        self.enqueued_at = enqueued_at
        self.stop_ids = frozenset() if params.ignore_eos else request.eos_ids | params.stop_token_ids
        self.num_prompt_tokens = self.num_tokens = len(prompt)
        self.num_computed = self.num_found = 0
        self.cached_tokens = self.loaded_tokens = self.host_tokens = -1
        self.constrained: Constrained | None = None
        self.drafts = DraftRecord()
        self.num_preemptions = 0
        self.pages: RequestPages | None = None
        self.given = Given()
        self.req_index = -1
        self.match_end: MatchEnd | None = None
        self.cache_end: CacheEnd | None = None
        self.waited_for: str | None = None
        self.leader: RequestState | None = None
        self.leader_pages = 0
        self.pending_finish: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.next_prompt_logprob = self.num_prompt_tokens
        start = request.logprob_start
        if start is not None:
            # Nothing predicts the first entry from inside the range asked for.
            self.prompt_logprobs = [TokenLogprobs(int(prompt[start]), None)]
            self.next_prompt_logprob = start + 1
        self._buffer = np.empty(min(max_tokens, self.num_tokens + 64), np.int32)
        self._buffer[: self.num_tokens] = prompt
        self._key_buffer = self._buffer
        if request.key_ids is not None:
            self._key_buffer = np.empty_like(self._buffer)
            self._key_buffer[: self.num_tokens] = request.key_ids
        self._key: bytes | None = None

    @property
    def rid(self) -> str:
        return self.request.rid

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Prompt and output so far, int32 (num_tokens,): a view."""
        return self._buffer[: self.num_tokens]

    @property
    def key_ids(self) -> NDArray[np.int32]:
        """What the cache knows the tokens by, int32 (num_tokens,): a view. See `Request.key_ids`."""
        return self._key_buffer[: self.num_tokens]

    @property
    def num_missing(self) -> int:
        """Tokens whose KV is not stored yet; at least one, as a sampled token is never computed in its own step."""
        return self.num_tokens - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def max_kv_tokens(self) -> int:
        """KV entries needed at the end: the last token is never computed."""
        return max(self.num_prompt_tokens, self.max_tokens - 1)

    @property
    def wants_tokens(self) -> bool:
        """False for `max_new_tokens=0`: the prompt is computed and nothing is sampled."""
        return self.max_tokens > self.num_prompt_tokens

    @property
    def match_limit(self) -> int:
        """How many tokens may come from the cache: one must be computed, and prompt log-probabilities need theirs."""
        if self.next_prompt_logprob < self.num_prompt_tokens:
            return self.next_prompt_logprob - 1
        return self.num_tokens - 1

    @property
    def key(self) -> bytes:
        """All tokens as a key of the radix tree."""
        if self._key is None:
            self._key = token_key(self.key_ids)
        return self._key

    @property
    def turn(self) -> Turn | None:
        """What it asks of the cache when it leaves; None for nothing."""
        request, end = self.request, self.match_end
        has_left_another = end is not None and end.reason is MissReason.DIVERGED
        if not (has_left_another or request.pins or request.session or request.previous):
            return None
        diverged_at = end.num_tokens if has_left_another and end is not None else None
        prompt = token_key(self.key_ids[: self.num_prompt_tokens])
        return Turn(prompt, request.pins, request.session, request.previous, diverged_at)

    def append(self, token_id: int) -> None:
        """Add a sampled token."""
        has_own_key = self._key_buffer is not self._buffer
        if self.num_tokens == len(self._buffer):
            self._buffer = self._grown(self._buffer)
            self._key_buffer = self._grown(self._key_buffer) if has_own_key else self._buffer
        self._buffer[self.num_tokens] = token_id
        if has_own_key:
            self._key_buffer[self.num_tokens] = token_id
        self.num_tokens += 1
        self._key = None

    def _grown(self, buffer: NDArray[np.int32]) -> NDArray[np.int32]:
        grown = np.empty(min(self.max_tokens, 2 * self.num_tokens), np.int32)
        grown[: self.num_tokens] = buffer
        return grown

    def collect_prompt_logprobs(self, target_ids: NDArray[np.int32], rows: list[LogprobRow]) -> None:
        """Append what a step computed for the next `len(target_ids)` prompt tokens."""
        if self.prompt_logprobs is None:
            return
        self.prompt_logprobs += [
            TokenLogprobs(int(token_id), row.logprob, row.top, row.chosen)
            for token_id, row in zip(target_ids, rows, strict=True)
        ]
        self.next_prompt_logprob += len(rows)

    def take_prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """The complete list, once; None if it was not asked for, is not complete, or was taken."""
        if self.prompt_logprobs is None or self.next_prompt_logprob < self.num_prompt_tokens:
            return None
        taken, self.prompt_logprobs = self.prompt_logprobs, None
        return taken

    def take_cache_end(self) -> CacheEnd | None:
        """Once."""
        taken, self.cache_end = self.cache_end, None
        return taken
