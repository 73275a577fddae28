"""Attacks with malformed frames: flipped, truncated, extended, residues that are not below q."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hostile import HostileFederation, HostileRun, Sealed, nothing_released

from crypto.frames import SealContext
from crypto.presets import SEED_BYTES
from protocol.errors import FrameInvalid
from protocol.plan import Plan

VICTIM, EVIL = 3, 1
Attempt = tuple[HostileRun, list[Any], dict[int, Sealed]]


@pytest.fixture(scope="module")
def attempt(federation: HostileFederation, plan: Plan) -> Iterator[Attempt]:
    """One sealed attempt; a refusal changes nothing, so all attacks of this module share it."""
    run = federation.run(plan).established()
    ready, sealed = run.sealed_attempt()
    yield run, ready, sealed
    run.open(1, ready, sealed, VICTIM)


def refused(attempt: Attempt, frames: bytes, index: int, *, signed: bool) -> str:
    run, ready, sealed = attempt
    honest = sealed[index]
    changed = run.forged(index, honest.header, [frames]) if signed else Sealed(honest.header, frames)
    request, blob = run.open_request(1, ready, {**sealed, index: changed})
    with nothing_released(run):
        return run.federation.refused(VICTIM, "query.open", request, blob)


@pytest.mark.parametrize("place", ["seed", "first residue", "last byte", "anywhere"])
def test_a_flipped_bit_is_noticed(attempt: Attempt, place: str) -> None:
    frame = attempt[2][0].frames
    places = {"seed": 3, "first residue": SEED_BYTES, "last byte": len(frame) - 1}
    position = places.get(place, random.Random(7).randrange(len(frame)))
    flipped = bytearray(frame)
    flipped[position] ^= 1
    assert refused(attempt, bytes(flipped), 0, signed=False) == "FS-FRAME-01"


@pytest.mark.parametrize(
    ("position", "bit"),
    [(3, 0), (SEED_BYTES - 1, 7), (SEED_BYTES + 5, 7), (-1, 0), (20_006, 7)],
    ids=["seed", "end of seed", "first residue", "last residue", "middle"],
)
def test_a_flipped_bit_above_the_noise_under_its_owners_signature_does_not_open(
    attempt: Attempt, position: int, bit: int
) -> None:
    flipped = bytearray(attempt[2][EVIL].frames)
    flipped[position] ^= 1 << bit
    assert refused(attempt, bytes(flipped), EVIL, signed=True) == "FS-ROUND-03"


def test_a_flipped_bit_below_the_noise_under_its_owners_signature_changes_no_sum(
    session: HostileRun,
) -> None:
    ready, sealed = session.sealed_attempt()
    flipped = bytearray(sealed[EVIL].frames)
    flipped[SEED_BYTES] ^= 1
    changed = session.forged(EVIL, sealed[EVIL].header, [bytes(flipped)])
    _, sums = session.open(1, ready, sealed, VICTIM)
    assert session.open(1, ready, {**sealed, EVIL: changed}, 0)[1] == sums


@pytest.mark.parametrize("signed", [False, True])
def test_frames_of_another_length_are_refused(attempt: Attempt, signed: bool) -> None:
    frame = attempt[2][EVIL].frames
    for changed in (b"", frame[:-1], frame[1:], frame + b"\0", frame * 2, frame[: len(frame) // 2]):
        assert refused(attempt, changed, EVIL, signed=signed) == "FS-FRAME-01"


def test_lengths_that_make_up_for_each_other_are_refused(attempt: Attempt) -> None:
    run, ready, sealed = attempt
    longer = run.forged(0, sealed[0].header, [sealed[0].frames + b"\0"])
    shorter = run.forged(1, sealed[1].header, [sealed[1].frames[:-1]])
    request, blob = run.open_request(1, ready, {**sealed, 0: longer, 1: shorter})
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "query.open", request, blob) == "FS-FRAME-01"


def test_a_residue_that_is_not_below_the_modulus_is_refused(attempt: Attempt) -> None:
    context = SealContext(attempt[0].packing())
    q, honest = attempt[0].packing().preset.coefficient_modulus, attempt[2][EVIL].frames
    for place, value in ((0, q), (1, q + 1), (2047, 2**56 - 1), (4095, q)):
        words = context.residues(honest[SEED_BYTES:])
        words[place] = value
        frame = honest[:SEED_BYTES] + context.residue_bytes(words)
        assert refused(attempt, frame, EVIL, signed=True) == "FS-FRAME-01"


def test_the_largest_residue_is_accepted_and_the_next_is_not(attempt: Attempt) -> None:
    packing = attempt[0].packing()
    context, q = SealContext(packing), packing.preset.coefficient_modulus
    words = np.full(packing.preset.poly_modulus_degree, q - 1, dtype=np.uint64)
    context.ciphertext(bytes(SEED_BYTES) + context.residue_bytes(words))
    words[-1] = q
    with pytest.raises(FrameInvalid):
        context.ciphertext(bytes(SEED_BYTES) + context.residue_bytes(words))


def test_random_bytes_never_reach_the_library_unchecked(attempt: Attempt) -> None:
    context, generator = SealContext(attempt[0].packing()), random.Random(11)
    size = attempt[0].packing().frame_bytes
    for length in [*range(0, 200, 13), size - 1, size + 1, 2 * size, size]:
        with pytest.raises(FrameInvalid):
            context.ciphertext(generator.randbytes(length - 7) + b"\xff" * 7 if length > 7 else b"")
    for data in (b"\x5e\xa1\x10\x04\x03" + bytes(size - 5), bytes(size)):
        context.ciphertext(data)


def test_frames_that_change_places_between_owners_are_refused(attempt: Attempt) -> None:
    run, ready, sealed = attempt
    crossed = {
        **sealed,
        0: Sealed(sealed[0].header, sealed[EVIL].frames),
        EVIL: Sealed(sealed[EVIL].header, sealed[0].frames),
    }
    request, blob = run.open_request(1, ready, crossed)
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "query.open", request, blob) == "FS-FRAME-01"
