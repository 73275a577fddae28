"""What a plan's noise is worth: epsilon of a schedule of DP-SGD steps, and the noise for a target.

One step is the Poisson-subsampled Gaussian mechanism: every record takes part with probability
`sample_rate`, one record changes the sum by at most `max_grad_norm` in L2, and the noise deviation is
`noise_multiplier * max_grad_norm`. Steps are composed by their privacy loss distribution (Koskela et
al. 2020; Doroshenko et al. 2022), evaluated pessimistically: what is returned is an upper bound.

Guarantee and its unit: (epsilon, delta) covers one *example* (one record of one owner), adjacency is
add/remove, and `delta` is the probability that the bound fails, for the whole schedule of one run. It
assumes that the coins and the noise are secret and that the schedule was fixed in advance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

from protocol.errors import NoiseTooSmall, PlanInvalid
from protocol.plan import Plan

DISCRETIZATION = 1e-3
"""Grid of the privacy loss. Every grid gives an upper bound; a finer one is tighter and slower."""

COARSE_DISCRETIZATION = 5e-3
"""Grid for the search below a noise multiplier of 1.5, where the fine one is slow and hardly tighter."""

LARGEST_NOISE_MULTIPLIER = 1e6
SMALLEST_NOISE_MULTIPLIER = 0.2
"""Calibration searches between these two."""

LARGEST_STEPS = 1_000_000
LARGEST_SIGNAL = 1000.0
"""Schedules beyond these limits are not evaluated, since a stranger's plan must not exhaust this machine.

The signal is an estimate of the squared mean over the deviation of the privacy loss; epsilon is about
half of it, and so the limit is far above any meaningful budget.
"""


@lru_cache(maxsize=4096)
def epsilon_of_steps(
    sample_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    discretization: float = DISCRETIZATION,
) -> float:
    """Return epsilon of `steps` equal DP-SGD steps, an upper bound.

    Args:
        sample_rate: Poisson sampling probability of one example, in (0, 1].
        noise_multiplier: Noise deviation divided by the clipping norm, > 0.
        steps: Number of composed steps, >= 0; none cost nothing.
        delta: Probability that the bound fails, in (0, 1).
        discretization: Grid of the privacy loss.

    Returns:
        Epsilon >= 0; infinity if the noise is too small for this delta, or if the schedule is beyond
        the limits of this module.
    """
    if steps == 0:
        return 0.0
    if _is_hopeless(sample_rate, noise_multiplier, steps):
        return math.inf
    # Importing dp_accounting takes about a second, which only those who account should pay.
    from dp_accounting import (
        GaussianDpEvent,
        NeighboringRelation,
        PoissonSampledDpEvent,
        SelfComposedDpEvent,
    )
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=discretization,
    )
    step = PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier))
    accountant.compose(SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


def epsilon_after(plan: Plan, rounds: int) -> float | None:
    """Return the privacy loss of one owner after a number of finished rounds.

    Args:
        plan: A plan whose noise multiplier is filled in.
        rounds: Rounds that this owner took part in, >= 0.

    Returns:
        Epsilon at `plan.privacy.delta` for one example; None if the plan adds no noise, which means
        that there is no guarantee at all.

    Raises:
        PlanInvalid: The plan has noise but its multiplier is not filled in.
    """
    if rounds < 0:
        raise ValueError("rounds must not be negative")
    privacy = plan.privacy
    if privacy.noise == "none":
        return None
    if privacy.noise_multiplier is None:
        raise PlanInvalid("privacy.noise_multiplier: the plan must be resolved first")
    steps = rounds * plan.training.local_steps
    return epsilon_of_steps(privacy.sample_rate, privacy.noise_multiplier, steps, privacy.delta)


def calibrate(plan: Plan) -> float:
    """Return the noise multiplier that just reaches the plan's target, rounded up to four digits.

    The schedule is `plan.total_steps`: spare attempts replace void ones and cost nothing more. The
    result is checked with the same bound that `require_target` uses, so that a plan with it passes.

    Raises:
        PlanInvalid: The plan has no target, or no noise multiplier in reach attains it.
    """
    privacy = plan.privacy
    if privacy.target_epsilon is None:
        raise PlanInvalid("privacy.target_epsilon: there is no target to calibrate for")
    target = privacy.target_epsilon

    def epsilon(noise_multiplier: float, grid: float) -> float:
        return epsilon_of_steps(
            privacy.sample_rate, noise_multiplier, plan.total_steps, privacy.delta, grid
        )

    guess = _first_guess(plan, target)
    grid = COARSE_DISCRETIZATION if guess < 1.5 else DISCRETIZATION
    root = _solve(partial(epsilon, grid=grid), target, guess)
    unit = 10.0 ** (math.floor(math.log10(root)) - 3)
    count = math.floor(root / unit)
    while not epsilon(_multiple(count, unit), DISCRETIZATION) <= target:
        count += 1
    return _multiple(count, unit)


def require_target(plan: Plan) -> None:
    """Check that the plan's noise keeps its whole schedule within its target.

    Raises:
        NoiseTooSmall: Epsilon of the full schedule is above `privacy.target_epsilon`.
        PlanInvalid: The noise multiplier is not filled in.
    """
    reached = epsilon_after(plan, plan.paid_rounds)
    target = plan.privacy.target_epsilon
    if reached is None or target is None:
        return
    if not reached <= target:
        raise NoiseTooSmall(f"the schedule reaches epsilon {reached:.4f}, the target is {target:g}")


def _is_hopeless(sample_rate: float, noise_multiplier: float, steps: int) -> bool:
    if steps > LARGEST_STEPS or noise_multiplier < SMALLEST_NOISE_MULTIPLIER / 2:
        return True
    unsampled = steps / noise_multiplier**2
    sampled = sample_rate**2 * steps * math.expm1(noise_multiplier**-2)
    return min(unsampled, sampled) > LARGEST_SIGNAL


def _first_guess(plan: Plan, target: float) -> float:
    """Invert the central-limit approximation (Bu et al. 2020); only a starting point, never a bound."""
    privacy = plan.privacy
    tail = math.sqrt(2 * math.log(1 / privacy.delta))
    # epsilon is about mu^2/2 + mu * tail, and mu^2 = rate^2 * steps * (exp(1/z^2) - 1).
    mu = math.sqrt(tail**2 + 2 * target) - tail
    guess = 1 / math.sqrt(math.log1p(mu**2 / (privacy.sample_rate**2 * plan.total_steps)))
    return min(max(guess, SMALLEST_NOISE_MULTIPLIER), LARGEST_NOISE_MULTIPLIER)


def _solve(epsilon: Callable[[float], float], target: float, guess: float) -> float:
    """Return a noise multiplier within 0.01 % of where epsilon crosses the target."""
    from scipy.optimize import brentq

    def excess(log_multiplier: float) -> float:
        reached = min(max(epsilon(math.exp(log_multiplier)), 1e-9), 1e9)
        return math.log(reached / target)

    low = high = math.log(guess)
    while excess(low) < 0 and low > math.log(SMALLEST_NOISE_MULTIPLIER):
        low -= 0.1
    while excess(high) > 0:
        high += 0.1 + (high - low) / 2
        if high > math.log(LARGEST_NOISE_MULTIPLIER):
            raise PlanInvalid("privacy.target_epsilon: no amount of noise in reach attains it")
    if low == high or excess(low) <= 0:
        return math.exp(low)
    return math.exp(float(brentq(excess, low, high, xtol=1e-4)))


def _multiple(count: int, unit: float) -> float:
    # The plan should show 2.167 and not a neighbour that binary fractions make of it.
    return float(f"{count * unit:.6g}")
