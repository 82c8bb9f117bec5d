"""What became of an earlier prompt in a later one: the first place where they differ, and what happened there.

Owns the names of what clients and templates do to a history, and what helps against each. Works on hashes and counts
(`mooli.frontend.prompt_heads`): never on words, and never on the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mooli.frontend.prompt_heads import PromptHead, Unit

ChangeKind = Literal["model", "arguments", "system", "tools", "messages", "compacted", "reasoning"]


@dataclass(frozen=True, slots=True)
class Change:
    """kind: what of the request. place: the message or tool it is in, None where it is in no single one. words: what
    happened there, to be read behind the place. advice: what helps."""

    kind: ChangeKind
    place: Unit | None
    words: str
    advice: str


APPEND = "append to the history and leave what was sent as it was"
KEEP_REASONING = "send the reasoning back with its message, and use a template that keeps it"


def change_between(earlier: PromptHead, later: PromptHead) -> Change | None:
    """The first change from `earlier` to `later`; None if the later only goes on, or is its beginning."""
    if earlier.model != later.model:
        return Change("model", None, "another model was asked for", "ask for the same model")
    at = _first_difference(earlier.units, later.units)
    if at is None:
        if earlier.arguments != later.arguments and len(earlier.units) == len(later.units):
            return _arguments(later.units[-1] if later.units else None)
        return None
    was, now = earlier.units[at], later.units[at]
    if "tool" in (was.kind, now.kind):
        changed = _tools(earlier, later)
        if changed is not None:
            return changed
    if _place_of(now, earlier.units, at + 1) is not None and _place_of(was, later.units, at + 1) is not None:
        kind: ChangeKind = "system" if "system" in (was.role, now.role) else "messages"
        words = "what stood before it comes later now: the template, or its client, puts them in another order"
        return Change(kind, now, words, "keep the system prompt and tools at the beginning, and all messages in order")
    if was.said == now.said and earlier.arguments != later.arguments and not _lost_reasoning(was, now):
        return _arguments(now)
    changed = None if "system" not in (was.role, now.role) else _system(was, now)
    return changed or _messages(earlier.units, later.units, at)


def _first_difference(earlier: Sequence[Unit], later: Sequence[Unit]) -> int | None:
    for at, (was, now) in enumerate(zip(earlier, later, strict=False)):
        if was.rendered != now.rendered or was.kind != now.kind:
            return at
    return None


def _arguments(place: Unit | None) -> Change:
    return Change(
        "arguments",
        place,
        "the template was told other arguments, such as how much to reason",
        "keep reasoning effort and template arguments the same through a conversation",
    )


def _tools(earlier: PromptHead, later: PromptHead) -> Change | None:
    was = {unit.role: unit for unit in earlier.units if unit.kind == "tool"}
    now = {unit.role: unit for unit in later.units if unit.kind == "tool"}
    new = [unit for name, unit in now.items() if name not in was]
    edited = [unit for name, unit in now.items() if name in was and was[name].said != unit.said]
    gone = len(was.keys() - now.keys())
    stable = "send the same tools in the same order, and steer by tool_choice"
    if new or gone:
        words = [f"tool {new[0].role} is new"] if new else []
        words += [f"{gone} {'tools are' if gone > 1 else 'tool is'} gone"] if gone else []
        return Change("tools", None, " and ".join(words), stable)
    if edited:
        return Change("tools", None, f"tool {edited[0].role} is described otherwise", stable)
    if list(was) != list(now):
        return Change("tools", None, "the tools are in another order", "sort the tools")
    return None


def _system(was: Unit, now: Unit) -> Change | None:
    outside = "keep what changes (date, folder, status) out of the system prompt: say it in the last message"
    if was.role != "system":
        return Change("system", now, "a system prompt is there that was not", outside)
    if now.role != "system":
        return Change("system", None, "the system prompt is gone", outside)
    if was.said == now.said:
        return Change("system", now, "the template writes something else into it, such as the date", outside)
    return Change("system", now, "it was edited", outside)


def _lost_reasoning(was: Unit, now: Unit) -> bool:
    return was.reasons and was.words == now.words and now.num_chars < was.num_chars


def _messages(earlier: Sequence[Unit], later: Sequence[Unit], at: int) -> Change:
    was, now = earlier[at], later[at]
    if was.said == now.said:
        if _lost_reasoning(was, now):
            return Change("reasoning", now, "its reasoning is gone: the template leaves it out", KEEP_REASONING)
        return Change("messages", now, "the template writes it otherwise than before", APPEND)
    moved = _place_of(now, earlier, at + 1)
    if moved is not None:
        count = moved - at
        words = f"{count} {'messages' if count > 1 else 'message'} before it {'are' if count > 1 else 'is'} gone"
        advice = "cut a history seldom and by much, so that what is left stays the same for many turns"
        return Change("compacted", now, words, advice)
    moved = _place_of(was, later, at + 1)
    if moved is not None:
        count = moved - at
        words = f"{count} {'messages were' if count > 1 else 'message was'} put in here"
        return Change("messages", now, words, APPEND)
    if was.role != now.role:
        if len(later) < len(earlier):
            return _compacted(now)
        return Change("messages", now, f"it is the {now.role}'s where one of the {was.role} was", APPEND)
    if was.words == now.words:
        if was.reasons and not now.reasons:
            return Change("reasoning", now, "its reasoning is gone", KEEP_REASONING)
        if now.reasons and not was.reasons:
            return Change("reasoning", now, "it has reasoning that it had not", APPEND)
        if was.calls != now.calls:
            return Change("messages", now, "its calls are others", APPEND)
        return Change("messages", now, "a field beside its content was changed", APPEND)
    if was.reasons and not now.reasons:
        return Change("reasoning", now, "its reasoning is gone", KEEP_REASONING)
    if (
        len(later) < len(earlier)
        and later[-1].said not in {unit.said for unit in earlier[at:]}
        and len(later) - at <= 2
    ):
        return _compacted(now)
    return Change("messages", now, "it was edited", APPEND)


def _compacted(now: Unit) -> Change:
    advice = "compact a history seldom: all behind the summary is computed again each time"
    return Change("compacted", now, "it stands for messages that are gone: the history was compacted", advice)


def _place_of(unit: Unit, units: Sequence[Unit], start: int) -> int | None:
    return next((i for i in range(start, len(units)) if units[i].said == unit.said), None)
