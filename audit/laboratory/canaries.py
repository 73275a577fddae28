"""Canaries: made-up examples whose presence an observer tries to guess, trained on by the owners' own code.

A task with one linear layer without bias, whose loss is its output, gives the example ``a e_j`` exactly the
gradient ``a e_j``, at every model. Canaries of ten clipping norms on coordinates of their own then pass
through the sampler, the clipping, the noise, the divisor, the rounding and the server's optimizer that a
run uses; nothing of them is copied here. One coordinate answers for one canary, and coordinates are
independent of each other: own clip, own coin, own noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.contribution import contribute, with_share
from client.noise import SecureStream
from crypto.packing import mean_update, quantize
from crypto.presets import packing_for
from protocol.optimizers import GlobalModel, apply_update
from protocol.plan import Plan
from tasks.images import Examples, ImageClassification

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

CANARY_NORMS = 10.0
"""Gradient norm of a canary in clipping norms: with one alone, a forgotten clip would change nothing."""

MOST_OWNERS = 3
"""Owners whose local noise is really drawn for a sum; fewer than the cohort show more, never less."""

_COPIES = 64


@dataclass(frozen=True)
class CanaryTask(ImageClassification):
    """A task whose gradients are the examples themselves.

    Attributes:
        width: Number of parameters, one for each coordinate of an example.
    """

    width: int = 1

    def build_model(self, plan: Plan) -> nn.Module:
        """Return one linear layer of zeros without bias, shape (1, width)."""
        layer = nn.Linear(self.width, 1, bias=False)
        nn.init.zeros_(layer.weight)
        return layer

    def loss(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the model's output as each example's loss, so that its gradient is the example."""
        return logits[:, 0]


def canary_task(plan: Plan, width: int) -> CanaryTask:
    """Return a canary task with that many coordinates, described as the plan's own task."""
    return CanaryTask(plan.task, "linear", width)


def dirac_examples(width: int, coordinates: NDArray[np.integer], norm: float) -> Examples:
    """Return one example of a norm for each of these coordinates, all other coordinates zero."""
    x = np.zeros((len(coordinates), width), dtype=np.float32)
    x[np.arange(len(coordinates)), coordinates] = norm
    return Examples(x, np.zeros(len(coordinates), dtype=np.int64))


@dataclass(frozen=True)
class Seen:
    """What three observers saw of one run with canaries, in sensitivities; larger looks present.

    Attributes:
        included: Which canaries were in the owner's data, bool (m,).
        updates: The canaries' coordinates of each update before encryption, float64 (rounds, m).
        sums: Likewise of each opened sum.
        final: Likewise of the last model less the first, float64 (m,); empty if none was made.
    """

    included: Bools
    updates: Floats
    sums: Floats
    final: Floats


def step_scale(plan: Plan) -> float:
    """Return by what the sum of a step's gradients is multiplied to change the model."""
    return plan.training.learning_rate / plan.privacy.expected_batch_size


def records_of_client(plan: Plan) -> int:
    """Return so many equal records that no owner's update is without them but once in e^64 steps."""
    return math.ceil(_COPIES / plan.privacy.sample_rate)


def fair_coins(count: int) -> Bools:
    """Return fair coins that do not come from the code under test, seeded by the operating system."""
    return np.random.default_rng().random(count) < 0.5


def watch_examples(plan: Plan, canaries: int, rounds: int) -> Seen:
    """Train with canaries as examples of one owner, and note what observers see. Unit `example`.

    With distributed noise, the sum is what a reader is left with who takes off its own share and those of
    the tolerated colluders, and an update has the smallest share that the plan allows.

    Args:
        plan: A resolved plan.
        canaries: m, each with a coordinate and a fair coin of its own.
        rounds: Rounds to train.
    """
    task, model = canary_task(plan, canaries), GlobalModel.initial(np.zeros(canaries))
    included = fair_coins(canaries)
    norm = CANARY_NORMS * plan.sensitivity
    with_canaries = dirac_examples(canaries, np.flatnonzero(included), norm)
    without = dirac_examples(canaries, np.zeros(0, dtype=np.int64), norm)
    unit = -plan.update_scale * plan.sensitivity
    updates, sums = [], []
    for _ in range(rounds):
        contribution = contribute(task, plan, model.weights, with_canaries)
        updates.append(with_share(plan, contribution, plan.cohort.maximum) / unit)
        parts = parts_of_sum(plan, task, model.weights, contribution, without)
        mean = _opened_mean(plan, parts)
        sums.append(mean * len(parts) / unit)
        model = apply_update(model, mean, plan.server_optimizer)
    final = model.weights.astype(np.float32).astype(np.float64) / (unit / (others_in_sum(plan) + 1))
    return Seen(included, np.array(updates), np.array(sums), final)


def parts_of_sum(
    plan: Plan, task: CanaryTask, model: Floats, contribution: Floats, without: Examples
) -> list[Floats]:
    """Return one owner's update and those of owners without records, as a reader of their sum meets them.

    Args:
        plan: A resolved plan.
        task: The canary task.
        model: This round's model.
        contribution: Of the owner with the canaries.
        without: No records.
    """
    others = range(others_in_sum(plan))
    if plan.privacy.noise == "distributed":
        # an owner without records contributes zeros, and its share
        contributions = [contribution, *(np.zeros_like(contribution) for _ in others)]
    else:
        contributions = [contribution, *(contribute(task, plan, model, without) for _ in others)]
    return [with_share(plan, part, plan.cohort.minimum) for part in contributions]


def _opened_mean(plan: Plan, parts: list[Floats]) -> Floats:
    """Round updates as they are sealed, add the integers, and return the mean as it is opened."""
    packing = packing_for(plan.encryption.preset, plan.cohort.maximum)
    total = np.zeros(parts[0].size, dtype=np.uint64)
    for part in parts:
        total += quantize(part, plan.update_range, packing, SecureStream().uniform(part.size))
    return mean_update(total, len(parts), plan.update_range, packing)


def others_in_sum(plan: Plan) -> int:
    """Return how many other owners' noise a reader of the sum meets here."""
    if plan.privacy.noise == "distributed":
        return plan.cohort.minimum - plan.privacy.tolerated_colluders - 2
    return min(plan.cohort.minimum, MOST_OWNERS) - 1


def watch_clients(plan: Plan, canaries: int, rounds: int) -> Seen:
    """Let each canary be an owner that contributes or does not; note what observers see. Unit `client`.

    A canary's whole update has one direction and is far above the clipping norm. Its examples are so many
    that a batch without any does not occur.

    Args:
        plan: A resolved plan.
        canaries: m owners, one after the other, each with a coin and fresh noise of its own.
        rounds: Rounds to train.
    """
    task, model = canary_task(plan, 1), np.zeros(1)
    included = fair_coins(canaries)
    norm = CANARY_NORMS * plan.sensitivity / step_scale(plan)
    full = dirac_examples(1, np.zeros(records_of_client(plan), dtype=np.int64), norm)
    empty = dirac_examples(1, np.zeros(0, dtype=np.int64), norm)
    updates, sums = np.empty((rounds, canaries)), np.empty((rounds, canaries))
    for canary in range(canaries):
        for number in range(rounds):
            contribution = contribute(task, plan, model, full if included[canary] else empty)
            update = with_share(plan, contribution, plan.cohort.maximum)
            updates[number, canary] = -update[0] / plan.sensitivity
            parts = parts_of_sum(plan, task, model, contribution, empty)
            sums[number, canary] = -np.sum(parts) / plan.sensitivity
    return Seen(included, updates, sums, np.zeros(0))
