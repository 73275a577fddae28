"""What the opened counts of a federated evaluation say; nothing here is secret."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from crypto.packing import mean_update
from crypto.presets import packing_for
from protocol.errors import PlanInvalid
from protocol.evaluation import Estimate, estimate_accuracy
from protocol.plan import Plan


def federated_accuracy(plan: Plan, sums: Sequence[int], contributors: int) -> Estimate | None:
    """Return the accuracy that opened, noised counts stand for.

    Args:
        plan: A resolved plan with evaluation.
        sums: Opened sums of (correct, incorrect), integers of the quantization grid.
        contributors: Owners whose counts are in the sums.

    Returns:
        The estimate; None if the counts do not stand out of the noise.

    Raises:
        PlanInvalid: The plan has no evaluation.
    """
    section = plan.evaluation
    if section is None:
        raise PlanInvalid("evaluation: the plan has none")
    packing = packing_for(plan.encryption.preset, plan.cohort.maximum)
    integers = np.array(sums, dtype=np.uint64)
    # divided by one, the mean is the sum
    correct, incorrect = mean_update(integers, contributors, section.count_range, packing, 1.0)
    # a stochastically rounded value has at most half a step of deviation
    rounding = section.count_range / packing.half_levels / 2
    each = math.hypot(section.noise_multiplier or 0.0, rounding)
    return estimate_accuracy(float(correct), float(incorrect), math.sqrt(contributors) * each)
