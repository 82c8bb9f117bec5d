"""What a call of the fused attention says: its arguments under the names of the first version, and all checks of them.

Owns what layouts mean for lengths and shapes. Computes nothing. Quantised and multi-latent forms, shared prefixes and
padding on the left are refused as not simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mooli_simulate_ascend.errors import check, check_simulated
from mooli_simulate_ascend.paging import (
    check_block_table,
    check_cache_numel,
    check_contiguous,
    check_heads,
    check_lengths,
    check_page_size,
    check_scale,
    check_table_width,
    check_types,
)
from mooli_simulate_ascend.profiles import FUSED, Profile

LAYOUTS = ("BSH", "BSND", "BNSD", "TND")
UNLIMITED = 2**31 - 1
MASK_SIZE = 2048
MAX_DECODE_LENGTH = 262144
MAX_ROW_WIDTH = 65535


@dataclass
class Call:
    """One call, by the first version's names."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    query_lengths: list[int] | None
    kv_lengths: list[int] | None
    block_table: Tensor | None
    num_heads: int
    num_kv_heads: int
    scale: float
    layout: str
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    block_size: int
    inner_precise: int
    with_lse: bool

    @property
    def is_packed(self) -> bool:
        return self.layout == "TND"

    @property
    def batch_size(self) -> int:
        return len(self.query_lengths or ()) if self.is_packed else self.query.shape[0]

    @property
    def longest_query(self) -> int:
        """Query positions of each row, padding included; of the longest in layout TND."""
        if self.is_packed:
            return max(spans(self.query_lengths or []), default=0)
        return self.query.shape[2] if self.layout == "BNSD" else self.query.shape[1]

    @property
    def is_decode(self) -> bool:
        """Whether the decode kernel serves the call: one query position, not packed."""
        return not self.is_packed and self.longest_query == 1

    @property
    def head_dim(self) -> int:
        return self.query.shape[-1] // (self.num_heads if self.layout == "BSH" else 1)

    @property
    def heads_first(self) -> bool:
        """Whether pages hold head after head."""
        return self.block_table is not None and self.key.dim() == 4


def spans(cumulative: Sequence[int]) -> list[int]:
    """Lengths from their running sums."""
    return [end - start for start, end in zip([0, *cumulative], cumulative, strict=False)]


@dataclass(frozen=True, slots=True)
class Version:
    """Where a version of the operation differs: its name, those of some arguments, and what is not simulated of it."""

    name: str
    query_lengths: str
    kv_lengths: str
    num_heads: str
    scale: str
    with_lse: str
    not_simulated: tuple[str, ...]


FIRST = Version(
    name=FUSED,
    query_lengths="actual_seq_lengths",
    kv_lengths="actual_seq_lengths_kv",
    num_heads="num_heads",
    scale="scale",
    with_lse="softmax_lse_flag",
    not_simulated=(
        *("pse_shift", "dequant_scale1", "quant_scale1", "dequant_scale2", "quant_scale2", "quant_offset2"),
        *("antiquant_scale", "antiquant_offset", "key_antiquant_scale", "key_antiquant_offset"),
        *("value_antiquant_scale", "value_antiquant_offset", "query_padding_size", "kv_padding_size"),
        *("key_shared_prefix", "value_shared_prefix", "actual_shared_prefix_len", "query_rope", "key_rope"),
        *("key_rope_antiquant_scale", "antiquant_mode", "key_antiquant_mode", "value_antiquant_mode"),
    ),
)
SECOND = Version(
    name=f"{FUSED}_v2",
    query_lengths="actual_seq_qlen",
    kv_lengths="actual_seq_kvlen",
    num_heads="num_query_heads",
    scale="softmax_scale",
    with_lse="return_softmax_lse",
    not_simulated=(
        *("query_rope", "key_rope", "pse_shift", "dequant_scale_query", "dequant_scale_key", "dequant_offset_key"),
        *("dequant_scale_value", "dequant_offset_value", "dequant_scale_key_rope", "quant_scale_out"),
        *("quant_offset_out", "learnable_sink", "query_quant_mode", "key_quant_mode", "value_quant_mode"),
        *("query_dtype", "key_dtype", "value_dtype", "query_rope_dtype", "key_rope_dtype"),
        *("key_shared_prefix_dtype", "value_shared_prefix_dtype", "dequant_scale_query_dtype"),
        *("dequant_scale_key_dtype", "dequant_scale_value_dtype", "dequant_scale_key_rope_dtype"),
    ),
)


