"""The native answer: dicts as SGLang's `Engine.generate` and /generate have them, whole or in chunks.

Owns their shape, what of it a stream says once, and SGLang's words for the model. Never waits for a sequence and never
changes one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mooli.config import EngineConfig
from mooli.engine.facts import EngineFacts
from mooli.frontend.cache_report import Inquiry
from mooli.frontend.chat_message import ChatMessage
from mooli.frontend.generation import Generation
from mooli.frontend.parts import PartReader, ReasoningCount, WireFormat
from mooli.frontend.tokenizer import Tokenizer
from mooli.types import DraftCounts, TokenLogprobs

WEIGHT_VERSION = "default"

LogprobTriple = tuple["float | None", int, "str | None"]
"""(log-probability, token id, text). The text is None unless the answer was asked for texts of tokens."""


@dataclass(slots=True)
class _Shown:
    """What of a sequence one dict shows. prompt: ids and log-probabilities of the prompt too. alternatives: of the
    output."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    prompt: bool = True
    alternatives: bool = True


class NativeAnswer:
    """One sequence as dicts.

    tokenizer: None leaves out `text`. index: place in the call's list, shown in chunks of calls with several requests,
    None otherwise. incremental: chunks hold what is new instead of everything so far.
    shows_token_texts: in lists of log-probabilities. shows_prompt_ids: `prompt_token_ids` too. reasoning: the format by
    which `reasoning_tokens` are counted; None counts none. message: of a conversation, what answers it. inquiry: makes
    its report on the cache, which `cache_report` has.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer | None,
        *,
        index: int | None = None,
        stream_interval: int = 1,
        incremental: bool = False,
        shows_token_texts: bool = False,
        shows_prompt_ids: bool = False,
        reasoning: WireFormat | None = None,
        message: ChatMessage | None = None,
        inquiry: Inquiry | None = None,
    ) -> None:
        self.generation = generation
        self._tokenizer = tokenizer
        self._index = index
        self._incremental = incremental
        self._shows_token_texts = shows_token_texts
        self._shows_prompt_ids = shows_prompt_ids
        self._parts = PartReader(generation, stream_interval=stream_interval)
        self._message = message
        self._inquiry = inquiry
        self._cache_report: dict[str, Any] | None = None
        self._reasoning: ReasoningCount | None = None
        if reasoning is not None and tokenizer is not None:
            self._reasoning = ReasoningCount(generation, reasoning, tokenizer)

    @property
    def is_over(self) -> bool:
        """Whether the last chunk has been taken."""
        return self._parts.is_over

    def chunk(self) -> dict[str, Any] | None:
        """A stream's next chunk if it is due: everything so far, or with `incremental` what no chunk has shown yet.

        What can be many times as long as the text goes out once: the prompt's ids and log-probabilities, and the lists
        of alternatives. With `incremental`, the prompt's are in the first chunk and alternatives beside their tokens;
        otherwise all are in the last chunk, whole, as clients of growing chunks read that one.
        """
        parts = self._parts.take()
        if not parts:
            return None
        is_first, is_last = parts[0].kind == "begin", parts[-1].kind == "end"
        if self._incremental:
            ids = [token_id for part in parts for token_id in part.token_ids]
            logprobs = [item for part in parts for item in part.logprobs]
            shown = _Shown("".join(part.text for part in parts), ids, logprobs, prompt=is_first)
        else:
            shown = self._all(is_last)
        result = self._dict(shown)
        if is_first or is_last:
            result["meta_info"]["response_sent_to_client_ts"] = time.time()
        if self._index is not None:
            result["index"] = self._index
        return result

    def result(self) -> dict[str, Any]:
        """The whole answer."""
        result = self._dict(self._all(True))
        result["meta_info"]["response_sent_to_client_ts"] = time.time()
        return result

    def _all(self, with_long_lists: bool) -> _Shown:
        generation = self.generation
        return _Shown(
            generation.text, generation.output_ids[:], generation.logprobs[:], with_long_lists, with_long_lists
        )

    def _dict(self, shown: _Shown) -> dict[str, Any]:
        answer: dict[str, Any] = {} if self._tokenizer is None else {"text": shown.text}
        answer["output_ids"] = shown.token_ids
        if self._message is not None and not (self._incremental and self.generation.finish is None):
            answer["message"] = self._message.so_far()
        if self._shows_prompt_ids and shown.prompt:
            answer["prompt_token_ids"] = self.generation.request.prompt_ids.tolist()
        answer["meta_info"] = self._meta_info(shown)
        return answer

    def _meta_info(self, shown: _Shown) -> dict[str, Any]:
        generation, last = self.generation, self.generation.last
        meta: dict[str, Any] = {
            "id": generation.rid,
            "finish_reason": None if generation.finish is None else generation.finish.to_dict(),
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": len(generation.output_ids),
            "reasoning_tokens": self._num_reasoning_tokens(),
            "cached_tokens": last.cached_tokens,
            "cached_tokens_details": cached_details(last.cached_tokens, last.loaded_tokens, last.host_tokens),
            "weight_version": WEIGHT_VERSION,
            "num_retractions": last.num_preemptions,
        }
        if self._inquiry is not None:
            meta["cache_report"] = self._report(self._inquiry, meta["reasoning_tokens"] > 0)
        if generation.finish is not None:
            meta["e2e_latency"] = generation.latency_s
            if last.drafts is not None:
                meta.update(_draft_info(last.drafts, last.completion_tokens))
        if generation.request.return_logprob:
            meta.update(self._logprob_info(shown))
        return meta

    def _report(self, inquiry: Inquiry, has_reasoned: bool) -> dict[str, Any] | None:
        """Made once, when it is known."""
        if self._cache_report is None:
            self._cache_report = inquiry.report(self.generation, has_reasoned=has_reasoned)
        inquiry.note(self.generation, has_reasoned=has_reasoned)
        return self._cache_report

    def _num_reasoning_tokens(self) -> int:
        if self._message is not None:
            return self._message.num_reasoning_tokens
        return 0 if self._reasoning is None else self._reasoning.update()

    def _logprob_info(self, shown: _Shown) -> dict[str, Any]:
        request, output = self.generation.request, shown.logprobs
        prompt = self.generation.prompt_logprobs if shown.prompt else []
        rich = output if shown.alternatives else []
        info: dict[str, Any] = {
            "input_token_logprobs": [self._triple(item.logprob, item.token_id) for item in prompt],
            "output_token_logprobs": [self._triple(item.logprob, item.token_id) for item in output],
            "output_token_logprobs_length": len(self.generation.logprobs),
        }
        if request.num_top_logprobs:
            info["input_top_logprobs"] = [self._alternatives(item, item.top) for item in prompt]
            info["output_top_logprobs"] = [self._alternatives(item, item.top) for item in rich]
        if request.logprob_token_ids:
            info["input_token_ids_logprobs"] = [self._alternatives(item, item.chosen) for item in prompt]
            info["output_token_ids_logprobs"] = [self._alternatives(item, item.chosen) for item in rich]
        return info

    def _alternatives(self, item: TokenLogprobs, entries: list[tuple[float, int]]) -> list[LogprobTriple] | None:
        """None where nothing predicts the position: the first token of a prompt."""
        return None if item.logprob is None else [self._triple(logprob, token_id) for logprob, token_id in entries]

    def _triple(self, logprob: float | None, token_id: int) -> LogprobTriple:
        if self._tokenizer is None or not self._shows_token_texts:
            return (logprob, token_id, None)
        return (logprob, token_id, self._tokenizer.token_text(token_id))


def cached_details(cached: int, loaded: int, host: int) -> dict[str, Any]:
    """Where so many cached tokens were, of which `loaded` came from disk and `host` from the host's memory below a
    device's: SGLang's names of tiers."""
    details: dict[str, Any] = {"device": cached - loaded - host, "host": host}
    return {**details, "storage": loaded, "storage_backend": "file"} if loaded else details


def native_answers(
    generations: Sequence[Generation],
    tokenizer: Tokenizer | None,
    config: EngineConfig,
    *,
    is_single: bool,
    shows_token_texts: bool = False,
    shows_prompt_ids: bool = False,
    reasoning: WireFormat | None = None,
    messages: WireFormat | None = None,
    on_end: Callable[[Generation], None] = lambda _: None,
    inquiries: Sequence[Inquiry] | None = None,
) -> list[NativeAnswer]:
    """One for each sequence of a call. is_single: of a single prompt, whose chunks have no index. messages: of a call
    of conversations, the format by which their answers are read; on_end: called of each of those that has been.
    inquiries: one for each sequence, where reports are wanted."""
    return [
        NativeAnswer(
            generation,
            tokenizer,
            index=None if is_single else index,
            stream_interval=config.stream_interval,
            incremental=config.incremental_streaming_output,
            shows_token_texts=shows_token_texts,
            shows_prompt_ids=shows_prompt_ids,
            reasoning=reasoning,
            inquiry=None if inquiries is None else inquiries[index],
            message=(
                None if messages is None or tokenizer is None else ChatMessage(generation, messages, tokenizer, on_end)
            ),
        )
        for index, generation in enumerate(generations)
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


def model_info(config: EngineConfig, facts: EngineFacts, wire_format: WireFormat) -> dict[str, Any]:
    """Which model is served: None and False stand for what this engine does not have."""
    return {
        "model_path": config.model_path,
        "tokenizer_path": config.tokenizer_path or config.model_path,
        "served_model_name": config.served_model_name or config.model_path,
        "is_generation": True,
        "preferred_sampling_params": config.preferred_sampling_params,
        "weight_version": WEIGHT_VERSION,
        "load_format": config.load_format,
        "reasoning_parser": wire_format.name,
        "tool_call_parser": None if wire_format.calls is None else wire_format.calls.name,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "architectures": [facts.architecture],
        "max_model_len": facts.context_length,
    }
