"""A federation in this process whose coordinator is the attacker.

Owners run their real apps on real homes. The coordinator can send any message to any owner, and for an
owner that the attacker bought, its keys are at hand as well.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message as FlowerMessage

from client.app import make_app
from client.owner import Owner
from client.state import RunState
from crypto.frames import SealContext
from crypto.masks import MaskContext, advance, apply_masks
from crypto.presets import Packing, packing_for
from crypto.secret import SealKey
from crypto.signing import sign
from crypto.wraps import WrapTree
from protocol.encoding import digest, digest_bytes
from protocol.messages import (
    CloseRequest,
    FitReply,
    FitRequest,
    Header,
    JoinReply,
    JoinRequest,
    KeysReply,
    KeysRequest,
    Message,
    OpenReply,
    OpenRequest,
    Purpose,
    RosterReply,
    RosterRequest,
    SealReply,
    SealRequest,
    Signed,
    Wraps,
)
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from protocol.records import from_record, to_record
from scenarios.grid import LocalGrid

FIRST_NODE = 100


@dataclass(frozen=True)
class Answered:
    """What an owner answered: bytes, or the text of the error that travels."""

    body: bytes
    blob: bytes
    error: str | None


class HostileFederation:
    """Owners in ascending order of fingerprint, so that owner 0 is the dealer, and a grid to reach them."""

    def __init__(self, owners: Sequence[Owner]) -> None:
        self.owners = sorted(owners, key=lambda owner: owner.fingerprint)
        self.apps = [make_app(lambda _context, owner=owner: owner) for owner in self.owners]
        self.grid = LocalGrid({FIRST_NODE + index: app for index, app in enumerate(self.apps)})

    def ask(self, index: int, kind: str, body: bytes, blob: bytes = b"") -> Answered:
        """Send raw bytes to one owner."""
        message = FlowerMessage(to_record(body, blob), FIRST_NODE + index, kind)
        (reply,) = self.grid.send_and_receive([message])
        if reply.has_error():
            return Answered(b"", b"", reply.error.reason)
        return Answered(*from_record(reply.content), None)

    def refused(self, index: int, kind: str, message: Message, blob: bytes = b"") -> str:
        """Send a message and return the error that must come back."""
        answered = self.ask(index, kind, message.to_bytes(), blob)
        assert answered.error is not None, f"owner {index} answered {kind}"
        return answered.error

    def accepted(self, index: int, kind: str, message: Message, blob: bytes = b"") -> Answered:
        """Send a message and return the answer that must come back."""
        answered = self.ask(index, kind, message.to_bytes(), blob)
        assert answered.error is None, f"owner {index} refused {kind}: {answered.error}"
        return answered

    def run(self, plan: Plan, indices: Sequence[int] = (0, 1, 2, 3)) -> HostileRun:
        """Start a run with some owners; nothing is sent yet."""
        for owner in self.owners:
            owner.pending.clear()
        return HostileRun(self, plan, list(indices))


@dataclass
class Sealed:
    """One owner's answer to seal."""

    header: Signed
    frames: bytes


