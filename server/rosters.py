"""A run's rosters: the first, and later ones between two rounds when somebody comes or must go.

A later roster is a new session with new keys under the same run. Owners that were there compute the model
that it starts from by themselves, the others get it with their word. Attempt numbers go on, so that every
owner's ledger prices the run as one. Nobody is waited for: who does not consent stays outside, and is
asked again when its node connects anew.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from cryptography import x509

from crypto.certificates import check_revocations, verify_signing_certificate
from crypto.trust import Trust
from protocol.errors import CertificateRefused, ModelMismatch, QuorumNotMet, SessionMismatch
from protocol.messages import Join, JoinRequest, Signed, Stage, Start
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from server.exchange import Exchanger, Request
from server.members import Member, ServerSession
from server.rounds import RoundRunner
from server.session import TRIES, Joining, wait_for_owners
from server.store import RunStore

_LOG = logging.getLogger("fedseal.server")
_WITHOUT_STEPS = (ModelMismatch.code, SessionMismatch.code)
"""Refusals of owners that cannot follow from their own model, and may get the model itself."""

_MOST_FAILURES = 4
"""Joins that a node may refuse, leave unanswered or need anew before it is out: rosters cost everybody."""

Arrival = tuple[str, str]
"""A node's public transport key and the time of its last activation."""

Question = tuple[str, int, frozenset[str], frozenset[Arrival]]
"""Whom a session asked to join, after how many rounds, and beside which members."""


@dataclass
class Past:
    """What is known of a run when it gets a later roster.

    Attributes:
        run: The run's identifier.
        steps: For each finished round, the openings that agree.
        owners: All owners that were ever in a roster, by fingerprint.
        following: Those of them that can follow from their own model.
    """

    run: str
    steps: list[list[Signed]]
    owners: dict[str, Member]
    following: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, runner: RoundRunner) -> Past:
        """Return the past of a run whose session stands."""
        session = runner.session
        owners = {**session.left, **session.members}
        return cls(session.run, runner.steps, owners, set(session.members))


