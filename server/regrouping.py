"""Making a later roster of a run: a new session with new keys, under the same run.

Owners that were there compute the model that it starts from by themselves, the others get it with their
word. Attempt numbers go on, so that every owner's ledger prices the run as one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from protocol.errors import (
    CertificateRefused,
    MemberUncertified,
    ModelMismatch,
    QuorumNotMet,
    SessionMismatch,
)
from protocol.messages import Join, JoinRequest, Signed, Stage, Start
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from server.cohort.attendance import note_objection
from server.cohort.members import Member, ServerSession
from server.cohort.patience import Patience
from server.cohort.session import TRIES, Joining
from server.cohort.standing import Standing
from server.exchange import Exchanger, Request
from server.rounds.runner import RoundRunner
from server.store import RunStore

_LOG = logging.getLogger("fedseal.server")
_WITHOUT_STEPS = (ModelMismatch.code, SessionMismatch.code)
"""Refusals of owners that cannot follow from their own model, and may get the model itself."""


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


class Regrouping:
    """Makes a run's later rosters.

    Args:
        exchanger: Sends requests, and knows which nodes are online.
        store: Records rosters and owners.
        plan: The resolved plan.
        joining: Runs the joining exchanges.
        patience: Knows whom not to ask.
        standing: Judges owners by their certificates.
    """

    def __init__(
        self,
        exchanger: Exchanger,
        store: RunStore,
        plan: Plan,
        joining: Joining,
        patience: Patience,
        standing: Standing,
    ) -> None:
        self._exchanger = exchanger
        self._store = store
        self._plan = plan
        self._joining = joining
        self._patience = patience
        self._standing = standing
        self._sums = (range(0), b"")
        self._model = ("", b"")

    def consenting(
        self, past: Past, nodes: Collection[int], start: Start, model: GlobalModel
    ) -> dict[str, Member]:
        """Ask owners that wait whether they consent; whom the run has left out does not count."""
        requests = dict.fromkeys(nodes, self._with_model(past, start, model))
        joined = self._joining.joined(past.run, requests, start)
        self._patience.note(self._exchanger, self._joining)
        return _without(joined, past)

    def next_start(self, past: Past, model: GlobalModel) -> Start:
        """Return where a new roster starts; its number is recorded before anybody hears of it."""
        number = self._store.get("last_roster", 1) + 1
        self._store.set("last_roster", number)
        return Start(
            roster=number,
            round=len(past.steps),
            model_hash=model.sha256(),
            sessions=[Stage.from_fields(stage) for stage in self._store.get("sessions", [])],
        )

    def make(
        self, past: Past, model: GlobalModel, start: Start, consenting: Mapping[str, Member]
    ) -> ServerSession:
        """Make a roster of the owners that are there; from the first request on there is no other.

        Raises:
            QuorumNotMet: It did not come about.
        """
        self._store.set("session", None)
        joined, before = dict(consenting), set(past.following)
        for left in reversed(range(TRIES)):
            joined |= self._join(past, model, start, {member.node for member in joined.values()})
            members = {name: self._carried(past, member) for name, member in sorted(joined.items())}
            if self._joining.are_enough(members):
                self._require_vouched(past, members)
                session = self._joining.agreed(past.run, members)
                if session is not None:
                    return self._entered(past, start, session, members)
            silent = self._joining.silent()
            self._note_objections(past, members)
            newcomers = [member for name, member in members.items() if name not in before]
            self._patience.suspect(newcomers, self._joining)
            self._patience.note(self._exchanger, self._joining)
            self._standing.wait_for_news(past.owners.values(), self._plan.deadlines.pause_s)
            with suppress(CertificateRefused):
                self._standing.judge(past.owners.values())
            if left:
                self._joining.wait_for(silent)
            start, joined = self.next_start(past, model), {}
        raise QuorumNotMet(f"joining failed {TRIES} times")

    def _note_objections(self, past: Past, members: Mapping[str, Member]) -> None:
        """Blame nobody for a roster in which an owner of the run refused another's certificate."""
        failed, objecting = self._joining.failed, False
        for name, member in members.items():
            if failed.get(member.node) == MemberUncertified.code and name in past.owners:
                owner = past.owners[name]
                note_objection(self._store, owner)
                self._store.put_owner(name, owner.facts())
                objecting = True
        if objecting:
            self._joining.forget()

    def _entered(self, past: Past, start: Start, session: str, members: dict[str, Member]) -> ServerSession:
        new = [member.name for name, member in members.items() if name not in past.owners]
        left = {name: owner for name, owner in past.owners.items() if name not in members}
        made = ServerSession(past.run, session, members, start.roster, start.round, left)
        self._patience.note(self._exchanger, self._joining)
        self._sums, self._model = (range(0), b""), ("", b"")
        record_session(self._store, made, new)
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
        joined = _without(joined, past)
        past.following |= set(joined)
        return joined

    def _may_join(self, owner: Member | None, key: str, since: str) -> bool:
        if owner is not None and (owner.excluded or owner.objects):
            return False
        return not self._patience.is_over(key, since)

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


def _without(joined: Mapping[str, Member], past: Past) -> dict[str, Member]:
    """Return who joined, less those that are out or object, by whichever node they came."""
    out = {name for name, owner in past.owners.items() if owner.excluded or owner.objects}
    return {name: member for name, member in joined.items() if name not in out}


def record_session(store: RunStore, session: ServerSession, new: list[str]) -> None:
    """Record a session that stands, and who is new in a later roster, in one transaction."""
    with store.transaction():
        store.set("run", session.run)
        store.set("session", session.session)
        stage = Stage(session=session.session, first_round=session.first_round)
        stages = [*store.get("sessions", []), stage.model_dump(mode="json")]
        store.set("sessions", stages)
        store.set("roster", session.roster)
        for member in session.members.values():
            store.put_owner(member.fingerprint, member.facts())
        later = {} if session.roster == 1 else {"round": session.first_round, "new": new}
        store.event("session", owners=len(session.members), members=list(session.members), **later)
