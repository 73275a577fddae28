"""The public side of the encryption: frames to ciphertexts, and adding them. No secret key is used here.

A *packed* frame is our own fixed-length form of a symmetric ciphertext: the 64-byte public seed of its
random half, then the residues of the other half's coefficients, packed without gaps. Bytes of a peer
never reach the library's parser as they came: every residue is compared with q, and the library's object
is built from a skeleton that is made here from the public parameters. `crypto.secret.self_test` compares
that skeleton with a ciphertext that was really encrypted by the installed library.

Where a library has another skeleton, a plan may order frames in SEAL's *own* serialization, uncompressed.
Bytes of a peer then do reach SEAL's parser, but only those that agree with a ciphertext of this party's
own making in length and in every fixed byte (`crypto.layouts`).
"""

from __future__ import annotations

import functools
import os
import struct
import tempfile
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from crypto.layouts import Layout
from crypto.presets import CKKS_SCALE_BITS, SEED_BYTES, Packing
from crypto.residues import residue_bytes, residue_words
from protocol.errors import EncryptionUnavailable, FrameInvalid

SEAL_HEADER: Final = struct.Struct("<HBBBBHQ")
"""SEAL's outer header: magic, its own size, version, kind of compression, zero, size of everything."""

_SEAL_MAGIC: Final = 0xA15E
_SEAL_VERSION: Final = (4, 3)
_NO_COMPRESSION: Final = 0
_BLAKE2XB: Final = 1


class SealFile:
    """A file in memory, for SEAL, which reads and writes paths, not bytes.

    Where the system has no memfd, it is a 0600 temporary file that `close` removes.
    """

    def __init__(self) -> None:
        self._on_disk = not hasattr(os, "memfd_create")
        if self._on_disk:
            self._descriptor, self.path = tempfile.mkstemp(prefix="fedseal-")
        else:
            self._descriptor = os.memfd_create("fedseal")
            self.path = f"/proc/self/fd/{self._descriptor}"

    def read(self) -> bytes:
        """Return the whole content."""
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def write(self, data: bytes | bytearray) -> None:
        """Replace the content."""
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))

    def close(self) -> None:
        """Free the memory."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if self._on_disk:
                os.unlink(self.path)

    def __del__(self) -> None:
        self.close()


class FrameFormat(Protocol):
    """One of the two forms that a frame can have."""

    size_bytes: int

    def ciphertext(self, frame: bytes) -> seal.Ciphertext:
        """Build the library's ciphertext from a peer's frame of the right length."""

    def check(self, frame: bytes) -> None:
        """Check a peer's frame of the right length."""

    def frame(self, blob: bytes) -> bytes:
        """Return the frame of an own ciphertext in SEAL's uncompressed form."""

    def seed(self, frame: bytes) -> bytes:
        """Return the public seed of a frame."""


