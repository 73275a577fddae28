"""Attacks on joining: swapped wraps, two rosters, changed plans, and joining as an oracle."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hostile import HostileFederation, HostileRun, nothing_released, resigned, wrap_digests_of

from client import joining
from client.policy import Peers
from crypto.agreement import HpkeKey, WrapContext, wrap
from crypto.authority import create_authority
from crypto.signing import sign
from crypto.wraps import WrapTree
from protocol.messages import (
    Join,
    JoinReply,
    JoinRequest,
    KeysReply,
    KeysRequest,
    RosterReply,
)
from protocol.plan import Plan
from tasks.partition import DIGITS_RANGE
from tests.credentials import owner_of

VICTIM, OTHER, EVIL = 3, 2, 1
"""The victim has the highest fingerprint; owner 0 is the dealer."""


def own_wrap(run: HostileRun, sender: int, receiver: int, secret: bytes) -> bytes:
    """Wrap a secret as the coordinator can: HPKE's info holds public values only."""
    state = run.state(receiver)
    public = HpkeKey.from_secret(bytes(state.hpke_secret or b"")).public()
    context = WrapContext(run.run, str(state.roster_hash), run.print_(sender), run.print_(receiver), "pair")
    return wrap(public, secret, context)


# --- wraps -------------------------------------------------------------------------------------------


def test_a_wrap_replaced_by_the_coordinators_own_is_refused(run: HostileRun) -> None:
    run.join().roster()
    honest = run.keys_request(VICTIM)
    swapped = {**honest.seeds, run.print_(OTHER): own_wrap(run, OTHER, VICTIM, bytes(32))}
    with nothing_released(run):
        request = honest.model_copy(update={"seeds": swapped})
        assert run.federation.refused(VICTIM, "query.keys", request) == "FS-WIRE-03"


def test_without_the_check_of_wraps_the_coordinator_would_own_the_masks(
    run: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.join().roster()
    honest = run.keys_request(VICTIM)
    swapped = {**honest.seeds, run.print_(OTHER): own_wrap(run, OTHER, VICTIM, bytes(32))}
    monkeypatch.setattr(joining, "_check_wrap", lambda *_: None)
    request = honest.model_copy(update={"seeds": swapped})
    KeysReply.from_bytes(run.federation.accepted(VICTIM, "query.keys", request).body)


def test_two_wraps_that_change_places_are_refused(run: HostileRun) -> None:
    run.join().roster()
    honest = run.keys_request(VICTIM)
    first, second = run.print_(EVIL), run.print_(OTHER)
    crossed = {**honest.seeds, first: honest.seeds[second], second: honest.seeds[first]}
    request = honest.model_copy(update={"seeds": crossed})
    assert run.federation.refused(VICTIM, "query.keys", request) == "FS-WIRE-03"


def test_a_proof_that_is_made_to_fit_the_coordinators_wrap_is_refused(run: HostileRun) -> None:
    run.join().roster()
    honest = run.keys_request(VICTIM)
    forged = own_wrap(run, OTHER, VICTIM, bytes(32))
    reply = run.rosters[OTHER]
    lied = wrap_digests_of(reply.model_copy(update={"seeds": {**reply.seeds, run.print_(VICTIM): forged}}))
    request = honest.model_copy(
        update={
            "seeds": {**honest.seeds, run.print_(OTHER): forged},
            "proofs": {**honest.proofs, run.print_(OTHER): WrapTree(lied).proof(run.print_(VICTIM))},
        }
    )
    assert run.federation.refused(VICTIM, "query.keys", request) == "FS-WIRE-03"


def test_wraps_of_another_hand_under_an_owners_name_are_refused(run: HostileRun) -> None:
    run.join().roster()
    reply = resigned(run, EVIL, run.rosters[OTHER])
    renamed = reply.wraps.model_copy(update={"signer": run.print_(OTHER)})
    run.rosters[OTHER] = reply.model_copy(update={"wraps": renamed})
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "query.keys", run.keys_request(VICTIM)) == "FS-WIRE-02"


