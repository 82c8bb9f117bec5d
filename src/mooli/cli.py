"""The `mooli` command: serve, generate, chat, demo, bench, pull, plan, doctor, selftest, version.

Owns what is typed and what is printed: answers go to standard output; progress, statistics and errors go to standard
error. An error of ours is one line and exit status 2, output that cannot be written is 1, Ctrl-C is 130. Never does
what `Engine` cannot do for everybody.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mooli.arguments import CommandParser
from mooli.backends.ascend.command import add_selftest_args, run_selftest_command
from mooli.config import EngineConfig
from mooli.doctor.command import add_doctor_args, run_doctor
from mooli.engine.facts import device_words
from mooli.errors import ChatTemplateError, MooliError, PromptError, RequestError, RequestFailedError
from mooli.frontend.call import Stream
from mooli.frontend.chat_encoding import encode_chat
from mooli.frontend.engine import Answer, Engine
from mooli.frontend.sampling import parse_sampling_params
from mooli.hub.command import add_pull_args, run_pull
from mooli.plan import add_plan_args, run_plan
from mooli.server.command import serve
from mooli.server.flags import add_server_args, unknown_argument
from mooli.version import __version__

DEMO_PROMPTS = (
    "Please introduce yourself briefly.",
    "Write a binary search in Python, with comments.",
    "Explain what hallucination means in a language model.",
)

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

Messages = list[dict[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parse(words)
    _make_streams_safe()
    is_server = args.run is serve
    if is_server:
        return serve(args, ["mooli", *words])
    if sys.stdout is None:
        print("mooli: error: standard output is closed: nothing could be printed", file=sys.stderr)
        return 1
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except MooliError as exc:
        _report(exc)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as exc:
        # A reader that leaves, `head` for example, has what it wanted.
        if not isinstance(exc, BrokenPipeError):
            print(f"mooli: error: the answer cannot be written: {exc}", file=sys.stderr)
        with contextlib.suppress(OSError, ValueError):
            # Otherwise flushing at exit would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _make_streams_safe() -> None:
    """A character that the terminal's encoding lacks is printed as "?", and bytes that are no text reach the check of
    prompts, instead of ending the program."""
    if sys.stderr is None:  # closed; `print` would write to standard output instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the program
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.parser.error(unknown_argument(unknown, args.parser))
    return args


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="mooli", description="Run large language models.")
    parser.add_argument("--version", action="version", version=f"mooli {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    generate = _command(commands, "generate", _generate, "answer prompts and exit")
    generate.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="Prompt; several are answered together. Default: all of stdin.",
    )
    generate.add_argument("--chat", action="store_true", help="Put the prompt through the model's chat template.")
    chat = _command(commands, "chat", _chat, "talk with the model; /reset forgets, /exit leaves")
    chat.add_argument("--system", metavar="TEXT", help="System message at the head of the conversation.")
    demo = _command(commands, "demo", _demo, "three questions to the demo model")
    for command, length in ((generate, 128), (chat, 1024), (demo, 256)):
        _add_sampling_args(command, length)
        EngineConfig.add_cli_args(command, defaults={"log_level": "warning"})
    server = _command(commands, "serve", serve, "serve a model over HTTP; without one, the demo model")
    add_server_args(server, takes_model=True)
    add_pull_args(_command(commands, "pull", run_pull, "fetch a model from Hugging Face or ModelScope"))
    add_plan_args(_command(commands, "plan", run_plan, "what a model takes of a memory, and what then fits"))
    add_doctor_args(_command(commands, "doctor", run_doctor, "what this machine has, what is missing, what to do"))
    selftest = _command(commands, "selftest", run_selftest_command, "compare an NPU's operations with plain torch")
    add_selftest_args(selftest)
    bench = _command(commands, "bench", _bench, "measure a server, or an engine in this process")
    bench.add_argument("kind", choices=tuple(_BENCHES), help="; ".join(f"{k}: {v[1]}" for k, v in _BENCHES.items()))
    bench.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="Its own flags; --help lists them.")
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version, parser=version)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[:1].upper() + text[1:] + "."
    )
    command.set_defaults(run=run, parser=command)
    return command


def _add_sampling_args(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    # Not an argparse default: what a user asks for must fit the context, a default takes what is left of it.
    parser.set_defaults(default_length=max_new_tokens)
    group.add_argument("--max-new-tokens", type=int, help=f"Default: {max_new_tokens}, or what is left of the context.")
    group.add_argument("--temperature", type=float, default=0.7, help="0 is greedy. Default: %(default)s.")
    group.add_argument("--top-p", type=float, default=0.95, help="Default: %(default)s.")
    group.add_argument("--top-k", type=int, default=-1, help="-1: the whole vocabulary. Default: %(default)s.")
    group.add_argument("--min-p", type=float, default=0.0, help="Default: %(default)s.")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="Default: %(default)s.")
    group.add_argument("--seed", type=int, help="The same seed gives the same answer. Default: drawn.")
    group.add_argument("--stop", action="append", metavar="TEXT", help="Stop at this text; may be given several times.")


_SAMPLING_FLAGS = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


def _sampling_params(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _SAMPLING_FLAGS if getattr(args, name) is not None}


# -- commands --


def _version(args: argparse.Namespace) -> int:
    print(f"mooli {__version__}")
    return 0


_BENCHES = {
    "serving": ("mooli.bench_serving", "requests to a running server"),
    "multiturn": ("mooli.bench.multiturn", "conversations of several rounds with a running server"),
    "replay": ("mooli.bench.replay", "a recorded or made-up trace, sent to a running server"),
    "offline": ("mooli.bench.offline", "throughput of an engine in this process"),
    "one-batch": ("mooli.bench.one_batch", "prefill and decode of an engine in this process, by batch size"),
    "report": ("mooli.bench.report", "a page of charts from result files"),
}
"""Each benchmark's module, which has a `main`, and what it measures."""


