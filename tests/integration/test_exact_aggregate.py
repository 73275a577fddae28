"""The opened sum is the plain integer sum of what the owners quantized, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from real_federation import small_plan

import crypto.frames
import crypto.sealing
from crypto.presets import packing_for
from protocol.errors import QuorumNotMet
from scenarios.simulate import Scenario, Simulation, build
from tasks.registry import task_for

Integers = NDArray[np.uint64]
ROUNDS = 3


class Recorder:
    """Passes `quantize` through and joins what it gave for the frames of one update."""

    def __init__(self, parameters: int) -> None:
        self._original = crypto.sealing.quantize
        self._parameters = parameters
        self._parts: list[tuple[NDArray[np.float64], Integers]] = []
        self.inputs: list[NDArray[np.float64]] = []
        self.updates: list[Integers] = []

    def __call__(self, update: NDArray[np.float64], *arguments: Any) -> Integers:
        result = self._original(update, *arguments)
        self._parts.append((update.copy(), result.copy()))
        if sum(part.size for part, _ in self._parts) == self._parameters:
            self.inputs.append(np.concatenate([part for part, _ in self._parts]))
            self.updates.append(np.concatenate([values for _, values in self._parts]))
            self._parts.clear()
        return result


@contextmanager
def simulated(folder: Path, owners: int, **sections: dict[str, Any]) -> Iterator[Simulation]:
    cohort = {"minimum": 3, "maximum": owners}
    plan = small_plan(run={"rounds": ROUNDS}, cohort=cohort, **sections)
    simulation = build(Scenario(plan="", owners=owners), plan, folder)
    assert isinstance(simulation, Simulation)
    try:
        yield simulation
    finally:
        simulation.close()


@pytest.mark.parametrize("preset", ["exact16", "compact", "fine", "wide", "ckks"])
def test_opened_sums_equal_the_plain_sum_with_three_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    check(tmp_path, monkeypatch, owners=3, encryption={"preset": preset})


def test_sums_are_exact_where_frames_are_in_seals_own_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several frames, and with a library of another version than the one that was measured."""
    monkeypatch.setattr(crypto.frames, "_SEAL_VERSION", (9, 9))
    model = {"name": "mlp", "hidden": [256]}
    check(tmp_path, monkeypatch, owners=3, model=model, encryption={"frames": "seal"})


def test_packed_frames_are_refused_by_a_library_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crypto.frames, "_SEAL_VERSION", (9, 9))
    with simulated(tmp_path, 3) as simulation:
        with pytest.raises(QuorumNotMet):
            simulation.run()
        assert {refusal["code"] for refusal in simulation.store.refusals()} == {"FS-FRAME-02"}


def test_opened_sums_equal_the_plain_sum_with_ten_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tmp_path, monkeypatch, owners=10)


def test_sum_is_exact_over_several_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, monkeypatch, owners=3, model={"name": "mlp", "hidden": [256]})


def test_sum_is_exact_where_every_value_is_clamped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is far outside this range, so that fields are filled to their ends."""
    updates = check(tmp_path, monkeypatch, owners=3, encryption={"update_range": 1e-7})
    assert {int(value) for value in np.unique(updates)} >= {0, int(np.max(updates))}
    assert np.mean((updates == 0) | (updates == np.max(updates))) > 0.99


def check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owners: int, **sections: dict[str, Any]
) -> Integers:
    """Run a plan, compare every round with its plain counterpart, and return all quantized updates."""
    with simulated(folder, owners, **sections) as simulation:
        store = simulation.store
        recorder = Recorder(task_for(store.plan()).initial_weights(store.plan()).size)
        monkeypatch.setattr(crypto.sealing, "quantize", recorder)
        simulation.run()
        plan, packing = store.plan(), packing_for(store.plan().encryption.preset, owners)
        assert not any(facts["void"] for facts in store.attempts())
        assert len(recorder.updates) == ROUNDS * owners
        weights = store.read_checkpoint(0).weights
        grid = plan.update_range / packing.half_levels
        for number in range(1, ROUNDS + 1):
            plain = recorder.updates[(number - 1) * owners : number * owners]
            total = [sum(int(update[index]) for update in plain) for index in range(weights.size)]
            opened = np.frombuffer(store.sums(number), dtype="<u4")
            assert opened.tolist() == total
            mean = (np.array(total) - owners * packing.half_levels) / owners * grid
            new = store.read_checkpoint(number).weights
            np.testing.assert_allclose(new, weights + mean, rtol=1e-12, atol=1e-15)
            _assert_close_to_the_updates(recorder, number, owners, mean, plan.update_range, grid)
            weights = new
        for owner in simulation.owners.values():
            run = str(store.get("run"))
            assert owner.store.model(run).sha256() == store.read_checkpoint(ROUNDS).sha256()
    return np.stack(recorder.updates)


def _assert_close_to_the_updates(
    recorder: Recorder,
    number: int,
    owners: int,
    mean: NDArray[np.float64],
    update_range: float,
    grid: float,
) -> None:
    """Tie the quantized mean to the float updates: the only loss is less than one grid step."""
    floats = recorder.inputs[(number - 1) * owners : number * owners]
    clamped = np.mean([np.clip(update, -update_range, update_range) for update in floats], axis=0)
    assert np.max(np.abs(mean - clamped)) < grid * (1 + 1e-9)
