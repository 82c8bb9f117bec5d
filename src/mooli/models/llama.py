"""Decoders of the Llama family: Llama (SmolLM2 too), Mistral, Qwen2 and Qwen2.5, Qwen3.

Owns the order of operations and the names of the weights. Never names a device, sees a request or touches an array:
every computation is an operation of the backend seam. What differs between the families (biases, q/k norm, window, rope
scaling, tied head) is data in the configuration.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mooli.backends.base import Array, AttentionSpec, Backend, RopeSpec, Weight
from mooli.models.checkpoint import Checkpoint, expected_shapes
from mooli.models.config import ModelConfig
from mooli.models.rope import inv_freq
from mooli.tensor import RawTensor

MOST_UNREAD_BYTES = 256 << 20
"""Of tensors that a backend has been given and not read yet, those that are copies of what the file holds included. So
much keeps it busy while the interpreter is somebody else's for a while: a tokenizer's library keeps it for 0.4 s."""


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """One decoder layer's weights, as the backend packed them. q_norm and k_norm are None without q/k norm."""

    input_norm: Weight
    qkv: Weight
    q_norm: Weight | None
    k_norm: Weight | None
    o: Weight
    post_attention_norm: Weight
    gate_up: Weight
    down: Weight


class LlamaModel:
    """A decoder whose weights are packed when it is made. T tokens in a step, H hidden size."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        backend: Backend,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Pack every weight, releasing each tensor as soon as it is packed.

        `progress(done, total)` is called before the first tensor, and whenever tensors have been packed.
        Names and shapes were checked when the checkpoint was opened (`mooli.models.checkpoint.check_tensors`).
        """
        self.config = config
        self._ops = backend.ops
        self._rope = RopeSpec(inv_freq(config))
        self._attention = AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            window=config.sliding_window or 0,
        )
        packer = _Packer(config, checkpoint, backend, progress)
        if config.tie_word_embeddings:
            self._embedding, self._head = packer.tied()
        else:
            self._embedding, self._head = packer.embedding(), packer.head()
        self._layers = [packer.layer(index) for index in range(config.num_layers)]
        self._norm = packer.vector("model.norm.weight")
        packer.finish()

    def forward(self, batch: Any) -> Array:
        """The hidden states (T, H) of a planned step, before the final norm, of asked tokens. Stores the KV of all."""
        ops, eps = self._ops, self.config.rms_norm_eps
        hidden = ops.embed(batch, self._embedding)
        for index, layer in enumerate(self._layers):
            qkv = ops.linear(ops.rms_norm(hidden, layer.input_norm, eps), layer.qkv)
            if layer.q_norm is not None:
                qkv = ops.head_norm(qkv, self._attention, layer.q_norm, layer.k_norm, eps)
            qkv = ops.rope(batch, qkv, self._attention, self._rope)
            mixed = ops.attend(batch, index, qkv, self._attention)
            if index + 1 == len(self._layers):
                mixed, hidden = ops.asked_rows(batch, mixed), ops.asked_rows(batch, hidden)
            hidden = ops.linear(mixed, layer.o, residual=hidden)
            gated = ops.linear_silu_mul(ops.rms_norm(hidden, layer.post_attention_norm, eps), layer.gate_up)
            hidden = ops.linear(gated, layer.down, residual=hidden)
        return hidden

    def logits(self, hidden: Array) -> Array:
        """The logits (S, vocab_size) of rows of hidden states (S, H), as `forward` returned them."""
        return self._ops.linear(self._ops.rms_norm(hidden, self._norm, self.config.rms_norm_eps), self._head)


class _Packer:
    """Reads tensors by name, has the backend pack them, and lets go of the file's pages when it has."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        backend: Backend,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._backend = backend
        self._progress = progress
        self._unread: deque[tuple[RawTensor, ...]] = deque()
        """The tensors of each call of the backend that may still read them."""
        self._unread_bytes = self._num_read = 0
        self._num_tensors = len(expected_shapes(config))
        self._report()

    def layer(self, index: int) -> LlamaLayer:
        config, prefix = self._config, f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return LlamaLayer(
            input_norm=self.vector(prefix + "input_layernorm.weight"),
            qkv=self._linear([attention + name for name in ("q_proj", "k_proj", "v_proj")], biased=config.qkv_bias),
            q_norm=self.vector(attention + "q_norm.weight") if config.qk_norm else None,
            k_norm=self.vector(attention + "k_norm.weight") if config.qk_norm else None,
            o=self._linear([attention + "o_proj"], biased=config.o_bias),
            post_attention_norm=self.vector(prefix + "post_attention_layernorm.weight"),
            gate_up=self._gated(mlp + "gate_proj", mlp + "up_proj"),
            down=self._linear([mlp + "down_proj"], biased=config.mlp_bias),
        )

    def embedding(self) -> Weight:
        table = self._checkpoint.tensor("model.embed_tokens.weight")
        return self._packed(self._backend.load_embedding(table), table)

    def head(self) -> Weight:
        table = self._checkpoint.tensor("lm_head.weight")
        return self._packed(self._backend.load_linear([table], head=True), table)

    def tied(self) -> tuple[Weight, Weight]:
        table = self._checkpoint.tensor("model.embed_tokens.weight")
        both: tuple[Weight, Weight] = self._packed(self._backend.load_tied(table), table)
        return both

    def vector(self, name: str) -> Weight:
        vector = self._checkpoint.tensor(name)
        return self._packed(self._backend.load_vector(vector), vector)

    def _linear(self, names: list[str], *, biased: bool) -> Weight:
        """Linear layers stacked along their outputs."""
        tensors = [self._checkpoint.tensor(f"{name}.weight") for name in names]
        biases = [self._checkpoint.tensor(f"{name}.bias") for name in names] if biased else []
        return self._packed(self._backend.load_linear(tensors, biases), *tensors, *biases)

    def _gated(self, gate_name: str, up_name: str) -> Weight:
        gate, up = self._checkpoint.tensor(f"{gate_name}.weight"), self._checkpoint.tensor(f"{up_name}.weight")
        if not self._config.mlp_bias:
            return self._packed(self._backend.load_gated(gate, up), gate, up)
        biases = [self._checkpoint.tensor(f"{name}.bias") for name in (gate_name, up_name)]
        return self._packed(self._backend.load_gated(gate, up, biases), gate, up, *biases)

    def _packed(self, weight: Weight, *tensors: RawTensor) -> Weight:
        self._unread.append(tensors)
        self._unread_bytes += sum(tensor.data.nbytes for tensor in tensors)
        self._release(at_most=len(self._unread))
        while self._unread_bytes > MOST_UNREAD_BYTES:
            self._release(at_most=len(self._unread) - 1)
        return weight

    def finish(self) -> None:
        """Returns when all is packed."""
        while self._unread:
            self._release(at_most=len(self._unread) - 1)

    def _release(self, at_most: int) -> None:
        """Let go of what has been read, when it is all but `at_most` of the backend's calls."""
        num_unread = self._backend.unread_loads(at_most)
        if num_unread == len(self._unread):
            return
        while len(self._unread) > num_unread:
            for tensor in self._unread.popleft():
                self._unread_bytes -= tensor.data.nbytes
                self._num_read += 1
                self._checkpoint.release(tensor.name)
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._num_read, self._num_tensors)
