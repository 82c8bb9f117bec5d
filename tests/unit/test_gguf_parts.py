"""GGUF models in several files open by the name of any part, with what is missing named."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from mooli.backends.dequant import dequantize
from mooli.errors import CheckpointError
from mooli.formats.gguf_names import first_parts, gguf_in_folder, missing_parts, part_names
from mooli.formats.gguf_parts import open_gguf
from mooli.hub import model_digest, resolve
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.llama import LlamaConfig
from mooli.models.loader import open_model, stored_types
from mooli.tensor import TensorType

CONFIG = LlamaConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
NAMES = [f"m-Q8-{part:05d}-of-00004.gguf" for part in (1, 2, 3, 4)]


def write(folder: Path, **limits: int) -> None:
    """A tiny model as the gguf package writes it, in parts where `limits` says so."""
    writer = gguf.GGUFWriter(folder / "m-Q8.gguf", "llama", **limits)
    scalars = {
        "block_count": CONFIG.num_layers,
        "context_length": 128,
        "embedding_length": CONFIG.hidden_size,
        "feed_forward_length": CONFIG.intermediate_size,
        "attention.head_count": CONFIG.num_heads,
        "attention.head_count_kv": CONFIG.num_kv_heads,
    }
    for key, value in scalars.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", CONFIG.rms_norm_eps)
    dummy = DummyCheckpoint(CONFIG)
    for name, spec in CONFIG.tensors().items():
        writer.add_tensor(spec.gguf, np.ascontiguousarray(dequantize(dummy.tensor(name))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir()
    write(folder, split_max_tensors=6)
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    return folder


@pytest.mark.parametrize("opened", [*NAMES, ""], ids=["first", "second", "third", "last", "folder"])
def test_any_part_opens_the_whole_model(parts: Path, tmp_path: Path, opened: str) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole)
    expected_config, expected = open_model(whole / "m-Q8.gguf")
    config, checkpoint = open_model(parts / opened)
    assert config == expected_config
    assert set(checkpoint.names()) == set(expected.names())
    for name in config.tensors():
        np.testing.assert_array_equal(dequantize(checkpoint.tensor(name)), dequantize(expected.tensor(name)))
        checkpoint.release(name)
    assert stored_types(parts / (opened or NAMES[0]), config) == dict.fromkeys(config.tensors(), TensorType.F32)
    checkpoint.close()
    expected.close()


def test_a_folder_of_parts_is_one_model_and_its_digest_is_that_of_all_parts(parts: Path) -> None:
    assert resolve(parts) == parts / NAMES[0]
    before = model_digest(parts / NAMES[1])
    assert before == model_digest(parts / NAMES[0])
    last = parts / NAMES[3]
    last.write_bytes(last.read_bytes() + bytes(32))
    assert model_digest(parts / NAMES[0]) != before


def test_missing_parts_are_named(parts: Path) -> None:
    (parts / NAMES[1]).unlink()
    (parts / NAMES[3]).unlink()
    assert missing_parts(parts / NAMES[2]) == [NAMES[1], NAMES[3]]
    with pytest.raises(CheckpointError, match=f"2 are missing in .*: {NAMES[1]}, {NAMES[3]}; put them beside"):
        open_model(parts / NAMES[0])


def test_a_part_under_another_name_is_refused(parts: Path) -> None:
    (parts / NAMES[0]).rename(parts / "m.gguf")
    with pytest.raises(CheckpointError, match="one of 4 parts, and its name does not say which"):
        open_model(parts / "m.gguf")


def test_parts_that_changed_their_places_are_refused(parts: Path) -> None:
    third = (parts / NAMES[2]).read_bytes()
    (parts / NAMES[2]).write_bytes((parts / NAMES[1]).read_bytes())
    (parts / NAMES[1]).write_bytes(third)
    with pytest.raises(CheckpointError, match=rf"{NAMES[1]} says that it is part 3 of 4"):
        open_gguf(parts / NAMES[0])


def test_a_part_of_another_model_is_refused(parts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write(other, split_max_tensors=7)
    assert len(list(other.iterdir())) == 3
    (parts / NAMES[1]).write_bytes((other / "m-Q8-00002-of-00003.gguf").read_bytes())
    with pytest.raises(CheckpointError, match="is part 2 of 3"):
        open_gguf(parts / NAMES[3])


def test_names_of_parts() -> None:
    assert part_names("q4/m-00002-of-00002.gguf") == ("q4/m-00001-of-00002.gguf", "q4/m-00002-of-00002.gguf")
    for alone in ("m.gguf", "m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-1-of-2.gguf", "m-00001-of-99999.gguf"):
        assert part_names(alone) == (alone,)
    assert first_parts(["a.gguf", "b-00002-of-00002.gguf", "b-00001-of-00002.gguf"]) == [
        "a.gguf",
        "b-00001-of-00002.gguf",
    ]


def test_two_models_in_parts_in_one_folder_have_to_be_told_apart(parts: Path) -> None:
    (parts / "m-Q4-00002-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files: m-Q4-00001-of-00002\.gguf, m-Q8-00001-of-00004\.gguf"):
        gguf_in_folder(parts)
