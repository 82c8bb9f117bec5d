"""What `mooli generate` and `mooli demo` do: an engine in this process, and its answers as they come.

Owns what is printed: answers on standard output; progress, statistics and errors of single answers on standard error.
Also what a conversation (`mooli.chat`) needs of the same: the engine of a command line, and the figures of an answer.
Flags are in `mooli.cli`. Never does what `Engine` cannot do for everybody.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mooli.config import DEMO, EngineConfig
from mooli.engine.facts import device_words
from mooli.entry import INTERRUPTED, Interruptible
from mooli.errors import ChatTemplateError, ConfigError, PromptError, RequestFailedError
from mooli.frontend.call import Stream
from mooli.frontend.chat_encoding import encode_chat
from mooli.frontend.engine import Answer, Engine
from mooli.frontend.sampling import parse_sampling_params
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
WITHOUT_EFFECT_ALONE = _WITHOUT_EFFECT | {"schedule_policy": _ONE_REQUEST, "max_running_requests": _ONE_REQUEST}
"""The same for conversations and `demo`."""

_SAMPLING_FLAGS = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


def sampling_params(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _SAMPLING_FLAGS if getattr(args, name) is not None}


def model_and_words(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The model that the words of a command line name, and what comes behind it: the first word is the model, unless
    --model-path gives it."""
    words: list[str] = list(args.words)
    if hasattr(args, "model_path") or not words:
        return None, words
    return words[0], words[1:]


def generate(args: argparse.Namespace) -> int:
    """Answer the prompts of the command line, or what is in files or on standard input."""
    model, words = model_and_words(args)
    config = engine_config(args, _WITHOUT_EFFECT, model)
    prompts = [*(args.prompt or ()), *([" ".join(words)] if words else [])]
    if "" in prompts:
        raise PromptError("--prompt is empty: give a text, or leave it out for standard input")
    if args.file:
        if len(prompts) > 1:
            raise ConfigError("--file goes with one prompt: give the others in commands of their own")
        prompts = ["\n\n".join([*prompts, *map(_text_of, args.file)])]
    prompts = prompts or [_prompt_from_stdin()]
    if len(prompts) > 1 and hasattr(args, "stream_interval"):
        raise ConfigError("--stream-interval: answers to several prompts are printed when all have ended; remove it")
    with open_engine(config) as engine, Interruptible():
        inputs: list[Any] = prompts
        if args.chat:
            inputs = [_chat_ids(engine, prompt) for prompt in prompts]
        if len(prompts) == 1:
            figures = _show(engine, args, **{"input_ids" if args.chat else "prompt": inputs[0]})
            print(figures.words(), file=sys.stderr)
            return INTERRUPTED if figures.is_interrupted else 0
        params = sampling_params(args)
        prompt, ids = (None, inputs) if args.chat else (inputs, None)
        answers = cast(list[Answer], engine.generate(prompt, params, ids))
        totals, failed = Figures(), 0
        for text, answer in zip(prompts, answers, strict=True):
            print(f"--- {text}\n{answer['text']}")
            meta = answer["meta_info"]
            totals.add(Figures(meta["prompt_tokens"], meta["cached_tokens"], meta["completion_tokens"]))
            if meta["finish_reason"]["type"] == "error":
                report_error(RequestFailedError(f"{text[:40]!r} failed: {meta['finish_reason']['message']}"))
                failed = 2
        print(f"all together: {totals.words()}", file=sys.stderr)
    return failed


MAX_FILE_BYTES = 8 << 20
"""Of a text that becomes part of a prompt."""


def read_text(path: str) -> str:
    """A file as part of a prompt. Raises PromptError where it cannot be read, or is no text."""
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise PromptError(f"{path} has more than {MAX_FILE_BYTES} bytes, the most that is read for a prompt")
        return data.decode("utf-8")
    except (OSError, RuntimeError) as exc:  # RuntimeError: ~ of an unknown user
        raise PromptError(f"{path} cannot be read: {exc}") from exc
    except UnicodeDecodeError as exc:
        raise PromptError(f"{path} is no text in UTF-8 (byte {exc.start}): convert it first") from exc


