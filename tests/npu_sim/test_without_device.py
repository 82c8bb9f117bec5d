"""A torch older than 2.13, which has no device in Python: operations take CPU tensors, with the same checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
import torch.utils.backend_registration as registration

if hasattr(registration, "_setup_privateuseone_for_python_backend"):
    del registration._setup_privateuseone_for_python_backend

import pytest
from paged import close, make_requests, scale_of
import mooli_simulate_ascend as sim

sim.install("8.2")
assert not sim.has_device()
assert torch.npu.is_available()
requests = make_requests([1, 1], [129, 40])
query = requests.queries
out = torch.empty_like(query)
call = (query, requests.key_cache, requests.value_cache, 2, 4, scale_of(query), requests.table)
torch.ops.atb._npu_paged_attention(*call, torch.tensor([129, 40], dtype=torch.int32), out)
assert close(out, requests.attention())
with pytest.raises(sim.SimulationError, match="misread"):
    torch.ops.atb._npu_paged_attention(*call, torch.tensor([129, 40]), out)
fused = torch.ops.npu.npu_fused_infer_attention_score
arguments = dict(
    query=query.view(2, 1, -1), key=requests.key_cache.flatten(2), value=requests.value_cache.flatten(2),
    block_table=requests.table, actual_seq_lengths_kv=[129, 40], num_heads=4, num_key_value_heads=2,
    scale=scale_of(query), block_size=128,
)
assert close(fused(**arguments)[0], requests.attention())
outs = [torch.empty(2, 1, 128, dtype=query.dtype), torch.empty(1)]
fused.out(**arguments, out=outs)
assert close(outs[0], requests.attention())
x = torch.zeros(4, 3)
assert torch.ops.npu.npu_scatter_nd_update_(x, torch.tensor([[2]]), torch.ones(1, 3)) is x
assert x[2].tolist() == [1, 1, 1]
with pytest.raises(sim.SimulationError, match="device npu"):
    torch.npu.graph(torch.npu.NPUGraph()).__enter__()
sim.install("8.5")
assert hasattr(torch.ops.npu, "npu_fused_infer_attention_score_v2")
print("fine")
"""


def test_operations_on_cpu_tensors() -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "simulate")]
    script = f"import sys; sys.path[:0] = {paths!r}\n{SCRIPT}"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout.strip() == "fine", ran.stderr
