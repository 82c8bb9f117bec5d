"""What a module in this folder declares to make a family of models known.

Owns the form. Never knows a family: `registry.py` has the list, and nothing else names one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mooli.backends.base import Array, Ops
from mooli.models.config import ModelConfig
from mooli.models.decoder import Decoder
from mooli.models.fields import GGUFSource, HFSource
from mooli.models.packer import Packer


class Model(Protocol):
    """A model with its weights packed, written against a backend's operations. T tokens in a step, H hidden size."""

    @property
    def config(self) -> ModelConfig: ...

    def forward(self, batch: Any) -> Array:
        """The hidden states (T, H) of a planned step, of asked tokens. Stores what the layers keep of all."""
        ...

    def logits(self, batch: Any, hidden: Array) -> Array:
        """The logits (S, vocab_size) of rows of hidden states (S, H), as `forward` returned them, and their batch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family: what files call it, how they are read, and its model.

    name: the `model_type` of its config.json. architectures: its Hugging Face class names; the first is its own.
    gguf: `general.architecture` of its GGUF files; () where none are read, and `read_gguf` is then None. gguf_with: a
    number that such a file has besides, where another family has the same architecture without it.
    hf_keys: what `read_hf` reads of a config.json besides `fields.HF_KEYS`. gguf_keys: what may be overridden of a GGUF
    file besides `fields.GGUF_KEYS`, by its Hugging Face name. Overriding another key is an error.
    read_hf, read_gguf: raise UnsupportedModelError for a feature that is not implemented, CheckpointError for a value
    that cannot be.
    model: of a configuration (one rank's part, perhaps), with its weights taken from the packer in the order of use.
    Nearly all families are a `Decoder` of their own configuration.
    """

    name: str
    architectures: tuple[str, ...]
    hf_keys: frozenset[str]
    read_hf: Callable[[HFSource], ModelConfig]
    model: Callable[[Any, Ops, Packer], Model] = Decoder
    gguf: tuple[str, ...] = ()
    gguf_with: str | None = None
    gguf_keys: frozenset[str] = frozenset()
    read_gguf: Callable[[GGUFSource], ModelConfig] | None = None
