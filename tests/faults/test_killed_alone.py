"""SIGKILL of one process alone, as an operator or the kernel's memory killer does it.

Kills that take a whole process group hide whether the processes that are left end, and whether they let go
of the run. `make test` kills two of the three in one run (`tests/integration/test_faults_real.py`); here
each dies at every step, and the table of outcomes is printed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from killing import ALONE, Killing, Note, killed_alone, killing_federation, outcome
from real_federation import wait_until
from steps import SERVER_STEPS

from protocol.errors import RunInterrupted
from server.watch import follow

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def killing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killing]:
    with killing_federation(tmp_path_factory.mktemp("alone")) as federation:
        yield federation


def kill_alone(killing: Killing, victim: str, step: str, note: Note) -> None:
    """Kill one process of the coordinator at a step: the others end, and the run can go on at once."""
    started, real = time.monotonic(), killing.real
    store = killed_alone(killing, victim, step)
    if store.finished_rounds() < store.plan().run.rounds or store.get("state") != "finished":
        with pytest.raises(RunInterrupted) as caught:
            follow(store, lambda _kind, _facts: None)
        assert caught.value.exit_code == 11
        shown = {run["run"]: run["state"] for run in real.made.link().runs()}
        assert shown[store.folder.name] == "paused"
        killing.resume(store)
    real.wait_for_end(store)
    killing.check(store)
    note("killed", outcome(f"{victim} alone", step, store, started))


def test_an_executor_killed_between_runs_is_started_again(killing: Killing) -> None:
    real = killing.real
    killing.kill("superexec")
    wait_until(lambda: killing.pid("superexec"), 20, "a new executor")
    store = real.run(killing.plan("after-it"))
    killing.check(store)


@pytest.mark.parametrize("victim", ALONE)
@pytest.mark.parametrize("step", SERVER_STEPS)
def test_one_process_is_killed_at_every_step(
    killing: Killing, step: str, victim: str, record_property: Note
) -> None:
    kill_alone(killing, victim, step, record_property)
