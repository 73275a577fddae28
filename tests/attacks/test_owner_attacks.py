"""Bought owners against the real coordinator: wrong sums, garbage, silence, and blaming others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message as FlowerMessage
from hostile import FIRST_NODE, HostileFederation, HostileRun, wrap_digests_of

import server.strategy
from client.owner import Owner
from crypto.frames import SealContext
from crypto.presets import SEED_BYTES, packing_for
from crypto.signing import sign
from crypto.wraps import WrapTree
from protocol.encoding import digest, digest_bytes
from protocol.errors import FedsealError, ProtocolViolation
from protocol.messages import Header, Opening, OpenReply, RosterReply, SealReply, Wraps
from protocol.plan import Plan
from protocol.records import from_record, to_record
from scenarios.grid import LocalGrid
from server.app import run_plan
from server.cohort.session import _check_wraps
from server.store import RunStore

EVIL, SILENT = 1, 2
Tamper = Callable[[Owner, bytes, bytes], tuple[bytes, bytes] | None]


def tampered(app: Any, owner: Owner, kind: str, tamper: Tamper, times: int = 10**6) -> Any:
    """Return an app that answers one kind of message as the attacker likes; None is silence."""
    count = 0

    def answer(message: Any, context: Any) -> Any:
        nonlocal count
        reply = app(message, context)
        if message.metadata.message_type != kind or reply.has_error() or count >= times:
            return reply
        count += 1
        changed = tamper(owner, *from_record(reply.content))
        if changed is None:
            raise FedsealError
        return FlowerMessage(to_record(*changed), reply_to=message)

    return answer


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "run")
    yield store
    store.close()


def carried_out(
    federation: HostileFederation,
    store: RunStore,
    plan: Plan,
    kind: str,
    tamper: Tamper,
    monkeypatch: pytest.MonkeyPatch,
    times: int = 10**6,
) -> str:
    """Let the real coordinator run a plan with one bought owner; returns how it ended."""
    monkeypatch.setattr(server.strategy, "_RETRY_PAUSE_S", 0.0)
    count = plan.cohort.maximum
    apps: dict[int, Any] = {FIRST_NODE + index: federation.apps[index] for index in range(count)}
    evil = federation.owners[EVIL]
    apps[FIRST_NODE + EVIL] = tampered(federation.apps[EVIL], evil, kind, tamper, times)
    for owner in federation.owners:
        owner.pending.clear()
    store.set("plan", plan.fields())
    trust = federation.owners[0].trust
    try:
        run_plan(LocalGrid(apps), store, trust)
    except FedsealError as error:
        return error.code
    return str(store.get("state"))


@pytest.fixture
def four(make_plan: Any) -> Plan:
    """Two rounds with four owners, three of which are enough."""
    plan: Plan = make_plan(run={"rounds": 2, "spare_attempts": 2}, cohort={"minimum": 3, "maximum": 4})
    return plan


def attempts_without(store: RunStore, fingerprint: str) -> list[bool]:
    """Return for each attempt that finished whether the bought owner was left out of it."""
    return [fingerprint not in one["contributors"] for one in store.attempts() if not one["void"]]


def events(store: RunStore, kind: str) -> list[dict[str, Any]]:
    return [facts for _, _, name, facts in store.events() if name == kind]


def lying_opening(owner: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
    opening = Opening.from_fields(OpenReply.from_bytes(body).opening.body)
    lie = np.full(len(blob) // 4, 3, dtype="<u4").tobytes()
    signed = sign(
        owner.credentials.signing_key, opening.model_copy(update={"sums_hash": digest_bytes(lie)})
    )
    return OpenReply(opening=signed).to_bytes(), lie


def test_an_opener_that_disagrees_is_outvoted_recorded_and_left_out(
    federation: HostileFederation, folder: RunStore, four: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = carried_out(federation, folder, four, "query.open", lying_opening, monkeypatch)
    assert state == "finished"
    evil = federation.owners[EVIL]
    (deviating,) = events(folder, "deviating")
    assert (deviating["owner"], deviating["opening"]["signer"]) == (evil.name, evil.fingerprint)
    assert attempts_without(folder, evil.fingerprint) == [False, True]
    for attempt in folder.attempts():
        assert all(opening["signer"] != evil.fingerprint for opening in attempt["openings"])


def test_further_openers_are_asked_one_by_one_until_a_quorum_agrees(
    federation: HostileFederation, folder: RunStore, make_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the three that are asked first one lies and one is silent; the fourth decides, the fifth rests."""
    asked: list[int] = []

    def watched(index: int, app: Any) -> Any:
        def answer(message: Any, context: Any) -> Any:
            if message.metadata.message_type == "query.open":
                asked.append(index)
            return app(message, context)

        return answer

    apps = [watched(index, app) for index, app in enumerate(federation.apps)]
    apps[SILENT] = tampered(apps[SILENT], federation.owners[SILENT], "query.open", silence)
    monkeypatch.setattr(federation, "apps", apps)
    plan = make_plan(run={"rounds": 1, "spare_attempts": 0})
    assert carried_out(federation, folder, plan, "query.open", lying_opening, monkeypatch) == "finished"
    assert (set(asked[:3]), asked[3:]) == ({EVIL, SILENT, 3}, [4])
    (attempt,) = folder.attempts()
    openers = [federation.owners[index].fingerprint for index in (3, 4)]
    assert [opening["signer"] for opening in attempt["openings"]] == openers
    assert [one["owner"] for one in events(folder, "deviating")] == [federation.owners[EVIL].name]


