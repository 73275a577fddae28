"""Charts of what a run left behind, as plain geometry that the page's template draws as inline SVG.

Each chart says in words what it shows, for those who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from audit.words import number, size

T = TypeVar("T")

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 18, 172
"""Plot area of a line chart, in units of its view box. It fits a narrow telephone at full size."""

MOST_DOTS = 24
"""Most values that get a dot each; of more, only the last has one."""

MOST_POINTS = 240
"""Most points of a line, about one for each pixel of its width."""

BAR_HEAD, BAR_ROW, BAR_LEFT, BAR_RIGHT = 28, 15, 4, 264
"""Height of an exchange's name and of each bar below it, and the horizontal room of the bars."""


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis, in view box units."""

    at: float
    label: str


@dataclass(frozen=True)
class LineChart:
    """A line over rounds, in view box units.

    Attributes:
        points: Positions of the values, of many rounds evenly chosen ones, the last among them.
        label: Where the last value is written, inside the plot.
        cap: Height of the limit line; None if there is none.
        summary: What the chart shows, for those who cannot see it.
    """

    points: list[tuple[float, float]]
    label: tuple[float, float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    cap: float | None
    cap_label: str
    last_label: str
    summary: str

    @property
    def path(self) -> str:
        """Return the points as an SVG `points` attribute."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)

    @property
    def dots(self) -> list[tuple[float, float]]:
        """Return the points that are drawn as dots."""
        return self.points if len(self.points) <= MOST_DOTS else self.points[-1:]


@dataclass(frozen=True)
class BarPart:
    """One bar: the bytes of one exchange in one direction."""

    direction: str
    width: float
    label: str


@dataclass(frozen=True)
class Bar:
    """The bars of one exchange under its name; a direction without bytes has none."""

    top: int
    name: str
    parts: list[BarPart]


@dataclass(frozen=True)
class BarChart:
    """Bars of all exchanges, on one linear scale, with a summary in words."""

    bars: list[Bar]
    height: int
    summary: str


def epsilon_chart(report: dict[str, Any]) -> LineChart | None:
    """Return spent epsilon over finished rounds with the promised limit; None without a guarantee."""
    spending, promised = report["spending"], report["promise"]["epsilon"]
    if promised == "inf" or any(point["epsilon"] == "inf" for point in spending):
        return None
    values = [(float(point["round"]), float(point["epsilon"])) for point in spending]
    last = values[-1][1]
    return _line_chart(
        values,
        y_range=(0.0, 1.15 * max(promised, last)),
        label=lambda value: f"{value:g}",
        cap=float(promised),
        cap_label=f"promised at most {promised:g}",
        last_label=number(last),
        summary=f"Spent epsilon rises from 0 to {number(last)} after {values[-1][0]:.0f} rounds. "
        f"The promised limit is {promised:g}.",
    )


def accuracy_chart(report: dict[str, Any]) -> LineChart | None:
    """Return accuracy over finished rounds; None if it was never measured."""
    values = [
        (float(entry["round"]), float(entry["accuracy"]))
        for entry in report["rounds"]
        if not entry["void"] and entry["accuracy"] is not None
    ]
    if not values:
        return None
    heights = [value for _, value in values]
    low = math.floor(10 * min(heights)) / 10
    high = max(low + 0.1, math.ceil(10 * max(heights)) / 10)
    return _line_chart(
        values,
        y_range=(low, high),
        label=lambda value: f"{100 * value:.0f} %",
        cap=None,
        cap_label="",
        last_label=f"{100 * heights[-1]:.1f} %",
        summary=f"Accuracy on public data goes from {100 * heights[0]:.1f} % "
        f"to {100 * heights[-1]:.1f} %. The scale starts at {100 * low:.0f} %.",
    )


def bytes_chart(report: dict[str, Any]) -> BarChart | None:
    """Return the bytes of each exchange, received and sent; None if nothing is on record."""
    totals: dict[str, dict[str, int]] = {}
    for entry in report["transcript"]:
        kind = totals.setdefault(entry["kind"], {"received": 0, "sent": 0})
        kind[entry["direction"]] += entry["total_bytes"]
    if not totals:
        return None
    largest = max(1, *(max(kind.values()) for kind in totals.values()))
    scale = (BAR_RIGHT - BAR_LEFT) / largest
    bars, top = [], 0
    for name, kind in totals.items():
        parts = [
            BarPart(direction, max(1.0, count * scale), size(count))
            for direction, count in kind.items()
            if count
        ]
        bars.append(Bar(top, name if len(name) <= 40 else name[:39] + "…", parts))
        top += BAR_HEAD + BAR_ROW * len(parts)
    sentences = [
        f"{bar.name}: " + (", ".join(f"{part.direction} {part.label}" for part in bar.parts) or "nothing")
        for bar in bars
    ]
    return BarChart(bars, height=top, summary=". ".join(sentences) + ".")


def _line_chart(
    values: Sequence[tuple[float, float]], *, y_range: tuple[float, float], label: Any, **rest: Any
) -> LineChart:
    first, last = min(x for x, _ in values), max(x for x, _ in values)
    low, high = y_range
    wide, tall = (last - first) or 1.0, (high - low) or 1.0

    def across(x: float) -> float:
        return LEFT + (x - first) / wide * (RIGHT - LEFT)

    def up(y: float) -> float:
        return BOTTOM - (y - low) / tall * (BOTTOM - TOP)

    cap = rest.pop("cap")
    points = [(across(x), up(y)) for x, y in evenly(values, MOST_POINTS)]
    right, height = points[-1]
    return LineChart(
        points=points,
        # below the line, or above it where the axis is near; never beyond the left edge
        label=(max(right, LEFT + 52.0), height + 26.0 if height < BOTTOM - 30 else height - 10.0),
        x_ticks=[Tick(across(x), f"{x:.0f}") for x in ticks(first, last, 6) if x == round(x)],
        y_ticks=[Tick(up(y), label(y)) for y in ticks(low, high, 4)],
        cap=None if cap is None else up(cap),
        **rest,
    )


def evenly(values: Sequence[T], most: int) -> list[T]:
    """Return all values if there are at most `most`, else so many at even distances, first and last too."""
    if len(values) <= most:
        return list(values)
    step = (len(values) - 1) / (most - 1)
    return [values[round(index * step)] for index in range(most)]


def ticks(low: float, high: float, count: int) -> Iterable[float]:
    """Return about `count` round numbers within [low, high]: 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    rough = span / count
    unit: float = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
