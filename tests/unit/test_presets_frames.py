"""All four presets through the real library: frames, keys, sums, sealing one frame at a time."""

from __future__ import annotations

import numpy as np
import pytest

from crypto.frames import SealContext
from crypto.masks import MaskContext
from crypto.packing import mean_update
from crypto.presets import PRESETS, packing_for
from crypto.residues import pack_bits, unpack_bits
from crypto.sealing import masks_for, open_frames, seal_frames
from crypto.secret import SealKey, self_test
from protocol.errors import CapacityExceeded, FrameInvalid, OpeningRefused

CASES = [
    ("exact16", 8, 3.52),
    ("compact", 8, 2.35),
    ("fine", 64, 3.77),
    ("wide", 8, 3.90),
    ("wide", 1024, 3.90),
    ("ckks", 8, 25.05),
    ("ckks", 256, 25.05),
]


@pytest.mark.parametrize(("name", "cohort", "largest"), CASES)
def test_a_sealed_sum_is_the_plain_sum(name: str, cohort: int, largest: float) -> None:
    packing = packing_for(name, cohort)
    assert packing.frame_bytes / packing.values_per_frame < largest
    context = SealContext(packing)
    self_test(context)
    key, rng = SealKey.generate(context), np.random.default_rng(1)
    names = ["a" * 64, "b" * 64, "c" * 64]
    chains = {
        frozenset(pair): bytes([sum(map(ord, pair[0] + pair[1])) % 251]) * 32
        for pair in ((x, y) for x in names for y in names if x < y)
    }
    mask = MaskContext("s", 1, "train", "l", "m", packing.plain_modulus)
    count = packing.values_per_frame + 5
    updates = [rng.uniform(-1, 1, count) for _ in names]
    sealed = []
    for own, update in zip(names, updates, strict=True):
        peers = {peer: chains[frozenset((own, peer))] for peer in names if peer != own}
        frames = seal_frames(update, 1.0, rng.random, masks_for(packing, own, peers, mask), key)
        sealed.append(list(frames))
    sums = open_frames(list(zip(*sealed, strict=True)), count, key)
    mean = mean_update(sums, len(names), 1.0, packing)
    assert np.max(np.abs(mean - np.mean(updates, axis=0))) <= 1.0 / packing.half_levels
    with pytest.raises(OpeningRefused):
        open_frames(list(zip(*sealed[:2], strict=True)), count, key)


@pytest.mark.parametrize("bits", [7, 31, 56, 60, 64])
def test_packing_bits_is_reversible_and_has_no_gaps(bits: int) -> None:
    rng = np.random.default_rng(2)
    words = rng.integers(0, 2**bits - 1, 4096, dtype=np.uint64, endpoint=True)
    data = pack_bits(words, bits)
    assert len(data) == 4096 * bits // 8
    assert np.array_equal(unpack_bits(data, bits), words)
    whole = sum(int(word) << (bits * index) for index, word in enumerate(words))
    assert data == whole.to_bytes(len(data), "little")


@pytest.mark.parametrize("name", ["fine", "wide", "ckks"])
def test_a_residue_at_its_prime_is_refused(name: str) -> None:
    packing = packing_for(name, 8)
    context = SealContext(packing)
    frame = SealKey.generate(context).encrypt(np.zeros(packing.preset.slots, dtype=np.uint64))
    words = context.residues(frame[64:])
    words[-1] = packing.preset.coefficient_moduli[-1]
    with pytest.raises(FrameInvalid):
        context.ciphertext(frame[:64] + context.residue_bytes(words))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_one_owner_above_the_capacity_is_refused(name: str) -> None:
    largest = PRESETS[name].plain_bits[-1][0]
    packing_for(name, largest)
    with pytest.raises(CapacityExceeded):
        packing_for(name, largest + 1)
