"""A federation of five owners that every attack may use; each attack starts a run of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hostile import HostileFederation, HostileRun

from client.owner import open_owner
from protocol.plan import Plan
from scenarios.federation import PolicySettings, make_federation
from tasks.partition import digits
from tasks.resolve import resolve

SETTINGS = PolicySettings(
    epsilon_total=1e6, epsilon_per_run=50.0, delta_total=0.009, allow_seal_frames=True
)


def attack_plan(**sections: dict[str, Any]) -> Plan:
    """Return a small resolved plan: 650 parameters, one frame, four rounds of one step."""
    return _resolved(json.dumps(sections, sort_keys=True))


@cache
def _resolved(sections: str) -> Plan:
    fields: dict[str, dict[str, Any]] = {
        "run": {"name": "attacked", "rounds": 4, "spare_attempts": 4},
        "task": {
            "name": "image-classification",
            "input_shape": [8, 8],
            "value_range": [0.0, 16.0],
            "classes": 10,
        },
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": 5},
        "training": {"local_steps": 1, "learning_rate": 0.5},
        "privacy": {
            "target_epsilon": 8.0,
            "delta": 1e-6,
            "sample_rate": 0.5,
            "expected_batch_size": 100.0,
        },
        "encryption": {"preset": "exact16", "quorum": 2},
    }
    for name, changes in json.loads(sections).items():
        changed = fields.get(name, {}) | changes
        fields[name] = {key: value for key, value in changed.items() if value is not None}
    return resolve(Plan.from_fields(fields))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Keep small models from waiting for threads that other processes hold up."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_plan() -> Any:
    return attack_plan


@pytest.fixture(scope="session")
def plan() -> Plan:
    return attack_plan()


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileFederation]:
    splits, _ = digits(seed=0, owners=5)
    few = [(x[:60], y[:60]) for x, y in splits]
    made = make_federation(tmp_path_factory.mktemp("attacked") / "federation", few, SETTINGS)
    hostile = HostileFederation([open_owner(home.folder, home.passphrase) for home in made.owners])
    yield hostile
    for owner in hostile.owners:
        owner.close()


@pytest.fixture
def run(federation: HostileFederation, plan: Plan) -> HostileRun:
    """A run of four owners that nobody joined yet."""
    return federation.run(plan)


@pytest.fixture
def session(run: HostileRun) -> HostileRun:
    """A run of four owners whose session stands."""
    return run.established()
