"""The weights of a model under one set of names, wherever they come from.

Owns the canonical names (Hugging Face's), the shapes a configuration demands, and the translation from each source: a
safetensors folder, a GGUF file, or random numbers. Never packs or converts a weight; the backend does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.formats.gguf import GGUFFile
from mooli.formats.safetensors import SafetensorsFolder
from mooli.models.config import ModelConfig
from mooli.tensor import RawTensor, TensorType, row_bytes


class Checkpoint(Protocol):
    """Where weights come from. Names are Hugging Face's, such as `model.layers.0.self_attn.q_proj.weight`."""

    def names(self) -> Iterable[str]: ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """(rows, columns) or (columns,) without touching the data. UnsupportedModelError for an unread type."""
        ...

    def tensor(self, name: str) -> RawTensor:
        """The stored bytes, as a view where the source allows. CheckpointError if there is no such tensor."""
        ...

    def release(self, name: str) -> None:
        """This tensor has been packed: its pages may leave memory."""
        ...

    def close(self) -> None: ...


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a model of this configuration needs, and its shape."""
    hidden, wide = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    linears = {
        "self_attn.q_proj": (queries, hidden, config.qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.o_bias),
        "mlp.gate_proj": (wide, hidden, config.mlp_bias),
        "mlp.up_proj": (wide, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, wide, config.mlp_bias),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensors(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the checkpoint has exactly the tensors the configuration needs, in their shapes.

    A tensor too many is an error as well: a bias or norm left out would change every answer without a word.
    """
    expected = expected_shapes(config)
    wrong = [f"{name} is missing" for name in expected if name not in checkpoint]
    for name in checkpoint.names():
        if name in expected:
            shape = checkpoint.shape(name)
            if shape != expected[name]:
                wrong.append(f"{name} has shape {list(shape)} instead of {list(expected[name])}")
        elif not _may_be_ignored(name):
            wrong.append(f"{name} has no place in a {config.family} model of {config.num_layers} layers")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"the weights do not fit the configuration: {'; '.join(wrong[:5])}{more}")


def _may_be_ignored(name: str) -> bool:
    # The head is stored next to a tied embedding by some tools; the others are frequencies, which the config gives.
    return name in ("lm_head.weight", "rope_freqs.weight") or name.endswith("rotary_emb.inv_freq")


class SafetensorsCheckpoint:
    """A Hugging Face folder of safetensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = SafetensorsFolder(folder)
        self._names = frozenset(self._folder.names())

    def names(self) -> Iterable[str]:
        return self._folder.names()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        info = self._folder.info(name)
        info.readable_type()
        return info.shape

    def tensor(self, name: str) -> RawTensor:
        return self._folder.tensor(name)

    def release(self, name: str) -> None:
        self._folder.release(name)

    def close(self) -> None:
        self._folder.close()


_GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.([a-z_]+)\.(weight|bias)")
_QUERY_OR_KEY = re.compile(r"\.self_attn\.([qk])_proj\.(weight|bias)$")


def canonical_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that has none is returned as it is."""
    block = _GGUF_BLOCK.fullmatch(gguf_name)
    if block and block[2] in _GGUF_BLOCK_NAMES:
        return f"model.layers.{block[1]}.{_GGUF_BLOCK_NAMES[block[2]]}.{block[3]}"
    return _GGUF_NAMES.get(gguf_name, gguf_name)


