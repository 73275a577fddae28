"""Federated evaluation on an owner's side: what may be evaluated, and the noised counts.

Accuracies, losses and record counts are releases like an update is. The only one that leaves an owner is
the vector (correct, incorrect) on its held-out records, with noise, as one more encrypted sum. It is
reserved, charged and sealed like an update, under masks of its own purpose.

Guarantee: adding or removing one record changes one of the two counts by 1 and nothing else, because each
record is counted by itself and decided by itself to be held out, and one that cannot be answered is left
out by itself. With noise of deviation `evaluation.noise_multiplier` on both, the evaluations of a run
together have the loss that `protocol.evaluation` states. Clamping, rounding and summing are
post-processing. It assumes that the noise is secret, and rests on no other owner.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from torch import nn

from client.contribution import Floats
from client.noise import SecureStream
from client.state import RunState
from protocol.errors import EvaluationRefused
from protocol.evaluation import COUNTS
from protocol.plan import Plan
from protocol.sections import EvaluationSection
from tasks.images import Examples, unflatten
from tasks.registry import Task

_LOG = logging.getLogger("fedseal.client")


def require_planned(plan: Plan) -> EvaluationSection:
    """Return the plan's section about evaluation.

    Raises:
        EvaluationRefused: The plan has none, or its noise is not filled in.
    """
    section = plan.evaluation
    if section is None:
        raise EvaluationRefused("the plan has no section evaluation")
    if section.noise == "local" and section.noise_multiplier is None:
        raise EvaluationRefused("evaluation.noise_multiplier is not filled in")
    return section


def require_due(plan: Plan, state: RunState, finished: int) -> None:
    """Check that the model after `finished` rounds may be evaluated now.

    Args:
        plan: The run's plan.
        state: This owner's state of the run.
        finished: Rounds that the model has behind it, as this owner itself computed it.

    Raises:
        EvaluationRefused: The plan does not evaluate this round; its evaluation was opened already; or it
            was sealed as often as there are spares for.
    """
    if not plan.is_evaluated(finished):
        raise EvaluationRefused("the plan does not evaluate the model after this round")
    sealed = [attempt for attempt, number in state.evaluated.items() if number == finished]
    if any(attempt in state.opened for attempt in sealed):
        raise EvaluationRefused("this model was evaluated already")
    if len(sealed) > plan.run.paid_spares:
        raise EvaluationRefused("this model was counted as often as run.paid_spares allows")


def count_range(plan: Plan) -> float:
    """Return the public bound of a noised count.

    Raises:
        EvaluationRefused: The plan has no evaluation.
    """
    return require_planned(plan).count_range


def noised_counts(task: Task, plan: Plan, model_vector: Floats, held_out: Examples) -> Floats:
    """Count right and wrong answers and add all the noise.

    The caller must have reserved the attempt in the ledger.

    Args:
        task: Gives the model and says what a right answer is.
        plan: A resolved plan with evaluation.
        model_vector: The model to evaluate, shape (n_params,).
        held_out: This owner's held-out records; may be empty, the result then is pure noise.

    Returns:
        float64 (2,): correct, incorrect. Without noise only if the plan says so.
    """
    section = require_planned(plan)
    counts = _counts(task, plan, model_vector, held_out)
    if section.noise_multiplier is None:
        return counts
    return counts + section.noise_multiplier * SecureStream().gaussian(COUNTS)


def _counts(task: Task, plan: Plan, model_vector: Floats, held_out: Examples) -> Floats:
    try:
        model = task.build_model(plan)
        unflatten(model, model_vector)
    except Exception:  # no record has any part in this; the noise is sent alone
        # the owner's own log only: an owner must be able to see that its counts are missing
        _LOG.warning("an evaluation failed and sent its noise alone")
        return np.zeros(COUNTS)
    counts = np.zeros(COUNTS)
    waiting, left_out = [slice(0, len(held_out))], False
    while waiting:
        part = waiting.pop()
        records = Examples(held_out.x[part], held_out.y[part])
        answers = _answers(task, model, records)
        if answers is not None:
            right = np.count_nonzero(answers)
            counts += (right, len(records) - right)
        elif len(records) > 1:
            middle = part.start + len(records) // 2
            waiting += [slice(part.start, middle), slice(middle, part.stop)]
        else:
            left_out = True
    if left_out:
        _LOG.warning("records that could not be answered were left out of an evaluation")
    return counts


def _answers(task: Task, model: nn.Module, records: Examples) -> NDArray[np.bool_] | None:
    """Return which records are answered right, or None if that cannot be said of all of them."""
    if not len(records):
        return np.zeros(0, dtype=np.bool_)
    try:
        return task.correct(model, records)
    except Exception:  # what went wrong may depend on data, and is told to nobody
        return None
