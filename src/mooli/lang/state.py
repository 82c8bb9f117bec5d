"""What a program holds in its hands: one state, or the forks of one.

Owns SGLang's names. What is behind them is the `Executor`'s. A state of a program that streams is the reader's: when it
is dropped, its requests end.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from mooli.errors import ProgramError
from mooli.lang.backends import Backend
from mooli.lang.executor import Executor
from mooli.lang.expressions import Expression, RoleBegin, RoleEnd, ScopeBegin, ScopeEnd, flat


class ProgramState:
    """`s` of a program: add to it with `+=`, read its variables as `s[name]`, which waits for them.

    on_drop: what is done when it is dropped.
    """

    def __init__(self, executor: Executor, *, on_drop: Callable[[], None] | None = None) -> None:
        self._executor = executor
        if on_drop is not None:
            weakref.finalize(self, on_drop).atexit = False

    def __iadd__(self, other: Expression | str) -> ProgramState:
        self._executor.submit(flat(other))
        return self

    def system(self, expression: Expression | str | None = None) -> Any:
        """Add a message, or open one for the body of a `with`."""
        return self._message("system", expression)

    def user(self, expression: Expression | str | None = None) -> Any:
        """Add a message, or open one for the body of a `with`."""
        return self._message("user", expression)

    def assistant(self, expression: Expression | str | None = None) -> Any:
        """Add a message, or open one for the body of a `with`."""
        return self._message("assistant", expression)

    @contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        """What the body adds is the variable `name` too."""
        self._executor.submit([ScopeBegin(name)])
        yield
        self._executor.submit([ScopeEnd(name)])

    def fork(self, n: int = 1) -> ProgramStateGroup:
        """`n` states that go on from here, each on its own. The cache computes what they share once."""
        if n < 1:
            raise ProgramError(f"fork({n}): there must be at least one")
        forks = [self._executor.fork(f"{self._executor.name}/fork {i}") for i in range(n)]
        return ProgramStateGroup([ProgramState(fork, on_drop=fork.close) for fork in forks], self)

    @contextmanager
    def copy(self, n: int = 1) -> Iterator[ProgramStateGroup]:
        """Forks for the body of a `with`, which end with it."""
        group = self.fork(n)
        try:
            yield group
        finally:
            for state in group:
                state._executor.close()

    def text(self) -> str:
        """Everything so far, as the model reads it."""
        return self._executor.text()

    def messages(self) -> list[dict[str, str]]:
        """The messages that have ended, as dicts of `role` and `content`."""
        return self._executor.messages()

    def sync(self) -> None:
        """Wait for all that was added. Raises ProgramError if something failed."""
        self._executor.sync()

    def error(self) -> BaseException | None:
        """What went wrong, once all that was added is done."""
        with suppress(ProgramError):
            self._executor.sync()
        return self._executor.error

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """Pieces of a variable's text as they come; without a name, of all that is said, but for the words of the
        template between messages. Dropping the state, not the iterator, ends the requests."""
        start = 0
        while (piece := self._executor.piece(var_name, start)) is not None:
            start += len(piece)
            yield piece

    async def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """`text_iter` for asyncio. return_meta_data: pairs of a piece and a dict, which is that of `get_meta_info`
        with the last, empty piece, and empty before."""
        import asyncio

        start = 0
        while (piece := await asyncio.to_thread(self._executor.piece, var_name, start)) is not None:
            start += len(piece)
            yield (piece, {}) if return_meta_data else piece
        if return_meta_data and var_name is not None:
            yield "", await asyncio.to_thread(self._executor.meta, var_name)

    def get_meta_info(self, name: str) -> Any:
        """`meta_info` of the answer that made a variable; of n > 1, a list. Of a choice, the scores of all choices as
        `normalized_prompt_logprobs`, their tokens, and how many of them were cached."""
        return self._executor.meta(name)

    def get_var(self, name: str) -> Any:
        return self._executor.value(name)

    def set_var(self, name: str, value: Any) -> None:
        self._executor.set_value(name, value)

    @property
    def ret_value(self) -> Any:
        """What the program returned, once it has."""
        return self._executor.return_value

    def __getitem__(self, name: str) -> Any:
        return self._executor.value(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._executor.set_value(name, value)

    def __contains__(self, name: str) -> bool:
        return self._executor.has(name)

    def __repr__(self) -> str:
        return f"ProgramState({self._executor.name})"

    @property
    def backend(self) -> Backend:
        return self._executor.backend

    def _message(self, role: str, expression: Expression | str | None) -> Any:
        if expression is None:
            return self._open(role)
        self._executor.submit([RoleBegin(role), *flat(expression), RoleEnd(role)])
        return None

    @contextmanager
    def _open(self, role: str) -> Iterator[None]:
        self._executor.submit([RoleBegin(role)])
        yield
        self._executor.submit([RoleEnd(role)])


class ProgramStateGroup:
    """Forks, in order."""

    def __init__(self, states: Sequence[ProgramState], source: ProgramState) -> None:
        self.states = list(states)
        self._source = source

    def join(self, mode: str = "gather_variable") -> None:
        """Wait for all forks. The source has each variable that is new in them as a list, in the order of the forks.

        Raises ProgramError if a fork failed, and for another mode.
        """
        if mode != "gather_variable":
            raise ProgramError(f"join({mode!r}) is not supported: only 'gather_variable' is")
        source = self._source._executor
        known = set(source.values)
        gathered: dict[str, list[Any]] = {}
        for state in self.states:
            state.sync()
            for name, value in state._executor.values.items():
                if name not in known:
                    gathered.setdefault(name, []).append(value)
        for name, values in gathered.items():
            source.set_value(name, values)
        for state in self.states:
            state._executor.end()

    def __iadd__(
        self, other: Expression | str | Sequence[Expression | str] | Callable[[int], Expression | str]
    ) -> ProgramStateGroup:
        """Add the same to all forks, the items of a list to one each, or what a function says of each one's number."""
        if callable(other):
            items: Sequence[Any] = [other(i) for i in range(len(self.states))]
        elif isinstance(other, (list, tuple)):
            items = other
        else:
            items = [other] * len(self.states)
        if len(items) != len(self.states):
            raise ProgramError(f"{len(items)} items cannot be added to {len(self.states)} forks: give one for each")
        for i, item in enumerate(items):
            self.states[i] += item
        return self

    def __getitem__(self, index: int) -> ProgramState:
        return self.states[index]

    def __setitem__(self, index: int, state: ProgramState) -> None:
        """So that `forks[i] += …` works."""
        self.states[index] = state

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)
