"""The backend seam: the small set of operations models are written in, and what else a device must provide.

Owns protocols and the plain specifications they take. Never computes. An `Array` is opaque to models: a tape register
on the CPU backend, a `torch.Tensor` on torch backends, a NumPy array in the reference. `reference` (NumPy, float32) is
the meaning of every operation; the others are tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mooli.backends.latent import LatentLayer, LatentSpec, refuse_int8
from mooli.backends.routing import RouteSpec
from mooli.batch import PageCopy, SamplingBatch, ScheduleBatch, StateCopy
from mooli.errors import ConfigError
from mooli.tensor import RawTensor

NUMERIC_VERSION = 2
"""Raised by whoever changes a bit of what a model leaves in a KV page, on any backend: operations, packing, layouts,
models. Pages of another version are never used. `tests/backends/test_numeric_version.py` notices most changes."""

Array = Any
"""Opaque to models. Activations have shape (tokens, features)."""

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
"""Of a gated linear. gelu_tanh: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), arXiv 1606.08415.
clamped_swiglu, of gpt-oss: with g = min(gate, 7) and u = the up projection between -7 and 7, the product is
g * sigmoid(1.702 * g) * (u + 1)."""

Weight = Any
"""What a backend's `load_*` returned; handed back to its operations unopened."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding, rotate-half convention: pairs (i, i + head_dim / 2).

    inv_freq: float64, radians per position, scaling (Llama 3, linear) already applied. There are head_dim / 2, or n
    fewer: then only the first 2 n values of a head are rotated, as a head of that length. factor: what cosines and
    sines are multiplied by, before they are rounded. growth, period: whole queries at position p are multiplied by
    `temperatures`, where growth is not 0 (Ministral 3 and Llama 4).
    Source: Su et al., RoFormer, arXiv 2104.09864; the factor: YaRN, arXiv 2309.00071.
    """

    inv_freq: NDArray[np.float64]
    factor: float = 1.0
    growth: float = 0.0
    period: int = 1

    @property
    def name(self) -> tuple[bytes, float]:
        """The same for rotations that are the same: tables are kept by it."""
        return self.inv_freq.tobytes(), self.factor

    def temperatures(self, positions: NDArray[Any]) -> NDArray[np.float64]:
        """1 + growth * ln(1 + floor(p / period)) of each position."""
        found: NDArray[np.float64] = 1.0 + self.growth * np.log1p(positions // self.period)
        return found


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention over the paged KV pool; query head h reads kv head h // (num_heads / num_kv_heads).

    A packed qkv row is [num_heads | num_kv_heads | num_kv_heads] * head_dim. `window` > 0: a token attends to the
    last `window` positions, itself included; 0 means all. `softcap` > 0: a score s, scaled, becomes softcap * tanh(s /
    softcap) before it is masked (Gemma 2, arXiv 2408.00118). Layers may differ in all of it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class DeltaSpec:
    """A recurrence with a matrix (key_dim, value_dim) of state for each head of values: `delta_rule`, which corrects
    what it knows, or `scan`, which adds to it.

    A packed row is [queries | keys | values] of num_key_heads * key_dim twice, and of values. key_heads: for each head
    of values, which head of queries and keys it goes with. Source: Gated DeltaNet, arXiv 2412.06464.
    """

    num_key_heads: int
    key_dim: int
    value_dim: int
    key_heads: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        """Of values."""
        return len(self.key_heads)

    @property
    def row_width(self) -> int:
        return 2 * self.num_key_heads * self.key_dim + self.num_heads * self.value_dim


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """Keeps keys and values of every token, in pages. `window` > 0: nothing that is attended there looks back on more
    than the last `window` positions, so that pages further back are read by nobody; 0: on all."""

    num_kv_heads: int
    head_dim: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class StateLayer:
    """Keeps float32 arrays for each sequence, and nothing of its tokens: a recurrence.

    conv: (columns, channels), the last inputs of a causal convolution of one column more. delta: (heads, key_dim,
    value_dim) of `DeltaSpec`; None where there is only a convolution.
    """

    conv: tuple[int, int]
    delta: tuple[int, int, int] | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.conv,) if self.delta is None else (self.conv, self.delta)

    @property
    def num_values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


CacheLayer = PagedLayer | LatentLayer | StateLayer


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What is kept of sequences: one entry of `layers` for each place that operations name by its index.

    `dtype`, of what is in pages, is one of float32, float16, bfloat16; int8 where the backend has it: a scale for each
    token and kv head of keys and of values, symmetric, ties to even. Keys are turned first by a Hadamard matrix, in
    blocks of the largest power of two that divides head_dim. Not finite in, NaN out.
    """

    layers: tuple[CacheLayer, ...]
    page_size: int
    dtype: str

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of each layer its number among those in its memory, from 0: pages have one, and states."""
        counts = {True: 0, False: 0}
        numbers = []
        for layer in self.layers:
            has_state = isinstance(layer, StateLayer)
            numbers.append(counts[has_state])
            counts[has_state] += 1
        return tuple(numbers)

    @property
    def state_layers(self) -> tuple[StateLayer, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, StateLayer))

    @property
    def state_bytes(self) -> int:
        """Of one slot, on every backend: what all layers keep of one sequence besides pages. 0 for most models."""
        return 4 * sum(layer.num_values for layer in self.state_layers)

    def paged_layers(self) -> tuple[PagedLayer | LatentLayer, ...]:
        """The layers of which pages are made.

        Raises ConfigError if there are none, UnsupportedModelError for a type that no backend keeps their kind in.
        """
        paged = tuple(layer for layer in self.layers if not isinstance(layer, StateLayer))
        if not paged:
            raise ConfigError("a cache without layers: declare one for each attention of the model")
        refuse_int8(paged, self.dtype)
        return paged


def check_attention(layers: Sequence[CacheLayer], layer: int, spec: AttentionSpec) -> None:
    """Raise ConfigError if layer `layer` does not keep what `spec` attends to."""
    if not 0 <= layer < len(layers):
        raise ConfigError(f"attention in layer {layer} of a KV pool of {len(layers)} layers: declare it")
    kept = layers[layer]
    if not isinstance(kept, PagedLayer):
        raise ConfigError(f"attention in layer {layer}, which keeps {kept}: declare it to keep keys and values")
    if (spec.num_kv_heads, spec.head_dim) != (kept.num_kv_heads, kept.head_dim):
        raise ConfigError(
            f"attention with {spec.num_kv_heads} kv heads of {spec.head_dim} in layer {layer}, which keeps "
            f"{kept.num_kv_heads} kv heads of {kept.head_dim}"
        )
    if kept.window and not 0 < spec.window <= kept.window:
        looks = f"the last {spec.window}" if spec.window else "all"
        raise ConfigError(
            f"attention to {looks} positions in layer {layer}, which keeps the last {kept.window}: declare no window"
        )


def check_conv(layers: Sequence[CacheLayer], layer: int, num_columns: int, num_channels: int) -> None:
    """Raise ConfigError if layer `layer` does not keep what a convolution of so many columns needs."""
    kept = layers[layer] if 0 <= layer < len(layers) else None
    if not isinstance(kept, StateLayer) or kept.conv != (num_columns - 1, num_channels):
        raise ConfigError(
            f"a convolution of {num_columns} columns and {num_channels} channels in layer {layer}, which keeps {kept}"
        )


def check_delta(layers: Sequence[CacheLayer], layer: int, spec: DeltaSpec) -> None:
    """Raise ConfigError if layer `layer` does not keep the state of `spec`."""
    kept = layers[layer] if 0 <= layer < len(layers) else None
    if not isinstance(kept, StateLayer) or kept.delta != (spec.num_heads, spec.key_dim, spec.value_dim):
        raise ConfigError(f"{spec} in layer {layer}, which keeps {kept}")


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Memory of the device, in bytes, with any cgroup limit respected.

    claimed_bytes: that other engines will still take; not among the available ones.
    """

    total_bytes: int
    available_bytes: int
    claimed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest step a runner will ever be given; backends size their buffers by it. num_states: slots of recurrent
    states, in all."""

    max_tokens: int
    max_rows: int
    max_pages_per_row: int
    num_states: int = 0


class Ops(Protocol):
    """The operations models are written in. `batch` is opaque and passed through.

    It says which row of the step each row of x belongs to: what depends on that takes it, the others cannot.
    Shapes: T tokens in the step, H hidden size, x (T, H).
    """

    def embed(self, batch: Any, table: Weight, scale: float = 1.0) -> Array:
        """Rows of `table` (vocab, H) at the step's token ids, times `scale`: (T, H)."""
        ...

    def rms_norm(self, x: Array, weight: Weight, eps: float, residual: Array | None = None) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight (+ residual), over the last axis."""
        ...

    def linear(self, batch: Any, x: Array, weight: Weight, residual: Array | None = None) -> Array:
        """x @ weight.T + bias (+ residual). The weight knows its packing and its bias."""
        ...

    def gated_linear(self, batch: Any, x: Array, weight: Weight) -> Array:
        """activation(x @ gate.T) * (x @ up.T) for a weight of `load_gated`. One op: the wide product stays in cache."""
        ...

    def head_norm(self, qkv: Array, spec: AttentionSpec, q_weight: Weight, k_weight: Weight, eps: float) -> Array:
        """RMS norm of every query and key head on its own (Qwen3). Values pass through."""
        ...

    def projection_norm(self, qkv: Array, spec: AttentionSpec, q_weight: Weight, k_weight: Weight, eps: float) -> Array:
        """RMS norm of the queries of all heads together, and of the keys of all (OLMo 2). Values pass through."""
        ...

    def rope(self, batch: Any, qkv: Array, spec: AttentionSpec, rope: RopeSpec) -> Array:
        """Rotate query and key heads by `ScheduleBatch.rope_positions`. Values pass through."""
        ...

    def attend(self, batch: Any, layer: int, qkv: Array, spec: AttentionSpec, sinks: Weight | None = None) -> Array:
        """Store k and v in the step's slots, then causal attention over each row's pages: (T, num_heads * head_dim).

        layer: index into `CacheSpec.layers`. See `check_attention`. sinks: a vector (num_heads,), for each query head a
        score, not scaled, of something that every token sees before all keys and whose value is zero. Sources: arXiv
        2309.17453; gpt-oss model card, arXiv 2508.10925.
        """
        ...

    def attend_latent(
        self,
        batch: Any,
        layer: int,
        q: Array,
        latent: Array,
        norm: Weight,
        eps: float,
        up: Weight,
        rope: RopeSpec,
        spec: LatentSpec,
    ) -> Array:
        """Multi-head latent attention: queries (T, spec.query_width) and latents (T, rank + rope_dim) to
        (T, num_heads * value_dim).

        A latent row is [c | k_r], a query row of each head [q_n | q_r]. k_r and q_r are rotated as in `rope`, c becomes
        its RMS norm with the gain `norm`; [c | k_r] is kept in the layer's pages. With U and V of a head, of
        `load_latent`: the key of a token is [U c | k_r], its value V c, and attention is causal. Exact backends compute
        (U^T q_n) c + q_r k_r for the scores and V (sum of weights times c), for every row of every step; others may
        compute prompts from keys and values.
        """
        ...

    def short_conv(self, batch: Any, layer: int, x: Array, weight: Weight) -> Array:
        """c * conv(b * u) of rows [b | c | u]: (T, 3 C) to (T, C), with a weight of `load_conv`.

        A causal convolution of each channel over the tokens of its row, those before the step included: of them the
        layer's state has the last inputs, which it goes on from and leaves as `ScheduleBatch.state_slots` says. Token
        by token, so that no bit depends on how a prompt is cut. Source: LFM2 technical report, arXiv 2511.23404.
        """
        ...

    def causal_conv(self, batch: Any, layer: int, x: Array, weight: Weight) -> Array:
        """silu(conv(x)): (T, C) to (T, C), otherwise like `short_conv`."""
        ...

    def delta_rule(self, batch: Any, layer: int, qkv: Array, gates: Array, weight: Weight, spec: DeltaSpec) -> Array:
        """The gated delta rule: packed rows (T, spec.row_width) to (T, num_heads * value_dim).

        gates: (T, 2 * num_heads), b and a. weight: of `load_delta`. Queries and keys are divided by their lengths,
        sqrt(sum of squares + 1e-6), and queries by sqrt(key_dim). With beta = sigmoid(b) and g = decay * softplus(a +
        dt_bias): S <- e^g S; S <- S + k (beta (v - S^T k))^T; the output is S^T q. S is the layer's state, as in
        `short_conv`. Exact backends go token by token; others may take chunks of a prompt at once.
        """
        ...

    def scan(self, batch: Any, layer: int, qkv: Array, steps: Array, weight: Weight, spec: DeltaSpec) -> Array:
        """A selective scan: packed rows (T, spec.row_width) to (T, num_heads * value_dim).

        steps: (T, num_heads). weight: of `load_scan`. Of Mamba-2's C, B and x, queries are the first, keys the second,
        values the third. With d = softplus(step + dt_bias): S <- e^(decay d) S + k (d v)^T; the output is S^T q +
        skip v. S is the layer's state, as in `short_conv`. Source: Mamba-2, arXiv 2405.21060.
        """
        ...

    def gated_norm(self, x: Array, gate: Array, weight: Weight, eps: float) -> Array:
        """RMS norm of every head of x (T, heads * width) on its own, times `weight` (width,), times silu(gate)."""
        ...

    def sigmoid_mul(self, x: Array, gate: Array) -> Array:
        """x * sigmoid(gate): x (T, F), gate (T, F) or (T, 1)."""
        ...

    def route(self, batch: Any, x: Array, router: Weight, spec: RouteSpec) -> Array:
        """Which experts compute each row of x, and their weights, as `RouteSpec` says, with a weight of `load_router`.
        All in float32. What it returns is for `experts` alone, of the same rows."""
        ...

    def experts(self, batch: Any, x: Array, routing: Array, weight: Weight, residual: Array | None = None) -> Array:
        """The sum over a row's experts, in the order of their choice, of weight * down(activation(gate x) * up x),
        (+ residual): (T, H), with a weight of `load_experts`. Products and sum are in float32."""
        ...

    def silu_mul(self, x: Array, gate: Array) -> Array:
        """x * silu(gate), both (T, F)."""
        ...

    def soft_cap(self, x: Array, cap: float) -> Array:
        """cap * tanh(x / cap): what is small stays nearly as it is, and nothing exceeds the cap (Gemma 2)."""
        ...

    def asked_rows(self, batch: Any, x: Array) -> Array:
        """x, of which only the rows of `ScheduleBatch.asked_tokens` matter from here on: others may be left out.

        After the last attention. What is combined afterwards must all have gone through it.
        """
        ...


@dataclass(slots=True)
class SampleResult:
    """token_ids int32 (S,), -1 for NaN logits; for rows that asked: log-probability of the sampled token, the top k
    (descending, ties by lower id) and the chosen ids."""

    token_ids: NDArray[np.int32]
    logprobs: list[tuple[float, list[tuple[float, int]], list[tuple[float, int]]] | None] = field(default_factory=list)


class Backend(Protocol):
    """Everything else a device provides. One instance serves one model."""

    name: str
    ops: Ops
    default_page_size: int
    default_chunked_prefill_size: int
    """Tokens of one step, where the user says nothing: from where on longer steps compute no more tokens a second."""

    default_max_running_requests: int
    """Requests in one step, where the user says nothing."""

    match_granularity_tokens: int
    """Cached prefixes are used in multiples of this: 1 unless the kernels want prompts to begin at certain places. It
    divides every page size."""

    mixed_step_parts: int
    """A step that streams wait for takes this part of the prompt tokens of one that nobody waits for."""

    is_exact: bool
    """What a row computes depends on that row alone, to the bit: not on what is computed beside it, and not on where a
    prompt was cut. Then guesses change no answer and are on where the user says nothing, and the length of steps may
    follow a clock (`mooli.scheduler.planning.Pace`)."""

    def check_page_size(self, page_size: int) -> None:
        """Raise ConfigError, naming the allowed sizes, if the kernels cannot use this page size."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for the start-up log and `get_server_info`: device, instruction set, threads."""
        ...

    def memory(self) -> MemoryInfo: ...

    def bind_thread(self) -> None:
        """Called once on the thread that will run the steps, for backends that pin it or bind a device to it."""
        ...

    # -- weights, packed once, one tensor at a time. `tensors` are stacked along rows (q, k, v). --
    def load_linear(
        self, tensors: Sequence[RawTensor], biases: Sequence[RawTensor] = (), *, head: bool = False
    ) -> Weight:
        """A linear weight (sum of rows, columns). `head` marks the output head, kept finer under int4."""
        ...

    def load_gated(
        self, gate: RawTensor, up: RawTensor, biases: Sequence[RawTensor] = (), *, activation: Activation = "silu"
    ) -> Weight:
        """The weight of `gated_linear`. `biases` is empty, or the gate's and the up projection's."""
        ...

    def load_embedding(self, table: RawTensor) -> Weight: ...

    def load_tied(self, table: RawTensor) -> tuple[Weight, Weight]:
        """The embedding and the head that are one table: `load_embedding` and `load_linear` of a head, in less memory
        where the device can."""
        ...

    def load_vector(self, vector: RawTensor) -> Weight: ...

    def load_conv(self, weight: RawTensor, bias: RawTensor | None = None) -> Weight:
        """The weight of `short_conv` and `causal_conv`, in float32: (channels, columns), the newest token's last; bias
        (channels,)."""
        ...

    def load_delta(self, decay: RawTensor, dt_bias: RawTensor) -> Weight:
        """The weight of `delta_rule`, in float32: two numbers for each head."""
        ...

    def load_scan(self, decay: RawTensor, dt_bias: RawTensor, skip: RawTensor) -> Weight:
        """The weight of `scan`, in float32: three numbers for each head."""
        ...

    def load_latent(self, keys: RawTensor, values: RawTensor, spec: LatentSpec) -> Weight:
        """What makes keys and values of latents: keys (num_heads * rank, nope_dim), of each head U transposed; values
        (num_heads * value_dim, rank). Never quantised to less than eight bits."""
        ...

    def load_router(
        self, weight: RawTensor, bias: RawTensor | None = None, correction: RawTensor | None = None
    ) -> Weight:
        """The weight of `route`, in float32: (experts, H); bias of the logits, correction of the choice (experts,)."""
        ...

    def load_experts(self, gated: Sequence[Weight], down: Sequence[Weight]) -> Weight:
        """The weight of `experts`: of each expert, what `load_gated` and `load_linear` returned, which nobody else
        uses."""
        ...

    def unread_loads(self, at_most: int) -> int:
        """Wait until the tensors of at most `at_most` of the `load_*` calls so far are still to be read; of how many
        they are. They are read in the order of the calls, and their bytes must stay until then. Operations wait too."""
        ...

    def weight_bytes(self) -> int:
        """Bytes of all packed weights so far."""
        ...

    # -- KV pool; its layout is the backend's secret --
    def kv_bytes_per_page(self, spec: CacheSpec) -> int:
        """Bytes of a page in all layers. Raises UnsupportedModelError for a kind of layer that it cannot compute."""
        ...

    def allocate(self, spec: CacheSpec, num_pages: int, limits: Limits) -> None:
        """Allocate KV pool and activation buffers. Called once, after the weights. Raises as `kv_bytes_per_page`."""
        ...

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy-on-write: the first `num_tokens` tokens of each source page, in order."""
        ...

    def copy_states(self, copies: Sequence[StateCopy]) -> None:
        """Of all layers with a recurrence, in order."""
        ...

    def read_pages(
        self, pages: Sequence[int] | NDArray[np.int32], num_tokens: int | None = None, out: Any = None
    ) -> NDArray[np.uint8]:
        """Pages as bytes: uint8 (pages, `kv_bytes_per_page`), each page whole and in one piece, in the order given.

        num_tokens: how many the pages hold, counted from the first one's first; those behind them come as if their keys
        and values were zeros, so that equal tokens are equal bytes. None: every page is full. out: a contiguous buffer
        of that size to read into, and then nothing is allocated. Called between steps, on their thread; the interpreter
        is not held while bytes are copied. Recurrent states are in no page: of a model with such layers, pages alone
        are of no use to a request, which needs the state after them (`read_state`).

        Raises EngineError for pages outside the pool or given twice, and for a buffer that does not fit.
        """
        ...

    def write_pages(self, pages: Sequence[int] | NDArray[np.int32], data: Any) -> None:
        """Pages from the bytes that `read_pages` gave of as many pages, whichever they were: exact to the bit.

        data: any contiguous buffer. Its meaning is not looked at: it must come from a pool of the same `page_format`,
        of the same model. Called between steps, on their thread. Raises EngineError as `read_pages` does.
        """
        ...

    def read_state(self, slot: int) -> NDArray[np.uint8]:
        """A recurrent state as bytes: uint8 (`CacheSpec.state_bytes`,). Called between steps, on their thread.

        Raises EngineError for a slot that is none.
        """
        ...

    def write_state(self, slot: int, data: Any) -> None:
        """A state from the bytes that `read_state` gave, of whichever slot: exact to the bit. data: any contiguous
        buffer, of the same model and `page_format`, not looked at. Called and raises as `read_state`, and for a buffer
        of another size."""
        ...

    def page_format(self) -> dict[str, str]:
        """What besides model and arguments decides the bits of pages and states of the allocated pool, by name: where
        values lie, instruction set, libraries. They may be written where it is the same."""
        ...

    # -- a step --
    def plan(self, batch: ScheduleBatch) -> Any:
        """Turn the host batch into what the operations take (ForwardBatch). Once a step."""
        ...

    def capture(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """`function(batch)` or `function(batch, hidden)` made fast: a tape on CPU, a graph on devices, or itself."""
        ...

    def take_rows(self, batch: Any, hidden: Array, rows: NDArray[np.int32]) -> tuple[Any, Array]:
        """The given token rows of what a captured function gave for `batch`: the arguments of another, which are the
        batch of these tokens alone and their rows.

        Only asked tokens may be taken from a result that has gone through `asked_rows`.
        """
        ...

    def sample(self, logits: Array, sampling: SamplingBatch, vocab_size: int) -> SampleResult: ...

    def run_step(
        self, forward: Callable[..., Array], logits: Callable[..., Array], batch: ScheduleBatch, vocab_size: int
    ) -> SampleResult:
        """A step in which all asked tokens sample, from its plan to its sampled tokens: captured `forward`, captured
        `logits` of their rows, `sample`. One call, so that a device need not wait for the host between them.

        If the batch says `may_begin_next`, it may begin with the step that will most likely follow, while the host
        takes this one in. The next `plan` decides whether that is used; keys and values of the sampled tokens may be
        stored anyway.
        """
        ...

    def logprobs(
        self, logits: Array, target_ids: NDArray[np.int32], num_top: int, token_ids: Sequence[int], vocab_size: int
    ) -> list[tuple[float, list[tuple[float, int]], list[tuple[float, int]]]]:
        """Per row of logits: log-softmax at the target, the top `num_top`, and at `token_ids`."""
        ...

    def to_host(self, x: Array) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


class OffloadingBackend(Backend, Protocol):
    """A backend whose pool may have memory of the host below it, in rows of `kv_bytes_per_page`."""

    def allocate_host(self, num_rows: int) -> None:
        """Pinned memory where the device copies faster from it. Called once, after `allocate`. Raises
        OutOfMemoryError."""
        ...

    def back_up(self, pages: Sequence[int], rows: Sequence[int]) -> None:
        """Copy full pages to rows of the host, exact to the bit: they are there when this returns. Called between
        steps, on their thread.

        Raises EngineError for pages or rows that are not there, or given twice.
        """
        ...

    def load_back(self, pages: Sequence[int], rows: Sequence[int]) -> None:
        """The inverse of `back_up`, with pages and rows of any numbers."""
        ...

    def host_bytes(self, row: int) -> bytes:
        """A row, as `read_pages` gives a page."""
        ...
