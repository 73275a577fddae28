"""The owners of a run as the coordinator knows them, and the session that they stand in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protocol.messages import JoinReply, LedgerHead, Purpose, Signed, Statement


@dataclass
class Member:
    """An owner as the coordinator knows it.

    Attributes:
        name: Common name of its certificate.
        fingerprint: SHA-256 of its signing public key.
        node: Flower's node id; a restarted node keeps it, a restarted coordinator gives another.
        node_key: Its node's public transport key, by which it is found again.
        public_key: Verifies its signatures.
        joined: Its newest join as it was sent.
        first_head: Ledger head that it signed when it joined.
        last_head: Newest ledger head that it signed.
        ready: Its newest ready message, which is returned to it to show it its own ledger head.
        roster: Number of the newest roster that it joined; a run's first is 1.
        known_round: Finished rounds that it has certainly applied.
        activated: Node activation in which it was last asked; it is skipped once it failed to answer,
            until it comes back.
        absent: Whether it failed to answer since that activation.
        problem: Code of its newest refusal or fault; None once it is asked again.
        excluded: Whether it is left out of the rest of the run.
        voided: Sealed attempts that were void because of it.
        objects: Whether it refused to go on beside an owner whose certificate it holds for invalid; it is
            asked again when the coordinator has another revocation list, or finds the same.
        unfounded: Times in a row that it did so and the coordinator found nothing.
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
    roster: int = 1
    ready: Signed | None = None
    known_round: int = 0
    activated: str = ""
    absent: bool = False
    problem: str | None = None
    excluded: bool = False
    voided: int = 0
    objects: bool = False
    unfounded: int = 0
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
                "roster": self.roster,
                "known_round": self.known_round,
                "excluded": self.excluded,
                "voided": self.voided,
                "objects": self.objects,
                "unfounded": self.unfounded,
                "received": self.received,
                "received_evaluations": self.received_evaluations,
            },
        }


def _dumped(message: Signed | None) -> dict[str, Any] | None:
    return None if message is None else message.model_dump(mode="json")


@dataclass
class ServerSession:
    """A session whose members all confirmed the same keys.

    Attributes:
        run: The run's identifier; it stays when the roster changes.
        session: The session's hash.
        members: The roster, by fingerprint.
        roster: Number of the roster; a run's first is 1.
        first_round: Finished rounds that the roster began with.
        left: Owners of earlier rosters that are not in this one.
        reduced: Whether a member lost its certificate, so that the keys should be renewed without it.
    """

    run: str
    session: str
    members: dict[str, Member] = field(default_factory=dict)
    roster: int = 1
    first_round: int = 0
    left: dict[str, Member] = field(default_factory=dict)
    reduced: bool = False

    def by_node(self, node: int) -> Member:
        """Return the member behind a node."""
        return next(member for member in self.members.values() if member.node == node)