def test_a_malformed_wrap_that_a_member_really_signed_is_refused_by_code(run: HostileRun) -> None:
    run.join().roster()
    honest = run.rosters[EVIL]
    for ciphertext in (b"", b"short", bytes(2000), b"\xff" * 1200):
        seeds = {**honest.seeds, run.print_(VICTIM): ciphertext}
        run.rosters[EVIL] = resigned(run, EVIL, honest.model_copy(update={"seeds": seeds}))
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "query.keys", run.keys_request(VICTIM)) == "FS-WIRE-03"


def test_a_member_that_wraps_nothing_for_the_victim_is_refused(run: HostileRun) -> None:
    run.join().roster()
    seeds = {name: seed for name, seed in run.rosters[EVIL].seeds.items() if name != run.print_(VICTIM)}
    run.rosters[EVIL] = resigned(run, EVIL, run.rosters[EVIL].model_copy(update={"seeds": seeds}))
    assert run.federation.refused(VICTIM, "query.keys", run.keys_request(VICTIM)) == "FS-WIRE-03"


def test_a_half_seed_of_the_wrong_length_is_refused(run: HostileRun) -> None:
    run.join().roster()
    short = own_wrap(run, EVIL, VICTIM, bytes(31))
    seeds = {**run.rosters[EVIL].seeds, run.print_(VICTIM): short}
    run.rosters[EVIL] = resigned(run, EVIL, run.rosters[EVIL].model_copy(update={"seeds": seeds}))
    assert run.federation.refused(VICTIM, "query.keys", run.keys_request(VICTIM)) == "FS-WIRE-03"


def test_a_member_that_reveals_another_nonce_than_it_committed_to_is_refused(run: HostileRun) -> None:
    """The last to reveal could otherwise try nonces until the ring puts bought owners around a victim."""
    run.join().roster()
    run.rosters[EVIL] = resigned(run, EVIL, run.rosters[EVIL], nonce="ab" * 32)
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "query.keys", run.keys_request(VICTIM)) == "FS-WIRE-03"


def test_keys_are_fixed_once_and_the_one_time_key_is_gone(session: HostileRun) -> None:
    changed = session.keys_request(VICTIM).model_copy(update={"key": None})
    with nothing_released(session):
        assert session.federation.refused(VICTIM, "query.keys", changed) == "FS-WIRE-03"
    assert session.state(VICTIM).hpke_secret is None
    assert session.state(VICTIM).halves == {}


# --- the roster --------------------------------------------------------------------------------------


def test_different_rosters_for_different_owners_are_refused(
    federation: HostileFederation, plan: Plan
) -> None:
    run = federation.run(plan, (0, 1, 2, 3, 4)).join()
    shown = {0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 2: (0, 1, 2, 3), 3: (0, 1, 2, 3, 4), 4: (0, 1, 2, 3, 4)}
    for index, members in shown.items():
        answered = federation.accepted(index, "query.roster", run.roster_request(members))
        run.rosters[index] = RosterReply.from_bytes(answered.body)
    for index in (0, 1, 2, 3):
        request = run.keys_request(index)
        four = [run.rosters[member].wraps for member in (0, 1, 2, 3)]
        with nothing_released(run):
            answer = federation.refused(index, "query.keys", request.model_copy(update={"wraps": four}))
            assert answer in ("FS-ROSTER-01", "FS-WIRE-03")


def test_a_join_that_was_replaced_is_refused(federation: HostileFederation, plan: Plan) -> None:
    earlier, run = federation.run(plan).join(), federation.run(plan).join()
    honest = run.joins[VICTIM]
    for index, replaced in ((VICTIM, VICTIM), (VICTIM, OTHER)):
        run.joins[replaced] = earlier.joins[replaced]
        with nothing_released(run):
            assert federation.refused(index, "query.roster", run.roster_request()) == "FS-ROSTER-01"
        run.joins[VICTIM] = honest


def test_a_run_is_bound_to_its_first_roster(run: HostileRun) -> None:
    run.join().roster()
    with nothing_released(run):
        request = run.roster_request((0, 1, 3))
        assert run.federation.refused(VICTIM, "query.roster", request) == "FS-ROSTER-01"
    again = run.federation.accepted(VICTIM, "query.roster", run.roster_request())
    assert again.body == run.rosters[VICTIM].to_bytes()


