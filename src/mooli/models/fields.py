"""What a model's files say of it, typed and bounded: JSON objects and GGUF metadata.

Owns the wording of the errors for missing, mistyped and out-of-range values, and the reading of what all families have.
Knows no family. Where a key is missing, the default is the one Transformers gives that family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mooli.errors import CheckpointError, UnsupportedModelError

HF_KEYS = frozenset(
    (
        *("architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"),
        *("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "quantization_config"),
    )
)
"""What is read of every config.json."""

GGUF_KEYS = frozenset(("max_position_embeddings", "eos_token_id", "bos_token_id"))
"""What may be overridden of every GGUF file, by its Hugging Face name."""

ROPE_VECTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of a GGUF file that are part of its configuration: factors of rotary frequencies."""

_END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>")
_CONTROL_TOKEN = 3
_MAX_EOS_IDS = 1024


class Fields:
    """Typed access to a dictionary that came from a file; CheckpointError names the key and what was found."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values, self.source, self.prefix = values, source, prefix

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.optional_integer(key, default)
        if value is None:
            raise CheckpointError(f"{self.source} has no {self.prefix}{key}")
        return value

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        value = self.values.get(self.prefix + key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
            raise CheckpointError(f"{self.source}: {self.prefix}{key} must be a whole number, got {short(value)}")
        return None if value is None else int(value)

    def per_layer(self, key: str, default: int | None = None) -> int:
        """A number that GGUF may also write as one entry per layer; they must agree."""
        value = self.values.get(self.prefix + key)
        if not isinstance(value, (list, tuple, np.ndarray)):
            return self.integer(key, default)
        entries = {v if isinstance(v, (int, np.integer)) else None for v in value}
        if len(entries) != 1 or None in entries:
            raise UnsupportedModelError(f"layers with different {self.prefix}{key} are not implemented")
        return int(entries.pop())  # type: ignore[arg-type]

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(self.prefix + key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.source} has no {self.prefix}{key}")
        return number(value, f"{self.source}: {self.prefix}{key}")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(self.prefix + key)
        value = default if value is None else value
        if not isinstance(value, (bool, np.bool_)):
            raise CheckpointError(f"{self.source}: {self.prefix}{key} must be true or false, got {short(value)}")
        return bool(value)


@dataclass(frozen=True, slots=True)
class HFSource:
    """A Hugging Face folder's config.json, overrides laid over it, and its generation_config.json if there is one.

    family, architecture: of the declaration that is to read it. context: the longest sequence that there will be, in
    tokens; None: as long as the model allows.
    """

    family: str
    architecture: str
    values: Mapping[str, Any]
    generation: Mapping[str, Any]
    context: int | None = None

    @property
    def fields(self) -> Fields:
        return Fields(self.values, "config.json")

    def common(
        self, *, max_position_embeddings: int, bos_id: int | None = None, eos_id: int | None = None
    ) -> dict[str, Any]:
        """The fields of `ModelConfig`. The arguments are the family's defaults."""
        fields = self.fields
        dtype = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        return {
            "family": self.family,
            "architecture": self.architecture,
            "vocab_size": fields.integer("vocab_size"),
            "hidden_size": fields.integer("hidden_size"),
            "num_layers": fields.integer("num_hidden_layers"),
            "max_position_embeddings": fields.integer("max_position_embeddings", max_position_embeddings),
            "dtype": str(dtype).removeprefix("torch."),
            "eos_ids": self.eos_ids(eos_id),
            "bos_id": fields.optional_integer("bos_token_id", bos_id),
        }

    def eos_ids(self, default: int | None = None) -> tuple[int, ...]:
        generation = _id_list(self.generation.get("eos_token_id"), "generation_config.json")
        return _merge_ids(generation, _id_list(self.values.get("eos_token_id", default), "config.json"))


@dataclass(frozen=True, slots=True)
class GGUFSource:
    """The metadata of a GGUF file of architecture `name`, and the (rows, columns) of its tensors.

    family, architecture, context: as of a folder. vectors: the content of those of `ROPE_VECTORS` that the file has.
    dtype: of the embedding, bfloat16 where that is quantised. overrides: by Hugging Face names.
    """

    family: str
    architecture: str
    name: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]
    vectors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    dtype: str = "bfloat16"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    context: int | None = None

    @property
    def freq_factors(self) -> tuple[float, ...]:
        """What each rotary frequency is divided by; () for nothing."""
        return self.vectors.get("rope_freqs.weight", ())

    @property
    def fields(self) -> Fields:
        """The keys of this architecture, without its name before them."""
        return Fields(self.metadata, "GGUF metadata", f"{self.name}.")

    def overridden(self, values: Mapping[str, Any]) -> Fields:
        """Values by their Hugging Face names, overrides laid over them."""
        return Fields({**values, **self.overrides}, "GGUF metadata")

    def common(self) -> dict[str, Any]:
        """The fields of `ModelConfig`."""
        fields = self.fields
        embedding = self.shapes.get("token_embd.weight")
        if embedding is None or len(embedding) != 2:
            raise CheckpointError("the GGUF file has no token_embd.weight of two dimensions")
        changed = self.overridden(
            {
                "max_position_embeddings": fields.integer("context_length"),
                "eos_token_id": _gguf_eos(self.metadata),
                "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            }
        )
        return {
            "family": self.family,
            "architecture": self.architecture,
            "vocab_size": int(embedding[0]),
            "hidden_size": fields.integer("embedding_length"),
            "num_layers": fields.integer("block_count"),
            "max_position_embeddings": changed.integer("max_position_embeddings"),
            "dtype": self.dtype,
            "eos_ids": _id_list(changed.values["eos_token_id"], "GGUF metadata"),
            "bos_id": changed.optional_integer("bos_token_id"),
        }


def number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise CheckpointError(f"{what} must be a number, got {short(value)}")
    # A float32 stands for the decimal that was written, 1e-06, not for the digits of its binary form.
    result = float(str(value)) if isinstance(value, np.float32) else float(min(value, 1e300))
    if not math.isfinite(result):
        raise CheckpointError(f"{what} must be finite, got {value}")
    return result


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise CheckpointError(f"{name} is {short(value)}, which is not between {low} and {high}")


def equal_heads(hidden_size: int, num_heads: int) -> int:
    """The head_dim of a model that does not name one: its heads share the hidden size."""
    if num_heads < 1 or hidden_size % num_heads:
        raise CheckpointError(f"hidden size {hidden_size} is not a multiple of the number of heads {num_heads}")
    return hidden_size // num_heads


def _id_list(value: Any, source: str) -> tuple[int, ...]:
    entries = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if len(entries) > _MAX_EOS_IDS:  # they go to the engine with every request
        raise CheckpointError(f"{source} has {len(entries)} eos_token_id; at most {_MAX_EOS_IDS} are read")
    return tuple(Fields({"eos_token_id": entry}, source).integer("eos_token_id") for entry in entries)


def _merge_ids(*lists: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token_id for ids in lists for token_id in ids))


def _gguf_eos(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids the file names as ending, then control tokens that end a turn by their well-known text.

    GGUF has one eos where generation_config.json often lists several; without the others a chat model runs on.
    """
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ids = _id_list([value for value in named if value is not None], "GGUF metadata")
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, Sequence) or not isinstance(kinds, (list, np.ndarray)) or len(kinds) != len(tokens):
        return _merge_ids(ids)
    control = np.flatnonzero(np.asarray(kinds) == _CONTROL_TOKEN)
    return _merge_ids(ids, tuple(i for i in control.tolist() if tokens[i] in _END_OF_TURN))