def call_of(version: Version, given: dict[str, Any]) -> Call:
    """The call that these arguments make. Raises SimulationError for those that are not simulated."""
    for argument in version.not_simulated:
        check_simulated(is_absent(given[argument]), version.name, argument)
    num_heads = given[version.num_heads]
    return Call(
        name=version.name,
        query=given["query"],
        key=given["key"],
        value=given["value"],
        mask=given["atten_mask"],
        query_lengths=as_lengths(given[version.query_lengths]),
        kv_lengths=as_lengths(given[version.kv_lengths]),
        block_table=given["block_table"],
        num_heads=num_heads,
        num_kv_heads=given["num_key_value_heads"] or num_heads,
        scale=given[version.scale],
        layout=given["input_layout"],
        sparse_mode=given["sparse_mode"],
        pre_tokens=given["pre_tokens"],
        next_tokens=given["next_tokens"],
        block_size=given["block_size"],
        inner_precise=given["inner_precise"],
        with_lse=given[version.with_lse],
    )


def is_absent(given: Any) -> bool:
    return not isinstance(given, Tensor) and not given


def as_lengths(given: Sequence[int] | None) -> list[int] | None:
    """A copy, frozen from here on."""
    return None if given is None else [int(length) for length in given]


def check_call(profile: Profile, call: Call) -> None:
    """Everything that can be said without reading a value. Raises SimulationError."""
    name = call.name
    check_simulated(call.layout in LAYOUTS, name, f"layout {call.layout!r}")
    check_simulated(call.key.dtype != torch.int8, name, "an int8 cache")
    dims = {"BSH": 3, "BSND": 4, "BNSD": 4, "TND": 3}[call.layout]
    check(
        call.query.dim() == dims, name, f"query has {call.query.dim()} dimensions in layout {call.layout}, not {dims}"
    )
    check_types(name, call.query, key=call.key, value=call.value)
    check_scale(name, call.scale)
    if call.layout == "BSH":
        check(call.query.shape[-1] % call.num_heads == 0, name, "the query's width is no multiple of num_heads")
    else:
        heads = call.query.shape[1 if call.layout in ("BNSD", "TND") else 2]
        check(
            heads == call.num_heads,
            name,
            f"query has {heads} heads in layout {call.layout}, num_heads is {call.num_heads}",
        )
    check_heads(name, call.num_heads, call.num_kv_heads, call.head_dim)
    check(
        call.key.shape == call.value.shape,
        name,
        f"key {tuple(call.key.shape)} and value {tuple(call.value.shape)} differ",
    )
    if call.block_table is not None:
        check_cache_numel(name, call.key)
    check_contiguous(name, query=call.query, key=call.key, value=call.value, atten_mask=call.mask)
    check(
        call.inner_precise in ((0, 1) if call.is_decode else (0, 1, 2, 3)), name, f"inner_precise {call.inner_precise}"
    )
    if call.is_packed:
        check_packed(profile, call)
    check(0 < call.batch_size <= 65536, name, f"{call.batch_size} requests")
    if call.block_table is None:
        check_dense(call)
    else:
        check_paged(call)
    check_row_lengths(call)
    check_mask(call)


