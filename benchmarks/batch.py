"""Whether `mooli batch` loses nothing, whatever happens, and what its order brings.

kills    ends the command with SIGKILL again and again, and compares the results with those of a run left alone.
         Rows are answered by a server of this process, or with --model by an engine of the command.
million  a long file of short rows, answered by nobody: time, and the most memory that was in use.
order    a shuffled file of rows that share heads, with a cache that holds few of them: rows a second by prefix and in
         the order of the file, in turns.

    python benchmarks/batch.py kills [--rows 500] [--kills 200] [--model demo]
    python benchmarks/batch.py million [--rows 1000000]
    python benchmarks/batch.py order [--model demo] [--heads 40] [--rows-each 25] [--turns 2]

Exit status 1 if a row is lost, there twice, or other bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

from mooli import cli
from mooli.batches import order
from mooli.batches.output import ResultFiles
from mooli.batches.rows import Row
from mooli.batches.runner import Batch


def chat(custom_id: str, system: str, question: str, max_tokens: int = 8, **body: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def command(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "mooli", "batch", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), *flags]


# -- kills -------------------------------------------------------------------------------------------------------------
def rows_to_kill(count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Few heads, some rows the same, some wrong, some sampled."""
    for number in range(count):
        head, question = f"You know all of subject {number % 7}.", f"What is {rng.randrange(count)}?"
        if number % 10 == 9:
            yield {**chat(f"row {number}", head, question), "url": "/v1/embeddings"}
        elif number % 10 == 4:
            yield chat(f"row {number}", head, question, max_tokens=-1)
        else:
            yield chat(f"row {number}", head, question, temperature=number % 2)


@contextlib.asynccontextmanager
async def answering(rng: random.Random) -> AsyncIterator[str]:
    """The address of a server that answers with what it was asked. Nothing it draws is the same twice."""

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []})

    async def answer(request: web.Request) -> web.Response:
        body = await request.json()
        if body["max_tokens"] < 1:
            return web.json_response({"error": {"message": "max_tokens is too small"}}, status=400)
        await asyncio.sleep(rng.random() * 0.01)
        text = body["messages"][-1]["content"].upper()
        details = {"cached_tokens": rng.randrange(20)}
        return web.json_response(
            {
                "id": f"chatcmpl-{rng.getrandbits(128):032x}", "object": "chat.completion", "created": int(time.time()),
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 20, "completion_tokens": 5, "prompt_tokens_details": details},
            }
        )  # fmt: skip

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def start(words: list[str]) -> asyncio.subprocess.Process:
    quiet = asyncio.subprocess.DEVNULL
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    return await asyncio.create_subprocess_exec(*words, stdin=quiet, stderr=quiet, env=environment)


def num_kept(folder: Path) -> int:
    try:
        return (folder / "out.jsonl.journal").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


async def killed(words: list[str], folder: Path, num_lines: int, rng: random.Random) -> bool:
    """Start the command, and kill it when that many lines are new, or soon after its start for none. Whether it was
    killed before its end."""
    before = num_kept(folder)
    process = await start(words)
    if num_lines == 0:
        await asyncio.sleep(rng.random())
    while process.returncode is None and num_kept(folder) < before + num_lines:
        await asyncio.sleep(0.002)
    await asyncio.sleep(rng.random() * 0.005)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    return await process.wait() == -9


def results(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("out.jsonl", "out.errors.jsonl")]


def problems(folder: Path, expected: list[bytes], count: int) -> list[str]:
    """What is wrong with the results."""
    found = results(folder)
    names = [json.loads(line)["custom_id"] for lines in found for line in lines.splitlines()]
    said = []
    if found != expected:
        said.append("the bytes are others than those of a run that was left alone")
    if sorted(names) != sorted(f"row {number}" for number in range(count)):
        said.append("a row is not there, or is there twice")
    if sorted(path.name for path in folder.iterdir()) != ["in.jsonl", "out.errors.jsonl", "out.jsonl"]:
        said.append(f"files were left: {sorted(path.name for path in folder.iterdir())}")
    return said


