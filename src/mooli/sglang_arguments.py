"""What becomes of SGLang's server arguments that Mooli does not have: the decision about each, as data.

Three kinds. A hint tunes what Mooli does not have or does by itself, so that without it the answers are the same: the
server commands accept it with a warning that gives the reason, `Engine(...)` does not. What asks for a feature that is
missing is refused, with a message that differs from that for a typing error. Arguments that work in the server only are
listed so that the engine can say so. Never gives an argument a meaning.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ONE_KERNEL = "each device has one implementation"
_NO_GRAPHS = "a CPU has no graphs, and on other devices MOOLI_GRAPHS=0 in the environment switches them off"
_NO_PORT = "the processes of --tp meet through a file on this machine, and one that dies is noticed at once"
_MIXED = "a step always takes running requests first and fills up with prompts; see --chunked-prefill-size"
_ONE_WAY = "pages move in one way, whole and as they lie; see --enable-hierarchical-cache"
_NO_HOST_TIME = "there is no such step to tune"
_GONE = "SGLang has dropped it too"

_HINTS_BY_REASON = {
    _NO_GRAPHS: """
        disable_cuda_graph cuda_graph_bs cuda_graph_bs_decode cuda_graph_bs_prefill cuda_graph_max_bs
        cuda_graph_max_bs_decode cuda_graph_max_bs_prefill cuda_graph_backend_decode cuda_graph_backend_prefill
        enable_piecewise_cuda_graph piecewise_cuda_graph_max_tokens piecewise_cuda_graph_tokens
        piecewise_cuda_graph_compiler
    """,
    "nothing is compiled at start": "enable_torch_compile torch_compile_max_bs",
    _MIXED: "max_prefill_tokens prefill_max_requests enable_mixed_chunk",
    "a request that finds no room gives way, and goes on later from what the cache kept of it": """
        schedule_conservativeness retraction_policy
    """,
    _ONE_KERNEL: "prefill_attention_backend decode_attention_backend",
    _NO_HOST_TIME: "num_continuous_decode_steps scheduler_recv_interval",
    "a step that is begun early gives what it would have given later": "disable_overlap_schedule",
    "with --enable-priority-scheduling the lower ones wait or give way": """
        disable_priority_preemption priority_scheduling_preemption_threshold
    """,
    "what was used least recently is evicted first": "radix_eviction_policy radix_eviction_policy_config",
    "text is handled in the one process that speaks HTTP": "tokenizer_worker_num detokenizer_worker_num",
    "NaN in the logits always ends its request with an error": "enable_nan_detection",
    "an answer on the CPU never depends on what is computed beside it": "enable_deterministic_inference",
    _ONE_WAY: "hicache_io_backend hicache_mem_layout",
    "a request waits for pages from disk as long as computing them would take": "hicache_storage_prefetch_policy",
    "the engine always sleeps while there is nothing to do": "sleep_on_idle",
    "there is one watchdog, see --watchdog-timeout": "soft_watchdog_timeout",
    "/metrics has the times": "show_time_cost",
    "there is one copy of the model": "load_balance_method",
    "a request's bound on its reasoning always holds": "enable_strict_thinking",
    _NO_PORT: "nccl_port dist_timeout",
    f"{_GONE}; for weights of fewer bits there is --quantization": "torchao_config",
    f"{_GONE}; /metrics has the histograms": "collect_tokens_histogram",
    f"{_GONE}; attention is always over the whole context": """
        enable_double_sparsity ds_channel_config_path ds_heavy_channel_num ds_heavy_token_num ds_heavy_channel_type
        ds_sparse_decode_threshold nsa_prefill_backend nsa_decode_backend hybrid_kvcache_ratio
    """,
    f"{_GONE}; prompts and answers are computed in one process": """
        disaggregation_decode_dp disaggregation_decode_tp disaggregation_prefill_pp prefill_round_robin_balance
        load_watch_interval
    """,
    f"{_GONE}; see --speculative-num-draft-tokens": "speculative_ngram_branch_length",
    f"{_GONE}; nothing is dumped": "debug_tensor_dump_inject",
}

HINTS: dict[str, str] = {name: why for why, names in _HINTS_BY_REASON.items() for name in names.split()}
"""Arguments without which every answer is the same, and why each has no effect here."""

HINT_VALUES: dict[str, tuple[frozenset[str], str]] = {
    "attention_backend": (
        _words("""
aiter cutedsl_mla cutlass_mla fa3 fa4 flashinfer flashmla flex_attention intel_amx intel_xpu torch_native triton
trtllm_mha trtllm_mla wave
"""),
        _ONE_KERNEL,
    ),
    "sampling_backend": (_words("flashinfer intel_xpu pytorch"), _ONE_KERNEL),
}
"""Values of arguments that Mooli has which are hints too: the libraries that SGLang's kernels come from."""