def check_packed(profile: Profile, call: Call) -> None:
    name = call.name
    check(bool(call.query_lengths), name, "layout TND needs the cumulative lengths of the queries")
    lengths = call.query_lengths or []
    check_lengths(name, "actual_seq_lengths", spans(lengths))
    check(
        call.query.shape[0] == lengths[-1],
        name,
        f"queryT({call.query.shape[0]}) must be equal to the last element of actualSequenceLengthQ({lengths[-1]})",
    )
    if call.block_table is not None:
        check(profile.tnd_paged, name, f"When layout is TND, not support Page Attention (CANN {profile.cann})")
    sizes = profile.tnd_head_dims
    check(
        sizes is None or call.head_dim in sizes,
        name,
        f"queryD({call.head_dim}) or keyD({call.head_dim}) must be "
        f"{' or '.join(map(str, sizes or ()))} (CANN {profile.cann})",
    )
    if profile.tnd_bfloat16_only:
        check(call.query.dtype == torch.bfloat16, name, f"layout TND takes bfloat16 only (CANN {profile.cann})")
    if profile.tnd_equal_heads:
        check(
            call.num_heads == call.num_kv_heads,
            name,
            f"layout TND needs as many kv as query heads (CANN {profile.cann})",
        )
    check(
        call.sparse_mode != 0 or call.mask is not None,
        name,
        "layout TND with sparse_mode 0 and no mask gives a uniform average: pass sparse_mode 3 and its mask",
    )


def check_paged(call: Call) -> None:
    name, table = call.name, call.block_table
    assert table is not None
    check(call.kv_lengths is not None, name, "actual_seq_lengths_kv is mandatory with a block_table")
    check_block_table(name, table, call.batch_size)
    if call.key.dim() == 3:
        width = call.num_kv_heads * call.head_dim
        page_size = call.key.shape[1]
        check(call.key.shape[2] == width, name, f"a cache row has {call.key.shape[2]} values, not {width}")
        check(width <= MAX_ROW_WIDTH, name, f"a cache row of {width} values is over {MAX_ROW_WIDTH}")
    else:
        check(
            call.key.dim() == 4 and call.layout in ("BNSD", "TND"),
            name,
            f"a cache of shape {tuple(call.key.shape)} in layout {call.layout}: "
            "(blocks, block_size, kv heads * D) is wanted",
        )
        page_size = call.key.shape[2]
        check(
            call.key.shape[1] == call.num_kv_heads and call.key.shape[3] == call.head_dim,
            name,
            f"a cache of shape {tuple(call.key.shape)}: (blocks, kv heads, block_size, D) is wanted",
        )
    check(call.block_size == page_size, name, f"block_size {call.block_size}, but pages of the cache have {page_size}")
    check_page_size(name, page_size)
    lengths = row_lengths_kv(call)
    if call.is_decode:
        check(max(lengths, default=0) <= MAX_DECODE_LENGTH, name, f"a kv length over {MAX_DECODE_LENGTH}")
    check_table_width(name, table, page_size, lengths)


def check_dense(call: Call) -> None:
    name = call.name
    check(call.key.dim() == call.query.dim(), name, f"key has {call.key.dim()} dimensions, query {call.query.dim()}")
    heads_at = {"BSND": 2, "BNSD": 1, "TND": 1}
    if call.layout == "BSH":
        check(
            call.key.shape[2] == call.num_kv_heads * call.head_dim,
            name,
            f"key rows have {call.key.shape[2]} values, not {call.num_kv_heads * call.head_dim}",
        )
    else:
        heads = call.key.shape[heads_at[call.layout]]
        check(heads == call.num_kv_heads, name, f"key has {heads} heads, num_key_value_heads is {call.num_kv_heads}")
        check(call.key.shape[-1] == call.head_dim, name, f"key's head_dim {call.key.shape[-1]} is not {call.head_dim}")
    if call.is_packed:
        check(bool(call.kv_lengths), name, "layout TND needs the cumulative lengths of the keys")
        total = (call.kv_lengths or [0])[-1]
        check(
            total == call.key.shape[0], name, f"keyT({call.key.shape[0]}) is not the last length of the keys ({total})"
        )
    else:
        check(call.key.shape[0] == call.batch_size, name, f"key has {call.key.shape[0]} rows, query {call.batch_size}")