class GGUFCheckpoint:
    """An open GGUF file. Takes over the file and closes it.

    In files of architecture llama the rows of every query and key head are stored for interleaved rotation (pairs
    2i, 2i + 1); they are put back, so that all models rotate halves (pairs i, i + head_dim / 2).
    """

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        splits = file.metadata.get("split.count", 1)
        if splits not in (0, 1):
            raise UnsupportedModelError(
                f"{file.path.name} is one of {splits} parts, which are not read; join them by llama-gguf-split --merge"
            )
        self._file = file
        self._gguf_names = {canonical_name(name): name for name in file.tensors}
        self._interleaved = file.metadata.get("general.architecture") == "llama"
        self._num_heads = {"q": config.num_heads, "k": config.num_kv_heads}

    def names(self) -> Iterable[str]:
        return self._gguf_names.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._gguf_names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._gguf_name(name)].shape

    def tensor(self, name: str) -> RawTensor:
        raw = dataclasses.replace(self._file.tensor(self._gguf_name(name)), name=name)
        part = _QUERY_OR_KEY.search(name)
        if not part or not self._interleaved:
            return raw
        order = _halves_from_pairs(raw.shape[0], self._num_heads[part[1]])
        if len(raw.shape) == 2:
            return raw.take_rows(order)
        item_bytes = row_bytes(raw.type, 1)
        return dataclasses.replace(raw, data=raw.data.reshape(-1, item_bytes)[order].reshape(1, -1))

    def release(self, name: str) -> None:
        self._file.release(self._gguf_name(name))

    def close(self) -> None:
        self._file.close()

    def _gguf_name(self, name: str) -> str:
        if name not in self._gguf_names:
            raise CheckpointError(f"{self._file.path.name} has no tensor for {name}")
        return self._gguf_names[name]


def _halves_from_pairs(num_rows: int, num_heads: int) -> NDArray[np.int64]:
    """Where row t * head_dim / 2 + i of each head is found: at 2i + t. int64 (num_rows,)."""
    if num_rows % (2 * num_heads):
        raise CheckpointError(f"{num_rows} query or key rows are not {num_heads} heads of even length")
    rows: NDArray[np.int64] = np.arange(num_rows, dtype=np.int64)
    order: NDArray[np.int64] = rows.reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return order


_STORED_AS = {"float32": TensorType.F32, "float16": TensorType.F16, "bfloat16": TensorType.BF16}
_DUMMY_VALUES_AT_A_TIME = 1 << 22


class DummyCheckpoint:
    """Random weights of the right shapes in the configuration's dtype, made when asked for.

    A tensor is a function of its name and the seed. Linear weights and the embedding are uniform with standard
    deviation 1 / sqrt(columns), biases 0.02 wide, norms within 0.1 of one: activations stay near one in every layer.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._shapes = expected_shapes(config)
        self._type = _STORED_AS[config.dtype]
        self._seed = seed

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"the configuration has no tensor {name}")
        return self._shapes[name]

    def tensor(self, name: str) -> RawTensor:
        shape = self.shape(name)
        rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
        centre, half_width = 0.0, (3.0 / columns) ** 0.5
        if len(shape) == 1:
            centre, half_width = (0.0, 0.02) if name.endswith(".bias") else (1.0, 0.1)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        data = np.empty((rows, row_bytes(self._type, columns)), np.uint8)
        step = max(1, _DUMMY_VALUES_AT_A_TIME // columns)
        for start in range(0, rows, step):
            values = random.random((min(step, rows - start), columns), np.float32)
            values *= 2 * half_width
            values += centre - half_width
            data[start : start + step] = _stored(values, self._type)
        return RawTensor(name, self._type, shape, data)

    def release(self, name: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


class ShapesCheckpoint:
    """The tensors of a configuration by type and shape: their bytes are all one zero, which takes no memory."""

    def __init__(self, config: ModelConfig, types: Mapping[str, TensorType]) -> None:
        """types: by name; the others have the configuration's dtype."""
        self._shapes = expected_shapes(config)
        self._types = types
        self._type = _STORED_AS[config.dtype]

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> RawTensor:
        shape = self._shapes[name]
        kind = self._types.get(name, self._type)
        rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
        data = np.broadcast_to(np.zeros(1, np.uint8), (rows, row_bytes(kind, columns)))
        scales = np.broadcast_to(np.zeros(1, np.float32), (rows,)) if kind == TensorType.I8 else None
        return RawTensor(name, kind, shape, data, scales)

    def release(self, name: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


def _stored(values: NDArray[np.float32], kind: TensorType) -> NDArray[np.uint8]:
    """float32 (rows, columns) rounded to `kind`, as bytes (rows, row_bytes)."""
    if kind == TensorType.F32:
        return values.view(np.uint8)
    if kind == TensorType.F16:
        return values.astype(np.float16).view(np.uint8)
    bits = values.view(np.uint32)
    to_even = ((bits >> 16) & 1) + 0x7FFF
    return ((bits + to_even) >> 16).astype(np.uint16).view(np.uint8)
