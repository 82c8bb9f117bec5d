"""Sampling parameters as users write them, checked and turned into `SamplingParams`.

Owns the names, defaults and limits of `sampling_params`. Never looks at a prompt: whether `max_new_tokens` fits the
context is `mooli.frontend.inputs`' question.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, get_args

from mooli.errors import GrammarError, SamplingParamsError, UnknownSamplingParamError
from mooli.frontend.unsupported import Api, asked, names_of
from mooli.types import TOP_K_ALL, Calls, Grammar, GrammarKind, Reasoning, SamplingParams, ThinkingBudget

MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 4096
"""Length of one stop string: text that could begin one is held back, so it must end."""

MAX_SAMPLES = 128
"""Largest `n`."""

MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 1024
"""Entries of the two: each is looked at in every step."""

GREEDY_BELOW = 1e-6
"""A temperature below this is greedy; dividing logits by it would overflow."""

FLAT_ABOVE = 1e6
"""A temperature above this samples as evenly as this one does; far above it would not be a float32."""

HARSH_BELOW = 1e-6
"""A repetition penalty below this is as this one; dividing logits by it would overflow."""

MAX_GRAMMAR_CHARS = {"json_schema": 1 << 19, "regex": 1 << 16, "ebnf": 1 << 16, "structural_tag": 1 << 19}
MAX_GRAMMAR_DEPTH = 128
"""How deep arrays and objects may lie in each other."""

GRAMMARS: tuple[GrammarKind, ...] = get_args(GrammarKind)
"""Names of parameters: at most one says what the whole output is."""

CALLS, REASONING = "calls", "reasoning_ahead"
"""Parameters that no user writes: `mooli.types.Calls`, and `mooli.types.Reasoning` or None, both made by
`mooli.frontend.tool_forcing`."""

_MADE_OF = ("grammar", "thinking")
"""Fields that are made of parameters of other names."""

_DEFAULTS: dict[str, Any] = {
    item.name: item.default
    for item in fields(SamplingParams)
    if item.default is not MISSING and item.name not in _MADE_OF
}
_INT64 = 2**63
_OTHER_ENGINES = {
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "repeat_penalty": "repetition_penalty",
    "do_sample": "temperature",
    "num_return_sequences": "n",
}
_NAMES = (*_DEFAULTS, *GRAMMARS, "max_thinking_tokens", "sampling_seed", *names_of(Api.SAMPLING))


def parse_sampling_params(
    params: Mapping[str, Any] | None,
    *,
    vocab_size: int,
    next_seed: Callable[[], int],
    preferred: Mapping[str, Any] | None = None,
) -> SamplingParams:
    """Check `params` and fill in defaults; `preferred` is laid under them.

    None for a parameter means its default, except for `max_new_tokens`, where it means no limit but the context.
    `next_seed` is called only where no seed is given.

    Raises UnknownSamplingParamError (a TypeError too) for a name that does not exist, SamplingParamsError for a value
    that is of the wrong type, out of range, or asks for what is not implemented, GrammarError for a schema or grammar
    that is no JSON, too long or too deep. What else is wrong with one is found where it is compiled.
    """
    if params is not None and not isinstance(params, Mapping):
        raise SamplingParamsError(f"sampling_params must be a dict, got {params!r} of type {type(params).__name__}")
    given = {**(preferred or {}), **(params or {})}
    for name, value in given.items():
        _check_name(name, value)
    values = {name: given[name] for name in _DEFAULTS if given.get(name) is not None}
    result = dict(_DEFAULTS)
    if "max_new_tokens" in given:
        result["max_new_tokens"] = None
    for name, value in values.items():
        if name not in ("stop", "stop_token_ids", "logit_bias", "seed"):
            result[name] = _CHECKS[name](name, value)
    result["stop"] = _stop_strings(values.get("stop"))
    result["stop_token_ids"] = frozenset(_token_ids("stop_token_ids", values.get("stop_token_ids", ()), vocab_size))
    result["logit_bias"] = _logit_bias(values.get("logit_bias") or {}, vocab_size)
    result["grammar"] = _grammar(given)
    result["thinking"] = _thinking(given)
    seed = _seed(given.get("seed"), given.get("sampling_seed"))
    result["seed"] = next_seed() if seed is None else seed
    if result["temperature"] < GREEDY_BELOW:
        result["temperature"] = 0.0
    result["temperature"] = min(result["temperature"], FLAT_ABOVE)
    result["repetition_penalty"] = max(result["repetition_penalty"], HARSH_BELOW)
    if result["top_k"] >= vocab_size:
        result["top_k"] = TOP_K_ALL
    longest = result["max_new_tokens"]
    if longest is not None and result["min_new_tokens"] > longest:
        message = f"min_new_tokens={result['min_new_tokens']} is more than max_new_tokens={longest}"
        raise _refused("min_new_tokens", message)
    return SamplingParams(**result)


def sample_params(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of sample `index` of `n`: the same but for the seed. Sample 0 keeps the seed itself.

    The others' seeds are mixed from (seed, index), so that samples differ and each can be had again.
    """
    return params if index == 0 else replace(params, seed=_mix(params.seed, index))


