"""`mooli.Engine` in process, all requests streamed.

python mooli_worker.py MODEL.gguf NUM_THREADS KV_TOKENS [QUANTIZATION]
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from protocol import Ledger, serve

import mooli


async def converse(engine: mooli.Engine, ledger: Ledger, conversation: int) -> None:
    sampling = {"temperature": 0.0, "max_new_tokens": ledger.output_len, "ignore_eos": True}
    goes_on = True
    while goes_on:
        sent_s, first_s, ids = ledger.now(), 0.0, []
        stream = await engine.async_generate(
            input_ids=ledger.prompt(conversation), sampling_params=sampling, stream=True
        )
        async for piece in stream:
            first_s = first_s or ledger.now()
            ids = piece["output_ids"]
        goes_on = ledger.answered(conversation, ids, sent_s, first_s, ledger.now())


async def run_all(engine: mooli.Engine, ledger: Ledger) -> None:
    async def place() -> None:
        while (fresh := ledger.begin()) is not None:
            await converse(engine, ledger, fresh)

    await asyncio.gather(*(place() for _ in range(ledger.at_once)))


def load() -> tuple[dict[str, Any], Callable[[Ledger], None]]:
    path, num_threads, kv_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    engine = mooli.Engine(
        model_path=path,
        quantization=sys.argv[4] if len(sys.argv) > 4 else None,
        num_threads=num_threads,
        max_total_tokens=kv_tokens,
        speculative_algorithm="none",
    )
    info = engine.get_server_info()
    facts = {
        "version": info["version"],
        "isa": info["backend"]["isa"],
        "weight_bytes": info["weight_bytes"],
        "kv_cache_bytes": info["kv_cache_bytes"],
    }
    return facts, lambda ledger: asyncio.run(run_all(engine, ledger))


if __name__ == "__main__":
    serve(load)
