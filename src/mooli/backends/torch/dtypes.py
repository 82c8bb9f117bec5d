"""Names of types, as configurations spell them, and what PyTorch calls them.

Owns the table. Never chooses a type.
"""

from __future__ import annotations

import torch

from mooli.errors import ConfigError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def torch_dtype(name: str) -> torch.dtype:
    """Raises ConfigError for a name that is no floating type of ours."""
    if name not in DTYPES:
        raise ConfigError(f"unknown type {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]
