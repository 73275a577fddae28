"""Updates in parts: any order, again, for one list only, never half opened, nothing decrypted too early."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hostile import HostileRun, answers, nothing_released
from in_parts import (
    EVIL,
    FRAMES,
    PEER,
    SIZE,
    VICTIM,
    all_sealed,
    fetched_sums,
    frames_of,
    long_plan,
    open_requests,
    opened_in_parts,
    part_of,
    run_in_parts,
    sealed_in_parts,
    small_parts,
)

import crypto.parts
import crypto.secret
from client import rounds
from crypto.parts import sum_parts
from protocol.encoding import digest_bytes
from protocol.messages import Header, Opening, OpenReply

__all__ = ["long_plan", "run_in_parts", "small_parts"]


# --- sealing -----------------------------------------------------------------------------------------


def test_parts_in_any_order_and_again_are_the_same_bytes(
    run: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypted: list[int] = []
    honest = crypto.secret.SealKey.encrypt

    def counted(self: Any, slots: Any) -> bytes:
        encrypted.append(1)
        return honest(self, slots)

    ready = run.fit(1)
    monkeypatch.setattr(crypto.secret.SealKey, "encrypt", counted)
    sealed = sealed_in_parts(run, ready, VICTIM, order=[1, 2, 0])
    assert len(encrypted) == FRAMES
    assert sealed_in_parts(run, ready, VICTIM, order=[2, 0, 1]) == sealed
    assert len(encrypted) == FRAMES, "a part was encrypted twice"
    body = Header.from_fields(sealed.header.body)
    assert (body.parameters, body.frames) == (SIZE, FRAMES)
    assert len(set(frames_of(run, sealed))) == FRAMES


def test_a_part_is_not_made_before_it_is_needed(run: HostileRun, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    honest = rounds.seal_frames

    def watched(*arguments: Any) -> Iterator[bytes]:
        for frame in honest(*arguments):
            made.append(len(frame))
            yield frame

    monkeypatch.setattr(rounds, "seal_frames", watched)
    ready = run.fit(1)
    for part in range(FRAMES):
        part_of(run, ready, VICTIM, part)
        assert len(made) == part + 1


def test_values_are_erased_behind_the_last_part(run: HostileRun, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    honest = rounds.seal_frames

    def watched(values: Any, *arguments: Any) -> Iterator[bytes]:
        held.append(values)
        return honest(values, *arguments)

    monkeypatch.setattr(rounds, "seal_frames", watched)
    ready = run.fit(1)
    owner = run.owner(VICTIM)
    update = owner.pending[run.run].update
    part_of(run, ready, VICTIM, 0)
    assert not update.any(), "the update is kept beside the values that are sealed"
    assert held[0].any()
    sealed_in_parts(run, ready, VICTIM)
    assert not held[0].any()
    assert run.run not in owner.pending
    assert run.run not in owner.sealing


def test_the_first_part_settles_the_list(run: HostileRun) -> None:
    ready = run.fit(1)
    part_of(run, ready, VICTIM, 0)
    for part in range(FRAMES + 1):
        request = run.seal_request(1, ready[1:]).model_copy(update={"part": part})
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "train.seal", request) == "FS-ROUND-01"
    sealed_in_parts(run, ready, VICTIM)


def test_a_part_that_does_not_exist_is_refused(run: HostileRun) -> None:
    ready = run.fit(1)
    for part in (FRAMES, 2**53):
        request = run.seal_request(1, ready).model_copy(update={"part": part})
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "train.seal", request) == "FS-ROUND-01"
    part_of(run, ready, VICTIM, 0)
    request = run.seal_request(1, ready).model_copy(update={"part": FRAMES})
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "train.seal", request) == "FS-ROUND-01"


def test_a_crash_between_parts_voids_the_attempt_and_is_paid(run: HostileRun) -> None:
    """What a restarted node has: the stored answers and the state, and no update."""
    ready = run.fit(1)
    first = part_of(run, ready, VICTIM, 0)
    owner = run.owner(VICTIM)
    owner.pending.clear()
    owner.sealing.clear()
    assert part_of(run, ready, VICTIM, 0) == first
    request = run.seal_request(1, ready).model_copy(update={"part": 1})
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "train.seal", request) == "FS-ROUND-01"
    run.fit(2)
    spent = owner.ledger.spent(run.run)
    assert (spent.sealed, spent.void) == (1, 0), "a part has left the node: the attempt is no refund"


def test_an_attempt_that_is_half_sealed_is_given_up_for_the_next(run: HostileRun) -> None:
    ready = run.fit(1)
    part_of(run, ready, VICTIM, 0)
    later = run.fit(2)
    assert run.run not in run.owner(VICTIM).sealing
    request = run.seal_request(1, ready).model_copy(update={"part": 1})
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "train.seal", request) == "FS-ROUND-01"
    sealed_in_parts(run, later, VICTIM, attempt=2)
    assert run.owner(VICTIM).ledger.spent(run.run).sealed == 2


# --- opening -----------------------------------------------------------------------------------------


def test_a_sum_in_parts_opens_to_the_integers_and_again(run: HostileRun) -> None:
    ready, sealed = all_sealed(run)
    requests = open_requests(run, ready, sealed)
    orders = ([0, 1, 2, 3], [0, 3, 1, 2])
    opened = [
        opened_in_parts(run, requests, index, order)
        for index, order in zip((VICTIM, PEER), orders, strict=True)
    ]
    bodies = [Opening.from_fields(OpenReply.from_bytes(one.body).opening.body) for one in opened]
    assert bodies[0] == bodies[1]
    sums = [fetched_sums(run, requests[0][0], index) for index in (VICTIM, PEER)]
    assert sums[0] == sums[1]
    assert digest_bytes(sums[0]) == bodies[0].sums_hash
    assert len(sums[0]) == 4 * SIZE
    levels = run.packing().half_levels
    assert np.frombuffer(sums[0], "<u4").max() <= 8 * levels
    assert run.federation.accepted(VICTIM, "query.open", *requests[3]) == opened[0]
    assert opened_in_parts(run, requests, VICTIM, orders[0]).blob == b""
    assert fetched_sums(run, requests[0][0], VICTIM) == sums[0]


def test_sums_are_not_given_before_they_are_opened(run: HostileRun) -> None:
    ready, sealed = all_sealed(run)
    requests = open_requests(run, ready, sealed)
    for place in (0, 1, 2):
        run.federation.accepted(VICTIM, "query.open", *requests[place])
    for part in range(FRAMES + 1, FRAMES + 1 + len(sum_parts(SIZE)) + 1):
        asked = requests[0][0].model_copy(update={"part": part})
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "query.open", asked) == "FS-ROUND-01"


def test_nothing_is_decrypted_before_all_parts_were_verified_and_added(
    run: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    decrypted: list[int] = []
    honest = crypto.secret.SealKey.decrypt

    def counted(self: Any, total: Any) -> Any:
        decrypted.append(1)
        return honest(self, total)

    ready, sealed = all_sealed(run)
    requests = open_requests(run, ready, sealed)
    monkeypatch.setattr(crypto.secret.SealKey, "decrypt", counted)
    for place in (0, 1, 2, 1, 2):
        run.federation.accepted(VICTIM, "query.open", *requests[place])
    assert decrypted == []
    run.federation.accepted(VICTIM, "query.open", *requests[3])
    assert len(decrypted) == FRAMES


def test_a_part_before_the_digests_is_refused(run: HostileRun) -> None:
    ready, sealed = all_sealed(run)
    requests = open_requests(run, ready, sealed)
    for part in (1, 2, 3):
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "query.open", *requests[part]) == "FS-ROUND-01"
    run.federation.accepted(VICTIM, "query.open", *requests[0])
    run.owner(VICTIM).opening.clear()
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "query.open", *requests[1]) == "FS-ROUND-01"


def test_digests_that_no_header_covers_are_refused(run: HostileRun) -> None:
    ready, sealed = all_sealed(run)
    request, digests = open_requests(run, ready, sealed)[0]
    flipped = bytes([digests[0] ^ 1]) + digests[1:]
    swapped = digests[32 * FRAMES :] + digests[: 32 * FRAMES]
    for wrong in (flipped, swapped, digests[:-1], digests + bytes(32), b""):
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "query.open", request, wrong) == "FS-FRAME-01"
    assert run.run not in run.owner(VICTIM).opening


def test_frames_that_are_not_the_signed_ones_are_refused_and_the_right_ones_still_open(
    run: HostileRun,
) -> None:
    ready, sealed = all_sealed(run)
    requests = open_requests(run, ready, sealed)
    run.federation.accepted(VICTIM, "query.open", *requests[0])
    request, blob = requests[1]
    other = requests[2][1]
    size = run.packing().frame_bytes
    for wrong in (other, blob[:-1] + bytes([blob[-1] ^ 1]), blob[:-size], blob + blob[:size], b""):
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "query.open", request, wrong) == "FS-FRAME-01"
    opened = opened_in_parts(run, requests, VICTIM, [1, 2, 3])
    assert OpenReply.from_bytes(opened.body).opening is not None


def test_headers_cannot_be_exchanged_between_parts(run: HostileRun) -> None:
    """A bought owner signs two headers; the digests of the one must not cover frames of the other."""
    ready, sealed = all_sealed(run)
    honest = open_requests(run, ready, sealed)
    frames = frames_of(run, sealed[EVIL])
    forged = run.forged(EVIL, sealed[EVIL].header, [frames[0], frames[1], frames[0]])
    other = open_requests(run, ready, {**sealed, EVIL: forged})
    run.federation.accepted(VICTIM, "query.open", *honest[0])
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "query.open", *other[3]) == "FS-ROUND-01"
        assert run.federation.refused(VICTIM, "query.open", *other[0]) == "FS-ROUND-03"


def test_half_a_sum_is_forgotten_with_the_next_attempt(run: HostileRun) -> None:
    ready, sealed = all_sealed(run)
    requests = open_requests(run, ready, sealed)
    for place in (0, 1):
        run.federation.accepted(VICTIM, "query.open", *requests[place])
    run.fit(2, [VICTIM])
    assert run.run not in run.owner(VICTIM).opening


def test_receipts_are_not_stored(run: HostileRun) -> None:
    ready, sealed = all_sealed(run)
    requests = open_requests(run, ready, sealed)
    before = answers(run.owner(VICTIM), run.run)
    run.federation.accepted(VICTIM, "query.open", *requests[0])
    assert answers(run.owner(VICTIM), run.run) == before
