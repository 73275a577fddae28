"""Attacks through later rosters of a run: forks, rollbacks, foreign models, and sealing twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hostile import Answered, HostileFederation, HostileRun, nothing_released

from client import joining
from client.following import follow
from crypto.signing import sign
from protocol.messages import (
    CloseReply,
    Join,
    JoinReply,
    JoinRequest,
    RosterRequest,
    Signed,
    Stage,
    Start,
    Statement,
)
from protocol.optimizers import GlobalModel
from protocol.plan import Plan

OLD, NEW = (0, 1, 2, 3), 4


class LaterRun:
    """A run of four owners with one finished round, and the means to make its second roster."""

    def __init__(self, run: HostileRun) -> None:
        self.run = run
        run.established()
        self.sessions = [Stage(session=run.session, first_round=0)]
        self.openings, self.sums = run.finished_round()
        # the model after the round, as an owner that follows it computes it
        request = run.fit_request(2, model_hash="00" * 32, round_number=2, steps=[self.openings])
        assert run.federation.refused(0, "train.fit", request, self.sums) == "FS-ROUND-02"
        self.model = self._followed()

    def _followed(self) -> GlobalModel:
        return follow(self.run.owner(0), self.run.state(0), [self.openings], self.sums)[0]

    def start(self, **changes: Any) -> Start:
        fields: dict[str, Any] = {
            "roster": 2,
            "round": 1,
            "model_hash": self.model.sha256(),
            "sessions": self.sessions,
        }
        return Start(**(fields | changes))

    def request(self, start: Start, *, follows: bool) -> tuple[JoinRequest, bytes]:
        steps = [self.openings] if follows else []
        blob = self.sums if follows else self.model.to_bytes()
        return JoinRequest(run=self.run.run, plan=self.run.plan.fields(), start=start, steps=steps), blob

    def join(self, index: int, start: Start, *, follows: bool | None = None) -> JoinReply:
        follows = index in OLD if follows is None else follows
        request, blob = self.request(start, follows=follows)
        return JoinReply.from_bytes(self.run.federation.accepted(index, "query.join", request, blob).body)

    def refused(self, index: int, start: Start, *, follows: bool | None = None) -> str:
        follows = index in OLD if follows is None else follows
        request, blob = self.request(start, follows=follows)
        return self.run.federation.refused(index, "query.join", request, blob)

    def second(self, indices: tuple[int, ...] = (*OLD, NEW), **changes: Any) -> HostileRun:
        """Let owners join the second roster; the run is that roster's from here on."""
        start = self.start(**changes)
        self.run.indices = list(indices)
        self.run.joins = {index: self.join(index, start) for index in indices}
        self.run.rosters = {}
        return self.run

    def roster_refused(self, index: int, joins: dict[int, JoinReply]) -> str:
        request = RosterRequest(run=self.run.run, members=[joins[one] for one in sorted(joins)])
        return self.run.federation.refused(index, "query.roster", request)


def stage(name: str, first_round: int = 1) -> Stage:
    """Return a session that nobody was in."""
    return Stage(session=name * 32, first_round=first_round)


def stage_of(run: HostileRun, first_round: int = 0) -> Stage:
    return Stage(session=run.session, first_round=first_round)


@pytest.fixture
def later(federation: HostileFederation, plan: Plan) -> LaterRun:
    return LaterRun(federation.run(plan, OLD))


def test_honestly_five_owners_go_on_together(later: LaterRun) -> None:
    old = later.run.session
    run = later.second().roster().keys()
    assert run.session != old
    openings, sums = run.finished_round(2, model_hash=later.model.sha256(), round_number=2)
    assert len(sums) == 4 * later.model.weights.size
    closing = run.close(NEW, [openings], sums, _after(run, openings, sums))
    statement = Statement.from_fields(CloseReply.from_bytes(closing.body).statement.body)
    assert statement.sessions == [old, run.session]
    assert run.state(NEW).keyed_in == {run.session: 1}
    assert [run.owner(index).ledger.spent(run.run).sealed for index in (*OLD, NEW)] == [2, 2, 2, 2, 1]


def _after(run: HostileRun, openings: list[Signed], sums: bytes) -> str:
    return follow(run.owner(0), run.state(0), [openings], sums)[0].sha256()


# --- what the model is -------------------------------------------------------------------------------


