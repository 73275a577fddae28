"""Largest correlations in noise that should have none, with the probability of larger ones.

Each function returns a statistic, what it is expected to be, the number of values that it rests on, and a
p value. A correlation of n independent normal values has a deviation of 1 / sqrt(n); the largest of many
is judged by Bonferroni's correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Figures = tuple[float, float, int, float]


def across(rows: Floats) -> Figures:
    """Return the largest correlation of two different rows, float64 (rows, values)."""
    correlations = _normalized(rows) @ _normalized(rows).T
    places = np.triu_indices(len(rows), k=1)
    return _largest(correlations[places], rows.shape[1], rows.size)


def between(blocks: Sequence[Floats]) -> Figures:
    """Return the largest correlation of a row of one block with a row of another."""
    normalized = [_normalized(block) for block in blocks]
    correlations = np.concatenate([(a @ b.T).ravel() for a, b in combinations(normalized, 2)])
    return _largest(correlations, blocks[0].shape[1], sum(block.size for block in blocks))


def along(rows: Floats) -> Figures:
    """Return the largest correlation of all rows with themselves shifted by up to three quarters."""
    width = rows.shape[1]
    # padded with zeros, so that a shift does not come round; fewer pairs are left for a larger one
    spectrum = np.square(np.abs(np.fft.rfft(_normalized(rows), n=2 * width, axis=1)))
    shifts = np.arange(1, 3 * width // 4)
    sums = np.fft.irfft(spectrum.mean(axis=0), n=2 * width)[shifts]
    return _largest(sums * np.sqrt(width / (width - shifts)), rows.size, rows.size)


def _normalized(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0))


def _largest(correlations: Floats, values: int, samples: int) -> Figures:
    from scipy.special import log_ndtr

    largest = float(np.abs(correlations).max(initial=0.0))
    log_p = math.log(2 * correlations.size) + float(log_ndtr(-largest * math.sqrt(values)))
    # the deviation that the largest of so many is near to
    expected = math.sqrt(2 * math.log(2 * correlations.size) / values)
    return largest, expected, samples, math.exp(min(log_p, 0.0))
