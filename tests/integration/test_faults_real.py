"""What four owners and a coordinator do when an owner is killed, refuses, or is missing."""

from __future__ import annotations

import os
import signal
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from killing import ALONE, Killing
from real_federation import RealFederation, federation_of, made_federation, small_plan, wait_until

from client.owner import POLICY
from client.policy import Policy
from protocol.accounting import epsilon_after
from protocol.errors import BudgetExhausted, PolicyRefused, QuorumNotMet
from protocol.plan import Plan
from scenarios.federation import OwnerHome
from server.store import RunStore

CAREFUL, VICTIM = "owner-4", "owner-1"
CAP = 1.2
SHORT_S = 15.0


def plan_of(name: str, epsilon: float, local_steps: int = 2, join_s: float = 90.0, rounds: int = 2) -> Plan:
    return small_plan(
        run={"name": name, "rounds": rounds},
        cohort={"minimum": 3, "maximum": 4},
        training={"local_steps": local_steps, "learning_rate": 0.1},
        privacy={"target_epsilon": epsilon},
        deadlines={"join_s": join_s, "fit_s": SHORT_S, "seal_s": 60.0, "open_s": 60.0},
    )


def cap_budget(owner: OwnerHome, epsilon: float) -> None:
    """Write lower caps into an owner's policy, as the owner would."""
    file = owner.folder / POLICY
    fields = tomllib.loads(file.read_text(encoding="utf-8"))
    fields["budget"] |= {"epsilon_per_run": epsilon, "epsilon_total": epsilon}
    file.write_text(tomli_w.dumps(fields), encoding="utf-8")
    assert Policy.from_toml(file.read_text(encoding="utf-8")).budget.epsilon_total == epsilon


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFederation]:
    """Four owners, one of which allows little."""
    made = made_federation(tmp_path_factory.mktemp("faults") / "federation", owners=4)
    cap_budget(next(owner for owner in made.owners if owner.name == CAREFUL), CAP)
    with federation_of(made) as federation:
        yield federation


@pytest.fixture(scope="module")
def refused(four: RealFederation) -> RunStore:
    """A run that costs more than the careful owner allows."""
    return four.run(plan_of("refused", epsilon=2.0))


@pytest.fixture(scope="module")
def killed(four: RealFederation, refused: RunStore) -> RunStore:
    """A run that the careful owner allows, and in whose second round another owner is killed."""
    store = four.submit(plan_of("killed", epsilon=1.0, local_steps=40))
    wait_until(store.finished_rounds, 120, lambda: f"the first round; logs: {four.logs()}")
    wait_until(lambda: reservations(four, store) == 2, 60, "the victim's second reservation")
    four.processes.kill(VICTIM)
    four.wait_for_end(store)
    return store


@pytest.fixture(scope="module")
def paused(four: RealFederation, killed: RunStore) -> tuple[RunStore, float]:
    """A run for which two owners are left, and how many seconds it lasted."""
    store = four.submit(plan_of("paused", epsilon=1.0, join_s=SHORT_S))
    started = time.monotonic()
    four.wait_for_end(store)
    return store, time.monotonic() - started


def reservations(four: RealFederation, store: RunStore) -> int:
    """Return how many attempts the victim has reserved in a run, by its own ledger."""
    with four.ledger(VICTIM) as ledger:
        bodies = [record.body for record in ledger.records()]
    return sum(body["kind"] == "reserve" and body["run"] == store.get("run") for body in bodies)


def contributors(store: RunStore) -> list[int]:
    return [len(facts["contributors"]) for facts in store.attempts() if not facts["void"]]


def test_run_goes_on_without_an_owner_whose_policy_refuses(four: RealFederation, refused: RunStore) -> None:
    assert refused.get("state") == "finished", four.logs()
    assert contributors(refused) == [3, 3]
    names = {facts["name"] for facts in refused.owners().values()}
    assert names == {"owner-1", "owner-2", "owner-3"}


def test_coordinator_learns_the_code_and_the_owner_the_reason(
    four: RealFederation, refused: RunStore
) -> None:
    assert [refusal["code"] for refusal in refused.refusals()] == [PolicyRefused.code]
    log = four.log(CAREFUL)
    assert PolicyRefused.code in log
    assert f"budget.epsilon_per_run is {CAP:g}" in log
    recorded = (refused.folder / "run.db").read_bytes() + (refused.folder / "run.db-wal").read_bytes()
    assert b"epsilon_per_run" not in recorded
    assert b"epsilon_per_run" not in four.log("coordinator").encode()


