"""Parts of weights: together they are the whole, and each is read alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from model_files import QWEN_PATH
from mooli.backends.dequant import dequantize
from mooli.errors import ConfigError
from mooli.models.checkpoint import Checkpoint, DummyCheckpoint
from mooli.models.config import ModelConfig
from mooli.models.llama import LlamaConfig
from mooli.models.loader import open_model
from mooli.models.sharding import COLUMNS, ROWS, Place, check_size, cut_tensor, part_checkpoint
from mooli.tensor import BLOCK, RawTensor, TensorType, row_bytes

CONFIG = LlamaConfig(
    family="qwen2", architecture="Qwen2ForCausalLM", vocab_size=121, hidden_size=32, intermediate_size=48,
    num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, o_bias=True, mlp_bias=True,
)  # fmt: skip


def parts_of(checkpoint: Checkpoint, config: ModelConfig, name: str, size: int) -> list[RawTensor]:
    made = [part_checkpoint(config, checkpoint, Place(rank, size)) for rank in range(size)]
    tensors = [part.tensor(name) for part in made]
    assert [part.shape(name) for part in made] == [tensor.shape for tensor in tensors]
    return tensors


def joined(tensors: list[RawTensor], axis: int) -> np.ndarray:
    return np.concatenate([dequantize(tensor) for tensor in tensors], axis=axis)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", sorted(CONFIG.tensors()))
def test_the_parts_of_every_tensor_make_the_whole(name: str, size: int) -> None:
    checkpoint = DummyCheckpoint(CONFIG, seed=1)
    whole, parts = dequantize(checkpoint.tensor(name)), parts_of(checkpoint, CONFIG, name, size)
    split = CONFIG.tensors()[name].split
    if split is None:
        assert "norm" in name
        assert all(np.array_equal(dequantize(part), whole) for part in parts)
        return
    axis = split.axis
    if axis == COLUMNS and name.endswith("bias"):  # once in the sum
        assert np.array_equal(sum(dequantize(part) for part in parts), whole)
        return
    if split.rule == "shared" and size == 4:  # two ranks have the same head
        parts = parts[::2]
    together = joined(parts, axis)
    assert np.array_equal(together[: len(whole)], whole)
    assert not together[len(whole) :].any()
    assert len(together) == len(whole) or split.rule == "padded"


def test_ranks_that_share_a_key_head_have_the_query_heads_that_read_it() -> None:
    checkpoint = DummyCheckpoint(CONFIG, seed=1)
    keys = parts_of(checkpoint, CONFIG, "model.layers.0.self_attn.k_proj.weight", 4)
    assert [np.array_equal(keys[i].data, keys[j].data) for i, j in [(0, 1), (2, 3), (1, 2)]] == [True, True, False]
    assert CONFIG.part(4).num_kv_heads == 1


@pytest.mark.parametrize("kind", list(TensorType), ids=lambda kind: kind.name)
def test_stored_bytes_are_cut_as_they_are_at_blocks_and_dequantised_between_them(kind: TensorType) -> None:
    columns = 2 * max(256, BLOCK[kind][0])
    rng = np.random.default_rng(3)
    data = rng.integers(0, 60, (6, row_bytes(kind, columns)), np.uint8)  # small bytes are small numbers in every type
    scales = rng.random(6, np.float32) if kind == TensorType.I8 else None
    raw = RawTensor("w", kind, (6, columns), data, scales)
    whole = dequantize(raw)
    half = cut_tensor(raw, COLUMNS, columns // 2, columns)
    assert (half.type, np.shares_memory(half.data, data)) == (kind, True)
    copy = dataclasses.replace(half, data=np.ascontiguousarray(half.data))
    assert np.array_equal(dequantize(copy), whole[:, columns // 2 :], equal_nan=True)
    odd = cut_tensor(raw, COLUMNS, 8, 24)
    assert odd.type == (kind if BLOCK[kind][0] == 1 else TensorType.F32)
    copy = dataclasses.replace(odd, data=np.ascontiguousarray(odd.data))
    assert np.array_equal(dequantize(copy), whole[:, 8:24], equal_nan=True)
    rows = cut_tensor(raw, ROWS, 4, 8)
    assert np.array_equal(dequantize(rows)[:2], whole[4:], equal_nan=True)
    assert not dequantize(rows)[2:].any()


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "width", "possible"),
    [(3, 4, 2, 48, "1, 2, 4"), (2, 9, 3, 48, "1, 3"), (4, 12, 6, 48, "1, 2, 3, 6, 12"), (4, 4, 4, 50, "1, 2")],
)
def test_a_number_of_ranks_that_does_not_fit_is_refused_with_those_that_do(
    size: int, heads: int, kv_heads: int, width: int, possible: str
) -> None:
    config = dataclasses.replace(CONFIG, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=width)
    with pytest.raises(ConfigError, match=rf"tp_size={size} .* {heads} attention heads .* tp_size={possible}$"):
        check_size(config, size)


@pytest.mark.skipif(not Path(QWEN_PATH).is_file(), reason="the model is not there")
@pytest.mark.parametrize("module", ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_the_parts_of_a_quantised_file_make_the_whole(module: str) -> None:
    config, checkpoint = open_model(Path(QWEN_PATH))
    name = f"model.layers.0.{module}.weight"
    whole, parts = dequantize(checkpoint.tensor(name)), parts_of(checkpoint, config, name, 2)
    copies = [dataclasses.replace(part, data=np.ascontiguousarray(part.data)) for part in parts]
    axis = 1 if module in ("self_attn.o_proj", "mlp.down_proj") else 0
    assert np.array_equal(joined(copies, axis), whole)
    checkpoint.close()
