"""Writing keys and values to slots, and scattering rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import refused

import mooli_simulate_ascend as sim


def cache(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(3, 128, 2, 16, dtype=dtype, device="npu")


def write_call(slots: list[int], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    count = len(slots)
    return {
        "key": torch.randn(count, 2, 16).to(dtype).npu(),
        "value": torch.randn(count, 2, 16).to(dtype).npu(),
        "key_cache": cache(dtype),
        "value_cache": cache(dtype),
        "slot_indices": torch.tensor(slots, dtype=torch.int32).npu(),
    }


def write(**call: Any) -> None:
    torch.ops.atb._npu_reshape_and_cache(**call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_tokens_lie_at_their_slots(dtype: torch.dtype) -> None:
    call = write_call([0, 127, 128, 300], dtype)
    write(**call)
    for tokens, stored in (("key", "key_cache"), ("value", "value_cache")):
        rows = call[stored].cpu().view(-1, 2, 16)
        assert torch.equal(rows[[0, 127, 128, 300]], call[tokens].cpu())
        rows[[0, 127, 128, 300]] = 0
        assert not rows.any()


def test_a_negative_slot_is_skipped() -> None:
    call = write_call([-1, 5])
    write(**call)
    rows = call["key_cache"].cpu().view(-1, 2, 16)
    assert torch.equal(rows[5], call["key"].cpu()[1])
    assert rows.abs().sum(dim=(1, 2)).count_nonzero() == 1


def test_a_slot_that_two_tokens_want_holds_nan() -> None:
    call = write_call([7, 7, 8])
    write(**call)
    rows = call["key_cache"].cpu().view(-1, 2, 16)
    assert rows[7].isnan().all()
    assert torch.equal(rows[8], call["key"].cpu()[2])


def made(wrong: dict[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in wrong.items()}


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    return lambda: torch.zeros(shape, dtype=dtype).npu()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"slot_indices": zeros(2, dtype=torch.int64)}, "slot should be int32"),
        ({"slot_indices": zeros(2, 1, dtype=torch.int32)}, "2 dimensions"),
        ({"slot_indices": zeros(3, dtype=torch.int32)}, "3 slots for 2 keys"),
        ({"slot_indices": lambda: torch.tensor([0, 384], dtype=torch.int32).npu()}, "slot 384 of 384"),
        ({"slot_indices": lambda: torch.zeros(2, dtype=torch.int32)}, "slot_indices is on cpu"),
        ({"key": zeros(2, 32)}, r"\(T, heads, D\)"),
        ({"value": lambda: torch.zeros(2, 16, 2, dtype=torch.bfloat16).npu().mT}, "value .* not contiguous"),
        ({"key": zeros(2, 2, 16, dtype=torch.float16)}, "key is torch.float16"),
        ({"key_cache": zeros(3, 128, 2, 16, dtype=torch.float32)}, "key_cache is torch.float32"),
        ({"key_cache": zeros(3, 128, 32)}, "is wanted"),
        ({"key_cache": zeros(2, 128, 2, 16)}, "different pages"),
        ({"slot_indices": zeros(0, dtype=torch.int32), "key": zeros(0, 2, 16), "value": zeros(0, 2, 16)}, "no tokens"),
    ],
)
def test_a_wrong_write_is_refused(wrong: dict[str, Any], message: str) -> None:
    refused(write, write_call([0, 1]), made(wrong), message)


def blocked(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ops.npu.npu_format_cast(torch.zeros(shape, dtype=torch.bfloat16).npu(), 29)


def test_both_caches_have_one_format() -> None:
    tokens, shape = torch.ones(1, 16, 16, dtype=torch.bfloat16).npu(), (2, 128, 16, 16)
    right = {name: torch.zeros(shape, dtype=torch.bfloat16).npu() for name in ("key_cache", "value_cache")}
    call = {"key": tokens, "value": tokens, **right, "slot_indices": torch.zeros(1, dtype=torch.int32).npu()}
    refused(write, call, {"key_cache": blocked(shape)}, "the other is not")


def test_the_newer_write_wants_blocked_caches(cann: Any) -> None:
    assert not hasattr(torch.ops.npu, "npu_scatter_pa_kv_cache")
    cann("8.3")
    call = write_call([0, 1])
    call["slot_mapping"] = call.pop("slot_indices")
    with pytest.raises(sim.SimulationError, match="written as FRACTAL_NZ"):
        torch.ops.npu.npu_scatter_pa_kv_cache(**call)
    caches = {name: blocked((2, 128, 16, 16)) for name in ("key_cache", "value_cache")}
    with pytest.raises(sim.NotSimulatedError, match="FRACTAL_NZ"):
        torch.ops.npu.npu_scatter_pa_kv_cache(**{**call, **caches})
    with pytest.raises(RuntimeError, match="cache_mode"):
        torch.ops.npu.npu_scatter_pa_kv_cache(**call, cache_mode="Norm")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_are_scattered_in_place_and_into_a_copy(dtype: torch.dtype) -> None:
    where = torch.tensor([[4], [1]], dtype=dtype).npu()
    updates = torch.randn(2, 3).npu()
    wanted = torch.zeros(6, 3)
    wanted[[4, 1]] = updates.cpu()
    x = torch.zeros(6, 3).npu()
    copied = torch.ops.npu.npu_scatter_nd_update(x, where, updates)
    assert torch.equal(copied.cpu(), wanted)
    assert not x.cpu().any()
    torch.ops.npu.npu_scatter_nd_update_(x, where, updates)
    assert torch.equal(x.cpu(), wanted)


def test_two_coordinates_name_a_row_of_a_page() -> None:
    x = torch.zeros(3, 4, 2).npu()
    updates = torch.randn(2, 2).npu()
    torch.ops.npu.npu_scatter_nd_update_(x, torch.tensor([[2, 1], [0, 3]]).npu(), updates)
    assert torch.equal(x.cpu()[[2, 0], [1, 3]], updates.cpu())


def scatter(x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> None:
    torch.ops.npu.npu_scatter_nd_update_(x, indices, updates)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"indices": zeros(2, dtype=torch.int64)}, "at least 2"),
        ({"indices": zeros(2, 1, dtype=torch.int16)}, "int32 or int64"),
        ({"indices": zeros(2, 3, dtype=torch.int64)}, "3 coordinates into 2"),
        ({"indices": lambda: torch.tensor([[0], [6]]).npu()}, "out of range"),
        ({"indices": lambda: torch.tensor([[0], [-1]]).npu()}, "out of range"),
        ({"updates": zeros(2, 4, dtype=torch.float32)}, r"not \(2, 3\)"),
        ({"updates": zeros(2, 3, dtype=torch.float16)}, "updates are torch.float16"),
        ({"x": zeros(6, 3, 2, 2, dtype=torch.float32), "updates": zeros(2, 3, 2, 2, dtype=torch.float32)}, "tiling"),
        ({"x": zeros(6, 3, dtype=torch.int16), "updates": zeros(2, 3, dtype=torch.int16)}, "input is torch.int16"),
    ],
)
def test_a_wrong_scatter_is_refused(wrong: dict[str, Any], message: str) -> None:
    right = {"x": torch.zeros(6, 3).npu(), "indices": torch.tensor([[0], [1]]).npu(), "updates": torch.ones(2, 3).npu()}
    refused(scatter, right, made(wrong), message)
