"""Pairwise masks over packed slots.

Every pair of owners of a round's list shares a stream of integers modulo t. The owner with the lower
fingerprint adds it, the other subtracts it, so that the masks cancel in the sum over exactly that list
and in no other. Slots are integers modulo t and a mask is uniform on them, so one masked frame carries
no information about its owner's update, even for a holder of the encryption key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

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
    for _ in range(steps):
        chain_key = hashlib.sha256(b"fedseal/ratchet/1\0" + chain_key).digest()
    return chain_key


def mask_stream(chain_key: bytes, context: MaskContext, count: int) -> NDArray[np.uint64]:
    """Return `count` integers, each exactly uniform in [0, t).

    AES-256-CTR under an HKDF-SHA256 key gives 8-byte little-endian words; a word keeps its lowest
    ``ceil(log2 t)`` bits and is skipped when the result is not below t.

    Args:
        chain_key: The pair's chain key of this attempt, 32 bytes.
        context: What the stream is bound to.
        count: Number of integers.

    Returns:
        uint64 (count,).
    """
    key = HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=context.info()).derive(chain_key)
    keystream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    keep = np.uint64((1 << (context.plain_modulus - 1).bit_length()) - 1)
    taken: list[NDArray[np.uint64]] = []
    missing = count
    while missing > 0:
        words = np.frombuffer(keystream.update(bytes(8 * (missing + 16))), dtype="<u8") & keep
        accepted = words[words < context.plain_modulus][:missing].astype(np.uint64)
        taken.append(accepted)
        missing -= accepted.size
    return np.concatenate(taken) if taken else np.zeros(0, dtype=np.uint64)


def apply_masks(
    slots: NDArray[np.uint64],
    own: str,
    chain_keys: Mapping[str, bytes],
    context: MaskContext,
) -> NDArray[np.uint64]:
    """Add this owner's masks for one round's list.

    Args:
        slots: uint64 (frames, slots), each below t.
        own: This owner's fingerprint.
        chain_keys: Chain key of this attempt for every *other* owner of the list, by fingerprint.
        context: What the streams are bound to.

    Returns:
        uint64 (frames, slots), each below t. All slots are masked, padding and check slots included.
    """
    modulus = np.uint64(context.plain_modulus)
    masked = slots.reshape(-1).copy()
    for peer, chain_key in chain_keys.items():
        stream = mask_stream(chain_key, context, masked.size)
        masked = (masked + (stream if own < peer else modulus - stream)) % modulus
    return masked.reshape(slots.shape)
