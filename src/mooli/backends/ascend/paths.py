"""Which fused operation serves which rows of a step, by CANN's release, shape and what the self-test found.

Owns the order of preference and the limits that the vendor's documents state. Never launches anything.

    path             rows               what it needs
    qlens            length > 1         a cached prefix of whole pages of 128: the kernel divides and drops the rest
    fia_tnd          length > 1         CANN 8.3 or newer; before 8.5 heads of 128 in bfloat16
    fia_bsh          length > 1         nothing more; one call a row
    fia_decode       length 1           -; the one that graphs hold
    paged_attention  length 1           -
    gather           any                nothing: plain torch over gathered pages, one row at a time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mooli.backends.ascend.versions import Release
from mooli.backends.base import AttentionSpec

PAGE_SIZE = 128
"""The one page size that every attention path takes; with smaller ones some run and give wrong numbers."""

GATHER = "gather"
QLENS, FIA_TND, FIA_BSH = "qlens", "fia_tnd", "fia_bsh"
FIA_DECODE, PAGED_ATTENTION = "fia_decode", "paged_attention"

RMS_NORM, ROTARY, SWIGLU = "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"
STORE, W8A8, GRAPHS = "_npu_reshape_and_cache", "w8a8", "graphs"
GROUPED_PRODUCT = "npu_grouped_matmul"
PAGE_REUSE, TOKEN_REUSE = "page_reuse", "token_reuse"

HALF = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Switches:
    """What must not be used, and why. A name stands for a path or an operation; "qlens head_dim=64 float16" for a path
    with that head size and type alone."""

    off: Mapping[str, str] = field(default_factory=dict)

    def is_on(self, name: str, detail: str = "") -> bool:
        return name not in self.off and (not detail or f"{name} {detail}" not in self.off)


def shape_name(head_dim: int, dtype: str) -> str:
    """As `Switches.is_on` takes it."""
    return f"head_dim={head_dim} {dtype}"


def extend_order(release: Release) -> tuple[str, ...]:
    """Paths for rows of several tokens, best first."""
    return (QLENS, FIA_BSH) if release < (8, 3) else (FIA_TND, QLENS, FIA_BSH)


DECODE_ORDER = (FIA_DECODE, PAGED_ATTENTION)
"""Paths for rows of one token, best first."""


def fits(path: str, spec: AttentionSpec, dtype: str, release: Release, *, is_aligned: bool = True) -> bool:
    """Whether the documents allow this path for such heads. Windows and soft caps are left to plain torch."""
    if path == GATHER:
        return True
    if dtype not in HALF or spec.window > 0 or spec.softcap > 0 or spec.head_dim % 16:
        return False
    if spec.num_heads > 256 or spec.num_heads > 64 * spec.num_kv_heads or spec.num_kv_heads * spec.head_dim > 65535:
        return False
    if path == QLENS:
        return is_aligned and spec.head_dim <= 128
    if path == PAGED_ATTENTION:
        return spec.head_dim <= 256
    if path == FIA_TND:
        return spec.head_dim <= 128 if release >= (8, 5) else spec.head_dim == 128 and dtype == "bfloat16"
    return spec.head_dim <= 512


@dataclass(frozen=True, slots=True)
class Paths:
    """The choice, for one release and one type of the computation."""

    release: Release
    switches: Switches
    dtype: str

    def extend(self, spec: AttentionSpec, *, is_aligned: bool) -> str:
        """For rows of several tokens. is_aligned: whole pages come before them."""
        if not self.switches.is_on(PAGE_REUSE):
            return GATHER
        return self._first(extend_order(self.release), spec, is_aligned)

    def decode(self, spec: AttentionSpec) -> str:
        """For rows of one token."""
        return self._first(DECODE_ORDER, spec, True)

    def match_granularity_tokens(self) -> int:
        """Cached prefixes are used in multiples of this: 1 where the path for prompts takes any, else a page."""
        if self.dtype not in HALF:
            return 1
        is_off = any(name.startswith(FIA_TND) and name.endswith((FIA_TND, self.dtype)) for name in self.switches.off)
        takes_any = self.release >= ((8, 3) if self.dtype == "bfloat16" else (8, 5)) and not is_off
        return 1 if takes_any and self.switches.is_on(TOKEN_REUSE) else PAGE_SIZE

    def _first(self, order: tuple[str, ...], spec: AttentionSpec, is_aligned: bool) -> str:
        detail = shape_name(spec.head_dim, self.dtype)
        for path in order:
            if fits(path, spec, self.dtype, self.release, is_aligned=is_aligned) and self.switches.is_on(path, detail):
                return path
        return GATHER
