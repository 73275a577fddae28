"""What the best thinkable attack on a run could find out; a pure function of the report's sections."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from audit.checks.check import Report
from audit.checks.experiments import FALSE_POSITIVE_RATE
from audit.facts import unflatten
from protocol.accounting import mechanism
from protocol.exposure import advantage_of_steps, detection_of_steps
from protocol.plan import Plan


@dataclass(frozen=True)
class Exposure:
    """What no attack on everything that a run released can beat, however skilled.

    Attributes:
        epsilon: Privacy loss that is judged, in [0, infinity].
        epsilon_worst: The same if all other owners collude.
        delta: Probability that the limit does not hold.
        planned: It is the loss of the whole plan, because the run can go on or released nothing.
        right: Share of right answers to "was it used?" at even odds, in [0.5, 1].
        found: Share of those used that are found where `FALSE_POSITIVE_RATE` of the others are accused.
    """

    epsilon: float
    epsilon_worst: float
    delta: float
    planned: bool
    right: float
    found: float


def exposure(report: Report) -> Exposure:
    """Return what the owner that lost most has lost, and what the best attack makes of it.

    The attack's figures come from the whole curve of training (`protocol.exposure`), which is sharper than
    what follows from epsilon and delta. Evaluation, if there is any, is added by its own epsilon: an attack
    on both is no better than one on training with e^epsilon times the rate of false alarms, plus delta.

    Args:
        report: Its sections `subject`, `plan`, `promise` and `claims` are read.
    """
    promise, claims = report["promise"], report["claims"]
    spent = max((c["spent"] for c in claims), key=lambda loss: float(loss["epsilon"]), default=None)
    planned = report["subject"]["state"] == "paused" or spent is None or float(spent["epsilon"]) == 0.0
    loss = promise if planned or spent is None else spent
    plan = Plan.from_fields(unflatten(report["plan"]))
    sealed = max((c["sealed_attempts"] for c in claims), default=0)
    counted = _evaluation(promise, spent, planned)
    right, found = _attack(plan, plan.paid_rounds if planned else sealed, *counted)
    return Exposure(
        float(loss["epsilon"]), float(loss["epsilon_worst"]), loss["delta"], planned, right, found
    )


def _evaluation(
    promise: dict[str, Any], spent: dict[str, Any] | None, planned: bool
) -> tuple[float, float]:
    if promise["evaluation"] is None:
        return 0.0, 0.0
    if planned or spent is None:
        return float(promise["evaluation"]["epsilon"]), promise["evaluation"]["delta"]
    return float(spent["evaluation_epsilon"]), spent["evaluation_delta"]


def _attack(plan: Plan, rounds: int, epsilon: float, delta: float) -> tuple[float, float]:
    """Return the share of right answers and of those found, after training and an evaluation's loss."""
    priced = mechanism(plan)
    if priced is None or math.isinf(epsilon):
        return 1.0, 1.0
    schedule = (priced.sample_rate, priced.noise_multiplier, rounds * priced.steps)
    alarms = FALSE_POSITIVE_RATE * math.exp(min(epsilon, 700.0))
    found = _detection(*schedule, alarms) + delta if alarms < 1.0 else 1.0
    counts = (math.expm1(min(epsilon, 700.0)) + 2 * delta) / (math.exp(min(epsilon, 700.0)) + 1)
    advantage = min(1.0, _advantage(*schedule) + counts)
    return (1.0 + advantage) / 2.0, min(1.0, found)


_advantage = lru_cache(maxsize=256)(advantage_of_steps)
_detection = lru_cache(maxsize=256)(detection_of_steps)
