"""Tests of the installed mechanism: does it draw, clip, add and divide as the plan says?

The owners' own code is run with made-up records (see `audit.laboratory.canaries`) and its results are
compared with what the plan's constants make of them. Such tests see what lower bounds on epsilon cannot:
noise that repeats looks more private to a bound, and a fifth too little noise is within its error. Each
test fails below a probability of `THRESHOLD` under a correct mechanism, so that an audit of 20 tests gives
a false alarm about twice in 100,000 audits. Tests of what must hold exactly have a p value of 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audit.evidence.experiments import ConformanceTest
from audit.laboratory.canaries import (
    CANARY_NORMS,
    canary_task,
    dirac_examples,
    records_of_client,
    step_scale,
)
from audit.laboratory.own_model import own_model_tests
from audit.laboratory.record_tests import (
    FEW_RECORDS,
    Sample,
    divisor_test,
    example_clip_tests,
    rounding_test,
    sampler_tests,
    update_clip_tests,
)
from audit.statistics.correlations import across, along, between
from audit.statistics.judging import judged, uniformity
from client.contribution import contribute, with_share
from protocol.plan import Plan

Floats = NDArray[np.float64]

_CLIENT_NORMS = 1000.0
_KS_VALUES = 50_000


def training_tests(plan: Plan, sample: Sample) -> list[ConformanceTest]:
    """Return all tests of an owner's training.

    Args:
        plan: A resolved plan of any unit and noise; without noise only sampler and divisor are tested.
        sample: How much is drawn.
    """
    results = [*sampler_tests(plan, sample), divisor_test(plan), rounding_test(plan)]
    if plan.privacy.noise != "none":
        results += noise_tests(plan, sample)
        results += update_clip_tests(plan) if plan.privacy.unit == "client" else example_clip_tests(plan)
        results += own_model_tests(plan, sample)
    return results


# --- noise ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Releases:
    """Updates of several owners in the same rounds, before encryption, in deviations of their noise.

    Attributes:
        idle: Owner without records: pure noise, float64 (rounds, width).
        busy: Owner with canaries on the first coordinates.
        few, more: Owners with `FEW_RECORDS` records and with one more, on the same first coordinates.
        deviation: The plan's deviation of a round's noise in sensitivities.
        canaries: Coordinates that have a signal in `busy`.
    """

    idle: Floats
    busy: Floats
    few: Floats
    more: Floats
    deviation: float
    canaries: int


def noise_tests(plan: Plan, sample: Sample) -> Iterator[ConformanceTest]:
    """Yield the tests of the noise's amount, shape and independence, and of the signal beside it."""
    seen = release(plan, sample)
    free = seen.busy[:, seen.canaries :]
    yield _scale("noise-scale", "Deviation of an update without records, over the plan's", seen.idle)
    yield _scale("noise-with-records", "The same of an owner with records, where they do not reach", free)
    yield _distribution(seen.idle)
    yield _record_count(seen)
    yield judged(
        "noise-across-rounds", "Largest correlation of the noise of two rounds", *across(seen.idle)
    )
    others = [free, seen.few[:, seen.canaries :], seen.more[:, seen.canaries :]]
    yield judged(
        "noise-across-owners",
        "Largest correlation of the noise of two owners in any rounds",
        *between([seen.idle[:, seen.canaries :], *others]),
    )
    yield judged(
        "noise-across-coordinates",
        "Largest correlation of the noise with itself at another place of the model",
        *along(seen.idle),
    )
    yield _signal(plan, seen)


def release(plan: Plan, sample: Sample) -> Releases:
    """Let four owners train in the same rounds, each round on a model that follows from the last one."""
    width, client = sample.width, plan.privacy.unit == "client"
    task, model = canary_task(plan, width), np.zeros(width)
    canaries = 1 if client else sample.canaries
    norm = (_CLIENT_NORMS / step_scale(plan) if client else CANARY_NORMS) * plan.sensitivity
    places = np.zeros(records_of_client(plan), dtype=np.int64) if client else np.arange(canaries)
    data = [dirac_examples(width, places[:0], norm), dirac_examples(width, places, norm)]
    data += [
        dirac_examples(width, np.arange(count) % canaries, norm) for count in (FEW_RECORDS, FEW_RECORDS + 1)
    ]
    steps = 1 if client else plan.training.local_steps
    deviation = plan.noise_deviation(plan.cohort.maximum) * math.sqrt(steps)
    rows: list[list[Floats]] = [[] for _ in data]
    for _ in range(sample.rounds):
        updates = [
            with_share(plan, contribute(task, plan, model, examples), plan.cohort.maximum)
            for examples in data
        ]
        for owner, update in zip(rows, updates, strict=True):
            owner.append(update / (plan.update_scale * deviation))
        model = model + updates[1]
    idle, busy, few, more = (np.array(owner) for owner in rows)
    return Releases(idle, busy, few, more, deviation / plan.sensitivity, canaries)


def _scale(test: str, what: str, values: Floats) -> ConformanceTest:
    from scipy.special import chdtr, chdtrc

    total, count = float(np.square(values).sum()), values.size
    p = 2 * min(float(chdtr(count, total)), float(chdtrc(count, total)))
    return judged(test, what, math.sqrt(total / count), 1.0, count, p)


def _distribution(values: Floats) -> ConformanceTest:
    from scipy.special import ndtr

    ordered = np.sort(ndtr(values.ravel()[:_KS_VALUES]))
    return uniformity("noise-distribution", "Distance of the noise from a normal distribution", ordered)


def _record_count(seen: Releases) -> ConformanceTest:
    from scipy.special import fdtr, fdtrc

    few, more = (rows[:, seen.canaries :] for rows in (seen.few, seen.more))
    totals = float(np.square(few).sum()), float(np.square(more).sum())
    ratio = totals[0] / totals[1] if totals[1] else math.nan
    count = few.size
    p = 2 * min(float(fdtr(count, count, ratio)), float(fdtrc(count, count, ratio)))
    return judged(
        "record-count",
        "Variance of an owner's noise over that of an owner with one record more",
        ratio,
        1.0,
        2 * count,
        p,
    )


def _signal(plan: Plan, seen: Releases) -> ConformanceTest:
    """Test the mean of the canaries' coordinates: rate, clip, divisor and step size together."""
    from scipy.special import ndtr

    values = -seen.busy[:, : seen.canaries] * seen.deviation
    if plan.privacy.unit == "client":
        mean, variance = 1.0, seen.deviation**2
    else:
        rate, steps = plan.privacy.sample_rate, plan.training.local_steps
        mean, variance = steps * rate, steps * rate * (1 - rate) + seen.deviation**2
    error = (float(values.mean()) - mean) / math.sqrt(variance / values.size)
    return judged(
        "signal",
        "Mean of what records far above the clipping norm add to an update, in clipping norms",
        float(values.mean()),
        mean,
        values.size,
        2 * float(ndtr(-abs(error))),
    )