def test_a_model_that_no_owner_vouches_for_is_refused(later: LaterRun) -> None:
    """The coordinator gives newcomers a model of its own, and the others are not asked."""
    chosen = GlobalModel.initial(later.model.weights + 1.0)
    start = later.start(model_hash=chosen.sha256())
    run = later.run
    request = JoinRequest(run=run.run, plan=run.plan.fields(), start=start, steps=[])
    answered = run.federation.accepted(NEW, "query.join", request, chosen.to_bytes())
    assert Join.from_fields(JoinReply.from_bytes(answered.body).join.body).vouches is False
    # whoever followed the run refuses that model
    for index in OLD:
        request = JoinRequest(run=run.run, plan=run.plan.fields(), start=start, steps=[later.openings])
        with nothing_released(run, index):
            assert run.federation.refused(index, "query.join", request, later.sums) == "FS-ROUND-02"


def test_one_bought_owner_cannot_vouch_for_a_quorum(later: LaterRun) -> None:
    chosen = GlobalModel.initial(later.model.weights + 1.0)
    start, run = later.start(model_hash=chosen.sha256()), later.run
    request = JoinRequest(run=run.run, plan=run.plan.fields(), start=start, steps=[])
    answered = run.federation.accepted(NEW, "query.join", request, chosen.to_bytes())
    joins = {NEW: JoinReply.from_bytes(answered.body)}
    for index in (0, 1, 2):
        joins[index] = _forged(run, index, start, vouches=index == 0)
    assert later.roster_refused(NEW, joins) == "FS-ROSTER-01"


def _forged(run: HostileRun, index: int, start: Start | None, *, vouches: bool) -> JoinReply:
    """Let a bought owner sign a join of its own making."""
    body = Join.from_fields(run.joins[index].join.body)
    body = body.model_copy(update={"start": start, "vouches": vouches})
    signed = sign(run.owner(index).credentials.signing_key, body)
    return run.joins[index].model_copy(update={"join": signed})


@pytest.mark.parametrize("what", ["other", "short", "infinite"])
def test_a_model_that_is_not_the_named_one_is_refused(later: LaterRun, what: str) -> None:
    run, weights = later.run, later.model.weights.copy()
    request, blob = later.request(later.start(), follows=False)
    if what == "infinite":
        weights[3] = np.inf
        broken = GlobalModel.initial(weights)
        request = request.model_copy(update={"start": later.start(model_hash=broken.sha256())})
        blob = broken.to_bytes()
    if what == "other":
        blob = GlobalModel.initial(weights + 1e-9).to_bytes()
    if what == "short":
        blob = blob[:-8]
    code = "FS-ROUND-02" if what == "other" else "FS-WIRE-01"
    assert run.federation.refused(NEW, "query.join", request, blob) == code
    assert run.owner(NEW).store.find(run.run) is None


def test_openings_are_no_use_to_who_was_in_no_session(later: LaterRun) -> None:
    """It cannot check them; the coordinator sends the model then, as to an owner that lost its state."""
    assert later.refused(NEW, later.start(), follows=True) == "FS-ROSTER-02"


def test_before_the_first_round_only_the_plans_own_model_is_a_start(
    federation: HostileFederation, plan: Plan
) -> None:
    run = federation.run(plan, OLD).established()
    model = run.model(0)
    chosen = GlobalModel.initial(model.weights + 1.0)
    for blob in (b"", chosen.to_bytes()):
        start = Start(roster=2, round=0, model_hash=chosen.sha256(), sessions=[stage_of(run)])
        request = JoinRequest(run=run.run, plan=plan.fields(), start=start, steps=[])
        assert run.federation.refused(NEW, "query.join", request, blob) == "FS-ROUND-02"


def test_a_first_roster_takes_no_model_and_no_steps(federation: HostileFederation, plan: Plan) -> None:
    run = federation.run(plan)
    request = JoinRequest(run=run.run, plan=plan.fields())
    assert run.federation.refused(NEW, "query.join", request, bytes(8 * 650)) == "FS-WIRE-03"


# --- going back, and forks ---------------------------------------------------------------------------


def test_a_roster_with_a_number_that_was_used_is_refused(later: LaterRun) -> None:
    later.second()
    with nothing_released(later.run, 0):
        assert later.refused(0, later.start(sessions=[*later.sessions, stage("ab")])) == "FS-WIRE-03"


