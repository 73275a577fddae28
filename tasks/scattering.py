"""The scattering transform of a grey image: fixed wavelets, no weights, nothing learned.

A cascade of wavelet transforms and moduli, averaged by a low-pass filter (Mallat 2012; Bruna & Mallat
2013, 'Invariant Scattering Convolution Networks'), here of order 2 with two scales (J = 2) and eight
orientations (L = 8). A linear model on these features is the strongest known start for differentially
private learning on small images: no privacy is spent on the features (Tramer & Boneh 2021,
'Differentially Private Learning Needs Better Features').

Guarantee: the features of an image are a function of that image alone. The filters have an upper frame
bound of 1, so that the transform, up to its subsampling, does not enlarge differences of images.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray

SCALES = 2
ORIENTATIONS = 8
CHANNELS = 1 + SCALES * ORIENTATIONS + ORIENTATIONS**2
STRIDE = 2**SCALES
SMALLEST_SIDE = 8

_MARGIN = STRIDE
_BANDWIDTH = 0.8
_FREQUENCY = 0.75 * math.pi
_SLANT = 4.0 / ORIENTATIONS
_WRAPS = 2
_BLOCK = 16
"""Images per block: 64 complex planes of each fit into a core's cache."""


def feature_shape(height: int, width: int) -> tuple[int, int, int]:
    """Return the shape of an image's features: 81 channels, a quarter of the height, of the width."""
    return CHANNELS, height // STRIDE, width // STRIDE


def scatter(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the scattering coefficients of images, each by itself.

    Images are extended by reflection, 4 pixels on each side, before the circular convolutions.

    Args:
        images: float32, shape (n, height, width); both sides multiples of 4 and at least 8.

    Returns:
        float32, shape (n, 81, height / 4, width / 4): the average, then 16 channels of order 1 (scale by
        scale, orientation by orientation), then 64 of order 2 (first orientation by second).
    """
    _, height, width = images.shape
    result = np.empty((len(images), *feature_shape(height, width)), dtype=np.float32)
    for start in range(0, len(images), _BLOCK):
        block = torch.from_numpy(images[start : start + _BLOCK])
        result[start : start + _BLOCK] = _scatter_block(block).numpy()
    return result


def wavelets(height: int, width: int) -> NDArray[np.float64]:
    """Return the Morlet wavelets in the frequency domain, real, shape (2, 8, height, width).

    A Morlet wavelet is a plane wave under a Gaussian envelope, less as much of the envelope as makes its
    mean zero. Scale j has the frequency (3/4) pi / 2^j and an envelope of deviation 0.8 * 2^j, twice as
    long across the wave as along it. Orientation l has the angle (3 - l) pi / 8.
    """
    bank = np.empty((SCALES, ORIENTATIONS, height, width))
    for scale in range(SCALES):
        for index in range(ORIENTATIONS):
            angle = (ORIENTATIONS // 2 - 1 - index) * math.pi / ORIENTATIONS
            shape, sigma = (height, width), _BANDWIDTH * 2**scale
            wave = _gabor(shape, sigma, angle, _FREQUENCY / 2**scale, _SLANT)
            envelope = _gabor(shape, sigma, angle, 0.0, _SLANT)
            morlet = wave - wave.sum() / envelope.sum() * envelope
            bank[scale, index] = np.fft.fft2(morlet).real
    return bank


def low_pass(height: int, width: int) -> NDArray[np.float64]:
    """Return the averaging Gaussian in the frequency domain, real, shape (height, width); 1 at zero."""
    sigma = _BANDWIDTH * 2 ** (SCALES - 1)
    spectrum: NDArray[np.float64] = np.fft.fft2(_gabor((height, width), sigma, 0.0, 0.0, 1.0)).real
    spectrum /= spectrum[0, 0]
    return spectrum


def _gabor(
    shape: tuple[int, int], sigma: float, angle: float, frequency: float, slant: float
) -> NDArray[np.complex128]:
    """Return a plane wave under a Gaussian of about unit sum, wrapped around the edges."""
    rows, columns = (np.arange(-_WRAPS * side, (_WRAPS + 1) * side) for side in shape)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    along = y * np.cos(angle) + x * np.sin(angle)
    across = x * np.cos(angle) - y * np.sin(angle)
    wave = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2) + 1j * frequency * along)
    copies = 2 * _WRAPS + 1
    wrapped: NDArray[np.complex128] = wave.reshape(copies, shape[0], copies, shape[1]).sum(axis=(0, 2))
    return wrapped * slant / (2 * np.pi * sigma**2)


class _Filters:
    """The filters for one padded size, as float32 tensors.

    Attributes:
        wavelets: Spectra, by scale, each (8, height, width).
        averages: For full and for half resolution, the pair of matrices (rows, columns) that average,
            keep every 4th pixel of the full resolution, and cut the margin off.
    """

    def __init__(self, height: int, width: int) -> None:
        self.wavelets = torch.from_numpy(wavelets(height, width)).float()
        self.averages = [
            (_average(height, resolution), _average(width, resolution)) for resolution in (1, 2)
        ]


@functools.cache
def _filters(height: int, width: int) -> _Filters:
    return _Filters(height, width)


def _average(side: int, step: int) -> torch.Tensor:
    """Return the matrix that averages one axis of a signal that was subsampled by `step`.

    The Gaussian is a product over the axes. At half resolution its spectrum is cut at the new band's edge.
    """
    spectrum, fine = low_pass(side, side)[0], side // step
    kept = np.r_[0 : fine // 2, side - fine // 2 : side]
    response = np.fft.fft(np.eye(fine), axis=0) * spectrum[kept, None]
    smooth = np.fft.ifft(response, axis=0).real
    rows = smooth[_MARGIN // step : (side - _MARGIN) // step : STRIDE // step]
    return torch.from_numpy(rows).float()


def _scatter_block(images: torch.Tensor) -> torch.Tensor:
    margin = (_MARGIN,) * 4
    padded = torch.nn.functional.pad(images[:, None], margin, mode="reflect")
    filters = _filters(*padded.shape[2:])
    fine, coarse = filters.wavelets
    spectrum = torch.fft.fft2(padded)
    first = torch.fft.ifft2(_times(spectrum, fine)).abs()
    first_coarse = torch.fft.ifft2(_folded(_times(spectrum, coarse))).abs()
    second = torch.fft.ifft2(_folded(_times(torch.fft.fft2(first)[:, :, None], coarse))).abs()
    return torch.cat(
        [
            _averaged(padded, filters.averages[0]),
            _averaged(first, filters.averages[0]),
            _averaged(first_coarse, filters.averages[1]),
            _averaged(second, filters.averages[1]).flatten(1, 2),
        ],
        dim=1,
    )


def _times(spectrum: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    # A product of complex and real tensors would turn the real one into a complex one first.
    return torch.view_as_complex(torch.view_as_real(spectrum) * real[..., None])


def _folded(spectrum: torch.Tensor) -> torch.Tensor:
    """Return the spectrum of every second pixel of both axes: the mean of its four quarters."""
    *leading, height, width = spectrum.shape
    quarters = spectrum.view(*leading, 2, height // 2, 2, width // 2)
    return (quarters[..., 0, :, :, :] + quarters[..., 1, :, :, :]).sum(dim=-2) / 4


def _averaged(planes: torch.Tensor, matrices: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    rows, columns = matrices
    return rows @ planes @ columns.T
