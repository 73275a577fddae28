"""A run whose coordinator or whose owner dies at any step, in this process; see `crashing`.

The same table with real processes and SIGKILL is `test_killed.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crashing import Crash, CrashingGrid, CrashingRun, Fault, Node, allow_exact_plan, exact_fields
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from steps import OWNERS, SERVER_STEPS, at, owner_steps

import client.rounds
import server.strategy
from client.ledger import Ledger
from client.owner import open_owner
from crypto.trust import load_trust
from protocol.errors import (
    CheckpointInvalid,
    FedsealError,
    LedgerConflict,
    ModelMismatch,
    QuorumNotMet,
    RunBusy,
    RunFailed,
    RunInterrupted,
)
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from scenarios.federation import Federation, make_federation
from server.exchange import Exchanger
from server.home import IDENTITY
from server.rounds.attempts import Attempt
from server.rounds.runner import RoundRunner
from server.runs import note_interruption
from tasks.partition import digits
from tasks.resolve import resolve


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    torch.set_num_threads(1)
    splits, _ = digits(seed=0, owners=OWNERS)
    made = make_federation(
        tmp_path_factory.mktemp("crashing") / "federation", [(x[:40], y[:40]) for x, y in splits]
    )
    for owner in made.owners:
        allow_exact_plan(owner)
    return made


@pytest.fixture(scope="module")
def nodes(federation: Federation) -> Iterator[list[Node]]:
    """The owners' nodes, in the order of the roster."""
    homes = sorted(federation.owners, key=lambda home: home.fingerprint)
    opened = [Node(home, open_owner(home.folder, home.passphrase)) for home in homes]
    yield opened
    for node in opened:
        node.owner.close()


@pytest.fixture(scope="module")
def plan() -> Plan:
    return resolve(Plan.from_fields(exact_fields()))


MakeRun = Callable[..., CrashingRun]


