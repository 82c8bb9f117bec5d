"""npu_fused_infer_attention_score, first and second version, with their .out forms and workspaces.

Owns what is computed and where it goes; fused_call.py knows the contract. Rows of padding, and tokens beyond a row's
own, get NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mooli_simulate_ascend.errors import check
from mooli_simulate_ascend.fused_call import (
    FIRST,
    SECOND,
    Call,
    call_of,
    check_call,
    row_lengths_kv,
    row_lengths_q,
)
from mooli_simulate_ascend.paging import (
    attend,
    check_contiguous,
    hidden_by_position,
    is_upper_triangle,
    read_pages,
)
from mooli_simulate_ascend.profiles import FUSED, Profile
from mooli_simulate_ascend.tasks import Task, operation


@operation(FUSED)
def fused_attention(profile: Profile, **arguments: Any) -> Task:
    return new_outputs(profile, call_of(FIRST, arguments))


@operation(f"{FUSED}.out")
def fused_attention_out(profile: Profile, workspace: Tensor | None, out: list[Tensor], **arguments: Any) -> Task:
    return given_outputs(profile, call_of(FIRST, arguments), workspace, out)


@operation(f"_{FUSED}_get_max_workspace")
def fused_attention_workspace(profile: Profile, **arguments: Any) -> Task:
    return workspace_of(profile, call_of(FIRST, arguments))


@operation(f"{FUSED}_v2")
def fused_attention_v2(profile: Profile, **arguments: Any) -> Task:
    return new_outputs(profile, call_of(SECOND, arguments))


@operation(f"{FUSED}_v2.out")
def fused_attention_v2_out(profile: Profile, workspace: Tensor | None, out: list[Tensor], **arguments: Any) -> Task:
    return given_outputs(profile, call_of(SECOND, arguments), workspace, out)


@operation(f"_{FUSED}_v2_get_max_workspace")
def fused_attention_v2_workspace(profile: Profile, **arguments: Any) -> Task:
    return workspace_of(profile, call_of(SECOND, arguments))


def lse_shape(call: Call) -> tuple[int, ...]:
    if not call.with_lse:
        return (1,)
    if call.is_packed:
        return (call.query.shape[0], call.num_heads, 1)
    return (call.batch_size, call.num_heads, call.longest_query, 1)


def new_outputs(profile: Profile, call: Call) -> Task:
    check_call(profile, call)
    new = [(tuple(call.query.shape), call.query.dtype), (lse_shape(call), torch.float32)]
    return Task(run=lambda outputs: compute(call, outputs[0], outputs[1]), new=new)


def given_outputs(profile: Profile, call: Call, workspace: Tensor | None, out: list[Tensor]) -> Task:
    check_call(profile, call)
    check(len(out) == 2, call.name, f"out has {len(out)} tensors: [attention, logsumexp] are wanted")
    attention, lse = out
    check(attention.shape == call.query.shape, call.name, f"out[0] is {tuple(attention.shape)}, not the query's shape")
    check(attention.dtype == call.query.dtype, call.name, f"out[0] is {attention.dtype}, not {call.query.dtype}")
    check_contiguous(call.name, **{"out[0]": attention, "out[1]": lse})
    if call.with_lse:
        check(tuple(lse.shape) == lse_shape(call), call.name, f"out[1] is {tuple(lse.shape)}, not {lse_shape(call)}")
        check(lse.dtype == torch.float32, call.name, f"out[1] is {lse.dtype}, not float32")
    else:
        check(lse.numel() == 1, call.name, f"out[1] has {lse.numel()} elements, not 1, as no logsumexp is asked for")
    if workspace is not None:
        check(
            workspace.numel() * workspace.element_size() >= workspace_bytes(call),
            call.name,
            f"workspace of {workspace.numel()} elements is too small: ask get_max_workspace for this call",
        )
    return Task(run=lambda _: compute(call, attention, lse), result=(attention, lse), out_form=True)


def workspace_of(profile: Profile, call: Call) -> Task:
    check_call(profile, call)
    # What is in it is nobody's business, so it stays as it was allocated.
    return Task(run=lambda _: None, new=[((workspace_bytes(call),), torch.uint8)], returns_one=True)


def workspace_bytes(call: Call) -> int:
    return 16384 + 4 * call.query.numel()


def compute(call: Call, attention: Tensor, lse: Tensor) -> None:
    """Fill the outputs. What no query asked for becomes NaN."""
    if call.mask is not None and call.sparse_mode in (2, 3, 4):
        check(is_upper_triangle(call.mask), call.name, "the mask is not the strict upper triangle of ones")
    attention.fill_(float("nan"))
    lse.fill_(float("nan"))
    queries, keys = row_lengths_q(call), row_lengths_kv(call)
    for row, (length, num_keys) in enumerate(zip(queries, keys, strict=True)):
        if length == 0 or num_keys == 0:
            continue
        query, target = row_of_query(call, call.query, row, length), row_of_query(call, attention, row, length)
        k, v = row_of_keys(call, call.key, row, num_keys), row_of_keys(call, call.value, row, num_keys)
        mixed, logsumexp = attend(query, k, v, call.scale, hidden_keys(call, row, length, num_keys))
        target.copy_(mixed)
        if call.with_lse:
            if call.is_packed:
                first = start_of(call, row)
                lse[first : first + length, :, 0] = logsumexp.T
            else:
                lse[row, :, :length, 0] = logsumexp


def start_of(call: Call, row: int) -> int:
    return ([0, *(call.query_lengths or [])])[row]


def row_of_query(call: Call, tensor: Tensor, row: int, length: int) -> Tensor:
    """A row's queries, or their place in the output: a view (heads, length, head_dim)."""
    if call.is_packed:
        first = start_of(call, row)
        return tensor[first : first + length].transpose(0, 1)
    if call.layout == "BNSD":
        return tensor[row, :, :length]
    return tensor[row].view(-1, call.num_heads, call.head_dim)[:length].transpose(0, 1)


def row_of_keys(call: Call, tensor: Tensor, row: int, num_keys: int) -> Tensor:
    """A row's keys or values, float32 (kv heads, keys, head_dim)."""
    if call.block_table is not None:
        table = call.block_table[row]
        return read_pages(call.name, tensor, table, num_keys, call.num_kv_heads, heads_first=call.heads_first)
    if call.is_packed:
        first = ([0, *(call.kv_lengths or [])])[row]
        return tensor[first : first + num_keys].transpose(0, 1).float()
    if call.layout == "BNSD":
        return tensor[row, :, :num_keys].float()
    return tensor[row].view(-1, call.num_kv_heads, call.head_dim)[:num_keys].transpose(0, 1).float()


def hidden_keys(call: Call, row: int, length: int, num_keys: int) -> Tensor | None:
    if call.is_decode:
        return None
    if call.sparse_mode in (0, 1):
        if call.mask is None:
            return None
        mask = (
            call.mask[row if call.mask.shape[0] > 1 and call.mask.dim() > 2 else 0]
            if call.mask.dim() > 2
            else call.mask
        )
        mask = mask[0] if mask.dim() == 3 else mask
        check(
            mask.shape[0] >= length and mask.shape[1] >= num_keys,
            call.name,
            f"a mask of {tuple(mask.shape)} is too small",
        )
        return mask[:length, :num_keys].bool()
    if call.sparse_mode == 2:
        return hidden_by_position(length, num_keys, 0)
    first = num_keys - length
    if call.sparse_mode == 3:
        return hidden_by_position(length, num_keys, first)
    return hidden_by_position(length, num_keys, first, call.pre_tokens, call.next_tokens)
