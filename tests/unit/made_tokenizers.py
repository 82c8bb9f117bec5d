"""Small tokenizers as models publish them: trained, in a folder, as GGUF metadata."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from mooli.frontend.gguf_tokenizer import DEEPSEEK_LETTERS

ROOT = Path(__file__).parents[2]
TEXTS = json.loads((ROOT / "tests/golden/torture_text.json").read_text(encoding="utf-8"))
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "</think>"]


PUBLISHED = {
    "deepseek-llm": (
        "[\r\n]",
        f"\\s?[{DEEPSEEK_LETTERS}]+",
        "\\s?[!-/:-~！-／：-～‘-\u201f\u3000-。]+",
        "\\s+$",
        "[一-龥ࠀ-一가-\ud7ff]+",
    ),
    "deepseek-v3": (
        "\\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
}
"""The patterns of a tokenizer.json, one after the other, of which transformers keeps none."""


def published_pre_tokenizer(name):
    """The pre-tokenizer section of the original tokenizer.json; the patterns are those transformers keeps."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in ("smollm", "starcoder"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    patterns = PUBLISHED.get(name) or (GGUF_PRE_TOKENIZER_SPLITS[name],)
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    if name == "deepseek-llm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained_byte_level(name, control_first=False):
    """A small byte-level BPE as a model of that family publishes it, trained on the test texts."""
    backend = Backend(models.BPE())
    if name in ("qwen2", "qwen35"):
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = published_pre_tokenizer(name)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROL if control_first else [],
    )
    backend.train_from_iterator([*TEXTS.values(), "hello world the answer is 42 and 1234"] * 3, trainer)
    if name in ("llama-bpe", "lfm2", "tekken"):
        # Some words are in the vocabulary but cannot be merged, as in the published files.
        model = json.loads(backend.to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]][:-100]
        backend.model = models.BPE(model["vocab"], merges, ignore_merges=True)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in USER_DEFINED])
    return backend


def gguf_metadata(backend, pre, num_unused=3):
    """What a converter writes for a byte-level tokenizer."""
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.get)
    types = [3 if t in CONTROL else 4 if t in USER_DEFINED else 1 for t in tokens]
    merges = json.loads(backend.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(num_unused)],
        "tokenizer.ggml.token_type": np.array(types + [5] * num_unused, np.int32),
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
        "tokenizer.ggml.eos_token_id": np.uint32(vocab["<|im_end|>"]),
        "tokenizer.ggml.bos_token_id": np.uint32(vocab["<|endoftext|>"]),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    }


def write_folder(folder, backend, **config):
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def changed(metadata, **changes):
    metadata = dict(metadata)
    for key, value in changes.items():
        name = f"tokenizer.ggml.{key}"
        metadata.pop(name, None) if value is None else metadata.update({name: value})
    return metadata


def sentencepiece_metadata(**changes):
    """A vocabulary as Llama 2 has it: bytes, then pieces that score less the later they come."""
    rng = random.Random(7)
    words = ["▁the", "▁answer", "▁is", "ing", "▁▁▁▁", "你好", "é", "ation", "▁t", "aaa", "\n\n", "▁1"]
    letters = sorted({c for w in words for c in w} | set("abcdefghijklmnopqrstuvwxyz▁.!"))
    pieces = {w[:i] for w in words for i in range(2, len(w) + 1)} | {w[i:] for w in words for i in range(1, len(w) - 1)}
    longer = sorted(pieces - set(letters))
    rng.shuffle(longer)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *longer, *letters, "<tool>"]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(longer) + len(letters)) + [4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(longer) + len(letters))] + [0.0]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return changed(metadata, **changes)
