"""The decoder that families share: an embedding, layers, a norm and a head.

Owns the order of operations around and within a layer, and what the configuration of any decoder says. A layer has a
mixer, which gives each token something of those before it (attention, or a recurrence), and an MLP, which computes each
token on its own. Which they are, and what files call them, a family says in its configuration. Never names a family. T
tokens in a step, H hidden size.

Three numbers scale what runs through the layers, each 1 where nothing is said (maximal update parametrisation, arXiv
2203.03466). With m the residual multiplier, what runs through here is h / m: branches are then added as they are, the
embedding is scaled by (embedding multiplier) / m, and every norm of h is that of h / m with eps / m^2. Logits are
divided by scaling the gains of the last norm. So no operation is added.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from mooli.backends.base import Array, Ops, RopeSpec, Weight
from mooli.models.config import ModelConfig, TensorSpec
from mooli.models.experts import Experts
from mooli.models.fields import ROPE_VECTORS, check_range
from mooli.models.layers import MLP, GatedMLP, Mixer, Tensors, norm_tensors, vocabulary_tensors
from mooli.models.packer import Packer
from mooli.models.rope import RopeScaling

logger = logging.getLogger(__name__)

AnyDecoder = TypeVar("AnyDecoder", bound="DecoderConfig")
Names = tuple[str, str]
"""Of a module: in folders, and in GGUF files."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer with a norm before each of its branches: h = x + mixer(N1 x), then h + mlp(N2 h)."""

    ops: Ops
    eps: float
    mixer: Mixer
    mlp: MLP
    norms: tuple[Weight, ...]

    def mix(self, batch: Any, layer: int, hidden: Array) -> Array:
        """What `mixer` mixes of what comes into the layer: (T, H) to (T, F)."""
        return self.mixer.mix(batch, layer, self.ops.rms_norm(hidden, self.norms[0], self.eps))

    def output(self, batch: Any, mixed: Array, hidden: Array) -> Array:
        """What the layer gives (T, H), of what was mixed and of what came in."""
        hidden = self.mixer.output(batch, mixed, residual=hidden)
        return self.mlp.output(batch, self.ops.rms_norm(hidden, self.norms[1], self.eps), residual=hidden)


