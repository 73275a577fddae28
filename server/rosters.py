"""A run's rosters: the first, and whether a later one is due because somebody comes or must go.

Nobody is waited for: who does not consent stays outside, and is asked again when its node connects anew.
"""

from __future__ import annotations

from collections.abc import Mapping

from crypto.trust import Trust
from protocol.errors import SessionMismatch
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from server.cohort.members import Member, ServerSession
from server.cohort.patience import Arrival, Patience
from server.cohort.session import Joining, wait_for_owners
from server.cohort.standing import Standing
from server.exchange import Exchanger
from server.regrouping import Past, Regrouping, record_session
from server.rounds.runner import RoundRunner
from server.store import RunStore

Question = tuple[str, int, frozenset[str], frozenset[Arrival]]
"""Whom a session asked to join, after how many rounds, and beside which members."""


class Rosters:
    """Makes a run's first roster, and later ones between two rounds where they are due.

    Attributes:
        standing: Judges members by their certificates.

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
        self.standing = Standing(store, trust)
        self._patience = Patience()
        self._joining = Joining(exchanger, store, plan, trust)
        self._regrouping = Regrouping(exchanger, store, plan, self._joining, self._patience, self.standing)
        self._asked: Question | None = None

    def first(self) -> ServerSession:
        """Make a run's first roster; see `Joining.establish`."""
        session = self._joining.establish()
        self._patience.note(self._exchanger, self._joining)
        record_session(self._store, session, [])
        return session

    def again(self, past: Past, model: GlobalModel) -> ServerSession:
        """Make the roster of a run that stopped while it had none; errors as in `renew_if_due`."""
        self.standing.judge(past.owners.values())
        wait_for_owners(self._exchanger, self._plan)
        return self._regrouping.make(past, model, self._regrouping.next_start(past, model), {})

    def somebody_waits(self, runner: RoundRunner) -> bool:
        """Tell whether owners that are not in the roster could make a round possible, or larger."""
        return bool(self._waiting(runner))

    def has_news(self, runner: RoundRunner) -> bool:
        """Tell whether `renew_if_due` has something to look at: who waits, or another revocation list."""
        return self.standing.has_news(_owners(runner)) or self.somebody_waits(runner)

    def judge(self, runner: RoundRunner) -> None:
        """Leave out whose certificate is not valid any more; see `Standing.judge`."""
        lost = self.standing.judge(_owners(runner))
        members = runner.session.members
        runner.session.reduced |= any(owner.fingerprint in members for owner in lost)

    def expelled(self, runner: RoundRunner) -> set[int]:
        """Return the nodes of members that were revoked; see `Standing.expelled`."""
        return self.standing.expelled(runner.session.members.values())

    def wait_for_news(self, runner: RoundRunner) -> None:
        """Wait for another revocation list where an owner objects to a member; see `Standing`."""
        self.standing.wait_for_news(_owners(runner), self._plan.deadlines.pause_s)

    def renew_if_due(self, runner: RoundRunner, model: GlobalModel) -> None:
        """Give the run a new roster if an owner that waits consents, or a member may not stay.

        Raises:
            QuorumNotMet: No new roster came about, and the old one is given up; the run can be resumed.
        """
        self.judge(runner)
        past, waiting = Past.of(runner), self._waiting(runner)
        if not waiting and not runner.session.reduced:
            return
        start, consenting = self._regrouping.next_start(past, model), dict[str, Member]()
        if waiting:
            consenting = self._regrouping.consenting(past, waiting, start, model)
            # who consents while too few do is asked again when others are there, or wait beside it
            self._asked = _question(runner, waiting)
            inside = {member.node_key for member in runner.session.members.values()}
            self._patience.count(key for key, _since in waiting.values() if key in inside)
        there = _there(runner)
        owners = {*there, *consenting}
        if len(owners) < self._plan.cohort.minimum or len(there) < self._plan.encryption.quorum:
            return
        if self._is_close(owners):
            self._patience.count(key for key, _since in waiting.values())
            return
        if consenting or runner.session.reduced:
            runner.enter(self._regrouping.make(past, model, start, consenting))

    def _waiting(self, runner: RoundRunner) -> dict[int, Arrival]:
        """Return the nodes to ask: online, not in the roster, not refused, as many as there is room for."""
        session = runner.session
        inside = {one.node_key: one for one in session.members.values()}
        gone = {one.node_key for one in _owners(runner) if one.excluded or one.objects}
        waiting = {}
        for key, (node, since) in self._exchanger.online_by_key().items():
            member = inside.get(key)
            # a member whose home was put back to before this roster is outside of it again
            if member is not None and member.problem != SessionMismatch.code:
                continue
            if key not in gone and not self._patience.is_over(key, since):
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


def _owners(runner: RoundRunner) -> list[Member]:
    return [*runner.session.members.values(), *runner.session.left.values()]


def _question(runner: RoundRunner, waiting: Mapping[int, Arrival]) -> Question:
    there = frozenset(_there(runner))
    return runner.session.session, len(runner.steps), there, frozenset(waiting.values())


def _there(runner: RoundRunner) -> set[str]:
    """Return the members that are there and in the session, as they say themselves."""
    present = runner.attendance.present()
    return {member.fingerprint for member in present if member.problem != SessionMismatch.code}
