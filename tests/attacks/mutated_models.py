"""More than 500 model folders that are not what they should be: configurations, tokenizers, templates, weights, links.

Owns the files. Every mutation is the same in every run. Never opens a model: that is `model_opener`'s.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

HIDDEN, MLP, HEADS, LAYERS, VOCAB = 32, 64, 2, 2, 300
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 298,
    "eos_token_id": 299,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "max_position_embeddings": 256,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCAB,
}
GENERATION = {"bos_token_id": 298, "eos_token_id": [299], "temperature": 0.7, "top_p": 0.9, "top_k": 20}
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX)
FILES = (*JSON_FILES, "chat_template.jinja", *SHARDS)


@dataclass(frozen=True)
class Mutation:
    """apply: changes a whole folder that `write_model` made."""

    name: str
    apply: Callable[[Path], None]


def write_model(folder: Path) -> None:
    """A whole small model in two shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|start|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(_tokenizer().to_str())
    rng = np.random.default_rng(0)
    tensors = {name: (rng.standard_normal(shape) / 8).astype(np.float32) for name, shape in _shapes().items()}
    halves = list(tensors)[: len(tensors) // 2], list(tensors)[len(tensors) // 2 :]
    for shard, names in zip(SHARDS, halves, strict=True):
        (folder / shard).write_bytes(_safetensors({name: tensors[name] for name in names}))
    weight_map = {name: shard for shard, names in zip(SHARDS, halves, strict=True) for name in names}
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r")]
    for merge in merges:
        vocab["".join(merge)] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    names = [*(f"<|unused{i}|>" for i in range(298 - len(vocab))), "<|start|>", "<|end|>"]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return backend


def _shapes() -> dict[str, tuple[int, ...]]:
    size = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (size, HIDDEN),
                "self_attn.v_proj": (size, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HIDDEN),
                "post_attention_layernorm": (HIDDEN,),
                "mlp.gate_proj": (MLP, HIDDEN),
                "mlp.up_proj": (MLP, HIDDEN),
                "mlp.down_proj": (HIDDEN, MLP),
            }.items()
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def _safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    header, data = {}, b""
    for name, tensor in tensors.items():
        end = len(data) + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), end]}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# -- values ------------------------------------------------------------------------------------------------------------
JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    "x",
    "\0",
    "../../../etc/passwd",
    "é" * 1000,
    "x" * 100_000,
    [],
    [[]],
    [None],
    [-1],
    [2**40] * 3,
    ["a"] * 1000,
    list(range(5000)),
    {},
    {"": {}},
    {"a": {"b": [{}]}},
    {"__class__": "os.system"},
)


def _rewrite(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return apply


def _with(name: str, **changes: Any) -> Callable[[Path], None]:
    return _rewrite(name, lambda raw: {**raw, **changes})


def _without(name: str, key: str) -> Callable[[Path], None]:
    return _rewrite(name, lambda raw: {k: v for k, v in raw.items() if k != key})


def config_values() -> Iterator[Mutation]:
    for key in (
        *CONFIG,
        "head_dim",
        "sliding_window",
        "quantization_config",
        "attention_bias",
        "auto_map",
        "vision_config",
    ):
        rng = random.Random(key)
        yield Mutation(f"config: no {key}", _without("config.json", key))
        for value in rng.sample(JUNK, 5):
            yield Mutation(f"config: {key}={repr(value)[:30]}", _with("config.json", **{key: value}))
    for size in (3, 31, 33, 2**20, 2**31 - 1, 2**33, 2**62):
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads"):
            yield Mutation(f"config: {key}={size}", _with("config.json", **{key: size}))
    for key in CONFIG["rope_scaling"]:
        rng = random.Random(f"rope {key}")
        for value in rng.sample(JUNK, 3):
            scaling = {**CONFIG["rope_scaling"], key: value}
            yield Mutation(f"config: rope {key}={repr(value)[:30]}", _with("config.json", rope_scaling=scaling))
    for kind in ("yarn", "linear", "dynamic", "longrope", "su", "default", "mrope"):
        scaling = {"rope_type": kind, "factor": 1e300, "long_factor": [1.0] * 7, "mrope_section": [2**40]}
        yield Mutation(f"config: rope of kind {kind}", _with("config.json", rope_scaling=scaling))
    for name in ("GPT2LMHeadModel", "../x", "os", "Qwen2ForCausalLM", "MixtralForCausalLM", "LlamaForCausalLM\0"):
        yield Mutation(f"config: architecture {name!r}", _with("config.json", architectures=[name]))
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}

    def with_code(folder: Path) -> None:
        _with("config.json", auto_map=code, trust_remote_code=True)(folder)
        for name in ("evil.py", "numpy.py", "mooli.py", "json.py", "__init__.py", "sitecustomize.py"):
            (folder / name).write_text("raise SystemExit('code of a model was run')")

    yield Mutation("config: code beside it", with_code)


