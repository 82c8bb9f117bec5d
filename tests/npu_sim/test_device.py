"""The device: what it computes, what it refuses, what it counts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

import mooli_simulate_ascend as sim


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1,
        lambda x: x.t().reshape(-1),
        lambda x: x[:, 1:3].contiguous().view(-1),
        lambda x: F.linear(x, x),
        lambda x: F.embedding(torch.tensor([1, 0], device=x.device), x),
        lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], is_causal=True),
        lambda x: torch.cat([x, x.flip(0)]).sort(dim=-1).values,
        lambda x: x.softmax(-1).cumsum(-1).topk(2).indices,
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x: x.index_select(0, torch.arange(2, device=x.device)),
        lambda x: x.clone().index_copy_(0, torch.tensor([1], device=x.device), x[:1]),
        lambda x: torch.full((2, 3), 7.0, device=x.device),
        lambda x: torch.eye(3, device=x.device),
        lambda x: torch.arange(1, 9, 2, device=x.device),
        lambda x: x.to(torch.bfloat16).float(),
    ],
)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_operators_compute_as_on_the_cpu(function: Callable[[torch.Tensor], torch.Tensor], mode: Any) -> None:
    with mode():
        x = torch.randn(5, 4)
        found = function(x.npu())
        assert found.device.type == "npu"
        # Attention is decomposed where gradients might be wanted.
        assert torch.allclose(found.cpu(), function(x), atol=1e-5)


def test_views_share_memory() -> None:
    x = torch.zeros(4, 3).npu()
    x[1:3].view(-1)[0] = 5
    x.t()[2].fill_(7)
    assert x.tolist() == [[0, 0, 7], [5, 0, 7], [0, 0, 7], [0, 0, 7]]


def test_strides_are_those_of_the_device() -> None:
    x = torch.zeros(4, 3).npu()
    assert x.is_contiguous()
    assert not x.t().is_contiguous()
    assert x.t().stride() == (1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_empty_memory_is_nan(dtype: torch.dtype) -> None:
    assert torch.empty(3, dtype=dtype, device="npu").cpu().isnan().all()
    assert torch.empty_like(torch.zeros(3, dtype=dtype).npu()).cpu().isnan().all()
    assert torch.empty(2, dtype=torch.int32, device="npu").tolist() == [-(2**31)] * 2


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda x: x + torch.ones(3), sim.SimulationError, "same device"),
        (lambda x: x.cpu() + x, sim.SimulationError, "same device"),
        (lambda x: torch.ops.npu.npu_swiglu(torch.ones(4)), NotImplementedError, "npu_swiglu"),
        (lambda x: x.numpy(), TypeError, "Tensor.cpu"),
        (lambda x: x.double(), sim.SimulationError, "float64"),
        (lambda x: torch.zeros(2, dtype=torch.float64, device="npu"), sim.SimulationError, "float64"),
        (lambda x: x.resize_(9), sim.SimulationError, "in place"),
        (lambda x: torch.add(x, x, out=torch.empty(0, device="npu")), sim.SimulationError, "was resized"),
        (lambda x: torch.npu.set_device(1), sim.SimulationError, "npu:1"),
    ],
)
def test_what_hardware_refuses_is_refused(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong(torch.ones(3).npu())


def test_copies_waits_and_operations_are_counted() -> None:
    counts = sim.operations
    x = torch.ones(4).npu()
    assert (counts.host_to_device, counts.copied_bytes) == (1, 16)
    y = torch.tensor([1, 2], device="npu")
    assert counts.host_to_device == 2
    counts.reset()
    (x * 2).view(2, 2).t()
    assert (counts.launched, counts.syncs) == (1, 0)
    y.sum().item()
    x.cpu()
    x.tolist()
    assert (counts.device_to_host, counts.syncs) == (3, 3)
    torch.npu.synchronize()
    x[x > 0]
    assert counts.syncs == 5
    assert counts.by_name["aten.mul.Tensor"] == 1


def test_an_operation_of_the_vendor_is_one() -> None:
    x = torch.ones(4).npu()
    sim.operations.reset()
    torch.ops.npu.npu_swiglu(x)
    assert sim.operations.as_dict()["launched"] == 1


def test_memory_is_counted_and_given_back() -> None:
    free, total = torch.npu.mem_get_info()
    assert 60 * 2**30 < total < 64 * 2**30
    x = torch.zeros(1000, device="npu")
    view = x[10:]
    assert torch.npu.mem_get_info()[0] == free - 4000
    del x
    assert torch.npu.memory_allocated() == total - free + 4000
    del view
    assert torch.npu.mem_get_info()[0] == free


def test_more_than_the_card_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mooli_simulate_ascend import memory

    monkeypatch.setattr(memory, "TOTAL_BYTES", torch.npu.memory_allocated() + 1000)
    torch.zeros(200, device="npu")
    with pytest.raises(RuntimeError, match=r"NPU out of memory\. Tried to allocate"):
        torch.zeros(300, device="npu")


def test_the_module_looks_like_the_real_one() -> None:
    import torch_npu

    assert importlib.util.find_spec("torch_npu") is not None
    assert torch_npu.__simulated__
    assert torch_npu.npu.is_available()
    assert torch_npu.npu is torch.npu
    assert torch.npu.get_device_name().startswith("Ascend910B")
    assert torch.npu.device_count() == 1
    torch_npu.op_plugin.atb._atb_ops._register_atb_extensions()
    x = torch.ones(4).npu()
    assert torch.equal(torch_npu.npu_swiglu(x).cpu(), torch.ops.npu.npu_swiglu(x).cpu())
    with pytest.raises(AttributeError, match="npu_no_such"):
        torch_npu.npu_no_such  # noqa: B018


@pytest.mark.parametrize(
    ("version", "cann_version", "torch_npu_version"),
    [("8.2", "8.2.RC1", "2.6.0"), ("8.3", "8.3.RC1", "2.8.0"), ("8.5", "8.5.0", "2.9.0")],
)
def test_a_profile_has_its_versions_and_operations(
    version: str, cann_version: str, torch_npu_version: str, cann: Any
) -> None:
    import torch_npu

    cann(version)
    newer = version != "8.2"
    assert sim.profile() == version
    assert torch_npu.__version__ == torch_npu_version
    assert torch_npu.npu.utils.get_cann_version("CANN") == torch.version.cann == cann_version
    for name in ("npu_fused_infer_attention_score_v2", "npu_scatter_pa_kv_cache", "npu_add_rms_norm_dynamic_quant"):
        assert hasattr(torch.ops.npu, name) == newer
    for name in ("npu_rms_norm", "npu_fused_infer_attention_score", "npu_quant_matmul"):
        assert hasattr(torch_npu, name)
    for name in ("npu_attention_update", "npu_top_k_top_p_sample"):
        assert not hasattr(torch_npu, name)


def test_every_schema_has_a_simulation() -> None:
    from mooli_simulate_ascend.profiles import PROFILES
    from mooli_simulate_ascend.schemas import schemas
    from mooli_simulate_ascend.tasks import OPERATIONS

    wanted = set()
    for profile in PROFILES.values():
        for declarations in schemas(profile).values():
            names = (declaration.split("(")[0] for declaration in declarations)
            wanted |= {name if "." in name else f"{name}.default" for name in names}
    assert wanted - {"get_npu_format.default"} == set(OPERATIONS)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(sim.SimulationError, match=r"8\.4"):
        sim.install("8.4")


def test_beside_a_real_torch_npu_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", type(sys)("torch_npu"))
    with pytest.raises(sim.SimulationError, match="torch_npu is loaded"):
        sim.install("8.3")
