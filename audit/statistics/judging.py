"""How one conformance test is judged: thresholds, and tests of more than one subject."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from audit.evidence.experiments import ConformanceTest

Floats = NDArray[np.float64]

THRESHOLD = 1e-6
"""Probability of a false alarm of one test, decided on before anything is run."""

_MEAN_KS = 0.8687
"""Expected Kolmogorov-Smirnov distance times the root of the sample size."""


def judged(
    test: str, what: str, statistic: float, expected: float, samples: int, p: float
) -> ConformanceTest:
    """Return a test's result; a statistic that cannot be computed counts as 0 and fails."""
    usable = math.isfinite(statistic) and math.isfinite(p)
    return ConformanceTest(
        test=test,
        what=what,
        statistic=float(statistic) if usable else 0.0,
        expected=float(expected),
        samples=int(samples),
        p_value=min(1.0, max(0.0, float(p))) if usable else 0.0,
        threshold=THRESHOLD,
    )


def exactly(
    test: str, what: str, statistic: float, expected: float, samples: int, *, holds: bool
) -> ConformanceTest:
    """Return the result of a test of something that must hold without exception."""
    return judged(test, what, statistic, expected, samples, 1.0 if holds else 0.0)


def uniformity(test: str, what: str, ordered: Floats) -> ConformanceTest:
    """Compare sorted values with the uniform distribution on [0, 1], by Kolmogorov and Smirnov."""
    from scipy.special import kolmogorov

    count = len(ordered)
    steps = np.arange(count + 1) / count
    distance = float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))
    p = float(kolmogorov(math.sqrt(count) * distance))
    return judged(test, what, distance, _MEAN_KS / math.sqrt(count), count, p)
