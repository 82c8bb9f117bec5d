"""The `mooli` command: serve, run, chat, generate, list, pull, plan, doctor and others.

Owns which commands there are, their exit statuses, and where text goes: answers to standard output; progress,
statistics and errors to standard error. An error of ours is one line and exit status 2, output that cannot be written
is 1, Ctrl-C is 130. Only what the command asked for needs is imported, as its flags are read and as it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mooli.arguments import CommandParser
from mooli.entry import INTERRUPTED
from mooli.errors import MooliError
from mooli.logs import report_error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parse(words)
    _make_streams_safe()
    if args.command == "serve":
        from mooli.server.command import serve

        return serve(args, ["mooli", *words])
    if sys.stdout is None:
        report_error("standard output is closed: nothing could be printed")
        return 1
    try:
        status: int = _function(_COMMANDS[args.command].run)(args)
        sys.stdout.flush()
        return status
    except MooliError as exc:
        report_error(exc)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as exc:
        if not isinstance(exc, BrokenPipeError) and _can_be_written():
            report_error(exc)
            return 2
        # A reader that leaves, `head` for example, has what it wanted.
        if not isinstance(exc, BrokenPipeError):
            report_error(f"the answer cannot be written: {exc}")
        with contextlib.suppress(OSError, ValueError):
            # Otherwise flushing at exit would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _can_be_written() -> bool:
    """Whether standard output takes what is left in its buffer. A full disk does not, the second time either."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return False
    return True


def _make_streams_safe() -> None:
    """A character that the terminal's encoding lacks is printed as "?", and bytes that are no text reach the check of
    prompts, instead of ending the program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command that the words name, read by its parser alone, and its name as `command`."""
    if words and words[0] in _COMMANDS:
        name, rest = words[0], words[1:]
    else:
        chosen, rest = _parser().parse_known_args(words)  # ends the program, unless the command comes behind a "--"
        name = chosen.command
    command = _COMMANDS[name]
    text = f"{command.text[:1].upper()}{command.text[1:]}."
    parser = CommandParser(prog=f"mooli {name}", description=text)
    command.add_args(parser)
    args, unknown = parser.parse_known_args(rest)
    if "words" in args and not any(word.startswith("-") for word in unknown):
        args.words += unknown  # a parser takes words in one place alone, and these come behind a flag
        unknown = []
    if unknown:
        from mooli.sglang_arguments import unknown_argument

        parser.error(unknown_argument(unknown, parser))
    args.command = name
    return args


def _parser() -> argparse.ArgumentParser:
    """The names of all commands; their flags are in parsers of their own."""
    parser = CommandParser(prog="mooli", description="Run large language models.")
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for name, command in _COMMANDS.items():
        if name not in _UNSEEN:
            commands.add_parser(name, help=command.text, add_help=False)
    return parser


