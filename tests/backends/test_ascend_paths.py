"""Which operation serves which rows: by release, shape, type, and what the self-test switched off."""

from __future__ import annotations

import pytest

from mooli.backends.ascend.paths import Paths, Switches, shape_name
from mooli.backends.base import AttentionSpec

QWEN = AttentionSpec(num_heads=28, num_kv_heads=4, head_dim=128, scale=128**-0.5)
WIDE = AttentionSpec(num_heads=8, num_kv_heads=8, head_dim=256, scale=1 / 16)
ODD = AttentionSpec(num_heads=8, num_kv_heads=8, head_dim=72, scale=0.1)
WINDOWED = AttentionSpec(num_heads=8, num_kv_heads=8, head_dim=128, scale=0.1, window=64)
MANY_QUERIES = AttentionSpec(num_heads=128, num_kv_heads=1, head_dim=128, scale=0.1)


def paths(release: tuple[int, int], dtype: str = "bfloat16", **off: str) -> Paths:
    return Paths(release, Switches(off), dtype)


@pytest.mark.parametrize(
    ("release", "aligned", "unaligned"),
    [((8, 2), "qlens", "fia_bsh"), ((8, 3), "fia_tnd", "fia_tnd"), ((9, 0), "fia_tnd", "fia_tnd")],
    ids=str,
)
def test_prompts_go_the_way_of_their_release(release: tuple[int, int], aligned: str, unaligned: str) -> None:
    assert paths(release).extend(QWEN, is_aligned=True) == aligned
    assert paths(release).extend(QWEN, is_aligned=False) == unaligned
    assert paths(release).decode(QWEN) == "fia_decode"


@pytest.mark.parametrize("spec", [ODD, WINDOWED, MANY_QUERIES], ids=["odd heads", "window", "many queries"])
def test_what_no_fused_path_takes_is_plain_torch(spec: AttentionSpec) -> None:
    chosen = paths((8, 5))
    assert {chosen.extend(spec, is_aligned=True), chosen.decode(spec)} == {"gather"}


@pytest.mark.parametrize(("release", "path"), [((8, 3), "qlens"), ((8, 5), "fia_tnd")], ids=str)
def test_small_heads_are_packed_from_8_5_on(release: tuple[int, int], path: str) -> None:
    small = AttentionSpec(num_heads=14, num_kv_heads=2, head_dim=64, scale=1 / 8)
    assert paths(release).extend(small, is_aligned=True) == path


def test_wide_heads_go_where_they_fit() -> None:
    assert paths((8, 2)).extend(WIDE, is_aligned=True) == "fia_bsh"
    assert paths((8, 2)).decode(WIDE) == "fia_decode"


def test_float32_is_plain_torch() -> None:
    chosen = paths((8, 2), "float32")
    assert {chosen.extend(QWEN, is_aligned=True), chosen.decode(QWEN)} == {"gather"}


def test_the_next_path_takes_over_from_one_that_is_off() -> None:
    assert paths((8, 2), fia_decode="wrong").decode(QWEN) == "paged_attention"
    assert paths((8, 2), fia_decode="wrong", paged_attention="wrong").decode(QWEN) == "gather"
    assert paths((8, 3), fia_tnd="refused").extend(QWEN, is_aligned=True) == "qlens"
    assert paths((8, 3), fia_tnd="refused").extend(QWEN, is_aligned=False) == "fia_bsh"


def test_a_path_may_be_off_for_one_head_size_and_type() -> None:
    off = {f"qlens {shape_name(128, 'bfloat16')}": "wrong"}
    assert paths((8, 2), **off).extend(QWEN, is_aligned=True) == "fia_bsh"
    assert paths((8, 2), "float16", **off).extend(QWEN, is_aligned=True) == "qlens"


def test_prompts_behind_cached_pages_that_come_out_wrong_are_left_to_plain_torch() -> None:
    assert paths((8, 5), page_reuse="off by 1").extend(QWEN, is_aligned=True) == "gather"


@pytest.mark.parametrize(
    ("chosen", "tokens"),
    [
        (paths((8, 2)), 128),
        (paths((8, 3)), 1),
        (paths((8, 5)), 1),
        (paths((8, 5), token_reuse="off by 1"), 128),
        (paths((8, 5), fia_tnd="refused"), 128),
        (paths((8, 5), **{"fia_tnd head_dim=128 bfloat16": "refused"}), 128),
        (paths((8, 5), **{"fia_tnd head_dim=128 float16": "refused"}), 1),
        (paths((8, 3), "float16"), 128),
        (paths((8, 5), "float16"), 1),
        (paths((8, 2), "float32"), 1),
    ],
    ids=["8.2", "8.3", "8.5", "reuse off", "path off", "size off", "other type off", "8.3 half", "8.5 half", "float32"],
)
def test_prefixes_are_cut_to_pages_where_the_path_wants_it(chosen: Paths, tokens: int) -> None:
    assert chosen.match_granularity_tokens() == tokens