class SandwichLayer(DecoderLayer):
    """One layer with norms on both sides of its branches: h = x + N2(mixer(N1 x)), then h + N4(mlp(N3 h)).

    Source: Ding et al., CogView, arXiv 2105.13290, which calls it a sandwich.
    """

    __slots__ = ()

    def output(self, batch: Any, mixed: Array, hidden: Array) -> Array:
        _, behind_mixer, before_mlp, behind_mlp = self.norms
        hidden = self.ops.rms_norm(self.mixer.output(batch, mixed), behind_mixer, self.eps, residual=hidden)
        wide = self.mlp.output(batch, self.ops.rms_norm(hidden, before_mlp, self.eps))
        return self.ops.rms_norm(wide, behind_mlp, self.eps, residual=hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """What the configuration of any decoder says. CheckpointError if a number is out of its bounds.

    intermediate_size: of the MLP. experts: what most layers have in its place, None where there are none. embedding_,
    residual_multiplier, logits_scaling: see above. num_extra_blocks: layers behind the last one that files may have,
    which predict further tokens (MTP), and are left out. prefix: of names in folders.
    """

    layer: ClassVar[type[DecoderLayer]] = DecoderLayer
    mlp: ClassVar[type[GatedMLP]] = GatedMLP
    last_norm: ClassVar[Names] = ("norm", "output_norm")

    intermediate_size: int
    norm_names: tuple[Names, ...] = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"))
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    mlp_bias: bool = False
    experts: Experts | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    num_extra_blocks: int = 0
    prefix: str = "model."

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        check_range("intermediate_size", self.intermediate_size, 1, 2**20)
        check_range("rms_norm_eps", self.rms_norm_eps, 1e-30, 1.0)
        check_range("rope_theta", self.rope_theta, 1e-3, 1e15)
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
            check_range(name, getattr(self, name), 1e-6, 1e6)
        check_range("layers that predict further tokens", self.num_extra_blocks, 0, 64)

    @property
    def eps(self) -> float:
        """Of norms of what runs through the layers."""
        return self.rms_norm_eps / self.residual_multiplier**2

    @abstractmethod
    def rotations(self) -> tuple[RopeSpec | None, ...]:
        """Of each layer's queries and keys, None where they are not rotated; one object for all that are equal."""

    @abstractmethod
    def mixer_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        """Of the mixer of layer `layer`, called `name` in folders and `gguf` in GGUF files."""

    @abstractmethod
    def load_mixer(self, packer: Packer, ops: Ops, layer: int, name: str, rotation: RopeSpec | None) -> Mixer:
        """The mixer of that layer."""

    def mlp_tensors(self, layer: int, name: str, gguf: str) -> Tensors:
        """The same of what computes each token on its own."""
        if self.experts is not None and layer not in self.experts.dense_layers:
            return self.experts.tensors(name, gguf, self.hidden_size)
        hidden, width = self.hidden_size, self.intermediate_size
        return self.mlp.tensors(f"{name}.{self.mlp.module}", gguf, hidden_size=hidden, width=width, bias=self.mlp_bias)

    def load_mlp(self, packer: Packer, ops: Ops, layer: int, name: str) -> MLP:
        if self.experts is not None and layer not in self.experts.dense_layers:
            return self.experts.load(packer, ops, name)
        return self.mlp.load(packer, f"{name}.{self.mlp.module}", ops)

    def tensors(self) -> dict[str, TensorSpec]:
        hidden = self.hidden_size
        tensors = vocabulary_tensors(f"{self.prefix}embed_tokens", "token_embd", self.vocab_size, hidden)
        for layer in range(self.num_layers):
            name, gguf = f"{self.prefix}layers.{layer}", f"blk.{layer}"
            for in_folders, in_gguf in self.norm_names:
                tensors |= norm_tensors(f"{name}.{in_folders}", f"{gguf}.{in_gguf}", hidden)
            tensors |= self.mixer_tensors(layer, name, gguf)
            tensors |= self.mlp_tensors(layer, name, gguf)
        in_folders, in_gguf = self.last_norm
        last = TensorSpec((hidden,), f"{in_gguf}.weight", factor=1.0 / self.logits_scaling)
        tensors[f"{self.prefix}{in_folders}.weight"] = last
        if not self.tie_word_embeddings:
            tensors |= vocabulary_tensors("lm_head", "output", self.vocab_size, hidden)
        return tensors

    def may_ignore(self, name: str) -> bool:
        # The head is stored next to a tied embedding by some tools; the others the configuration gives.
        further = range(self.num_layers, self.num_layers + self.num_extra_blocks)
        blocks = tuple(f"{block}{layer}." for layer in further for block in (f"{self.prefix}layers.", "blk."))
        return (
            name in ("lm_head.weight", *ROPE_VECTORS)
            or name.endswith(("rotary_emb.inv_freq", "embed_tokens.embed_scale"))
            or name.startswith(blocks)
        )

    def shares(self, size: int) -> dict[str, Any]:
        """The fields of which each of `size` ranks has a part."""
        experts = None if self.experts is None else self.experts.part(size)
        return {"intermediate_size": self.intermediate_size // size, "experts": experts}

    def part(self: AnyDecoder, size: int) -> AnyDecoder:
        return dataclasses.replace(self, **self.shares(size))


class Decoder:
    """A model of any configuration of a decoder."""

    def __init__(self, config: DecoderConfig, ops: Ops, packer: Packer) -> None:
        self.config = config
        self._ops = ops
        if config.num_extra_blocks:
            logger.info(
                "layers behind the last one, which predict further tokens (MTP), are not used: up to %d",
                config.num_extra_blocks,
            )
        embedding = f"{config.prefix}embed_tokens"
        if config.tie_word_embeddings:
            self._embedding, self._head = packer.tied(embedding)
        else:
            self._embedding, self._head = packer.embedding(embedding), packer.head("lm_head")
        self._layers = []
        for index, rotation in enumerate(config.rotations()):
            name = f"{config.prefix}layers.{index}"
            mixer = config.load_mixer(packer, ops, index, name, rotation)
            mlp = config.load_mlp(packer, ops, index, name)
            norms = tuple(packer.vector(f"{name}.{norm}.weight") for norm, _ in config.norm_names)
            self._layers.append(config.layer(ops, config.eps, mixer, mlp, norms))
        self._norm = packer.vector(f"{config.prefix}{config.last_norm[0]}.weight")

    def forward(self, batch: Any) -> Array:
        """The hidden states (T, H) of a planned step, over the residual multiplier and before the final norm, of asked
        tokens. Stores what the layers keep of all."""
        ops, config = self._ops, self.config
        hidden = ops.embed(batch, self._embedding, config.embedding_multiplier / config.residual_multiplier)
        for index, layer in enumerate(self._layers):
            mixed = layer.mix(batch, index, hidden)
            if index + 1 == len(self._layers):
                mixed, hidden = ops.asked_rows(batch, mixed), ops.asked_rows(batch, hidden)
            hidden = layer.output(batch, mixed, hidden)
        return hidden

    def logits(self, batch: Any, hidden: Array) -> Array:
        """The logits (S, vocab_size) of rows of hidden states (S, H), as `forward` returned them, and their batch."""
        return self._ops.linear(batch, self._ops.rms_norm(hidden, self._norm, self.config.eps), self._head)
