"""A plan that cannot be kept is refused with the field's name, and equal plans have equal hashes."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from protocol.encoding import decode, encode
from protocol.errors import CapacityExceeded, FedsealError, NoiseTooSmall, PlanInvalid
from protocol.plan import Plan
from tasks.resolve import resolve

DIGITS = Path(__file__).parents[2] / "scenarios" / "plans" / "digits.toml"

MARKER = "patient-7731"


def fields(**changes: Any) -> dict[str, Any]:
    """Fields of a small plan; a change is named by section and field, joined by two underscores."""
    plan: dict[str, Any] = {
        "run": {"name": "unit", "rounds": 2},
        "task": {
            "name": "image-classification",
            "input_shape": [4],
            "value_range": [0.0, 1.0],
            "classes": 2,
        },
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": 8},
        "training": {"local_steps": 1, "learning_rate": 0.5},
        "privacy": {
            "target_epsilon": 8.0,
            "noise_multiplier": 4.0,
            "sample_rate": 0.5,
            "expected_batch_size": 16.0,
        },
        "encryption": {"quorum": 2},
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            plan.setdefault(section, {})[field] = value
        else:
            plan[section] = value
    return plan


def without(section: str, field: str = "") -> dict[str, Any]:
    plan = fields()
    del (plan[section] if field else plan)[field or section]
    return plan


def refusal(plan: dict[str, Any]) -> FedsealError:
    with pytest.raises(FedsealError) as refused:
        resolve(Plan.from_fields(plan))
    return refused.value


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"unheard": {}}, "unheard"),
        ({"privacy__epsilon": 1.0}, "privacy.epsilon"),
        ({"run__name": "Upper"}, "run.name"),
        ({"run__name": "../x"}, "run.name"),
        ({"run__name": ""}, "run.name"),
        ({"run__name": "a\n"}, "run.name"),
        ({"run__rounds": 0}, "run.rounds"),
        ({"run__rounds": "2"}, "run.rounds"),
        ({"run__rounds": 2.0}, "run.rounds"),
        ({"run__rounds": True}, "run.rounds"),
        ({"run__spare_attempts": -1}, "run.spare_attempts"),
        ({"run": 7}, "run"),
        ({"task__classes": 1}, "task.classes"),
        ({"task__input_shape": []}, "task.input_shape"),
        ({"task__input_shape": [0]}, "task.input_shape"),
        ({"task__input_shape": "8x8"}, "task.input_shape"),
        ({"task__value_range": [1.0, 0.0]}, "task.value_range"),
        ({"task__value_range": [1.0, 1.0]}, "task.value_range"),
        ({"task__value_range": [1.0]}, "task.value_range"),
        ({"task__value_range": [0.0, math.inf]}, "task.value_range"),
        ({"task__value_range": [math.nan, 1.0]}, "task.value_range"),
        ({"task__name": "unknown-task"}, "task.name"),
        ({"model__name": "transformer"}, "model.name"),
        ({"model__hidden": [4]}, "model.hidden"),
        ({"model__initial_seed": 2**32}, "model.initial_seed"),
        ({"model__initial_sha256": "abc"}, "model.initial_sha256"),
        ({"cohort__minimum": 2}, "cohort.minimum"),
        ({"cohort__minimum": 1}, "cohort.minimum"),
        ({"cohort__minimum": 0, "cohort__allow_small": True}, "cohort.minimum"),
        ({"cohort__minimum": 9}, "cohort.m"),
        ({"cohort__allow_small": 1}, "cohort.allow_small"),
        ({"deadlines": {"fit_s": 0}}, "deadlines.fit_s"),
        ({"deadlines": {"fit_s": math.inf}}, "deadlines.fit_s"),
        ({"training__local_steps": 0}, "training.local_steps"),
        ({"training__learning_rate": 0.0}, "training.learning_rate"),
        ({"training__learning_rate": math.nan}, "training.learning_rate"),
        ({"server_optimizer": {"name": "sgd"}}, "server_optimizer.name"),
        ({"server_optimizer": {"momentum": 1.0}}, "server_optimizer.momentum"),
        ({"privacy__target_epsilon": 0.0}, "privacy.target_epsilon"),
        ({"privacy__target_epsilon": -1.0}, "privacy.target_epsilon"),
        ({"privacy__target_epsilon": math.inf}, "privacy.target_epsilon"),
        ({"privacy__target_epsilon": None}, "privacy.target_epsilon"),
        ({"privacy__noise": "none"}, "privacy.noise"),
        ({"privacy__noise": "none", "privacy__noise_multiplier": None}, "target_epsilon"),
        ({"privacy__noise": "none", "privacy__target_epsilon": None}, "noise_multiplier"),
        ({"privacy__noise": "distributed"}, "privacy.noise"),
        ({"privacy__unit": "client"}, "privacy.unit"),
        ({"privacy__delta": 0.0}, "privacy.delta"),
        ({"privacy__delta": 1.0}, "privacy.delta"),
        ({"privacy__delta": math.nan}, "privacy.delta"),
        ({"privacy__sample_rate": 0.0}, "privacy.sample_rate"),
        ({"privacy__sample_rate": 1.01}, "privacy.sample_rate"),
        ({"privacy__max_grad_norm": 0.0}, "privacy.max_grad_norm"),
        ({"privacy__expected_batch_size": 0.0}, "privacy.expected_batch_size"),
        ({"privacy__noise_multiplier": 0.0}, "privacy.noise_multiplier"),
        ({"encryption__preset": "paillier"}, "encryption.preset"),
        ({"encryption__quorum": 4}, "encryption.quorum"),
        ({"encryption__quorum": 0}, "encryption.quorum"),
        ({"encryption__update_range": 0.0}, "encryption.update_range"),
        ({"compression": {"prune_ratio": 1.0}}, "compression.prune_ratio"),
        ({"compression": {"quantize": "int4"}}, "compression.quantize"),
        ({"version": 2}, "version"),
        ({"version": True}, "version"),
        ({"version": 1.0}, "version"),
    ],
)
def test_an_impossible_value_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    error = refusal(fields(**change))
    assert isinstance(error, PlanInvalid)
    assert error.code == "FS-PLAN-01"
    assert named in error.detail
    assert error.remedy in error.explain()
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("section", "field"),
    [("run", ""), ("task", ""), ("cohort", ""), ("privacy", ""), ("run", "rounds"), ("task", "classes")],
)
def test_a_missing_field_is_refused_by_name(section: str, field: str) -> None:
    error = refusal(without(section, field))
    assert error.code == "FS-PLAN-01"
    assert error.detail.startswith(f"{section}.{field}".rstrip("."))


@pytest.mark.parametrize("plan", [None, [], "plan", 7])
def test_what_is_not_a_table_is_refused(plan: Any) -> None:
    with pytest.raises(PlanInvalid):
        Plan.from_fields(plan)


def test_a_cohort_beyond_the_capacity_of_the_preset_is_refused() -> None:
    for preset in ("exact16", "compact"):
        plan = fields(cohort__maximum=257, encryption__preset=preset)
        error = refusal(plan)
        assert isinstance(error, CapacityExceeded)
        assert error.code == "FS-PLAN-02"
        assert "encryption.preset" in error.detail
        assert "cohort.maximum" in error.detail
        resolve(Plan.from_fields(fields(cohort__maximum=256, encryption__preset=preset)))


def test_noise_that_misses_the_target_is_refused() -> None:
    error = refusal(fields(privacy__noise_multiplier=0.5, privacy__target_epsilon=0.5))
    assert isinstance(error, NoiseTooSmall)
    assert error.code == "FS-PLAN-03"
    assert "privacy.noise_multiplier" in error.explain()
    assert "privacy.target_epsilon" in error.explain()


def test_two_owners_need_the_plans_word_for_it() -> None:
    plan = fields(cohort__minimum=2, cohort__allow_small=True)
    assert Plan.from_fields(plan).cohort.minimum == 2


def test_no_noise_is_possible_only_without_a_promise() -> None:
    plan = fields(privacy__noise="none", privacy__target_epsilon=None, privacy__noise_multiplier=None)
    assert resolve(Plan.from_fields(plan)).privacy.target_epsilon is None


@pytest.mark.parametrize(
    "name",
    [
        "run__name",
        "run__rounds",
        "task__name",
        "task__input_shape",
        "model__initial_sha256",
        "cohort__minimum",
        "privacy__delta",
        "privacy__unit",
        "privacy__noise",
        "encryption__preset",
        "server_optimizer__name",
        "version",
        "privacy",
    ],
)
def test_a_refused_value_is_not_echoed(name: str) -> None:
    value = {"task__name": f"UPPER {MARKER}"}.get(name, f"{MARKER}!")
    error = refusal(fields(**{name: value}))
    assert MARKER not in error.explain()
    assert MARKER not in str(error)


def test_broken_toml_is_refused_without_its_text() -> None:
    for text in (f'[run]\nname = "{MARKER}', f"name = {MARKER}", "[run]\n[run]\n", "a = 1\na = 2"):
        with pytest.raises(PlanInvalid, match="not TOML") as refused:
            Plan.from_toml(text)
        assert MARKER not in refused.value.explain()


def test_the_hash_does_not_depend_on_order_or_on_written_defaults() -> None:
    plan = Plan.from_fields(fields())
    backwards = {section: dict(reversed(values.items())) for section, values in reversed(fields().items())}
    assert Plan.from_fields(backwards).sha256() == plan.sha256()
    assert Plan.from_fields(plan.fields()).sha256() == plan.sha256()
    assert Plan.from_fields(fields(server_optimizer={})).sha256() == plan.sha256()
    written = fields(run__spare_attempts=5, deadlines={"join_s": 60}, privacy__delta=0.00001)
    assert Plan.from_fields(written).sha256() == plan.sha256()


def test_whole_numbers_may_stand_for_floats_without_another_hash() -> None:
    whole = fields(privacy__target_epsilon=8, privacy__expected_batch_size=16, task__value_range=[0, 1])
    assert Plan.from_fields(whole).sha256() == Plan.from_fields(fields()).sha256()


@pytest.mark.parametrize(
    "change",
    [
        {"run__rounds": 3},
        {"run__name": "other"},
        {"cohort__maximum": 9},
        {"deadlines": {"fit_s": 1.0}},
        {"privacy__delta": 1e-6},
        {"privacy__noise_multiplier": 4.001},
        {"encryption__preset": "compact"},
        {"compression": {"prune_ratio": 0.25}},
        {"model__initial_seed": 1},
    ],
)
def test_every_section_is_in_the_hash(change: dict[str, Any]) -> None:
    assert Plan.from_fields(fields(**change)).sha256() != Plan.from_fields(fields()).sha256()


def test_a_plan_survives_the_wire() -> None:
    plan = resolve(Plan.from_fields(fields()))
    assert Plan.from_fields(decode(encode(plan.fields()))) == plan


def test_a_plan_cannot_be_changed() -> None:
    plan = Plan.from_fields(fields())
    with pytest.raises(ValueError, match="frozen"):
        plan.run.rounds = 7  # type: ignore[misc]


def test_resolving_twice_changes_nothing() -> None:
    once = resolve(Plan.from_fields(fields()))
    assert resolve(once) == once
    assert resolve(once).sha256() == once.sha256()
    assert once.model.initial_sha256 is not None


def test_resolving_leaves_its_input_alone() -> None:
    plan = Plan.from_fields(fields())
    before = copy.deepcopy(plan.fields())
    resolve(plan)
    assert plan.fields() == before


def test_the_shipped_plan_resolves_to_its_target() -> None:
    plan = Plan.from_toml(DIGITS.read_text())
    resolved = resolve(plan)
    assert resolved.privacy.noise_multiplier is not None
    assert resolved.model.initial_sha256 is not None
    assert resolve(resolved) == resolved
    assert plan.sha256() != resolved.sha256()
    weaker = resolved.fields()
    weaker["privacy"]["noise_multiplier"] *= 0.98
    assert isinstance(refusal(weaker), NoiseTooSmall)


def test_derived_numbers_follow_their_definition() -> None:
    plan = Plan.from_fields(fields(run__rounds=3, run__paid_spares=2, training__local_steps=4))
    assert plan.max_attempts == 3 + 5
    assert plan.paid_rounds == 5
    assert plan.total_steps == 20
    assert plan.update_range == pytest.approx(0.5 * (2 * 4 + 8 * 4.0 * 2 / 16))
    assert Plan.from_fields(fields(encryption__update_range=0.25)).update_range == 0.25
