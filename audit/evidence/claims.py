"""What a run promised to each owner, what it cost, and whether the owner's own signed word agrees."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

from audit.evidence.run import ClaimEvidence, OwnerEvidence, RoundEvidence, RunEvidence
from protocol.claims import UNITS, adjacency, assumption, planned_worst
from protocol.errors import ReportInvalid
from protocol.evaluation import (
    evaluation_delta,
    evaluation_epsilon,
    promised_loss,
    run_epsilon,
    worst_run_epsilon,
)
from protocol.messages import Statement
from protocol.plan import Plan
from server.rounds.evaluation import federated_accuracy

RELATIVE_TOLERANCE = 1e-6
"""Recomputed numbers may differ this much: mathematical libraries round the last digits differently."""


def promise(plan: Plan) -> dict[str, Any]:
    """Return what the plan promises for training and evaluation together, as the report spells it."""
    privacy, (epsilon, delta) = plan.privacy, promised_loss(plan)
    return {
        "unit": privacy.unit,
        "covers": UNITS[privacy.unit],
        "adjacency": adjacency(plan),
        "noise": privacy.noise,
        "assumption": assumption(plan),
        "epsilon": _loss(epsilon),
        "epsilon_worst": _loss(planned_worst(plan)),
        "delta": delta,
        "noise_multiplier": privacy.noise_multiplier,
        "max_grad_norm": privacy.max_grad_norm,
        "max_update_norm": privacy.max_update_norm,
        "sample_rate": privacy.sample_rate,
        "expected_batch_size": privacy.expected_batch_size,
        "local_steps": plan.training.local_steps,
        "rounds": plan.run.rounds,
        "cohort_minimum": plan.cohort.minimum,
        "cohort_maximum": plan.cohort.maximum,
        "quorum": plan.encryption.quorum,
        "evaluation": _evaluation(plan),
    }


def _evaluation(plan: Plan) -> dict[str, Any] | None:
    section = plan.evaluation
    if section is None:
        return None
    return {
        "noise": section.noise,
        "noise_multiplier": section.noise_multiplier,
        "epsilon": _loss(section.target_epsilon),
        "delta": evaluation_delta(plan),
        "every": section.every,
        "evaluations": plan.paid_evaluations,
        "holdout_share": section.holdout_share,
        "count_range": section.count_range,
    }


def estimate(plan: Plan, entry: RoundEvidence) -> dict[str, Any] | None:
    """Return the accuracy that an evaluation's opened counts stand for; None if there is none.

    Raises:
        ReportInvalid: There are counts and the plan has no evaluation, or the counts are no sum.
    """
    if entry.sums is None:
        return None
    if plan.evaluation is None:
        raise ReportInvalid("the evidence has counts that the plan does not ask for")
    found = federated_accuracy(plan, entry.sums, len(entry.contributors))
    return None if found is None else asdict(found)


def _loss(epsilon: float | None) -> float | Literal["inf"]:
    """Return a privacy loss as the report spells it: JSON has no infinity."""
    return "inf" if epsilon is None or math.isinf(epsilon) else float(epsilon)


def spent_epsilon(plan: Plan, rounds: int, evaluations: int = 0) -> float | Literal["inf"]:
    """Return epsilon of a number of rounds and evaluations, computed from the plan alone."""
    return 0.0 if rounds + evaluations == 0 else _loss(run_epsilon(plan, rounds, evaluations))


def _worst(plan: Plan, rounds: int, evaluations: int) -> float | Literal["inf"]:
    return 0.0 if rounds + evaluations == 0 else _loss(worst_run_epsilon(plan, rounds, evaluations))


def _evaluation_part(plan: Plan, _rounds: int, evaluations: int) -> float | Literal["inf"]:
    return _loss(evaluation_epsilon(plan, evaluations))


def _training_delta(plan: Plan) -> float:
    return 0.0 if plan.privacy.noise == "none" else plan.privacy.delta


def claim(evidence: RunEvidence, owner: OwnerEvidence, plan: Plan) -> dict[str, Any]:
    """Return what was promised to one owner, what it spent, and what it signed."""
    statement = owner.verified_statement()
    sealed = _sealed(evidence, owner, statement)
    counted = _counted(owner, statement, plan)
    evaluation = evaluation_delta(plan) if counted else 0.0
    spent = {
        "epsilon": spent_epsilon(plan, sealed, counted),
        "epsilon_worst": _worst(plan, sealed, counted),
        "delta": (_training_delta(plan) if sealed else 0.0) + evaluation,
        "evaluation_epsilon": _evaluation_part(plan, sealed, counted),
        "evaluation_delta": evaluation,
    }
    claimed = owner.claimed
    return {
        "owner": owner.name,
        "fingerprint": owner.fingerprint,
        "unit": claimed.unit,
        "adjacency": claimed.adjacency,
        "promised": {
            "epsilon": _loss(claimed.epsilon),
            "epsilon_worst": _loss(claimed.epsilon_worst),
            "delta": claimed.delta,
        },
        "promise_matches_plan": _promise_matches(claimed, plan),
        "spent": spent,
        "stated": None
        if statement is None
        else {
            "epsilon": _loss(statement.epsilon),
            "epsilon_worst": _loss(statement.epsilon_worst),
            "delta": statement.delta,
            "evaluation_epsilon": _loss(statement.evaluation_epsilon),
            "evaluation_delta": statement.evaluation_delta,
        },
        "sealed_attempts": sealed,
        "sealed_evaluations": counted,
        "certificate_matches": owner.public_key() is not None,
        "certificate_covers_run": owner.certificate_covers_presence(),
        "statement": "missing" if owner.statement is None else "valid" if statement else "invalid",
        "disagreements": []
        if statement is None
        else _disagreements(evidence, statement, plan, (sealed, counted)),
        "model_signed": statement is not None and statement.model_hash == evidence.model_hash,
        "ledger_went_back": owner.ledger_went_back(),
    }


def _promise_matches(claimed: ClaimEvidence, plan: Plan) -> bool:
    planned = (plan.privacy.unit, adjacency(plan), *promised_loss(plan))
    recorded = (claimed.unit, claimed.adjacency, claimed.epsilon, claimed.delta)
    return recorded == planned and close(_loss(claimed.epsilon_worst), _loss(planned_worst(plan)))


def _sealed(evidence: RunEvidence, owner: OwnerEvidence, statement: Statement | None) -> int:
    """Return for how many attempts an owner pays: what the coordinator saw, or more if it says more.

    An owner whose sealed update was lost on the way has spent what the coordinator never saw.
    """
    stated = statement.sealed_attempts if statement else 0
    return max(owner.sealed_attempts, stated if stated <= evidence.attempts_used else 0)


def _counted(owner: OwnerEvidence, statement: Statement | None, plan: Plan) -> int:
    """Return for how many evaluations an owner pays, as `_sealed` does for attempts."""
    stated = statement.sealed_evaluations if statement else 0
    return max(owner.sealed_evaluations, stated if stated <= plan.paid_evaluations else 0)


def _disagreements(
    evidence: RunEvidence, statement: Statement, plan: Plan, sealed: tuple[int, int]
) -> list[str]:
    """Name the fields in which a truly signed statement differs from what the report computes.

    An epsilon may be above the recomputed one, because an attempt that a crash interrupted counts as
    spent in the owner's ledger; it is never above that of all attempts, and never below.
    """
    most_sealed = (evidence.attempts_used, min(evidence.attempts_used, plan.paid_evaluations))
    training = {_training_delta(plan)} | ({0.0} if sealed[0] == 0 else set())
    evaluation = {evaluation_delta(plan)} | ({0.0} if sealed[1] == 0 else set())

    def fits(stated: float, price: Callable[[Plan, int, int], float | Literal["inf"]]) -> bool:
        least, most = float(price(plan, *sealed)), float(price(plan, *most_sealed))
        return close(stated, least) or least < stated <= most or close(stated, most)

    pairs = {
        "session": [statement.session] == [evidence.session] == statement.sessions[-1:],
        "plan_hash": statement.plan_hash == evidence.plan_hash,
        "unit": statement.unit == plan.privacy.unit,
        "epsilon": fits(float(_loss(statement.epsilon)), spent_epsilon),
        "epsilon_worst": fits(float(_loss(statement.epsilon_worst)), _worst),
        "evaluation_epsilon": fits(float(_loss(statement.evaluation_epsilon)), _evaluation_part),
        "delta": any(close(statement.delta, part + statement.evaluation_delta) for part in training),
        "evaluation_delta": statement.evaluation_delta in evaluation,
        "sealed_attempts": statement.sealed_attempts == sealed[0],
        "sealed_evaluations": statement.sealed_evaluations == sealed[1],
    }
    return [name for name, agrees in pairs.items() if not agrees]


def close(first: Any, second: Any) -> bool:
    """Tell whether two values are equal, numbers up to `RELATIVE_TOLERANCE`."""
    if isinstance(first, float | int) and isinstance(second, float | int):
        return math.isclose(first, second, rel_tol=RELATIVE_TOLERANCE)
    return bool(first == second)
