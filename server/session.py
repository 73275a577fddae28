"""Establishing a session: the coordinator's side of `query.join`, `query.roster` and `query.keys`."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from crypto.agreement import signed_hash
from crypto.certificates import verify_signing_certificate
from crypto.signing import signed_head, verify
from crypto.trust import Trust
from crypto.wraps import WrapTree, wrap_digests
from protocol.encoding import digest_bytes
from protocol.errors import FedsealError, ProtocolViolation, QuorumNotMet
from protocol.messages import (
    Join,
    JoinReply,
    JoinRequest,
    KeysReply,
    KeysRequest,
    LedgerHead,
    Purpose,
    RosterReply,
    RosterRequest,
    Session,
    Signed,
    Statement,
    Wraps,
)
from protocol.plan import Plan
from server.exchange import Exchanger, Reply, Request
from server.store import RunStore

_LOG = logging.getLogger("fedseal.server")
SETTLE_S = 3.0
"""Seconds without anybody new after which enough owners need not be all owners."""


@dataclass
class Member:
    """An owner as the coordinator knows it.

    Attributes:
        name: Common name of its certificate.
        fingerprint: SHA-256 of its signing public key.
        node: Flower's node id; a restarted node keeps it, a restarted coordinator gives another.
        node_key: Its node's public transport key, by which it is found again.
        public_key: Verifies its signatures.
        joined: Its join as it was sent.
        first_head: Ledger head that it signed when it joined.
        last_head: Newest ledger head that it signed.
        ready: Its newest ready message, which is returned to it to show it its own ledger head.
        known_round: Finished rounds that it has certainly applied.
        activated: Node activation in which it was last asked; it is skipped once it failed to answer,
            until it comes back.
        absent: Whether it failed to answer since that activation.
        problem: Code of its newest refusal or fault; None once it is asked again.
        excluded: Whether it is left out of the rest of the run.
        voided: Sealed attempts that were void because of it.
        sealed: Training attempts for which it may have sealed: those it was asked to seal, until its
            statement says how many it did seal.
        sealed_evaluations: The same of evaluations.
        received: Training attempts for which its frames arrived.
        received_evaluations: The same of evaluations.
        statement: Its closing statement.
    """

    name: str
    fingerprint: str
    node: int
    node_key: str
    public_key: Ed25519PublicKey
    joined: JoinReply
    first_head: LedgerHead
    last_head: LedgerHead
    ready: Signed | None = None
    known_round: int = 0
    activated: str = ""
    absent: bool = False
    problem: str | None = None
    excluded: bool = False
    voided: int = 0
    sealed: int = 0
    sealed_evaluations: int = 0
    received: int = 0
    received_evaluations: int = 0
    statement: Signed | None = None

    def note_asked(self, purpose: Purpose) -> None:
        """Count one more attempt that may cost this owner privacy; before it is asked to seal."""
        if purpose == "train":
            self.sealed += 1
        else:
            self.sealed_evaluations += 1

    def note_received(self, purpose: Purpose) -> None:
        """Count one more attempt that did cost this owner privacy."""
        if purpose == "train":
            self.received += 1
        else:
            self.received_evaluations += 1

    def note_statement(self, signed: Signed, body: Statement) -> None:
        """Take an owner's own count, as far as it is not below what arrived."""
        self.statement, self.last_head = signed, body.ledger
        self.sealed = max(self.received, body.sealed_attempts)
        self.sealed_evaluations = max(self.received_evaluations, body.sealed_evaluations)

    def facts(self) -> dict[str, Any]:
        """Return what the run store records of this owner; `server.resume` reads it again."""
        return {
            "name": self.name,
            "certificate": self.joined.model_dump(mode="json")["certificate"],
            "ledger_first": self.first_head.model_dump(mode="json"),
            "ledger_last": self.last_head.model_dump(mode="json"),
            "sealed": self.sealed,
            "sealed_evaluations": self.sealed_evaluations,
            "statement": _dumped(self.statement),
            "member": {
                "node_key": self.node_key,
                "joined": self.joined.model_dump(mode="json"),
                "ready": _dumped(self.ready),
                "known_round": self.known_round,
                "excluded": self.excluded,
                "voided": self.voided,
                "received": self.received,
                "received_evaluations": self.received_evaluations,
            },
        }


def _dumped(message: Signed | None) -> dict[str, Any] | None:
    return None if message is None else message.model_dump(mode="json")


