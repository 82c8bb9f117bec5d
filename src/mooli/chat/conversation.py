"""A conversation: what was said, what of it still fits the context, and its file.

Owns the messages, the settings that go with them, which turns are left out where the context is full, and the format of
the file. Never asks a model and never prints.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mooli.errors import RequestError
from mooli.frontend.sampling import parse_sampling_params

FORMAT = 1
"""Of the file, as its field `mooli_chat` says it."""

MAX_FILE_BYTES = 64 << 20

_ANSWER_SHARE = 4
"""An answer may take this part of the context where nothing else is said: prompts leave it free."""

_KEPT_SHARE = 0.75
"""Of the room for prompts, what is used again once it was full: so the next turns fit without another cut."""

_OF_MESSAGES = ("role", "content", "reasoning_content")
"""What a model hears of a message."""


class ConversationFileError(RequestError):
    """A file that is no conversation, or cannot be read or written."""


@dataclass(slots=True)
class Conversation:
    """system: its first message, None without one. messages: all others, the user's and the assistant's in turn; an
    answer that was cut says so under `cut`. first: index of the first that the model still hears.
    settings: sampling parameters by their native names."""

    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    first: int = 0

    def heard(self, first: int | None = None) -> list[dict[str, Any]]:
        """What the model is sent, from `first` on or from where it now begins."""
        said = self.messages[self.first if first is None else first :]
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + [{name: message[name] for name in _OF_MESSAGES if name in message} for message in said]

    def forget(self) -> None:
        """All messages; settings and system message stay."""
        self.messages, self.first = [], 0

    def take_back(self) -> str | None:
        """Remove the last question and its answer; the question. None where there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                self.first = min(self.first, len(self.messages))
                return str(message["content"])
        return None

    def set(self, name: str, value: str) -> None:
        """A setting, as a user writes it; an empty value takes it away. Raises RequestError for one that cannot be."""
        settings = {key: kept for key, kept in self.settings.items() if key != name}
        if value:
            settings[name] = _typed(value)
        parse_sampling_params(settings, vocab_size=2**31, next_seed=lambda: 0)
        self.settings = settings

    def fit(self, context_length: int | None, num_tokens: Callable[[Sequence[Mapping[str, Any]]], int | None]) -> int:
        """Leave out the oldest turns until the last question and an answer fit. Returns how many were left out now.

        The last question is never left out: where it alone is too long, whoever answers says so.
        """
        if context_length is None:
            return 0
        wanted = self.settings.get("max_new_tokens")
        most = context_length // _ANSWER_SHARE
        room = context_length - min(wanted if isinstance(wanted, int) else most, most)
        count = num_tokens(self.heard())
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "user" and i > self.first]
        if count is None or count <= room or not turns:
            return 0
        low, high = 0, len(turns) - 1  # the first turn to begin with, such that all fits
        while low < high:
            middle = (low + high) // 2
            count = num_tokens(self.heard(turns[middle]))
            if count is not None and count <= room * _KEPT_SHARE:
                high = middle
            else:
                low = middle + 1
        self.first = turns[low]
        return low + 1

    # -- its file ------------------------------------------------------------------------------------------------------
    def save(self, path: Path, model: str) -> None:
        """Write all of it, whole or not at all, for its owner's eyes. Raises ConversationFileError."""
        content = {
            "mooli_chat": FORMAT,
            "model": model,
            "system": self.system,
            "settings": self.settings,
            "messages": self.messages,
        }
        try:
            descriptor, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogatepass") as file:
                json.dump(content, file, ensure_ascii=False, indent=1)
                file.write("\n")
            os.replace(name, path)
        except OSError as exc:
            raise ConversationFileError(f"{path} cannot be written: {exc}") from exc

    def load(self, path: Path) -> None:
        """Become what a file holds: one that `save` wrote, or messages as OpenAI's API takes them, alone or under
        "messages". Raises ConversationFileError, and changes nothing then."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise ConversationFileError(f"{path} has more than {MAX_FILE_BYTES} bytes: it is no conversation")
            content = json.loads(data)
        except (OSError, ValueError, RecursionError) as exc:
            raise ConversationFileError(f"{path} cannot be read: {exc}") from exc
        if isinstance(content, list):
            content = {"messages": content}
        if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
            raise ConversationFileError(
                f"{path} holds no messages: give a file that /save wrote, or a list of messages"
            )
        loaded = _read(content, path)
        self.system, self.messages, self.settings, self.first = loaded.system, loaded.messages, loaded.settings, 0


def _read(content: Mapping[str, Any], path: Path) -> Conversation:
    if content.get("mooli_chat", FORMAT) != FORMAT:
        raise ConversationFileError(f"{path} is of format {content['mooli_chat']}; this version reads {FORMAT}")
    messages: list[dict[str, Any]] = []
    system = content.get("system")
    for index, message in enumerate(content["messages"]):
        role = message.get("role") if isinstance(message, dict) else None
        texts = [message.get(name) for name in _OF_MESSAGES[1:] if name in message] if role else []
        if role not in ("system", "user", "assistant") or not all(isinstance(text, str) for text in texts) or not texts:
            raise ConversationFileError(
                f"{path}: messages[{index}] is no text of a system, user or assistant: such are all that is read here"
            )
        if role == "system" and index == 0 and system is None:
            system = message["content"]
        else:
            messages.append({"content": "", **message})
    settings = content.get("settings") or {}
    if not isinstance(system, str | None) or not isinstance(settings, dict):
        raise ConversationFileError(f"{path}: system must be a text and settings an object")
    try:
        parse_sampling_params(settings, vocab_size=2**31, next_seed=lambda: 0)
    except RequestError as exc:
        raise ConversationFileError(f"{path}: settings: {exc}") from exc
    return Conversation(system, messages, settings)


def _typed(value: str) -> Any:
    """A setting as JSON, or as the word that it is."""
    try:
        return json.loads(value)
    except ValueError:
        return value
