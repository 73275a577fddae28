"""The third exchange of an attempt, `query.open`, from the coordinator's side.

Openers add the frames themselves; the coordinator only passes them on, and believes a sum that a quorum of
openers signed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from crypto.agreement import signed_hash
from crypto.parts import SUM_BYTES, sum_parts
from crypto.signing import verify
from protocol.encoding import digest_bytes
from protocol.errors import EncodingInvalid, FedsealError, ProtocolViolation, QuorumNotMet
from protocol.messages import Opening, OpenReply, OpenRequest, Signed
from protocol.plan import Plan
from protocol.storage import STORAGE_FAULTS
from server.cohort.attendance import Attendance
from server.cohort.members import Member, ServerSession
from server.exchange import Exchanger, Reply, Request
from server.rounds.attempts import Attempt
from server.rounds.gathering import Gathering
from server.store import RunStore


class Checks:
    """Checks replies of a round, and records those that are not accepted.

    Args:
        store: Records refusals.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store

    def checked(
        self, member: Member, reply: Reply, check: Callable[[Reply], Signed | None]
    ) -> Signed | None:
        """Return what a reply brought, or record why it is not accepted."""
        try:
            if reply.code == QuorumNotMet.code:
                # the code of the exchange itself for a node that is gone: nobody refused anything
                return None
            if reply.code is not None:
                self._refused(member, reply.code)
                return None
            return check(reply)
        except STORAGE_FAULTS:
            raise
        except FedsealError as error:
            self._refused(member, error.code)
            return None

    def _refused(self, member: Member, code: str) -> None:
        member.problem = code
        self._store.refuse(member.fingerprint, "round", code)
        self._store.event("refused", owner=member.name, code=code)

    def note_deviation(self, member: Member, signed: Signed) -> None:
        """Record an opening that a quorum contradicts; it is evidence against its signer."""
        self._store.event("deviating", owner=member.name, opening=signed.model_dump(mode="json"))


