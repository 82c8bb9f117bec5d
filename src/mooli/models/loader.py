"""From a path to a configuration and the weights that go with it.

Owns the choice of format and the order of checks: configuration first, then names and shapes, before a single weight is
read. Never packs weights and never looks for a model by name; `mooli.hub` does that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooli.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from mooli.formats.files import read_json
from mooli.formats.gguf import GGUFFile, is_gguf
from mooli.formats.gguf_names import gguf_in_folder
from mooli.formats.gguf_parts import GGUFParts, open_gguf
from mooli.formats.safetensors import SafetensorsFolder
from mooli.models.checkpoint import (
    Checkpoint,
    DummyCheckpoint,
    GGUFCheckpoint,
    SafetensorsCheckpoint,
    TensorFolder,
    check_tensors,
    gguf_places,
)
from mooli.models.config import ModelConfig
from mooli.models.fields import ROPE_VECTORS
from mooli.models.modelslim import ModelslimCheckpoint, described_types, find_description
from mooli.models.quantized.folder import KEYS as QUANTIZATION_KEYS
from mooli.models.quantized.folder import QuantizedFolder, take_format
from mooli.models.quantized.weights import WeightFormat
from mooli.models.registry import merge_hf_overrides, read_gguf_config, read_hf_config
from mooli.tensor import TensorType

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")

_MAX_CONFIG_BYTES = 1 << 24
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_DTYPES = {TensorType.F32: "float32", TensorType.F16: "float16", TensorType.BF16: "bfloat16"}


def open_model(
    path: Path,
    *,
    load_format: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    context: int | None = None,
) -> tuple[ModelConfig, Checkpoint]:
    """Configuration and checkpoint of the model at `path`: a Hugging Face folder or a GGUF file.

    load_format: auto takes safetensors, then GGUF; dummy needs only the configuration and makes random weights from
    `seed`. overrides: Hugging Face names laid over the configuration. context: the longest sequence that there will be,
    in tokens, by which some models rotate; None: as long as the model allows. The caller closes the checkpoint.
    Raises ConfigError for a load format or override that is not there, and any ModelError; names and shapes of all
    tensors are checked.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format is {load_format!r}; possible are {', '.join(LOAD_FORMATS)}")
    gguf = _gguf_path(path, load_format)
    if gguf is not None:
        return _open_gguf(gguf, load_format, overrides, seed, context)
    return _open_folder(path, load_format, overrides, seed, context)


def _gguf_path(path: Path, load_format: str) -> Path | None:
    """The GGUF file to read, or None for a Hugging Face folder."""
    if path.is_dir():
        if load_format == "safetensors":
            return None
        has_config = (path / "config.json").is_file()
        has_other = load_format == "dummy" or any(path.glob("*.safetensors"))
        if load_format != "gguf" and has_config and has_other:
            return None
        found = gguf_in_folder(path)
        if found is None and load_format == "gguf":
            raise ModelNotFoundError(f"there is no .gguf file in {path}")
        return found
    if not path.is_file():
        raise ModelNotFoundError(f"there is no model at {path}")
    if path.suffix in _PICKLE_SUFFIXES and not is_gguf(path):
        raise _pickle_error(path.name)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path.name} is one file of a model; give the folder, which has config.json too")
    if load_format == "safetensors":
        raise ConfigError(
            f"load_format is 'safetensors' and {path.name} is a file; give a folder or another load_format"
        )
    return path


def _open_gguf(
    path: Path, load_format: str, overrides: Mapping[str, Any] | None, seed: int, context: int | None
) -> tuple[ModelConfig, Checkpoint]:
    file = open_gguf(path)
    try:
        shapes = {name: info.shape for name, info in file.tensors.items()}
        embedding = file.tensors.get("token_embd.weight")
        dtype = _DTYPES.get(embedding.type, "bfloat16") if embedding else "bfloat16"
        config = read_gguf_config(
            file.metadata, shapes, vectors=_rope_vectors(file), dtype=dtype, overrides=overrides, context=context
        )
        if load_format == "dummy":
            file.close()
            return config, DummyCheckpoint(config, seed)
        checkpoint = GGUFCheckpoint(file, config)
        check_tensors(config, checkpoint)
    except BaseException:
        file.close()
        raise
    return config, checkpoint


