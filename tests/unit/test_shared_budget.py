"""Distributed noise and units in an owner's policy and ledger: by name only, and both losses capped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from client.ledger import Ledger
from client.policy import Policy, admit
from console.show import _print_ledger, show_plan
from protocol.accounting import epsilon_after, worst_epsilon_after
from protocol.errors import BudgetExhausted, PolicyInvalid, PolicyRefused
from protocol.plan import Plan

RUN, OTHER = "11" * 32, "22" * 32
POLICY = """
dataset = "ward-7"
data_file = "records.npz"

[budget]
epsilon_total = 8.0
epsilon_per_run = 8.0
epsilon_worst = 30.0
delta_total = 1e-3

[plans]
tasks = ["image-classification"]
models = ["linear"]
units = ["example", "client"]
allow_distributed_noise = true

[peers]
min_known_peers = 2
"""


def policy(*changes: tuple[str, str]) -> Policy:
    text = POLICY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return Policy.from_toml(text)


def make_plan(**privacy: Any) -> Plan:
    shared = {"noise": "distributed", "target_epsilon": 8.0, "noise_multiplier": 1.0}
    return Plan.from_fields(
        {
            "run": {"name": "unit", "rounds": 3},
            "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
            "model": {"name": "linear"},
            "cohort": {"minimum": 4, "maximum": 8},
            "training": {"local_steps": 1, "learning_rate": 0.5},
            "privacy": {"sample_rate": 0.1, "expected_batch_size": 48.0, **shared, **privacy},
        }
    )


PLAN = make_plan()
CLIENT = make_plan(unit="client", max_update_norm=1.0, noise="local", noise_multiplier=4.0)
WORST = worst_epsilon_after(PLAN, PLAN.paid_rounds) or 0.0


def refusal(changed: Policy, plan: Plan = PLAN) -> str:
    with pytest.raises(PolicyRefused) as refused:
        admit(changed, plan)
    return refused.value.detail


def test_shared_noise_is_allowed_by_name_and_no_other_way() -> None:
    admit(policy(), PLAN)
    off = policy(("allow_distributed_noise = true", ""))
    assert "allow_distributed_noise is false" in refusal(off)
    with pytest.raises(PolicyInvalid) as invalid:
        policy(("epsilon_worst = 30.0\n", ""))
    assert "budget.epsilon_worst" in invalid.value.detail
    with pytest.raises(PolicyInvalid):
        policy(("epsilon_worst = 30.0", "epsilon_worst = 7.0"))


def test_more_colluders_than_known_peers_are_refused() -> None:
    assert "min_known_peers is 2" in refusal(policy(), with_two_colluders())


def with_two_colluders() -> Plan:
    fields = PLAN.fields()
    fields["privacy"]["tolerated_colluders"] = 2
    fields["cohort"]["minimum"] = 5
    return Plan.from_fields(fields)


def test_the_loss_if_all_others_collude_has_a_cap_of_its_own() -> None:
    assert "collude" in refusal(policy(("epsilon_worst = 30.0", "epsilon_worst = 8.0")), PLAN)
    assert WORST > 8.0 > (epsilon_after(PLAN, PLAN.paid_rounds) or 0.0)


def test_units_are_allowed_one_by_one() -> None:
    only = policy(('units = ["example", "client"]', ""))
    admit(only, PLAN)
    assert "plans.units does not hold 'client'" in refusal(only, CLIENT)


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Any]:
    opened: list[Ledger] = []

    def open_with(rules: Policy) -> Ledger:
        opened.append(Ledger.open(tmp_path / "l" / "ledger.db", rules, tmp_path / "i" / "head"))
        return opened[-1]

    yield open_with
    for ledger in opened:
        ledger.close()


def test_the_ledger_counts_both_losses(open_ledger: Any) -> None:
    ledger = open_ledger(policy())
    ledger.open_run(RUN, PLAN)
    ledger.reserve(RUN, 1, "train")
    ledger.commit(RUN, 1)
    spent, totals = ledger.spent(RUN), ledger.totals()
    assert (spent.unit, spent.noise) == ("example", "distributed")
    assert spent.epsilon == totals.epsilon == epsilon_after(PLAN, 1)
    assert spent.epsilon_worst == totals.epsilon_worst == worst_epsilon_after(PLAN, 1)
    assert (spent.epsilon_worst or 0.0) > (spent.epsilon or 0.0)
    assert spent.delta == PLAN.privacy.delta
    opened = next(record.body for record in ledger.records() if record.body["kind"] == "open_run")
    assert (opened["unit"], opened["noise"]) == ("example", "distributed")


def test_the_worst_cap_stops_a_run_that_the_other_caps_allow(open_ledger: Any) -> None:
    ledger = open_ledger(policy(("epsilon_worst = 30.0", f"epsilon_worst = {1.5 * WORST:.3f}")))
    ledger.open_run(RUN, PLAN)
    for attempt in (1, 2, 3, 4):
        ledger.reserve(RUN, attempt, "train")
    with pytest.raises(BudgetExhausted) as refused:
        ledger.open_run(OTHER, make_plan(noise_multiplier=1.0001))
    assert "epsilon_worst" in refused.value.detail


def test_a_worst_cap_that_was_taken_away_stops_a_run_that_is_open(open_ledger: Any) -> None:
    open_ledger(policy()).open_run(RUN, PLAN)
    stricter = policy(("epsilon_worst = 30.0", ""), ("allow_distributed_noise = true", ""))
    with pytest.raises(BudgetExhausted):
        open_ledger(stricter).reserve(RUN, 1, "train")


def test_a_ledger_never_adds_up_two_units(open_ledger: Any) -> None:
    ledger = open_ledger(policy())
    ledger.open_run(RUN, PLAN)
    ledger.open_run(OTHER, CLIENT)
    ledger.reserve(RUN, 1, "train")
    with pytest.raises(BudgetExhausted) as refused:
        ledger.reserve(OTHER, 1, "train")
    assert "per example" in refused.value.detail
    assert ledger.totals().unit == "example"


def test_the_command_line_shows_unit_and_both_losses(open_ledger: Any) -> None:
    rules = policy()
    ledger = open_ledger(rules)
    ledger.open_run(RUN, PLAN)
    ledger.reserve(RUN, 1, "train")
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as shown:
        _print_ledger(console, ledger, rules, as_json=False)
    text = shown.get()
    assert "distributed" in text
    assert "EXPERIMENTAL" in text
    assert f"{worst_epsilon_after(PLAN, 1):.4f}" in text
    assert "one record of one owner" in text


def test_plan_check_marks_shared_noise(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=200)
    with console.capture() as shown:
        show_plan(console, PLAN, as_json=False)
    assert "EXPERIMENTAL" in shown.get()
    assert f"{WORST:.4f}" in shown.get()
    show_plan(console, PLAN, as_json=True)
    assert json.loads(capsys.readouterr().out)["privacy"]["noise"] == "distributed"
