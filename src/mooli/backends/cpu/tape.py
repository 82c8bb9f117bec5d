"""Records the operations of a model as a native tape, once, and replays it for any number of rows.

Owns registers (who holds which activation) and their places in one arena. Never computes: a recorded operation is an
entry in a list until the native tape runs it, without Python between operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli import _native
from mooli.backends.base import AttentionSpec, DeltaSpec, RopeSpec
from mooli.backends.cpu.latent import LatentWeight
from mooli.backends.cpu.packing import Kind
from mooli.backends.latent import LatentSpec, check_rows
from mooli.backends.routing import RouteSpec, Score
from mooli.batch import TokenMasks
from mooli.errors import ConfigError, EngineClosedError, OutOfMemoryError

LAST_INTEGER_KIND = Kind.Q6
"""Packed kinds up to this one multiply integers, in row blocks of the same size."""

SCORES: dict[Score, int] = {"softmax": 0, "sigmoid": 1, "chosen_softmax": 2}
"""As native/experts.h numbers them."""


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm that a linear does itself, row by row, as it quantises its input."""

    source: Register
    weight: Any
    eps: float


@dataclass(frozen=True, slots=True)
class Gated:
    """A gated linear that may leave its result as the next linear multiplies it."""

    source: Register
    weight: Any
    norm: tuple[Any, float]


@dataclass(eq=False, slots=True)
class Register:
    """An activation of `width` float32 a row. `address` is set when the arena is laid out, `norm` by rms_norm, `gated`
    by gated_linear."""

    width: int
    address: int = 0
    last_use: int = -1
    norm: Norm | None = None
    gated: Gated | None = None


@dataclass(slots=True)
class Entry:
    """One recorded operation. `emit(tape)` adds it to the native tape once registers have addresses.

    `reusable` is an input the result may overwrite, if nothing reads it later. `droppable` ones are left out if
    nothing reads their output: they do nothing else.
    """

    inputs: tuple[Register, ...]
    output: Register
    emit: Callable[[Any], None]
    reusable: Register | None = None
    droppable: bool = False


@dataclass(slots=True)
class Rows:
    """Rows of an earlier tape's result, to be another's input: `source` (max rows, width), `indices` int32 (n,)."""

    source: NDArray[np.float32]
    indices: NDArray[np.int32]


@dataclass(slots=True)
class Result:
    """What a replayed tape computed: the first `num_rows` rows of `values` (max rows, width), until the next replay.

    `tokens`: the tokens whose rows they are, ascending int32; None if they are the step's tokens in order.
    """

    values: NDArray[np.float32]
    num_rows: int
    tokens: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """A step whose host arrays the device has taken over. asked_tokens: int32, ascending.

    tokens: int32, those of the step that the rows of a function of rows stand for; None for all of them.
    """

    num_tokens: int
    asked_tokens: NDArray[np.int32]
    tokens: NDArray[np.int32] | None = None


@dataclass(slots=True)
class Recording:
    """The entries of a function being recorded."""

    entries: list[Entry] = field(default_factory=list)
    has_asked_rows: bool = False

    def add(
        self,
        inputs: tuple[Register, ...],
        width: int,
        emit: Callable[[Any, Register], None],
        reusable: Register | None = None,
        droppable: bool = False,
    ) -> Register:
        output = Register(width)
        self.entries.append(Entry(inputs, output, lambda tape: emit(tape, output), reusable, droppable))
        return output


