"""What crosses between the text side and the engine: requests, outputs, finish reasons.

Owns plain data and its meaning. Never holds text, arrays of a device, or behaviour beyond validation-free conversion;
sampling values are validated where they enter (`mooli.frontend.sampling`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TOP_K_ALL = -1
"""`top_k` value that keeps the whole vocabulary."""


GrammarKind = Literal["json_schema", "regex", "ebnf", "structural_tag"]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The reasoning that an output begins with, as far as its prompt leaves it open. All are texts of the output.

    opening: what begins it. is_open: the prompt has begun it; where it has not, an output may go without reasoning.
    closing: what ends it, its first occurrence. again: with `opening` behind it, what begins more of it behind
    `closing`; "" where there is no more. words: what stands before what the output says then, calls excepted.
    calls_end_it: a call of a function that begins in it ends it; else what looks like one there are words of it.
    """

    opening: str
    closing: str
    is_open: bool
    again: str = ""
    words: str = ""
    calls_end_it: bool = True


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """After `max_tokens` tokens of reasoning its closing text comes, whatever the model would say; at once for 0.

    reasoning: None as long as nobody has looked how the prompt ends, or where there is none.
    """

    max_tokens: int
    reasoning: Reasoning | None = None


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls of functions that an output must be, or may be. It is written for one wire format and one set of functions.

    text: rules of llguidance's Lark: `calls` is an output that calls, and `calls_after_trigger` what follows where it
    has begun. is_forced: nothing but calls. triggers: texts that begin calls wherever they are, so that reasoning has
    none of them, and no other text where calls are not forced.
    """

    text: str
    is_forced: bool
    triggers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output must be: a language, as its user wrote it. Whether it is one is found where it is compiled.

    text: of a JSON schema, a regular expression, a grammar (Lark or GBNF), or a structural tag as JSON; "" of calls.
    calls: of the kind "calls", what the output is; of the others, what it may be instead. reasoning: what comes before;
    the output is held to the rest from where that ends, inside a token too.
    """

    kind: GrammarKind | Literal["calls"]
    text: str
    calls: Calls | None = None
    reasoning: Reasoning | None = None

    @property
    def argument(self) -> str:
        """What of a request says so."""
        return "tools" if self.kind == "calls" else self.kind


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """What a grammar must know of a vocabulary.

    tokens: the bytes of each id, b"" for one without a token. special_ids: those that stand for no text of an answer.
    eos_ids: of them, those that may end one. whole_ids: of the others, those that a tokenizer finds as wholes before it
    cuts a text.
    """

    tokens: list[bytes]
    special_ids: list[int]
    eos_ids: list[int]
    whole_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Values are already validated.

    temperature 0.0 means greedy. `seed` is always set by the time the scheduler sees it: a sampled token is a function
    of (logits, seed, position) alone, so batching can never change it.
    `stop` (strings) is the text side's business; the scheduler looks only at ids.
    grammar: what the whole output is; None for anything. thinking: how long it may reason; None for any length.
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = TOP_K_ALL
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    n: int = 1
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: int | None = None
    grammar: Grammar | None = None
    thinking: ThinkingBudget | None = None

    @property
    def needs_vocabulary(self) -> bool:
        """What bytes tokens stand for decides which may be sampled."""
        return self.grammar is not None or self.thinking is not None


