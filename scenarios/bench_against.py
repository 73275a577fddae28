"""A benchmark's ratios beside those of an earlier file: what became worse, and what cannot be compared.

Figures of two days or machines say nothing; ratios of programs that were measured in turn do. Compared
are those of each program of fedseal to each other project's, and to the first program of the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from protocol.errors import BenchmarkFailed
from scenarios.bench_targets import Run, median, size_name

TOLERATED: Final = 1.2
"""A ratio that grew by more than this factor counts as worse; less is better in every row of a table."""

_OWN: Final = "fedseal"
Ratios = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Comparison:
    """What two files of a benchmark say beside each other.

    Attributes:
        worse: A line for every ratio that grew by more than `TOLERATED`.
        compared: Number of ratios that both files have.
        notes: Lines on what differs between the files or stands in one of them only.
    """

    worse: tuple[str, ...]
    compared: int
    notes: tuple[str, ...]


def read_earlier(file: Path, name: str) -> dict[str, Any]:
    """Read an earlier file of a benchmark.

    Args:
        file: As `fedseal bench --json` wrote it.
        name: The benchmark that is to be compared with it.

    Raises:
        BenchmarkFailed: It cannot be read, or is of another benchmark.
    """
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        kind = earlier["benchmark"]
        for run in earlier["runs"]:
            _ratios(run)
        _facts(earlier)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BenchmarkFailed("the file that --against names is not one of fedseal bench --json") from None
    if kind != name:
        raise BenchmarkFailed(f"the file that --against names is of the benchmark {kind}, not of {name}")
    return dict(earlier)


def compare(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> Comparison:
    """Compare the ratios of two files of one benchmark.

    Args:
        earlier: From `read_earlier`.
        later: The report of `scenarios.bench.make_report`.
    """
    before, after = _by_size(earlier), _by_size(later)
    worse, notes, compared = [], _differences(_facts(earlier), _facts(later)), 0
    for size in before | after:
        if size not in before or size not in after:
            notes.append(f"{size}: only in the {'earlier' if size in before else 'new'} file")
            continue
        old, new = before[size], after[size]
        both = [key for key in old if key in new]
        compared += len(both)
        worse += [
            f"{size}: {pair}, {metric}: {old[pair, metric]:.3g} became {new[pair, metric]:.3g}"
            for pair, metric in both
            if new[pair, metric] > TOLERATED * old[pair, metric]
        ]
        for ratios, others, where in ((old, new, "earlier"), (new, old, "new")):
            alone = dict.fromkeys(pair for pair, metric in ratios if (pair, metric) not in others)
            notes += [f"{size}: {pair}: some or all ratios only in the {where} file" for pair in alone]
    return Comparison(tuple(worse), compared, tuple(notes))


def _by_size(report: Mapping[str, Any]) -> dict[str, Ratios]:
    return {size_name(run): _ratios(run) for run in report["runs"]}


def _ratios(run: Run) -> Ratios:
    """Return how many times as much an arm takes as another, by their labels and the metric's."""
    arms, ratios = run["arms"], Ratios()
    for arm, other in _pairs(arms):
        for metric in run["metrics"]:
            above, below = (median(run, one["key"], metric["key"]) for one in (arm, other))
            if metric["compared"] and above is not None and below:
                ratios[f"{arm['label']} to {other['label']}", metric["label"]] = above / below
    return ratios


def _pairs(arms: list[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for arm in arms:
        if not arm["label"].startswith(_OWN):
            continue
        for other in arms:
            if other is not arm and (other is arms[0] or not other["label"].startswith(_OWN)):
                yield arm, other


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Return what may explain a difference: machine and versions."""
    facts = {**report["machine"], **report["versions"]}
    return {name: str(value) for name, value in facts.items()}


def _differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return [
        f"{name}: {before.get(name, 'unknown')} in the earlier file, {after.get(name, 'unknown')} now"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
