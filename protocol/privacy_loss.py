"""What a schedule of equal Gaussian steps costs: epsilon of a mechanism, without knowing any plan.

One step is the Poisson-subsampled Gaussian mechanism: every unit takes part with probability
`sample_rate`, one unit changes the sum by at most the sensitivity in L2, and the noise deviation is
`noise_multiplier` times the sensitivity. Steps are composed by their privacy loss distribution (Koskela
et al. 2020) on a grid, rounded so that the result is an upper bound ("connect the dots", Doroshenko et
al. 2022). Without subsampling the composed loss is Gaussian itself and its curve is known in closed form
(Balle & Wang 2018, theorem 8), which is used instead.

The bound needs that coins and noise are secret and that the schedule was fixed in advance. Adding or
removing a unit and replacing its contribution by zero have the same price.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from protocol.environment import root_logger_kept
from protocol.errors import AccountantRefused

COARSEST_GRID = 5e-3
FINEST_GRID = 1e-6
GRID_SHARE = 0.09
"""A grid of this share of a step's deviation lifts epsilon by about 0.1 %, for any number of steps."""

MOST_CELLS = 40_000
"""Grid cells that the loss of one step may take."""

SMALLEST_NOISE_MULTIPLIER = 0.1
LARGEST_NOISE_MULTIPLIER = 1e6
LARGEST_STEPS = 1_000_000
LARGEST_SIGNAL = 1000.0
"""Schedules beyond these limits are not evaluated, since a stranger's plan must not exhaust this machine;
more noise than the largest counts as the largest.

The signal is an estimate of the squared mean over the deviation of the privacy loss; epsilon is about
half of it, and so the limit is far above any meaningful budget.
"""

ROUND_OFF = 2.0**-52
"""Probability per composed step that may be lost to floating point; the bound gives it away in delta.

The fast Fourier transform of n composed steps was seen to lose up to a third of n * 2^-52 of the tail
against the closed form, for n up to a million. Without this allowance the bound would fall below the
truth for a delta of 1e-12 and a thousand steps.
"""

_NO_BOUND = {
    "gdp": "the Gaussian approximation 'gdp' is no bound: in 4 of 6 settings that were measured it is "
    "below a lower bound of the true loss",
    "rdp": "'rdp' is a cross-check: it is valid, but states more loss than there is",
    "prv": "'prv' is a cross-check: its bound holds up to numerical error estimates",
}


def require_accountant(name: object) -> None:
    """Check the name of an accountant.

    Raises:
        AccountantRefused: It is not ``pld``. Says why for the other accountants that Opacus users know.
    """
    if name != "pld":
        raise AccountantRefused(_NO_BOUND.get(str(name), "fedseal knows only 'pld'"))


@lru_cache(maxsize=4096)
def epsilon_of_steps(
    sample_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    discretization: float | None = None,
) -> float:
    """Return epsilon of `steps` equal steps, an upper bound.

    Args:
        sample_rate: Poisson sampling probability of one unit, in (0, 1].
        noise_multiplier: Noise deviation divided by the sensitivity, > 0.
        steps: Number of composed steps, >= 0; none cost nothing.
        delta: Probability that the bound fails, in (0, 1).
        discretization: Grid of the privacy loss; every grid gives an upper bound, a finer one is
            tighter and slower. By default what `grid_for` says.

    Returns:
        Epsilon >= 0; infinity if the noise is too small for this delta, if delta is below what floating
        point resolves (`ROUND_OFF` times the steps), or if the schedule is beyond the limits of this
        module.
    """
    if steps == 0:
        return 0.0
    if beyond_limits(sample_rate, noise_multiplier, steps):
        return math.inf
    if sample_rate == 1.0:
        return gaussian_epsilon(math.sqrt(steps) / noise_multiplier, delta)
    noise_multiplier = min(noise_multiplier, LARGEST_NOISE_MULTIPLIER)
    remaining = delta - steps * ROUND_OFF
    if remaining <= 0.0:
        return math.inf
    grid = discretization or grid_for(sample_rate, noise_multiplier)
    step = step_distribution(sample_rate, noise_multiplier, grid)
    return float(step.self_compose(steps).get_epsilon_for_delta(remaining))


