"""Exact attention over paged keys and values: gather the slots a row sees, then scaled_dot_product_attention.

Owns which slots and which mask, computed once a step and kept in the step's memo for all layers. Never reads a slot
that the row's own sequence has not stored: rows shorter than their group repeat their last slot behind a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from mooli.backends.base import AttentionSpec
from mooli.backends.torch.kv_pool import KVPool
from mooli.backends.torch.step_plan import ChunkRow, DecodeGroup, ForwardBatch


class PagedAttention:
    """Attention over one pool. A device with better kernels for a part overrides that part."""

    scores_at_a_time = 1 << 25
    """Scores that may exist at one time where torch has no fused kernel and computes them all: 128 MiB in float32."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool

    def attend(
        self, batch: ForwardBatch, layer: int, q: Tensor, spec: AttentionSpec, sinks: Tensor | None = None
    ) -> Tensor:
        """Attention of every row to its sequence: q (T, num_heads * head_dim) to (T, num_heads * length of a value)."""
        if len(batch.decode) == 1 and batch.decode[0].tokens is None:
            return self.attend_group(batch, layer, 0, q, spec, sinks)
        out = q.new_empty(len(q), spec.num_heads * self.pool.value_dims[layer])
        for index, group in enumerate(batch.decode):
            if group.tokens is not None:
                mixed = self.attend_group(batch, layer, index, q.index_select(0, group.tokens), spec, sinks)
                out.index_copy_(0, group.tokens, mixed)
        for index, row in enumerate(batch.chunks):
            tokens = slice(row.first_token, row.first_token + row.length)
            out[tokens] = self.attend_chunk(batch, layer, index, q[tokens], spec, sinks)
        return out

    def attend_group(
        self,
        batch: ForwardBatch,
        layer: int,
        index: int,
        q: Tensor,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Rows of length 1 together: q (G, num_heads * head_dim)."""
        key = ("group", index, spec.window)
        if key not in batch.memo:
            batch.memo[key] = group_keys(batch.decode[index], self.pool.page_size, spec.window)
        slots, visible = batch.memo[key]
        k, v = self.pool.gather(layer, slots)
        # The query heads that share a kv head stand in the place of query positions: nothing is repeated.
        grouped = q.reshape(len(q), spec.num_kv_heads, -1, spec.head_dim)
        k, v = (x.transpose(1, 2).to(q.dtype) for x in (k, v))
        if sinks is None and not spec.softcap:
            mixed = self.kernel(grouped, k, v, visible, is_causal=False, scale=spec.scale)
        else:
            each = None if sinks is None else sinks.view(spec.num_kv_heads, -1, 1)
            mixed = attend_laid_out(grouped, k, v, visible, each, spec)
        return mixed.reshape(len(q), -1)

    def attend_chunk(
        self,
        batch: ForwardBatch,
        layer: int,
        index: int,
        q: Tensor,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """One row of several tokens: q (L, num_heads * head_dim)."""
        k, v = self.gather_chunk(batch, layer, index, spec.window)
        # Kv heads are the batch, and each one's keys are seen by its query heads without being repeated.
        k, v = (x.to(q.dtype).transpose(0, 1).unsqueeze(1) for x in (k, v))
        return self.attend_gathered(batch, batch.chunks[index], q, k, v, spec, sinks)

    def gather_chunk(self, batch: ForwardBatch, layer: int, index: int, window: int) -> tuple[Tensor, Tensor]:
        """Keys and values that a row of several tokens sees: (N, kv heads, head_dim) both."""
        key = ("chunk", index, window)
        if key not in batch.memo:
            row = batch.chunks[index]
            batch.memo[key] = chunk_slots(row, first_key_of(row.start, window), self.pool.page_size)
        return self.pool.gather(layer, batch.memo[key])

    def attend_gathered(
        self,
        batch: ForwardBatch,
        row: ChunkRow,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """A row's queries (L, num_heads * head_dim) and the keys and values that it sees, (kv heads, 1, N, head_dim)
        both. Queries go in blocks, so that scores stay bounded."""
        first_gathered = first_key_of(row.start, spec.window)
        queries = q.view(row.length, spec.num_kv_heads, -1, spec.head_dim).permute(1, 2, 0, 3)
        is_fused = sinks is None and not spec.softcap
        at_a_time = self.scores_at_a_time if is_fused else PagedAttention.scores_at_a_time
        step = max(1, at_a_time // (spec.num_heads * k.shape[2]))
        blocks = []
        for begin in range(0, row.length, step):
            block = queries[:, :, begin : begin + step]
            first_query = row.start + begin
            first_key, end = first_key_of(first_query, spec.window), first_query + block.shape[2]
            seen = slice(first_key - first_gathered, end - first_gathered)
            is_triangle = first_key == first_query and (spec.window <= 0 or block.shape[2] <= spec.window)
            is_masked = not is_triangle or not is_fused
            visible = self._chunk_mask(batch, row, first_query, end, spec.window) if is_masked else None
            keys, values = (x[:, :, seen].expand(-1, block.shape[1], -1, -1) for x in (k, v))
            if is_fused:
                blocks.append(self.kernel(block, keys, values, visible, is_causal=is_triangle, scale=spec.scale))
            else:
                each = None if sinks is None else sinks.view(spec.num_kv_heads, -1, 1, 1)
                blocks.append(attend_laid_out(block, keys, values, visible, each, spec))
        mixed = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
        return mixed.permute(2, 0, 1, 3).reshape(row.length, -1)

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, *, is_causal: bool, scale: float
    ) -> Tensor:
        """Attention of q (B, H, L, D) to k and v (B, H, N, D). `visible`: bool, broadcast to (B, H, L, N), or None."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal, scale=scale)

    def _chunk_mask(self, batch: ForwardBatch, row: ChunkRow, first_query: int, end: int, window: int) -> Tensor:
        """The mask of a block of queries, kept for other layers if the row has no other block."""
        if end - first_query < row.length:
            return causal_mask(first_query, end, window, row.pages.device)
        key = ("mask", first_query, end, window)
        if key not in batch.memo:
            batch.memo[key] = causal_mask(first_query, end, window, row.pages.device)
        kept: Tensor = batch.memo[key]
        return kept


def attend_laid_out(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, sinks: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """`PagedAttention.kernel` where scores have a cap, or each row of them one more, of `sinks`, broadcast to
    (B, H, L, 1).

    In float32, all scores laid out: torch has no fused kernel for either.
    """
    scores = q.float() @ k.float().transpose(-1, -2) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        logits = sinks.float().expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, logits], dim=-1), dim=-1)[..., :-1]
    return (weights @ v.float()).to(q.dtype)