REFUSED = _words("""
abort_on_priority_when_disabled attn_dp_size base_gpu_id completion_template
constrained_json_disable_any_whitespace constrained_json_whitespace_pattern cpu_offload_gb crash_dump_folder
default_priority_value disaggregation_bootstrap_port disaggregation_mode
disaggregation_transfer_backend dist_init_addr download_dir enable_dp_attention enable_flexkv
enable_http2 enable_lmcache enable_lora enable_memory_saver enable_multimodal
enable_trace ep ep_size expert_parallel_size extra_metric_labels gpu_id_step grpc_port
hf_chat_template_name hicache_storage_backend_extra_config is_embedding
log_requests_target lora_backend lora_eviction_policy lora_paths lora_target_modules max_loaded_loras max_lora_rank
max_loras_per_batch model_impl model_loader_extra_config model_type nccl_init_addr nnodes node_rank otlp_traces_endpoint
pipeline_parallel_size pp pp_size revision
schedule_low_priority_values_first smg_grpc_mode speculative_accept_threshold_acc
speculative_accept_threshold_single speculative_draft_model_path speculative_eagle_topk
speculative_ngram_capacity speculative_ngram_match_type speculative_ngram_max_bfs_breadth
speculative_ngram_max_trie_depth speculative_ngram_min_bfs_breadth speculative_num_steps speculative_token_map
strip_thinking_cache tokenizer_mode tool_server
trust_request_chat_template warmups weight_version
""")
"""Arguments that ask for what is missing."""

_ONE_MACHINE = "one model runs on one machine: --tp uses several devices of it"
_VISIBLE = "choose devices with ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES"

REASONS: dict[str, str] = {
    **dict.fromkeys(("dist_init_addr", "nccl_init_addr", "nnodes", "node_rank"), _ONE_MACHINE),
    **dict.fromkeys(("base_gpu_id", "gpu_id_step"), _VISIBLE),
}
"""What is to be said of some of them."""

SERVER_ARGUMENTS = _words("""
admin_api_key allowed_hosts api_key api_keys_file batch_dir max_batch_rows
bucket_e2e_request_latency bucket_inter_token_latency bucket_time_to_first_token
cors_allow_origins decode_log_interval default_chat_template_kwargs enable_cache_report enable_metrics
enable_response_store fastapi_root_path host keep_alive_timeout log_level_http log_requests log_requests_format
log_requests_level max_body_bytes max_body_values max_concurrent_requests max_file_bytes max_files
max_files_bytes max_header_bytes max_loaded_models max_queued_requests max_request_items
max_stop_chars model_idle_timeout models no_page port read_timeout request_timeout response_store_bytes
sampling_defaults
shutdown_timeout skip_server_warmup ssl_ca_certs ssl_certfile ssl_keyfile ssl_keyfile_password
stream_response_default_include_usage watchdog_timeout write_timeout
""")
"""The fields of `mooli.server.config.ServerConfig`, which is above the engine and cannot be asked here."""

SWITCHES = _words("""
abort_on_priority_when_disabled collect_tokens_histogram constrained_json_disable_any_whitespace disable_cuda_graph
disable_overlap_schedule disable_priority_preemption enable_deterministic_inference enable_double_sparsity
enable_dp_attention enable_flexkv enable_http2 enable_lmcache enable_lora
enable_memory_saver enable_mixed_chunk enable_multimodal enable_nan_detection enable_piecewise_cuda_graph
enable_strict_thinking enable_torch_compile enable_trace is_embedding
prefill_round_robin_balance schedule_low_priority_values_first show_time_cost sleep_on_idle smg_grpc_mode
strip_thinking_cache trust_request_chat_template
""")
"""Those whose flag takes no value."""

LISTS = _words("""
cuda_graph_bs cuda_graph_bs_decode cuda_graph_bs_prefill log_requests_target lora_paths lora_target_modules
piecewise_cuda_graph_tokens
""")
"""Those whose flag takes several values."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_dp_size": (1,),
    "base_gpu_id": (0,),
    "cpu_offload_gb": (0,),
    "disable_cuda_graph": (True,),
    "disaggregation_mode": ("null",),
    "ep": (1,),
    "ep_size": (1,),
    "expert_parallel_size": (1,),
    "model_impl": ("auto",),
    "gpu_id_step": (1,),
    "model_type": ("auto", "llm"),
    "nnodes": (1,),
    "node_rank": (0,),
    "pipeline_parallel_size": (1,),
    "pp": (1,),
    "pp_size": (1,),
    "tokenizer_mode": ("auto", "fast"),
    "weight_version": ("default",),
}
"""Values that ask for what is so anyway."""


def is_sglang_argument(name: str) -> bool:
    """Whether SGLang has, or had, an argument of that name, and Mooli has not."""
    return name in HINTS or name in REFUSED


def is_server_argument(name: str) -> bool:
    """Whether Mooli's server has an argument of that name, and its engine has not."""
    return name in SERVER_ARGUMENTS


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether `name=value` leaves a feature off that Mooli does not have, so that it can be accepted as it is."""
    if value is None or value is False:
        return True
    return any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL.get(name, ()))


def unknown_argument(given: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What to say of words on a command line that its parser does not know."""
    word = next((word for word in given if word.startswith("-")), given[0])
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        return f"{flag!r} is more than this command takes; a prompt goes behind --prompt, a model behind --model"
    name = flag.lstrip("-").replace("-", "_")
    if is_server_argument(name) and flag not in parser._option_string_actions:
        return f"{flag} is a flag of `mooli serve`: remove it"
    if is_sglang_argument(name) and flag not in parser._option_string_actions:
        return f"{flag} is known to SGLang but not supported by Mooli yet: remove it"
    shown = [flag for flag, action in parser._option_string_actions.items() if action.help is not argparse.SUPPRESS]
    close = difflib.get_close_matches(flag, shown, n=1)
    return f"there is no flag {flag}" + (f"; did you mean {close[0]}?" if close else "")
