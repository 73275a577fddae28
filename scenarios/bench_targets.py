"""What a benchmark is held to: limits on figures of its runs, with what was measured beside them.

Every figure comes from the runs of one report, those of peers too; what was not measured has no value.
Where several runs qualify, the worst counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich import box
from rich.table import Table

Run = Mapping[str, Any]
Figure = Callable[[Run], float | None]
Entry = dict[str, Any]

_SIGNS: Final = {False: "<= ", True: ">= "}


@dataclass(frozen=True)
class Target:
    """A limit on one figure.

    Attributes:
        key: Name in the report.
        label: What is limited, for people.
        most: Largest value that meets it; None for a figure that is only reported.
        figure: Takes the value out of a run; None if the run has not measured it.
        qualifies: Whether a run counts.
        wanted: Which runs count, for people.
        least: Smallest value that meets it, for a figure of which more is better; then there is no `most`.
    """

    key: str
    label: str
    most: float | None
    figure: Figure
    qualifies: Callable[[Run], bool] = lambda _: True
    wanted: str = "any run"
    least: float | None = None


def evaluate(targets: Sequence[Target], runs: Sequence[Run]) -> dict[str, Entry]:
    """Return for every target its value, the limit, whether it is met, and the run that it is from.

    A value that was not measured is None, with a reason; it is neither met nor missed.
    """
    return {target.key: _limited(target, runs) for target in targets}


def targets_table(entries: Mapping[str, Entry]) -> Table:
    """Lay the result of `evaluate` out, one row per target."""
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title="targets", title_justify="left"
    )
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("limit", justify="right")
    table.add_column("")
    table.add_column("from")
    for key, entry in entries.items():
        verdict = {True: "met", False: "missed", None: "-"}[entry["met"]]
        name = f"{key}: {entry['label']}"
        origin = entry["from"] or entry["reason"]
        limit = _shown(entry["target"])
        sign = "" if limit == "-" or isinstance(entry["target"], bool) else _SIGNS[entry["more_is_better"]]
        table.add_row(name, _shown(entry["value"]), sign + limit, verdict, origin)
    return table


def entry(target: float | bool | None, label: str, *, more_is_better: bool = False) -> Entry:
    """Return an entry without a value."""
    return {
        "value": None,
        "target": target,
        "more_is_better": more_is_better,
        "label": label,
        "met": None,
        "from": None,
        "reason": None,
    }


def size_name(run: Run) -> str:
    """Return a run's size for people."""
    settings = run["settings"]
    if "parameters" not in settings:
        return f"{settings['repetitions']} repetitions"
    return f"{settings['parameters']:,} parameters, {settings['clients']} clients"


def median(run: Run, arm: str, metric: str) -> float | None:
    """Return an arm's median in a run, or None if it has none."""
    for candidate in run["arms"]:
        if candidate["key"] == arm and candidate["summary"][metric] is not None:
            return float(candidate["summary"][metric]["median"])
    return None


def median_of(arm: str, metric: str) -> Figure:
    """Return a figure: an arm's median."""
    return lambda run: median(run, arm, metric)


def ratio_of(arm: str, other: str, metric: str) -> Figure:
    """Return a figure: an arm's median as a multiple of another arm's."""

    def figure(run: Run) -> float | None:
        above, below = median(run, arm, metric), median(run, other, metric)
        return None if above is None or not below else above / below

    return figure


def _limited(target: Target, runs: Sequence[Run]) -> Entry:
    falls = target.least is not None
    limit = target.least if falls else target.most
    result = entry(limit, target.label, more_is_better=falls)
    chosen = [run for run in runs if target.qualifies(run)]
    if not chosen:
        return result | {"reason": f"no run with {target.wanted}"}
    known = [(value, run) for run in chosen if (value := target.figure(run)) is not None]
    if not known:
        return result | {"reason": "the peer was not measured"}
    worst = min if falls else max
    value, run = worst(known, key=lambda pair: pair[0])
    met = None if limit is None else (value >= limit if falls else value <= limit)
    return result | {"value": value, "met": met, "from": size_name(run)}


def _shown(value: float | bool | None) -> str:
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else f"{value:.3f}"
