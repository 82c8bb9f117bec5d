"""One request on the text side: token ids in, a growing text out.

Owns the text of a request, and where a stop string ends it. Never submits, waits or aborts, and never knows what of it
has been read: that is the reader's (`mooli.frontend.parts`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from mooli.errors import GrammarError, RequestError, RequestFailedError
from mooli.frontend.detokenizer import IncrementalDetokenizer
from mooli.frontend.stop import StopMatcher, StopStrings
from mooli.frontend.tokenizer import Tokenizer
from mooli.types import CacheEnd, FinishReason, Request, RequestOutput, TokenLogprobs


class Generation:
    """What one request has produced so far. Not thread-safe: used by whoever reads the answer.

    tokenizer None: no text. shown_ids: special tokens that are part of the text.
    stops: those of the request, made once for all of a call that have the same.
    Attributes are for readers. output_ids, text_lengths, logprobs: one entry for each token, log-probabilities only if
    the request wants them; text_lengths has how many characters of `text` came with the token. What was held back until
    the end is behind them all. prompt_logprobs: from the request's `logprob_start` on, empty until the first output.
    cache_end: once it has begun to run. last: the latest output. latency_s: from the start to the end, once there is a
    `finish`.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        *,
        shown_ids: frozenset[int] = frozenset(),
        stops: StopStrings | None = None,
    ) -> None:
        params = request.sampling
        self.request = request
        self.text = ""
        self.output_ids: list[int] = []
        self.text_lengths: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finish: FinishReason | None = None
        self.last = RequestOutput(request.rid, prompt_tokens=len(request.prompt_ids))
        self.latency_s = 0.0
        self.cache_end: CacheEnd | None = None
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                shown_ids=shown_ids,
            )
        self._matcher = StopMatcher(stops or StopStrings(params.stop), trim=not params.no_stop_trim)
        self._start = time.perf_counter()
        self._cause: BaseException | None = None

    @property
    def rid(self) -> str:
        return self.request.rid

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that came from the cache."""
        return self.last.cached_tokens

    @property
    def loaded_tokens(self) -> int:
        """Those of them that were loaded from disk for it."""
        return self.last.loaded_tokens

    @property
    def host_tokens(self) -> int:
        """Those of them that were copied back from the host's memory."""
        return self.last.host_tokens

    @property
    def written_tokens(self) -> int:
        """Tokens of the prompt that were computed, and are in the cache since."""
        return self.last.written_tokens

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    def update(self, output: RequestOutput) -> str | None:
        """Take an engine output. Returns the stop string if one has just ended the text while the engine goes on.

        Tokens after the one that completes a stop string are dropped, and so is everything after the end.
        """
        if self.finish is not None:
            return None
        self.last = output
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.cache_end is not None:
            self.cache_end = output.cache_end
        finish = output.finish
        stop_id = finish.matched if finish is not None and finish.type == "stop" else None
        if stop_id not in self.request.eos_ids and stop_id not in self.request.sampling.stop_token_ids:
            stop_id = None  # where a grammar ends the output, its last token is part of the answer
        for i, token_id in enumerate(output.new_token_ids):
            self.output_ids.append(token_id)
            self.text_lengths.append(0)
            if self.request.return_logprob:
                self.logprobs.append(output.logprobs[i])
            ends_here = isinstance(stop_id, int) and i == len(output.new_token_ids) - 1
            # The text of the token that ends a sequence is part of the stop condition, not of the answer.
            if self._detokenizer is not None and (not ends_here or self.request.sampling.no_stop_trim):
                piece = self._matcher.push(self._detokenizer.push([token_id]))
                self.text += piece
                self.text_lengths[-1] = len(piece)
            matched = self._matcher.matched
            if matched is not None:
                self._end(FinishReason("stop", matched=matched))
                return matched if output.finish is None else None
        if output.finish is not None:
            self._end(self._flush() or output.finish)
        return None

    def fail(self, message: str, cause: BaseException) -> None:
        """End with `error`, because `update` has raised `cause`; the caller ends the request in the engine."""
        self._cause = cause
        self._end(FinishReason("error", message=message, status_code=500, err_type=type(cause).__name__))

    def raise_if_failed(self) -> None:
        """RequestError if the engine refused the request after all, RequestFailedError if it ended with `error`."""
        finish = self.finish
        if finish is None or (finish.type != "error" and finish.status_code is None):
            return
        if finish.err_type == GrammarError.__name__:
            grammar = self.request.sampling.grammar
            raise GrammarError(f"{finish.message}", argument=None if grammar is None else grammar.argument)
        error = RequestError if finish.type == "abort" and finish.status_code == 400 else RequestFailedError
        raise error(f"request {self.rid} failed: {finish.message}") from self._cause

    def _flush(self) -> FinishReason | None:
        """Show what was held back; the reason if that completes a stop string."""
        if self._detokenizer is None:
            return None
        self.text += self._matcher.push(self._detokenizer.flush())
        matched = self._matcher.matched
        self.text += self._matcher.flush()
        return None if matched is None else FinishReason("stop", matched=matched)

    def _end(self, finish: FinishReason) -> None:
        self.finish = finish
        self.latency_s = time.perf_counter() - self._start


def generations_of(
    requests: Sequence[Request], tokenizer: Tokenizer | None, *, shown_ids: frozenset[int] = frozenset()
) -> list[Generation]:
    """One for each request of a call. shown_ids: special tokens that are part of the text."""
    stops = {stop: StopStrings(stop) for stop in dict.fromkeys(request.sampling.stop for request in requests)}
    return [
        Generation(request, tokenizer, shown_ids=shown_ids, stops=stops[request.sampling.stop]) for request in requests
    ]
