"""SGLang's engine arguments that Mooli knows of and does not have.

Owns their names, so that the message for one of them differs from that for a typing error. Never gives one a meaning.
"""

from __future__ import annotations

from typing import Any

_NAMES = """
admin_api_key api_key attn_dp_size base_gpu_id completion_template constrained_json_disable_any_whitespace
constrained_json_whitespace_pattern cpu_offload_gb crash_dump_folder cuda_graph_backend_decode
cuda_graph_backend_prefill cuda_graph_bs cuda_graph_bs_decode cuda_graph_bs_prefill cuda_graph_max_bs
cuda_graph_max_bs_decode cuda_graph_max_bs_prefill debug_tensor_dump_inject decode_attention_backend
decode_log_interval default_chat_template_kwargs default_priority_value detokenizer_worker_num disable_cuda_graph
disable_overlap_schedule disable_priority_preemption disaggregation_bootstrap_port disaggregation_mode
disaggregation_transfer_backend dist_init_addr dist_timeout download_dir enable_cache_report
enable_deterministic_inference enable_dp_attention enable_flexkv enable_hicache enable_hierarchical_cache
enable_http2 enable_lmcache enable_lora enable_memory_saver enable_metrics enable_mixed_chunk enable_multimodal
enable_nan_detection enable_priority_scheduling enable_response_store enable_torch_compile enable_trace ep_size
expert_parallel_size fastapi_root_path gpu_id_step grammar_backend grpc_port hf_chat_template_name
hicache_io_backend hicache_mem_layout hicache_ratio hicache_size hicache_storage_backend
hicache_storage_backend_extra_config hicache_storage_prefetch_policy hicache_write_policy host is_embedding
load_balance_method log_level_http log_requests log_requests_format log_requests_level log_requests_target
lora_backend lora_eviction_policy lora_paths lora_target_modules max_loaded_loras max_lora_rank max_loras_per_batch
max_prefill_tokens max_queued_requests model_impl model_loader_extra_config nccl_init_addr nccl_port nnodes
node_rank num_continuous_decode_steps otlp_traces_endpoint pipeline_parallel_size port pp_size
prefill_attention_backend prefill_max_requests priority_scheduling_preemption_threshold radix_eviction_policy
radix_eviction_policy_config reasoning_parser retraction_policy revision sampling_defaults schedule_conservativeness
schedule_low_priority_values_first scheduler_recv_interval show_time_cost skip_server_warmup sleep_on_idle
smg_grpc_mode soft_watchdog_timeout speculative_accept_threshold_acc speculative_accept_threshold_single
speculative_algorithm speculative_draft_model_path speculative_eagle_topk speculative_num_draft_tokens
speculative_num_steps speculative_token_map ssl_ca_certs ssl_certfile ssl_keyfile ssl_keyfile_password
stream_response_default_include_usage strip_thinking_cache tokenizer_mode tokenizer_worker_num tool_call_parser
tool_server torch_compile_max_bs torchao_config trust_request_chat_template warmups watchdog_timeout weight_version
"""
_NAME_SET = frozenset(_NAMES.split())

_NEUTRAL: dict[str, Any] = {"disable_cuda_graph": True, "disable_overlap_schedule": True}
"""Values that ask for what is so anyway: there are no CUDA graphs and no overlapping schedule to switch off."""

_NEUTRAL_ONE = frozenset(
    ("attn_dp_size", "ep_size", "expert_parallel_size", "nnodes", "pipeline_parallel_size", "pp_size")
)


def is_sglang_argument(name: str) -> bool:
    """Whether SGLang has an argument of that name, and Mooli has not."""
    return name in _NAME_SET


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether `name=value` leaves a feature off that Mooli does not have, so that it can be accepted as it is."""
    if value is None or value is False:
        return True
    if name in _NEUTRAL_ONE:
        return type(value) is int and value == 1
    return name in _NEUTRAL and value is _NEUTRAL[name]
