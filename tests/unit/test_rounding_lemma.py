"""The rounding lemma of docs/privacy.md, checked with exact probability mass functions.

One owner's integer is floor(x + z + u) with z Gaussian of deviation s and u uniform in [0, 1): it is k with
the density at k of x + z + t, where t is triangular on [-1, 1]. The sum of m owners has the discrete
convolution of these; the channel applied to the continuous sum has the density of x + N(0, m s^2) + m
triangular values. Both are written down in closed form here, independently of the product's code.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from mpmath import binomial, erfc, exp, log, mp, mpf, pi, sqrt
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import norm

from protocol.shares import rounding_loss

Pmf = NDArray[np.float64]


def antiderivative(order: int, w: mpf, deviation: mpf) -> mpf:
    """Return the n-th antiderivative of the Gaussian's distribution function; -1 is its density."""
    density = exp(-((w / deviation) ** 2) / 2) / (deviation * sqrt(2 * pi))
    values = [density, erfc(-w / deviation / sqrt(2)) / 2]
    for n in range(1, order + 1):
        values.append((w * values[-1] + deviation**2 * values[-2]) / n)
    return values[order + 1]


def channel(w: mpf, share: mpf, owners: int) -> mpf:
    """Return the density at w of N(0, owners * share^2) plus `owners` triangular values."""
    deviation, order = share * sqrt(owners), 2 * owners
    return sum(
        (-1) ** j * binomial(order, j) * antiderivative(order - 1, w + owners - j, deviation)
        for j in range(order + 1)
    )


def summed(k: int, share: mpf, values: list[mpf], reach: int) -> mpf:
    """Return the probability that the rounded values of all owners add up to k."""
    if len(values) == 1:
        return channel(k - values[0], share, 1)
    middle = k // len(values)
    return sum(
        channel(j - values[0], share, 1) * summed(k - j, share, values[1:], reach)
        for j in range(middle - reach, middle + reach + 1)
    )


@pytest.mark.parametrize(("share", "digits", "reach"), [("1", 30, 13), ("1.5", 40, 22), ("2", 60, 32)])
def test_two_owners_differ_from_the_channel_by_the_bound_and_not_much_less(
    share: str, digits: int, reach: int
) -> None:
    with mp.workdps(digits):
        s, largest = mpf(share), mpf(0)
        for first, second in (("0", "0"), ("0.3", "0.9"), ("0.5", "-0.25")):
            values = [mpf(first), mpf(second)]
            for k in (-2, 0, 3):
                real, ideal = summed(k, s, values, reach), channel(k - sum(values), s, 2)
                largest = max(largest, abs(log(real / ideal)))
        bound = rounding_loss(float(share), 2, 1)
        assert bound / 20 < largest <= bound


def test_three_owners_differ_by_less_than_twice_the_bound_of_two() -> None:
    with mp.workdps(30):
        s, values = mpf("0.8"), [mpf("0.1"), mpf("0.45"), mpf("0.7")]
        real, ideal = summed(1, s, values, 9), channel(1 - sum(values), s, 3)
        assert 0 < abs(log(real / ideal)) <= 2.01 * 2 * exp(-((pi * s) ** 2))


@pytest.mark.parametrize(
    ("share", "digits", "reach", "least"),
    [(4, 90, 70, "1e-68"), pytest.param(8, 320, 230, "1e-273", marks=pytest.mark.long)],
)
def test_shares_of_several_steps_differ_by_nothing_that_matters(
    share: int, digits: int, reach: int, least: str
) -> None:
    with mp.workdps(digits):
        values = [mpf("0.3"), mpf("0.9")]
        real, ideal = summed(1, mpf(share), values, reach), channel(1 - sum(values), mpf(share), 2)
        assert abs(log(real / ideal)) <= 2.01 * exp(-((pi * share) ** 2)) < mpf(least)
    bound = rounding_loss(float(share), 2, 1)
    assert bound == pytest.approx(2.01 * float(exp(-((pi * share) ** 2))), rel=1e-9)


# --- privacy of the released integers -----------------------------------------------------------------


def owner_pmf(value: float, share: float, grid: NDArray[np.int64]) -> Pmf:
    """Return the probabilities of one owner's integer on a grid of integers."""

    def twice_integrated(w: NDArray[np.float64]) -> NDArray[np.float64]:
        return w * ndtr(w / share) + share * norm.pdf(w / share)

    w = grid - value
    return twice_integrated(w + 1) - 2 * twice_integrated(w) + twice_integrated(w - 1)


