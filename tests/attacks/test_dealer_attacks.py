"""Attacks on the key that the dealer deals: two keys, a foreign one, one that another hand sealed."""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hostile import HostileRun, nothing_released, resigned

from crypto.agreement import HpkeKey, WrapContext, seal_dealt, wrap
from crypto.frames import SealContext
from crypto.secret import SealKey
from protocol.messages import Join, KeysReply, RosterReply, Wraps

VICTIM, OTHER, EVIL = 3, 2, 1
"""The victim has the highest fingerprint; owner 0 is the dealer."""


def second_deal(run: HostileRun) -> RosterReply:
    """Let a bought dealer deal another key, signed as well as the first one."""
    key = SealKey.generate(SealContext(run.packing()))
    deal = dealing(run, key.residues())
    return resigned(run, 0, deal, key_commitment=key.commitment())


def dealing(run: HostileRun, secret: bytes) -> RosterReply:
    """Return the dealer's reply with something else dealt; it is not signed yet."""
    roster_hash, keys = str(run.state(0).roster_hash), {}
    content_key, sealed = seal_dealt(secret, run.run, roster_hash, run.print_(0))
    for index in run.indices[1:]:
        public = Join.from_fields(run.joins[index].join.body).hpke_key
        context = WrapContext(run.run, roster_hash, run.print_(0), run.print_(index), "bfv")
        keys[run.print_(index)] = wrap(public, content_key, context)
    return run.rosters[0].model_copy(update={"keys": keys, "dealt": sealed})


def test_a_dealer_that_commits_to_two_keys_splits_the_session_and_nothing_is_sealed(
    run: HostileRun,
) -> None:
    run.join().roster()
    first, second = run.rosters[0], second_deal(run)
    sessions = {}
    for index, deal in ((1, first), (2, first), (3, second)):
        run.rosters[0] = deal
        answered = run.federation.accepted(index, "query.keys", run.keys_request(index))
        sessions[index] = KeysReply.from_bytes(answered.body).session.body["session"]
    assert sessions[1] == sessions[2] != sessions[3]
    run.session = sessions[1]
    with nothing_released(run, 3):
        assert run.federation.refused(3, "train.fit", run.fit_request(1)) == "FS-ROSTER-02"
    ready = run.fit(1, [1, 2])
    run.session = sessions[3]
    split_off = run.fit(1, [3])
    with nothing_released(run, 1, 2, 3):
        request = run.seal_request(1, [*ready, *split_off])
        assert run.federation.refused(3, "train.seal", request) == "FS-ROSTER-01"
        run.session = sessions[1]
        request = run.seal_request(1, [*ready, *split_off])
        assert run.federation.refused(1, "train.seal", request) == "FS-ROSTER-01"


def test_a_key_that_is_not_the_committed_one_is_refused(run: HostileRun) -> None:
    run.join().roster()
    committed = Wraps.from_fields(run.rosters[0].wraps.body).key_commitment
    run.rosters[0] = resigned(run, 0, second_deal(run), key_commitment=committed)
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "query.keys", run.keys_request(VICTIM)) == "FS-WIRE-03"


def test_a_dealt_key_with_impossible_residues_is_refused(run: HostileRun) -> None:
    run.join().roster()
    honest = run.rosters[0]
    for residues in (b"\xff" * 4096 * 7, b"", bytes(4096 * 7 + 1)):
        run.rosters[0] = honest
        run.rosters[0] = resigned(run, 0, dealing(run, residues))
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "query.keys", run.keys_request(VICTIM)) == "FS-FRAME-01"


def test_a_dealt_key_that_the_coordinator_or_a_bought_owner_replaces_is_refused(run: HostileRun) -> None:
    """Every member knows the content key, so that the dealer's signature must cover what it opens."""
    run.join().roster()
    request = run.keys_request(VICTIM)
    other = dealing(run, SealKey.generate(SealContext(run.packing())).residues())
    content_key = opened_content_key(run, EVIL)
    forged = AESGCM(content_key).encrypt(bytes(12), bytes(4096 * 7), b"")
    for dealt in (other.dealt, forged, b"", None, (request.dealt or b"")[:-1]):
        changed = request.model_copy(update={"dealt": dealt})
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "query.keys", changed) == "FS-WIRE-03"


def test_a_dealt_key_that_its_dealer_sealed_for_another_run_is_refused(run: HostileRun) -> None:
    run.join().roster()
    honest = run.rosters[0]
    key = SealKey.generate(SealContext(run.packing()))
    _, sealed = seal_dealt(key.residues(), "ab" * 32, str(run.state(0).roster_hash), run.print_(0))
    for dealt in (sealed, b"", b"short"):
        run.rosters[0] = resigned(run, 0, honest.model_copy(update={"dealt": dealt}))
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "query.keys", run.keys_request(VICTIM)) == "FS-WIRE-03"


def opened_content_key(run: HostileRun, index: int) -> bytes:
    """Return the content key of what was dealt, as a bought owner opens it."""
    context = WrapContext(
        run.run, str(run.state(index).roster_hash), run.print_(0), run.print_(index), "bfv"
    )
    secret = run.state(index).hpke_secret
    assert secret is not None
    return HpkeKey.from_secret(secret).unwrap(run.rosters[0].keys[run.print_(index)], context)


def test_a_second_dealer_is_refused(run: HostileRun) -> None:
    run.join().roster()
    run.rosters[EVIL] = resigned(run, EVIL, run.rosters[EVIL], key_commitment="ab" * 32)
    assert run.federation.refused(OTHER, "query.keys", run.keys_request(OTHER)) == "FS-WIRE-03"
