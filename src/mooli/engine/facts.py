"""What building an engine settled, as plain data that can leave the process.

Owns `EngineFacts`, how it is said in words, and what the namespace of its KV cache is made of. Never builds anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheNamespace:
    """Everything that decides the bits of a KV page, by name. Pages pass between engines of one digest alone.

    model: digest of its files. load_format, seed: of random weights; the seed is None where they come from files.
    numbers: digest of the configuration as it is used: rotations, norms and heads, overrides of arguments included.
    adapter: digest of what is merged into the weights; empty where nothing is. parts: that a model is cut in, each
    with pages of its own. page_format: `Backend.page_format`. numeric_version: `mooli.backends.base.NUMERIC_VERSION`.
    """

    model: str
    load_format: str
    seed: int | None
    numbers: str
    adapter: str = ""
    backend: str
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    page_size: int
    parts: int
    page_format: Mapping[str, str]
    numeric_version: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def digest(self) -> str:
        """32 hex digits."""
        return self.root.hex()[:32]

    @property
    def root(self) -> bytes:
        """32 bytes: what names of pages begin with (`mooli.cache.page_hash`)."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()

    @property
    def state_root(self) -> bytes:
        """32 bytes: what recurrent states are stored under, which have no part in the pages."""
        return hashlib.sha256(self.root + b"recurrent states").digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """Sizes in tokens, pages or bytes as their names say, and the device in words.

    vocab_size: ids that can be prompted and sampled. cache_namespace: the digest of what makes KV of two engines
    differ, which `cache_ingredients` has by name (`CacheNamespace`).
    speculative_algorithm: how tokens are guessed; None where they are not. num_state_slots: recurrent states that there
    is room for, running requests' and snapshots, each of state_bytes; 0 for most models.
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
    num_parameters: int = 0
    weight_bytes: int
    kv_cache_bytes: int
    num_state_slots: int = 0
    state_bytes: int = 0
    load_time_s: float
    cache_namespace: str
    speculative_algorithm: str | None
    backend: dict[str, Any]
    cache_ingredients: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def device_words(described: Mapping[str, Any]) -> str:
    """What a backend says of itself (`Backend.describe`) in a few words, such as "avx512_bf16, 2 threads"."""
    if "num_threads" not in described:
        return str(described.get("library") or described.get("device") or "device unknown")
    threads = described["num_threads"]
    return f"{described.get('isa')}, {threads} thread{'' if threads == 1 else 's'}"
