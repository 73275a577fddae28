"""Federated evaluation in numbers: what its noise is worth, and what its opened counts say.

An owner counts the right and the wrong answers of a finished round's model on its held-out records,
(correct, incorrect), and adds Gaussian noise to both. Adding or removing one record changes one of the
two by 1, so that the L2 sensitivity is 1 and one evaluation is a Gaussian mechanism whose deviation is
its noise multiplier. All evaluations of a run are composed like steps that use every record.

Guarantee and its unit: (epsilon, delta) covers one *example*, adjacency add/remove, for all evaluations
of one run together. It comes on top of what training costs: the two are added up, although no record is
in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from protocol.accounting import epsilon_after, epsilon_of_steps, noise_for, worst_epsilon_after
from protocol.errors import NoiseTooSmall, PlanInvalid
from protocol.plan import Plan

COUNTS = 2
"""Values of one owner's contribution: correct and incorrect answers, in this order."""

SMALLEST_SIGNAL = 5.0
"""An accuracy is estimated if the opened total is at least this many deviations of its noise."""


def evaluation_epsilon(plan: Plan, evaluations: int) -> float | None:
    """Return the privacy loss of one example after a number of sealed evaluations.

    Args:
        plan: A resolved plan.
        evaluations: Evaluations that the owner sealed, >= 0.

    Returns:
        Epsilon at `evaluation.delta`, an upper bound; 0 for none; None if they have no noise.

    Raises:
        PlanInvalid: The plan has no evaluation, or its noise multiplier is not filled in.
    """
    if evaluations < 0:
        raise ValueError("evaluations must not be negative")
    if evaluations == 0:
        return 0.0
    section = plan.evaluation
    if section is None:
        raise PlanInvalid("evaluation: the plan has none")
    if section.noise == "none":
        return None
    if section.noise_multiplier is None:
        raise PlanInvalid("evaluation.noise_multiplier: the plan must be resolved first")
    return epsilon_of_steps(1.0, section.noise_multiplier, evaluations, section.delta)


def evaluation_delta(plan: Plan) -> float:
    """Return the delta of all evaluations together; 0 if there are none or they have no noise."""
    section = plan.evaluation
    return section.delta if section is not None and section.noise == "local" else 0.0


def promised_loss(plan: Plan) -> tuple[float | None, float]:
    """Return epsilon and delta that a plan promises: those of training and of evaluation, added up.

    Returns:
        Epsilon is None without noise; delta is that of `privacy.delta` then.
    """
    delta = math.fsum((plan.privacy.delta, evaluation_delta(plan)))
    training = plan.privacy.target_epsilon
    if training is None or plan.evaluation is None:
        return training, delta
    return math.fsum((training, plan.evaluation.target_epsilon or 0.0)), delta


def run_epsilon(plan: Plan, rounds: int, evaluations: int) -> float | None:
    """Return what an owner lost in so many sealed rounds and evaluations; None without noise.

    Raises:
        PlanInvalid: A noise multiplier is not filled in.
    """
    return _sum(epsilon_after(plan, rounds), evaluation_epsilon(plan, evaluations))


def worst_run_epsilon(plan: Plan, rounds: int, evaluations: int) -> float | None:
    """Return the same if all other owners collude; evaluation rests on no other owner."""
    return _sum(worst_epsilon_after(plan, rounds), evaluation_epsilon(plan, evaluations))


def planned_epsilon(plan: Plan) -> float | None:
    """Return what a whole run costs at most, all paid rounds and evaluations; None without noise."""
    return run_epsilon(plan, plan.paid_rounds, plan.paid_evaluations)


def planned_worst_epsilon(plan: Plan) -> float | None:
    """Return the same if all other owners collude."""
    return worst_run_epsilon(plan, plan.paid_rounds, plan.paid_evaluations)


def _sum(training: float | None, evaluation: float | None) -> float | None:
    return None if training is None or evaluation is None else training + evaluation


def calibrate_evaluation(plan: Plan) -> float:
    """Return the noise multiplier that just reaches the target of all paid evaluations.

    Raises:
        PlanInvalid: The plan has no target for evaluations, or no noise in reach attains it.
    """
    section = plan.evaluation
    if section is None or section.target_epsilon is None:
        raise PlanInvalid("evaluation.target_epsilon: there is no target to calibrate for")
    return noise_for(1.0, plan.paid_evaluations, section.delta, section.target_epsilon)


def require_evaluation_target(plan: Plan) -> None:
    """Check that the noise keeps all paid evaluations within their target.

    Raises:
        NoiseTooSmall: Epsilon of all evaluations is above `evaluation.target_epsilon`.
        PlanInvalid: The noise multiplier is not filled in.
    """
    section = plan.evaluation
    if section is None or section.target_epsilon is None:
        return
    reached = evaluation_epsilon(plan, plan.paid_evaluations)
    if reached is None or not reached <= section.target_epsilon:
        raise NoiseTooSmall(
            f"the evaluations reach epsilon {reached or math.inf:.4f}, "
            f"evaluation.target_epsilon is {section.target_epsilon:g}"
        )


@dataclass(frozen=True)
class Estimate:
    """What an evaluation says of a model.

    Attributes:
        accuracy: Share of right answers over all owners' held-out records, in [0, 1].
        standard_error: Deviation of `accuracy` that the noise and the rounding cause; how few records
            were held out is not in it.
    """

    accuracy: float
    standard_error: float


def estimate_accuracy(correct: float, incorrect: float, deviation: float) -> Estimate | None:
    """Return the accuracy that noised counts stand for.

    Args:
        correct: Noised sum of right answers over all owners.
        incorrect: Noised sum of wrong answers.
        deviation: Deviation of the noise of each of the two.

    Returns:
        The estimate with its error to first order in the noise; None if the counts do not stand out of
        the noise.
    """
    total = correct + incorrect
    if not total > 0 or not total >= SMALLEST_SIGNAL * math.sqrt(2) * deviation:
        return None
    accuracy = min(max(correct / total, 0.0), 1.0)
    error = deviation * math.hypot(correct, incorrect) / total**2
    return Estimate(accuracy=accuracy, standard_error=error)