def test_an_owner_never_goes_back_to_an_earlier_round(later: LaterRun) -> None:
    run = later.second().roster().keys()
    initial = GlobalModel.initial(run.owner(0).task(run.plan).initial_weights(run.plan))
    start = later.start(roster=3, round=0, model_hash=initial.sha256())
    request = JoinRequest(run=run.run, plan=run.plan.fields(), start=start, steps=[])
    with nothing_released(run, 0):
        assert run.federation.refused(0, "query.join", request) == "FS-ROUND-02"


def test_another_model_for_a_round_that_was_applied_is_refused(later: LaterRun) -> None:
    run = later.second().roster().keys()
    chosen = GlobalModel.initial(later.model.weights + 1.0)
    start = later.start(roster=3, model_hash=chosen.sha256())
    request = JoinRequest(run=run.run, plan=run.plan.fields(), start=start, steps=[])
    with nothing_released(run, 0):
        assert run.federation.refused(0, "query.join", request, chosen.to_bytes()) == "FS-ROUND-02"


def test_a_session_in_which_an_owner_sealed_cannot_be_left_out(later: LaterRun) -> None:
    """Its openings would be missing in what the owners state in the end."""
    with nothing_released(later.run, 0):
        assert later.refused(0, later.start(sessions=[])) == "FS-WIRE-03"


def test_who_was_there_does_not_vouch_for_sessions_that_it_does_not_know(later: LaterRun) -> None:
    """With one that nobody was in, openings of another run would count in the report of this one."""
    start = later.start(sessions=[*later.sessions, stage("ab")])
    joins = {index: later.join(index, start) for index in (0, 1, 2, NEW)}
    assert not any(Join.from_fields(reply.join.body).vouches for reply in joins.values())
    assert later.roster_refused(0, joins) == "FS-ROSTER-01"


def test_a_run_that_seems_to_begin_with_its_second_roster_needs_a_quorum_too(
    federation: HostileFederation, plan: Plan
) -> None:
    run = federation.run(plan, OLD)
    start = Start(roster=2, round=0, model_hash=str(plan.model.initial_sha256), sessions=[stage("ab", 0)])
    request = JoinRequest(run=run.run, plan=plan.fields(), start=start, steps=[])
    for index in OLD:
        run.joins[index] = JoinReply.from_bytes(federation.accepted(index, "query.join", request).body)
    assert federation.refused(0, "query.roster", run.roster_request()) == "FS-ROSTER-01"


@pytest.mark.parametrize("what", ["fork", "hidden fork", "other past", "other beginning"])
def test_a_fork_of_the_run_does_not_come_together_again(later: LaterRun, what: str) -> None:
    """Half of the owners are taken elsewhere meanwhile; what they opened there would be off the record."""
    run = later.second((0, 1, 2)).roster().keys()
    openings, sums = run.finished_round(2, model_hash=later.model.sha256(), round_number=2)
    model = follow(run.owner(0), run.state(0), [openings], sums)[0]
    ours, first = stage_of(run, 1), later.sessions[0]
    # owner 0 applies the second round, so that it is two rounds on
    run.fit(3, (0,), model_hash=model.sha256(), round_number=3, steps=[openings], sums=sums)
    sessions = {
        "fork": [first, ours, stage("ab", 1)],
        "hidden fork": [first, stage("ab", 1), ours],
        "other past": [stage("ab", 0), first, ours],
        "other beginning": [first, ours.model_copy(update={"first_round": 2})],
    }[what]
    chosen = GlobalModel.initial(model.weights + 1.0)
    start = Start(roster=9, round=4, model_hash=chosen.sha256(), sessions=sessions)
    jump = JoinRequest(run=run.run, plan=run.plan.fields(), start=start, steps=[])
    with nothing_released(run, 0):
        assert run.federation.refused(0, "query.join", jump, chosen.to_bytes()) == "FS-WIRE-03"


def test_another_plan_for_a_later_roster_is_refused(later: LaterRun, make_plan: Any) -> None:
    request, blob = later.request(later.start(), follows=True)
    other = make_plan(training={"local_steps": 2})
    changed = request.model_copy(update={"plan": other.fields()})
    with nothing_released(later.run, 0):
        assert later.run.federation.refused(0, "query.join", changed, blob) == "FS-WIRE-03"


