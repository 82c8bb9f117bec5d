"""Norms, gates, rotations and sampling filters: what they take, and their definitions in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from mooli_simulate_ascend.errors import check, check_simulated
from mooli_simulate_ascend.paging import HALF_TYPES, check_contiguous
from mooli_simulate_ascend.profiles import Profile
from mooli_simulate_ascend.tasks import Task, operation

FLOAT_TYPES = (*HALF_TYPES, torch.float32)
MAX_TOP_K = 1024


# ---------------------------------------------------------------------- norms


def check_norm(name: str, x: Tensor, gamma: Tensor) -> None:
    check(x.dtype in FLOAT_TYPES, name, f"input is {x.dtype}")
    depth = gamma.dim()
    check(1 <= depth <= x.dim() and x.shape[x.dim() - depth :] == gamma.shape, name, f"gamma is {tuple(gamma.shape)}")
    check(x.numel() > 0, name, "empty tensors are not taken")


def normed(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm and its factor, float32."""
    wide = x.float()
    over = tuple(range(-gamma.dim(), 0))
    factor = torch.rsqrt(wide.square().mean(dim=over, keepdim=True) + epsilon)
    return wide * factor * gamma.float(), factor


def factor_shape(x: Tensor, gamma: Tensor) -> tuple[int, ...]:
    return (*x.shape[: x.dim() - gamma.dim()], *([1] * gamma.dim()))


@operation("npu_rms_norm")
def rms_norm(profile: Profile, x: Tensor, gamma: Tensor, epsilon: float) -> Task:
    name = "npu_rms_norm"
    check_norm(name, x, gamma)
    pair_fits = gamma.dtype == x.dtype or (x.dtype in HALF_TYPES and gamma.dtype == torch.float32)
    check(pair_fits, name, f"input is {x.dtype} and gamma {gamma.dtype}: the same, or half and float32")

    def run(new: Sequence[Tensor]) -> None:
        y, factor = normed(x, gamma, epsilon)
        new[0].copy_(y)
        new[1].copy_(factor)

    return Task(run=run, new=[(tuple(x.shape), x.dtype), (factor_shape(x, gamma), torch.float32)])


def check_sum(name: str, x1: Tensor, x2: Tensor, gamma: Tensor) -> None:
    check_norm(name, x1, gamma)
    check(x1.shape == x2.shape and x1.dtype == x2.dtype, name, "x1 and x2 differ in shape or type")
    check(gamma.dtype == x1.dtype, name, f"gamma is {gamma.dtype}, but x is {x1.dtype}")
    check_contiguous(name, x1=x1, x2=x2, gamma=gamma)


@operation("npu_add_rms_norm")
def add_rms_norm(profile: Profile, x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> Task:
    check_sum("npu_add_rms_norm", x1, x2, gamma)

    def run(new: Sequence[Tensor]) -> None:
        total = x1.float() + x2.float()
        y, factor = normed(total, gamma, epsilon)
        for target, values in zip(new, (y, factor, total), strict=True):
            target.copy_(values)

    like_x = (tuple(x1.shape), x1.dtype)
    return Task(run=run, new=[like_x, (factor_shape(x1, gamma), torch.float32), like_x])


# ---------------------------------------------------------------------- gates


@operation("npu_swiglu")
def swiglu(profile: Profile, x: Tensor, dim: int) -> Task:
    name = "npu_swiglu"
    check(x.dtype in FLOAT_TYPES, name, f"input is {x.dtype}")
    check(x.numel() > 0, name, "empty tensors are not taken")
    check(-x.dim() <= dim < x.dim(), name, f"dim {dim} of {x.dim()}")
    check(x.shape[dim] % 2 == 0, name, f"dimension {dim} has {x.shape[dim]} values: an even number is wanted")
    check_contiguous(name, input=x)
    shape = list(x.shape)
    shape[dim] //= 2

    def run(new: Sequence[Tensor]) -> None:
        first, second = x.float().chunk(2, dim=dim)
        new[0].copy_(F.silu(first) * second)

    return Task(run=run, new=[(tuple(shape), x.dtype)], returns_one=True)


# ---------------------------------------------------------------------- rotations


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, halves: bool) -> Tensor:
    """x * cos + rotated(x) * sin, float32; `halves` pairs a value with the one half a head away, else neighbours."""
    wide = x.float()
    if halves:
        first, second = wide.chunk(2, dim=-1)
        other = torch.cat([-second, first], dim=-1)
    else:
        other = torch.stack([-wide[..., 1::2], wide[..., ::2]], dim=-1).flatten(-2)
    return wide * cos.float() + other * sin.float()


