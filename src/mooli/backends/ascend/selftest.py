"""The self-test: every operation the backend would use, on this very device, against plain torch in float32.

Owns the checks and their bounds. Never decides what follows from a failure but its name: `paths.Switches` says what is
not to be used, and `selftest_record` keeps it. It has run on the simulated device only.

In this order: norm, rotation, gate, quantised and grouped product, store, each attention path at lengths around a
page's edge with and without a cached prefix, whole decode steps from a graph with changing lengths, and a prompt behind
a cached prefix against the same prompt cold. Later checks use what earlier ones left on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mooli.backends.ascend.attention import AscendAttention
from mooli.backends.ascend.backend import AscendBackend
from mooli.backends.ascend.bring_up import Npu
from mooli.backends.ascend.host_work import HostWork, HostWorkCounter
from mooli.backends.ascend.kv_pool import AscendKVPool
from mooli.backends.ascend.paths import (
    DECODE_ORDER,
    FIA_BSH,
    GRAPHS,
    GROUPED_PRODUCT,
    HALF,
    PAGE_REUSE,
    PAGE_SIZE,
    QLENS,
    RMS_NORM,
    ROTARY,
    STORE,
    SWIGLU,
    TOKEN_REUSE,
    W8A8,
    Paths,
    Switches,
    extend_order,
    fits,
    shape_name,
)
from mooli.backends.ascend.quant import load_w8a8
from mooli.backends.ascend.selftest_model import VOCAB, Part, SmallModel
from mooli.backends.ascend.step import Rows, int32
from mooli.backends.base import AttentionSpec, CacheSpec, PagedLayer
from mooli.backends.torch.dtypes import torch_dtype
from mooli.tensor import RawTensor, TensorType

logger = logging.getLogger(__name__)

BOUNDS = {"float16": 0.004, "bfloat16": 0.02}
"""Most root mean square error of a row, relative to the row's own. A single key too many in 300 is 0.06."""

MODEL_BOUND = 4
"""Times the bound for a whole model, where roundings add up."""

W8A8_BOUND = 0.03

HEAD_SIZES = (64, 128)
DECODE_LENGTHS = (1, 127, 128, 129, 300)
EXTENDS = ((0, 2), (0, 127), (0, 128), (0, 129), (0, 300), (128, 2), (128, 129), (256, 44))
"""(cached tokens, new tokens): what every path for prompts takes."""

UNALIGNED_EXTENDS = ((1, 126), (127, 2), (129, 171), (300, 5))


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check. name: what is switched off if it failed. what: how it was used. failure: "" if it agreed. error: the
    greatest row's, relative; None if there is no result to compare."""

    name: str
    what: str
    failure: str
    error: float | None


def run_selftest(npu: Npu) -> list[Outcome]:
    """Every check. One that raises has failed, with the error's first line."""
    outcomes: list[Outcome] = []
    with torch.no_grad():
        for dtype in HALF:
            for check in (_norm, _rotary, _swiglu, _w8a8, _grouped, _store):
                outcomes.append(_outcome(*check(npu, dtype)))
            outcomes += [_outcome(*check) for check in _attention_checks(npu, dtype)]
        for dtype in HALF:
            outcomes += [_outcome(*check) for check in _model_checks(npu, dtype, switches_of(outcomes))]
    return outcomes


def switches_of(outcomes: Sequence[Outcome]) -> Switches:
    """What must not be used after these."""
    return Switches({outcome.name: outcome.failure for outcome in outcomes if outcome.failure})


Check = tuple[str, str, float, Callable[[], float]]
"""(name, what, bound, error of the result)"""


def _outcome(name: str, what: str, bound: float, measure: Callable[[], float]) -> Outcome:
    try:
        error = measure()
    except Exception as exc:  # whatever an operation raises, it is not to be used
        first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        logger.debug("self-test of %s (%s)", name, what, exc_info=True)
        return Outcome(name, what, f"{what}: {first}", None)
    if not error <= bound:  # NaN too
        return Outcome(name, what, f"{what}: off by {error:.2g} of a row, at most {bound:g} is right", error)
    return Outcome(name, what, "", error)


