"""The arguments of one `generate` call, checked and turned into engine requests.

Owns the input rules: single or batch, text or ids, values for all or one per item, `n` samples, request ids, and that a
prompt fits the context. Everything is checked before anything is submitted. Never runs a request.

`n` > 1 needs no hidden request that fills the cache first: all samples are submitted together, the scheduler computes
their common prompt once and lets the others wait for it.
"""

from __future__ import annotations

import hashlib
import operator
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mooli.errors import ContextLengthError, PromptError, RequestError
from mooli.frontend.retention import parse_pins, parse_sessions
from mooli.frontend.sampling import parse_sampling_params, sample_params
from mooli.frontend.text_memory import TextMemory
from mooli.frontend.unsupported import Api, refuse_unsupported
from mooli.types import Request, SamplingParams

MAX_TOP_LOGPROBS = 128
MAX_LOGPROB_TOKEN_IDS = 1024
MAX_RID_CHARS = 256
MAX_PRIORITY = 2**31 - 1
MAX_SALT_CHARS = 4096


Ids = list[int] | NDArray[np.int32]
"""Token ids on their way to a request: those of a long prompt are best not made Python's numbers."""


class Encoder(Protocol):
    """What of a tokenizer is needed here."""

    def encode(self, text: str) -> list[int]: ...

    def least_tokens(self, text: str) -> int:
        """A number of ids that `encode` gives at least, found without the work of `encode`."""
        ...


@dataclass(frozen=True)
class GenerateCall:
    """The arguments of one call, in SGLang's order; whoever makes one may have given values of other types.

    prompt: text or a list of texts; input_ids instead: token ids, or a list of lists of them.
    sampling_params: a dict for all prompts or a list with one for each.
    return_logprob: add log-probabilities of the output, and of the prompt from `logprob_start_len` on (-1: none),
        with `top_logprobs_num` alternatives and those of `token_ids_logprob` at each position.
    require_reasoning: count the tokens of reasoning in `meta_info`; the text is told as it is.
    stream: whether the answer is read while it grows.
    rid: id of the request, or one for each; drawn if not given. priority: larger goes first, where
        `enable_priority_scheduling` is set.
    cache_salt: requests share cached prefixes only with requests of the same salt.
    no_store: nothing of prompt and answer is kept on disk (`kv_cache_dir`).
    return_cache_report: say in `meta_info` how much of the prompt was in the cache, and why no more.
    session_id: of which conversation it is a turn: what of the turn before is not in this one may leave the cache
        first. pin: keep the prompt in the cache for a time, {"seconds": 300} or {"ttl": "5m"}, with "weight" and, for
        its beginning alone, "tokens"; or a list of those. Advice, see docs/cache.md.

    All others are for what Mooli does not have, and refused unless they have their default
    (`mooli.frontend.unsupported`).
    """

    prompt: str | Sequence[str] | None = None
    sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None
    input_ids: Sequence[int] | Sequence[Sequence[int]] | Sequence[int | Sequence[int]] | NDArray[Any] | None = None
    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None
    mm_hashes: Any = None
    mm_content_hashes: Any = None
    return_logprob: bool | Sequence[bool] = False
    logprob_start_len: int | Sequence[int | None] | None = None
    top_logprobs_num: int | Sequence[int | None] | None = None
    token_ids_logprob: Sequence[int] | Sequence[Sequence[int]] | Sequence[int | Sequence[int] | None] | None = None
    lora_path: Any = None
    custom_logit_processor: Any = None
    require_reasoning: bool = False
    return_hidden_states: bool = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    stream: bool = False
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    routed_dp_rank: Any = None
    disagg_prefill_dp_rank: Any = None
    kv_hints: Any = None
    data_parallel_rank: Any = None
    external_trace_header: Any = None
    rid: str | Sequence[str] | None = None
    session_params: Any = None
    priority: int | None = None
    session_id: Any = None
    cache_salt: str | None = field(default=None, kw_only=True)
    no_store: bool = field(default=False, kw_only=True)
    return_cache_report: bool = field(default=False, kw_only=True)
    pin: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Caller:
    """client: whose call it is, for its fair share of the queue. tenant: calls of different tenants share no cached
    prefix, whatever their salts. is_background: nobody waits for its answer, and nobody is to wait for it. no_store:
    nothing of it is to be kept."""

    client: str = ""
    tenant: str = ""
    is_background: bool = False
    no_store: bool = False