# -- bytes -------------------------------------------------------------------------------------------------------------
def _replace(name: str, change: Callable[[random.Random, bytes], bytes], seed: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(random.Random(seed), path.read_bytes()))

    return apply


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 3, 30])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _splice(rng: random.Random, data: bytes) -> bytes:
    first, second = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:second] + data[first:]


def raw_bytes() -> Iterator[Mutation]:
    ways: dict[str, Callable[[random.Random, bytes], bytes]] = {
        "cut": lambda rng, data: data[: rng.randrange(len(data))],
        "bits": _flip,
        "spliced": _splice,
    }
    for name in FILES:
        for way, change in ways.items():
            for number in range(3):
                yield Mutation(f"{name}: {way} {number}", _replace(name, change, f"{name} {way} {number}"))
    whole: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda data: b"",
        "zeros": lambda data: b"\0" * 4096,
        "0xff": lambda data: b"\xff" * 4096,
        "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
        "UTF-16": lambda data: data.decode().encode("utf-16"),
        "twice": lambda data: data + data,
        "deep lists": lambda data: b"[" * 200_000,
        "deep objects": lambda data: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "duplicate keys": lambda data: b'{"vocab_size": 1,' + data[1:],
        "a huge number": lambda data: b'{"x": ' + b"9" * 100_000 + b"," + data[1:],
        "a lone surrogate": lambda data: b'{"\\ud800": "\\udfff",' + data[1:],
        "pickle": lambda data: b"\x80\x04\x95\x05\0\0\0\0\0\0\0}\x94.",
    }
    for name in JSON_FILES:
        for way, make in whole.items():
            yield Mutation(f"{name}: {way}", _replace(name, lambda rng, data, make=make: make(data), way))  # type: ignore[misc]
    for name in FILES:
        yield Mutation(f"{name}: not there", lambda folder, name=name: (folder / name).unlink())  # type: ignore[misc]

        def sparse(folder: Path, name: str = name) -> None:
            os.truncate(folder / name, 2**40)

        yield Mutation(f"{name}: a terabyte of zeros behind it", sparse)


def weights() -> Iterator[Mutation]:
    for number in range(40):

        def lie(folder: Path, number: int = number) -> None:
            rng = random.Random(f"weights {number}")
            path = folder / rng.choice(SHARDS)
            data = path.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            _change_a_node(rng, header)
            text = json.dumps(header).encode()
            said = rng.choice([len(text), len(text), len(text) + 1, 2**63, 0, 2**32])
            path.write_bytes(struct.pack("<Q", said) + text + data[8 + length :])

        yield Mutation(f"weights: header {number}", lie)
    for value in (float("nan"), float("inf"), 1e38, -1e38, 1e-45):

        def fill(folder: Path, value: float = value) -> None:
            path = folder / SHARDS[1]
            data = path.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            count = (len(data) - 8 - length) // 4
            path.write_bytes(data[: 8 + length] + np.full(count, value, np.float32).tobytes())

        yield Mutation(f"weights: all {value}", fill)


