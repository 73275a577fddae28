"""The scattering transform equals a slow one written from its definition, and has its known properties."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.inputs import SCATTERING_GROUPS, scattering_features
from tasks.scattering import CHANNELS, feature_shape, low_pass, scatter, wavelets

Image = NDArray[Any]
RNG = np.random.default_rng(5)


def gaussian_sum(
    omega: tuple[float, float], angle: float, frequency: float, sigma: tuple[float, float]
) -> float:
    """Continuous Fourier transform of a modulated Gaussian, summed over the aliases of unit sampling."""
    total = 0.0
    for m, n in itertools.product(range(-3, 4), repeat=2):
        y, x = omega[0] + 2 * math.pi * m, omega[1] + 2 * math.pi * n
        along = y * math.cos(angle) + x * math.sin(angle) - frequency
        across = x * math.cos(angle) - y * math.sin(angle)
        total += math.exp(-((sigma[0] * along) ** 2 + (sigma[1] * across) ** 2) / 2)
    return total


def morlet_spectrum(scale: int, index: int, omega: tuple[float, float]) -> float:
    """Closed form of a wavelet's spectrum at one frequency, by Poisson summation."""
    angle = (3 - index) * math.pi / 8
    sigma = (0.8 * 2**scale, 0.8 * 2**scale / 0.5)
    frequency = 0.75 * math.pi / 2**scale
    ratio = gaussian_sum((0, 0), angle, frequency, sigma) / gaussian_sum((0, 0), angle, 0, sigma)
    return gaussian_sum(omega, angle, frequency, sigma) - ratio * gaussian_sum(omega, angle, 0, sigma)


def closed_spectra(size: int) -> tuple[Image, Image]:
    bank, average = np.empty((2, 8, size, size)), np.empty((size, size))
    for row, column in itertools.product(range(size), repeat=2):
        omega = (2 * math.pi * row / size, 2 * math.pi * column / size)
        average[row, column] = gaussian_sum(omega, 0.0, 0.0, (1.6, 1.6))
        for scale, index in itertools.product(range(2), range(8)):
            bank[scale, index, row, column] = morlet_spectrum(scale, index, omega)
    return bank, average / average[0, 0]


def kernel(spectrum: Image) -> Image:
    """Inverse Fourier transform, written out."""
    size = len(spectrum)
    wave = np.exp(2j * np.pi * np.outer(np.arange(size), np.arange(size)) / size)
    result: Image = wave @ spectrum @ wave / size**2
    return result


def convolve(image: Image, spectrum: Image) -> Image:
    """Circular convolution, written out as a sum over shifts."""
    result = np.zeros(image.shape, dtype=np.complex128)
    for (row, column), weight in np.ndenumerate(kernel(spectrum)):
        result += weight * np.roll(image, (row, column), axis=(0, 1))
    return result


