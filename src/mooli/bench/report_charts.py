"""The report's charts: distributions, what happened over time, the timeline of requests, what came from the cache.

Owns their shapes. Every chart takes all runs and gives them the same scales; `run0`, `run1`, ... are the style sheet's
classes that colour a run. Never reads a file, never formats a page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mooli.bench.report_runs import Floats, Requests, Run
from mooli.bench.report_svg import (
    Html,
    Scale,
    drawing,
    duration_text,
    element,
    horizontal_line,
    joined,
    line_path,
    nice_top,
    short_number,
    spread,
    step_path,
    text,
    vertical_line,
)

HALF, FULL = 560.0, 1160.0
"""Widths of drawings: two to a row, or one."""

LEFT, RIGHT = 58.0, 14.0

MARKS = (("p50", "median"), ("p90", "p90"), ("p99", "p99"))
"""Marked percentiles, and how the result's keys call them."""

LOG_FROM = 8
"""From this ratio of the largest value to a small one on, an axis is logarithmic."""

NUM_COLUMNS = 56
"""Of a histogram of many values, and of those that tell about a curve."""

NUM_CURVE_POINTS = 180
MOST_COLUMNS = 240


def letter(number: int) -> str:
    """The letter of a run."""
    return "ABCDEFGH"[number]


def distribution_chart(runs: Sequence[Run], name: str, noun: str) -> Html | None:
    """Histograms, one under the other, and the share of values below each value; None without details.

    name: "ttft", "itl", "tpot" or "e2e_latency". noun: what a value belongs to, for the words under the pointer.
    The marks are the percentiles of the result, not of the values drawn.
    """
    values = [np.sort(run.requests.samples_ms(name)) if run.requests is not None else np.empty(0) for run in runs]
    if not any(len(found) for found in values):
        return None
    scale = _value_scale([found for found in values if len(found)])
    height = 74.0 if len(runs) > 1 else 120.0
    num_bins = min(max(int(2 * math.sqrt(max(len(found) for found in values))), 10), NUM_COLUMNS)
    edges = [scale.value_at(i / num_bins) for i in range(num_bins + 1)]
    counts = [_binned(found, edges) for found in values]
    top_share = max(float(count.max()) / max(len(found), 1) for count, found in zip(counts, values, strict=True))
    parts: list[Html] = []
    y = 16.0
    for i, run in enumerate(runs):
        bars = _Bars(scale=scale, edges=edges, top_share=top_share, top=y + 4, base=y + height)
        parts.append(_histogram(bars, counts[i], len(values[i]), i, noun, is_alone=len(runs) == 1))
        parts.append(_marks(run, name, scale, y + 4, y + height, i))
        y += height + 18
    curve_top, curve_base = y + 4, y + 150
    parts.append(_curves(runs, name, values, scale, curve_top, curve_base, noun))
    parts.append(_value_axis(scale, curve_base))
    return drawing(HALF, curve_base + 24, f"Distribution of {noun}s", *parts)


def _value_scale(values: Sequence[Floats]) -> Scale:
    high = max(float(found[-1]) for found in values)
    low = min(float(found[0]) for found in values)
    small = min(float(found[int(0.01 * len(found))]) for found in values)
    if high <= 0:
        return Scale(0.0, 1.0, LEFT, HALF - RIGHT)
    positive = min((float(found[found > 0][0]) for found in values if (found > 0).any()), default=high)
    if high / max(small, positive) > LOG_FROM:
        return Scale(max(positive, high / 1e5, small / 2), high * 1.02, LEFT, HALF - RIGHT, is_log=True)
    if low > 0.6 * high and high > low:
        margin = 0.08 * (high - low)
        return Scale(low - margin, high + margin, LEFT, HALF - RIGHT)
    return Scale(0.0, high * 1.04, LEFT, HALF - RIGHT)


def _binned(values: Floats, edges: Sequence[float]) -> Floats:
    inside = np.clip(values, edges[0], edges[-1])
    bounds = np.asarray(edges)
    bins = np.clip(np.searchsorted(bounds, inside, side="right") - 1, 0, len(edges) - 2)
    return np.bincount(bins, minlength=len(edges) - 1).astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bars:
    """Where a histogram stands: shares of all values, from `base` up to `top`."""

    scale: Scale
    edges: Sequence[float]
    top_share: float
    top: float
    base: float


