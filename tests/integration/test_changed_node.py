"""Owners change their minds while their nodes run: real processes, one coordinator, no restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from real_federation import RealFederation, small_plan

from client.owner import POLICY
from protocol.plan import Plan
from scenarios.federation import DATA

OWNERS = ("owner-1", "owner-2", "owner-3")
IMPATIENT = {"join_s": 3.0, "pause_s": 1.0}


def plan_of(name: str) -> Plan:
    return small_plan(run={"name": name, "rounds": 1}, deadlines=IMPATIENT, privacy={"target_epsilon": 0.5})


@pytest.fixture
def homes(real: RealFederation) -> Iterator[list[Path]]:
    """The homes of all owners, whose policies and data are put back afterwards."""
    folders = [real.owner(name).folder for name in OWNERS]
    kept = {folder / name: (folder / name).read_bytes() for folder in folders for name in (POLICY, DATA)}
    yield folders
    for file, content in kept.items():
        file.write_bytes(content)


def spent(real: RealFederation) -> list[int]:
    counts = []
    for name in OWNERS:
        with real.ledger(name) as ledger:
            counts.append(len(ledger.records()))
    return counts


def test_running_nodes_honour_a_changed_policy_and_withdrawn_data(
    real: RealFederation, homes: list[Path]
) -> None:
    assert real.run(plan_of("before")).get("state") == "finished"
    before = spent(real)
    *forbidding, withdrawing = homes
    for home in forbidding:
        text = (home / POLICY).read_text(encoding="utf-8")
        (home / POLICY).write_text(text.replace('"linear",', ""), encoding="utf-8")
    (withdrawing / DATA).write_bytes(b"")
    assert real.run(plan_of("after")).get("state") == "paused"
    *logs, last = (real.log(name) for name in OWNERS)
    for log in logs:
        assert "policy.toml changed" in log
        assert "plans.models does not hold 'linear'" in log
    assert "the data file changed" in last
    assert "query.join refused: FS-DATA-01" in last
    assert all("rows: " in log for log in (*logs, last))
    assert spent(real) == before
    assert "rows: " not in real.log("coordinator")
