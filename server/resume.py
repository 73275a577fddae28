"""Going on with a run after its coordinator ended, however it ended.

All that is needed stands in the run store. The owners keep their session keys themselves; nothing is
agreed anew and nothing is opened anew. An attempt that was under way stays void: what was sealed for it
stays charged, and the next attempt has a number above every number that was begun.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from crypto.certificates import verify_signing_certificate
from crypto.signing import verify
from crypto.trust import Trust
from protocol.errors import CheckpointInvalid, RunFailed
from protocol.messages import Join, JoinReply, LedgerHead, Ready, Signed
from protocol.optimizers import GlobalModel
from server.session import Member, ServerSession
from server.store import RunStore


def recorded_session(store: RunStore, trust: Trust) -> ServerSession | None:
    """Return the session that the run has, or None if no session stands yet.

    Args:
        store: The run's store.
        trust: The federation's authority and its revocation list.

    Raises:
        RunFailed: The run folder is from before runs could be resumed.
        CertificateRefused: A member's certificate has expired or was revoked; the owners refuse that
            roster too.
        SignatureInvalid, EncodingInvalid: The record was changed.
    """
    session = store.get("session")
    if session is None:
        return None
    members = {fingerprint: _member(facts, trust) for fingerprint, facts in store.owners().items()}
    if members.keys() != {member.fingerprint for member in members.values()}:
        raise RunFailed("the record of the members is not in order")
    return ServerSession(store.get("run"), session, dict(sorted(members.items())))


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
        ready=ready,
        known_round=int(state["known_round"]),
        excluded=bool(state["excluded"]),
        voided=int(state["voided"]),
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
