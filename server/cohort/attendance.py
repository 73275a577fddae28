"""Who of a session's members is asked, who is left out of a round or of the run, and why.

An owner that did not answer is left out until it shows that it is there again: its node connects anew, or
its late answer comes in. An owner because of which a sealed attempt was void cost everybody a paid round:
the second time it is left out of the whole run, as is one that signed a sum that a quorum contradicts.
An owner that seals for nobody beside a member whose certificate it holds for invalid is not to blame: its
revocation list may be newer than the coordinator's (`server.cohort.standing`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence

from protocol.errors import (
    BudgetExhausted,
    LedgerConflict,
    MemberUncertified,
    ModelMismatch,
    QuorumNotMet,
)
from protocol.plan import Plan
from server.cohort.members import Member, ServerSession
from server.cohort.session import SETTLE_S
from server.exchange import Exchanger
from server.store import RunStore

_LOG = logging.getLogger("fedseal.server")
_POLL_S = 0.2
_MOST_VOIDS = 1


class Attendance:
    """Keeps the book on one session's members.

    Args:
        exchanger: Knows which nodes are online and what came late.
        store: Records who is left out and why.
        plan: The resolved plan.
        session: The established session.
    """

    def __init__(self, exchanger: Exchanger, store: RunStore, plan: Plan, session: ServerSession) -> None:
        self._exchanger = exchanger
        self._store = store
        self._plan = plan
        self._session = session
        self._since: float | None = None

    def present(self, *, objecting: bool = False) -> list[Member]:
        """Return the members to ask: those that are online and not left out.

        Args:
            objecting: Also those that would not go on beside a member.

        Members are found by the transport keys of their nodes, because a coordinator that was restarted
        gives the nodes new ids. A wrong match would be harmless: nodes refuse requests of sessions
        that they are not in, and replies count by their signatures alone.
        """
        online = self._exchanger.online_by_key()
        late = set(self._exchanger.late())
        present = []
        for member in self._session.members.values():
            if member.node in late:
                self._note_return(member, "late answer dropped")
            if member.node_key not in online:
                continue
            member.node, activated = online[member.node_key]
            if activated != member.activated:
                member.activated = activated
                self._note_return(member, "connected again")
            if not (member.absent or member.excluded or (member.objects and not objecting)):
                present.append(member)
        return present

    def _note_return(self, member: Member, how: str) -> None:
        if member.absent or how.startswith("late"):
            self._store.event("returned", owner=member.name, how=how)
            _LOG.info("%s: %s", member.name, how)
        member.absent = False

    def wait(self, *, for_all: bool = False, instead: Callable[[], bool] | None = None) -> bool:
        """Wait until enough members are there for a round; returns whether they are.

        Args:
            for_all: Wait for all members, and be content with enough of them once nobody else comes.
            instead: Tells whether to stop waiting, because there is something else to do.

        Raises:
            QuorumNotMet: Fewer than `cohort.minimum` are there at `deadlines.pause_s`.
        """
        least, now = self._plan.cohort.minimum, time.monotonic()
        # who only looks after something else goes on waiting
        started = self._since if self._since is not None else now
        self._since = started
        wanted = sum(not member.excluded for member in self._session.members.values())
        count, changed, said = -1, now, False
        while True:
            present, now = len(self.present()), time.monotonic()
            if present != count:
                count, changed = present, now
            if present >= least and (not for_all or present >= wanted or now - changed > SETTLE_S):
                self._since = None
                return True
            if now - started >= self._plan.deadlines.pause_s:
                raise QuorumNotMet(f"{present} owners are there, {least} are needed{self._objections()}")
            if instead is not None and instead():
                return False
            if wanted < least:
                raise QuorumNotMet(f"{wanted} owners are left in the run, {least} are needed")
            if present < least and not said:
                said = True
                self._store.event("waiting", owners=present, needed=least)
                _LOG.warning("waiting for owners: %d are there, %d are needed", present, least)
            time.sleep(_POLL_S)

    def _objections(self) -> str:
        count = sum(one.objects and not one.excluded for one in self._session.members.values())
        if not count:
            return ""
        return f"; {count} refuse another's certificate: give the coordinator the newest revocation list"

    def leave_out(self, asked: Sequence[Member], answered: Collection[str]) -> None:
        """Leave out those of the asked members that did not answer, until they return.

        A member that misses steps, because its home was put back to an earlier state, is sent all of
        them the next time instead.
        """
        for member in asked:
            if member.fingerprint in answered or member.absent:
                continue
            if member.problem == ModelMismatch.code and member.known_round > self._session.first_round:
                member.known_round = self._session.first_round
                continue
            member.absent = True
            reason = member.problem or "no answer"
            self._store.event("absent", owner=member.name, reason=reason)
            _LOG.warning("%s is left out: %s", member.name, reason)

    def blame(self, listed: Sequence[Member], sealed: Collection[str]) -> None:
        """Note who made an attempt void: by missing or wrong frames, or by refusing a member."""
        for member in listed:
            if member.problem == MemberUncertified.code:
                note_objection(self._store, member)
        blamed = [one for one in listed if one.fingerprint not in sealed and not one.objects]
        self.leave_out(blamed, sealed)
        for member in blamed:
            member.voided += 1
            if member.voided > _MOST_VOIDS:
                self.exclude(member, f"made {member.voided} sealed attempts void")

    def exclude(self, member: Member, reason: str) -> None:
        """Leave a member out of the rest of the run."""
        exclude(self._store, member, reason)

    def can_go_on(self) -> bool:
        """Tell whether enough members may have privacy budget left for a further round."""
        members = self._session.members.values()
        left = sum(not one.excluded and not self._is_spent(one) for one in members)
        return left >= self._plan.cohort.minimum

    def _is_spent(self, member: Member) -> bool:
        """Tell whether a member refused because the run may cost it nothing more.

        A ledger also refuses an attempt for which its owner was interrupted; it takes the next one.
        """
        if member.problem == LedgerConflict.code:
            return member.sealed >= self._plan.paid_rounds
        return member.problem == BudgetExhausted.code


def exclude(store: RunStore, member: Member, reason: str) -> None:
    """Leave an owner out of the rest of a run."""
    member.excluded = True
    store.event("excluded", owner=member.name, reason=reason)
    _LOG.warning("%s is left out of the run: %s", member.name, reason)


def note_objection(store: RunStore, member: Member) -> None:
    """Ask an owner that would not go on beside another no more before there is news of certificates."""
    member.objects = True
    store.event("objects", owner=member.name)
    _LOG.warning("%s holds another's certificate for invalid", member.name)
