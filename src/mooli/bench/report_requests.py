"""The report's charts of single requests: the timeline, and how much of their prompts came from the cache.

Owns their shapes. Never reads a file, never formats a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mooli.bench.report_charts import FULL, HALF, RIGHT, Series, TimeAxis, letter
from mooli.bench.report_runs import Floats, Requests, Run
from mooli.bench.report_svg import (
    Html,
    Scale,
    drawing,
    duration_text,
    element,
    horizontal_line,
    nice_top,
    short_number,
    text,
    vertical_line,
)

MOST_REQUESTS = 400
"""Requests drawn in all timelines together."""

SHORT_SHARE = 0.05
"""Requests shorter than this share of the run are dots when all of it is drawn: of many such, a part is drawn."""

ROOM = 360.0
"""Height all timelines together take when many requests are open at once."""

MOST_TEXT = 80

NUM_CACHE_STEPS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """note: which requests are drawn, in words; empty when all are."""

    chart: Html
    note: str


def timeline(runs: Sequence[Run], axis: TimeAxis) -> Timeline | None:
    """A bar to a request: waiting for the first token, then receiving. None where starts are not known.

    A request takes the first line that is free, so there are as many lines as requests were open at once.
    """
    known = [
        (i, run.requests, run.requests.start_s)
        for i, run in enumerate(runs)
        if run.requests is not None and run.requests.start_s is not None and len(run.requests)
    ]
    if not known:
        return None
    most = MOST_REQUESTS // len(known)
    begin_s, end_s = _window([(requests, starts) for _, requests, starts in known], axis.seconds, most)
    chosen = [_chosen(starts, begin_s, end_s, most) for _, _, starts in known]
    ends = [
        float((starts + requests.latency_s)[rows].max())
        for (_, requests, starts), rows in zip(known, chosen, strict=True)
        if rows
    ]
    if end_s < axis.seconds:
        axis = replace(axis, first_s=begin_s, seconds=min(max(ends, default=end_s), end_s + (end_s - begin_s) / 4))
    across = axis.scale()
    notes, parts, y = [], [], 14.0
    for (number, requests, starts), rows in zip(known, chosen, strict=True):
        if len(rows) < len(requests):
            name = f"Run {letter(number)}: " if len(runs) > 1 else ""
            notes.append(
                f"{name}{len(rows):,} of {len(requests):,} requests are drawn, {_which(begin_s, end_s, axis)}."
            )
        lanes = _lanes(starts, requests.latency_s, rows, gap_s=1.5 / (across.end - across.start) * (end_s - begin_s))
        pitch = min(max(ROOM / len(known) / (max(lanes, default=0) + 1), 1.75), 12.0)
        if len(runs) > 1:
            parts.append(text(axis.left - 10, y + 13, letter(number), f"letter run{number}", "end"))
        parts.append(_bars(requests, starts, rows, [y + lane * pitch for lane in lanes], pitch, across, number))
        y += max(pitch * (max(lanes, default=0) + 1), 18.0) + 12
    base = y - 4
    frame = [axis.draw(10.0, base), horizontal_line(base, axis.left, axis.right, "axis")]
    return Timeline(chart=drawing(FULL, base + 24, "Timeline of requests", *frame, *parts), note=" ".join(notes))


def _which(begin_s: float, end_s: float, axis: TimeAxis) -> str:
    if axis.first_s or end_s < axis.seconds:
        return f"those sent from {short_number(begin_s)} s to {short_number(end_s)} s, in the middle of the run"
    return "evenly spread"


def _window(known: Sequence[tuple[Requests, Floats]], seconds: float, most: int) -> tuple[float, float]:
    """From when to when requests are drawn: the whole time, or its middle when that many would be dots."""
    too_many = [(requests, starts) for requests, starts in known if len(requests) > most]
    typical_s = max((float(np.median(requests.latency_s)) for requests, _ in too_many), default=seconds)
    if typical_s > SHORT_SHARE * seconds:
        return 0.0, seconds
    middle_s = 0.5 * min(float(starts.max()) for _, starts in known)
    width_s = seconds
    for _, starts in too_many:
        nearest = np.sort(np.abs(starts - middle_s))
        width_s = min(width_s, 2 * float(nearest[most - 1]))
    return max(middle_s - width_s / 2, 0.0), middle_s + width_s / 2


def _chosen(starts: Floats, begin_s: float, end_s: float, most: int) -> list[int]:
    """Positions of the requests to draw, in the order they were sent."""
    order = np.argsort(starts, kind="stable")
    order = order[(starts[order] >= begin_s) & (starts[order] <= end_s)]
    if len(order) > most:
        order = order[np.linspace(0, len(order) - 1, most).round().astype(np.int64)]
    return [int(at) for at in order]


def _lanes(starts: Floats, latencies: Floats, rows: Sequence[int], gap_s: float) -> list[int]:
    """The line of each request: the first that has been free for `gap_s`."""
    free_from: list[float] = []
    lanes = []
    for at in rows:
        start = float(starts[at])
        lane = next((i for i, free_s in enumerate(free_from) if free_s <= start), len(free_from))
        if lane == len(free_from):
            free_from.append(0.0)
        free_from[lane] = start + float(latencies[at]) + gap_s
        lanes.append(lane)
    return lanes


def _bars(
    requests: Requests,
    starts: Floats,
    rows: Sequence[int],
    tops: Sequence[float],
    pitch: float,
    across: Scale,
    number: int,
) -> Html:
    thick = pitch * (0.74 if pitch > 3 else 0.86)
    lines = []
    for at, y in zip(rows, tops, strict=True):
        start_s, latency_s = float(starts[at]), float(requests.latency_s[at])
        x0, x2 = across(start_s), across(start_s + latency_s)
        bars = []
        if requests.succeeded[at]:
            x1 = across(start_s + min(float(requests.ttft_s[at]), latency_s))
            bars.append(element("rect", x=x0, y=y, width=max(x1 - x0, 0.3), height=thick, class_="wait"))
            if x2 > x1:
                bars.append(element("rect", x=x1, y=y, width=x2 - x1, height=thick))
        else:
            bars.append(element("rect", x=x0, y=y, width=max(x2 - x0, 4.0), height=thick, class_="failed"))
        lines.append(element("g", *bars, data_tip=_story(requests, start_s, at)))
    return element("g", *lines, class_=f"rows run{number}")


def _story(requests: Requests, start_s: float, at: int) -> str:
    """One request in words."""
    turn = f", turn {requests.turns[at]}" if requests.turns[at] else ""
    lines = [f"request {requests.indices[at]}{turn}, sent at {short_number(start_s)} s"]
    if not requests.succeeded[at]:
        return "\n".join([*lines, f"failed: {_cut(requests.errors[at])}"])
    lines.append(
        f"first token after {duration_text(1000 * float(requests.ttft_s[at]))},"
        f" done after {duration_text(1000 * float(requests.latency_s[at]))}"
    )
    tokens = f"{int(requests.input_lens[at]):,} tokens in, {int(requests.output_lens[at]):,} out"
    if not math.isnan(requests.cached[at]):
        tokens += f", {int(requests.cached[at]):,} from the cache"
    return "\n".join([*lines, tokens])


def _cut(words: str) -> str:
    return words if len(words) <= MOST_TEXT else words[: MOST_TEXT - 1] + "…"


def hit_rate_series(runs: Sequence[Run], axis: TimeAxis) -> list[Series | None]:
    """Cached share of the prompt tokens of the requests sent in each step, in percent; NaN where none was sent."""
    width_s = axis.seconds / NUM_CACHE_STEPS
    return [_hit_rates(run.requests, width_s) for run in runs]


def _hit_rates(requests: Requests | None, width_s: float) -> Series | None:
    if requests is None or requests.start_s is None:
        return None
    known = requests.succeeded & ~np.isnan(requests.cached) & ~np.isnan(requests.prompt_tokens)
    if not known.any():
        return None
    steps = np.clip(requests.start_s[known] / width_s, 0, NUM_CACHE_STEPS - 1).astype(np.int64)
    cached = np.bincount(steps, weights=requests.cached[known], minlength=NUM_CACHE_STEPS)
    prompts = np.bincount(steps, weights=requests.prompt_tokens[known], minlength=NUM_CACHE_STEPS)
    shares = np.full(NUM_CACHE_STEPS, math.nan)
    np.divide(100 * cached, prompts, out=shares, where=prompts > 0)
    return Series(width_s=width_s, values=shares)


def hit_rate_bars(runs: Sequence[Run]) -> Html | None:
    """The hit rate of each run as a bar; None when no server told."""
    rates = [run.hit_rate_pct for run in runs]
    if all(rate is None for rate in rates):
        return None
    across = Scale(0.0, 100.0, 96.0, HALF - 64.0)
    parts = []
    for i, rate in enumerate(rates):
        y = 12.0 + 34 * i
        parts.append(_bar_label(i, "Hit rate" if len(runs) == 1 else f"{letter(i)}  hit rate", y))
        parts.append(element("rect", x=across.start, y=y, width=across.end - across.start, height=18, class_="track"))
        if rate is not None:
            width = max(across(rate) - across.start, 1.0)
            parts.append(element("rect", x=across.start, y=y, width=width, height=18, class_=f"bar run{i}"))
        words = "not told" if rate is None else f"{short_number(rate)} %"
        parts.append(text(across.end + 8, y + 13, words, "value" if rate is not None else "quiet"))
    return drawing(HALF, 12 + 34 * len(runs), "Cache hit rate", *parts)


def cold_and_warm_bars(runs: Sequence[Run]) -> Html | None:
    """Median TTFT of cold and of warm requests; None when no server told."""
    found = [
        (i, kind, run.number(kind, "requests"), run.number(kind, "median_ttft_ms"))
        for i, run in enumerate(runs)
        for kind in ("cold", "warm")
    ]
    shown = [(i, kind, num, median) for i, kind, num, median in found if num is not None and median is not None]
    if not shown:
        return None
    longest = max((median for _, _, num, median in shown if num), default=1.0)
    across = Scale(0.0, nice_top(longest), 96.0, HALF - 170.0)
    parts, y = [], 12.0
    last = shown[0][0]
    for i, kind, num, median in shown:
        y += 12.0 if i != last else 0.0
        last = i
        parts.append(_bar_label(i, kind.capitalize() if len(runs) == 1 else f"{letter(i)}  {kind}", y))
        parts.append(vertical_line(across.start, y - 3, y + 21, "axis"))
        if num:
            width = max(across(median) - across.start, 1.0)
            class_ = f"bar run{i} {'pale' if kind == 'cold' else ''}".strip()
            parts.append(element("rect", x=across.start, y=y, width=width, height=18, class_=class_))
            parts.append(text(across.start + width + 8, y + 13, duration_text(median), "value"))
        words = f"{int(num):,} request{'' if num == 1 else 's'}"
        parts.append(text(HALF - RIGHT, y + 13, words, "quiet", "end"))
        y += 28
    return drawing(HALF, y + 4, "Median time to first token, cold and warm", *parts)


def _bar_label(run: int, words: str, y: float) -> Html:
    return text(86.0, y + 13, words, "tick", "end")