NOBODY = Caller()


@dataclass(frozen=True, slots=True)
class CallInputs:
    """Requests of one call, grouped by prompt (p0s0, p0s1, p1s0, …). is_single: one dict is returned, not a list."""

    requests: list[Request]
    is_single: bool
    is_stream: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRules:
    """What every call to one engine has in common.

    encoder: None if the engine has no tokenizer. texts: long ones that were tokenised before. context_length: most
    tokens of prompt and answer together. namespace: of requests without a salt. preferred: sampling parameters laid
    under each request's. next_seed: seeds for requests that bring none. max_sequences: prompts times `n` of one call;
    more are refused before anything is done for them. max_stop_chars: of all stop strings of one call, those of each
    sequence counted. has_reasoning: it is known how the model marks its reasoning.
    """

    encoder: Encoder | None
    vocab_size: int
    context_length: int
    eos_ids: frozenset[int]
    namespace: str
    next_seed: Callable[[], int]
    preferred: Mapping[str, Any]
    allow_auto_truncate: bool = False
    max_sequences: int = sys.maxsize
    max_stop_chars: int = sys.maxsize
    has_reasoning: bool = False
    texts: TextMemory | None = None

    def prepare(self, call: GenerateCall, caller: Caller = NOBODY) -> CallInputs:
        """Its requests.

        Raises PromptError for a prompt that cannot be served, SamplingParamsError for a bad sampling value,
        RequestError for anything else that is wrong with the call.
        """
        refuse_unsupported(vars(call), Api.ENGINE)
        self._check_reasoning(call.require_reasoning)
        if not isinstance(call.stream, bool):
            raise RequestError(f"stream must be True or False, not {call.stream!r}")
        if not isinstance(call.no_store, bool):
            raise RequestError(f"no_store must be True or False, not {call.no_store!r}", argument="no_store")
        if not isinstance(call.return_cache_report, bool):
            raise RequestError(
                f"return_cache_report must be True or False, not {call.return_cache_report!r}",
                argument="return_cache_report",
            )
        namespace = self.namespace_of(call.cache_salt, caller.tenant)
        prompts, is_batch = self._prompts(call.prompt, call.input_ids, None if caller.is_background else namespace)
        size = len(prompts)
        given = _per_item("sampling_params", call.sampling_params, size, is_batch)
        explicit = [isinstance(item, Mapping) and item.get("max_new_tokens") is not None for item in given]
        params = self._sampling(given)
        n = params[0].n
        if any(item.n != n for item in params):
            raise RequestError("n must be the same in all sampling_params of a batch", argument="n")
        self._check_count(size * n)
        self._check_stop_chars(n * sum(len(text) for item in params for text in item.stop))
        if self.encoder is None and any(item.stop for item in params):
            raise RequestError(
                "stop needs a tokenizer, and there is none here: use stop_token_ids",
                argument="stop",
                advice="(skip_tokenizer_init=True leaves it out)",
            )
        rows = _logprob_rows(call, size, is_batch, n)
        chosen = self._chosen_ids(rows)
        rank = 0 if call.priority is None else _index("priority", call.priority)
        if not -MAX_PRIORITY <= rank <= MAX_PRIORITY:
            raise RequestError(
                f"priority={str(rank)[:80]} is outside {-MAX_PRIORITY} … {MAX_PRIORITY}", argument="priority"
            )
        pins, sessions = parse_pins(call.pin, rank), parse_sessions(call.session_id, size, n)
        rids = _rids(call.rid, size, n, is_batch)
        requests = []
        for i in range(size):
            where = f"prompt {i}: " if is_batch else ""
            ids, item = self._fit(prompts[i], params[i], explicit[i], i if is_batch else None)
            options = self._logprob_options(rows[i], chosen[i], len(ids), where)
            for j in range(n):
                request = Request(
                    rid=rids[i * n + j],
                    prompt_ids=ids,
                    sampling=sample_params(item, j),
                    eos_ids=self.eos_ids,
                    namespace=namespace,
                    priority=rank,
                    client=caller.client,
                    is_background=caller.is_background,
                    no_store=call.no_store or caller.no_store,
                    wants_cache_end=call.return_cache_report,
                    pins=pins,
                    session=sessions[i],
                    **options,
                )
                requests.append(request)
        return CallInputs(requests, is_single=not is_batch and n == 1, is_stream=call.stream)

    def _check_reasoning(self, required: bool) -> None:
        if not isinstance(required, bool):
            raise RequestError(
                f"require_reasoning must be True or False, not {required!r}", argument="require_reasoning"
            )
        if required and not self.has_reasoning:
            raise RequestError(
                "require_reasoning=True, but nothing is known of reasoning in this model's answers: leave it out",
                argument="require_reasoning",
                advice="(or start with reasoning_parser)",
            )

    def _sampling(self, given: Sequence[Any]) -> list[SamplingParams]:
        """Checked parameters. Neighbours that were given as one object are looked at once, and share what is long."""
        params: list[SamplingParams] = []
        num_drawn = 0

        def draw() -> int:
            nonlocal num_drawn
            num_drawn += 1
            return self.next_seed()

        for i, item in enumerate(given):
            if i == 0 or item is not given[i - 1]:
                num_drawn = 0
                params.append(
                    parse_sampling_params(item, vocab_size=self.vocab_size, next_seed=draw, preferred=self.preferred)
                )
            else:
                params.append(replace(params[-1], seed=draw()) if num_drawn else params[-1])
        return params

    def check_length(self, text: str, index: int | None = None) -> None:
        """Raise ContextLengthError for a text that is certainly too long; far cheaper than to encode it.

        index: of the prompt in its batch.
        """
        if self.encoder is not None and not self.allow_auto_truncate:
            refuse_too_long(self.encoder, text, self.context_length, index)

    def _prompts(self, prompt: Any, input_ids: Any, owner: str | None) -> tuple[list[NDArray[np.int32]], bool]:
        """The prompts as ids, and whether the call is a batch."""
        if (prompt is None) == (input_ids is None):
            raise PromptError("give either prompt or input_ids" + ("" if prompt is None else ", not both"))
        if prompt is not None:
            is_batch = isinstance(prompt, (list, tuple))
            texts = list(prompt) if is_batch else [prompt]
            if not texts:
                raise PromptError("the list of prompts is empty", argument="prompt")
            self._check_count(len(texts))
            return [self._encode(text, i if is_batch else None, owner) for i, text in enumerate(texts)], is_batch
        is_array = isinstance(input_ids, np.ndarray) and input_ids.ndim > 0
        is_flat = is_array and input_ids.ndim == 1
        if not isinstance(input_ids, (list, tuple)) and not is_array:
            raise PromptError(
                f"input_ids must be a list of ids or a list of lists of ids, not {_type(input_ids)}",
                argument="input_ids",
            )
        is_batch = not is_flat and len(input_ids) > 0 and isinstance(input_ids[0], (list, tuple, np.ndarray))
        items = list(input_ids) if is_batch else [input_ids]
        self._check_count(len(items))
        return [self._check_ids(ids, i if is_batch else None) for i, ids in enumerate(items)], is_batch

    def _check_count(self, num_sequences: int) -> None:
        if num_sequences > self.max_sequences:
            raise RequestError(
                f"{num_sequences} sequences in one request are more than the {self.max_sequences} that are taken at"
                " once: send fewer prompts, or a smaller n"
            )

    def _check_stop_chars(self, num_chars: int) -> None:
        if num_chars > self.max_stop_chars:
            raise RequestError(
                f"stop has strings of {num_chars} characters in one request, each sequence's counted, more than the"
                f" {self.max_stop_chars} that are possible: give fewer or shorter ones, or fewer prompts at once",
                argument="stop",
            )

    def _encode(self, text: Any, index: int | None, owner: str | None) -> NDArray[np.int32]:
        where = "" if index is None else f"prompt {index}: "
        if self.encoder is None:
            raise PromptError(
                "a text needs a tokenizer, and there is none here: give input_ids",
                argument="prompt",
                advice="(skip_tokenizer_init=True leaves it out)",
            )
        if not isinstance(text, str):
            raise PromptError(
                f"{where}a prompt must be a str, not {_type(text)}; ids go into input_ids", argument="prompt"
            )
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise PromptError(f"{where}the prompt is not valid Unicode: {exc}", argument="prompt") from exc
        self.check_length(text, index)
        encode = self.encoder.encode if self.texts is None else self.texts.of(owner)
        ids = np.asarray(encode(text), dtype=np.int64)  # a vocabulary may have any id of 32 bits
        if not len(ids):
            raise PromptError(f"{where}the prompt is empty: there must be at least one token", argument="prompt")
        if ids.max() >= self.vocab_size:
            raise PromptError(f"{where}the tokenizer gave id {ids.max()}, but the model has {self.vocab_size} tokens")
        return ids.astype(np.int32)

    def _check_ids(self, ids: Any, index: int | None) -> NDArray[np.int32]:
        where = "" if index is None else f"prompt {index}: "
        if not isinstance(ids, (list, tuple, np.ndarray)) or (isinstance(ids, np.ndarray) and ids.ndim == 0):
            raise PromptError(f"{where}input_ids must be a list of ids, not {_type(ids)}", argument="input_ids")
        if not len(ids):
            raise PromptError(f"{where}input_ids is empty: there must be at least one token", argument="input_ids")
        # As nearly always: to look at one id after the other takes ten times as long.
        if isinstance(ids, list) and set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < self.vocab_size:
            return np.array(ids, dtype=np.int32)
        numbers = ids if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" and ids.ndim == 1 else None
        if numbers is not None and numbers.min() >= 0 and numbers.max() < self.vocab_size:
            return numbers.astype(np.int32)
        checked = np.empty(len(ids), dtype=np.int32)
        for position, token_id in enumerate(ids):
            try:
                number = -1 if isinstance(token_id, (bool, np.bool_)) else operator.index(token_id)
            except TypeError:
                number = -1
            if not 0 <= number < self.vocab_size:
                raise PromptError(
                    f"{where}input_ids[{position}] is {str(token_id)[:80]}, not an id of 0 … {self.vocab_size - 1}",
                    argument="input_ids",
                )
            checked[position] = number
        return checked

    def _fit(
        self, ids: NDArray[np.int32], params: SamplingParams, explicit: bool, index: int | None
    ) -> tuple[NDArray[np.int32], SamplingParams]:
        """The prompt and its parameters, fitted to the context.

        An unset `max_new_tokens` takes what the context leaves. One that the request names is refused, or cut with
        `allow_auto_truncate`.
        """
        where = "" if index is None else f"prompt {index}: "
        if len(ids) >= self.context_length:
            if not self.allow_auto_truncate:
                raise _too_long(f"{len(ids)} tokens", len(ids), self.context_length, index)
            ids = ids[: self.context_length - 1]
        room = self.context_length - len(ids)
        wanted = params.max_new_tokens
        if wanted is None or wanted <= room:
            return ids, params
        if explicit and not self.allow_auto_truncate:
            raise ContextLengthError(
                f"{where}the prompt has {len(ids)} tokens and max_new_tokens is {wanted}, together more than the"
                f" context length of {self.context_length}. Set max_new_tokens to at most {room}, or leave it out.",
                prompt_tokens=len(ids),
                context_length=self.context_length,
                max_new_tokens=wanted,
                prompt_index=index,
            )
        return ids, replace(params, max_new_tokens=room, min_new_tokens=min(params.min_new_tokens, room))

    def _chosen_ids(self, rows: Sequence[dict[str, Any]]) -> list[tuple[int, ...]]:
        """The checked `token_ids_logprob` of each item, one list for all looked at once."""
        chosen: list[tuple[int, ...]] = []
        last: Any = None
        for i, row in enumerate(rows):
            ids = row["token_ids_logprob"]
            if i == 0 or ids is not last:
                where = f"prompt {i}: " if len(rows) > 1 else ""
                chosen.append(self._checked_logprob_ids(() if ids is None else ids, where))
            else:
                chosen.append(chosen[-1])
            last = ids
        return chosen

    def _checked_logprob_ids(self, ids: Any, where: str) -> tuple[int, ...]:
        if not isinstance(ids, (list, tuple)):
            raise RequestError(
                f"{where}token_ids_logprob must be a list of ids, not {_type(ids)}", argument="token_ids_logprob"
            )
        if len(ids) > MAX_LOGPROB_TOKEN_IDS:
            raise RequestError(
                f"{where}token_ids_logprob has {len(ids)} ids; at most {MAX_LOGPROB_TOKEN_IDS} are possible",
                argument="token_ids_logprob",
            )
        for token_id in ids:
            if not 0 <= _index("token_ids_logprob", token_id) < self.vocab_size:
                raise RequestError(
                    f"{where}token_ids_logprob has {token_id}, not an id of 0 … {self.vocab_size - 1}",
                    argument="token_ids_logprob",
                )
        return tuple(int(token_id) for token_id in ids)

    def _logprob_options(
        self, row: dict[str, Any], chosen: tuple[int, ...], prompt_length: int, where: str
    ) -> dict[str, Any]:
        """Fields of `Request` for one item's log-probability arguments."""
        wanted = row["return_logprob"]
        if not isinstance(wanted, bool):
            raise RequestError(f"{where}return_logprob must be True or False, not {wanted!r}")
        start = -1 if row["logprob_start_len"] is None else _index("logprob_start_len", row["logprob_start_len"])
        num_top = 0 if row["top_logprobs_num"] is None else _index("top_logprobs_num", row["top_logprobs_num"])
        if not wanted:
            if start != -1 or num_top or chosen:
                raise RequestError(
                    f"{where}log-probability arguments have no effect without return_logprob", argument="return_logprob"
                )
            return {}
        if not -1 <= start < prompt_length:
            raise RequestError(
                f"{where}logprob_start_len={start} is outside -1 … {prompt_length - 1}, the prompt's tokens",
                argument="logprob_start_len",
            )
        if not 0 <= num_top <= min(MAX_TOP_LOGPROBS, self.vocab_size):
            raise RequestError(
                f"{where}top_logprobs_num={num_top} is outside 0 … {min(MAX_TOP_LOGPROBS, self.vocab_size)}",
                argument="top_logprobs_num",
            )
        return {
            "return_logprob": True,
            "logprob_start": None if start == -1 else start,
            "num_top_logprobs": num_top,
            "logprob_token_ids": chosen,
        }

    def namespace_of(self, salt: Any, tenant: str = "") -> str:
        """What of the cache a call with this salt shares; of equal length whatever the salt: it stays in the engine
        with its pages. Raises RequestError."""
        if salt is not None and not isinstance(salt, str):
            raise RequestError(f"cache_salt must be a str, not {_type(salt)}", argument="cache_salt")
        if not salt and not tenant:
            return self.namespace
        if salt and len(salt) > MAX_SALT_CHARS:
            raise RequestError(
                f"cache_salt has {len(salt)} characters; at most {MAX_SALT_CHARS} are possible", argument="cache_salt"
            )
        parts = (tenant, salt or "")
        digest = hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode("utf-8", "surrogatepass"))
        return f"{self.namespace}/{digest.hexdigest()}"


