"""How much too little noise an audit would have exposed: the power of a bound, by simulation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from audit.statistics.bounds import (
    SIGNIFICANCE,
    Errors,
    Guesses,
    clopper_pearson_upper,
    exact_refuted,
    gaussian_one_run_epsilon,
    gaussian_threshold_bound,
    guess_halves,
    one_run_epsilon,
)
from audit.statistics.channels import Channel, Claim, Method, finite
from protocol.privacy_loss import epsilon_of_steps

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_SIMULATED = 20_000
_ONE_IN_FIVE = 0.8416
"""Deviations of a normal value below which one in five lies: power is stated at 0.8."""


def detectable(
    method: Method, channel: Channel, claim: Claim, thresholds: Floats, canaries: int
) -> float | None:
    """Return the smallest true epsilon that a method exposes with a probability of about 0.8, or None.

    The mechanism is simulated with less and less noise than claimed, until the method's bound is above the
    claim although the numbers of errors are as unfavourable as they are once in five audits.
    """
    low, high = math.log(0.02), 0.0
    if not math.isfinite(claim.epsilon) or not _exposes(method, channel, claim, thresholds, canaries, low):
        return None
    while high - low > 0.02:
        middle = (low + high) / 2
        if _exposes(method, channel, claim, thresholds, canaries, middle):
            low = middle
        else:
            high = middle
    noise = claim.noise_multiplier * math.exp(low)
    return finite(epsilon_of_steps(claim.schedule.rate, noise, claim.schedule.steps, claim.delta))


def _exposes(
    method: Method, channel: Channel, claim: Claim, thresholds: Floats, canaries: int, log_share: float
) -> bool:
    """Tell whether an audit of this share of the noise ends above the claim, four times in five."""
    included = np.arange(_SIMULATED) % 2 == 0
    noise = channel.noise * math.exp(log_share)
    scores = channel.simulate(included, noise, np.random.default_rng(1))
    if method in ("one run", "one run, f-DP"):
        epsilon_of = one_run_epsilon if method == "one run" else gaussian_one_run_epsilon
        halves, right = guess_halves(canaries), included[np.argsort(-scores, kind="stable")]
        level = SIGNIFICANCE / len(halves)
        return any(
            epsilon_of(_unlucky_guesses(right, half, canaries), claim.delta, level) > claim.epsilon
            for half in halves
        )
    errors = _unlucky_errors(scores, included, thresholds, canaries)
    if method == "Clopper-Pearson, Gaussian":
        return gaussian_threshold_bound(errors, claim.delta).epsilon > claim.epsilon
    return exact_refuted(errors, claim.schedule, claim.noise_multiplier)


def _unlucky_guesses(right: Bools, half: int, canaries: int) -> Guesses:
    many = max(1, round(half * len(right) / canaries))
    share = (right[:many].mean() + (~right[-many:]).mean()) / 2
    mean, deviation = 2 * half * share, math.sqrt(2 * half * share * (1 - share))
    return Guesses(canaries, 2 * half, max(0, math.floor(mean - _ONE_IN_FIVE * deviation)))


def _unlucky_errors(scores: Floats, included: Bools, thresholds: Floats, canaries: int) -> Errors:
    each, trials = SIGNIFICANCE / (2 * len(thresholds)), canaries // 2

    def unlucky(share: Floats) -> Floats:
        # both kinds of error at once are this unfavourable about as often as one alone at 0.84 deviations
        events = trials * share + _ONE_IN_FIVE / math.sqrt(2) * np.sqrt(trials * share * (1 - share))
        return clopper_pearson_upper(np.ceil(events), trials, each)

    inside, outside = np.sort(scores[included]), np.sort(scores[~included])
    misses = np.searchsorted(inside, thresholds) / len(inside)
    alarms = 1 - np.searchsorted(outside, thresholds) / len(outside)
    wrong = np.zeros(len(thresholds), dtype=np.int64)
    return Errors(unlucky(alarms), unlucky(misses), wrong, canaries)
