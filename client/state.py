"""What an owner knows of a run, and what a step of the protocol leads to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from protocol.encoding import Blob, Digest
from protocol.errors import SessionMismatch
from protocol.messages import Count, Fingerprint, JoinReply, Message, Signed, Start
from protocol.optimizers import GlobalModel
from protocol.plan import Plan


class RunState(Message):
    """What an owner knows of one run. Secret fields are erased as soon as the protocol allows.

    Attributes:
        run: The coordinator's run identifier.
        plan: The plan in canonical fields.
        stage: How far joining has come.
        hpke_secret: One-time key; erased when the session stands.
        join: This owner's own join, as sent.
        nonce: What this owner's join commits to; revealed with the wraps.
        graph_seed: What all members' nonces make together.
        members: All members of the roster, in order; empty before `rostered`.
        roster_hash: Hash of the roster; a join once bound to a roster refuses another.
        halves: Half seeds that this owner wrapped; erased when the session stands.
        session: The session's hash.
        chain_keys: Mask chain key per peer, ratcheted to `chain_attempt`.
        chain_attempt: Attempt that the chain keys belong to; earlier ones cannot be derived any more.
        bfv_key: The session's encryption key, as it was dealt.
        round: Finished rounds that this owner has applied.
        sealed: Attempt to the hash of the list it was sealed for.
        opened: Attempt to the hash of the headers it was opened for.
        evaluated: Sealed evaluation attempt to the finished round whose model it counted on.
        lists: The distinct lists of owners that this owner sealed for.
        start: Where the roster goes on; None for a run's first.
        sealed_in: The sessions that this owner sealed in, oldest first.
        keyed_in: The sessions whose keys this owner held, and the finished rounds that they began with.
        computed: Whether this owner computed its model itself, or a quorum vouched for it in a session.
    """

    run: Digest
    plan: dict[str, object]
    stage: Literal["joined", "rostered", "keyed", "closed"]
    join: JoinReply
    nonce: Digest
    graph_seed: Digest | None = None
    hpke_secret: Blob | None = None
    members: list[JoinReply] = Field(default_factory=list)
    roster_hash: Digest | None = None
    halves: dict[Fingerprint, Blob] = Field(default_factory=dict)
    session: Digest | None = None
    chain_keys: dict[Fingerprint, Blob] = Field(default_factory=dict)
    chain_attempt: Count = 0
    bfv_key: Blob | None = None
    round: Count = 0
    sealed: dict[str, Digest] = Field(default_factory=dict)
    opened: dict[str, Digest] = Field(default_factory=dict)
    evaluated: dict[str, Count] = Field(default_factory=dict)
    lists: list[list[Fingerprint]] = Field(default_factory=list)
    start: Start | None = None
    sealed_in: list[Digest] = Field(default_factory=list)
    keyed_in: dict[Digest, Count] = Field(default_factory=dict)
    computed: bool = True

    def with_changes(self, **changes: object) -> RunState:
        """Return a copy with some fields replaced."""
        return self.model_copy(update=changes)

    def parsed_plan(self) -> Plan:
        """Return the plan; it was validated when the run was joined."""
        return Plan.from_fields(self.plan)

    def keyed_session(self) -> str:
        """Return the session hash of a run whose keys stand.

        Raises:
            SessionMismatch: The run has no session yet, or is closed.
        """
        if self.stage != "keyed" or self.session is None:
            raise SessionMismatch("this run has no open session")
        return self.session


@dataclass(frozen=True)
class Answer:
    """A reply as it was sent: canonical body and blob."""

    body: bytes
    blob: bytes = b""


@dataclass(frozen=True)
class Outcome:
    """What a protocol step leads to; all of it is stored before the reply leaves the node.

    Attributes:
        state: The run's new state.
        reply: The message to answer.
        blob: What travels beside the reply.
        model: The global model, where the step changed it.
        heads: Verified joins and ready messages of a round's list, for the ledger heads in them.
        lasting: Whether anything is stored; not for the receipt of a part, which changes nothing.
    """

    state: RunState
    reply: Message
    blob: bytes = b""
    model: GlobalModel | None = None
    heads: Sequence[Signed] = ()
    lasting: bool = True