def test_a_closed_run_is_not_opened_again(later: LaterRun) -> None:
    run = later.run
    run.close(0, [later.openings], later.sums, later.model.sha256())
    request, _ = later.request(later.start(), follows=False)
    with nothing_released(run, 0):
        assert run.federation.refused(0, "query.join", request) == "FS-WIRE-03"


def test_members_that_were_shown_different_starts_do_not_come_together(later: LaterRun) -> None:
    start = later.start()
    joins = {index: later.join(index, start) for index in (0, 1, 2)}
    for other in (later.start(roster=3), later.start(roster=4, sessions=[*later.sessions, stage("cd")])):
        mixed = joins | {NEW: later.join(NEW, other)}
        assert later.roster_refused(0, mixed) == "FS-ROSTER-01"


def test_a_join_of_the_first_roster_is_no_member_of_the_second(later: LaterRun) -> None:
    start = later.start()
    joins = {index: later.join(index, start) for index in (0, 1, NEW)}
    joins[2] = later.run.joins[2]
    assert later.roster_refused(0, joins) == "FS-ROSTER-01"


# --- the earlier session -----------------------------------------------------------------------------


def test_the_earlier_session_is_dead_once_the_next_roster_was_joined(later: LaterRun) -> None:
    run = later.run
    old = run.session
    ready, sealed = run.sealed_attempt(
        2, model_hash=later.model.sha256(), round_number=2, steps=[later.openings], sums=later.sums
    )
    request, blob = run.open_request(2, ready, sealed)
    assert later.join(0, later.start(), follows=False) is not None
    assert run.federation.refused(0, "query.open", request, blob) == "FS-ROSTER-02"
    assert run.federation.refused(0, "train.seal", run.seal_request(2, ready)) == "FS-ROSTER-02"
    state = run.state(0)
    assert (state.session, state.bfv_key, state.chain_keys) == (None, None, {})
    assert old in state.sealed_in


def test_an_attempt_that_was_sealed_is_not_sealed_again_in_the_next_session(later: LaterRun) -> None:
    """Its frames of the first session and those of the second would hold the same update."""
    run = later.run
    run.sealed_attempt(
        2, model_hash=later.model.sha256(), round_number=2, steps=[later.openings], sums=later.sums
    )
    start = later.start()
    run.indices = [*OLD, NEW]
    run.joins = {index: later.join(index, start, follows=False) for index in run.indices}
    run.rosters = {}
    run.roster().keys()
    with nothing_released(run, *OLD):
        request = run.fit_request(2, model_hash=later.model.sha256(), round_number=2)
        assert run.federation.refused(0, "train.fit", request) == "FS-LEDGER-03"
    assert run.fit(3, model_hash=later.model.sha256(), round_number=2)


def test_a_contribution_that_was_not_sealed_is_refunded_and_gone(later: LaterRun) -> None:
    run = later.run
    run.fit(
        2, (0,), model_hash=later.model.sha256(), round_number=2, steps=[later.openings], sums=later.sums
    )
    assert run.owner(0).ledger.spent(run.run).reserved == 1
    later.join(0, later.start(), follows=False)
    spent = run.owner(0).ledger.spent(run.run)
    assert (spent.reserved, spent.sealed, spent.void) == (0, 1, 1)
    assert run.run not in run.owner(0).pending


def test_a_repeated_join_gives_the_same_bytes(later: LaterRun) -> None:
    request, blob = later.request(later.start(), follows=True)
    answers: list[Answered] = [
        later.run.federation.accepted(0, "query.join", request, blob) for _ in range(2)
    ]
    assert answers[0].body == answers[1].body


def test_without_the_check_of_vouchers_a_newcomer_would_take_any_model(
    later: LaterRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = GlobalModel.initial(later.model.weights + 1.0)
    start, run = later.start(model_hash=chosen.sha256()), later.run
    request = JoinRequest(run=run.run, plan=run.plan.fields(), start=start, steps=[])
    answered = run.federation.accepted(NEW, "query.join", request, chosen.to_bytes())
    joins = {NEW: JoinReply.from_bytes(answered.body)}
    joins |= {index: _forged(run, index, start, vouches=False) for index in (0, 1, 2)}
    assert later.roster_refused(NEW, joins) == "FS-ROSTER-01"
    monkeypatch.setattr(joining, "require_vouched", lambda *_: None)
    members = RosterRequest(run=run.run, members=[joins[one] for one in sorted(joins)])
    run.federation.accepted(NEW, "query.roster", members)