@operation("npu_rotary_mul")
def rotary_mul(profile: Profile, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str) -> Task:
    name = "npu_rotary_mul"
    check(x.dtype in FLOAT_TYPES, name, f"input is {x.dtype}")
    check(x.dim() == r1.dim() == r2.dim() == 4, name, f"{x.dim()}, {r1.dim()}, {r2.dim()} dimensions: 4 each")
    check(r1.shape == r2.shape, name, f"r1 is {tuple(r1.shape)}, r2 {tuple(r2.shape)}")
    check(r1.dtype == x.dtype and r2.dtype == x.dtype, name, f"input is {x.dtype}, r1 {r1.dtype}, r2 {r2.dtype}")
    check(rotary_mode in ("half", "interleave"), name, f"rotary_mode {rotary_mode!r}")
    size = x.shape[-1]
    check(size % 2 == 0 and size < 896, name, f"head_dim {size}: even and below 896")
    check(r1.shape[-1] == size, name, f"r1 is {r1.shape[-1]} wide, not {size}: cos and sin for both halves of a head")
    heads_at = 2 if r1.shape[2] == 1 else 1
    check(r1.shape[heads_at] == 1, name, f"r1 is {tuple(r1.shape)}: one value for all heads")
    check(r1.shape[0] in (1, x.shape[0]), name, f"r1 has {r1.shape[0]} rows for {x.shape[0]}")
    length_at = 3 - heads_at
    check(
        r1.shape[length_at] == x.shape[length_at],
        name,
        f"r1 is for {r1.shape[length_at]} of {x.shape[length_at]} tokens",
    )
    check(
        x.shape[0] < 1000 and x.shape[heads_at] < 1000,
        name,
        f"{x.shape[0]} rows, {x.shape[heads_at]} heads: below 1000",
    )
    check_contiguous(name, input=x)

    def run(new: Sequence[Tensor]) -> None:
        new[0].copy_(turned(x, r1, r2, halves=rotary_mode == "half"))

    return Task(run=run, new=[(tuple(x.shape), x.dtype)], returns_one=True)


@operation("npu_apply_rotary_pos_emb")
def apply_rotary_pos_emb(
    profile: Profile, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str, rotary_mode: str = "half"
) -> Task:
    """In place, although the schema does not say so."""
    name = "npu_apply_rotary_pos_emb"
    check(
        layout in profile.rotary_layouts,
        name,
        f"layout {layout!r} (CANN {profile.cann} takes {profile.rotary_layouts})",
    )
    check(rotary_mode == "half", name, f"rotary_mode {rotary_mode!r}")
    check(query.dtype in FLOAT_TYPES, name, f"query is {query.dtype}")
    for argument, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        check(tensor.dim() == 4, name, f"{argument} has {tensor.dim()} dimensions, not 4")
        check(tensor.dtype == query.dtype, name, f"{argument} is {tensor.dtype}, but query is {query.dtype}")
        wanted = profile.rotary_head_dims
        check(
            tensor.shape[-1] in wanted,
            name,
            f"{argument}'s head_dim {tensor.shape[-1]} (CANN {profile.cann}: {wanted})",
        )
    check(key.shape[:2] == query.shape[:2], name, "query and key are for different tokens")
    one_head = (*query.shape[:2], 1, query.shape[3])
    check(tuple(cos.shape) == one_head == tuple(sin.shape), name, f"cos is {tuple(cos.shape)}, not {one_head}")
    check_contiguous(name, query=query, key=key, cos=cos, sin=sin)

    def run(_: Sequence[Tensor]) -> None:
        for tensor in (query, key):
            tensor.copy_(turned(tensor, cos, sin, halves=True))

    return Task(run=run, result=(query, key), out_form=True)


def check_cached_rotation(
    name: str, positions: Tensor, query: Tensor, key: Tensor, head_size: int, cache: Tensor
) -> None:
    check(query.dtype in FLOAT_TYPES, name, f"query is {query.dtype}")
    check(positions.dtype in (torch.int32, torch.int64), name, f"positions are {positions.dtype}")
    check(positions.dim() == 1, name, f"positions have {positions.dim()} dimensions, not 1")
    check(cache.dim() == 2 and cache.dtype == query.dtype, name, f"cos_sin_cache is {tuple(cache.shape)} {cache.dtype}")
    check(cache.shape[1] % 2 == 0 and cache.shape[1] <= head_size, name, f"cos_sin_cache is {cache.shape[1]} wide")
    for argument, tensor in (("query", query), ("key", key)):
        check(
            tensor.dim() == 2 and len(tensor) == len(positions),
            name,
            f"{argument} is {tuple(tensor.shape)}: (tokens, n * D)",
        )
        check(
            tensor.shape[1] % head_size == 0, name, f"{argument} is {tensor.shape[1]} wide: no multiple of {head_size}"
        )
        check(tensor.dtype == query.dtype, name, f"{argument} is {tensor.dtype}, but query is {query.dtype}")
    check_contiguous(name, positions=positions, query=query, key=key, cos_sin_cache=cache)