def test_a_malformed_roster_is_refused(run: HostileRun) -> None:
    """An owner twice, out of order, the victim twice, too small, without the victim, nobody."""
    run.join()
    for members in ((0, 1, 1, 3), (1, 0, 2, 3), (0, 1, 3, 3), (0, 3), (0, 1, 2), ()):
        with nothing_released(run):
            request = run.roster_request(members)
            assert run.federation.refused(VICTIM, "query.roster", request) == "FS-ROSTER-01", members


def test_a_roster_of_strangers_is_refused(run: HostileRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.join()
    pinned = {"known": run.print_(0), "absent": run.federation.owners[4].fingerprint}
    policy = run.owner(VICTIM).policy
    peers = Peers(pinned=pinned, min_known_peers=2)
    monkeypatch.setattr(run.owner(VICTIM), "policy", policy.model_copy(update={"peers": peers}))
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "query.roster", run.roster_request()) == "FS-ROSTER-01"
    monkeypatch.setattr(joining, "require_acceptable", lambda *_: None)
    run.federation.accepted(VICTIM, "query.roster", run.roster_request())


def sybil(run: HostileRun) -> JoinReply:
    """Make a member of the attacker's own authority, with a well-formed join."""
    credentials = owner_of(create_authority("fedseal demo authority", days=3), "sybil", days=3)
    body = Join.from_fields(run.joins[EVIL].join.body)
    forged = body.model_copy(update={"hpke_key": HpkeKey.generate().public()})
    certificate = credentials.signing_certificate.public_bytes(Encoding.DER)
    return JoinReply(certificate=certificate, join=sign(credentials.signing_key, forged))


def test_a_member_of_another_authority_is_refused(run: HostileRun) -> None:
    run.join()
    foreign = sybil(run)
    members = sorted([*run.joins.values(), foreign], key=lambda reply: reply.join.signer)
    request = run.roster_request().model_copy(update={"members": members})
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "query.roster", request) == "FS-CERT-03"


def test_a_foreign_key_under_a_members_certificate_is_refused(run: HostileRun) -> None:
    run.join()
    foreign = sybil(run)
    run.joins[OTHER] = foreign.model_copy(update={"certificate": run.joins[OTHER].certificate})
    assert run.federation.refused(VICTIM, "query.roster", run.roster_request()) == "FS-WIRE-02"


def test_a_malformed_one_time_key_is_refused_by_code(run: HostileRun) -> None:
    run.join()
    honest = run.joins[EVIL]
    for public in (b"", bytes(1216), b"\xff" * 1216):
        body = Join.from_fields(honest.join.body).model_copy(update={"hpke_key": public})
        signed = sign(run.owner(EVIL).credentials.signing_key, body)
        run.joins[EVIL] = honest.model_copy(update={"join": signed})
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "query.roster", run.roster_request()) == "FS-WIRE-03"


def test_wraps_of_an_earlier_run_are_refused(federation: HostileFederation, plan: Plan) -> None:
    earlier, run = federation.run(plan).join().roster(), federation.run(plan).join().roster()
    run.rosters[OTHER] = earlier.rosters[OTHER]
    with nothing_released(run):
        assert federation.refused(VICTIM, "query.keys", run.keys_request(VICTIM)) == "FS-ROSTER-01"


