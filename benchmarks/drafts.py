"""What guessing tokens brings: accepted tokens a step and tokens a second, with and without, in turns.

Three workloads (benchmarks/draft_texts.py), each conversation in an empty cache: code that is given back changed, and
chats of several turns, both greedy, then every last turn is asked a second time, as a user does who presses "again";
and the chats' first questions answered at temperature 1, where little repeats and guessing can only cost. All engines
of a model live in one process and take turns conversation by conversation. The speed is that of the tokens after the
first of each answer, so prompts have no part in it. Every answer is compared with the one of the engine that guesses
nothing.

    python benchmarks/drafts.py --models demo,qwen --tokens 4,8 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draft_texts import CODE_EDITING, MULTI_TURN
from loaded import compared_model, demo_model

from mooli import Engine
from mooli.frontend.chat_encoding import encode_chat

MODELS = {"demo": demo_model, "qwen": compared_model}
SAMPLED = "temperature 1"
WORKLOADS = {
    "code editing": CODE_EDITING,
    "multi-turn": MULTI_TURN,
    SAMPLED: [[turns[0]] for turns in MULTI_TURN],
}
AGAIN = "asked again"
NO_CHUNKS_BETWEEN = 10**6


@dataclass
class Count:
    """Of one engine on one workload. seconds and tokens: of each round, after first tokens."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    proposed: int = 0
    right: int = 0

    def add(self, answer: Answer) -> None:
        self.seconds[-1] += answer.seconds
        self.tokens[-1] += len(answer.output_ids) - 1
        self.steps += answer.meta.get("spec_verify_ct", len(answer.output_ids) - 1)
        self.proposed += answer.meta.get("spec_num_proposed_drafts", 0)
        self.right += answer.meta.get("spec_num_correct_drafts", 0)

    def speeds(self) -> list[float]:
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]


@dataclass(frozen=True)
class Answer:
    """seconds: from the first token to the last."""

    output_ids: list[int]
    text: str
    seconds: float
    meta: dict[str, Any]


def ask(engine: Engine, messages: list[dict[str, str]], max_new_tokens: int, temperature: float) -> Answer:
    ids = encode_chat(engine.tokenizer_manager.tokenizer, messages)
    params = {"max_new_tokens": max_new_tokens, "temperature": temperature, "sampling_seed": 1}
    first_s = last_s = 0.0
    last: dict[str, Any] = {}
    for chunk in engine.generate(input_ids=ids, sampling_params=params, stream=True):
        last_s, last = time.perf_counter(), chunk
        first_s = first_s or last_s
    return Answer(last["output_ids"], last["text"], last_s - first_s, last["meta_info"])


def converse(
    engine: Engine, turns: list[str], max_new_tokens: int, temperature: float
) -> Iterator[tuple[bool, Answer]]:
    """The answers of a conversation in an empty cache, then, if greedy, the last one asked again: (whether again,
    answer)."""
    engine.flush_cache()
    messages: list[dict[str, str]] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answer = ask(engine, messages, max_new_tokens, temperature)
        yield False, answer
        messages.append({"role": "assistant", "content": answer.text})
    if temperature == 0:
        yield True, ask(engine, messages[:-1], max_new_tokens, temperature)


def engines_of(path: Path, given: argparse.Namespace) -> dict[str, Engine]:
    common = {"model_path": str(path), "max_total_tokens": 8192, "stream_interval": NO_CHUNKS_BETWEEN}
    common |= {"num_threads": given.threads, "quantization": given.quantization}
    engines = {"off": Engine(**common, speculative_algorithm="none")}
    for tokens in given.tokens.split(","):
        arguments = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": int(tokens)}
        engines[f"{tokens} tokens"] = Engine(**common, **arguments)
    return engines


def measure(path: Path, given: argparse.Namespace) -> dict[tuple[str, str], Count]:
    """By workload and engine. Exits if an answer differs."""
    engines = engines_of(path, given)
    counts = {(kind, name): Count() for kind in (*WORKLOADS, AGAIN) for name in engines}
    for turn in range(given.rounds):
        for count in counts.values():
            count.seconds.append(0.0)
            count.tokens.append(0)
        for kind, conversations in WORKLOADS.items():
            for index, turns in enumerate(conversations):
                names = list(engines)
                names = names[turn % len(names) :] + names[: turn % len(names)]
                said: dict[str, list[list[int]]] = {}
                for name in names:
                    temperature = 1.0 if kind == SAMPLED else 0.0
                    for is_again, answer in converse(engines[name], turns, given.max_new_tokens, temperature):
                        counts[AGAIN if is_again else kind, name].add(answer)
                        said.setdefault(name, []).append(answer.output_ids)
                if any(answers != said["off"] for answers in said.values()):
                    raise SystemExit(f"{kind}, conversation {index}: answers differ")
    for engine in engines.values():
        engine.shutdown()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,qwen", help="of demo, qwen")
    parser.add_argument("--tokens", default="4,8", help="values of --speculative-num-draft-tokens to try")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--quantization", choices=("int8", "int4"), default=None, help="default: as in the file")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    given = parser.parse_args()
    for model in given.models.split(","):
        counts = measure(MODELS[model](), given)
        print(f"\n{model}, median of {given.rounds} rounds; all answers equal")
        print("| workload | guesses | tokens | tokens a step | right guesses | tok/s | to off |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for (kind, name), count in counts.items():
            ratios = [one / off for one, off in zip(count.speeds(), counts[kind, "off"].speeds(), strict=True)]
            rate = f"{count.right / count.proposed:.0%} of {count.proposed // given.rounds}" if count.proposed else "-"
            print(
                f"| {kind} | {name} | {count.tokens[0]} | {sum(count.tokens) / max(count.steps, 1):.2f} | {rate}"
                f" | {statistics.median(count.speeds()):.1f} | {statistics.median(ratios):.2f} |"
            )


if __name__ == "__main__":
    main()
