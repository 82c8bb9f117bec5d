"""Norms, gates, rotations and sampling filters against their formulas, and every argument they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from paged import close
from refusals import refused

import mooli_simulate_ascend as sim

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def randn(*shape: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).npu()


def norm(x: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.cpu().float(), gamma.shape, gamma.cpu().float(), eps)


def made(wrong: dict[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in wrong.items()}


# ---------------------------------------------------------------------- norms


@pytest.mark.parametrize("shape", [(1, 32), (5, 64), (2, 3, 128)])
@pytest.mark.parametrize("types", [(BFLOAT16, BFLOAT16), (FLOAT16, FLOAT32), (FLOAT32, FLOAT32)])
def test_rms_norm(shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype]) -> None:
    x, gamma = randn(*shape, dtype=types[0]), randn(shape[-1], dtype=types[1])
    y, factor = torch.ops.npu.npu_rms_norm(x, gamma, 1e-5)
    assert y.dtype == types[0]
    assert close(y, norm(x, gamma, 1e-5))
    assert factor.dtype == FLOAT32
    assert close(factor, torch.rsqrt(x.cpu().float().square().mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("shape", [(1, 32), (5, 64)])
def test_add_rms_norm(shape: tuple[int, ...]) -> None:
    x1, x2, gamma = randn(*shape), randn(*shape), randn(shape[-1])
    y, _, total = torch.ops.npu.npu_add_rms_norm(x1, x2, gamma, 1e-5)
    assert close(total, x1.cpu().float() + x2.cpu().float())
    assert close(y, norm((x1.cpu().float() + x2.cpu().float()), gamma, 1e-5), 0.03)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": lambda: randn(32, dtype=FLOAT16)}, "the same, or half and float32"),
        ({"gamma": lambda: randn(16)}, "gamma is"),
        ({"x": lambda: randn(0, 32)}, "empty"),
        ({"x": lambda: torch.ones(2, 32, dtype=torch.int32).npu()}, "input is torch.int32"),
        ({"gamma": lambda: torch.ones(32, dtype=BFLOAT16)}, "gamma is on cpu"),
    ],
)
def test_a_wrong_norm_is_refused(wrong: dict[str, Any], message: str) -> None:
    right = {"x": randn(2, 32), "gamma": randn(32)}
    refused(lambda x, gamma: torch.ops.npu.npu_rms_norm(x, gamma, 1e-5), right, made(wrong), message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": lambda: randn(32, dtype=FLOAT32)}, "gamma is torch.float32"),
        ({"x2": lambda: randn(1, 32)}, "differ"),
        ({"x2": lambda: randn(2, 32, dtype=FLOAT16)}, "differ"),
        ({"x1": lambda: randn(0, 32), "x2": lambda: randn(0, 32)}, "empty"),
        ({"x1": lambda: randn(32, 2).T}, "not contiguous"),
    ],
)
def test_a_wrong_sum_and_norm_is_refused(wrong: dict[str, Any], message: str) -> None:
    right = {"x1": randn(2, 32), "x2": randn(2, 32), "gamma": randn(32)}
    refused(lambda x1, x2, gamma: torch.ops.npu.npu_add_rms_norm(x1, x2, gamma), right, made(wrong), message)


# ---------------------------------------------------------------------- gates


@pytest.mark.parametrize(("shape", "dim"), [((3, 8), -1), ((2, 3, 64), -1), ((4, 5), 0)])
def test_swiglu(shape: tuple[int, ...], dim: int) -> None:
    x = randn(*shape)
    first, second = x.cpu().float().chunk(2, dim=dim)
    assert close(torch.ops.npu.npu_swiglu(x, dim), F.silu(first) * second)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: randn(3, 7), "even number"),
        (lambda: randn(8, 3).T, "not contiguous"),
        (lambda: randn(0, 8), "empty"),
        (lambda: torch.tensor(1.0).npu(), "dim -1 of 0"),
        (lambda: torch.ones(3, 8, dtype=torch.int8).npu(), "input is torch.int8"),
    ],
)
def test_a_wrong_gate_is_refused(wrong: Any, message: str) -> None:
    refused(lambda x: torch.ops.npu.npu_swiglu(x, -1), {"x": randn(3, 8)}, {"x": wrong()}, message)


# ---------------------------------------------------------------------- rotations


def angles(tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (tokens, size / 2) of float32."""
    at = torch.arange(tokens)[:, None] * torch.pow(10000.0, -torch.arange(0, size, 2) / size)
    return at.cos(), at.sin()


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotation of (tokens, heads, size), the halves of a head paired."""
    first, second = heads.cpu().float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def both(x: torch.Tensor, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
    """For both halves of a head: (1, tokens, 1, size)."""
    return torch.cat([x, x], dim=-1)[None, :, None].to(dtype).npu()


@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 16), (7, 3, 64), (1200, 2, 32)])
def test_rotary_mul(tokens: int, heads: int, size: int) -> None:
    x = randn(1, tokens, heads, size, dtype=FLOAT32)
    cos, sin = angles(tokens, size)
    out = torch.ops.npu.npu_rotary_mul(x, both(cos, FLOAT32), both(sin, FLOAT32))
    assert close(out[0], turned(x[0], cos, sin), 1e-4)


def test_rotary_mul_pairs_neighbours_if_asked() -> None:
    x = randn(1, 5, 2, 16, dtype=FLOAT32)
    cos, sin = angles(5, 16)
    wide = (part.repeat_interleave(2, dim=-1)[None, :, None].npu() for part in (cos, sin))
    out = torch.ops.npu.npu_rotary_mul(x, *wide, "interleave").cpu()[0]
    number = torch.view_as_complex(x.cpu()[0].view(5, 2, 8, 2)) * torch.complex(cos, sin)[:, None]
    assert close(out, torch.view_as_real(number).flatten(-2), 1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": lambda: randn(7, 3, 64)}, "4 each"),
        ({"r1": lambda: randn(1, 7, 1, 32), "r2": lambda: randn(1, 7, 1, 32)}, "32 wide, not 64"),
        ({"r1": lambda: randn(1, 6, 1, 64), "r2": lambda: randn(1, 6, 1, 64)}, "6 of 7 tokens"),
        ({"r2": lambda: randn(1, 7, 1, 64, dtype=FLOAT32)}, "r2 torch.float32"),
        ({"r1": lambda: randn(1, 7, 3, 64), "r2": lambda: randn(1, 7, 3, 64)}, "one value for all heads"),
        ({"r1": lambda: randn(1, 1, 1, 64)}, "r2"),
        ({"mode": "quarter"}, "rotary_mode"),
        ({"x": lambda: torch.ones(1, 7, 3, 64, dtype=torch.int8).npu()}, "input is torch.int8"),
        ({"r1": lambda: randn(2, 7, 1, 64), "r2": lambda: randn(2, 7, 1, 64)}, "2 rows for 1"),
        ({"x": lambda: randn(1, 7, 1000, 64)}, "below 1000"),
        ({"x": lambda: randn(1, 7, 3, 896)}, "below 896"),
        ({"x": lambda: randn(1, 3, 7, 64).transpose(1, 2)}, "not contiguous"),
    ],
)
def test_a_wrong_rotation_is_refused(wrong: dict[str, Any], message: str) -> None:
    right = {"x": randn(1, 7, 3, 64), "r1": randn(1, 7, 1, 64), "r2": randn(1, 7, 1, 64), "mode": "half"}
    refused(lambda x, r1, r2, mode: torch.ops.npu.npu_rotary_mul(x, r1, r2, mode), right, made(wrong), message)


def position_call(**others: Any) -> dict[str, Any]:
    cos, sin = angles(20, 32)
    return {
        "positions": torch.tensor([3, 0, 19]).npu(),
        "query": randn(3, 4 * 32, dtype=FLOAT32),
        "key": randn(3, 2 * 32, dtype=FLOAT32),
        "cos_sin_cache": torch.cat([cos, sin], dim=-1).npu(),
        "head_size": 32,
        **others,
    }


def rotary_embedding(**call: Any) -> None:
    torch.ops.atb._npu_rotary_embedding(**call, is_neox_style=True)


def test_rotary_embedding_turns_in_place() -> None:
    call = position_call()
    cos, sin = (part[[3, 0, 19]] for part in angles(20, 32))
    wanted = [turned(call[name].view(3, -1, 32), cos, sin).flatten(1) for name in ("query", "key")]
    again = torch.ops.npu.npu_mrope(**call, mrope_section=[0, 0, 0])
    rotary_embedding(**call)
    for name, values, copied in zip(("query", "key"), wanted, again, strict=True):
        assert close(call[name], values, 1e-4)
        assert close(copied, values, 1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"positions": lambda: torch.tensor([3, 0, 20]).npu()}, "outside of the 20 rows"),
        ({"positions": lambda: torch.tensor([3.0, 0, 1]).npu()}, "positions are torch.float32"),
        ({"positions": lambda: torch.tensor([3, 0]).npu()}, "tokens"),
        ({"query": lambda: randn(3, 4, 32, dtype=FLOAT32)}, r"\(tokens, n \* D\)"),
        ({"query": lambda: randn(128, 3, dtype=FLOAT32).T}, "not contiguous"),
        ({"cos_sin_cache": lambda: randn(20, 32)}, "cos_sin_cache is"),
        ({"cos_sin_cache": lambda: randn(20, 64, dtype=FLOAT32)}, "64 wide"),
        ({"head_size": 48}, "no multiple of 48"),
        ({"positions": lambda: torch.tensor([[3, 0, 1]]).npu()}, "2 dimensions, not 1"),
        ({"query": lambda: torch.ones(3, 128, dtype=torch.int32).npu()}, "query is torch.int32"),
        ({"key": lambda: randn(3, 64)}, "key is torch.bfloat16"),
    ],
)
def test_a_wrong_rotary_embedding_is_refused(wrong: dict[str, Any], message: str) -> None:
    refused(rotary_embedding, position_call(), made(wrong), message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"mrope_section": [4, 6, 6]}, "mrope_section .* is not simulated"), ({"rotary_mode": "quarter"}, "rotary_mode")],
)
def test_a_wrong_mrope_is_refused(wrong: dict[str, Any], message: str) -> None:
    refused(torch.ops.npu.npu_mrope, position_call(), wrong, message)


def test_the_newer_rotary_pos_emb_pairs_halves_only(cann: Any) -> None:
    cann("8.3")
    right = [randn(1, 5, heads, 128) for heads in (4, 2, 1, 1)]
    call = torch.ops.npu.npu_apply_rotary_pos_emb
    refused(lambda mode: call(*right, "BSND", mode), {"mode": "half"}, {"mode": "interleave"}, "rotary_mode")


@pytest.mark.parametrize(("version", "size"), [("8.2", 128), ("8.3", 64)])
def test_apply_rotary_pos_emb_turns_in_place(version: str, size: int, cann: Any) -> None:
    cann(version)
    q, k = randn(1, 5, 4, size, dtype=FLOAT32), randn(1, 5, 2, size, dtype=FLOAT32)
    cos, sin = angles(5, size)
    wanted = [turned(x[0], cos, sin) for x in (q, k)]
    torch.ops.npu.npu_apply_rotary_pos_emb(q, k, both(cos, FLOAT32), both(sin, FLOAT32), "BSH")
    assert close(q[0], wanted[0], 1e-4)
    assert close(k[0], wanted[1], 1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layout": "BSND"}, "layout 'BSND'"),
        ({"cos": lambda: randn(1, 4, 1, 128)}, "cos is"),
        ({"q": lambda: randn(1, 5, 4, 64)}, "head_dim 64"),
        ({"k": lambda: randn(1, 4, 2, 128)}, "different tokens"),
        ({"k": lambda: randn(1, 5, 2, 128, dtype=FLOAT16)}, "key is torch.float16"),
        ({"q": lambda: randn(5, 4, 128)}, "not 4"),
        ({"q": lambda: torch.ones(1, 5, 4, 128, dtype=torch.int8).npu()}, "query is torch.int8"),
    ],
)
def test_a_wrong_rotary_pos_emb_is_refused(wrong: dict[str, Any], message: str) -> None:
    right = {"q": randn(1, 5, 4, 128), "k": randn(1, 5, 2, 128), "cos": randn(1, 5, 1, 128), "sin": randn(1, 5, 1, 128)}

    def call(q: Any, k: Any, cos: Any, sin: Any, layout: str = "BSH") -> None:
        torch.ops.npu.npu_apply_rotary_pos_emb(q, k, cos, sin, layout)

    refused(call, right, made(wrong), message)


# ---------------------------------------------------------------------- sampling


def filter_call(**others: Any) -> dict[str, Any]:
    return {
        "logits": torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, 0.0, 5.0]]).npu(),
        "p": torch.tensor([1.0, 1.0]).npu(),
        "k": torch.tensor([2, 4], dtype=torch.int32).npu(),
        **others,
    }


def keep(**call: Any) -> torch.Tensor:
    return torch.ops.npu.npu_top_k_top_p(call["logits"], call["p"], call["k"])


def test_top_k_keeps_the_largest_and_all_that_equal_them() -> None:
    kept = keep(**filter_call(k=torch.tensor([2, 1], dtype=torch.int32).npu())).cpu().isfinite()
    assert kept.tolist() == [[False, True, False, True], [True, True, False, True]]


@pytest.mark.parametrize("p", [0.0, 0.3, 0.7, 0.95])
def test_top_p_keeps_the_likeliest_up_to_a_sum(p: float) -> None:
    logits = torch.randn(3, 50)
    call = filter_call(
        logits=logits.npu(), p=torch.full((3,), p).npu(), k=torch.full((3,), 50, dtype=torch.int32).npu()
    )
    kept = keep(**call).cpu().isfinite()
    for row, seen in zip(logits.softmax(-1), kept, strict=True):
        ordered, order = row.sort(descending=True)
        count = max(1, int((ordered.cumsum(0) - ordered < p).sum()))
        assert set(order[:count].tolist()) == set(seen.nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": lambda: torch.tensor([0, 4], dtype=torch.int32).npu()}, "outside of 1 .. 4"),
        ({"k": lambda: torch.tensor([5, 4], dtype=torch.int32).npu()}, "outside of 1 .. 4"),
        ({"k": lambda: torch.tensor([1, 4]).npu()}, "k is torch.int64"),
        ({"k": lambda: torch.tensor([1], dtype=torch.int32).npu()}, "for 2 rows"),
        ({"p": lambda: torch.ones(2, dtype=FLOAT16).npu()}, "p is torch.float16"),
        ({"p": lambda: torch.tensor([1.5, 1]).npu()}, r"outside of 0 \.\. 1"),
        ({"logits": lambda: torch.ones(4).npu()}, "1 dimensions"),
        ({"logits": lambda: torch.ones(2, 4, dtype=torch.int32).npu()}, "logits are torch.int32"),
        ({"p": lambda: torch.ones(3).npu()}, "p is .* for 2 rows"),
    ],
)
def test_a_wrong_filter_is_refused(wrong: dict[str, Any], message: str) -> None:
    refused(keep, filter_call(), made(wrong), message)


def test_k_is_1024_at_most() -> None:
    logits = torch.randn(1, 2000).npu()
    one = torch.ones(1).npu()
    refused(
        keep,
        {"logits": logits, "p": one, "k": torch.tensor([1024], dtype=torch.int32).npu()},
        {"k": torch.tensor([1025], dtype=torch.int32).npu()},
        "outside of 1 .. 1024",
    )


def test_only_newer_versions_take_one_filter_alone(cann: Any) -> None:
    logits = torch.randn(2, 8).npu()
    with pytest.raises(sim.SimulationError, match="p is None"):
        torch.ops.npu.npu_top_k_top_p(logits, None, None)
    cann("8.3")
    assert torch.equal(torch.ops.npu.npu_top_k_top_p(logits, None, None).cpu(), logits.cpu())


def test_positional_order_is_logits_p_k() -> None:
    call = filter_call()
    with pytest.raises(sim.SimulationError, match=r"p is torch\.int32"):
        torch.ops.npu.npu_top_k_top_p(call["logits"], call["k"], call["p"])