def slow_scattering(image: Image) -> Image:
    """Order 2, J = 2, L = 8, straight from the definition, in float64."""
    padded = np.pad(image, 4, mode="reflect")
    size = len(padded)
    bank, average = closed_spectra(size)
    low = np.r_[0 : size // 4, size - size // 4 : size]
    half_average = average[np.ix_(low, low)]

    def averaged(plane: Image) -> Image:
        full = len(plane) == size
        smooth = convolve(plane, average if full else half_average).real
        step = 4 if full else 2
        return smooth[::step, ::step][1:-1, 1:-1]

    first = [abs(convolve(padded, spectrum)) for spectrum in bank[0]]
    coarse = [abs(convolve(padded, spectrum))[::2, ::2] for spectrum in bank[1]]
    second = [abs(convolve(plane, spectrum))[::2, ::2] for plane in first for spectrum in bank[1]]
    return np.stack([averaged(plane) for plane in [padded, *first, *coarse, *second]])


def test_it_equals_a_slow_transform_from_the_definition() -> None:
    image = RNG.uniform(0, 1, (8, 8))
    expected = slow_scattering(image)
    assert expected.shape == feature_shape(8, 8) == (81, 2, 2)
    got = scatter(image[None].astype(np.float32))[0]
    np.testing.assert_allclose(got, expected, atol=2e-7)


def test_wavelets_have_their_closed_form_spectrum() -> None:
    bank = wavelets(36, 36)
    for scale, index, row, column in [(0, 0, 13, 2), (0, 5, 3, 30), (1, 2, 6, 3), (1, 7, 1, 35)]:
        omega = (2 * math.pi * row / 36, 2 * math.pi * column / 36)
        assert bank[scale, index, row, column] == pytest.approx(
            morlet_spectrum(scale, index, omega), abs=1e-12
        )


def test_wavelets_ignore_constants_and_the_average_keeps_them() -> None:
    assert np.abs(wavelets(36, 36)[:, :, 0, 0]).max() < 1e-12
    assert low_pass(36, 36)[0, 0] == 1.0
    assert np.fft.ifft2(low_pass(36, 36)).real.sum() == pytest.approx(1.0)
    flat = scatter(np.full((1, 28, 28), 0.7, dtype=np.float32))[0]
    np.testing.assert_allclose(flat[0], 0.7, atol=1e-6)
    assert np.abs(flat[1:]).max() < 1e-6


def test_the_filters_do_not_add_energy() -> None:
    def mirrored(spectrum: Image) -> Image:
        return np.roll(spectrum[::-1, ::-1], (1, 1), axis=(0, 1))

    bank = wavelets(36, 36).reshape(16, 36, 36)
    energy = low_pass(36, 36) ** 2 + sum((one**2 + mirrored(one) ** 2) / 2 for one in bank)
    assert energy.max() <= 1 + 1e-9
    assert energy.min() > 0.1


def test_a_shift_by_four_pixels_shifts_the_features_by_one() -> None:
    image = np.zeros((28, 28), dtype=np.float32)
    image[9:17, 10:18] = RNG.uniform(0, 1, (8, 8))
    plain, shifted = scatter(np.stack([image, np.roll(image, (4, -4), axis=(0, 1))]))
    np.testing.assert_allclose(shifted[:, 1:, :-1], plain[:, :-1, 1:], atol=1e-6)
    assert np.abs(shifted - plain).max() > 0.01


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1.0))
def test_it_does_not_enlarge_differences(seed: int, distance: float) -> None:
    rng = np.random.default_rng(seed)
    first = rng.uniform(0, 1, (28, 28))
    pair = np.stack([first, first + distance * rng.uniform(-1, 1, (28, 28))])
    features = scatter(pair.astype(np.float32))
    padded = np.pad(pair, ((0, 0), (4, 4), (4, 4)), mode="reflect")
    # one of 16 pixels is kept, so that each stands for 16
    moved = 16 * float(np.sum((features[0] - features[1]).astype(np.float64) ** 2))
    assert moved <= float(np.sum((padded[0] - padded[1]) ** 2)) * (1 + 1e-4)


def test_features_of_an_image_do_not_depend_on_the_others() -> None:
    x = RNG.integers(0, 256, (21, 12, 16)).astype(np.uint8)
    others = RNG.integers(0, 256, x.shape).astype(np.uint8)
    for row in (0, 15, 16, 20):
        changed = others.copy()
        changed[row] = x[row]
        np.testing.assert_array_equal(
            scattering_features(changed, 0, 255)[row], scattering_features(x, 0, 255)[row]
        )


def test_features_are_normalized_by_groups_of_one_image() -> None:
    x = RNG.uniform(0, 1, (3, 28, 28)).astype(np.float32)
    groups = scattering_features(x, 0.0, 1.0).reshape(3, SCATTERING_GROUPS, -1)
    assert groups.shape[2] == CHANNELS // SCATTERING_GROUPS * 49
    np.testing.assert_allclose(groups.mean(axis=2), 0, atol=1e-5)
    assert groups.var(axis=2).max() <= 1 + 1e-4
    black = scattering_features(np.zeros((1, 28, 28), dtype=np.uint8), 0, 255)
    assert np.isfinite(black).all()
    assert scattering_features(x[:0], 0.0, 1.0).shape == (0, 3969)
