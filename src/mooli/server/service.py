"""What routes work with: one model's text side, and the engine process behind it.

Owns the way from the arguments of a call to its growing answers, how many may run and wait together, and who is counted
in the metrics. Text is brought up to date when an output comes, whether or not anybody reads: a stop string ends its
request at once, and so does a text that cannot be made. Never knows HTTP.
Lives in the server's event loop; only tokenising of long texts leaves it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from mooli.config import EngineConfig
from mooli.engine.facts import EngineFacts
from mooli.errors import KeyBusyError, QueueFullError, RequestError
from mooli.frontend.cache_report import Asked, CacheExplainer, Inquiry, Told
from mooli.frontend.call import Call, Listener
from mooli.frontend.chat_encoding import encode_conversation
from mooli.frontend.generation import Generation, generations_of
from mooli.frontend.infill import Infill, open_infill
from mooli.frontend.inputs import NOBODY, Caller, CallInputs, GenerateCall, Ids, InputRules
from mooli.frontend.own_answers import OwnAnswers
from mooli.frontend.parts import PLAIN_TEXT, WireFormat
from mooli.frontend.prefix_lengths import PrefixLengths
from mooli.frontend.retention import Place
from mooli.frontend.text_side import input_rules
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.tool_forcing import begin_behind_reasoning
from mooli.frontend.tool_prompt import for_template
from mooli.frontend.tools import ToolSet
from mooli.frontend.wire_formats.choice import open_wire_format
from mooli.link.link import Link
from mooli.logs import FirstTimes
from mooli.server.activity import Activity
from mooli.server.batch_desk import BatchDesk
from mooli.server.cache_feed import CacheFeed, Names
from mooli.server.config import ServerConfig
from mooli.server.keys import Key, KeyRing
from mooli.server.logs import LogTail, RequestLog, StepLog
from mooli.server.metrics import Metrics
from mooli.server.response_store import ResponseStore
from mooli.server.work import SharedWork, TextThreads, num_chars
from mooli.types import TokenBytes

NO_TEXT = "its text could not be made; the server's log says why"
"""Of a failure whose words are not for clients."""

LEFT = "The client closed the connection."

T = TypeVar("T")


class Service:
    """See the module docstring. Attributes are for routes to read.

    sampling_defaults: of chats, from the model's own files; laid under what a request says.
    last_stats: `Scheduler.stats` of the newest step, None before the first.
    token_bytes: of the vocabulary, for grammars; kept by the function once they are made.
    """

    def __init__(
        self,
        *,
        config: ServerConfig,
        engine_config: EngineConfig,
        client: Link,
        tokenizer: Tokenizer | None,
        metrics: Metrics,
        step_log: StepLog,
        request_log: RequestLog | None,
        sampling_defaults: Mapping[str, Any],
        startup_time_s: float,
        launch_command: str,
        keys: KeyRing,
        log_tail: LogTail,
        batches: BatchDesk | None = None,
        token_bytes: Callable[[], TokenBytes] | None = None,
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
        self.last_stats: Mapping[str, int] | None = None
        self.failures = FirstTimes()
        self.log_tail = log_tail
        self.activity = Activity(client.name_of)
        self.max_open = client.facts.max_running_requests + config.max_queued_requests
        """Sequences that may run and wait together."""
        self.wire_format: WireFormat = open_wire_format(engine_config, tokenizer)
        """How the model writes its messages. Chats read answers by it; other routes tell the text as it is."""
        self.infill: Infill | None = open_infill(tokenizer)
        """How the model fills in the middle of a text; None if it does not."""
        self.rules: InputRules = replace(
            input_rules(engine_config, client.facts, tokenizer, self.wire_format),
            max_sequences=self.max_open,
            max_stop_chars=config.max_stop_chars,
        )
        self.own_answers = None if tokenizer is None or engine_config.disable_radix_cache else OwnAnswers(tokenizer)
        """Of conversations, for their next turns; None where nothing is found again anyway."""
        self.explainer = CacheExplainer(tokenizer, self.rules.namespace)
        """Says of a request that asks what the cache had of it."""
        self.responses = ResponseStore(config.response_store_bytes) if config.enable_response_store else None
        """What was answered, for clients that ask again; None: nothing is kept."""
        self.batches = batches
        """Of clients, with their files; None: none are taken."""
        self.text_threads = TextThreads()
        self.is_draining = False
        self.num_active = 0
        """Calls that are not closed yet."""
        self.num_sequences: collections.Counter[str] = collections.Counter()
        """Of those calls, by the name of the key they came with; those in the background left out."""
        self.num_background = 0
        """Sequences in the background: they take nobody's place."""
        self.num_flushing = 0
        """Calls that wait until the cache can be flushed."""
        self.cache_feed = CacheFeed(
            client,
            self.activity,
            Names(self._label, self._tenant_of),
            tokens_per_s=lambda: step_log.last_gen_throughput,
            is_draining=lambda: self.is_draining,
        )
        """The cache and what runs in it, for who looks."""
        self._prefix_lengths = None if tokenizer is None else PrefixLengths(tokenizer)
        self._token_bytes = token_bytes
        self._shared: dict[str, SharedWork[Any]] = {}
        self._tenants: frozenset[str] | None = None
        self._labels: dict[str, str] = {}

    @property
    def facts(self) -> EngineFacts:
        return self.client.facts

    @property
    def model_name(self) -> str:
        return self.engine_config.served_model_name or self.engine_config.model_path

    async def prepare(self, call: GenerateCall, caller: Caller = NOBODY) -> CallInputs:
        """`InputRules.prepare`, off the event loop where text or lists are long; what is held behind reasoning knows of
        it then. Raises RequestError."""
        if isinstance(call.prompt, str):
            self.rules.check_length(call.prompt)  # here: it need not wait for a thread
        num = num_chars((call.prompt, call.input_ids, call.sampling_params, call.token_ids_logprob))
        inputs = await self.text_threads.run(num, lambda: self.rules.prepare(call, caller))
        begin_behind_reasoning(inputs.requests, self.wire_format, self.tokenizer, grammars=call.require_reasoning)
        # The first time it takes long, and the link asks for it in the event loop.
        if self._token_bytes is not None and any(item.sampling.needs_vocabulary for item in inputs.requests):
            await asyncio.to_thread(self._token_bytes)
            self._token_bytes = None
        return inputs

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: ToolSet | None = None,
        template_arguments: Mapping[str, Any] = MappingProxyType({}),
        *,
        owner: str | None = None,
        takes_up: bool = False,
    ) -> Ids:
        """Ids of a conversation in OpenAI's chat shape (`mooli.frontend.tool_prompt.for_template`,
        `mooli.frontend.chat_encoding.encode_conversation`). What users write never becomes a control token.

        owner: whose texts of before are remembered, see `owner_of`. takes_up: with the ids of their own answers.

        Raises ChatTemplateError, PromptError, ContextLengthError before the text is tokenised where it is certainly too
        long, or RequestError for messages that are wrong, and without a tokenizer or a template."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError("this server has no tokenizer: use /generate with input_ids")
        template = tokenizer.chat_template
        if template is None:
            raise RequestError("this model has no chat template: use /v1/completions or /generate", argument="messages")
        limit = None if self.rules.allow_auto_truncate else self.rules.context_length

        texts, own = self.rules.texts, self.own_answers

        def encode() -> Ids:
            told, shown = for_template(template, messages, tools)
            ids = encode_conversation(
                tokenizer,
                told,
                shown,
                template_arguments,
                context_length=limit,
                encode=None if texts is None else texts.of(owner),
            )
            return ids if own is None or owner is None or not takes_up else own.taken_up(owner, ids)

        given = (messages, template_arguments, [] if tools is None else tools.for_template())
        return await self.text_threads.run(num_chars(given), encode)

    def owner_of(self, caller: Caller, cache_salt: str | None = None) -> str | None:
        """Whose conversations share what is computed for them: in the cache, in `own_answers`, and of their texts. None
        for one in the background, whose answers are not to depend on what was answered before."""
        return None if caller.is_background else self.rules.namespace_of(cache_salt, caller.tenant)

    async def inquire(
        self,
        inputs: CallInputs,
        caller: Caller,
        told: Told | None = None,
        *,
        model: str | None = None,
        previous_id: str | None = None,
    ) -> Inquiry:
        """What is to be told of the first request of a call, which asks for it. told: its conversation. previous_id: of
        the request that it goes on; without one, that of the same conversation is looked for."""
        request = inputs.requests[0]
        asked = Asked(request.rid, request.namespace, caller.tenant, model or self.model_name, previous_id)
        num = 0 if told is None else num_chars((told.messages, told.template_arguments))
        return await self.text_threads.run(num, lambda: self.explainer.inquire(asked, len(request.prompt_ids), told))

    def chat_sampling(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling parameters of a chat: those given over the model's own; what the operator prefers goes between."""
        preferred = self.engine_config.preferred_sampling
        own = {name: value for name, value in self.sampling_defaults.items() if name not in preferred}
        return {**own, **given}

    async def prefix_tokens(self, told: Told, place: Place) -> int | None:
        """Tokens of a conversation's prompt up to the end of a message or tool; None where that cannot be told."""
        lengths = self._prefix_lengths
        if lengths is None:
            return None
        num = num_chars((told.messages, told.template_arguments))
        return await self.text_threads.run(num, lambda: lengths.up_to(told, place))

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Raises PromptError, or RequestError without a tokenizer."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError("this server has no tokenizer")
        return await self.text_threads.run(
            len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    def require_infill(self, name: str) -> Infill:
        """name: of the field that asks for a middle. Raises RequestError for a model that was not taught to."""
        if self.infill is None:
            raise RequestError(
                f"{name} is not supported by this model: its vocabulary has no tokens for filling in a middle. Leave it"
                " out",
                argument=name,
            )
        return self.infill

    async def encode_infill(
        self, infill: Infill, before: str, after: str, files: tuple[tuple[str, str], ...] = ()
    ) -> list[int]:
        """Ids of `Infill.encode`. Raises PromptError, and ContextLengthError before a text is tokenised that is
        certainly too long."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError("this server has no tokenizer")
        for text in (before, after):
            self.rules.check_length(text)
        num = len(before) + len(after) + num_chars(files)
        return await self.text_threads.run(num, lambda: infill.encode(tokenizer, before, after, files))

    @contextlib.contextmanager
    def start(
        self, inputs: CallInputs, *, wire_format: WireFormat = PLAIN_TEXT, is_counted: bool = True
    ) -> Iterator[Call]:
        """Submit. Leaving it aborts what is not finished; what was computed of that stays in the cache.

        wire_format: by which the answers are read. is_counted: False for health checks, which are no traffic.
        Raises RequestError for an id in use, QueueFullError, KeyBusyError when it would be more than the key may have,
        EngineDeadError.
        """
        num_new, is_background = len(inputs.requests), inputs.requests[0].is_background
        key = self.keys.named(inputs.requests[0].client)
        name = "" if key is None else key.name
        self._check_key(key, num_new, 0 if is_background else self.num_sequences[name])
        if not is_background and self.client.num_open - self.num_background + num_new > self.max_open:
            raise QueueFullError("The request queue is full.", retry_after_s=1)
        listeners: list[Listener] = []
        if is_counted:
            # The log first: it says that a request begins before anything is counted of it.
            listeners = [log for log in (self.request_log,) if log is not None]
            listeners.append(_Measured(self.metrics, self.activity, is_stream=inputs.is_stream))
        if self.own_answers is not None and wire_format is not PLAIN_TEXT and not is_background:
            listeners.append(_Remembered(self.own_answers))
        markers = wire_format.marker_tokens
        shown_ids = self.tokenizer.special_ids_of(markers) if self.tokenizer and markers else frozenset()
        generations = generations_of(inputs.requests, self.tokenizer, shown_ids=shown_ids)
        call = Call(self.client, generations, listeners=listeners, no_text=NO_TEXT, failures=self.failures)
        self.num_active += 1
        self._count(name, num_new, is_background)
        try:
            yield call
        finally:
            self.num_active -= 1
            self._count(name, -num_new, is_background)
            call.close(LEFT)

    def _count(self, name: str, num_new: int, is_background: bool) -> None:
        if is_background:
            self.num_background += num_new
        else:
            self.num_sequences[name] += num_new

    def shared(
        self, name: str, work: Callable[[], Awaitable[T]], *, keep_s: float = 0.0, pause_s: float = 0.0
    ) -> SharedWork[T]:
        """The work of that name, which is this one if there is none yet."""
        return self._shared.setdefault(name, SharedWork(work, keep_s=keep_s, pause_s=pause_s))

    def _label(self, namespace: str) -> str:
        """Of a namespace of the cache, for people."""
        if self._tenants is not self.keys.tenants:  # they were read anew
            self._tenants = self.keys.tenants
            self._labels = {self.rules.namespace_of(None, tenant): f"tenant {tenant}" for tenant in self._tenants}
            self._labels[self.rules.namespace] = "default"
        return self._labels.get(namespace) or namespace[-12:]

    def _tenant_of(self, client: str) -> str:
        """Of who sends a request; "" for nobody whose name is in the file of keys."""
        key = self.keys.named(client)
        return "" if key is None else key.tenant

    def _check_key(self, key: Key | None, num_new: int, num_open: int) -> None:
        if key is None or key.max_sequences is None:
            return
        most = key.max_sequences
        if num_new > most:
            raise RequestError(
                f"this key may have {most} sequences at a time, and the request is for {num_new}: send fewer"
                " prompts, or a smaller n"
            )
        if num_open + num_new > most:
            raise KeyBusyError(
                f"This key may have {most} sequences running and waiting at a time: try again when some have ended.",
                retry_after_s=1,
            )


class _Remembered(Listener):
    """Tells of the answers to conversations."""

    def __init__(self, answers: OwnAnswers) -> None:
        self._answers = answers

    def finished(self, generation: Generation, elapsed_s: float) -> None:
        if generation.finish is not None:
            self._answers.add(generation.request, generation.output_ids)


class _Measured(Listener):
    """Tells the metrics, and who looks at the server, of one call's requests."""

    def __init__(self, metrics: Metrics, activity: Activity, *, is_stream: bool) -> None:
        self._metrics = metrics
        self._activity = activity
        self._is_stream = is_stream
        self._last_s: dict[str, float] = {}

    def started(self, generation: Generation) -> None:
        self._metrics.received(is_stream=self._is_stream, prompt_tokens=generation.prompt_tokens)
        self._activity.started(generation)

    def grew(self, generation: Generation, num_tokens: int, elapsed_s: float) -> None:
        last_s = self._last_s.get(generation.rid)
        self._last_s[generation.rid] = elapsed_s
        if last_s is None:
            self._metrics.first_token(is_stream=self._is_stream, elapsed_s=elapsed_s)
            self._activity.first_token(generation, elapsed_s)
        else:
            self._metrics.next_tokens(num_tokens=num_tokens, elapsed_s=elapsed_s - last_s)
            self._activity.next_tokens(num_tokens, elapsed_s - last_s)

    def finished(self, generation: Generation, elapsed_s: float) -> None:
        self._metrics.finished(generation, is_stream=self._is_stream, elapsed_s=elapsed_s)
        self._activity.finished(generation, elapsed_s)
