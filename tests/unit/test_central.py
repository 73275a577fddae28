"""Central training is the owners' training step with the plan's optimizer and accounting."""

from pathlib import Path

import pytest

from protocol.plan import Plan
from scenarios.central import CentralTraining
from scenarios.simulate import Scenario, build
from server.store import RunStore


def digits_plan(rounds: int) -> Plan:
    return Plan.from_fields(
        {
            "run": {"name": "central", "rounds": rounds, "paid_spares": 0},
            "task": {
                "name": "image-classification",
                "input_shape": [8, 8],
                "value_range": [0.0, 16.0],
                "classes": 10,
            },
            "model": {"name": "scattering"},
            "cohort": {"minimum": 1, "maximum": 1, "allow_small": True},
            "training": {"local_steps": 1, "learning_rate": 0.5},
            "server_optimizer": {"name": "fedavgm", "momentum": 0.9},
            "privacy": {
                "target_epsilon": 8.0,
                "sample_rate": 0.25,
                "expected_batch_size": 360.0,
                "max_grad_norm": 1.0,
            },
            "encryption": {"quorum": 1},
        }
    )


def test_central_training_learns_and_pays_for_every_round(tmp_path: Path) -> None:
    scenario = Scenario(plan="", owners=1, kind="central")
    training = build(scenario, digits_plan(rounds=25), tmp_path)
    assert isinstance(training, CentralTraining)
    training.run()
    training.close()
    store = RunStore(tmp_path / "run")
    rounds = [facts for _, _, kind, facts in store.events() if kind == "round"]
    # twenty evaluations at most, and the last round always
    assert [facts["round"] for facts in rounds] == [*range(2, 25, 2), 25]
    assert store.attempts()[-1]["accuracy"] == rounds[-1]["accuracy"] > 0.85
    (spent,) = rounds[-1]["epsilon"].values()
    assert 7.9 < spent <= 8.0
    assert store.get("state") == "finished"
    store.close()


def test_a_central_scenario_has_one_owner() -> None:
    with pytest.raises(ValueError, match="owners must be 1"):
        Scenario(plan="", owners=3, kind="central")
