"""Resolving a plan: filling in what follows from it, and refusing what cannot work.

A resolved plan names its noise and the hash of its initial model. Every party that gets it can check both.
"""

from __future__ import annotations

from crypto.presets import packing_for
from protocol.accounting import calibrate, require_target
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from tasks.registry import task_for


def resolve(plan: Plan) -> Plan:
    """Return the plan with calibrated noise and the initial model's hash, after all checks.

    Raises:
        CapacityExceeded: The encryption preset cannot hold the largest cohort.
        NoiseTooSmall: The plan names a noise multiplier that misses its target.
        PlanInvalid: Task, model or target are not possible, or the named initial model is another one.
    """
    packing_for(plan.encryption.preset, plan.cohort.maximum)
    privacy = plan.privacy
    if privacy.noise == "local" and privacy.noise_multiplier is None:
        privacy = privacy.model_copy(update={"noise_multiplier": calibrate(plan)})
    resolved = plan.model_copy(update={"privacy": privacy})
    require_target(resolved)
    initial = GlobalModel.initial(task_for(resolved).initial_weights(resolved)).sha256()
    model = resolved.model.model_copy(update={"initial_sha256": resolved.model.initial_sha256 or initial})
    return Plan.from_fields(resolved.model_copy(update={"model": model}).fields())
