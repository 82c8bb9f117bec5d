"""One request on the text side: token ids in, text and the public answer dict out.

Owns the text of a request, where a stop string ends it, and the shape of the answer. Never submits, waits or aborts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mooli.errors import RequestError, RequestFailedError
from mooli.frontend.detokenizer import IncrementalDetokenizer
from mooli.frontend.inputs import CallInputs
from mooli.frontend.stop import StopMatcher, StopStrings
from mooli.frontend.tokenizer import Tokenizer
from mooli.types import DraftCounts, FinishReason, Request, RequestOutput, TokenLogprobs

WEIGHT_VERSION = "default"

LogprobTriple = tuple["float | None", int, "str | None"]
"""(log-probability, token id, text). The text is None unless `Generation.shows_logprob_texts`."""


@dataclass(slots=True)
class _Sent:
    """How much of a sequence the chunks so far have shown."""

    chars: int = 0
    tokens: int = 0
    chunks: int = 0


@dataclass(frozen=True, slots=True)
class _Shown:
    """What of a sequence an answer has: tokens from which on, what belongs to the prompt, and lists of alternatives."""

    first_token: int = 0
    prompt: bool = True
    alternatives: bool = True


class Generation:
    """What one request has produced so far. Not thread-safe: used by whoever reads the answer.

    tokenizer None: no text, and `text` is left out of answers. stops: those of the request, made once for all of a call
    that have the same. index: place in the call's list, shown in chunks of
    calls with several requests, None otherwise. incremental: chunks hold what is new instead of everything so far.

    shows_logprob_texts, shows_prompt_ids: set before the first chunk to have the texts of tokens in lists of
    log-probabilities, and `prompt_token_ids` in answers.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        *,
        stops: StopStrings | None = None,
        index: int | None = None,
        stream_interval: int = 1,
        incremental: bool = False,
    ) -> None:
        params = request.sampling
        self.request = request
        self.text = ""
        self.output_ids: list[int] = []
        self.finish: FinishReason | None = None
        self.shows_logprob_texts = False
        self.shows_prompt_ids = False
        self._tokenizer = tokenizer
        self._index = index
        self._stream_interval = params.stream_interval or stream_interval
        self._incremental = incremental
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        self._matcher = StopMatcher(stops or StopStrings(params.stop), trim=not params.no_stop_trim)
        self._last = RequestOutput(request.rid, prompt_tokens=len(request.prompt_ids))
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._sent = _Sent()
        self._start = time.perf_counter()
        self._latency_s = 0.0
        self._cause: BaseException | None = None

    @property
    def rid(self) -> str:
        return self.request.rid

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that came from the cache."""
        return self._last.cached_tokens

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def logprobs(self) -> Sequence[TokenLogprobs]:
        """One entry for each of `output_ids`, if the request wants log-probabilities."""
        return self._logprobs

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprobs]:
        """From the request's `logprob_start` on; empty until the first output."""
        return self._prompt_logprobs

    def update(self, output: RequestOutput) -> str | None:
        """Take an engine output. Returns the stop string if one has just ended the text while the engine goes on.

        Tokens after the one that completes a stop string are dropped, and so is everything after the end.
        """
        if self.finish is not None:
            return None
        self._last = output
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        stop_id = output.finish.matched if output.finish is not None and output.finish.type == "stop" else None
        for i, token_id in enumerate(output.new_token_ids):
            self.output_ids.append(token_id)
            if self.request.return_logprob:
                self._logprobs.append(output.logprobs[i])
            ends_here = isinstance(stop_id, int) and i == len(output.new_token_ids) - 1
            # The text of the token that ends a sequence is part of the stop condition, not of the answer.
            if not ends_here or self.request.sampling.no_stop_trim:
                self._show(token_id)
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

    def _flush(self) -> FinishReason | None:
        """Show what was held back; the reason if that completes a stop string."""
        if self._detokenizer is None:
            return None
        self.text += self._matcher.push(self._detokenizer.flush())
        matched = self._matcher.matched
        self.text += self._matcher.flush()
        return None if matched is None else FinishReason("stop", matched=matched)

    def is_due(self) -> bool:
        """Whether a stream shows a chunk now: at the first token, then at the interval, and at the end."""
        new = len(self.output_ids) - self._sent.tokens
        if self.finish is not None or (self._sent.chunks == 0 and new > 0):
            return True
        return new >= self._stream_interval

    def chunk(self) -> dict[str, Any]:
        """The next chunk of a stream: everything so far, or with `incremental` what no chunk has shown yet.

        What can be many times as long as the text goes out once: the prompt's ids and log-probabilities, and the lists
        of alternatives. With `incremental`, the prompt's are in the first chunk and alternatives beside their tokens;
        otherwise all are in the last chunk, whole, as clients of growing chunks read that one.
        """
        is_last = self.finish is not None
        if self._incremental:
            text, shown = self.text[self._sent.chars :], _Shown(self._sent.tokens, self._sent.chunks == 0, True)
        else:
            text, shown = self.text, _Shown(0, is_last, is_last)
        result = self._answer(text, shown)
        if self._sent.chunks == 0 or is_last:
            result["meta_info"]["response_sent_to_client_ts"] = time.time()
        if self._index is not None:
            result["index"] = self._index
        self._sent = _Sent(len(self.text), len(self.output_ids), self._sent.chunks + 1)
        return result

    def result(self) -> dict[str, Any]:
        """The whole answer."""
        result = self._answer(self.text, _Shown())
        result["meta_info"]["response_sent_to_client_ts"] = time.time()
        return result

    def raise_if_failed(self) -> None:
        """RequestError if the engine refused the request after all, RequestFailedError if it ended with `error`."""
        finish = self.finish
        if finish is None or (finish.type != "error" and finish.status_code is None):
            return
        error = RequestError if finish.type == "abort" and finish.status_code == 400 else RequestFailedError
        raise error(f"request {self.rid} failed: {finish.message}") from self._cause

    def _show(self, token_id: int) -> None:
        if self._detokenizer is not None:
            self.text += self._matcher.push(self._detokenizer.push([token_id]))

    def _end(self, finish: FinishReason) -> None:
        self.finish = finish
        self._latency_s = time.perf_counter() - self._start

    def _answer(self, text: str, shown: _Shown) -> dict[str, Any]:
        answer: dict[str, Any] = {} if self._detokenizer is None else {"text": text}
        answer["output_ids"] = self.output_ids[shown.first_token :]
        if self.shows_prompt_ids and shown.prompt:
            answer["prompt_token_ids"] = self.request.prompt_ids.tolist()
        answer["meta_info"] = self._meta_info(shown)
        return answer

    def _meta_info(self, shown: _Shown) -> dict[str, Any]:
        last = self._last
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": None if self.finish is None else self.finish.to_dict(),
            "prompt_tokens": len(self.request.prompt_ids),
            "completion_tokens": len(self.output_ids),
            "reasoning_tokens": 0,
            "cached_tokens": last.cached_tokens,
            "cached_tokens_details": {"device": last.cached_tokens, "host": 0},
            "weight_version": WEIGHT_VERSION,
            "num_retractions": last.num_preemptions,
        }
        if self.finish is not None:
            meta["e2e_latency"] = self._latency_s
            if last.drafts is not None:
                meta.update(_draft_info(last.drafts, last.completion_tokens))
        if self.request.return_logprob:
            meta.update(self._logprob_info(shown))
        return meta

    def _logprob_info(self, shown: _Shown) -> dict[str, Any]:
        output = self._logprobs[shown.first_token :]
        prompt = self._prompt_logprobs if shown.prompt else []
        rich = output if shown.alternatives else []
        info: dict[str, Any] = {
            "input_token_logprobs": [self._triple(item.logprob, item.token_id) for item in prompt],
            "output_token_logprobs": [self._triple(item.logprob, item.token_id) for item in output],
            "output_token_logprobs_length": len(self._logprobs),
        }
        if self.request.num_top_logprobs:
            info["input_top_logprobs"] = [self._alternatives(item, item.top) for item in prompt]
            info["output_top_logprobs"] = [self._alternatives(item, item.top) for item in rich]
        if self.request.logprob_token_ids:
            info["input_token_ids_logprobs"] = [self._alternatives(item, item.chosen) for item in prompt]
            info["output_token_ids_logprobs"] = [self._alternatives(item, item.chosen) for item in rich]
        return info

    def _alternatives(self, item: TokenLogprobs, entries: list[tuple[float, int]]) -> list[LogprobTriple] | None:
        """None where nothing predicts the position: the first token of a prompt."""
        return None if item.logprob is None else [self._triple(logprob, token_id) for logprob, token_id in entries]

    def _triple(self, logprob: float | None, token_id: int) -> LogprobTriple:
        if self._tokenizer is None or not self.shows_logprob_texts:
            return (logprob, token_id, None)
        return (logprob, token_id, self._tokenizer.token_text(token_id))


def generations_of(
    inputs: CallInputs, tokenizer: Tokenizer | None, *, stream_interval: int, incremental: bool
) -> list[Generation]:
    """One for each request of a call."""
    stops: dict[tuple[str, ...], StopStrings] = {}
    for request in inputs.requests:
        if request.sampling.stop not in stops:
            stops[request.sampling.stop] = StopStrings(request.sampling.stop)
    return [
        Generation(
            request,
            tokenizer,
            stops=stops[request.sampling.stop],
            index=None if inputs.is_single else index,
            stream_interval=stream_interval,
            incremental=incremental,
        )
        for index, request in enumerate(inputs.requests)
    ]


def _draft_info(drafts: DraftCounts, completion_tokens: int) -> dict[str, Any]:
    """SGLang's account of speculation in one request. The rate is of drafts, the length is of tokens a step."""
    return {
        "spec_accept_rate": drafts.num_right / max(drafts.num_proposed, 1),
        "spec_accept_length": completion_tokens / max(drafts.num_steps, 1),
        "spec_num_correct_drafts": drafts.num_right,
        "spec_num_proposed_drafts": drafts.num_proposed,
        "spec_verify_ct": drafts.num_steps,
        "spec_correct_drafts_histogram": list(drafts.histogram),
    }
