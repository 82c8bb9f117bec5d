"""What building an engine settled, as plain data that can leave the process.

Owns `EngineFacts` and how it is said in words. Never builds anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """Sizes in tokens, pages or bytes as their names say, and the device in words.

    vocab_size: ids that can be prompted and sampled. cache_namespace: everything that makes KV of two engines differ.
    speculative_algorithm: how tokens are guessed; None where they are not.
    """

    resolved_model_path: str
    architecture: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    model_context_length: int
    context_length: int
    dtype: str
    kv_cache_dtype: str
    quantization: str | None
    page_size: int
    num_pages: int
    max_total_num_tokens: int
    max_running_requests: int
    chunked_prefill_size: int
    weight_bytes: int
    kv_cache_bytes: int
    load_time_s: float
    cache_namespace: str
    speculative_algorithm: str | None
    backend: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def device_words(described: Mapping[str, Any]) -> str:
    """What a backend says of itself (`Backend.describe`) in a few words, such as "avx512_bf16, 2 threads"."""
    if "num_threads" not in described:
        return str(described.get("library") or described.get("device") or "device unknown")
    threads = described["num_threads"]
    return f"{described.get('isa')}, {threads} thread{'' if threads == 1 else 's'}"
