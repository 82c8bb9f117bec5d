"""`mooli chat` and `mooli run`: who answers, what the user types, and what its commands do.

Owns the loop of a conversation and its exit status. What is kept of it is `Conversation`'s, what is shown `Screen`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mooli.answers import (
    WITHOUT_EFFECT_ALONE,
    engine_config,
    model_and_words,
    open_engine,
    read_text,
    sampling_params,
)
from mooli.chat.conversation import Conversation
from mooli.chat.keyboard import QUOTES, history_file, messages
from mooli.chat.replies import EngineReplier, Replier, Reply, ServerReplier, served_model
from mooli.chat.screen import open_screen
from mooli.config import EngineConfig
from mooli.entry import INTERRUPTED, Interruptible
from mooli.errors import ChatTemplateError, ConfigError, EngineError, PromptError, RequestError, RequestFailedError
from mooli.lang.endpoint import RuntimeEndpoint
from mooli.logs import report_error

USUAL_ADDRESS = ("127.0.0.1", 30000)
"""Where `mooli serve` listens."""

_LOOK_S = 1.0
"""So long may a server take that is only looked for."""

_REFUSED = (RequestError, RequestFailedError, ChatTemplateError)
"""What one question may bring without the end of the conversation."""


def chat(args: argparse.Namespace) -> int:
    """Talk with a model that is loaded for it, or with that of the server at --url."""
    return _converse(args, looks_for_server=False)


def run(args: argparse.Namespace) -> int:
    """`chat`, with the server at the usual address where that has the model."""
    return _converse(args, looks_for_server=True)


def _converse(args: argparse.Namespace, *, looks_for_server: bool) -> int:
    model, words = model_and_words(args)
    model = model or getattr(args, "model_path", None)
    if looks_for_server and model is None and args.url is None:
        raise ConfigError("name a model, as in `mooli run demo`; `mooli list --available` has short names")
    question = " ".join(words) or None
    conversation = Conversation(args.system)
    if args.load is not None:
        conversation.load(Path(args.load).expanduser())
        conversation.system = conversation.system if args.system is None else args.system
    conversation.settings.update(sampling_params(args))
    files = [read_text(path) for path in args.file or ()]
    with contextlib.closing(_open_replier(args, model, looks_for_server)) as replier, Interruptible():
        talk = _Talk(replier, conversation, is_plain=args.plain, files=files)
        if question is None and looks_for_server and not args.json and not _is_typed():
            question = sys.stdin.read().strip() if sys.stdin is not None else ""
        if question is not None:
            return talk.ask_once(question)
        if args.json:
            return talk.answer_lines()
        if _is_typed():
            print(f"{replier.model}: /help says what there is; Ctrl-C ends an answer, Ctrl-D leaves.", file=sys.stderr)
        return talk.go_on(messages(None if args.no_history else history_file()))


def _is_typed() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _open_replier(args: argparse.Namespace, model: str | None, looks_for_server: bool) -> Replier:
    if args.url is not None:
        given = sorted(EngineConfig.given_in(args).keys() - {"model_path"})
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')}: with --url that is for the server to say; remove it")
        return ServerReplier(args.url, args.api_key, model)
    if looks_for_server and not EngineConfig.given_in(args).keys() - {"model_path"}:
        address = _usual_server(model, args.api_key)
        if address is not None:
            print(f"{model}: answered by the server at {address}", file=sys.stderr)
            return ServerReplier(address, args.api_key, model)
    if args.api_key is not None:
        raise ConfigError("--api-key: no server is talked to here; remove it, or give --url")
    # Growing answers: what is new of text and reasoning is found by `Reply`.
    config = dataclasses.replace(engine_config(args, WITHOUT_EFFECT_ALONE, model), incremental_streaming_output=False)
    return EngineReplier(open_engine(config))


def _usual_server(model: str | None, api_key: str | None) -> str | None:
    """The URL of the server at the usual address, if one is there and has `model`."""
    url = f"http://{USUAL_ADDRESS[0]}:{USUAL_ADDRESS[1]}"
    try:
        socket.create_connection(USUAL_ADDRESS, _LOOK_S).close()
        served_model(RuntimeEndpoint(url, api_key, patience_s=_LOOK_S), model)
    except (OSError, EngineError, RequestError):
        return None
    return url


@dataclass(slots=True)
class _Talk:
    """files: texts that go with the next message."""

    replier: Replier
    conversation: Conversation
    is_plain: bool
    files: list[str] = field(default_factory=list)

    # -- ways to talk --------------------------------------------------------------------------------------------------
    def go_on(self, typed: Iterator[str]) -> int:
        """Until the user has enough."""
        for line in typed:
            if line in ("/exit", "/quit", "/bye"):
                break
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._ask(line)
            except _REFUSED as exc:
                report_error(exc)
        return 0

    def ask_once(self, question: str) -> int:
        """One question, whose errors are the command's."""
        reply = self._ask(question)
        return INTERRUPTED if reply.figures.is_interrupted else 0

    def answer_lines(self) -> int:
        """Lines of JSON to lines of JSON. 2 if one was not answered."""
        status = 0
        for line in sys.stdin or ():
            if not line.strip():
                continue
            try:
                reply = self._answered(_message_in(line), shows=False)
            except _REFUSED as exc:
                print(json.dumps({"error": {"type": type(exc).__name__, "message": str(exc)}}), flush=True)
                status = 2
                continue
            print(json.dumps(_as_json(reply), ensure_ascii=False), flush=True)
            if reply.figures.is_interrupted:
                return INTERRUPTED
        return status

    # -- a turn --------------------------------------------------------------------------------------------------------
    def _ask(self, question: str) -> Reply:
        reply = self._answered(question, shows=True)
        print(reply.figures.words(), file=sys.stderr)
        if reply.figures.finish == "length":
            print(
                "[cut: the answer is as long as it may be; /set max_new_tokens N allows more]",
                file=sys.stderr,
            )
        return reply

    def _answered(self, question: str, *, shows: bool) -> Reply:
        """The answer, which is part of the conversation then, as far as it came. Where there is none, nor is the
        question."""
        conversation = self.conversation
        conversation.messages.append({"role": "user", "content": "\n\n".join([*self.files, question])})
        try:
            self._fit()
            reply = self._read(shows)
        except _REFUSED:
            conversation.messages.pop()
            print("The last message is forgotten; /reset begins a new conversation.", file=sys.stderr)
            raise
        self.files = []
        said = {"role": "assistant", "content": reply.text}
        if reply.reasoning:
            said["reasoning_content"] = reply.reasoning
        if reply.figures.finish in ("length", "abort"):
            said["cut"] = reply.figures.finish
        conversation.messages.append(said)
        return reply

    def _fit(self) -> None:
        left_out = self.conversation.fit(self.replier.context_length, self.replier.num_tokens)
        if left_out:
            turns = "turn is" if left_out == 1 else f"{left_out} turns are"
            print(
                f"[the context of {self.replier.context_length} tokens is full: the oldest {turns} left out from now"
                " on. The cache has nothing of what is left in its new place: this answer takes longer to begin]",
                file=sys.stderr,
            )

    def _read(self, shows: bool) -> Reply:
        reply = Reply()
        pieces = self.replier.pieces(self.conversation.heard(), self.conversation.settings, reply)
        screen = open_screen(is_plain=self.is_plain) if shows else None
        is_over = False
        try:
            for piece in pieces:
                if screen is not None:
                    screen.show(piece)
            is_over = True
        except KeyboardInterrupt:
            reply.figures.finish, is_over = "abort", True
        finally:
            if screen is not None and (is_over or reply.text or reply.reasoning):
                screen.end()
        return reply

    # -- commands ------------------------------------------------------------------------------------------------------
    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        command = _COMMANDS.get(name)
        if command is None:
            print(f"There is no {name}.", file=sys.stderr)
            self.help("")
            return
        command.run(self, rest.strip())

    def help(self, _: str) -> None:
        for name, command in _COMMANDS.items():
            print(f"  {f'{name} {command.words}':<22}{command.text}", file=sys.stderr)
        for name, text in (("/exit", "leave, as Ctrl-D does"), (QUOTES, "begins and ends a message of several lines")):
            print(f"  {name:<22}{text}", file=sys.stderr)

    def reset(self, _: str) -> None:
        self.conversation.forget()
        self.files = []
        print("The conversation is forgotten.", file=sys.stderr)

    def system(self, text: str) -> None:
        self.conversation.system = text or None
        self.conversation.first = 0
        what = "is set: the prompt is read anew from its beginning" if text else "is removed"
        print(f"The system message {what}.", file=sys.stderr)

    def set(self, words: str) -> None:
        name, _, value = words.partition(" ")
        if name:
            self.conversation.set(name, value.strip())
        settings = self.conversation.settings
        print(
            ", ".join(f"{key} = {json.dumps(settings[key])}" for key in settings) or "Nothing is set.", file=sys.stderr
        )

    def retry(self, _: str) -> None:
        question = self.conversation.take_back()
        if question is None:
            raise PromptError("there is nothing to answer again yet")
        self._ask(question)

    def save(self, name: str) -> None:
        path = _path(name, "/save")
        self.conversation.save(path, self.replier.model)
        print(f"{len(self.conversation.messages)} messages are in {path}.", file=sys.stderr)

    def load(self, name: str) -> None:
        self.conversation.load(_path(name, "/load"))
        print(f"{len(self.conversation.messages)} messages are loaded.", file=sys.stderr)

    def file(self, name: str) -> None:
        text = read_text(str(_path(name, "/file")))
        self.files.append(text)
        print(f"{len(text)} characters of {name} go with your next message.", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Command:
    words: str
    text: str
    run: Callable[[_Talk, str], None]


_COMMANDS = {
    "/help": _Command("", "this list", _Talk.help),
    "/reset": _Command("", "forget the conversation", _Talk.reset),
    "/retry": _Command("", "answer the last message again", _Talk.retry),
    "/system": _Command("TEXT", "the system message; without a text, none", _Talk.system),
    "/set": _Command("NAME VALUE", "a sampling parameter, as temperature 0; alone, it shows them", _Talk.set),
    "/file": _Command("FILE", "put a text into the next message", _Talk.file),
    "/save": _Command("FILE", "write the conversation", _Talk.save),
    "/load": _Command("FILE", "go on with one that was written", _Talk.load),
}


def _path(name: str, command: str) -> Path:
    if not name:
        raise PromptError(f"{command} needs a file, as in {command} talk.json")
    try:
        return Path(name).expanduser()
    except RuntimeError as exc:
        raise PromptError(f"{name}: {exc}") from exc


def _message_in(line: str) -> str:
    """A line of --json: {"content": TEXT}, "TEXT", or the text itself."""
    if not line.lstrip().startswith(("{", '"')):
        return line.strip()
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise PromptError(f"a line is neither JSON nor plain text: {exc}") from exc
    text = message.get("content") if isinstance(message, dict) else message
    if not isinstance(text, str):
        raise PromptError('a line of JSON must be a text, or an object with a text as "content"')
    return text


def _as_json(reply: Reply) -> dict[str, Any]:
    figures = reply.figures
    answer: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.reasoning:
        answer["reasoning_content"] = reply.reasoning
    answer["finish_reason"] = figures.finish
    answer["usage"] = {
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": figures.cached_tokens},
    }
    return answer
