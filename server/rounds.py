"""One attempt at a round: fit, seal, open, from the coordinator's side.

The coordinator holds no key. It checks signatures, digests and residues as replies arrive and passes
frames on to the openers, who add them; it accepts an opened sum only when a quorum signed the same one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from crypto.agreement import signed_hash
from crypto.frames import SealContext
from crypto.packing import mean_update
from crypto.presets import Packing
from crypto.signing import verify
from protocol.encoding import digest, digest_bytes
from protocol.errors import FedsealError, FrameInvalid, ProtocolViolation, QuorumNotMet
from protocol.evaluation import COUNTS, Estimate
from protocol.messages import (
    FitReply,
    FitRequest,
    Header,
    Opening,
    OpenReply,
    OpenRequest,
    Purpose,
    Ready,
    SealReply,
    SealRequest,
    Signed,
)
from protocol.optimizers import GlobalModel, apply_update
from protocol.plan import Plan
from server.evaluation import federated_accuracy
from server.exchange import Exchanger, Reply, Request
from server.layout import frame_layout
from server.session import Member, ServerSession
from server.store import RunStore


@dataclass
class Attempt:
    """What happened in one attempt.

    Attributes:
        number: Attempt number.
        round: Round that it tries to finish, or whose model it evaluates.
        model_hash: The model that was trained from or evaluated.
        purpose: What the attempt is for.
        seconds: Wall time of each exchange.
        upload_bytes: Bytes that a contributor sent for its update: header and frames.
        download_bytes: Bytes that an opener received.
        ready: Signed ready messages of the list, in order.
        headers: Signed headers in list order.
        openings: Signed openings that agree.
        sums: Opened sums, little-endian uint32.
    """

    number: int
    round: int
    model_hash: str
    purpose: Purpose = "train"
    seconds: dict[str, float] = field(default_factory=dict)
    upload_bytes: int = 0
    download_bytes: int = 0
    ready: list[Signed] = field(default_factory=list)
    headers: list[Signed] = field(default_factory=list)
    openings: list[Signed] = field(default_factory=list)
    sums: bytes = b""


class RoundRunner:
    """Runs attempts for one session.

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
        self._session = session
        self._context = SealContext(packing, frame_layout(plan))
        store.set("frame_bytes", self._context.frame_bytes)
        self._seeds: set[bytes] = set()
        self.steps: list[list[Signed]] = []

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
            np.frombuffer(attempt.sums, dtype="<u4").astype(np.uint64),
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
        started = time.monotonic()
        frames = self._seal(attempt, parameters)
        attempt.seconds["seal"] = time.monotonic() - started
        started = time.monotonic()
        self._open(attempt, frames, parameters)
        attempt.seconds["open"] = time.monotonic() - started

    # --- fit ---------------------------------------------------------------------------------------

    def _fit(self, attempt: Attempt) -> None:
        invited = self._invited()
        if len(invited) < self._plan.cohort.minimum:
            raise QuorumNotMet(f"{len(invited)} owners are there")
        requests = {member.node: self.step_request(attempt, member) for member in invited}
        ready: dict[str, Signed] = {}
        answered: set[str] = set()
        for reply in self._exchanger.ask("train.fit", requests, self._plan.deadlines.fit_s):
            member = self._session.by_node(reply.node)
            answered.add(member.fingerprint)
            signed = self._checked(member, reply, partial(self._ready, attempt, member))
            if signed is not None:
                ready[member.fingerprint] = signed
        # whoever refuses an evaluation may still train
        self._mark_absent(invited, ready.keys() if attempt.purpose == "train" else answered)
        if len(ready) < self._plan.cohort.minimum:
            raise QuorumNotMet(f"{len(ready)} owners are ready, {self._plan.cohort.minimum} are needed")
        attempt.ready = [ready[fingerprint] for fingerprint in sorted(ready)]

    def _invited(self) -> list[Member]:
        """Return the members to ask: those online, less those that failed since their last start."""
        online = self._exchanger.online()
        invited = []
        for member in self._session.members.values():
            if member.node not in online:
                continue
            if online[member.node] != member.activated:
                member.activated, member.absent, member.known_round = online[member.node], False, 0
            if not member.absent and not member.excluded:
                invited.append(member)
        return invited

    def step_request(self, attempt: Attempt, member: Member) -> Request:
        """Return the fit request for a member, with the rounds that it may not have applied yet."""
        steps = self.steps[member.known_round :]
        sums = b"".join(
            self._store.sums(number) for number in range(member.known_round + 1, len(self.steps) + 1)
        )
        message = FitRequest(
            session=self._session.session,
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
        expected = (self._session.session, attempt.number, attempt.purpose, attempt.model_hash)
        if (body.session, body.attempt, body.purpose, body.model_hash) != expected:
            raise ProtocolViolation("a ready message is for another session, attempt, purpose or model")
        member.last_head, member.ready = body.ledger, answer.ready
        member.known_round = len(self.steps)
        return answer.ready

    # --- seal --------------------------------------------------------------------------------------

    def _seal(self, attempt: Attempt, parameters: int) -> list[bytes]:
        listed = [self._session.members[signed.signer] for signed in attempt.ready]
        message = SealRequest(session=self._session.session, attempt=attempt.number, ready=attempt.ready)
        request = Request(message.to_bytes())
        sealed: dict[str, tuple[Signed, bytes]] = {}
        for reply in self._exchanger.ask(
            "train.seal",
            {member.node: request for member in listed},
            self._plan.deadlines.seal_s,
        ):
            member = self._session.by_node(reply.node)
            signed = self._checked(member, reply, partial(self._header, attempt, member, parameters))
            if signed is None:
                continue
            sealed[member.fingerprint] = (signed, reply.blob)
            member.note_sealed(attempt.purpose)
            attempt.upload_bytes = len(reply.body) + len(reply.blob)
        self._mark_absent(listed, sealed.keys())
        if len(sealed) < len(listed):
            raise ProtocolViolation("an owner of the list did not seal; its masks do not cancel")
        attempt.headers = [sealed[signed.signer][0] for signed in attempt.ready]
        return [sealed[signed.signer][1] for signed in attempt.ready]

    def _header(self, attempt: Attempt, member: Member, parameters: int, reply: Reply) -> Signed:
        signed = SealReply.from_bytes(reply.body).header
        header = verify(signed, member.public_key, Header)
        frames = self._context.split(reply.blob, self._packing.frames_for(parameters))
        expected = Header(
            version=1,
            session=self._session.session,
            attempt=attempt.number,
            purpose=attempt.purpose,
            preset_hash=self._packing.sha256(),
            list_hash=signed_hash(attempt.ready),
            model_hash=attempt.model_hash,
            parameters=parameters,
            frames=len(frames),
            frames_hash=digest([digest_bytes(frame) for frame in frames]),
        )
        if header != expected:
            raise FrameInvalid("a header does not describe the frames of this attempt")
        for frame in frames:
            self._context.check(frame)
        self._note_seeds(member, frames)
        return signed

    def _note_seeds(self, member: Member, frames: Sequence[bytes]) -> None:
        """Refuse a ciphertext seed that occurred before: two ciphertexts with one seed give the key away.

        Raises:
            FrameInvalid: An owner's generator repeats itself, or frames were copied.
        """
        seeds = {self._context.seed(frame) for frame in frames}
        if len(seeds) < len(frames) or seeds & self._seeds:
            self._store.event("repeated_seed", owner=member.name)
            raise FrameInvalid("a ciphertext seed occurred before")
        self._seeds |= seeds

    # --- open --------------------------------------------------------------------------------------

    def _open(self, attempt: Attempt, frames: Sequence[bytes], parameters: int) -> None:
        message = OpenRequest(
            session=self._session.session,
            attempt=attempt.number,
            ready=attempt.ready,
            headers=attempt.headers,
        )
        request = Request(message.to_bytes(), b"".join(frames))
        attempt.download_bytes = len(request.body) + len(request.blob)
        answers: dict[tuple[str, str], list[Signed]] = {}
        sums: dict[str, bytes] = {}
        for openers in self._opener_groups(attempt):
            for reply in self._exchanger.ask(
                "query.open",
                {member.node: request for member in openers},
                self._plan.deadlines.open_s,
            ):
                member = self._session.by_node(reply.node)
                signed = self._checked(member, reply, partial(self._opening, attempt, member, parameters))
                if signed is not None:
                    body = Opening.from_fields(signed.body)
                    answers.setdefault((body.sums_hash, body.headers_hash), []).append(signed)
                    sums[body.sums_hash] = reply.blob
            agreed = next((k for k, v in answers.items() if len(v) >= self._plan.encryption.quorum), None)
            if agreed is not None:
                self._set_aside(answers, agreed)
                attempt.openings = sorted(answers[agreed], key=lambda signed: signed.signer)
                attempt.sums = sums[agreed[0]]
                return
        raise QuorumNotMet("no quorum of openers agrees on the sum")

    def _set_aside(self, answers: dict[tuple[str, str], list[Signed]], agreed: tuple[str, str]) -> None:
        """Record openers that signed another sum than the quorum, and leave them out from now on."""
        for signed in (one for key, group in answers.items() if key != agreed for one in group):
            member = self._session.members[signed.signer]
            member.excluded = True
            self._store.event("deviating", owner=member.name, opening=signed.model_dump(mode="json"))

    def _opener_groups(self, attempt: Attempt) -> Iterable[list[Member]]:
        """Yield the first quorum + 1 openers, rotating by attempt, then the rest one by one."""
        listed = [self._session.members[signed.signer] for signed in attempt.ready]
        turn = attempt.number % len(listed)
        ordered = listed[turn:] + listed[:turn]
        first = min(self._plan.encryption.quorum + 1, len(ordered))
        yield ordered[:first]
        for member in ordered[first:]:
            yield [member]

    def _opening(self, attempt: Attempt, member: Member, parameters: int, reply: Reply) -> Signed:
        signed = OpenReply.from_bytes(reply.body).opening
        body = verify(signed, member.public_key, Opening)
        expected = Opening(
            session=self._session.session,
            attempt=attempt.number,
            purpose=attempt.purpose,
            list_hash=signed_hash(attempt.ready),
            headers_hash=signed_hash(attempt.headers),
            model_hash=attempt.model_hash,
            contributors=len(attempt.headers),
            total_weight=self._total_weight(attempt),
            sums_hash=digest_bytes(reply.blob),
        )
        if body != expected or len(reply.blob) != 4 * parameters:
            raise ProtocolViolation("an opening is not for this attempt")
        return signed

    def _total_weight(self, attempt: Attempt) -> float:
        signers = [signed.signer for signed in attempt.headers]
        return self._plan.total_weight(signers) if attempt.purpose == "train" else float(len(signers))

    # --- shared ------------------------------------------------------------------------------------

    def _checked(self, member: Member, reply: Reply, check: Callable[[Reply], Signed]) -> Signed | None:
        """Return the checked reply, or record why it is not accepted."""
        try:
            if reply.code is not None:
                self._refused(member, reply.code)
                return None
            return check(reply)
        except FedsealError as error:
            self._refused(member, error.code)
            return None

    def _refused(self, member: Member, code: str) -> None:
        self._store.refuse(member.fingerprint, "round", code)
        self._store.event("refused", owner=member.name, code=code)

    def _mark_absent(self, asked: Sequence[Member], answered: Iterable[str]) -> None:
        present = set(answered)
        for member in asked:
            if member.fingerprint not in present and not member.absent:
                member.absent = True
                self._store.event("absent", owner=member.name)
