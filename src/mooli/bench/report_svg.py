"""Markup, scales and axes: what every chart of the report is made of.

Owns escaping: a `str` that goes into an element is text and is escaped, `Html` is markup and is not. Never knows what a
chart shows.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass


class Html(str):
    """Markup. Made by `element` and `joined` only."""

    __slots__ = ()


Child = str | float | int | None


def element(tag: str, *children: Child, **attributes: Child) -> Html:
    """`<tag attributes>children</tag>`. `class_` is class, `data_tip` is data-tip; None is left out."""
    head = "".join(f' {_name(name)}="{_attribute(value)}"' for name, value in attributes.items() if value is not None)
    if not children and tag in ("path", "rect", "line", "circle", "meta"):
        return Html(f"<{tag}{head}/>")
    return Html(f"<{tag}{head}>{joined(children)}</{tag}>")


def joined(children: Sequence[Child]) -> Html:
    return Html("".join(_content(child) for child in children if child is not None))


def _name(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _attribute(value: Child) -> str:
    return html.escape(coordinate(value) if isinstance(value, float) else str(value))


def _content(child: Child) -> str:
    if isinstance(child, Html):
        return child
    return html.escape(coordinate(child) if isinstance(child, float) else str(child))


def coordinate(value: float) -> str:
    """At most two decimals, none that say nothing."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` onto pixels from `start` to `end`; values beyond are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def value_at(self, share: float) -> float:
        if self.is_log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + share * (self.high - self.low)

    def ticks(self, most: int = 7) -> list[float]:
        """At most about `most` round values inside."""
        if self.is_log:
            return _log_ticks(self.low, self.high, most)
        step = nice_step((self.high - self.low) / max(most - 1, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def nice_top(value: float, steps: int = 4) -> float:
    """A round number that is not below `value`, for the top of a scale that begins with 0."""
    if value <= 0:
        return 1.0
    step = nice_step(value / steps)
    return step * math.ceil(value / step - 1e-9)


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        inside = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(inside) <= most:
            return inside
    return inside[:: -(-len(inside) // most)]


def short_number(value: float) -> str:
    """Three digits that matter, thousands apart."""
    size = abs(value)
    if size and size < 0.001:
        return f"{value:.1e}"
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration_text(ms: float) -> str:
    """Milliseconds with a unit a person reads at once."""
    return f"{short_number(ms / 1000)} s" if abs(ms) >= 1000 else f"{short_number(ms)} ms"


def spread(positions: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Ascending `positions` moved as little as needed to lie `least` apart within `low` and `high`."""
    moved: list[float] = []
    for position in positions:
        moved.append(max(position, moved[-1] + least if moved else low))
    limit = high
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - least
    return moved


def step_path(xs: Sequence[float], ys: Sequence[float], *, base: float | None = None) -> str:
    """Path of a step line: `ys[i]` holds from `xs[i]` to `xs[i + 1]`; closed down to `base` when given."""
    parts = []
    for i, y in enumerate(ys):
        parts.append(f"{'L' if i else 'M'}{coordinate(xs[i])} {coordinate(y)}H{coordinate(xs[i + 1])}")
    if parts and base is not None:
        parts.append(f"V{coordinate(base)}H{coordinate(xs[0])}Z")
    return "".join(parts)


def line_path(xs: Sequence[float], ys: Sequence[float]) -> str:
    return "".join(
        f"{'L' if i else 'M'}{coordinate(x)} {coordinate(y)}" for i, (x, y) in enumerate(zip(xs, ys, strict=True))
    )


def text(x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> Html:
    return element("text", words, x=x, y=y, class_=class_ or None, text_anchor=None if anchor == "start" else anchor)


def horizontal_line(y: float, x1: float, x2: float, class_: str) -> Html:
    return element("line", x1=x1, x2=x2, y1=y, y2=y, class_=class_)


def vertical_line(x: float, y1: float, y2: float, class_: str) -> Html:
    return element("line", x1=x, x2=x, y1=y1, y2=y2, class_=class_)


def drawing(width: float, height: float, label: str, *children: Html) -> Html:
    """An SVG that fills the width it is given."""
    size = f"0 0 {coordinate(width)} {coordinate(height)}"
    return element("svg", *children, viewBox=size, role="img", aria_label=label, class_="wide" if width > 800 else None)
