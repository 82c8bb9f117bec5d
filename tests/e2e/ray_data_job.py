"""A job of Ray Data as users write one, in a process of its own: Ray is as small as it can be, and is gone with it.

    python ray_data_job.py FOLDER URL

FOLDER: for Ray's files and the datasets. URL: of a server. What came out is one line of JSON on standard output.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

GREEDY = {"temperature": 0, "max_new_tokens": 6}
SAMPLED = {"temperature": 0.9, "max_new_tokens": 6, "ignore_eos": True}
BAD_ROWS = {3: {"max_new_tokens": -1}, 4: {"n": 2}}
NUM_ROWS = 12
ENGINE = {"num_cpus": 1, "max_total_tokens": 4096, "random_seed": 5}


def rows() -> list[dict[str, Any]]:
    """Of three groups with a head each, none beside another of its group. Row 5 has no prompt."""
    heads = [f"{name} are what this long beginning is about, and all of its group have it. " * 3 for name in "ABC"]
    made = [{"id": i, "question": f"{heads[i % 3]}Question {i}:"} for i in range(NUM_ROWS)]
    made[5]["question"] = None  # type: ignore[assignment]
    return made


def params_of(row: dict[str, Any]) -> dict[str, Any]:
    return {**SAMPLED, **BAD_ROWS.get(row["id"], {})}


def conversation_of(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {row['id']}."}]


def by_id(dataset: Any) -> list[dict[str, Any]]:
    return sorted(dataset.take_all(), key=lambda row: row["id"])


def prompts(concurrency: int, num_blocks: int) -> list[dict[str, Any]]:
    import ray.data

    import mooli.ray

    dataset = ray.data.from_items(rows(), override_num_blocks=num_blocks)
    found = mooli.ray.batch(
        dataset, model_path="demo", prompt="question", sampling_params=params_of, concurrency=concurrency, **ENGINE
    )
    return by_id(found)


def conversations() -> list[dict[str, Any]]:
    import ray.data

    import mooli.ray

    items = [{"id": i, "said": conversation_of({"id": i})} for i in range(2)]
    # Arrow gives the other messages a null `name` too.
    items[0]["said"] = [{"role": "system", "content": "Be brief.", "name": "x"}, *items[0]["said"]]  # type: ignore
    dataset = ray.data.from_items(items, override_num_blocks=1)
    return by_id(mooli.ray.batch(dataset, messages="said", sampling_params=GREEDY, **ENGINE))


def in_two_runs(folder: Path) -> list[dict[str, Any]]:
    """The second run finds the first one's rows done, and adds its own. What the files have then."""
    import pyarrow
    import pyarrow.parquet
    import ray.data
    from ray.data.checkpoint import CheckpointConfig

    import mooli.ray

    given, out = folder / "in", folder / "out"
    given.mkdir()
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(folder / "done"), delete_checkpoint_on_success=False
    )
    for run in range(2):
        ids = range(run * 3, run * 3 + 3)
        table = pyarrow.table({"id": list(ids), "run": [run] * 3, "question": [f"Number {i}:" for i in ids]})
        pyarrow.parquet.write_table(table, given / f"{run}.parquet")
        dataset = ray.data.read_parquet(str(given))
        found = mooli.ray.batch(dataset, prompt="question", sampling_params=GREEDY, **ENGINE)
        found.write_parquet(str(out))
    ray.data.DataContext.get_current().checkpoint_config = None
    return [row for file in sorted(out.glob("*.parquet")) for row in pyarrow.parquet.read_table(file).to_pylist()]


def over_http(url: str) -> list[dict[str, Any]]:
    """Ray's own processor, at a server."""
    import ray.data
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    def payload(row: dict[str, Any]) -> dict[str, Any]:
        messages = conversation_of(row) if row["id"] else []
        return {"id": row["id"], "payload": {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 6}}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        body = row["http_response"]
        if body.get("error") is not None:  # Arrow gives every row of a block the same fields
            return {"id": row["id"], "text": None, "error": body["error"]["message"]}
        return {"id": row["id"], "text": body["choices"][0]["message"]["content"], "error": None}

    config = HttpRequestProcessorConfig(url=f"{url}/v1/chat/completions", concurrency=1, batch_size=4)
    process = build_processor(config, preprocess=payload, postprocess=answer)
    return by_id(process(ray.data.from_items([{"id": i} for i in range(4)], override_num_blocks=1)))


def main(folder: Path, url: str) -> None:
    import ray
    import ray.data

    import mooli.ray
    from mooli.errors import ConfigError

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints goes to the log
    ray.init(
        num_cpus=4, include_dashboard=False, object_store_memory=80 * 2**20, _temp_dir=str(folder / "ray"),
        _system_config={"prestart_worker_first_driver": False},
    )  # fmt: skip
    found: dict[str, Any] = {
        "one actor": prompts(1, 1),
        "two actors": prompts(2, 4),
        "conversations": conversations(),
        "two runs": in_two_runs(folder),
        "over http": over_http(url),
    }
    dataset = ray.data.from_items([{"error": "mine"}])
    for name, arguments in {
        "both": {"prompt": "a", "messages": "b"},
        "neither": {},
        "samples": {"prompt": "a", "sampling_params": {"n": 2}},
        "actors": {"prompt": "a", "concurrency": 0},
        "argument": {"prompt": "a", "no_such_argument": 1},
    }.items():
        try:
            mooli.ray.batch(dataset, **arguments)
        except ConfigError as exc:
            found[name] = str(exc)
    ray.shutdown()
    print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
