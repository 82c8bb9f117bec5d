"""`mooli.Engine`: a model in this process, for scripts, notebooks, threads and asyncio programs.

Owns the public methods and the life of an engine: start, use, shutdown. Text work is in `inputs`, `generation` and
`call`; what runs when is the engine's. Never starts a process, installs no signal handler, and touches no event loop of
the caller: the engine has one thread of its own, and a second only while it starts.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace, TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from mooli.config import EngineConfig
from mooli.engine.build import Progress, build_engine
from mooli.errors import ConfigError, PromptError
from mooli.frontend.cache_report import CacheExplainer, Told
from mooli.frontend.call import AsyncStream, Stream, run, run_async, stream_async, stream_sync
from mooli.frontend.chat import ChatOptions, chat_call, told_of
from mooli.frontend.generation import Generation, generations_of
from mooli.frontend.inputs import GenerateCall
from mooli.frontend.native_answer import NativeAnswer, model_info, native_answers
from mooli.frontend.own_answers import OwnAnswers
from mooli.frontend.parts import WireFormat
from mooli.frontend.text_side import check_preferred, input_rules, open_tokenizer, token_bytes, with_seed
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.tool_forcing import begin_behind_reasoning
from mooli.frontend.wire_formats.choice import open_wire_format
from mooli.hub.locate import locate
from mooli.link.thread import EngineLoop
from mooli.logs import add_log_level

logger = logging.getLogger(__name__)

P = ParamSpec("P")
C = TypeVar("C")
T = TypeVar("T")

Answer = dict[str, Any]
"""{"text", "output_ids", "meta_info": {"id", "finish_reason", "prompt_tokens", "completion_tokens", …}}
as SGLang has it; chunks of a call with several requests have "index" too; without a tokenizer there is no "text"."""


Conversation = Sequence[Mapping[str, Any]]
"""Messages: mappings of JSON values, with `role` and `content`."""


@dataclass(frozen=True, slots=True)
class FlushCacheResult:
    """Whether the cache was emptied, and why not."""

    success: bool
    message: str


def _taking(call: Callable[P, C]) -> Callable[[Callable[[Engine, C], T]], Callable[Concatenate[Engine, P], T]]:
    """Makes a method that takes a `call` one that takes its fields: by place, by name and with their types."""

    def decorate(method: Callable[[Engine, C], T]) -> Callable[Concatenate[Engine, P], T]:
        @functools.wraps(method)
        def taking(self: Engine, /, *args: P.args, **kwargs: P.kwargs) -> T:
            bound = signature.bind(self, *args, **kwargs)
            return method(self, call(*bound.args[1:], **bound.kwargs))

        fields = inspect.signature(call).parameters.values()
        own = inspect.signature(method)
        signature = own.replace(parameters=[own.parameters["self"], *fields])
        taking.__signature__ = signature  # type: ignore[attr-defined]
        return taking

    return decorate


class Engine:
    """A model, ready to generate. Keywords are those of `EngineConfig`; `model_path` is the only one that is needed.

        engine = Engine(model_path="demo")
        engine.generate("The capital of France is", {"max_new_tokens": 8})["text"]

    All methods may be called from several threads at once; concurrent calls share each step of the model. It works in a
    script without an `if __name__ == "__main__"` guard, and in a notebook, whose event loop is left alone. An engine
    that is not shut down is when it is collected, or when the interpreter ends.

    server_args: an `EngineConfig` or a dict of its keywords, instead of keywords.
    progress: called as progress(stage, done, total) while the model loads.

    Raises ConfigError (UnknownArgumentError for a name that does not exist), BackendUnavailableError, OutOfMemoryError
    or a ModelError, all with what to do about it.
    """

    def __init__(
        self,
        *,
        server_args: EngineConfig | Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> None:
        started = time.perf_counter()
        given = _config(server_args, kwargs)
        config = with_seed(given)
        check_preferred(config)
        add_log_level(config.log_level)
        if config.trust_remote_code:
            logger.info("trust_remote_code has no effect: code from a model folder is never run")
        model_path = locate(config.model_path, needs_weights=config.load_format != "dummy")
        with ThreadPoolExecutor(1, "mooli-tokenizer") as aside:
            opening = _Opening(lambda: aside.submit(open_tokenizer, config, model_path))
            built = build_engine(
                given,  # without a seed, dummy weights are the same each time
                model_path,
                tokenizer_vocab_size=lambda: _vocab_size(opening.result()),
                progress=opening.beside(progress),
            )
            tokenizer = opening.result()
        self.server_args = config
        self.tokenizer_manager = SimpleNamespace(tokenizer=tokenizer)
        self._tokenizer = tokenizer
        self._facts = built.facts
        self._core = built.core
        self._wire_format = open_wire_format(config, tokenizer)
        self._rules = input_rules(config, built.facts, tokenizer, self._wire_format)
        self._own_answers = None if tokenizer is None or config.disable_radix_cache else OwnAnswers(tokenizer)
        self._explainer = CacheExplainer(tokenizer, self._rules.namespace)
        self._loop = EngineLoop(built.core, built.facts, on_thread_start=built.bind_thread)
        wake = functools.partial(self._loop.wake, built.core.look_again)
        self._loop.wake(lambda: built.core.bind_disk(wake))
        if tokenizer is not None and config.grammar_backend != "none":
            vocabulary = functools.partial(token_bytes, tokenizer, built.facts, self._wire_format)
            self._loop.wake(lambda: built.core.bind_grammars(vocabulary, wake))
        built.watch(self._loop.fail)
        self._finalizer = weakref.finalize(self, _shut_down, self._loop, built.close)
        self._startup_time_s = time.perf_counter() - started

    @_taking(GenerateCall)
    def generate(self, call: GenerateCall) -> Answer | list[Answer] | Stream:
        """Generate and wait: a dict for one prompt, a list for a list of prompts or n > 1 (grouped by prompt).

        The arguments are the fields of `GenerateCall`: generate(prompt, sampling_params, …).

        stream=True: return an iterator of chunks at once. Each has everything so far, or with the engine's
        incremental_streaming_output what is new; the last one of a request has a finish_reason. Lists of the
        prompt's log-probabilities and of alternatives come once: in the last chunk, or with
        incremental_streaming_output in the first and beside their tokens. Closing or dropping the iterator, or
        Ctrl-C while it waits, aborts what is not finished; one that is kept and not read goes on to its end.

        Raises PromptError, SamplingParamsError or another RequestError (all ValueError) before anything runs;
        RequestFailedError if the only request fails; in a list, or in a stream, a failed request has the finish_reason
        type `error` instead. Raises EngineClosedError after `shutdown`, EngineDeadError if the engine breaks down.
        """
        return self._answer(call)

    @_taking(GenerateCall)
    async def async_generate(self, call: GenerateCall) -> Answer | list[Answer] | AsyncStream:
        """`generate`, with the same arguments, for asyncio: await it for the answer, or with stream=True for an
        asynchronous iterator. Cancelling the task, or closing the iterator, aborts the requests."""
        return await self._answer_async(call)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        stream: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Answer | list[Answer] | Stream:
        """`generate` for a conversation, or for a list of conversations: the model's own template makes its prompt.

        messages: dicts of `role` and `content` as OpenAI has them, with `tool_calls` and results of tools too; or a
        list of such lists. No text in them can end a message or begin another.
        tools, tool_choice, parallel_tool_calls: the functions that the model may call, and whether it must, as OpenAI
        has them. response_format: what the answer is held to, likewise. Nothing is called here: who asks does that.
        add_generation_prompt: the assistant begins a message. continue_final_message: the last message goes on instead.
        chat_template_kwargs: further names for the template, `enable_thinking` for example.
        arguments: other fields of `GenerateCall`, such as return_logprob.

        The answer is that of `generate` with one key more: `message` is what the assistant says, to be appended to
        `messages`: {"role", "content"}, and where there are some `reasoning_content` and `tool_calls`, whose arguments
        are JSON. With the engine's incremental_streaming_output only the last chunk has it. `text` is all of that as
        the model writes it.

        Raises ChatTemplateError if the model has no template or it refuses the messages, RequestError for tools or
        messages that are wrong, and what `generate` raises.
        """
        options = ChatOptions(
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        call, wire_format, told = self._chat_call(
            messages, options, {**arguments, "sampling_params": sampling_params, "stream": stream}
        )
        return self._answer(call, wire_format, told)

    async def async_chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        stream: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Answer | list[Answer] | AsyncStream:
        """`chat`, with the same arguments, for asyncio; as `async_generate` is to `generate`."""
        options = ChatOptions(
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        call, wire_format, told = self._chat_call(
            messages, options, {**arguments, "sampling_params": sampling_params, "stream": stream}
        )
        return await self._answer_async(call, wire_format, told)

    def flush_cache(self) -> FlushCacheResult:
        """Forget all cached prefixes. Without effect, and saying so, while requests are running."""
        if self._loop.call(self._core.flush_cache):
            return FlushCacheResult(True, "Cache flushed.")
        return FlushCacheResult(False, "The cache is not flushed: requests are running or waiting.")

    def get_server_info(self) -> dict[str, Any]:
        """All arguments, what became of their defaults, what the device is, and counters since the start."""
        from mooli.version import __version__  # here: looking it up costs 20 ms, of every start

        stats = self._loop.call(self._core.stats)
        return {
            **self.server_args.to_dict(),
            **self._facts.to_dict(),
            "startup_time": self._startup_time_s,
            "internal_states": [stats],
            "version": __version__,
        }

    def get_model_info(self) -> dict[str, Any]:
        """Which model this is."""
        return model_info(self.server_args, self._facts, self._wire_format)

    def shutdown(self) -> None:
        """Stop the engine and give its memory back. Open requests end with EngineClosedError. May be called again."""
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _chat_call(
        self, messages: Any, options: ChatOptions, arguments: dict[str, Any]
    ) -> tuple[GenerateCall, WireFormat, list[Told]]:
        """Also what the template is told, where a report on the cache is wanted."""
        if self._tokenizer is None:
            raise PromptError(
                "a conversation needs a tokenizer, and there is none here: give input_ids to generate",
                argument="messages",
                advice="(skip_tokenizer_init=True leaves it out)",
            )
        context_length = self._facts.context_length
        owner = self._rules.namespace_of(arguments.get("cache_salt"))
        own = self._own_answers
        call, wire_format = chat_call(
            self._tokenizer,
            self._wire_format,
            messages,
            options,
            arguments,
            context_length,
            encode=self._tokenizer.encode if self._rules.texts is None else self._rules.texts.of(owner),
            take_up=list if own is None else functools.partial(own.taken_up, owner),
        )
        told = told_of(messages, options) if arguments.get("return_cache_report") else []
        return GenerateCall(**call), wire_format, told

    def _answer(
        self, call: GenerateCall, messages: WireFormat | None = None, told: Sequence[Told] = ()
    ) -> Answer | list[Answer] | Stream:
        answers, is_single = self._prepare(call, messages, told)
        if call.stream:
            return stream_sync(self._loop, answers, owner=self)
        results = run(self._loop, answers)
        return results[0] if is_single else results

    async def _answer_async(
        self, call: GenerateCall, messages: WireFormat | None = None, told: Sequence[Told] = ()
    ) -> Answer | list[Answer] | AsyncStream:
        answers, is_single = self._prepare(call, messages, told)
        if call.stream:
            return stream_async(self._loop, answers, owner=self)
        results = await run_async(self._loop, answers)
        return results[0] if is_single else results

    def _remember(self, generation: Generation) -> None:
        """The answer to a conversation, for its next turn."""
        if self._own_answers is not None:
            self._own_answers.add(generation.request, generation.output_ids)

    def _prepare(
        self, call: GenerateCall, messages: WireFormat | None, told: Sequence[Told]
    ) -> tuple[list[NativeAnswer], bool]:
        """The answers of a checked call, none submitted yet, and whether it is for a dict rather than a list. messages:
        of a call of conversations, how their answers are read; told: those conversations, for a report."""
        inputs = self._rules.prepare(call)
        reads = self._wire_format if messages is None else messages
        holds_behind = call.require_reasoning or messages is not None
        begin_behind_reasoning(inputs.requests, reads, self._tokenizer, grammars=holds_behind)
        if self._tokenizer is not None and any(request.sampling.thinking is not None for request in inputs.requests):
            token_bytes(self._tokenizer, self._facts, self._wire_format)  # the first time here, and not between steps
        markers = () if messages is None or self._tokenizer is None else messages.marker_tokens
        shown_ids = self._tokenizer.special_ids_of(markers) if self._tokenizer is not None and markers else frozenset()
        generations = generations_of(inputs.requests, self._tokenizer, shown_ids=shown_ids)
        answers = native_answers(
            generations,
            self._tokenizer,
            self.server_args,
            is_single=inputs.is_single,
            reasoning=self._wire_format if call.require_reasoning else None,
            messages=messages,
            on_end=self._remember,
            inquiries=self._explainer.inquire_all(inputs.requests, told) if call.return_cache_report else None,
        )
        return answers, inputs.is_single


def _config(server_args: EngineConfig | Mapping[str, Any] | None, kwargs: dict[str, Any]) -> EngineConfig:
    if server_args is None:
        return EngineConfig.from_kwargs(**kwargs)
    if kwargs:
        raise ConfigError(f"server_args and keywords ({', '.join(kwargs)}) are both given: give one of them")
    if isinstance(server_args, EngineConfig):
        return server_args
    if not isinstance(server_args, Mapping):
        raise ConfigError(f"server_args must be an EngineConfig or a dict, not {type(server_args).__name__}")
    return EngineConfig.from_kwargs(**server_args)


def _vocab_size(tokenizer: Tokenizer | None) -> int | None:
    return None if tokenizer is None else tokenizer.vocab_size


class _Opening:
    """The tokenizer, read beside the weights from when the first of them is packed. Not before: its library keeps the
    interpreter to itself for long, and what comes before the weights is needed to have anything packed at all."""

    def __init__(self, submit: Callable[[], Future[Tokenizer | None]]) -> None:
        self._submit = submit
        self._future: Future[Tokenizer | None] | None = None

    def result(self) -> Tokenizer | None:
        """Waits for it, or raises why it cannot be read."""
        return self._begun().result()

    def beside(self, progress: Progress | None) -> Progress:
        """`progress`, which ends the loading where the tokenizer cannot be read: weights may take a minute more."""

        def report(stage: str, done: int, total: int) -> None:
            if self._begun().done():
                self.result()
            if progress is not None:
                progress(stage, done, total)

        return report

    def _begun(self) -> Future[Tokenizer | None]:
        if self._future is None:
            self._future = self._submit()
        return self._future


def _shut_down(loop: EngineLoop, close: Callable[[], None]) -> None:
    # Memory that a step still computes in must not be given back.
    if loop.close():
        close()
