"""Prompts and arrival times: their lengths, what they share, and that a seed decides them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_server import byte_tokenizer

from mooli.bench.datasets import (
    Dataset,
    DatasetOptions,
    MooncakeOptions,
    Randoms,
    SharedPrefixOptions,
    load_dataset,
    random_lengths,
    word_list,
)
from mooli.bench.errors import BenchmarkError
from mooli.bench.load import arrival_times
from mooli.bench.records import BenchRequest
from mooli.frontend.tokenizer import Tokenizer


def load(tokenizer: Tokenizer, *, seed: int = 42, **given: Any) -> Dataset:
    return load_dataset(DatasetOptions(**given), tokenizer, Randoms.seeded(seed))


def conversations(folder: Path, *pairs: tuple[str, str], extra: tuple[Any, ...] = ()) -> str:
    data = [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in pairs]
    file = folder / "sharegpt.json"
    file.write_text(json.dumps([*data, *extra]))
    return str(file)


@pytest.mark.parametrize(("ratio", "low"), [(0.0, 1), (0.5, 5), (1.0, 10)])
def test_random_lengths_reach_both_ends_and_no_further(ratio: float, low: int) -> None:
    lengths = random_lengths(10, ratio, 2000, Randoms.seeded(1))
    assert (min(lengths), max(lengths)) == (low, 10)


def test_lengths_are_those_sglang_draws_from_the_same_seed(tokenizer: Tokenizer) -> None:
    dataset = load(
        tokenizer, name="random", num_prompts=5, random_input_len=100, random_output_len=50, random_range_ratio=0.5
    )
    drawn = np.random.RandomState(42)
    inputs, outputs = drawn.randint(50, 101, size=5), drawn.randint(25, 51, size=5)
    assert [request.prompt_len for request in dataset.requests] == inputs.tolist()
    assert [request.output_len for request in dataset.requests] == outputs.tolist()


def test_random_without_a_file_is_words_of_the_package_and_says_so(tokenizer: Tokenizer) -> None:
    dataset = load(tokenizer, name="random", num_prompts=3, random_input_len=200, random_range_ratio=1.0)
    assert any("list in the package" in remark for remark in dataset.remarks)
    for request in dataset.requests:
        assert isinstance(request.prompt, str)
        assert len(tokenizer.encode(request.prompt)) == request.prompt_len == 200
        assert set(request.prompt.split()[:-1]) <= set(word_list())
    assert len({str(request.prompt) for request in dataset.requests}) == 3


def test_the_seed_decides_the_prompts(tokenizer: Tokenizer) -> None:
    given = {"name": "random", "num_prompts": 4, "random_input_len": 50}
    assert load(tokenizer, **given).requests == load(tokenizer, **given).requests
    assert load(tokenizer, seed=1, **given).requests != load(tokenizer, **given).requests


def test_random_cuts_and_repeats_the_prompts_of_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = conversations(tmp_path, ("abc", "x" * 9), ("defghijklm", "y" * 9))
    dataset = load(
        tokenizer,
        name="random",
        path=path,
        num_prompts=2,
        random_input_len=7,
        random_range_ratio=1.0,
        tokenize_prompt=True,
    )
    texts = {tokenizer.decode(list(request.prompt)) for request in dataset.requests}  # type: ignore[arg-type]
    assert texts == {"abcabca", "defghij"}


def test_fewer_prompts_than_asked_for_are_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = load(tokenizer, name="random", path=conversations(tmp_path, ("abc", "x")), num_prompts=3)
    assert len(dataset.requests) == 1
    assert "there are 1 prompts, fewer than the 3 asked for" in dataset.remarks


def test_random_ids_run_on_from_a_drawn_offset(tokenizer: Tokenizer) -> None:
    given = {"random_input_len": 300, "random_range_ratio": 1.0, "tokenize_prompt": True}
    dataset = load(tokenizer, name="random-ids", num_prompts=3, **given)
    for request in dataset.requests:
        ids = [int(i) for i in request.prompt]  # type: ignore[arg-type]
        assert ids == [(ids[0] + j) % 256 for j in range(300)]


def test_sharegpt_takes_the_first_two_turns_and_leaves_out_what_does_not_fit(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = conversations(
        tmp_path,
        ("hello", "world!"),
        ("q", "too short a prompt"),
        ("too short an answer", "a"),
        ("long " * 50, "answer"),
        extra=({"conversations": [{"value": "alone"}]}, {"conversation": [{"value": "other"}, {"value": "key"}]}, 3),
    )
    dataset = load(tokenizer, name="sharegpt", path=path, sharegpt_context_len=100)
    found = sorted((str(r.prompt), r.prompt_len, r.output_len) for r in dataset.requests)
    assert found == [("hello", 5, 6), ("other", 5, 3)]
    fixed = load(tokenizer, name="sharegpt", path=path, sharegpt_output_len=9, num_prompts=2)
    assert [request.output_len for request in fixed.requests] == [9, 9]


def test_a_suffix_goes_in_front_of_the_assistants_mark(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = conversations(tmp_path, ("Human: hi Assistant:", "hello"))
    dataset = load(tokenizer, name="sharegpt", path=path, prompt_suffix=" Be brief. ")
    assert dataset.requests[0].prompt == "Human: hi  Be brief. Assistant:"


def test_a_chat_template_is_put_around_the_prompt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = conversations(tmp_path, ("hi there", "hello"))
    dataset = load(tokenizer, name="sharegpt", path=path, apply_chat_template=True)
    assert dataset.requests[0].prompt == "user: hi there\nassistant: "


def test_sharegpt_without_a_file_says_what_to_do(tokenizer: Tokenizer) -> None:
    with pytest.raises(BenchmarkError, match=r"random` needs none; or give --dataset-path FILE"):
        load(tokenizer, name="sharegpt")


def test_a_sharegpt_file_in_the_local_cache_is_used(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hub" / "datasets--anon8231489123--ShareGPT_Vicuna_unfiltered" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    file = Path(conversations(tmp_path, ("hello", "world")))
    file.rename(folder / "ShareGPT_V3_unfiltered_cleaned_split.json")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load(tokenizer, name="sharegpt").requests[0].prompt == "hello"


def test_custom_reads_json_lines_and_counts_those_that_are_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "custom.jsonl"
    line = {"conversations": [{"content": "hello"}, {"content": "world"}]}
    file.write_text(f"{json.dumps(line)}\nnot json\n\n")
    dataset = load(tokenizer, name="custom", path=str(file))
    assert [request.prompt for request in dataset.requests] == ["hello"]
    assert dataset.remarks == (f"1 lines of {file} are no JSON objects and were left out",)


def test_openai_requests_keep_their_own_keys(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "openai.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    lines = [{"model": "x", "messages": messages, "max_tokens": 12, "temperature": 0.7}, {"messages": messages}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    dataset = load(tokenizer, name="openai", path=str(file), is_chat=True)
    first, second = dataset.requests
    assert (first.prompt, first.output_len, first.extra_body) == (messages, 12, {"temperature": 0.7})
    assert first.prompt_len == len("user: hi\nassistant: ")
    assert second.output_len == 256
    with pytest.raises(BenchmarkError, match="holds chats"):
        load(tokenizer, name="openai", path=str(file))


GSP = SharedPrefixOptions(num_groups=3, prompts_per_group=4, system_prompt_len=30, question_len=5, output_len=6)


def test_groups_share_their_first_part_and_nothing_else(tokenizer: Tokenizer) -> None:
    dataset = load(tokenizer, name="generated-shared-prefix", shared_prefix=GSP)
    assert len(dataset.requests) == 12
    heads = [str(request.prompt).split("\n\n")[0] for request in dataset.requests]
    assert sorted(heads.count(head) for head in set(heads)) == [4, 4, 4]
    assert len({str(request.prompt) for request in dataset.requests}) == 12
    assert heads != sorted(heads, key=heads.index)
    assert all(len(tokenizer.encode(str(r.prompt))) == r.prompt_len and r.output_len == 6 for r in dataset.requests)


def test_ordered_groups_come_one_after_the_other_with_a_key_each(tokenizer: Tokenizer) -> None:
    gsp = dataclasses.replace(GSP, ordered=True, send_routing_key=True, fast_prepare=True)
    requests = load(tokenizer, name="generated-shared-prefix", shared_prefix=gsp).requests
    keys = [request.routing_key for request in requests]
    assert keys == sorted(keys, key=keys.index) and len(set(keys)) == 3
    assert {request.prompt_len for request in requests} == {35}


def test_zipf_makes_the_first_group_the_largest(tokenizer: Tokenizer) -> None:
    gsp = dataclasses.replace(GSP, prompts_per_group=50, ordered=True, group_distribution="zipf", zipf_alpha=2.0)
    requests = load(tokenizer, name="generated-shared-prefix", shared_prefix=gsp).requests
    heads = [str(request.prompt).split("\n\n")[0] for request in requests]
    counts = [heads.count(head) for head in dict.fromkeys(heads)]
    assert sum(counts) == 150 and counts == sorted(counts, reverse=True) and counts[0] > 75


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_turns": 2}, "needs a chat"),
        ({"group_distribution": "zipf"}, "--gsp-zipf-alpha"),
        ({"group_distribution": "zipf", "zipf_alpha": math.inf}, "finite"),
        ({"zipf_alpha": 1.0}, "belongs to"),
        ({"num_groups": 0}, "--gsp-num-groups must be at least 1"),
        ({"range_ratio": 1.5}, "from 0 to 1"),
    ],
)
def test_groups_that_cannot_be_made_are_refused(tokenizer: Tokenizer, change: dict[str, Any], words: str) -> None:
    with pytest.raises(BenchmarkError, match=words):
        load(tokenizer, name="generated-shared-prefix", shared_prefix=dataclasses.replace(GSP, **change))


TRACE = [
    {"timestamp": 3000, "input_length": 1100, "output_length": 64, "hash_ids": [1, 2, 4]},
    {"timestamp": 1000, "input_length": 1024, "output_length": 32, "hash_ids": [1, 2]},
    {"timestamp": 2000, "input_length": 700, "output_length": 1, "hash_ids": [7, 2]},
]


def trace_file(folder: Path, *records: Any) -> str:
    file = folder / "conversation_trace.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records or TRACE))
    return str(file)


def common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_a_trace_keeps_its_times_and_shares_what_it_shared(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cake = MooncakeOptions(slowdown_factor=2.0)
    requests = load(tokenizer, name="mooncake", path=trace_file(tmp_path), mooncake=cake).requests
    assert [request.arrival_s for request in requests] == [0.0, 2.0, 4.0]
    assert [request.output_len for request in requests] == [32, 1, 64]
    first, other, third = (str(request.prompt) for request in requests)
    assert common_prefix(first, third) > 2 * len("hi " * 127)
    assert common_prefix(first, other) < 40


def test_a_length_factor_scales_lengths_and_leaves_the_sharing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cake = MooncakeOptions(length_factor=0.125)
    requests = load(tokenizer, name="mooncake", path=str(Path(trace_file(tmp_path)).parent), mooncake=cake).requests
    assert [request.prompt_len for request in requests] == [128, 88, 138]
    assert [request.output_len for request in requests] == [4, 1, 8]
    first, other, third = (str(request.prompt) for request in requests)
    assert third.startswith(first)
    assert common_prefix(first, other) < 16


def test_rounds_of_a_session_grow_and_come_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cake = MooncakeOptions(num_rounds=2)
    path = trace_file(tmp_path, TRACE[0])
    first, second = load(tokenizer, name="mooncake", path=path, mooncake=cake).requests
    assert first.arrival_s == second.arrival_s
    assert str(second.prompt).startswith(str(first.prompt))
    chat = load(tokenizer, name="mooncake", path=path, mooncake=cake, is_chat=True).requests[1]
    assert [message["role"] for message in chat.prompt] == ["user", "assistant", "user"]  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    ("record", "words"),
    [({"input_length": 3}, "timestamp"), ({"timestamp": 0, "hash_ids": 3}, "hash_ids"), ("text", "timestamp")],
)
def test_a_malformed_trace_is_refused(tokenizer: Tokenizer, tmp_path: Path, record: Any, words: str) -> None:
    with pytest.raises(BenchmarkError, match=words):
        load(tokenizer, name="mooncake", path=trace_file(tmp_path, record))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "mooncake"}, "--dataset-path"),
        ({"name": "mmmu"}, "images"),
        ({"name": "custom"}, "--dataset-path"),
        ({"name": "custom", "path": "/no/such/file"}, "cannot read"),
        ({"name": "random", "path": "/no/such/file"}, "cannot read"),
        ({"name": "random", "random_input_len": 0}, "at least 1"),
        ({"name": "random", "random_range_ratio": -1.0}, "from 0 to 1"),
        ({"name": "random-ids", "path": "x"}, "reads no file"),
        ({"name": "nothing"}, "no dataset"),
        ({"name": "random", "num_prompts": 0}, "--num-prompts"),
    ],
)
def test_what_cannot_be_loaded_is_said(tokenizer: Tokenizer, given: dict[str, Any], words: str) -> None:
    with pytest.raises(BenchmarkError, match=words):
        load(tokenizer, **given)


def test_a_tokenizer_without_a_template_cannot_apply_one(tmp_path: Path) -> None:
    plain = byte_tokenizer(tmp_path / "plain", chat_template=None)
    with pytest.raises(BenchmarkError, match="no chat template"):
        load(plain, name="sharegpt", path=conversations(tmp_path, ("hello", "world")), apply_chat_template=True)


def requests_at(*times: float | None) -> list[BenchRequest]:
    return [BenchRequest(prompt="x", prompt_len=1, output_len=1, arrival_s=time) for time in times]


def test_an_infinite_rate_sends_everything_at_once() -> None:
    times = arrival_times(requests_at(None, None), request_rate=math.inf, generator=np.random.RandomState(0))
    assert times == [0.0, 0.0]


def test_a_finite_rate_is_a_poisson_process_from_the_first_request_on() -> None:
    times = arrival_times(requests_at(*[None] * 4001), request_rate=5.0, generator=np.random.RandomState(0))
    gaps = np.diff(times)
    expected = np.random.RandomState(0).exponential(0.2, size=4000)
    assert times[0] == 0.0
    assert gaps == pytest.approx(expected)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() == pytest.approx(0.2, rel=0.1)


def test_requests_with_times_of_their_own_ignore_the_rate() -> None:
    times = arrival_times(requests_at(0.0, 1.5), request_rate=5.0, generator=np.random.RandomState(0))
    assert times == [0.0, 1.5]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(BenchmarkError, match="--request-rate"):
        arrival_times(requests_at(None), request_rate=rate, generator=np.random.RandomState(0))
