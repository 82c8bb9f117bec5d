"""Conversations under load: what is said, whose turn it is, and when the next request goes out.

Owns making the questions up, putting an answer and the next question behind a conversation (text is joined for routes
that take text, as SGLang's bench_multiturn does, and a chat route gets messages), the queue of conversations that are
ready, the gaps, the places, and giving up when the server is gone. Never knows HTTP.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from mooli.bench.datasets import DatasetOptions, Randoms, load_dataset
from mooli.bench.errors import BenchmarkError
from mooli.bench.load import LoadResult, Refusals, until_stopped
from mooli.bench.multiturn_flags import MultiturnOptions
from mooli.bench.records import BenchRequest, Message, RequestRecord
from mooli.frontend.tokenizer import Tokenizer


@dataclass(slots=True, kw_only=True)
class Conversation:
    """questions: what the user says, one a round. history: what is sent next, the next question included.

    round_index: of the request that comes next. prompt_len: tokens of `history`, as far as known.
    """

    index: int
    questions: Sequence[str]
    history: str | list[Message]
    prompt_len: int
    round_index: int = 0

    @property
    def is_over(self) -> bool:
        return self.round_index == len(self.questions)


Send = Callable[[Conversation, "list[RequestRecord]"], Awaitable[bool]]
"""Sends a conversation's next request, adds its record, and moves the conversation on. False: it cannot go on. Raises
UnreachableError when there is no server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """gap_s: drawn after each request. picks: which of so many waiting conversations is next."""

    max_parallel: int
    gap_s: Callable[[], float]
    picks: Callable[[int], int]
    has_round_barrier: bool = False


def pace(
    *, max_parallel: int, request_rate: float, distribution: str, policy: str, has_round_barrier: bool, seed: int
) -> Pace:
    """Gaps of mean 1 / `request_rate` seconds, none for inf.

    distribution: "poisson" (exponential gaps) or "uniform" (from 0 to twice the mean). policy: "random" or "fifo".
    """
    chance = random.Random(seed)

    def gap_s() -> float:
        if distribution == "poisson":
            return chance.expovariate(1.0) / request_rate
        return chance.uniform(0.0, 2.0) / request_rate

    order = random.Random(seed + 1)  # so that the gaps are the same whatever the queue holds
    return Pace(
        max_parallel=max_parallel,
        gap_s=gap_s,
        picks=order.randrange if policy == "random" else lambda num: 0,
        has_round_barrier=has_round_barrier,
    )


async def converse_under_load(
    conversations: Sequence[Conversation],
    send: Send,
    how: Pace,
    *,
    clock: Callable[[], float],
    stop: asyncio.Event,
    records: list[RequestRecord],
) -> LoadResult:
    """Bring all conversations to their end, and tell what came.

    A gap passes after each request; then the next one goes out as soon as a conversation is ready and a place is free.
    A conversation whose request fails ends there. stop: setting it ends the run: what is in progress is cut off and
    marked so. records: filled as requests are sent.
    """
    total = sum(len(conversation.questions) for conversation in conversations)
    refusals, start_s = Refusals(stop), clock()
    await until_stopped(_Run(conversations, send, how, refusals, records).send_all(), stop)
    return LoadResult.of(records, refusals, start_s=start_s, end_s=clock(), num_unsent=total - len(records))


class _Run:
    def __init__(
        self,
        conversations: Sequence[Conversation],
        send: Send,
        how: Pace,
        refusals: Refusals,
        records: list[RequestRecord],
    ) -> None:
        self._send = send
        self._how = how
        self._refusals = refusals
        self._records = records
        self._ready = list(conversations)
        self._next_round: list[Conversation] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None

    async def send_all(self) -> None:
        try:
            while await self._has_next():
                conversation = self._ready.pop(self._how.picks(len(self._ready)))
                task = asyncio.create_task(self._send_one(conversation))
                self._tasks.add(task)
                gap_s = self._how.gap_s()
                if gap_s:
                    await asyncio.sleep(gap_s)
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._failure is not None:
            raise self._failure

    async def _has_next(self) -> bool:
        """Wait until a conversation is ready and there is a place for it. False when none will be."""
        while self._failure is None:
            if not self._tasks and not self._ready:
                self._ready, self._next_round = self._next_round, []
                if not self._ready:
                    return False
            if self._ready and len(self._tasks) < self._how.max_parallel:
                return True
            self._changed.clear()
            await self._changed.wait()
        return False

    async def _send_one(self, conversation: Conversation) -> None:
        try:
            with self._refusals:
                goes_on = await self._send(conversation, self._records)
                if goes_on and not conversation.is_over:
                    (self._next_round if self._how.has_round_barrier else self._ready).append(conversation)
        except Exception as exc:
            self._failure = exc
        finally:
            task = asyncio.current_task()
            if task is not None:
                self._tasks.discard(task)
            self._changed.set()


# -- what is said ------------------------------------------------------------------------------------------------------


def make_conversations(options: MultiturnOptions, tokenizer: Tokenizer) -> list[Conversation]:
    """The conversations of a run, with all their questions; the same for the same seed. Raises BenchmarkError."""
    chance = random.Random(options.seed)
    num_rounds = [chance.randint(options.min_rounds, options.max_rounds) for _ in range(options.num_clients)]
    randoms = Randoms.seeded(options.seed)
    first = _questions(options, options.num_clients, options.request_len, tokenizer, randoms)
    num_later = sum(num_rounds) - options.num_clients
    later = iter(_questions(options, num_later, options.question_len, tokenizer, randoms))
    conversations = []
    for index, (request, num) in enumerate(zip(first, num_rounds, strict=True)):
        texts = [str(request.prompt), *(str(next(later).prompt) for _ in range(num - 1))]
        start = [_message("user", texts[0])] if options.is_chat else texts[0]
        conversations.append(Conversation(index=index, questions=texts, history=start, prompt_len=request.prompt_len))
    return conversations


def move_on(conversation: Conversation, record: RequestRecord, count_tokens: Callable[[str], int]) -> None:
    """Put the answer, and the next question if there is one, behind the conversation."""
    conversation.round_index += 1
    if conversation.is_over:
        return
    said = conversation.questions[conversation.round_index]
    if isinstance(conversation.history, str):
        conversation.history += record.generated_text + said
    else:
        conversation.history += [_message("assistant", record.generated_text), _message("user", said)]
    conversation.prompt_len = record.prompt_len + record.output_len + count_tokens(said)


def _questions(
    options: MultiturnOptions, num: int, length: int, tokenizer: Tokenizer, randoms: Randoms
) -> list[BenchRequest]:
    if not num:
        return []
    data = DatasetOptions(
        name="random" if options.words else "random-ids",
        path=options.dataset_path,
        num_prompts=num,
        random_input_len=length,
        random_output_len=options.output_len,
        random_range_ratio=1.0,
    )
    found = load_dataset(data, tokenizer, randoms).requests
    if len(found) < num:
        raise BenchmarkError(
            f"{options.dataset_path} has {len(found)} prompts of the {num} that these conversations take: lower"
            " --num-clients or the number of rounds"
        )
    return found


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
