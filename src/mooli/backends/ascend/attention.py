"""Attention over the paged KV pool with the NPU's fused operations. Not tried on hardware.

Owns how each path of `paths.py` is called: layouts, masks, lengths. Never chooses the order of paths. Sources: the
documents of torch_npu's operations for CANN 8.2 to 8.5, ATB's for `_npu_flash_attention_qlens`, and what vllm-ascend
and SGLang ship.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from mooli.backends.ascend.kv_pool import AscendKVPool
from mooli.backends.ascend.paths import (
    FIA_BSH,
    FIA_DECODE,
    FIA_TND,
    GATHER,
    PAGE_SIZE,
    PAGED_ATTENTION,
    QLENS,
    Paths,
)
from mooli.backends.ascend.step import HAS_LENGTHS, AscendStep, Rows, int32
from mooli.backends.base import AttentionSpec
from mooli.backends.latent import LatentLayer
from mooli.backends.torch.attention import PagedAttention
from mooli.backends.torch.step_plan import ForwardBatch

CAUSAL_MASK = 2048
"""Edge of the mask that the fused attention wants for sparse_mode 3, whatever the lengths."""

RIGHT_DOWN_CAUSAL = 3
"""sparse_mode: the last query sees the last key, also where there are more keys than queries."""

Calls = list[tuple[str, Rows]]


class AscendAttention(PagedAttention):
    """Rows of a step in as few calls as their paths allow."""

    pool: AscendKVPool

    def __init__(self, pool: AscendKVPool, paths: Paths, device: torch.device) -> None:
        super().__init__(pool)
        self.paths = paths
        self._device = device
        self._masks: dict[str, Tensor] = {}
        self._workspaces: dict[tuple[int, ...], Tensor] = {}
        self._lse = torch.zeros(1, dtype=torch.float32, device=device)
        self._kernels: dict[str, Callable[[int, Rows, Tensor, AttentionSpec], Tensor]] = {
            QLENS: self._qlens,
            FIA_TND: self._fia_tnd,
            FIA_BSH: self._fia_bsh,
            FIA_DECODE: self._fia_decode,
            PAGED_ATTENTION: self._paged_attention,
        }

    def attend(
        self, batch: ForwardBatch, layer: int, q: Tensor, spec: AttentionSpec, sinks: Tensor | None = None
    ) -> Tensor:
        is_latent = isinstance(self.pool.layers[layer], LatentLayer)
        if is_latent or not isinstance(batch, AscendStep) or batch.rows is None:
            return super().attend(batch, layer, q, spec, sinks)
        q = q.contiguous()
        if batch.is_static:
            if self.paths.decode(spec) != FIA_DECODE or sinks is not None:
                raise RuntimeError(f"only {FIA_DECODE} can be captured, and rows like these go another way")
            batch.memo[HAS_LENGTHS] = True
            return self._static_decode(layer, batch.rows, q, spec)
        if sinks is not None:
            # Of the fused operations only that of CANN 8.3 and later (npu_fused_infer_attention_score_v2) takes them.
            return super().attend(batch, layer, q, spec, sinks)
        key = ("calls", spec)
        if key not in batch.memo:
            batch.memo[key] = self.calls(batch.rows, spec)
        calls: Calls = batch.memo[key]
        parts = [self._call(path, batch, layer, rows, q[rows.tokens], spec) for path, rows in calls]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def calls(self, rows: Rows, spec: AttentionSpec) -> Calls:
        """Rows beside each other that go the same way, in the order of the step."""

        def path_of(index: int) -> str:
            if rows.lengths[index] == 1:
                return self.paths.decode(spec)
            start = rows.kv_lengths[index] - rows.lengths[index]
            return self.paths.extend(spec, is_aligned=start % PAGE_SIZE == 0)

        made: Calls = []
        for path, indices in groupby(range(len(rows.lengths)), path_of):
            members = list(indices)
            if path in (FIA_BSH, GATHER):
                made += [(path, rows.part(index, index + 1)) for index in members]
            else:
                made.append((path, rows.part(members[0], members[-1] + 1)))
        return made

    def launch(self, path: str, layer: int, rows: Rows, q: Tensor, spec: AttentionSpec) -> Tensor:
        """One fused path: q (T, num_heads * head_dim) of `rows`, contiguous, and so is the result."""
        return self._kernels[path](layer, rows, q, spec)

    def _call(self, path: str, batch: AscendStep, layer: int, rows: Rows, q: Tensor, spec: AttentionSpec) -> Tensor:
        if path != GATHER:
            return self.launch(path, layer, rows, q, spec)
        index = next(i for i, row in enumerate(batch.chunks) if row.first_token == rows.first_token)
        return self.attend_chunk(batch, layer, index, q, spec)

    # -- rows of several tokens: q (T, num_heads * head_dim), and so is the result --

    def _qlens(self, layer: int, rows: Rows, q: Tensor, spec: AttentionSpec) -> Tensor:
        query = q.view(len(q), spec.num_heads, spec.head_dim)
        out = torch.empty_like(query)
        torch.ops.atb._npu_flash_attention_qlens(
            query=query,
            key_cache=self.pool.key_pages[layer],
            value_cache=self.pool.value_pages[layer],
            block_table=rows.block_table,
            mask=self._mask("qlens", q.dtype),
            # Lengths are read by the host: tensors of the CPU, and of 32 bits, which is not checked.
            seq_len=torch.from_numpy(int32(rows.lengths)),
            context_lens=torch.from_numpy(int32(rows.kv_lengths)),
            num_kv_heads=spec.num_kv_heads,
            num_heads=spec.num_heads,
            scale_value=spec.scale,
            out=out,
        )
        return out.view(len(q), -1)

    def _fia_tnd(self, layer: int, rows: Rows, q: Tensor, spec: AttentionSpec) -> Tensor:
        mixed, _ = torch.ops.npu.npu_fused_infer_attention_score(
            q.view(len(q), spec.num_heads, spec.head_dim),
            self.pool.key_rows[layer],
            self.pool.value_rows[layer],
            atten_mask=self._mask("fia", q.dtype),
            # Cumulative for queries; with pages, each row's own for keys.
            actual_seq_lengths=list(accumulate(rows.lengths)),
            actual_seq_lengths_kv=rows.kv_lengths,
            **self._fia(rows, spec, "TND"),
            sparse_mode=RIGHT_DOWN_CAUSAL,
        )
        result: Tensor = mixed
        return result.reshape(len(q), -1)

    def _fia_bsh(self, layer: int, rows: Rows, q: Tensor, spec: AttentionSpec) -> Tensor:
        mixed, _ = torch.ops.npu.npu_fused_infer_attention_score(
            q.view(1, len(q), -1),
            self.pool.key_rows[layer],
            self.pool.value_rows[layer],
            atten_mask=self._mask("fia", q.dtype),
            actual_seq_lengths=rows.lengths,
            actual_seq_lengths_kv=rows.kv_lengths,
            **self._fia(rows, spec, "BSH"),
            sparse_mode=RIGHT_DOWN_CAUSAL,
        )
        result: Tensor = mixed
        return result.view(len(q), -1)

    # -- rows of one token --

    def _fia_decode(self, layer: int, rows: Rows, q: Tensor, spec: AttentionSpec) -> Tensor:
        mixed, _ = torch.ops.npu.npu_fused_infer_attention_score(
            q.view(len(q), 1, -1),
            self.pool.key_rows[layer],
            self.pool.value_rows[layer],
            actual_seq_lengths_kv=rows.kv_lengths,
            **self._fia(rows, spec, "BSH"),
        )
        result: Tensor = mixed
        return result.view(len(q), -1)

    def _paged_attention(self, layer: int, rows: Rows, q: Tensor, spec: AttentionSpec) -> Tensor:
        query = q.view(len(q), spec.num_heads, spec.head_dim)
        out = torch.empty_like(query)
        torch.ops.atb._npu_paged_attention(
            query=query,
            key_cache=self.pool.key_pages[layer],
            value_cache=self.pool.value_pages[layer],
            num_kv_heads=spec.num_kv_heads,
            num_heads=spec.num_heads,
            scale_value=spec.scale,
            block_table=rows.block_table,
            context_lens=torch.from_numpy(int32(rows.kv_lengths)),
            out=out,
        )
        return out.view(len(q), -1)

    def _static_decode(self, layer: int, rows: Rows, q: Tensor, spec: AttentionSpec) -> Tensor:
        """The form that graphs know how to give new lengths to: `.out`, with a workspace that outlives the capture."""
        query = q.view(len(q), 1, -1)
        arguments = {
            **self._fia(rows, spec, "BSH"),
            "actual_seq_lengths_kv": rows.kv_lengths,
        }
        keys, values = self.pool.key_rows[layer], self.pool.value_rows[layer]
        name = (len(q), spec.num_heads, spec.num_kv_heads, spec.head_dim, rows.block_table.shape[1])
        if name not in self._workspaces:
            # Made in the runs that warm a capture up.
            ask = torch.ops.npu._npu_fused_infer_attention_score_get_max_workspace
            self._workspaces[name] = ask(query, keys, values, **arguments)
        out = torch.empty_like(query)
        torch.ops.npu.npu_fused_infer_attention_score.out(
            query, keys, values, **arguments, workspace=self._workspaces[name], out=[out, self._lse]
        )
        return out.view(len(q), -1)

    def _fia(self, rows: Rows, spec: AttentionSpec, layout: str) -> dict[str, Any]:
        # The scale's default is 1.
        return {
            "block_table": rows.block_table,
            "block_size": PAGE_SIZE,
            "num_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "scale": spec.scale,
            "input_layout": layout,
        }

    def _mask(self, kind: str, dtype: torch.dtype) -> Tensor:
        if kind not in self._masks:
            edge, value = (CAUSAL_MASK, 1) if kind == "fia" else (PAGE_SIZE, masked_value(dtype))
            kept = torch.bool if kind == "fia" else dtype
            upper = torch.triu(torch.ones(edge, edge, dtype=torch.bool), diagonal=1)
            mask = torch.zeros(edge, edge, dtype=kept).masked_fill_(upper, value)
            self._masks[kind] = mask.to(self._device)
        return self._masks[kind]


def masked_value(dtype: torch.dtype) -> float:
    """What stands in the 128 x 128 mask of `_npu_flash_attention_qlens` for "not seen": -inf for float16, and 1 for
    bfloat16, which the kernel multiplies itself."""
    return -torch.inf if dtype == torch.float16 else 1.0