def resigned(owner: Owner, body: bytes, frames: list[bytes]) -> tuple[bytes, bytes]:
    header = Header.from_fields(SealReply.from_bytes(body).header.body)
    changed = header.model_copy(update={"frames_hash": digest([digest_bytes(frame) for frame in frames])})
    reply = SealReply(header=sign(owner.credentials.signing_key, changed))
    return reply.to_bytes(), b"".join(frames)


def garbage(owner: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
    return resigned(owner, body, [bytes(len(blob))])


def too_large(owner: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
    context = SealContext(packing_for("exact16", 4))
    words = np.full(4096, 2**56 - 1, dtype=np.uint64)
    return resigned(owner, body, [blob[:SEED_BYTES] + context.residue_bytes(words)])


def unsigned(owner: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
    return body, bytes(len(blob))


def silence(owner: Owner, body: bytes, blob: bytes) -> None:
    return None


def test_garbage_with_a_valid_header_voids_the_attempt_and_opens_nothing(
    federation: HostileFederation, folder: RunStore, four: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried_out(federation, folder, four, "train.seal", garbage, monkeypatch, times=1)
    first, second = folder.attempts()[:2]
    assert (first["void"], first["openings"], first["sums_hash"]) == (True, [], None)
    assert folder.refusals()[0]["code"] == "FS-ROUND-03"
    assert not second["void"]


def test_one_void_attempt_does_not_end_the_run(
    federation: HostileFederation, folder: RunStore, four: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bought owner that vanishes once, after all have sealed; the plan has two spare attempts."""
    state = carried_out(federation, folder, four, "train.seal", silence, monkeypatch, times=1)
    assert state == "finished"


@pytest.mark.parametrize(
    "tamper",
    [
        unsigned,
        silence,
        too_large,
    ],
)
def test_an_owner_whose_frames_voided_an_attempt_is_left_out(
    federation: HostileFederation,
    folder: RunStore,
    four: Plan,
    monkeypatch: pytest.MonkeyPatch,
    tamper: Tamper,
) -> None:
    carried_out(federation, folder, four, "train.seal", tamper, monkeypatch)
    assert [one["void"] for one in folder.attempts()] == [True, False, False]
    assert attempts_without(folder, federation.owners[EVIL].fingerprint) == [True, True]


def test_a_dealer_that_leaves_somebody_out_is_blamed_itself(run: HostileRun) -> None:
    """Else whoever got no key would refuse, and be left out in its place."""
    run.join().roster()
    dealer = run.rosters[0]
    for index in (0, EVIL):
        check_as_coordinator(run, index, run.rosters[index])
    fewer = {name: key for name, key in dealer.keys.items() if name != run.print_(EVIL)}
    liars = [
        (0, dealer.model_copy(update={"keys": fewer})),
        (0, dealer.model_copy(update={"dealt": None})),
        (0, dealer.model_copy(update={"keys": {}, "dealt": None})),
        (EVIL, run.rosters[EVIL].model_copy(update={"dealt": dealer.dealt})),
        (EVIL, run.rosters[EVIL].model_copy(update={"keys": run.rosters[EVIL].seeds, "dealt": b"x"})),
    ]
    for index, reply in liars:
        with pytest.raises(ProtocolViolation, match="deal"):
            check_as_coordinator(run, index, reply)
    # what all others would refuse, and be blamed for
    for changes in ({"nonce": "ab" * 32}, {"key_commitment": "ab" * 32}, {"roster_hash": "ab" * 32}):
        with pytest.raises(ProtocolViolation):
            check_as_coordinator(run, EVIL, run.rosters[EVIL], **changes)


def check_as_coordinator(run: HostileRun, index: int, reply: RosterReply, **changes: Any) -> None:
    """Check an answer to `query.roster` that its sender signed as it is."""
    body = Wraps.from_fields(reply.wraps.body)
    body = body.model_copy(update={"wraps_hash": WrapTree(wrap_digests_of(reply)).root, **changes})
    joins = [run.joins[other] for other in run.indices]
    _check_wraps(reply, body, joins, run.joins[index])


def test_a_member_that_sends_other_wraps_than_it_signed_is_left_out(
    federation: HostileFederation, folder: RunStore, four: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_wraps(_owner: Owner, body: bytes, _blob: bytes) -> tuple[bytes, bytes]:
        reply = RosterReply.from_bytes(body)
        seeds = {name: bytes(len(seed)) for name, seed in reply.seeds.items()}
        return reply.model_copy(update={"seeds": seeds}).to_bytes(), b""

    state = carried_out(federation, folder, four, "query.roster", other_wraps, monkeypatch)
    assert state == "finished"
    evil = federation.owners[EVIL].fingerprint
    assert evil not in folder.owners()
