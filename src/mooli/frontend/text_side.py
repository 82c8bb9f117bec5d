"""The text side of one engine: its tokenizer and the rules for its calls.

Owns how both come out of a configuration and of what building the engine settled. An engine in this process and a
server whose engine is in another one are given the same. Never loads weights and never starts anything.
"""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mooli.config import EngineConfig
from mooli.engine.facts import EngineFacts
from mooli.errors import ConfigError, SamplingParamsError
from mooli.formats.files import read_given_file, read_json
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.inputs import InputRules
from mooli.frontend.parts import PLAIN_TEXT, WireFormat
from mooli.frontend.sampling import parse_sampling_params
from mooli.frontend.text_memory import TextMemory
from mooli.frontend.tokenizer import MAX_TEMPLATE_BYTES, Tokenizer, load_tokenizer
from mooli.hub import resolve
from mooli.types import TokenBytes


def with_seed(config: EngineConfig) -> EngineConfig:
    """`config` with a random seed in the place of none."""
    return replace(config, random_seed=secrets.randbelow(2**30)) if config.random_seed is None else config


def check_preferred(config: EngineConfig) -> None:
    """Raise ConfigError for `preferred_sampling_params` that every request would fail on."""
    preferred = config.preferred_sampling
    # What a request may still add is left open: the length here, and ids are checked when the vocabulary is known.
    request = {} if "max_new_tokens" in preferred else {"max_new_tokens": None}
    try:
        parse_sampling_params(request, vocab_size=2**31, next_seed=lambda: 0, preferred=preferred)
    except SamplingParamsError as exc:
        raise ConfigError(f"preferred_sampling_params: {exc}") from exc


def open_tokenizer(config: EngineConfig, model_path: Path) -> Tokenizer | None:
    """The tokenizer that `config` asks for, with the chat template it asks for. None with `skip_tokenizer_init`.

    Raises TokenizerError, ChatTemplateError, ModelNotFoundError or ConfigError.
    """
    if config.skip_tokenizer_init:
        return None
    tokenizer = load_tokenizer(model_path if config.tokenizer_path is None else resolve(config.tokenizer_path))
    if config.chat_template is not None:
        source = _template_source(config.chat_template)
        if tokenizer.chat_template is not None:
            tokenizer.chat_template = tokenizer.chat_template.with_source(source)
        else:
            tokenizer.chat_template = ChatTemplate(source, special_tokens=tokenizer.special_tokens)
        tokenizer.chat_template.compile()
    return tokenizer


def input_rules(
    config: EngineConfig, facts: EngineFacts, tokenizer: Tokenizer | None, wire_format: WireFormat = PLAIN_TEXT
) -> InputRules:
    """What every call has in common. `config.random_seed` must be set (`with_seed`)."""
    return InputRules(
        encoder=tokenizer,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        eos_ids=_eos_ids(facts, tokenizer),
        namespace=facts.cache_namespace,
        next_seed=_seed_stream(config.random_seed or 0),
        preferred=config.preferred_sampling,
        allow_auto_truncate=config.allow_auto_truncate,
        has_reasoning=wire_format.name is not None,
        texts=None if tokenizer is None else TextMemory(tokenizer),
    )


def token_bytes(tokenizer: Tokenizer, facts: EngineFacts, wire_format: WireFormat) -> TokenBytes:
    """What grammars must know of the vocabulary: markers of the wire format are text to them. Some tenths of a second
    the first time."""
    calls = () if wire_format.calls is None else wire_format.calls.marker_tokens
    markers = frozenset((*wire_format.marker_tokens, *calls))
    return tokenizer.grammar_tokens(facts.vocab_size, tuple(sorted(_eos_ids(facts, tokenizer))), markers)


def _eos_ids(facts: EngineFacts, tokenizer: Tokenizer | None) -> frozenset[int]:
    eos_ids = frozenset(facts.eos_ids) | (frozenset() if tokenizer is None else tokenizer.eos_ids)
    return frozenset(token_id for token_id in eos_ids if 0 <= token_id < facts.vocab_size)


def sampling_defaults(model_path: Path) -> dict[str, Any]:
    """Sampling parameters that the model's generation_config.json recommends; {} where there is none.

    Raises ConfigError for values that no request could have.
    """
    file = model_path / "generation_config.json"
    if not model_path.is_dir() or not file.is_file():
        return {}
    given = read_json(file)
    recommended = {name: given[name] for name in _RECOMMENDED if given.get(name) is not None}
    if recommended.get("top_k") == 0:  # transformers' way to say the whole vocabulary
        del recommended["top_k"]
    if given.get("do_sample") is False:
        recommended["temperature"] = 0.0
    try:
        parse_sampling_params(recommended, vocab_size=2**31, next_seed=lambda: 0)
    except SamplingParamsError as exc:
        raise ConfigError(f"{file}: {exc}. Correct the file, or start with --sampling-defaults openai") from exc
    return recommended


_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _template_source(given: str) -> str:
    """The template itself, or what is in the file of that name."""
    if "{" in given:
        return given
    try:
        text = read_given_file(Path(given).expanduser(), MAX_TEMPLATE_BYTES).decode("utf-8")
    except (OSError, RuntimeError, ValueError) as exc:
        raise ConfigError(f"chat_template={given!r} is neither a template nor a file that can be read: {exc}") from exc
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _seed_stream(seed: int) -> Callable[[], int]:
    """Seeds for requests that bring none: the same for the same calls in the same order."""
    generator = random.Random(seed)
    lock = threading.Lock()

    def next_seed() -> int:
        with lock:
            return generator.getrandbits(64)

    return next_seed