def _mix(seed: int, index: int) -> int:
    """SplitMix64's finaliser over the seed and a multiple of its increment (Steele, Lea, Flood 2014)."""
    mask = 2**64 - 1
    value = (seed + index * 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def _check_name(name: Any, value: Any) -> None:
    if asked({name: value}, Api.SAMPLING):
        raise _refused(name, f"{name} is not supported yet: remove {name}={_short(value)}")
    if name in _NAMES or (name in (CALLS, REASONING) and (value is None or isinstance(value, (Calls, Reasoning)))):
        return
    close = _OTHER_ENGINES.get(name) or next(iter(difflib.get_close_matches(str(name), _NAMES, n=1)), None)
    hint = f"did you mean {close}?" if close else f"there are: {', '.join(sorted(_NAMES))}"
    raise UnknownSamplingParamError(f"there is no sampling parameter {name!r}; {hint}", argument="sampling_params")


def _number(low: float, high: float = math.inf, *, above_low: bool = False) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if isinstance(value, (bool, str, bytes)):
            raise _wrong_type(name, value, "a number")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as exc:
            raise _wrong_type(name, value, "a finite number") from exc
        inside = low < number <= high if above_low else low <= number <= high
        if not math.isfinite(number) or not inside:
            opening = "(" if above_low else "["
            closing = "inf)" if high == math.inf else f"{high}]"
            raise _refused(name, f"{name}={_short(value)} is outside {opening}{low}, {closing}")
        return number

    return check


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        number = _index(name, value)
        if not low <= number <= high:
            raise _refused(name, f"{name}={number} is outside {low} … {high}")
        return number

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, value, "true or false")
    return value


