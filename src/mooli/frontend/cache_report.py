"""What a request is told of its prompt in the cache: how much was there, how much was lost, where, why and what helps.

Owns the words and the shape of the report, and how what the engine saw of tokens and what is known of an earlier prompt
are put together. Only requests that ask are looked at, and remembered for later ones. Never changes a prompt.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mooli.errors import MooliError
from mooli.frontend.generation import Generation
from mooli.frontend.prompt_changes import APPEND, KEEP_REASONING, Change, change_between
from mooli.frontend.prompt_heads import PromptHead, PromptHeads, digest, units_of
from mooli.frontend.prompt_parts import PromptPart, prompt_parts
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.tools import ToolSet
from mooli.types import CacheEnd, Request

logger = logging.getLogger(__name__)

SHOWN_TOKENS = 16
MUCH_LOST = 1024
"""So many lost tokens are worth a line of the log."""

LOG_PAUSE_S = 10.0
"""Between two such lines."""

_NEAR_CHARS = 24
"""So near to where prompts differ a date or a time is taken to be what differs."""

_TIME = re.compile(
    r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[./]\d{1,2}[./]\d{2,4}|\d{1,2}:\d{2}|\b(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b"
    r"|\b(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]* \d|\d [A-Z][a-z]{2,8} \d{4}"
)

_ADVICE: Mapping[str, str] = {
    "evicted": "give the KV cache more memory, or ask again sooner",
    "namespace": "use one cache_salt for one conversation, and the same key",
    "in_flight": "send the second request when the first has its answer",
    "held_back": "ask for log-probabilities of fewer prompt tokens (logprob_start_len)",
    "no_state": "give states more memory (state_cache_fraction)",
    "disabled": "start without disable_radix_cache",
    "judged_slower": "a faster disk, or more memory for the KV cache",
    "load_failed": "the log says what of the cache's folder, or of the host's memory, could not be brought",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request says of itself: of which earlier request it goes on, if it does; and whose cache it uses."""

    rid: str
    namespace: str
    tenant: str = ""
    model: str = ""
    previous_id: str | None = None


class Told(NamedTuple):
    """A conversation: messages and tools as `mooli.frontend.tool_prompt.for_template` takes them, and what else the
    template is told."""

    messages: Sequence[Any]
    tools: ToolSet | None
    template_arguments: Mapping[str, Any]


