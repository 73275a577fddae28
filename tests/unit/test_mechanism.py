"""The audit of an installed mechanism: bounds below the claim, controls above it, and safe planting."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import audit.laboratory.mechanism
from audit.evidence.experiments import MechanismEvidence
from audit.laboratory.canaries import canary_task, dirac_examples, watch_examples
from audit.laboratory.faults import scaled_noise
from audit.laboratory.lower_bounds import Size, bounds_of_size, claim_for, exceeding_bounds
from audit.laboratory.mechanism import audit_mechanism, code_hash
from audit.laboratory.selftest import small_plan
from audit.statistics.channels import Channel
from client.noise import SecureStream
from client.training import clipped_sum, local_update
from tests.unit.test_conformance import PLANS

SMALL = Size(canaries=300, rounds=4, steps=8)


@pytest.fixture(scope="module")
def evidence() -> MechanismEvidence:
    return audit_mechanism(small_plan(), "quick", lambda _: None)


def test_a_quick_audit_finds_nothing_wrong(evidence: MechanismEvidence) -> None:
    assert all(test.p_value >= test.threshold for test in evidence.conformance)
    assert all(bound.claimed is not None and bound.epsilon <= bound.claimed for bound in evidence.bounds)
    assert evidence.plan_hash == small_plan().sha256()
    assert MechanismEvidence.from_fields(evidence.fields()) == evidence


def test_with_the_noise_off_each_observer_sees_more_than_claimed(evidence: MechanismEvidence) -> None:
    for observer in ("update", "opened sum", "exported model"):
        bounds = [bound for bound in evidence.bounds if bound.observer == observer]
        assert len(bounds) == 4
        assert any((bound.control or 0.0) > (bound.claimed or 0.0) and bound.detectable for bound in bounds)
        for bound in bounds:
            assert bound.detectable is None or bound.detectable > (bound.claimed or 0.0)


def test_the_wire_shows_nothing_and_has_no_control(evidence: MechanismEvidence) -> None:
    (wire,) = (bound for bound in evidence.bounds if bound.observer == "wire")
    assert (wire.epsilon, wire.guesses, wire.control, wire.detectable) == (0.0, 0, None, None)


@pytest.mark.parametrize(("name", "size"), [("distributed", Size(300, 8, 8)), ("client", Size(60, 1, 1))])
def test_other_units_and_noise_are_audited_in_an_equivalent_way(name: str, size: Size) -> None:
    bounds = bounds_of_size(PLANS[name], size, lambda _: None)
    assert {bound.observer for bound in bounds} >= {"update", "opened sum", "wire"}
    assert all(bound.epsilon <= (bound.claimed or 0.0) for bound in bounds)
    for observer in ("update", "opened sum"):
        controls = [b for b in bounds if b.observer == observer]
        assert any((bound.control or 0.0) > (bound.claimed or 0.0) for bound in controls)


def test_without_noise_there_is_no_claim_and_no_control() -> None:
    bounds = bounds_of_size(PLANS["none"], SMALL, lambda _: None)
    assert {bound.claimed for bound in bounds} == {bound.control for bound in bounds} == {None}
    assert max(bound.epsilon for bound in bounds) > 2.0


def test_a_bound_alone_notices_missing_noise() -> None:
    plan = small_plan()
    assert exceeding_bounds(plan, SMALL) == []
    with scaled_noise(0.0):
        assert "update, Clopper-Pearson, PLD" in exceeding_bounds(plan, SMALL)


def test_canaries_have_exactly_the_gradients_that_they_stand_for() -> None:
    plan = PLANS["every record in every step"]
    task, norms = canary_task(plan, 6), np.array([10.0, 0.5])
    for norm in norms * plan.sensitivity:
        total = clipped_sum(task, plan, np.ones(6), dirac_examples(6, np.array([1, 4]), norm))
        expected = np.zeros(6)
        expected[[1, 4]] = min(norm, plan.sensitivity)
        assert total == pytest.approx(expected, rel=1e-5)


def test_an_update_looks_as_the_channel_says() -> None:
    plan = small_plan()
    with scaled_noise(0.0):
        seen = watch_examples(plan, 400, 8)
    assert np.all(seen.updates[:, ~seen.included] == 0.0)
    taken = seen.updates[:, seen.included]
    assert taken == pytest.approx(np.rint(taken), abs=1e-3)
    assert taken.max() == pytest.approx(plan.training.local_steps, abs=1e-3)
    assert seen.sums == pytest.approx(seen.updates, abs=0.01)
    assert seen.final == pytest.approx(seen.sums.sum(axis=0), abs=0.01)


def test_the_score_of_several_steps_is_the_known_one_for_one_step() -> None:
    values = np.linspace(-3.0, 4.0, 9)[None, :]
    scores = Channel("update", 0.2, 1, 1, 1.5).scores(values)
    assert scores == pytest.approx(np.log(0.8 + 0.2 * np.exp((2 * values[0] - 1) / (2 * 1.5**2))))


def test_one_threshold_lies_between_noise_free_canaries_that_take_part_rarely_or_never() -> None:
    """Else a control at a small rate would see nothing: all other thresholds lie in the noise."""
    rare = Channel("update", 0.01, 1, 20, 2.0)
    rounds = np.zeros((20, 2))
    rounds[3, 1] = 1.0
    never, once = rare.scores(rounds)
    assert np.sum((never < rare.thresholds()) & (rare.thresholds() < once)) >= 1


def test_a_claim_is_about_the_audited_rounds() -> None:
    few, all_rounds = (claim_for(small_plan(), Channel("update", 0.2, 2, rounds, 1.0)) for rounds in (1, 8))
    assert few is not None
    assert all_rounds is not None
    assert few.epsilon < all_rounds.epsilon <= 2.0


def test_an_owner_in_another_thread_keeps_its_noise() -> None:
    plan, drawn = small_plan(), []
    task, nothing = canary_task(plan, 50), dirac_examples(50, np.zeros(0, dtype=np.int64), 1.0)

    def train() -> None:
        drawn.append(local_update(task, plan, np.zeros(50), nothing))

    with scaled_noise(0.0):
        train()
        other = threading.Thread(target=train)
        other.start()
        other.join()
    train()
    without, elsewhere, after = drawn
    assert np.all(without == 0.0)
    assert np.all(elsewhere != 0.0)
    assert np.all(after != 0.0)


def test_a_fault_goes_away_even_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), scaled_noise(0.0):
        raise ZeroDivisionError
    assert np.all(SecureStream().gaussian(20) != 0.0)


def test_the_code_hash_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_hash()
    assert before == code_hash()
    source = tmp_path / "noise.py"
    source.write_text("changed = True\n")
    other = ModuleType("client.noise")
    other.__file__ = str(source)
    changed = tuple(
        other if module.__name__ == "client.noise" else module
        for module in audit.laboratory.mechanism.AUDITED
    )
    monkeypatch.setattr(audit.laboratory.mechanism, "AUDITED", changed)
    assert code_hash() != before