def _histogram(bars: _Bars, counts: Floats, num: int, run: int, noun: str, *, is_alone: bool) -> Html:
    parts = [horizontal_line(bars.base, LEFT, HALF - RIGHT, "axis")]
    if not is_alone:
        parts.append(text(LEFT - 10, bars.base - 4, letter(run), "letter", "end"))
    if not num:
        return element(
            "g", *parts, text(LEFT + 8, bars.base - 8, "no details in the file", "quiet"), class_=f"run{run}"
        )
    up = Scale(0.0, bars.top_share, bars.base, bars.top)
    path = []
    for i, count in enumerate(counts):
        if count:
            x1, x2 = bars.scale(bars.edges[i]), bars.scale(bars.edges[i + 1])
            tip = f"{duration_text(bars.edges[i])} to {duration_text(bars.edges[i + 1])}\n" + (
                f"{int(count):,} of {num:,} {noun}s ({short_number(100 * count / num)} %)"
            )
            y = min(up(count / num), bars.base - 1)
            path.append(element("rect", x=x1 + 0.5, width=x2 - x1 - 1, y=y, height=bars.base - y, data_tip=tip))
    if is_alone:
        label = f"{short_number(100 * bars.top_share)} %"
        parts += [text(LEFT - 8, bars.top + 8, label, "tick", "end"), text(LEFT - 8, bars.base, "0", "tick", "end")]
    return element("g", *parts, element("g", *path, class_="bars"), class_=f"run{run}")


def _marks(run: Run, name: str, scale: Scale, top: float, base: float, number: int) -> Html:
    found = [(mark, value) for mark, key in MARKS if (value := run.number(f"{key}_{name}_ms")) is not None]
    places = spread([scale(value) for _, value in found], 27, LEFT + 10, HALF - RIGHT - 10)
    parts = []
    for (mark, value), place in zip(found, places, strict=True):
        line = vertical_line(scale(value), top, base, f"mark {mark}")
        label = text(place, top - 4, mark, "mark-label", "middle")
        parts.append(element("g", line, label, data_tip=f"{mark} {duration_text(value)}"))
    return element("g", *parts, class_=f"run{number}")


def _curves(
    runs: Sequence[Run], name: str, values: Sequence[Floats], scale: Scale, top: float, base: float, noun: str
) -> Html:
    up = Scale(0.0, 100.0, base, top)
    parts = [horizontal_line(up(share), LEFT, HALF - RIGHT, "grid") for share in (50, 90, 99)]
    places = spread([up(99), up(90), up(50), up(0)], 12, top, base)
    for share, place in zip((99, 90, 50, 0), places, strict=True):
        parts.append(text(LEFT - 8, place + 4, f"{share} %" if share else "0", "tick", "end"))
    for i, (run, found) in enumerate(zip(runs, values, strict=True)):
        if not len(found):
            continue
        # Even steps of the share below, and closer ones in the tail, where percentiles are read off.
        shares = np.unique(np.concatenate([np.linspace(0, 0.95, NUM_CURVE_POINTS), np.linspace(0.95, 1, 60)]))
        xs = [scale(float(value)) for value in np.quantile(found, shares)]
        parts.append(element("path", d=line_path(xs, [up(100 * share) for share in shares]), class_=f"curve run{i}"))
        for (mark, key), percent in zip(MARKS, (50, 90, 99), strict=True):
            value = run.number(f"{key}_{name}_ms")
            if value is not None:
                tip = f"{letter(i)} " if len(runs) > 1 else ""
                dot = element("circle", cx=scale(value), cy=up(percent), r=4, class_=f"dot run{i}")
                parts.append(element("g", dot, data_tip=f"{tip}{mark} {duration_text(value)}"))
    columns = []
    for i in range(NUM_COLUMNS):
        edge = scale.value_at((i + 1) / NUM_COLUMNS)
        words = [f"{noun} up to {duration_text(edge)}"]
        for number, found in enumerate(values):
            if len(found):
                percent_up_to = 100 * float(np.searchsorted(found, edge, side="right")) / len(found)
                words.append((f"{letter(number)} " if len(runs) > 1 else "") + f"{short_number(percent_up_to)} %")
        x1, x2 = scale(scale.value_at(i / NUM_COLUMNS)), scale(edge)
        columns.append(element("rect", x=x1, width=x2 - x1, y=top, height=base - top, data_tip="\n".join(words)))
    # Dots come after the columns, so that the pointer finds them.
    dots = [part for part in parts if part.startswith("<g")]
    rest = [part for part in parts if not part.startswith("<g")]
    axis = horizontal_line(base, LEFT, HALF - RIGHT, "axis")
    return element("g", *rest, axis, element("g", *columns, class_="pointer"), *dots)


