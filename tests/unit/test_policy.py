"""A policy names what is wrong with itself, and with every plan outside it."""

import pytest

from client.policy import Policy, admit
from protocol.errors import PlanInvalid, PolicyInvalid, PolicyRefused
from protocol.plan import Plan

FINGERPRINT = "ab" * 32
TEXT = f"""
dataset = "ward-7"
data_file = "records.npz"

[budget]
epsilon_total = 20.0
epsilon_per_run = 8
delta_total = 1e-4

[plans]
tasks = ["image-classification"]
models = ["linear"]

[peers]
pinned = {{ bank-a = "{FINGERPRINT}" }}
"""


def make_plan(privacy: dict[str, object] | None = None, **sections: dict[str, object]) -> Plan:
    base = {"delta": 1e-5, "sample_rate": 0.1, "expected_batch_size": 48.0}
    local = {"target_epsilon": 8.0, "noise_multiplier": 1.0}
    fields: dict[str, object] = {
        "run": {"name": "unit", "rounds": 10},
        "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": 8},
        "training": {"local_steps": 8, "learning_rate": 0.5},
        "privacy": base | (local if privacy is None else privacy),
    }
    return Plan.from_fields(fields | sections)


def test_reads_a_file_and_fills_in_safe_defaults() -> None:
    policy = Policy.from_toml(TEXT)
    assert policy.dataset == "ward-7"
    assert policy.peers.pinned == {"bank-a": FINGERPRINT}
    assert (policy.plans.min_cohort, policy.peers.min_known_peers) == (3, 2)
    assert not policy.plans.allow_no_privacy
    admit(policy, make_plan())


def test_every_field_is_described() -> None:
    def undescribed(schema: dict[str, dict[str, object]]) -> list[str]:
        return [name for name, field in schema.items() if "description" not in field]

    whole = Policy.model_json_schema()
    assert not undescribed(whole["properties"])
    for part in whole["$defs"].values():
        assert not undescribed(part["properties"])


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("epsilon_total = 20.0", "epsilon_total = -1.0", "budget.epsilon_total"),
        ("epsilon_total = 20.0", "epsilon_total = inf", "budget.epsilon_total"),
        ("epsilon_total = 20.0", "epsilon_total = nan", "budget.epsilon_total"),
        ("epsilon_total = 20.0", 'epsilon_total = "20"', "budget.epsilon_total"),
        ("epsilon_total = 20.0", "epsilon_total = 5.0", "epsilon_per_run"),
        ("epsilon_total = 20.0", "", "budget.epsilon_total"),
        ("delta_total = 1e-4", "delta_total = 1.0", "budget.delta_total"),
        ("delta_total = 1e-4", "delta_total = 1e-4\nepsilon = 1.0", "budget.epsilon"),
        ('models = ["linear"]', "models = []", "plans.models"),
        ('models = ["linear"]', 'models = ["linear"]\nmin_cohort = 2', "min_cohort"),
        ('models = ["linear"]', 'models = ["linear"]\nallow_no_privacy = 1', "plans.allow_no_privacy"),
        ("[peers]", "[peers]\nmin_known_peers = 0", "min_known_peers"),
        (FINGERPRINT, "xyz", "peers.pinned.bank-a"),
        ('dataset = "ward-7"', 'dataset = "../x"', "dataset"),
        ('dataset = "ward-7"', "dataset = ", "not TOML"),
    ],
)
def test_a_wrong_field_is_named(old: str, new: str, field: str) -> None:
    with pytest.raises(PolicyInvalid, match=field):
        Policy.from_toml(TEXT.replace(old, new))


def test_the_demonstration_has_to_say_so() -> None:
    text = TEXT.replace("[peers]", "[peers]\ndemo = true\nmin_known_peers = 0")
    text = text.replace('models = ["linear"]', 'models = ["linear"]\nmin_cohort = 1\nallow_small = true')
    policy = Policy.from_toml(text)
    assert (policy.peers.min_known_peers, policy.plans.min_cohort) == (0, 1)


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        (
            make_plan(task={"name": "speech", "input_shape": [8], "classes": 2}),
            "plans.tasks does not hold 'speech'",
        ),
        (make_plan(model={"name": "mlp", "hidden": [4]}), "plans.models does not hold 'mlp'"),
        (
            make_plan(
                cohort={"minimum": 2, "maximum": 8, "allow_small": True},
            ),
            "plans.min_cohort is 3, the plan's cohort.minimum is 2",
        ),
        (make_plan({"noise": "none"}), "plans.allow_no_privacy"),
        (
            make_plan({"target_epsilon": 50.0, "noise_multiplier": 0.5}),
            "budget.epsilon_per_run is 8, the plan's epsilon is",
        ),
        (
            make_plan({"target_epsilon": 8.0, "noise_multiplier": 2.0, "delta": 1e-3}),
            "budget.delta_total is 0.0001, the plan's delta is 0.001",
        ),
    ],
)
def test_a_plan_outside_the_policy_is_refused_by_name(plan: Plan, field: str) -> None:
    with pytest.raises(PolicyRefused, match=field):
        admit(Policy.from_toml(TEXT), plan)


def test_what_counts_is_the_computed_epsilon_and_not_the_promised_one() -> None:
    lying = make_plan({"target_epsilon": 1.0, "noise_multiplier": 0.5})
    with pytest.raises(PolicyRefused, match="epsilon_per_run"):
        admit(Policy.from_toml(TEXT), lying)


def test_no_privacy_is_possible_when_the_owner_asks_for_it() -> None:
    text = TEXT.replace('models = ["linear"]', 'models = ["linear"]\nallow_no_privacy = true')
    admit(Policy.from_toml(text), make_plan({"noise": "none"}))


def test_an_unresolved_plan_is_not_admitted() -> None:
    with pytest.raises(PlanInvalid):
        admit(Policy.from_toml(TEXT), make_plan({"target_epsilon": 8.0}))


def test_the_compatibility_scheme_must_be_allowed_by_name() -> None:
    plan = make_plan(encryption={"preset": "ckks"})
    with pytest.raises(PolicyRefused, match=r"plans\.allow_ckks"):
        admit(Policy.from_toml(TEXT), plan)
    admit(Policy.from_toml(TEXT.replace("[plans]", "[plans]\nallow_ckks = true")), plan)


def test_weights_that_would_lay_one_owner_bare_are_refused() -> None:
    cohort = {"minimum": 3, "maximum": 8, "weights": {FINGERPRINT: 0.01}}
    with pytest.raises(PolicyRefused, match=r"plans\.min_weight"):
        admit(Policy.from_toml(TEXT), make_plan(cohort=cohort))
    admit(Policy.from_toml(TEXT), make_plan(cohort=cohort | {"weights": {FINGERPRINT: 0.75}}))
