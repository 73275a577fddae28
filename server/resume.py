"""Going on with a run after its coordinator ended, however it ended.

All that is needed stands in the run store. The owners keep their session keys themselves. Nothing is
agreed anew, except where the coordinator ended while it made a new roster, and nothing is opened anew. An
attempt that was under way stays void: what was sealed for it stays charged, and the next attempt has a
number above every number that was begun.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from crypto.certificates import check_revocations, verify_signing_certificate
from crypto.signing import verify
from crypto.trust import Trust
from protocol.errors import CertificateRefused, CheckpointInvalid, RunFailed
from protocol.messages import Join, JoinReply, LedgerHead, Ready, Signed
from protocol.optimizers import GlobalModel
from server.cohort.members import Member, ServerSession
from server.regrouping import Past
from server.store import RunStore


def recorded_session(store: RunStore, trust: Trust) -> ServerSession | None:
    """Return the session that the run has, or None if no session stands.

    Members whose certificates have expired or were revoked are left out of it.

    Args:
        store: The run's store.
        trust: The federation's authority and its revocation list.

    Raises:
        RunFailed: The run folder is from before runs could be resumed.
        CertificateRefused: The revocation list is not valid.
        SignatureInvalid, EncodingInvalid: The record was changed.
    """
    session = store.get("session")
    if session is None:
        return None
    owners, roster = _owners(store, trust), store.get("roster", 1)
    members = {name: owner for name, owner in owners.items() if owner.roster == roster}
    starts = [Join.from_fields(owner.joined.join.body).start for owner in members.values()]
    recorded = sum(facts["member"].get("roster", 1) == roster for facts in store.owners().values())
    return ServerSession(
        store.get("run"),
        session,
        members,
        roster,
        max((start.round for start in starts if start is not None), default=0),
        {name: owner for name, owner in owners.items() if owner.roster != roster},
        reduced=recorded > len(members),
    )


def recorded_past(store: RunStore, trust: Trust) -> Past | None:
    """Return the past of a run that stopped while it got a later roster; None if it never had any.

    Errors as in `recorded_session`.
    """
    run = store.get("run")
    if run is None:
        return None
    owners, roster = _owners(store, trust), store.get("roster", 1)
    following = {name for name, owner in owners.items() if owner.roster == roster}
    return Past(run, recorded_steps(store), owners, following)


def _owners(store: RunStore, trust: Trust) -> dict[str, Member]:
    """Return the recorded owners, by fingerprint in ascending order, that have valid certificates.

    Raises:
        CertificateRefused: The revocation list itself is not valid.
    """
    check_revocations(trust.revocations, trust.authority, datetime.now(UTC))
    owners = {}
    for fingerprint, facts in sorted(store.owners().items()):
        with suppress(CertificateRefused):
            owners[fingerprint] = _member(facts, trust)
            if owners[fingerprint].fingerprint != fingerprint:
                raise RunFailed("the record of the members is not in order")
    return owners


def _member(facts: dict[str, Any], trust: Trust) -> Member:
    state = facts.get("member")
    if state is None:
        raise RunFailed("this run folder was written by a version that could not resume")
    joined = JoinReply.from_fields(state["joined"])
    certified = verify_signing_certificate(
        joined.certificate, trust.authority, trust.revocations, datetime.now(UTC)
    )
    verify(joined.join, certified.public_key, Join)
    ready = None if state["ready"] is None else Signed.from_fields(state["ready"])
    if ready is not None:
        verify(ready, certified.public_key, Ready)
    return Member(
        name=certified.name,
        fingerprint=certified.fingerprint,
        node=0,
        node_key=str(state["node_key"]),
        public_key=certified.public_key,
        joined=joined,
        first_head=LedgerHead.from_fields(facts["ledger_first"]),
        last_head=LedgerHead.from_fields(facts["ledger_last"]),
        roster=int(state.get("roster", 1)),
        ready=ready,
        known_round=int(state["known_round"]),
        excluded=bool(state["excluded"]),
        voided=int(state["voided"]),
        objects=bool(state.get("objects", False)),
        unfounded=int(state.get("unfounded", 0)),
        sealed=int(facts["sealed"]),
        sealed_evaluations=int(facts["sealed_evaluations"]),
        received=int(state["received"]),
        received_evaluations=int(state["received_evaluations"]),
        statement=None if facts["statement"] is None else Signed.from_fields(facts["statement"]),
    )


def recorded_steps(store: RunStore) -> list[list[Signed]]:
    """Return for each finished round the openings that agree, as owners need them to follow."""
    return [[Signed.from_fields(one) for one in facts["openings"]] for facts in store.rounds()]


def recorded_model(store: RunStore, initial: GlobalModel) -> GlobalModel:
    """Return the model after the last finished round.

    Raises:
        CheckpointInvalid: Its checkpoint is missing, damaged, or not the recorded one.
        RunFailed: The plan in the folder is not the one that the run began with.
    """
    plan_hash = store.plan().sha256()
    if store.get("plan_hash", plan_hash) != plan_hash:
        raise RunFailed("the plan in the run folder is not the one that the run began with")
    finished = store.finished_rounds()
    if finished == 0:
        return initial
    model = store.read_checkpoint(finished)
    if model.sha256() != store.get("model_hash"):
        raise CheckpointInvalid
    return model
