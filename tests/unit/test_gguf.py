"""GGUF files are read exactly, and wrong ones are refused before anything is allocated."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from model_files import (
    ARRAY,
    BOOL,
    I32,
    STRING,
    U8,
    U32,
    demo_path,
    gguf_bytes,
    pair,
    small_gguf,
    string,
    string_array,
    u32,
)
from mooli.errors import CheckpointError, ModelError, ModelNotFoundError, UnsupportedModelError
from mooli.formats.gguf import is_gguf, read_gguf
from mooli.formats.gguf_names import gguf_in_folder
from mooli.tensor import TensorType

HUGE = (1 << 63) - 1
VECTOR = np.ones(8, np.float32).tobytes()


def save(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def test_metadata_of_every_kind_is_read(tmp_path: Path) -> None:
    with read_gguf(save(tmp_path, small_gguf())) as file:
        metadata = file.metadata
    assert file.version == 3
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 1
    assert type(metadata["llama.block_count"]) is int
    assert metadata["llama.rope.freq_base"] == np.float32(1e5)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.tokens"].tolist() == ["a", "é", "龍", "", "<|im_end|>"]
    assert metadata["tokenizer.ggml.token_type"].tolist() == [1, 1, 1, 1, 3]
    assert list(metadata["nested"][0]) == ["x"]
    assert metadata["nested"][1].tolist() == [1, 2, 3]
    assert metadata["flags"].tolist() == [True, False, True]
    assert metadata["count"] == 1 << 40


def test_an_array_of_strings_is_a_sequence_that_outlives_the_file(tmp_path: Path) -> None:
    with read_gguf(save(tmp_path, small_gguf())) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
    expected = ["a", "é", "龍", "", "<|im_end|>"]
    assert list(tokens) == tokens.tolist() == tokens[:] == expected
    assert [tokens[index] for index in range(-5, 5)] == expected + expected
    assert tokens[3:0:-2] == expected[3:0:-2]
    assert "龍" in tokens
    for outside in (5, -6):
        with pytest.raises(IndexError):
            tokens[outside]


def test_tensors_are_views_with_rows_first(tmp_path: Path) -> None:
    with read_gguf(save(tmp_path, small_gguf())) as file:
        raw = file.tensor("token_embd.weight")
        assert (raw.type, raw.shape, raw.data.shape) == (TensorType.Q8_0, (5, 64), (5, 68))
        assert not raw.data.flags.owndata
        assert not raw.data.flags.writeable
        norm = file.tensor("output_norm.weight")
        assert norm.shape == (64,)
        np.testing.assert_array_equal(norm.data.view(np.float32)[0], np.ones(64))
        assert file.tensor("half").data.shape == (3, 14)


def test_a_view_outlives_the_file_and_a_release(tmp_path: Path) -> None:
    with read_gguf(save(tmp_path, small_gguf())) as file:
        raw = file.tensor("half")
        before = raw.data.copy()
        file.release("half")
    np.testing.assert_array_equal(raw.data, before)


def test_what_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    values = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    kinds = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"]
    quantised = {kind: gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]) for kind in kinds}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_array("words", ["one", "two"])
    writer.add_bool("yes", True)
    for kind, data in quantised.items():
        writer.add_tensor(kind, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with read_gguf(path) as file:
        assert file.metadata["words"][:] == ["one", "two"]
        for kind, data in quantised.items():
            raw = file.tensor(kind)
            assert (raw.type.name, raw.shape) == (kind, (3, 256))
            np.testing.assert_array_equal(raw.data.tobytes(), data.tobytes())


def test_a_real_file_reads_as_the_gguf_package_reads_it() -> None:
    path = demo_path()
    if path is None:
        pytest.skip("the demo model is not installed")
    expected = gguf.GGUFReader(path)
    with read_gguf(path) as file:
        assert list(file.tensors) == [tensor.name for tensor in expected.tensors]
        for tensor in expected.tensors:
            info = file.tensors[tensor.name]
            assert info.shape == tuple(reversed(tensor.shape.tolist()))
            assert (info.type.name, info.offset, info.num_bytes) == (
                tensor.tensor_type.name,
                tensor.data_offset,
                tensor.n_bytes,
            )
        for key in ("tokenizer.ggml.merges", "tokenizer.ggml.token_type", "tokenizer.chat_template"):
            assert np.array_equal(file.metadata[key], expected.fields[key].contents()), key
        tokens = expected.fields["tokenizer.ggml.tokens"]
        assert len(file.metadata["tokenizer.ggml.tokens"]) == len(tokens.data)
        for index in (0, 1000, len(tokens.data) - 1):
            assert file.metadata["tokenizer.ggml.tokens"][index] == tokens.contents(index)


def test_version_two_is_read(tmp_path: Path) -> None:
    data = gguf_bytes([pair("a", U32, u32(7))], version=struct.pack("<I", 2))
    with read_gguf(save(tmp_path, data)) as file:
        assert (file.version, file.metadata) == (2, {"a": 7})


def test_trailing_dimensions_of_one_are_dropped(tmp_path: Path) -> None:
    with read_gguf(save(tmp_path, gguf_bytes([], [("t", (4, 2, 1, 1), 0, 0, VECTOR)]))) as file:
        assert file.tensor("t").shape == (2, 4)


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return pair("key", ARRAY, struct.pack("<IQ", kind, count) + payload)


NESTED = struct.pack("<IQ", ARRAY, 1) * 5 + struct.pack("<IQ", U8, 0)

MALFORMED = {
    "an empty file": (b"", "is empty"),
    "another magic": (gguf_bytes(magic=b"PK\x03\x04"), "not a GGUF file"),
    "only a magic": (b"GGUF", "truncated"),
    "a huge number of tensors": (gguf_bytes(num_tensors=HUGE), "number of tensors"),
    "a huge number of pairs": (gguf_bytes(num_pairs=HUGE), "number of metadata pairs"),
    "a huge key": (gguf_bytes([struct.pack("<Q", HUGE) + b"key" * 9]), "more than"),
    "a huge string": (gguf_bytes([pair("key", STRING, struct.pack("<Q", 1 << 25))]), "truncated"),
    "a huge string array": (gguf_bytes([array(STRING, HUGE)]), "entries do not fit"),
    "a huge string in an array": (gguf_bytes([array(STRING, 1, struct.pack("<Q", HUGE))]), "truncated"),
    "a string array that ends early": (gguf_bytes([array(STRING, 2, string("a" * 8) + b"\x01")]), "ends inside"),
    "a huge number array": (gguf_bytes([array(I32, HUGE)]), "entries do not fit"),
    "a huge nested array": (gguf_bytes([array(ARRAY, HUGE)]), "entries do not fit"),
    "arrays nested too deep": (gguf_bytes([pair("key", ARRAY, NESTED)]), "nested more than"),
    "an unknown value type": (gguf_bytes([pair("key", 99, b"")]), "unknown value type 99"),
    "an array of an unknown type": (gguf_bytes([array(99, 0)]), "unknown value type 99"),
    "a truth value of two": (gguf_bytes([pair("key", BOOL, b"\x02")]), "neither 0 nor 1"),
    "a key twice": (gguf_bytes([pair("key", U32, u32(1))] * 2), "appears twice"),
    "a key in bad UTF-8": (gguf_bytes([string(b"\xff\xfe") + struct.pack("<II", U32, 1)]), "not valid UTF-8"),
    "a token in bad UTF-8": (gguf_bytes([pair("key", ARRAY, string_array(["ok", b"\xe9"]))]), "string 1"),
    "an alignment of three": (gguf_bytes([pair("general.alignment", U32, u32(3))]), "power of two"),
    "an alignment of zero": (gguf_bytes([pair("general.alignment", U32, u32(0))]), "alignment 0"),
    "an alignment that is text": (gguf_bytes([pair("general.alignment", STRING, string("8"))]), "power of two"),
    "a tensor twice": (gguf_bytes([], [("t", (8,), 0, 0, VECTOR), ("t", (8,), 0, 32, VECTOR)]), "appears twice"),
    "tensors that overlap": (gguf_bytes([], [("a", (16,), 0, 0, VECTOR * 2), ("b", (8,), 0, 32, b"")]), "overlap"),
    "a tensor past the end": (gguf_bytes([], [("t", (8,), 0, 0, VECTOR[:-1])]), "truncated"),
    "a tensor far past the end": (gguf_bytes([], [("t", (8,), 0, 1 << 62, b"")]), "does not fit"),
    "an offset off the alignment": (gguf_bytes([], [("t", (8,), 0, 4, VECTOR)]), "alignment"),
    "no dimensions": (gguf_bytes([], [("t", (), 0, 0, VECTOR)]), "0 dimensions"),
    "five dimensions": (gguf_bytes([], [("t", (1,) * 5, 0, 0, VECTOR)]), "5 dimensions"),
    "a dimension of zero": (gguf_bytes([], [("t", (0, 8), 0, 0, VECTOR)]), "has dimensions"),
    "dimensions whose product overflows": (gguf_bytes([], [("t", (1 << 34, 1 << 34), 0, 0, VECTOR)]), "does not fit"),
    "a dimension beyond reason": (gguf_bytes([], [("t", (1 << 63,), 0, 0, VECTOR)]), "has dimensions"),
    "columns that split a block": (gguf_bytes([], [("t", (40,), 8, 0, bytes(64))]), "whole blocks"),
}


@pytest.mark.parametrize(("data", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_refused_and_says_why(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_gguf(save(tmp_path, data))


UNSUPPORTED = {
    "big endian": (gguf_bytes(version=struct.pack(">I", 3)), "big-endian"),
    "version one": (gguf_bytes(version=struct.pack("<I", 1)), "version 1"),
    "version four": (gguf_bytes(version=struct.pack("<I", 4)), "version 4"),
    "a known other tensor type": (gguf_bytes([], [("blk.0.x", (256,), 16, 0, bytes(66))]), "blk.0.x has type IQ2_XXS"),
    "an unknown tensor type": (gguf_bytes([], [("blk.0.x", (256,), 77, 0, bytes(84))]), "number 77"),
    "four dimensions": (gguf_bytes([], [("t", (2, 2, 2, 2), 0, 0, VECTOR)]), "4 dimensions"),
}


@pytest.mark.parametrize(("data", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_is_not_read_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_gguf(save(tmp_path, data))


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    data = small_gguf()
    for length in [*range(0, 1200, 7), len(data) - 1]:
        with pytest.raises(ModelError):
            read_gguf(save(tmp_path, data[:length]))


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no file"):
        read_gguf(tmp_path / "none.gguf")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_gguf(tmp_path)


def test_an_unknown_tensor_name_is_refused(tmp_path: Path) -> None:
    with read_gguf(save(tmp_path, small_gguf())) as file, pytest.raises(CheckpointError, match=r"no tensor nothing"):
        file.tensor("nothing")


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF....")
    (tmp_path / "other").write_bytes(b"abc")
    assert is_gguf(tmp_path / "blob")
    assert not is_gguf(tmp_path / "other")
    assert not is_gguf(tmp_path / "none")


def test_a_folder_of_several_files_lists_them(tmp_path: Path) -> None:
    assert gguf_in_folder(tmp_path) is None
    (tmp_path / "a.gguf").touch()
    assert gguf_in_folder(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        gguf_in_folder(tmp_path)
