"""Mooli and other engines on the same work and the same weights, in turns, on this machine.

The peers that `make peers` has installed: OpenVINO GenAI and transformers in process, llama.cpp and vLLM behind their
servers, Mooli both ways. One engine computes while the others are stopped. Every sample, the gauges of the machine
around it and the reasons of failures go to a JSON file, from which the tables can be made again (--from).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from comparison.catalogue import MOOLI, Peers, Variant, mooli_variants, peer_variants
from comparison.health import Gauge
from comparison.quality import Quality
from comparison.results import Results, ResultsFileError, load_results
from comparison.run import Limits, ModelRun
from comparison.table import (
    MODEL_NAMES,
    MarkersMissingError,
    short_block,
    whole_text,
    with_block,
    workloads_text,
)
from comparison.weights import Weights
from comparison.workloads import SHAPES
from loaded import compared_model, demo_model

from mooli.bench.results import client_machine

FILES = {"qwen": (compared_model, "Q4_K_M"), "smollm2": (demo_model, "Q4_1")}
QUICK_SCALE, QUICK_ROUNDS = 0.05, 1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"workloads:\n{workloads_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often every workload is run (default: 3)")
    parser.add_argument("--models", default="qwen,smollm2", help="of qwen, smollm2")
    parser.add_argument("--workloads", default=",".join(SHAPES), help="those below, with commas")
    parser.add_argument("--only", default="", help="engines whose key has one of these words, e.g. int4,Q4_0,vLLM")
    parser.add_argument("--skip", default="", help="leave out engines whose key has one of these words")
    parser.add_argument("--threads", type=int, help="of every engine (default: what Mooli would take)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all lengths; figures then mean little")
    parser.add_argument("--quick", action="store_true", help=f"--scale {QUICK_SCALE} --rounds {QUICK_ROUNDS}")
    parser.add_argument("--no-quality", action="store_true", help="leave out the divergence from the float32 model")
    parser.add_argument("--start-limit", type=float, default=600.0, help="seconds an engine may take to start")
    parser.add_argument("--run-limit", type=float, default=600.0, help="seconds one workload may take")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="the folder that `make peers` fills")
    parser.add_argument("--results", type=Path, help="the JSON file (default: .peers/results/TIME.json)")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing: make the tables of this file")
    parser.add_argument("--update", action="store_true", help="put the short table into --document")
    parser.add_argument("--document", type=Path, default=Path("docs/figures.md"))
    args = parser.parse_args(arguments)
    if args.quick:
        args.scale, args.rounds = QUICK_SCALE, QUICK_ROUNDS
    for name, known in (("models", FILES), ("workloads", SHAPES)):
        wanted = words(getattr(args, name))
        if not wanted or set(wanted) - set(known):
            parser.error(f"--{name} takes {', '.join(known)}, with commas")
        setattr(args, name, wanted)
    if args.rounds < 1 or not 0 < args.scale <= 1:
        parser.error("--rounds must be at least 1 and --scale above 0 and at most 1")
    return args


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def chosen(variants: list[Variant], only: list[str], skip: list[str]) -> list[Variant]:
    """Those with a word of `only` in their key (all when it is empty) and none of `skip`; capitals do not matter."""

    def has(variant: Variant, wanted: list[str]) -> bool:
        return any(word.lower() in variant.key.lower() for word in wanted)

    return [variant for variant in variants if (not only or has(variant, only)) and not has(variant, skip)]


def measure(args: argparse.Namespace) -> Results:
    """Run everything; what is done is in the file at any time. Ctrl-C and SIGTERM end it with what finished."""
    gauge = Gauge(args.threads)
    threads = gauge.num_threads
    peers = Peers(args.peers.resolve())
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    path = args.results or args.peers / "results" / f"{began.replace(' ', '-').replace(':', '')}.json"
    settings = {"rounds": args.rounds, "threads": threads, "scale": args.scale}
    results = Results(client_machine(), settings, began, missing=peers.missing())
    only, skip = words(args.only), words(args.skip)

    def saved() -> None:
        results.save(path)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, interrupted)
    try:
        for model in args.models:
            find, label = FILES[model]
            quantise = peers.llama("llama-quantize")
            folder = args.peers.resolve() / "weights"
            weights = Weights(
                MODEL_NAMES[model], find().resolve(), label, folder, quantise, peers.transformers_python()
            )
            variants = chosen(mooli_variants(weights, threads) + peer_variants(peers, weights, threads), only, skip)
            limits = Limits(start_s=args.start_limit, run_s=args.run_limit)
            run = ModelRun(
                model, variants, results, gauge, logs=args.peers / "logs", limits=limits, scale=args.scale, say=say
            )
            run.run(args.workloads, args.rounds, saved)
            if not args.no_quality:
                formats = list(dict.fromkeys((variant.engine, variant.weights) for variant in variants))
                measured = Quality(weights, peers, args.peers.resolve() / "quality", say).measure(formats)
                results.quality[model] = measured
            saved()
        results.is_complete = True
    except KeyboardInterrupt:
        say("interrupted: what finished is below")
    finally:
        saved()
    say(f"written: {path}")
    return results


def interrupted(_: int, __: FrameType | None) -> None:
    """As Ctrl-C, which asyncio takes as a wish to end its tasks; an exception out of nowhere would end one of them."""
    signal.raise_signal(signal.SIGINT)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.source:
        try:
            results = load_results(args.source)
        except ResultsFileError as exc:
            print(f"error: {exc}", file=sys.stderr)
            return 1
    else:
        results = measure(args)
    print(whole_text(results))
    if args.update:
        if not results.is_complete:
            print("error: the run did not finish; the table stays as it was", file=sys.stderr)
            return 1
        try:
            text = with_block(args.document.read_text(encoding="utf-8"), short_block(results))
        except (OSError, MarkersMissingError) as exc:
            print(f"error: {args.document}: {exc}", file=sys.stderr)
            return 1
        args.document.write_text(text, encoding="utf-8")
    if not results.is_complete:
        return 130
    mine = [facts for variants in results.variants.values() for facts in variants.values() if facts.engine == MOOLI]
    failed = any(facts.error for facts in mine) or any(s.error and s.variant.startswith(MOOLI) for s in results.samples)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
