"""Random bits that an attacker cannot repeat: Poisson coins and Gaussian noise from AES-256-CTR.

A seeded generator of a numerical library would do for statistics, but whoever learns its seed can
subtract the noise, and an experiment's seed is public. Here every stream has a key of its own, drawn
from the operating system, which never leaves the object.
"""

from __future__ import annotations

import math
import os
from typing import final

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_PAIRS = 2**14
"""Gaussian pairs made at once, so that the intermediate values stay in the processor's cache."""
_MANTISSA, _ONE = np.int64(2**52 - 1), np.int64(0x3FF << 52)


@final
class SecureStream:
    """A stream of unpredictable numbers under a fresh key; make a new one for every DP-SGD step.

    The counter starts at zero, which is safe because no key is used twice. A process that forks must
    not use the stream in both halves: they would draw the same numbers.

    Guarantee: the output is indistinguishable from random under the assumption that AES-256 is a
    pseudorandom permutation and that the operating system's generator is sound.
    """

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16)))
        self._encryptor = cipher.encryptor()

    def bytes(self, n: int) -> bytes:
        """Return the next `n` bytes of the key stream."""
        return self._encryptor.update(b"\x00" * n)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Return `n` multiples of 2^-53, uniform in [0, 1)."""
        values = np.empty(n)
        for start in range(0, n, 2 * _PAIRS):
            block = values[start : start + 2 * _PAIRS]
            words = np.frombuffer(self.bytes(8 * len(block)), dtype="<u8")
            np.multiply(words >> np.uint64(11), 2.0**-53, out=block)
        return values

    def gaussian(self, n: int) -> NDArray[np.float64]:
        """Return `n` standard normal values (Box & Muller 1958).

        Radius and angle come from uniform values of 52 bits. The largest magnitude is
        sqrt(2 * 52 * ln 2) = 8.49, beyond which a normal value falls with a probability of 2e-17.
        Floating-point values are not exactly Gaussian (Mironov 2012): round the noisy result to a
        coarse grid before it is released, as the encryption does.
        """
        values = np.empty(n + n % 2)
        for start in range(0, len(values), 2 * _PAIRS):
            block = values[start : start + 2 * _PAIRS]
            _box_muller(self.bytes(8 * len(block)), block)
        return values[:n]

    def coins(self, n: int, probability: float) -> NDArray[np.bool_]:
        """Return `n` independent coins that are true with `probability`, in [0, 1], to within 2^-53.

        This is the Poisson sampler: each record of an owner is in a batch by a coin of its own.
        """
        return self.uniform(n) < probability


def _box_muller(key_stream: bytes, values: NDArray[np.float64]) -> None:
    """Fill an even number of values from 8 bytes of key stream each."""
    half = len(values) // 2
    words = np.frombuffer(bytearray(key_stream), dtype="<i8").astype(np.int64, copy=False)
    # The exponent of 1 before 52 random bits makes a double that is uniform in [1, 2).
    words &= _MANTISSA
    words |= _ONE
    doubles = words.view(np.float64)
    radius, angle = doubles[:half], doubles[half:]
    # 2 - u lies in (0, 1], so that the logarithm is always finite.
    np.subtract(2.0, radius, out=radius)
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle *= 2.0 * math.pi
    # torch has vector code for sine and cosine, numpy for the logarithm.
    turns = torch.from_numpy(angle)
    torch.cos(turns, out=torch.from_numpy(values[:half]))
    torch.sin(turns, out=torch.from_numpy(values[half:]))
    values[:half] *= radius
    values[half:] *= radius
