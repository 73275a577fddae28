"""Pictures of a plan's privacy loss: an SVG file, and a few lines of text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.text import Text

from audit.outlook import Outlook, Point
from protocol.claims import EXPERIMENTAL, UNITS
from protocol.plan import Plan

_TEMPLATES = Path(__file__).parent / "templates"

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 696, 92, 356
"""Plot area, in units of the view box."""

_BLOCKS = " ▁▂▃▄▅▆▇█"
_CHART_WIDTH, _CHART_HEIGHT = 60, 8


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve with a label at its end."""

    style: str
    points: str
    end: Tick
    label_y: float


def svg(plan: Plan, view: Outlook) -> str:
    """Return a picture of epsilon over rounds as the text of one SVG file.

    It names the unit, has a description for those who cannot see it, needs no network and no script.
    """
    distributed = plan.privacy.noise == "distributed"
    target, last = plan.privacy.target_epsilon, view.curve[-1]
    drawn = [last.epsilon, target or 0.0] + ([last.worst] if distributed else [])
    ticks = _ticks(1.05 * max((value for value in drawn if math.isfinite(value)), default=1.0))
    scale_x = (RIGHT - LEFT) / last.rounds
    scale_y = (BOTTOM - TOP) / ticks[-1]
    lines = [_line("line", "promised" if distributed else "", view.curve, scale_x, scale_y)]
    if distributed:
        worst = [Point(point.rounds, point.worst, point.worst) for point in view.curve]
        lines.append(_line("worst", "if all others collude", worst, scale_x, scale_y))
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("privacy.svg.j2").render(
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        top=TOP,
        bottom=BOTTOM,
        title=title(plan),
        subtitle=f"delta {plan.privacy.delta:g}, noise multiplier {view.mechanism.noise_multiplier:g}"
        f", {plan.run.rounds} rounds and {plan.run.paid_spares} paid spare",
        alarm=f"{EXPERIMENTAL}: the promise rests on other owners' noise" if distributed else "",
        summary=summary(plan, view),
        y_ticks=[Tick(round(BOTTOM - value * scale_y, 1), f"{value:g}") for value in ticks],
        x_ticks=[
            Tick(round(LEFT + value * scale_x, 1), f"{value:g}")
            for value in _ticks(last.rounds)
            if value <= last.rounds and value == int(value)
        ],
        cap=Tick(round(BOTTOM - target * scale_y, 1), f"target {target:g}") if target else None,
        lines=[line for line in lines if line.points],
    )


def title(plan: Plan) -> str:
    """Return what the picture shows, with its unit."""
    unit = plan.privacy.unit
    return f"Privacy loss of one {unit} ({UNITS[unit]})"


def summary(plan: Plan, view: Outlook) -> str:
    """Return the picture in one or two sentences."""
    last = view.curve[-1]
    text = f"Epsilon of one {plan.privacy.unit} rises from 0 to {last.epsilon:.4g} in {last.rounds} rounds"
    if plan.privacy.target_epsilon is not None:
        text += f", the target is {plan.privacy.target_epsilon:g}"
    if plan.privacy.noise == "distributed":
        text += f". If all other owners collude it rises to {last.worst:.4g}"
    return text + "."


def text_chart(points: Sequence[Point], ascii_only: bool) -> Text:
    """Return epsilon over rounds as lines of block characters, or of `#` where only ASCII can be shown.

    Args:
        points: In ascending order of rounds, the first at no rounds.
        ascii_only: The terminal cannot show block characters.
    """
    rounds, top = points[-1].rounds, points[-1].epsilon
    if not math.isfinite(top) or top <= 0:
        return Text("")
    columns = [
        _interpolate(points, rounds * (i + 1) / _CHART_WIDTH) / top * _CHART_HEIGHT
        for i in range(_CHART_WIDTH)
    ]
    chart = Text()
    for row in range(_CHART_HEIGHT, 0, -1):
        mark = (
            f"{top * row / _CHART_HEIGHT:8.3g} " if row in (_CHART_HEIGHT, _CHART_HEIGHT // 2) else " " * 9
        )
        chart.append(mark, style="dim")
        chart.append(
            "".join(_cell(height - row + 1, ascii_only) for height in columns) + "\n", style="cyan"
        )
    axis = f"{'1':<{_CHART_WIDTH // 2}}{f'round {rounds}':>{_CHART_WIDTH - _CHART_WIDTH // 2}}"
    chart.append(" " * 9 + axis, style="dim")
    return chart


def _cell(height: float, ascii_only: bool) -> str:
    filled = min(max(height, 0.0), 1.0)
    if ascii_only:
        return "#" if filled >= 0.5 else " "
    return _BLOCKS[round(filled * (len(_BLOCKS) - 1))]


def _interpolate(points: Sequence[Point], rounds: float) -> float:
    for before, after in pairwise(points):
        if rounds <= after.rounds:
            share = (rounds - before.rounds) / (after.rounds - before.rounds)
            return before.epsilon + share * (after.epsilon - before.epsilon)
    return points[-1].epsilon


def _line(style: str, name: str, points: Sequence[Point], scale_x: float, scale_y: float) -> Line:
    known = [point for point in points if math.isfinite(point.epsilon)]
    places = [(LEFT + one.rounds * scale_x, BOTTOM - one.epsilon * scale_y) for one in known]
    x, y = places[-1]
    label = f"{name} {known[-1].epsilon:.2f}".strip()
    # Above a rising curve's end a label is free of the curve, but the promise has its target there.
    offset = 24 if style == "line" else -9
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places) if len(places) > 1 else ""
    return Line(style, text, Tick(round(x, 1), label), round(min(y + offset, BOTTOM - 6), 1))


def _ticks(most: float) -> list[float]:
    """Return about five round numbers from 0 up to `most` or a little beyond."""
    rough = most / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(step * i, 10) for i in range(math.ceil(most / step) + 1)]