class _ShowVersion(argparse.Action):
    """Looks the version up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(_version())
        parser.exit()


def _version() -> str:
    from mooli.version import __version__

    return f"mooli {__version__}"


def _function(place: str) -> Callable[..., Any]:
    """What `place`, as "module:name", names."""
    module, _, name = place.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


# -- flags --


def _add_generate_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="MODEL PROMPT", help="The model, and a prompt; or by their flags.")
    parser.add_argument(
        "--file", action="append", metavar="FILE", help="Text to put behind the prompt; several may be given; -: stdin."
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="Prompt; several are answered together. Default: all of stdin.",
    )
    parser.add_argument("--chat", action="store_true", help="Put the prompt through the model's chat template.")
    _add_answer_args(parser, 128)


def _add_chat_args(parser: argparse.ArgumentParser) -> None:
    _function("mooli.chat.flags:add_chat_args")(parser)
    _add_answer_args(parser, 1024, *_OF_SEVERAL_REQUESTS)


def _add_demo_args(parser: argparse.ArgumentParser) -> None:
    _add_answer_args(parser, 256, *_OF_SEVERAL_REQUESTS)


_OF_SERVERS = ("skip_tokenizer_init", "trust_remote_code", "served_model_name", "incremental_streaming_output")
_OF_SEVERAL_REQUESTS = ("schedule_policy", "max_running_requests")
"""Engine arguments that the help of commands does not show in which they change nothing."""


def _add_answer_args(parser: argparse.ArgumentParser, max_new_tokens: int, *hidden: str) -> None:
    from mooli.config import EngineConfig

    takes_words = any(action.dest == "words" for action in parser._actions)
    parser.usage = f"%(prog)s {'[MODEL] [PROMPT] ' if takes_words else ''}[FLAG ...]"
    group = parser.add_argument_group("sampling")
    # Not argparse defaults: preferred parameters win over them, and what a user asks for must fit the context, where
    # a default takes what is left of it.
    parser.set_defaults(default_sampling={"max_new_tokens": max_new_tokens, "temperature": 0.7, "top_p": 0.95})
    whole: dict[str, Any] = {"type": int, "metavar": "INT"}
    number: dict[str, Any] = {"type": float, "metavar": "FLOAT"}
    left = f"Default: {max_new_tokens}, or what is left of the context."
    group.add_argument("--max-new-tokens", **whole, help=f"Longest answer, in tokens. {left}")
    group.add_argument("--temperature", **number, help="0 is greedy. Default: 0.7.")
    group.add_argument("--top-p", **number, help="Draw among the likeliest that reach this share. Default: 0.95.")
    group.add_argument("--top-k", **whole, help="-1: the whole vocabulary. Default: -1.")
    group.add_argument("--min-p", **number, help="Least share of the likeliest's probability. Default: 0.0.")
    group.add_argument("--repetition-penalty", **number, help="1 is none. Default: 1.0.")
    group.add_argument("--seed", **whole, help="The same seed gives the same answer. Default: drawn.")
    group.add_argument("--stop", action="append", metavar="TEXT", help="Stop at this text; may be given several times.")
    EngineConfig.add_cli_args(parser, defaults={"log_level": "warning"}, hidden=(*_OF_SERVERS, *hidden))


def _add_serve_args(parser: argparse.ArgumentParser) -> None:
    from mooli.server.command import add_server_args

    add_server_args(parser, takes_model=True)


def _add_selftest_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        "--backend",
        default="npu",
        choices=("npu", "ascend"),
        help="Which device: only NPUs have operations that are tested at first use. Default: %(default)s.",
    )


def _add_bench_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=tuple(_BENCHES), help="; ".join(f"{k}: {v[1]}" for k, v in _BENCHES.items()))
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="Its own flags; --help lists them.")


_BENCHES = {
    "serving": ("mooli.bench_serving:main", "requests to a running server"),
    "multiturn": ("mooli.bench.multiturn:main", "conversations of several rounds with a running server"),
    "replay": ("mooli.bench.replay:main", "a recorded or made-up trace, sent to a running server"),
    "offline": ("mooli.bench.offline:main", "throughput of an engine in this process"),
    "one-batch": ("mooli.bench.one_batch:main", "prefill and decode of an engine in this process, by batch size"),
    "report": ("mooli.bench.report_page:main", "a page of charts from result files"),
}
"""Where each benchmark's `main` is, and what it measures."""


def _bench(args: argparse.Namespace) -> int:
    status: int = _function(_BENCHES[args.kind][0])(args.words)
    return status


def _cache(args: argparse.Namespace) -> int:
    from mooli.cache_flags import CACHE_COMMANDS

    command = CACHE_COMMANDS[args.kind]
    parser = CommandParser(
        prog=f"mooli cache {args.kind}", description=f"{command.text[:1].upper()}{command.text[1:]}."
    )
    command.add_args(parser)
    status: int = _function(command.run)(parser.parse_args(args.words))
    return status