@dataclass
class ServerSession:
    """A session whose members all confirmed the same keys."""

    run: str
    session: str
    members: dict[str, Member] = field(default_factory=dict)

    def by_node(self, node: int) -> Member:
        """Return the member behind a node."""
        return next(member for member in self.members.values() if member.node == node)


def node_digest(node: int) -> str:
    """Return a stand-in for the fingerprint of an owner that refused before it named itself."""
    return digest_bytes(f"node {node}".encode())


def wait_for_owners(exchanger: Exchanger, plan: Plan) -> dict[int, str]:
    """Wait until the largest cohort is online, or the smallest one and nobody else comes.

    Raises:
        QuorumNotMet: Fewer than `cohort.minimum` nodes are online at `deadlines.join_s`.
    """
    deadline = time.monotonic() + plan.deadlines.join_s
    nodes, changed = exchanger.online(), time.monotonic()
    while time.monotonic() < deadline:
        current = exchanger.online()
        if current.keys() != nodes.keys():
            nodes, changed = current, time.monotonic()
        settled = time.monotonic() - changed > SETTLE_S
        if len(nodes) >= plan.cohort.maximum or (len(nodes) >= plan.cohort.minimum and settled):
            break
        time.sleep(0.1)
    if len(nodes) < plan.cohort.minimum:
        raise QuorumNotMet(f"{len(nodes)} owners are online, {plan.cohort.minimum} are needed")
    return dict(sorted(nodes.items())[: plan.cohort.maximum])


