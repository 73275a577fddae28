"""Owners come and go between the rounds of a run: the roster is made anew, and nothing else is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scene import ROUNDS, Scene

import server.regrouping
from audit.collecting.collect import presence
from client import joining
from client.state import RunState
from crypto.agreement import WrapContext
from protocol.errors import QuorumNotMet
from protocol.messages import Join, Opening
from server.app import run_plan


def test_an_owner_joins_between_two_rounds(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(4)
    made.go(3)
    made.run(monkeypatch, {2: lambda _round: made.come(3)})
    assert made.contributors() == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    made.check_models(0, 1, 2, 3)
    first, second = made.sessions()
    assert first["owners"] == 3
    assert (second["owners"], second["round"], second["new"]) == (4, 2, ["owner-4"])
    # one run in every ledger, and each owner pays for what it sealed
    run = made.store.get("run")
    assert [made.owner(index).ledger.spent(run).sealed for index in range(4)] == [4, 4, 4, 2]
    assert all(len(made.owner(index).ledger.totals().unprotected) == 0 for index in range(4))
    for index in range(4):
        opened = [one.body for one in made.owner(index).ledger.records() if one.body["kind"] == "open_run"]
        assert [one["run"] for one in opened] == [run]
    owners = made.store.owners()
    assert all(facts["statement"] is not None for facts in owners.values())
    assert [owners[made.owner(index).fingerprint]["sealed"] for index in range(4)] == [4, 4, 4, 2]
    # openings name two sessions, and so do the attempts that they belong to
    said = [Opening.from_fields(facts["openings"][0]["body"]).session for facts in made.store.rounds()]
    assert said == [facts["session"] for facts in made.store.rounds()]
    assert said[0] == said[1] != said[2] == said[3] == made.store.get("session")


def test_keys_of_the_earlier_roster_are_gone(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(4)
    made.go(3)
    before: list[RunState] = []

    def come(_round: int) -> None:
        before.append(made.state(0))
        made.come(3)

    after: list[RunState] = []
    made.run(monkeypatch, {2: come, 3: lambda _round: after.append(made.state(0))})
    old, new = before[0], after[0]
    assert old.session != new.session
    assert old.bfv_key != new.bfv_key
    assert not set(old.chain_keys.values()) & set(new.chain_keys.values())
    assert new.start is not None
    assert (new.start.roster, new.start.round) == (2, 2)
    assert set(old.sealed) < set(new.sealed)
    joins = {Join.from_fields(reply.join.body).vouches for reply in new.members}
    assert joins == {True, False}


def test_another_owner_takes_the_place_of_one_that_is_gone(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the run would pause: two owners are left, three are needed."""
    made = scene(4)
    made.go(3)

    def change(_round: int) -> None:
        made.go(2)
        made.come(3)

    made.run(monkeypatch, {2: change})
    assert made.contributors() == [[0, 1, 2], [0, 1, 2], [0, 1, 3], [0, 1, 3]]
    made.check_models(0, 1, 3)
    owners = made.store.owners()
    assert owners[made.owner(2).fingerprint]["statement"] is None
    assert owners[made.owner(2).fingerprint]["sealed"] == 2
    times = dict[str, list[str]]()
    for _id, moment, kind, _facts in made.store.events():
        times.setdefault(kind, []).append(moment)
    end = made.store.get("finished_at")
    present = [presence(made.store, made.owner(index).fingerprint) for index in range(4)]
    assert present[0] == present[1] == (times["session"][0], end)
    assert present[2:] == [(times["session"][0], times["round"][1]), (times["session"][1], end)]


