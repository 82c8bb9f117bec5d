"""Writing keys and values to their slots, and scattering rows.

A slot that two tokens are stored to holds NaN afterwards: which of them stays is not defined on the device. That is
harmless where nobody reads, as in a page for padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mooli_simulate_ascend.errors import NotSimulatedError, check
from mooli_simulate_ascend.formats import FRACTAL_NZ, format_of
from mooli_simulate_ascend.paging import check_contiguous
from mooli_simulate_ascend.profiles import Profile
from mooli_simulate_ascend.tasks import Task, operation, poison

CACHE_TYPES = (torch.float16, torch.bfloat16, torch.int8)
SCATTER_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int64, torch.bool)


@operation("_npu_reshape_and_cache")
def reshape_and_cache(
    profile: Profile, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> Task:
    """Tokens (T, kv heads, D) to slots page * 128 + offset; a negative slot is skipped."""
    name = "_npu_reshape_and_cache"
    check(slot_indices.dtype == torch.int32, name, f"slot should be int32, but is {slot_indices.dtype}")
    check_tokens(name, key, value, key_cache, value_cache, slot_indices)

    def run(_: Sequence[Tensor]) -> None:
        slots = slot_indices.long()
        num_slots = key_cache.shape[0] * key_cache.shape[1]
        check(
            not bool((slots >= num_slots).any()), name, f"slot {int(slots.max())} of {num_slots} (507015 on a device)"
        )
        kept = slots >= 0
        for tokens, cache in ((key, key_cache), (value, value_cache)):
            store(cache.view(num_slots, *cache.shape[2:]), slots[kept], tokens[kept])

    return Task(run=run, out_form=True)


def check_tokens(name: str, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    check(slots.dim() == 1, name, f"slots have {slots.dim()} dimensions, not 1")
    check(
        key.dim() == 3 and value.dim() == 3, name, f"key {tuple(key.shape)}, value {tuple(value.shape)}: (T, heads, D)"
    )
    check(len(slots) == len(key) == len(value), name, f"{len(slots)} slots for {len(key)} keys and {len(value)} values")
    check(len(slots) > 0, name, "no tokens")
    check_contiguous(name, key=key, value=value, key_cache=key_cache, value_cache=value_cache, slots=slots)
    for argument, tokens, cache in (("key", key, key_cache), ("value", value, value_cache)):
        check(cache.dtype in CACHE_TYPES, name, f"{argument}_cache is {cache.dtype}: float16, bfloat16 or int8")
        check(tokens.dtype == cache.dtype, name, f"{argument} is {tokens.dtype}, but its cache {cache.dtype}")
        check(
            cache.dim() == 4 and tuple(cache.shape[2:]) == tuple(tokens.shape[1:]),
            name,
            f"{argument}_cache is {tuple(cache.shape)}: (blocks, block, *{tuple(tokens.shape[1:])}) is wanted",
        )
    check(key_cache.shape[:2] == value_cache.shape[:2], name, "the caches have different pages")
    check(format_of(key_cache) == format_of(value_cache), name, "one cache is FRACTAL_NZ, the other is not")


def store(rows: Tensor, where: Tensor, values: Tensor) -> None:
    """Put `values` into `rows`; rows that are named twice become poison."""
    rows[where] = values
    found, counts = torch.unique(where, return_counts=True)
    twice = found[counts > 1]
    if len(twice):
        rows[twice] = poison(torch.empty_like(rows[twice]))


@operation("npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(
    profile: Profile,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    compress_lens: Tensor | None,
    compress_seq_offsets: Tensor | None,
    seq_lens: Tensor | None,
) -> Task:
    """Without the argument cache_mode, which these versions do not have, caches are taken for FRACTAL_NZ."""
    name = "npu_scatter_pa_kv_cache"
    check(
        format_of(key_cache) == FRACTAL_NZ and format_of(value_cache) == FRACTAL_NZ,
        name,
        "without cache_mode the caches are written as FRACTAL_NZ, and these are ND: use _npu_reshape_and_cache",
    )
    raise NotSimulatedError(f"{name}: writing to FRACTAL_NZ caches is not simulated")


@operation("npu_scatter_nd_update_")
def scatter_nd_update_in_place(profile: Profile, x: Tensor, indices: Tensor, updates: Tensor) -> Task:
    check_scatter("npu_scatter_nd_update_", x, indices, updates)

    def run(_: Sequence[Tensor]) -> None:
        scatter("npu_scatter_nd_update_", x, indices, updates)

    return Task(run=run, result=(x,), returns_one=True, out_form=True)


@operation("npu_scatter_nd_update")
def scatter_nd_update(profile: Profile, x: Tensor, indices: Tensor, updates: Tensor) -> Task:
    check_scatter("npu_scatter_nd_update", x, indices, updates)

    def run(new: Sequence[Tensor]) -> None:
        new[0].copy_(x)
        scatter("npu_scatter_nd_update", new[0], indices, updates)

    return Task(run=run, new=[(tuple(x.shape), x.dtype)], returns_one=True)


def check_scatter(name: str, x: Tensor, indices: Tensor, updates: Tensor) -> None:
    check(x.dtype in SCATTER_TYPES, name, f"input is {x.dtype}")
    check(updates.dtype == x.dtype, name, f"updates are {updates.dtype}, but input is {x.dtype}")
    check(indices.dtype in (torch.int32, torch.int64), name, f"indices are {indices.dtype}: int32 or int64")
    check(indices.dim() >= 2, name, f"indices have {indices.dim()} dimension: at least 2, the last of size 1 for rows")
    depth = indices.shape[-1]
    check(1 <= depth <= x.dim(), name, f"indices of {depth} coordinates into {x.dim()} dimensions")
    check(updates.dim() <= 3, name, f"updates of {updates.dim()} dimensions are rejected in tiling: flatten to rows")
    wanted = (*indices.shape[:-1], *x.shape[depth:])
    check(tuple(updates.shape) == wanted, name, f"updates are {tuple(updates.shape)}, not {wanted}")
    check_contiguous(name, input=x, indices=indices, updates=updates)


def scatter(name: str, x: Tensor, indices: Tensor, updates: Tensor) -> None:
    depth = indices.shape[-1]
    where = indices.reshape(-1, depth).long()
    sizes = torch.tensor(x.shape[:depth])
    check(
        not bool(((where < 0) | (where >= sizes)).any()), name, f"an index is out of range of {tuple(x.shape[:depth])}"
    )
    steps = torch.tensor([int(torch.tensor(x.shape[d + 1 : depth]).prod()) for d in range(depth)])
    rows = x.view(-1, *x.shape[depth:])
    store(rows, (where * steps).sum(dim=1), updates.reshape(-1, *x.shape[depth:]))