def check_row_lengths(call: Call) -> None:
    name = call.name
    for argument, lengths in (("actual_seq_lengths", call.query_lengths), ("actual_seq_lengths_kv", call.kv_lengths)):
        if lengths is None or (call.is_decode and argument == "actual_seq_lengths"):
            continue
        enough = (
            len(lengths) == call.batch_size if call.is_packed else len(lengths) in (1, *range(call.batch_size, 65537))
        )
        check(
            enough,
            name,
            f"{argument}: key/value's actual sequence lengths shape size is {len(lengths)}, "
            f"it should be bigger or equal to batch size({call.batch_size})",
        )
    keys = row_lengths_kv(call)
    check_lengths(name, "actual_seq_lengths_kv", keys)
    if call.block_table is None and not call.is_packed:
        num_keys = call.key.shape[2] if call.layout == "BNSD" else call.key.shape[1]
        check(max(keys) <= num_keys, name, f"a kv length of {max(keys)}, but there are {num_keys} keys")
    if not call.is_decode:
        queries = row_lengths_q(call)
        check_lengths(name, "actual_seq_lengths", queries)
        check(max(queries) <= call.longest_query, name, f"a query length of {max(queries)}, over {call.longest_query}")
        if call.sparse_mode in (2, 3, 4):
            fits = all(q <= kv for q, kv in zip(queries, keys, strict=True))
            check(fits, name, f"more queries than keys: {queries} and {keys} (the new tokens' keys count)")


def check_mask(call: Call) -> None:
    name, mask = call.name, call.mask
    if call.is_decode:
        # Ignored with one query; a mask of its own was seen to be ignored past 512 keys.
        check(mask is None, name, "a mask is not reliable with one query position: pass none")
        return
    check(call.sparse_mode in range(5), name, f"sparse_mode {call.sparse_mode}")
    whole = call.pre_tokens >= UNLIMITED and call.next_tokens >= UNLIMITED
    if call.sparse_mode == 0:
        check_simulated(whole, name, "sparse_mode 0 with pre_tokens or next_tokens")
    if call.sparse_mode == 1:
        check(mask is not None, name, "sparse_mode 1 needs the whole mask")
    if call.sparse_mode in (2, 3, 4):
        check(mask is not None, name, f"sparse_mode {call.sparse_mode} needs the mask of 2048 x 2048")
    if mask is None:
        return
    check(mask.dtype in (torch.bool, torch.int8, torch.uint8), name, f"the mask is {mask.dtype}: bool, int8 or uint8")
    if call.sparse_mode in (2, 3, 4):
        wanted = [(MASK_SIZE, MASK_SIZE), (1, MASK_SIZE, MASK_SIZE), (1, 1, MASK_SIZE, MASK_SIZE)]
        check(tuple(mask.shape) in wanted, name, f"the mask is {tuple(mask.shape)}: exactly 2048 x 2048 is wanted")
    else:
        check_simulated(not call.is_packed, name, "a whole mask in layout TND")
        check(mask.dim() in (2, 3, 4), name, f"the mask has {mask.dim()} dimensions")


def row_lengths_q(call: Call) -> list[int]:
    if call.is_packed:
        return spans(call.query_lengths or [])
    return broadcast(call.query_lengths, call.longest_query, call.batch_size)


def row_lengths_kv(call: Call) -> list[int]:
    if call.is_packed:
        # Packed keys come with running sums, pages with each request's own length.
        return spans(call.kv_lengths or []) if call.block_table is None else list(call.kv_lengths or [])
    num_keys = call.key.shape[2] if call.layout == "BNSD" else call.key.shape[1]
    return broadcast(call.kv_lengths, num_keys, call.batch_size)


def broadcast(lengths: list[int] | None, default: int, count: int) -> list[int]:
    if lengths is None:
        return [default] * count
    return lengths * count if len(lengths) == 1 else lengths[:count]
