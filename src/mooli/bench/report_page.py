"""A page to look at a run, or at several side by side, out of result files: `mooli bench report`.

Owns the page's order, its head, which numbers are shown where with their words, what counts as a difference, and
writing it. The page is one file that loads nothing: its policy allows its own style and its own script, by their
hashes, and no more. A figure stands in a `data` element whose value is the result's own, unrounded.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.resources
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mooli.bench.errors import BenchmarkError
from mooli.bench.metrics import FORMULAS
from mooli.bench.report_charts import (
    TimeAxis,
    activity,
    cold_and_warm_bars,
    distribution_chart,
    hit_rate_bars,
    hit_rate_series,
    letter,
    time_chart,
    timeline,
)
from mooli.bench.report_runs import Run, finite, read_runs
from mooli.bench.report_svg import Html, duration_text, element, joined, short_number
from mooli.bench.results import engine_facts
from mooli.version import __version__


def main(argv: Sequence[str] | None = None, program: str = "python3 -m mooli.bench.report") -> int:
    """Run the command and return the exit status: 0, or 1 when no page could be made. program: its name in help."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Make one page with charts out of result files of bench_serving.",
        epilog="Files written with --output-details have curves and a timeline; others have figures and tables.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl", help="result files, at most 6 runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument("--all-lines", action="store_true", help="every line of each file, not only the last")
    args = parser.parse_args(argv)
    try:
        write_page(args.output, read_runs(args.files, all_lines=args.all_lines))
    except BenchmarkError as exc:
        print(f"{program}: error: {exc}", file=sys.stderr)
        return 1
    print(f"Report written to {args.output}")
    return 0


def write_page(file: Path, runs: Sequence[Run]) -> None:
    """Write the page of `runs` to `file`. Raises BenchmarkError when it cannot be written."""
    try:
        # What is no character, half a surrogate pair for example, becomes a question mark.
        file.write_bytes(page(runs).encode("utf-8", "replace"))
    except OSError as exc:
        raise BenchmarkError(f"the report cannot be written to {file}: {exc.strerror}") from exc


