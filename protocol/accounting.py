"""What a plan's noise is worth: the mechanism of a round, epsilon of a schedule, noise for a target.

Guarantee and its unit: (epsilon, delta) covers one *example* (one record of one owner) or one *client*
(everything that one owner contributes), as `privacy.unit` says and never one for the other. Adjacency is
add/remove of the example, or a contribution of zero instead of the client's. `delta` is the probability
that the bound fails, for the whole schedule of one run. `protocol.privacy_loss` has the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import NoiseTooSmall, PlanInvalid
from protocol.plan import Plan
from protocol.privacy_loss import LARGEST_NOISE_MULTIPLIER, epsilon_of_steps

__all__ = [
    "Mechanism",
    "calibrate",
    "epsilon_after",
    "epsilon_of_steps",
    "mechanism",
    "noise_for",
    "require_target",
    "worst_epsilon_after",
]

SMALLEST_NOISE_MULTIPLIER = 0.2
"""Calibration gives no less noise than this."""

TOLERANCE = 1e-4
"""Relative accuracy with which calibration searches, before it rounds up."""


@dataclass(frozen=True)
class Mechanism:
    """The Gaussian mechanism of one round, in all that its price depends on.

    Attributes:
        sample_rate: Probability that a unit takes part in a step; 1 for unit `client`.
        noise_multiplier: Deviation of the noise of a release over its sensitivity.
        worst_noise_multiplier: The same if nobody else's noise counts; equal with local noise.
        steps: Composed steps of one round.
        delta: Probability that the bound fails, over all rounds.
    """

    sample_rate: float
    noise_multiplier: float
    worst_noise_multiplier: float
    steps: int
    delta: float

    def epsilon(self, rounds: int) -> float:
        """Return the privacy loss of one unit after `rounds` rounds."""
        return epsilon_of_steps(self.sample_rate, self.noise_multiplier, rounds * self.steps, self.delta)

    def worst_epsilon(self, rounds: int) -> float:
        """Return the privacy loss of one unit if all other owners collude."""
        steps = rounds * self.steps
        return epsilon_of_steps(self.sample_rate, self.worst_noise_multiplier, steps, self.delta)


def mechanism(plan: Plan) -> Mechanism | None:
    """Return the mechanism of one round of a resolved plan; None if it adds no noise.

    A step of unit `example` is one DP-SGD step. A round of unit `client` is one step of rate 1, however
    many local steps it has, because the whole update is clipped and noised once.

    Raises:
        PlanInvalid: The plan has noise but its multiplier is not filled in.
    """
    privacy = plan.privacy
    if privacy.noise == "none":
        return None
    if privacy.noise_multiplier is None:
        raise PlanInvalid("privacy.noise_multiplier: the plan must be resolved first")
    rate, steps = _schedule(plan)
    # The smallest share is the one of the longest list.
    own = plan.noise_deviation(plan.cohort.maximum) / plan.sensitivity
    return Mechanism(
        sample_rate=rate,
        noise_multiplier=privacy.noise_multiplier,
        worst_noise_multiplier=own if privacy.noise == "distributed" else privacy.noise_multiplier,
        steps=steps,
        delta=plan.mechanism_delta,
    )


def epsilon_after(plan: Plan, rounds: int) -> float | None:
    """Return the privacy loss of one owner after a number of finished rounds.

    Args:
        plan: A plan whose noise multiplier is filled in.
        rounds: Rounds that this owner took part in, >= 0.

    Returns:
        Epsilon at `plan.privacy.delta` for one unit; None if the plan adds no noise, which means
        that there is no guarantee at all. With distributed noise it assumes that at most
        `privacy.tolerated_colluders` owners tell their noise to a reader of the sum.

    Raises:
        PlanInvalid: The plan has noise but its multiplier is not filled in.
    """
    if rounds < 0:
        raise ValueError("rounds must not be negative")
    priced = mechanism(plan)
    return None if priced is None else priced.epsilon(rounds)


def worst_epsilon_after(plan: Plan, rounds: int) -> float | None:
    """Return the privacy loss of one owner if all other owners collude; see `epsilon_after`.

    With local noise it is the same. With distributed noise only the owner's own share protects it, the
    smallest one that a list of `cohort.maximum` owners allows; this needs no assumption about others.
    """
    if rounds < 0:
        raise ValueError("rounds must not be negative")
    priced = mechanism(plan)
    return None if priced is None else priced.worst_epsilon(rounds)


def calibrate(plan: Plan) -> float:
    """Return the noise multiplier that just reaches the plan's target, rounded up to four digits.

    The schedule is `plan.paid_rounds`: spare attempts replace void ones and cost nothing more. The
    result is checked with the same bound that `require_target` uses, so that a plan with it passes.

    Raises:
        PlanInvalid: The plan has no noise or no target, or no noise multiplier in reach attains it.
    """
    target = plan.privacy.target_epsilon
    if target is None or plan.privacy.noise == "none":
        raise PlanInvalid("privacy.target_epsilon: there is no target to calibrate for")
    rate, steps = _schedule(plan)
    return noise_for(rate, plan.paid_rounds * steps, plan.mechanism_delta, target)


def noise_for(sample_rate: float, steps: int, delta: float, target_epsilon: float) -> float:
    """Return the smallest noise multiplier of four digits that keeps a schedule within a target.

    Args:
        sample_rate: Poisson sampling probability of one unit, in (0, 1].
        steps: Composed steps of the whole schedule, >= 1.
        delta: Probability that the bound fails, in (0, 1).
        target_epsilon: Largest epsilon, > 0.

    Raises:
        PlanInvalid: No noise multiplier in reach attains the target.
    """

    def epsilon(noise_multiplier: float) -> float:
        return epsilon_of_steps(sample_rate, noise_multiplier, steps, delta)

    root = _solve(epsilon, target_epsilon, _first_guess(sample_rate, steps, delta, target_epsilon))
    unit = 10.0 ** (math.floor(math.log10(root)) - 3)
    count = math.ceil(root * (1 - TOLERANCE) / unit)
    while not epsilon(_multiple(count, unit)) <= target_epsilon:
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


def _schedule(plan: Plan) -> tuple[float, int]:
    """Return the sample rate of a step and the steps of a round."""
    if plan.privacy.unit == "client":
        return 1.0, 1
    return plan.privacy.sample_rate, plan.training.local_steps


def _first_guess(sample_rate: float, steps: int, delta: float, target: float) -> float:
    """Invert the central-limit approximation (Bu et al. 2020); only a starting point, never a bound."""
    tail = math.sqrt(2 * math.log(1 / delta))
    # epsilon is about mu^2/2 + mu * tail, and mu^2 = rate^2 * steps * (exp(1/z^2) - 1).
    mu = math.sqrt(tail**2 + 2 * target) - tail
    guess = 1 / math.sqrt(math.log1p(mu**2 / (sample_rate**2 * steps)))
    return min(max(guess, SMALLEST_NOISE_MULTIPLIER), LARGEST_NOISE_MULTIPLIER)


def _solve(epsilon: Callable[[float], float], target: float, guess: float) -> float:
    """Return a noise multiplier where epsilon is within `TOLERANCE` of the target, in few evaluations.

    The logarithm of epsilon is almost a line over the logarithm of the noise, so the search follows
    secants and halves the bracket where a secant leads out of it.
    """
    smallest, largest = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(LARGEST_NOISE_MULTIPLIER)
    low, high = smallest - 1.0, largest + 1.0
    point, last, slope = math.log(guess), None, -1.3
    while high - low > TOLERANCE:
        # Neither infinity nor zero has a logarithm; both only say on which side the root is.
        value = math.log(min(max(epsilon(math.exp(point)), 1e-9), 1e9) / target)
        low, high = (point, high) if value > 0 else (low, point)
        if abs(value) < TOLERANCE or (point == smallest and value < 0):
            break
        if point == largest and value > 0:
            raise PlanInvalid(f"target_epsilon: no amount of noise in reach attains {target:g}")
        if last is not None and point != last[0]:
            slope = min((value - last[1]) / (point - last[0]), -0.1)
        last = (point, value)
        step = min(max(-value / slope, -1.0), 1.0)
        point = min(max(point + step, smallest), largest)
        if not low < point < high:
            point = (low + high) / 2
    return math.exp(point)


def _multiple(count: int, unit: float) -> float:
    # The plan should show 2.167 and not a neighbour that binary fractions make of it.
    return float(f"{count * unit:.6g}")