def _rope_vectors(file: GGUFFile | GGUFParts) -> dict[str, tuple[float, ...]]:
    vectors = {}
    for name in ROPE_VECTORS:
        if name not in file.tensors:
            continue
        raw = file.tensor(name)
        if raw.type != TensorType.F32 or len(raw.shape) != 1 or raw.num_columns > 512:
            raise CheckpointError(f"{name} is {raw.type.name} of shape {list(raw.shape)}, not a short F32 vector")
        vectors[name] = tuple(raw.data.view("<f4")[0].tolist())
    return vectors


def _open_folder(
    path: Path, load_format: str, overrides: Mapping[str, Any] | None, seed: int, context: int | None
) -> tuple[ModelConfig, Checkpoint]:
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"{path} has neither config.json nor a .gguf file: it is not a model folder")
    raw = merge_hf_overrides(read_json(path / "config.json", _MAX_CONFIG_BYTES), overrides)
    description = find_description(path)
    if description is not None:
        # The description says it tensor by tensor; some versions of the tool repeat it here.
        for key in QUANTIZATION_KEYS:
            raw.pop(key, None)
    weight_format = take_format(raw)
    generation_path = path / "generation_config.json"
    # An override of the ending ids must win over the generation config, not be joined with it.
    overridden = "eos_token_id" in (overrides or {})
    generation = read_json(generation_path, _MAX_CONFIG_BYTES) if generation_path.is_file() and not overridden else None
    config = read_hf_config(raw, generation, context=context)
    if load_format == "dummy":
        return config, DummyCheckpoint(config, seed)
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise _pickle_error(pickles[0])
        raise ModelNotFoundError(f"{path} has config.json but no .safetensors file; download the weights too")
    checkpoint = (
        SafetensorsCheckpoint(_tensor_folder(path, config, weight_format), config.tensors())
        if description is None
        else ModelslimCheckpoint(path, description, config.tensors())
    )
    try:
        embedding = next(iter(config.tensors()))
        if not (raw.get("dtype") or raw.get("torch_dtype")) and embedding in checkpoint:
            config = dataclasses.replace(config, dtype=_DTYPES[checkpoint.tensor(embedding).type])
        check_tensors(config, checkpoint)
    except BaseException:
        checkpoint.close()
        raise
    return config, checkpoint


def _tensor_folder(path: Path, config: ModelConfig, weight_format: WeightFormat | None) -> TensorFolder:
    folder = SafetensorsFolder(path)
    return folder if weight_format is None else QuantizedFolder(folder, weight_format, config.tensors())


def stored_types(path: Path, config: ModelConfig) -> dict[str, TensorType] | None:
    """Types by the model's names, as they are stored at `path` or read from it: all tensors of a GGUF file, the
    quantised ones of a folder; None for a folder without such. Raises any ModelError."""
    if path.is_dir():
        description = find_description(path)
        if description is not None:
            return described_types(description)
        weight_format = take_format(read_json(path / "config.json", _MAX_CONFIG_BYTES))
        return None if weight_format is None else _expected_types(config, weight_format)
    with open_gguf(path) as file:
        places = gguf_places(config.tensors(), file.tensors)
        return {name: file.tensors[file_name].type for name, file_name in places.files.items()}


def _expected_types(config: ModelConfig, weight_format: WeightFormat) -> dict[str, TensorType]:
    """Of all matrices but the embedding, which comes first."""
    _, *others = config.tensors().items()
    return {
        name: kind
        for name, spec in others
        if len(spec.shape) == 2
        and (kind := weight_format.expected(name.removesuffix(".weight"), spec.shape[1])) is not None
    }


def _pickle_error(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is a pickle file, which can run code when read and is not supported; convert the model with"
        " `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)` of Transformers, which writes"
        " safetensors, or use a model that has them"
    )
