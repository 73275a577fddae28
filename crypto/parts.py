"""Parts of an encrypted update: how much of it one message carries.

An update of a large model is sealed, sent, added and opened part by part, so that no party holds more of it
in memory than it must, and encrypting goes on while the part before is on its way. How many parts there are
follows from public constants alone; no party chooses, and no message says it.
"""

from __future__ import annotations

from typing import Final

from crypto.presets import Packing

PART_BYTES: Final = 8 * 1024 * 1024
"""Packed frames of one part at most; frames in SEAL's own form are up to a third larger."""

SUM_BYTES: Final = 4
"""Length of one opened value, a little-endian uint32."""

DIGEST_BYTES: Final = 32
"""Length of a frame's SHA-256."""


def seal_parts(packing: Packing, parameters: int) -> list[range]:
    """Return the frame positions of each part of one owner's update.

    Args:
        packing: The fitted preset.
        parameters: Values of the update, at least 1.

    Returns:
        Consecutive ranges that cover all frames; one for a small model.
    """
    return _cut(packing.frames_for(parameters), PART_BYTES // packing.frame_bytes)


def open_parts(packing: Packing, parameters: int, owners: int) -> list[range]:
    """Return the frame positions of each part that an opener is sent.

    A part holds its positions' frames of all owners of the list, so that each part's sums are complete.

    Args:
        packing: The fitted preset.
        parameters: Values of the update, at least 1.
        owners: Length of the list, at least 1.
    """
    return _cut(packing.frames_for(parameters), PART_BYTES // (packing.frame_bytes * owners))


def sum_parts(parameters: int) -> list[range]:
    """Return the values of each part in which opened sums travel.

    Args:
        parameters: Values of the sum, at least 1; four bytes each.
    """
    return _cut(parameters, PART_BYTES // SUM_BYTES)


def _cut(count: int, per_part: int) -> list[range]:
    step = max(1, per_part)
    return [range(start, min(start + step, count)) for start in range(0, count, step)]
