"""Which class runs which model family.

Owns the table and nothing else. Families that differ only in numbers and switches of the configuration share a class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from mooli.backends.base import Array, Backend
from mooli.errors import UnsupportedModelError
from mooli.models.checkpoint import Checkpoint
from mooli.models.config import ModelConfig
from mooli.models.llama import LlamaModel


class Model(Protocol):
    """A model with its weights packed, written against a backend's operations."""

    config: ModelConfig

    def forward(self, batch: Any) -> Array:
        """The hidden states (T, H) of a planned step."""
        ...

    def logits(self, hidden: Array) -> Array:
        """The logits (S, vocab_size) of rows of hidden states."""
        ...


MODELS: dict[str, type[LlamaModel]] = {
    "llama": LlamaModel,
    "mistral": LlamaModel,
    "qwen2": LlamaModel,
    "qwen3": LlamaModel,
}
"""Family, as `ModelConfig.family` names it, to class."""


def create_model(
    config: ModelConfig,
    checkpoint: Checkpoint,
    backend: Backend,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model of `config.family`, its weights packed. `progress(done, total)` is called as parts are done.

    Raises UnsupportedModelError for a family that is not implemented.
    """
    model_class = MODELS.get(config.family)
    if model_class is None:
        raise UnsupportedModelError(
            f"model family {config.family!r} is not implemented; implemented: {', '.join(MODELS)}"
        )
    return model_class(config, checkpoint, backend, progress)
