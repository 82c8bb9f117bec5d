"""`@function`: a Python function that writes a program's text, and the ways to run it.

Owns what arguments are the program's and what are sampling parameters, and that a run which is left ends its requests.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mooli.errors import ProgramError
from mooli.lang.backends import Backend, backend_or_default
from mooli.lang.executor import Executor
from mooli.lang.state import ProgramState

_SAMPLING = (
    "max_new_tokens", "min_new_tokens", "n", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k",
    "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "ignore_eos", "sampling_seed",
)  # fmt: skip
_LOGPROBS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")

_MAX_THREADS = 64


class Program:
    """A function whose first parameter is the state, `s`."""

    def __init__(self, func: Callable[..., Any], bound: Mapping[str, Any] | None = None) -> None:
        """Raises ProgramError if the first parameter is not named `s`."""
        names = list(inspect.signature(func).parameters)
        if names[:1] != ["s"]:
            raise ProgramError(f"the first parameter of {func.__name__} must be s, the state")
        functools.update_wrapper(self, func)
        self._func = func
        self._names = names[1:]
        self._bound = dict(bound or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """With a state, do what the function does to it, as a part of another program; otherwise `run`."""
        if args and isinstance(args[0], ProgramState):
            return self._func(*args, **{**self._bound, **kwargs})
        return self.run(*args, **kwargs)

    def bind(self, **kwargs: Any) -> Program:
        """The same program with some arguments given."""
        return Program(self._func, {**self._bound, **kwargs})

    def run(
        self, *args: Any, stream: bool = False, backend: Any = None, use_thread: bool = True, **kwargs: Any
    ) -> ProgramState:
        """Run it to its end, or with stream=True return its state at once, to be read while it grows.

        kwargs: arguments of the function, and sampling parameters for all its answers that do not have their own:
        max_new_tokens (128), temperature, stop, …; where both have a name, it is the function's. use_thread: False
        carries out everything in turn on this thread.

        Raises what the function raises, and ProgramError, with the program's name, for an answer that failed.
        """
        executor, given = self._executor(backend_or_default(backend), kwargs, stream, use_thread)
        if not stream:
            self._run(executor, args, given)
            return ProgramState(executor)
        state = ProgramState(executor, on_drop=executor.abandon)
        threading.Thread(
            target=self._run_aside, args=(executor, args, given), name=f"mooli-{executor.name}", daemon=True
        ).start()
        return state

    def run_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any] | Sequence[Any]],
        *,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
        backend: Any = None,
        **kwargs: Any,
    ) -> list[ProgramState] | Iterator[ProgramState]:
        """Run it once for each dict of arguments, or tuple of them in their order: the states in the same order.

        num_threads: programs at a time; "auto" takes up to 64. The engine computes them together. progress_bar: count
        on standard error. generator_style: an iterator, which hands out states as soon as it is their turn.
        kwargs: sampling parameters, as of `run`.

        The first program that fails ends all others, and its error is raised.
        """
        if not isinstance(batch_kwargs, Sequence) or isinstance(batch_kwargs, str):
            raise ProgramError("run_batch: give a list with the arguments of each run")
        rows = [dict(row) if isinstance(row, Mapping) else self._named(row) for row in batch_kwargs]
        if num_threads == "auto":
            num_threads = _MAX_THREADS
        if not isinstance(num_threads, int) or num_threads < 1:
            raise ProgramError(f"run_batch: num_threads={num_threads!r} is neither 'auto' nor a number from 1 on")
        states = self._run_rows(rows, kwargs, backend_or_default(backend), num_threads, progress_bar)
        return states if generator_style else list(states)

    def _run_rows(
        self, rows: list[dict[str, Any]], common: dict[str, Any], backend: Backend, num_threads: int, has_bar: bool
    ) -> Iterator[ProgramState]:
        from concurrent.futures import ThreadPoolExecutor

        prepared = [self._executor(backend, {**common, **row}, False, True) for row in rows]
        pool = ThreadPoolExecutor(max(1, min(num_threads, len(rows))), "mooli-programs")
        try:
            futures = [pool.submit(self._run, executor, (), given) for executor, given in prepared]
            for i, (future, (executor, _)) in enumerate(zip(futures, prepared, strict=True)):
                future.result()
                if has_bar:
                    print(f"\r{i + 1}/{len(rows)} programs", end="", file=sys.stderr, flush=True)
                yield ProgramState(executor)
        except BaseException:
            for executor, _ in prepared:
                executor.abandon()
            raise
        finally:
            if has_bar:
                print(file=sys.stderr)
            pool.shutdown(wait=False, cancel_futures=True)

    def _executor(
        self, backend: Backend, kwargs: Mapping[str, Any], is_stream: bool, has_thread: bool
    ) -> tuple[Executor, dict[str, Any]]:
        """A state to run on, and the arguments of the function."""
        given = {**self._bound, **kwargs}
        own = set(self._names)
        params = {name: given.pop(name) for name in _SAMPLING if name in given and name not in own}
        logprobs = {name: given.pop(name) for name in _LOGPROBS if name in given and name not in own}
        params, logprobs = ({k: v for k, v in items.items() if v is not None} for items in (params, logprobs))
        name = self._func.__name__
        return Executor(name, backend, params, logprobs, is_stream=is_stream, has_thread=has_thread), given

    def _run(self, executor: Executor, args: Sequence[Any], given: Mapping[str, Any]) -> None:
        try:
            executor.raise_error()
            executor.return_value = self._func(ProgramState(executor), *args, **given)
            executor.sync()
            executor.end()
        except BaseException as exc:
            executor.fail(exc)
            executor.abandon()
            raise

    def _run_aside(self, executor: Executor, args: Sequence[Any], given: Mapping[str, Any]) -> None:
        """For a reader, who hears of an error from the state."""
        try:
            self._run(executor, args, given)
        except Exception:
            return

    def _named(self, row: Any) -> dict[str, Any]:
        values = list(row) if isinstance(row, (list, tuple)) else [row]
        if len(values) > len(self._names):
            raise ProgramError(f"{self._func.__name__} takes {len(self._names)} arguments, not {len(values)}")
        return dict(zip(self._names, values, strict=False))


def function(func: Callable[..., Any] | None = None, *, num_api_spec_tokens: int | None = None) -> Any:
    """Decorator that makes a program of a function. num_api_spec_tokens: accepted, and of no use here: it is for paid
    APIs."""
    return Program if func is None else Program(func)
