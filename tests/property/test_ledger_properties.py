"""Whatever becomes of attempts, a ledger charges epsilon and delta for all that may have left its owner."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from client.entries import AnyEntry, CloseRun, from_bytes, genesis, marking, opening, to_bytes
from client.policy import Budget
from client.spending import Spending
from protocol.errors import BudgetExhausted, LedgerConflict
from protocol.messages import Purpose
from protocol.plan import Plan
from tasks.resolve import resolve


def evaluated_plan(unit: str) -> Plan:
    privacy: dict[str, object] = {
        "target_epsilon": 4.0,
        "delta": 1e-5,
        "sample_rate": 0.1,
        "expected_batch_size": 10.0,
    }
    if unit == "client":
        privacy |= {"unit": "client", "max_update_norm": 0.5}
    fields: dict[str, object] = {
        "run": {"name": "unit", "rounds": 4, "paid_spares": 1},
        "task": {"name": "image-classification", "input_shape": [2, 2], "classes": 2},
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": 3},
        "training": {"local_steps": 1, "learning_rate": 0.5},
        "privacy": privacy,
    }
    if unit == "example":
        fields["evaluation"] = {"every": 2, "target_epsilon": 1.0, "delta": 1e-6}
    return resolve(Plan.from_fields(fields))


PLANS = {unit: evaluated_plan(unit) for unit in ("example", "client")}
RUNS = [f"{number:064x}" for number in range(3)]


@dataclass
class Released:
    """What really left, known to nobody but this test: purposes of released attempts by run."""

    purposes: dict[str, list[Purpose]] = field(default_factory=dict)

    def delta(self, plan: Plan) -> float:
        each = {"train": plan.privacy.delta, "evaluate": plan.evaluation.delta if plan.evaluation else 0.0}
        return math.fsum(each[purpose] for made in self.purposes.values() for purpose in sorted(set(made)))


@st.composite
def histories(draw: DrawFn) -> tuple[str, list[tuple[str, int, Purpose, str]]]:
    """Unit and attempts: run, number, purpose, and how each ended."""
    unit = draw(st.sampled_from(sorted(PLANS)))
    purposes: list[Purpose] = ["train", "evaluate"] if unit == "example" else ["train"]
    ends = ["released", "released, then killed", "killed before its release", "void"]
    attempt = st.tuples(
        st.sampled_from(RUNS), st.integers(1, 40), st.sampled_from(purposes), st.sampled_from(ends)
    )
    return unit, draw(st.lists(attempt, max_size=25))


@given(histories(), st.floats(1e-6, 1e-4), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_no_released_attempt_is_without_its_delta(
    history: tuple[str, list[tuple[str, int, Purpose, str]]], cap: float, closed_after: int
) -> None:
    unit, attempts = history
    plan, released = PLANS[unit], Released()
    spending, written = Spending(), list[bytes]()
    budget = Budget(epsilon_total=1e3, epsilon_per_run=1e3, delta_total=cap, epsilon_worst=None)

    def append(entry: AnyEntry) -> None:
        spending.apply(entry)
        written.append(to_bytes(entry))

    append(genesis("ward", 0))
    for run in RUNS:
        append(opening(run, plan, 0))
    for number, (run, attempt, purpose, end) in enumerate(attempts):
        if number == closed_after:
            append(CloseRun(run=run, time_s=0))
        try:
            cost = spending.open_run(run).cost_with(purpose)
            assert cost is not None
            spending.require_caps(budget, run, cost)
            append(marking("reserve", run, attempt, purpose, 0))
        except (LedgerConflict, BudgetExhausted):
            continue
        if end == "void":
            append(marking("void", run, attempt, purpose, 0))
            continue
        if end == "released":
            append(marking("commit", run, attempt, purpose, 0))
        if end != "killed before its release":
            released.purposes.setdefault(run, []).append(purpose)
        totals = spending.totals()
        assert totals.delta >= released.delta(plan) * (1 - 1e-12)
        assert totals.delta <= cap * (1 + 1e-9)
    again = Spending()
    for body in written:
        again.apply(from_bytes(body))
    assert again.totals() == spending.totals()
    for run in RUNS:
        spent, made = again.run(run).spent(), released.purposes.get(run, [])
        least = again.run(run).cost(made.count("train"), made.count("evaluate"))
        assert least is not None
        assert spent.epsilon is not None
        assert spent.epsilon >= least.epsilon
        assert spent.delta >= least.delta
        assert (spent.delta > 0) == (spent.epsilon > 0)