FinishType = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class FinishReason:
    """Why a request ended. Every request gets exactly one.

    `matched` is the token id or stop string of a `stop`; `length` the number of tokens of a `length`;
    `message`, `status_code` and `err_type` belong to `abort` and `error`.
    """

    type: FinishType
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None
    err_type: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The `meta_info["finish_reason"]` shape of the public API."""
        if self.type == "stop":
            return {"type": "stop", "matched": self.matched}
        if self.type == "length":
            return {"type": "length", "length": self.length}
        return {
            "type": self.type,
            "message": self.message,
            "status_code": self.status_code,
            "err_type": self.err_type,
        }


FIRST_CONTENT_ID = 1 << 30
"""In `Request.key_ids`, ids from here to 2^31 are content's. No vocabulary is that large."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A wish: keep the first `num_tokens` of a prompt, None for all of it, for so long after the request that asks.

    It is advice. weight: of what is kept so, less goes before more where there is too much of it; from 1 on.
    """

    seconds: float
    weight: int = 1
    num_tokens: int | None = None


@dataclass(slots=True, kw_only=True)
class Request:
    """One sequence to generate, as the engine sees it.

    prompt_ids: int32, at least one token, all inside the vocabulary (checked by the text side).
    eos_ids: ids that end the sequence unless `sampling.ignore_eos`.
    logprob_start: first prompt index whose log-probability is wanted; None for no prompt log-probabilities.
        The entry at `logprob_start` itself is always null: it would need the token before it.
    num_top_logprobs: how many alternatives per position; `logprob_token_ids`: ids whose log-probability is wanted too.
    key_ids: int32 (prompt tokens,), what the cache knows the prompt by; None where that is its own ids. A token that
        stands for content (an image's placeholder) may have 30 bits of the content's digest there, from
        `FIRST_CONTENT_ID` on; every other has its own id. They are compared, and never computed with.
    namespace: requests of different namespaces never share cache pages (salt, adapter).
    priority: larger goes first, where priorities count (`enable_priority_scheduling`).
    client: whose it is, in the words of whoever took it in; the queue is shared fairly among clients. "" for nobody's.
    is_background: it has time, and others never wait for it longer than a step.
    no_store: nothing of it is to be kept outside the memory of the engine.
    wants_cache_end: it is to be told what the cache had instead of its own tokens, and since when not.
    pins: what of its prompt is to be kept longer than by its last use.
    session: of which conversation it is a turn, if it has a name; previous: the name under which the turn before went,
        if it was another. What of that is not in this turn is not to be kept.
    """

    rid: str
    prompt_ids: NDArray[np.int32]
    key_ids: NDArray[np.int32] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: frozenset[int] = frozenset()
    return_logprob: bool = False
    logprob_start: int | None = None
    num_top_logprobs: int = 0
    logprob_token_ids: tuple[int, ...] = ()
    namespace: str = ""
    priority: int = 0
    client: str = ""
    is_background: bool = False
    no_store: bool = False
    wants_cache_end: bool = False
    pins: tuple[Pin, ...] = ()
    session: str = ""
    previous: str = ""


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token itself and of the alternatives asked for.

    All are natural-log softmax of the model's own logits, before penalties, bias and temperature; of a token that was
    sampled under a constraint, of the logits that it allows alone: -inf for others, which are no alternatives.
    `logprob` is None for the first position of a prompt, which nothing predicts.
    """

    token_id: int
    logprob: float | None
    top: list[tuple[float, int]] = field(default_factory=list)
    chosen: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """How guessed tokens fared in one request so far.

    num_proposed: drafts verified. histogram: at i, the steps that continued the output and found i drafts right.
    """

    num_proposed: int
    histogram: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        return sum(self.histogram)

    @property
    def num_right(self) -> int:
        return sum(i * count for i, count in enumerate(self.histogram))


@dataclass(frozen=True, slots=True)
class CacheEnd:
    """Where a request ended in the cache when it first began to run, and why.

    reason: a value of `mooli.cache.kv_cache.MissReason`; None where all was there that may be. num_tokens: so many
    agree with what was there, of which `num_matched` were used. num_lost: so many more were known before. had: up to 16
    ids that were there instead, where it diverged. evicted_s, unused_s: seconds since what is lost was evicted, and for
    how long nobody had used it then; None where it was not.
    """

    reason: str | None
    num_tokens: int
    num_matched: int
    num_lost: int = 0
    had: tuple[int, ...] = ()
    evicted_s: float | None = None
    unused_s: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """What one step added to one request. Sent whenever there is something new; the last one has `finish`.

    new_token_ids: appended since the last output, a matched stop token included.
    prompt_logprobs: complete list, sent once, with the output that carries the first token (or the finish).
    cached_tokens: prompt tokens whose KV came from the tree at first admission. loaded_tokens: those of them that were
        loaded from disk for it, host_tokens those that were copied back from the host's memory. written_tokens: those
        computed, and kept for others.
    drafts: None where the engine guesses no tokens.
    cache_end: with the first output, if it ever began to run.
    """

    rid: str
    new_token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    num_preemptions: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    drafts: DraftCounts | None = None
    loaded_tokens: int = 0
    host_tokens: int = 0
    cache_end: CacheEnd | None = None
