"""Quantization of updates, and packing of the integers into slots.

The update is a float64 vector. It is clamped to a public range, rounded stochastically to a grid of
``2L + 1`` points, shifted to ``[0, 2L]``, and laid into frames: frame by frame, field by field, slot by
slot. The last four slots of a frame hold a 1 from every contributor. Everything is exact integers from
the rounding on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crypto.presets import CHECK_SLOTS, Packing
from protocol.errors import OpeningRefused

Integers = NDArray[np.uint64]
Floats = NDArray[np.float64]


def quantize(update: Floats, update_range: float, packing: Packing, uniforms: Floats) -> Integers:
    """Clamp and round an update to the grid; unbiased inside the range.

    Args:
        update: float64 (n,), finite.
        update_range: R > 0; values outside [-R, R] are clamped.
        packing: Supplies L.
        uniforms: float64 (n,) in [0, 1), from a secure stream; they decide the rounding.

    Returns:
        uint64 (n,) in [0, 2L]. The error of a value inside the range is below one step, R / L.
    """
    levels = float(packing.half_levels)
    # one array, changed in place: the arithmetic is the same and new memory costs more than it
    grid = np.clip(update, -update_range, update_range).astype(np.float64, copy=False)
    grid *= levels / update_range
    grid += uniforms
    np.clip(np.floor(grid, out=grid), -levels, levels, out=grid)
    grid += levels
    return grid.astype(np.uint64)


def mean_update(
    sums: NDArray[np.unsignedinteger[Any]],
    contributors: int,
    update_range: float,
    packing: Packing,
    total_weight: float | None = None,
) -> Floats:
    """Return the mean of the quantized updates from their opened sum, float64 (n,).

    The integer part is exact, because integers below 2**53 are. The public factor R / (L * weight) is
    rounded twice and its product with the integer once: the relative error is below 3.01 * 2**-53.
    """
    divisor = float(contributors) if total_weight is None else total_weight
    mean = sums.astype(np.float64)
    mean -= contributors * packing.half_levels
    mean *= update_range / packing.half_levels / divisor
    return mean


def clipped_share(update: Floats, update_range: float) -> float:
    """Return the share of values outside the range; it is for the owner only and never sent."""
    outside = np.count_nonzero(update > update_range) + np.count_nonzero(update < -update_range)
    return float(outside) / update.size if update.size else 0.0


def pack(values: Integers, packing: Packing) -> Integers:
    """Lay quantized values into slots and set the check slots to 1.

    Args:
        values: uint64 (n,), each in [0, 2L].
        packing: The fitted preset.

    Returns:
        uint64 (frames, slots), each entry below the plain modulus.
    """
    size = packing.values_per_frame
    starts = range(0, packing.frames_for(values.size) * size, size)
    return np.stack([pack_frame(values[start : start + size], packing) for start in starts])


def pack_frame(values: Integers, packing: Packing) -> Integers:
    """Lay the values of one frame into its slots, uint64 (slots,); missing values are zero."""
    slots, fields = packing.preset.slots, packing.preset.values_per_slot
    padded = np.zeros(packing.values_per_frame, dtype=np.uint64)
    padded[: values.size] = values
    packed = np.ones(slots, dtype=np.uint64)
    packed[:-CHECK_SLOTS] = _join_fields(padded.reshape(fields, slots - CHECK_SLOTS), packing.radix)
    return packed


def unpack_sum(packed: Integers, parameters: int, contributors: int, packing: Packing) -> Integers:
    """Take the sums out of opened slots, after checking that they can be what they claim.

    Args:
        packed: uint64 (frames, slots) as decrypted.
        parameters: Values to return.
        contributors: Owners whose frames were added.
        packing: The fitted preset.

    Returns:
        uint64 (parameters,), each in [0, 2 L contributors].

    Raises:
        OpeningRefused: The frames are not as many as the parameters take, the contributors are none or
            more than the proof of capacity covers, a check slot does not count them, or a field is out
            of range. Masks that do not cancel, a missing owner and a foreign key all end here: a
            random frame passes with probability below 2**-4096.
    """
    if packed.shape[0] != packing.frames_for(parameters):
        raise OpeningRefused("the number of frames does not fit the number of parameters")
    if not 1 <= contributors <= packing.cohort:
        raise OpeningRefused("the preset was not fitted to this number of contributors")
    if not np.all(packed[:, -CHECK_SLOTS:] == contributors):
        raise OpeningRefused("the check slots do not count the contributors")
    fields = _split_fields(packed[:, :-CHECK_SLOTS], packing)
    flat = fields.reshape(-1)
    if np.any(flat[:parameters] > 2 * packing.half_levels * contributors):
        raise OpeningRefused("a field is larger than the largest possible sum")
    if np.any(flat[parameters:] != 0):
        raise OpeningRefused("padding does not open to zero")
    return flat[:parameters]


def _join_fields(grid: Integers, radix: int) -> Integers:
    packed: Integers = grid[-1].copy()
    for field in range(len(grid) - 2, -1, -1):
        packed = packed * np.uint64(radix) + grid[field]
    return packed


def _split_fields(packed: Integers, packing: Packing) -> Integers:
    fields = []
    rest = packed
    for _ in range(packing.preset.values_per_slot - 1):
        rest, field = np.divmod(rest, np.uint64(packing.radix))
        fields.append(field)
    fields.append(rest)
    return np.stack(fields, axis=1)
