"""What is said in the conversations of `mooli bench multiturn`.

Owns making the questions up and putting an answer and the next question behind a conversation: text is joined for
routes that take text, as SGLang's bench_multiturn does, and a chat route gets messages. Never sends anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from mooli.bench.datasets import DatasetOptions, Randoms, load_dataset
from mooli.bench.errors import BenchmarkError
from mooli.bench.multiturn_flags import MultiturnOptions
from mooli.bench.multiturn_load import Conversation
from mooli.bench.records import BenchRequest, Message, RequestRecord
from mooli.frontend.tokenizer import Tokenizer


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
