"""Noise shares under secure aggregation: how large a share is, and how rarely one is clamped.

With ``privacy.noise = "distributed"`` no owner adds all the noise. Each of the n owners of a list adds a
Gaussian share, and only the sum of their integers is opened. What an owner rounds and sends alone would
protect little; the sum has the noise of a trusted curator, as long as enough owners add their share.
Everything here is arithmetic on public numbers. docs/privacy.md has the statement and its proof.
"""

from __future__ import annotations

import math

CLAMP_SHARE = 0.01
"""Part of delta that pays for values outside the public range: clamping one owner's value before the
sum is no post-processing of the sum, so it must almost never happen."""

LEAST_SHARE_STEPS = 8.0
"""Smallest deviation of a noise share in steps of the quantization grid; see `rounding_loss`. The lemma
needs half of it; the rest keeps the rounding error small beside the noise."""

LARGEST_PARAMETERS = 2**31
"""Values of one update that `clamp_deviations` allows for."""


def honest_shares(owners: int, colluders: int) -> int:
    """Return how many shares the promised noise is made of: n - t - 1.

    Whoever reads the sum may be an owner, who knows its own share, and be told those of t others.

    Args:
        owners: n, the length of the round's list; at least t + 3, so that another owner's share is
            left beside the victim's own.
        colluders: t, owners that may tell their shares to a reader of the sum.
    """
    if owners < colluders + 3:
        raise ValueError("a list needs at least three owners more than may collude")
    return owners - colluders - 1


def share_deviation(deviation: float, owners: int, colluders: int) -> float:
    """Return the deviation of one owner's share of Gaussian noise of a given deviation.

    Variances of independent Gaussians add up, so `honest_shares` of these make at least `deviation`.
    """
    return deviation / math.sqrt(honest_shares(owners, colluders))


def clamp_deviations(values: int, delta: float, epsilon: float) -> float:
    """Return k so that noise beyond k deviations, anywhere in a run, costs `CLAMP_SHARE` of delta.

    A Gaussian value is beyond k deviations with probability at most exp(-k^2/2). If any of `values` is,
    with probability p in all, the run may differ from one without clamping; two runs on neighbouring
    data then differ by p (1 + exp(epsilon)) more in delta. The result makes that CLAMP_SHARE * delta.

    Args:
        values: Noise values of all owners in all attempts of the run.
        delta: Failure probability that the run promises.
        epsilon: Privacy loss that the run promises.
    """
    factor = max(epsilon, 0.0) + math.log1p(math.exp(-abs(epsilon)))
    return math.sqrt(2.0 * (math.log(values) + math.log(1.0 / (CLAMP_SHARE * delta)) + factor))


def rounding_loss(share_steps: float, owners: int, values: int) -> float:
    """Return how far rounding moves the probabilities of a run's sums, at most, as a logarithm.

    The sum of m stochastically rounded values with Gaussian shares of s grid steps has, at every integer,
    the probability of a post-processing of the continuous Gaussian sum up to a factor within exp(+-r),
    r = 2.01 (m - 1) exp(-pi^2 s^2): the lemma of docs/privacy.md. Over a run this adds at most twice the
    result to epsilon, and multiplies delta by exp of it.

    Args:
        share_steps: Deviation of one share in steps of the quantization grid, at least 1.
        owners: Most owners of a list, at least 1.
        values: Coordinates of all attempts of a run together.
    """
    if share_steps < 1.0:
        raise ValueError("a share must be at least one step of the grid")
    return values * 2.01 * (owners - 1) * math.exp(-((math.pi * share_steps) ** 2))
