"""What every model says of itself: a few numbers, its tensors, what its layers keep, and a rank's part of it.

Owns the fields that engine and `plan` need of any model, and the form in which a family declares its tensors. What else
a family has is in its own subclass, beside its model. Never reads a file and never looks at weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from mooli.backends.base import CacheLayer, CacheSpec
from mooli.errors import UnsupportedModelError
from mooli.models.fields import check_range
from mooli.models.stacks import Rows, Stacked

DTYPES = ("float32", "float16", "bfloat16")

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True, slots=True)
class Split:
    """How a tensor is cut for tensor parallelism: along `axis`, between its `units` equal units, which are `what`.

    rule: "even" gives each rank as many units. "shared" gives several ranks the same one where there are fewer than
    ranks. "padded" gives each as many, zeros beyond the end. A bias is cut with the rows of its weight; where columns
    are cut, only the first rank has it, so that the sum over the ranks has it once.
    """

    axis: int
    units: int
    what: str
    rule: Literal["even", "shared", "padded"] = "even"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a model needs. Its name, in the table of `ModelConfig.tensors`, is that of the safetensors files.

    shape: (rows, columns) or (columns,). gguf: its name in a GGUF file. split: None for one that every rank has whole.
    gguf_paired_heads, hf_paired_heads: files of that kind have the rows of so many heads in pairs for interleaved
    rotation (2i, 2i + 1), which are put back, so that all models rotate halves (i, i + head_dim / 2). 0: the rows are
    as they should be. paired_rows: only so many last rows of each of these heads are, or first ones if `pairs_begin`; 0
    for all. hf_offset: safetensors files have the values less this. factor: of a vector, what the model multiplies the
    values by before all else. hf_is_log: safetensors files have the logarithm of what the values are the negative of,
    in GGUF files as in the model. hf_stacks, gguf_stacks: where else files of that kind may have it.
    """

    shape: tuple[int, ...]
    gguf: str
    split: Split | None = None
    gguf_paired_heads: int = 0
    hf_paired_heads: int = 0
    hf_offset: float = 0.0
    factor: float = 1.0
    hf_is_log: bool = False
    paired_rows: int = 0
    pairs_begin: bool = False
    hf_stacks: tuple[Stacked | Rows, ...] = ()
    gguf_stacks: tuple[Stacked | Rows, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(ABC):
    """What engine and `plan` need of any model. CheckpointError if a number is out of its bounds.

    family: its name in `mooli.models.registry`; `architecture` is the Hugging Face class name.
    dtype: what the checkpoint was saved in (quantised GGUF files: bfloat16).
    eos_ids: every id that ends a sequence, the generation config's first. They may lie outside the vocabulary.
    """

    family: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int = 2048
    dtype: str = "float32"
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def __post_init__(self) -> None:
        check_range("vocab_size", self.vocab_size, 1, 2**24)
        check_range("hidden_size", self.hidden_size, 1, 2**17)
        check_range("num_layers", self.num_layers, 1, 1024)
        check_range("max_position_embeddings", self.max_position_embeddings, 1, 2**28)
        if self.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"checkpoint dtype {self.dtype!r} is not supported; supported: {', '.join(DTYPES)}"
            )

    @abstractmethod
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor the model needs, by name; the embedding first."""

    def may_ignore(self, name: str) -> bool:
        """Whether a file may have this tensor all the same, which the model does not need."""
        return False

    @abstractmethod
    def cache_layers(self) -> tuple[CacheLayer, ...]:
        """What each layer keeps of a sequence, by `Ops.attend`'s index; of one rank, if this is its part."""

    def cache_spec(self, page_size: int, dtype: str) -> CacheSpec:
        """The same in pages of `page_size` tokens."""
        return CacheSpec(self.cache_layers(), page_size, dtype)

    @abstractmethod
    def part(self, size: int) -> ModelConfig:
        """The configuration of what one of `size` ranks computes. `mooli.models.sharding` says which sizes fit."""
