"""The attention of namespace atb against plain float32, and every argument it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged import Requests, close, make_requests, scale_of, triangle
from refusals import refused

import mooli_simulate_ascend as sim


def lengths(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def common(requests: Requests) -> dict[str, Any]:
    return {
        "query": requests.queries.npu(),
        "key_cache": requests.key_cache.npu(),
        "value_cache": requests.value_cache.npu(),
        "block_table": requests.table.npu(),
        "context_lens": lengths(requests.totals),
        "num_heads": requests.queries.shape[1],
        "num_kv_heads": requests.key_cache.shape[2],
        "scale_value": scale_of(requests.queries),
        "out": torch.empty(requests.queries.shape, dtype=requests.queries.dtype, device="npu"),
    }


def masked(dtype: torch.dtype) -> float:
    return float("-inf") if dtype == torch.float16 else 1.0


def qlens_call(requests: Requests) -> dict[str, Any]:
    dtype = requests.queries.dtype
    return {**common(requests), "seq_len": lengths(requests.new), "mask": triangle(128, dtype, masked(dtype)).npu()}


def splitfuse_call(requests: Requests) -> dict[str, Any]:
    dtype = requests.queries.dtype
    value = float("-inf") if dtype == torch.float16 else -10000.0
    rows = torch.cat([triangle(512, torch.float32, value)[t - n : t] for n, t in zip(requests.new, requests.totals)])  # noqa: B905
    mask = rows[:, : max(requests.totals)].to(dtype).contiguous().npu()
    return {**common(requests), "seq_len": lengths(requests.new), "mask": mask}


def flash_call(requests: Requests) -> dict[str, Any]:
    dtype = requests.queries.dtype
    call = common(requests)
    for name in ("key_cache", "value_cache", "block_table", "context_lens"):
        del call[name]
    return {
        **call,
        "key": torch.cat(requests.keys).npu(),
        "value": torch.cat(requests.values).npu(),
        "seq_len": lengths(requests.new),
        "mask": triangle(256, dtype, masked(dtype)).npu(),
    }


def paged(**call: Any) -> torch.Tensor:
    torch.ops.atb._npu_paged_attention(**call)
    return call["out"]


def qlens(**call: Any) -> torch.Tensor:
    torch.ops.atb._npu_flash_attention_qlens(**call)
    return call["out"]


def splitfuse(**call: Any) -> torch.Tensor:
    torch.ops.atb._npu_paged_attention_splitfuse(**call)
    return call["out"]


def flash(**call: Any) -> torch.Tensor:
    torch.ops.atb._npu_flash_attention(**call)
    return call["out"]


BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@BOTH
@pytest.mark.parametrize("totals", [[1], [127, 128, 129], [300]])
def test_paged_attention_is_attention(totals: list[int], dtype: torch.dtype) -> None:
    requests = make_requests([1] * len(totals), totals, dtype=dtype)
    assert close(paged(**common(requests)), requests.attention())


@BOTH
@pytest.mark.parametrize(("new", "totals"), [([5], [5]), ([1, 5, 128], [129, 261, 128]), ([200, 1], [328, 1])])
def test_qlens_is_causal_attention_behind_whole_pages(new: list[int], totals: list[int], dtype: torch.dtype) -> None:
    requests = make_requests(new, totals, dtype=dtype)
    assert close(qlens(**qlens_call(requests)), requests.attention())


def test_qlens_takes_flat_queries_and_caches() -> None:
    requests = make_requests([5], [133])
    call = qlens_call(requests)
    for name in ("key_cache", "value_cache"):
        call[name] = call[name].flatten(2)
    call["query"], call["out"] = call["query"].flatten(1), call["out"].flatten(1)
    assert close(qlens(**call), requests.attention())


@BOTH
def test_splitfuse_is_causal_attention_behind_any_prefix(dtype: torch.dtype) -> None:
    requests = make_requests([3, 1, 9], [20, 130, 9], dtype=dtype)
    assert close(splitfuse(**splitfuse_call(requests)), requests.attention())


@BOTH
def test_flash_attention_is_causal_attention(dtype: torch.dtype) -> None:
    requests = make_requests([3, 130], [3, 130], dtype=dtype)
    assert close(flash(**flash_call(requests)), requests.attention())


def test_padding_rows_of_no_keys_become_nan() -> None:
    requests = make_requests([1, 1], [40, 3])
    out = paged(**{**common(requests), "context_lens": lengths([40, 0])}).cpu()
    assert close(out[0], requests.attention()[0])
    assert out[1].isnan().all()


def made(wrong: dict[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in wrong.items()}


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    return lambda: torch.zeros(shape, dtype=dtype).npu()


WRONG_PAGED = [
    ({"context_lens": lambda: lengths([40, 3], torch.int64)}, "misread"),
    ({"context_lens": lambda: lengths([40, 3]).npu()}, "hostData is null"),
    ({"context_lens": lambda: lengths([40])}, "1 context_lens for 2 tokens"),
    ({"context_lens": lambda: lengths([40, -3])}, "negative"),
    ({"context_lens": lambda: lengths([4000, 3])}, "columns"),
    ({"block_table": zeros(2, 2, dtype=torch.int64)}, "not int32"),
    ({"block_table": zeros(1, 2, dtype=torch.int32)}, "1 rows for 2 requests"),
    ({"block_table": lambda: torch.full((2, 2), 77, dtype=torch.int32).npu()}, r"page \[77\]"),
    ({"query": zeros(2, 128)}, "2 dimensions"),
    ({"query": zeros(2, 4, 32, dtype=torch.float32)}, "float16 or bfloat16"),
    ({"query": lambda: torch.zeros(4, 2, 32, dtype=torch.bfloat16).npu().transpose(0, 1)}, "not contiguous"),
    ({"key_cache": zeros(4, 128, 64), "value_cache": zeros(4, 128, 64)}, "3 dimensions"),
    ({"key_cache": zeros(4, 64, 2, 32), "value_cache": zeros(4, 64, 2, 32)}, "block_size 64"),
    ({"key_cache": zeros(4, 8, 2, 32), "value_cache": zeros(4, 8, 2, 32)}, "aligned to 16"),
    ({"key_cache": zeros(3, 128, 2, 32)}, "caches differ"),
    ({"num_kv_heads": 3}, "no multiple of 3"),
    ({"num_heads": 2}, "4 heads, num_heads is 2"),
    ({"scale_value": 1.0}, "left at 1.0"),
    ({"context_lens": lambda: lengths([[40, 3]])}, "2 dimensions, not 1"),
    ({"num_kv_heads": 0}, "0 kv heads"),
    ({"key_cache": zeros(4, 128, 2, 16), "value_cache": zeros(4, 128, 2, 16)}, "rows must be"),
    ({"query": zeros(0, 4, 32)}, "no tokens"),
    ({"out": zeros(2, 128)}, "out is"),
    ({"out": zeros(2, 4, 32, dtype=torch.float16)}, "out is torch.float16"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_PAGED)
def test_a_wrong_paged_call_is_refused(wrong: dict[str, Any], message: str) -> None:
    refused(paged, common(make_requests([1, 1], [40, 3])), made(wrong), message)


WRONG_QLENS = [
    ({"context_lens": lambda: lengths([130, 9])}, "prefix of 125 tokens"),
    ({"seq_len": lambda: lengths([5, 9], torch.int64)}, "misread"),
    ({"seq_len": lambda: lengths([5, 9]).npu()}, "hostData is null"),
    ({"seq_len": lambda: lengths([5])}, "1 seq_len, but 2 context_lens"),
    ({"seq_len": lambda: lengths([5, 8])}, "adds up to 13"),
    ({"context_lens": lambda: lengths([133, 8])}, "counts the new tokens too"),
    ({"mask": lambda: triangle(256, torch.bfloat16).npu()}, "exactly 128 x 128"),
    ({"mask": lambda: triangle(128, torch.float16).npu()}, "mask is torch.float16"),
    ({"mask": lambda: triangle(128, torch.bfloat16, float("-inf")).npu()}, "the mask is not zero with 1"),
    ({"mask": zeros(128, 128)}, "the mask is not zero with 1"),
    ({"block_table": zeros(3, 3, dtype=torch.int32)}, "3 rows for 2"),
    ({"query": zeros(14, 4, 32, 1)}, "4 dimensions"),
    ({"query": zeros(14, 126)}, "no multiple of 4 heads"),
    ({"scale_value": 1.0}, "left at 1.0"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_QLENS)
def test_a_wrong_qlens_call_is_refused(wrong: dict[str, Any], message: str) -> None:
    refused(qlens, qlens_call(make_requests([5, 9], [133, 9])), made(wrong), message)


def test_the_mask_of_qlens_is_minus_infinity_in_float16() -> None:
    right = qlens_call(make_requests([5], [5], dtype=torch.float16))
    refused(qlens, right, {"mask": triangle(128, torch.float16, 1).npu()}, "with -inf strictly above")


def test_qlens_takes_heads_of_128_at_most() -> None:
    qlens(**qlens_call(make_requests([5], [5], size=128)))
    with pytest.raises(sim.SimulationError, match="over 128"):
        qlens(**qlens_call(make_requests([5], [5], size=144)))


def test_paged_attention_takes_heads_of_256_at_most() -> None:
    paged(**common(make_requests([1], [5], size=256)))
    with pytest.raises(sim.SimulationError, match="over 256"):
        paged(**common(make_requests([1], [5], size=272)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mask": zeros(12, 100)}, "keys or more"),
        ({"query": zeros(12, 128)}, "2 dimensions"),
        ({"mask": zeros(11, 130)}, "12 tokens"),
        ({"mask": zeros(12, 130)}, "do not hide"),
        ({"seq_len": lambda: lengths([3, 8])}, "adds up to 11"),
    ],
)
def test_a_wrong_splitfuse_call_is_refused(wrong: dict[str, Any], message: str) -> None:
    refused(splitfuse, splitfuse_call(make_requests([3, 9], [130, 9])), made(wrong), message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mask": lambda: triangle(64, torch.bfloat16).npu()}, "at least 130 wide"),
        ({"mask": zeros(256, 256)}, "the mask is not"),
        ({"key": zeros(132, 2, 32)}, "133 tokens of 64 values"),
        ({"seq_len": lambda: lengths([3, 130]).npu()}, "hostData is null"),
    ],
)
def test_a_wrong_flash_call_is_refused(wrong: dict[str, Any], message: str) -> None:
    refused(flash, flash_call(make_requests([3, 130], [3, 130])), made(wrong), message)


def test_the_newer_paged_attention_has_a_workspace(cann: Any) -> None:
    requests = make_requests([1, 1], [40, 3])
    assert not hasattr(torch.ops.atb, "_npu_paged_attention_get_workspace")
    cann("8.3")
    call = common(requests)
    workspace = torch.ops.atb._npu_paged_attention_get_workspace(**call)
    assert close(paged(**call, workspace=workspace), requests.attention())
    refused(paged, call, {"workspace": torch.empty(4, dtype=torch.uint8, device="npu")}, "too small")
