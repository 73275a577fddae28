"""A federation in this process whose parties can die, for the tests of several files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crashing import CrashingRun, MakeRun, Node, allow_exact_plan, exact_fields
from steps import OWNERS

import server.strategy
from client.owner import open_owner
from crypto.trust import load_trust
from protocol.plan import Plan
from scenarios.federation import Federation, make_federation
from server.home import IDENTITY
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