def lower_bound_of_steps(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Return an epsilon that no correct accounting of these steps can go below.

    It is the same distribution rounded the other way, on a finer grid. The gap to `epsilon_of_steps`
    grows with steps times grid, so that long schedules have a loose lower bound. Only for checks.

    Args:
        sample_rate: As in `epsilon_of_steps`.
        noise_multiplier: As in `epsilon_of_steps`.
        steps: As in `epsilon_of_steps`.
        delta: As in `epsilon_of_steps`.

    Returns:
        Epsilon >= 0; 0 says nothing.
    """
    if steps == 0 or beyond_limits(sample_rate, noise_multiplier, steps):
        return 0.0
    if sample_rate == 1.0:
        exact = gaussian_epsilon(math.sqrt(steps) / noise_multiplier, delta)
        return exact * (1 - 1e-6) if exact < math.inf else 0.0
    if noise_multiplier > LARGEST_NOISE_MULTIPLIER:
        return 0.0
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    step = from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=sample_rate,
        value_discretization_interval=grid_for(sample_rate, noise_multiplier, 10 * MOST_CELLS) / 10,
        pessimistic_estimate=False,
        use_connect_dots=False,
    )
    given = delta + 1e-15 + steps * ROUND_OFF
    return float(step.self_compose(steps).get_epsilon_for_delta(given))


def rdp_epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Return epsilon by Renyi accounting (Mironov et al. 2019): valid, looser, wholly other arithmetic.

    A cross-check of `epsilon_of_steps`, never what a run is charged.

    Args:
        sample_rate: As in `epsilon_of_steps`.
        noise_multiplier: As in `epsilon_of_steps`.
        steps: As in `epsilon_of_steps`.
        delta: As in `epsilon_of_steps`.
    """
    if steps == 0:
        return 0.0
    if beyond_limits(sample_rate, noise_multiplier, steps):
        return math.inf
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    with root_logger_kept(), _quiet("absl"):
        accountant.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)), steps)
        return float(accountant.get_epsilon(delta))


def grid_for(sample_rate: float, noise_multiplier: float, most_cells: int = MOST_CELLS) -> float:
    """Return a grid for the privacy loss of one step: 1, 2 or 5 times a power of ten.

    It follows the deviation of one step's loss, because rounding adds about a sixth of the squared grid
    to its variance in every step: a fixed grid of 1e-3 overstates epsilon by a fifth for a rate of 0.001
    and 100,000 steps. It never depends on the number of steps, so that epsilon never falls with them.

    Args:
        sample_rate: As in `epsilon_of_steps`.
        noise_multiplier: As in `epsilon_of_steps`.
        most_cells: Bounds the cost where the loss of one step reaches far.
    """
    exponent = min(noise_multiplier**-2, 600.0)
    deviation = sample_rate * math.sqrt(math.expm1(exponent))
    farthest = math.log1p(sample_rate * math.expm1(min(10 / noise_multiplier + exponent / 2, 600.0)))
    wanted = max(GRID_SHARE * deviation, farthest / most_cells)
    wanted = min(max(wanted, FINEST_GRID), COARSEST_GRID)
    power = 10.0 ** math.floor(math.log10(wanted) + 1e-9)
    factor = max(factor for factor in (1, 2, 5) if factor == 1 or factor * power <= wanted * (1 + 1e-9))
    return float(f"{factor * power:.0e}")


@lru_cache(maxsize=16)
def step_distribution(sample_rate: float, noise_multiplier: float, grid: float) -> Any:
    """Return the privacy loss distribution of one step, rounded up to a grid.

    Args:
        sample_rate: In (0, 1].
        noise_multiplier: Between the smallest and the largest of this module.
        grid: As `grid_for` says.

    Returns:
        A `PrivacyLossDistribution` of dp_accounting.
    """
    # Importing dp_accounting takes about a second, which only those who account should pay.
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=grid
    )


def gaussian_epsilon(signal: float, delta: float) -> float:
    """Return epsilon of one Gaussian mechanism, rounded up (Balle & Wang 2018, theorem 8).

    Args:
        signal: Sensitivity over noise deviation, > 0; of n equal mechanisms, the square root of n larger.
        delta: Probability that the bound fails, in (0, 1).
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    given = delta * (1 - 1e-6) - 8 * ROUND_OFF
    if given <= 0.0:
        return math.inf
    if math.erf(signal / math.sqrt(8.0)) <= given:
        return 0.0

    def excess(epsilon: float) -> float:
        upper = math.exp(log_ndtr(signal / 2 - epsilon / signal))
        return float(upper - math.exp(epsilon + log_ndtr(-signal / 2 - epsilon / signal)) - given)

    # There the first of the two probabilities alone is below delta.
    enough = signal**2 / 2 + signal * math.sqrt(2 * math.log(1 / given))
    return float(brentq(excess, 0.0, enough, xtol=1e-12)) + 1e-11


def beyond_limits(sample_rate: float, noise_multiplier: float, steps: int) -> bool:
    """Tell whether a schedule is not evaluated, because it would cost too much and protects nothing."""
    if steps > LARGEST_STEPS or noise_multiplier < SMALLEST_NOISE_MULTIPLIER:
        return True
    unsampled = steps * noise_multiplier**-2
    sampled = sample_rate**2 * steps * math.expm1(noise_multiplier**-2)
    return min(unsampled, sampled) > LARGEST_SIGNAL


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's warnings about orders that it leaves out from the terminal."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
