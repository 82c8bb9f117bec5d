"""The tokens that answers were made of, for conversations that go on with them.

Owns which ids stand in a prompt where it repeats what the model itself said. A model may write a text in other tokens
than a tokenizer reads it in: then the next turn's prompt differs from what is in the cache, and all from there on would
be computed again. So the answer's own ids are put in the place of those that were read. Both are the same text. An
answer that came back as another text is left as it is, and the log says how much of it is computed again. Never looks
at a text of a conversation, and never at the cache.

What an answer is read as is worked out on a thread of its own when it has ended, as nobody waits for it then; who asks
for a prompt sooner works it out first.

An answer is found by what stands before it and by what it is read as, both in ids: words of a user that look like a
control token are other ids, and so are never mistaken for one. Those of different owners are apart.

Reference: "splicing" of cached ids in SGLang (pull request 26555).
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from mooli.errors import MooliError
from mooli.frontend.tokenizer import Tokenizer
from mooli.types import Request

logger = logging.getLogger(__name__)

MAX_ANSWERS = 2048
"""That are remembered: those that are not read as they were written. Least recently used ones go first."""

MAX_ANSWER_TOKENS = 8192
"""Of a longer one nothing is remembered: to read it again takes too long."""

MAX_PROMPTS = 256
MAX_PROMPT_TOKENS = 2**21
"""Of prompts that begin with such answers: so many, and so many tokens of them, are known in both forms."""

MAX_LAST_ANSWERS = 256
"""Of which it is known what would be lost of them."""

_TAIL_TOKENS = 64
"""In so many tokens at a prompt's end there is a special one, which begins the assistant's turn."""


class OwnAnswers:
    """Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: deque[tuple[Request, list[int]]] = deque()
        """Answers that have ended and are not read yet."""
        self._reading = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "mooli-own-answers")
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()
        """By the owner and all ids, as they are read, up to the answer's end."""
        self._ends: Counter[int] = Counter()
        """Where answers end, in such ids."""
        self._prompts: OrderedDict[bytes, NDArray[np.int32]] = OrderedDict()
        """By the owner and the ids of a prompt, those as they are read."""
        self._num_prompt_tokens = 0
        self._last: OrderedDict[bytes, tuple[int, NDArray[np.int32]]] = OrderedDict()
        """By the owner and a prompt as it is read, up to the last special token: its length, and all that followed."""
        self._has_told = False

    def taken_up(self, owner: str, ids: Sequence[int]) -> NDArray[np.int32]:
        """The prompt `ids` with the own ids of the answers in it."""
        self.settle()
        read = np.asarray(ids, dtype=np.int32)
        with self._lock:
            found = self._found(owner, read)
            pieces: list[NDArray[np.int32]] = []
            position = 0
            for answer in found:
                pieces += [read[position : answer.end - answer.num_read], np.asarray(answer.ids, dtype=np.int32)]
                position = answer.end
            own = np.concatenate([*pieces, read[position:]])
            if found:
                self._remember_prompt(_digest(owner, own), read)
            self._tell_lost(owner, read, own, found)
            return own

    def _found(self, owner: str, read: NDArray[np.int32]) -> list[_Answer]:
        """The answers in a prompt, in order."""
        found: list[_Answer] = []
        for digest, _ in _digests(owner, read, self._ends):
            answer = self._answers.get(digest)
            if answer is not None and answer.end - answer.num_read >= (found[-1].end if found else 0):
                self._answers.move_to_end(digest)
                found.append(answer)
        return found

    def _tell_lost(self, owner: str, read: NDArray[np.int32], own: NDArray[np.int32], found: Sequence[_Answer]) -> None:
        """Say how much of the last answer in a prompt is not found in the cache."""
        starts = {start for start, _ in self._last.values()}
        known = [digest for digest, _ in _digests(owner, read, starts) if digest in self._last]
        if not known:
            return
        start, written = self._last.pop(known[-1])
        start += sum(len(answer.ids) - answer.num_read for answer in found if answer.end <= start)
        now = own[start : start + len(written)]
        differs = np.flatnonzero(now != written[: len(now)])
        if len(differs):  # otherwise it is there, or asked for once more
            level = logging.DEBUG if self._has_told else logging.INFO
            self._has_told = True
            logger.log(
                level,
                "%d of %d tokens of an earlier answer are computed again: it came back otherwise than the model wrote"
                " it, without its reasoning for example; said once at this level",
                len(written) - int(differs[0]),
                len(written),
            )

    def add(self, request: Request, output_ids: Sequence[int]) -> None:
        """Remember an answer if it is not read as it was written. `request.namespace` is its owner. Returns at once."""
        self._waiting.append((request, [*output_ids]))
        with suppress(RuntimeError):  # at the end of the process there are no new threads
            self._thread.submit(self.settle)

    def settle(self) -> None:
        """Read what has been added."""
        with self._reading:
            while self._waiting:
                self._take_in(*self._waiting.popleft())

    def _take_in(self, request: Request, written: list[int]) -> None:
        while written and written[-1] in request.eos_ids:
            written.pop()
        prompt = request.prompt_ids
        tail = _tail(prompt[-_TAIL_TOKENS:].tolist(), self._tokenizer.special_ids)
        if not written or tail is None or len(written) > MAX_ANSWER_TOKENS:
            return
        own = [*tail, *written]
        read = self._read(own)
        if read is None:
            return
        with self._lock:
            before = self._prompts.get(_digest(request.namespace, prompt), prompt)
            start = len(before) - len(tail)
            if before[start:].tolist() != tail:
                return
            if request.sampling.n == 1:  # of several, one may come back
                self._last[_digest(request.namespace, before[:start])] = (start, np.asarray(own, dtype=np.int32))
            if len(self._last) > MAX_LAST_ANSWERS:
                self._last.popitem(last=False)
            if read == own:
                return
            whole = np.concatenate([before[:start], np.asarray(read, dtype=np.int32)])
            digest = _digest(request.namespace, whole)
            if digest not in self._answers:
                self._ends[len(whole)] += 1
            self._answers[digest] = _Answer(own, len(read), len(whole))
            self._answers.move_to_end(digest)
            while len(self._answers) > MAX_ANSWERS:
                _, oldest = self._answers.popitem(last=False)
                self._ends[oldest.end] -= 1
                if not self._ends[oldest.end]:
                    del self._ends[oldest.end]

    def _read(self, ids: Sequence[int]) -> list[int] | None:
        """The ids in which the text of `ids` is read; None if it cannot be."""
        read: list[int] = []
        run: list[int] = []
        special_ids = self._tokenizer.special_ids
        try:
            for token_id in [*ids, None]:
                if token_id is not None and token_id not in special_ids:
                    run.append(token_id)
                    continue
                if run:
                    text = self._tokenizer.decode(run, skip_special_tokens=False)
                    read += self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)
                    run = []
                if token_id is not None:
                    read.append(token_id)
        except MooliError:
            return None
        return read

    def _remember_prompt(self, digest: bytes, read: NDArray[np.int32]) -> None:
        known = self._prompts.pop(digest, None)
        self._num_prompt_tokens += len(read) - (0 if known is None else len(known))
        self._prompts[digest] = read
        while len(self._prompts) > MAX_PROMPTS or self._num_prompt_tokens > MAX_PROMPT_TOKENS:
            _, oldest = self._prompts.popitem(last=False)
            self._num_prompt_tokens -= len(oldest)


