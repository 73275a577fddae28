"""Tests of the mechanism pass for every kind of plan, and their statistics are what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from audit.checks.experiments import required_tests
from audit.laboratory.conformance import training_tests
from audit.laboratory.protections import protection_tests
from audit.laboratory.record_tests import Sample, participations
from audit.laboratory.selftest import failed, small_plan
from audit.statistics.correlations import across, along, between
from audit.statistics.judging import THRESHOLD, exactly, judged, uniformity
from crypto.presets import packing_for
from protocol.plan import Plan
from tasks.resolve import resolve

SAMPLE = Sample(width=1024, canaries=200, rounds=8)


def plan_with(privacy: dict[str, Any], **sections: dict[str, Any]) -> Plan:
    fields = small_plan().fields()
    fields["privacy"] |= {"noise_multiplier": None} | privacy
    for name, values in sections.items():
        fields[name] |= values
    return resolve(Plan.from_fields(fields))


PLANS: dict[str, Plan] = {
    "local": small_plan(),
    "every record in every step": plan_with({"sample_rate": 1.0}),
    "distributed": plan_with(
        {"noise": "distributed"}, cohort={"minimum": 4, "maximum": 6}, training={"local_steps": 1}
    ),
    "client": plan_with({"unit": "client", "max_update_norm": 0.5}),
    "none": plan_with({"noise": "none", "target_epsilon": None}),
    "ckks": plan_with({}, encryption={"preset": "ckks"}),
    "one owner": plan_with(
        {}, cohort={"minimum": 1, "maximum": 1, "allow_small": True}, encryption={"quorum": 1}
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_shipped_code_conforms_to_every_kind_of_plan(name: str) -> None:
    plan = PLANS[name]
    tests = training_tests(plan, SAMPLE) + protection_tests(plan)
    assert failed(tests) == []
    names = [test.test for test in tests]
    assert len(set(names)) == len(names)
    promise = {
        "noise": plan.privacy.noise,
        "unit": plan.privacy.unit,
        "sample_rate": plan.privacy.sample_rate,
    }
    scheme = packing_for(plan.encryption.preset, plan.cohort.maximum).preset.scheme
    needed = set(required_tests({"promise": promise, "encryption": {"scheme": scheme}}))
    assert needed == {*names, "export-independent"}
    assert all(test.threshold == THRESHOLD for test in tests)


def test_participation_is_read_exactly_from_training_without_noise() -> None:
    plan = PLANS["every record in every step"]
    assert np.all(participations(plan, SAMPLE) == plan.training.local_steps)


def test_correlations_are_found_where_they_are() -> None:
    rng = np.random.default_rng(0)
    clean, other = rng.normal(size=(6, 4000)), rng.normal(size=(6, 4000))
    assert all(figures[3] > 1e-4 for figures in (across(clean), along(clean), between([clean, other])))
    repeated, shared, periodic = clean.copy(), other.copy(), clean.copy()
    repeated[4] += 0.5 * repeated[1]
    shared[5] += 0.5 * clean[0]
    periodic[:, 2000:] = 0.5 * periodic[:, :2000] + periodic[:, 2000:]
    for largest, _, _, p in (across(repeated), between([clean, shared]), along(periodic)):
        assert largest > 0.1
        assert p < 1e-9


def test_no_noise_at_all_has_no_correlation_and_no_error() -> None:
    assert across(np.zeros((3, 100)))[0] == 0.0


def test_uniformity_sees_another_distribution() -> None:
    values = np.sort(np.random.default_rng(0).random(5000))
    assert uniformity("u", "u", values).p_value > 1e-3
    assert uniformity("u", "u", values**1.2).p_value < THRESHOLD


def test_what_cannot_be_computed_fails() -> None:
    assert judged("x", "x", float("nan"), 1.0, 1, 0.5).p_value == 0.0
    assert judged("x", "x", 1.0, 1.0, 1, 2.0).p_value == 1.0
    assert failed([exactly("x", "x", 1.0, 0.0, 1, holds=False)]) == ["x"]
