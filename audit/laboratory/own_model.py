"""Tests of noise and clipping on the plan's own model, with its number of parameters and its layers.

Tests with canaries look at a made-up layer of a few thousand values. What is wrong at another size only, in
one layer only, or where a stream of noise begins again after more values than that, can be seen nowhere but
here. No record is needed: noise is watched with an owner without records, and with one whose made-up
records have no finite gradient and so count as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audit.evidence.experiments import ConformanceTest
from audit.laboratory.canaries import canary_task
from audit.laboratory.record_tests import EXACTNESS, Sample, made_up
from audit.statistics.correlations import anywhere, repeats
from audit.statistics.judging import exactly, judged, uniformity
from client.contribution import contribute, with_share
from client.training import clipped_sum
from protocol.plan import Plan
from tasks.images import Examples
from tasks.registry import Task, task_for

Floats = NDArray[np.float64]

VALUES = 2**23
"""Noise values that are drawn in all, but for two rounds of two steps, which are the least."""

BLOCK = 2**15
"""Neighbouring parameters whose noise is also judged by itself."""

_EXPECTED_IN_BATCH = 8
_MOST_RECORDS = 100_000
_KS_VALUES = 50_000
_EXAMPLE_VALUES = 2**23
_EXAMPLE_PARAMETERS = 5 * 10**9
_DIFFERENT = 5


def own_model_tests(plan: Plan, sample: Sample) -> Iterator[ConformanceTest]:
    """Yield the tests on the plan's own model; the plan has noise."""
    noise = own_noise(plan, sample)
    yield _scale(noise)
    values = noise.rows.ravel()
    yield _distribution(values[:: max(1, values.size // _KS_VALUES)])
    yield judged(
        "noise-across-coordinates-own-model",
        "Largest correlation of the own model's noise with itself at any other place of the model",
        *repeats(noise.rows),
    )
    yield judged(
        "noise-across-rounds-own-model",
        "Largest correlation of the own model's noise in two rounds or of two owners, also shifted",
        *anywhere(noise.rows),
    )
    if plan.privacy.unit == "example":
        yield pieces_test(plan)


@dataclass(frozen=True)
class OwnNoise:
    """Updates that are noise alone, in deviations of the plan's noise.

    Attributes:
        rows: float32 (2 rounds, trained parameters), by turns of an owner without records and of one whose
            records have no finite gradient.
        starts: Where the noise of each trained tensor begins.
    """

    rows: NDArray[np.float32]
    starts: NDArray[np.int64]


def own_noise(plan: Plan, sample: Sample) -> OwnNoise:
    """Let two owners train the plan's own model on nothing, each round on what came out of the last one.

    It begins with weights of zero, so that rounding to float32 is that of the noise itself.
    """
    task = task_for(plan)
    sizes = [(p.numel(), p.requires_grad) for p in task.build_model(plan).parameters()]
    parameters = sum(size for size, _ in sizes)
    shortest = min(2, plan.training.local_steps)
    steps = max(shortest, min(plan.training.local_steps, VALUES // (4 * parameters)))
    rounds = max(2, min(sample.rounds, VALUES // (2 * parameters * steps)))
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"local_steps": steps})})
    noisy_steps = 1 if plan.privacy.unit == "client" else steps
    deviation = plan.update_scale * plan.noise_deviation(plan.cohort.maximum) * math.sqrt(noisy_steps)
    trained = np.repeat([grows for _, grows in sizes], [size for size, _ in sizes])
    starts = np.cumsum([0, *(size for size, grows in sizes if grows)])[:-1]
    rows, model = np.empty((2 * rounds, int(trained.sum())), dtype=np.float32), np.zeros(parameters)
    owners = _silent(task, plan)
    for number in range(rounds):
        for turn, examples in enumerate(owners):
            contribution = contribute(task, plan, model, examples)
            update = with_share(plan, contribution, plan.cohort.maximum)
            rows[2 * number + turn] = update[trained] / deviation
        model = model + update
    return OwnNoise(rows, starts)


def _silent(task: Task, plan: Plan) -> tuple[Examples, Examples]:
    """Return no records, and records without a finite gradient, of which some are in nearly every batch."""
    one = made_up(task, plan, 1)
    count = min(_MOST_RECORDS, math.ceil(_EXPECTED_IN_BATCH / plan.privacy.sample_rate))
    x = np.broadcast_to(np.full_like(one.x, np.nan), (count, *one.x.shape[1:]))
    return Examples(one.x[:0], one.y[:0]), Examples(x, np.zeros(count, dtype=np.int64))


def _scale(noise: OwnNoise) -> ConformanceTest:
    """Judge the whole, each owner, each round, each tensor and each block, and report the least likely."""
    from scipy.special import chdtr, chdtrc

    rows, width = noise.rows, noise.rows.shape[1]
    by_row = np.array([float(np.square(row, dtype=np.float64).sum()) for row in rows])
    by_place = np.zeros(width)
    for row in rows:
        by_place += np.square(row, dtype=np.float64)
    totals, counts = [by_row, by_row.reshape(-1, 2).sum(axis=0), by_row.sum(keepdims=True)], []
    counts += [np.full(len(rows), width), np.full(2, rows.size // 2), np.full(1, rows.size)]
    for starts in (noise.starts, np.arange(0, width, BLOCK)):
        totals.append(np.add.reduceat(by_place, starts))
        counts.append(np.diff([*starts, width]) * len(rows))
    total, count = np.concatenate(totals), np.concatenate(counts).astype(np.float64)
    p = 2 * np.minimum(chdtr(count, total), chdtrc(count, total))
    least = int(np.argmin(p))
    return judged(
        "noise-scale-own-model",
        "Deviation of the own model's noise over the plan's, in the owner, round, layer or block where it "
        "is least likely",
        math.sqrt(float(total[least] / count[least])),
        1.0,
        rows.size,
        float(p[least]) * len(p),
    )


def _distribution(values: NDArray[np.float32]) -> ConformanceTest:
    from scipy.special import ndtr

    return uniformity(
        "noise-distribution-own-model",
        "Distance of the own model's noise from a normal distribution",
        np.sort(ndtr(values.astype(np.float64))),
    )


# --- clipping in pieces --------------------------------------------------------------------------------


def pieces_test(plan: Plan) -> ConformanceTest:
    """Clip batches that are added up in several pieces: canaries, and examples of the plan's own model."""
    canaries, examples = _canaries_in_pieces(plan), _own_model_in_pieces(plan)
    worst = max(canaries, examples, key=lambda ratio: abs(ratio - 1.0))
    holds = abs(canaries - 1.0) <= EXACTNESS + 1e-6 / plan.privacy.max_grad_norm
    return exactly(
        "clip-in-pieces",
        "Sum of clipped gradients over what it must be, for batches that are added up in several pieces",
        worst,
        1.0,
        _batch(plan),
        holds=holds and abs(examples - 1.0) <= 10 * EXACTNESS,
    )


def _batch(plan: Plan) -> int:
    """Return a number of examples that are more than one piece: pieces have a quarter of a batch, or 64."""
    return min(2**17, 150 + math.ceil(0.4 * plan.privacy.expected_batch_size))


def _certain(plan: Plan, bound: float) -> Plan:
    privacy = plan.privacy.model_copy(update={"sample_rate": 1.0, "max_grad_norm": bound})
    return plan.model_copy(update={"privacy": privacy})


def _canaries_in_pieces(plan: Plan) -> float:
    count, bound = _batch(plan), plan.privacy.max_grad_norm
    width = max(16, min(count, _EXAMPLE_VALUES // count))
    places = np.arange(count) % width
    norms = np.where(places % 2 == 0, 10.0, 0.5) * bound
    x = np.zeros((count, width), dtype=np.float32)
    x[np.arange(count), places] = norms
    examples = Examples(x, np.zeros(count, dtype=np.int64))
    total = clipped_sum(canary_task(plan, width), _certain(plan, bound), np.zeros(width), examples)
    ratios = total / np.bincount(places, np.minimum(norms, bound))
    return float(ratios[np.argmax(np.abs(ratios - 1.0))])


def _own_model_in_pieces(plan: Plan) -> float:
    """Return one plus the distance of a batch's sum from that of its examples, in norms of the batch."""
    task = task_for(plan)
    model, examples = task.initial_weights(plan), made_up(task, plan, _DIFFERENT)
    count = min(_batch(plan), max(48, _EXAMPLE_PARAMETERS // model.size))

    def total(chosen: NDArray[np.int64], bound: float) -> Floats:
        parts = Examples(examples.x[chosen], examples.y[chosen])
        return clipped_sum(task, _certain(plan, bound), model, parts)

    alone = [np.array([index]) for index in range(_DIFFERENT)]
    norms = [float(np.linalg.norm(total(one, 1e6))) for one in alone]
    bound = min(max(0.5 * min(norms), 1e-5), 1e6)
    chosen = np.arange(count) % _DIFFERENT
    often = np.bincount(chosen, minlength=_DIFFERENT)
    expected = sum(
        (n * total(one, bound) for n, one in zip(often, alone, strict=True)), np.zeros(model.size)
    )
    return 1.0 + float(np.linalg.norm(total(chosen, bound) - expected)) / (bound * count)
