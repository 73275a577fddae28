"""Charts of experiments: lower bounds, membership inference, rebuilt pictures; as plain geometry.

As in `audit.pages.charts`, each says in words what it shows, for those who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from audit.checks.experiments import all_bounds
from audit.pages.charts import Tick, ticks
from audit.pages.listings import strongest_bounds
from audit.statistics.roc import ceiling
from audit.words import number, percent

BOUND_LEFT, BOUND_RIGHT = 4, 350
"""Horizontal room of the bars of lower bounds, in units of the view box."""

GROUP_HEAD, BOUND_ROW = 38, 36
"""Height of an observer's name, and of each bound below it."""

ROC_LEFT, ROC_RIGHT, ROC_TOP, ROC_BOTTOM = 46, 350, 12, 268
"""Plot area of a ROC, in units of its view box."""

LEAST_RATE = 1e-3
"""Smallest rate on the logarithmic axes of a ROC; what is below is drawn on the edge."""

_OBSERVERS = {
    "update": "The update before encryption",
    "opened sum": "The opened sum of all owners",
    "exported model": "The exported model",
    "wire": "The coordinator's wire",
}
_MODELS = {"without protection": "control", "as planned": "planned", "exported": "exported"}


@dataclass(frozen=True)
class BoundRow:
    """One lower bound as a bar.

    Attributes:
        control: Where the control's mark stands, or None; `beyond` if it is further right than shown.
    """

    top: int
    method: str
    width: float
    label: str
    control: float | None
    control_label: str
    beyond: bool


@dataclass(frozen=True)
class BoundGroup:
    """The bars of one observer, with the claim as a line."""

    top: int
    bottom: int
    name: str
    claimed: float | None
    claimed_label: str
    rows: list[BoundRow]


@dataclass(frozen=True)
class BoundsChart:
    """Lower bounds of all observers on one linear scale."""

    groups: list[BoundGroup]
    ticks: list[Tick]
    height: int
    summary: str


def bounds_chart(report: dict[str, Any]) -> BoundsChart | None:
    """Return the lower bounds beside the claimed epsilon; None if there are none."""
    bounds = strongest_bounds(all_bounds(report))
    if not bounds:
        return None
    largest = max(max(b["epsilon"], b["claimed"] or 0.0) for b in bounds) or 1.0
    controls = [b["control"] for b in bounds if b["control"] is not None]
    span = max(1.1 * largest, min(max(controls, default=0.0), 3 * largest))

    def across(value: float) -> float:
        return BOUND_LEFT + min(value, span) / span * (BOUND_RIGHT - BOUND_LEFT)

    groups, top = [], 0
    for observer, name in _OBSERVERS.items():
        mine = [b for b in bounds if b["observer"] == observer]
        if mine:
            groups.append(_group(top, name, mine, across, span))
            top = groups[-1].bottom + 10
    sentences = [
        f"{_OBSERVERS[b['observer']]}, {b['method']}: at least {number(float(b['epsilon']))}, claimed "
        f"{number(b['claimed'])}, with the noise off {number(b['control'])}"
        for b in bounds
    ]
    axis = [Tick(across(value), f"{value:g}") for value in ticks(0.0, span, 5)]
    return BoundsChart(groups, axis, top, ". ".join(sentences) + ".")


def _group(top: int, name: str, bounds: list[dict[str, Any]], across: Any, span: float) -> BoundGroup:
    rows = []
    for index, bound in enumerate(bounds):
        control = bound["control"]
        rows.append(
            BoundRow(
                top=top + GROUP_HEAD + BOUND_ROW * index,
                method=bound["method"],
                width=max(1.0, across(bound["epsilon"]) - BOUND_LEFT),
                label=number(float(bound["epsilon"])),
                control=None if control is None else across(control),
                control_label="" if control is None else number(float(control)),
                beyond=control is not None and control > span,
            )
        )
    claims = [b["claimed"] for b in bounds if b["claimed"] is not None]
    claimed = max(claims, default=None)
    return BoundGroup(
        top=top,
        bottom=top + GROUP_HEAD + BOUND_ROW * len(bounds),
        name=name,
        claimed=None if claimed is None else across(claimed),
        claimed_label="nothing claimed" if claimed is None else f"claimed {number(float(claimed))}",
        rows=rows,
    )


@dataclass(frozen=True)
class Curve:
    """One ROC as an SVG `points` attribute; `style` names the model that was attacked."""

    style: str
    label: str
    path: str


