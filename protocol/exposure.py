"""What a schedule's noise means for those who are in the data, beyond one epsilon.

How well the best attack can tell whether a unit took part, and what a group of units loses together.
Everything here is computed from the whole privacy loss distribution and is sharper than what follows from
(epsilon, delta) alone. It explains a promise and is never charged.
"""

from __future__ import annotations

import math

from protocol.privacy_loss import (
    LARGEST_NOISE_MULTIPLIER,
    LARGEST_SIGNAL,
    ROUND_OFF,
    SMALLEST_NOISE_MULTIPLIER,
    beyond_limits,
    gaussian_epsilon,
    grid_for,
    step_distribution,
)

_LARGEST_EXPONENT = 30.0
_EXPONENTS = 301


def advantage_of_steps(sample_rate: float, noise_multiplier: float, steps: int) -> float:
    """Return how much better than a coin any test tells "with this unit" from "without it".

    It is the total variation distance, delta at epsilon 0: with even odds, no attack is right more often
    than (1 + advantage) / 2.

    Args:
        sample_rate: Poisson sampling probability of one unit, in (0, 1].
        noise_multiplier: Noise deviation divided by the sensitivity, > 0.
        steps: Number of composed steps, >= 0.

    Returns:
        An upper bound in [0, 1].
    """
    return _deltas(sample_rate, noise_multiplier, steps, [0.0])[0]


def detection_of_steps(
    sample_rate: float, noise_multiplier: float, steps: int, false_alarms: float
) -> float:
    """Return which share of those who took part the best attack finds, at a rate of false alarms.

    Of all tests that name at most `false_alarms` of the units that did not take part, none names more
    than this share of those that did. It is the least that the pairs (epsilon, delta(epsilon)) allow
    (Kairouz et al. 2015, theorem 2.4).

    Args:
        sample_rate: As in `advantage_of_steps`.
        noise_multiplier: As in `advantage_of_steps`.
        steps: As in `advantage_of_steps`.
        false_alarms: In (0, 1).

    Returns:
        An upper bound in [false_alarms, 1].
    """
    exponents = [_LARGEST_EXPONENT * (i / (_EXPONENTS - 1)) ** 2 for i in range(_EXPONENTS)]
    deltas = _deltas(sample_rate, noise_multiplier, steps, exponents)
    found = 1.0
    for epsilon, delta in zip(exponents, deltas, strict=True):
        missed = math.exp(-epsilon) * (1.0 - delta - false_alarms)
        found = min(found, math.exp(epsilon) * false_alarms + delta, 1.0 - missed)
    return max(found, false_alarms)


def epsilon_of_group(
    sample_rate: float, noise_multiplier: float, steps: int, delta: float, members: int
) -> float:
    """Return epsilon of a group of units that are all added or removed together, an upper bound.

    The members take part in a step independently, and in the worst case all push the sum the same way:
    a mixture of Gaussians with a binomial weight (Choquette-Choo et al. 2024, "Privacy Amplification
    for Matrix Mechanisms", lemma 4.5). This is far below what follows from (epsilon, delta) alone.

    Args:
        sample_rate: As in `advantage_of_steps`.
        noise_multiplier: As in `advantage_of_steps`, for one unit.
        steps: As in `advantage_of_steps`.
        delta: Probability that the bound fails for the group.
        members: Units in the group, >= 1.

    Returns:
        Epsilon >= 0 of the whole group; infinity if it is beyond any use.
    """
    if steps == 0:
        return 0.0
    # All members push by their mean at least; what the mixture adds to that costs time and no memory.
    signal = steps * (members * sample_rate / noise_multiplier) ** 2
    if noise_multiplier / members < SMALLEST_NOISE_MULTIPLIER or signal > LARGEST_SIGNAL:
        return math.inf
    noise_multiplier = min(noise_multiplier, LARGEST_NOISE_MULTIPLIER)
    if sample_rate == 1.0:
        return gaussian_epsilon(members * math.sqrt(steps) / noise_multiplier, delta)
    remaining = delta - steps * ROUND_OFF
    if remaining <= 0.0:
        return math.inf
    from dp_accounting.pld.privacy_loss_distribution import from_mixture_gaussian_mechanism

    counts = range(members + 1)
    weights = [
        math.comb(members, count) * sample_rate**count * (1 - sample_rate) ** (members - count)
        for count in counts
    ]
    step = from_mixture_gaussian_mechanism(
        noise_multiplier,
        [float(count) for count in counts],
        [weight / math.fsum(weights) for weight in weights],
        value_discretization_interval=2 * grid_for(min(1.0, members * sample_rate), noise_multiplier),
    )
    return float(step.self_compose(steps).get_epsilon_for_delta(remaining))


def _deltas(sample_rate: float, noise_multiplier: float, steps: int, exponents: list[float]) -> list[float]:
    """Return delta at each of some ascending epsilons, an upper bound in [0, 1]."""
    if steps == 0:
        return [0.0] * len(exponents)
    if beyond_limits(sample_rate, noise_multiplier, steps):
        return [1.0] * len(exponents)
    if sample_rate == 1.0:
        return [_gaussian_delta(math.sqrt(steps) / noise_multiplier, one) for one in exponents]
    noise_multiplier = min(noise_multiplier, LARGEST_NOISE_MULTIPLIER)
    step = step_distribution(sample_rate, noise_multiplier, grid_for(sample_rate, noise_multiplier))
    found = step.self_compose(steps).get_delta_for_epsilon(exponents)
    return [min(max(float(one), 0.0) + steps * ROUND_OFF, 1.0) for one in found]


def _gaussian_delta(signal: float, epsilon: float) -> float:
    from scipy.special import log_ndtr

    if epsilon == 0.0:
        return math.erf(signal / math.sqrt(8.0))
    upper = math.exp(log_ndtr(signal / 2 - epsilon / signal))
    delta = upper - math.exp(epsilon + log_ndtr(-signal / 2 - epsilon / signal))
    return min(max(delta, 0.0) + ROUND_OFF, 1.0)