@dataclass
class HostileRun:
    """One run, step by step; each step has an honest form that a test can alter before it is sent."""

    federation: HostileFederation
    plan: Plan
    indices: list[int]
    run: str = field(default_factory=lambda: secrets.token_hex(32))
    session: str = ""
    joins: dict[int, JoinReply] = field(default_factory=dict)
    rosters: dict[int, RosterReply] = field(default_factory=dict)

    # --- views -------------------------------------------------------------------------------------

    def owner(self, index: int) -> Owner:
        return self.federation.owners[index]

    def print_(self, index: int) -> str:
        return self.owner(index).fingerprint

    def state(self, index: int) -> RunState:
        state = self.owner(index).store.find(self.run)
        assert state is not None
        return state

    def packing(self) -> Packing:
        return packing_for(self.plan.encryption.preset, self.plan.cohort.maximum)

    def bfv_key(self, index: int) -> SealKey:
        """Return the encryption key, as an owner that the attacker bought would hand it over."""
        return SealKey.from_residues(SealContext(self.packing()), bytes(self.state(index).bfv_key or b""))

    def model(self, index: int) -> GlobalModel:
        return self.owner(index).store.model(self.run)

    # --- joining -----------------------------------------------------------------------------------

    def join(self) -> HostileRun:
        request = JoinRequest(run=self.run, plan=self.plan.fields())
        for index in self.indices:
            answered = self.federation.accepted(index, "query.join", request)
            self.joins[index] = JoinReply.from_bytes(answered.body)
        return self

    def roster_request(self, indices: Sequence[int] | None = None) -> RosterRequest:
        chosen = self.indices if indices is None else indices
        return RosterRequest(run=self.run, members=[self.joins[index] for index in chosen])

    def roster(self) -> HostileRun:
        for index in self.indices:
            answered = self.federation.accepted(index, "query.roster", self.roster_request())
            self.rosters[index] = RosterReply.from_bytes(answered.body)
        return self

    def keys_request(self, receiver: int) -> KeysRequest:
        own = self.print_(receiver)
        replies = {self.print_(index): self.rosters[index] for index in self.rosters}
        return KeysRequest(
            run=self.run,
            wraps=[reply.wraps for reply in replies.values()],
            proofs={
                name: WrapTree(wrap_digests_of(reply)).proof(own)
                for name, reply in replies.items()
                if own in reply.seeds
            },
            seeds={name: reply.seeds[own] for name, reply in replies.items() if own in reply.seeds},
            key=next((reply.keys[own] for reply in replies.values() if own in reply.keys), None),
            dealt=next((reply.dealt for reply in replies.values() if own in reply.keys), None),
            heads=[reply.heads[own] for reply in replies.values() if own in reply.heads],
        )

    def keys(self) -> HostileRun:
        for index in self.indices:
            answered = self.federation.accepted(index, "query.keys", self.keys_request(index))
            self.session = KeysReply.from_bytes(answered.body).session.body["session"]
        return self

    def established(self) -> HostileRun:
        """Join honestly, all the way."""
        return self.join().roster().keys()

    # --- rounds ------------------------------------------------------------------------------------

    def fit_request(
        self,
        attempt: int,
        model_hash: str | None = None,
        round_number: int = 1,
        steps: Any = (),
        purpose: Purpose = "train",
    ) -> FitRequest:
        return FitRequest(
            session=self.session,
            attempt=attempt,
            purpose=purpose,
            round=round_number,
            model_hash=model_hash or self.model(self.indices[0]).sha256(),
            steps=list(steps),
            newest=None,
        )

    def fit(self, attempt: int, indices: Sequence[int] | None = None, **changes: Any) -> list[Signed]:
        """Let owners train for an attempt; returns their ready messages in order."""
        sums = changes.pop("sums", b"")
        request = self.fit_request(attempt, **changes)
        return [
            FitReply.from_bytes(self.federation.accepted(index, "train.fit", request, sums).body).ready
            for index in (self.indices if indices is None else indices)
        ]

    def seal_request(self, attempt: int, ready: Sequence[Signed]) -> SealRequest:
        return SealRequest(session=self.session, attempt=attempt, ready=list(ready))

    def seal(self, attempt: int, ready: Sequence[Signed], indices: Sequence[int]) -> dict[int, Sealed]:
        request = self.seal_request(attempt, ready)
        sealed = {}
        for index in indices:
            answered = self.federation.accepted(index, "train.seal", request)
            sealed[index] = Sealed(SealReply.from_bytes(answered.body).header, answered.blob)
        return sealed

    def open_request(
        self, attempt: int, ready: Sequence[Signed], sealed: dict[int, Sealed]
    ) -> tuple[OpenRequest, bytes]:
        request = OpenRequest(
            session=self.session,
            attempt=attempt,
            ready=list(ready),
            headers=[one.header for one in sealed.values()],
        )
        return request, b"".join(one.frames for one in sealed.values())

    def sealed_attempt(
        self, attempt: int = 1, indices: Sequence[int] | None = None, **changes: Any
    ) -> tuple[list[Signed], dict[int, Sealed]]:
        """Carry an attempt as far as the frames."""
        chosen = self.indices if indices is None else indices
        ready = self.fit(attempt, chosen, **changes)
        return ready, self.seal(attempt, ready, chosen)

    def open(
        self, attempt: int, ready: Sequence[Signed], sealed: dict[int, Sealed], index: int
    ) -> tuple[Signed, bytes]:
        request, blob = self.open_request(attempt, ready, sealed)
        answered = self.federation.accepted(index, "query.open", request, blob)
        return OpenReply.from_bytes(answered.body).opening, answered.blob

    def finished_round(self, attempt: int = 1, **changes: Any) -> tuple[list[Signed], bytes]:
        """Carry an attempt to its end; returns the openings of the first two owners and the sums."""
        ready, sealed = self.sealed_attempt(attempt, **changes)
        openings = [self.open(attempt, ready, sealed, index) for index in self.indices[:2]]
        assert openings[0][1] == openings[1][1]
        return [signed for signed, _ in openings], openings[0][1]

    def close(self, index: int, steps: Any, sums: bytes, model_hash: str) -> Answered:
        request = CloseRequest(session=self.session, model_hash=model_hash, steps=list(steps))
        return self.federation.accepted(index, "query.close", request, sums)

    # --- an owner that the attacker bought ---------------------------------------------------------

    def forged(self, index: int, header: Signed, frames: Sequence[bytes], /, **changes: Any) -> Sealed:
        """Let a bought owner sign other frames, or a header with other fields."""
        body = Header.from_fields(header.body)
        fields = {"frames_hash": digest([digest_bytes(frame) for frame in frames]), **changes}
        signed = sign(self.owner(index).credentials.signing_key, body.model_copy(update=fields))
        return Sealed(signed, b"".join(frames))

    def sealed_by_hand(
        self, index: int, header: Signed, chains: dict[str, bytes], slots: Any, key: SealKey | None = None
    ) -> Sealed:
        """Let a bought owner mask and encrypt slots of its choice, with masks that cancel."""
        body = Header.from_fields(header.body)
        packing = self.packing()
        context = MaskContext(
            body.session,
            body.attempt,
            body.purpose,
            body.list_hash,
            body.model_hash,
            packing.plain_modulus,
        )
        ratcheted = {peer: advance(chain, body.attempt) for peer, chain in chains.items()}
        masked = apply_masks(slots, self.print_(index), ratcheted, context)
        key = key or self.bfv_key(index)
        return self.forged(index, header, [key.encrypt(row) for row in masked])


