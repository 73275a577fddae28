"""SIGKILL while a run gets its second roster: one owner of three is gone, and another takes its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from crashing import exact_fields
from killing import DEADLINES, STEP_S, Killing, Note, killing_federation, outcome, plan_name
from real_federation import wait_until
from steps import ROSTER_STEPS, owner_steps

from protocol.plan import Plan
from server.store import RunStore

pytestmark = pytest.mark.long

STAYS, LEAVES, COMES = "owner-1", "owner-3", "owner-4"
OWNER_STEPS = [step for step in owner_steps(lambda _one: True) if step.endswith("again")]


@pytest.fixture(scope="module")
def killing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killing]:
    with killing_federation(tmp_path_factory.mktemp("replaced"), started=3) as federation:
        yield federation


def begin(killing: Killing, step: str, order: Callable[[], None]) -> RunStore:
    """Begin a run of three owners; one of them leaves behind the first round, and another comes.

    The order to die is given between the two.
    """
    real = killing.real
    running = real.processes.pids()
    if COMES in running:
        real.processes.terminate(COMES)
    if LEAVES not in running:
        connected = real.log(LEAVES).count("is connected")
        real.start_owner(LEAVES)
        wait_until(lambda: real.log(LEAVES).count("is connected") > connected, 30, "the first three")
    run = {"name": plan_name(step), "rounds": 3, "spare_attempts": 6}
    store = real.submit(Plan.from_fields(exact_fields(run=run, deadlines=DEADLINES)))
    wait_until(lambda: store.finished_rounds() > 0, STEP_S, lambda: f"the first round; {real.logs()}")
    real.processes.terminate(LEAVES)
    order()
    real.start_owner(COMES)
    return store


def finish(killing: Killing, store: RunStore) -> None:
    killing.real.wait_for_end(store)
    killing.check(store)
    prints = {home.fingerprint: home.name for home in killing.real.made.owners}
    last = {prints[one] for one in store.rounds()[-1]["contributors"]}
    assert last == {STAYS, "owner-2", COMES}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("step", ROSTER_STEPS)
def test_coordinator_killed_while_it_makes_a_roster(
    killing: Killing, step: str, whole: bool, record_property: Note
) -> None:
    started, real = time.monotonic(), killing.real

    def order() -> None:
        nodes = {pid for name, pid in real.processes.pids().items() if name != "coordinator"}
        killing.order("server", step, *[pid for pid in set(real.living()) - nodes if whole])

    store = begin(killing, step, order)
    wait_until(lambda: killing.carried_out("server"), STEP_S, lambda: f"the step; {real.logs()}")
    if whole:
        killing.restart_coordinator()
    else:
        wait_until(lambda: not store.is_carried_out(), 10, "the end of the run's process")
    killing.resume(store)
    finish(killing, store)
    record_property("killed", outcome("coordinator" if whole else "run's process", step, store, started))


@pytest.mark.parametrize("victim", [STAYS, COMES])
@pytest.mark.parametrize("step", OWNER_STEPS)
def test_owner_killed_while_a_roster_is_made(
    killing: Killing, step: str, victim: str, record_property: Note
) -> None:
    started, real = time.monotonic(), killing.real
    store = begin(killing, step, lambda: killing.order(victim, step))
    wait_until(lambda: killing.carried_out(victim), STEP_S, lambda: f"the step; {real.logs()}")
    wait_until(lambda: victim in real.processes.ended(), 10, "the end of the victim")
    real.start_owner(victim)
    finish(killing, store)
    record_property("killed", outcome("owner", f"{step}, {victim}", store, started))
