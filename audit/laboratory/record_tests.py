"""Tests of what an owner's training does with records: sampling, dividing, clipping, rounding.

All of it is seen without noise, through the functions that a run uses: plain training shows who took part
and by what was divided, the clipped sum shows the clipping.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audit.evidence.experiments import ConformanceTest
from audit.laboratory.canaries import CANARY_NORMS, canary_task, dirac_examples, step_scale
from audit.statistics.judging import exactly, judged
from client.contribution import clipped_to_norm
from client.noise import SecureStream
from client.training import clipped_sum, plain_update
from crypto.packing import quantize
from crypto.presets import packing_for
from protocol.plan import Plan
from tasks.images import Examples
from tasks.registry import Task, task_for

Floats = NDArray[np.float64]

FEW_RECORDS = 5
EXACTNESS = 1e-4
"""Relative difference that float32 may make where a result must be exact."""


@dataclass(frozen=True)
class Sample:
    """How much is drawn: parameters of the made-up model, canaries among them, rounds."""

    width: int
    canaries: int
    rounds: int


# --- sampler -------------------------------------------------------------------------------------------


def sampler_tests(plan: Plan, sample: Sample) -> Iterator[ConformanceTest]:
    """Yield the tests of Poisson sampling: rate, sizes of batches, participation of single records."""
    from scipy.special import bdtr, bdtrc, chdtr, chdtrc, gammainc, gammaincc

    counts = participations(plan, sample)
    rounds, records = counts.shape
    rate, steps = plan.privacy.sample_rate, plan.training.local_steps
    trials, total = rounds * records * steps, float(counts.sum())
    what = "Share of all records that take part in a step"
    if rate == 1.0:
        everyone = bool(np.all(counts == steps))
        yield exactly("participation-rate", what, total / trials, rate, trials, holds=everyone)
        return
    p = 2 * min(float(bdtr(total, trials, rate)), float(bdtrc(total - 1, trials, rate)))
    yield judged("participation-rate", what, total / trials, rate, trials, p)
    expected, variance = records * steps * rate, records * steps * rate * (1 - rate)
    spread = float((np.square(counts.sum(axis=1) - expected) / variance).sum())
    p = 2 * min(float(chdtr(rounds, spread)), float(chdtrc(rounds, spread)))
    yield judged(
        "batch-dispersion",
        "Variance of the batches' sizes over Poisson sampling's",
        spread / rounds,
        1.0,
        rounds,
        p,
    )
    drawn = rounds * steps
    variance = drawn * rate * (1 - rate)
    spread = float((np.square(counts.sum(axis=0) - drawn * rate) / variance).sum())
    # squared deviations of binomial counts, matched in mean and variance by a gamma distribution
    each = 2 + (1 - 6 * rate * (1 - rate)) / variance
    shape, scaled = records / each, spread / each
    p = 2 * min(float(gammainc(shape, scaled)), float(gammaincc(shape, scaled)))
    yield judged(
        "record-dispersion",
        "Variance of how often single records take part over Poisson sampling's",
        spread / records,
        1.0,
        records,
        p,
    )


def participations(plan: Plan, sample: Sample) -> Floats:
    """Return how often each record took part in each round, as training without noise shows it."""
    task, model = canary_task(plan, sample.canaries), np.zeros(sample.canaries)
    examples = dirac_examples(sample.canaries, np.arange(sample.canaries), CANARY_NORMS)
    unit = CANARY_NORMS * step_scale(plan)
    rows = [plain_update(task, plan, model, examples) / -unit for _ in range(sample.rounds)]
    return np.rint(np.array(rows))


def divisor_test(plan: Plan) -> ConformanceTest:
    """Test that a step divides by the plan's public number, whatever the number of records."""
    certain = _with_privacy(plan, sample_rate=1.0)
    width = FEW_RECORDS
    task, examples = canary_task(plan, width), dirac_examples(width, np.arange(width), CANARY_NORMS)
    update = plain_update(task, certain, np.zeros(width), examples)
    ratios = -update / (plan.training.local_steps * CANARY_NORMS * step_scale(plan))
    worst = float(ratios[np.argmax(np.abs(ratios - 1.0))])
    return exactly(
        "divisor",
        "Plan's divisor over the divisor of a step, from an update without noise",
        worst,
        1.0,
        width,
        holds=abs(worst - 1.0) <= EXACTNESS,
    )


# --- clipping ------------------------------------------------------------------------------------------


