"""From an update to its frames, and from all owners' frames to the sum: one frame at a time.

Sealing takes no memory that grows with the model, besides update and frames: each frame is quantized,
packed, masked and encrypted before the next one is touched. Adding keeps one running sum for each frame
position, so its memory grows with the model but not with the number of owners. For owners only; the
coordinator never loads this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crypto.masks import MaskContext, Masks, ResidueMasks
from crypto.packing import pack_frame, quantize, unpack_sum
from crypto.presets import SEED_BYTES, Packing
from crypto.secret import SealKey
from protocol.errors import OpeningRefused

Uniforms = Callable[[int], NDArray[np.float64]]


def seal_frames(
    update: NDArray[np.float64],
    update_range: float,
    uniforms: Uniforms,
    masks: Masks | ResidueMasks,
    key: SealKey,
) -> Iterator[bytes]:
    """Yield the encrypted frames of an update.

    Args:
        update: float64 (n,), finite.
        update_range: Public range R of one value.
        uniforms: Gives the next random numbers in [0, 1) of a secure stream; they decide the rounding.
        masks: This owner's masks for exactly the list that the frames are sealed for.
        key: The session's key.

    Yields:
        One frame of `SealContext.frame_bytes` bytes per `Packing.values_per_frame` values.
    """
    packing = key.context.packing
    for start in range(0, update.size, packing.values_per_frame):
        part = update[start : start + packing.values_per_frame]
        values = quantize(part, update_range, packing, uniforms(part.size))
        slots = pack_frame(values, packing)
        if isinstance(masks, Masks):
            yield key.encrypt(masks.apply(slots))
        else:
            frame = key.encrypt(slots)
            residues = masks.apply(key.context.residues(frame[SEED_BYTES:]))
            yield frame[:SEED_BYTES] + key.context.residue_bytes(residues)


def masks_for(
    packing: Packing, own: str, chain_keys: Mapping[str, bytes], context: MaskContext
) -> Masks | ResidueMasks:
    """Return an owner's masks for one list, of the kind that the preset's scheme takes."""
    if packing.preset.scheme == "CKKS":
        return ResidueMasks(own, chain_keys, context, packing.preset.coefficient_moduli)
    return Masks(own, chain_keys, context)


class RunningSum:
    """The sum of all owners' frames, added position by position and decrypted once it is complete.

    Args:
        parameters: Values of an update.
        key: The session's key. Only sums that were added here are decrypted.
    """

    def __init__(self, parameters: int, key: SealKey) -> None:
        self.context = key.context
        self.parameters = parameters
        self._key = key
        self._sums: list[Any] = [None] * key.context.packing.frames_for(parameters)

    def add(self, position: int, frames: Sequence[bytes]) -> None:
        """Add the frames of all contributors at one position, whose digests verified signatures cover.

        Raises:
            FrameInvalid: A frame is malformed, or there is none.
            OpeningRefused: There is no such position, or its sum is there already.
        """
        if not 0 <= position < len(self._sums) or self._sums[position] is not None:
            raise OpeningRefused("the number of frames does not fit the number of parameters")
        self._sums[position] = self._key.context.total(frames)

    def open(self, contributors: int) -> NDArray[np.uint64]:
        """Decrypt the sums and return the integers, uint64 (parameters,).

        Raises:
            OpeningRefused: A position is missing, or a sum does not open to what these contributors can
                have sealed.
        """
        packing = self._key.context.packing
        if any(total is None for total in self._sums):
            raise OpeningRefused("the number of frames does not fit the number of parameters")
        opened = np.zeros(self.parameters, dtype=np.uint64)
        for index, total in enumerate(self._sums):
            start = index * packing.values_per_frame
            count = min(packing.values_per_frame, self.parameters - start)
            slots = self._key.decrypt(total)[np.newaxis]
            opened[start : start + count] = unpack_sum(slots, count, contributors, packing)
            self._sums[index] = None
        return opened


def open_frames(columns: Sequence[Sequence[bytes]], parameters: int, key: SealKey) -> NDArray[np.uint64]:
    """Add all owners' frames, decrypt the sums, and return the integers.

    Args:
        columns: For each frame position, that frame of every contributor.
        parameters: Values of an update.
        key: The session's key; see `RunningSum`.

    Returns:
        uint64 (parameters,).

    Raises:
        FrameInvalid: A frame is malformed.
        OpeningRefused: A sum does not open to what these contributors can have sealed.
    """
    total = RunningSum(parameters, key)
    for position, frames in enumerate(columns):
        total.add(position, frames)
    return total.open(max((len(frames) for frames in columns), default=0))
