"""npu_fused_infer_attention_score against attention in plain float32, and every argument it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged import PAGE, Requests, close, make_requests, scale_of, triangle
from refusals import refused

import mooli_simulate_ascend as sim

MASK = triangle(2048)


def fused(**arguments: Any) -> Any:
    return torch.ops.npu.npu_fused_infer_attention_score(**arguments)


def fused_out(**arguments: Any) -> Any:
    return torch.ops.npu.npu_fused_infer_attention_score.out(**arguments)


def flat(cache: torch.Tensor) -> torch.Tensor:
    return cache.flatten(2)


def decode_call(requests: Requests, **others: Any) -> dict[str, Any]:
    """One query a request, layout BSH."""
    heads, size = requests.queries.shape[1:]
    kv_heads = requests.key_cache.shape[2]
    return {
        "query": requests.queries.view(-1, 1, heads * size).npu(),
        "key": flat(requests.key_cache).npu(),
        "value": flat(requests.value_cache).npu(),
        "block_table": requests.table.npu(),
        "actual_seq_lengths_kv": requests.totals,
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": scale_of(requests.queries),
        "input_layout": "BSH",
        "block_size": PAGE,
        **others,
    }


def extend_call(requests: Requests, **others: Any) -> dict[str, Any]:
    """One request of several queries, layout BSH."""
    call = decode_call(requests)
    call["query"] = requests.queries.flatten(1)[None].npu()
    return {**call, "sparse_mode": 3, "atten_mask": MASK.npu(), "actual_seq_lengths": requests.new, **others}


def packed_call(requests: Requests, **others: Any) -> dict[str, Any]:
    """Layout TND."""
    call = extend_call(requests)
    cumulative = torch.tensor(requests.new).cumsum(0).tolist()
    query = requests.queries.npu()
    return {**call, "query": query, "input_layout": "TND", "actual_seq_lengths": cumulative, **others}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("totals", [[1], [127, 128], [129, 300, 5], [256]])
def test_decode_is_attention(totals: list[int], dtype: torch.dtype) -> None:
    requests = make_requests([1] * len(totals), totals, dtype=dtype)
    assert close(fused(**decode_call(requests))[0], requests.attention())


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (8, 1, 64), (6, 2, 128)])
def test_decode_in_layout_bsnd_is_attention(heads: int, kv_heads: int, size: int) -> None:
    requests = make_requests([1, 1], [40, 200], heads, kv_heads, size)
    call = decode_call(requests, input_layout="BSND", query=requests.queries[:, None].npu())
    assert close(fused(**call)[0], requests.attention())


def test_layout_bnsd_reads_pages_that_hold_head_after_head() -> None:
    requests = make_requests([1, 1], [40, 200])
    caches = {
        name: cache.transpose(1, 2).contiguous().npu()
        for name, cache in (("key", requests.key_cache), ("value", requests.value_cache))
    }
    call = decode_call(requests, input_layout="BNSD", query=requests.queries[:, :, None].contiguous().npu(), **caches)
    assert close(fused(**call)[0], requests.attention())


@pytest.mark.parametrize(("new", "total"), [(5, 5), (5, 133), (128, 256), (200, 300), (2, 128)])
def test_extend_is_causal_attention_behind_a_prefix(new: int, total: int) -> None:
    requests = make_requests([new], [total])
    assert close(fused(**extend_call(requests))[0], requests.attention())


def test_rows_are_padded_to_one_length_and_the_padding_is_nan() -> None:
    requests = make_requests([3, 7], [150, 7])
    padded = torch.zeros(2, 7, 4 * 32, dtype=torch.bfloat16)
    padded[0, :3], padded[1] = requests.queries.flatten(1)[:3], requests.queries.flatten(1)[3:]
    out = fused(**extend_call(requests, query=padded.npu()))[0].cpu()
    assert close(torch.cat([out[0, :3], out[1]]), requests.attention())
    assert out[0, 3:].isnan().all()


@pytest.mark.parametrize("mode", [2, 4])
def test_the_other_masks_are_left_top_and_a_band(mode: int) -> None:
    requests = make_requests([40], [40])
    window = None if mode == 2 else 9
    limits = {} if mode == 2 else {"pre_tokens": 8, "next_tokens": 0}
    out = fused(**extend_call(requests, sparse_mode=mode, **limits))[0]
    assert close(out, requests.attention(window=window))


@pytest.mark.parametrize(("version", "size"), [("8.3", 128), ("8.5", 32)])
def test_packed_rows_are_attention_in_newer_versions(version: str, size: int, cann: Any) -> None:
    cann(version)
    requests = make_requests([1, 5, 130], [129, 5, 300], size=size)
    assert close(fused(**packed_call(requests))[0], requests.attention())


def test_the_second_version_is_the_first_with_other_names(cann: Any) -> None:
    cann("8.5")
    requests = make_requests([1, 5], [129, 5])
    call = packed_call(requests)
    names = {
        "actual_seq_lengths": "actual_seq_qlen",
        "actual_seq_lengths_kv": "actual_seq_kvlen",
        "num_heads": "num_query_heads",
        "scale": "softmax_scale",
    }
    out = torch.ops.npu.npu_fused_infer_attention_score_v2(**{names.get(name, name): x for name, x in call.items()})[0]
    assert close(out, requests.attention())


def test_keys_and_values_need_no_pages() -> None:
    requests = make_requests([9], [9])
    call = extend_call(
        requests, key=requests.keys[0].flatten(1)[None].npu(), value=requests.values[0].flatten(1)[None].npu()
    )
    for name in ("block_table", "block_size"):
        del call[name]
    assert close(fused(**call)[0], requests.attention())


def test_the_logarithm_of_the_sum_comes_if_asked_for() -> None:
    requests = make_requests([1], [70])
    _, lse = fused(**decode_call(requests, softmax_lse_flag=True))
    q, k = requests.queries[0].float(), requests.keys[0].float().repeat_interleave(2, dim=1)
    wanted = torch.logsumexp(torch.einsum("hd,khd->hk", q, k) * scale_of(q), dim=-1)
    assert tuple(lse.shape) == (1, 4, 1, 1)
    assert close(lse, wanted[None, :, None, None])
    assert fused(**decode_call(requests))[1].numel() == 1


def test_a_row_of_no_keys_is_padding_and_becomes_nan() -> None:
    requests = make_requests([1, 1], [40, 200])
    out = fused(**decode_call(requests, actual_seq_lengths_kv=[40, 0]))[0].cpu()
    assert close(out[0], requests.attention()[0])
    assert out[1].isnan().all()


def test_a_length_beyond_what_was_stored_shows_as_nan() -> None:
    requests = make_requests([1], [40])
    assert fused(**decode_call(requests, actual_seq_lengths_kv=[41]))[0].cpu().isnan().all()


def test_the_out_form_writes_into_given_memory() -> None:
    requests = make_requests([1, 1], [40, 200])
    call = decode_call(requests)
    out, lse = torch.empty_like(call["query"]), torch.empty(1, dtype=torch.float32, device="npu")
    workspace = torch.ops.npu._npu_fused_infer_attention_score_get_max_workspace(**call)
    fused_out(**call, workspace=workspace, out=[out, lse])
    assert close(out, requests.attention())


WIDE = (1, 128, 130 * 512)


def wide(shape: tuple[int, ...]) -> torch.Tensor:
    """A huge cache of hardly any memory."""
    return torch.zeros(1, dtype=torch.bfloat16).npu().expand(*shape)


WRONG_DECODES = [
    ({"query": lambda: torch.zeros(2, 1, 128).npu()}, "float16 or bfloat16"),
    ({"key": lambda: torch.zeros(6, 128, 64).npu()}, "key is torch.float32"),
    ({"query": lambda: torch.zeros(128, 1, 2, dtype=torch.bfloat16).npu().permute(2, 1, 0)}, "query .* not contiguous"),
    ({"key": lambda: torch.zeros(5, 64, 128, dtype=torch.bfloat16).npu().mT}, "key .* not contiguous"),
    ({"num_heads": 3}, "no multiple of num_heads"),
    ({"num_heads": 4, "num_key_value_heads": 3}, "no multiple of 3 kv heads"),
    ({"scale": 1.0}, "left at 1.0"),
    ({"value": lambda: torch.zeros(4, 128, 64, dtype=torch.bfloat16).npu()}, "differ"),
    ({"actual_seq_lengths_kv": None}, "mandatory"),
    ({"actual_seq_lengths_kv": [40, 200, -1][1:]}, "negative"),
    ({"actual_seq_lengths_kv": [4000, 200]}, "columns"),
    ({"block_table": lambda: torch.zeros(2, 3, dtype=torch.int64).npu()}, "int64, not int32"),
    ({"block_table": lambda: torch.zeros(3, 3, dtype=torch.int32).npu()}, "3 rows for 2 requests"),
    ({"block_table": lambda: torch.zeros(2, dtype=torch.int32).npu()}, "1 dimensions"),
    ({"block_table": lambda: torch.zeros(2, 0, dtype=torch.int32).npu()}, "no columns"),
    ({"block_table": lambda: torch.full((2, 3), 99, dtype=torch.int32).npu()}, r"page \[99\]"),
    ({"block_table": lambda: torch.full((2, 3), -1, dtype=torch.int32).npu()}, r"page \[-1\]"),
    ({"block_table": lambda: torch.zeros(2, 3, dtype=torch.int32)}, "block_table is on cpu"),
    ({"block_size": 64}, "block_size 64, but pages"),
    ({"input_layout": "SBH"}, "layout 'SBH' is not simulated"),
    ({"inner_precise": 2}, "inner_precise 2"),
    ({"atten_mask": lambda: torch.zeros(2, 1, 1, 512, dtype=torch.bool).npu()}, "mask is not reliable"),
    ({"pse_shift": lambda: torch.zeros(1).npu()}, "pse_shift is not simulated"),
    ({"antiquant_mode": 1}, "antiquant_mode is not simulated"),
    ({"key": lambda: torch.zeros(5, 128, 64, dtype=torch.int8).npu()}, "int8 cache is not simulated"),
    ({"query": lambda: torch.zeros(2, 128, dtype=torch.bfloat16).npu()}, "2 dimensions in layout BSH"),
    ({"query": lambda: torch.zeros(0, 1, 128, dtype=torch.bfloat16).npu()}, "0 requests"),
    ({"num_key_value_heads": -1}, "-1 kv heads"),
    (
        {"input_layout": "BSND", "query": lambda: torch.zeros(2, 1, 2, 32, dtype=torch.bfloat16).npu()},
        "2 heads in layout",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_DECODES)
def test_a_wrong_decode_is_refused(wrong: dict[str, Any], message: str) -> None:
    made = {name: value() if callable(value) else value for name, value in wrong.items()}
    refused(fused, decode_call(make_requests([1, 1], [40, 200])), made, message)


@pytest.mark.parametrize(
    ("size", "message"), [(16, "wrong without a word"), (64, "wrong"), (1, "aligned to 16, but got 1")]
)
def test_only_pages_of_128_are_taken(size: int, message: str) -> None:
    right = decode_call(make_requests([1], [30]))
    caches = {name: torch.zeros(64, size, 64, dtype=torch.bfloat16).npu() for name in ("key", "value")}
    table = torch.zeros(1, 64, dtype=torch.int32).npu()
    refused(fused, right, {**caches, "block_table": table, "block_size": size}, message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"query": (1, 1, 24 * 4)}, "no multiple of 16"),
        ({"query": (1, 1, 4 * 528), "key": (2, 128, 2 * 528), "value": (2, 128, 2 * 528)}, "over 512"),
        ({"query": (1, 1, 260 * 16), "num_heads": 260}, "more than 256"),
        ({"query": (1, 1, 130 * 16), "num_heads": 130, "num_key_value_heads": 1}, "share a kv head"),
        ({"key": (2, 128, 80), "value": (2, 128, 80)}, "80 values, not 64"),
        ({"key": (2, 128, 2, 32), "value": (2, 128, 2, 32)}, "is wanted"),
        (
            {"query": (1, 1, 130 * 512), "num_heads": 130, "num_key_value_heads": 130, "key": WIDE, "value": WIDE},
            "over 65535",
        ),
        (
            {"input_layout": "BNSD", "query": (1, 4, 1, 32), "key": (2, 128, 2, 32), "value": (2, 128, 2, 32)},
            "kv heads, block",
        ),
    ],
)
def test_wrong_shapes_are_refused(wrong: dict[str, Any], message: str) -> None:
    made = {
        name: torch.zeros(value, dtype=torch.bfloat16).npu() if isinstance(value, tuple) else value
        for name, value in wrong.items()
    }
    refused(fused, decode_call(make_requests([1], [30])), made, message)


def test_a_cache_beyond_int32_is_refused() -> None:
    caches = {name: wide((2**18, 128, 64)) for name in ("key", "value")}
    refused(fused, decode_call(make_requests([1], [30])), caches, "does not fit int32")


def test_a_decode_length_has_a_limit() -> None:
    right = decode_call(make_requests([1], [30]), block_table=torch.ones(1, 2049, dtype=torch.int32).npu())
    refused(fused, right, {"actual_seq_lengths_kv": [262145]}, "over 262144")


WRONG_EXTENDS = [
    ({"atten_mask": None}, "needs the mask of 2048"),
    ({"atten_mask": lambda: triangle(512).npu()}, "exactly 2048 x 2048"),
    ({"atten_mask": lambda: triangle(2048, torch.bfloat16).npu()}, "bool, int8 or uint8"),
    ({"atten_mask": lambda: triangle(2048).T.contiguous().npu()}, "strict upper triangle"),
    ({"atten_mask": lambda: torch.zeros(2048, 2048, dtype=torch.bool).npu()}, "strict upper triangle"),
    ({"sparse_mode": 5}, "sparse_mode 5"),
    ({"sparse_mode": 1, "atten_mask": None}, "needs the whole mask"),
    ({"actual_seq_lengths": [6]}, "query length of 6, over 5"),
    ({"sparse_mode": 0, "atten_mask": None, "pre_tokens": 5}, "is not simulated"),
    ({"sparse_mode": 1, "atten_mask": lambda: torch.zeros(133, dtype=torch.bool).npu()}, "1 dimensions"),
    ({"sparse_mode": 1, "atten_mask": lambda: torch.zeros(5, 100, dtype=torch.bool).npu()}, "too small"),
    ({"actual_seq_lengths_kv": [4]}, "more queries than keys"),
    ({"actual_seq_lengths_kv": []}, "shape size is 0"),
    ({"inner_precise": 4}, "inner_precise 4"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_EXTENDS)
def test_a_wrong_extend_is_refused(wrong: dict[str, Any], message: str) -> None:
    made = {name: value() if callable(value) else value for name, value in wrong.items()}
    refused(fused, extend_call(make_requests([5], [133])), made, message)


WRONG_PACKED = [
    ({"actual_seq_lengths": [1, 5]}, r"queryT\(6\) must be equal to the last .*\(5\)"),
    ({"actual_seq_lengths": [6, 1]}, "negative"),
    ({"actual_seq_lengths": None}, "cumulative"),
    ({"actual_seq_lengths_kv": [129]}, r"batch size\(2\)"),
    ({"sparse_mode": 0, "atten_mask": None}, "uniform average"),
    ({"sparse_mode": 1}, "layout TND is not simulated"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_PACKED)
def test_a_wrong_packed_call_is_refused(wrong: dict[str, Any], message: str, cann: Any) -> None:
    cann("8.5")
    refused(fused, packed_call(make_requests([1, 5], [129, 5])), wrong, message)


@pytest.mark.parametrize(
    ("version", "size", "dtype", "message"),
    [
        ("8.2", 128, torch.bfloat16, "not support Page Attention"),
        ("8.3", 64, torch.bfloat16, r"queryD\(64\)"),
        ("8.3", 128, torch.float16, "bfloat16 only"),
    ],
)
def test_older_versions_refuse_packed_pages(
    version: str, size: int, dtype: torch.dtype, message: str, cann: Any
) -> None:
    requests = make_requests([1, 5], [129, 5], size=size, dtype=dtype)
    cann("8.5")
    fused(**packed_call(requests))
    cann(version)
    with pytest.raises(sim.SimulationError, match=message):
        fused(**packed_call(requests))


@pytest.mark.parametrize(
    ("size", "kv_heads", "message"), [(192, 4, None), (192, 2, "as many kv as query heads"), (128, 4, r"queryD\(128\)")]
)
def test_cann_82_packs_only_wide_heads_without_pages(size: int, kv_heads: int, message: str | None) -> None:
    requests = make_requests([6, 3], [6, 3], 4, kv_heads, size)
    keys = {"key": torch.cat(requests.keys).npu(), "value": torch.cat(requests.values).npu()}
    call = packed_call(requests, **keys, block_table=None, actual_seq_lengths_kv=[6, 9])
    if message is None:
        assert close(fused(**call)[0], requests.attention())
    else:
        with pytest.raises(sim.SimulationError, match=message):
            fused(**call)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"out": [(2, 1, 64), (1,)]}, r"out\[0\] is \(2, 1, 64\)"),
        ({"out": [(2, 1, 128), (2,)]}, r"out\[1\] has 2 elements"),
        ({"out": [(2, 1, 128)]}, "out has 1 tensors"),
        ({"out": [(2, 1, 128), (1,)], "softmax_lse_flag": True}, r"out\[1\] is \(1,\)"),
        ({"out": [(2, 1, 128), (2, 4, 1, 1)], "softmax_lse_flag": True}, r"out\[1\] is torch.bfloat16"),
        ({"workspace": (8,)}, "too small"),
    ],
)
def test_wrong_outputs_are_refused(wrong: dict[str, Any], message: str) -> None:
    call = decode_call(make_requests([1, 1], [40, 200]))
    out = [torch.empty(2, 1, 128, dtype=torch.bfloat16, device="npu"), torch.empty(1, device="npu")]
    types = {"out": torch.bfloat16, "workspace": torch.uint8}

    def make(name: str, shape: Any) -> Any:
        if isinstance(shape, list):
            return [make(name, part) for part in shape]
        if isinstance(shape, bool):
            return shape
        return torch.empty(shape, dtype=types[name], device="npu")

    refused(fused_out, {**call, "out": out}, {name: make(name, shape) for name, shape in wrong.items()}, message)


def test_arguments_that_no_schema_has_are_refused() -> None:
    with pytest.raises(RuntimeError, match="actual_seq_kvlen"):
        fused(**decode_call(make_requests([1], [30])), actual_seq_kvlen=[30])


def test_an_output_of_another_type_is_refused() -> None:
    call = decode_call(make_requests([1], [40]))
    out = [torch.empty(1, 1, 128, dtype=dtype, device="npu") for dtype in (torch.bfloat16, torch.float16)]
    lse = torch.empty(1, device="npu")
    refused(fused_out, {**call, "out": [out[0], lse]}, {"out": [out[1], lse]}, r"out\[0\] is torch\.float16")


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("shape", [(9, 9), (1, 9, 9), (1, 1, 9, 9)])
def test_a_whole_mask_hides_what_it_says(mode: int, shape: tuple[int, ...]) -> None:
    requests = make_requests([9], [9])
    call = extend_call(requests, sparse_mode=mode, atten_mask=triangle(9).view(shape).npu())
    assert close(fused(**call)[0], requests.attention())


def dense(layout: str, **others: Any) -> dict[str, Any]:
    """Queries and keys of one request without pages."""
    shapes = {
        "BSH": ((1, 9, 128), (1, 9, 64)),
        "BSND": ((1, 9, 4, 32), (1, 9, 2, 32)),
        "BNSD": ((1, 4, 9, 32), (1, 2, 9, 32)),
        "TND": ((9, 4, 32), (9, 2, 32)),
    }[layout]
    tensors = [torch.randn(shape).to(torch.bfloat16).npu() for shape in (shapes[0], shapes[1], shapes[1])]
    lengths = {"actual_seq_lengths": [9], "actual_seq_lengths_kv": [9]}
    call = dict(zip(("query", "key", "value"), tensors, strict=True))
    mask = {"sparse_mode": 3, "atten_mask": MASK.npu()}
    return {
        **call,
        **lengths,
        **mask,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "scale": 0.2,
        "input_layout": layout,
        **others,
    }


@pytest.mark.parametrize(
    ("layout", "wrong", "message"),
    [
        ("BSH", {"key": (1, 9, 4, 16), "value": (1, 9, 4, 16)}, "4 dimensions, query 3"),
        ("BSH", {"key": (1, 9, 128), "value": (1, 9, 128)}, "128 values, not 64"),
        ("BSH", {"key": (2, 9, 64), "value": (2, 9, 64)}, "2 rows, query 1"),
        ("BSH", {"key": (1, 8, 64), "value": (1, 8, 64)}, "there are 8 keys"),
        ("BSND", {"key": (1, 9, 4, 32), "value": (1, 9, 4, 32)}, "4 heads, num_key_value_heads is 2"),
        ("BNSD", {"key": (1, 2, 9, 16), "value": (1, 2, 9, 16)}, "head_dim 16 is not 32"),
        ("TND", {"actual_seq_lengths_kv": None}, "cumulative lengths of the keys"),
        ("TND", {"actual_seq_lengths_kv": [8]}, r"keyT\(9\)"),
    ],
)
def test_wrong_keys_without_pages_are_refused(layout: str, wrong: dict[str, Any], message: str, cann: Any) -> None:
    cann("8.5")
    tensors = {
        name: torch.zeros(value, dtype=torch.bfloat16).npu() if isinstance(value, tuple) else value
        for name, value in wrong.items()
    }
    refused(fused, dense(layout), tensors, message)


def test_the_second_version_refuses_what_is_not_simulated(cann: Any) -> None:
    cann("8.5")
    call = dense("BSH", actual_seq_qlen=[9], actual_seq_kvlen=[9], num_query_heads=4, softmax_scale=0.2)
    for name in ("actual_seq_lengths", "actual_seq_lengths_kv", "num_heads", "scale"):
        del call[name]
    sink = {"learnable_sink": torch.zeros(4).npu()}
    refused(torch.ops.npu.npu_fused_infer_attention_score_v2, call, sink, "learnable_sink is not simulated")