@dataclass(frozen=True)
class RocChart:
    """The ROC of one attack on one group of records, on logarithmic axes."""

    title: str
    curves: list[Curve]
    ceiling: str | None
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    summary: str


def roc_charts(report: dict[str, Any]) -> list[RocChart]:
    """Return a chart for each attack and group of records, with the ceiling that the promise sets."""
    attacks = [] if report["laboratory"] is None else report["laboratory"]["membership"]
    kinds = dict.fromkeys((attack["attack"], attack["group"]) for attack in attacks)
    return [_roc(report, kind, [a for a in attacks if (a["attack"], a["group"]) == kind]) for kind in kinds]


def _roc(report: dict[str, Any], kind: tuple[str, str], attacks: list[dict[str, Any]]) -> RocChart:
    axis = [(1e-3, "0.1 %"), (1e-2, "1 %"), (1e-1, "10 %"), (1.0, "100 %")]
    return RocChart(
        title=f"{kind[0][0].upper()}{kind[0][1:]}, {kind[1]}",
        curves=[
            Curve(_MODELS[attack["model"]], attack["model"], _points(attack["curve"])) for attack in attacks
        ],
        ceiling=_ceiling(report["promise"]),
        x_ticks=[Tick(_across(rate), label) for rate, label in axis],
        y_ticks=[Tick(_up(rate), label) for rate, label in axis],
        summary=" ".join(_sentence(attack) for attack in attacks),
    )


def _sentence(attack: dict[str, Any]) -> str:
    rate = attack["tpr_at_1_percent"]
    allowed = attack["ceiling_at_1_percent"]
    limit = "" if allowed is None else f" The promise allows {percent(allowed)}."
    model = attack["model"].capitalize()
    return (
        f"{model}: {percent(rate['value'])} of members found ({percent(rate['low'])} to "
        f"{percent(rate['high'])}) at 1 % of outsiders accused.{limit}"
    )


def _ceiling(promise: dict[str, Any]) -> str | None:
    """Return the largest true positive rates under the promise; None without one about single records."""
    if promise["epsilon"] == "inf" or promise["unit"] != "example":
        return None
    rates = [LEAST_RATE * 10 ** (3 * i / 40) for i in range(41)]
    return _points((rate, ceiling(promise["epsilon"], promise["delta"], rate)) for rate in rates)


def _points(curve: Iterable[Any]) -> str:
    return " ".join(f"{_across(x):.1f},{_up(y):.1f}" for x, y in curve)


def _share(rate: float) -> float:
    """Return where on a logarithmic axis from `LEAST_RATE` to 1 a rate stands, from 0 to 1."""
    return 1 - math.log10(max(rate, LEAST_RATE)) / math.log10(LEAST_RATE)


def _across(rate: float) -> float:
    return ROC_LEFT + _share(rate) * (ROC_RIGHT - ROC_LEFT)


def _up(rate: float) -> float:
    return ROC_BOTTOM - _share(rate) * (ROC_BOTTOM - ROC_TOP)


@dataclass(frozen=True)
class Picture:
    """What one observer could rebuild; `png` is base64, and empty where there is no picture."""

    observed: str
    png: str
    caption: str


@dataclass(frozen=True)
class InversionPanel:
    """One attack: the original picture, and what came back from what each observer holds."""

    title: str
    original_png: str
    pictures: list[Picture]


def inversion_panels(report: dict[str, Any]) -> list[InversionPanel]:
    """Return a row of pictures for each attack and number of records in the attacked step."""
    attacks = [] if report["laboratory"] is None else report["laboratory"]["inversion"]
    kinds = dict.fromkeys((attack["attack"], attack["batch"]) for attack in attacks)
    panels = []
    for name, batch in kinds:
        mine = [a for a in attacks if (a["attack"], a["batch"]) == (name, batch)]
        panels.append(
            InversionPanel(
                title=f"{name.capitalize()}, {batch} {'record' if batch == 1 else 'records'}",
                original_png=next((a["original_png"] for a in mine if a["original_png"]), ""),
                pictures=[Picture(a["observed"], a["rebuilt_png"], _caption(a)) for a in mine],
            )
        )
    return panels


def _caption(attack: dict[str, Any]) -> str:
    count = f"{attack['rebuilt']} of {attack['batch']} rebuilt"
    likeness = attack["psnr_db"]
    return count if likeness is None else f"{count}, {likeness:.0f} dB"
