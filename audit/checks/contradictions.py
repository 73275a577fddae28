"""What no honest evidence can say: facts that contradict each other or the plan are refused, not judged.

A check compares what was found with a limit that stands beside it. These limits follow from the plan; here
they are held against it, so that whoever edits evidence cannot move a limit instead of a finding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from audit.checks.check import Report
from audit.checks.experiments import FALSE_POSITIVE_RATE, all_bounds
from audit.statistics.roc import ceiling
from protocol.errors import ReportInvalid

_TOLERANCE = 1 + 1e-6


def refuse_contradictions(report: Report) -> None:
    """Return if the sections of a report agree with each other as far as they must.

    Args:
        report: Its sections `subject`, `promise`, `rounds`, `laboratory` and `findings` are read.

    Raises:
        ReportInvalid: A round, an attempt or an owner of a sum is named twice, or an experiment states
            another limit than the promise has.
    """
    entries, promise = report["rounds"], report["promise"]
    finished = [e["round"] for e in entries if e["purpose"] == "train" and not e["void"]]
    if _repeated(finished) or not all(1 <= number <= promise["rounds"] for number in finished):
        raise ReportInvalid("a finished round is on record twice, or is none of the plan")
    if _repeated(entry["attempt"] for entry in entries):
        raise ReportInvalid("an attempt is on record twice")
    if any(_repeated(entry["contributors"]) for entry in entries):
        raise ReportInvalid("an owner is named twice in one sum")
    if promise["noise"] == "none":
        return
    if any((bound["claimed"] or 0.0) > promised_epsilon(report, bound) for bound in all_bounds(report)):
        raise ReportInvalid("a lower bound is compared with more than the plan promises")
    attacks, most = (report["laboratory"] or {"membership": []})["membership"], promised_rate(report)
    if any((attack["ceiling_at_1_percent"] or 0.0) > most * _TOLERANCE for attack in attacks):
        raise ReportInvalid("a membership attack is compared with more than the plan promises")


def promised_epsilon(report: Report, bound: dict[str, Any]) -> float:
    """Return epsilon of the whole run for a bound's observer, of which what the bound claims is a part.

    Whoever sees an update before encryption sees it without the others' noise.
    """
    part = "epsilon_worst" if bound["observer"] == "update" else "epsilon"
    return float(report["promise"][part]) * _TOLERANCE


def promised_rate(report: Report) -> float:
    """Return the largest true positive rate at `FALSE_POSITIVE_RATE` that the promise allows.

    A promise about a whole owner covers each of its records at twice the epsilon.
    """
    promise = report["promise"]
    epsilon, delta = float(promise["epsilon"]), float(promise["delta"])
    if promise["unit"] == "client":
        epsilon, delta = 2 * epsilon, delta * (1 + math.exp(min(epsilon, 700.0)))
    return ceiling(epsilon, min(delta, 1.0), FALSE_POSITIVE_RATE)


def _repeated(values: Iterable[Any]) -> bool:
    listed = list(values)
    return len(set(listed)) < len(listed)
