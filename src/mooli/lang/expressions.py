"""What a program adds to its state, as plain data: text, generations, choices, and where messages begin and end.

Owns the functions with SGLang's names and arguments. Never runs anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from mooli.errors import ProgramError
from mooli.lang.choices import ChoicesMethod, token_length_normalized

INT, FLOAT, BOOL, STRING = r"[-+]?[0-9]+[ \n]?", r"[-+]?[0-9]*\.?[0-9]+[ \n]?", r"(True|False)", r'"[\w\d\s]*"'
"""What answers of a `dtype` are held to."""


class Expression:
    """Something that can be added to a state, and put together with `+`."""

    def __add__(self, other: Expression | str) -> Joined:
        return Joined([*_items(self), *_items(other)])

    def __radd__(self, other: Expression | str) -> Joined:
        return Joined([*_items(other), *_items(self)])


@dataclass(frozen=True, slots=True)
class Text(Expression):
    text: str


@dataclass(frozen=True, slots=True)
class Gen(Expression):
    """name: None keeps the answer in the text only. params: sampling parameters that are given here. logprobs: the
    log-probability arguments of `Engine.generate`."""

    name: str | None
    params: Mapping[str, Any]
    logprobs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Select(Expression):
    name: str | None
    choices: Sequence[str]
    method: ChoicesMethod


@dataclass(frozen=True, slots=True)
class RoleBegin(Expression):
    role: str


@dataclass(frozen=True, slots=True)
class RoleEnd(Expression):
    role: str


@dataclass(frozen=True, slots=True)
class ScopeBegin(Expression):
    """What is added from here to its end is the variable `name` too."""

    name: str


@dataclass(frozen=True, slots=True)
class ScopeEnd(Expression):
    name: str


@dataclass(frozen=True, slots=True)
class Joined(Expression):
    """Expressions one after the other."""

    items: Sequence[Expression]


def flat(expression: Any) -> list[Expression]:
    """The simple expressions that an expression or a text is made of.

    Raises ProgramError for anything else, None among it: the value of a variable that was never made, mostly.
    """
    return _items(expression)


def _items(expression: Any) -> list[Expression]:
    if isinstance(expression, str):
        return [Text(expression)]
    if isinstance(expression, Joined):
        return [*expression.items]
    if isinstance(expression, Expression):
        return [expression]
    raise ProgramError(
        f"a {type(expression).__name__} cannot be added to a program's text: add a str, gen(), select() or a message"
    )


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    stop_regex: str | Sequence[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesMethod | None = None,
    regex: str | None = None,
    json_schema: str | None = None,
) -> Gen | Select:
    """An answer of the model, kept as `state[name]`.

    Without a value, a parameter is that of the program's `run`. n: several answers, of which the text goes on with the
    first; the variable is a list of them. choices: choose one of these instead (`select`). dtype: int, float, bool or
    str; holds the answer to the shape of one. The variable is text in any case. dtype, regex and json_schema need an
    engine that holds answers to a grammar; one that does not refuses them by name.

    Raises ProgramError for arguments that cannot be together.
    """
    if choices is not None:
        if regex is not None or json_schema is not None or dtype is not None:
            raise ProgramError("gen: choices cannot be together with dtype, regex or json_schema")
        return select(name, choices, 0.0 if temperature is None else temperature, choices_method)
    if dtype is not None:
        if regex is not None or json_schema is not None:
            raise ProgramError("gen: give one of dtype, regex and json_schema")
        regex = _regex_of(dtype)
        if regex in (INT, FLOAT):  # where a number ends, the model would go on
            stop = [*([stop] if isinstance(stop, str) else stop or ()), " ", "\n"]
    params = {
        "max_new_tokens": max_tokens, "min_new_tokens": min_tokens, "n": n, "stop": stop,
        "stop_token_ids": stop_token_ids, "stop_regex": stop_regex, "temperature": temperature, "top_p": top_p,
        "top_k": top_k, "min_p": min_p, "frequency_penalty": frequency_penalty, "presence_penalty": presence_penalty,
        "ignore_eos": ignore_eos, "regex": regex, "json_schema": json_schema,
    }  # fmt: skip
    logprobs = {
        "return_logprob": return_logprob, "logprob_start_len": logprob_start_len, "top_logprobs_num": top_logprobs_num,
        "return_text_in_logprobs": return_text_in_logprobs,
    }  # fmt: skip
    return Gen(name, _given(params), _given(logprobs))


def gen_int(name: str | None = None, **arguments: Any) -> Gen | Select:
    """`gen` held to a whole number."""
    return gen(name, **arguments, dtype=int)


def gen_string(name: str | None = None, **arguments: Any) -> Gen | Select:
    """`gen` held to a text in quotes."""
    return gen(name, **arguments, dtype=str)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesMethod | None = None,
) -> Select:
    """The one of `choices` that the model finds most likely here, kept as `state[name]`.

    choices_method: how log-probabilities are compared; `token_length_normalized` if not given.
    Raises ProgramError for an empty list, an empty choice, or a temperature: a choice is not sampled.
    """
    texts = [] if choices is None or isinstance(choices, str) else list(choices)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ProgramError(
            f"select({name!r}): choices must be a list of texts that are not empty, not {choices!r:.200}"
        )
    if temperature > 1e-5:
        raise ProgramError(f"select({name!r}): temperature={temperature} has no effect, a choice is not sampled")
    return Select(name, texts, token_length_normalized if choices_method is None else choices_method)


def system(expression: Expression | str | None = None) -> Expression:
    return _message("system", expression)


def user(expression: Expression | str | None = None) -> Expression:
    return _message("user", expression)


def assistant(expression: Expression | str | None = None) -> Expression:
    return _message("assistant", expression)


def system_begin() -> RoleBegin:
    return RoleBegin("system")


def system_end() -> RoleEnd:
    return RoleEnd("system")


def user_begin() -> RoleBegin:
    return RoleBegin("user")


def user_end() -> RoleEnd:
    return RoleEnd("user")


def assistant_begin() -> RoleBegin:
    return RoleBegin("assistant")


def assistant_end() -> RoleEnd:
    return RoleEnd("assistant")


def image(*_: Any, **__: Any) -> NoReturn:
    """Raises ProgramError: models here read text."""
    raise ProgramError("image() is not supported: only text is read and written")


def video(*_: Any, **__: Any) -> NoReturn:
    """Raises ProgramError: models here read text."""
    raise ProgramError("video() is not supported: only text is read and written")


def separate_reasoning(*_: Any, **__: Any) -> NoReturn:
    """Raises ProgramError."""
    raise ProgramError("separate_reasoning() is not supported: an answer's text holds its reasoning")


def _message(role: str, expression: Expression | str | None) -> Joined:
    return Joined([RoleBegin(role), *([] if expression is None else _items(expression)), RoleEnd(role)])


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _regex_of(dtype: type | str) -> str:
    regexes = {"int": INT, "float": FLOAT, "bool": BOOL, "str": STRING}
    name = dtype if isinstance(dtype, str) else dtype.__name__
    if name not in regexes:
        raise ProgramError(f"gen: dtype must be one of {', '.join(regexes)}, not {name!r:.80}")
    return regexes[name]


def names_of(expressions: Iterable[Expression]) -> list[str]:
    """Variables that these will make."""
    named = (item.name for item in expressions if isinstance(item, (Gen, Select, ScopeBegin)))
    return [name for name in named if name is not None]
