"""Tiny random models of a family: saved as Transformers saves them, written as GGUF, and run on any backend.

Owns how they are made, so that every parameter shows in the logits, and how a backend's logits are compared. Families
and their configurations stand in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file
from test_llama_family import Golden, Runnable, assert_same, opened

from mooli.batch import PageCopy, StateCopy
from steps import Row
from variants import Variant

VOCAB = 199
PROMPTS = [np.random.default_rng(length).integers(0, VOCAB, length).tolist() for length in (3, 40)]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
ROUTER_SCALE = 4.0
"""Of routers' weights: experts lie so far apart that rounding hardly ever changes a choice."""

Floats = NDArray[np.float32]


def save(
    config: transformers.PreTrainedConfig, folder: Path, routers: tuple[str, ...] = ("gate.w", "router")
) -> Golden:
    """A model with random weights, biases, gains and corrections, saved; and its logits. routers: in their names."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "bias" in n)]
    with torch.no_grad():
        for name, tensor in tensors:
            # Fresh gains are all ones, and biases zeros, which would hide that they are used.
            if tensor.dim() == 1 or "bias" in name:
                is_less_by_one = "Qwen3_5" in type(model).__name__ or "Qwen3Next" in type(model).__name__
                is_gain = "norm" in name and (not is_less_by_one or "linear_attn" in name)
                tensor.normal_(1.0 if is_gain else 0.0, 0.3)
                continue
            # Of experts (outputs, inputs) or, in gpt-oss, the other way about: inputs are known by the hidden size.
            inputs = tensor.shape[-2] if "gpt_oss" in config.model_type and tensor.dim() == 3 else tensor.shape[-1]
            scale = ROUTER_SCALE if tensor.dim() == 2 and any(part in name for part in routers) else 1.0
            tensor.normal_(0.0, scale * inputs**-0.5)
        logits = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]
    model.save_pretrained(folder)
    return Golden(folder, logits)


def logits_of(path: Path, variant: Variant) -> list[Floats]:
    """Of all prompts."""
    with opened(path, variant) as runnable:
        return [_whole(runnable, prompt) for prompt in PROMPTS]


def rounds(variant: Variant) -> bool:
    """Then a row may choose another expert where two are nearly equal: of most rows the logits are near, not of all."""
    return variant.embed > 0 or variant.linear > 1e-5 or variant.kv_dtype != "float32"


def middle_error(actual: Floats, expected: Floats) -> float:
    """Of rows, relative to all of them."""
    errors = np.sqrt(np.mean((actual - expected) ** 2, axis=1))
    return float(np.median(errors) / np.sqrt(np.mean(expected**2)))


def check(golden: Golden, variant: Variant) -> None:
    """Whole, in chunks, in a batch and behind a cached prefix."""
    prompt = PROMPTS[-1]
    with opened(golden.folder, variant) as runnable:
        for tokens, expected in zip(PROMPTS, golden.logits, strict=True):
            actual = _whole(runnable, tokens)
            assert_near(actual, expected, variant)
        whole = actual
        pages = runnable.pages.take(len(prompt))
        bounds = [0, 1, 13, 26, 39, len(prompt)]
        parts = [runnable.logits([Row(prompt[a:b], a, pages)]) for a, b in pairwise(bounds)]
        assert_alike(np.concatenate(parts), whole, variant)
        mixed_pages = [runnable.pages.take(len(prompt)) for _ in range(3)]
        runnable.logits([Row(prompt[:39], 0, mixed_pages[0]), Row(prompt[:20], 0, mixed_pages[1])])
        mixed = runnable.logits(
            [
                Row(prompt[39:], 39, mixed_pages[0]),
                Row(prompt[20:33], 20, mixed_pages[1]),
                Row(prompt[:9], 0, mixed_pages[2]),
            ]
        )
        assert_alike(mixed, np.concatenate([whole[39:], whole[20:33], whole[:9]]), variant)
        _check_prefix(runnable, whole, variant)


def _check_prefix(runnable: Runnable, whole: Floats, variant: Variant) -> None:
    prompt, page_size = PROMPTS[-1], runnable.page_size
    shared, first = len(prompt) - 4, runnable.pages.take(len(prompt))
    runnable.logits([Row(prompt, 0, first, saves=((7, 33), (shared, 32)))])
    full_pages, rest = divmod(shared, page_size)
    own = runnable.pages.take(len(prompt) - full_pages * page_size)
    if rest:
        runnable.backend.copy_pages([PageCopy(first[full_pages], own[0], rest)])
    if runnable.has_states:
        runnable.backend.copy_states([StateCopy(32, own[0])])
    cached = runnable.logits([Row(prompt[shared:], shared, first[:full_pages] + own, state=own[0])])
    assert_alike(cached, whole[shared:], variant)


def _whole(runnable: Runnable, prompt: list[int]) -> Floats:
    return runnable.logits([Row(prompt, 0, runnable.pages.take(len(prompt)))])


def assert_near(actual: Floats, expected: Floats, variant: Variant) -> None:
    """Within what the variant's arithmetic may be off by."""
    assert actual.shape == expected.shape
    if not rounds(variant):
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    elif len(actual) > 9:
        # Each expert is a product more, and so is its weight.
        assert middle_error(actual, expected) <= 2 * variant.model


def assert_alike(actual: Floats, expected: Floats, variant: Variant) -> None:
    """Between ways to compute the same rows: equal to the bit where the backend promises it."""
    if variant.exact_rows or not rounds(variant):
        assert_same(actual, expected, variant)
    else:
        assert middle_error(actual, expected) <= variant.model


Tensor = tuple[str, Floats]


def write_gguf(
    path: Path,
    folder: Path,
    arch: gguf.MODEL_ARCH,
    keys: dict[str, Any],
    convert: Callable[[dict[str, Floats]], Iterable[Tensor]],
    *,
    sizes: dict[str, Any] = SIZES,
) -> None:
    """A saved model as the gguf package names it: `convert(tensors)` gives those of a file, by names in folders, of
    those of a folder. keys: of the architecture, besides those that all have."""
    keys, name = dict(keys), gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(keys.pop("block_count", sizes["num_hidden_layers"]))
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    for key, value in keys.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        if isinstance(value, bool):
            add = writer.add_bool
        elif isinstance(value, str):
            add = writer.add_string
        elif isinstance(value, list):
            add = writer.add_array
        add(f"{name}.{key}", value)
    names = gguf.get_tensor_name_map(arch, sizes["num_hidden_layers"] + 1)
    for hf_name, values in convert(load_file(folder / "model.safetensors")):
        known = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert known is not None, hf_name
        writer.add_tensor(known, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stacked_experts(tensors: dict[str, Floats]) -> dict[str, Floats]:
    """Of tensors of a folder, those of single experts as one tensor each, `experts.gate_proj.weight` (experts, outputs,
    inputs), as converters stack them before they name them."""
    made: dict[str, Floats] = {}
    stacks: dict[str, dict[int, Floats]] = {}
    for name, values in tensors.items():
        if ".experts." not in name or not name.split(".experts.")[1].split(".")[0].isdigit():
            made[name] = values
            continue
        before, after = name.split(".experts.")
        number, rest = after.split(".", 1)
        stacks.setdefault(f"{before}.experts.{rest}", {})[int(number)] = values
    for name, entries in stacks.items():
        made[name] = np.stack([entries[index] for index in range(len(entries))])
    return made
