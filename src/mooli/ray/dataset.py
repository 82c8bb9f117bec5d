"""A model over the rows of a Ray dataset: `mooli.ray.batch`.

Owns what becomes of a row: its prompt, its answer or what was wrong with it, in columns beside its own; and the order
in which an actor computes the rows of a block. One engine an actor. How blocks come and go, which actor gets one, what
is tried again and what is kept for a second run is Ray's.

One row never stops the others: what is wrong with it is in its column `error`. What would be wrong with every row is
raised: arguments that cannot be used at once, an engine that breaks down where Ray then starts the actor anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mooli.config import EngineConfig
from mooli.errors import ChatTemplateError, ConfigError, RequestError, RequestFailedError

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

Row = dict[str, Any]
Source = str | Callable[[Row], Any]
"""Where a row's prompt or messages are: the name of a column, or what makes them of the row."""

COLUMNS = {
    "generated_text": "string",
    "finish_reason": "string",
    "prompt_tokens": "int64",
    "completion_tokens": "int64",
    "cached_tokens": "int64",
    "error": "string",
}
"""What a row gets, and its Arrow type. Where there is an error, all others are null; else `error` is."""

ROWS_PER_SLOT = 2
"""Rows that are on their way to an engine for each that it computes at a time."""

SEED_BYTES = 4


def batch(
    dataset: Dataset,
    *,
    model_path: str = "demo",
    prompt: Source | None = None,
    messages: Source | None = None,
    sampling_params: Mapping[str, Any] | Callable[[Row], Mapping[str, Any]] | None = None,
    concurrency: int | tuple[int, int] = 1,
    num_cpus: int | None = None,
    resources: Mapping[str, float] | None = None,
    batch_size: int | None = None,
    **engine: Any,
) -> Dataset:
    """`dataset` with an answer beside each row: the columns of `COLUMNS`. Nothing runs before the dataset is read.

    prompt, messages: exactly one. A column's name, or a function of the row. Messages are a list as `Engine.chat` takes
    it, or its JSON. sampling_params: of all rows, or a function of the row.
    concurrency: actors, each with an engine of its own; (least, most): as many as there is work for. num_cpus: of each,
    and its threads; default: all but one of the smallest node that is alive, which Ray needs to read and write.
    resources: what else an actor takes, {"NPU": 1} for example.
    batch_size: rows that an engine gets at a time, in the order of their prompts; default: a whole block.
    engine: further arguments of `mooli.Engine`.

    A row that brings no sampling_seed gets one of `random_seed` (0) and of what it asks for. So on the CPU its answer
    depends on no other row, block or actor, and is the same in a second run.

    Raises ConfigError for arguments that cannot be used.
    """
    import ray

    asks = _Asks.read(prompt=prompt, messages=messages, sampling_params=sampling_params)
    least, most = concurrency if isinstance(concurrency, tuple) else (concurrency, concurrency)
    if not 1 <= least <= most:
        raise ConfigError(f"concurrency={concurrency!r}: give the number of actors, or (least, most) of them")
    if num_cpus is None:
        num_cpus = max(1, _least_cpus(ray) - 1)
    if num_cpus < 1:
        raise ConfigError(f"num_cpus={num_cpus!r}: an engine needs at least one")
    arguments = {"random_seed": 0, "num_threads": num_cpus, **engine, "model_path": model_path}
    EngineConfig.from_kwargs(**arguments)
    return dataset.map_batches(
        BlockAnswers,
        fn_constructor_kwargs={"asks": asks, "arguments": arguments},
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=num_cpus,
        resources=None if resources is None else dict(resources),
        batch_size=batch_size,
        batch_format="pyarrow",
        zero_copy_batch=True,
    )


def _least_cpus(ray: Any) -> int:
    """Starts Ray on this machine, as datasets do, where it is not there yet."""
    if not ray.is_initialized():
        ray.init()
    return int(min(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]))


