"""Two thousand damaged files: each opens with all tensors inside it, or raises a ModelError; none takes memory."""

from __future__ import annotations

import json
import random
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from model_files import small_gguf, small_safetensors
from mooli.errors import ModelError, UnsupportedModelError
from mooli.formats.gguf import GGUFFile
from mooli.formats.safetensors import SafetensorsFile

pytestmark = pytest.mark.slow

FILES_PER_CASE = 200
MAX_PEAK_BYTES = 2_000_000
HUGE = (
    0,
    1,
    0x7F,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    (1 << 64) - 32,
)

Mutation = Callable[[random.Random, bytes], bytes]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        # Most flips go to the header: the rest is numbers, in which any bit is right.
        result[rng.randrange(min(len(data), rng.choice([64, 1000, len(data)])))] ^= 1 << rng.randrange(8)
    return bytes(result)


def overwrite_lengths(rng: random.Random, data: bytes) -> bytes:
    """A number of 4 or 8 bytes, or a decimal one, becomes a huge one."""
    result = bytearray(data)
    digits = list(re.finditer(rb"\d+", data[:600]))
    if digits and data[:4] != b"GGUF" and rng.random() < 0.7:
        found = rng.choice(digits)
        result[found.start() : found.end()] = str(rng.choice(HUGE) * rng.choice([1, 1, -1])).encode()
        if rng.random() < 0.8:  # keep the header's length true, so that the number itself is what is judged
            result[:8] = struct.pack("<Q", struct.unpack("<Q", data[:8])[0] + len(result) - len(data))
        return bytes(result)
    width = rng.choice([4, 8])
    start = rng.randrange(min(1000, len(data) - width))
    result[start : start + width] = (rng.choice(HUGE) % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(result)


def swap_sections(rng: random.Random, data: bytes) -> bytes:
    cuts = sorted(rng.randrange(len(data)) for _ in range(4))
    a, b, c, d = cuts
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def lie_about_shapes(rng: random.Random, data: bytes) -> bytes:
    """Shapes, types and offsets of one tensor change; the rest of the file stays well formed."""
    if data[:4] == b"GGUF":
        entries = [b"token_embd.weight", b"output_norm.weight", b"blk.0.attn_q.weight", b"blk.0.ffn_up.weight", b"half"]
        name = rng.choice(entries)
        start = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
        result = bytearray(data)
        (num_dims,) = struct.unpack_from("<I", result, start)
        fields = [(start, "<I"), *((start + 4 + 8 * i, "<Q") for i in range(num_dims))]
        fields += [(start + 4 + 8 * num_dims, "<I"), (start + 8 + 8 * num_dims, "<Q")]
        position, code = rng.choice(fields)
        limit = 1 << 8 * struct.calcsize(code)
        struct.pack_into(code, result, position, rng.choice([*HUGE, *range(40), 64, 96, 256, 352]) % limit)
        return bytes(result)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    lies = (*HUGE, -1, 2.5, "8", None, True, [], {})
    field = rng.choice(["dtype", "shape", "data_offsets"])
    if field == "dtype":
        entry["dtype"] = rng.choice(["F32", "F16", "BF16", "F64", "BOOL", "X", "", 3])
    elif rng.random() < 0.8:
        entry[field][rng.randrange(len(entry[field]))] = rng.choice(lies)
    else:
        entry[field] = [rng.choice(lies) for _ in range(rng.randrange(40))]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def open_and_read_all(kind: type[GGUFFile | SafetensorsFile], path: Path) -> None:
    with kind(path) as file:
        size = path.stat().st_size
        for name, info in file.tensors.items():
            assert 0 <= info.offset <= info.offset + info.num_bytes <= size
            try:
                raw = file.tensor(name)
            except UnsupportedModelError:
                continue
            assert raw.data.nbytes == info.num_bytes
            assert raw.data.shape[0] == raw.num_rows
            int(raw.data.sum())
            file.release(name)


@pytest.mark.parametrize("mutate", [truncate, flip_bits, overwrite_lengths, swap_sections, lie_about_shapes])
@pytest.mark.parametrize(
    ("kind", "seed_file"),
    [(GGUFFile, small_gguf()), (SafetensorsFile, small_safetensors())],
    ids=["gguf", "safetensors"],
)
def test_a_damaged_file_opens_whole_or_raises_a_model_error(
    tmp_path: Path, kind: type[GGUFFile | SafetensorsFile], seed_file: bytes, mutate: Mutation
) -> None:
    rng = random.Random(f"{kind.__name__} {mutate.__name__}")
    path = tmp_path / "damaged"
    refused = 0
    tracemalloc.start()
    try:
        for number in range(FILES_PER_CASE):
            path.write_bytes(mutate(rng, seed_file))
            tracemalloc.reset_peak()
            try:
                open_and_read_all(kind, path)
            except ModelError as error:
                refused += 1
                assert len(str(error)) < 2000
            peak = tracemalloc.get_traced_memory()[1]
            assert peak < MAX_PEAK_BYTES, f"file {number} took {peak} bytes"
    finally:
        tracemalloc.stop()
    assert refused > FILES_PER_CASE // 10, "these mutations test nothing"
    if mutate is truncate:
        assert refused == FILES_PER_CASE


@pytest.mark.parametrize(
    ("kind", "seed_file"),
    [(GGUFFile, small_gguf()), (SafetensorsFile, small_safetensors())],
    ids=["gguf", "safetensors"],
)
def test_the_undamaged_seed_opens_whole(
    tmp_path: Path, kind: type[GGUFFile | SafetensorsFile], seed_file: bytes
) -> None:
    path = tmp_path / "whole"
    path.write_bytes(seed_file)
    open_and_read_all(kind, path)
