"""What routes work with: one model's text side, and the engine process behind it.

Owns the way from the arguments of a call to its growing answers, and who is counted in the metrics. Text is brought up
to date when an output comes, whether or not anybody reads: a stop string ends its request at once, and so does a text
that cannot be made. Never knows HTTP.
Lives in the server's event loop; only tokenising of long texts leaves it.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from mooli.config import EngineConfig
from mooli.engine.client import EngineClient
from mooli.engine.facts import EngineFacts
from mooli.errors import MooliError, RequestError
from mooli.frontend.chat_encoding import encode_chat
from mooli.frontend.generation import Generation, generations_of
from mooli.frontend.inputs import CallInputs, InputRules
from mooli.frontend.text_side import input_rules
from mooli.frontend.tokenizer import Tokenizer
from mooli.logs import FirstTimes
from mooli.server.config import ServerConfig
from mooli.server.keys import KeyRing
from mooli.server.metrics import Metrics
from mooli.server.request_log import RequestLog
from mooli.server.routing import HttpError
from mooli.server.shared_work import SharedWork
from mooli.server.step_log import StepLog
from mooli.server.text_threads import TextThreads, num_chars
from mooli.types import RequestOutput

logger = logging.getLogger(__name__)

NO_TEXT = "its text could not be made; the server's log says why"
"""Of a failure whose words are not for clients."""

LEFT = "The client closed the connection."

T = TypeVar("T")


class Observer(Protocol):
    """What the metrics are told of requests. Times are in seconds."""

    def received(self, *, is_stream: bool, prompt_tokens: int) -> None: ...

    def first_token(self, *, is_stream: bool, elapsed_s: float) -> None: ...

    def next_tokens(self, *, num_tokens: int, elapsed_s: float) -> None:
        """`num_tokens` more, `elapsed_s` after the ones before."""
        ...

    def finished(self, generation: Generation, *, is_stream: bool, elapsed_s: float) -> None: ...


class Service:
    """See the module docstring. Attributes are for routes to read.

    sampling_defaults: of chats, from the model's own files; laid under what a request says.
    """

    def __init__(
        self,
        *,
        config: ServerConfig,
        engine_config: EngineConfig,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        metrics: Metrics,
        step_log: StepLog,
        request_log: RequestLog | None,
        sampling_defaults: Mapping[str, Any],
        startup_time_s: float,
        launch_command: str,
        keys: KeyRing,
    ) -> None:
        self.config = config
        self.keys = keys
        self.engine_config = engine_config
        self.client = client
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.step_log = step_log
        self.request_log = request_log
        self.sampling_defaults = sampling_defaults
        self.startup_time_s = startup_time_s
        self.launch_command = launch_command
        self.started_at = time.time()
        self.failures = FirstTimes()
        self.max_open = client.facts.max_running_requests + config.max_queued_requests
        """Sequences that may run and wait together."""
        self.rules: InputRules = replace(
            input_rules(engine_config, client.facts, tokenizer),
            max_sequences=self.max_open,
            max_stop_chars=config.max_stop_chars,
        )
        self.text_threads = TextThreads()
        self.is_draining = False
        self.num_active = 0
        """Calls that are not closed yet."""
        self.num_sequences: collections.Counter[str] = collections.Counter()
        """Of those calls, by the name of the key they came with."""
        self.num_flushing = 0
        """Calls that wait until the cache can be flushed."""
        self._shared: dict[str, SharedWork[Any]] = {}

    @property
    def facts(self) -> EngineFacts:
        return self.client.facts

    @property
    def model_name(self) -> str:
        return self.engine_config.served_model_name or self.engine_config.model_path

    async def prepare(self, **arguments: Any) -> CallInputs:
        """`InputRules.prepare`, off the event loop where text or lists are long. Raises RequestError."""
        prompt = arguments.get("prompt")
        if isinstance(prompt, str):
            self.rules.check_length(prompt)  # here: it need not wait for a thread
        return await self.text_threads.run(num_chars(arguments), lambda: self.rules.prepare(**arguments))

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_arguments: Any) -> list[int]:
        """Ids of a conversation (`mooli.frontend.chat_encoding.encode_chat`). What users write never becomes a control
        token. Raises ChatTemplateError, PromptError, ContextLengthError before the text is tokenised where it is
        certainly too long, or RequestError without a tokenizer."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError("this server has no tokenizer: use /generate with input_ids")
        limit = None if self.rules.allow_auto_truncate else self.rules.context_length
        return await self.text_threads.run(
            num_chars((messages, template_arguments)),
            lambda: encode_chat(tokenizer, messages, context_length=limit, **template_arguments),
        )

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Raises PromptError, or RequestError without a tokenizer."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError("this server has no tokenizer")
        return await self.text_threads.run(
            len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    def start(self, inputs: CallInputs, *, is_stream: bool, is_counted: bool = True) -> ServedCall:
        """Submit. Use the call as a context manager: leaving it aborts what is not finished.

        is_counted: False for health checks, which are no traffic.
        Raises RequestError for an id in use, HttpError (503) when the queue is full and (429) when it would be more
        than the key may have, EngineDeadError.
        """
        self._check_key(inputs)
        if self.client.num_open + len(inputs.requests) > self.max_open:
            raise HttpError(503, "The request queue is full.", code="queue_full", retry_after_s=1)
        return ServedCall(self, inputs, is_stream=is_stream, is_counted=is_counted)

    def shared(
        self, name: str, work: Callable[[], Awaitable[T]], *, keep_s: float = 0.0, pause_s: float = 0.0
    ) -> SharedWork[T]:
        """The work of that name, which is this one if there is none yet."""
        return self._shared.setdefault(name, SharedWork(work, keep_s=keep_s, pause_s=pause_s))

    def _check_key(self, inputs: CallInputs) -> None:
        key = self.keys.named(inputs.requests[0].client)
        if key is None or key.max_sequences is None:
            return
        most, num_new = key.max_sequences, len(inputs.requests)
        if num_new > most:
            raise HttpError(
                400, f"this key may have {most} sequences at a time, and the request is for {num_new}: send fewer"
                " prompts, or a smaller n",
            )  # fmt: skip
        if self.num_sequences[key.name] + num_new > most:
            raise HttpError(
                429,
                f"This key may have {most} sequences running and waiting at a time: try again when some have ended.",
                code="key_busy",
                retry_after_s=1,
            )


class ServedCall:
    """The requests of one HTTP request. `generations` hold the text and everything else there is of each so far.

    with service.start(inputs, is_stream=True) as call:
        async for changed in call.changes(): ...
    """

    def __init__(self, service: Service, inputs: CallInputs, *, is_stream: bool, is_counted: bool) -> None:
        self._client = service.client
        self._observer: Observer | None = service.metrics if is_counted else None
        self._log = service.request_log if is_counted else None
        self._service = service
        self._is_closed = False
        self._is_stream = is_stream
        self._changed: dict[int, None] = {}
        self._wake = asyncio.Event()
        self._error: MooliError | None = None
        self._started_s = time.perf_counter()
        config = service.engine_config
        self.is_single = inputs.is_single
        self.generations = generations_of(
            inputs,
            service.tokenizer,
            stream_interval=config.stream_interval,
            incremental=config.incremental_streaming_output,
        )
        self._last_s: dict[int, float] = {}
        self._open = set(range(len(self.generations)))
        sinks = [self._sink(index) for index in self._open]
        self._client.submit(inputs.requests, sinks)
        service.num_active += 1
        key = service.keys.named(inputs.requests[0].client)
        self._key_name = "" if key is None else key.name
        service.num_sequences[self._key_name] += len(self.generations)
        for generation in self.generations:
            self._count_start(generation)

    @property
    def is_done(self) -> bool:
        return not self._open

    async def changes(self) -> AsyncIterator[list[int]]:
        """Indices of generations that changed since they were last yielded, until all have ended. A slow reader gets
        fewer, larger changes. Raises what ended the whole call, EngineDeadError for example."""
        while True:
            if self._error is not None:
                raise self._error
            if self._changed:
                changed, self._changed = sorted(self._changed), {}
                yield changed
            elif self.is_done:
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    async def wait(self) -> None:
        """Until all have ended. Raises like `changes`; a single request that failed raises what it failed of."""
        async for _ in self.changes():
            pass
        if len(self.generations) == 1:
            self.generations[0].raise_if_failed()

    def close(self, reason: str = LEFT) -> None:
        """Abort what is not finished; what was computed of it stays in the cache. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._service.num_active -= 1
            self._service.num_sequences[self._key_name] -= len(self.generations)
        left, self._open = sorted(self._open), set()
        if left:
            self._client.drop([self.generations[index].request for index in left], reason)
            for index in left:
                self._count_end(self.generations[index])

    def __enter__(self) -> ServedCall:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sink(self, index: int) -> Callable[[RequestOutput | MooliError], None]:
        def take(item: RequestOutput | MooliError) -> None:
            self._take(index, item)

        return take

    def _take(self, index: int, item: RequestOutput | MooliError) -> None:
        generation = self.generations[index]
        if isinstance(item, MooliError):
            self._error = self._error or item
        else:
            num_before = len(generation.output_ids)
            stop_string = self._update(generation, item)
            if stop_string is not None:
                self._client.finish(generation.request, stop_string)
            self._count_tokens(index, len(generation.output_ids) - num_before)
        if isinstance(item, MooliError) or generation.finish is not None:
            self._open.discard(index)
            self._count_end(generation)
        self._changed[index] = None
        self._wake.set()

    def _update(self, generation: Generation, output: RequestOutput) -> str | None:
        """The stop string that has ended the text, if one has. A text that cannot be made ends its own request only."""
        try:
            return generation.update(output)
        except BaseException as exc:  # what a panic of the tokenizer's library raises is no Exception
            shown = exc if self._service.failures.is_first("text", exc) else None
            words = f"{type(exc).__name__}: {exc}"
            logger.error("request %s ends here, as its text cannot be made: %s", generation.rid, words, exc_info=shown)
            generation.fail(NO_TEXT, exc)
            self._client.drop([generation.request], NO_TEXT)
            return None

    # -- metrics and log: what they fail of is said once, and never ends a request --
    def _count_start(self, generation: Generation) -> None:
        try:
            if self._log is not None:
                self._log.started(generation)
            if self._observer is not None:
                self._observer.received(is_stream=self._is_stream, prompt_tokens=generation.prompt_tokens)
        except Exception as exc:
            self._not_counted(exc)

    def _count_tokens(self, index: int, num_tokens: int) -> None:
        if self._observer is None or not num_tokens:
            return
        now = time.perf_counter()
        last = self._last_s.get(index)
        self._last_s[index] = now
        try:
            if last is None:
                self._observer.first_token(is_stream=self._is_stream, elapsed_s=now - self._started_s)
            else:
                self._observer.next_tokens(num_tokens=num_tokens, elapsed_s=now - last)
        except Exception as exc:
            self._not_counted(exc)

    def _count_end(self, generation: Generation) -> None:
        elapsed_s = time.perf_counter() - self._started_s
        try:
            if self._observer is not None:
                self._observer.finished(generation, is_stream=self._is_stream, elapsed_s=elapsed_s)
            if self._log is not None:
                self._log.finished(generation, elapsed_s)
        except Exception as exc:
            self._not_counted(exc)

    def _not_counted(self, error: Exception) -> None:
        if self._service.failures.is_first("metrics", error):
            logger.error("metrics or request log failed; requests go on, and this is said once", exc_info=error)
