"""What is the Ascend backend's own, on the simulated device: refusals, packing, graphs, host work, overflow."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import mooli_simulate_ascend as sim
from mooli.backends import create_backend
from mooli.backends.ascend.backend import AscendBackend
from mooli.backends.ascend.bring_up import Npu, open_npu
from mooli.backends.ascend.graphs import SIZES
from mooli.backends.ascend.host_work import HostWorkCounter
from mooli.backends.ascend.paths import PAGE_SIZE, Switches
from mooli.backends.ascend.quant import FRACTAL_NZ, W8A8Linear
from mooli.backends.ascend.selftest import decode_work
from mooli.backends.ascend.selftest_model import Part, SmallModel
from mooli.backends.base import MemoryInfo
from mooli.backends.dequant import dequantize
from mooli.backends.torch.weights import FloatLinear, Int8Linear
from mooli.errors import ConfigError
from mooli.tensor import RawTensor, TensorType
from steps import LIMITS, Choice, sampling_batch, uniform_cache
from variants import simulated_npu


@pytest.fixture(autouse=True)
def _simulated() -> Iterator[None]:
    with simulated_npu():
        yield


@pytest.fixture
def npu() -> Npu:
    return open_npu()


def raw(rows: int, columns: int, scale: float = 1.0) -> RawTensor:
    values = (np.random.default_rng(0).standard_normal((rows, columns)) * scale).astype(np.float32)
    return RawTensor("t", TensorType.F32, (rows, columns), values.view(np.uint8))


# -- what is refused --


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int4"}, r"int4.*int8"),
        ({"quantization": "int8", "dtype": "float32"}, "float16 or bfloat16"),
        ({"num_threads": 2}, "num_threads=2 has no effect"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_backend("ascend", **settings)


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_pages_are_of_128_tokens(page_size: int) -> None:
    with pytest.raises(ConfigError, match=f"page_size={page_size} .*128"):
        create_backend("ascend").check_page_size(page_size)


def test_a_cache_of_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='float16'.*dtype='bfloat16'"):
        create_backend("ascend").allocate(uniform_cache(1, 1, 32, 128, "float16"), 4, LIMITS)


def test_a_pool_beyond_what_kernels_count_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most 16382 of this model: lower max_total_tokens to 2096896"):
        create_backend("ascend").allocate(uniform_cache(1, 8, 128, 128, "bfloat16"), 16383, LIMITS)


# -- where it starts --


def test_it_runs_as_many_requests_as_its_largest_graph_holds() -> None:
    assert create_backend("ascend").default_max_running_requests == SIZES[-1]


@pytest.mark.parametrize(("gib", "tokens"), [(29, 4096), (61, 8192)])
def test_a_step_is_longer_than_on_a_cpu_and_fits_the_card(
    npu: Npu, monkeypatch: pytest.MonkeyPatch, gib: int, tokens: int
) -> None:
    monkeypatch.setattr(AscendBackend, "memory", lambda self: MemoryInfo(gib * 2**30, gib * 2**30))
    backend = AscendBackend(npu, Switches())
    assert backend.default_chunked_prefill_size == tokens
    assert tokens % PAGE_SIZE == 0


# -- what it tells --


def test_everything_it_says_of_itself_says_simulated(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mooli"):
        described = create_backend("ascend", dtype="float16").describe()
    assert described["library"].startswith("SIMULATED Ascend910B3, CANN 8.2")
    assert described["simulated"] is True
    assert described["attention"] == {"prompts": ["qlens", "fia_bsh"], "decode": ["fia_decode", "paged_attention"]}
    assert described["match_granularity_tokens"] == 128
    assert "SIMULATED" in caplog.text


def test_auto_is_bfloat16() -> None:
    assert create_backend("ascend").describe()["dtype"] == "bfloat16"


# -- weights --


@pytest.mark.parametrize(("rows", "columns", "kind"), [(64, 48, FRACTAL_NZ), (40, 48, 2), (64, 40, 2)])
def test_int8_weights_lie_transposed_and_in_tiles_where_they_fit(rows: int, columns: int, kind: int) -> None:
    import torch_npu

    weight = create_backend("ascend", quantization="int8").load_linear([raw(rows, columns)])
    assert isinstance(weight, W8A8Linear)
    assert (tuple(weight.codes.shape), weight.codes.dtype) == ((columns, rows), torch.int8)
    assert torch_npu.get_npu_format(weight.codes) == kind
    assert weight.num_bytes() == rows * columns + 4 * rows


def test_the_head_stays_in_floats() -> None:
    weight = create_backend("ascend", quantization="int8").load_linear([raw(64, 32)], head=True)
    assert isinstance(weight, FloatLinear)
    assert weight.values.dtype == torch.bfloat16


def test_int8_without_its_operations_is_the_torch_backends(npu: Npu) -> None:
    backend = AscendBackend(npu, Switches({"w8a8": "differs"}), quantization="int8")
    assert isinstance(backend.load_linear([raw(64, 32)]), Int8Linear)


def int8_rows(rows: int, columns: int, seed: int = 0) -> RawTensor:
    """As a checkpoint of msmodelslim has it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (rows, columns), dtype=np.int8)
    return RawTensor("t", TensorType.I8, codes.shape, codes.view(np.uint8), rng.random(rows, np.float32))