def _change_a_node(rng: random.Random, tree: Any) -> None:
    """Replace, remove or repeat something at a random place of a JSON value."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        node = tree
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            below = node[key]
            if not isinstance(below, dict | list) or not below or rng.random() < 0.25:
                if rng.random() < 0.2:
                    del node[key]
                else:
                    node[key] = deepcopy(rng.choice(JUNK))
                break
            node = below


# -- tokenizers --------------------------------------------------------------------------------------------------------
def tokenizers() -> Iterator[Mutation]:
    for number in range(60):

        def change(raw: Any, number: int = number) -> Any:
            rng = random.Random(f"tokenizer {number}")
            small = {key: raw[key] for key in raw if key not in ("model", "added_tokens")}
            _change_a_node(rng, rng.choice([small, small, raw]))
            return {**raw, **small}

        yield Mutation(f"tokenizer: {number}", _rewrite("tokenizer.json", change))
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    empty = {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 1000}

    def split(pattern: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    def template(ids: list[int]) -> dict[str, Any]:
        tokens = [{"SpecialToken": {"id": "x", "type_id": 0}}] * len(ids)
        special = {"x": {"id": "x", "ids": ids, "tokens": ["x"] * len(ids)}}
        return {
            "type": "TemplateProcessing",
            "single": [*tokens, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": special,
        }

    parts: dict[str, dict[str, Any]] = {
        "grows thousandfold": {"normalizer": grow},
        "grows thousandfold, three times": {"normalizer": {"type": "Sequence", "normalizers": [grow] * 3}},
        "grows between all letters": {"normalizer": {"type": "Sequence", "normalizers": [empty] * 3}},
        "prepends": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
        "prepends again and again": {
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 10**5}] * 100}
        },
        "nested 150 times": {"normalizer": _nested("Sequence", "normalizers", 150)},
        "an exponential pattern": {"pre_tokenizer": split(r"(a|a)*(a|a)*(a|a)*$x")},
        "a nested pattern": {"pre_tokenizer": split(r"((a+)+)+$")},
        "a back reference": {"pre_tokenizer": split(r"(.*)\1(.*)\2$")},
        "a repeated pattern": {"pre_tokenizer": split("(" * 50 + "a" + "){100}" * 50)},
        "a pattern of a megabyte": {"pre_tokenizer": split("a?" * 500_000)},
        "a pattern that is none": {"pre_tokenizer": split("(")},
        "a pattern of look-behinds": {"pre_tokenizer": split("(?<=a{1,1000}){1000}")},
        "a character map that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "a long post-processor": {"post_processor": template([0] * 100_000)},
        "ids beyond the vocabulary": {"post_processor": template([2**31, 2**32 - 1])},
        "a decoder that grows": {"decoder": {**grow, "pattern": {"String": "h"}}},
        "a decoder that grows thrice": {
            "decoder": {"type": "Sequence", "decoders": [{**grow, "pattern": {"String": "h"}}, grow, grow]}
        },
        "truncation": {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}},
        "padding": {
            "padding": {
                "strategy": {"Fixed": 10**9},
                "direction": "Left",
                "pad_to_multiple_of": 10**9,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "x",
            }
        },
    }
    for name, changes in parts.items():
        yield Mutation(f"tokenizer: {name}", _with("tokenizer.json", **changes))
    model_changes: dict[str, Callable[[Any], Any]] = {
        "ids with a hole": lambda model: {**model, "vocab": {**model["vocab"], "zz": 10**6}},
        "a huge id": lambda model: {**model, "vocab": {**model["vocab"], "zz": 2**32 - 1}},
        "two of one id": lambda model: {**model, "vocab": {**model["vocab"], "zz": 0}},
        "merges of nothing": lambda model: {**model, "merges": [["q", "zz"]]},
        "merges twice": lambda model: {**model, "merges": model["merges"] * 2},
        "no vocabulary": lambda model: {**model, "vocab": {}},
        "Unigram of nothing": lambda model: {"type": "Unigram", "unk_id": 0, "vocab": []},
        "Unigram of NaN": lambda model: {"type": "Unigram", "unk_id": 5, "vocab": [["a", 1e999]]},
        "WordPiece": lambda model: {
            "type": "WordPiece",
            "unk_token": "none",
            "vocab": {},
            "max_input_chars_per_word": 0,
        },
        "WordLevel": lambda model: {"type": "WordLevel", "unk_token": "none", "vocab": {"a": 1}},
        "an unknown one": lambda model: {**model, "type": "Evil"},
        "dropout": lambda model: {**model, "dropout": 1.0},
        "dropout beyond": lambda model: {**model, "dropout": 7.5},
        "byte fallback": lambda model: {**model, "byte_fallback": True, "unk_token": "none", "fuse_unk": True},
        "a suffix": lambda model: {
            **model,
            "end_of_word_suffix": "x" * 10_000,
            "continuing_subword_prefix": "y" * 10_000,
        },
    }
    for name, make in model_changes.items():
        yield Mutation(
            f"tokenizer, model: {name}",
            _rewrite("tokenizer.json", lambda raw, make=make: {**raw, "model": make(raw["model"])}),  # type: ignore[misc]
        )
    token = {"id": 299, "content": "", "special": True, "normalized": False, "single_word": False, "lstrip": True}
    for name, tokens in {
        "empty": [{**token, "rstrip": True}],
        "of all ids": [{**token, "id": i, "content": "a", "rstrip": False} for i in range(300)],
        "with a huge id": [{**token, "id": 2**32 - 1, "content": "a", "rstrip": False}],
        "of a space": [{**token, "content": " ", "rstrip": True}],
        "100,000": [{**token, "id": 300 + i, "content": f"<{i}>", "rstrip": False} for i in range(100_000)],
        "of a megabyte": [{**token, "content": "x" * 10**6, "rstrip": False}],
    }.items():
        yield Mutation(f"tokenizer, added tokens: {name}", _with("tokenizer.json", added_tokens=tokens))
    for key in ("bos_token", "eos_token", "pad_token", "chat_template", "add_bos_token", "added_tokens_decoder"):
        rng = random.Random(f"settings {key}")
        for value in rng.sample(JUNK, 4):
            yield Mutation(
                f"tokenizer_config: {key}={repr(value)[:30]}", _with("tokenizer_config.json", **{key: value})
            )
    for key in (*GENERATION, "max_new_tokens", "repetition_penalty"):
        rng = random.Random(f"generation {key}")
        for value in rng.sample(JUNK, 3):
            yield Mutation(f"generation: {key}={repr(value)[:30]}", _with("generation_config.json", **{key: value}))
    for number in range(10):

        def change_index(raw: Any, number: int = number) -> Any:
            _change_a_node(random.Random(f"index {number}"), raw)
            return raw

        yield Mutation(f"index: {number}", _rewrite(INDEX, change_index))
    for shard in ("../x", "/etc/passwd", "", "\0", "model.bin", SHARDS[0] + "/", "./" + SHARDS[0], 5, ["a"]):

        def elsewhere(raw: Any, shard: Any = shard) -> Any:
            return {**raw, "weight_map": dict.fromkeys(raw["weight_map"], shard)}

        yield Mutation(f"index: weights in {shard!r}", _rewrite(INDEX, elsewhere))


def _nested(kind: str, key: str, depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": kind, key: []}
    for _ in range(depth):
        inner = {"type": kind, key: [inner]}
    return inner


# -- templates ---------------------------------------------------------------------------------------------------------
TEMPLATES = (
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% for i in range(30000) %}{% for j in range(30000) %}{% endfor %}{% endfor %}",
    "{% for i in range(10**9) %}{% if i < 0 %}x{% endif %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{% set a = 'a' * 100000 %}{{ a * 100000 }}",
    "{% set a = 1000000000 %}{{ 'a' * a }}",
    "{{ [1] * 1000000000 }}",
    "{{ (1, 2) * 1000000000 }}",
    "{{ 'a'|center(1000000000) }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}{{ 'a'.rjust(1000000000) }}{{ '1'.zfill(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' % 1.5 }}",
    "{{ '%s%s' % ('a' * 100000, 'b') * 50000 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{0:>{1}}'.format('a', 1000000000) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__init__.__globals__}'.format_map({'a': messages}) }}",
    "{{ 'a%1000000000s'|format('b') }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).join(['b'] * 100000) }}",
    "{{ (['b'] * 100000)|join('a' * 100000) }}",
    "{{ ('a,' * 100000).split(',')|join('b' * 100000) }}",
    "{{ 'a'.expandtabs(1000000000) }}{{ '\t'.expandtabs(1000000000) }}",
    "{{ ('\t' * 100000).expandtabs(100000) }}",
    "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "{{ ('a\n' * 100000)|indent(100000) }}",
    "{{ 'a'|indent(1000000000, true) }}",
    "{{ 'a'|wordwrap(1, true, 'b' * 100000) }}",
    "{{ ('a ' * 10000)|wordwrap(1, true, 'b' * 100000) }}",
    "{{ messages|tojson(indent=100000000) }}",
    "{{ range(1000000)|list|tojson(indent=100000) }}",
    "{{ [[[[[[1]]]]]]|pprint }}{{ range(1000000)|list|pprint }}",
    "{{ range(100000000)|list }}",
    "{{ range(100000000)|sum }}",
    "{{ range(100000000)|batch(2)|list|length }}",
    "{{ range(10)|slice(1000000000)|list|length }}",
    "{{ range(10)|batch(1000000000, 'x')|list }}",
    "{{ (range(1000)|list * 1000)|sort|unique|list|length }}",
    "{{ 10 ** 10 ** 8 }}",
    "{{ 9999999 ** 9999999 % 7 }}",
    "{{ 2 ** 2 ** 2 ** 2 ** 2 ** 2 }}",
    "{{ 1 << 10000000000 }}",
    "{{ (10 ** 1000)|string * 100000 }}",
    "{{ 1e308 * 10 }}{{ (1e308 * 10)|int }}",
    "{{ '9' * 5000 }}{{ ('9' * 5000)|int }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% set ns = namespace(a='a') %}{% for i in range(100) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a=[1]) %}{% for i in range(100) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a='a') %}{% for i in range(100) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a=2) %}{% for i in range(100) %}{% set ns.a = ns.a * ns.a %}{% endfor %}{{ ns.a }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.environ }}",
    "{{ messages.append(1) }}",
    "{{ lipsum(n=100000) }}",
    "{{ joiner('x' * 100000000)() }}",
    "{{ cycler(*range(10000000)) }}",
    "{{ dict(a=1, **{'b': range(10000000)|list}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% from 'x' import y %}",
    "{{ raise_exception('x' * 10000000) }}",
    "{{ undefined.x.y }}",
    "{{ 1 / 0 }}",
    "{{ '' | nosuchfilter }}",
    "{% if %}",
    "{% for %}",
    "{{",
    "{% endfor %}",
    "{% block a %}{% block a %}{% endblock %}{% endblock %}",
    "{% " + "if 1 %}{% " * 500 + "endif %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 100_000 + "1 }}",
    "{{ " + "[" * 2000 + "]" * 2000 + " }}",
    "{{ " + " + ".join(["'a'"] * 20_000) + " }}",
    "{{ not " * 3000,
    "{% raw %}" + "x" * 5_000_000,
    "{{ strftime_now('%1000000000d') }}",
    "{{ strftime_now('%Y' * 1000000) }}",
    "{{ 'x'|e|urlize|striptags|title|wordcount }}{{ ('<' * 1000000)|striptags }}",
    "{{ (('<a' * 100000) ~ '>')|striptags }}",
    "{{ ('http://' ~ 'a.' * 100000)|urlize }}",
    "{{ {'a' * 1000: 1}|xmlattr }}",
    "{% set x %}{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}{{ x * 1000 }}",
    "{% filter upper %}{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}{% endfilter %}",
    "{% call(x) f() %}{% endcall %}",
    "{% generation %}{{ messages }}{% endgeneration %}",
    "\ud7ff\0\x01{{ '\\0' }}",
)


def templates() -> Iterator[Mutation]:
    for number, text in enumerate(TEMPLATES):

        def write(folder: Path, text: str = text) -> None:
            (folder / "chat_template.jinja").write_text(text)

        yield Mutation(f"template {number}: {text[:60]!r}", write)
    for value in ([{"name": "default", "template": "{{ 1 }}"}] * 1000, [{"name": 1}], [{"template": TEMPLATES[0]}]):

        def write_config(folder: Path, value: Any = value) -> None:
            (folder / "chat_template.jinja").unlink()
            _with("tokenizer_config.json", chat_template=value)(folder)

        yield Mutation(f"template in tokenizer_config: {str(value)[:60]}", write_config)


# -- what is no file ---------------------------------------------------------------------------------------------------
def special_files() -> Iterator[Mutation]:
    targets = {
        "the environment": "/proc/self/environ",
        "memory": "/proc/self/mem",
        "zeros": "/dev/zero",
        "random bytes": "/dev/urandom",
        "standard input": "/dev/stdin",
        "a terminal": "/dev/tty",
        "the system log": "/proc/kmsg",
        "a folder": "/",
        "nothing": "/nowhere/at/all",
        "itself": None,
        "passwords": "/etc/passwd",
    }
    for name in FILES:
        for what, target in targets.items():

            def link(folder: Path, name: str = name, target: str | None = target) -> None:
                (folder / name).unlink()
                (folder / name).symlink_to(target if target is not None else name)

            yield Mutation(f"{name}: a link to {what}", link)

        def pipe(folder: Path, name: str = name) -> None:
            (folder / name).unlink()
            os.mkfifo(folder / name)

        def bound(folder: Path, name: str = name) -> None:
            (folder / name).unlink()
            here = os.open(folder, os.O_RDONLY)  # the path of a socket may not be long
            try:
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(f"/proc/self/fd/{here}/{name}")
            finally:
                os.close(here)

        def directory(folder: Path, name: str = name) -> None:
            (folder / name).unlink()
            (folder / name).mkdir()

        def outside(folder: Path, name: str = name) -> None:
            moved = folder.parent / f"moved {folder.name}"
            moved.mkdir()
            (folder / name).rename(moved / name)
            (folder / name).symlink_to(moved / name)

        yield Mutation(f"{name}: a pipe that nobody writes", pipe)
        yield Mutation(f"{name}: a socket", bound)
        yield Mutation(f"{name}: a folder", directory)
        yield Mutation(f"{name}: a link to a file outside", outside)


FAMILIES = (config_values, raw_bytes, weights, tokenizers, templates, special_files)
