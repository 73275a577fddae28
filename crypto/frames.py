"""The public side of the encryption: frames to ciphertexts, and adding them. No secret key is used here.

A frame is our own fixed-length form of a symmetric ciphertext: the 64-byte public seed of its random
half, then the residues of the other half's coefficients, packed without gaps. Bytes of a peer never
reach the library's parser as they came: every residue is compared with q, and the library's object is
built from a skeleton that is made here from the public parameters. `crypto.secret.self_test` compares
that skeleton with a ciphertext that was really encrypted by the installed library.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from crypto.presets import CKKS_SCALE_BITS, SEED_BYTES, Packing
from protocol.errors import EncryptionUnavailable, FrameInvalid

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


class SealContext:
    """SEAL's context for one `Packing`, with the frame format.

    Args:
        packing: The fitted preset; its moduli are asserted against what SEAL builds.

    Raises:
        EncryptionUnavailable: SEAL builds other moduli, or gives a lower security level.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.seal = _build_context(packing)
        self._evaluator = seal.Evaluator(self.seal)
        self._file = SealFile()
        self._head, self._tail = _skeleton(self.seal, packing)
        self._residues = packing.preset.poly_modulus_degree * len(packing.preset.coefficient_moduli)
        body = self._head + bytes(8 * self._residues) + self._tail + bytes(SEED_BYTES)
        self._blob = bytearray(serialized(body))
        start = len(self._blob) - len(body) + len(self._head)
        self._blob_words = np.frombuffer(self._blob, dtype="<u8", count=self._residues, offset=start)

    def ciphertext(self, frame: bytes) -> seal.Ciphertext:
        """Build the library's ciphertext from a peer's frame.

        Raises:
            FrameInvalid: Wrong length, or a residue that is not below q.
        """
        if len(frame) != self.packing.frame_bytes:
            raise FrameInvalid(f"a frame must have {self.packing.frame_bytes} bytes")
        words = self.residues(frame[SEED_BYTES:])
        # the blob's fixed parts never change, so only residues and seed are written into it
        self._blob_words[:] = words
        self._blob[-SEED_BYTES:] = frame[:SEED_BYTES]
        self._file.write(self._blob)
        ciphertext = seal.Ciphertext()
        ciphertext.load(self.seal, self._file.path)
        return ciphertext

    def check(self, frame: bytes) -> None:
        """Check a peer's frame without building anything from it.

        Raises:
            FrameInvalid: Wrong length, or a residue that is not below its prime.
        """
        if len(frame) != self.packing.frame_bytes:
            raise FrameInvalid(f"a frame must have {self.packing.frame_bytes} bytes")
        self.residues(frame[SEED_BYTES:])

    def residues(self, data: bytes, moduli: Sequence[int] | None = None) -> NDArray[np.uint64]:
        """Parse packed residues of one polynomial, uint64 (primes * degree,), prime by prime.

        Args:
            data: As `residue_bytes` made them.
            moduli: The primes; those of a ciphertext unless told otherwise.

        Raises:
            FrameInvalid: Wrong length, or a residue that is not below its prime.
        """
        primes, degree = (
            moduli or self.packing.preset.coefficient_moduli,
            self.packing.preset.poly_modulus_degree,
        )
        sizes = [degree * prime.bit_length() // 8 for prime in primes]
        if len(data) != sum(sizes):
            raise FrameInvalid(f"residues must have {sum(sizes)} bytes")
        rows, start = [], 0
        for prime, size in zip(primes, sizes, strict=True):
            row = unpack_bits(data[start : start + size], prime.bit_length())
            if bool((row >= prime).any()):
                raise FrameInvalid("a residue is not below its modulus")
            rows.append(row)
            start += size
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def residue_bytes(self, words: NDArray[np.uint64], moduli: Sequence[int] | None = None) -> bytes:
        """Return residues packed without gaps; inverse of `residues`."""
        primes = moduli or self.packing.preset.coefficient_moduli
        rows = words.reshape(len(primes), -1)
        return b"".join(pack_bits(row, q.bit_length()) for row, q in zip(rows, primes, strict=True))

    def frame(self, body: bytes) -> bytes:
        """Return the frame of a ciphertext that this process encrypted.

        Args:
            body: SEAL's uncompressed form of a seeded ciphertext, without its outer header.
        """
        count = self._residues
        expected = len(self._head) + 8 * count + len(self._tail) + SEED_BYTES
        if len(body) != expected or not body.startswith(self._head):
            raise EncryptionUnavailable("SEAL's ciphertext does not have the expected layout")
        words = np.frombuffer(body, dtype="<u8", count=count, offset=len(self._head))
        return body[-SEED_BYTES:] + self.residue_bytes(words.astype(np.uint64, copy=False))

    def split(self, blob: bytes, frames: int) -> list[bytes]:
        """Cut a blob into frames.

        Raises:
            FrameInvalid: The blob does not hold exactly `frames` frames.
        """
        size = self.packing.frame_bytes
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


def pack_bits(words: NDArray[np.uint64], bits: int) -> bytes:
    """Write integers of `bits` bits each, little endian and without gaps.

    Args:
        words: uint64 (n,), each below ``2**bits``; ``n * bits`` must be a multiple of 8.
        bits: 1 to 64.
    """
    words = np.ascontiguousarray(words, dtype="<u8")
    if bits % 8 == 0:
        whole, narrow = _byte_fields(bits // 8, 8), _byte_fields(bits // 8, bits // 8)
        packed = np.empty(words.size, dtype=narrow)
        for name in narrow.names or ():
            packed[name] = words.view(whole)[name]
        return packed.tobytes()
    wide = words.view(np.uint8).reshape(words.size, 8)
    low = np.unpackbits(wide, axis=1, bitorder="little")[:, :bits]
    return np.packbits(low.reshape(-1), bitorder="little").tobytes()


def unpack_bits(data: bytes, bits: int) -> NDArray[np.uint64]:
    """Read integers of `bits` bits each; inverse of `pack_bits`."""
    count = len(data) * 8 // bits
    if bits % 8 == 0:
        # words that overlap: each is read with the next one's first bytes, which are then cut off
        overlapping = np.ndarray((count,), dtype="<u8", buffer=data + bytes(7), strides=(bits // 8,))
        kept: NDArray[np.uint64] = overlapping & np.uint64((1 << bits) - 1)
        return kept
    flat = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count * bits, bitorder="little")
    padded = np.zeros((count, 64), dtype=np.uint8)
    padded[:, :bits] = flat.reshape(count, bits)
    wide = np.packbits(padded, axis=1, bitorder="little")
    return wide.view("<u8").reshape(count).astype(np.uint64, copy=False)


@cache
def _byte_fields(size: int, stride: int) -> np.dtype[np.void]:
    """Describe the lowest `size` bytes of every `stride` as integers, which copy faster than bytes do."""
    widths = [width for width in (8, 4, 2, 1) if size & width]
    offsets = [sum(widths[:index]) for index in range(len(widths))]
    formats, names = [f"<u{width}" for width in widths], [f"f{width}" for width in widths]
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": stride})


def serialized(body: bytes) -> bytes:
    """Put SEAL's 16-byte header for uncompressed data before `body`."""
    header = struct.pack("<HBBBBHQ", _SEAL_MAGIC, 16, *_SEAL_VERSION, _NO_COMPRESSION, 0, 16 + len(body))
    return header + body


def _build_context(packing: Packing) -> seal.SEALContext:
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
