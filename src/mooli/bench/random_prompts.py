"""Prompts of chosen lengths: `random` (text) and `random-ids` (running ids).

Owns cutting text and ids to length. Lengths are drawn as SGLang draws them, in the same order from the same seed.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from mooli.bench.conversations import first_turns
from mooli.bench.datasets import Dataset, DatasetOptions, Randoms, random_lengths, sharegpt_in_cache
from mooli.bench.errors import BenchmarkError
from mooli.bench.records import BenchRequest
from mooli.frontend.tokenizer import Tokenizer


def random_text(options: DatasetOptions, tokenizer: Tokenizer, randoms: Randoms) -> Dataset:
    """ShareGPT's prompts, shuffled, repeated or cut to length; without the file, words drawn from a list of ours."""
    input_lens, output_lens = _lengths(options, tokenizer, randoms)
    file = Path(options.path) if options.path else sharegpt_in_cache()
    if file is not None:
        ids = _from_conversations(file, input_lens, tokenizer, randoms)
        return _dataset(options, ids, output_lens, tokenizer, note=f"random, text of {file}")
    ids = _from_words(input_lens, tokenizer, randoms)
    return _dataset(
        options,
        ids,
        output_lens,
        tokenizer,
        note="random, words from Mooli's own list",
        remarks=("no ShareGPT file was given: the prompts are words drawn from a list in the package",),
    )


def random_ids(options: DatasetOptions, tokenizer: Tokenizer, randoms: Randoms) -> Dataset:
    """Token j of request i is (offset_i + i + j) mod vocabulary, with an offset drawn for each request."""
    if options.path:
        raise BenchmarkError("--dataset-name random-ids reads no file; leave out --dataset-path or use random")
    input_lens, output_lens = _lengths(options, tokenizer, randoms)
    vocab_size = _plain_vocab_size(tokenizer)
    offsets = randoms.numpy.randint(0, vocab_size, size=options.num_prompts)
    ids = [
        [(int(offset) + i + j) % vocab_size for j in range(length)]
        for i, (offset, length) in enumerate(zip(offsets, input_lens, strict=True))
    ]
    return _dataset(options, ids, output_lens, tokenizer, note="random-ids")


def _lengths(options: DatasetOptions, tokenizer: Tokenizer, randoms: Randoms) -> tuple[list[int], list[int]]:
    """Input and output lengths; a text is shorter by what the server's tokenizer puts around it."""
    if options.random_input_len < 1 or options.random_output_len < 1:
        raise BenchmarkError("--random-input-len and --random-output-len must be at least 1")
    num, ratio = options.num_prompts, options.random_range_ratio
    input_lens = random_lengths(options.random_input_len, ratio, num, randoms)
    output_lens = random_lengths(options.random_output_len, ratio, num, randoms)
    if not options.tokenize_prompt:
        num_added = len(tokenizer.encode("", add_special_tokens=True))
        input_lens = [max(length - num_added, 1) for length in input_lens]
    return input_lens, output_lens


def _dataset(
    options: DatasetOptions,
    ids: list[list[int]],
    output_lens: list[int],
    tokenizer: Tokenizer,
    *,
    note: str,
    remarks: tuple[str, ...] = (),
) -> Dataset:
    requests = [
        BenchRequest(
            prompt=prompt if options.tokenize_prompt else tokenizer.decode(prompt, skip_special_tokens=False),
            prompt_len=len(prompt),
            output_len=output_len,
        )
        for prompt, output_len in zip(ids, output_lens, strict=False)
    ]
    if len(requests) < options.num_prompts:
        remarks += (f"there are {len(requests)} prompts, fewer than the {options.num_prompts} asked for",)
    return Dataset(requests=requests, note=note, remarks=remarks)


def _from_conversations(file: Path, input_lens: list[int], tokenizer: Tokenizer, randoms: Randoms) -> list[list[int]]:
    turns = first_turns(file)
    randoms.python.shuffle(turns)
    prompts: list[list[int]] = []
    for said, _ in turns:
        if len(prompts) == len(input_lens):
            break
        ids = tokenizer.encode(said, add_special_tokens=False)
        if ids:
            length = input_lens[len(prompts)]
            prompts.append((ids * -(-length // len(ids)))[:length])
    return prompts


def _from_words(input_lens: list[int], tokenizer: Tokenizer, randoms: Randoms) -> list[list[int]]:
    # A word is tokenised once, with the space before it: text is cut at spaces first, so that the words of a sentence
    # are the same tokens.
    words = [tokenizer.encode(" " + word, add_special_tokens=False) for word in word_list()]
    prompts = []
    for length in input_lens:
        ids: list[int] = []
        while len(ids) < length:
            ids += randoms.python.choice(words)
        prompts.append(ids[:length])
    return prompts


def word_list() -> list[str]:
    """About a thousand short English words."""
    file = importlib.resources.files("mooli.bench").joinpath("words.txt")
    return file.read_text(encoding="utf-8").split()


def _plain_vocab_size(tokenizer: Tokenizer) -> int:
    """Ids up to the last ordinary token; the special and unused ones behind it would be odd prompts."""
    size = tokenizer.vocab_size
    while size > 1 and (size - 1 in tokenizer.special_ids or not tokenizer.has_token(size - 1)):
        size -= 1
    return size