class _Answer:
    """ids: as it was written, with what stands before it since the last special token; num_read: of the ids in which
    that is read. end: of these, in the conversation."""

    __slots__ = ("end", "ids", "num_read")

    def __init__(self, ids: list[int], num_read: int, end: int) -> None:
        self.ids = ids
        self.num_read = num_read
        self.end = end


def _tail(ids: list[int], special_ids: frozenset[int]) -> list[int] | None:
    """What follows the last special token; None if there is none."""
    at = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in special_ids), None)
    return None if at is None else ids[at + 1 :]


def _digests(owner: str, ids: NDArray[np.int32], ends: Iterable[int]) -> list[tuple[bytes, int]]:
    """Of the beginnings of `ids` up to each of `ends` that it has, in order."""
    state, position = hashlib.blake2b(_owner(owner), digest_size=16), 0
    found = []
    for end in sorted(end for end in ends if end <= len(ids)):
        state.update(ids[position:end].tobytes())
        position = end
        found.append((state.copy().digest(), end))
    return found


def _owner(owner: str) -> bytes:
    return owner.encode("utf-8", "surrogatepass") + b"\0"


def _digest(owner: str, ids: NDArray[np.int32]) -> bytes:
    return hashlib.blake2b(_owner(owner) + ids.tobytes(), digest_size=16).digest()