def test_an_owner_leaves_and_comes_back_through_a_third_roster(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(5, run={"rounds": 6})
    made.go(3)
    made.go(4)

    def first(_round: int) -> None:
        made.go(0)
        made.come(3)

    made.run(monkeypatch, {1: first, 3: lambda _r: made.come(0), 4: lambda _r: made.come(4)})
    assert made.contributors()[0] == [0, 1, 2]
    assert made.contributors()[1:3] == [[1, 2, 3]] * 2
    assert made.contributors()[3] == [0, 1, 2, 3]
    assert made.contributors()[4:] == [[0, 1, 2, 3, 4]] * 2
    made.check_models(0, 1, 2, 3, 4)
    run = made.store.get("run")
    assert [made.owner(index).ledger.spent(run).sealed for index in range(5)] == [4, 6, 6, 5, 2]
    assert [len(one["members"]) for one in made.sessions()] == [3, 3, 4, 5]


def test_nobody_joins_where_the_roster_is_full(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(4, cohort={"minimum": 3, "maximum": 3})
    made.go(3)
    made.run(monkeypatch, {1: lambda _round: made.come(3)})
    assert made.contributors() == [[0, 1, 2]] * ROUNDS
    assert len(made.sessions()) == 1


def test_who_does_not_consent_stays_outside_and_the_session_stands(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(4)
    made.go(3)
    newcomer = made.owner(3)
    newcomer.policy = newcomer.policy.model_copy(
        update={"plans": newcomer.policy.plans.model_copy(update={"models": ("cnn",)})}
    )
    made.run(monkeypatch, {1: lambda _round: made.come(3)})
    assert made.contributors() == [[0, 1, 2]] * ROUNDS
    assert len(made.sessions()) == 1
    refused = [one for one in made.store.refusals() if one["kind"] == "query.join"]
    assert [one["code"] for one in refused] == ["FS-POLICY-02"]


@pytest.mark.parametrize("replaces", [False, True])
def test_without_noise_one_owner_alone_does_not_join(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    """Two lists that differ in one owner would show its update; in place of another it may come."""
    privacy = {"noise": "none", "target_epsilon": None, "noise_multiplier": None}
    made = scene(4, privacy=privacy)
    made.go(3)

    def come(_round: int) -> None:
        made.come(3)
        if replaces:
            made.go(0)

    for index in range(4):
        owner = made.owner(index)
        owner.policy = owner.policy.model_copy(
            update={"plans": owner.policy.plans.model_copy(update={"allow_no_privacy": True})}
        )
    made.run(monkeypatch, {1: come})
    assert made.contributors() == [[0, 1, 2]] + [[1, 2, 3] if replaces else [0, 1, 2]] * 3
    assert not any(facts["void"] for facts in made.store.attempts())


def test_the_moments_of_an_adaptive_optimizer_reach_who_joins_late(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(4, server_optimizer={"name": "fedadam", "learning_rate": 0.05})
    made.go(3)
    made.run(monkeypatch, {2: lambda _round: made.come(3)})
    assert made.contributors()[2:] == [[0, 1, 2, 3]] * 2
    made.check_models(0, 1, 2, 3)
    assert np.any(made.owner(3).store.model(made.store.get("run")).second_moment)


def test_a_member_that_is_silent_while_a_roster_is_made_is_left_out_of_it(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It disappears between its consent and its wraps."""
    made = scene(5, deadlines={"join_s": 3.0, "pause_s": 2.0})
    made.go(3)
    made.go(4)
    push = made.simulation.grid.push_messages

    def push_messages(messages: Any) -> list[str]:
        asked = list(messages)
        if any(one.metadata.message_type == "query.roster" for one in asked) and len(asked) == 5:
            made.go(4)
        return push(asked)

    def come(_round: int) -> None:
        made.come(3)
        made.come(4)
        monkeypatch.setattr(made.simulation.grid, "push_messages", push_messages)

    made.run(monkeypatch, {2: come})
    assert made.contributors() == [[0, 1, 2]] * 2 + [[0, 1, 2, 3]] * 2
    made.check_models(0, 1, 2, 3)
    assert made.state(0).start is not None
    assert made.state(0).start.roster == 3


@pytest.mark.parametrize("kind", ["query.roster", "query.keys"])
def test_members_that_are_away_for_a_moment_while_a_roster_is_made_are_waited_for(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Without the two, the next try would have too few owners."""
    made = scene(5, cohort={"minimum": 4, "maximum": 5})
    monkeypatch.setattr("server.exchange._ALIVE_CHECK_S", 0.1)
    made.go(4)
    push, back = made.simulation.grid.push_messages, list[threading.Timer]()

    def push_messages(messages: Any) -> list[str]:
        asked = list(messages)
        if not back and len(asked) == 5 and asked[0].metadata.message_type == kind:
            for index in (0, 1):
                made.go(index)
                back.append(threading.Timer(1.5, made.come, [index]))
                back[-1].start()
        return push(asked)

    def come(_round: int) -> None:
        made.come(4)
        monkeypatch.setattr(made.simulation.grid, "push_messages", push_messages)

    made.run(monkeypatch, {2: come})
    assert made.contributors() == [[0, 1, 2, 3]] * 2 + [[0, 1, 2, 3, 4]] * 2
    made.check_models(0, 1, 2, 3, 4)
    assert len(back) == 2


def test_a_run_goes_on_after_its_coordinator_died_while_it_made_a_roster(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old session is given up, the new one does not stand yet: it is made when the run is resumed."""
    for step in ("query.roster", "query.keys"):
        made = scene(4)
        made.go(3)
        push = made.simulation.grid.push_messages

        def dying(messages: Any, step: str = step, push: Any = push) -> list[str]:
            asked = list(messages)
            if any(one.metadata.message_type == step for one in asked):
                raise QuorumNotMet("the coordinator ends here")
            return push(asked)

        def come(_round: int, made: Scene = made, dying: Any = dying) -> None:
            made.come(3)
            monkeypatch.setattr(made.simulation.grid, "push_messages", dying)

        with pytest.raises(QuorumNotMet, match="ends here"):
            made.run(monkeypatch, {2: come})
        assert made.store.get("session") is None
        monkeypatch.setattr(made.simulation.grid, "push_messages", push)
        run_plan(made.simulation.grid, made.store, made.simulation.trust)
        assert made.contributors() == [[0, 1, 2]] * 2 + [[0, 1, 2, 3]] * 2
        made.check_models(0, 1, 2, 3)
        run = made.store.get("run")
        assert [made.owner(index).ledger.spent(run).sealed for index in range(4)] == [4, 4, 4, 2]


def test_owners_that_were_in_a_roster_which_nobody_recorded_come_into_the_next_one(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have followed to its model, and the coordinator does not know it: it sends what led there again.

    By then they can check it no more. Who signed it may have left, and its session is not theirs any more.
    """
    made = scene(4)
    made.go(3)
    record, gone = server.regrouping.record_session, list[int]()

    def dying(*_arguments: Any) -> None:
        raise QuorumNotMet("the coordinator ends here")

    def change(_round: int) -> None:
        signers = {one["signer"] for one in made.store.rounds()[-1]["openings"]}
        gone.append(next(index for index in range(3) if made.owner(index).fingerprint in signers))
        made.go(gone[0])
        made.come(3)
        monkeypatch.setattr("server.regrouping.record_session", dying)

    with pytest.raises(QuorumNotMet, match="ends here"):
        made.run(monkeypatch, {2: change})
    assert made.store.get("session") is None
    present = [index for index in range(4) if index not in gone]
    assert {made.state(index).stage for index in present} == {"keyed"}
    monkeypatch.setattr("server.regrouping.record_session", record)
    run_plan(made.simulation.grid, made.store, made.simulation.trust)
    assert made.contributors() == [[0, 1, 2]] * 2 + [present] * 2
    made.check_models(*present)
    # the newcomer vouches, too: in the roster that was not recorded it had the model by a quorum's word
    joins = [Join.from_fields(reply.join.body) for reply in made.state(present[0]).members]
    assert all(join.vouches for join in joins)
    assert {join.start.roster for join in joins if join.start is not None} == {3}


def test_a_member_whose_home_was_put_back_comes_in_through_a_new_roster(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state is from before the roster: it is in no session that stands, and gets into the next one."""
    made = scene(4)
    made.go(3)
    kept: list[RunState] = []

    def restore(_round: int) -> None:
        owner, session = made.owner(2), made.sessions()[-1]
        assert session["owners"] == 4
        owner.pending.clear()
        owner.store.save(kept[0])

    def come(_round: int) -> None:
        kept.append(made.state(2))
        made.come(3)

    made.run(monkeypatch, {1: come, 2: restore})
    assert made.store.get("state") == "finished"
    assert made.contributors()[1] == [0, 1, 2, 3]
    assert made.contributors()[3] == [0, 1, 2, 3]
    assert len(made.sessions()) == 3
    made.check_models(0, 1, 2, 3)


def test_an_owner_that_needs_one_roster_after_the_other_is_out_at_last(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind every round it is in no session any more: each new roster costs everybody."""
    made = scene(4, run={"rounds": 14, "spare_attempts": 3})

    def forget(_round: int) -> None:
        owner, run = made.owner(3), made.store.get("run")
        owner.pending.clear()
        owner.store.save(made.state(3).with_changes(session=None))
        assert owner.store.find(run) is not None

    made.run(monkeypatch, dict.fromkeys(range(1, 14), forget))
    assert made.store.get("state") == "finished"
    assert len(made.sessions()) == 6
    assert made.contributors()[-1] == [0, 1, 2]


def test_a_newcomer_that_wraps_garbage_is_left_out_and_nobody_else_is(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers refuse what it sent, so that they look like those that fail."""
    made = scene(4)
    made.go(3)
    evil, wrap = made.owner(3).fingerprint, joining.wrap

    def garbage(key: bytes, secret: bytes, context: WrapContext) -> bytes:
        wrapped = wrap(key, secret, context)
        return bytes(len(wrapped)) if context.sender == evil else wrapped

    monkeypatch.setattr(joining, "wrap", garbage)
    made.run(monkeypatch, {2: lambda _round: made.come(3)})
    assert made.contributors() == [[0, 1, 2]] * ROUNDS
    assert [one["owners"] for one in made.sessions()] == [3, 3]
    made.check_models(0, 1, 2)
    assert not any(facts["void"] for facts in made.store.attempts())
    refused = {one["owner"] for one in made.store.refusals() if one["kind"] == "query.keys"}
    assert refused == {made.owner(index).fingerprint for index in range(3)}


def test_a_newcomer_is_not_blamed_for_the_silence_of_others(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member disappears while the roster is made; the newcomer is in the next try."""
    made = scene(4, deadlines={"join_s": 3.0, "pause_s": 2.0})
    made.go(3)
    push = made.simulation.grid.push_messages

    def push_messages(messages: Any) -> list[str]:
        asked = list(messages)
        if any(one.metadata.message_type == "query.roster" for one in asked) and len(asked) == 4:
            made.go(0)
        return push(asked)

    def come(_round: int) -> None:
        made.come(3)
        monkeypatch.setattr(made.simulation.grid, "push_messages", push_messages)

    made.run(monkeypatch, {2: come})
    assert made.contributors() == [[0, 1, 2]] * 2 + [[1, 2, 3]] * 2
    made.check_models(1, 2, 3)
