"""`generated-shared-prefix`: groups of prompts that begin with the same text.

Owns making them up. A group's text, an empty line, then a question of its own, all of tokens drawn from the vocabulary.
Nothing is kept between runs.
"""

from __future__ import annotations

import math
import secrets

import numpy as np

from mooli.bench.datasets import Dataset, DatasetOptions, Randoms, SharedPrefixOptions, random_lengths, usable_ids
from mooli.bench.errors import BenchmarkError
from mooli.bench.records import BenchRequest
from mooli.frontend.tokenizer import Tokenizer


def shared_prefix(options: DatasetOptions, tokenizer: Tokenizer, randoms: Randoms) -> Dataset:
    """num_groups * prompts_per_group conversations; `--num-prompts` says nothing here.

    Raises BenchmarkError for counts below 1, a distribution that does not fit its parameter, and several turns on a
    route that takes no chat.
    """
    gsp = options.shared_prefix
    _check(gsp, is_chat=options.is_chat)
    num = gsp.num_groups * gsp.prompts_per_group
    system_lens = random_lengths(gsp.system_prompt_len, gsp.range_ratio, gsp.num_groups, randoms)
    question_lens = np.asarray(random_lengths(gsp.question_len, gsp.range_ratio, num * gsp.num_turns, randoms))
    output_lens = random_lengths(gsp.output_len, gsp.range_ratio, num, randoms)
    ids = usable_ids(tokenizer)

    def text(length: int) -> str:
        return tokenizer.decode(randoms.python.choices(ids, k=length), skip_special_tokens=False)

    systems = [text(length) for length in system_lens]
    run = secrets.token_hex(4)
    requests = []
    for i, group in enumerate(_groups(gsp, randoms)):
        lens = question_lens[i * gsp.num_turns : (i + 1) * gsp.num_turns]
        first, *later = (text(int(length)) for length in lens)
        prompt = f"{systems[group]}\n\n{first}"
        drawn_len = system_lens[group] + int(lens[0])
        requests.append(
            BenchRequest(
                prompt=prompt,
                # Random tokens written as text are not the same tokens when read again.
                prompt_len=drawn_len if gsp.fast_prepare else len(tokenizer.encode(prompt)),
                output_len=output_lens[i],
                later_turns=tuple(later),
                routing_key=f"{run}_{group}" if gsp.send_routing_key else None,
            )
        )
    if not gsp.ordered:
        randoms.python.shuffle(requests)
    remarks = []
    if gsp.fast_prepare:
        remarks.append("input tokens are those drawn, not those of the text (--gsp-fast-prepare)")
    if options.num_prompts not in (num, DatasetOptions().num_prompts):
        remarks.append(f"--num-prompts says nothing here: groups and prompts per group make {num} prompts")
    note = f"generated-shared-prefix, {gsp.num_groups} groups of {gsp.prompts_per_group}"
    if gsp.group_distribution == "zipf":
        note = f"generated-shared-prefix, {num} prompts over {gsp.num_groups} groups, zipf {gsp.zipf_alpha:g}"
    return Dataset(requests=requests, note=note, remarks=tuple(remarks))


def _groups(gsp: SharedPrefixOptions, randoms: Randoms) -> list[int]:
    """The group of each prompt: all alike, or drawn with weights 1 / rank**alpha, rank starting at 1."""
    num = gsp.num_groups * gsp.prompts_per_group
    if gsp.group_distribution == "uniform":
        return [i // gsp.prompts_per_group for i in range(num)]
    weights = np.arange(1, gsp.num_groups + 1, dtype=np.float64) ** -(gsp.zipf_alpha or 1.0)
    return [int(group) for group in np.sort(randoms.numpy.choice(gsp.num_groups, size=num, p=weights / weights.sum()))]


def _check(gsp: SharedPrefixOptions, *, is_chat: bool) -> None:
    for flag, value in (
        ("--gsp-num-groups", gsp.num_groups),
        ("--gsp-prompts-per-group", gsp.prompts_per_group),
        ("--gsp-system-prompt-len", gsp.system_prompt_len),
        ("--gsp-question-len", gsp.question_len),
        ("--gsp-output-len", gsp.output_len),
        ("--gsp-num-turns", gsp.num_turns),
    ):
        if value < 1:
            raise BenchmarkError(f"{flag} must be at least 1, got {value}")
    alpha = gsp.zipf_alpha
    if gsp.group_distribution == "zipf" and not (alpha is not None and math.isfinite(alpha) and alpha > 0):
        raise BenchmarkError(
            f"--gsp-group-distribution zipf needs --gsp-zipf-alpha, a finite number above 0, got {alpha}"
        )
    if gsp.group_distribution == "uniform" and alpha is not None:
        raise BenchmarkError("--gsp-zipf-alpha belongs to --gsp-group-distribution zipf")
    if gsp.num_turns > 1 and not is_chat:
        raise BenchmarkError(
            "--gsp-num-turns above 1 needs a chat: --backend sglang-oai-chat, vllm-chat or lmdeploy-chat"
        )
