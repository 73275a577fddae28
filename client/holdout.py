"""Which of an owner's records are held out of training.

Each record is decided by itself, by a keyed hash of its raw content, so that adding or removing one record
moves no other one. The key is secret, belongs to the dataset and stays the same, so that nobody else can
tell on which side a record is, and a record that was held out in one run is held out in the next one with
the same share. Equal records are on the same side.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PERSONALIZATION = b"fedseal/holdout"


@dataclass(frozen=True)
class Holdout:
    """The split of one dataset for one share.

    Attributes:
        key: The dataset's secret key, 32 bytes; for the owner only.
        share: Probability that a record is held out, in (0, 1).
    """

    key: bytes
    share: float

    def held_out(self, x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.bool_]:
        """Tell for each record whether it is held out.

        Args:
            x: Raw values, shape (n, ...); the type that a file stores them in plays no part.
            y: Labels, shape (n,).

        Returns:
            bool, shape (n,); record i depends on `x[i]` and `y[i]` alone.
        """
        limit = int(self.share * 2**64)
        draws = (self._draw(row, label) for row, label in zip(x, y, strict=True))
        return np.fromiter((draw < limit for draw in draws), dtype=np.bool_, count=len(y))

    def trained_on(self, x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.bool_]:
        """Tell for each record whether it may be trained on: the opposite of `held_out`."""
        return ~self.held_out(x, y)

    def _draw(self, row: NDArray[Any], label: Any) -> int:
        digest = hashlib.blake2b(digest_size=8, key=self.key, person=_PERSONALIZATION)
        # adding zero turns minus zero, which is the same value, into zero
        digest.update((np.asarray(row, dtype="<f8") + 0.0).tobytes())
        digest.update(int(label).to_bytes(8, "little", signed=True))
        return int.from_bytes(digest.digest(), "little")
