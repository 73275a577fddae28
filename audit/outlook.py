"""What a plan will cost, before it runs: privacy loss round by round, and what would change it.

All figures follow from public constants of the plan. Nothing here is a measurement, and no private data
is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from audit.statistics.crosscheck import CrossChecks, cross_checks
from protocol.accounting import Mechanism, mechanism, noise_for
from protocol.errors import PlanInvalid
from protocol.evaluation import evaluation_delta, evaluation_epsilon, planned_epsilon, promised_loss
from protocol.plan import Plan

MOST_ROWS = 16
"""Rounds that are listed one by one; longer runs are thinned."""

CURVE_POINTS = 20


@dataclass(frozen=True)
class Point:
    """Privacy loss of training after a number of sealed rounds.

    Attributes:
        rounds: Sealed rounds, those beyond `run.rounds` are paid spares.
        epsilon: What is promised for them.
        worst: The same if all other owners collude.
    """

    rounds: int
    epsilon: float
    worst: float


@dataclass(frozen=True)
class Change:
    """What one change of the plan would do to training.

    Attributes:
        name: Stable name, for example ``rounds x 2``.
        epsilon: Privacy loss of the changed plan with the plan's noise.
        noise_multiplier: Noise that keeps the changed plan's target; None if the change is to the noise,
            if there is no target, or if no noise in reach keeps it.
    """

    name: str
    epsilon: float
    noise_multiplier: float | None


@dataclass(frozen=True)
class EvaluationLoss:
    """What federated evaluation adds: its evaluations, their noise, and their own epsilon and delta."""

    evaluations: int
    noise_multiplier: float
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Outlook:
    """Everything about a plan's privacy loss that can be known before the run.

    Attributes:
        mechanism: The mechanism of one round of training.
        rows: Rounds for a table, thinned for long runs; the last is all that the noise pays for.
        curve: Points for a line, beginning with no rounds.
        checks: The whole schedule of training by every accountant.
        changes: What changes of the plan would do to training.
        evaluation: What evaluation adds; None without.
        epsilon: Loss of the whole run, training and evaluation together.
        delta: Failure probability of the whole run.
    """

    mechanism: Mechanism
    rows: list[Point]
    curve: list[Point]
    checks: CrossChecks
    changes: list[Change]
    evaluation: EvaluationLoss | None
    epsilon: float
    delta: float


def outlook(plan: Plan) -> Outlook | None:
    """Return what a resolved plan will cost; None if it adds no noise, since nothing bounds its loss.

    Raises:
        PlanInvalid: The plan has noise but its multipliers are not filled in.
    """
    priced = mechanism(plan)
    epsilon = planned_epsilon(plan)
    if priced is None or epsilon is None:
        return None
    paid = plan.paid_rounds
    rows = listed_rounds(plan.run.rounds, paid)
    linear = {round(paid * part / CURVE_POINTS) for part in range(CURVE_POINTS + 1)}
    points = {
        rounds: Point(rounds, priced.epsilon(rounds), priced.worst_epsilon(rounds))
        for rounds in sorted({0, *rows, *linear})
    }
    return Outlook(
        mechanism=priced,
        rows=[points[rounds] for rounds in rows],
        curve=list(points.values()),
        checks=cross_checks(priced, paid),
        changes=[_changed(plan, *variant) for variant in _variants(plan, priced)],
        evaluation=_evaluation(plan),
        epsilon=epsilon,
        delta=promised_loss(plan)[1],
    )


def listed_rounds(rounds: int, paid: int) -> list[int]:
    """Return which rounds a table lists: all of a short run, else 1, 2, 5, 10, 20 and so on.

    Args:
        rounds: Rounds that must finish; always listed.
        paid: Rounds that the noise pays for, >= `rounds`; always the last one listed.
    """
    if paid <= MOST_ROWS:
        return list(range(1, paid + 1))
    steps = {factor * 10**power for power in range(6) for factor in (1, 2, 5)}
    return sorted({step for step in steps if step < rounds} | {rounds, paid})


def _variants(plan: Plan, priced: Mechanism) -> Iterator[tuple[str, Mechanism, int]]:
    """Yield name, mechanism and rounds of every change."""
    spares = plan.run.paid_spares
    for label, factor in (("/ 2", 0.5), ("x 2", 2.0)):
        yield f"rounds {label}", priced, max(1, round(plan.run.rounds * factor)) + spares
    paid = plan.paid_rounds
    if plan.privacy.unit == "example":
        for label, factor in (("/ 2", 0.5), ("x 2", 2.0)):
            rate = min(1.0, priced.sample_rate * factor)
            if rate != priced.sample_rate:
                yield f"sample rate {label}", replace(priced, sample_rate=rate), paid
    for label, factor in (("/ 2", 0.5), ("x 2", 2.0)):
        noise = priced.noise_multiplier * factor
        yield f"noise {label}", replace(priced, noise_multiplier=noise), paid
    for label, factor in (("/ 10", 0.1), ("x 10", 10.0)):
        if priced.delta * factor < 1.0:
            yield f"delta {label}", replace(priced, delta=priced.delta * factor), paid


def _changed(plan: Plan, name: str, changed: Mechanism, rounds: int) -> Change:
    target, needed = plan.privacy.target_epsilon, None
    if target is not None and not name.startswith("noise"):
        try:
            needed = noise_for(changed.sample_rate, rounds * changed.steps, changed.delta, target)
        except PlanInvalid:
            needed = None
    return Change(name, changed.epsilon(rounds), needed)


def _evaluation(plan: Plan) -> EvaluationLoss | None:
    section = plan.evaluation
    if section is None or section.noise_multiplier is None:
        return None
    count = plan.paid_evaluations
    epsilon = evaluation_epsilon(plan, count)
    if epsilon is None:
        return None
    return EvaluationLoss(count, section.noise_multiplier, epsilon, evaluation_delta(plan))
