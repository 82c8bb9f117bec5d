"""What constrained output costs and brings: masks, steps, forced runs, and grammars that mean harm.

    masks    200 drawn schemas: time to compile one, and time of a mask and the token after it
    steps    16 rows held to a schema against 16 that are free, in turns: time of a step (must: at most 5 % more)
    forced   JSON answers with forced runs against the same without, in turns (must: 1.25 times the tokens a second);
             every answer is compared
    hostile  grammars made to cost much in one request beside 8 streams: their longest gap (must: under 0.3 s)

Run with nothing else on the machine.

    python benchmarks/grammar.py [--only masks,steps] [--model qwen] [--quick]

Not measured, and only run when it is named (some minutes):

    valid    500 drawn schemas and 300 sets of tools, sampled at temperature 1.5: every finished answer is judged by
             jsonschema, every refusal has to say why
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from loaded import PAGE_SIZE, Loaded, compared_model, demo_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from mooli import Engine
from mooli.bench.results import client_machine
from mooli.cache.kv_cache import KVCache
from mooli.engine.build import draft_settings
from mooli.engine.core import EngineCore
from mooli.errors import GrammarError
from mooli.frontend.chat_encoding import encode_chat
from mooli.frontend.tokenizer import Tokenizer, load_tokenizer
from mooli.frontend.wire_formats.choice import CALL_FORMATS
from mooli.grammar.compiler import Compilation
from mooli.grammar.constraint import GrammarConstraint
from mooli.grammar.language import compiled
from mooli.grammar.vocabulary import open_vocabulary
from mooli.scheduler.drafts import ForcedSettings
from mooli.scheduler.scheduler import Scheduler
from mooli.types import Grammar, Request, SamplingParams
from schemas import hostile_grammars, random_schema

MODELS = {"demo": demo_model, "qwen": compared_model}
NUM_PAGES = 700
ROWS = 16


def text(name: str, **limits: Any) -> dict[str, Any]:
    return {name: {"type": "string", "maxLength": 24, **limits}}


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


PERSON = record(
    **text("first_name"),
    **text("last_name"),
    year_of_birth={"type": "integer", "minimum": 1800, "maximum": 2020},
    **text("country_of_birth"),
    occupation={"enum": ["mathematician", "engineer", "physicist", "writer"]},
)
WEATHER = record(
    **text("location"),
    temperature_unit={"enum": ["celsius", "fahrenheit"]},
    temperature_value={"type": "integer", "minimum": -50, "maximum": 60},
    precipitation_probability={"type": "integer", "minimum": 0, "maximum": 100},
    wind_direction={"enum": ["north", "east", "south", "west"]},
    is_raining={"type": "boolean"},
)
ORDER = record(
    order_status={"enum": ["pending", "delivered", "cancelled"]},
    customer=record(**text("customer_name"), **text("shipping_address")),
    items={
        "type": "array",
        "items": record(**text("product_name"), quantity={"type": "integer", "minimum": 1, "maximum": 99}),
        "minItems": 2,
        "maxItems": 3,
    },
)
ANSWERS = {
    "a person": ("Who was Ada Lovelace? Answer in JSON.", PERSON),
    "the weather": ("Make up a weather report for Hamburg, in JSON.", WEATHER),
    "an order": ("Ms Meyer of 5 Long Street ordered two lamps and one chair. Write the order as JSON.", ORDER),
    "four people": (
        "List four scientists of the 19th century, in JSON.",
        {"type": "array", "items": PERSON, "minItems": 4, "maxItems": 4},
    ),
    "a call": (
        "What is the weather in Hamburg? Call the tool get_current_weather.",
        record(
            name={"const": "get_current_weather"},
            arguments=record(**text("location"), unit={"enum": ["celsius", "fahrenheit"]}),
        ),
    ),
}


def without_bounds(schema: Any) -> Any:
    """Its texts may be of any length."""
    if not isinstance(schema, dict):
        return schema
    return {name: without_bounds(value) for name, value in schema.items() if name != "maxLength"}


LONG = {
    "strings of any length": {"type": "array", "minItems": 50, "items": without_bounds(PERSON)},
    "strings of 24 at most": {"type": "array", "minItems": 50, "items": PERSON},
}
"""Go on for as long as a row of the benchmark does. A bound is counted in masks, which then are dearer."""


class Languages:
    """Grammars of a model's vocabulary, compiled once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        given = tokenizer.grammar_tokens(vocab_size, tuple(tokenizer.eos_ids))
        start = time.perf_counter()
        self.vocabulary = open_vocabulary(given, vocab_size)
        self.seconds = time.perf_counter() - start
        self.tokens = given.tokens
        self._kept: dict[str, Compilation] = {}

    def constraint(self, schema: Any) -> GrammarConstraint:
        text = json.dumps(schema)
        if text not in self._kept:
            grammar = Grammar("json_schema", text)
            self._kept[text] = Compilation(grammar, matcher=compiled(grammar, self.vocabulary))
        return GrammarConstraint(self._kept[text])


