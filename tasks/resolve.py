"""Resolving a plan: filling in what follows from it, and refusing what cannot work.

A resolved plan names its noise and the hash of its initial model. Every party that gets it can check both.
"""

from __future__ import annotations

from crypto.graph import ALL_PAIRS_UP_TO
from crypto.presets import Packing, packing_for
from protocol.accounting import calibrate, require_target
from protocol.errors import PlanInvalid, ShareTooSmall
from protocol.evaluation import calibrate_evaluation, require_evaluation_target
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from protocol.shares import LARGEST_PARAMETERS, LEAST_SHARE_STEPS, rounding_loss
from tasks.registry import task_for

NEGLIGIBLE_LOSS = 1e-50
"""Rounding may add twice this to epsilon; accounting is far less exact than that."""


def resolve(plan: Plan) -> Plan:
    """Return the plan with calibrated noise and the initial model's hash, after all checks.

    Raises:
        CapacityExceeded: The encryption preset cannot hold the largest cohort.
        NoiseTooSmall: The plan names a noise multiplier that misses its target.
        ShareTooSmall: A share of distributed noise is too small beside the quantization grid.
        PlanInvalid: Task, model or target are not possible, or the named initial model is another one.
    """
    packing_for(plan.encryption.preset, plan.cohort.maximum)
    privacy = plan.privacy
    if privacy.noise != "none" and privacy.noise_multiplier is None:
        privacy = privacy.model_copy(update={"noise_multiplier": calibrate(plan)})
    evaluation = plan.evaluation
    if evaluation is not None and evaluation.noise == "local" and evaluation.noise_multiplier is None:
        evaluation = evaluation.model_copy(update={"noise_multiplier": calibrate_evaluation(plan)})
    resolved = plan.model_copy(update={"privacy": privacy, "evaluation": evaluation})
    require_target(resolved)
    require_evaluation_target(resolved)
    require_shares(resolved)
    initial = GlobalModel.initial(task_for(resolved).initial_weights(resolved)).sha256()
    model = resolved.model.model_copy(update={"initial_sha256": resolved.model.initial_sha256 or initial})
    return Plan.from_fields(resolved.model_copy(update={"model": model}).fields())


def require_shares(plan: Plan) -> None:
    """Check what distributed noise needs beyond the plan's own fields; other noise needs no check.

    Args:
        plan: A plan whose noise multiplier is filled in.

    Raises:
        ShareTooSmall: The smallest share is below `LEAST_SHARE_STEPS` steps of the quantization grid.
        PlanInvalid: So many may collude that honest owners of a long list might not share masks.
    """
    if plan.privacy.noise != "distributed":
        return
    packing, owners = packing_for(plan.encryption.preset, plan.cohort.maximum), plan.cohort.maximum
    steps = share_steps(plan, packing)
    if not steps >= LEAST_SHARE_STEPS:
        raise ShareTooSmall(f"it is {steps:.2f} steps of the grid, {LEAST_SHARE_STEPS:g} are needed")
    loss = rounding_loss(steps, owners, LARGEST_PARAMETERS * plan.paid_rounds)
    if not loss <= NEGLIGIBLE_LOSS:
        raise ShareTooSmall(f"rounding would add {2 * loss:.2g} to epsilon")
    shortest = max(plan.cohort.minimum, ALL_PAIRS_UP_TO + 1)
    corrupted = (plan.privacy.tolerated_colluders + 1) / shortest
    if owners > ALL_PAIRS_UP_TO and corrupted > plan.cohort.corrupted_share:
        raise PlanInvalid(f"cohort.corrupted_share must be at least {corrupted:.3f} for these colluders")


def share_steps(plan: Plan, packing: Packing) -> float:
    """Return the deviation of the smallest noise share of a plan, in steps of its quantization grid."""
    grid = plan.update_range / packing.half_levels
    return plan.noise_deviation(plan.cohort.maximum) * plan.update_scale / grid
