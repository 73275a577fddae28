"""From signed openings to the model: an owner computes every round's model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from client.membership import member_keys, uncertified, verified_bodies
from client.owner import Owner
from client.state import RunState
from crypto.packing import mean_update
from crypto.presets import packing_for
from protocol.encoding import digest_bytes
from protocol.errors import ModelMismatch, ProtocolViolation
from protocol.messages import Opening, Signed
from protocol.optimizers import GlobalModel, apply_update, require_bounded
from protocol.plan import Plan

_SUM_BYTES = 4


def follow(
    owner: Owner, state: RunState, steps: Sequence[Sequence[Signed]], blob: bytes
) -> tuple[GlobalModel, int]:
    """Apply finished rounds to this owner's model; rounds that it has applied already are skipped.

    Args:
        owner: This owner.
        state: Its state of the run.
        steps: For each finished round, the openings that agree.
        blob: Sums of all steps, little-endian uint32.

    Returns:
        The model after the last step, and the number of rounds it has behind it.

    Raises:
        ModelMismatch: The steps do not start from a model that this owner knows.
        ModelRanAway: A model is not finite, or has a weight beyond the bound of all plans.
        ProtocolViolation: Fewer than a quorum agree, the sums are not the signed ones, or they are not
            of training.
    """
    plan, keys = state.parsed_plan(), member_keys(owner, state)
    model, finished = owner.store.model(state.run), state.round
    size = model.weights.size * _SUM_BYTES
    if len(blob) != size * len(steps):
        raise ProtocolViolation("the sums do not have the expected length")
    for index, openings in enumerate(steps):
        sums = blob[index * size : (index + 1) * size]
        body = _agreed(plan, state, openings, keys, sums)
        if body.model_hash != model.sha256():
            if finished == state.round:
                continue
            raise ModelMismatch("a step does not start from this owner's model")
        integers = np.frombuffer(sums, dtype="<u4")
        mean = opened_mean(plan, integers, body.contributors, body.total_weight)
        model = apply_update(model, mean, plan.server_optimizer)
        finished += 1
    require_bounded(model)
    return model, finished


def opened_mean(
    plan: Plan, sums: NDArray[np.unsignedinteger[Any]], contributors: int, total_weight: float | None = None
) -> NDArray[np.float64]:
    """Return the mean update that opened sums of a plan stand for; see `mean_update`."""
    packing = packing_for(plan.encryption.preset, plan.cohort.maximum)
    return mean_update(sums, contributors, plan.update_range, packing, total_weight)


def _agreed(
    plan: Plan,
    state: RunState,
    openings: Sequence[Signed],
    keys: dict[str, Ed25519PublicKey],
    sums: bytes,
) -> Opening:
    # who opened and has lost its certificate since counts no more; the others may still be a quorum
    lost = uncertified(state.members, keys)
    bodies = verified_bodies([one for one in openings if one.signer not in lost], keys, Opening)
    if len(bodies) < plan.encryption.quorum or any(body != bodies[0] for body in bodies):
        raise ProtocolViolation("fewer than a quorum of openers agree")
    body = bodies[0]
    if body.session != state.keyed_session() or body.sums_hash != digest_bytes(sums):
        raise ProtocolViolation("an opening is of another session or for other sums")
    if body.purpose != "train":
        raise ProtocolViolation("counts of an evaluation are no update of the model")
    if not plan.cohort.minimum <= body.contributors <= plan.cohort.maximum:
        raise ProtocolViolation("an opening has too few or too many contributors")
    return body