@pytest.fixture
def begin(
    federation: Federation, nodes: list[Node], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MakeRun:
    monkeypatch.setattr(server.strategy, "_RETRY_PAUSE_S", 0.0)
    trust = load_trust(federation.server_home / IDENTITY)

    def begun(**sections: dict[str, Any]) -> CrashingRun:
        chosen = resolve(Plan.from_fields(exact_fields(**sections))) if sections else plan
        return CrashingRun(federation, nodes, tmp_path / "run", chosen, trust)

    return begun


FAST = (
    *("keyed", "session not committed", "half sealed", "open sent", "temporary file written", "renamed"),
    *("not committed", "committed", "half closed"),
    *("rostered", "reserved", "training", "ready", "paid", "sealed", "opened", "closed"),
)
"""Steps of `make test`; the others take part in `make test-long`."""


def each(steps: Iterable[str]) -> list[Any]:
    return [pytest.param(step, marks=() if step in FAST else pytest.mark.long) for step in steps]


@pytest.mark.parametrize("step", each(SERVER_STEPS))
def test_a_run_goes_on_after_its_coordinator_died(
    begin: MakeRun, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    fault, run = Fault(), begin()
    SERVER_STEPS[step]()(monkeypatch, fault)
    run.to_the_end()
    assert (fault.struck, run.starts) == (1, 2)
    run.check()
    with run.store() as store:
        assert all(len(facts["contributors"]) == OWNERS for facts in store.rounds())
        assert all(facts["statement"] for facts in store.owners().values())


def strike_owner(step: str, victim: Node, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    owned = owner_steps(lambda one: one in (victim.owner.store, victim.owner.ledger))
    owned[step]()(monkeypatch, fault)


OWNER_STEPS = (
    *("join", "joined", "roster", "rostered", "keys", "keyed", "fit received", "reserved", "training"),
    *("ready", "seal", "paid", "sealed", "open", "opened", "close", "closed"),
)
VOID = {"seal", "paid"}
"""Steps at which the others have sealed, or are about to, for a list that the dead owner is in."""


@pytest.mark.parametrize("step", each(OWNER_STEPS))
def test_a_run_goes_on_after_an_owner_died(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    fault, run, victim = Fault(), begin(), nodes[2]
    strike_owner(step, victim, monkeypatch, fault)
    run.to_the_end()
    assert (fault.struck, run.starts) == (1, 1)
    run.check()
    with run.store() as store:
        voids = [facts["attempt"] for facts in store.attempts() if facts["void"]]
        assert voids == ([2] if step in VOID else [])
        in_last = victim.owner.fingerprint in store.rounds()[-1]["contributors"]
        assert in_last == (victim.owner.fingerprint in store.owners()), "it is back for the last round"


def test_both_die_in_one_round(begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    server_fault, owner_fault, run = Fault(), Fault(), begin()
    SERVER_STEPS["half sealed"]()(monkeypatch, server_fault)
    strike_owner("training", nodes[0], monkeypatch, owner_fault)
    run.to_the_end()
    assert (server_fault.struck, owner_fault.struck) == (1, 1)
    run.check()


def test_a_coordinator_that_dies_too_often_cannot_spend_more_than_the_plan(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt is sealed and lost: owners stop when the rounds that the noise pays for are used up."""
    run = begin(run={"rounds": 2, "paid_spares": 1, "spare_attempts": 8})
    original = Exchanger.ask

    def dying(exchanger: Exchanger, kind: str, *arguments: Any) -> Any:
        if kind == "query.open":
            raise Crash
        return original(exchanger, kind, *arguments)

    monkeypatch.setattr(Exchanger, "ask", dying)
    for _ in range(3):
        with pytest.raises(Crash):
            run.carry_out()
    with pytest.raises(RunFailed, match="privacy budget"):
        run.carry_out()
    with run.store() as store:
        assert store.get("state") == "failed"
        assert LedgerConflict.code in {refusal["code"] for refusal in store.refusals()}
        identifier = store.get("run")
    for node in nodes:
        assert node.owner.ledger.spent(identifier).sealed == 3 == run.plan.paid_rounds


def test_epsilon_that_the_coordinator_shows_after_a_crash_covers_what_was_lost(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With noise: the update that was sealed and lost is in the epsilon of every later round."""
    noisy = {
        "noise": "local",
        "target_epsilon": 6.0,
        "delta": 1e-6,
        "sample_rate": 0.5,
        "expected_batch_size": 20.0,
    }
    fault, run = Fault(), begin(privacy=noisy, training={"learning_rate": 0.5})
    SERVER_STEPS["half sealed"]()(monkeypatch, fault)
    run.to_the_end()
    with run.store() as store:
        assert store.get("state") == "finished"
        shown = [facts["epsilon"] for _, _, kind, facts in store.events() if kind == "round"][-1]
        for node in nodes:
            spent = node.owner.ledger.spent(store.get("run"))
            assert spent.sealed == 4
            assert shown[node.home.name] == spent.epsilon
            assert store.owners()[node.owner.fingerprint]["sealed"] == 4


# --- deadlines, quorum, pause --------------------------------------------------------------------------


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


# --- the run folder ------------------------------------------------------------------------------------


def test_only_one_process_carries_a_run_out(begin: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.app._CLAIM_WAIT_S", 0.2)
    run = begin()
    with run.store() as other:
        other.claim()
        with pytest.raises(RunBusy):
            run.carry_out()
        assert other.get("state") == "submitted"
    run.carry_out()
    run.check()


def test_a_finished_run_is_not_carried_out_again(begin: MakeRun) -> None:
    run = begin(run={"rounds": 1})
    run.carry_out()
    with pytest.raises(RunFailed):
        run.carry_out()
    run.check()


@pytest.mark.parametrize("damage", ["missing", "truncated", "of another round"])
def test_a_checkpoint_that_is_not_the_recorded_one_is_refused(
    begin: MakeRun, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    fault, run = Fault(), begin()
    SERVER_STEPS["committed"]()(monkeypatch, fault)
    at(RoundRunner, "run", lambda _self, attempt, _model: attempt.round == 3)(monkeypatch, Fault())
    fault.armed = False
    with pytest.raises(Crash):
        run.carry_out()
    file = run.folder / "checkpoint-0002.safetensors"
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    else:
        file.write_bytes((run.folder / "checkpoint-0001.safetensors").read_bytes())
    with pytest.raises(CheckpointInvalid):
        run.carry_out()


def test_a_checkpoint_is_on_disk_before_it_has_its_name(
    begin: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a loss of power can take away: the file is synced, then renamed, then its folder is synced."""
    run, acts = begin(), list[tuple[str, str]]()
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        acts.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        acts.append(("rename", Path(target).name))
        replace(source, target)

    with run.store() as store:
        monkeypatch.setattr("server.store.os.fsync", synced)
        monkeypatch.setattr("server.store.os.replace", replaced)
        store.write_checkpoint(0, GlobalModel.initial(np.zeros(5)))
        name = next(file.name for file in run.folder.glob("checkpoint-*"))
    temporary = Path(name).with_suffix(".tmp").name
    assert acts == [("sync", temporary), ("rename", name), ("sync", run.folder.name)]


def test_a_coordinator_whose_folder_is_put_back_gets_nothing_twice(
    begin: MakeRun, nodes: list[Node], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its folder is that of the second round's start again, when the third round has begun."""
    run, old = begin(), tmp_path / "old"
    original = RoundRunner.run

    def watched(runner: RoundRunner, attempt: Attempt, model: GlobalModel) -> GlobalModel:
        if attempt.round == 2 and not old.exists():
            shutil.copytree(run.folder, old)
        return original(runner, attempt, model)

    monkeypatch.setattr(RoundRunner, "run", watched)
    at(RoundRunner, "_seal", lambda _self, attempt, *_rest: attempt.round == 3)(monkeypatch, Fault())
    with pytest.raises(Crash):
        run.carry_out()
    shutil.rmtree(run.folder)
    shutil.copytree(old, run.folder)
    with contextlib.suppress(FedsealError):
        run.carry_out()
    with run.store() as store:
        name, rounds = store.get("run"), store.rounds()
    for node in nodes:
        bodies = [one.body for one in node.owner.ledger.records() if one.body.get("run") == name]
        settled = [body["attempt"] for body in bodies if body["kind"] == "commit"]
        assert sorted(set(settled)) == sorted(settled), "an attempt is sealed once"
        assert {attempt for who, attempt in run.released if who == node.home.name} <= set(settled)
        state = node.owner.store.find(name)
        assert state is not None
        assert len(state.opened) <= len(state.sealed)
        assert state.round >= 2, "no owner goes back behind a round that it has applied"
    assert [facts["round"] for facts in rounds] == list(range(1, len(rounds) + 1))


def test_a_run_whose_process_is_gone_is_noted_as_paused(
    begin: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin()
    SERVER_STEPS["fit sent"]()(monkeypatch, Fault())
    with pytest.raises(Crash):
        run.carry_out()
    with run.store() as store:
        assert store.get("state") == "running"
        note_interruption(store)
        assert (store.get("state"), store.get("problem")["code"]) == ("paused", RunInterrupted.code)
    run.carry_out()
    run.check()
