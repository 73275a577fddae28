"""A federation of real processes that die at named steps, and what must hold afterwards."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from crashing import allow_exact_plan, exact_fields, twin_models
from real_federation import RealFederation, federation_of, made_federation, marked, wait_until
from steps import OWNERS

from protocol.plan import Plan
from scenarios.demo import wait_for_coordinator
from scenarios.federation import DATA
from server.addresses import read_addresses
from server.store import RunStore
from server.submit import submit
from tasks.registry import task_for

KILLER = Path(__file__).parent / "killer"
STEP_S = 120.0
ALONE = ("server", "superexec", "serverapp")
"""The processes of a coordinator that has a run under way."""

DEADLINES = {"join_s": 60.0, "fit_s": 20.0, "seal_s": 20.0, "open_s": 20.0, "pause_s": 60.0}


@dataclass
class Killing:
    """A running federation in which whoever reaches a step can be told to die there."""

    real: RealFederation
    orders: Path

    def order(self, who: str, step: str, *others: int | str) -> None:
        """Let a process die at its next arrival at a step, and others, by process id, with it.

        With the word "alone" among them, the others die and the process itself goes on.
        """
        text = "\n".join((step, *map(str, others)))
        (self.orders / f".{who}").write_text(text)
        (self.orders / f".{who}").rename(self.orders / who)

    def pid(self, name: str) -> int | None:
        """Return the process id of one of `ALONE`, or None if there is no such process."""
        if name == "server":
            return self.real.processes.pids().get("coordinator")
        program = {"superexec": "flower-superexec", "serverapp": "flwr-serverapp"}[name]
        for pid, words in self.real.living().items():
            if program in (Path(word).name for word in words):
                return pid
        return None

    def kill(self, name: str) -> None:
        """Kill one of `ALONE` and wait until it is gone."""
        pid = self.pid(name)
        assert pid is not None, f"{name} is running"
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.pid(name) != pid, 10, f"the end of {name}")

    def carried_out(self, who: str) -> bool:
        return not (self.orders / who).exists()

    def plan(self, name: str, quorum: int = 2) -> Plan:
        sections = {"run": {"name": name}, "deadlines": DEADLINES, "encryption": {"quorum": quorum}}
        return Plan.from_fields(exact_fields(**sections))

    def restart_coordinator(self) -> None:
        """Start it again as a supervisor would, on the same port."""
        real = self.real
        home = real.made.server_home
        real.processes.kill("coordinator")
        (home / "addresses.json").unlink(missing_ok=True)
        with marked(real.mark):
            real.processes.start(
                "coordinator",
                ["server", "--home", str(home), "--port", str(real.port)],
                real.made.server_passphrase,
            )
            wait_for_coordinator(real.processes, home)
        assert read_addresses(home).port == real.port

    def resume(self, store: RunStore) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            submit(self.real.home, store, self.real.made.link())

    def check(self, store: RunStore) -> None:
        """Check what must hold after every kill."""
        assert store.get("state") == "finished", self.real.logs()
        plan = store.plan()
        assert [facts["round"] for facts in store.rounds()] == list(range(1, plan.run.rounds + 1))
        task = task_for(plan)
        examples = {
            home.fingerprint: task.read_private(home.folder / DATA) for home in self.real.made.owners
        }
        for number, model in enumerate(twin_models(plan, store, examples)):
            assert store.read_checkpoint(number).sha256() == model.sha256(), f"round {number}"
        for home in self.real.made.owners:
            self._check_spending(store, home.name, home.fingerprint)

    def _check_spending(self, store: RunStore, name: str, fingerprint: str) -> None:
        """What a node sealed is charged in its ledger, and the coordinator's book is not below that."""
        with self.real.ledger(name) as ledger:
            if store.get("run") not in [record.body.get("run") for record in ledger.records()]:
                return
            spent = ledger.spent(store.get("run"))
        finished = sum(fingerprint in facts["contributors"] for facts in store.rounds())
        assert spent.sealed >= finished
        facts = store.owners().get(fingerprint)
        # what came is paid, void or not, and the coordinator never counts less than the owner
        assert facts is None or facts["sealed"] >= spent.sealed >= facts["member"]["received"]


@contextmanager
def killing_federation(folder: Path, started: int = OWNERS) -> Iterator[Killing]:
    """Run a federation of `OWNERS` owners, the first of which have running nodes."""
    orders = folder / "orders"
    orders.mkdir()
    made = made_federation(folder / "federation", owners=OWNERS)
    for owner in made.owners:
        allow_exact_plan(owner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(KILLER), str(KILLER.parents[2]))))
        patch.setenv("FEDSEAL_TEST_KILL", str(orders))
        with federation_of(made, made.owners[:started]) as real:
            yield Killing(real, orders)


Note = Callable[[str, object], None]


def outcome(who: str, step: str, store: RunStore, started: float) -> tuple[str, str, str, int, int]:
    """Return one line of the table that `tests/conftest.py` prints."""
    rounds = " ".join(str(len(facts["contributors"])) for facts in store.rounds())
    void = sum(facts["void"] for facts in store.attempts())
    return who, step, rounds, void, round(time.monotonic() - started)


def plan_name(step: str) -> str:
    """Return a plan's name for a step."""
    return re.sub("[^a-z]", "-", step)


def killed_coordinator(killing: Killing, step: str, *, whole: bool, restart: bool = True) -> RunStore:
    """Kill the run's process at a step of a new run, and the whole coordinator with it or not."""
    real = killing.real
    nodes = {pid for name, pid in real.processes.pids().items() if name != "coordinator"}
    others = [pid for pid in set(real.living()) - nodes if whole]
    killing.order("server", step, *others)
    store = real.submit(killing.plan(plan_name(step)))
    wait_until(lambda: killing.carried_out("server"), STEP_S, "the step")
    if whole:

        def left() -> str:
            return f"no process is left behind: {set(real.living()) - nodes}"

        wait_until(lambda: set(real.living()) <= nodes, 30, left)
        if restart:
            killing.restart_coordinator()
    else:
        wait_until(lambda: not store.is_carried_out(), 10, "the end of the run's process")
    return store


def killed_alone(killing: Killing, victim: str, step: str) -> RunStore:
    """Kill one process of the coordinator at a step of a new run, and start the server again if need be.

    What the killed one leaves behind must end by itself.
    """
    real = killing.real
    nodes = {pid for name, pid in real.processes.pids().items() if name != "coordinator"}
    before = {name: killing.pid(name) for name in ("server", "superexec")}
    others = [] if victim == "serverapp" else [str(before[victim]), "alone"]
    killing.order("server", step, *others)
    store = real.submit(killing.plan(plan_name(f"{victim} {step}")))
    wait_until(lambda: killing.carried_out("server"), STEP_S, "the step")
    if victim == "server":

        def left() -> str:
            return f"no process is left behind: {set(real.living()) - nodes}"

        wait_until(lambda: set(real.living()) <= nodes, 20, left)
        killing.restart_coordinator()
    else:
        wait_until(lambda: killing.pid("serverapp") is None, 20, "the end of the run's process")
        assert killing.pid("server") == before["server"]
        wait_until(lambda: killing.pid("superexec"), 20, "an executor")
    # a process that dies is not listed any more a moment before it lets go of its files
    wait_until(lambda: not store.is_carried_out(), 10, "the run's lock to be free")
    return store
