"""The secret side of the encryption: keys, encrypting, decrypting. Only owners may import this module.

The coordinator never loads it; a test starts a coordinator and checks. The key is shared by the owners
of one session and is of use to none of them alone, because every update is masked before it is
encrypted (see `crypto.masks`). No public, relinearization or Galois key is ever made.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from crypto.encoders import encoder_for
from crypto.frames import SealContext, SealFile, load_own_form, serialized
from crypto.measuring import expanded, key_layout
from protocol.errors import EncryptionUnavailable, FrameInvalid

_COMMITMENT_TAG: Final = b"fedseal/bfv-key/1\0"


class SealKey:
    """A secret key of one session.

    Who may call: owners only. Make one with `generate` (the dealer) or `from_dealt` (everyone else).
    """

    def __init__(self, context: SealContext, key: seal.SecretKey) -> None:
        self.context = context
        self._key = key
        self._encryptor = seal.Encryptor(context.seal, key)
        self._decryptor = seal.Decryptor(context.seal, key)
        self._encoder = encoder_for(context)
        self._file = SealFile()

    @classmethod
    def generate(cls, context: SealContext) -> SealKey:
        """Draw a fresh ternary key from the operating system's randomness."""
        return cls(context, seal.KeyGenerator(context.seal).secret_key())

    @classmethod
    def from_residues(cls, context: SealContext, data: bytes) -> SealKey:
        """Rebuild a key from the dealer's fixed-width residues; SEAL never parses the dealer's bytes.

        Raises:
            FrameInvalid: Wrong length, or a residue that is not below q.
        """
        words = context.residues(data, context.packing.preset.key_moduli)
        body = struct.pack("<4Q", *context.seal.key_parms_id())
        body += struct.pack("<Qd", words.size, 1.0)
        body += serialized(struct.pack("<Q", words.size) + words.astype("<u8").tobytes())
        file = SealFile()
        file.write(serialized(body))
        key = seal.SecretKey()
        key.load(context.seal, file.path)
        file.close()
        return cls(context, key)

    def residues(self) -> bytes:
        """Return the key as fixed-width residues. Only for `dealt`, and for published test vectors."""
        blob = self._own_form()
        preset = self.context.packing.preset
        count = preset.poly_modulus_degree * len(preset.key_moduli)
        words = np.frombuffer(blob[-8 * count :], dtype="<u8")
        return self.context.residue_bytes(words.astype(np.uint64), preset.key_moduli)

    @classmethod
    def from_dealt(cls, context: SealContext, data: bytes) -> SealKey:
        """Rebuild a key from what the dealer wrapped, or from what `dealt` gave earlier.

        Call it only on bytes that a verified signature covers.

        Raises:
            FrameInvalid: It is not the form that a key has here.
        """
        if _deals_residues(context):
            return cls.from_residues(context, data)
        key = load_own_form(seal.SecretKey(), context.seal, data, key_layout(context))
        if key.parms_id() != context.seal.key_parms_id():
            raise FrameInvalid("SEAL's own form holds a key of another kind")
        return cls(context, key)

    def dealt(self) -> bytes:
        """Return the key as the dealer wraps it and an owner's sealed state keeps it.

        Fixed-width residues; SEAL's own uncompressed form only where frames have that form too and the
        installed library does not take residues.
        """
        return self.residues() if _deals_residues(self.context) else self._own_form()

    def commitment(self) -> str:
        """Return the hash to which the dealer commits; the key has far more entropy than a hash."""
        return hashlib.sha256(_COMMITMENT_TAG + self.dealt()).hexdigest()

    def encrypt(self, slots: NDArray[np.uint64]) -> bytes:
        """Encrypt one frame's slots under fresh randomness.

        Args:
            slots: uint64 (slots,), each below the plain modulus.

        Returns:
            One frame of exactly `SealContext.frame_bytes` bytes.
        """
        plaintext = self._encoder.encode(slots)
        self._encryptor.encrypt_symmetric(plaintext).save(self._file.path)
        return self.context.frame(expanded(self._file.read()))

    def decrypt(self, total: seal.Ciphertext) -> NDArray[np.uint64]:
        """Decrypt a sum that this owner added itself; uint64 (slots,).

        Never call this on a ciphertext that another party made: a crafted one returns the key.
        """
        plaintext = seal.Plaintext()
        self._decryptor.decrypt(total, plaintext)
        return self._encoder.decode(plaintext)

    def open_sum(self, columns: Sequence[Sequence[bytes]]) -> NDArray[np.uint64]:
        """Add frames and decrypt the sums.

        Args:
            columns: For each frame position, the frames of all contributors.

        Returns:
            uint64 (frames, slots).
        """
        return np.stack([self.decrypt(self.context.total(frames)) for frames in columns])

    def _own_form(self) -> bytes:
        self._key.save(self._file.path)
        blob = expanded(self._file.read())
        self._file.write(b"")
        return blob


def _deals_residues(context: SealContext) -> bool:
    """Return whether keys travel as residues: always, unless frames are SEAL's own and residues fail."""
    if context.packed:
        return True
    key = SealKey(context, seal.KeyGenerator(context.seal).secret_key())
    slots = np.arange(context.packing.preset.slots, dtype=np.uint64)
    try:
        copy = SealKey.from_residues(context, key.residues())
        return np.array_equal(copy.open_sum([[key.encrypt(slots)]])[0], slots)
    except (ValueError, RuntimeError, FrameInvalid):
        return False


def self_test(context: SealContext) -> None:
    """Check the frame format of a plan against the installed library, with a throw-away key.

    Raises:
        EncryptionUnavailable: A frame made here does not decrypt to what went in, two frames do not add,
            or a key does not survive the form in which it is dealt.
    """
    modulus = context.packing.plain_modulus
    largest = modulus if context.packing.preset.scheme == "BFV" else modulus // 2
    slots = np.arange(context.packing.preset.slots, dtype=np.uint64) * np.uint64(2654435761)
    slots %= np.uint64(largest)
    try:
        key = SealKey.generate(context)
        copy = SealKey.from_dealt(context, key.dealt())
        opened = copy.open_sum([[key.encrypt(slots), copy.encrypt(slots)]])[0]
    except (ValueError, RuntimeError, FrameInvalid) as error:
        raise EncryptionUnavailable("SEAL's format is not the expected one") from error
    if not np.array_equal(opened, (slots + slots) % np.uint64(modulus)):
        raise EncryptionUnavailable("a test sum does not open to what went in")