class Rosters:
    """Makes a run's rosters.

    Args:
        exchanger: Sends requests, and knows which nodes are online.
        store: Records rosters and owners.
        plan: The resolved plan.
        trust: The federation's authority and its revocation list.
    """

    def __init__(self, exchanger: Exchanger, store: RunStore, plan: Plan, trust: Trust) -> None:
        self._exchanger = exchanger
        self._store = store
        self._plan = plan
        self._trust = trust
        self._joining = Joining(exchanger, store, plan, trust)
        self._refused: set[Arrival] = set()
        self._silences = Counter[Arrival]()
        self._failures = Counter[str]()
        self._asked: Question | None = None
        self._sums = (range(0), b"")
        self._model = ("", b"")
        self._expelled: tuple[x509.CertificateRevocationList, set[int]] | None = None

    def first(self) -> ServerSession:
        """Make a run's first roster; see `Joining.establish`."""
        session = self._joining.establish()
        self._note_failures()
        self._record(session, [])
        return session

    def again(self, past: Past, model: GlobalModel) -> ServerSession:
        """Make the roster of a run that stopped while it had none; errors as in `renew_if_due`."""
        wait_for_owners(self._exchanger, self._plan)
        return self._make(past, model, self._next_start(past, model), {})

    # --- whether a new roster is due ---------------------------------------------------------------

    def somebody_waits(self, runner: RoundRunner) -> bool:
        """Tell whether owners that are not in the roster could make a round possible, or larger."""
        return bool(self._waiting(runner))

    def renew_if_due(self, runner: RoundRunner, model: GlobalModel) -> None:
        """Give the run a new roster if an owner that waits consents, or a member may not stay.

        Raises:
            QuorumNotMet: No new roster came about, and the old one is given up; the run can be resumed.
        """
        self._leave_out_uncertified(runner)
        past, waiting = Past.of(runner), self._waiting(runner)
        if not waiting and not runner.session.reduced:
            return
        start, consenting = self._next_start(past, model), dict[str, Member]()
        if waiting:
            requests = dict.fromkeys(waiting, self._with_model(past, start, model))
            consenting = self._consenting(past, requests, start)
            # who consents while too few do is asked again when others are there, or wait beside it
            self._asked = _question(runner, waiting)
            inside = {member.node_key for member in runner.session.members.values()}
            self._failures.update(key for key, _since in waiting.values() if key in inside)
        there = _there(runner)
        owners = {*there, *consenting}
        if len(owners) < self._plan.cohort.minimum or len(there) < self._plan.encryption.quorum:
            return
        if self._is_close(owners):
            self._failures.update(key for key, _since in waiting.values())
            return
        if consenting or runner.session.reduced:
            runner.enter(self._make(past, model, start, consenting))

    def _consenting(self, past: Past, requests: dict[int, Request], start: Start) -> dict[str, Member]:
        """Ask owners that wait whether they consent; whom the run has left out does not count."""
        joined = self._joining.joined(past.run, requests, start)
        self._note_failures()
        out = {name for name, owner in past.owners.items() if owner.excluded}
        return {name: member for name, member in joined.items() if name not in out}

    def _waiting(self, runner: RoundRunner) -> dict[int, Arrival]:
        """Return the nodes to ask: online, not in the roster, not refused, as many as there is room for."""
        session = runner.session
        inside = {one.node_key: one for one in session.members.values()}
        gone = {one.node_key for one in (*inside.values(), *session.left.values()) if one.excluded}
        waiting = {}
        for key, (node, since) in self._exchanger.online_by_key().items():
            member = inside.get(key)
            # a member whose home was put back to before this roster is outside of it again
            if member is not None and member.problem != SessionMismatch.code:
                continue
            if key not in gone and not self._is_refused(key, since):
                waiting[node] = (key, since)
        there = len(_there(runner))
        chosen = dict(sorted(waiting.items())[: max(0, self._plan.cohort.maximum - there)])
        enough = there + len(chosen) >= self._plan.cohort.minimum
        # as many must have followed the run for the others to believe them
        enough = enough and there >= self._plan.encryption.quorum
        return chosen if enough and self._asked != _question(runner, chosen) else {}

    def _is_close(self, owners: set[str]) -> bool:
        """Tell whether owners would refuse to seal for them, because no noise hides a single one.

        Without noise a list must not differ from an earlier one in one owner (`client.rounds`).
        """
        if self._plan.privacy.noise != "none":
            return False
        lists = [set(facts["asked"]) for facts in self._store.attempts() if facts["asked"]]
        return any(len(owners ^ earlier) == 1 for earlier in lists)

    def _leave_out_uncertified(self, runner: RoundRunner) -> None:
        """Leave members out of the run whose certificates have expired or were revoked.

        Raises:
            CertificateRefused: The revocation list itself is not valid; nobody is left out for that.
        """
        check_revocations(self._trust.revocations, self._trust.authority, datetime.now(UTC))
        for member in runner.session.members.values():
            if not member.excluded and not self._is_certified(member):
                runner.attendance.exclude(member, "its certificate is not valid any more")
                runner.session.reduced = True

    def expelled(self, runner: RoundRunner) -> set[int]:
        """Return the nodes of members that were revoked; no exchange waits for them any more.

        Certificates are looked at when there is another list than the last time.
        """
        known = self._expelled
        try:
            newest = self._trust.revocations
        except CertificateRefused:
            # it is being replaced; what it says is judged between rounds
            return set() if known is None else known[1]
        if known is None or known[0] is not newest:
            members = runner.session.members.values()
            gone = {member.node for member in members if not self._is_certified(member)}
            self._expelled = known = newest, gone
        return known[1]

    def _is_certified(self, member: Member) -> bool:
        trust, now = self._trust, datetime.now(UTC)
        try:
            verify_signing_certificate(member.joined.certificate, trust.authority, trust.revocations, now)
        except CertificateRefused:
            return False
        return True

    def _note_failures(self) -> None:
        """Remember who refused, or was silent twice, until it connects anew; at last for good."""
        for key, (node, since) in self._exchanger.online_by_key().items():
            if node in self._joining.failed:
                self._refused.add((key, since))
                self._failures[key] += 1
            silent = self._joining.silences[node]
            self._failures[key] += silent
            self._silences[key, since] += silent
        self._joining.forget()

    def _is_refused(self, key: str, since: str) -> bool:
        silent = self._silences[key, since] > 1 or self._failures[key] > _MOST_FAILURES
        return silent or (key, since) in self._refused

    # --- making it ---------------------------------------------------------------------------------

    def _next_start(self, past: Past, model: GlobalModel) -> Start:
        """Return where a new roster starts; its number is recorded before anybody hears of it."""
        number = self._store.get("last_roster", 1) + 1
        self._store.set("last_roster", number)
        return Start(
            roster=number,
            round=len(past.steps),
            model_hash=model.sha256(),
            sessions=[Stage.from_fields(stage) for stage in self._store.get("sessions", [])],
        )

    def _make(
        self, past: Past, model: GlobalModel, start: Start, consenting: Mapping[str, Member]
    ) -> ServerSession:
        """Make a roster of the owners that are there; from the first request on there is no other.

        Raises:
            QuorumNotMet: It did not come about.
        """
        self._store.set("session", None)
        joined, before = dict(consenting), set(past.following)
        for _ in range(TRIES):
            joined |= self._join(past, model, start, {member.node for member in joined.values()})
            members = {name: self._carried(past, member) for name, member in sorted(joined.items())}
            if self._joining.are_enough(members):
                self._require_vouched(past, members)
                session = self._joining.agreed(past.run, members)
                if session is not None:
                    return self._entered(past, start, session, members)
            self._suspect(members, before)
            self._note_failures()
            start, joined = self._next_start(past, model), {}
        raise QuorumNotMet(f"joining failed {TRIES} times")

    def _suspect(self, members: Mapping[str, Member], before: Collection[str]) -> None:
        """Leave newcomers out of the next try, and blame nobody else for this one.

        Who sends what the others must refuse makes them look like those that fail. So newcomers that failed
        themselves are left out, or all of them if none did.
        """
        newcomers = [member for name, member in members.items() if name not in before]
        failed = self._joining.failed.keys() | self._joining.silences.keys()
        if newcomers:
            self._joining.forget()
        for member in [one for one in newcomers if one.node in failed] or newcomers:
            self._refused.add((member.node_key, member.activated))
            self._failures[member.node_key] += 1

    def _entered(self, past: Past, start: Start, session: str, members: dict[str, Member]) -> ServerSession:
        new = [member.name for name, member in members.items() if name not in past.owners]
        left = {name: owner for name, owner in past.owners.items() if name not in members}
        made = ServerSession(past.run, session, members, start.roster, start.round, left)
        self._note_failures()
        self._sums, self._model = (range(0), b""), ("", b"")
        self._record(made, new)
        _LOG.info("roster %d of %d owners from round %d on", start.roster, len(members), start.round + 1)
        return made

    def _join(
        self, past: Past, model: GlobalModel, start: Start, asked: Collection[int]
    ) -> dict[str, Member]:
        """Ask all others that are online; who cannot follow from its own model is sent the model."""
        requests, by_key = dict[int, Request](), {one.node_key: one for one in past.owners.values()}
        online = {
            key: node
            for key, (node, since) in self._exchanger.online_by_key().items()
            if self._may_join(by_key.get(key), key, since) and node not in asked
        }
        known = {key for key in online if key in by_key and by_key[key].fingerprint in past.following}
        for key in sorted(online, key=lambda key: (key not in known, online[key])):
            if len(requests) + len(asked) >= self._plan.cohort.maximum:
                break
            follows = key in known
            requests[online[key]] = (
                self._with_steps(past, start, by_key[key])
                if follows
                else self._with_model(past, start, model)
            )
        joined = self._joining.joined(past.run, requests, start)
        failed = self._joining.failed
        lost = [node for node in requests if failed.get(node) in _WITHOUT_STEPS]
        if lost:
            again = {node: self._with_model(past, start, model) for node in lost}
            for node in lost:
                del failed[node]
            joined |= self._joining.joined(past.run, again, start)
        past.following |= set(joined)
        return joined

    def _may_join(self, owner: Member | None, key: str, since: str) -> bool:
        if owner is not None and owner.excluded:
            return False
        return not self._is_refused(key, since)

    def _with_steps(self, past: Past, start: Start, member: Member) -> Request:
        missed = range(member.known_round + 1, start.round + 1)
        # members that have missed the same rounds share one copy of the sums
        if self._sums[0] != missed:
            self._sums = missed, b"".join([self._store.sums(number) for number in missed])
        return self._request(past, start, past.steps[member.known_round :], self._sums[1])

    def _with_model(self, past: Past, start: Start, model: GlobalModel) -> Request:
        if self._model[0] != start.model_hash:
            self._model = start.model_hash, model.to_bytes()
        return self._request(past, start, [], self._model[1] if start.round else b"", "global model")

    def _request(
        self,
        past: Past,
        start: Start,
        steps: list[list[Signed]],
        blob: bytes,
        content: str | None = None,
    ) -> Request:
        message = JoinRequest(run=past.run, plan=self._plan.fields(), start=start, steps=steps)
        return Request(message.to_bytes(), blob, content)

    def _carried(self, past: Past, fresh: Member) -> Member:
        """Return a member with what is known of it from earlier rosters."""
        known = past.owners.get(fresh.fingerprint)
        if known is None:
            return fresh
        carried = replace(
            known,
            node=fresh.node,
            node_key=fresh.node_key,
            activated=fresh.activated,
            joined=fresh.joined,
            last_head=fresh.last_head,
            roster=fresh.roster,
            known_round=fresh.known_round,
            absent=False,
            problem=None,
        )
        past.owners[fresh.fingerprint] = carried
        return carried

    def _require_vouched(self, past: Past, members: Mapping[str, Member]) -> None:
        vouching = sum(Join.from_fields(one.joined.join.body).vouches for one in members.values())
        if vouching < self._plan.encryption.quorum:
            raise QuorumNotMet(
                f"{vouching} of the owners that are there know the model by themselves, "
                f"{self._plan.encryption.quorum} are needed"
            )

    def _record(self, session: ServerSession, new: list[str]) -> None:
        with self._store.transaction():
            self._store.set("run", session.run)
            self._store.set("session", session.session)
            stage = Stage(session=session.session, first_round=session.first_round)
            stages = [*self._store.get("sessions", []), stage.model_dump(mode="json")]
            self._store.set("sessions", stages)
            self._store.set("roster", session.roster)
            for member in session.members.values():
                self._store.put_owner(member.fingerprint, member.facts())
            later = {} if session.roster == 1 else {"round": session.first_round, "new": new}
            self._store.event(
                "session", owners=len(session.members), members=list(session.members), **later
            )


def _question(runner: RoundRunner, waiting: Mapping[int, Arrival]) -> Question:
    there = frozenset(_there(runner))
    return runner.session.session, len(runner.steps), there, frozenset(waiting.values())


def _there(runner: RoundRunner) -> set[str]:
    """Return the members that are there and in the session, as they say themselves."""
    present = runner.attendance.present()
    return {member.fingerprint for member in present if member.problem != SessionMismatch.code}
