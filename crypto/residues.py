"""Residues of polynomials as bytes without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from protocol.errors import FrameInvalid


def residue_words(data: bytes, primes: Sequence[int], degree: int) -> NDArray[np.uint64]:
    """Parse packed residues of one polynomial, uint64 (primes * degree,), prime by prime.

    Args:
        data: As `residue_bytes` made them.
        primes: The primes of the modulus.
        degree: Coefficients of the polynomial.

    Raises:
        FrameInvalid: Wrong length, or a residue that is not below its prime.
    """
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


def residue_bytes(words: NDArray[np.uint64], primes: Sequence[int]) -> bytes:
    """Return residues packed without gaps; inverse of `residue_words`."""
    rows = words.reshape(len(primes), -1)
    return b"".join(pack_bits(row, q.bit_length()) for row, q in zip(rows, primes, strict=True))


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
