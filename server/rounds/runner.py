"""One attempt at a round: fit, seal, open, from the coordinator's side.

The coordinator holds no key. It checks signatures, digests and residues as replies arrive and passes
frames on to the openers, who add them; it accepts an opened sum only when a quorum signed the same one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from crypto.frames import SealContext
from crypto.packing import mean_update
from crypto.presets import Packing
from crypto.signing import verify
from protocol.errors import (
    FrameInvalid,
    ProtocolViolation,
    QuorumNotMet,
    RunInterrupted,
)
from protocol.evaluation import COUNTS, Estimate
from protocol.messages import (
    FitReply,
    FitRequest,
    Header,
    Ready,
    SealReply,
    SealRequest,
    Signed,
)
from protocol.optimizers import GlobalModel, apply_update
from protocol.plan import Plan
from server.cohort.attendance import Attendance
from server.cohort.members import Member, ServerSession
from server.exchange import Exchanger, Reply, Request
from server.rounds.attempts import Attempt
from server.rounds.evaluation import federated_accuracy
from server.rounds.gathering import Gathering
from server.rounds.layout import frame_layout
from server.rounds.openings import Checks, OpeningExchange
from server.store import RunStore


class RoundRunner:
    """Runs attempts for one session after the other.

    Attributes:
        session: The session that attempts are made in.
        attendance: Who of its members is there.
        steps: For each finished round, the openings that agree.

    Args:
        exchanger: Sends requests.
        store: Records what happened.
        plan: The resolved plan.
        packing: The fitted preset.
        session: The established session.
    """

    def __init__(
        self,
        exchanger: Exchanger,
        store: RunStore,
        plan: Plan,
        packing: Packing,
        session: ServerSession,
    ) -> None:
        self._exchanger = exchanger
        self._store = store
        self._plan = plan
        self._packing = packing
        self._context = SealContext(packing, frame_layout(plan))
        store.set("frame_bytes", self._context.frame_bytes)
        self._seeds: set[bytes] = set()
        self._checks = Checks(store)
        self.steps: list[list[Signed]] = []
        self._newest_sums = (range(0), b"")
        self.enter(session)

    def enter(self, session: ServerSession) -> None:
        """Go on in a session."""
        self.session = session
        self.attendance = Attendance(self._exchanger, self._store, self._plan, session)
        self._opening = OpeningExchange(self._exchanger, self._checks, self._plan, session, self.attendance)

    def run(self, attempt: Attempt, model: GlobalModel) -> GlobalModel:
        """Carry one training attempt through and return the next model.

        Raises:
            QuorumNotMet: Too few owners are ready, or too few opened.
            ProtocolViolation, FrameInvalid: An owner of the list did not seal as it must; the attempt
                is void, because its masks do not cancel.
        """
        self._carry(attempt, model.weights.size)
        contributors = [signed.signer for signed in attempt.headers]
        mean = mean_update(
            np.frombuffer(attempt.sums, dtype="<u4"),
            len(contributors),
            self._plan.update_range,
            self._packing,
            self._plan.total_weight(contributors),
        )
        return apply_update(model, mean, self._plan.server_optimizer)

    def evaluate(self, attempt: Attempt) -> Estimate | None:
        """Carry one evaluation through and return what its noised counts say; errors as in `run`."""
        self._carry(attempt, COUNTS)
        counts = np.frombuffer(attempt.sums, dtype="<u4").tolist()
        return federated_accuracy(self._plan, counts, len(attempt.headers))

    def _carry(self, attempt: Attempt, parameters: int) -> None:
        started = time.monotonic()
        self._fit(attempt)
        attempt.seconds["fit"] = time.monotonic() - started
        with Gathering(self._store.folder, self._context, parameters) as gathering:
            started = time.monotonic()
            self._seal(attempt, gathering, parameters)
            attempt.seconds["seal"] = time.monotonic() - started
            started = time.monotonic()
            self._opening.carry(attempt, gathering, parameters)
            attempt.seconds["open"] = time.monotonic() - started

    # --- fit ---------------------------------------------------------------------------------------

    def _fit(self, attempt: Attempt) -> None:
        invited = self.attendance.present()
        if len(invited) < self._plan.cohort.minimum:
            raise QuorumNotMet(f"{len(invited)} owners are there")
        for member in invited:
            member.problem = None
        requests = {member.node: self.step_request(attempt, member) for member in invited}
        ready: dict[str, Signed] = {}
        answered: set[str] = set()
        for reply in self._exchanger.ask("train.fit", requests, self._plan.deadlines.fit_s):
            member = self.session.by_node(reply.node)
            answered.add(member.fingerprint)
            signed = self._checks.checked(member, reply, partial(self._ready, attempt, member))
            if signed is not None:
                ready[member.fingerprint] = signed
        # whoever refuses an evaluation may still train
        self.attendance.leave_out(invited, ready.keys() if attempt.purpose == "train" else answered)
        if len(ready) < self._plan.cohort.minimum:
            raise QuorumNotMet(f"{len(ready)} owners are ready, {self._plan.cohort.minimum} are needed")
        attempt.ready = [ready[fingerprint] for fingerprint in sorted(ready)]

    def step_request(self, attempt: Attempt, member: Member) -> Request:
        """Return the fit request for a member, with the rounds that it may not have applied yet."""
        steps = self.steps[member.known_round :]
        missed = range(member.known_round + 1, len(self.steps) + 1)
        # most members have missed the same rounds: their requests share one copy of the sums
        if self._newest_sums[0] != missed:
            self._newest_sums = (missed, b"".join([self._store.sums(number) for number in missed]))
        sums = self._newest_sums[1]
        message = FitRequest(
            session=self.session.session,
            attempt=attempt.number,
            purpose=attempt.purpose,
            round=attempt.round,
            model_hash=attempt.model_hash,
            steps=steps,
            newest=member.ready,
        )
        return Request(message.to_bytes(), sums)

    def _ready(self, attempt: Attempt, member: Member, reply: Reply) -> Signed:
        answer = FitReply.from_bytes(reply.body)
        body = verify(answer.ready, member.public_key, Ready)
        expected = (self.session.session, attempt.number, attempt.purpose, attempt.model_hash)
        if (body.session, body.attempt, body.purpose, body.model_hash) != expected:
            raise ProtocolViolation("a ready message is for another session, attempt, purpose or model")
        member.last_head, member.ready = body.ledger, answer.ready
        member.known_round = len(self.steps)
        return answer.ready

    # --- seal --------------------------------------------------------------------------------------

    def _seal(self, attempt: Attempt, gathering: Gathering, parameters: int) -> None:
        listed = [self.session.members[signed.signer] for signed in attempt.ready]
        message = SealRequest(session=self.session.session, attempt=attempt.number, ready=attempt.ready)
        requests = [
            Request(message.model_copy(update={"part": part}).to_bytes())
            for part in range(len(gathering.parts))
        ]
        self._note_asked(attempt, listed)
        sealed: dict[str, Signed] = {}
        for reply in self._exchanger.ask(
            "train.seal",
            {member.node: requests for member in listed},
            self._plan.deadlines.seal_s,
        ):
            member = self.session.by_node(reply.node)
            if member.problem is not None:
                continue
            take = partial(self._take_part, attempt, member, gathering, parameters)
            signed = self._checks.checked(member, reply, take)
            if signed is None:
                continue
            sealed[member.fingerprint] = signed
            member.note_received(attempt.purpose)
            attempt.upload_bytes = gathering.received_bytes[member.fingerprint]
        self.attendance.blame(listed, sealed.keys())
        if len(sealed) < len(listed):
            raise ProtocolViolation("an owner of the list did not seal; its masks do not cancel")
        attempt.headers = [sealed[signed.signer] for signed in attempt.ready]

    def _note_asked(self, attempt: Attempt, listed: Sequence[Member]) -> None:
        """Record, before anybody is asked to seal, whom it may cost: a crash must not lose that."""
        attempt.asked = [member.fingerprint for member in listed]
        with self._store.transaction():
            for member in listed:
                member.problem = None
                member.note_asked(attempt.purpose)
                self._store.put_owner(member.fingerprint, member.facts())
            facts = attempt.facts(reason=RunInterrupted.code)
            self._store.void_attempt(attempt.number, attempt.purpose, attempt.round, facts)

    def _take_part(
        self, attempt: Attempt, member: Member, gathering: Gathering, parameters: int, reply: Reply
    ) -> Signed | None:
        """Keep a part of an owner's frames; returns its header once all of them are there."""
        signed, owner = SealReply.from_bytes(reply.body).header, member.fingerprint
        if (signed is None) == (reply.part == len(gathering.parts) - 1):
            raise ProtocolViolation("the header must come with the last part and with no other")
        if signed is not None:
            verify(signed, member.public_key, Header)
            gathering.headers[owner] = signed
        frames = gathering.take(owner, reply.part, reply.blob)
        self._store.note_ciphertexts(gathering.digests(owner, reply.part))
        self._note_seeds(member, frames)
        size = len(reply.body) + len(reply.blob)
        gathering.received_bytes[owner] = gathering.received_bytes.get(owner, 0) + size
        if not gathering.is_complete(owner):
            return None
        return self._header(attempt, member, gathering, parameters)

    def _header(self, attempt: Attempt, member: Member, gathering: Gathering, parameters: int) -> Signed:
        signed = gathering.headers[member.fingerprint]
        expected = Header(
            version=1,
            session=self.session.session,
            attempt=attempt.number,
            purpose=attempt.purpose,
            preset_hash=self._packing.sha256(),
            list_hash=attempt.list_hash,
            model_hash=attempt.model_hash,
            parameters=parameters,
            frames=self._packing.frames_for(parameters),
            frames_hash=gathering.frames_hash(member.fingerprint),
        )
        if verify(signed, member.public_key, Header) != expected:
            raise FrameInvalid("a header does not describe the frames of this attempt")
        gathering.check_own_form(member.fingerprint)
        return signed

    def _note_seeds(self, member: Member, frames: Sequence[bytes]) -> None:
        """Refuse a ciphertext seed that occurred before.

        Two ciphertexts with one seed and one key give the difference of their plaintexts.

        Raises:
            FrameInvalid: An owner's generator repeats itself, or frames were copied.
        """
        seeds = {self._context.seed(frame) for frame in frames}
        if len(seeds) < len(frames) or seeds & self._seeds:
            self._store.event("repeated_seed", owner=member.name)
            raise FrameInvalid("a ciphertext seed occurred before")
        self._seeds |= seeds
