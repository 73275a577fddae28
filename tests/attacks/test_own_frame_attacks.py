"""Attacks on frames in SEAL's own form: nothing is parsed before its signature was verified."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hostile import HostileFederation, HostileRun, Sealed, nothing_released
from test_owner_attacks import carried_out, folder, resigned

import crypto.frames
import crypto.secret
from client.owner import Owner
from crypto.agreement import WrapContext, seal_dealt, wrap
from crypto.measuring import plan_context
from crypto.secret import SealKey
from crypto.signing import sign
from protocol.messages import Header, Join
from protocol.plan import Plan
from server.store import RunStore

__all__ = ["folder"]

VICTIM, EVIL = 3, 1
Q = 72057594037641217
PLACES = {"outer header": 9, "compression": 5, "parms id": 20, "seed type": -65, "zero byte": 104}
Attempt = tuple[HostileRun, list[Any], dict[int, Sealed]]


@pytest.fixture(scope="module")
def own_plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(run={"rounds": 1}, cohort={"maximum": 4}, encryption={"frames": "seal"})


@pytest.fixture(scope="module")
def attempt(federation: HostileFederation, own_plan: Plan) -> Iterator[Attempt]:
    """One sealed attempt; a refusal changes nothing, so all attacks of this module share it."""
    run = federation.run(own_plan).established()
    ready, sealed = run.sealed_attempt()
    yield run, ready, sealed
    run.open(1, ready, sealed, VICTIM)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What SEAL's parser was given, in order."""
    seen: list[bytes] = []
    original = crypto.frames.load_own_form

    def load(target: Any, context: Any, data: bytes, layout: Any) -> Any:
        seen.append(data)
        return original(target, context, data, layout)

    monkeypatch.setattr(crypto.frames, "load_own_form", load)
    return seen


def flipped(frame: bytes, place: int) -> bytes:
    changed = bytearray(frame)
    changed[place] ^= 1
    return bytes(changed)


def with_residue(frame: bytes, value: int) -> bytes:
    start = len(frame) - 64 - 17 - 8 * 4096
    return frame[:start] + struct.pack("<Q", value) + frame[start + 8 :]


def refused(attempt: Attempt, changed: Sealed, index: int) -> str:
    run, ready, sealed = attempt
    request, blob = run.open_request(1, ready, {**sealed, index: changed})
    with nothing_released(run):
        return run.federation.refused(VICTIM, "query.open", request, blob)


# --- an owner that opens -----------------------------------------------------------------------------


def test_an_owner_parses_nothing_that_no_signature_covers(attempt: Attempt, parsed: list[bytes]) -> None:
    """A changed frame under the honest header, in whatever region, and lengths of all kinds."""
    honest = attempt[2][0]
    for place in (*PLACES.values(), 97, 20_000, -1):
        changed = Sealed(honest.header, flipped(honest.frames, place))
        assert refused(attempt, changed, 0) == "FS-FRAME-01"
    for frames in (b"", honest.frames[:-1], honest.frames + b"\0", honest.frames * 2):
        assert refused(attempt, Sealed(honest.header, frames), 0) == "FS-FRAME-01"
    assert parsed == []


def test_an_owner_parses_nothing_under_a_forged_header(attempt: Attempt, parsed: list[bytes]) -> None:
    """The bought owner signs in the name of another, and for another round."""
    run, _, sealed = attempt
    header = Header.from_fields(sealed[0].header.body)
    stolen = sign(run.owner(EVIL).credentials.signing_key, header).model_copy(
        update={"signer": run.print_(0)}
    )
    assert refused(attempt, Sealed(stolen, sealed[0].frames), 0) == "FS-WIRE-02"
    other = run.forged(EVIL, sealed[EVIL].header, [sealed[EVIL].frames], attempt=2)
    assert refused(attempt, other, EVIL) == "FS-WIRE-03"
    assert parsed == []


