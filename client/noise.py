"""Random bits that an attacker cannot repeat: Poisson coins and Gaussian noise from AES-256-CTR.

A seeded generator of a numerical library would do for statistics, but whoever learns its seed can
subtract the noise, and an experiment's seed is public. Here every stream has a key of its own, drawn
from the operating system, which never leaves the object.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray


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
        words = np.frombuffer(self.bytes(8 * n), dtype="<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussian(self, n: int) -> NDArray[np.float64]:
        """Return `n` standard normal values (Box & Muller 1958).

        The largest magnitude is sqrt(2 * 53 * ln 2) = 8.57, beyond which a normal value falls with a
        probability of 1e-17. Floating-point values are not exactly Gaussian (Mironov 2012): round the
        noisy result to a coarse grid before it is released, as the encryption does.
        """
        pairs = (n + 1) // 2
        # 1 - u lies in (0, 1], so that the logarithm is always finite.
        radius = np.sqrt(-2.0 * np.log(1.0 - self.uniform(pairs)))
        angle = 2.0 * np.pi * self.uniform(pairs)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]

    def coins(self, n: int, probability: float) -> NDArray[np.bool_]:
        """Return `n` independent coins that are true with `probability`, in [0, 1], to within 2^-53."""
        return self.uniform(n) < probability