def _top_k(name: str, value: Any) -> int:
    number = _index(name, value)
    if number != TOP_K_ALL and number < 1:
        raise _refused(name, f"top_k={number} must be -1 (the whole vocabulary) or at least 1")
    return number


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": _integer(0, _INT64 - 1),
    "min_new_tokens": _integer(0, _INT64 - 1),
    "temperature": _number(0.0),
    "top_k": _top_k,
    "top_p": _number(0.0, 1.0, above_low=True),
    "min_p": _number(0.0, 1.0),
    "frequency_penalty": _number(-2.0, 2.0),
    "presence_penalty": _number(-2.0, 2.0),
    "repetition_penalty": _number(0.0, 2.0, above_low=True),
    "ignore_eos": _flag,
    "n": _integer(1, MAX_SAMPLES),
    "skip_special_tokens": _flag,
    "spaces_between_special_tokens": _flag,
    "no_stop_trim": _flag,
    "stream_interval": _integer(1, _INT64 - 1),
}


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if strings is None:
        return ()
    if not isinstance(strings, (list, tuple)) or not all(isinstance(text, str) for text in strings):
        raise _wrong_type("stop", value, "a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise _refused("stop", f"stop has {len(strings)} strings; at most {MAX_STOP_STRINGS} are possible")
    for text in strings:
        if not 0 < len(text) <= MAX_STOP_CHARS:
            message = f"stop has a string of {len(text)} characters; 1 … {MAX_STOP_CHARS} are possible"
            raise _refused("stop", message)
    return tuple(strings)


def _token_ids(name: str, value: Any, vocab_size: int) -> list[int]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _wrong_type(name, value, "a list of token ids")
    ids = [_index(name, token_id) for token_id in value]
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise _refused(name, f"{name} has {len(ids)} ids; at most {MAX_STOP_TOKEN_IDS} are possible")
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise _refused(name, f"{name} has id {token_id}, outside the vocabulary of {vocab_size} tokens")
    return ids


def _logit_bias(value: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, Mapping):
        raise _wrong_type("logit_bias", value, "an object of token id to number")
    if len(value) > MAX_LOGIT_BIAS:
        raise _refused("logit_bias", f"logit_bias has {len(value)} entries; at most {MAX_LOGIT_BIAS} are possible")
    result: dict[int, float] = {}
    for key, bias in value.items():
        try:
            token_id = int(key) if isinstance(key, str) else operator.index(key)  # JSON has string keys only
        except (TypeError, ValueError) as exc:
            raise _refused("logit_bias", f"a key of logit_bias must be a token id, not {_short(key)}") from exc
        if not 0 <= token_id < vocab_size:
            raise _refused("logit_bias", f"logit_bias has id {token_id}, outside the vocabulary of {vocab_size} tokens")
        result[token_id] = _number(-1e9, 1e9)(f"logit_bias[{token_id}]", bias)
    return tuple(result.items())


def _grammar(given: Mapping[str, Any]) -> Grammar | None:
    """From the one of GRAMMARS that is given, and calls. A schema or a tag may be an object or its text."""
    named = [name for name in GRAMMARS if given.get(name) is not None and given[name] != ""]
    calls: Calls | None = given.get(CALLS)
    reasoning: Reasoning | None = given.get(REASONING)
    if not named:
        return None if calls is None else Grammar("calls", "", calls, reasoning_before(calls, reasoning))
    kind = named[0]
    if len(named) > 1:
        raise GrammarError(f"{' and '.join(named)} are given: at most one is possible", argument=named[1])
    if calls is not None and calls.is_forced:
        message = f"{kind} is given, and a tool must be called: an answer cannot be both. Leave one out"
        raise GrammarError(message, argument=kind)
    text = given[kind]
    is_json = kind in ("json_schema", "structural_tag")
    if is_json and isinstance(text, (Mapping, bool)):
        try:
            text = json.dumps(text)
        except (TypeError, ValueError, RecursionError) as exc:
            raise GrammarError(f"{kind} cannot be written as JSON: {exc}", argument=kind) from exc
    if not isinstance(text, str):
        wanted = "an object or its JSON" if is_json else "a text"
        raise GrammarError(f"{kind} must be {wanted}, not {_short(text)}", argument=kind)
    if kind == "json_schema" and text == "$$ANY$$":  # SGLang's word for any object
        text = '{"type": "object"}'
    if len(text) > MAX_GRAMMAR_CHARS[kind]:
        message = f"{kind} has {len(text)} characters; at most {MAX_GRAMMAR_CHARS[kind]} are possible"
        raise GrammarError(message, argument=kind)
    if "\0" in text:
        raise GrammarError(f"{kind} has a NUL character: leave it out", argument=kind)
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise GrammarError(f"{kind} is not valid Unicode: {exc}", argument=kind) from exc
    if is_json:
        _check_json(kind, text)
    return Grammar(kind, text, calls, reasoning)


def reasoning_before(calls: Calls, reasoning: Reasoning | None) -> Reasoning | None:
    """What calls need to know of the reasoning before them, where there is no other grammar."""
    is_asked = calls.is_forced or (reasoning is not None and not reasoning.calls_end_it)
    # Where a call is free the reasoning before it is, and one begun in reasoning may be one all the same.
    return reasoning if is_asked else None


def _thinking(given: Mapping[str, Any]) -> ThinkingBudget | None:
    """From `max_thinking_tokens`, or what SGLang reads of `custom_params`. -1 is no limit, as in vLLM."""
    name, value = "max_thinking_tokens", given.get("max_thinking_tokens")
    custom = given.get("custom_params")
    if value is None and isinstance(custom, Mapping):
        name, value = "custom_params.thinking_budget", custom.get("thinking_budget")
    if value is None:
        return None
    number = _integer(-1, _INT64 - 1)(name, value)
    reasoning: Reasoning | None = given.get(REASONING)
    is_over = REASONING in given and reasoning is None
    return None if number < 0 or is_over else ThinkingBudget(number, reasoning)


def _check_json(kind: str, text: str) -> None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise GrammarError(f"{kind} is not valid JSON: {exc}", argument=kind) from exc
    if not isinstance(value, (dict, bool)):
        raise GrammarError(f"{kind} must be an object, not {_short(value)}", argument=kind)
    level = [value]
    for _ in range(MAX_GRAMMAR_DEPTH):
        level = [item for node in level if isinstance(node, (dict, list)) for item in _items(node)]
        if not level:
            return
    raise GrammarError(f"{kind} is deeper than {MAX_GRAMMAR_DEPTH} levels: use $defs and $ref", argument=kind)


def _items(node: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def _seed(seed: Any, sampling_seed: Any) -> int | None:
    """The seed as an unsigned 64-bit number, from either of its names."""
    if seed is None and sampling_seed is None:
        return None
    name, value = ("seed", seed) if sampling_seed is None else ("sampling_seed", sampling_seed)
    if seed is not None and sampling_seed is not None and seed != sampling_seed:
        raise _refused("seed", f"seed={seed!r} and sampling_seed={sampling_seed!r} differ: give one")
    return _integer(-_INT64, _INT64 - 1)(name, value) % 2**64


def _index(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise _wrong_type(name, value, "a whole number")
    try:
        return operator.index(value)
    except TypeError as exc:
        raise _wrong_type(name, value, "a whole number") from exc


def _wrong_type(name: str, value: Any, wanted: str) -> SamplingParamsError:
    return _refused(name, f"{name} must be {wanted}, not {_short(value)}")


def _refused(name: str, message: str) -> SamplingParamsError:
    """name: of the parameter, or of an entry such as logit_bias[5]."""
    return SamplingParamsError(message, argument=name.partition("[")[0])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
