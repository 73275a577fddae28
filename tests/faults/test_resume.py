"""A run whose coordinator or whose owner dies at any step, in this process; see `crashing`.

The same table with real processes and SIGKILL is `test_killed.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashing import Crash, Fault, MakeRun, Node, strike_owner
from steps import OWNERS, SERVER_STEPS, at

from protocol.errors import (
    CheckpointInvalid,
    FedsealError,
    LedgerConflict,
    RunBusy,
    RunFailed,
    RunInterrupted,
)
from protocol.optimizers import GlobalModel
from server.exchange import Exchanger
from server.rounds.attempts import Attempt
from server.rounds.runner import RoundRunner
from server.runs import note_interruption

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
        monkeypatch.setattr("server.checkpoints.os.fsync", synced)
        monkeypatch.setattr("server.checkpoints.os.replace", replaced)
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