def refuse_too_long(encoder: Encoder, text: str, context_length: int, index: int | None = None) -> None:
    """Raise ContextLengthError for a text that no context of this length can hold, before the work of encoding it.

    index: of the prompt in its batch.
    """
    least = encoder.least_tokens(text)
    if least >= context_length:
        size = f"{len(text)} characters, which are at least {least} tokens,"
        raise _too_long(size, least, context_length, index, is_estimate=True)


def _too_long(
    size: str, num_tokens: int, context_length: int, index: int | None, *, is_estimate: bool = False
) -> ContextLengthError:
    where = "" if index is None else f"prompt {index}: "
    return ContextLengthError(
        f"{where}the prompt has {size} and the context length is {context_length}: at most {context_length - 1} are"
        " possible. Shorten it.",
        advice="Or start the engine with a larger context_length (or max_total_tokens) if model and memory allow, or"
        " set allow_auto_truncate=True.",
        prompt_tokens=num_tokens,
        is_estimate=is_estimate,
        context_length=context_length,
        prompt_index=index,
    )


def _per_item(name: str, value: Any, size: int, is_batch: bool) -> list[Any]:
    """One value for each item: a list is taken item by item, anything else holds for all."""
    if not isinstance(value, (list, tuple)):
        return [value] * size
    if not is_batch:
        raise RequestError(f"{name} is a list, but there is one prompt: give a single value", argument=name)
    if len(value) != size:
        raise RequestError(f"{name} has {len(value)} entries for {size} prompts", argument=name)
    return [*value]


