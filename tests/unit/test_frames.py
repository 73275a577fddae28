"""Frames: fixed in length, checked in every residue, exact in their sum, and of no use when forged."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import crypto.frames
from crypto.frames import SealContext
from crypto.masks import MaskContext, Masks, apply_masks
from crypto.packing import mean_update, pack, unpack_sum
from crypto.presets import PRESETS, SEED_BYTES, Packing, packing_for
from crypto.residues import pack_bits, unpack_bits
from crypto.sealing import open_frames, seal_frames
from crypto.secret import SealKey, self_test
from protocol.errors import EncryptionUnavailable, FrameInvalid, OpeningRefused

Integers = NDArray[np.uint64]

NAMES = [name for name in sorted(PRESETS) if PRESETS[name].scheme == "BFV"]
MUTATIONS = 2000
VECTORS = Path(__file__).parents[1] / "vectors"


def context_for(name: str, cohort: int) -> SealContext:
    return SealContext(packing_for(name, cohort))


@pytest.fixture(scope="module", params=NAMES)
def context(request: pytest.FixtureRequest) -> SealContext:
    return context_for(request.param, 8)


@pytest.fixture(scope="module")
def key(context: SealContext) -> SealKey:
    return SealKey.generate(context)


def random_slots(rng: np.random.Generator, packing: Packing) -> Integers:
    return rng.integers(0, packing.plain_modulus, 4096, dtype=np.uint64)


def residue(context: SealContext, frame: bytes, index: int, value: int) -> bytes:
    """The frame with one residue replaced, written without the code under test."""
    bits = context.packing.preset.coefficient_moduli[0].bit_length()
    number = int.from_bytes(frame[SEED_BYTES:], "little")
    number &= ~(((1 << bits) - 1) << index * bits)
    number |= value << index * bits
    return frame[:SEED_BYTES] + number.to_bytes(len(frame) - SEED_BYTES, "little")


def test_a_frame_has_its_fixed_length_and_goes_both_ways(context: SealContext, key: SealKey) -> None:
    slots = random_slots(np.random.default_rng(1), context.packing)
    frames = [key.encrypt(slots) for _ in range(3)]
    assert {len(frame) for frame in frames} == {context.packing.frame_bytes}
    assert len(set(frames)) == 3
    assert len({frame[:SEED_BYTES] for frame in frames}) == 3
    for frame in frames:
        assert np.array_equal(key.open_sum([[frame]])[0], slots)


@pytest.mark.parametrize("owners", [2, 3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_the_opened_sum_is_the_integer_sum_modulo_t(name: str, owners: int) -> None:
    context = context_for(name, owners)
    dealer = SealKey.generate(context)
    keys = [dealer] + [SealKey.from_residues(context, dealer.residues()) for _ in range(owners - 1)]
    rng, modulus = np.random.default_rng(owners), context.packing.plain_modulus
    columns, expected = [], []
    for fill in (None, modulus - 1, 0):
        rows = [
            random_slots(rng, context.packing) if fill is None else np.full(4096, fill, dtype=np.uint64)
            for _ in range(owners)
        ]
        columns.append([key.encrypt(row) for key, row in zip(keys, rows, strict=True)])
        expected.append([sum(slot) % modulus for slot in zip(*(row.tolist() for row in rows), strict=True)])
    for key in (keys[0], keys[-1]):
        assert key.open_sum(columns).tolist() == expected


@pytest.mark.parametrize(
    ("name", "cohort"), [(name, cohort) for name in NAMES for cohort, _ in PRESETS[name].plain_bits]
)
def test_the_largest_cohort_of_every_row_opens_exactly(name: str, cohort: int) -> None:
    """Fresh ciphertexts up to the limit; above 64 owners a part is added again in their place."""
    context = context_for(name, cohort)
    key, modulus = SealKey.generate(context), context.packing.plain_modulus
    rows = [np.full(4096, modulus - 1, dtype=np.uint64)]
    rows += [random_slots(np.random.default_rng(i), context.packing) for i in range(min(cohort, 64) - 1)]
    frames = [key.encrypt(row) for row in rows]
    times = [cohort // len(rows)] * len(rows)
    opened = key.open_sum([[frame for frame, n in zip(frames, times, strict=True) for _ in range(n)]])[0]
    columns = zip(*(row.tolist() for row in rows), strict=True)
    assert opened.tolist() == [sum(column) * times[0] % modulus for column in columns]


def test_masked_updates_open_to_the_sum_for_the_whole_list_only(context: SealContext, key: SealKey) -> None:
    packing, rng = context.packing, np.random.default_rng(3)
    owners = ["a", "b", "c"]
    bound_to = MaskContext("s", 1, "train", "l", "m", packing.plain_modulus)
    values = [rng.integers(0, 2 * packing.half_levels, 5000, dtype=np.uint64) for _ in owners]
    frames = []
    for owner, value in zip(owners, values, strict=True):
        chains = {peer: bytes([ord(owner) ^ ord(peer)] * 32) for peer in owners if peer != owner}
        frames.append(key.encrypt(apply_masks(pack(value, packing), owner, chains, bound_to)[0]))
    opened = unpack_sum(key.open_sum([frames]), 5000, 3, packing)
    assert opened.tolist() == [sum(column) for column in zip(*(v.tolist() for v in values), strict=True)]
    for some in (frames[:1], frames[:2], frames[1:], [*frames, frames[0]]):
        with pytest.raises(OpeningRefused):
            unpack_sum(key.open_sum([some]), 5000, len(some), packing)


def test_a_sealed_update_opens_to_its_sum_frame_by_frame() -> None:
    """Three owners, three frames each; a lost, a repeated or a moved frame is refused."""
    context = context_for("exact16", 3)
    key, packing, rng = SealKey.generate(context), context.packing, np.random.default_rng(5)
    size, owners = 2 * packing.values_per_frame + 7, ["a", "b", "c"]
    bound_to = MaskContext("s", 1, "train", "l", "m", packing.plain_modulus)
    updates = [rng.uniform(-1, 1, size) for _ in owners]
    rows = []
    for owner, update in zip(owners, updates, strict=True):
        chains = {peer: bytes([ord(owner) ^ ord(peer)] * 32) for peer in owners if peer != owner}
        masks = Masks(owner, chains, bound_to)
        rows.append(list(seal_frames(update, 1.0, rng.random, masks, key)))
    columns = list(zip(*rows, strict=True))
    mean = mean_update(open_frames(columns, size, key), 3, 1.0, packing)
    assert np.abs(mean - np.mean(updates, axis=0)).max() <= 1.0 / packing.half_levels
    moved = [(rows[0][1], rows[1][0], rows[2][0]), *columns[1:]]
    for wrong in ([], columns[:2], [*columns, columns[0]], columns[::-1], moved):
        with pytest.raises(OpeningRefused):
            open_frames(wrong, size, key)


def test_a_frame_of_another_length_is_refused(context: SealContext, key: SealKey) -> None:
    frame = key.encrypt(np.zeros(4096, dtype=np.uint64))
    for wrong in (b"", frame[:1], frame[:SEED_BYTES], frame[:-1], frame[1:], frame + b"\0", frame * 2):
        with pytest.raises(FrameInvalid) as refused:
            context.ciphertext(wrong)
        assert refused.value.code == "FS-FRAME-01"


def test_a_residue_that_is_not_below_its_modulus_is_refused_at_every_place(
    context: SealContext, key: SealKey
) -> None:
    preset = context.packing.preset
    frame = key.encrypt(np.zeros(4096, dtype=np.uint64))
    for row, modulus in enumerate(preset.coefficient_moduli):
        for place in (0, 1, 2, 7, 2047, 2048, 4094, 4095):
            index = row * 4096 + place
            context.ciphertext(residue(context, frame, index, modulus - 1))
            for value in (modulus, modulus + 1, (1 << preset.coefficient_moduli[0].bit_length()) - 1):
                with pytest.raises(FrameInvalid, match="residue"):
                    context.ciphertext(residue(context, frame, index, value))


def test_all_bits_set_are_refused(context: SealContext) -> None:
    with pytest.raises(FrameInvalid):
        context.ciphertext(b"\xff" * context.packing.frame_bytes)


def test_a_blob_is_cut_only_into_whole_frames(context: SealContext) -> None:
    size = context.packing.frame_bytes
    blob = bytes(range(256)) * (2 * size // 256 + 1)
    assert b"".join(context.split(blob[: 2 * size], 2)) == blob[: 2 * size]
    assert context.split(b"", 0) == []
    for length, frames in ((2 * size - 1, 2), (2 * size + 1, 2), (2 * size, 1), (2 * size, 3), (0, 1)):
        with pytest.raises(FrameInvalid):
            context.split(blob[:length], frames)


def test_no_frame_is_no_sum(key: SealKey) -> None:
    with pytest.raises(FrameInvalid):
        key.open_sum([[]])


def test_a_foreign_key_opens_to_nothing(context: SealContext, key: SealKey) -> None:
    packing = context.packing
    frame = key.encrypt(pack(np.zeros(100, dtype=np.uint64), packing)[0])
    with pytest.raises(OpeningRefused):
        unpack_sum(SealKey.generate(context).open_sum([[frame]]), 100, 1, packing)


def test_key_residues_go_both_ways(context: SealContext, key: SealKey) -> None:
    residues = key.residues()
    assert len(residues) == context.packing.residues_bytes == context.packing.frame_bytes - SEED_BYTES
    copy = SealKey.from_residues(context, residues)
    assert copy.residues() == residues
    assert copy.commitment() == key.commitment()
    assert SealKey.generate(context).commitment() != key.commitment()
    assert context.residue_bytes(context.residues(residues)) == residues


def test_malformed_key_residues_are_refused(context: SealContext, key: SealKey) -> None:
    residues = key.residues()
    for wrong in (b"", residues[:-1], residues + b"\0", b"\xff" * len(residues)):
        with pytest.raises(FrameInvalid):
            SealKey.from_residues(context, wrong)


@pytest.mark.parametrize("bits", [1, 7, 8, 31, 33, 56, 60, 64])
def test_packed_bits_are_one_little_endian_number(bits: int) -> None:
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 2**64 - 1, 64, dtype=np.uint64, endpoint=True) >> np.uint64(64 - bits)
    words[:2] = 0, (1 << bits) - 1
    number = sum(word << index * bits for index, word in enumerate(words.tolist()))
    data = pack_bits(words, bits)
    assert data == number.to_bytes(8 * bits, "little")
    assert np.array_equal(unpack_bits(data, bits), words)


def mutated(rng: np.random.Generator, frame: bytes) -> bytes:
    """One hostile change: bits, bytes, lengths, places, regions."""
    data = bytearray(frame)
    start, end = sorted(rng.integers(0, len(data), 2).tolist())
    kind = int(rng.integers(8))
    if kind <= 2:
        bit = int(rng.integers(8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
    elif kind == 3:
        bit = int(rng.integers(8 * SEED_BYTES))
        data[bit // 8] ^= 1 << bit % 8
    elif kind == 4:
        data[start] = int(rng.choice([0, 1, 127, 128, 255]))
    elif kind == 5:
        data = data[:end] if rng.integers(2) else data + data[start:end] + b"\0"
    elif kind == 6:
        data[start:end] = bytes(end - start)
    else:
        data[start:end] = data[start:end][::-1]
    return bytes(data)


def opens_to(key: SealKey, frames: Sequence[bytes], parameters: int) -> list[int] | None:
    """The sums, or None where the frames or what they open to are refused. Nothing else may happen."""
    packing = key.context.packing
    try:
        sums = unpack_sum(key.open_sum([frames]), parameters, len(frames), packing)
    except (FrameInvalid, OpeningRefused):
        return None
    return [int(value) for value in sums]


def test_a_mutated_frame_never_opens_to_another_sum() -> None:
    """2,000 hostile frames among honest ones: no crash, and no sum but the honest one.

    A change of a residue's lowest bits is no more than a little noise; it opens to the right sum.
    """
    context = context_for("exact16", 3)
    key, packing, rng = SealKey.generate(context), context.packing, np.random.default_rng(2024)
    size = packing.values_per_frame
    values = [rng.integers(0, 2 * packing.half_levels, size, dtype=np.uint64) for _ in range(3)]
    honest = [key.encrypt(pack(value, packing)[0]) for value in values]
    expected = opens_to(key, honest, size)
    assert expected == [sum(column) for column in zip(*(v.tolist() for v in values), strict=True)]
    refused = 0
    for _ in range(MUTATIONS):
        frame = mutated(rng, honest[2])
        opened = opens_to(key, [honest[0], honest[1], frame], size)
        refused += opened is None
        assert opened is None or opened == expected
    assert refused > 0.85 * MUTATIONS


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_above_the_noise_is_always_refused(name: str) -> None:
    """In the seed any bit will do; in a residue, any bit that is worth more than q / t."""
    context = context_for(name, 8)
    key, packing, rng = SealKey.generate(context), context.packing, np.random.default_rng(6)
    preset = packing.preset
    honest = [key.encrypt(pack(np.zeros(10, dtype=np.uint64), packing)[0]) for _ in range(3)]
    assert opens_to(key, honest, 10) == [0] * 10
    lowest = 0
    if len(preset.coefficient_moduli) == 1:
        lowest = (preset.coefficient_modulus // packing.plain_modulus).bit_length()
    for _ in range(60):
        index = int(rng.integers(4096 * len(preset.coefficient_moduli)))
        in_residue = 8 * SEED_BYTES + preset.coefficient_moduli[0].bit_length() * index
        in_residue += int(rng.integers(lowest, preset.coefficient_moduli[0].bit_length()))
        for bit in (int(rng.integers(8 * SEED_BYTES)), in_residue):
            data = bytearray(honest[0])
            data[bit // 8] ^= 1 << bit % 8
            assert opens_to(key, [bytes(data), *honest[1:]], 10) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_library_passes_its_self_test(name: str) -> None:
    self_test(context_for(name, PRESETS[name].plain_bits[-1][0]))


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        ("_SEAL_VERSION", (4, 1)),
        ("_SEAL_VERSION", (9, 9)),
        ("_SEAL_MAGIC", 0xBEEF),
        ("_NO_COMPRESSION", 2),
        ("_BLAKE2XB", 2),
    ],
)
def test_a_skeleton_that_does_not_fit_the_library_is_noticed(
    constant: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crypto.frames, constant, value)
    with pytest.raises(EncryptionUnavailable) as refused:
        self_test(context_for("exact16", 8))
    assert refused.value.code == "FS-FRAME-02"


def test_a_sum_that_does_not_open_to_what_went_in_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    encrypt = SealKey.encrypt
    monkeypatch.setattr(SealKey, "encrypt", lambda key, slots: encrypt(key, np.roll(slots, 1)))
    with pytest.raises(EncryptionUnavailable, match="test sum"):
        self_test(context_for("exact16", 8))


def test_the_published_frames_open() -> None:
    vector = json.loads((VECTORS / "bfv.json").read_text())
    context = context_for(vector["preset"], vector["cohort"])
    key = SealKey.from_residues(context, base64.b64decode(vector["key_residues"]))
    assert key.commitment() == vector["key_commitment"]
    frames = [base64.b64decode(owner["frame"]) for owner in vector["owners"]]
    opened = unpack_sum(key.open_sum([frames]), vector["parameters"], len(frames), context.packing)
    multipliers, span = [owner["multiplier"] for owner in vector["owners"]], 2 * vector["half_levels"] + 1
    assert opened.tolist() == [
        sum(index * multiplier % span for multiplier in multipliers)
        for index in range(vector["parameters"])
    ]
