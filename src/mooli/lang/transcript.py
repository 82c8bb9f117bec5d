"""What a state has said so far, and the prompt that this is for a model.

Owns the rule that a text becomes ids as if it had come at once, but for what the model itself wrote: its own ids stay,
so that the cache holds all of them. Messages become text by the model's own template. Never generates.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mooli.errors import ProgramError
from mooli.lang.backends import Backend

_MAX_CUT_TOKENS = 16
"""So many of an answer's last ids may not be in its text: a stop string's, an end of turn."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A piece of text; ids: those that the model wrote it with."""

    text: str
    ids: tuple[int, ...] | None = None


@dataclass
class Transcript:
    """Either plain text, or messages, of which the last may be open.

    runs: of the plain text, or of the open message. known: ids of the messages up to the end of what the model last
    wrote, as it read and wrote them.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    role: str | None = None
    runs: list[_Run] = field(default_factory=list)
    known: list[int] = field(default_factory=list)

    def copy(self) -> Transcript:
        """One that goes on apart from this."""
        return replace(self, messages=[dict(message) for message in self.messages], runs=list(self.runs))

    def say(self, text: str) -> None:
        """Add a text. Raises ProgramError for one between messages."""
        if self.role is None and self.messages:
            if not text.strip():
                return
            raise ProgramError(
                f"{text[:40]!r} stands between messages, where the template has no place for it: put it into system(),"
                " user() or assistant()"
            )
        if text:
            self.runs.append(_Run(text))

    def say_generated(self, text: str, ids: Sequence[int], prompt: Sequence[int], backend: Backend) -> None:
        """Add what the model wrote behind `prompt`, the `prompt_ids`: with its ids as far as these say the text."""
        kept = len(ids) if backend.keeps_ids else 0
        while kept and not text.startswith(backend.decode(ids[:kept])):
            kept = kept - 1 if len(ids) - kept < _MAX_CUT_TOKENS else 0
        said = backend.decode(ids[:kept]) if kept else ""
        if kept:
            self.runs.append(_Run(said, tuple(ids[:kept])))
        if kept and self.role == "assistant":
            self.known = [*prompt, *ids[:kept]]
        self.say(text[len(said) :])

    def begin(self, role: str) -> None:
        """Open a message. Raises ProgramError inside another, or behind plain text."""
        if self.role is not None:
            raise ProgramError(f"a message of {role} begins inside one of {self.role}: end that first")
        if "".join(run.text for run in self.runs).strip():
            raise ProgramError(f"a message of {role} begins behind plain text: put that text into a message")
        self.role, self.runs = role, []

    def end(self, role: str) -> None:
        """Close it. Raises ProgramError if there is none of `role`."""
        if self.role != role:
            raise ProgramError(f"a message of {role} ends that has not begun: {self.role or 'none'} is open")
        self.messages.append({"role": role, "content": self._said()})
        self.role, self.runs = None, []

    def prompt_ids(self, backend: Backend, then: str = "") -> list[int]:
        """Ids of everything so far and of `then` behind it. Raises ProgramError where the model cannot go on, and what
        the backend raises."""
        if not self.messages and self.role is None:
            return self._ids(backend, then, is_prompt=True)
        if self.role is None:
            raise ProgramError("gen() and select() behind messages must stand in a message: put it into assistant()")
        content = self._said() + then
        if self.role != "assistant" or (content and not backend.keeps_ids):
            return backend.encode_chat([*self.messages, {"role": self.role, "content": content}], is_open=True)
        ids = self._as_known(backend.encode_chat(self.messages, is_open=False), backend)
        return [*ids, *self._ids(backend, then, is_prompt=False)]

    def text(self, backend: Backend) -> str:
        """Everything so far; of messages, what the template makes of them, special tokens included."""
        if not self.messages and self.role is None:
            return self._said()
        if self.role is None:
            return backend.decode(backend.encode_chat(self.messages, is_open=False, goes_on=False))
        return backend.decode(self.prompt_ids(backend))

    def _said(self) -> str:
        return "".join(run.text for run in self.runs)

    def _as_known(self, ids: list[int], backend: Backend) -> list[int]:
        """The same text as `ids`, which has earlier answers as the model wrote them, if it has them word for word."""
        if not self.known or ids[: len(self.known)] == self.known:
            return ids
        text = backend.decode(self.known)
        end = bisect_left(range(len(ids)), len(text), key=lambda count: len(backend.decode(ids[:count])))
        return [*self.known, *ids[end:]] if backend.decode(ids[:end]) == text else ids

    def _ids(self, backend: Backend, then: str, *, is_prompt: bool) -> list[int]:
        ids: list[int] = []
        text = ""
        is_first = is_prompt
        for run in [*self.runs, _Run(then)]:
            if run.ids is None:
                text += run.text
                continue
            if text:
                ids += backend.encode(text, begins=is_first, has_special=is_prompt)
            ids += run.ids
            text, is_first = "", False
        return [*ids, *backend.encode(text, begins=is_first, has_special=is_prompt)] if text else ids
