"""What an observer gets of one canary, as a plan's constants say: scores, thresholds, simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from audit.evidence.experiments import Observer
from audit.statistics.bounds import Schedule
from protocol.optimizers import GlobalModel, apply_update
from protocol.sections import ServerOptimizerSection

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Method = Literal["one run", "one run, f-DP", "Clopper-Pearson, Gaussian", "Clopper-Pearson, PLD"]

THRESHOLD_QUANTILES = 1 / (1 + np.exp(-np.linspace(-5.0, 5.0, 25)))
_SIMULATED = 8000


@dataclass(frozen=True)
class Channel:
    """What one observer gets of one canary, as the plan's constants say it is.

    Attributes:
        observer: Who looks.
        rate: Probability that a canary takes part in a step.
        steps: Steps whose sum is released in a round.
        rounds: Rounds.
        noise: Deviation of a step's noise as seen, in sensitivities; 0 without noise.
        optimizer: The server's, where only the last model is seen; None where every round is.
        scale: A mean update of one sensitivity in one coordinate, where only the last model is seen.
    """

    observer: Observer
    rate: float
    steps: int
    rounds: int
    noise: float
    optimizer: ServerOptimizerSection | None = None
    scale: float = 1.0

    def scores(self, seen: Floats) -> Floats:
        """Return a score for each canary, from rounds (rounds, m) or from the last model (m,).

        Rounds are scored by the logarithm of the likelihood ratio, which no other score beats.
        """
        if self.optimizer is not None:
            return seen
        if self.noise == 0.0:
            return np.asarray(seen.sum(axis=0))
        taken, weights = _participations(self.steps, self.rate)
        variance = self.steps * self.noise**2
        scores = np.zeros(seen.shape[1])
        for values in seen:
            exponents = (taken[:, None] * values - taken[:, None] ** 2 / 2) / variance + weights[:, None]
            largest = exponents.max(axis=0)
            scores += largest + np.log(np.exp(exponents - largest).sum(axis=0))
        return scores

    def simulate(self, included: Bools, noise: float, rng: np.random.Generator) -> Floats:
        """Return the scores of simulated canaries of a mechanism with this noise, float64 (m,)."""
        return self._scored([self._round(included, noise, rng) for _ in range(self.rounds)])

    def _scored(self, rounds: Sequence[Floats]) -> Floats:
        if self.optimizer is None:
            return self.scores(np.array(rounds))
        model = GlobalModel.initial(np.zeros(len(rounds[0])))
        for values in rounds:
            model = apply_update(model, -values * self.scale, self.optimizer)
        return self.scores(-model.weights / self.scale)

    def _round(self, included: Bools, noise: float, rng: np.random.Generator) -> Floats:
        values = rng.normal(0.0, noise * math.sqrt(self.steps), len(included))
        values[included] += rng.binomial(self.steps, self.rate, int(included.sum()))
        return values

    def thresholds(self) -> Floats:
        """Return the thresholds at which decisions are made; the same for every audit of a plan.

        Quantiles of what noise makes of the scores, and one threshold for when there is none: between a
        canary that never takes part and one that does once.
        """
        rng = np.random.default_rng(0)
        simulated = self.simulate(np.arange(_SIMULATED) % 2 == 0, self.noise, rng)
        rounds = [np.zeros(2) for _ in range(self.rounds)]
        rounds[self.rounds // 2][1] = 1.0
        return np.append(np.quantile(simulated, THRESHOLD_QUANTILES), self._scored(rounds).mean())


def _participations(steps: int, rate: float) -> tuple[Floats, Floats]:
    """Return how often a unit can take part in a round, and the logarithms of the probabilities."""
    from scipy.special import gammaln, xlog1py, xlogy

    taken = np.arange(steps + 1, dtype=np.float64)
    logs = gammaln(steps + 1) - gammaln(taken + 1) - gammaln(steps - taken + 1)
    logs = logs + xlogy(taken, rate) + xlog1py(steps - taken, -rate)
    likely = logs > -40.0
    return taken[likely], np.asarray(logs[likely])


@dataclass(frozen=True)
class Claim:
    """What is promised to one observer: epsilon of the audited rounds at delta, and its schedule."""

    epsilon: float
    delta: float
    schedule: Schedule
    noise_multiplier: float


def finite(epsilon: float) -> float | None:
    """Return a loss for the evidence, in which a loss without bound is None."""
    return epsilon if math.isfinite(epsilon) else None