def sum_pmf(values: list[float], share: float, reach: int = 1200) -> Pmf:
    grid = np.arange(-reach // len(values), reach // len(values) + 1)
    pmf = np.ones(1)
    for value in values:
        pmf = np.convolve(pmf, np.maximum(owner_pmf(value, share, grid), 0.0))
    assert pmf.sum() == pytest.approx(1.0, abs=1e-10)
    return pmf


def hockey_stick(first: Pmf, second: Pmf, epsilon: float) -> float:
    return float(np.maximum(first - np.exp(epsilon) * second, 0.0).sum())


def gaussian_delta(epsilon: float, signal: float) -> float:
    """Return delta of the Gaussian mechanism with mean over deviation `signal` (Balle & Wang 2018)."""
    return float(
        ndtr(signal / 2 - epsilon / signal) - np.exp(epsilon) * ndtr(-signal / 2 - epsilon / signal)
    )


@pytest.mark.parametrize("multiplier", [0.8, 2.0])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_one_dimension_is_no_worse_than_the_continuous_gaussian(multiplier: float, epsilon: float) -> None:
    """The honest owners' shares make the promised noise; the victim's record moves its own value."""
    share, honest = 8.0, 3
    norm_ = share * np.sqrt(honest) / multiplier
    delta = gaussian_delta(epsilon, 1 / multiplier)
    for start in (0.0, 0.37, 0.5):
        first = sum_pmf([start, 0.2, -0.4], share)
        for change in (norm_, -norm_):
            second = sum_pmf([start + change, 0.2, -0.4], share)
            for one, other in ((first, second), (second, first)):
                assert hockey_stick(one, other, epsilon) <= delta + 1e-10


def test_one_dimension_is_also_hardly_better() -> None:
    """The rounding hides little, so that the accounting of the Gaussian is the right one."""
    share, honest, multiplier = 8.0, 3, 1.0
    change = share * np.sqrt(honest) / multiplier
    reached = hockey_stick(sum_pmf([change, 0, 0], share), sum_pmf([0, 0, 0], share), 1.0)
    assert reached == pytest.approx(gaussian_delta(1.0, 1.0), rel=0.01)


@pytest.mark.parametrize("angle", [0.0, 0.4, np.pi / 4])
@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_two_dimensions_are_no_worse_than_the_continuous_gaussian(angle: float, epsilon: float) -> None:
    share, honest, multiplier = 8.0, 2, 1.0
    length = share * np.sqrt(honest) / multiplier
    sides = [length * np.cos(angle), length * np.sin(angle)]
    first = [sum_pmf([0.3, 0.1], share, 260), sum_pmf([0.8, -0.6], share, 260)]
    moved = [sum_pmf([0.3 + sides[0], 0.1], share, 260), sum_pmf([0.8 + sides[1], -0.6], share, 260)]
    delta = gaussian_delta(epsilon, 1 / multiplier)
    for one, other in itertools.permutations((first, moved)):
        reached = hockey_stick(np.outer(*one), np.outer(*other), epsilon)
        assert 0.9 * delta <= reached <= delta + 1e-10


def test_one_own_share_gives_the_worst_epsilon_whatever_its_size() -> None:
    """If all others collude, rounding is a post-processing of one Gaussian, with no condition on s."""
    for share in (0.2, 1.0, 8.0):
        first, second = sum_pmf([0.0], share, 400), sum_pmf([share], share, 400)
        for epsilon in (0.1, 1.0, 2.0):
            assert hockey_stick(first, second, epsilon) <= gaussian_delta(epsilon, 1.0) + 1e-12


def test_shares_that_are_clamped_break_the_promise() -> None:
    """Why the range must be wide: clamping one value before the sum is no post-processing of the sum."""
    share, honest, largest = 8.0, 4, 40

    def clamped(value: float) -> Pmf:
        pmf = owner_pmf(value, share, np.arange(-200, 201))
        inside = pmf[200 - largest : 201 + largest].copy()
        inside[0] += pmf[: 200 - largest].sum()
        inside[-1] += pmf[201 + largest :].sum()
        return inside

    first, second = clamped(38.0 - share * np.sqrt(honest)), clamped(38.0)
    for _ in range(honest - 1):
        first, second = np.convolve(first, clamped(38.0)), np.convolve(second, clamped(38.0))
    assert hockey_stick(first, second, 1.0) > 1.4 * gaussian_delta(1.0, 1.0)
