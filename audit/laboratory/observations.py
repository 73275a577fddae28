"""What different observers hold of one owner's update, made by the code that owners run.

The attacked step is the easiest one for an attacker: one step, in which every given record is for sure, and
of a size that makes the update the gradient itself, so that nothing of it is lost by rounding.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from client.contribution import contribute, with_share
from client.noise import SecureStream
from client.training import plain_update
from crypto.masks import MaskContext
from crypto.measuring import plan_context
from crypto.presets import CHECK_SLOTS, SEED_BYTES, Packing
from crypto.sealing import masks_for, seal_frames
from crypto.secret import SealKey
from protocol.plan import Plan
from tasks.images import Examples
from tasks.registry import Task

Floats = NDArray[np.float64]

_OWN, _PEERS = "a" * 64, ("b" * 64, "c" * 64)


def single_step(plan: Plan) -> Plan:
    """Return the plan with one local step of size 1 that takes every record; clipping and noise stay."""
    step = {"local_steps": 1, "learning_rate": plan.privacy.expected_batch_size}
    return plan.model_copy(
        update={
            "training": plan.training.model_copy(update=step),
            "privacy": plan.privacy.model_copy(update={"sample_rate": 1.0}),
        }
    )


def plain(task: Task, plan: Plan, weights: Floats, records: Examples) -> Floats:
    """Return the update of one step without clipping and noise: the control."""
    return plain_update(task, single_step(plan), weights, records)


def private(task: Task, plan: Plan, weights: Floats, records: Examples) -> Floats:
    """Return the update of one step as the plan orders it, clipped and noised, before encryption.

    With distributed noise it has one owner's share alone. Without noise it is the plain one.
    """
    step = single_step(plan)
    return with_share(step, contribute(task, step, weights, records), plan.cohort.minimum)


def received(plan: Plan, update: Floats) -> Floats:
    """Seal an update for a list of three, and read what the coordinator gets as numbers.

    The coordinator has no key. It can take a ciphertext's residues for the packed integers that they
    stand for, and turn these into values of an update as an owner would after opening.

    Args:
        plan: Names preset and form of the frames.
        update: Shape (n,); give the plain one, so that encryption alone protects it.

    Returns:
        float64 (n,).
    """
    context = plan_context(plan)
    packing = context.packing
    # what masks are bound to changes nothing for an outsider; the chain keys are fresh
    bound = MaskContext("audit", 1, "train", "list", "model", packing.plain_modulus)
    masks = masks_for(packing, _OWN, {peer: os.urandom(32) for peer in _PEERS}, bound)
    scale = single_step(plan).update_range
    frames = seal_frames(update, scale, SecureStream().uniform, masks, SealKey.generate(context))
    values = []
    for frame in frames:
        if context.packed:
            words = context.residues(frame[SEED_BYTES:])
        else:
            body = frame[: len(frame) // 8 * 8]
            words = np.frombuffer(body, dtype="<u8").astype(np.uint64)
        values.append(_as_values(words, packing) * scale)
    return np.concatenate([np.zeros(0), *values])[: update.size]


def _as_values(words: NDArray[np.uint64], packing: Packing) -> Floats:
    """Read words as slots of fields; returns a frame's values in [-1, 1)."""
    slots = words[: packing.preset.slots - CHECK_SLOTS]
    fields = []
    for _ in range(packing.preset.values_per_slot):
        slots, field = np.divmod(slots, np.uint64(packing.radix))
        fields.append(field)
    return np.concatenate(fields).astype(np.float64) / packing.radix * 2.0 - 1.0
