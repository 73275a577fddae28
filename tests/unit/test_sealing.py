"""Sealing works frame by frame: memory does not grow with the model, and the frames do not depend on it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from crypto.frames import SealContext
from crypto.masks import MaskContext, Masks
from crypto.presets import packing_for
from crypto.sealing import open_frames, seal_frames
from crypto.secret import SealKey
from protocol.errors import OpeningRefused

PACKING = packing_for("exact16", 3)
KEY = SealKey.generate(SealContext(PACKING))
CONTEXT = MaskContext("s", 1, "train", "l", "m", PACKING.plain_modulus)


def peak_bytes(frames: int) -> int:
    """Seal an update of this many frames, dropping each frame at once; returns the most memory in use."""
    update = np.zeros(PACKING.values_per_frame * frames)
    masks = Masks("a" * 64, {"b" * 64: bytes(32)}, CONTEXT)
    rng = np.random.default_rng(0)
    tracemalloc.start()
    for _ in seal_frames(update, 1.0, rng.random, masks, KEY):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_memory_of_sealing_does_not_grow_with_the_model() -> None:
    peak_bytes(1)
    assert peak_bytes(40) < 1.2 * peak_bytes(4)


def test_an_empty_update_has_no_frames() -> None:
    assert (
        list(seal_frames(np.zeros(0), 1.0, np.random.default_rng(0).random, Masks("a", {}, CONTEXT), KEY))
        == []
    )


def test_a_missing_column_is_not_filled_up() -> None:
    update = np.zeros(PACKING.values_per_frame + 1)
    frames = list(seal_frames(update, 1.0, np.random.default_rng(0).random, Masks("a", {}, CONTEXT), KEY))
    with pytest.raises(OpeningRefused):
        open_frames([frames[:1]], update.size, KEY)