def test_refusing_owner_spends_nothing(four: RealFederation, refused: RunStore) -> None:
    with four.ledger(CAREFUL) as ledger:
        opened = [record.body for record in ledger.records() if record.body["kind"] == "open_run"]
    assert refused.get("run") not in [body["run"] for body in opened]


def test_run_finishes_without_a_killed_owner(four: RealFederation, killed: RunStore) -> None:
    assert killed.get("state") == "finished", four.logs()
    assert contributors(killed) == [4, 3]
    assert "owner-1" in {facts["owner"] for _id, _time, kind, facts in killed.events() if kind == "absent"}


def test_round_that_the_killed_owner_reserved_stays_spent(four: RealFederation, killed: RunStore) -> None:
    with four.ledger(VICTIM) as ledger:
        spent = ledger.spent(killed.get("run"))
    assert spent.void == 0
    assert spent.sealed + spent.reserved == 2
    assert spent.epsilon == epsilon_after(killed.plan(), 2)


def test_survivors_pay_for_their_rounds_alone(four: RealFederation, killed: RunStore) -> None:
    for name in ("owner-2", "owner-3", CAREFUL):
        with four.ledger(name) as ledger:
            spent = ledger.spent(killed.get("run"))
        assert (spent.sealed, spent.reserved) == (2, 0)


def test_run_with_too_few_owners_pauses_within_its_deadline(
    four: RealFederation, paused: tuple[RunStore, float]
) -> None:
    store, seconds = paused
    assert store.get("state") == "paused", four.logs()
    assert store.get("problem")["code"] == QuorumNotMet.code
    assert seconds < 2 * SHORT_S + 30, "two waits at most, and the start of a process"
    assert contributors(store) == []


def test_exhausted_budget_is_refused_with_its_own_code(
    four: RealFederation, paused: tuple[RunStore, float]
) -> None:
    store, _seconds = paused
    assert BudgetExhausted.code in [refusal["code"] for refusal in store.refusals()]
    assert f"budget.epsilon_total is {CAP:g}" in four.log(CAREFUL)


def test_paused_run_costs_nobody_anything(four: RealFederation, paused: tuple[RunStore, float]) -> None:
    costs = {"refused": 2.0, "killed": 1.0}
    for name in ("owner-2", "owner-3"):
        with four.ledger(name) as ledger:
            assert ledger.totals().epsilon <= sum(costs.values())


def kill_alone(killing: Killing, store: RunStore, victim: str) -> None:
    """Kill one process of the coordinator after a further round; those below it must end by themselves."""
    begun, below = store.finished_rounds(), ALONE[ALONE.index(victim) :]
    wait_until(
        lambda: store.finished_rounds() > begun, 120, lambda: f"a round; logs: {killing.real.logs()}"
    )
    ending = {pid for name in below if (pid := killing.pid(name))}
    pid = killing.pid(victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not ending & {killing.pid(name) for name in below}, 10, f"the end of {below}")
    wait_until(lambda: not store.is_carried_out(), 10, "the end of the run's lock")


def test_a_run_survives_one_process_of_the_coordinator_after_the_other(
    four: RealFederation, paused: tuple[RunStore, float], tmp_path: Path
) -> None:
    """The SuperExec is killed alone, then the server alone; tests/faults kills each at every step."""
    killing = Killing(four, tmp_path)
    four.start_owner(VICTIM)
    store = four.submit(plan_of("survives", epsilon=1.0, local_steps=40, rounds=40))
    for victim in ("superexec", "server"):
        kill_alone(killing, store, victim)
        if victim == "server":
            killing.restart_coordinator()
        wait_until(lambda: killing.pid("superexec"), 20, "a SuperExec")
        states = {one["run"]: one["state"] for one in four.made.link().runs()}
        assert states[store.folder.name] == "paused", "nobody carries it out"
        killing.resume(store)
    four.wait_for_end(store)
    assert store.get("state") == "finished", four.logs()
    assert contributors(store) == [3] * 40


def test_every_process_ends_cleanly_when_it_is_asked_to(
    four: RealFederation, paused: tuple[RunStore, float]
) -> None:
    assert not four.processes.ended()
    asked = four.processes.pids()
    for pid in asked.values():
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not four.processes.pids(), 60, lambda: f"the end of {asked}")
    for name in asked:
        assert four.processes.ended()[name] == 0, four.log(name)
        assert "Traceback" not in four.log(name)
    assert not list(four.home.glob("addresses.json"))
