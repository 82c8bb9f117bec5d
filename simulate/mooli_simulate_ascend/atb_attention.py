"""The attention operations of the transformer library (namespace atb): they write into `out` and return nothing.

Owns their contracts. Lengths are CPU int32 tensors, read when the call is made. Rows of padding get NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mooli_simulate_ascend.errors import check
from mooli_simulate_ascend.paging import (
    PAGE_SIZE,
    attend,
    check_block_table,
    check_contiguous,
    check_heads,
    check_output,
    check_page_size,
    check_scale,
    check_table_width,
    check_types,
    hidden_by_position,
    host_lengths,
    is_upper_triangle,
    read_pages,
)
from mooli_simulate_ascend.profiles import Profile
from mooli_simulate_ascend.tasks import Task, operation


@dataclass
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float


def heads_of(name: str, query: Tensor, num_heads: int, num_kv_heads: int, scale: float, widest: int) -> Heads:
    """Head sizes of a query (tokens, heads * D) or (tokens, heads, D)."""
    check(query.dim() in (2, 3), name, f"query has {query.dim()} dimensions: (tokens, heads * D) or (tokens, heads, D)")
    if query.dim() == 3:
        check(query.shape[1] == num_heads, name, f"query has {query.shape[1]} heads, num_heads is {num_heads}")
    width = query[0:1].numel() if query.shape[0] else 0
    check(query.shape[0] > 0, name, "query has no tokens")
    check(width % max(num_heads, 1) == 0, name, f"the query's width {width} is no multiple of {num_heads} heads")
    check_scale(name, scale)
    check_heads(name, num_heads, num_kv_heads, width // max(num_heads, 1), widest=widest)
    return Heads(num_heads, num_kv_heads, width // num_heads, scale)


def check_caches(name: str, heads: Heads, key_cache: Tensor, value_cache: Tensor, *, four_dims: bool) -> None:
    """(blocks, block, kv heads, D), or (blocks, block, kv heads * D) unless `four_dims`."""
    check(
        key_cache.shape == value_cache.shape,
        name,
        f"caches differ: {tuple(key_cache.shape)}, {tuple(value_cache.shape)}",
    )
    check_contiguous(name, key_cache=key_cache, value_cache=value_cache)
    inner = {3: (heads.num_kv_heads * heads.head_dim,), 4: (heads.num_kv_heads, heads.head_dim)}
    if four_dims:
        check(key_cache.dim() == 4, name, f"caches have {key_cache.dim()} dimensions: (blocks, block, kv heads, D)")
    wanted = inner.get(key_cache.dim())
    check(
        wanted == tuple(key_cache.shape[2:]), name, f"caches of shape {tuple(key_cache.shape)}: rows must be {wanted}"
    )
    check_page_size(name, key_cache.shape[1])


@operation("_npu_paged_attention", host=["context_lens"])
def paged_attention(
    profile: Profile,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    workspace: Tensor | None = None,
) -> Task:
    """Decode: one row of the block table for each token."""
    name = "_npu_paged_attention"
    check_types(name, query, key_cache=key_cache, value_cache=value_cache)
    check(query.dim() == 3, name, f"query has {query.dim()} dimensions: (tokens, heads, D)")
    heads = heads_of(name, query, num_heads, num_kv_heads, scale_value, widest=256)
    check_contiguous(name, query=query)
    check_caches(name, heads, key_cache, value_cache, four_dims=True)
    lengths = host_lengths(name, "context_lens", context_lens)
    check(len(lengths) == len(query), name, f"{len(lengths)} context_lens for {len(query)} tokens")
    check_block_table(name, block_table, len(query))
    check_table_width(name, block_table, PAGE_SIZE, lengths)
    check_output(name, out, query)
    if workspace is not None:
        needed = paged_workspace_bytes(query)
        check(workspace.numel() * workspace.element_size() >= needed, name, "the workspace is too small for this call")

    def run(_: Sequence[Tensor]) -> None:
        out.fill_(float("nan"))
        for row, length in enumerate(lengths):
            if length:
                k, v = (
                    read_pages(name, cache, block_table[row], length, num_kv_heads, heads_first=False)
                    for cache in (key_cache, value_cache)
                )
                mixed, _lse = attend(query[row][:, None], k, v, scale_value, None)
                out[row] = mixed[:, 0].to(out.dtype)

    return Task(run=run, out_form=True)


def paged_workspace_bytes(query: Tensor) -> int:
    return 16384 + 4 * query.numel()


@operation("_npu_paged_attention_get_workspace", host=["context_lens"])
def paged_attention_workspace(profile: Profile, query: Tensor, **others: object) -> Task:
    paged_attention(profile, query, **others)  # type: ignore[arg-type]
    return Task(run=lambda _: None, new=[((paged_workspace_bytes(query),), torch.uint8)], returns_one=True)


@operation("_npu_flash_attention_qlens", host=["seq_len", "context_lens"])
def flash_attention_qlens(
    profile: Profile,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    context_lens: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: Tensor,
) -> Task:
    """Extend behind a prefix: the prefix of each request is a multiple of 128, which the kernel does not check."""
    name = "_npu_flash_attention_qlens"
    check_types(name, query, key_cache=key_cache, value_cache=value_cache)
    heads = heads_of(name, query, num_heads, num_kv_heads, scale_value, widest=128)
    check_contiguous(name, query=query, mask=mask)
    check_caches(name, heads, key_cache, value_cache, four_dims=False)
    queries, totals = host_lengths(name, "seq_len", seq_len), host_lengths(name, "context_lens", context_lens)
    check_requests(name, query, queries, totals)
    for new, total in zip(queries, totals, strict=True):
        check(
            (total - new) % PAGE_SIZE == 0,
            name,
            f"a prefix of {total - new} tokens: the kernel divides by 128 and drops the rest, without an error",
        )
    check_block_table(name, block_table, len(queries))
    check_table_width(name, block_table, PAGE_SIZE, totals)
    check(tuple(mask.shape) == (128, 128), name, f"the mask is {tuple(mask.shape)}: exactly 128 x 128 is wanted")
    check(mask.dtype == query.dtype, name, f"the mask is {mask.dtype}, but query is {query.dtype}")
    check_output(name, out, query)

    def run(_: Sequence[Tensor]) -> None:
        check(is_upper_triangle(mask, masked_value(mask.dtype)), name, f"the mask is not {triangle_text(mask.dtype)}")
        attend_pages(name, heads, query, key_cache, value_cache, block_table, queries, totals, out)

    return Task(run=run, out_form=True)


@operation("_npu_paged_attention_splitfuse", host=["seq_len", "context_lens"])
def paged_attention_splitfuse(
    profile: Profile,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: Tensor,
) -> Task:
    """Any mixture of prefixes, with a mask row for each token."""
    name = "_npu_paged_attention_splitfuse"
    check_types(name, query, key_cache=key_cache, value_cache=value_cache, mask=mask)
    check(query.dim() == 3, name, f"query has {query.dim()} dimensions: (tokens, heads, D)")
    heads = heads_of(name, query, num_heads, num_kv_heads, scale_value, widest=256)
    check_contiguous(name, query=query, mask=mask)
    check_caches(name, heads, key_cache, value_cache, four_dims=True)
    queries, totals = host_lengths(name, "seq_len", seq_len), host_lengths(name, "context_lens", context_lens)
    check_requests(name, query, queries, totals)
    check_block_table(name, block_table, len(queries))
    check_table_width(name, block_table, PAGE_SIZE, totals)
    check(
        mask.dim() == 2 and mask.shape[0] == len(query) and mask.shape[1] >= max(totals),
        name,
        f"the mask is {tuple(mask.shape)}: ({len(query)} tokens, {max(totals)} keys or more) is wanted",
    )
    check_output(name, out, query)

    def run(_: Sequence[Tensor]) -> None:
        masked = float("-inf") if mask.dtype == torch.float16 else float(torch.tensor(-10000.0, dtype=mask.dtype))
        first = 0
        for new, total in zip(queries, totals, strict=True):
            hidden = hidden_by_position(new, total, total - new)
            wanted = torch.zeros(hidden.shape).masked_fill_(hidden, masked)
            same = bool(torch.equal(mask[first : first + new, :total].float(), wanted))
            check(
                same, name, f"the mask rows of tokens {first} and on do not hide what comes after each, with {masked:g}"
            )
            first += new
        attend_pages(name, heads, query, key_cache, value_cache, block_table, queries, totals, out)

    return Task(run=run, out_form=True)


@operation("_npu_flash_attention", host=["seq_len"])
def flash_attention(
    profile: Profile,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> Task:
    """Whole prompts, without pages."""
    name = "_npu_flash_attention"
    check_types(name, query, key=key, value=value, mask=mask)
    heads = heads_of(name, query, num_heads, num_kv_heads, scale_value, widest=256)
    check_contiguous(name, query=query, key=key, value=value, mask=mask)
    width = num_kv_heads * heads.head_dim
    for argument, tensor in (("key", key), ("value", value)):
        fits = tensor.shape[0] == len(query) and tensor.numel() == len(query) * width
        check(fits, name, f"{argument} is {tuple(tensor.shape)}: {len(query)} tokens of {width} values are wanted")
    queries = host_lengths(name, "seq_len", seq_len)
    check_requests(name, query, queries, queries)
    check(
        mask.dim() == 2 and mask.shape[0] == mask.shape[1] >= max(queries),
        name,
        f"the mask is {tuple(mask.shape)}: square, at least {max(queries)} wide",
    )
    check_output(name, out, query)

    def run(_: Sequence[Tensor]) -> None:
        check(is_upper_triangle(mask, masked_value(mask.dtype)), name, f"the mask is not {triangle_text(mask.dtype)}")
        shape = (len(query), -1, heads.head_dim)
        q, k, v = (x.reshape(shape).transpose(0, 1) for x in (query, key.float(), value.float()))
        target = out.view(shape).transpose(0, 1)
        first = 0
        for length in queries:
            rows = slice(first, first + length)
            hidden = hidden_by_position(length, length, 0)
            target[:, rows] = attend(q[:, rows], k[:, rows], v[:, rows], scale_value, hidden)[0].to(out.dtype)
            first += length

    return Task(run=run, out_form=True)


def check_requests(name: str, query: Tensor, queries: list[int], totals: list[int]) -> None:
    check(len(queries) == len(totals), name, f"{len(queries)} seq_len, but {len(totals)} context_lens")
    check(sum(queries) == len(query), name, f"seq_len adds up to {sum(queries)}, but there are {len(query)} tokens")
    for new, total in zip(queries, totals, strict=True):
        check(new <= total, name, f"context_lens counts the new tokens too: {total} in all with {new} new")


def attend_pages(
    name: str,
    heads: Heads,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    queries: list[int],
    totals: list[int],
    out: Tensor,
) -> None:
    """Causal attention of each request's new tokens to all of its tokens."""
    shape = (len(query), heads.num_heads, heads.head_dim)
    q, target = query.view(shape).transpose(0, 1), out.view(shape).transpose(0, 1)
    target.fill_(float("nan"))
    first = 0
    for row, (new, total) in enumerate(zip(queries, totals, strict=True)):
        if new:
            k, v = (
                read_pages(name, cache, block_table[row], total, heads.num_kv_heads, heads_first=False)
                for cache in (key_cache, value_cache)
            )
            tokens = slice(first, first + new)
            mixed, _ = attend(q[:, tokens], k, v, heads.scale, hidden_by_position(new, total, total - new))
            target[:, tokens] = mixed.to(out.dtype)
        first += new


def masked_value(dtype: torch.dtype) -> float:
    """What hides a key: minus infinity in float16 (float32's lowest, cast), one in bfloat16."""
    return float("-inf") if dtype == torch.float16 else 1.0


def triangle_text(dtype: torch.dtype) -> str:
    return f"zero with {masked_value(dtype):g} strictly above the diagonal, as {dtype} wants"
