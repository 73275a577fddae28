"""Noise shares in numbers: how large, how rarely clamped, and which plans may have them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.presets import packing_for
from protocol.accounting import epsilon_after, epsilon_of_steps, worst_epsilon_after
from protocol.claims import EXPERIMENTAL, UNITS, adjacency, assumption
from protocol.errors import FedsealError, PlanInvalid, ShareTooSmall
from protocol.plan import Plan
from protocol.shares import (
    CLAMP_SHARE,
    clamp_deviations,
    honest_shares,
    rounding_loss,
    share_deviation,
)
from tasks.resolve import resolve, share_steps


def fields(**changes: dict[str, Any]) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "run": {"name": "shared", "rounds": 3},
        "task": {"name": "image-classification", "input_shape": [4], "classes": 2},
        "model": {"name": "linear"},
        "cohort": {"minimum": 4, "maximum": 6},
        "training": {"local_steps": 1, "learning_rate": 0.5},
        "privacy": {
            "noise": "distributed",
            "target_epsilon": 8.0,
            "sample_rate": 0.5,
            "expected_batch_size": 16.0,
        },
    }
    for section, values in changes.items():
        plan[section] = {k: v for k, v in (plan.get(section, {}) | values).items() if v is not None}
    return plan


CLIENT = {"unit": "client", "max_update_norm": 0.5}


@given(st.integers(1, 500), st.integers(0, 500), st.floats(0.01, 100))
def test_shares_of_the_honest_make_at_least_the_promised_noise(t: int, more: int, deviation: float) -> None:
    """Whoever reads the sum knows its own share, and t others tell theirs."""
    owners = t + 3 + more
    share = share_deviation(deviation, owners, t)
    left = owners - (t + 1)
    assert left == honest_shares(owners, t) >= 2
    assert share * math.sqrt(left) == pytest.approx(deviation)
    assert share < deviation


def test_a_list_that_is_too_small_for_its_colluders_has_no_shares() -> None:
    with pytest.raises(ValueError, match="three owners more"):
        share_deviation(1.0, 4, 2)


@given(st.integers(1, 2**60), st.floats(1e-12, 0.1), st.floats(0.01, 60))
def test_clamping_costs_its_part_of_delta_at_most(values: int, delta: float, epsilon: float) -> None:
    k = clamp_deviations(values, delta, epsilon)
    # log of 2 Q(k) <= log exp(-k^2/2), times the number of values, times (1 + e^epsilon)
    log_cost = math.log(values) - k * k / 2 + np.logaddexp(0.0, epsilon)
    assert log_cost == pytest.approx(math.log(CLAMP_SHARE * delta), abs=1e-6)
    assert math.log(math.erfc(min(k, 26.0) / math.sqrt(2))) <= -(min(k, 26.0) ** 2) / 2


def test_rounding_needs_a_share_of_a_step_and_costs_nothing_at_eight() -> None:
    assert 2**31 * 110_000 * rounding_loss(8.0, 1024, 1) < 1e-250
    assert rounding_loss(8.0, 1, 10**6) == 0.0
    assert rounding_loss(1.0, 3, 10) == pytest.approx(40.2 * math.exp(-(math.pi**2)))
    with pytest.raises(ValueError, match="at least one step"):
        rounding_loss(0.5, 3, 1)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cohort": {"minimum": 3}}, "tolerated_colluders + 3"),
        ({"privacy": {"tolerated_colluders": 2}}, "tolerated_colluders + 3"),
        ({"training": {"local_steps": 2}}, "training.local_steps = 1"),
        ({"cohort": {"weights": {"ab" * 32: 0.5}}}, "cohort.weights"),
        ({"encryption": {"preset": "ckks"}}, "ckks"),
        ({"privacy": {"target_epsilon": None}}, "privacy.target_epsilon"),
        ({"privacy": {"max_update_norm": 1.0}}, "max_update_norm"),
        ({"privacy": {"unit": "client"}}, "max_update_norm"),
        ({"privacy": CLIENT | {"noise": "none", "target_epsilon": None}}, "no client"),
        ({"privacy": {"noise_multiplier": 4.0}, "encryption": {"update_range": 0.1}}, "update_range"),
    ],
)
def test_plans_for_which_the_proof_does_not_hold_are_refused(
    changes: dict[str, dict[str, Any]], field: str
) -> None:
    with pytest.raises(PlanInvalid) as refused:
        Plan.from_fields(fields(**changes))
    assert field in refused.value.detail


def test_a_share_that_drowns_in_the_grid_is_refused() -> None:
    plan = Plan.from_fields(
        fields(
            privacy={"expected_batch_size": 1e6, "target_epsilon": 50.0}, encryption={"preset": "compact"}
        )
    )
    with pytest.raises(ShareTooSmall) as refused:
        resolve(plan)
    assert "8 are needed" in refused.value.detail


def test_long_lists_need_masks_that_hold_with_these_colluders() -> None:
    cohort = {"minimum": 40, "maximum": 100}
    with pytest.raises(FedsealError) as refused:
        resolve(Plan.from_fields(fields(cohort=cohort, privacy={"tolerated_colluders": 30})))
    assert "corrupted_share" in refused.value.detail
    resolve(Plan.from_fields(fields(cohort=cohort, privacy={"tolerated_colluders": 10})))


def test_several_local_steps_are_fine_for_whole_updates() -> None:
    plan = resolve(Plan.from_fields(fields(privacy=CLIENT, training={"local_steps": 5})))
    assert plan.noise_deviation(4) == pytest.approx(
        (plan.privacy.noise_multiplier or 0) * 0.5 / math.sqrt(2)
    )
    assert epsilon_after(plan, 4) == epsilon_of_steps(
        1.0, plan.privacy.noise_multiplier or 0.0, 4, plan.mechanism_delta
    )


@pytest.mark.parametrize("privacy", [{}, CLIENT])
def test_the_range_holds_signal_and_noise_of_the_smallest_list(privacy: dict[str, Any]) -> None:
    plan = resolve(Plan.from_fields(fields(privacy=privacy)))
    share = plan.noise_deviation(plan.cohort.minimum)
    assert share > plan.noise_deviation(plan.cohort.maximum)
    room = plan.update_range / plan.update_scale - plan.signal_bound
    assert room / share == pytest.approx(
        clamp_deviations(2**31 * plan.cohort.maximum * plan.paid_rounds, plan.privacy.delta, 8.0)
    )
    packing = packing_for(plan.encryption.preset, plan.cohort.maximum)
    smallest = plan.noise_deviation(plan.cohort.maximum) * plan.update_scale
    assert share_steps(plan, packing) == pytest.approx(smallest / (plan.update_range / packing.half_levels))


def test_a_named_range_takes_room_from_the_signal_and_not_from_the_noise() -> None:
    free = resolve(Plan.from_fields(fields()))
    narrow = resolve(Plan.from_fields(fields(encryption={"update_range": 0.9 * free.update_range})))
    assert narrow.signal_bound < free.signal_bound
    room = free.update_range / free.update_scale - free.signal_bound
    assert narrow.update_range / narrow.update_scale - narrow.signal_bound == pytest.approx(room)


def test_the_noise_is_priced_at_what_clamping_leaves_of_delta() -> None:
    shared, local = (
        resolve(Plan.from_fields(fields(privacy={"noise": n}))) for n in ("distributed", "local")
    )
    assert shared.mechanism_delta == pytest.approx(0.99e-5)
    assert local.mechanism_delta == 1e-5
    assert (shared.privacy.noise_multiplier or 0) >= (local.privacy.noise_multiplier or 0)


def test_the_worst_epsilon_counts_the_smallest_own_share_alone() -> None:
    plan = resolve(Plan.from_fields(fields()))
    own = (plan.privacy.noise_multiplier or 0.0) / math.sqrt(6 - 2)
    assert worst_epsilon_after(plan, 4) == epsilon_of_steps(0.5, own, 4, plan.mechanism_delta)
    assert (worst_epsilon_after(plan, 4) or 0.0) > (epsilon_after(plan, 4) or 0.0)
    local = resolve(Plan.from_fields(fields(privacy={"noise": "local"})))
    assert worst_epsilon_after(local, 4) == epsilon_after(local, 4)


def test_one_unit_is_never_called_the_other_and_shared_noise_is_marked() -> None:
    example, client = (Plan.from_fields(fields(privacy=one)) for one in ({}, CLIENT))
    assert (adjacency(example), adjacency(client)) == ("add/remove", "zero-out")
    assert "record" in UNITS["example"]
    assert "record" not in UNITS["client"]
    local = Plan.from_fields(fields(privacy={"noise": "local"}))
    assert EXPERIMENTAL in assumption(example)
    assert "at most 1 tell" in assumption(example)
    assert EXPERIMENTAL not in assumption(local)