def _text_of(path: str) -> str:
    return _prompt_from_stdin() if path == "-" else read_text(path)


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
    with open_engine(engine_config(args, WITHOUT_EFFECT_ALONE, DEMO)) as engine, Interruptible():
        totals = Figures()
        for prompt in DEMO_PROMPTS:
            print(f"\n>>> {prompt}\n")
            figures = _show(engine, args, input_ids=_chat_ids(engine, prompt))
            print(f"\n{figures.words()}")
            if figures.is_interrupted:
                return INTERRUPTED
            totals.add(figures)
        print(f"\nall together: {totals.words()}")
    return 0


# -- parts --


@dataclass(slots=True)
class Figures:
    """What an answer took. first_token_s: from the question on. decode_s: from the first token to the last, in which
    decode_tokens came. finish: the type of its finish reason, "abort" where it was interrupted."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    decode_tokens: int = 0
    decode_s: float = 0.0
    finish: str | None = None

    @property
    def is_interrupted(self) -> bool:
        return self.finish == "abort"

    def add(self, other: Figures) -> None:
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.decode_tokens += other.decode_tokens
        self.decode_s += other.decode_s

    def saw(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int, elapsed_s: float) -> None:
        """A chunk has come: so many tokens in all, `elapsed_s` after the question."""
        self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
        if self.first_token_s is None:
            self.decode_tokens, self.first_token_s = -completion_tokens, elapsed_s
        self.decode_tokens += completion_tokens - self.completion_tokens
        self.completion_tokens = completion_tokens
        self.decode_s = elapsed_s - self.first_token_s

    def words(self) -> str:
        speed = f", {self.decode_tokens / self.decode_s:.1f} tok/s" if self.decode_s > 0 else ""
        first = "" if self.first_token_s is None else f", first token after {self.first_token_s * 1000:.0f} ms"
        interrupted = "; interrupted" if self.is_interrupted else ""
        return (
            f"[{self.completion_tokens} tokens{speed}; prompt {self.prompt_tokens} tokens, {self.cached_tokens} from"
            f" the cache{first}{interrupted}]"
        )


def _show(engine: Engine, args: argparse.Namespace, **inputs: Any) -> Figures:
    """Generate, and print the answer as it comes. Ctrl-C ends it. inputs: of `Engine.generate`."""
    figures = Figures()
    began = time.perf_counter()
    chunks: Stream | None = None
    try:
        chunks = cast(Stream, engine.generate(sampling_params=sampling_params(args), stream=True, **inputs))
        for chunk in chunks:
            meta = chunk["meta_info"]
            sys.stdout.write(chunk["text"])
            sys.stdout.flush()
            elapsed_s = time.perf_counter() - began
            figures.saw(meta["prompt_tokens"], meta["cached_tokens"], meta["completion_tokens"], elapsed_s)
            finish = meta["finish_reason"]
            if finish is not None and finish["type"] == "error":
                raise RequestFailedError(finish["message"])
    except KeyboardInterrupt:
        figures.finish = "abort"
        if chunks is not None:
            chunks.close()
    print(flush=True)
    return figures


def _chat_ids(engine: Engine, text: str) -> list[int]:
    """The ids of a message, up to where the assistant is to go on. Nothing typed in it can end a turn."""
    tokenizer = engine.tokenizer_manager.tokenizer
    if tokenizer.chat_template is None:
        raise ChatTemplateError("the model has no chat template: give one with --chat-template")
    return encode_chat(tokenizer, [{"role": "user", "content": text}])


def engine_config(
    args: argparse.Namespace, without_effect: Mapping[str, str], model: str | None = None
) -> EngineConfig:
    """The engine arguments of a command, for `model` where its flags name none. Those for sampling are checked too:
    before the model is loaded.

    Raises ConfigError for those that would change nothing here, with the reason.
    """
    for name in EngineConfig.given_in(args):
        if name in without_effect:
            raise ConfigError(f"--{name.replace('_', '-')}: {without_effect[name]}; remove it")
    defaults: dict[str, Any] = {"log_level": "warning", "incremental_streaming_output": True}
    if model is not None:
        defaults["model_path"] = model
    config = EngineConfig.from_cli_args(args, **defaults)
    preferred = args.default_sampling | config.preferred_sampling
    config = dataclasses.replace(config, preferred_sampling_params=json.dumps(preferred))
    parse_sampling_params(sampling_params(args), vocab_size=2**31, next_seed=lambda: 0)
    return config


def open_engine(config: EngineConfig) -> Engine:
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
