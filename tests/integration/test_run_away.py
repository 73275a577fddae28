"""A model that runs away ends its run in that round, at the coordinator and at every owner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scene import Scene

from audit.conclude import conclude
from protocol import optimizers
from protocol.errors import FedsealError, ModelRanAway
from protocol.optimizers import GlobalModel
from protocol.sections import ServerOptimizerSection
from server.watch import follow

MakeScene = Callable[..., Scene]
RUNAWAY = {
    "server_optimizer": {"name": "fedadam", "learning_rate": 1e4},
    "training": {"local_steps": 2, "learning_rate": 1e4},
}


def moved(name: str, value: float, steps: int) -> GlobalModel:
    """Return a model of which one weight is moved by the same update in each step, at the largest rate."""
    optimizer = ServerOptimizerSection(name=name, learning_rate=1e4, epsilon=1e-10)  # type: ignore[arg-type]
    model = GlobalModel.initial(np.zeros(3))
    for _ in range(steps):
        model = optimizers.apply_update(model, np.array([0.0, value, 0.0]), optimizer)
    return model


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308, 2.0, -2.0])
@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_no_optimizer_gives_a_model_beyond_the_bound(name: str, value: float) -> None:
    with pytest.raises(ModelRanAway):
        moved(name, value, steps=3)
    assert np.isfinite(moved(name, 1e-6, steps=1).weights).all()


def test_the_round_that_makes_it_ends_the_run(
    scene: MakeScene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    three = scene(3, **RUNAWAY)
    with pytest.raises(ModelRanAway):
        three.run(monkeypatch, {})
    store = three.store
    assert store.get("state") == "failed"
    ended = store.finished_rounds()
    assert ended < three.plan.run.rounds
    attempts = store.attempts()
    assert len(attempts) == ended + 1, "nobody is asked for another round"
    assert attempts[-1]["reason"] == ModelRanAway.code
    kinds = [kind for _, _, kind, _ in store.events()]
    assert "ran_away" in kinds
    assert "void" not in kinds, "its sum was opened"
    with pytest.raises(ModelRanAway) as caught:
        follow(store, lambda _kind, _facts: None)
    assert caught.value.exit_code == 12
    key = Ed25519PrivateKey.generate()
    conclusion = conclude(store, three.folder / "server", key, tmp_path / "out", lambda _text: None)
    assert conclusion.report_html.is_file()
    assert conclusion.package is None


def test_an_owner_does_not_train_on_a_model_beyond_the_bound(
    scene: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that looks away is refused by every owner, and nobody is charged for another round."""
    three = scene(3, **RUNAWAY, run={"rounds": 3, "spare_attempts": 1})
    monkeypatch.setattr("server.rounds.runner.apply_update", optimizers._following)
    monkeypatch.setattr("server.strategy._RETRY_PAUSE_S", 0.0)
    with pytest.raises(FedsealError):
        three.run(monkeypatch, {})
    finished = three.store.finished_rounds()
    assert 1 <= finished < 3
    assert {refusal["code"] for refusal in three.store.refusals()} == {ModelRanAway.code}
    for owner in three.simulation.owners.values():
        assert owner.ledger.spent(three.store.get("run")).sealed == finished
