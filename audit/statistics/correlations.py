"""Largest correlations in noise that should have none, with the probability of larger ones.

Each function returns a statistic, what it is expected to be, the number of values that it rests on, and a
p value. A correlation of n independent normal values has a deviation of 1 / sqrt(n); the largest of many
is judged by Bonferroni's correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Values = NDArray[np.floating[Any]]
Figures = tuple[float, float, int, float]
Sums = tuple[Floats, Floats]
"""Sums of products, and how many products are in each."""

WINDOW = 2**21
"""Values of a row whose correlations are computed at every shift."""


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


def repeats(rows: Values) -> Figures:
    """Return the largest correlation of all rows with themselves, at every shift within a row.

    Args:
        rows: Standard normal and independent if nothing is wrong, (rows, width). Of more than `WINDOW`
            values, all shifts are tried in the first ones, and larger ones in sums of neighbours.
    """
    return _judged(_shifted(rows), rows.size)


def anywhere(rows: Values) -> Figures:
    """Return the largest correlation of two rows at equal places, and of all rows laid end to end.

    Laid end to end, all pairs of rows are compared at every shift too.

    Args:
        rows: As for `repeats`.
    """
    # each sum by itself in float32 is exact enough: its rounding is far below its deviation
    products = (rows @ rows.T)[np.triu_indices(len(rows), k=1)].astype(np.float64)
    pairs = products, np.full(products.size, float(rows.shape[1]))
    return _judged([pairs, *_shifted(rows.reshape(1, -1))], rows.size)


def _shifted(rows: Values) -> list[Sums]:
    """Return sums of products at each shift, and of how many: of the window and, beyond it, of all."""
    width = rows.shape[1]
    if width <= WINDOW:
        return [_at_shifts(rows)]
    size = math.ceil(width / WINDOW)
    whole = rows[:, : width - width % size].reshape(len(rows), -1, size)
    # sums of independent neighbours are as independent, and a shift of many values is one of fewer sums
    return [_at_shifts(rows[:, :WINDOW]), _at_shifts(whole.sum(axis=2) / math.sqrt(size))]


def _at_shifts(rows: Values) -> Sums:
    from scipy.fft import irfft, next_fast_len, rfft

    width = rows.shape[1]
    length = next_fast_len(2 * width, real=True)
    spectrum = np.zeros(length // 2 + 1)
    for row in rows:
        spectrum += np.square(np.abs(rfft(row.astype(np.float64), length)))
    shifts = np.arange(1, width)
    return irfft(spectrum, length)[shifts], len(rows) * (width - shifts).astype(np.float64)


def _judged(parts: Sequence[Sums], samples: int) -> Figures:
    """Return the least likely of many sums of products, by a bound that holds for few products too."""
    sums, counts = (np.concatenate(values) for values in zip(*parts, strict=True))
    if not sums.size:
        return 0.0, 0.0, samples, 1.0
    log_p = _log_tail(np.abs(sums), counts)
    least = int(np.argmin(log_p))
    tries = math.log(2 * sums.size)
    expected = math.sqrt(2 * tries / counts[least])
    return (
        float(abs(sums[least]) / counts[least]),
        expected,
        samples,
        math.exp(min(0.0, tries + log_p[least])),
    )


def _log_tail(sums: Floats, counts: Floats) -> Floats:
    """Bound the logarithm of the probability that a sum of n products x_i x_(i + shift) is at least s.

    Chernoff: the moment generating function at t is the product of (1 - t^2 m^2)^(-1/2) over the positive
    eigenvalues m of the graph of the pairs, whose squares add up to n and which are at most 2. So its
    logarithm is at most -n/8 log(1 - 4 t^2), and u = 2 t solves u / (1 - u^2) = 2 s / n.
    """
    ratio = 2.0 * sums / counts
    u = 2.0 * ratio / (1.0 + np.sqrt(1.0 + 4.0 * np.square(ratio)))
    return np.asarray(-(sums * u / 2.0 + counts / 8.0 * np.log1p(-np.square(u))))


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
