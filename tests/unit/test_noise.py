"""The secure stream: the right distributions, and nothing that could repeat them."""

import os
import random

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.stats import kstest

from client.noise import SecureStream

SAMPLES = 400_000
SMALLEST_P = 1e-4
"""False alarm rate of one statistical test; with a handful of them a run fails once in thousands."""


def test_stream_is_aes_256_ctr_under_the_drawn_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = bytes(range(32))
    monkeypatch.setattr(os, "urandom", lambda n: key[:n])
    expected = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(100))
    stream = SecureStream()
    assert stream.bytes(64) + stream.bytes(36) == expected


def test_uniform_is_uniform_and_below_one() -> None:
    values = SecureStream().uniform(SAMPLES)
    assert values.dtype == np.float64
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert kstest(values, "uniform").pvalue > SMALLEST_P


def test_gaussian_is_standard_normal() -> None:
    values = SecureStream().gaussian(SAMPLES)
    assert values.dtype == np.float64
    assert kstest(values, "norm").pvalue > SMALLEST_P
    assert values.std() == pytest.approx(1.0, rel=0.01)
    assert abs(values.mean()) < 5 / np.sqrt(SAMPLES)
    assert abs(np.mean(values**4) - 3.0) < 0.1


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_any_length(n: int) -> None:
    stream = SecureStream()
    assert stream.bytes(n).__len__() == stream.uniform(n).size == stream.gaussian(n).size == n
    assert stream.coins(n, 0.5).shape == (n,)


def test_the_two_halves_and_two_streams_are_uncorrelated() -> None:
    first, second = SecureStream().gaussian(SAMPLES), SecureStream().gaussian(SAMPLES)
    bound = 5 / np.sqrt(SAMPLES)
    assert abs(np.corrcoef(first, second)[0, 1]) < bound
    half = SAMPLES // 2
    assert abs(np.corrcoef(first[:half], first[half:])[0, 1]) < 2 * bound
    assert abs(np.corrcoef(first[:half] ** 2, first[half:] ** 2)[0, 1]) < 2 * bound


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_extreme_words_stay_finite(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    stream = SecureStream()
    monkeypatch.setattr(stream, "bytes", lambda n: word.to_bytes(8, "little") * (n // 8))
    assert np.all(np.isfinite(stream.gaussian(4)))
    assert stream.uniform(1)[0] < 1.0
    assert np.abs(stream.gaussian(4)).max() < 8.6


def test_coins_have_the_probability_and_the_ends_are_certain() -> None:
    stream = SecureStream()
    mask = stream.coins(SAMPLES, 0.3)
    assert mask.dtype == np.bool_
    assert abs(mask.mean() - 0.3) < 5 * np.sqrt(0.21 / SAMPLES)
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