def _bench(args: argparse.Namespace) -> int:
    # Imported when asked for: no other command needs an HTTP client.
    status: int = importlib.import_module(_BENCHES[args.kind][0]).main(args.words)
    return status


def _generate(args: argparse.Namespace) -> int:
    config = _config(args)
    prompts = args.prompt or [_prompt_from_stdin()]
    with _open_engine(config) as engine:
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
                _report(RequestFailedError(f"{text[:40]!r} failed: {meta['finish_reason']['message']}"))
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


def _demo(args: argparse.Namespace) -> int:
    with _open_engine(_config(args, model_path="demo")) as engine:
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


def _chat(args: argparse.Namespace) -> int:
    start: Messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    with _open_engine(_config(args)) as engine:
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
        shown = _show(engine, args, input_ids=_chat_ids(engine, messages))
    except (RequestError, RequestFailedError, ChatTemplateError) as exc:
        messages.pop()
        _report(exc)
        print("The last message is forgotten; /reset begins a new conversation.", file=sys.stderr)
        return
    messages.append({"role": "assistant", "content": shown.text})
    print(shown.statistics(), file=sys.stderr)


# -- parts of them --


@dataclass(slots=True)
class _Shown:
    """An answer as it was printed, and its figures. decode_s: from the first token to the last."""

    text: str = ""
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

    def statistics(self) -> str:
        speed = f", {self.decode_tokens / self.decode_s:.1f} tok/s" if self.decode_s > 0 else ""
        first = "" if self.first_token_s is None else f", first token after {self.first_token_s * 1000:.0f} ms"
        interrupted = "; interrupted" if self.is_interrupted else ""
        return (
            f"[{self.completion_tokens} tokens{speed}; prompt {self.prompt_tokens} tokens, {self.cached_tokens} from"
            f" the cache{first}{interrupted}]"
        )


def _show(engine: Engine, args: argparse.Namespace, **inputs: Any) -> _Shown:
    """Generate, and print the answer as it comes. Ctrl-C ends it."""
    shown = _Shown()
    first_tokens = 0
    began = time.perf_counter()
    chunks: Stream | None = None
    try:
        chunks = cast(Stream, engine.generate(sampling_params=_sampling_params(args), stream=True, **inputs))
        for chunk in chunks:
            elapsed_s = time.perf_counter() - began
            meta = chunk["meta_info"]
            sys.stdout.write(chunk["text"])
            sys.stdout.flush()
            shown.text += chunk["text"]
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


def _config(args: argparse.Namespace, **defaults: Any) -> EngineConfig:
    """The engine arguments of a command. Those for sampling are checked too: before the model is loaded."""
    defaults["log_level"] = "warning"
    defaults["incremental_streaming_output"] = True
    defaults["preferred_sampling_params"] = {"max_new_tokens": args.default_length}
    config = EngineConfig.from_cli_args(args, **defaults)
    if config.skip_tokenizer_init:
        raise RequestError("--skip-tokenizer-init leaves nothing that could be printed here: remove it")
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


def _report(exc: MooliError) -> None:
    print(f"mooli: error: {' '.join(str(exc).split())}", file=sys.stderr)