def test_int8_of_a_checkpoint_is_kept_as_it_is() -> None:
    stacked = [int8_rows(40, 48, 1), int8_rows(24, 48, 2)]
    backend = create_backend("ascend")
    weight = backend.load_linear(stacked)
    assert isinstance(weight, W8A8Linear)
    codes = np.concatenate([tensor.data.view(np.int8) for tensor in stacked])
    np.testing.assert_array_equal(weight.codes.cpu().numpy().T, codes)
    np.testing.assert_array_equal(weight.scales.cpu(), np.concatenate([tensor.scales for tensor in stacked]))
    assert backend.describe()["weight_kinds"] == {"I8 as W8A8": 2}


def test_int8_stacked_with_floats_becomes_floats() -> None:
    weight = create_backend("ascend").load_linear([int8_rows(40, 48), raw(24, 48)])
    assert isinstance(weight, FloatLinear)


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"switches": {"w8a8": "differs"}}])
def test_int8_of_a_checkpoint_becomes_floats_where_the_product_is_not_used(npu: Npu, settings: dict[str, Any]) -> None:
    backend = AscendBackend(npu, Switches(settings.get("switches", {})), dtype=settings.get("dtype", "float16"))
    tensor = int8_rows(64, 32)
    weight = backend.load_linear([tensor])
    assert isinstance(weight, FloatLinear)
    np.testing.assert_allclose(weight.values.float().cpu(), dequantize(tensor), rtol=2**-10)


# -- graphs --

PROMPTS = [Part(list(range(length % 90 + 1)), 0, range(4 * i, 4 * i + 4)) for i, length in enumerate((3, 60, 89))]


def decode(step: int) -> list[Part]:
    return [Part([5 + step + i], len(part.ids) + step, part.pages) for i, part in enumerate(PROMPTS)]


def test_decode_steps_are_one_replay_with_the_head_in_it(npu: Npu) -> None:
    backend = AscendBackend(npu, Switches(), dtype="float16")
    model = SmallModel(backend)
    model.greedy(PROMPTS)
    for step in range(3):
        model.greedy(decode(step))
    assert backend.graphs is not None
    assert backend.graphs.num_replays == 3
    assert backend.describe()["graphs"] == "decode steps"


@pytest.mark.parametrize("off", ["fia_decode", "graphs"])
def test_without_what_graphs_need_steps_run_eagerly_to_the_same_result(npu: Npu, off: str) -> None:
    models = [
        SmallModel(AscendBackend(npu, switches, dtype="float16"))
        for switches in (Switches(), Switches({off: "differs"}))
    ]
    for model in models:
        model.logits(PROMPTS)
    for step in range(3):
        whole, eager = (model.logits(decode(step)) for model in models)
        np.testing.assert_allclose(eager, whole, atol=0.01)
    assert models[1].backend.describe()["graphs"] == "off"


def test_a_capture_that_fails_is_told_once_and_steps_go_on(
    npu: Npu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, broken = (SmallModel(AscendBackend(npu, Switches(), dtype="float16")) for _ in range(2))

    def fail() -> None:
        raise RuntimeError("AclmdlRICaptureBegin failed, error code is 207008")

    results = []
    for model in (whole, broken):
        if model is broken:
            monkeypatch.setattr(npu.api, "NPUGraph", fail)
        with caplog.at_level(logging.WARNING, logger="mooli"):
            model.logits(PROMPTS)
            results.append([model.logits(decode(step)) for step in range(3)])
    np.testing.assert_allclose(results[1], results[0], atol=0.01)
    assert caplog.text.count("207008") == 1
    assert broken.backend.describe()["graphs"] == "off"


def test_graphs_can_be_switched_off(npu: Npu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOOLI_GRAPHS", "0")
    assert AscendBackend(npu, Switches()).graphs is None


# -- what the host does --


def test_a_captured_decode_step_is_one_replay_one_upload_and_one_copy_back(npu: Npu) -> None:
    work = decode_work(npu, Switches())
    assert (work.replays, work.to_device, work.to_host) == (1, 1, 1)
    # Beside the replay: a new length for each layer's attention, and the choice of the tokens.
    assert work.by_name["npu::npu_fused_infer_attention_score"] == 2
    assert not [name for name in work.by_name if "mm" in name or "linear" in name]
    assert str(work).startswith("1 graph replay, ")


def test_the_count_is_the_simulated_devices_own(npu: Npu) -> None:
    model = SmallModel(AscendBackend(npu, Switches({"graphs": "to see every operation"}), dtype="float16"))
    model.greedy(PROMPTS)
    model.greedy(decode(0))
    sim.operations.reset()
    counter = HostWorkCounter(npu.device)
    with counter:
        model.greedy(decode(1))
    assert counter.work.to_device == sim.operations.host_to_device == 1
    assert counter.work.to_host == sim.operations.device_to_host == 1


# -- overflow --


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_that_are_no_numbers_cost_their_row_its_token_and_nobody_elses(
    npu: Npu, caplog: pytest.LogCaptureFixture, bad: float, dtype: str
) -> None:
    backend = AscendBackend(npu, Switches(), dtype=dtype)
    rows = np.zeros((3, 8), dtype=np.float32)
    rows[:, 5] = 1
    rows[1, 2] = bad
    logits = torch.from_numpy(rows).to(torch.float16).to(npu.device)
    with caplog.at_level(logging.ERROR, logger="mooli"):
        result = backend.sample(logits, sampling_batch([Choice()] * 3), 8)
    assert result.token_ids.tolist() == [5, -1, 5]
    assert f"1 requests hold NaN or infinity in {dtype}" in caplog.text
    assert ("bfloat16'" in caplog.text) == (dtype == "float16")
