"""From a configuration to an engine core: the only place that knows both the deciding and the computing column.

Owns the order of building (backend, configuration, weights, pool, scheduler) and the defaults that depend on model,
memory and device. Never starts a thread and never handles text.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mooli.arguments import parse_object
from mooli.backends import create_backend
from mooli.backends.base import NUMERIC_VERSION, Backend, CacheSpec, Limits
from mooli.cache.kv_cache import KVCache
from mooli.config import NGRAM_DRAFT_TOKENS, EngineConfig
from mooli.engine.core import EngineCore
from mooli.engine.disk import open_disk
from mooli.engine.facts import CacheNamespace, EngineFacts, device_words
from mooli.engine.host import open_host
from mooli.engine.pool_size import (
    DRAFT_STEP_TOKENS,
    GIB,
    PoolNeeds,
    context_for,
    kv_type,
    num_pool_pages,
    state_room,
)
from mooli.engine.weight_sizes import check_weights_fit
from mooli.errors import ConfigError, EngineDeadError
from mooli.grammar.compiler import Grammars
from mooli.hub import model_digest
from mooli.models.config import ModelConfig
from mooli.models.loader import open_model
from mooli.models.registry import create_model
from mooli.models.sharding import Place, check_size, part_checkpoint
from mooli.runner.base import Runner
from mooli.runner.model_runner import ModelRunner
from mooli.scheduler.drafts import DraftSettings, ForcedSettings
from mooli.scheduler.planning import Pace
from mooli.scheduler.scheduler import Scheduler
from mooli.scheduler.write_behind import PageBytes

if TYPE_CHECKING:
    from mooli.engine.kv_events import KvEventPublisher, KvEventsConfig
    from mooli.engine.ranks import RankTeam

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): called as building goes on."""

