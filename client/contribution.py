"""What an owner contributes to a round: made when it trains, and noised at the latest when it is sealed.

| unit | noise | kept after `train.fit` | added at `train.seal` |
|---|---|---|---|
| example | local | the update of DP-SGD, all its noise in it | nothing |
| example | distributed | the clipped sum of one Poisson batch | a noise share |
| client | local | the clipped update with all its noise | nothing |
| client | distributed | the clipped update | a noise share |
| example | none | the update | nothing |

What is kept with distributed noise has no protection of its own. It lives in memory only, is never
written or sent, and is erased when it was sealed or given up. The share is drawn when the round's list is
known, because its deviation depends on how many owners are in the list.
"""

from __future__ import annotations

import logging
import math

import numpy as np
from numpy.typing import NDArray

from client.noise import SecureStream
from client.safety import require_own
from client.training import clipped_sum, local_update, plain_update
from protocol.plan import Plan
from tasks.images import Examples
from tasks.registry import Task

Floats = NDArray[np.float64]

_LOG = logging.getLogger("fedseal.client")


def contribute(task: Task, plan: Plan, model_vector: Floats, examples: Examples) -> Floats:
    """Train for one round and return what `with_share` turns into this owner's update.

    Args:
        task: Gives the model and the loss.
        plan: A resolved plan.
        model_vector: This round's model, shape (n_params,).
        examples: The owner's data; may be empty.

    Returns:
        float64, shape (n_params,), finite. With distributed noise it must not leave the node.

    Guarantee: adding or removing one unit changes the result, without its noise, by at most
    `plan.sensitivity` in L2. The caller must have reserved the attempt in the ledger.

    Raises:
        ModelUnsafe, ModelMismatch: The model cannot be trained.
        NoiseSeeded, SamplerReplaced: Noise or batches do not come from the project's own stream.
        TrainingFailed: Anything else; the cause may depend on data and is not told.
    """
    privacy = plan.privacy
    if privacy.unit == "client":
        update = clipped_to_norm(plain_update(task, plan, model_vector, examples), plan.sensitivity)
        if privacy.noise == "distributed":
            return _within(update, plan.signal_bound)
        return update + plan.noise_deviation(1) * require_own(SecureStream()).gaussian(update.size)
    if privacy.noise == "distributed":
        total = -_finite_or_zero(clipped_sum(task, plan, model_vector, examples))
        return _within(total, plan.signal_bound)
    update = local_update(task, plan, model_vector, examples)
    # whether a value overflowed is told to nobody; it is clamped to the public range when it is sealed
    return np.nan_to_num(update, nan=0.0, posinf=plan.update_range, neginf=-plan.update_range)


def with_share(plan: Plan, contribution: Floats, owners: int) -> Floats:
    """Return the update to seal for a list: the contribution, plus a noise share if the plan has shares.

    Args:
        plan: A resolved plan.
        contribution: What `contribute` returned.
        owners: Length of the verified list that the update is sealed for; never a number that somebody
            announced.

    Returns:
        float64, shape (n_params,), in the unit of an update. It is a new array.

    Guarantee: with distributed noise, the sum over the list has Gaussian noise of at least
    `noise_multiplier * sensitivity * update_scale`, even after the shares of one reader and of
    `tolerated_colluders` others are taken off. Every call draws a fresh share, so that a contribution
    must not be sealed twice.
    """
    if plan.privacy.noise != "distributed":
        return contribution.copy()
    share = plan.noise_deviation(owners) * require_own(SecureStream()).gaussian(contribution.size)
    return (contribution + share) * plan.update_scale


def clipped_to_norm(update: Floats, max_norm: float) -> Floats:
    """Return an update scaled down to an L2 norm of at most `max_norm`; zeros if it is not finite.

    An update that could not be computed counts as that of an owner without data, so that nobody learns
    of it.
    """
    finite = _finite_or_zero(update)
    largest = float(np.max(np.abs(finite), initial=0.0))
    if largest == 0.0:
        return finite
    # scaled by the largest value first, because squares of large values overflow
    norm = largest * float(np.linalg.norm(finite / largest))
    return finite if norm <= max_norm else finite * (max_norm / norm)


def _finite_or_zero(values: Floats) -> Floats:
    if np.all(np.isfinite(values)):
        return values
    # the owner's own log only: an owner must be able to see that its training fails
    _LOG.warning("a contribution was not finite; it counts as zero")
    return np.zeros_like(values)


def _within(values: Floats, bound: float) -> Floats:
    """Project onto the box [-bound, bound]: a projection on a convex set brings no two points apart."""
    if not (bound > 0 and math.isfinite(bound)):
        raise ValueError("the bound of a signal must be positive")
    return np.clip(values, -bound, bound)