def page(runs: Sequence[Run]) -> str:
    """The whole page of `runs`, the first of which is the one others are compared with."""
    style, script = _packaged("report.css"), _packaged("report.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )
    title = " and ".join(run.label for run in runs)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"Serving benchmark: {title}"),
        Html(f"<style>{style}</style>"),
    )
    body = element(
        "body",
        element("header", element("h1", "Serving benchmark"), _subtitle(runs), legend(runs) if len(runs) > 1 else None),
        element("main", *_sections(runs)),
        element("footer", f"Made by Mooli {__version__} from the results alone; this page loads nothing."),
        element("div", id="tip", hidden=""),
        Html(f"<script>{script}</script>"),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _subtitle(runs: Sequence[Run]) -> Html | None:
    run = runs[0]
    if len(runs) > 1:
        return None
    known = [run.label, run.text("model"), run.text("backend"), run.text("dataset_note"), day_and_time(run)]
    return element("p", " · ".join(words for words in known if words), class_="subtitle")


def _sections(runs: Sequence[Run]) -> list[Html | None]:
    axis = TimeAxis.of(runs)
    failures = failures_table(runs)
    slowest = slowest_table(runs)
    return [
        remarks_list(runs),
        tiles(runs),
        element("h2", "Failures") if failures else None,
        _card(failures) if failures else None,
        element("h2", "Latency"),
        _pair(
            _distribution(runs, "Time to first token", "ttft", "request"),
            _distribution(runs, "Inter-token latency", "itl", "gap"),
        ),
        _pair(
            _distribution(runs, "Time per output token, after the first", "tpot", "request"),
            _distribution(runs, "End-to-end latency", "e2e_latency", "request"),
        ),
        element("h2", "Over time"),
        _over_time(runs, axis),
        element("h2", "Prefix cache"),
        _cache(runs, axis),
        element("h2", "Requests") if slowest else None,
        _timeline(runs, axis),
        _card(element("h3", "Slowest requests"), slowest) if slowest else None,
        element("h2", "All figures"),
        _pair(_card(figures_table(runs, RATES)), _card(figures_table(runs, COUNTS))),
        element("h2", "This run" if len(runs) == 1 else "These runs"),
        _card(facts_table(runs)),
        _card(element("details", element("summary", "What each number means"), element("pre", FORMULAS))),
    ]


def _distribution(runs: Sequence[Run], title: str, name: str, noun: str) -> Html:
    chart = distribution_chart(runs, name, noun)
    words = f"Share of {noun}s by value, and below it the share of {noun}s up to a value."
    return _card(
        element("h3", title), element("p", words, class_="note") if chart else None, chart, statistics_table(runs, name)
    )


def _over_time(runs: Sequence[Run], axis: TimeAxis) -> Html:
    found = activity(runs, axis)
    if found is None:
        return _card(
            element(
                "p", "The files say nothing about time: they hold neither starts nor sums by second.", class_="note"
            )
        )
    return _card(
        element("h3", "Output tokens per second"),
        element("p", found.note, class_="note"),
        time_chart(found.tokens, axis, "Output tokens per second over time", " tok/s"),
        element("h3", "Requests in progress"),
        time_chart(found.open, axis, "Requests in progress over time", " in progress", height=110.0),
    )


def _cache(runs: Sequence[Run], axis: TimeAxis) -> Html:
    total = hit_rate_bars(runs)
    if total is None:
        words = "The server did not say how much it reused (SGLang's OpenAI routes: --enable-cache-report)."
        return _card(element("p", words, class_="note"))
    split = cold_and_warm_bars(runs)
    series = hit_rate_series(runs, axis)
    cards = [
        _card(element("h3", "Prompt tokens that came from the cache"), total),
        _card(
            element("h3", "Median time to first token"),
            element("p", "Warm: at least half of the prompt came from the cache. Cold: all others.", class_="note"),
            split,
        )
        if split is not None
        else None,
    ]
    over_time = None
    if any(found is not None for found in series):
        over_time = _card(
            element("h3", "Hit rate over time"),
            element("p", "Of the requests sent in each step; nothing is drawn where none was sent.", class_="note"),
            time_chart(series, axis, "Cache hit rate over time", " %", height=110.0),
        )
    return joined([_pair(*cards), over_time])


def _timeline(runs: Sequence[Run], axis: TimeAxis) -> Html | None:
    found = timeline(runs, axis)
    if found is None:
        return None
    keys = element(
        "p",
        element("span", class_="key wait run0"),
        "waiting for the first token (the server's queue and its prefill: a client cannot tell them apart)",
        element("span", class_="key run0"),
        "receiving tokens",
        element("span", class_="key failed"),
        "failed",
        class_="note",
    )
    note = element("p", found.note, class_="note") if found.note else None
    return _card(element("h3", "Timeline"), keys, note, found.chart)


def _card(*parts: Html | None) -> Html:
    return element("section", *parts, class_="card")


def _pair(*cards: Html | None) -> Html:
    return element("div", *cards, class_="pair")


def _packaged(name: str) -> str:
    return importlib.resources.files("mooli.bench").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


# -- tables and tiles --------------------------------------------------------------------------------------------------

STATISTICS = (
    ("mean", "Mean"), ("median", "P50"), ("p90", "P90"), ("p95", "P95"), ("p99", "P99"),
)  # fmt: skip

SAME_WITHIN = 0.02
"""Ratios this close to 1 are not called better or worse."""

NUM_SLOWEST = 5
MOST_WORDS = 72
MOST_FAILURES = 20

Figure: TypeAlias = tuple[str, str, str, bool | None]

RATES: tuple[Figure, ...] = (
    ("request_throughput", "Request throughput", "req/s", True),
    ("input_throughput", "Input token throughput", "tok/s", True),
    ("output_throughput", "Output token throughput", "tok/s", True),
    ("total_throughput", "Total token throughput", "tok/s", True),
    ("max_output_tokens_per_s", "Peak output token throughput", "tok/s", True),
    ("request_goodput", "Goodput", "req/s", True),
    ("concurrency", "Concurrency, mean", "requests", None),
    ("max_concurrent_requests", "Concurrency, peak", "requests", None),
    ("accept_length", "Accept length", "tokens", True),
)
"""Key, label, unit, and whether more is better (None: neither)."""

COUNTS: tuple[Figure, ...] = (
    ("duration", "Duration", "s", None),
    ("completed", "Successful requests", "", None),
    ("failed", "Failed requests", "", False),
    ("interrupted", "Cut off by the user", "", None),
    ("unsent", "Never sent", "", None),
    ("total_input_tokens", "Input tokens", "", None),
    ("total_output_tokens", "Output tokens", "", None),
    ("total_output_tokens_retokenized", "Output tokens, retokenized", "", None),
)


def badge(number: int) -> Html:
    return element("span", letter(number), class_=f"badge run{number}")


def figure(run: Run, number: int, key: str, shown: str | None = None) -> Html:
    """The result's figure under `key`, with two decimals, or as `shown`."""
    value = run.number(key)
    if value is None:
        return element("span", "–", class_="quiet")
    exact = run.result[key]
    words = shown if shown is not None else f"{exact:,}" if isinstance(exact, int) else f"{value:,.2f}"
    return element("data", words, value=repr(exact), data_key=key, data_run=number)


def ratio(value: float | None, first: float | None, more_is_better: bool | None) -> Html:
    """`value` as a multiple of the first run's."""
    if value is None or not first:
        return element("span", "–", class_="quiet")
    times = value / first
    kind = "same"
    if more_is_better is not None and abs(times - 1) >= SAME_WITHIN:
        kind = "better" if (times > 1) == more_is_better else "worse"
    words = {"better": "better", "worse": "worse", "same": ""}[kind]
    return element("span", f"×{times:.2f}", class_=f"ratio {kind}", title=words or None)


def tiles(runs: Sequence[Run]) -> Html:
    """The six figures to look at first."""
    return element(
        "section",
        _tile(runs, "Output throughput", "output_throughput", "tok/s", True, ("peak", "max_output_tokens_per_s")),
        _tile(runs, "Requests", "request_throughput", "req/s", True, None),
        _tile(runs, "Time to first token", "median_ttft_ms", "ms", False, ("p99", "p99_ttft_ms")),
        _tile(runs, "Inter-token latency", "median_itl_ms", "ms", False, ("p99", "p99_itl_ms")),
        _tile(runs, "End-to-end latency", "median_e2e_latency_ms", "ms", False, ("p99", "p99_e2e_latency_ms")),
        _tile(runs, "Cache hit rate", "cache_hit_rate_pct", "%", True, None),
        class_="tiles" if len(runs) == 1 else "tiles several",
    )


def _tile(
    runs: Sequence[Run], title: str, key: str, unit: str, more_is_better: bool, below: tuple[str, str] | None
) -> Html:
    rows: list[Html | None] = []
    for i, run in enumerate(runs):
        value, shown_unit = run.number(key), unit
        shown = "–" if value is None else short_number(value)
        if value is not None and unit == "ms":
            shown, shown_unit = duration_text(value).split(" ")
        number = figure(run, i, key, shown)
        parts: list[Html | None] = [
            badge(i) if len(runs) > 1 else None,
            element(
                "span", number, element("span", shown_unit, class_="unit") if value is not None else None, class_="big"
            ),
            ratio(value, runs[0].number(key), more_is_better) if i and value is not None else None,
        ]
        rows += [element("div", *parts, class_="tile-row"), _tile_note(run, i, key, below)]
    return element("div", element("h3", title), *rows, class_="tile")


def _tile_note(run: Run, number: int, key: str, below: tuple[str, str] | None) -> Html | None:
    words: list[Html | str] = ["median"] if key.startswith("median") else []
    if below is not None and (value := run.number(below[1])) is not None:
        shown = duration_text(value) if below[1].endswith("_ms") else f"{short_number(value)} tok/s"
        words += [", " if words else "", f"{below[0]} ", figure(run, number, below[1], shown)]
    if key == "request_throughput":
        words += [figure(run, number, "completed"), " succeeded"]
        if run.number("failed"):
            words += [", ", element("span", figure(run, number, "failed"), " failed", class_="bad")]
    elif key == "cache_hit_rate_pct":
        words.append("not told by the server" if run.hit_rate_pct is None else "of prompt tokens")
    return element("p", *words, class_="note") if words else None


def statistics_table(runs: Sequence[Run], name: str) -> Html:
    """Mean and percentiles of "ttft", "itl", "tpot" or "e2e_latency", a row to a run, with ratios to the first."""
    with_max = name == "itl" and any(run.number("max_itl_ms") is not None for run in runs)
    columns = [*STATISTICS, ("max", "Max")] if with_max else list(STATISTICS)
    head = element("tr", element("th", "ms"), *(element("th", label, scope="col") for _, label in columns))
    rows = []
    for i, run in enumerate(runs):
        first = element("th", badge(i) if len(runs) > 1 else "", scope="row")
        rows.append(element("tr", first, *(element("td", figure(run, i, f"{key}_{name}_ms")) for key, _ in columns)))
        if i:
            cells = []
            for key, _ in columns:
                own, other = run.number(f"{key}_{name}_ms"), runs[0].number(f"{key}_{name}_ms")
                cells.append(element("td", ratio(own, other, False)))
            label = element("th", f"{letter(i)} / A", scope="row", class_="quiet")
            rows.append(element("tr", label, *cells, class_="ratios"))
    return element("table", element("thead", head), element("tbody", *rows), class_="figures")


def figures_table(runs: Sequence[Run], figures: Sequence[Figure]) -> Html:
    """Those figures, a column to a run."""
    rows = []
    for key, label, unit, more_is_better in figures:
        values = [run.number(key) for run in runs]
        if all(value is None for value in values) or (key in ("interrupted", "unsent") and not any(values)):
            continue
        cells = []
        for i, run in enumerate(runs):
            compared = (
                element("small", ratio(values[i], values[0], more_is_better)) if i and values[i] and values[0] else None
            )
            cells.append(element("td", figure(run, i, key), " " if compared else None, compared))
        name = element("th", label, element("span", f", {unit}", class_="unit") if unit else None, scope="row")
        rows.append(element("tr", name, *cells))
    return element("table", _run_heads(runs, with_labels=False), element("tbody", *rows), class_="figures")


def _run_heads(runs: Sequence[Run], *, with_labels: bool) -> Html | None:
    if len(runs) == 1:
        return None
    cells = [
        element("th", badge(i), f" {run.label}" if with_labels else None, scope="col") for i, run in enumerate(runs)
    ]
    return element("thead", element("tr", element("td"), *cells))


def failures_table(runs: Sequence[Run]) -> Html | None:
    """Reasons with how often each came; None when nothing failed."""
    rows = []
    for i, run in enumerate(runs):
        listed = run.result.get("failures")
        for item in listed[:MOST_FAILURES] if isinstance(listed, list) else []:
            if isinstance(item, Mapping):
                name = element("td", badge(i)) if len(runs) > 1 else None
                count = element("td", short_number(finite(item.get("count")) or 0.0))
                rows.append(element("tr", name, count, element("td", str(item.get("reason")), class_="words")))
    if not rows:
        return None
    heads = [
        element("th", "Run") if len(runs) > 1 else None,
        element("th", "Times"),
        element("th", "Reason", class_="words"),
    ]
    return element("table", element("thead", element("tr", *heads)), element("tbody", *rows), class_="figures")


def slowest_table(runs: Sequence[Run]) -> Html | None:
    """The requests with the longest latencies, and how their answers begin; None without details."""
    rows = []
    for i, run in enumerate(runs):
        requests = run.requests
        if requests is None:
            continue
        latencies = np.where(requests.succeeded, requests.latency_s, -1.0)
        for at in np.argsort(-latencies, kind="stable")[:NUM_SLOWEST]:
            if not requests.succeeded[at]:
                continue
            answer = " ".join(requests.texts[at].split())
            gaps = requests.itl_s[at]
            cells = [
                badge(i) if len(runs) > 1 else None,
                str(requests.indices[at]) + (f".{requests.turns[at]}" if requests.turns[at] else ""),
                duration_text(float(requests.latency_s[at]) * 1000),
                duration_text(float(requests.ttft_s[at]) * 1000),
                duration_text(float(gaps.max()) * 1000) if len(gaps) else "–",
                f"{int(requests.input_lens[at]):,}",
                f"{int(requests.output_lens[at]):,}",
            ]
            words = answer if len(answer) <= MOST_WORDS else answer[: MOST_WORDS - 1] + "…"
            shown = [element("td", cell) for cell in cells if cell is not None]
            rows.append(element("tr", *shown, element("td", words, class_="words")))
    if not rows:
        return None
    labels = ["Request", "Latency", "First token", "Longest gap", "Tokens in", "Tokens out"]
    heads = [element("th", label) for label in ([*(["Run"] if len(runs) > 1 else []), *labels])]
    head = element("tr", *heads, element("th", "Answer begins", class_="words"))
    return element("table", element("thead", head), element("tbody", *rows), class_="figures")


def facts_table(runs: Sequence[Run]) -> Html:
    """What was measured, how, and on what, a column to a run; facts that differ are marked."""
    groups = [("Workload", _workload), ("Engine", _engine), ("Client", _client)]
    bodies = []
    for title, read in groups:
        facts = [read(run) for run in runs]
        names = list(dict.fromkeys(name for found in facts for name in found))
        if not names:
            continue
        rows = [element("tr", element("th", title, colspan=len(runs) + 1, scope="rowgroup", class_="group"))]
        for name in names:
            values = [found.get(name, "–") for found in facts]
            differs = "differs" if len(set(values)) > 1 else None
            cells = [element("td", value) for value in values]
            rows.append(element("tr", element("th", name, scope="row"), *cells, class_=differs))
        bodies.append(element("tbody", *rows))
    return element("table", _run_heads(runs, with_labels=True), *bodies, class_="facts")


def _workload(run: Run) -> dict[str, str]:
    keys = {
        "Model": "model",
        "Tokenizer": "tokenizer",
        "Back-end (--backend)": "backend",
        "Dataset (--dataset-name)": "dataset_name",
        "Prompts": "dataset_note",
        "Requests asked for": "num_prompts",
        "Request rate (req/s)": "request_rate",
        "Largest concurrency": "max_concurrency",
        "Seed (--seed)": "seed",
        "Reuse prevented (--force-miss)": "force_miss",
        "Measured at": "date",
    }
    facts = {label: _said(run.result[key]) for label, key in keys.items() if run.result.get(key) is not None}
    if str(run.result.get("dataset_name", "")).startswith("random"):
        for label, key in (
            ("Input length (--random-input-len)", "random_input_len"),
            ("Output length (--random-output-len)", "random_output_len"),
            ("Range ratio (--random-range-ratio)", "random_range_ratio"),
        ):
            facts[label] = _said(run.result.get(key))
    if "max_concurrency" in run.result and run.result["max_concurrency"] is None:
        facts["Largest concurrency"] = "not set"
    return facts


def _engine(run: Run) -> dict[str, str]:
    info = run.result.get("server_info")
    return {key: _said(value) for key, value in engine_facts(info).items()} if isinstance(info, Mapping) else {}


def _client(run: Run) -> dict[str, str]:
    client = run.result.get("client")
    if not isinstance(client, Mapping):
        return {}
    machine = client.get("machine")
    facts = {str(key): _said(value) for key, value in machine.items()} if isinstance(machine, Mapping) else {}
    for label, key, unit in (
        ("send delay, mean", "mean_send_delay_ms", "ms"),
        ("event loop lag, p99", "p99_event_loop_lag_ms", "ms"),
        ("processor use", "cpu_share", "cores"),
    ):
        value = finite(client.get(key))
        if value is not None:
            facts[label] = f"{value:.2f} {unit}"
    return facts


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return "no limit (inf)" if value == float("inf") else str(value)


def legend(runs: Sequence[Run]) -> Html:
    """Which letter and colour is which run."""
    items = [element("li", badge(i), " ", element("b", run.label), " ", _about(run)) for i, run in enumerate(runs)]
    return element("ul", *items, class_="legend")


def _about(run: Run) -> Html:
    known = [run.text("model"), run.text("backend"), day_and_time(run)]
    return element("span", " · ".join(words for words in known if words), class_="quiet")


def day_and_time(run: Run) -> str | None:
    """When the run ended, to the minute."""
    date = run.text("date")
    if date is None or not date.endswith("+00:00"):
        return date
    return f"{date[:16].replace('T', ' ')} UTC"


def remarks_list(runs: Sequence[Run]) -> Html | None:
    """What the reader should know: notes of the runs and remarks about their files."""
    items = []
    for i, run in enumerate(runs):
        notes = run.result.get("notes")
        said = [str(note) for note in notes] if isinstance(notes, list) else []
        if run.requests is None:
            said.append("the file lists no single requests (--output-details), so curves and timeline are missing")
        if run.result.get("is_interrupted") is True:
            said.append("the run was stopped by Ctrl-C: the figures are of what had finished")
        name = [badge(i), " "] if len(runs) > 1 else []
        items += [element("li", *name, words) for words in (*run.remarks, *said)]
    if len(runs) > 1:
        items.append(
            element("li", "Ratios are to run A. Each is one run: what differs from run to run is not in them.")
        )
    return element("ul", *items, class_="remarks") if items else None
