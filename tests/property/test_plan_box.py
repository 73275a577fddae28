"""A plan inside the schema's bounds is resolved or refused with a code; one outside is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import FedsealError, PlanInvalid
from protocol.evaluation import planned_epsilon, planned_worst_epsilon, promised_loss
from protocol.plan import Plan
from tasks.resolve import resolve

BOXED = {
    "training": ("learning_rate",),
    "server_optimizer": ("learning_rate", "momentum", "second_moment", "epsilon"),
    "privacy": (
        *("target_epsilon", "delta", "max_grad_norm", "max_update_norm", "sample_rate"),
        *("expected_batch_size", "noise_multiplier"),
    ),
    "evaluation": ("target_epsilon", "delta", "noise_multiplier", "count_range", "holdout_share"),
}
"""The fractional constants that accounting, training and the model's update are computed from."""


def bounds(section: str, field: str) -> tuple[float, float]:
    """Return the least and the largest value of a field, as the schema states them."""
    definitions = Plan.model_json_schema()["$defs"]
    name = {"server_optimizer": "ServerOptimizerSection"}.get(section, f"{section.title()}Section")
    schema = definitions[name]["properties"][field]
    schema = next((one for one in schema.get("anyOf", []) if one["type"] == "number"), schema)
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    assert high is not None, f"{section}.{field} has no upper bound"
    assert "exclusiveMinimum" not in schema, f"{section}.{field} may be as small as a float can be"
    return float(schema["minimum"]), float(high)


def inside(section: str, field: str) -> st.SearchStrategy[float]:
    """Draw from a field's range, evenly over its orders of magnitude, its ends among it."""
    low, high = bounds(section, field)
    if low == 0:
        return st.floats(0, high, exclude_max=True)
    ends = st.sampled_from((low, high))
    logs = st.floats(math.log(low), math.log(high))
    return ends | logs.map(lambda power: min(max(math.exp(power), low), high))


@st.composite
def plans(draw: st.DrawFn, rounds: int = 200, steps: int = 10) -> dict[str, Any]:
    unit, noise = (
        draw(st.sampled_from(("example", "client"))),
        draw(st.sampled_from(("local", "distributed"))),
    )
    values = {
        section: {field: draw(inside(section, field)) for field in fields}
        for section, fields in BOXED.items()
    }
    privacy, evaluation = values["privacy"], values.pop("evaluation")
    if unit == "example":
        del privacy["max_update_norm"]
    for section in (privacy, evaluation):
        if draw(st.booleans()):
            del section["noise_multiplier"]
    local_steps = 1 if noise == "distributed" else draw(st.integers(1, steps))
    fields: dict[str, Any] = {
        "run": {"name": "box", "rounds": draw(st.integers(1, rounds))},
        "task": {"name": "image-classification", "input_shape": [2, 2], "classes": 2},
        "model": {"name": "linear"},
        "cohort": {"minimum": 4, "maximum": draw(st.integers(4, 60))},
        **values,
    }
    fields["training"] |= {"local_steps": local_steps}
    fields["server_optimizer"] |= {
        "name": draw(st.sampled_from(("fedavg", "fedavgm", "fedadam", "fedyogi")))
    }
    privacy |= {"unit": unit, "noise": noise}
    if unit == "example" and draw(st.booleans()):
        fields["evaluation"] = {"every": draw(st.integers(1, 100)), **evaluation}
    return fields


@settings(max_examples=8, deadline=None)
@given(plans())
def test_a_plan_within_the_bounds_is_resolved_or_refused_with_a_code(fields: dict[str, Any]) -> None:
    require_resolved_or_refused(fields)


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(plans(rounds=5000, steps=100))
def test_many_plans_within_the_bounds(fields: dict[str, Any]) -> None:
    require_resolved_or_refused(fields)


def require_resolved_or_refused(fields: dict[str, Any]) -> None:
    try:
        resolved = resolve(Plan.from_fields(fields))
    except FedsealError:
        return
    promised, delta = promised_loss(resolved)
    epsilon, worst = planned_epsilon(resolved), planned_worst_epsilon(resolved)
    assert promised is not None
    assert epsilon is not None
    assert worst is not None
    assert 0 <= epsilon <= promised * (1 + 1e-9)
    assert epsilon <= worst
    assert 0 < delta < 1
    assert 0 < resolved.update_range < math.inf


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        *(
            (section, field, value)
            for section, fields in BOXED.items()
            for field in fields
            for value in (5e-324, 1e308)
        ),
        ("privacy", "sample_rate", 1e-300),
        ("server_optimizer", "learning_rate", 1e308),
    ],
)
def test_a_value_out_of_all_proportion_is_refused(section: str, field: str, value: float) -> None:
    fields: dict[str, Any] = {
        "run": {"name": "box", "rounds": 2},
        "task": {"name": "image-classification", "input_shape": [2, 2], "classes": 2},
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": 3},
        "training": {"local_steps": 1, "learning_rate": 1.0},
        "server_optimizer": {"name": "fedadam"},
        "privacy": {"target_epsilon": 1.0, "sample_rate": 0.5, "expected_batch_size": 1.0},
        "evaluation": {"every": 1, "target_epsilon": 1.0},
    }
    if field == "max_update_norm":
        del fields["evaluation"]
        fields["privacy"] |= {"unit": "client"}
    fields[section] |= {field: value}
    if bounds(section, field)[0] == 0 and value < 1:
        assert Plan.from_fields(fields)
        return
    with pytest.raises(PlanInvalid, match=field):
        resolve(Plan.from_fields(fields))
