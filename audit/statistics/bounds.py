"""Lower bounds on epsilon from guesses and scores: statistics alone, no training and no randomness.

A canary is in the data or not, by a fair coin. A score, larger where a canary looks present, is turned into
guesses, or into false alarms and misses at thresholds. If so many guesses cannot be right, or so few errors
cannot be made, under a privacy loss, the loss is larger. Every bound here holds with probability
1 - `significance`; whatever is tried more than once is paid for by Bonferroni's correction, and what is
tried is fixed before the scores are seen.

Sources: Steinke, Nasr & Jagielski 2023 (arXiv 2305.08846); Mahloujifar, Melis & Chaudhuri 2024 (arXiv
2410.22235); Nasr et al. 2023 (arXiv 2302.07956); Dong, Roth & Su 2022 (Gaussian differential privacy).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.privacy_loss import (
    SMALLEST_NOISE_MULTIPLIER,
    beyond_limits,
    epsilon_of_steps,
    gaussian_epsilon,
    grid_for,
    step_distribution,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SIGNIFICANCE = 0.05
"""Probability with which a bound may be wrong, unless told otherwise."""

GUESS_SHARES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Shares of the canaries that are guessed, in halves: the highest scores in, the lowest out. Fixed once for
all audits, because a number of guesses that is chosen after the fact needs a correction of its own."""

MOST_EPSILON = 60.0
MOST_MU = 60.0
"""Where the searches end: nobody tells larger losses apart."""

_ACCURACY = 1e-4
_BELOW = 1.0 - 1e-5
"""`gaussian_epsilon` rounds up; a lower bound gives back more than that."""


@dataclass(frozen=True)
class Guesses:
    """How many of the most confident guesses were right.

    Attributes:
        canaries: All canaries, guessed or not.
        guesses: Those about which a guess was made.
        correct: Right guesses.
    """

    canaries: int
    guesses: int
    correct: int


@dataclass(frozen=True)
class Bound:
    """A lower bound and the guesses that it rests on; of a bound by thresholds, all of its decisions."""

    epsilon: float
    guesses: int
    correct: int


# --- one run, (epsilon, delta) -------------------------------------------------------------------------


def one_run_p_value(seen: Guesses, epsilon: float, delta: float) -> float:
    """Return how probable so many right guesses are under (epsilon, delta), at most.

    Theorem 5.2 of Steinke et al.: the number of right guesses is dominated by a binomial one of rate
    1 / (1 + exp(-epsilon)), but for an event whose probability grows with delta and the canaries.

    Args:
        seen: Guesses of one run; the canaries' coins are independent and fair, nothing else is assumed.
        epsilon: At least 0.
        delta: In [0, 1).
    """
    from scipy.special import bdtrc

    if seen.correct == 0:
        return 1.0
    rate = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(bdtrc(seen.correct - 1, seen.guesses, rate))
    if delta == 0.0:
        return tail
    fewer = np.arange(1, seen.correct + 1)
    left = seen.correct - fewer - 1
    tails = np.where(left >= 0, bdtrc(np.maximum(left, 0).astype(np.float64), seen.guesses, rate), 1.0)
    slope = float(np.max((tails - tail) / fewer, initial=0.0))
    return min(1.0, tail + 2.0 * seen.canaries * delta * slope)


def one_run_epsilon(seen: Guesses, delta: float, significance: float = SIGNIFICANCE) -> float:
    """Return the largest epsilon that these guesses refute, by `one_run_p_value`; 0 if none."""
    return _largest_refuted(lambda value: one_run_p_value(seen, value, delta) <= significance, MOST_EPSILON)


# --- one run, f-DP -------------------------------------------------------------------------------------


def gaussian_refuted(seen: Guesses, mu: float, significance: float = SIGNIFICANCE) -> bool:
    """Tell whether so many right guesses refute Gaussian differential privacy of parameter mu.

    Algorithm 1 of Mahloujifar et al. for the Gaussian trade-off curve. `right` and `wrong` bound the
    probability, per canary, that exactly i guesses are right and this canary is among them, or not.

    Args:
        seen: Guesses of one run.
        mu: Greater than 0.
        significance: Probability of so many right guesses, or more, that is refuted.
    """
    from scipy.special import ndtr, ndtri

    m, r, c = seen.canaries, seen.guesses, seen.correct
    right, wrong = significance * c / m, significance * (r - c) / m
    for i in range(c - 1, -1, -1):
        least = float(ndtr(ndtri(right) - mu))
        if least <= wrong:
            break
        right = min(right + (i / (r - i)) * (least - wrong), 1.0)
        wrong = least
    return right + wrong > r / m


