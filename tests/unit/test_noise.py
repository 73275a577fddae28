"""The secure stream: the right distributions, and nothing that could repeat them.

Every statistical test states its false alarm rate and finds an error of 1 % in the deviation; that it
does is tested too, on values that have the error.
"""

import itertools
import os
import random

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import binom, chi2, kstest

import client.noise
from client.noise import SecureStream

SAMPLES = 4_000_000
SMALLEST_P = 1e-6
"""False alarm rate of one statistical test; all of this file together: about one run in 10,000."""
SIGMAS = 5.0
"""The same for a normal statistic: 6e-7 on both sides together."""


def deviation_is_one(values: NDArray[np.float64]) -> bool:
    """An estimate of the deviation from n values has the deviation 1/sqrt(2n): 0.00035 for 4 million."""
    return bool(abs(values.std() - 1.0) < SIGMAS / np.sqrt(2 * values.size))


def mean_is_zero(values: NDArray[np.float64]) -> bool:
    return bool(abs(values.mean()) < SIGMAS / np.sqrt(values.size))


def distribution_is_normal(values: NDArray[np.float64]) -> bool:
    """Kolmogorov, Smirnov: 1 % in the deviation moves the distribution by 0.0024; the bound is 0.0014."""
    ranks = ndtr(np.sort(values))
    steps = np.arange(values.size + 1) / values.size
    distance = max(float(np.max(ranks - steps[:-1])), float(np.max(steps[1:] - ranks)))
    return distance < np.sqrt(np.log(2 / SMALLEST_P) / (2 * values.size))


def uncorrelated(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    return bool(abs(np.corrcoef(first, second)[0, 1]) < SIGMAS / np.sqrt(first.size))


@pytest.fixture(scope="module")
def gaussian() -> NDArray[np.float64]:
    return SecureStream().gaussian(SAMPLES)


def test_stream_is_aes_256_ctr_under_the_drawn_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = bytes(range(32))
    monkeypatch.setattr(os, "urandom", lambda n: key[:n])
    expected = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(100))
    stream = SecureStream()
    assert stream.bytes(64) + stream.bytes(36) == expected


def test_uniform_is_uniform_and_below_one() -> None:
    values = SecureStream().uniform(SAMPLES // 10)
    assert values.dtype == np.float64
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert kstest(values, "uniform").pvalue > SMALLEST_P


def test_gaussian_is_standard_normal(gaussian: NDArray[np.float64]) -> None:
    assert gaussian.dtype == np.float64
    assert deviation_is_one(gaussian)
    assert mean_is_zero(gaussian)
    assert distribution_is_normal(gaussian)
    for power, moment, variance in ((3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        assert abs(np.mean(gaussian**power) - moment) < SIGMAS * np.sqrt(variance / SAMPLES)


def test_tails_are_as_heavy_as_they_must_be(gaussian: NDArray[np.float64]) -> None:
    for bound in (2.0, 3.0, 4.0, 4.5):
        for beyond in (int(np.sum(gaussian > bound)), int(np.sum(gaussian < -bound))):
            tail = binom(SAMPLES, ndtr(-bound))
            assert tail.ppf(SMALLEST_P / 2) <= beyond <= tail.isf(SMALLEST_P / 2)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_tests_find_an_error_of_one_percent(factor: float, gaussian: NDArray[np.float64]) -> None:
    assert not deviation_is_one(factor * gaussian)
    assert not distribution_is_normal(factor * gaussian)
    assert not mean_is_zero(gaussian + 0.01)


def test_no_value_depends_on_another_at_a_distance(gaussian: NDArray[np.float64]) -> None:
    """Neighbours, the two values of one pair, and the same place in the next block, in sign and size."""
    pairs = client.noise._PAIRS
    for lag in (1, 2, 3, 4, 7, 8, 16, 64, pairs - 1, pairs, pairs + 1, 2 * pairs - 1, 2 * pairs, 4 * pairs):
        assert uncorrelated(gaussian[:-lag], gaussian[lag:]), lag
        assert uncorrelated(np.abs(gaussian[:-lag]), np.abs(gaussian[lag:])), lag


def test_owners_have_independent_noise() -> None:
    """28 pairs of owners, in sign and size; a common part of 2 % of the variance does not go unseen."""
    owners = [SecureStream().gaussian(SAMPLES // 8) for _ in range(8)]
    for first, second in itertools.combinations(owners, 2):
        assert uncorrelated(first, second)
        assert uncorrelated(np.abs(first), np.abs(second))
    common = np.sqrt(0.02) * SecureStream().gaussian(SAMPLES // 8)
    assert not uncorrelated(owners[0] + common, owners[1] + common)


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_any_length(n: int) -> None:
    stream = SecureStream()
    assert stream.bytes(n).__len__() == stream.uniform(n).size == stream.gaussian(n).size == n
    assert stream.coins(n, 0.5).shape == (n,)


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_extreme_words_stay_finite(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    stream = SecureStream()
    monkeypatch.setattr(stream, "bytes", lambda n: word.to_bytes(8, "little") * (n // 8))
    assert np.all(np.isfinite(stream.gaussian(4)))
    assert stream.uniform(1)[0] < 1.0
    assert np.abs(stream.gaussian(4)).max() < 8.6


def test_coins_are_independent_and_have_the_probability() -> None:
    """Batches of 400 records at four rates: mean, spread of batch sizes and of how often one is drawn."""
    for probability in (0.01, 0.1, 0.5, 0.9):
        batches = np.stack([SecureStream().coins(400, probability) for _ in range(2000)])
        assert batches.dtype == np.bool_
        variance = probability * (1 - probability)
        assert abs(batches.mean() - probability) < SIGMAS * np.sqrt(variance / batches.size)
        for axis in (0, 1):
            counts = batches.sum(axis=axis)
            n, drawn = batches.shape[axis], batches.shape[1 - axis]
            statistic = float(np.sum((counts - n * probability) ** 2) / (n * variance))
            assert chi2(drawn).ppf(SMALLEST_P) < statistic < chi2(drawn).isf(SMALLEST_P)


def test_the_ends_of_coins_are_certain() -> None:
    stream = SecureStream()
    assert stream.coins(1000, 1.0).all()
    assert not stream.coins(1000, 0.0).any()


def test_no_seed_of_a_library_has_any_influence() -> None:
    def draw() -> bytes:
        torch.manual_seed(42)
        np.random.seed(42)
        random.seed(42)
        return SecureStream().gaussian(8).tobytes()

    assert draw() != draw()


def test_drawing_does_not_touch_the_global_generators() -> None:
    before = torch.get_rng_state()
    SecureStream().gaussian(1000)
    assert torch.equal(before, torch.get_rng_state())