def _candidates(args: argparse.Namespace) -> int:
    """Print what may stand where the cursor is: the line behind `mooli` is one word of ours."""
    words = " ".join(args.typed).split(" ")
    if len(words) == 1:
        found = sorted(name for name in _COMMANDS if name.startswith(words[0]) and name not in _UNSEEN)
    elif words[0] in _COMMANDS:
        parser = CommandParser(prog="mooli", add_help=True)
        _COMMANDS[words[0]].add_args(parser)
        found = _function("mooli.shelf.completion:candidates")(parser, words[1:])
    else:
        found = []
    print("\n".join(found))
    return 0


def _print_version(args: argparse.Namespace) -> int:
    print(_version())
    return 0


class _Command(NamedTuple):
    """add_args: adds its flags to a parser. run: where the function is that runs it, as "module:name"."""

    text: str
    add_args: Callable[[argparse.ArgumentParser], object]
    run: str


def _flags(place: str) -> Callable[[argparse.ArgumentParser], object]:
    """The function at `place`, which is imported when it is called."""
    return lambda parser: _function(place)(parser)


_COMMANDS = {
    "generate": _Command("answer prompts and exit", _add_generate_args, "mooli.answers:generate"),
    "run": _Command(
        "talk with a model, or ask it once; fetches it, and uses a server that has it",
        _add_chat_args,
        "mooli.chat.command:run",
    ),
    "chat": _Command("talk with the model; /help says how", _add_chat_args, "mooli.chat.command:chat"),
    "demo": _Command("three questions to the demo model", _add_demo_args, "mooli.answers:demo"),
    "serve": _Command(
        "serve a model over HTTP; without one, the demo model", _add_serve_args, "mooli.server.command:serve"
    ),
    "batch": _Command(
        "answer a file of requests in OpenAI's batch format",
        _flags("mooli.batch_flags:add_batch_args"),
        "mooli.batch_run:run_batch",
    ),
    "pull": _Command(
        "fetch a model from Hugging Face or ModelScope",
        _flags("mooli.hub.command:add_pull_args"),
        "mooli.hub.command:run_pull",
    ),
    "list": _Command(
        "the models on this machine", _flags("mooli.shelf.flags:add_list_args"), "mooli.shelf.command:list_models"
    ),
    "show": _Command(
        "what a model is, can do and takes", _flags("mooli.shelf.flags:add_show_args"), "mooli.shelf.command:show"
    ),
    "rm": _Command(
        "remove a model from this machine", _flags("mooli.shelf.flags:add_rm_args"), "mooli.shelf.command:rm"
    ),
    "ps": _Command("the servers that run", _flags("mooli.shelf.flags:add_ps_args"), "mooli.shelf.command:ps"),
    "stop": _Command("end a server", _flags("mooli.shelf.flags:add_stop_args"), "mooli.shelf.command:stop"),
    "plan": _Command(
        "what a model takes of a memory, and what then fits",
        _flags("mooli.plan_flags:add_plan_args"),
        "mooli.plan:run_plan",
    ),
    "doctor": _Command(
        "what this machine has, what is missing, what to do",
        _flags("mooli.doctor.command:add_doctor_args"),
        "mooli.doctor.command:run_doctor",
    ),
    "selftest": _Command(
        "compare an NPU's operations with plain torch",
        _add_selftest_args,
        "mooli.backends.ascend.command:run_selftest_command",
    ),
    "cache": _Command(
        "what of prompts is kept on disk, whether it is right, away with it; why a prompt was not found",
        _flags("mooli.cache_flags:add_cache_args"),
        f"{__name__}:_cache",
    ),
    "bench": _Command("measure a server, or an engine in this process", _add_bench_args, f"{__name__}:_bench"),
    "completion": _Command(
        "what a shell must know to complete words",
        _flags("mooli.shelf.flags:add_completion_args"),
        "mooli.shelf.completion:print_script",
    ),
    "_candidates": _Command(
        "words for a shell", _flags("mooli.shelf.flags:add_candidates_args"), f"{__name__}:_candidates"
    ),
    "version": _Command("print the version", lambda parser: None, f"{__name__}:_print_version"),
}

_UNSEEN = ("_candidates",)
"""Commands that programs call, and no person."""
