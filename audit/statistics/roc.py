"""What a membership attack achieves: ROC, area, true positive rate at a small false positive rate.

Scores are higher for records that the attacker takes for members. Every rate is that of a threshold that
exists: nothing is interpolated, so that no rate is shown that no attacker reaches.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audit.evidence.experiments import Rate
from audit.statistics.bounds import clopper_pearson_upper

Floats = NDArray[np.float64]

INTERVAL_ERROR = 0.05
"""Probability that an interval misses the true rate, half of it on each side."""

CURVE_POINTS = 100
_DIGITS = 6


def area(members: Floats, outsiders: Floats) -> float:
    """Return the area under the ROC curve: how often a member scores above an outsider, ties as halves.

    Computed from ranks (Mann & Whitney 1947).

    Args:
        members: Scores, shape (n,), n >= 1.
        outsiders: Scores, shape (m,), m >= 1.
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([members, outsiders]))
    n, m = len(members), len(outsiders)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def true_positives(members: Floats, outsiders: Floats, false_positive_rate: float) -> int:
    """Count the members above the lowest threshold that at most this share of the outsiders exceeds.

    Args:
        members: Scores, shape (n,).
        outsiders: Scores, shape (m,), m >= 1.
        false_positive_rate: In [0, 1).
    """
    allowed = math.floor(false_positive_rate * len(outsiders) + 1e-9)
    threshold = np.sort(outsiders)[::-1][allowed]
    return int(np.sum(members > threshold))


def true_positive_rate(members: Floats, outsiders: Floats, false_positive_rate: float) -> Rate:
    """Return the true positive rate at a false positive rate, with a two-sided interval of 95 %.

    `value` and `high` are for the threshold that at most this share of these outsiders exceeds. `low` is
    what is judged, and is for a stricter one: with 97.5 % probability no more than this share of all
    outsiders exceeds it. Of few outsiders nobody can say that of any threshold, and `low` is 0: at 1 % it
    takes 368. Scores are taken as independent, and bounds are those of Clopper & Pearson 1934.
    """
    hits, trials = true_positives(members, outsiders, false_positive_rate), len(members)
    _, high = interval(hits, trials)
    accused = np.arange(len(outsiders))
    bounds = clopper_pearson_upper(accused, len(outsiders), INTERVAL_ERROR / 2)
    sure = int(np.count_nonzero(bounds <= false_positive_rate))
    low = 0.0
    if sure:
        threshold = np.sort(outsiders)[::-1][sure - 1]
        low, _ = interval(int(np.sum(members > threshold)), trials)
    return Rate(value=hits / trials, low=low, high=high)


def interval(hits: int, trials: int) -> tuple[float, float]:
    """Return the two-sided 95 % interval of a rate (Clopper & Pearson 1934).

    Args:
        hits: Successes, in [0, trials].
        trials: Independent trials, >= 1.
    """
    events = np.array([hits, trials - hits])
    high, high_of_misses = clopper_pearson_upper(events, trials, INTERVAL_ERROR / 2)
    return max(0.0, 1.0 - float(high_of_misses)), float(high)


def ceiling(epsilon: float, delta: float, false_positive_rate: float) -> float:
    """Return the largest true positive rate of any test of membership under (epsilon, delta).

    Both errors of a test obey the same two inequalities (Kairouz, Oh & Viswanath 2015, theorem 2.1); the
    ceiling is the smaller of what they leave, and at most 1.
    """
    outright = 1.0 - math.exp(-epsilon) * (1.0 - delta - false_positive_rate)
    if epsilon > math.log(1.0 / max(false_positive_rate, 1e-300)):
        return min(outright, 1.0)
    return min(math.exp(epsilon) * false_positive_rate + delta, outright, 1.0)


def curve(members: Floats, outsiders: Floats, points: int = CURVE_POINTS) -> list[tuple[float, float]]:
    """Return the ROC as (false positive rate, true positive rate), from no false positive to all.

    Args:
        members: Scores, shape (n,), n >= 1.
        outsiders: Scores, shape (m,), m >= 1.
        points: Most points, >= 3; they are evenly spread over the logarithm of the false positive rate,
            because what matters to a person is how surely few are exposed.

    Returns:
        Both rates ascending; the first has no false positive, the last is (1, 1).
    """
    m = len(outsiders)
    descending = np.sort(outsiders)[::-1]
    allowed = np.unique(np.concatenate([[0], np.geomspace(1, m, points - 1).astype(int)]))
    thresholds = np.append(descending, -np.inf)[allowed]
    hits = len(members) - np.searchsorted(np.sort(members), thresholds, side="right")
    rates = zip(allowed / m, hits / len(members), strict=True)
    return [(_rounded(false), _rounded(true)) for false, true in rates]


def _rounded(rate: Any) -> float:
    return round(float(rate), _DIGITS)