@dataclass(frozen=True, slots=True)
class _Asks:
    """What rows ask for. is_chat: `source` gives messages."""

    source: Source
    is_chat: bool
    sampling_params: Mapping[str, Any] | Callable[[Row], Mapping[str, Any]] | None

    @classmethod
    def read(
        cls,
        *,
        prompt: Source | None,
        messages: Source | None,
        sampling_params: Mapping[str, Any] | Callable[[Row], Mapping[str, Any]] | None,
    ) -> _Asks:
        """Raises ConfigError."""
        if (prompt is None) == (messages is None):
            raise ConfigError("a batch needs prompt=… or messages=…, and not both: a column's name, or a function")
        source: Any = messages if prompt is None else prompt
        if not isinstance(source, str) and not callable(source):
            raise ConfigError(f"{source!r} is neither the name of a column nor a function of a row")
        if sampling_params is not None and not callable(sampling_params):
            if not isinstance(sampling_params, Mapping):
                raise ConfigError(f"sampling_params={sampling_params!r} is neither a mapping nor a function of a row")
            _check_samples(sampling_params, ConfigError)
        return cls(source, prompt is None, sampling_params)

    def of(self, row: Row, random_seed: int) -> _Ask:
        """Raises whatever a function of the user raises, KeyError for a column that is not there, and RequestError."""
        asked = self.source(row) if callable(self.source) else row[self.source]
        if self.is_chat and isinstance(asked, str):
            asked = json.loads(asked)
        if asked is None or (self.is_chat and not isinstance(asked, Sequence)):
            what = "messages" if self.is_chat else "prompt"
            raise RequestError(f"this row's {what} cannot be {str(asked)[:80]!r}", argument=what)
        if self.is_chat:
            # Arrow gives all messages of a column the same fields, and null to those that have none.
            asked = [_without_nulls(message) for message in asked]
        given = self.sampling_params(row) if callable(self.sampling_params) else self.sampling_params
        params = dict(given or {})
        _check_samples(params, RequestError)
        key = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False, default=str)
        if params.get("sampling_seed") is None:
            params["sampling_seed"] = _seed(random_seed, key, params)
        return _Ask(key, asked, params)


def _without_nulls(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    return {name: value for name, value in message.items() if value is not None}


def _check_samples(params: Mapping[str, Any], error: type[ConfigError | RequestError]) -> None:
    if params.get("n", 1) not in (1, None):
        raise error(f"n={params['n']!r}: a row has one answer; give rows several times instead")


def _seed(random_seed: int, key: str, params: Mapping[str, Any]) -> int:
    asked = json.dumps([random_seed, key, params], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=SEED_BYTES).digest(), "little") >> 1


@dataclass(frozen=True, slots=True)
class _Ask:
    """A row's request. key: sorted by it, prompts that begin alike stand beside each other."""

    key: str
    asked: Any
    params: dict[str, Any]


class BlockAnswers:
    """What an actor of Ray Data runs: its engine, and the rows of one block after the other."""

    def __init__(self, asks: _Asks, arguments: Mapping[str, Any]) -> None:
        from mooli.frontend.engine import Engine

        self._asks = asks
        self._random_seed = int(arguments["random_seed"])
        self._engine = Engine(**arguments)
        self._num_at_once = ROWS_PER_SLOT * int(self._engine.get_server_info()["max_running_requests"])

    def __call__(self, block: pyarrow.Table) -> pyarrow.Table:
        """Raises ConfigError if the block has one of `COLUMNS` already, and EngineError if the engine is gone."""
        import pyarrow

        if taken := [name for name in COLUMNS if name in block.column_names]:
            raise ConfigError(f"the dataset has a column {taken[0]!r} already: rename it (Dataset.rename_columns)")
        found = asyncio.run(self._answers(block.to_pylist()))
        for name, kind in COLUMNS.items():
            values = pyarrow.array([answer.get(name) for answer in found], pyarrow.type_for_alias(kind))
            block = block.append_column(name, values)
        return block

    async def _answers(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """In the order of `rows`; computed in that of their prompts, so that what several share is computed once."""
        found: list[dict[str, Any]] = [{} for _ in rows]
        asks: list[tuple[int, _Ask]] = []
        for place, row in enumerate(rows):
            try:
                asks.append((place, self._asks.of(row, self._random_seed)))
            except Exception as exc:  # of a function that the user has given
                found[place] = {"error": _words(exc)}
        waiting = iter(sorted(asks, key=lambda item: item[1].key))
        workers = [asyncio.ensure_future(self._work(waiting, found)) for _ in range(min(self._num_at_once, len(asks)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        return found

    async def _work(self, waiting: Iterator[tuple[int, _Ask]], found: list[dict[str, Any]]) -> None:
        for place, ask in waiting:
            found[place] = await self._answer(ask)

    async def _answer(self, ask: _Ask) -> dict[str, Any]:
        generate = self._engine.async_chat if self._asks.is_chat else self._engine.async_generate
        try:
            answer: Any = await generate(ask.asked, ask.params)
        except (RequestError, RequestFailedError, ChatTemplateError) as exc:
            return {"error": _words(exc)}
        meta = answer["meta_info"]
        return {
            "generated_text": answer["text"],
            "finish_reason": meta["finish_reason"]["type"],
            **{name: meta[name] for name in ("prompt_tokens", "completion_tokens", "cached_tokens")},
        }


def _words(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"
