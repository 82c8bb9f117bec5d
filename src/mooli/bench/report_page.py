"""A page to look at a run, or at several side by side, out of result files: `mooli bench report`.

Owns the page's order, its head, and writing it. The page is one file that loads nothing: its policy allows its own
style and its own script, by their hashes, and no more.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.resources
import sys
from collections.abc import Sequence
from pathlib import Path

from mooli.bench.errors import BenchmarkError
from mooli.bench.metrics import FORMULAS
from mooli.bench.report_charts import TimeAxis, activity, distribution_chart, time_chart
from mooli.bench.report_requests import cold_and_warm_bars, hit_rate_bars, hit_rate_series, timeline
from mooli.bench.report_runs import Run, read_runs
from mooli.bench.report_svg import Html, element, joined
from mooli.bench.report_tables import (
    COUNTS,
    RATES,
    day_and_time,
    facts_table,
    failures_table,
    figures_table,
    legend,
    remarks_list,
    slowest_table,
    statistics_table,
    tiles,
)
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