async def run_kills(args: argparse.Namespace) -> int:
    rng = random.Random(args.seed)
    rows = list(rows_to_kill(args.rows, rng))
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / name for name in ("whole", "killed")]
        for folder in folders:
            folder.mkdir()
            write_rows(folder / "in.jsonl", rows)
        async with answering(rng) as url:
            flags = ["--url", url] if args.model is None else ["--model-path", args.model, "--max-total-tokens", "8192"]
            flags += ["--max-concurrency", "4"]
            status = await (await start(command(folders[0], *flags))).wait()
            expected = results(folders[0])
            start_s, num_killed, num_whole = time.perf_counter(), 0, 0
            while num_killed < args.kills:
                # So many a time that the last kill comes about when the last row does.
                num_lines = rng.randrange(2 * args.rows // args.kills + 1)
                if await killed(command(folders[1], *flags), folders[1], num_lines, rng):
                    num_killed += 1
                elif (folders[1] / "out.jsonl").exists():  # done too early: the same again, from the beginning
                    num_whole += 1
                    if said := problems(folders[1], expected, args.rows):
                        print("\n".join(said))
                        return 1
                    for name in ("out.jsonl", "out.errors.jsonl"):
                        (folders[1] / name).unlink()
            last = await (await start(command(folders[1], *flags))).wait()
        said = problems(folders[1], expected, args.rows)
        if status != last:
            said.append(f"exit statuses differ: {status} and {last}")
        took_s = time.perf_counter() - start_s
        print(
            f"{args.rows} rows, {num_killed} kills in {took_s:.0f} s, {num_whole + 1} times to the end: "
            + ("; ".join(said) or "every row once, the same bytes")
        )
        return 1 if said else 0


# -- a million rows ----------------------------------------------------------------------------------------------------
def run_million(args: argparse.Namespace) -> int:
    """In this process, whose memory is looked at."""
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(
            folder / "in.jsonl",
            (chat(f"row {n}", f"Subject {rng.randrange(1000)}.", f"What is {rng.random()}?") for n in range(args.rows)),
        )
        answer = {
            "id": "chatcmpl-0", "object": "chat.completion", "created": 0,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Nothing."}}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 2},
        }  # fmt: skip

        async def send(url: str, body: dict[str, Any]) -> tuple[int, Any]:
            return 200, answer

        files = ResultFiles(folder / "out.jsonl", folder / "out.errors.jsonl")
        times = [time.perf_counter()]
        with Batch(folder / "in.jsonl", folder / "out.jsonl.journal", files) as batch:
            times.append(time.perf_counter())
            batch.begin({}, 0)
            asyncio.run(batch.run(send, max_concurrency=64))
            times.append(time.perf_counter())
        with Batch(folder / "in.jsonl", folder / "out.jsonl.journal", files) as batch:
            times.append(time.perf_counter())
            num_pending = batch.num_pending
            batch.finish()
        times.append(time.perf_counter())
        with files.output.open("rb") as lines:
            count = sum(1 for _ in lines)
    read_s, run_s, again_s, finish_s = (end - begin for begin, end in itertools.pairwise(times))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{args.rows} rows: read and put in order in {read_s:.1f} s, answered in {run_s:.1f} s, taken up again in"
        f" {again_s:.1f} s, results in {finish_s:.1f} s; most memory {peak_mib:.0f} MiB"
    )
    return 0 if (count, num_pending) == (args.rows, 0) else 1


# -- order -------------------------------------------------------------------------------------------------------------
WORDS = ("river", "stone", "window", "garden", "letter", "market", "winter", "engine", "silver", "bridge", "forest")


def run_order(args: argparse.Namespace) -> int:
    rng = random.Random(args.seed)
    heads = [" ".join(rng.choices(WORDS, k=args.head_words)) for _ in range(args.heads)]
    rows = [
        chat(f"{number} {each}", head, f"Word {rng.randrange(10**6)}?", max_tokens=args.max_tokens)
        for number, head in enumerate(heads)
        for each in range(args.rows_each)
    ]
    rng.shuffle(rows)
    rates: dict[str, list[float]] = {"prefix": [], "file": []}
    results: set[bytes] = set()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder / "in.jsonl", rows)
        for _ in range(args.turns):
            for by in rates:
                flags = ["--by", by, "--max-total-tokens", str(args.cache_tokens), "--model", args.model]
                words = [sys.executable, __file__, "order-run", *flags, "--folder", place]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                last = done.stderr.splitlines()[-1]
                rates[by].append(len(rows) / float(done.stdout))
                results.add((folder / "out.jsonl").read_bytes())
                print(f"{by}: {rates[by][-1]:.2f} rows/s; {last}", flush=True)
    print(f"{len(rows)} rows of {args.heads} heads: {max(rates['prefix']) / max(rates['file']):.2f} times file order")
    return 0 if len(results) == 1 else 1


def run_order_once(args: argparse.Namespace) -> int:
    """Prints the seconds from the first row to the results."""
    if args.by == "file":
        places = iter(range(10**9))

        def by_place(row: Row) -> bytes:
            return next(places).to_bytes(8, "big")

        order.order_key = by_place
    began, run = [0.0], Batch.run

    async def timed(self: Batch, *words: Any, **options: Any) -> None:
        began[0] = time.perf_counter()
        await run(self, *words, **options)

    Batch.run = timed  # type: ignore[method-assign]
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    flags = ["--model-path", args.model, "--max-total-tokens", args.max_total_tokens, "--overwrite"]
    words = ["in.jsonl", "-o", "out.jsonl", *flags, "--max-concurrency", "4", "--context-length", "1024"]
    os.chdir(args.folder)
    status = cli.main(["batch", *words])
    print(time.perf_counter() - began[0])
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description="What mooli batch keeps, and what its order brings.")
    kinds = parser.add_subparsers(required=True)
    kills = kinds.add_parser("kills")
    kills.add_argument("--rows", type=int, default=500)
    kills.add_argument("--kills", type=int, default=200)
    kills.add_argument("--model")
    kills.set_defaults(run=lambda args: asyncio.run(run_kills(args)))
    million = kinds.add_parser("million")
    million.add_argument("--rows", type=int, default=1_000_000)
    million.set_defaults(run=run_million)
    by_order = kinds.add_parser("order")
    by_order.add_argument("--model", default="demo")
    by_order.add_argument("--heads", type=int, default=40)
    by_order.add_argument("--rows-each", type=int, default=25)
    by_order.add_argument("--head-words", type=int, default=256)
    by_order.add_argument("--max-tokens", type=int, default=4)
    by_order.add_argument("--cache-tokens", type=int, default=1408)
    by_order.add_argument("--turns", type=int, default=2)
    by_order.set_defaults(run=run_order)
    once = kinds.add_parser("order-run")
    for name in ("--by", "--max-total-tokens", "--model", "--folder"):
        once.add_argument(name, required=True)
    once.set_defaults(run=run_order_once)
    for kind in (kills, million, by_order):
        kind.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if getattr(args, "model", None) and Path(args.model).exists():
        args.model = str(Path(args.model).resolve())  # the command runs in another folder
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
