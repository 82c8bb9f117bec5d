"""Carries out what is added to one state, in its order, on a thread of the state's own.

Owns variables, growing answers, the state's first error, and that requests end with the state that wants them. Never
knows the program: what is added comes as expressions.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mooli.errors import ProgramError
from mooli.lang.answers import Growing, option_logprobs
from mooli.lang.backends import Backend, Chunks
from mooli.lang.choices import needs_unconditional
from mooli.lang.expressions import (
    Expression,
    Gen,
    RoleBegin,
    RoleEnd,
    ScopeBegin,
    ScopeEnd,
    Select,
    Text,
    names_of,
)
from mooli.lang.transcript import Transcript

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 128
"""Of an answer whose length nobody names, as in SGLang."""

_SELDOM = 1 << 30
"""Tokens between two chunks of an answer that nobody reads while it grows."""


class Executor:
    """name: of the state, for errors. params: sampling parameters and log-probability arguments for all answers that do
    not have their own. is_stream: answers are read while they grow. has_thread: False carries out at once what is
    added, on the thread that adds it. root: the state of the program that this one was forked in.

    What is added to a state that has failed or is closed raises its error. Thread-safe.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        params: Mapping[str, Any],
        logprobs: Mapping[str, Any],
        *,
        is_stream: bool,
        has_thread: bool,
        root: Executor | None = None,
    ) -> None:
        self.name = name
        self.backend = backend
        self.values: dict[str, Any] = {}
        self.metas: dict[str, Any] = {}
        self.return_value: Any = None
        self._params = dict(params)
        self._logprobs = dict(logprobs)
        self._is_stream = is_stream
        self._has_thread = has_thread
        self._transcript = Transcript()
        self._changed = threading.Condition()  # its lock may be taken twice: a finaliser runs anywhere
        self._waiting: deque[Expression] = deque()
        self._expected: list[str] = []
        self._is_busy = False
        self._is_ended = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._said = ""
        self._growing: dict[str, str] = {}
        self._scopes: dict[str, int] = {}
        self._chunks: Chunks | None = None
        self._root = root or self
        self._forks: weakref.WeakSet[Executor] = weakref.WeakSet()  # a root's: all of the program

    # -- what a program does ------------------------------------------------------------------------------------------

    def submit(self, expressions: Sequence[Expression]) -> None:
        """Have them carried out behind those that were submitted before."""
        with self._changed:
            self.raise_error()
            if self._is_ended:
                raise ProgramError(f"program {self.name}: it is over, nothing can be added to it")
            self._waiting.extend(expressions)
            self._expected += names_of(expressions)
            if self._has_thread and self._thread is None and self._waiting:
                self._thread = threading.Thread(target=self._run, name=f"mooli-{self.name}", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if not self._has_thread:
            self._run_waiting()
            self.raise_error()

    def set_value(self, name: str, value: Any) -> None:
        """Behind what was submitted before."""
        self.sync()
        with self._changed:
            self.values[name] = value
            self._changed.notify_all()

    def value(self, name: str) -> Any:
        """Waits for it. Raises KeyError if nothing that was submitted makes it, and the state's error."""
        with self._changed:
            self._wait(lambda: name not in self._expected)
            if name not in self.values:
                raise KeyError(f"program {self.name} has no variable {name!r}")
            return self.values[name]

    def has(self, name: str) -> bool:
        """Whether there is such a variable, or will be."""
        with self._changed:
            return name in self.values or name in self._expected

    def meta(self, name: str) -> Any:
        """Waits for the variable. Raises KeyError for one that the model did not make."""
        self.value(name)
        if name not in self.metas:
            raise KeyError(f"program {self.name}: the model did not make the variable {name!r}")
        return self.metas[name]

    def sync(self) -> None:
        """Wait until all that was submitted is done. Raises the state's error."""
        with self._changed:
            self._wait(lambda: not self._waiting and not self._is_busy)
            self.raise_error()

    def text(self) -> str:
        self.sync()
        return self._transcript.text(self.backend)

    def messages(self) -> list[dict[str, str]]:
        self.sync()
        return self._transcript.copy().messages

    def fork(self, name: str) -> Executor:
        """One that goes on from here, apart from this. Nothing is copied but text: pages are shared by the cache."""
        self.sync()
        fork = Executor(
            name, self.backend, self._params, self._logprobs,
            is_stream=self._is_stream, has_thread=self._has_thread, root=self._root,
        )  # fmt: skip
        fork.values, fork.metas, fork._said = dict(self.values), dict(self.metas), self._said
        fork._transcript = self._transcript.copy()
        self._root._forks.add(fork)
        self._root.raise_error()  # it was abandoned meanwhile, and may not have known this fork
        return fork

    def piece(self, name: str | None, start: int) -> str | None:
        """What is there of a variable's text, or of all that was said, from a place on: waits until there is something.
        None when there will be no more. Raises the state's error."""
        with self._changed:

            def is_over() -> bool:
                return self._is_idle_for_ever() or (name in self.values and name not in self._expected)

            def grown() -> str:
                return self._said if name is None else self._growing.get(name, "")

            self._wait(lambda: len(grown()) > start or is_over())
            if len(grown()) <= start:
                self.raise_error()
            return grown()[start:] or None

    # -- its life -----------------------------------------------------------------------------------------------------

    @property
    def error(self) -> BaseException | None:
        return self._error

    def raise_error(self) -> None:
        """Raise what this state has failed of."""
        if self._error is not None:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """It ends here: the first error stays."""
        with self._changed:
            self._error = self._error or error
            self._waiting.clear()
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more will be submitted; what was is still done."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """End its requests: nobody wants them any more. Any thread, a finaliser too."""
        with self._changed:
            if not self._is_idle_for_ever():
                self.fail(ProgramError(f"program {self.name} was abandoned: nobody waits for it any more"))
            self._is_ended = True
            chunks = self._chunks
            self._changed.notify_all()
        if chunks is not None:
            chunks.close()

    def abandon(self) -> None:
        """`close` the program with all of its forks, unless it has come to its end: then forks are who holds them's."""
        with self._changed:
            if self._is_idle_for_ever():
                return
        self.close()  # first: who forks from now on, hears of it
        for fork in list(self._forks):
            fork.close()

    def _is_idle_for_ever(self) -> bool:
        return self._is_ended and not self._waiting and not self._is_busy

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Until it holds; raises the state's error if it does not. The lock is held."""
        while not condition():
            self.raise_error()
            self._changed.wait()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._is_ended or self._error is not None:
                        return
                    self._changed.wait()
            self._run_waiting()

    def _run_waiting(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    return
                expression = self._waiting.popleft()
                self._is_busy = True
            try:
                self._carry_out(expression)
            except BaseException as exc:
                self.fail(self._told(expression, exc))
                if not isinstance(exc, Exception):
                    raise
            finally:
                with self._changed:
                    self._is_busy = False
                    self._changed.notify_all()

    def _told(self, expression: Expression, exc: BaseException) -> BaseException:
        """An error that says where in which program it was."""
        where = ""
        if isinstance(expression, (Gen, Select)):
            where = f", {type(expression).__name__.lower()}({expression.name!r})"
        elif isinstance(expression, (RoleBegin, RoleEnd)):
            where = f", message of {expression.role}"
        error = ProgramError(f"program {self.name}{where}: {exc or type(exc).__name__}")
        error.__cause__ = exc
        return error

    def _carry_out(self, expression: Expression) -> None:
        transcript = self._transcript
        if isinstance(expression, Text):
            transcript.say(expression.text)
            self._say(expression.text)
        elif isinstance(expression, Gen):
            self._generate(expression)
        elif isinstance(expression, Select):
            self._select(expression)
        elif isinstance(expression, RoleBegin):
            transcript.begin(expression.role)
        elif isinstance(expression, RoleEnd):
            transcript.end(expression.role)
        elif isinstance(expression, ScopeBegin):
            self._scopes[expression.name] = len(self._said)
        elif isinstance(expression, ScopeEnd):
            start = self._scopes.pop(expression.name)
            self._set(expression.name, self._said[start:], None)

    def _generate(self, expression: Gen) -> None:
        params = {"max_new_tokens": DEFAULT_MAX_TOKENS, **self._params, **expression.params}
        if not self._is_stream:
            params["stream_interval"] = _SELDOM
        ids = self._transcript.prompt_ids(self.backend)
        answers = [Growing() for _ in range(params.get("n") or 1)]
        start = len(self._said)
        for chunk in self._open(lambda: self.backend.start(ids, params, **{**self._logprobs, **expression.logprobs})):
            index = chunk.get("index", 0)
            answers[index].take(chunk)
            if index == 0:
                self._grow(expression.name, start, answers[0].text)
        self._closed()
        first = answers[0]
        self._transcript.say_generated(first.text, first.output_ids, ids, self.backend)
        if len(answers) == 1:
            self._set(expression.name, first.text, first.meta_info)
        else:
            self._set(expression.name, [item.text for item in answers], [item.meta_info for item in answers])

    def _select(self, expression: Select) -> None:
        prompt = self._transcript.prompt_ids(self.backend)
        options = [self._transcript.prompt_ids(self.backend, choice) for choice in expression.choices]
        starts = [_common(prompt, ids) for ids in options]
        if not min(starts):
            raise ProgramError("a choice needs a text before it, that its first token follows")
        given, answers = self._score(options, starts)
        alone: list[list[float]] | None = None
        if needs_unconditional(expression.method):
            # The first token follows nothing there, and counts as certain.
            rest = [ids[start:] for ids, start in zip(options, starts, strict=True)]
            scored, _ = self._score(rest, [1] * len(rest))
            alone = [[0.0, *logprobs] for logprobs in scored]
        scores = expression.method(given, alone)
        choice = expression.choices[scores.index(max(scores))]
        self._say(choice)
        self._transcript.say(choice)
        meta = {
            "normalized_prompt_logprobs": scores,
            "input_token_logprobs": [answer.meta_info["input_token_logprobs"] for answer in answers],
            "output_token_logprobs": [[] for _ in answers],
            "prompt_tokens": [answer.meta_info["prompt_tokens"] for answer in answers],
            "cached_tokens": [answer.meta_info["cached_tokens"] for answer in answers],
        }
        self._set(expression.name, choice, meta)

    def _score(self, prompts: list[list[int]], starts: list[int]) -> tuple[list[list[float]], list[Growing]]:
        """The log-probabilities of each prompt's tokens from its start on, all in one batch, and the answers."""
        answers = [Growing() for _ in prompts]
        from_each = [start - 1 for start in starts]
        nothing = {"max_new_tokens": 0, "temperature": 0.0}
        for chunk in self._open(
            lambda: self.backend.start(prompts, nothing, return_logprob=True, logprob_start_len=from_each)
        ):
            answers[chunk.get("index", 0)].take(chunk)
        self._closed()
        counts = [len(ids) - start for ids, start in zip(prompts, starts, strict=True)]
        return [option_logprobs(a.meta_info, count) for a, count in zip(answers, counts, strict=True)], answers

    def _open(self, start: Callable[[], Chunks]) -> Chunks:
        """Begin requests which end when this is closed."""
        chunks = start()
        with self._changed:
            self._chunks = chunks
            error = self._error
        if error is not None:
            chunks.close()
            raise error
        return chunks

    def _closed(self) -> None:
        """The answers are over. Raises the state's error: they may be as it was closed."""
        with self._changed:
            self._chunks = None
            self.raise_error()

    def _say(self, text: str) -> None:
        with self._changed:
            self._said += text
            self._changed.notify_all()

    def _grow(self, name: str | None, start: int, text: str) -> None:
        with self._changed:
            self._said = self._said[:start] + text
            if name is not None:
                self._growing[name] = text
            self._changed.notify_all()

    def _set(self, name: str | None, value: Any, meta: Any) -> None:
        if name is None:
            return
        with self._changed:
            self.values[name] = value
            if meta is not None:
                self.metas[name] = meta
            self._growing[name] = value if isinstance(value, str) else value[0]
            self._expected.remove(name)
            self._changed.notify_all()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists have in common from the front."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
