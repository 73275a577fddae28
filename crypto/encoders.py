"""From slots to SEAL's plaintexts and back, for both schemes.

BFV's slots are integers modulo t, exactly. CKKS's slots are real numbers with an error. Everything that is
encoded here is an integer, and the error of a sum is far below a quarter (`crypto.presets`), so rounding
gives the integers back. Only rounded integers ever leave this module: the error of a CKKS decryption tells
about the key (Li and Micciancio 2021), and an owner must not release it.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from crypto.frames import SealContext
from crypto.presets import CKKS_SCALE_BITS
from protocol.errors import OpeningRefused

CKKS_TOLERANCE: Final = 0.25
"""Largest accepted distance of an opened CKKS slot from an integer."""


class Encoder(Protocol):
    """Puts the integers of one frame's slots into a plaintext."""

    def encode(self, slots: NDArray[np.uint64]) -> seal.Plaintext:
        """Return the plaintext of uint64 (slots,)."""

    def decode(self, plaintext: seal.Plaintext) -> NDArray[np.uint64]:
        """Return the integers of a plaintext, uint64 (slots,)."""


class BatchEncoder:
    """BFV: integers modulo t."""

    def __init__(self, context: SealContext) -> None:
        self._encoder = seal.BatchEncoder(context.seal)

    def encode(self, slots: NDArray[np.uint64]) -> seal.Plaintext:
        """Return the plaintext of uint64 (slots,), each below t."""
        plaintext = seal.Plaintext()
        self._encoder.encode(slots.tolist(), plaintext)
        return plaintext

    def decode(self, plaintext: seal.Plaintext) -> NDArray[np.uint64]:
        """Return the integers of a plaintext, uint64 (slots,)."""
        return np.array(self._encoder.decode_uint64(plaintext), dtype=np.uint64)


class RoundingEncoder:
    """CKKS: integers as real numbers, rounded when they are decoded."""

    def __init__(self, context: SealContext) -> None:
        self._encoder = seal.CKKSEncoder(context.seal)

    def encode(self, slots: NDArray[np.uint64]) -> seal.Plaintext:
        """Return the plaintext of uint64 (slots,), each below 2**31."""
        plaintext = seal.Plaintext()
        self._encoder.encode(slots.astype(np.float64).tolist(), 2.0**CKKS_SCALE_BITS, plaintext)
        return plaintext

    def decode(self, plaintext: seal.Plaintext) -> NDArray[np.uint64]:
        """Return the rounded integers of a plaintext, uint64 (slots,).

        Raises:
            OpeningRefused: A slot is not close to an integer that a sum can have; masks that do not cancel
                and foreign keys end here.
        """
        values = np.array(self._encoder.decode_double(plaintext))
        rounded = np.rint(values)
        close = np.abs(values - rounded) < CKKS_TOLERANCE
        if not bool(np.all(close & (rounded >= 0) & (rounded < 2.0**32))):
            raise OpeningRefused("a slot does not open to an integer")
        integers: NDArray[np.uint64] = rounded.astype(np.uint64)
        return integers


def encoder_for(context: SealContext) -> Encoder:
    """Return the encoder of a context's scheme."""
    if context.packing.preset.scheme == "CKKS":
        return RoundingEncoder(context)
    return BatchEncoder(context)