class TapeOps:
    """The operations of the seam, each of which records itself. Only usable inside a captured function."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._recording: Recording | None = None
        self._ropes: dict[tuple[bytes, float, float, int], Any] = {}
        self._shapes: dict[DeltaSpec, Any] = {}
        self._routes: dict[RouteSpec, Any] = {}
        self.numbers: tuple[int, ...] = ()
        """Of each layer, among those of its kind: `CacheSpec.numbers`."""
        self.attentions: list[tuple[int, AttentionSpec]] = []
        """Layers, and what was recorded to attend there."""
        self.latents: list[tuple[int, LatentSpec]] = []
        """The same, of attention to latents."""
        self.convs: list[tuple[int, int, int]] = []
        """Layers, and of how many columns and channels the convolution is that was recorded there."""
        self.deltas: list[tuple[int, DeltaSpec]] = []
        self.mixtures: list[tuple[int, int, int]] = []
        """Of experts that were recorded, how many compute a row, and their outer and inner size."""

    def record(self, function: Callable[..., Register], *inputs: Register) -> tuple[Recording, Register]:
        """What `function` does of a batch, of which nothing is known yet, and of `inputs`."""
        self._recording = Recording()
        try:
            return self._recording, function(None, *inputs)
        finally:
            self._recording = None

    def _now(self) -> Recording:
        if self._recording is None:
            raise ConfigError("operations of the cpu backend run inside a captured function: use backend.capture")
        return self._recording

    def embed(self, batch: Any, table: Any, scale: float = 1.0) -> Register:
        return self._now().add((), table.width, lambda t, out: t.embed(table.native, scale, out.address))

    def rms_norm(self, x: Register, weight: Any, eps: float, residual: Register | None = None) -> Register:
        if residual is not None and residual.width != x.width:
            raise ConfigError(f"a residual of {residual.width} values on a norm of {x.width}")

        def emit(tape: Any, out: Register) -> None:
            after = 0 if residual is None else residual.address
            tape.rms_norm(x.address, weight.native, eps, x.width, after, out.address)

        if residual is not None:
            return self._now().add((x, residual), x.width, emit, reusable=residual)
        normed = self._now().add((x,), x.width, emit, droppable=True)
        normed.norm = Norm(x, weight, eps)
        return normed

    def linear(self, batch: Any, x: Register, weight: Any, residual: Register | None = None) -> Register:
        if weight.native.gated or x.width != weight.native.k:
            raise ConfigError(f"linear takes rows of {weight.native.k} values and an ungated weight, got {x.width}")
        if residual is not None and residual.width != weight.native.n:
            raise ConfigError(f"a residual of {residual.width} values on a linear weight of {weight.native.n}")
        return self._linear(x, weight, residual)

    def gated_linear(self, batch: Any, x: Register, weight: Any) -> Register:
        if not weight.native.gated or x.width != weight.native.k:
            raise ConfigError(f"gated_linear takes rows of {weight.native.k} values and a gated weight")
        return self._linear(x, weight, None)

    def _linear(self, x: Register, weight: Any, residual: Register | None) -> Register:
        if x.gated is not None and max(x.gated.weight.native.kind, weight.native.kind) <= LAST_INTEGER_KIND:
            return self._gated_down(x.gated, weight, residual)
        norm = x.norm
        source = x if norm is None else norm.source
        norm_weight, eps = (None, 0.0) if norm is None else (norm.weight.native, norm.eps)

        def emit(tape: Any, out: Register) -> None:
            after = 0 if residual is None else residual.address
            tape.linear(source.address, weight.native, norm_weight, eps, after, out.address)

        inputs = (source,) if residual is None else (source, residual)
        gated = weight.native.gated
        result = self._now().add(inputs, weight.native.n, emit, reusable=residual, droppable=gated)
        if gated:
            result.gated = Gated(source, weight, (norm_weight, eps))
        return result

    def _gated_down(self, gated: Gated, weight: Any, residual: Register | None) -> Register:
        """Both linears in one; the entry of the first, which stores what it computes, goes if nobody else reads it."""
        source = gated.source

        def emit(tape: Any, out: Register) -> None:
            after = 0 if residual is None else residual.address
            tape.gated_linear_down(source.address, gated.weight.native, *gated.norm, weight.native, after, out.address)

        inputs = (source,) if residual is None else (source, residual)
        return self._now().add(inputs, weight.native.n, emit, reusable=residual)

    def head_norm(self, qkv: Register, spec: AttentionSpec, q_weight: Any, k_weight: Any, eps: float) -> Register:
        return self._norm_of_heads(qkv, spec, (q_weight, k_weight), eps, is_joint=False)

    def projection_norm(self, qkv: Register, spec: AttentionSpec, q_weight: Any, k_weight: Any, eps: float) -> Register:
        return self._norm_of_heads(qkv, spec, (q_weight, k_weight), eps, is_joint=True)

    def _norm_of_heads(
        self, qkv: Register, spec: AttentionSpec, weights: tuple[Any, Any], eps: float, is_joint: bool
    ) -> Register:
        heads = _check_heads(qkv, spec)
        q, k = (weight.native for weight in weights)
        return self._now().add(
            (qkv,),
            qkv.width,
            lambda t, out: t.head_norm(qkv.address, q, k, eps, *heads, is_joint, out.address),
            reusable=qkv,
        )

    def rope(self, batch: Any, qkv: Register, spec: AttentionSpec, rope: RopeSpec) -> Register:
        table = self._rope_table(rope)
        heads = _check_heads(qkv, spec)
        return self._now().add(
            (qkv,), qkv.width, lambda t, out: t.rope(qkv.address, table, *heads, out.address), reusable=qkv
        )

    def _rope_table(self, rope: RopeSpec) -> Any:
        key = (*rope.name, rope.growth, rope.period)
        if key not in self._ropes:
            frequencies = np.ascontiguousarray(rope.inv_freq, dtype=np.float64)
            self._ropes[key] = self._device.add_rope(frequencies, rope.factor, rope.growth, rope.period)
        return self._ropes[key]

    def attend(self, batch: Any, layer: int, qkv: Register, spec: AttentionSpec, sinks: Any | None = None) -> Register:
        _check_heads(qkv, spec)
        if sinks is not None and len(sinks.native.array()) != spec.num_heads:
            raise ConfigError(f"{len(sinks.native.array())} sinks for {spec.num_heads} query heads")
        native = None if sinks is None else sinks.native
        self.attentions.append((layer, spec))

        def emit(tape: Any, out: Register) -> None:
            how = (spec.num_heads, spec.scale, spec.window, spec.softcap)
            tape.attend(self.numbers[layer], qkv.address, *how, native, out.address)

        return self._now().add((qkv,), spec.num_heads * spec.head_dim, emit)

    def attend_latent(
        self,
        batch: Any,
        layer: int,
        q: Register,
        latent: Register,
        norm: Any,
        eps: float,
        up: LatentWeight,
        rope: RopeSpec,
        spec: LatentSpec,
    ) -> Register:
        check_rows(spec, q.width, latent.width)
        if up.spec != spec:
            raise ConfigError(f"weights that were loaded for {up.spec}, not for {spec}")
        table = self._rope_table(rope)
        self.latents.append((layer, spec))

        def emit(tape: Any, out: Register) -> None:
            number, places = self.numbers[layer], (q.address, latent.address)
            tape.attend_latent(
                number, *places, norm.native, eps, up.native, table, spec.rope_dim, spec.scale, out.address
            )

        return self._now().add((q, latent), spec.num_heads * spec.value_dim, emit)

    def short_conv(self, batch: Any, layer: int, x: Register, weight: Any) -> Register:
        return self._conv(layer, x, weight, parts=3)

    def causal_conv(self, batch: Any, layer: int, x: Register, weight: Any) -> Register:
        return self._conv(layer, x, weight, parts=1)

    def _conv(self, layer: int, x: Register, weight: Any, parts: int) -> Register:
        native = weight.native
        if x.width != parts * native.channels:
            raise ConfigError(f"rows of {x.width} values are not {parts} parts of {native.channels} channels")
        self.convs.append((layer, native.columns, native.channels))

        def emit(tape: Any, out: Register) -> None:
            tape.conv(self.numbers[layer], x.address, native, parts == 3, out.address)

        return self._now().add((x,), native.channels, emit)

    def delta_rule(
        self, batch: Any, layer: int, qkv: Register, gates: Register, weight: Any, spec: DeltaSpec
    ) -> Register:
        shape = self._shape(layer, qkv, gates, 2 * spec.num_heads, spec)

        def emit(tape: Any, out: Register) -> None:
            tape.delta_rule(self.numbers[layer], qkv.address, gates.address, weight.native, shape, out.address)

        return self._now().add((qkv, gates), spec.num_heads * spec.value_dim, emit)

    def scan(self, batch: Any, layer: int, qkv: Register, steps: Register, weight: Any, spec: DeltaSpec) -> Register:
        shape = self._shape(layer, qkv, steps, spec.num_heads, spec)

        def emit(tape: Any, out: Register) -> None:
            tape.scan(self.numbers[layer], qkv.address, steps.address, weight.native, shape, out.address)

        return self._now().add((qkv, steps), spec.num_heads * spec.value_dim, emit)

    def _shape(self, layer: int, qkv: Register, gates: Register, num_gates: int, spec: DeltaSpec) -> Any:
        if (qkv.width, gates.width) != (spec.row_width, num_gates):
            raise ConfigError(f"rows of {qkv.width} values and {gates.width} gates are not those of {spec}")
        if spec not in self._shapes:
            self._shapes[spec] = _native.DeltaShape(
                spec.num_key_heads, spec.key_dim, spec.value_dim, list(spec.key_heads)
            )
        self.deltas.append((layer, spec))
        return self._shapes[spec]

    def gated_norm(self, x: Register, gate: Register, weight: Any, eps: float) -> Register:
        width = len(weight.native.array())
        if x.width != gate.width or x.width % width:
            raise ConfigError(f"a gated norm of {x.width} values by {gate.width}, in heads of {width}")

        def emit(tape: Any, out: Register) -> None:
            tape.gated_norm(x.address, gate.address, weight.native, eps, x.width // width, width, out.address)

        return self._now().add((x, gate), x.width, emit, reusable=None if x is gate else x)

    def sigmoid_mul(self, x: Register, gate: Register) -> Register:
        if gate.width not in (1, x.width):
            raise ConfigError(f"{x.width} values times {gate.width}")

        def emit(tape: Any, out: Register) -> None:
            tape.sigmoid_mul(x.address, gate.address, x.width, gate.width < x.width, out.address)

        return self._now().add((x, gate), x.width, emit, reusable=x)

    def silu_mul(self, x: Register, gate: Register) -> Register:
        if x.width != gate.width:
            raise ConfigError(f"{x.width} values times {gate.width}")

        def emit(tape: Any, out: Register) -> None:
            tape.silu_mul(x.address, gate.address, x.width, out.address)

        return self._now().add((x, gate), x.width, emit, reusable=x)

    def route(self, batch: Any, x: Register, router: Any, spec: RouteSpec) -> Register:
        if router.linear.native.n != spec.num_experts:
            raise ConfigError(f"a router of {router.linear.native.n} experts for {spec.num_experts}")
        if spec not in self._routes:
            self._routes[spec] = _native.RouteShape(
                spec.num_experts, spec.top_k, SCORES[spec.score], spec.groups, spec.kept_groups, spec.group_top,
                spec.normalise, spec.eps, spec.minimum, spec.factor,
            )  # fmt: skip
        shape = self._routes[spec]
        logits = self.linear(batch, x, router.linear)

        def emit(tape: Any, out: Register) -> None:
            tape.route(logits.address, router.native, shape, out.address)

        return self._now().add((logits,), 2 * spec.top_k, emit)

    def experts(
        self, batch: Any, x: Register, routing: Register, weight: Any, residual: Register | None = None
    ) -> Register:
        native, slots = weight.native, routing.width // 2
        if x.width != native.hidden or (residual is not None and residual.width != native.hidden):
            raise ConfigError(f"experts of rows of {native.hidden} values take rows of {x.width}")
        self.mixtures.append((slots, native.hidden, native.inner))

        def emit(tape: Any, out: Register) -> None:
            after = 0 if residual is None else residual.address
            tape.experts(x.address, routing.address, slots, native, after, out.address)

        inputs = (x, routing) if residual is None else (x, routing, residual)
        return self._now().add(inputs, native.hidden, emit, reusable=None if residual is x else residual)

    def soft_cap(self, x: Register, cap: float) -> Register:
        if not cap > 0:
            raise ConfigError(f"a soft cap of {cap}: it must be positive")
        return self._now().add(
            (x,), x.width, lambda t, out: t.soft_cap(x.address, cap, x.width, out.address), reusable=x
        )

    def asked_rows(self, batch: Any, x: Register) -> Register:
        recording = self._now()
        recording.has_asked_rows = True
        return recording.add((x,), x.width, lambda t, out: t.asked_rows(x.address, x.width, out.address), reusable=x)


def _check_heads(qkv: Register, spec: AttentionSpec) -> tuple[int, int, int]:
    if qkv.width != (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim or spec.num_heads % spec.num_kv_heads:
        raise ConfigError(
            f"rows of {qkv.width} values are not {spec.num_heads} query and 2 x {spec.num_kv_heads} kv heads "
            f"of {spec.head_dim}"
        )
    return spec.num_heads, spec.num_kv_heads, spec.head_dim


class CapturedTape:
    """A function of operations as a native tape. Recorded at the first call, when all sizes are known."""

    def __init__(self, device: Any, ops: TapeOps, function: Callable[..., Any], prepare: Callable[[], int]) -> None:
        """`prepare()` makes the device ready for what was recorded and returns the most tokens of a step."""
        self._device, self._ops, self._function, self._prepare = device, ops, function, prepare
        self._tape: Any = None
        self._has_asked_rows = False
        self._capacity = 0
        self._input: NDArray[np.float32] | None = None
        self._output: NDArray[np.float32] | None = None
        self._input_address = self._result_address = 0
        self._arena: Any = None

    def close(self) -> None:
        """Let go of the tape, its buffers and the model behind the function. Not callable afterwards."""
        self._tape = self._arena = self._input = self._output = None
        self._capacity = 0
        self._function = _closed

    def __call__(self, planned: Planned, rows: Rows | None = None) -> Result:
        if rows is not None:
            count = len(rows.indices)
            self._take_rows(count, rows.source.shape[1])
            assert self._input is not None
            np.take(rows.source, rows.indices, axis=0, out=self._input[:count], mode="clip")
        else:
            count = planned.num_tokens
            self._take_steps()
        self._tape.run(count)
        assert self._output is not None
        if rows is not None or not self._has_asked_rows or len(planned.asked_tokens) == count:
            return Result(self._output, count)
        return Result(self._output, len(planned.asked_tokens), planned.asked_tokens)

    def run_then(self, planned: Planned, head: CapturedTape) -> Result:
        """This on the planned step, then `head` on its asked tokens, without Python in between: what `head` gives."""
        buffers = self._buffers_to(planned, head)
        self._tape.run_then(planned.num_tokens, head._tape, *buffers)
        assert head._output is not None
        return Result(head._output, len(planned.asked_tokens))

    def run_choosing(
        self, planned: Planned, head: CapturedTape, vocab_size: int, masks: TokenMasks | None, may_begin_next: bool
    ) -> NDArray[np.int32]:
        """The same, for the id below `vocab_size` with the largest value, of those allowed, in each row of what `head`
        would give, which need not be stored; -1 for a row with NaN or nothing allowed. With `may_begin_next`, the other
        threads then begin with the next step: it is computed before its masks are asked for."""
        buffers = self._buffers_to(planned, head)
        token_ids = np.empty(len(planned.asked_tokens), dtype=np.int32)
        allowed, rows = (None, None) if masks is None else (masks.allowed, masks.rows)
        self._tape.run_choosing(
            planned.num_tokens, head._tape, *buffers, vocab_size, allowed, rows, may_begin_next, token_ids
        )
        return token_ids

    def begin_next(self, token_ids: NDArray[np.int32]) -> None:
        """Let the other threads begin with the step that follows if each row of the planned one has that token more.
        The last result is overwritten."""
        self._tape.begin_next(token_ids)

    def _buffers_to(self, planned: Planned, head: CapturedTape) -> tuple[int, int, int]:
        """Addresses of this tape's result and of the input of `head`, and the width of both, once both can be run."""
        self._take_steps()
        assert self._output is not None
        width = self._output.shape[1]
        head._take_rows(len(planned.asked_tokens), width)
        return self._result_address, head._input_address, width

    def _take_steps(self) -> None:
        if self._tape is None:
            self._record(None, 0)

    def _take_rows(self, count: int, width: int) -> None:
        if count > self._capacity:
            self._record(width, count)

    def _record(self, input_width: int | None, rows: int) -> None:
        """Record the function. With `input_width`, it takes a register of that width instead of a planned step."""
        first = Register(input_width) if input_width is not None else None
        recording, result = self._ops.record(self._function, *([] if first is None else [first]))
        entries = _drop_unread(recording.entries, result)
        # Also for a function of rows: its weights may be wider than all that was loaded before.
        max_tokens = self._prepare()
        capacity = max_tokens if first is None else max(rows, 1)
        floats = _lay_out(entries, first, result, capacity)
        try:
            arena = _native.FloatBuffer(max(floats, 1))
        except MemoryError as exc:
            raise OutOfMemoryError(
                f"the system gives no memory for {floats / 2**28:.2f} GiB of activations ({capacity} tokens a step):"
                " lower chunked_prefill_size, max_total_tokens or mem_fraction_static"
            ) from exc
        base = arena.address
        registers = {id(r): r for e in entries for r in (*e.inputs, e.output)}
        registers |= {id(r): r for r in (first, result) if r is not None}
        for register in registers.values():
            register.address = base + register.address * 4
        tape = _native.Tape(self._device)
        for entry in entries:
            entry.emit(tape)
        memory = arena.array()

        def view(register: Register) -> NDArray[np.float32]:
            begin = (register.address - base) // 4
            values: NDArray[np.float32] = memory[begin : begin + capacity * register.width]
            return values.reshape(capacity, register.width)

        # Only now: a recording that failed leaves no half of a tape behind.
        self._tape, self._arena, self._capacity = tape, arena, capacity
        self._has_asked_rows = recording.has_asked_rows
        self._output = view(result)
        self._input = None if first is None else view(first)
        self._input_address = 0 if first is None else first.address
        self._result_address = result.address


