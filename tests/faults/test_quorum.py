"""Deadlines, quorum and pauses: who is waited for, who is left out, what ends a run; in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from crashing import Crash, CrashingGrid, Fault, MakeRun, Node, strike_owner
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from steps import OWNERS

import client.rounds
from client.ledger import Ledger
from protocol.errors import (
    LedgerConflict,
    ModelMismatch,
    QuorumNotMet,
)
from protocol.plan import Plan
from server.rounds.runner import RoundRunner


class Absentees:
    """Takes nodes offline and brings them back, as their owners would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gone: set[str] = set()
        original = CrashingGrid.get_nodes

        def online(grid: CrashingGrid) -> Any:
            names = {number: node.home.name for number, node in grid.nodes.items()}
            return [one for one in original(grid) if names[one.node_id] not in self.gone]

        monkeypatch.setattr(CrashingGrid, "get_nodes", online)


def test_too_few_owners_pause_the_run_within_the_deadline_and_it_goes_on(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    absentees, run = Absentees(monkeypatch), begin(deadlines={"pause_s": 0.5})
    monkeypatch.setattr(
        RoundRunner,
        "run",
        _before(RoundRunner.run, lambda attempt: attempt.round == 2, lambda: absentees.gone.update(names)),
    )
    names = {node.home.name for node in nodes[:2]}
    with pytest.raises(QuorumNotMet):
        run.carry_out()
    with run.store() as store:
        assert (store.get("state"), store.get("problem")["code"]) == ("paused", "FS-RUN-01")
        assert store.finished_rounds() == 1
        used = store.last_attempt()
        assert [facts["needed"] for _, _, kind, facts in store.events() if kind == "waiting"] == [3]
    absentees.gone.clear()
    run.carry_out()
    run.check()
    with run.store() as store:
        assert store.last_attempt() == used + 2, "waiting uses no attempt up"
        assert store.get("problem") is None
        assert [facts["rounds"] for _, _, kind, facts in store.events() if kind == "resumed"] == [1]


def _before(original: Any, when: Callable[[Any], bool], act: Callable[[], Any]) -> Any:
    done = False

    def changed(runner: RoundRunner, attempt: Any, model: Any) -> Any:
        nonlocal done
        if when(attempt) and not done:
            done = True
            act()
        return original(runner, attempt, model)

    return changed


def test_all_owners_gone_pause_the_run(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    absentees, run = Absentees(monkeypatch), begin(deadlines={"pause_s": 0.3})
    everybody = {node.home.name for node in nodes}
    monkeypatch.setattr(
        RoundRunner,
        "run",
        _before(
            RoundRunner.run, lambda attempt: attempt.round == 1, lambda: absentees.gone.update(everybody)
        ),
    )
    with pytest.raises(QuorumNotMet):
        run.carry_out()
    absentees.gone.clear()
    run.carry_out()
    run.check()


def test_a_member_leaves_and_comes_back(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    absentees, run, who = Absentees(monkeypatch), begin(), nodes[1].home.name
    leave = _before(RoundRunner.run, lambda one: one.round == 2, lambda: absentees.gone.add(who))
    come_back = _before(leave, lambda one: one.round == 3, absentees.gone.clear)
    monkeypatch.setattr(RoundRunner, "run", come_back)
    run.carry_out()
    run.check()
    with run.store() as store:
        assert [len(facts["contributors"]) for facts in store.rounds()] == [4, 3, 4]


@pytest.mark.parametrize("kind", ["query.join", "query.keys"])
def test_an_owner_that_is_away_for_a_moment_while_owners_join_is_waited_for(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """All owners are needed; one is away for longer than any exchange waits for it."""
    absentees, who = Absentees(monkeypatch), nodes[1].home.name
    monkeypatch.setattr("server.exchange._ALIVE_CHECK_S", 0.1)
    original, left = CrashingGrid._deliver, False

    def lost_while_away(grid: CrashingGrid, message: Any) -> Any:
        nonlocal left
        if grid.nodes[message.metadata.dst_node_id].home.name != who:
            return original(grid, message)
        if message.metadata.message_type == kind and not left:
            left = True
            absentees.gone.add(who)
            threading.Timer(1.5, absentees.gone.clear).start()
        away = Message(Error(ErrorCode.NODE_UNAVAILABLE, ""), reply_to=message)
        return away if who in absentees.gone else original(grid, message)

    monkeypatch.setattr(CrashingGrid, "_deliver", lost_while_away)
    run = begin(run={"rounds": 1}, cohort={"minimum": 4, "maximum": 4})
    run.carry_out()
    run.check()
    assert left


def test_an_owner_that_is_interrupted_and_asked_again_for_the_same_attempt_does_not_end_the_run(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All owners are needed; one starts again while it trains, and refuses the attempt that it reserved."""
    run, victim, fault = begin(cohort={"minimum": 4, "maximum": 4}), nodes[0], Fault()
    original = CrashingGrid._deliver

    def delivered_again(grid: CrashingGrid, message: Any) -> Any:
        armed = fault.armed
        reply = original(grid, message)
        return original(grid, message) if armed and not fault.armed else reply

    monkeypatch.setattr(CrashingGrid, "_deliver", delivered_again)
    strike_owner("training", victim, monkeypatch, fault)
    run.carry_out()
    run.check()
    with run.store() as store:
        assert LedgerConflict.code in {refusal["code"] for refusal in store.refusals()}
        assert [len(facts["contributors"]) for facts in store.rounds()] == [4, 4, 4]


def test_a_straggler_is_left_out_its_late_answer_dropped_and_it_is_asked_again(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, victim = begin(deadlines={"fit_s": 4.0}), nodes[1]
    run.workers, calls, original = OWNERS, 0, client.rounds.contribute

    def slow(task: Any, plan: Plan, weights: Any, examples: Any) -> Any:
        nonlocal calls
        if examples is victim.owner.examples(plan):
            calls += 1
            if calls == 1:
                time.sleep(5.0)
        return original(task, plan, weights, examples)

    monkeypatch.setattr(client.rounds, "contribute", slow)
    monkeypatch.setattr(
        RoundRunner,
        "run",
        _before(RoundRunner.run, lambda attempt: attempt.round == 2, lambda: time.sleep(3.0)),
    )
    run.carry_out()
    run.check()
    with run.store() as store:
        assert [len(facts["contributors"]) for facts in store.rounds()] == [3, 4, 4]
        returned = [facts for _, _, kind, facts in store.events() if kind == "returned"]
        assert [(one["owner"], one["how"]) for one in returned] == [
            (victim.home.name, "late answer dropped")
        ]
    assert "came late and is dropped" in caplog.text


def test_an_owner_that_voids_two_sealed_attempts_is_left_out_of_the_run(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It restarts each time, so that it is asked again after the first time and not after the second."""
    run, victim, struck = begin(), nodes[3], 0
    original = Ledger.commit

    def dying(ledger: Ledger, *arguments: Any) -> None:
        nonlocal struck
        if ledger is victim.owner.ledger:
            struck += 1
            raise Crash
        original(ledger, *arguments)

    monkeypatch.setattr(Ledger, "commit", dying)
    run.carry_out()
    assert struck == 2
    run.check()
    with run.store() as store:
        facts = store.owners()[victim.owner.fingerprint]
        assert (facts["member"]["excluded"], facts["member"]["voided"]) == (True, 2)
        excluded = [facts for _, _, kind, facts in store.events() if kind == "excluded"]
        assert [(one["owner"], "void" in one["reason"]) for one in excluded] == [(victim.home.name, True)]
        assert [len(one["contributors"]) for one in store.rounds()] == [3, 3, 3]


def test_an_owner_with_an_older_state_is_sent_all_rounds_again(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses once, is not blamed for it, and takes part again."""
    run, victim = begin(run={"rounds": 4}), nodes[0]
    original, forgot = client.rounds.follow, 0

    def forgetful(owner: Any, state: Any, steps: Any, blob: bytes) -> Any:
        nonlocal forgot
        if owner is victim.owner and len(steps) == 1 and state.round == 1:
            forgot += 1
            raise ModelMismatch
        return original(owner, state, steps, blob)

    monkeypatch.setattr(client.rounds, "follow", forgetful)
    run.carry_out()
    run.check()
    assert forgot == 1
    with run.store() as store:
        assert [len(facts["contributors"]) for facts in store.rounds()] == [4, 4, 3, 4]
