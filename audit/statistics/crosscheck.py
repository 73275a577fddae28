"""Epsilon by accountants that fedseal does not charge by, as a check of the one that it does.

Four independent computations must be in order: the lower bound, privacy loss distributions (what is
charged), and Renyi accounting; the privacy random variables of Opacus lie close to the second. None of the
others is ever a promise. Opacus' Gaussian accountant is left out, because it is no bound.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from protocol.accounting import Mechanism, epsilon_of_steps
from protocol.environment import root_logger_kept
from protocol.privacy_loss import lower_bound_of_steps, rdp_epsilon

LARGEST_MESH = 4_000_000
"""Points beyond which Opacus' accountant is not asked; it would take gigabytes for a large epsilon."""

_PRV_ERROR = 0.01


@dataclass(frozen=True)
class CrossChecks:
    """Epsilon of one schedule by every method.

    Attributes:
        lower: No correct accounting says less.
        pld: Privacy loss distributions; what is promised and charged.
        prv: Opacus' privacy random variables, with their numerical error added; None where their
            arithmetic breaks down.
        rdp: Renyi accounting.
    """

    lower: float
    pld: float
    prv: float | None
    rdp: float

    @property
    def agree(self) -> bool:
        """Tell whether the values are in the order and as close together as they must be."""
        near = self.prv is None or abs(self.prv - self.pld) <= 0.02 + 0.01 * self.pld
        return self.lower <= self.pld and self.pld <= self.rdp * 1.003 + 1e-6 and near


def cross_checks(priced: Mechanism, rounds: int) -> CrossChecks:
    """Price a number of rounds by every method.

    Args:
        priced: The mechanism of one round.
        rounds: Rounds, >= 1.
    """
    schedule = (priced.sample_rate, priced.noise_multiplier, rounds * priced.steps, priced.delta)
    return CrossChecks(
        lower=lower_bound_of_steps(*schedule),
        pld=epsilon_of_steps(*schedule),
        prv=prv_epsilon(*schedule),
        rdp=rdp_epsilon(*schedule),
    )


def prv_epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float | None:
    """Return epsilon by Opacus' accountant of privacy random variables (Gopi et al. 2021).

    Args:
        sample_rate: Poisson sampling probability of one unit, in (0, 1].
        noise_multiplier: Noise deviation divided by the sensitivity, > 0.
        steps: Number of composed steps, >= 0.
        delta: Probability that the bound fails, in (0, 1).

    Returns:
        Its upper value, 0.01 above its estimate; None where it would need too much memory or reports a
        numerical failure.
    """
    if steps == 0:
        return 0.0
    if _mesh_points(sample_rate, noise_multiplier, steps, delta) > LARGEST_MESH:
        return None
    with root_logger_kept():
        from opacus.accountants import PRVAccountant
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    try:
        with warnings.catch_warnings():
            # It takes the logarithm of zero at rate 1, and has advice on its choice of orders.
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))
    except (ArithmeticError, RuntimeError, ValueError):
        return None


def _mesh_points(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Estimate the size of Opacus' mesh as it chooses it (Gopi et al. 2021, section 5)."""
    error = delta / 1000
    width = 2 * (3 + rdp_epsilon(sample_rate, noise_multiplier, steps, error / (8 * steps)))
    return width * math.sqrt(steps * math.log(12 / error) / 2) / _PRV_ERROR
