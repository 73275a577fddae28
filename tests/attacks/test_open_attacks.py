"""Attacks on opening: crafted ciphertexts, second openings, foreign headers, missing and copied frames."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
from hostile import HostileFederation, HostileRun, Sealed, answers, nothing_released

from client import opening
from client.policy import Peers
from crypto.frames import SealContext, SealFile, serialized
from crypto.packing import pack
from crypto.secret import SealKey
from crypto.signing import sign
from protocol.messages import Header, OpenRequest
from protocol.plan import Plan

VICTIM, PEER, EVIL = 3, 2, 1
Attempt = tuple[list[Any], dict[int, Sealed]]


def open_refused(
    run: HostileRun, ready: Any, sealed: dict[int, Sealed], index: int = VICTIM, attempt: int = 1
) -> str:
    request, blob = run.open_request(attempt, ready, sealed)
    with nothing_released(run):
        return run.federation.refused(index, "query.open", request, blob)


def frames_of(run: HostileRun, sealed: Sealed) -> list[bytes]:
    return SealContext(run.packing()).split(sealed.frames, len(sealed.frames) // run.packing().frame_bytes)


# --- the decryption oracle ---------------------------------------------------------------------------


def crafted_frame(run: HostileRun) -> bytes:
    """Return c0 = round(q/t) at one place, with a seed of the coordinator's choice."""
    packing = run.packing()
    words = np.zeros(packing.preset.poly_modulus_degree, dtype=np.uint64)
    words[0] = (packing.preset.coefficient_modulus + packing.plain_modulus // 2) // packing.plain_modulus
    return bytes(64) + SealContext(packing).residue_bytes(words)


def crafted_ciphertext(context: SealContext) -> seal.Ciphertext:
    """Return the ciphertext c0 = 0, c1 = round(q/t), whose decryption is the key modulo t."""
    packing = context.packing
    degree = packing.preset.poly_modulus_degree
    words = np.zeros(2 * degree, dtype="<u8")
    words[degree] = (
        packing.preset.coefficient_modulus + packing.plain_modulus // 2
    ) // packing.plain_modulus
    body = struct.pack("<4Q", *context.seal.first_parms_id())
    body += struct.pack("<BQQQdQ", 0, 2, degree, 1, 1.0, 1)
    body += serialized(struct.pack("<Q", words.size) + words.tobytes())
    file = SealFile()
    file.write(serialized(body))
    ciphertext = seal.Ciphertext()
    ciphertext.load(context.seal, file.path)
    return ciphertext


def test_a_crafted_ciphertext_would_return_the_key_if_it_were_decrypted(session: HostileRun) -> None:
    """Why an owner decrypts nothing but its own sum: here is what the answer would hold."""
    key = session.bfv_key(EVIL)
    slots = key.decrypt(crafted_ciphertext(key.context))
    packing, plaintext = session.packing(), seal.Plaintext()
    seal.BatchEncoder(key.context.seal).encode(slots.tolist(), plaintext)
    coefficients = {plaintext[place] for place in range(plaintext.coeff_count())}
    assert coefficients <= {0, 1, packing.plain_modulus - 1}
    assert len(coefficients) == 3


def test_a_crafted_ciphertext_sent_to_open_is_refused(session: HostileRun) -> None:
    ready, sealed = session.sealed_attempt()
    for index in session.indices:
        crafted = {**sealed, index: Sealed(sealed[index].header, crafted_frame(session))}
        assert open_refused(session, ready, crafted) == "FS-FRAME-01"
    request, _ = session.open_request(1, ready, sealed)
    for blob in (b"", crafted_frame(session), crafted_frame(session) * 4):
        with nothing_released(session):
            assert session.federation.refused(VICTIM, "query.open", request, blob) == "FS-FRAME-01"


def test_crafted_frames_that_a_bought_owner_signs_do_not_open(session: HostileRun) -> None:
    ready, sealed = session.sealed_attempt()
    sealed[EVIL] = session.forged(EVIL, sealed[EVIL].header, [crafted_frame(session)])
    assert open_refused(session, ready, sealed) == "FS-ROUND-03"


# --- which list, how often ---------------------------------------------------------------------------


def test_nothing_is_opened_before_it_is_sealed(session: HostileRun) -> None:
    ready = session.fit(1)
    sealed = session.seal(1, ready, [0, 1, 2])
    assert open_refused(session, ready, sealed) == "FS-ROUND-01"


def test_a_list_that_was_not_sealed_is_not_opened(session: HostileRun) -> None:
    ready, sealed = session.sealed_attempt()
    del sealed[0]
    assert open_refused(session, ready[1:], sealed) == "FS-ROUND-01"


def test_a_victim_among_sybils_does_not_open(session: HostileRun, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, sealed = session.sealed_attempt()
    pinned = {"first": session.print_(PEER), "second": session.federation.owners[4].fingerprint}
    policy = session.owner(VICTIM).policy
    peers = Peers(pinned=pinned, min_known_peers=2)
    monkeypatch.setattr(session.owner(VICTIM), "policy", policy.model_copy(update={"peers": peers}))
    assert open_refused(session, ready, sealed) == "FS-ROSTER-01"


def resealed(run: HostileRun, sealed: dict[int, Sealed], chains: dict[str, bytes], value: int) -> Sealed:
    """Let a bought owner seal a second update for the same list, with masks that cancel."""
    packing = run.packing()
    values = np.full(650, value, dtype=np.uint64)
    return run.sealed_by_hand(EVIL, sealed[EVIL].header, chains, pack(values, packing))


def test_a_second_sum_of_one_attempt_is_not_opened(session: HostileRun) -> None:
    chains = session.state(EVIL).chain_keys
    ready, sealed = session.sealed_attempt()
    other = {**sealed, EVIL: resealed(session, sealed, chains, 5)}
    first = session.open(1, ready, sealed, VICTIM)
    assert open_refused(session, ready, other) == "FS-ROUND-01"
    assert session.open(1, ready, sealed, VICTIM) == first
    # The other sum was a good one: an owner that opened nothing yet opens it, and then that one alone.
    session.open(1, ready, other, PEER)
    assert open_refused(session, ready, sealed, PEER) == "FS-ROUND-01"


def test_an_opening_is_given_again_after_later_attempts_to_the_bit(session: HostileRun) -> None:
    ready, sealed = session.sealed_attempt(1)
    first = session.open(1, ready, sealed, VICTIM)
    session.sealed_attempt(2)
    assert session.open(1, ready, sealed, VICTIM) == first


# --- headers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, EVIL])
def test_a_header_of_something_else_is_refused(session: HostileRun, index: int) -> None:
    ready, sealed = session.sealed_attempt()
    honest = sealed[index]
    for changes in (
        {"session": "ab" * 32},
        {"attempt": 2},
        {"preset_hash": "ab" * 32},
        {"list_hash": "ab" * 32},
        {"model_hash": "ab" * 32},
        {"parameters": 651},
        {"frames": 2},
        {"frames": 0},
    ):
        sealed[index] = session.forged(index, honest.header, frames_of(session, honest), **changes)
        assert open_refused(session, ready, sealed) == "FS-WIRE-03", changes
    session.open(1, ready, {**sealed, index: honest}, VICTIM)


def test_headers_of_other_owners_than_the_list_are_refused(session: HostileRun) -> None:
    ready, sealed = session.sealed_attempt()
    for order in ((0, 1, 2), (1, 0, 2, 3), (0, 1, 1, 3), ()):
        headers = [sealed[index].header for index in order]
        request = OpenRequest(session=session.session, attempt=1, ready=ready, headers=headers)
        blob = b"".join(sealed[index].frames for index in order)
        with nothing_released(session):
            assert session.federation.refused(VICTIM, "query.open", request, blob) == "FS-ROSTER-01"


def test_a_header_under_another_owners_name_is_refused(session: HostileRun) -> None:
    ready, sealed = session.sealed_attempt()
    stolen = sealed[0].header.model_copy(update={"signer": session.print_(EVIL)})
    sealed[EVIL] = Sealed(stolen, sealed[0].frames)
    assert open_refused(session, ready, sealed) == "FS-WIRE-02"


def test_a_ready_message_in_place_of_a_header_is_refused(session: HostileRun) -> None:
    ready, sealed = session.sealed_attempt()
    sealed[EVIL] = Sealed(ready[EVIL], sealed[EVIL].frames)
    assert open_refused(session, ready, sealed) == "FS-WIRE-02"


def test_a_header_is_at_most_a_kilobyte(session: HostileRun) -> None:
    _, sealed = session.sealed_attempt()
    assert all(len(one.header.to_bytes()) <= 1024 for one in sealed.values())


# --- frames of others --------------------------------------------------------------------------------


def test_a_copied_ciphertext_is_refused(session: HostileRun) -> None:
    """A bought owner signs the victim's own frames to have the update counted twice."""
    ready, sealed = session.sealed_attempt()
    copied = frames_of(session, sealed[VICTIM])
    sealed[EVIL] = session.forged(EVIL, sealed[EVIL].header, copied)
    assert open_refused(session, ready, sealed, PEER) == "FS-ROUND-03"


def test_a_copied_ciphertext_that_was_encrypted_afresh_does_not_open(session: HostileRun) -> None:
    ready, sealed = session.sealed_attempt()
    key = session.bfv_key(EVIL)
    frames = frames_of(session, sealed[VICTIM])
    afresh = [key.encrypt(key.decrypt(key.context.ciphertext(frame))) for frame in frames]
    sealed[EVIL] = session.forged(EVIL, sealed[EVIL].header, afresh)
    assert open_refused(session, ready, sealed, PEER) == "FS-ROUND-03"


def test_frames_of_an_earlier_attempt_do_not_open(session: HostileRun) -> None:
    _, old = session.sealed_attempt(1)
    ready, sealed = session.sealed_attempt(2)
    replayed = {**sealed, PEER: old[PEER]}
    assert open_refused(session, ready, replayed, attempt=2) == "FS-WIRE-03"
    forged = session.forged(EVIL, sealed[EVIL].header, frames_of(session, old[EVIL]))
    assert open_refused(session, ready, {**sealed, EVIL: forged}, attempt=2) == "FS-ROUND-03"


def test_an_opening_of_another_run_is_refused(federation: HostileFederation, plan: Plan) -> None:
    first = federation.run(plan).established()
    ready, sealed = first.sealed_attempt()
    request, blob = first.open_request(1, ready, sealed)
    second = federation.run(plan).established()
    second.sealed_attempt()
    moved = request.model_copy(update={"session": second.session})
    with nothing_released(second):
        assert federation.refused(VICTIM, "query.open", moved, blob) == "FS-ROSTER-01"
    unknown = request.model_copy(update={"session": "ab" * 32})
    assert federation.refused(VICTIM, "query.open", unknown, blob) == "FS-ROSTER-02"


def test_frames_under_a_foreign_key_do_not_open(session: HostileRun) -> None:
    chains = session.state(EVIL).chain_keys
    ready, sealed = session.sealed_attempt()
    foreign = SealKey.generate(SealContext(session.packing()))
    slots = pack(np.zeros(650, dtype=np.uint64), session.packing())
    sealed[EVIL] = session.sealed_by_hand(EVIL, sealed[EVIL].header, chains, slots, foreign)
    assert open_refused(session, ready, sealed) == "FS-ROUND-03"


def test_frames_without_their_masks_do_not_open(session: HostileRun) -> None:
    ready, sealed = session.sealed_attempt()
    slots = pack(np.zeros(650, dtype=np.uint64), session.packing())
    frames = [session.bfv_key(EVIL).encrypt(row) for row in slots]
    sealed[EVIL] = session.forged(EVIL, sealed[EVIL].header, frames)
    assert open_refused(session, ready, sealed) == "FS-ROUND-03"


def honest_slots(run: HostileRun) -> Any:
    return pack(np.full(650, run.packing().half_levels, dtype=np.uint64), run.packing())


def two_in_a_check_slot(run: HostileRun) -> Any:
    slots = honest_slots(run)
    slots[0, -1] = 2
    return slots


def field_out_of_range(run: HostileRun) -> Any:
    slots = honest_slots(run)
    slots[0, 0] = run.packing().radix - 1
    return slots


def value_in_the_padding(run: HostileRun) -> Any:
    slots = honest_slots(run)
    slots[0, -5] = 1
    return slots


def test_rightly_masked_frames_with_impossible_content_do_not_open(session: HostileRun) -> None:
    chains = session.state(EVIL).chain_keys
    ready, sealed = session.sealed_attempt()
    for slots in (two_in_a_check_slot, field_out_of_range, value_in_the_padding):
        sealed[EVIL] = session.sealed_by_hand(EVIL, sealed[EVIL].header, chains, slots(session))
        assert open_refused(session, ready, sealed) == "FS-ROUND-03", slots.__name__
    sealed[EVIL] = session.sealed_by_hand(EVIL, sealed[EVIL].header, chains, honest_slots(session))
    session.open(1, ready, sealed, VICTIM)


# --- a sealed owner that disappears ------------------------------------------------------------------


def test_a_sum_without_a_sealed_owner_does_not_open(session: HostileRun) -> None:
    ready, sealed = session.sealed_attempt()
    gone = {index: one for index, one in sealed.items() if index != 0}
    request, blob = session.open_request(1, ready, gone)
    with nothing_released(session):
        assert session.federation.refused(VICTIM, "query.open", request, blob) == "FS-ROSTER-01"
    request, _ = session.open_request(1, ready, sealed)
    with nothing_released(session):
        assert session.federation.refused(VICTIM, "query.open", request, blob) == "FS-FRAME-01"


def test_without_the_check_slots_a_missing_owner_would_give_an_answer(
    session: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bought owner stands in for one that vanished; only the content tells."""
    ready, sealed = session.sealed_attempt()
    zero = [session.bfv_key(0).encrypt(np.zeros(4096, dtype=np.uint64))]
    sealed[0] = session.forged(0, sealed[0].header, zero)
    assert open_refused(session, ready, sealed) == "FS-ROUND-03"
    before = answers(session.owner(VICTIM), session.run)
    monkeypatch.setattr(opening.RunningSum, "open", lambda *_: np.zeros(650, dtype=np.uint64))
    session.open(1, ready, sealed, VICTIM)
    assert answers(session.owner(VICTIM), session.run) != before


def test_a_member_that_left_the_list_cannot_sign_for_it(federation: HostileFederation, plan: Plan) -> None:
    run = federation.run(plan, (0, 1, 2, 3, 4)).established()
    ready, sealed = run.sealed_attempt(1, [0, 1, 2, 3])
    header = Header.from_fields(sealed[0].header.body)
    stranger = Sealed(sign(federation.owners[4].credentials.signing_key, header), sealed[0].frames)
    assert open_refused(run, ready, {**sealed, 4: stranger}) == "FS-ROSTER-01"
