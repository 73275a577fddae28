"""SIGKILL at named steps, with real processes over mutual TLS: the run goes on and nothing is lost.

`make test` kills at a few steps. `make test-long` kills at every step and prints the table of outcomes.
The plan is that of `crashing`, in which every update is exact, so that each finished model must be, to the
bit, the one that an undisturbed run with the same lists of owners has.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashing import exact_fields
from killing import (
    DEADLINES,
    KILLER,
    STEP_S,
    Killing,
    Note,
    killed_coordinator,
    killing_federation,
    outcome,
    plan_name,
)
from real_federation import PASSPHRASE, wait_until
from steps import SERVER_STEPS, owner_steps

from protocol.errors import FedsealError, QuorumNotMet, RunFailed, ServerUnavailable
from protocol.plan import Plan
from server.submit import prepare_run

pytestmark = pytest.mark.long
"""Real time limits, which a busy machine breaks; `make test-long` runs them."""

VICTIM = "owner-2"
ONCE = [step for step in owner_steps(lambda _one: True) if not step.endswith("again")]
OWNER_STEPS = (*ONCE, "half the frames sent", "sent")


@pytest.fixture(scope="module")
def killing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killing]:
    with killing_federation(tmp_path_factory.mktemp("killed")) as federation:
        yield federation


def kill_coordinator(killing: Killing, step: str, note: Note, *, whole: bool) -> None:
    """Kill the coordinator at a step, and resume the run."""
    started = time.monotonic()
    store = killed_coordinator(killing, step, whole=whole)
    killing.resume(store)
    killing.real.wait_for_end(store)
    killing.check(store)
    note("killed", outcome("coordinator" if whole else "run's process", step, store, started))


def kill_owner(killing: Killing, step: str, note: Note) -> None:
    """Kill an owner's node at a step, start it again, and let the run come to its end."""
    real = killing.real
    killing.order(VICTIM, step)
    started = time.monotonic()
    # one owner more than the quorum opens: all four of them, where the victim has to be among them
    quorum = 3 if step in ("open", "opened") else 2
    store = real.submit(killing.plan(plan_name(step), quorum))
    wait_until(lambda: VICTIM in real.processes.ended(), STEP_S, "the step")
    assert killing.carried_out(VICTIM)
    real.start_owner(VICTIM)
    real.wait_for_end(store)
    killing.check(store)
    note("killed", outcome("owner", step, store, started))
    wait_until(lambda: real.log(VICTIM).count("is connected") > 1, 30, "the victim's return")


def passphrase_file(folder: Path) -> Path:
    """Write the federation's passphrase where nobody else reads it."""
    file = folder / "passphrase"
    file.touch(mode=0o600)
    file.write_bytes(PASSPHRASE)
    return file


def test_a_run_goes_on_after_its_coordinator_was_killed(killing: Killing, tmp_path: Path) -> None:
    """An operator resumes it by the command line, which packages the model in the end."""
    store = killed_coordinator(killing, "half sealed", whole=True)
    passphrase = passphrase_file(tmp_path)
    command = [sys.executable, "-m", "fedseal", "run", "--resume", store.folder.name]
    command += ["--home", str(killing.real.home), "--passphrase-file", str(passphrase)]
    command += ["--operator-passphrase-file", str(passphrase)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 of 3 rounds are finished" in ended.stdout
    assert "going on after round 1 with the same keys" in ended.stdout
    assert "package: " in ended.stdout
    killing.check(store)


def documented_loop(killing: Killing, run: str, passphrase: Path) -> str:
    """Return the shell loop of docs/operations.md for one run; it waits a second in place of ten."""
    text = (KILLER.parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"```\n(until fedseal run .*?done)\n```", text, re.DOTALL)
    for name, value in (
        ("RUN", run),
        ("HOME", killing.real.home),
        ("FILE", passphrase),
        ("sleep 10", "sleep 1"),
    ):
        loop = re.sub(rf"\b{name}\b", str(value), loop)
    return loop.replace("until fedseal", f"until {sys.executable} -m fedseal") + "\nexit $?"


def test_the_documented_supervisor_resubmits(killing: Killing, tmp_path: Path) -> None:
    """The coordinator is killed and stays away for a while; the loop ends with the run."""
    passphrase = passphrase_file(tmp_path)
    started = time.monotonic()
    store = killed_coordinator(killing, "half sealed", whole=True, restart=False)
    loop = documented_loop(killing, store.folder.name, passphrase)
    with subprocess.Popen(
        ["bash", "-c", loop], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            time.sleep(15)
            assert process.poll() is None, "it must go on trying"
            killing.restart_coordinator()
            output, _ = process.communicate(timeout=200)
        finally:
            process.kill()
    assert process.returncode == 0, output.decode()
    assert FedsealError.code not in output.decode()
    assert ServerUnavailable.code in output.decode(), "the coordinator was away"
    killing.check(store)
    assert time.monotonic() - started > 15


def test_the_documented_supervisor_gives_a_failed_run_up(killing: Killing, tmp_path: Path) -> None:
    passphrase = passphrase_file(tmp_path)
    store = prepare_run(killing.real.home, killing.plan("failed"), None)
    store.set("problem", {"code": RunFailed.code})
    store.set("state", "failed")
    loop = documented_loop(killing, store.folder.name, passphrase)
    ended = subprocess.run(["bash", "-c", loop], capture_output=True, text=True, timeout=100)
    assert RunFailed.code in ended.stderr, ended.stdout + ended.stderr
    assert store.get("state") == "failed"
    store.close()


def test_a_run_goes_on_without_a_killed_owner(killing: Killing, record_property: Note) -> None:
    kill_owner(killing, "half the frames sent", record_property)


def test_a_run_whose_nodes_are_all_gone_pauses_in_time_and_goes_on(killing: Killing) -> None:
    """Every node is killed behind the first round; nobody hangs, and nothing is lost."""
    real, waits = killing.real, DEADLINES | {"fit_s": 10.0, "seal_s": 10.0, "open_s": 10.0, "pause_s": 10.0}
    fields = exact_fields(run={"name": "all-gone", "rounds": 3, "spare_attempts": 6}, deadlines=waits)
    store = real.submit(Plan.from_fields(fields))
    wait_until(lambda: store.finished_rounds() > 0, STEP_S, "the first round")
    for home in real.made.owners:
        real.processes.kill(home.name)
    started, finished = time.monotonic(), store.finished_rounds()
    assert finished < 3, "they were killed in time"
    wait_until(lambda: store.get("state") == "paused", STEP_S, lambda: f"a pause; {real.logs()}")
    # an attempt that is under way ends by its deadlines, and then the run waits once
    assert time.monotonic() - started < 3 * 10 + 10 + 20
    assert store.get("problem")["code"] == QuorumNotMet.code
    for home in real.made.owners:
        real.start_owner(home.name)
    killing.resume(store)
    real.wait_for_end(store)
    killing.check(store)


@pytest.mark.long
@pytest.mark.parametrize("step", SERVER_STEPS)
def test_coordinator_killed_at_every_step(killing: Killing, step: str, record_property: Note) -> None:
    kill_coordinator(killing, step, record_property, whole=True)


@pytest.mark.long
@pytest.mark.parametrize("step", SERVER_STEPS)
def test_run_process_killed_at_every_step(killing: Killing, step: str, record_property: Note) -> None:
    kill_coordinator(killing, step, record_property, whole=False)


@pytest.mark.long
@pytest.mark.parametrize("step", OWNER_STEPS)
def test_owner_killed_at_every_step(killing: Killing, step: str, record_property: Note) -> None:
    kill_owner(killing, step, record_property)