@dataclass(slots=True)
class Inquiry:
    """One request that is to be told. text, parts: of its conversation; without one, "" and none. head: of it.

    previous: the request that it goes on, if that is known. is_missing: one was named and is not known. change: from
    that one.
    """

    asked: Asked
    tokenizer: Tokenizer | None
    text: str
    parts: Sequence[PromptPart]
    messages: Sequence[Any]
    base_namespace: str
    head: PromptHead
    previous: PromptHead | None
    is_missing: bool
    change: Change | None
    log: LossLog
    has_told: bool = False

    def note(self, generation: Generation, *, has_reasoned: bool = False) -> None:
        """How far the answer has come: all but its last token is computed, so that a later prompt may find it."""
        self.head.num_tokens = generation.prompt_tokens + max(0, len(generation.output_ids) - 1)
        self.head.has_reasoned |= has_reasoned

    def report(self, generation: Generation, *, has_reasoned: bool = False) -> dict[str, Any] | None:
        """None as long as the request has not begun to run."""
        self.note(generation, has_reasoned=has_reasoned)
        end = generation.cache_end
        if end is None:
            return None
        found = self._found(end, generation.request.prompt_ids.tolist())
        if not self.has_told:
            self.has_told = True
            self.log.tell(found)
        return found

    def missed(self, generation: Generation) -> Change | None:
        """What of this request differs from the one it goes on: by its form, whatever the cache had of it. An answer
        that came back otherwise is a change too."""
        end = generation.cache_end
        if self.change is not None or self.previous is None or end is None:
            return self.change
        return self._answer_change(end, generation.prompt_tokens)

    def num_missed(self, generation: Generation) -> int:
        """Tokens that the earlier request had, and that were not found."""
        end = generation.cache_end
        return 0 if end is None else self._lost_to_previous(end.num_matched, generation.prompt_tokens)

    def _found(self, end: CacheEnd, ids: list[int]) -> dict[str, Any]:
        reason = (end.reason or "none").replace(" ", "_")
        num_lost, place, change = end.num_lost, None, None
        if reason in ("new", "diverged", "namespace"):
            reason, num_lost, change = self._beyond_the_tree(reason, end, len(ids))
        elif reason != "none":
            num_lost = num_lost or self._lost_to_previous(end.num_tokens, len(ids))
        advice = _ADVICE.get(reason)
        if change is not None:
            place, advice = self._said(change, end, ids), change.advice
        elif reason == "diverged" or (num_lost and reason != "none"):
            place = self._place_at(end.num_tokens, ids)
            if reason == "evicted" and end.evicted_s is not None:
                where = f"{place}: " if place else ""
                place = f"{where}evicted {end.evicted_s:.1f} s ago, unused for {end.unused_s or 0:.1f} s then"
        return {
            "reason": reason,
            "matched_tokens": end.num_matched,
            "lost_tokens": num_lost,
            "divergence_index": None if reason == "none" else end.num_tokens,
            "message": place,
            "had": self._decoded(end.had) if reason == "diverged" else None,
            "has": self._decoded(ids[end.num_tokens : end.num_tokens + SHOWN_TOKENS]) if reason == "diverged" else None,
            "previous_id": None if self.previous is None else self.previous.rid,
            "advice": advice,
        }

    def _beyond_the_tree(self, reason: str, end: CacheEnd, num_tokens: int) -> tuple[str, int, Change | None]:
        """The reason, the tokens lost, and the change, by what is known of an earlier prompt."""
        previous = self.previous
        if reason == "namespace" and self.asked.namespace == self.base_namespace:
            reason = "new"  # there is nothing at all, for anybody
        if previous is None:
            return reason, 0, None
        lost = self._lost_to_previous(end.num_tokens, num_tokens)
        if previous.namespace != self.asked.namespace:
            return "namespace", lost, None
        if self.change is not None:
            return "diverged", lost, self.change
        change = self._answer_change(end, num_tokens)
        if change is not None:
            return "diverged", lost, change
        if lost and end.num_tokens < previous.num_prompt_tokens:
            return "evicted", lost, None  # longer ago than is remembered page by page, or flushed
        return reason, lost, None

    def _lost_to_previous(self, num_found: int, num_tokens: int) -> int:
        previous = self.previous
        if previous is None:
            return 0
        return max(0, min(previous.num_tokens, num_tokens - 1) - num_found)

    def _answer_change(self, end: CacheEnd, num_tokens: int) -> Change | None:
        """The earlier answer came back as another text than the model wrote."""
        previous = self.previous
        if previous is None or end.reason not in ("diverged", "new"):
            return None
        if end.reason == "new" and not (previous.has_reasoned and end.num_tokens < previous.num_tokens):
            return None
        last = max((unit.index for unit in previous.units if unit.kind == "message"), default=-1)
        answer = next((u for u in self.head.units if u.kind == "message" and u.index > last), None)
        # A prompt may end with the beginning of the answer, a marker of reasoning for example.
        if answer is None or answer.role != "assistant" or end.num_tokens < previous.num_prompt_tokens - SHOWN_TOKENS:
            return None
        if end.num_tokens >= previous.num_tokens:
            return None
        is_first = end.num_tokens <= previous.num_prompt_tokens + 2
        if previous.has_reasoned and is_first:
            return Change("reasoning", answer, "its reasoning is gone", KEEP_REASONING)
        return Change("messages", answer, "it came back otherwise than the model wrote it", APPEND)

    # -- words --
    def _said(self, change: Change, end: CacheEnd, ids: list[int]) -> str:
        place, words = change.place, change.words
        where = None if place is None else _place_words(place.kind, place.index, place.role)
        if change.kind == "system" and (shown := self._time_near(end.num_tokens, ids)) is not None:
            words += f" (near {shown!r})"
        return words if where is None else f"{where}: {words}"

    def _place_at(self, index: int, ids: list[int]) -> str | None:
        at = self._char_at(index, ids)
        part = next((part for part in self.parts if part.start <= at < part.end), None)
        if part is None:
            return None
        if part.kind == "end":
            return "behind the last message"
        role = next((u.role for u in self.head.units if (u.kind, u.index) == (part.kind, part.index)), "")
        return _place_words(part.kind, part.index, role)

    def _time_near(self, index: int, ids: list[int]) -> str | None:
        at = self._char_at(index, ids)
        found = _TIME.search(self.text, max(0, at - _NEAR_CHARS), at + _NEAR_CHARS)
        return None if found is None else found.group()

    def _char_at(self, index: int, ids: list[int]) -> int:
        """Where in the text a token begins."""
        return len(self._decoded(ids[:index]) or "")

    def _decoded(self, ids: Sequence[int]) -> str | None:
        if self.tokenizer is None:
            return None
        try:
            return self.tokenizer.decode(list(ids), skip_special_tokens=False)
        except MooliError:
            return None