def _closed(*arguments: Any) -> Any:
    raise EngineClosedError("the backend was closed")


def _drop_unread(entries: list[Entry], result: Register) -> list[Entry]:
    """The entries without those that only compute what nobody reads, such as norms that linears do themselves."""
    read = {id(result)} | {id(register) for entry in entries for register in entry.inputs}
    return [entry for entry in entries if not entry.droppable or id(entry.output) in read]


def _lay_out(entries: list[Entry], first: Register | None, result: Register, rows: int) -> int:
    """Give every register a place, in floats from the arena's start; returns the arena's size.

    A place is free again after the last entry that reads it; an operation that may overwrite its input takes its place.
    """
    for index, entry in enumerate(entries):
        for register in entry.inputs:
            register.last_use = index
    result.last_use = len(entries)
    free: list[tuple[int, int]] = []  # (size, place)
    end = 0

    def take(width: int) -> int:
        nonlocal end
        size = -(-rows * width // 16) * 16  # whole cache lines
        fitting = [slot for slot in free if slot[0] == size]
        if fitting:
            free.remove(fitting[0])
            return fitting[0][1]
        end += size
        return end - size

    def release(register: Register) -> None:
        free.append((-(-rows * register.width // 16) * 16, register.address))

    if first is not None:
        first.address = take(first.width)
        if first.last_use < 0:
            first.last_use = len(entries)
    for index, entry in enumerate(entries):
        dying = {id(r): r for r in entry.inputs if r.last_use == index}
        over = entry.reusable
        if over is not None and id(over) in dying and over.width == entry.output.width:
            entry.output.address = over.address
            del dying[id(over)]
        else:
            entry.output.address = take(entry.output.width)
        for register in dying.values():
            release(register)
        if entry.output.last_use < 0:
            entry.output.last_use = index
            release(entry.output)
    return end