def turned_by_cache(name: str, positions: Tensor, x: Tensor, head_size: int, cache: Tensor, *, halves: bool) -> Tensor:
    where = positions.long()
    outside = bool(((where < 0) | (where >= len(cache))).any())
    check(not outside, name, f"a position is outside of the {len(cache)} rows of cos_sin_cache")
    cos, sin = cache[where][:, None].float().chunk(2, dim=-1)
    if halves:
        cos, sin = (torch.cat([part, part], dim=-1) for part in (cos, sin))
    else:
        cos, sin = (part.repeat_interleave(2, dim=-1) for part in (cos, sin))
    heads = x.view(len(x), -1, head_size)
    turning = turned(heads[..., : cache.shape[1]], cos, sin, halves=halves)
    return torch.cat([turning, heads[..., cache.shape[1] :].float()], dim=-1).flatten(1)


@operation("_npu_rotary_embedding")
def rotary_embedding(
    profile: Profile,
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox_style: bool,
) -> Task:
    name = "_npu_rotary_embedding"
    check_cached_rotation(name, positions, query, key, head_size, cos_sin_cache)

    def run(_: Sequence[Tensor]) -> None:
        for tensor in (query, key):
            tensor.copy_(turned_by_cache(name, positions, tensor, head_size, cos_sin_cache, halves=is_neox_style))

    return Task(run=run, out_form=True)


@operation("npu_mrope")
def mrope(
    profile: Profile,
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    mrope_section: list[int] | None,
    rotary_mode: str,
) -> Task:
    name = "npu_mrope"
    check_simulated(mrope_section is None or list(mrope_section) == [0, 0, 0], name, f"mrope_section {mrope_section}")
    check(rotary_mode in ("half", "interleave"), name, f"rotary_mode {rotary_mode!r}")
    check_cached_rotation(name, positions, query, key, head_size, cos_sin_cache)

    def run(new: Sequence[Tensor]) -> None:
        for target, tensor in zip(new, (query, key), strict=True):
            halves = rotary_mode == "half"
            target.copy_(turned_by_cache(name, positions, tensor, head_size, cos_sin_cache, halves=halves))

    return Task(run=run, new=[(tuple(query.shape), query.dtype), (tuple(key.shape), key.dtype)])


# ---------------------------------------------------------------------- sampling


@operation("npu_top_k_top_p")
def top_k_top_p(profile: Profile, logits: Tensor, p: Tensor | None, k: Tensor | None) -> Task:
    """Logits with what is dropped set to minus infinity. The order is (logits, p, k)."""
    name = "npu_top_k_top_p"
    check(logits.dim() == 2, name, f"logits have {logits.dim()} dimensions, not 2")
    check(logits.dtype in FLOAT_TYPES, name, f"logits are {logits.dtype}")
    if p is not None:
        check(p.dtype == logits.dtype, name, f"p is {p.dtype}, but logits are {logits.dtype}")
        check(tuple(p.shape) == (len(logits),), name, f"p is {tuple(p.shape)} for {len(logits)} rows")
    if k is not None:
        check(k.dtype == torch.int32, name, f"k is {k.dtype}, not int32")
        check(tuple(k.shape) == (len(logits),), name, f"k is {tuple(k.shape)} for {len(logits)} rows")
    check_contiguous(name, logits=logits, p=p, k=k)
    vocabulary = logits.shape[1]

    def run(new: Sequence[Tensor]) -> None:
        if k is not None:
            most = min(MAX_TOP_K, vocabulary)
            check(not bool(((k < 1) | (k > most)).any()), name, f"k is outside of 1 .. {most}: {k.tolist()[:8]}")
        if p is not None:
            check(not bool(((p < 0) | (p > 1)).any()), name, f"p is outside of 0 .. 1: {p.tolist()[:8]}")
        values, order = logits.float().sort(dim=-1, stable=True)
        if k is not None:
            kth = values.gather(1, vocabulary - k.long()[:, None])
            values = values.masked_fill(values < kth, float("-inf"))
        if p is not None:
            dropped = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - p.float()[:, None]
            dropped[:, -1] = False
            values = values.masked_fill(dropped, float("-inf"))
        new[0].copy_(torch.empty_like(values).scatter_(1, order, values))

    return Task(run=run, new=[(tuple(logits.shape), logits.dtype)], returns_one=True)