def row_error(actual: Tensor, expected: Tensor) -> float:
    """The greatest root mean square error of a row, relative to the row's own; NaN counts."""
    actual, expected = (x.float().cpu().flatten(0, -2).double() for x in (actual, expected))
    error = (actual - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()
    worst: float = torch.where(error.isnan(), torch.inf, error).max().item()
    return worst


class _Numbers:
    """Random numbers: on the host in float32, as the device has them after rounding."""

    def __init__(self, npu: Npu, dtype: str) -> None:
        self._random = torch.Generator().manual_seed(1)
        self._npu, self.dtype = npu, torch_dtype(dtype)

    def pair(self, *shape: int) -> tuple[Tensor, Tensor]:
        """(float32 on the host, the same on the device)."""
        values = torch.randn(shape, generator=self._random).to(self.dtype)
        return values.float(), values.to(self._npu.device)


def _norm(npu: Npu, dtype: str) -> Check:
    def measure() -> float:
        numbers = _Numbers(npu, dtype)
        (x, x_there), (gain, gain_there) = numbers.pair(7, 256), numbers.pair(256)
        expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain
        return row_error(torch.ops.npu.npu_rms_norm(x_there, gain_there, 1e-6)[0], expected)

    return RMS_NORM, dtype, BOUNDS[dtype], measure


def _rotary(npu: Npu, dtype: str) -> Check:
    def measure() -> float:
        numbers = _Numbers(npu, dtype)
        x, x_there = numbers.pair(1, 5, 6, 64)
        angles = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
        angles = torch.cat([angles, angles], dim=-1)[None, :, None, :]
        cos, sin = (part.to(numbers.dtype) for part in (angles.cos(), angles.sin()))
        turned = torch.cat([-x[..., 32:], x[..., :32]], dim=-1)
        actual = torch.ops.npu.npu_rotary_mul(x_there, cos.to(npu.device), sin.to(npu.device))
        return row_error(actual, x * cos.float() + turned * sin.float())

    return ROTARY, dtype, BOUNDS[dtype], measure


def _swiglu(npu: Npu, dtype: str) -> Check:
    def measure() -> float:
        x, x_there = _Numbers(npu, dtype).pair(5, 256)
        gate, up = x.chunk(2, dim=-1)
        return row_error(torch.ops.npu.npu_swiglu(x_there, -1), torch.nn.functional.silu(gate) * up)

    return SWIGLU, dtype, BOUNDS[dtype], measure


def _w8a8(npu: Npu, dtype: str) -> Check:
    def measure() -> float:
        numbers = _Numbers(npu, dtype)
        (x, x_there), (matrix, _) = numbers.pair(5, 256), numbers.pair(96, 256)
        raw = RawTensor("self-test", TensorType.F32, (96, 256), matrix.numpy().view(np.uint8))
        return row_error(load_w8a8([raw], None, npu.device).matmul(x_there), x @ matrix.T)

    return W8A8, dtype, W8A8_BOUND, measure


def _grouped(npu: Npu, dtype: str) -> Check:
    def measure() -> float:
        numbers = _Numbers(npu, dtype)
        (x, x_there), (matrices, matrices_there) = numbers.pair(7, 64), numbers.pair(4, 64, 96)
        ends = torch.tensor([3, 3, 6, 7])  # one group has no rows
        products = torch.ops.npu.npu_grouped_matmul(
            [x_there], [matrices_there], group_list=ends.to(npu.device), split_item=2, group_type=0, group_list_type=0
        )
        expected = torch.cat([x[:3] @ matrices[0], x[3:6] @ matrices[2], x[6:] @ matrices[3]])
        return row_error(products[0], expected)

    return GROUPED_PRODUCT, dtype, BOUNDS[dtype], measure


def _store(npu: Npu, dtype: str) -> Check:
    def measure() -> float:
        pool = AscendKVPool(CacheSpec((PagedLayer(2, 64),) * 2, PAGE_SIZE, dtype), 3, npu, Switches())
        numbers = _Numbers(npu, dtype)
        (k, k_there), (v, v_there) = numbers.pair(5, 128), numbers.pair(5, 128)
        slots = torch.from_numpy(int32([0, 127, 128, 383, 200])).to(npu.device)
        pool.store(1, slots, k_there, v_there)
        read = pool.gather(1, slots)
        return max(row_error(there.flatten(1), here) for there, here in zip(read, (k, v), strict=True))

    return STORE, dtype, 0.0, measure


# -- attention --


def _attention_checks(npu: Npu, dtype: str) -> Iterator[Check]:
    release = npu.versions.release
    for head_dim in HEAD_SIZES:
        detail = shape_name(head_dim, dtype)
        for path in (*extend_order(release), *DECODE_ORDER):
            if not fits(path, _spec(head_dim), dtype, release):
                continue
            cases: tuple[tuple[int, int], ...] = EXTENDS
            if path in DECODE_ORDER:
                cases = tuple((length - 1, 1) for length in DECODE_LENGTHS)
            elif path != QLENS:
                cases = (*EXTENDS, *UNALIGNED_EXTENDS)

            measure = partial(_attention_error, npu, dtype, path, head_dim, cases)
            yield f"{path} {detail}", f"{len(cases)} rows", BOUNDS[dtype], measure


def _attention_error(npu: Npu, dtype: str, path: str, head_dim: int, cases: Sequence[tuple[int, int]]) -> float:
    """The worst of rows with (cached, new) tokens, in one batch where the path takes one."""
    spec = _spec(head_dim)
    widths = [-(-sum(case) // PAGE_SIZE) for case in cases]
    pool = AscendKVPool(CacheSpec((PagedLayer(2, head_dim),), PAGE_SIZE, dtype), sum(widths), npu, Switches())
    attention = AscendAttention(pool, Paths(npu.versions.release, Switches(), dtype), npu.device)
    numbers = _Numbers(npu, dtype)
    # Pages in no order, so that nothing is right by lying in sequence.
    free = iter(np.random.default_rng(2).permutation(sum(widths)).tolist())
    table = np.zeros((len(cases), max(widths)), dtype=np.int32)
    queries, expected = [], []
    for index, (cached, new) in enumerate(cases):
        total = cached + new
        table[index, : widths[index]] = [next(free) for _ in range(widths[index])]
        (q, q_there), (k, k_there), (v, v_there) = (
            numbers.pair(n, heads * head_dim) for n, heads in ((new, 4), (total, 2), (total, 2))
        )
        where = np.arange(total)
        slots = table[index, where // PAGE_SIZE] * PAGE_SIZE + where % PAGE_SIZE
        # In plain torch: the fused store has a check of its own.
        for cache, values in ((pool.key_rows[0], k_there), (pool.value_rows[0], v_there)):
            cache.view(-1, 2 * head_dim).index_copy_(0, torch.from_numpy(slots.astype(np.int64)).to(npu.device), values)
        queries.append(q_there)
        expected.append(_attended(q, k, v, cached, spec))
    rows = Rows(0, [new for _, new in cases], [sum(case) for case in cases], torch.from_numpy(table).to(npu.device))
    q_all = torch.cat(queries)
    if path == FIA_BSH:
        parts = [rows.part(index, index + 1) for index in range(len(cases))]
        actual = torch.cat([attention.launch(path, 0, part, q_all[part.tokens], spec) for part in parts])
    else:
        actual = attention.launch(path, 0, rows, q_all, spec)
    heads = (-1, spec.num_heads, head_dim)
    return row_error(actual.reshape(heads), torch.cat(expected).reshape(heads))


def _spec(head_dim: int) -> AttentionSpec:
    return AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=head_dim, scale=head_dim**-0.5)


def _attended(q: Tensor, k: Tensor, v: Tensor, cached: int, spec: AttentionSpec) -> Tensor:
    """Causal attention in float32 on the host, head by head."""
    shape = (-1, spec.num_kv_heads, spec.head_dim)
    k, v = (x.view(shape).repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.view(-1, spec.num_heads, spec.head_dim), k) * spec.scale
    unseen = torch.arange(len(k))[None, :] > cached + torch.arange(len(q))[:, None]
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).reshape(len(q), -1)


# -- whole steps --


def _model_checks(npu: Npu, dtype: str, switches: Switches) -> Iterator[Check]:
    bound = MODEL_BOUND * BOUNDS[dtype]
    yield GRAPHS, f"decode steps, {dtype}", bound, lambda: _graph_error(npu, dtype, switches)
    yield (
        PAGE_REUSE,
        f"a prompt behind cached pages, {dtype}",
        bound,
        lambda: _reuse_error(npu, dtype, switches, PAGE_SIZE),
    )
    if Paths(npu.versions.release, switches, dtype).match_granularity_tokens() == 1:
        what = f"a prompt behind part of a cached page, {dtype}"
        yield TOKEN_REUSE, what, bound, lambda: _reuse_error(npu, dtype, switches, 200)


def _models(npu: Npu, dtype: str, switches: Switches) -> tuple[SmallModel, SmallModel]:
    """(with graphs, without)."""
    without = Switches({**switches.off, GRAPHS: "the other half of a comparison"})
    captured, eager = AscendBackend(npu, switches, dtype=dtype), AscendBackend(npu, without, dtype=dtype)
    return SmallModel(captured), SmallModel(eager)


def _ids(seed: int, count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCAB, count).tolist()
    return ids


def _graph_error(npu: Npu, dtype: str, switches: Switches) -> float:
    """Of three rows, their lengths crossing pages' edges while they are decoded, then of two."""
    lengths = (1, 126, 299)
    prompts = [Part(_ids(length, length), 0, range(4 * i, 4 * i + 4)) for i, length in enumerate(lengths)]
    models = _models(npu, dtype, switches)
    for model in models:
        model.logits(prompts)
    worst, graphs = 0.0, models[0].backend.graphs
    for step in range(5):
        parts = [Part([7 * step + i], len(p.ids) + step, p.pages) for i, p in enumerate(prompts)]
        captured, eager = (model.logits(parts[: 3 if step < 4 else 2]) for model in models)
        worst = max(worst, _error(captured, eager))
    if graphs is not None and graphs.failure is not None:
        raise RuntimeError(graphs.failure)
    for model in models:
        model.backend.close()
    return worst


def _reuse_error(npu: Npu, dtype: str, switches: Switches, cached: int) -> float:
    """Of the logits after a prompt and after greedy tokens behind it: cold, and with `cached` tokens found."""
    prompt = _ids(3, 260)
    _, model = _models(npu, dtype, switches)
    cold, warm = list(range(3)), list(range(8, 11))
    first = model.logits([Part(prompt, 0, cold)])
    whole = cached // PAGE_SIZE
    warm[:whole] = cold[:whole]
    if cached % PAGE_SIZE:
        model.copy(cold[whole], warm[whole], cached % PAGE_SIZE)
    again = model.logits([Part(prompt[cached:], cached, warm)])
    worst = _error(again, first)
    for position in range(260, 266):
        token = int(first[0].argmax())
        first, again = (model.logits([Part([token], position, pages)]) for pages in (cold, warm))
        worst = max(worst, _error(again, first))
    model.backend.close()
    return worst


def _error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return row_error(torch.from_numpy(actual), torch.from_numpy(expected))


def decode_work(npu: Npu, switches: Switches) -> HostWork:
    """What the host does for a greedy decode step of four rows of the small model, once everything is captured."""
    backend = AscendBackend(npu, switches, dtype="bfloat16")
    model = SmallModel(backend)
    model.greedy([Part([1, 2], 0, [i]) for i in range(4)])
    model.greedy([Part([3], 2, [i]) for i in range(4)])
    before = 0 if backend.graphs is None else backend.graphs.num_replays
    counter = HostWorkCounter(npu.device)
    with counter:
        model.greedy([Part([4], 3, [i]) for i in range(4)])
    if backend.graphs is not None:
        counter.work.replays = backend.graphs.num_replays - before
    backend.close()
    return counter.work
