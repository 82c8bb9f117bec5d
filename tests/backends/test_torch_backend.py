"""What is the torch backend's own: what it refuses and tells, how it keeps weights, what it gives back."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mooli.backends import create_backend
from mooli.backends.sizes import INT8_GROUP
from mooli.backends.torch import CudaBackend, TorchBackend
from mooli.backends.torch.weights import FloatLinear, Int8Linear
from mooli.errors import BackendUnavailableError, ConfigError, OutOfMemoryError, UnsupportedModelError
from mooli.tensor import RawTensor, TensorType
from steps import LIMITS, Choice, Row, sampling_batch, step, uniform_cache


def raw(values: NDArray[Any], kind: TensorType = TensorType.F32) -> RawTensor:
    data = np.ascontiguousarray(values)
    return RawTensor("t", kind, data.shape, data.reshape(-1, data.shape[-1]).view(np.uint8))


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# -- what is refused --


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int4"}, r"int4.*int8.*'cpu'"),
        ({"dtype": "float8"}, "float8.*bfloat16"),
        ({"num_threads": 0}, "num_threads"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchBackend(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["cuda"])
def test_without_a_cuda_device_the_cuda_backend_says_so(name: str) -> None:
    with pytest.raises(BackendUnavailableError, match=r"CUDA.*device='cpu'"):
        create_backend(name)


def test_a_torch_with_cuda_but_no_device_asks_for_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    with pytest.raises(BackendUnavailableError, match="nvidia-smi"):
        CudaBackend()


def test_without_torch_installed_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mooli, mooli.backends as b\n"
        "try: b.create_backend('torch')\n"
        "except mooli.BackendUnavailableError as exc: print(exc)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install mooli[torch]" in result.stdout


def test_a_pool_that_does_not_fit_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemoryError, match=r"GiB.*lower mem_fraction_static"):
        TorchBackend().allocate(uniform_cache(80, 8, 128, 128, "float32"), 10**9, LIMITS)


def test_rows_of_half_a_block_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Q8_0 rows of 40"):
        TorchBackend().load_linear([RawTensor("t", TensorType.Q8_0, (1, 40), np.zeros((1, 68), np.uint8))])


def test_a_step_before_the_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="allocate"):
        TorchBackend().plan(step([Row([0], 0, [0])], 16))


# -- what it tells --


def test_it_says_which_weights_it_dequantised() -> None:
    backend = TorchBackend(dtype="bfloat16")
    backend.load_linear([RawTensor("t", TensorType.Q4_1, (2, 32), np.zeros((2, 20), np.uint8))])
    backend.load_embedding(raw(random(4, 32)))
    described = backend.describe()
    assert described["weight_kinds"] == {"Q4_1 dequantised to bfloat16": 1, "F32 as bfloat16": 1}
    assert described["library"] == f"torch {torch.__version__}"
    assert described["dtype"] == "bfloat16"


def test_auto_is_float32_on_a_cpu() -> None:
    assert TorchBackend().describe()["dtype"] == "float32"


def test_a_number_of_threads_is_set() -> None:
    before = torch.get_num_threads()
    try:
        backend = TorchBackend(num_threads=before + 1)
        assert backend.describe()["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


# -- weights --


@pytest.mark.parametrize("kind", [TensorType.F32, TensorType.F16, TensorType.BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_floats_are_loaded_from_read_only_files_to_the_type_asked_for(kind: TensorType, dtype: str) -> None:
    stored = torch.from_numpy(random(5, 8))
    if kind != TensorType.F32:
        stored = stored.to(torch.float16 if kind == TensorType.F16 else torch.bfloat16)
    data = stored.view(torch.uint8).numpy().copy()
    data.flags.writeable = False
    weight = TorchBackend(dtype=dtype).load_linear([RawTensor("t", kind, (5, 8), data)])
    assert isinstance(weight, FloatLinear)
    assert torch.equal(weight.values, stored.to(getattr(torch, dtype)))


def test_a_large_matrix_is_loaded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, values = random(37, 32), raw(random(37, 32))
    monkeypatch.setattr("mooli.backends.torch.weights.VALUES_AT_A_TIME", 100)
    weight = TorchBackend().load_linear([values, values])
    assert isinstance(weight, FloatLinear)
    np.testing.assert_array_equal(weight.values.numpy(), np.concatenate([whole, whole]))


def test_a_tied_head_shares_the_embedding() -> None:
    backend, table = TorchBackend(dtype="bfloat16"), raw(random(20, 32))
    embedding = backend.load_embedding(table)
    before = backend.weight_bytes()
    head = backend.load_linear([table], head=True)
    assert isinstance(head, FloatLinear)
    assert head.values.data_ptr() == embedding.data_ptr()
    assert backend.weight_bytes() == before


def test_a_head_of_its_own_is_not_the_embedding() -> None:
    backend, other = TorchBackend(), random(20, 32)
    other[-1, -1] += 1
    backend.load_embedding(raw(random(20, 32)))
    head = backend.load_linear([raw(other)], head=True)
    assert isinstance(head, FloatLinear)
    np.testing.assert_array_equal(head.values.numpy(), other)


@pytest.mark.parametrize("columns", [32, 96, 50, 7], ids=lambda columns: f"{columns}-columns")
def test_int8_weights_are_within_half_a_step_of_their_group(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr("mooli.backends.torch.weights.VALUES_AT_A_TIME", 128)
    values = random(45, columns)
    values[3] = 0
    weight = TorchBackend(quantization="int8").load_linear([raw(values[:20]), raw(values[20:])])
    assert isinstance(weight, Int8Linear)
    actual = weight.expand(0, 45, torch.float32).numpy()
    for begin in range(0, columns, INT8_GROUP):
        group = slice(begin, begin + INT8_GROUP)
        half_step = np.abs(values[:, group]).max(axis=1, keepdims=True) / 127 / 2
        assert (np.abs(actual[:, group] - values[:, group]) <= half_step * 1.001).all()
    x = torch.from_numpy(random(3, columns))
    np.testing.assert_allclose(weight.matmul(x).numpy(), x.numpy() @ actual.T, rtol=1e-4, atol=1e-4)


def test_int8_weights_take_about_a_quarter_of_float32() -> None:
    small, large = TorchBackend(quantization="int8"), TorchBackend()
    for backend in (small, large):
        backend.load_linear([raw(random(64, 256))])
    assert small.weight_bytes() == large.weight_bytes() * (1 + 4 / INT8_GROUP) / 4


# -- what goes over the bus --


@pytest.mark.parametrize("num_top", [-1, 3])
def test_a_greedy_step_is_read_back_once(monkeypatch: pytest.MonkeyPatch, num_top: int) -> None:
    copies: list[int] = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.numel()) or original(self))
    backend = TorchBackend()
    result = backend.sample(torch.from_numpy(random(4, 50)), sampling_batch([Choice(num_top=num_top)] * 4), 50)
    assert len(copies) == 1
    np.testing.assert_array_equal(result.token_ids, random(4, 50).argmax(axis=1))


# -- what it gives back --


def test_closing_gives_the_pool_back() -> None:
    backend = TorchBackend()
    backend.allocate(uniform_cache(1, 1, 8, 16, "float32"), 4, LIMITS)
    assert backend.pool is not None
    pool = weakref.ref(next(iter(backend.pool.stacks.values())))
    backend.close()
    gc.collect()
    assert pool() is None
    backend.close()