def wrap_digests_of(reply: RosterReply) -> dict[str, list[str]]:
    """Return the digests that the coordinator relays for one sender."""
    return {
        receiver: [digest_bytes(seed)]
        + (
            [digest_bytes(reply.keys[receiver]), digest_bytes(reply.dealt or b"")]
            if receiver in reply.keys
            else []
        )
        for receiver, seed in reply.seeds.items()
    }


@contextmanager
def nothing_released(run: HostileRun, *indices: int) -> Iterator[None]:
    """Check that what happens inside releases nothing and refunds nothing."""
    watched = indices or tuple(run.indices)
    before = {index: _protected(run, index) for index in watched}
    charged = {index: _charged(run.owner(index), run.run) for index in watched}
    yield
    for index in watched:
        assert _protected(run, index) == before[index], f"owner {index} changed or stored an answer"
        assert _charged(run.owner(index), run.run) >= charged[index], f"owner {index} was refunded"


def answers(owner: Owner, run: str) -> list[tuple[Any, ...]]:
    """Return the answers that an owner has stored for a run."""
    query = "SELECT request, attempt, body, blob FROM answers WHERE run = ? ORDER BY request"
    return owner.store._database.execute(query, (run,)).fetchall()


def charged_epsilon(owner: Owner, run: str) -> float:
    """Return what the ledger charges for a run."""
    return owner.ledger.spent(run).epsilon or 0.0


def slots_of(run: HostileRun, frames: bytes, key: SealKey) -> Any:
    """Decrypt one owner's frames: what a bought owner shows the coordinator; uint64 (frames, slots)."""
    parts = key.context.split(frames, len(frames) // run.packing().frame_bytes)
    return np.stack([key.decrypt(key.context.ciphertext(part)) for part in parts])


def _protected(run: HostileRun, index: int) -> Any:
    owner = run.owner(index)
    state = owner.store.find(run.run)
    fields = None if state is None else state.model_dump(mode="json")
    return fields, answers(owner, run.run)


def _charged(owner: Owner, run: str) -> int:
    if owner.store.find(run) is None:
        return 0
    spent = owner.ledger.spent(run)
    return spent.sealed + spent.reserved


def resigned(run: HostileRun, index: int, reply: RosterReply, **changes: Any) -> RosterReply:
    """Let a bought owner sign other wraps than it made."""
    body = Wraps.from_fields(reply.wraps.body)
    fields = {"wraps_hash": WrapTree(wrap_digests_of(reply)).root, **changes}
    signed = sign(run.owner(index).credentials.signing_key, body.model_copy(update=fields))
    return reply.model_copy(update={"wraps": signed})
