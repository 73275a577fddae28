"""What SEAL's own serialization of one kind of object looks like here: its length and its fixed bytes.

Nothing about SEAL's format is known in advance. A party serializes many objects that it makes itself and
compares them: positions at which all of them agree are fixed, the others are the content. Bytes of a peer
must have the same length and the same fixed bytes before SEAL may parse them, so headers, versions,
compression, identifiers, counts and types are those that this party's own library wrote.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from crypto.presets import SEED_BYTES
from protocol.errors import EncryptionUnavailable, FrameInvalid

SAMPLES: Final = 16
"""Objects that are compared. A byte of content with b random bits looks fixed with probability
``2**(-15 b)``; the narrowest, the highest bytes of 60-bit residues, have four."""

_SIZE: Final = struct.Struct("<Q")


@dataclass(frozen=True)
class Layout:
    """The measured form of one kind of serialized object.

    Attributes:
        sample: One object that was made here, uncompressed.
        content: Which of its bytes differ between objects, bool (size_bytes,).
    """

    sample: bytes
    content: NDArray[np.bool_]

    @classmethod
    def measure(cls, samples: Sequence[bytes]) -> Layout:
        """Compare objects of this party's own making.

        Args:
            samples: `SAMPLES` uncompressed serializations of independent random objects.

        Raises:
            EncryptionUnavailable: They differ in length, or there are too few of them.
        """
        if len(samples) < SAMPLES or len({len(sample) for sample in samples}) != 1:
            raise EncryptionUnavailable("SEAL's own format has no fixed length")
        rows = np.stack([np.frombuffer(sample, dtype=np.uint8) for sample in samples])
        return cls(samples[0], np.asarray((rows != rows[0]).any(axis=0)))

    @property
    def size_bytes(self) -> int:
        """The one length that such an object has."""
        return len(self.sample)

    def require(self, data: bytes) -> None:
        """Check length and fixed bytes of a peer's object; its content is not looked at.

        Raises:
            FrameInvalid: The length or a fixed byte differs.
        """
        if len(data) != self.size_bytes:
            raise FrameInvalid(f"SEAL's own form must have {self.size_bytes} bytes")
        differs = np.frombuffer(data, dtype=np.uint8) != np.frombuffer(self.sample, dtype=np.uint8)
        if bool((differs & ~self.content).any()):
            raise FrameInvalid("a fixed part is not the one that the library here writes")

    def seed_start(self) -> int:
        """Return where a ciphertext's public seed starts: the last run of content, of exactly 64 bytes.

        Raises:
            EncryptionUnavailable: There is no such run; ciphertexts are not seeded, or not as known.
        """
        places = np.flatnonzero(self.content)
        breaks = np.flatnonzero(np.diff(places) != 1)
        start = 0 if breaks.size == 0 else int(breaks[-1]) + 1
        if places.size - start != SEED_BYTES:
            raise EncryptionUnavailable("SEAL's own ciphertexts do not end with a seed of 64 bytes")
        return int(places[start])

    def to_bytes(self) -> bytes:
        """Return sample and content map, for another process of this party."""
        return _SIZE.pack(self.size_bytes) + self.sample + np.packbits(self.content).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """Inverse of `to_bytes`.

        Raises:
            EncryptionUnavailable: It is no layout.
        """
        size = _SIZE.unpack_from(data)[0] if len(data) >= _SIZE.size else 0
        end = _SIZE.size + size
        if size == 0 or len(data) != end + -(-size // 8):
            raise EncryptionUnavailable("a measured layout is damaged")
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8, offset=end), count=size)
        return cls(data[_SIZE.size : end], bits.astype(np.bool_))