VocabSize = Callable[[], "int | None"]
"""Gives the size of a tokenizer's vocabulary once it is known; None without one."""


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A core ready to step. `bind_thread` is to be called once on the thread that will step; `close` gives memory,
    threads and processes back, when nothing steps any more. `watch` has a function called, on another thread, if a
    process that computes a part of the model breaks down."""

    core: EngineCore
    model_config: ModelConfig
    facts: EngineFacts
    bind_thread: Callable[[], None]
    close: Callable[[], None]
    watch: Callable[[Callable[[EngineDeadError], None]], None] = lambda callback: None


class SoloTeam:
    """The processes that an engine is built on, in the order of the steps in which several take part. Here there is
    one, and nobody to ask; for several see `RankTeam`."""

    def meet(self, backend: Backend) -> int:
        """Available bytes of the device, before anything is loaded."""
        return backend.memory().available_bytes

    def needs(self, own: PoolNeeds) -> list[PoolNeeds]:
        """What decides the size of the pool, for each rank, once all have loaded."""
        return [own]

    def allocate(self, spec: CacheSpec, num_pages: int, limits: Limits, vocab_size: int) -> None:
        """Have the other ranks allocate the same."""

    def runner(self, own: Runner) -> Runner:
        """What computes a step on all ranks."""
        return own

    def pages(self, own: Backend, part_bytes: int) -> PageBytes:
        """The pages of all ranks as bytes, of which one has `part_bytes` in each."""
        return own

    def describe(self, needs: Sequence[PoolNeeds]) -> dict[str, Any]:
        """What there is to say of the ranks."""
        return {}

    def watch(self, callback: Callable[[EngineDeadError], None]) -> None:
        """See `BuiltEngine.watch`."""

    def stop(self) -> None:
        """The engine is about to close."""

    def close(self) -> None:
        """End the other ranks."""


def build_engine(
    config: EngineConfig,
    model_path: Path,
    *,
    tokenizer_vocab_size: VocabSize = lambda: None,
    progress: Progress | None = None,
) -> BuiltEngine:
    """Load the model at `model_path` and size everything around it.

    tokenizer_vocab_size: ids with a text, asked for once the weights are loaded; a model may have more rows than that,
    which must never be sampled.

    Raises BackendUnavailableError, ConfigError, OutOfMemoryError, or any ModelError.
    """
    started = time.perf_counter()
    backend = create_backend(
        config.backend_name,
        dtype=config.dtype,
        quantization=config.quantization,
        num_threads=config.num_threads,
    )
    team = _team(config, model_path)
    try:
        return _build(config, model_path, backend, team, tokenizer_vocab_size, progress or _silent, started)
    except BaseException:
        team.close()
        backend.close()
        raise


def _team(config: EngineConfig, model_path: Path) -> SoloTeam | RankTeam:
    if config.tp_size == 1:
        return SoloTeam()
    from mooli.engine.ranks import RankTeam  # here: importing what it needs takes 30 ms, of every start

    return RankTeam(config, model_path)


def _build(
    config: EngineConfig,
    model_path: Path,
    backend: Backend,
    team: SoloTeam | RankTeam,
    tokenizer_vocab_size: VocabSize,
    progress: Progress,
    started: float,
) -> BuiltEngine:
    events = _events_config(config)
    page_size = config.page_size or backend.default_page_size
    backend.check_page_size(page_size)
    model_config, checkpoint = open_model(
        model_path,
        load_format=config.load_format,
        overrides=config.model_overrides,
        seed=config.random_seed or 0,
        context=config.context_length,
    )
    try:
        _check_context(config, model_config)
        check_size(model_config, config.tp_size)
        available_bytes = team.meet(backend)
        check_weights_fit(config, model_config, model_path, available_bytes)
        place = Place(0, config.tp_size)
        own_config = model_config.part(config.tp_size)
        kv_dtype = kv_type(config.kv_cache_dtype, config.dtype, backend.describe().get("dtype"))
        kv_spec = own_config.cache_spec(page_size, kv_dtype)
        _check_states(config, kv_spec)
        # A layer that the backend cannot compute is found before a weight is read.
        bytes_per_page = backend.kv_bytes_per_page(kv_spec)
        model = create_model(
            own_config,
            part_checkpoint(model_config, checkpoint, place),
            backend,
            lambda done, total: progress("Loading weights", done, total),
        )
    finally:
        checkpoint.close()
    # While weights were loaded, others may have taken or claimed some.
    memory = backend.memory()
    # No answer changes where a backend is exact, and what repeats nothing costs next to nothing (docs/log/serving.md).
    drafts = draft_settings(config, "NGRAM" if backend.is_exact else "none")
    needs = PoolNeeds(
        available_bytes=min(available_bytes, memory.available_bytes + backend.weight_bytes()),
        claimed_bytes=memory.claimed_bytes,
        weight_bytes=backend.weight_bytes(),
        bytes_per_page=bytes_per_page,
        page_size=page_size,
        model_context=model_config.max_position_embeddings,
        max_running_requests=config.max_running_requests or backend.default_max_running_requests,
        context_length=config.context_length,
        mem_fraction_static=config.mem_fraction_static,
        max_total_tokens=config.max_total_tokens,
        state_bytes=kv_spec.state_bytes,
        num_tried=0 if drafts is None else drafts.tokens_per_step,
        snapshot_share=config.state_cache_fraction,
    )
    each = team.needs(needs)
    num_pages = min(map(num_pool_pages, each))
    states = state_room(needs)
    context_length = context_for(needs, num_pages)
    if context_length < needs.model_context and config.context_length is None:
        logger.info(
            "context_length is %d: the KV cache holds no more of the %d of the model",
            context_length,
            needs.model_context,
        )
    described = backend.describe()
    step_tokens = config.chunked_prefill_size or backend.default_chunked_prefill_size
    vocab_size = min(model_config.vocab_size, tokenizer_vocab_size() or model_config.vocab_size)
    mixed_tokens = None if step_tokens == -1 else -(-step_tokens // backend.mixed_step_parts)
    grammars = Grammars(vocab_size)
    cache = KVCache(
        num_pages,
        page_size,
        enabled=not config.disable_radix_cache,
        match_granularity_tokens=backend.match_granularity_tokens,
        states=states,
        retention_share=config.retention_share,
    )
    scheduler = Scheduler(
        cache,
        max_batch_tokens=step_tokens,
        # A request holds at least one page, and one state where there are some.
        max_running_requests=min(
            needs.max_running_requests if states is None else states.num_running,
            num_pages,
        ),
        context_length=context_length,
        vocab_size=vocab_size,
        policy=config.schedule_policy,
        priorities=config.enable_priority_scheduling,
        mixed_prefill_tokens=mixed_tokens,
        computed_in=described.get("dtype"),
        drafts=drafts,
        # Like guesses: where they change no answer, or were asked for.
        forced=ForcedSettings() if backend.is_exact or drafts is not None else None,
        constraints=grammars.constraint_of,
    )
    progress("Allocating KV cache", 0, 1)
    limits = Limits(
        max_tokens=scheduler.max_batch_tokens,
        max_rows=scheduler.max_running_requests,
        max_pages_per_row=-(-context_length // page_size),
        num_states=0 if states is None else states.num_slots,
    )
    team.allocate(kv_spec, num_pages, limits, vocab_size)
    backend.allocate(kv_spec, num_pages, limits)
    progress("Allocating KV cache", 1, 1)
    own_runner = ModelRunner(model, backend, vocab_size)
    runner = team.runner(own_runner)
    namespace = cache_namespace(config, model_path, model_config, backend, kv_spec)
    cache.digests.engine = namespace.root
    pages = team.pages(backend, bytes_per_page)
    page_bytes = bytes_per_page * config.tp_size
    host = open_host(config, cache, backend, kv_spec, namespace.root, scheduler.max_batch_tokens)
    if host is not None:
        scheduler.attach_host(host)
    disk = open_disk(config, cache, pages, page_bytes, kv_spec, namespace, scheduler.max_batch_tokens, host)
    if disk is not None:
        scheduler.attach_disk(disk)
    facts = EngineFacts(
        resolved_model_path=str(model_path),
        architecture=model_config.architecture,
        vocab_size=vocab_size,
        eos_ids=tuple(sorted(token_id for token_id in model_config.eos_ids if 0 <= token_id < vocab_size)),
        model_context_length=model_config.max_position_embeddings,
        context_length=context_length,
        dtype=config.dtype,
        kv_cache_dtype=kv_spec.dtype,
        quantization=config.quantization,
        page_size=page_size,
        num_pages=num_pages,
        max_total_num_tokens=num_pages * page_size,
        max_running_requests=scheduler.max_running_requests,
        chunked_prefill_size=scheduler.max_batch_tokens,
        num_parameters=sum(math.prod(spec.shape) for spec in model_config.tensors().values()),
        weight_bytes=sum(need.weight_bytes for need in each),
        kv_cache_bytes=num_pages * bytes_per_page * config.tp_size,
        num_state_slots=limits.num_states,
        state_bytes=kv_spec.state_bytes,
        load_time_s=time.perf_counter() - started,
        cache_namespace=namespace.digest,
        speculative_algorithm=None if drafts is None else "NGRAM",
        backend={**described, **team.describe(each)},
        cache_ingredients=namespace.to_dict(),
    )
    logger.info(
        "%s on backend %s (%s): context %d tokens, KV cache %d tokens, weights %.2f GiB",
        model_path.name,
        backend.name,
        device_words(described),
        context_length,
        facts.max_total_num_tokens,
        facts.weight_bytes / GIB,
    )
    # Where an answer depends on how a prompt is cut, the cut must not depend on a clock.
    pace = Pace(mixed_tokens, step_tokens) if backend.is_exact and mixed_tokens is not None else None
    core = EngineCore(scheduler, runner, pace, grammars)
    publisher = _publisher(events, cache)

    def close() -> None:
        core.close_disk()
        # The core outlives this, for who asks a closed engine; the device must not.
        core.release_runner()
        if publisher is not None:
            publisher.close()
        team.stop()
        own_runner.close()
        team.close()

    return BuiltEngine(core, model_config, facts, backend.bind_thread, close, team.watch)


def _events_config(config: EngineConfig) -> KvEventsConfig | None:
    """Of what is published of the cache, checked before any weight is read; None for nothing."""
    if config.kv_events_config is None:
        return None
    from mooli.engine.kv_events import KvEventsConfig  # here: hardly anybody needs it

    wanted = KvEventsConfig.of(parse_object("kv_events_config", config.kv_events_config))
    if wanted.is_on and config.disable_radix_cache:
        raise ConfigError("kv_events_config has no effect with disable_radix_cache: give one of them")
    return wanted if wanted.is_on else None


def _publisher(wanted: KvEventsConfig | None, cache: KVCache) -> KvEventPublisher | None:
    """Of what becomes of pages, where it is wanted."""
    if wanted is None:
        return None
    from mooli.engine.kv_events import KvEventPublisher

    publisher = KvEventPublisher(wanted, cache.page_size)
    cache.tell(publisher.take)
    return publisher


def _check_context(config: EngineConfig, model_config: ModelConfig) -> None:
    """Refuse a context beyond what the model was made for, before any weight is read."""
    longest = model_config.max_position_embeddings
    if config.context_length is not None and config.context_length > longest:
        raise ConfigError(
            f"context_length={config.context_length} is more than the {longest} positions of the model: lower it, or"
            f" state a longer context with json_model_override_args='{{\"max_position_embeddings\": …}}' if the model"
            " can do that"
        )


def _check_states(config: EngineConfig, kv_spec: CacheSpec) -> None:
    """Refuse an argument about recurrent states for a model that has none."""
    if config.state_cache_fraction is not None and not kv_spec.state_layers:
        raise ConfigError(
            f"state_cache_fraction={config.state_cache_fraction} is of no use: no layer of this model keeps a recurrent"
            " state; leave it out"
        )


def draft_settings(config: EngineConfig, default: str = "none") -> DraftSettings | None:
    """What `speculative_algorithm` (or `default`, where nothing is said) and its arguments ask for; None where no
    tokens are to be guessed."""
    if (config.speculative_algorithm or default) == "none":
        return None
    tokens = config.speculative_num_draft_tokens or NGRAM_DRAFT_TOKENS
    return DraftSettings(tokens, max(tokens, DRAFT_STEP_TOKENS), *config.ngram_match_window)


def cache_namespace(
    config: EngineConfig, model_path: Path, model_config: ModelConfig, backend: Backend, kv_spec: CacheSpec
) -> CacheNamespace:
    """What decides the values in the KV cache of an engine whose pool is allocated."""
    is_random = config.load_format == "dummy"
    return CacheNamespace(
        model=model_digest(model_path),
        load_format=config.load_format,
        seed=(config.random_seed or 0) if is_random else None,
        numbers=hashlib.sha256(repr(model_config).encode()).hexdigest()[:32],
        backend=backend.name,
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=kv_spec.dtype,
        page_size=kv_spec.page_size,
        parts=config.tp_size,
        page_format=backend.page_format(),
        numeric_version=NUMERIC_VERSION,
    )


def _silent(stage: str, done: int, total: int) -> None:
    pass