def _place_words(kind: str, index: int, role: str) -> str:
    if kind == "tool":
        return f"tool {role}"
    return "the system prompt" if role == "system" and index == 0 else f"message {index} ({role})"


class LossLog:
    """Says where much was lost, not often. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._num_silent = 0

    def tell(self, report: Mapping[str, Any]) -> None:
        lost = report["lost_tokens"]
        if lost < MUCH_LOST:
            return
        with self._lock:
            now = time.monotonic()
            if now < self._next_s:
                self._num_silent += 1
                return
            self._next_s = now + LOG_PAUSE_S
            silent, self._num_silent = self._num_silent, 0
        more = f" ({silent} more requests lost as much meanwhile)" if silent else ""
        logger.info("%s tokens lost: %s%s", f"{lost:,}", report["message"] or report["reason"].replace("_", " "), more)


class CacheExplainer:
    """Makes inquiries, and remembers the prompts of those who asked.

    base_namespace: of requests without a salt or a tenant.
    """

    def __init__(self, tokenizer: Tokenizer | None, base_namespace: str) -> None:
        self._tokenizer = tokenizer
        self._base_namespace = base_namespace
        self._heads = PromptHeads()
        self._log = LossLog()

    def inquire_all(
        self, requests: Sequence[Request], told: Sequence[Told] = (), *, tenant: str = "", model: str = ""
    ) -> list[Inquiry]:
        """One for each request of a call; samples of one prompt share theirs. told: conversations of its prompts."""
        inquiries: list[Inquiry] = []
        num_prompts = 0
        for i, request in enumerate(requests):
            if i and request.prompt_ids is requests[i - 1].prompt_ids:
                inquiries.append(inquiries[-1])
                continue
            asked = Asked(request.rid, request.namespace, tenant, model)
            conversation = told[num_prompts] if num_prompts < len(told) else None
            inquiries.append(self.inquire(asked, len(request.prompt_ids), conversation))
            num_prompts += 1
        return inquiries

    def inquire(self, asked: Asked, num_prompt_tokens: int, told: Told | None = None) -> Inquiry:
        """What is to be told of one request. A conversation whose parts cannot be told apart counts as a mere text."""
        template = None if self._tokenizer is None else self._tokenizer.chat_template
        messages, tools, arguments = told or Told((), None, {})
        text, parts = "", list[PromptPart]()
        if template is not None and messages:
            try:
                text, parts = prompt_parts(template, messages, tools, **arguments)
            except MooliError:
                messages = ()
        head = PromptHead(
            rid=asked.rid,
            tenant=asked.tenant,
            namespace=asked.namespace,
            model=asked.model,
            arguments=digest(dict(arguments)),
            units=units_of(messages, tools, text, parts),
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=num_prompt_tokens,
        )
        if asked.previous_id is not None:
            previous = self._heads.find(asked.tenant, asked.previous_id)
        else:
            previous = self._heads.most_like(head)
        self._heads.add(head)
        return Inquiry(
            asked=asked,
            tokenizer=self._tokenizer,
            text=text,
            parts=parts,
            messages=messages,
            base_namespace=self._base_namespace,
            head=head,
            previous=previous,
            is_missing=asked.previous_id is not None and previous is None,
            change=None if previous is None else change_between(previous, head),
            log=self._log,
        )
