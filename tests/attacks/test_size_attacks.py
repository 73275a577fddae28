"""A coordinator whose plan asks an owner's machine for more than it has."""

from __future__ import annotations

import copy
import resource
import time
from typing import Any

import pytest
from hostile import HostileFederation

from protocol.messages import JoinRequest
from protocol.plan import Plan

HUGE: dict[str, dict[str, dict[str, Any]]] = {
    "wide layers": {"model": {"name": "mlp", "hidden": [65_536] * 8}},
    "two wide layers": {"model": {"name": "mlp", "hidden": [65_536, 65_536]}},
    "a large example": {"task": {"input_shape": [100_000] * 4}},
    "many classes": {"task": {"classes": 100_000, "input_shape": [100_000]}},
    "a large picture": {"model": {"name": "cnn"}, "task": {"input_shape": [100_000, 100_000]}},
    "a large transform": {"model": {"name": "scattering"}, "task": {"input_shape": [10_000, 10_000]}},
    "many rounds": {
        "run": {"rounds": 100_000},
        "training": {"local_steps": 100_000},
        "privacy": {"noise_multiplier": 1e6},
    },
    "many spares": {"run": {"paid_spares": 10_000, "spare_attempts": 10_000}},
    "tiny noise": {"privacy": {"noise_multiplier": 0.01}},
    "tiny probabilities": {"privacy": {"delta": 1e-300, "sample_rate": 1e-300}},
}
LONGEST_CPU_S = 5.0
GROWTH_KB = 200 * 1024


@pytest.mark.parametrize("name", HUGE)
def test_a_plan_that_asks_for_too_much_is_refused_without_the_effort(
    federation: HostileFederation, plan: Plan, name: str
) -> None:
    fields = copy.deepcopy(plan.fields())
    for section, changes in HUGE[name].items():
        fields[section] |= changes
    run = federation.run(plan)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    answered = federation.ask(0, "query.join", JoinRequest(run=run.run, plan=fields).to_bytes())
    assert answered.error in ("FS-PLAN-01", "FS-PLAN-03", "FS-PLAN-05", "FS-ROUND-02"), name
    assert time.process_time() - started < LONGEST_CPU_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KB


def test_an_owner_answers_an_honest_plan_after_all_that(federation: HostileFederation, plan: Plan) -> None:
    federation.run(plan).join()