def example_clip_tests(plan: Plan) -> Iterator[ConformanceTest]:
    """Yield the tests of clipping single examples: of canaries, and of the plan's own model."""
    bound, width = plan.privacy.max_grad_norm, 16
    certain = _with_privacy(plan, sample_rate=1.0)
    norms = np.where(np.arange(width) % 2 == 0, CANARY_NORMS, 0.5) * bound
    examples = dirac_examples(width, np.arange(width), 1.0)
    examples = Examples((examples.x * norms[:, None]).astype(np.float32), examples.y)
    total = clipped_sum(canary_task(plan, width), certain, np.zeros(width), examples)
    ratios = total / np.minimum(norms, bound)
    worst = float(ratios[np.argmax(np.abs(ratios - 1.0))])
    yield exactly(
        "clip",
        "Gradient after clipping over what it must be, for norms of 10 and 0.5 clipping norms",
        worst,
        1.0,
        width,
        holds=abs(worst - 1.0) <= EXACTNESS + 1e-6 / bound,
    )
    yield _own_model_clip(plan)


def _own_model_clip(plan: Plan) -> ConformanceTest:
    """Clip made-up examples of the plan's own model, below the norm of each, one by one and together."""
    task = task_for(plan)
    model, examples = task.initial_weights(plan), made_up(task, plan, 3)

    def total(chosen: list[int], bound: float) -> Floats:
        certain = _with_privacy(plan, sample_rate=1.0, max_grad_norm=bound)
        return clipped_sum(task, certain, model, Examples(examples.x[chosen], examples.y[chosen]))

    norms = [float(np.linalg.norm(total([index], 1e6))) for index in range(len(examples))]
    bound = min(max(0.5 * min(norms), 1e-5), 1e6)
    apart = [total([index], bound) for index in range(len(examples))]
    ratios = [float(np.linalg.norm(gradient)) / bound for gradient in apart]
    rest = float(np.linalg.norm(total([0, 1, 2], bound) - sum(apart))) / bound
    worst = max(*ratios, 1.0 + rest)
    return exactly(
        "clip-own-model",
        "Gradient of an example of the plan's own model over the clipping norm, alone and in a batch",
        worst,
        1.0,
        len(examples),
        holds=worst <= 1.0 + 10 * EXACTNESS and min(ratios) >= 0.9,
    )


def made_up(task: Task, plan: Plan, count: int, seed: int = 0) -> Examples:
    """Return examples of uniform noise in the declared range with labels in turn; nobody's records."""
    low, high = plan.task.value_range
    raw = np.random.default_rng(seed).uniform(low, high, (count, *plan.task.input_shape))
    labels = np.arange(count) % plan.task.classes
    return task.check(np.clip(raw.astype(np.float32), low, high), labels)


def update_clip_tests(plan: Plan) -> Iterator[ConformanceTest]:
    """Yield the test of clipping a whole update, above and below the norm."""
    direction = np.ones(16) / 4.0
    ratios = [
        float(np.linalg.norm(clipped_to_norm(direction * factor * plan.sensitivity, plan.sensitivity)))
        / (min(factor, 1.0) * plan.sensitivity)
        for factor in (CANARY_NORMS, 0.5)
    ]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1.0))
    yield exactly(
        "clip",
        "Norm of an update after clipping over what it must be, for norms of 10 and 0.5 clipping norms",
        worst,
        1.0,
        len(ratios),
        holds=abs(worst - 1.0) <= 1e-9,
    )


# --- rounding ------------------------------------------------------------------------------------------


def rounding_test(plan: Plan) -> ConformanceTest:
    """Test that rounding to the quantization grid has no bias and stays within one step."""
    from scipy.special import ndtr

    packing, count, reach = (
        packing_for(plan.encryption.preset, plan.cohort.maximum),
        20_000,
        plan.update_range,
    )
    shares = np.random.default_rng(0).uniform(0.05, 0.95, count)
    places = np.floor(np.linspace(-0.9, 0.9, count) * packing.half_levels) + shares
    rounded = quantize(
        places * (reach / packing.half_levels), reach, packing, SecureStream().uniform(count)
    )
    errors = rounded.astype(np.float64) - packing.half_levels - places
    error = float(errors.sum()) / math.sqrt(float((shares * (1 - shares)).sum()))
    inside = bool(np.all(np.abs(errors) <= 1.0 + 1e-6))
    return judged(
        "rounding",
        "Mean error of rounding to the quantization grid, in steps of it",
        float(errors.mean()),
        0.0,
        count,
        2 * float(ndtr(-abs(error))) if inside else 0.0,
    )


def _with_privacy(plan: Plan, **changes: float) -> Plan:
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update=changes)})
