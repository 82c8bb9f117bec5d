"""Checks and reads that all attention operations share: lengths, block tables, head counts, masks; sums in float32.

Never knows which operation asks; its name is an argument, for the messages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mooli_simulate_ascend.errors import check

PAGE_SIZE = 128
MAX_CACHE_NUMEL = 2**31 - 1
HALF_TYPES = (torch.float16, torch.bfloat16)

_triangles: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Masks that were found to be the strict upper triangle, so that millions of elements are compared once a tensor."""


def check_heads(
    name: str, num_heads: int, num_kv_heads: int, head_dim: int, most: int = 256, widest: int = 512
) -> None:
    """Head counts and sizes. `most`: query heads, `widest`: head_dim."""
    check(num_heads >= 1 and num_kv_heads >= 1, name, f"{num_heads} query and {num_kv_heads} kv heads")
    check(num_heads <= most, name, f"{num_heads} query heads are more than {most}")
    check(num_heads % num_kv_heads == 0, name, f"{num_heads} query heads are no multiple of {num_kv_heads} kv heads")
    check(num_heads // num_kv_heads <= 64, name, f"{num_heads // num_kv_heads} query heads share a kv head: over 64")
    check(head_dim % 16 == 0, name, f"head_dim {head_dim} is no multiple of 16")
    check(head_dim <= widest, name, f"head_dim {head_dim} is over {widest}")


def check_scale(name: str, scale: float) -> None:
    check(scale != 1.0, name, "the scale was left at 1.0: pass 1 / sqrt(head_dim)")


def check_contiguous(name: str, **tensors: Tensor | None) -> None:
    for argument, tensor in tensors.items():
        if tensor is not None:
            check(tensor.is_contiguous(), name, f"{argument} of shape {tuple(tensor.shape)} is not contiguous")


def check_types(name: str, query: Tensor, **others: Tensor) -> None:
    check(query.dtype in HALF_TYPES, name, f"query is {query.dtype}: float16 or bfloat16 only")
    for argument, tensor in others.items():
        check(tensor.dtype == query.dtype, name, f"{argument} is {tensor.dtype}, but query is {query.dtype}")


def check_page_size(name: str, page_size: int) -> None:
    """128, the one size that is right on every attention path."""
    check(page_size % 16 == 0, name, f"561002: block_size should aligned to 16, but got {page_size}")
    check(
        page_size == PAGE_SIZE,
        name,
        f"block_size {page_size} runs on some paths and is wrong without a word on others: 128",
    )


def check_cache_numel(name: str, cache: Tensor) -> None:
    check(
        cache.numel() <= MAX_CACHE_NUMEL,
        name,
        f"a cache of {cache.numel()} elements does not fit int32 ({MAX_CACHE_NUMEL})",
    )


def check_block_table(name: str, table: Tensor, num_rows: int) -> None:
    check(table.dtype == torch.int32, name, f"block_table is {table.dtype}, not int32")
    check(table.dim() == 2, name, f"block_table has {table.dim()} dimensions, not 2")
    check(table.shape[0] == num_rows, name, f"block_table has {table.shape[0]} rows for {num_rows} requests")
    check(table.shape[1] > 0, name, "block_table has no columns: tiling fails")
    check_contiguous(name, block_table=table)


def check_table_width(name: str, table: Tensor, page_size: int, lengths: Sequence[int]) -> None:
    longest = max(lengths, default=0)
    check(
        -(-longest // page_size) <= table.shape[1],
        name,
        f"block_table has {table.shape[1]} columns, but {longest} tokens need {-(-longest // page_size)}",
    )


def check_lengths(name: str, argument: str, lengths: Sequence[int]) -> None:
    check(all(length >= 0 for length in lengths), name, f"{argument} has a negative length: {list(lengths)}")


def host_lengths(name: str, argument: str, tensor: Tensor) -> list[int]:
    """Lengths that the library reads through a pointer to host memory: a CPU int32 tensor."""
    check(tensor.dtype == torch.int32, name, f"{argument} is {tensor.dtype}: read as int32, it would be misread")
    check(tensor.dim() == 1, name, f"{argument} has {tensor.dim()} dimensions, not 1")
    check_contiguous(name, **{argument: tensor})
    lengths: list[int] = tensor.tolist()
    check_lengths(name, argument, lengths)
    return lengths


def check_output(name: str, out: Tensor, query: Tensor) -> None:
    check(out.shape == query.shape, name, f"out is {tuple(out.shape)}, but query is {tuple(query.shape)}")
    check(out.dtype == query.dtype, name, f"out is {out.dtype}, but query is {query.dtype}")
    check_contiguous(name, out=out)


def is_upper_triangle(mask: Tensor, masked: float = 1.0) -> bool:
    """Whether a square mask holds `masked` strictly above the diagonal and zero elsewhere."""
    if mask in _triangles and _triangles[mask] == masked:
        return True
    above = torch.ones(mask.shape[-2:], dtype=torch.bool).triu_(1)
    wanted = torch.zeros(mask.shape[-2:], dtype=torch.float32).masked_fill_(above, masked)
    found = bool(torch.equal(mask.reshape(wanted.shape).float(), wanted))
    if found:
        _triangles[mask] = masked
    return found


def read_pages(name: str, cache: Tensor, row: Tensor, length: int, num_kv_heads: int, *, heads_first: bool) -> Tensor:
    """Keys or values of one request, float32 (num_kv_heads, length, head_dim). Pages are checked to exist.

    cache: (pages, page, kv heads * head_dim), (pages, page, kv heads, head_dim), or, `heads_first`, (pages, kv heads,
    page, head_dim).
    """
    page_size = cache.shape[2] if heads_first else cache.shape[1]
    pages = row[: -(-length // page_size)].long()
    outside = (pages < 0) | (pages >= cache.shape[0])
    check(not bool(outside.any()), name, f"block_table names page {pages[outside][:1].tolist()} of {cache.shape[0]}")
    found = cache[pages]
    if heads_first:
        found = found.transpose(1, 2)
    return found.reshape(len(pages) * page_size, num_kv_heads, -1)[:length].transpose(0, 1).float()


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention in float32: query (heads, L, D), keys and values (kv heads, N, D), hidden bool (L, N) or None.

    Returns (heads, L, D) and the logarithm of the sum of exponentials (heads, L). A query that sees nothing has NaN.
    """
    num_heads, length, head_dim = query.shape
    grouped = query.float().reshape(keys.shape[0], -1, head_dim)
    scores = (grouped @ keys.transpose(1, 2)).reshape(num_heads, length, -1) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    mixed = weights.reshape(keys.shape[0], -1, keys.shape[1]) @ values
    return mixed.reshape(num_heads, length, -1), torch.logsumexp(scores, dim=-1)


def hidden_by_position(
    num_queries: int, num_keys: int, first: int, before: int | None = None, after: int = 0
) -> Tensor:
    """Keys that queries at positions `first` and on do not see: bool (queries, keys).

    A query at p sees keys p - before .. p + after; `before` None: from the first.
    """
    queries = torch.arange(first, first + num_queries)[:, None]
    keys = torch.arange(num_keys)[None, :]
    hidden = keys > queries + after
    return hidden if before is None else hidden | (keys < queries - before)