def group_keys(group: DecodeGroup, page_size: int, window: int) -> tuple[Tensor, Tensor | None]:
    """Slots int64 (G, N) of the keys of each row, and which are to be seen: bool (G, 1, 1, N), or None for all."""
    num_keys = min(group.num_keys, window) if window > 0 else group.num_keys
    last = group.positions[:, None]
    where = torch.arange(num_keys, device=last.device)[None, :]
    if window > 0:
        where = where + (last - (window - 1)).clamp(min=0)
    within = torch.minimum(where, last)
    slots = group.page_table.gather(1, within // page_size) * page_size + within % page_size
    return slots, None if group.is_even else (where <= last)[:, None, None, :]


def chunk_slots(row: ChunkRow, first_key: int, page_size: int) -> Tensor:
    """Slots int64 (N,) of positions `first_key` and on, up to the row's last."""
    where = torch.arange(first_key, row.start + row.length, device=row.pages.device)
    return row.pages[where // page_size] * page_size + where % page_size


def first_key_of(position: int, window: int) -> int:
    """The first position that a token at `position` sees."""
    return max(0, position - window + 1) if window > 0 else 0


def causal_mask(first_query: int, end: int, window: int, device: torch.device) -> Tensor:
    """Which keys the queries `first_query` .. `end` see: bool (queries, keys), from the first key any of them sees."""
    queries = torch.arange(first_query, end, device=device)[:, None]
    keys = torch.arange(first_key_of(first_query, window), end, device=device)[None, :]
    visible = keys <= queries
    return visible & (keys > queries - window) if window > 0 else visible
