"""A simulated Ascend device: torch_npu's operations with their schemas, checks and limits, on a machine that has none.

    install(profile="8.2")   "8.2", "8.3" or "8.5": the CANN version whose operations and rules are simulated. May be
                             called again with another one (the operations are defined anew). Raises SimulationError
                             beside a real torch_npu.
    is_installed()           whether `install` was called in this process.
    has_device()             whether torch.device("npu") works: torch 2.13 or newer.
    profile()                the installed profile.
    operations               what the host asked for since `operations.reset()`: `.launched` (an eager operation is one,
                             a graph replay is one, an updated task is one; views are none), `.by_name` (Counter),
                             `.replays`, `.updates`, `.host_to_device`, `.device_to_host` (copies), `.copied_bytes`,
                             `.syncs`; `.as_dict()`.
    SimulationError          what every check raises: a RuntimeError, as torch_npu raises. NotSimulatedError, one of
                             them, for what may be right on a device but is unknown here.

What `install` makes:

- `sys.modules["torch_npu"]` (with `__simulated__ = True`), `__version__` (2.6.0, 2.8.0, 2.9.0 by profile),
  `torch.version.cann` ("8.2.RC1", "8.3.RC1", "8.5.0"); `torch_npu.<name>` of every operation of `torch.ops.npu` and
  `torch.ops.atb`; `torch_npu.npu` is `torch.npu`; `torch_npu.op_plugin.atb._atb_ops._register_atb_extensions()`;
  `torch_npu.npu.utils.get_cann_version(module)`; `torch_npu.get_npu_format(tensor)`.
- torch 2.13 or newer: the device `torch.device("npu")` in Python. Tensors hold a CPU tensor, every operation runs on
  the CPU; mixing npu and CPU tensors, or an npu operation on CPU tensors, is refused as on hardware, and so is float64.
  Before 2.13 there is no such device: the operations then take CPU tensors, and there are no graphs.
- `torch.npu`: is_available, device_count (1), set_device, current_device, get_device_name ("Ascend910B3"),
  get_device_properties, get_soc_version, mem_get_info (free and total bytes of a 64 GB card, whatever the host has),
  memory_allocated, max_memory_allocated, memory_reserved, memory_stats, reset_peak_memory_stats, empty_cache,
  synchronize, set_compile_mode, set_option, config.allow_internal_format, is_bf16_supported, manual_seed(_all), Stream,
  Event, ExternalEvent, stream, current_stream, default_stream, set_stream, NPUGraph, graph, graph_pool_handle,
  is_current_stream_capturing, graph_task_group_begin/end, graph_task_update_begin/end.
- `torch.empty` on the device is poisoned (NaN, or the type's lowest integer).

Operations, all profiles: npu_fused_infer_attention_score (+ .out, + its _get_max_workspace), npu_scatter_nd_update(_),
npu_rms_norm, npu_add_rms_norm, npu_swiglu, npu_rotary_mul, npu_apply_rotary_pos_emb, npu_mrope, npu_top_k_top_p,
npu_dynamic_quant, npu_quant_matmul, npu_quantize, npu_trans_quant_param, npu_weight_quant_batchmatmul,
npu_format_cast(_), get_npu_format; atb: _npu_flash_attention_qlens, _npu_paged_attention, _npu_flash_attention,
_npu_paged_attention_splitfuse, _npu_reshape_and_cache, _npu_rotary_embedding.
From 8.3: npu_fused_infer_attention_score_v2 (+ .out, workspace), npu_add_rms_norm_dynamic_quant,
npu_scatter_pa_kv_cache (without the argument cache_mode, which came later: it takes caches for FRACTAL_NZ, so that ND
ones are refused); atb _npu_paged_attention_get_workspace, and _npu_paged_attention's argument workspace.
Not defined, though torch_npu has them: npu_top_k_top_p_sample, npu_attention_update, experts, fused collectives.
Rules that change: fused attention in layout TND with pages is refused in 8.2, taken for head_dim 128 in 8.3 (bfloat16)
and for any in 8.5; npu_top_k_top_p needs both p and k in 8.2; npu_apply_rotary_pos_emb's layouts and head sizes; what
`NPUGraph.update` knows; TASK_QUEUE_ENABLE=2 is refused while capturing in 8.2.

Rows of padding, and what no query asked for, are NaN in the results of attention, as is a slot that two tokens were
stored to in one call.

Graphs (`with torch.npu.graph(g): ...`, `g.replay()`): while capturing nothing is computed (results are NaN until
replayed, stores do not happen), host lengths and CPU tensors are frozen; a copy between host and device, a
synchronisation, a read of a value (`.item()`, `nonzero`, a bool mask as an index) and a random number are errors.
Replays use the captured storages: a tensor that the graph uses and that was freed is an error, and so is a result that
would need other memory. Frozen lengths change through `g.update(cpu_update_input=[{...}])` (captured with
`auto_dispatch_capture=True`; 8.2 knows only `.out` of the fused attention, 8.3 also its plain form, 8.5 also the second
version and _npu_paged_attention) or through graph_task_update_begin/end with the handle of graph_task_group_end. An
operation in a group writes to `out`, and the fused attention has a workspace. The graph waits for each ExternalEvent it
captured: one that is not recorded by the time of the replay is an error (a device would hang).
"""

from __future__ import annotations

from mooli_simulate_ascend.counters import Operations, operations
from mooli_simulate_ascend.errors import NotSimulatedError, SimulationError
from mooli_simulate_ascend.installation import has_device, install, is_installed, profile

__all__ = [
    "NotSimulatedError",
    "Operations",
    "SimulationError",
    "has_device",
    "install",
    "is_installed",
    "operations",
    "profile",
]