class SealContext:
    """SEAL's context for one `Packing`, with the frame format.

    Args:
        packing: The fitted preset; its moduli are asserted against what SEAL builds.
        layout: How SEAL serializes a ciphertext here, if frames are in that form; else they are packed.

    Raises:
        EncryptionUnavailable: SEAL builds other moduli, or gives a lower security level, or its own
            ciphertexts are not seeded.
    """

    def __init__(self, packing: Packing, layout: Layout | None = None) -> None:
        self.packing = packing
        self.packed = layout is None
        self.seal = build_context(packing)
        self._evaluator = seal.Evaluator(self.seal)
        self._format: FrameFormat = (
            _Packed(self.seal, packing) if layout is None else _Own(self.seal, layout)
        )

    @property
    def frame_bytes(self) -> int:
        """Exact length of one frame in bytes."""
        return self._format.size_bytes

    def ciphertext(self, frame: bytes) -> seal.Ciphertext:
        """Build the library's ciphertext from a peer's frame.

        Call it only on frames whose digest a verified signature covers.

        Raises:
            FrameInvalid: Wrong length, a residue that is not below its prime, or a wrong fixed part.
        """
        self._require_length(frame)
        return self._format.ciphertext(frame)

    def check(self, frame: bytes) -> None:
        """Check a peer's frame and keep nothing of it; as `ciphertext`, and with the same errors."""
        self._require_length(frame)
        self._format.check(frame)

    def _require_length(self, frame: bytes) -> None:
        if len(frame) != self.frame_bytes:
            raise FrameInvalid(f"a frame must have {self.frame_bytes} bytes")

    def residues(self, data: bytes, moduli: Sequence[int] | None = None) -> NDArray[np.uint64]:
        """Parse packed residues of one polynomial, uint64 (primes * degree,), prime by prime.

        Args:
            data: As `residue_bytes` made them.
            moduli: The primes; those of a ciphertext unless told otherwise.

        Raises:
            FrameInvalid: Wrong length, or a residue that is not below its prime.
        """
        preset = self.packing.preset
        return residue_words(data, moduli or preset.coefficient_moduli, preset.poly_modulus_degree)

    def residue_bytes(self, words: NDArray[np.uint64], moduli: Sequence[int] | None = None) -> bytes:
        """Return residues packed without gaps; inverse of `residues`."""
        return residue_bytes(words, moduli or self.packing.preset.coefficient_moduli)

    def frame(self, blob: bytes) -> bytes:
        """Return the frame of a ciphertext that this process encrypted.

        Args:
            blob: SEAL's uncompressed form of a seeded ciphertext.

        Raises:
            EncryptionUnavailable: It is not laid out as expected.
        """
        return self._format.frame(blob)

    def seed(self, frame: bytes) -> bytes:
        """Return the 64-byte public seed of a frame of the right length."""
        return self._format.seed(frame)

    def split(self, blob: bytes, frames: int) -> list[bytes]:
        """Cut a blob into frames.

        Raises:
            FrameInvalid: The blob does not hold exactly `frames` frames.
        """
        size = self.frame_bytes
        if len(blob) != frames * size:
            raise FrameInvalid(f"{frames} frames must have {frames * size} bytes")
        return [blob[start : start + size] for start in range(0, len(blob), size)]

    def add(self, total: seal.Ciphertext | None, frame: bytes) -> seal.Ciphertext:
        """Add a peer's frame to a running sum; the first frame starts it."""
        ciphertext = self.ciphertext(frame)
        if total is None:
            return ciphertext
        self._evaluator.add_inplace(total, ciphertext)
        return total

    def total(self, frames: Sequence[bytes]) -> seal.Ciphertext:
        """Return the sum of peers' frames at one position.

        Raises:
            FrameInvalid: A frame is malformed, or there is none.
        """
        total = None
        for frame in frames:
            total = self.add(total, frame)
        if total is None:
            raise FrameInvalid("there is no frame to add")
        return total


class _Packed:
    """Seed and residues without gaps; SEAL's object is built from a skeleton."""

    def __init__(self, context: seal.SEALContext, packing: Packing) -> None:
        self._seal = context
        self._file = SealFile()
        self._degree = packing.preset.poly_modulus_degree
        self._primes = packing.preset.coefficient_moduli
        self.size_bytes = packing.frame_bytes
        self._head, self._tail = _skeleton(context, packing)
        self._residues = self._degree * len(self._primes)
        body = self._head + bytes(8 * self._residues) + self._tail + bytes(SEED_BYTES)
        self._blob = bytearray(serialized(body))
        start = len(self._blob) - len(body) + len(self._head)
        self._blob_words = np.frombuffer(self._blob, dtype="<u8", count=self._residues, offset=start)

    def ciphertext(self, frame: bytes) -> seal.Ciphertext:
        words = residue_words(frame[SEED_BYTES:], self._primes, self._degree)
        # the blob's fixed parts never change, so only residues and seed are written into it
        self._blob_words[:] = words
        self._blob[-SEED_BYTES:] = frame[:SEED_BYTES]
        self._file.write(self._blob)
        ciphertext = seal.Ciphertext()
        ciphertext.load(self._seal, self._file.path)
        return ciphertext

    def check(self, frame: bytes) -> None:
        residue_words(frame[SEED_BYTES:], self._primes, self._degree)

    def frame(self, blob: bytes) -> bytes:
        start, count = SEAL_HEADER.size + len(self._head), self._residues
        expected = start + 8 * count + len(self._tail) + SEED_BYTES
        if len(blob) != expected or blob[SEAL_HEADER.size : start] != self._head:
            raise EncryptionUnavailable("SEAL's ciphertext does not have the expected layout")
        words = np.frombuffer(blob, dtype="<u8", count=count, offset=start)
        return blob[-SEED_BYTES:] + residue_bytes(words.astype(np.uint64, copy=False), self._primes)

    def seed(self, frame: bytes) -> bytes:
        return frame[:SEED_BYTES]