class Joining:
    """Runs the three joining exchanges for one plan.

    Args:
        exchanger: Sends requests.
        store: Records refusals and owners.
        plan: The resolved plan.
        trust: The federation's authority and its revocation list.
    """

    def __init__(
        self,
        exchanger: Exchanger,
        store: RunStore,
        plan: Plan,
        trust: Trust,
    ) -> None:
        self._exchanger = exchanger
        self._store = store
        self._plan = plan
        self._trust = trust

    def establish(self) -> ServerSession:
        """Join all owners that consent, and return the session.

        An owner that fails after its join spoils the roster, so joining starts again without it; a run
        identifier is never used for two rosters.

        Raises:
            QuorumNotMet: Too few owners consent, or joining failed three times.
        """
        nodes = wait_for_owners(self._exchanger, self._plan)
        for _ in range(3):
            run = secrets.token_hex(32)
            members = self._join(run, nodes)
            replies = self._roster(run, members)
            if replies.keys() == members.keys():
                session = self._keys(run, members, replies)
                if session is not None:
                    return session
            nodes = {node: nodes[node] for node in nodes if self._still_willing(node, members)}
        raise QuorumNotMet("joining failed three times")

    def _join(self, run: str, nodes: dict[int, str]) -> dict[str, Member]:
        request = Request(JoinRequest(run=run, plan=self._plan.fields()).to_bytes())
        members: dict[str, Member] = {}
        keys = {node: key for key, (node, _activated) in self._exchanger.online_by_key().items()}
        for reply in self._ask("query.join", dict.fromkeys(nodes, request)):
            try:
                member = self._member(run, reply, keys.get(reply.node, ""))
            except FedsealError as error:
                self._refuse(node_digest(reply.node), "query.join", error)
                continue
            members[member.fingerprint] = member
        members = dict(sorted(members.items()))
        self._store.event("joined", owners=len(members), members=list(members))
        if len(members) < self._plan.cohort.minimum:
            raise QuorumNotMet(
                f"{len(members)} owners joined, {self._plan.cohort.minimum} are needed; "
                f"refusals: {self._codes()}"
            )
        for member in members.values():
            member.activated = nodes[member.node]
        return members

    def _codes(self) -> str:
        codes = [refusal["code"] for refusal in self._store.refusals()]
        return ", ".join(sorted(set(codes))) or "none"

    def _member(self, run: str, reply: Reply, node_key: str) -> Member:
        joined = JoinReply.from_bytes(reply.body)
        certified = verify_signing_certificate(
            joined.certificate, self._trust.authority, self._trust.revocations, datetime.now(UTC)
        )
        body = verify(joined.join, certified.public_key, Join)
        if body.run != run or body.plan_hash != self._plan.sha256():
            raise ProtocolViolation("a join is for another run or plan")
        return Member(
            name=certified.name,
            fingerprint=certified.fingerprint,
            node=reply.node,
            node_key=node_key,
            public_key=certified.public_key,
            joined=joined,
            first_head=body.ledger,
            last_head=body.ledger,
        )

    def _roster(self, run: str, members: dict[str, Member]) -> dict[str, RosterReply]:
        joins = [member.joined for member in members.values()]
        request = Request(RosterRequest(run=run, members=joins).to_bytes())
        replies: dict[str, RosterReply] = {}
        nodes = {member.node: member for member in members.values()}
        for reply in self._ask("query.roster", dict.fromkeys(nodes, request)):
            member = nodes[reply.node]
            own = member.fingerprint
            try:
                answer = RosterReply.from_bytes(reply.body)
                body = verify(answer.wraps, member.public_key, Wraps)
                _check_wraps(answer, body, signed_hash([m.join for m in joins]), set(members) - {own})
            except FedsealError as error:
                self._refuse(member.fingerprint, "query.roster", error)
                continue
            replies[member.fingerprint] = answer
        return dict(sorted(replies.items()))

    def _keys(
        self, run: str, members: dict[str, Member], replies: dict[str, RosterReply]
    ) -> ServerSession | None:
        wraps = [reply.wraps for reply in replies.values()]
        trees = {s: WrapTree(wrap_digests(r.seeds, r.keys, r.dealt)) for s, r in replies.items()}
        requests = {
            member.node: Request(
                KeysRequest(
                    run=run,
                    wraps=wraps,
                    proofs={s: tree.proof(own) for s, tree in trees.items() if s != own},
                    seeds={s: r.seeds[own] for s, r in replies.items() if own in r.seeds},
                    key=next((r.keys[own] for r in replies.values() if own in r.keys), None),
                    dealt=next((r.dealt for r in replies.values() if own in r.keys), None),
                    heads=_returned_heads(member, replies.values()),
                ).to_bytes()
            )
            for own, member in members.items()
        }
        session = signed_hash(wraps)
        nodes = {member.node: member for member in members.values()}
        confirmed: set[str] = set()
        for reply in self._ask("query.keys", requests):
            member = nodes[reply.node]
            try:
                answer = KeysReply.from_bytes(reply.body)
                if verify(answer.session, member.public_key, Session).session == session:
                    confirmed.add(member.fingerprint)
            except FedsealError as error:
                self._refuse(member.fingerprint, "query.keys", error)
        return ServerSession(run, session, members) if confirmed == members.keys() else None

    def _refuse(self, owner: str, kind: str, error: FedsealError) -> None:
        # the detail may name a field as its sender spelled it, line breaks included
        _LOG.warning("an answer to %s is refused: %s %s", kind, error.code, ascii(error.detail)[:200])
        self._store.refuse(owner, kind, error.code)

    def _still_willing(self, node: int, members: dict[str, Member]) -> bool:
        refused = {refusal["owner"] for refusal in self._store.refusals()}
        names = {node_digest(node)} | {m.fingerprint for m in members.values() if m.node == node}
        return not names & refused and any(m.node == node for m in members.values())

    def _ask(self, kind: str, requests: dict[int, Request]) -> Iterable[Reply]:
        for reply in self._exchanger.ask(kind, requests, self._plan.deadlines.join_s):
            if reply.code is None:
                yield reply
            else:
                self._store.refuse(node_digest(reply.node), kind, reply.code)
                self._store.event("refused", exchange=kind, code=reply.code)


def _returned_heads(member: Member, replies: Iterable[RosterReply]) -> list[Signed]:
    """Return what peers hold of a member's messages, one per ledger head; only what it truly signed."""
    found: dict[str, Signed] = {}
    for signed in (reply.heads.get(member.fingerprint) for reply in replies):
        if signed is not None:
            with suppress(FedsealError):
                found[signed_head(signed, member.public_key).head] = signed
    return [found[head] for head in sorted(found)]


def _check_wraps(answer: RosterReply, body: Wraps, roster_hash: str, peers: set[str]) -> None:
    """Check that an owner wrapped for exactly its peers, and sent what it signed.

    Whoever got other wraps would refuse them, and would be blamed instead of their sender.
    """
    if body.roster_hash != roster_hash or set(answer.seeds) != peers:
        raise ProtocolViolation("wraps are for another roster")
    deals = body.key_commitment is not None
    if set(answer.keys) != (peers if deals else set()) or (answer.dealt is not None) != deals:
        raise ProtocolViolation("the encryption key is not dealt to exactly the roster")
    if body.wraps_hash != WrapTree(wrap_digests(answer.seeds, answer.keys, answer.dealt)).root:
        raise ProtocolViolation("wraps are not the ones that their sender signed")