def _value_axis(scale: Scale, base: float) -> Html:
    parts = [text(0.0, base + 18, "log", "tick")] if scale.is_log else []
    for tick in scale.ticks():
        # A label at the right edge ends with its tick, so that it does not stick out.
        anchor = "end" if scale(tick) > HALF - RIGHT - 8 else "middle"
        parts += [
            vertical_line(scale(tick), base, base + 4, "axis"),
            text(scale(tick), base + 18, duration_text(tick) if tick else "0", "tick", anchor),
        ]
    return joined(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeAxis:
    """The time scale that all runs share, in seconds from the first request of each, from `first_s` to `seconds`."""

    seconds: float
    left: float
    right: float
    first_s: float = 0.0

    @staticmethod
    def of(runs: Sequence[Run]) -> TimeAxis:
        ends = [run.number("duration") or 0.0 for run in runs]
        for run in runs:
            requests = run.requests
            if requests is not None and requests.start_s is not None and len(requests):
                ends.append(float((requests.start_s + requests.latency_s).max()))
        return TimeAxis(seconds=max(ends) * 1.01 or 1.0, left=LEFT, right=FULL - RIGHT)

    def scale(self) -> Scale:
        return Scale(self.first_s, self.seconds, self.left, self.right)

    def draw(self, top: float, base: float) -> Html:
        """Ticks under `base`, and faint lines up to `top`."""
        scale, parts = self.scale(), []
        ticks = scale.ticks(12)
        for i, tick in enumerate(ticks):
            parts.append(vertical_line(scale(tick), top, base, "grid"))
            is_last = i == len(ticks) - 1
            words = f"{short_number(tick)} s" if is_last or not i else short_number(tick)
            anchor = "end" if scale(tick) > self.right - 12 else "middle"
            parts.append(text(scale(tick), base + 18, words, "tick", anchor))
        return joined(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values of one run in buckets of `width_s` seconds. NaN where there is nothing to show."""

    width_s: float
    values: Floats

    def thinned(self, factor: int, combine: Callable[[Floats], float]) -> Series:
        groups = [self.values[at : at + factor] for at in range(0, len(self.values), factor)]
        return Series(width_s=self.width_s * factor, values=np.asarray([combine(group) for group in groups]))


def time_chart(series: Sequence[Series | None], axis: TimeAxis, label: str, unit: str, height: float = 150.0) -> Html:
    """A step line to a run, over time. unit: of the values, with a space before it where one belongs."""
    top, base = 14.0, 14.0 + height
    known = [found for found in series if found is not None]
    peak = max((float(np.nanmax(found.values)) for found in known if len(found.values)), default=0.0)
    up = Scale(0.0, 100.0 if unit == " %" else nice_top(peak), base, top)
    parts = [axis.draw(top, base)]
    for tick in up.ticks(5):
        parts.append(horizontal_line(up(tick), axis.left, axis.right, "grid" if tick else "axis"))
        parts.append(
            text(axis.left - 8, up(tick) + 4, short_number(tick) + (unit if unit == " %" else ""), "tick", "end")
        )
    across = axis.scale()
    for i, found in enumerate(series):
        if found is not None:
            parts.append(_steps(found, across, up, i, base, is_filled=len(series) == 1))
    parts.append(_pointer_columns(series, across, top, base, unit))
    return drawing(FULL, base + 24, label, *parts)


def _steps(series: Series, across: Scale, up: Scale, run: int, base: float, *, is_filled: bool) -> Html:
    parts = []
    start = 0
    values = series.values
    while start < len(values):
        if math.isnan(values[start]):
            start += 1
            continue
        end = start
        while end < len(values) and not math.isnan(values[end]):
            end += 1
        xs = [across(i * series.width_s) for i in range(start, end + 1)]
        ys = [up(float(value)) for value in values[start:end]]
        if is_filled:
            parts.append(element("path", d=step_path(xs, ys, base=base), class_=f"area run{run}"))
        parts.append(element("path", d=step_path(xs, ys), class_=f"curve run{run}"))
        start = end
    return joined(parts)


def _pointer_columns(series: Sequence[Series | None], across: Scale, top: float, base: float, unit: str) -> Html:
    """Invisible columns that tell the values under the pointer."""
    known = [found for found in series if found is not None]
    if not known:
        return Html("")
    width_s = known[0].width_s
    columns = []
    for i in range(max(len(found.values) for found in known)):
        x1, x2 = across(i * width_s), across((i + 1) * width_s)
        words = [f"{short_number(i * width_s)} to {short_number((i + 1) * width_s)} s"]
        for number, found in enumerate(series):
            if found is not None and i < len(found.values) and not math.isnan(found.values[i]):
                name = f"{letter(number)} " if len(series) > 1 else ""
                words.append(f"{name}{short_number(float(found.values[i]))}{unit}")
        if x2 > x1 and len(words) > 1:
            tip = "\n".join(words)
            columns.append(element("rect", x=x1, width=x2 - x1, y=top, height=base - top, data_tip=tip))
    return element("g", *columns, class_="pointer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Tokens per second and open requests of all runs, in the same buckets. note: which buckets, in words."""

    tokens: list[Series | None]
    open: list[Series | None]
    note: str


SHORT_RUN_S = 12.0
"""Runs shorter than this are drawn in buckets of less than a second, where the requests are known."""


def activity(runs: Sequence[Run], axis: TimeAxis) -> Activity | None:
    """None when no file says anything about time.

    Buckets of one second are the result's own lists; others are counted from the requests.
    """
    has_starts = all(run.requests is not None and run.requests.start_s is not None for run in runs)
    if axis.seconds < SHORT_RUN_S and has_starts:
        width_s = next(width for width in (0.01, 0.02, 0.05, 0.1, 0.2) if axis.seconds / width <= 120 or width == 0.2)
        counted = [_count(run, width_s) for run in runs]
        note = f"One step is {short_number(width_s)} s, counted from the requests that succeeded."
        return Activity(tokens=[tokens for tokens, _ in counted], open=[opened for _, opened in counted], note=note)
    tokens = [_listed(run, "output_tokens_per_second") for run in runs]
    opened = [_listed(run, "requests_per_second") for run in runs]
    longest = max((len(found.values) for found in (*tokens, *opened) if found is not None), default=0)
    if not longest:
        return None
    factor = -(-longest // MOST_COLUMNS)
    if factor == 1:
        return Activity(tokens=tokens, open=opened, note="One step is 1 s.")
    return Activity(
        tokens=[found and found.thinned(factor, lambda group: float(group.mean())) for found in tokens],
        open=[found and found.thinned(factor, lambda group: float(group.max())) for found in opened],
        note=f"One step is {factor} s: the mean of {factor} seconds for tokens, the largest for requests.",
    )


def _listed(run: Run, key: str) -> Series | None:
    values = run.seconds_list(key)
    return None if values is None else Series(width_s=1.0, values=values)


def _count(run: Run, width_s: float) -> tuple[Series | None, Series | None]:
    requests = run.requests
    if requests is None or requests.start_s is None or not requests.succeeded.any():
        return None, None
    done = np.flatnonzero(requests.succeeded)
    starts = requests.start_s[done] - requests.start_s[done].min()
    ends = starts + requests.latency_s[done]
    num = int(ends.max() / width_s) + 1
    tokens, opened = np.zeros(num), np.zeros(num)
    for start, end, at in zip(starts, ends, done, strict=True):
        times = start + requests.ttft_s[at] + np.cumsum(np.concatenate([[0.0], requests.itl_s[at]]))
        np.add.at(tokens, np.clip(times / width_s, 0, num - 1).astype(np.int64), 1)
        opened[int(start / width_s) : int(end / width_s) + 1] += 1
    return Series(width_s=width_s, values=tokens / width_s), Series(width_s=width_s, values=opened)


# -- single requests ---------------------------------------------------------------------------------------------------

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