@pytest.mark.parametrize("region", sorted(PLACES))
def test_a_signed_frame_with_another_fixed_part_never_reaches_the_parser(
    attempt: Attempt, parsed: list[bytes], monkeypatch: pytest.MonkeyPatch, region: str
) -> None:
    run, _, sealed = attempt
    loaded: list[str] = []
    original = crypto.frames.seal.Ciphertext.load

    def load(*arguments: Any) -> None:
        loaded.append("loaded")
        original(*arguments)

    monkeypatch.setattr(crypto.frames.seal.Ciphertext, "load", load)
    evil = flipped(sealed[EVIL].frames, PLACES[region])
    assert refused(attempt, run.forged(EVIL, sealed[EVIL].header, [evil]), EVIL) == "FS-FRAME-01"
    assert parsed[-1] == evil
    assert len(loaded) == len(parsed) - 1


def test_a_signed_residue_above_its_prime_is_refused_and_another_seed_does_not_open(
    attempt: Attempt,
) -> None:
    run, _, sealed = attempt
    honest = sealed[EVIL]
    for value in (Q, Q + 1, 2**56 - 1):
        evil = run.forged(EVIL, honest.header, [with_residue(honest.frames, value)])
        assert refused(attempt, evil, EVIL) == "FS-FRAME-01"
    evil = run.forged(EVIL, honest.header, [flipped(honest.frames, -1)])
    assert refused(attempt, evil, EVIL) == "FS-ROUND-03"


def test_a_key_in_seals_own_form_is_parsed_only_if_its_dealer_signed_it(
    federation: HostileFederation, own_plan: Plan, parsed: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a library that does not take residues; the coordinator relays another key than was wrapped."""
    monkeypatch.setattr(crypto.frames, "_SEAL_VERSION", (9, 9))
    monkeypatch.setattr(crypto.secret, "load_own_form", crypto.frames.load_own_form)
    run = federation.run(own_plan).join().roster()
    request = run.keys_request(VICTIM)
    key, dealt = request.key, request.dealt
    assert key is not None
    assert dealt is not None
    roster_hash = str(run.state(0).roster_hash)
    context = WrapContext(run.run, roster_hash, run.print_(0), run.print_(VICTIM), "bfv")
    public = Join.from_fields(run.joins[VICTIM].join.body).hpke_key
    own = SealKey.generate(plan_context(own_plan)).dealt()
    content_key, sealed = seal_dealt(own, run.run, roster_hash, run.print_(0))
    before = len(parsed)
    for swapped in (
        {"key": key[:-1] + bytes([key[-1] ^ 1])},
        {"dealt": dealt[:-1] + bytes([dealt[-1] ^ 1])},
        {"key": wrap(public, content_key, context), "dealt": sealed},
        {"dealt": sealed},
    ):
        changed = request.model_copy(update=swapped)
        assert federation.refused(VICTIM, "query.keys", changed) == "FS-WIRE-03"
    assert len(parsed) == before
    federation.accepted(VICTIM, "query.keys", request)
    assert len(parsed) > before
    assert len(parsed[-1]) > run.packing().residues_bytes


# --- the coordinator ---------------------------------------------------------------------------------


def unsigned(_: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
    return body, flipped(blob, 97)


def too_large(owner: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
    return resigned(owner, body, [with_residue(blob, Q)])


def compressed(owner: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
    return resigned(owner, body, [blob[:5] + b"\2" + blob[6:]])


@pytest.mark.parametrize("tamper", [unsigned, too_large, compressed])
def test_the_coordinator_refuses_bad_frames_and_parses_only_signed_ones(
    federation: HostileFederation,
    folder: RunStore,
    own_plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    parsed: list[bytes],
    tamper: Callable[[Owner, bytes, bytes], tuple[bytes, bytes]],
) -> None:
    sent: list[bytes] = []

    def tampering(owner: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
        changed = tamper(owner, body, blob)
        sent.append(changed[1])
        return changed

    carried_out(federation, folder, own_plan, "train.seal", tampering, monkeypatch, times=1)
    first = folder.attempts()[0]
    assert (first["void"], first["openings"]) == (True, [])
    assert folder.refusals()[0]["code"] == "FS-FRAME-01"
    assert (sent[0] in parsed) == (tamper is not unsigned)
