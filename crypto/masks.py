"""Pairwise masks over packed slots.

Every pair of owners of a round's list shares a stream of integers modulo t. The owner with the lower
fingerprint adds it, the other subtracts it, so that the masks cancel in the sum over exactly that list
and in no other. Slots are integers modulo t and a mask is uniform on them, so one masked frame carries
no information about its owner's update, even for a holder of the encryption key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from protocol.encoding import encode

KEY_BYTES = 32


@dataclass(frozen=True)
class MaskContext:
    """What a mask stream is bound to; two different contexts give independent streams."""

    session: str
    attempt: int
    purpose: str
    list_hash: str
    model_hash: str
    plain_modulus: int

    def info(self) -> bytes:
        """Return the canonical bytes that enter the key derivation."""
        return b"fedseal/mask/1\0" + encode(
            {
                "session": self.session,
                "attempt": self.attempt,
                "purpose": self.purpose,
                "list_hash": self.list_hash,
                "model_hash": self.model_hash,
                "plain_modulus": str(self.plain_modulus),
            }
        )


def first_chain_key(pair_seed: bytes) -> bytes:
    """Return the chain key of attempt 0."""
    return hashlib.sha256(b"fedseal/chain/1\0" + pair_seed).digest()


def advance(chain_key: bytes, steps: int) -> bytes:
    """Ratchet a chain key forward by `steps` attempts; there is no way back.

    A disk that is stolen after an attempt therefore does not hold that attempt's masks.
    """
    if steps < 0:
        raise ValueError("a chain key cannot be turned back")
    for _ in range(steps):
        chain_key = hashlib.sha256(b"fedseal/ratchet/1\0" + chain_key).digest()
    return chain_key


class MaskStream:
    """The integers that two owners share for one context, each exactly uniform in [0, t).

    AES-256-CTR under an HKDF-SHA256 key gives 8-byte little-endian words; a word keeps its lowest
    ``ceil(log2 t)`` bits and is skipped when the result is not below t. The integers do not depend on
    how many are taken at a time.

    Args:
        chain_key: The pair's chain key of this attempt, 32 bytes.
        context: What the stream is bound to.
    """

    def __init__(self, chain_key: bytes, context: MaskContext) -> None:
        key = HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=context.info()).derive(chain_key)
        self._keystream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._modulus = context.plain_modulus
        self._keep = np.uint64((1 << (context.plain_modulus - 1).bit_length()) - 1)
        self._ready = np.zeros(0, dtype=np.uint64)

    def take(self, count: int) -> NDArray[np.uint64]:
        """Return the next `count` integers, uint64 (count,)."""
        while self._ready.size < count:
            data = self._keystream.update(bytes(8 * (count - self._ready.size + 16)))
            words = np.frombuffer(data, dtype="<u8") & self._keep
            self._ready = np.concatenate([self._ready, words[words < self._modulus].astype(np.uint64)])
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken


def mask_stream(chain_key: bytes, context: MaskContext, count: int) -> NDArray[np.uint64]:
    """Return the first `count` integers of a `MaskStream`."""
    return MaskStream(chain_key, context).take(count)


class Masks:
    """One owner's masks for one round's list, given out frame by frame.

    Args:
        own: This owner's fingerprint.
        chain_keys: Chain key of this attempt for every peer that this owner masks with.
        context: What the streams are bound to.
    """

    def __init__(self, own: str, chain_keys: Mapping[str, bytes], context: MaskContext) -> None:
        self._modulus = np.uint64(context.plain_modulus)
        self._streams = [(own < peer, MaskStream(key, context)) for peer, key in chain_keys.items()]

    def apply(self, slots: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Mask the next slots: plus where this owner's fingerprint is lower, minus where it is higher.

        Args:
            slots: uint64 (n,), each below t. Check slots and padding are masked like all others.

        Returns:
            uint64 (n,), each below t.
        """
        masked = slots
        for adds, stream in self._streams:
            mask = stream.take(slots.size)
            raised = masked + (mask if adds else self._modulus - mask)
            # below 2t; where t was not reached the difference wraps around and the smaller one is kept
            masked = np.minimum(raised, raised - self._modulus)
        return masked


class ResidueMasks:
    """Masks for CKKS frames: uniform residues, added to the ciphertext instead of to its slots.

    A CKKS slot is no integer modulo t, so masks cannot stand below the encryption. Adding a uniform ring
    element to one half of the ciphertext hides what it encrypts in the same way, also from a holder of
    the key, and cancels in the sum of exactly the list's ciphertexts.

    Args:
        own: This owner's fingerprint.
        chain_keys: Chain key of this attempt for every peer that this owner masks with.
        context: What the streams are bound to; its modulus is replaced by each prime.
        moduli: Primes of the ciphertext.
    """

    def __init__(
        self, own: str, chain_keys: Mapping[str, bytes], context: MaskContext, moduli: Sequence[int]
    ) -> None:
        self._rows = [Masks(own, chain_keys, replace(context, plain_modulus=prime)) for prime in moduli]

    def apply(self, residues: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Mask the next frame's residues, uint64 (primes * degree,), prime by prime."""
        rows = residues.reshape(len(self._rows), -1)
        return np.concatenate([masks.apply(row) for masks, row in zip(self._rows, rows, strict=True)])


def apply_masks(
    slots: NDArray[np.uint64],
    own: str,
    chain_keys: Mapping[str, bytes],
    context: MaskContext,
) -> NDArray[np.uint64]:
    """Mask all frames of an update at once, uint64 (frames, slots); see `Masks`."""
    return Masks(own, chain_keys, context).apply(slots.reshape(-1)).reshape(slots.shape)
