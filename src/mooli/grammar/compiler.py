"""Grammars are compiled aside, while everything else goes on.

Owns the compiled grammars that are kept, the threads that make them, and what they may cost: MAX_AT_ONCE at a time,
each within DEADLINE_S. Requests that wait are held by the scheduler (`ConstraintWaits`); whoever steps is woken when
one is ready or never will be. Never steps, and never ends a request itself.

A compilation cannot be stopped, but its work is bounded (`mooli.grammar.language`): past its deadline its requests are
refused, and its thread is left to its end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mooli.errors import GrammarError, MooliError, QueueFullError
from mooli.grammar.constraint import GrammarConstraint
from mooli.grammar.thinking import Markers, ThinkingConstraint
from mooli.types import Grammar, Reasoning, Request, TokenBytes

if TYPE_CHECKING:
    import llguidance

logger = logging.getLogger(__name__)

DEADLINE_S = 10.0
MAX_AT_ONCE = 2
MAX_THREADS = 4
"""Those past their deadline counted too."""

MAX_WAITING = 256
MAX_KEPT = 128
"""Compiled grammars, those that were refused included. One takes some 100 KB; MAX_LEXER_STATES bounds the largest."""

_NICENESS = 10
"""Of the threads that compile: those that compute go first."""


@dataclass(eq=False)
class Compilation:
    """A grammar from its first request on. matcher or error: once it is over.

    rids: requests that came before.
    """

    grammar: Grammar
    matcher: llguidance.LLMatcher | None = None
    error: MooliError | None = None
    is_spoilt: bool = False
    rids: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.matcher is not None or self.error is not None


class Grammars:
    """The constraints of an engine's requests. `constraint_of` and `take_failures` are called on the thread that steps.

    vocab_size: ids that can be sampled.
    """

    def __init__(self, vocab_size: int, *, deadline_s: float = DEADLINE_S) -> None:
        self._vocab_size = vocab_size
        self._deadline_s = deadline_s
        self._token_bytes: Callable[[], TokenBytes] | None = None
        self._wake: Callable[[], None] = lambda: None
        self._kept: OrderedDict[Grammar, Compilation] = OrderedDict()
        self._markers: dict[Reasoning | None, Markers] = {}
        self._failed: queue.SimpleQueue[Compilation] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: deque[Compilation] = deque()
        self._running: set[Compilation] = set()
        self._num_threads = 0
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._vocabulary_lock = threading.Lock()

    def bind(self, token_bytes: Callable[[], TokenBytes], wake: Callable[[], None]) -> None:
        """See `EngineCore.bind_grammars`."""
        self._token_bytes, self._wake = token_bytes, wake

    def constraint_of(self, request: Request) -> GrammarConstraint | ThinkingConstraint | None:
        """What the output of a request must keep to, maybe not ready yet; None if nothing is asked of it.

        Raises GrammarError if the grammar was refused before or nobody has told the vocabulary, QueueFullError.
        """
        grammar, thinking = request.sampling.grammar, request.sampling.thinking
        held = None if grammar is None else self._held_to(grammar, request.rid)
        if thinking is None:
            return held
        token_bytes = self._known_bytes("max_thinking_tokens")
        markers = self._markers.get(thinking.reasoning)
        if markers is None:
            if len(self._markers) >= MAX_KEPT:
                self._markers.clear()
            markers = self._markers[thinking.reasoning] = Markers(thinking, token_bytes())
        return ThinkingConstraint(thinking.max_tokens, markers, held)

    def _held_to(self, grammar: Grammar, rid: str) -> GrammarConstraint:
        self._known_bytes(grammar.argument)
        known = self._kept.get(grammar)
        if known is None or known.is_spoilt:
            known = self._begin(grammar)
        self._kept.move_to_end(grammar)
        with self._lock:
            if not known.is_over:
                known.rids.append(rid)
        if known.error is not None:
            raise GrammarError(str(known.error), argument=grammar.argument)
        return GrammarConstraint(known)

    def _known_bytes(self, argument: str) -> Callable[[], TokenBytes]:
        if self._token_bytes is None:
            raise GrammarError(
                f"{argument} is not possible here: leave it out",
                argument=argument,
                advice="(skip_tokenizer_init=True or grammar_backend='none')",
            )
        return self._token_bytes

    def take_failures(self) -> list[tuple[str, MooliError]]:
        """Requests whose grammar was refused since the last time, and why."""
        failures: list[tuple[str, MooliError]] = []
        while True:
            try:
                failed = self._failed.get_nowait()
            except queue.Empty:
                return failures
            if failed.error is not None:
                failures += [(rid, failed.error) for rid in failed.rids]

    # -- aside ---------------------------------------------------------------------------------------------------------
    def _begin(self, grammar: Grammar) -> Compilation:
        with self._lock:
            if len(self._waiting) >= MAX_WAITING:
                raise QueueFullError("Too many grammars wait to be compiled.", retry_after_s=1)
            new = self._kept[grammar] = Compilation(grammar)
            self._waiting.append(new)
            self._start_threads()
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return new

    def _start_threads(self) -> None:
        while self._waiting and len(self._running) < MAX_AT_ONCE and self._num_threads < MAX_THREADS:
            following = self._waiting.popleft()
            self._running.add(following)
            self._num_threads += 1
            timer = threading.Timer(self._deadline_s, self._expire, (following,))
            timer.daemon = True
            timer.start()
            thread = threading.Thread(target=self._compile, args=(following, timer), name="mooli-grammar", daemon=True)
            thread.start()

    def _compile(self, compilation: Compilation, timer: threading.Timer) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # on Linux, of this thread alone
        matcher, error = None, None
        try:
            from mooli.grammar.language import compiled

            matcher = compiled(compilation.grammar, self._opened())
        except MooliError as exc:
            error = exc
        except BaseException as exc:  # a panic of the library is no Exception, and requests must not wait for ever
            logger.warning("a grammar could not be compiled: %s: %s", type(exc).__name__, exc)
            kind = compilation.grammar.argument
            error = GrammarError(f"{kind}: it cannot be compiled: {type(exc).__name__}: {str(exc)[:500]}")
        timer.cancel()
        with self._lock:
            self._num_threads -= 1
        self._settle(compilation, matcher, error)

    def _expire(self, compilation: Compilation) -> None:
        kind = compilation.grammar.argument
        late = GrammarError(f"{kind}: to compile it takes longer than {self._deadline_s:g} s: use a simpler one")
        compilation.is_spoilt = True  # it may have been the machine: the next request tries anew
        self._settle(compilation, None, late)

    def _settle(self, compilation: Compilation, matcher: llguidance.LLMatcher | None, error: MooliError | None) -> None:
        """Once: what comes after the deadline counts for nobody."""
        with self._lock:
            is_first = not compilation.is_over
            if is_first:
                compilation.matcher, compilation.error = matcher, error
                self._running.discard(compilation)
            self._start_threads()
        if is_first:
            if error is not None:
                self._failed.put(compilation)
            self._wake()

    def _opened(self) -> llguidance.LLTokenizer:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                from mooli.grammar.vocabulary import open_vocabulary

                if self._token_bytes is None:
                    raise GrammarError("nobody has told the vocabulary")
                self._vocabulary = open_vocabulary(self._token_bytes(), self._vocab_size)
            return self._vocabulary
