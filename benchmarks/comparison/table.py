"""The results as text: what each engine did, Mooli against the best peer, and whether the machine was healthy.

Owns words and columns. Computes nothing that arithmetic.py does not.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from comparison.arithmetic import (
    Ratio,
    Spread,
    against_best_peer,
    best_gauge,
    is_healthy,
    of,
    spread,
    targets,
    values,
)
from comparison.catalogue import MOOLI
from comparison.results import EngineFacts, Results
from comparison.workloads import SHAPES

MODEL_NAMES = {"qwen": "Qwen2.5-Coder-0.5B-Instruct", "smollm2": "SmolLM2-135M-Instruct"}
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"

_COLUMNS = (
    ("single: TTFT ms", "single", "ttft_ms"),
    ("ms per token", "single", "ms_per_token"),
    ("random: tok/s", "random", "total_tok_s"),
    ("shared: tok/s", "shared", "total_tok_s"),
    ("multiturn: tok/s", "multiturn", "total_tok_s"),
)

_SHORT_BITS = (4, 8)
_FIGURE_NAMES = {"ttft_ms": "TTFT, ms", "ms_per_token": "ms per token", "total_tok_s": "tok/s"}


class MarkersMissingError(ValueError):
    """A document without the two comments between which the table goes."""


def whole_text(results: Results) -> str:
    """Everything, for a terminal."""
    blocks = [_headline(results)]
    for model in results.variants:
        name = MODEL_NAMES.get(model, model)
        blocks.append(f"## {name}: median (least..most) of the rounds\n\n" + aligned(engine_rows(results, model)))
        blocks.append(f"## {name}: times faster than the best peer\n\n" + aligned(target_rows(results, model)))
    blocks += [health_text(results), failures_text(results)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def engine_rows(results: Results, model: str) -> list[list[str]]:
    """A row to a variant: every workload, the start and the divergence."""
    rows = [["engine", "weights", "through", *(title for title, *_ in _COLUMNS), "start s", "GB", "mean KL"]]
    for key, facts in results.variants[model].items():
        cells = [cell(results, model, key, workload, figure) for _, workload, figure in _COLUMNS]
        start = "–" if facts.start_s is None else f"{facts.start_s:.1f}"
        memory = "–" if facts.resident_bytes is None else f"{facts.resident_bytes / 1e9:.2f}"
        rows.append([facts.engine, facts.weights, facts.through, *cells, start, memory, _kl(results, model, facts)])
    return rows


def cell(results: Results, model: str, variant: str, workload: str, figure: str) -> str:
    """A figure with its spread; "failed" when no round finished and one was tried."""
    found = spread(values(of(results, model, variant, workload).values(), figure))
    if found is None:
        tried = any(
            (sample.model, sample.variant, sample.workload) == (model, variant, workload) for sample in results.samples
        )
        return "failed" if tried else "–"
    return spread_words(found)


def spread_words(found: Spread) -> str:
    return f"{number(found.median)} ({number(found.low)}..{number(found.high)})"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 200 else f"{value:.1f}" if value >= 20 else f"{value:.2f}"


def target_rows(results: Results, model: str) -> list[list[str]]:
    """A row to a target: the ratio to the best peer at equal or finer weights, and both values."""
    rows = [["workload, Mooli's weights", "times faster", "must", "aim", "Mooli", "best peer", "KL", "healthy rounds"]]
    for target in targets(model):
        ratio = against_best_peer(results, model, target)
        goals = ["–" if goal is None else f"{goal:g}" for goal in (target.must, target.aim)]
        if ratio is None:
            rows.append([target.title, "–", *goals, "–", "no such peer ran", "–", "–"])
            continue
        ours, theirs = (results.variants[model][key] for key in (ratio.ours, ratio.theirs))
        rows.append(
            [
                target.title,
                _ratio_words(ratio),
                *goals,
                f"{number(ratio.ours_value)} {ours.through}",
                f"{number(ratio.theirs_value)} {theirs.engine} {theirs.weights}",
                f"{_kl(results, model, ours)} / {_kl(results, model, theirs)}",
                f"{ratio.healthy} of {ratio.rounds}",
            ]
        )
    return rows


def _ratio_words(ratio: Ratio) -> str:
    found = ratio.spread
    return f"{found.median:.2f} ({found.low:.2f}..{found.high:.2f})"


def _kl(results: Results, model: str, facts: EngineFacts) -> str:
    found = results.quality.get(model, {}).get(f"{facts.engine} {facts.weights}", {})
    return f"{found['mean_kl']:.4f}" if "mean_kl" in found else "not measured"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, with a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def health_text(results: Results) -> str:
    """What the gauges said around the samples."""
    if not results.samples:
        return "No sample was taken."
    best = best_gauge(results)
    readings = [value for sample in results.samples for value in (sample.before, sample.after)]
    ops = [value["ops_s"] / 1e9 for value in readings]
    read = [value["bytes_s"] / 1e9 for value in readings]
    healthy = sum(is_healthy(sample, best) for sample in results.samples)
    stolen_s = max(value["stolen_s"] for value in readings) - min(value["stolen_s"] for value in readings)
    words = (
        f"Machine: integer gauge {min(ops):.0f}..{max(ops):.0f} Gop/s, read {min(read):.1f}..{max(read):.1f} GB/s; "
        f"{healthy} of {len(results.samples)} samples with a healthy gauge before and after; "
        f"{stolen_s:.1f} s of processor time went to other guests of the host."
    )
    return words if healthy > len(results.samples) / 2 else f"{words}\nMOST SAMPLES ARE NOT HEALTHY: measure again."


def failures_text(results: Results) -> str:
    """Peers that are missing, did not start, or failed at a workload, with the reasons."""
    lines = [f"- {name}: {reason}" for name, reason in results.missing.items()]
    for model, variants in results.variants.items():
        lines += [f"- {model}, {key}: did not run: {facts.error}" for key, facts in variants.items() if facts.error]
    lines += [
        f"- {sample.model}, {sample.variant}, {sample.workload}, round {sample.round + 1}: {sample.error}"
        for sample in results.samples
        if sample.error
    ]
    for model, formats in results.quality.items():
        lines += [f"- {model}, {name}: KL {found['error']}" for name, found in formats.items() if "error" in found]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _headline(results: Results) -> str:
    machine = results.machine
    processor = f"{machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores"
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items())
    state = "" if results.is_complete else "\nTHE RUN DID NOT FINISH: only what did is below."
    return f"# Engines on the same work, {results.began}\n\n{processor}; {settings}\n{_versions(results)}{state}"


def _versions(results: Results) -> str:
    names = {
        f"{facts.engine} {facts.version}".strip()
        for variants in results.variants.values()
        for facts in variants.values()
        if not facts.error
    }
    return ", ".join(sorted(names))


def short_block(results: Results) -> str:
    """Markdown for between the markers: a row to a workload, a column to each of Mooli's formats that have goals."""
    threads = results.settings.get("threads", "?")
    began = results.began.split(" ")[0]
    caption = (
        f"Measured by `make compare` ({began}, {results.machine.get('cpu', 'unknown processor')}, {threads} threads, "
        f"{results.settings.get('rounds', '?')} rounds in turns, {_health_share(results)}; {_versions(results)}): how "
        "many times faster Mooli is than the fastest peer at equal or finer weights (time per token: the same size), "
        "median (least..most) of the rounds, then both figures. The workloads are in "
        "[benchmarking.md](benchmarking.md#mooli-beside-other-engines-make-compare)."
    )
    lines = [
        *textwrap.wrap(caption, 120, break_long_words=False, break_on_hyphens=False),
        "",
        "| | int4 | int8 |",
        "| --- | --- | --- |",
    ]
    for model in results.variants:
        name = MODEL_NAMES.get(model, model).removesuffix("-Instruct")
        wanted = {(each.workload, each.figure, each.bits): each for each in targets(model)}
        for workload, figure in dict.fromkeys((workload, figure) for workload, figure, _ in wanted):
            cells = [
                _short_cell(results, against_best_peer(results, model, wanted[workload, figure, bits]))
                for bits in _SHORT_BITS
            ]
            if any(cell != "–" for cell in cells):
                lines.append(f"| {name}, {workload}: {_FIGURE_NAMES[figure]} | {' | '.join(cells)} |")
        cells = [_short_kl(results, model, bits) for bits in _SHORT_BITS]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {name}, mean KL from float32 | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short_cell(results: Results, ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    theirs = results.variants[ratio.model][ratio.theirs]
    peer = f"{theirs.engine} {theirs.weights}"
    return f"**{_ratio_words(ratio)}** {number(ratio.ours_value)}, {number(ratio.theirs_value)} {peer}"


def _short_kl(results: Results, model: str, bits: int) -> str:
    """Of every engine at this size, Mooli first."""
    found = {
        f"{facts.engine} {facts.weights}": results.quality.get(model, {}).get(f"{facts.engine} {facts.weights}", {})
        for facts in sorted(results.variants[model].values(), key=lambda facts: facts.engine != MOOLI)
        if facts.bits == bits
    }
    said = [f"{name} {values['mean_kl']:.4f}" for name, values in found.items() if "mean_kl" in values]
    return ", ".join(said) or "–"


def _health_share(results: Results) -> str:
    healthy = sum(is_healthy(sample, best_gauge(results)) for sample in results.samples)
    return f"machine healthy at {healthy} of {len(results.samples)} samples"


def with_block(document: str, block: str) -> str:
    """`document` with `block` between its markers. Raises MarkersMissingError without them."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MarkersMissingError(f"it has no lines {BEGIN} and {END}, between which the table would go")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def workloads_text() -> str:
    """One line to a workload, for --help."""
    lines = []
    for name, shape in SHAPES.items():
        shared = f", {shape.groups} groups that share {shape.shared_len} tokens" if shape.groups else ""
        turns = f", {shape.turns} turns, {shape.later_len} new tokens each" if shape.turns > 1 else ""
        lines.append(
            f"  {name:<10} {shape.conversations} requests, {shape.at_once} at once, {shape.new_len} tokens in, "
            f"{shape.output_len} out{shared}{turns}"
        )
    return "\n".join(lines)
