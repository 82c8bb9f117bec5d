"""What `mooli generate`, `mooli chat` and `mooli demo` do: an engine in this process, and its answers as they come.

Owns what is printed: answers on standard output; progress, statistics, errors of single answers and, in a conversation,
what the model reasons on standard error.
Their flags are in `mooli.cli`. Never does what `Engine` cannot do for everybody.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mooli.config import DEMO, EngineConfig
from mooli.engine.facts import device_words
from mooli.entry import INTERRUPTED, Interruptible
from mooli.errors import ChatTemplateError, ConfigError, PromptError, RequestError, RequestFailedError
from mooli.frontend.call import Stream
from mooli.frontend.chat_encoding import encode_chat
from mooli.frontend.engine import Answer, Engine
from mooli.frontend.parts import PLAIN_TEXT, Parser, Part
from mooli.frontend.sampling import parse_sampling_params
from mooli.frontend.wire_formats.choice import open_wire_format
from mooli.logs import report_error

DEMO_PROMPTS = (
    "Please introduce yourself briefly.",
    "Write a binary search in Python, with comments.",
    "Explain what hallucination means in a language model.",
)

_WITHOUT_EFFECT = {
    "skip_tokenizer_init": "it leaves nothing that could be printed here",
    "served_model_name": "nobody asks for the model by name here",
    "incremental_streaming_output": "an answer is printed as it comes in any case",
}
"""Engine arguments that would change nothing in these commands, and why."""

_ONE_REQUEST = "one request runs at a time here"
_WITHOUT_EFFECT_ALONE = _WITHOUT_EFFECT | {"schedule_policy": _ONE_REQUEST, "max_running_requests": _ONE_REQUEST}
"""The same for `chat` and `demo`."""

Messages = list[dict[str, str]]

_SAMPLING_FLAGS = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


def _sampling_params(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _SAMPLING_FLAGS if getattr(args, name) is not None}


def generate(args: argparse.Namespace) -> int:
    """Answer the prompts of the command line, or what is on standard input."""
    config = _config(args, _WITHOUT_EFFECT)
    prompts = args.prompt or [_prompt_from_stdin()]
    if "" in prompts:
        raise PromptError("--prompt is empty: give a text, or leave it out for standard input")
    if len(prompts) > 1 and hasattr(args, "stream_interval"):
        raise ConfigError("--stream-interval: answers to several prompts are printed when all have ended; remove it")
    with _open_engine(config) as engine, Interruptible():
        inputs: list[Any] = prompts
        if args.chat:
            inputs = [_chat_ids(engine, [{"role": "user", "content": prompt}]) for prompt in prompts]
        if len(prompts) == 1:
            shown = _show(engine, args, **{"input_ids" if args.chat else "prompt": inputs[0]})
            print(shown.statistics(), file=sys.stderr)
            return INTERRUPTED if shown.is_interrupted else 0
        params = _sampling_params(args)
        prompt, ids = (None, inputs) if args.chat else (inputs, None)
        answers = cast(list[Answer], engine.generate(prompt, params, ids))
        totals, failed = _Shown(), 0
        for text, answer in zip(prompts, answers, strict=True):
            print(f"--- {text}\n{answer['text']}")
            meta = answer["meta_info"]
            totals.add(_Shown("", meta["prompt_tokens"], meta["cached_tokens"], meta["completion_tokens"]))
            if meta["finish_reason"]["type"] == "error":
                report_error(RequestFailedError(f"{text[:40]!r} failed: {meta['finish_reason']['message']}"))
                failed = 2
        print(f"all together: {totals.statistics()}", file=sys.stderr)
    return failed


def _prompt_from_stdin() -> str:
    """All of standard input but the line end that a shell or an editor puts behind it, which a model would read."""
    if sys.stdin is None:
        raise PromptError("standard input is closed: give --prompt")
    if sys.stdin.isatty():
        print("Type the prompt; Ctrl-D on an empty line ends it.", file=sys.stderr)
    text = sys.stdin.read().removesuffix("\n").removesuffix("\r")
    if not text:
        raise PromptError("the prompt is empty: give --prompt, or a text on standard input")
    return text


def demo(args: argparse.Namespace) -> int:
    """Three questions to the demo model."""
    with _open_engine(_config(args, _WITHOUT_EFFECT_ALONE, model_path=DEMO)) as engine, Interruptible():
        totals = _Shown()
        for prompt in DEMO_PROMPTS:
            print(f"\n>>> {prompt}\n")
            shown = _show(engine, args, input_ids=_chat_ids(engine, [{"role": "user", "content": prompt}]))
            print(f"\n{shown.statistics()}")
            if shown.is_interrupted:
                return INTERRUPTED
            totals.add(shown)
        print(f"\nall together: {totals.statistics()}")
    return 0


def chat(args: argparse.Namespace) -> int:
    """A conversation, line by line."""
    start: Messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    with _open_engine(_config(args, _WITHOUT_EFFECT_ALONE)) as engine, Interruptible():
        messages = list(start)
        if sys.stdin is not None and sys.stdin.isatty():
            print("/reset forgets the conversation, /exit leaves, Ctrl-C ends an answer.", file=sys.stderr)
        for line in _lines():
            if line in ("/exit", "/quit"):
                break
            if line == "/reset":
                messages = list(start)
                print("The conversation is forgotten.", file=sys.stderr)
                continue
            if line.startswith("/"):
                print("Commands: /reset, /exit", file=sys.stderr)
                continue
            if line:
                _chat_turn(engine, args, messages, line)
    return 0


def _chat_turn(engine: Engine, args: argparse.Namespace, messages: Messages, line: str) -> None:
    """Answer `line` and append both to `messages`. Ctrl-C ends the answer; what there is of it is kept."""
    messages.append({"role": "user", "content": line})
    try:
        shown = _answered(engine, args, messages)
    except (RequestError, RequestFailedError, ChatTemplateError) as exc:
        messages.pop()
        report_error(exc)
        print("The last message is forgotten; /reset begins a new conversation.", file=sys.stderr)
        return
    told = {"role": "assistant", "content": shown.text}
    messages.append(told | {"reasoning_content": shown.reasoning} if shown.reasoning else told)
    print(shown.statistics(), file=sys.stderr)


def _answered(engine: Engine, args: argparse.Namespace, messages: Messages) -> _Shown:
    """The next message, printed as it comes: what the model reasons apart, where it is known how that is marked."""
    ids = _chat_ids(engine, messages)
    tokenizer = engine.tokenizer_manager.tokenizer
    wire_format = open_wire_format(engine.server_args, tokenizer)
    if wire_format.name is None:
        return _show(engine, args, input_ids=ids)
    tail = tokenizer.decode(ids[-wire_format.prompt_tail_tokens :], skip_special_tokens=False)
    return _show(engine, args, wire_format.parser(tail), messages=messages)


# -- parts --


@dataclass(slots=True)
class _Shown:
    """An answer as it was printed, and its figures. decode_s: from the first token to the last."""

    text: str = ""
    reasoning: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    decode_tokens: int = 0
    decode_s: float = 0.0
    is_interrupted: bool = False

    def add(self, other: _Shown) -> None:
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.decode_tokens += other.decode_tokens
        self.decode_s += other.decode_s

    def tell(self, parts: Sequence[Part]) -> None:
        """Print what is new. Reasoning is dim on a terminal, and ends its line before the answer begins."""
        for part in (part for part in parts if part.text):
            if part.kind == "reasoning":
                dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
                print(f"{dim}{part.text}{plain}", end="", file=sys.stderr, flush=True)
                self.reasoning += part.text
                continue
            if self.reasoning and not self.text:
                print(file=sys.stderr, flush=True)
            sys.stdout.write(part.text)
            sys.stdout.flush()
            self.text += part.text

    def statistics(self) -> str:
        speed = f", {self.decode_tokens / self.decode_s:.1f} tok/s" if self.decode_s > 0 else ""
        first = "" if self.first_token_s is None else f", first token after {self.first_token_s * 1000:.0f} ms"
        interrupted = "; interrupted" if self.is_interrupted else ""
        return (
            f"[{self.completion_tokens} tokens{speed}; prompt {self.prompt_tokens} tokens, {self.cached_tokens} from"
            f" the cache{first}{interrupted}]"
        )


def _show(engine: Engine, args: argparse.Namespace, parser: Parser = PLAIN_TEXT, **inputs: Any) -> _Shown:
    """Generate, and print the answer as it comes. Ctrl-C ends it. inputs: of `Engine.generate`, or `messages`."""
    shown = _Shown()
    answer = engine.chat if "messages" in inputs else engine.generate
    first_tokens = 0
    began = time.perf_counter()
    chunks: Stream | None = None
    try:
        chunks = cast(Stream, answer(sampling_params=_sampling_params(args), stream=True, **inputs))
        for chunk in chunks:
            elapsed_s = time.perf_counter() - began
            meta = chunk["meta_info"]
            shown.tell(parser.push(chunk["text"], [len(chunk["text"])]))
            shown.prompt_tokens, shown.cached_tokens = meta["prompt_tokens"], meta["cached_tokens"]
            if shown.first_token_s is None:
                first_tokens, shown.first_token_s = meta["completion_tokens"], elapsed_s
            shown.completion_tokens = meta["completion_tokens"]
            shown.decode_tokens = shown.completion_tokens - first_tokens
            shown.decode_s = elapsed_s - shown.first_token_s
            finish = meta["finish_reason"]
            if finish is not None and finish["type"] == "error":
                raise RequestFailedError(finish["message"])
    except KeyboardInterrupt:
        shown.is_interrupted = True
        if chunks is not None:
            chunks.close()
    shown.tell(parser.flush())
    print(flush=True)
    return shown


def _chat_ids(engine: Engine, messages: Messages) -> list[int]:
    """The ids of a conversation, up to where the assistant is to go on. Nothing typed in it can end a turn."""
    tokenizer = engine.tokenizer_manager.tokenizer
    if tokenizer.chat_template is None:
        raise ChatTemplateError("the model has no chat template: give one with --chat-template")
    return encode_chat(tokenizer, messages)


def _lines() -> Iterator[str]:
    """What the user types, or the lines of a pipe, until the end."""
    if sys.stdin is None:
        return
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` editing and history, where Python has it
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return


def _config(args: argparse.Namespace, without_effect: Mapping[str, str], **defaults: Any) -> EngineConfig:
    """The engine arguments of a command. Those for sampling are checked too: before the model is loaded.

    Raises ConfigError for those that would change nothing here, with the reason.
    """
    for name in EngineConfig.given_in(args):
        if name in without_effect:
            raise ConfigError(f"--{name.replace('_', '-')}: {without_effect[name]}; remove it")
    defaults["log_level"] = "warning"
    defaults["incremental_streaming_output"] = True
    config = EngineConfig.from_cli_args(args, **defaults)
    preferred = args.default_sampling | config.preferred_sampling
    config = dataclasses.replace(config, preferred_sampling_params=json.dumps(preferred))
    parse_sampling_params(_sampling_params(args), vocab_size=2**31, next_seed=lambda: 0)
    return config


def _open_engine(config: EngineConfig) -> Engine:
    progress = _Progress(config.model_path)
    engine = Engine(server_args=config, progress=progress.update)
    progress.end(engine)
    return engine


class _Progress:
    """A line that fills while the model loads, on a terminal; one line when it is loaded, anywhere."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._is_terminal = sys.stderr.isatty()

    def update(self, stage: str, done: int, total: int) -> None:
        if self._is_terminal:
            print(f"\r\x1b[K{stage} {100 * done // max(total, 1)}%", end="", file=sys.stderr, flush=True)

    def end(self, engine: Engine) -> None:
        info = engine.get_server_info()
        clear = "\r\x1b[K" if self._is_terminal else ""
        device = f"{engine.server_args.backend_name} ({device_words(info['backend'])})"
        print(
            f"{clear}{self._model}: ready in {info['startup_time']:.1f} s; backend {device},"
            f" context {info['context_length']} tokens, KV cache {info['max_total_num_tokens']} tokens",
            file=sys.stderr,
            flush=True,
        )