_LOGPROB_ARGUMENTS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob")


def _logprob_rows(call: GenerateCall, size: int, is_batch: bool, n: int) -> list[dict[str, Any]]:
    """The log-probability arguments of each item."""
    columns: dict[str, list[Any]] = {}
    for name in _LOGPROB_ARGUMENTS:
        value: Any = getattr(call, name)
        if name == "token_ids_logprob":
            if value is not None and not isinstance(value, (list, tuple)):
                raise RequestError(
                    f"token_ids_logprob must be a list of ids, not {_type(value)}", argument="token_ids_logprob"
                )
            # A flat list of ids holds for all items.
            is_per_item = any(item is None or isinstance(item, (list, tuple)) for item in value or ())
        else:
            is_per_item = isinstance(value, (list, tuple))
        if is_per_item and n > 1:
            raise RequestError(f"{name} cannot be a list together with n={n}: give one value for all", argument=name)
        columns[name] = _per_item(name, value, size, is_batch) if is_per_item else [value] * size
    return [{name: column[i] for name, column in columns.items()} for i in range(size)]


def _rids(rid: Any, size: int, n: int, is_batch: bool) -> list[str]:
    """An id for each request: as given, `rid_0`, `rid_1`, … where one was given for several, or drawn."""
    if rid is None:
        return [uuid.uuid4().hex for _ in range(size * n)]
    if isinstance(rid, (list, tuple)):
        names = _per_item("rid", rid, size, is_batch)
    else:
        names = [f"{rid}_{i}" for i in range(size)] if is_batch and isinstance(rid, str) else [rid] * size
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_RID_CHARS:
            raise RequestError(
                f"rid must be a text of 1 … {MAX_RID_CHARS} characters, not {str(name)[:80]!r}", argument="rid"
            )
    if n > 1:
        names = [f"{name}_{j}" for name in names for j in range(n)]
    if len(set(names)) != len(names):
        raise RequestError("rid has the same id twice: every request needs its own", argument="rid")
    return names


def _index(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise RequestError(
            f"{name} must be a whole number, not {str(value)[:80]!r} of type {_type(value)}", argument=name
        ) from None


def _type(value: Any) -> str:
    return type(value).__name__
