"""What each simulated CANN version is called and what it allows.

The pairs are the vendor's: CANN 8.2 with torch_npu 2.6.0, 8.3 with 2.8.0, 8.5 with 2.9.0.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """One CANN version. `tnd_*` are the limits of the fused attention's layout TND."""

    name: str
    cann: str
    torch_npu: str
    tnd_paged: bool
    tnd_head_dims: tuple[int, ...] | None
    """Head sizes the layout takes, None for any."""
    tnd_bfloat16_only: bool
    tnd_equal_heads: bool
    rotary_head_dims: tuple[int, ...]
    """Head sizes of npu_apply_rotary_pos_emb."""
    rotary_layouts: tuple[str, ...]
    updated_by_graph: frozenset[str]
    """Operations that `NPUGraph.update` knows, by qualified name."""
    rejects_task_queue_2: bool

    def at_least(self, name: str) -> bool:
        """Whether this version is `name` or newer."""
        return as_numbers(self.name) >= as_numbers(name)


def as_numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("."))


FUSED = "npu_fused_infer_attention_score"

PROFILES = {
    "8.2": Profile(
        name="8.2",
        cann="8.2.RC1",
        torch_npu="2.6.0",
        tnd_paged=False,
        tnd_head_dims=(192,),
        tnd_bfloat16_only=True,
        tnd_equal_heads=True,
        rotary_head_dims=(128,),
        rotary_layouts=("BSH",),
        updated_by_graph=frozenset({f"{FUSED}.out"}),
        rejects_task_queue_2=True,
    ),
    "8.3": Profile(
        name="8.3",
        cann="8.3.RC1",
        torch_npu="2.8.0",
        tnd_paged=True,
        tnd_head_dims=(128, 192),
        tnd_bfloat16_only=True,
        tnd_equal_heads=False,
        rotary_head_dims=(64, 128),
        rotary_layouts=("BSH", "BSND"),
        updated_by_graph=frozenset({f"{FUSED}.default", f"{FUSED}.out"}),
        rejects_task_queue_2=False,
    ),
    "8.5": Profile(
        name="8.5",
        cann="8.5.0",
        torch_npu="2.9.0",
        tnd_paged=True,
        tnd_head_dims=None,
        tnd_bfloat16_only=False,
        tnd_equal_heads=False,
        rotary_head_dims=(64, 128),
        rotary_layouts=("BSH", "BSND"),
        updated_by_graph=frozenset(
            {
                f"{FUSED}.default",
                f"{FUSED}.out",
                f"{FUSED}_v2.default",
                f"{FUSED}_v2.out",
                "_npu_paged_attention.default",
            }
        ),
        rejects_task_queue_2=False,
    ),
}
