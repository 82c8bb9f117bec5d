"""Safetensors files and sharded folders are read exactly, and wrong ones are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model_files import safetensors_bytes, small_safetensors
from mooli.backends.dequant import dequantize
from mooli.errors import CheckpointError, ModelError, ModelNotFoundError, UnsupportedModelError
from mooli.formats.safetensors import INDEX_NAME, SafetensorsFile, SafetensorsFolder
from mooli.tensor import TensorType


def save(folder: Path, data: bytes, name: str = "model.safetensors") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_the_safetensors_package_writes_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(5, 7).to(dtype), "b": torch.randn(3).to(dtype)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        for name, expected in tensors.items():
            raw = file.tensor(name)
            assert raw.shape == tuple(expected.shape)
            assert not raw.data.flags.owndata
            np.testing.assert_array_equal(dequantize(raw), expected.float().numpy())


def test_a_dtype_that_is_not_read_is_refused_when_used(tmp_path: Path) -> None:
    with SafetensorsFile(save(tmp_path, small_safetensors())) as file:
        assert file.tensor("model.norm.weight").type == TensorType.BF16
        with pytest.raises(UnsupportedModelError, match="ids has dtype I64"):
            file.tensor("ids")
        with pytest.raises(CheckpointError, match="no tensor other"):
            file.tensor("other")


@pytest.mark.parametrize("shape", [[], [2, 2, 2, 2], [0, 4]], ids=["scalar", "four dimensions", "no rows"])
def test_a_shape_that_is_not_read_is_refused_when_used(tmp_path: Path, shape: list[int]) -> None:
    size = 4 * int(np.prod(shape))
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    path = save(tmp_path, safetensors_bytes({"t": entry}, bytes(size)))
    with SafetensorsFile(path) as file, pytest.raises(UnsupportedModelError, match="t has shape"):
        file.tensor("t")


def entry(begin: int = 0, end: int = 16, shape: object = (2, 2), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


MALFORMED = {
    "an empty file": (b"", "is empty"),
    "seven bytes": (bytes(7), "truncated"),
    "a huge header": (safetensors_bytes(b"{}", length=(1 << 63)), "does not fit"),
    "a header longer than the file": (safetensors_bytes(b"{}", length=3), "does not fit"),
    "no JSON": (safetensors_bytes(b"{"), "not valid JSON"),
    "a list": (safetensors_bytes(b"[]"), "JSON object"),
    "bad UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "deep nesting": (safetensors_bytes(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "a number of ten thousand digits": (safetensors_bytes(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "not a number": (safetensors_bytes(b'{"a": NaN}'), "NaN is not a number"),
    "a name twice": (safetensors_bytes(b'{"a": 1, "a": 2}'), "duplicate key 'a'"),
    "a dtype twice": (safetensors_bytes(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "duplicate key 'dtype'"),
    "an entry without shape": (safetensors_bytes({"t": {"dtype": "F32", "data_offsets": [0, 16]}}), "must have"),
    "an entry with more": (safetensors_bytes({"t": {**entry(), "strides": [1]}}), "must have"),
    "metadata that is not text": (safetensors_bytes({"__metadata__": {"a": 1}}), "names to strings"),
    "a dtype that is a number": (safetensors_bytes({"t": entry(dtype=4)}), "dtype must be"),
    "a shape that is a string": (safetensors_bytes({"t": entry(shape="2, 2")}), "shape must be"),
    "a negative shape": (safetensors_bytes({"t": entry(shape=[-2, -2])}), "shape must be"),
    "a shape of booleans": (safetensors_bytes({"t": entry(shape=[True])}), "shape must be"),
    "a shape of a hundred": (safetensors_bytes({"t": entry(shape=[1] * 100)}), "shape must be"),
    "a lying shape": (safetensors_bytes({"t": entry(shape=[2, 3])}, bytes(16)), "does not take 16 bytes"),
    "an overflowing shape": (safetensors_bytes({"t": entry(shape=[1 << 59] * 3)}, bytes(16)), "does not take"),
    "offsets reversed": (safetensors_bytes({"t": entry(16, 0)}, bytes(16)), "a begin and an end"),
    "negative offsets": (safetensors_bytes({"t": entry(-16, 0)}, bytes(16)), "a begin and an end"),
    "offsets past the end": (safetensors_bytes({"t": entry()}, bytes(15)), "truncated"),
    "tensors that overlap": (safetensors_bytes({"a": entry(), "b": entry()}, bytes(16)), "overlaps"),
    "a hole": (safetensors_bytes({"a": entry(), "b": entry(20, 36)}, bytes(36)), "hole"),
    "bytes after the end": (safetensors_bytes({"a": entry()}, bytes(17)), "damaged"),
}


@pytest.mark.parametrize(("data", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_refused_and_says_why(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(save(tmp_path, data))


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    data = small_safetensors()
    for length in range(0, len(data), 5):
        with pytest.raises(ModelError):
            SafetensorsFile(save(tmp_path, data[:length]))


def sharded(folder: Path, weight_map: object) -> Path:
    save(folder, safetensors_bytes({"a": entry()}, bytes(16)), "model-1.safetensors")
    save(folder, safetensors_bytes({"b": entry()}, b"\x01" * 16), "model-2.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_sharded_folder_finds_each_tensor_in_its_shard(tmp_path: Path) -> None:
    folder = SafetensorsFolder(sharded(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"}))
    assert list(folder.names()) == ["a", "b"]
    assert folder.tensor("b").data.max() == 1
    folder.release("b")
    folder.close()


def test_shards_without_an_index_are_all_read(tmp_path: Path) -> None:
    sharded(tmp_path, {})
    (tmp_path / INDEX_NAME).unlink()
    assert sorted(SafetensorsFolder(tmp_path).names()) == ["a", "b"]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path, {})
    (tmp_path / INDEX_NAME).unlink()
    save(tmp_path, safetensors_bytes({"a": entry()}, bytes(16)), "copy.safetensors")
    with pytest.raises(CheckpointError, match=r"a is both in copy\.safetensors and in model-1"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-1.safetensors", "c": "model-3.safetensors"}, r"shard model-3\.safetensors is missing"),
        ({"a": "../model-1.safetensors"}, "not the name of a file in the folder"),
        ({"a": "/etc/passwd"}, "not the name of a file in the folder"),
        ({"a": "sub\\model-1.safetensors"}, "not the name of a file in the folder"),
        ({"a": "config.json"}, "not the name of a file in the folder"),
        ({"a": 1}, "not the name of a file in the folder"),
        ({"a": "model-2.safetensors"}, "where it is not"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(sharded(tmp_path, weight_map))


def test_a_folder_without_files_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors file"):
        SafetensorsFolder(tmp_path)


def resident_file_bytes() -> int:
    """Memory of this process that is mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file() or "RssFile" not in Path("/proc/self/status").read_text(),
    reason="only Linux tells",
)
def test_released_tensors_leave_memory_and_can_be_read_again(tmp_path: Path) -> None:
    size = 64 << 20
    shape = [size // 4096, 1024]
    path = save(tmp_path, safetensors_bytes({"t": entry(end=size, shape=shape)}, b"\x01" * size))
    with SafetensorsFile(path) as file:
        raw = file.tensor("t")
        assert raw.data.max() == 1
        touched = resident_file_bytes()
        file.release("t")
        assert resident_file_bytes() < touched - size // 2
        assert raw.data.min() == 1


def test_a_header_of_spaces_at_the_end_is_read(tmp_path: Path) -> None:
    text = json.dumps({"a": entry()}).encode() + b"   "
    path = save(tmp_path, struct.pack("<Q", len(text)) + text + bytes(16))
    with SafetensorsFile(path) as file:
        assert list(file.tensors) == ["a"]
