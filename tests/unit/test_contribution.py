"""What an owner contributes: clipped as promised, noised as promised, and silent about its data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import client.contribution
from client.contribution import clipped_to_norm, contribute, with_share
from client.training import clipped_sum
from crypto.packing import mean_update, quantize
from crypto.presets import packing_for
from protocol.plan import Plan
from tasks.images import Examples
from tasks.registry import task_for
from tasks.resolve import resolve


def make_plan(steps: int = 1, **privacy: Any) -> Plan:
    fixed = {"target_epsilon": 8.0, "sample_rate": 1.0, "expected_batch_size": 16.0}
    return resolve(
        Plan.from_fields(
            {
                "run": {"name": "shared", "rounds": 3},
                "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
                "model": {"name": "linear"},
                "cohort": {"minimum": 4, "maximum": 6},
                "training": {"local_steps": steps, "learning_rate": 0.5},
                "privacy": fixed | privacy,
            }
        )
    )


SHARED = make_plan(noise="distributed")
CLIENT = make_plan(steps=3, unit="client", max_update_norm=0.25)
SHARED_CLIENT = make_plan(steps=3, unit="client", max_update_norm=0.25, noise="distributed")


def examples(n: int, scale: float = 1.0) -> Examples:
    generator = np.random.default_rng(n)
    x = scale * generator.normal(size=(n, 64)).astype(np.float32)
    return Examples(x, generator.integers(0, 10, n))


def contribution(plan: Plan, data: Examples) -> Any:
    task = task_for(plan)
    return contribute(task, plan, task.initial_weights(plan), data)


def test_a_shared_contribution_is_the_clipped_sum_down_the_gradient() -> None:
    task, data = task_for(SHARED), examples(20)
    start = task.initial_weights(SHARED)
    kept = contribute(task, SHARED, start, data)
    np.testing.assert_allclose(kept, -clipped_sum(task, SHARED, start, data), rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(kept) <= 20 * SHARED.sensitivity


def test_one_example_moves_a_shared_contribution_by_the_clipping_norm_at_most() -> None:
    data = examples(20, scale=50.0)
    fewer = Examples(data.x[1:], data.y[1:])
    moved = np.linalg.norm(contribution(SHARED, data) - contribution(SHARED, fewer))
    assert 0.5 < moved <= SHARED.sensitivity * (1 + 1e-5)


def test_a_signal_is_held_within_its_public_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.contribution, "clipped_sum", lambda *_: np.full(650, -1e9))
    np.testing.assert_array_equal(contribution(SHARED, examples(1)), np.full(650, SHARED.signal_bound))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("plan", [SHARED, SHARED_CLIENT])
def test_what_is_not_finite_counts_as_nothing(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, wrong: float
) -> None:
    broken = np.zeros(650)
    broken[3] = wrong
    for name in ("clipped_sum", "plain_update"):
        monkeypatch.setattr(client.contribution, name, lambda *_: broken)
    assert not contribution(plan, examples(3)).any()
    assert with_share(plan, contribution(plan, examples(3)), 4).std() > 0


@pytest.mark.parametrize("plan", [SHARED, SHARED_CLIENT])
def test_an_owner_without_data_contributes_a_share_and_nothing_else(plan: Plan) -> None:
    kept = contribution(plan, examples(0))
    assert not kept.any()
    sealed = with_share(plan, kept, 5)
    expected = plan.noise_deviation(5) * plan.update_scale
    assert sealed.std() == pytest.approx(expected, rel=0.15)
    assert not np.array_equal(sealed, with_share(plan, kept, 5)), "a share was drawn twice"
    assert not kept.any(), "what is kept must not be touched"


def test_a_whole_update_is_clipped_and_locally_noised() -> None:
    updates = [contribution(CLIENT, examples(0)) for _ in range(20)]
    assert np.std(updates) == pytest.approx(CLIENT.noise_deviation(1), rel=0.05)
    assert CLIENT.noise_deviation(1) == (CLIENT.privacy.noise_multiplier or 0.0) * 0.25
    kept = contribution(SHARED_CLIENT, examples(64, scale=30.0))
    assert np.linalg.norm(kept) == pytest.approx(0.25)
    unchanged = contribution(CLIENT, examples(3))
    np.testing.assert_array_equal(with_share(CLIENT, unchanged, 4), unchanged)


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e200])
def test_clipping_bounds_the_norm_of_updates_of_any_size(size: float) -> None:
    update = size * np.random.default_rng(0).normal(size=100)
    clipped = clipped_to_norm(update, 0.5)
    assert np.linalg.norm(clipped) <= 0.5 * (1 + 1e-12)
    if size < 0.01:
        np.testing.assert_array_equal(clipped, update)
    assert not clipped_to_norm(np.array([1.0, math.nan]), 0.5).any()
    assert not clipped_to_norm(np.zeros(0), 0.5).size


@pytest.mark.parametrize("owners", [4, 6])
def test_the_sum_of_rounded_shares_has_the_promised_noise_without_its_reader_and_colluder(
    owners: int,
) -> None:
    """Real noise, real rounding: the integers of all but two owners, as a coalition of two sees them."""
    plan, packing = SHARED, packing_for("exact16", 6)
    coins = np.random.default_rng(1)
    empty = np.zeros(50_000)
    integers = [
        quantize(with_share(plan, empty, owners), plan.update_range, packing, coins.random(empty.size))
        for _ in range(owners - plan.privacy.tolerated_colluders - 1)
    ]
    left = mean_update(np.sum(integers, axis=0), len(integers), plan.update_range, packing, 1.0)
    promised = (plan.privacy.noise_multiplier or 0.0) * plan.sensitivity * plan.update_scale
    # the deviation of 50,000 values is known to 0.3 %; rounding adds less than 0.2 % of variance
    assert left.std() == pytest.approx(promised, rel=0.015)
    assert abs(left.mean()) < 5 * promised / math.sqrt(empty.size)


def test_no_share_leaves_the_range() -> None:
    kept = np.full(200_000, SHARED.signal_bound)
    assert np.abs(with_share(SHARED, kept, 4)).max() < SHARED.update_range