class OpeningExchange:
    """Runs the exchange for one session.

    Args:
        exchanger: Sends requests.
        checks: Checks replies.
        plan: The resolved plan.
        session: The established session.
        attendance: Leaves out owners that deviate.
    """

    def __init__(
        self,
        exchanger: Exchanger,
        checks: Checks,
        plan: Plan,
        session: ServerSession,
        attendance: Attendance,
    ) -> None:
        self._exchanger = exchanger
        self._checks = checks
        self._plan = plan
        self._session = session
        self._attendance = attendance

    def carry(self, attempt: Attempt, gathering: Gathering, parameters: int) -> None:
        """Let openers open the sum of an attempt until a quorum agrees, and note openings and sums.

        Raises:
            QuorumNotMet: Too few openers agree.
        """
        answers: dict[tuple[str, str], list[Signed]] = {}
        sums: dict[str, bytes] = {}
        for openers in self._opener_groups(attempt):
            for reply in self._opened(attempt, openers, gathering):
                member = self._session.by_node(reply.node)
                signed = self._checks.checked(
                    member, reply, partial(self._opening, attempt, member, parameters)
                )
                if signed is not None:
                    body = Opening.from_fields(signed.body)
                    answers.setdefault((body.sums_hash, body.headers_hash), []).append(signed)
                    sums[body.sums_hash] = reply.blob
            agreed = next((k for k, v in answers.items() if len(v) >= self._plan.encryption.quorum), None)
            if agreed is not None:
                self._set_aside(answers, agreed)
                attempt.openings = sorted(answers[agreed], key=lambda signed: signed.signer)
                attempt.sums = sums[agreed[0]] or self._fetched_sums(attempt, gathering, parameters)
                return
        raise QuorumNotMet("no quorum of openers agrees on the sum")

    def _opened(self, attempt: Attempt, openers: Sequence[Member], gathering: Gathering) -> Iterator[Reply]:
        """Send openers all parts of the sum, and yield the reply of each that ends its opening.

        A part is sent when the one before it was added, so that one part is in memory; an opener that
        fails at one is not sent the next.
        """
        message = self._open_request(attempt)
        nodes = [member.node for member in openers]
        deadline = time.monotonic() + self._plan.deadlines.open_s
        last = gathering.opening_parts(len(attempt.headers)) - 1
        blobs = gathering.opening_blobs([signed.signer for signed in attempt.headers])
        sent_bytes = 0
        for part, blob in enumerate(blobs):
            request = Request(message.model_copy(update={"part": part}).to_bytes(), blob)
            sent_bytes += len(request.body) + len(request.blob)
            left_s = deadline - time.monotonic()
            willing = []
            for reply in self._exchanger.ask("query.open", dict.fromkeys(nodes, request), left_s):
                if part < last and is_receipt(reply):
                    willing.append(reply.node)
                else:
                    yield reply
            nodes = willing
            if not nodes:
                break
        attempt.download_bytes = max(attempt.download_bytes, sent_bytes)

    def _fetched_sums(self, attempt: Attempt, gathering: Gathering, parameters: int) -> bytes:
        """Fetch opened sums part by part, from one of the openers that agree on their hash.

        Raises:
            QuorumNotMet: None of them sends what it signed.
        """
        message = self._open_request(attempt)
        first = gathering.opening_parts(len(attempt.headers))
        sums_hash = Opening.from_fields(attempt.openings[0].body).sums_hash
        deadline = time.monotonic() + self._plan.deadlines.open_s
        for node in (self._session.members[signed.signer].node for signed in attempt.openings):
            for part, values in enumerate(sum_parts(parameters), start=first):
                request = Request(message.model_copy(update={"part": part}).to_bytes())
                left_s = deadline - time.monotonic()
                replies = list(self._exchanger.ask("query.open", {node: request}, left_s))
                if [len(reply.blob) for reply in replies] != [SUM_BYTES * len(values)]:
                    break
                gathering.keep_sums(replies[0].blob)
            sums = gathering.sums()
            if digest_bytes(sums) == sums_hash and len(sums) == SUM_BYTES * parameters:
                return sums
        raise QuorumNotMet("no opener sends the sums that it signed")

    def _open_request(self, attempt: Attempt) -> OpenRequest:
        return OpenRequest(
            session=self._session.session,
            attempt=attempt.number,
            ready=attempt.ready,
            headers=attempt.headers,
        )

    def _set_aside(self, answers: dict[tuple[str, str], list[Signed]], agreed: tuple[str, str]) -> None:
        """Record openers that signed another sum than the quorum, and leave them out from now on."""
        for signed in (one for key, group in answers.items() if key != agreed for one in group):
            member = self._session.members[signed.signer]
            self._checks.note_deviation(member, signed)
            self._attendance.exclude(member, "signed a sum that a quorum contradicts")

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
        if signed is None:
            raise ProtocolViolation("an opener has all parts and did not open")
        body = verify(signed, member.public_key, Opening)
        at_once = len(sum_parts(parameters)) == 1
        expected = Opening(
            session=self._session.session,
            attempt=attempt.number,
            purpose=attempt.purpose,
            list_hash=attempt.list_hash,
            headers_hash=signed_hash(attempt.headers),
            model_hash=attempt.model_hash,
            contributors=len(attempt.headers),
            total_weight=self._total_weight(attempt),
            sums_hash=digest_bytes(reply.blob) if at_once else body.sums_hash,
        )
        if body != expected or len(reply.blob) != (SUM_BYTES * parameters if at_once else 0):
            raise ProtocolViolation("an opening is not for this attempt")
        return signed

    def _total_weight(self, attempt: Attempt) -> float:
        signers = [signed.signer for signed in attempt.headers]
        return self._plan.total_weight(signers) if attempt.purpose == "train" else float(len(signers))


def is_receipt(reply: Reply) -> bool:
    """Return whether an opener's reply says that it took a part and waits for the others."""
    try:
        return reply.code is None and OpenReply.from_bytes(reply.body).opening is None
    except EncodingInvalid:
        return False
