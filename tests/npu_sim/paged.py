"""Requests with keys and values in pages, and their attention in plain float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 128


@dataclass
class Requests:
    """Requests of `totals` tokens, of which the last `new` are queries. Tensors of the host."""

    new: list[int]
    totals: list[int]
    queries: Tensor  # (new tokens, heads, D)
    keys: list[Tensor]  # (total, kv heads, D) each
    values: list[Tensor]
    key_cache: Tensor  # (pages, 128, kv heads, D)
    value_cache: Tensor
    table: Tensor

    def attention(self, *, window: int | None = None) -> Tensor:
        """Causal attention in float32, (new tokens, heads, D)."""
        mixed, first = [], 0
        for new, total, k, v in zip(self.new, self.totals, self.keys, self.values, strict=True):
            q = self.queries[first : first + new].float()
            first += new
            group = q.shape[1] // k.shape[1]
            k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale_of(q)
            at = torch.arange(total - new, total)[:, None]
            seen = torch.arange(total)[None, :]
            hidden = seen > at
            if window is not None:
                hidden |= seen <= at - window
            mixed.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v))
        return torch.cat(mixed)


def scale_of(queries: Tensor) -> float:
    return float(queries.shape[-1]) ** -0.5


def make_requests(
    new: list[int],
    totals: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
) -> Requests:
    """Pages in a shuffled order; slots beyond a request's tokens, and a page of nobody, are NaN."""
    counts = [-(-total // PAGE) for total in totals]
    order = (torch.randperm(sum(counts)) + 1).tolist()
    caches = [torch.full((sum(counts) + 2, PAGE, kv_heads, size), float("nan"), dtype=dtype) for _ in range(2)]
    table = torch.zeros(len(totals), max(counts) + 1, dtype=torch.int32)
    keys, values = [], []
    for row, (total, count) in enumerate(zip(totals, counts, strict=True)):
        pages = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(pages)
        for cache, stored in zip(caches, (keys, values), strict=True):
            tokens = torch.randn(total, kv_heads, size).to(dtype)
            stored.append(tokens)
            for index, page in enumerate(pages):
                part = tokens[index * PAGE : (index + 1) * PAGE]
                cache[page, : len(part)] = part
    queries = torch.randn(sum(new), heads, size).to(dtype)
    return Requests(new, totals, queries, keys, values, *caches, table)


def triangle(size: int, dtype: torch.dtype = torch.bool, masked: float = 1) -> Tensor:
    """The strict upper triangle."""
    above = torch.ones(size, size, dtype=torch.bool).triu_(1)
    return torch.zeros(size, size).masked_fill_(above, masked).to(dtype)


def close(found: Tensor, wanted: Tensor, tolerance: float = 0.02) -> bool:
    """Whether tensors agree, up to the rounding of results to bfloat16."""
    return torch.allclose(found.cpu().float().reshape(wanted.shape), wanted.float(), atol=tolerance, rtol=tolerance)