class _Own:
    """SEAL's own uncompressed serialization, as this party's library writes it."""

    def __init__(self, context: seal.SEALContext, layout: Layout) -> None:
        self._seal = context
        self._layout = layout
        self._seed_start = layout.seed_start()
        self.size_bytes = layout.size_bytes

    def ciphertext(self, frame: bytes) -> seal.Ciphertext:
        ciphertext = load_own_form(seal.Ciphertext(), self._seal, frame, self._layout)
        if ciphertext.size() != 2 or ciphertext.parms_id() != self._seal.first_parms_id():
            raise FrameInvalid("SEAL's own form holds another kind of ciphertext")
        return ciphertext

    def check(self, frame: bytes) -> None:
        # residues have no place of their own here: SEAL's loader is what compares them with their primes
        self.ciphertext(frame)

    def frame(self, blob: bytes) -> bytes:
        try:
            self._layout.require(blob)
        except FrameInvalid as error:
            raise EncryptionUnavailable("SEAL's own ciphertexts differ in a fixed part") from error
        return blob

    def seed(self, frame: bytes) -> bytes:
        return frame[self._seed_start : self._seed_start + SEED_BYTES]


def load_own_form(target: Any, context: seal.SEALContext, data: bytes, layout: Layout) -> Any:
    """Let SEAL parse a peer's object in SEAL's own form, after everything that can be compared was.

    Args:
        target: An empty ciphertext or secret key.
        context: SEAL's context.
        data: Bytes of a peer whose signature was verified.
        layout: The form that such an object has here.

    Returns:
        `target`, loaded and valid for the context, its residues below their primes.

    Raises:
        FrameInvalid: A fixed part differs, or SEAL's checked load refuses it.
    """
    layout.require(data)
    file = SealFile()
    try:
        file.write(data)
        target.load(context, file.path)
        valid = bool(seal.is_valid_for(target, context))
    except (ValueError, RuntimeError, IndexError, MemoryError):
        valid = False
    finally:
        file.close()
    if not valid:
        raise FrameInvalid("SEAL refuses an object in its own form")
    return target


def serialized(body: bytes) -> bytes:
    """Put SEAL's 16-byte header for uncompressed data before `body`."""
    size = SEAL_HEADER.size
    return SEAL_HEADER.pack(_SEAL_MAGIC, size, *_SEAL_VERSION, _NO_COMPRESSION, 0, size + len(body)) + body


@functools.lru_cache(maxsize=8)
def build_context(packing: Packing) -> seal.SEALContext:
    """Return SEAL's context for a packing: the same object each time, which nothing can change.

    It holds the parameters' tables and no key. Building it takes longer than encrypting a frame.

    Raises:
        EncryptionUnavailable: SEAL builds other moduli, or gives a lower security level.
    """
    preset = packing.preset
    parameters = seal.EncryptionParameters(getattr(seal.SCHEME_TYPE, preset.scheme))
    parameters.set_poly_modulus_degree(preset.poly_modulus_degree)
    bits = [modulus.bit_length() for modulus in preset.key_moduli]
    parameters.set_coeff_modulus(seal.CoeffModulus.Create(preset.poly_modulus_degree, bits))
    if preset.scheme == "BFV":
        plain_bits = packing.plain_modulus.bit_length()
        parameters.set_plain_modulus(seal.PlainModulus.Batching(preset.poly_modulus_degree, plain_bits))
    level = getattr(seal.SEC_LEVEL_TYPE, f"TC{preset.security_bits}")
    context = seal.SEALContext(parameters, True, level)
    if not context.parameters_set():
        raise EncryptionUnavailable("SEAL refuses the parameters at the required security level")
    built = context.first_context_data().parms()
    moduli = tuple(modulus.value() for modulus in built.coeff_modulus())
    keys = tuple(modulus.value() for modulus in context.key_context_data().parms().coeff_modulus())
    plain = built.plain_modulus().value() if preset.scheme == "BFV" else packing.plain_modulus
    if (moduli, keys, plain) != (preset.coefficient_moduli, preset.key_moduli, packing.plain_modulus):
        raise EncryptionUnavailable("SEAL builds other moduli than the preset names")
    return context


def _skeleton(context: seal.SEALContext, packing: Packing) -> tuple[bytes, bytes]:
    """Return the bytes of SEAL's seeded ciphertext before its residues and before its seed."""
    degree, approximate = packing.preset.poly_modulus_degree, packing.preset.scheme == "CKKS"
    scale = 2.0**CKKS_SCALE_BITS if approximate else 1.0
    polynomials, primes, correction = 2, len(packing.preset.coefficient_moduli), 1
    fixed = struct.pack("<4Q", *context.first_parms_id())
    # CKKS ciphertexts are kept as evaluations (NTT form), BFV ciphertexts as coefficients
    fixed += struct.pack("<BQQQdQ", approximate, polynomials, degree, primes, scale, correction)
    data = struct.pack("<Q", degree * primes)
    head = fixed + serialized(data + bytes(8 * degree * primes))[: 16 + len(data)]
    generator = struct.pack("<B", _BLAKE2XB) + bytes(SEED_BYTES)
    tail = serialized(generator)[: 16 + 1]
    return head, tail