class Model:
    """A model, its tokenizer and its languages, and cores that step it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loaded = Loaded(path, "cpu", num_pages=NUM_PAGES)
        self.tokenizer = load_tokenizer(path)
        self.vocab_size = self.loaded.config.vocab_size
        self.languages = Languages(self.tokenizer, self.vocab_size)

    def core(self, schemas: dict[str, Any], *, guesses: bool = False, forced: bool = False) -> EngineCore:
        """schemas: by rid. guesses, forced: as an engine has them by default."""
        scheduler = Scheduler(
            KVCache(NUM_PAGES, PAGE_SIZE),
            max_batch_tokens=512,
            max_running_requests=ROWS,
            context_length=2048,
            vocab_size=self.vocab_size,
            drafts=draft_settings(_Defaults(), "NGRAM") if guesses else None,  # type: ignore[arg-type]
            forced=ForcedSettings() if forced else None,
            constraints=lambda r: self.languages.constraint(schemas[r.rid]) if r.rid in schemas else None,
        )
        return EngineCore(scheduler, self.loaded.runner)

    def prompt(self, question: str) -> np.ndarray:
        ids = encode_chat(self.tokenizer, [{"role": "user", "content": question}])
        return np.array(ids, np.int32)


class _Defaults:
    """Of an `EngineConfig`, what `draft_settings` reads."""

    speculative_algorithm = None
    speculative_num_draft_tokens = None
    ngram_match_window = (2, 12)


def spread(times: Sequence[float], unit: float, name: str) -> str:
    at = [float(np.percentile(times, share)) / unit for share in (50, 99, 100)]
    return f"p50 {at[0]:.4g}, p99 {at[1]:.4g}, longest {at[2]:.4g} {name}"


def masks(model: Model, quick: bool) -> None:
    languages = model.languages
    rng, count = random.Random(20), 20 if quick else 200
    to_compile, to_mask, lengths, refused = [], [], [], 0
    words = np.zeros(-(-model.vocab_size // 32), np.uint32)
    for index in range(count):
        text = json.dumps(random_schema(rng))
        start = time.perf_counter()
        try:
            matcher = compiled(Grammar("json_schema", text), languages.vocabulary)
        except GrammarError:
            refused += 1
            continue
        finally:
            to_compile.append(time.perf_counter() - start)
        held = GrammarConstraint(Compilation(Grammar("json_schema", text), matcher=matcher))
        draw = random.Random(index)
        for length in range(150):  # noqa: B007
            start = time.perf_counter()
            words[:] = 0
            held.mask((), words[None])
            filled = time.perf_counter()
            ids = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            token_id = int(draw.choice([i for i in draw.choices(ids, k=4) if languages.tokens[i].strip()] or ids))
            begun = time.perf_counter()
            held.advance([token_id])
            has_ended = held.has_ended
            to_mask.append(filled - start + time.perf_counter() - begun)
            if has_ended:
                break
        lengths.append(length + 1)
    print(f"\nmasks: vocabulary of {model.vocab_size} ids opened in {languages.seconds:.2f} s")
    print(
        f"  to compile one of {count} schemas, first mask included: {spread(to_compile, 1e-3, 'ms')}; {refused} refused"
    )
    print(f"  mask and accept of {len(to_mask)} tokens: {spread(to_mask, 1e-6, 'us')}; mean "
          f"{1e6 * statistics.fmean(to_mask):.4g} us")  # fmt: skip


def steps(model: Model, quick: bool) -> None:
    for name, schema in LONG.items():
        for temperature in (0.0, 0.8):
            print(f"\nsteps of {ROWS} rows at temperature {temperature:g}, {name}")
            _steps(model, schema, temperature, *((1, 12) if quick else (5, 24)))


def _steps(model: Model, schema: Any, temperature: float, blocks: int, length: int) -> None:
    times: dict[bool, list[list[float]]] = {False: [], True: []}

    def block(constrained: bool, seed: int) -> list[float]:
        rids = [f"{i}" for i in range(ROWS)]
        core = model.core(dict.fromkeys(rids, schema) if constrained else {})
        for i, rid in enumerate(rids):
            params = SamplingParams(
                max_new_tokens=length + 2, temperature=temperature, ignore_eos=True, seed=100 * seed + i
            )
            core.add(Request(rid=rid, prompt_ids=model.prompt(f"{i}: a list of people, in JSON."), sampling=params))
        while core.last_step.decode_rows < ROWS:
            core.step()
        taken = []
        while core.has_work and core.last_step.decode_rows == ROWS and len(taken) < length:
            start = time.perf_counter()
            core.step()
            taken.append(time.perf_counter() - start)
        for rid in rids:
            core.abort(rid)
        core.step()
        return taken

    for turn in range(blocks):
        for constrained in (False, True) if turn % 2 else (True, False):
            times[constrained].append(block(constrained, turn))
    for constrained, name in ((False, "free"), (True, "constrained")):
        print(f"  {name}: {spread([t for taken in times[constrained] for t in taken], 1e-3, 'ms')}")
    ratios = [
        statistics.median(held) / statistics.median(free) for held, free in zip(times[True], times[False], strict=True)
    ]
    print(
        f"  constrained to free, medians in turns: {', '.join(f'{r:.3f}' for r in ratios)}; "
        f"median {statistics.median(ratios):.3f} (must: at most 1.05)"
    )


def forced(model: Model, quick: bool) -> None:
    rounds = 1 if quick else 3
    chosen = dict(list(ANSWERS.items())[: 2 if quick else None])
    print("\nforced runs: tokens a second of whole requests, prompts included, with to without")
    for guesses in (False, True):
        speeds: dict[str, list[float]] = {}
        totals = []
        for turn in range(rounds):
            seconds, tokens = {False: 0.0, True: 0.0}, 0
            for name, (question, schema) in chosen.items():
                said = {}
                for is_on in (False, True) if turn % 2 else (True, False):
                    core = model.core({"r": schema}, guesses=guesses, forced=is_on)
                    params = SamplingParams(max_new_tokens=300, temperature=0.0, seed=1)
                    core.add(Request(rid="r", prompt_ids=model.prompt(question), sampling=params))
                    ids = []
                    start = time.perf_counter()
                    while core.has_work:
                        for out in core.step():
                            ids += out.new_token_ids
                    took = time.perf_counter() - start
                    seconds[is_on] += took
                    said[is_on] = ids
                    speeds.setdefault(f"{name} {is_on}", []).append(len(ids) / took)
                    if is_on:
                        speeds.setdefault(f"{name} share", []).append(core.stats()["forced_tokens"] / len(ids))
                if said[True] != said[False]:
                    raise SystemExit(f"{name}: the answer differs with forced runs")
                tokens += len(said[True])
            totals.append(seconds[False] / seconds[True])
        print(f"  guesses {'on' if guesses else 'off'}: {statistics.median(totals):.2f} times over all"
              f"{'' if guesses else ' (must: 1.25)'}; {tokens} tokens; every answer equal")  # fmt: skip
        for name in chosen:
            off, on = (statistics.median(speeds[f"{name} {is_on}"]) for is_on in (False, True))
            print(f"    {name}: {off:.1f} -> {on:.1f} tokens/s, {on / off:.2f} times; "
                  f"{speeds[f'{name} share'][0]:.0%} of the tokens forced")  # fmt: skip


def hostile(path: Path, quick: bool) -> None:
    with Engine(model_path=str(path), max_total_tokens=8192, random_seed=1) as engine:
        asyncio.run(_hostile(engine, quick))


def valid(path: Path, quick: bool) -> None:
    """Exits if anything is not as its grammar says."""
    from valid_output import drawn_refusals, drawn_schemas, drawn_tool_sets, judge_refusals, judge_schemas, judge_tools

    num_schemas, num_sets = (20, 12) if quick else (500, 300)
    with Engine(model_path=str(path), max_total_tokens=16384, random_seed=1) as engine:
        campaigns = {
            "schemas": judge_schemas(engine, drawn_schemas(num_schemas, seed=1), max_new_tokens=150),
            "sets of tools": judge_tools(
                engine, list(CALL_FORMATS.values()), drawn_tool_sets(num_sets, seed=2), max_new_tokens=150
            ),
            "schemas that cannot be kept to": judge_refusals(engine, *drawn_refusals(num_sets, seed=3)),
        }
    print()
    for what, campaign in campaigns.items():
        calls = f" ({campaign.num_calls} calls)" if campaign.num_calls else ""
        print(f"{what}: {campaign.num_right} finished and valid{calls}, {campaign.num_cut} cut by length, "
              f"{campaign.refusals.total()} refused, {len(campaign.faults)} faults")  # fmt: skip
        for why, count in campaign.refusals.most_common(5):
            print(f"    refused {count}: {why[:160]}")
    faults = [fault for campaign in campaigns.values() for fault in campaign.faults]
    if faults:
        raise SystemExit("\n\n".join(faults))


async def _hostile(engine: Engine, quick: bool) -> None:
    gaps: list[tuple[float, float]] = []  # when it ended, and how long it was
    stop = asyncio.Event()

    async def stream(index: int) -> None:
        while not stop.is_set():
            params = {"max_new_tokens": 120, "ignore_eos": True, "temperature": 0.8, "stream_interval": 1}
            chunks = await engine.async_generate(f"{index}: once upon a time", params, stream=True)
            last = 0.0
            async for _ in chunks:
                now = time.perf_counter()
                if last:
                    gaps.append((now, now - last))
                last = now

    def longest(since: float) -> float:
        return max((gap for at, gap in gaps if at >= since), default=0.0)

    # The first grammar opens the vocabulary.
    await engine.async_generate("x", {"regex": "ab", "max_new_tokens": 4})
    streams = [asyncio.create_task(stream(index)) for index in range(8)]
    await asyncio.sleep(2)
    start = time.perf_counter()
    await asyncio.sleep(1 if quick else 4)
    print(f"\nhostile grammars beside 8 streams; without any their longest gap is {longest(start):.3f} s")
    found = list(hostile_grammars().items())
    worst, slowest = 0.0, 0.0
    for name, grammar in found[:2] if quick else found:
        start = time.perf_counter()
        try:
            answer = await engine.async_generate("y", {**grammar, "max_new_tokens": 16, "temperature": 1.5})
            end = answer["meta_info"]["finish_reason"]["type"]
        except GrammarError as exc:
            end = f"refused: {str(exc)[:70]}"
        took = time.perf_counter() - start
        await asyncio.sleep(0.3)
        worst, slowest = max(worst, longest(start)), max(slowest, took)
        print(f"  {name}: longest gap {longest(start):.3f} s; over in {took:.2f} s, {end}")
    print(f"  longest gap of all {worst:.3f} s (must: under 0.3 on an idle machine); longest wait {slowest:.2f} s")
    stop.set()
    await asyncio.gather(*streams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="masks,steps,forced,hostile")
    parser.add_argument("--model", choices=MODELS, default="qwen")
    parser.add_argument("--quick", action="store_true", help="a few of everything, in seconds")
    given = parser.parse_args()
    path = MODELS[given.model]()
    wanted = given.only.split(",")
    parts: dict[str, Callable[[Model, bool], None]] = {"masks": masks, "steps": steps, "forced": forced}
    of_engine: dict[str, Callable[[Path, bool], None]] = {"hostile": hostile, "valid": valid}
    unknown = [name for name in wanted if name not in parts and name not in of_engine]
    if unknown:
        parser.error(f"--only={given.only}: there is no {unknown[0]!r}")
    machine = client_machine()
    print(f"{path.name} on {machine.get('cpu', machine['system'])}, {machine['cores']} cores")
    if any(name in parts for name in wanted):
        model = Model(path)
        for name in wanted:
            if name in parts:
                parts[name](model, given.quick)
        model.loaded.backend.close()
    for name in wanted:
        if name in of_engine:
            of_engine[name](path, given.quick)


if __name__ == "__main__":
    main()
