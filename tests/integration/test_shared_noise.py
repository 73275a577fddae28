"""Distributed noise and unit `client`, from plan to report, with the real protocol in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_federation import small_plan

from audit.collecting.collect import collect
from audit.pages.render import html
from audit.report import build_report
from crypto.packing import mean_update
from crypto.presets import packing_for
from protocol.accounting import epsilon_after, worst_epsilon_after
from protocol.claims import EXPERIMENTAL
from protocol.errors import QuorumNotMet
from protocol.plan import Plan
from scenarios.simulate import Simulation, federate
from tasks.partition import digits
from tasks.resolve import resolve

EMPTY = (np.zeros((0, 8, 8), np.float32), np.zeros(0, np.int64))
SHARED = {"noise": "distributed", "target_epsilon": 8.0}
CLIENT = {"unit": "client", "max_update_norm": 0.5, "target_epsilon": 40.0}


def plan_with(privacy: dict[str, Any], **sections: dict[str, Any]) -> Plan:
    parts = {"cohort": {"minimum": 4, "maximum": 5}, "training": {"local_steps": 1}} | sections
    return resolve(small_plan(privacy=privacy, **parts))


@contextmanager
def running(folder: Path, plan: Plan, shards: Any) -> Iterator[Simulation]:
    simulation = federate(plan, shards, folder)
    try:
        yield simulation
    finally:
        simulation.close()


def test_a_shared_run_opens_sums_with_the_promised_noise(tmp_path: Path) -> None:
    plan = plan_with(SHARED, model={"name": "mlp", "hidden": [128]})
    with running(tmp_path, plan, [EMPTY] * 5) as simulation:
        simulation.run()
        packing = packing_for("exact16", 5)
        promised = (plan.privacy.noise_multiplier or 0.0) * plan.sensitivity * plan.update_scale
        for number in (1, 2):
            sums = np.frombuffer(simulation.store.sums(number), "<u4").astype(np.uint64)
            total = mean_update(sums, 5, plan.update_range, packing, 1.0)
            # five shares, of which three make the promise; 9,610 values give it to 0.7 %
            assert total.std() == pytest.approx(promised * np.sqrt(5 / 3), rel=0.03)
        spent = [owner.ledger.spent(run) for owner in simulation.owners.values() for run in _runs(owner)]
    assert len(spent) == 5
    assert {one.epsilon for one in spent} == {epsilon_after(plan, 2)}
    assert {one.epsilon_worst for one in spent} == {worst_epsilon_after(plan, 2)}
    assert {one.delta for one in spent} == {plan.privacy.delta}


@pytest.mark.parametrize("privacy", [SHARED, CLIENT, CLIENT | SHARED])
def test_a_run_of_any_unit_and_noise_is_reported_as_what_it_is(
    tmp_path: Path, privacy: dict[str, Any]
) -> None:
    steps = 3 if "unit" in privacy else 1
    plan = plan_with(privacy, training={"local_steps": steps, "learning_rate": 0.5}, run={"rounds": 1})
    shards, _ = digits(seed=0, owners=4)
    few = [(x[:80], y[:80]) for x, y in shards]
    with running(tmp_path, plan, few) as simulation:
        simulation.run()
        evidence = collect(simulation.store, tmp_path / "server", None)
    report = build_report(evidence, datetime.now(UTC))
    shared = plan.privacy.noise == "distributed"
    assert report["promise"]["unit"] == plan.privacy.unit
    assert report["promise"]["adjacency"] == ("zero-out" if steps == 3 else "add/remove")
    assert (EXPERIMENTAL in report["promise"]["assumption"]) == shared
    assert {claim["unit"] for claim in report["claims"]} == {plan.privacy.unit}
    for claim in report["claims"]:
        assert claim["disagreements"] == []
        assert claim["promise_matches_plan"]
        assert claim["stated"]["epsilon"] == pytest.approx(epsilon_after(plan, 1))
        assert claim["stated"]["epsilon_worst"] == pytest.approx(worst_epsilon_after(plan, 1))
        assert (claim["stated"]["epsilon_worst"] > claim["stated"]["epsilon"]) == shared
    checks = {check["id"]: check["status"] for check in report["checks"]}
    assert checks["noise-shares"] == ("missing" if shared else "pass")
    assert checks["budget-kept"] == checks["statements-agree"] == "pass"
    page = html(report)
    assert ("EXPERIMENTAL" in page) == shared
    other = "one record of one owner" if plan.privacy.unit == "client" else "everything that one owner"
    assert other not in page


def test_a_shared_run_stops_when_its_lists_get_too_short(tmp_path: Path) -> None:
    plan = plan_with(SHARED, deadlines={"join_s": 0.1})
    with running(tmp_path, plan, [EMPTY] * 4) as simulation:
        simulation.grid.remove(next(iter(simulation.owners)))
        with pytest.raises(QuorumNotMet):
            simulation.run()


def test_owners_that_did_not_allow_it_do_not_join(tmp_path: Path) -> None:
    plan = plan_with(SHARED)
    with running(tmp_path, plan, [EMPTY] * 4) as simulation:
        for owner in simulation.owners.values():
            plans = owner.policy.plans.model_copy(update={"allow_distributed_noise": False})
            owner.policy = owner.policy.model_copy(update={"plans": plans})
        with pytest.raises(QuorumNotMet):
            simulation.run()
        assert all(not _runs(owner) for owner in simulation.owners.values())


def _runs(owner: Any) -> list[str]:
    bodies = [record.body for record in owner.ledger.records()]
    return [body["run"] for body in bodies if body["kind"] == "open_run"]