# --- the plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"privacy": {"noise_multiplier": 3.0}},
        {"training": {"local_steps": 2}},
        {"run": {"rounds": 5}},
        {"cohort": {"minimum": 4}},
    ],
    ids=["less noise", "more steps", "more rounds", "cohort"],
)
def test_a_changed_plan_for_the_same_run_is_refused(
    run: HostileRun, make_plan: Callable[..., Plan], change: dict[str, Any]
) -> None:
    run.join()
    request = JoinRequest(run=run.run, plan=make_plan(**change).fields())
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "query.join", request) == "FS-WIRE-03"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"privacy": {"noise": "none", "target_epsilon": None}}, "FS-POLICY-02"),
        ({"privacy": {"target_epsilon": 60.0}}, "FS-POLICY-02"),
        ({"privacy": {"delta": 0.01}}, "FS-POLICY-02"),
        ({"cohort": {"minimum": 2, "allow_small": True}}, "FS-POLICY-02"),
    ],
    ids=["no noise", "epsilon", "delta", "cohort"],
)
def test_a_plan_outside_the_policy_is_refused_and_leaves_no_trace(
    federation: HostileFederation, make_plan: Callable[..., Plan], change: dict[str, Any], code: str
) -> None:
    run = federation.run(make_plan(**change))
    head = federation.owners[VICTIM].ledger.head()
    request = JoinRequest(run=run.run, plan=run.plan.fields())
    assert federation.refused(VICTIM, "query.join", request) == code
    assert federation.owners[VICTIM].store.find(run.run) is None
    assert federation.owners[VICTIM].ledger.head() == head


@pytest.mark.parametrize(
    ("section", "field", "value", "code"),
    [
        ("privacy", "noise_multiplier", 0.5, "FS-PLAN-03"),
        ("privacy", "noise_multiplier", None, "FS-PLAN-01"),
        ("model", "initial_sha256", "00" * 32, "FS-ROUND-02"),
        ("run", "rounds", 100, "FS-PLAN-03"),
        ("training", "local_steps", 100, "FS-PLAN-03"),
    ],
)
def test_a_resolved_plan_that_was_tampered_with_is_refused(
    federation: HostileFederation, plan: Plan, section: str, field: str, value: Any, code: str
) -> None:
    fields = plan.fields()
    fields[section][field] = value
    request = JoinRequest(run=secrets.token_hex(32), plan=fields)
    assert federation.refused(VICTIM, "query.join", request) == code


@pytest.mark.parametrize("question", ["largest value", "label"])
def test_joining_answers_no_question_about_the_data(
    federation: HostileFederation, make_plan: Callable[..., Plan], question: str
) -> None:
    """Nothing in an answer to a join may depend on records: it is neither noised nor charged."""
    run = federation.run(make_plan())
    owner = federation.owners[VICTIM]
    x, y = np.load(owner.data_file, allow_pickle=False).values()
    largest, classes = float(np.max(x)), int(np.max(y)) + 1
    assert (largest, classes) == (DIGITS_RANGE[1], 10)
    tasks: tuple[dict[str, Any], ...]
    if question == "largest value":
        tasks = ({"value_range": [0.0, largest]}, {"value_range": [0.0, largest - 0.5]})
    else:
        tasks = ({"classes": classes}, {"classes": classes - 1})
    answers = set()
    for task in tasks:
        request = JoinRequest(run=secrets.token_hex(32), plan=make_plan(task=task).fields())
        answers.add(federation.ask(VICTIM, "query.join", request.to_bytes()).error)
    assert run.plan.task.classes == 10
    assert len(answers) == 1, f"the coordinator tells the data apart by {answers}"


def test_a_plan_whose_sums_one_colluder_can_invent_is_refused(
    federation: HostileFederation, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(encryption={"quorum": 1})
    request = JoinRequest(run=secrets.token_hex(32), plan=plan.fields())
    assert federation.refused(VICTIM, "query.join", request) == "FS-POLICY-02"


# --- the wire ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"\xff\xfe", b"[" * 5000, b'{"run": "x"}', b'{"plan":{},"run":"' + b"a" * 64 + b'"} '],
)
def test_bytes_that_are_not_canonical_are_refused(federation: HostileFederation, body: bytes) -> None:
    assert federation.ask(VICTIM, "query.join", body).error == "FS-WIRE-01"


def test_keys_of_a_run_that_was_never_joined_are_refused(run: HostileRun) -> None:
    run.join().roster()
    request = run.keys_request(VICTIM).model_copy(update={"run": secrets.token_hex(32)})
    assert isinstance(request, KeysRequest)
    assert run.federation.refused(VICTIM, "query.keys", request) == "FS-WIRE-03"