def gaussian_one_run_epsilon(seen: Guesses, delta: float, significance: float = SIGNIFICANCE) -> float:
    """Return epsilon at delta of the largest mu that these guesses refute, by `gaussian_refuted`."""
    if 2 * seen.correct <= seen.guesses:
        return 0.0
    mu = _largest_refuted(lambda value: gaussian_refuted(seen, value, significance), MOST_MU)
    return epsilon_of_mu(mu, delta)


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Return epsilon at delta of mu-Gaussian differential privacy, rounded down."""
    return gaussian_epsilon(mu, delta) * _BELOW if mu > 0.0 else 0.0


# --- guesses from scores -------------------------------------------------------------------------------


def guess_halves(canaries: int) -> list[int]:
    """Return how many canaries are guessed in, and as many out, for each of `GUESS_SHARES`."""
    return sorted({int(share * canaries / 2) for share in GUESS_SHARES} - {0})


def one_run_bound(
    scores: Floats,
    included: Bools,
    epsilon_of: Callable[[Guesses, float], float],
    significance: float = SIGNIFICANCE,
) -> Bound:
    """Return the best bound over `GUESS_SHARES`, each at its share of the significance.

    Args:
        scores: Of each canary, larger where it looks present; float64 (m,).
        included: Whether it was, bool (m,).
        epsilon_of: Gives from guesses and a significance a lower bound on epsilon.
        significance: Probability with which the result may be wrong.
    """
    right = included[np.argsort(-scores, kind="stable")]
    m = len(scores)
    halves = guess_halves(m)
    best = Bound(0.0, 0, 0)
    for half in halves:
        correct = int(right[:half].sum()) + int((~right[m - half :]).sum())
        epsilon = epsilon_of(Guesses(m, 2 * half, correct), significance / len(halves))
        if epsilon > best.epsilon or best.guesses == 0:
            best = Bound(epsilon, 2 * half, correct)
    return best


# --- errors at thresholds ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """What deciding by thresholds costs at most, and what was seen.

    Attributes:
        false_alarms: Upper confidence bounds of the false positive rate at each threshold, float64 (k,).
        misses: Likewise of the false negative rate.
        wrong: Wrong decisions at each threshold, int (k,).
        decisions: Canaries that were decided on.
    """

    false_alarms: Floats
    misses: Floats
    wrong: NDArray[np.int64]
    decisions: int


def clopper_pearson_upper(events: NDArray[Any], trials: int, significance: float) -> Floats:
    """Return upper confidence bounds of probabilities (Clopper & Pearson 1934); 1 where all happened."""
    from scipy.special import betaincinv

    events = np.asarray(events)
    some = np.minimum(events, trials - 1)
    bound = betaincinv(some + 1.0, np.maximum(trials - some, 1), 1.0 - significance)
    return np.where(events >= trials, 1.0, bound)


def errors_at(
    scores: Floats, included: Bools, thresholds: Floats, significance: float = SIGNIFICANCE
) -> Errors:
    """Bound both error rates at all thresholds, all at once with probability 1 - `significance`.

    Args:
        scores: Of each canary, float64 (m,).
        included: Whether it was present, bool (m,); both kinds must occur.
        thresholds: Fixed without looking at these scores, float64 (k,).
        significance: Shared by the 2 k bounds.
    """
    each = significance / (2 * len(thresholds))
    inside, outside = np.sort(scores[included]), np.sort(scores[~included])
    missed = np.searchsorted(inside, thresholds, side="left")
    alarmed = len(outside) - np.searchsorted(outside, thresholds, side="left")
    return Errors(
        false_alarms=clopper_pearson_upper(alarmed, len(outside), each),
        misses=clopper_pearson_upper(missed, len(inside), each),
        wrong=(missed + alarmed).astype(np.int64),
        decisions=len(scores),
    )


def gaussian_threshold_bound(errors: Errors, delta: float) -> Bound:
    """Return epsilon of the largest mu that the errors refute, if the trade-off curve is Gaussian.

    Nasr et al. 2023: mu is at least ndtri(1 - false alarms) - ndtri(misses).
    """
    from scipy.special import ndtri

    mus = -ndtri(errors.false_alarms) - ndtri(errors.misses)
    best = int(np.argmax(mus))
    right = errors.decisions - int(errors.wrong[best])
    return Bound(epsilon_of_mu(min(float(mus[best]), MOST_MU), delta), errors.decisions, right)


@dataclass(frozen=True)
class Schedule:
    """Poisson-subsampled Gaussian steps: rate in (0, 1], steps >= 1."""

    rate: float
    steps: int


@lru_cache(maxsize=1024)
def privacy_profile(schedule: Schedule, noise_multiplier: float) -> tuple[Floats, Floats]:
    """Return points (epsilon, delta) of the exact privacy curve of a schedule, float64 (k,) each."""
    epsilons = np.concatenate([np.linspace(0.0, 4.0, 161), np.linspace(4.1, 16.0, 120)])
    grid = grid_for(schedule.rate, noise_multiplier)
    step = step_distribution(schedule.rate, noise_multiplier, grid)
    composed = step.self_compose(schedule.steps)
    return epsilons, np.asarray(composed.get_delta_for_epsilon(epsilons), dtype=np.float64)


def fewest_misses(false_alarms: Floats, profile: tuple[Floats, Floats]) -> Floats:
    """Return the trade-off curve that a privacy curve implies: misses at each false alarm rate, at least.

    Wasserman & Zhou 2010: for each (epsilon, delta), misses >= 1 - delta - exp(epsilon) false alarms, and
    the same with the two kinds of error exchanged. No test does better, whatever its score.
    """
    epsilons, deltas = profile
    alarms, growth = false_alarms[:, None], np.exp(epsilons)[None, :]
    direct = 1.0 - deltas - growth * alarms
    exchanged = (1.0 - deltas - alarms) / growth
    return np.asarray(np.maximum(np.maximum(direct, exchanged).max(axis=1), 0.0))


def exact_threshold_bound(errors: Errors, schedule: Schedule, delta: float) -> Bound:
    """Return epsilon of the largest noise multiplier whose exact trade-off curve the errors refute.

    The curve is that of the plan's own schedule, by its privacy loss distribution, instead of a Gaussian
    curve. It assumes that rate and steps are the plan's, which the tests of the sampler look at, and asks
    how much noise there can be at most.

    Args:
        errors: From canaries that are independent of each other.
        schedule: Rate and steps.
        delta: Where epsilon is stated.
    """
    low, high = _lattice_limits(schedule)
    # refuted above some noise and not below it: find the least refuted noise
    if not _refuted(errors, schedule, high):
        return Bound(0.0, errors.decisions, _right_at_best(errors, schedule, high))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _refuted(errors, schedule, middle) else (middle + 1, high)
    epsilon = epsilon_of_steps(schedule.rate, _noise_at(high), schedule.steps, delta)
    return Bound(min(epsilon, MOST_EPSILON), errors.decisions, _right_at_best(errors, schedule, high))


_NOISE_RATIO = 1.005
_MOST_NOISE = 1e4


def _noise_at(place: int) -> float:
    """Return a noise multiplier of a fixed lattice, so that curves are shared between bounds."""
    return float(_NOISE_RATIO**place)


def _lattice_limits(schedule: Schedule) -> tuple[int, int]:
    """Return the places of the least noise whose loss is still told apart, and of the most noise."""
    low = math.ceil(math.log(SMALLEST_NOISE_MULTIPLIER) / math.log(_NOISE_RATIO))
    high = math.floor(math.log(_MOST_NOISE) / math.log(_NOISE_RATIO))
    most = high
    while low < high:
        middle = (low + high) // 2
        noise = _noise_at(middle)
        # the central-limit loss decides where to begin; the bound itself is computed from the exact curve
        signal = schedule.rate**2 * schedule.steps * math.expm1(min(noise**-2, 600.0))
        reached = beyond_limits(schedule.rate, noise, schedule.steps) or signal > MOST_EPSILON
        low, high = (middle + 1, high) if reached else (low, middle)
    return low, most


def _refuted(errors: Errors, schedule: Schedule, place: int) -> bool:
    return exact_refuted(errors, schedule, _noise_at(place))


def exact_refuted(errors: Errors, schedule: Schedule, noise_multiplier: float) -> bool:
    """Tell whether errors at some threshold are fewer than a schedule's exact trade-off curve allows."""
    profile = privacy_profile(schedule, noise_multiplier)
    return bool(np.any(fewest_misses(errors.false_alarms, profile) > errors.misses))


def _right_at_best(errors: Errors, schedule: Schedule, place: int) -> int:
    least = fewest_misses(errors.false_alarms, privacy_profile(schedule, _noise_at(place)))
    best = int(np.argmax(least - errors.misses))
    return errors.decisions - int(errors.wrong[best])


# --- searching -----------------------------------------------------------------------------------------


def _largest_refuted(refuted: Callable[[float], bool], most: float) -> float:
    """Return the largest refuted value, to `_ACCURACY` below it; 0 if the smallest one is not refuted.

    Whatever is refuted is refuted with all smaller values.
    """
    if not refuted(_ACCURACY):
        return 0.0
    low, high = _ACCURACY, 1.0
    while refuted(high):
        if high >= most:
            return most
        low, high = high, min(2.0 * high, most)
    while high - low > _ACCURACY:
        middle = (low + high) / 2.0
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
