"""Federated evaluation without a federation: price, schedule, split, noised counts, and the estimate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client.entries import from_bytes
from client.evaluation import noised_counts
from client.holdout import Holdout
from client.ledger import Ledger
from client.noise import SecureStream
from client.policy import Policy
from client.spending import Spending
from crypto.packing import quantize
from crypto.presets import packing_for
from protocol.accounting import epsilon_after
from protocol.encoding import encode
from protocol.errors import BudgetExhausted, LedgerConflict, PlanInvalid
from protocol.evaluation import (
    calibrate_evaluation,
    estimate_accuracy,
    evaluation_epsilon,
    planned_epsilon,
    promised_loss,
    run_epsilon,
)
from protocol.plan import Plan
from server.rounds.evaluation import federated_accuracy
from tasks.images import Examples
from tasks.registry import task_for
from tasks.resolve import resolve

KEY = bytes(range(32))


def make_plan(every: int = 3, rounds: int = 8, **section: Any) -> Plan:
    fields: dict[str, Any] = {
        "run": {"name": "unit", "rounds": rounds, "paid_spares": 2},
        "task": {"name": "image-classification", "input_shape": [2, 2], "classes": 2},
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": 8},
        "training": {"local_steps": 2, "learning_rate": 0.5},
        "privacy": {"target_epsilon": 4.0, "sample_rate": 0.1, "expected_batch_size": 10.0},
        "evaluation": {"every": every, "target_epsilon": 1.0} | section,
    }
    return Plan.from_fields(fields)


PLAN = resolve(make_plan())


# --- schedule and price ------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 200))
def test_the_schedule_has_as_many_evaluations_as_are_paid(every: int, rounds: int) -> None:
    plan = make_plan(every, rounds)
    due = [number for number in range(rounds + 2) if plan.is_evaluated(number)]
    assert len(due) == plan.paid_evaluations - plan.run.paid_spares
    assert due[-1] == rounds
    assert due[0] == min(every, rounds)
    assert plan.max_attempts == rounds + plan.run.spare_attempts + plan.paid_evaluations


def test_calibrated_noise_just_reaches_its_own_target() -> None:
    section = PLAN.evaluation
    assert section is not None
    reached = evaluation_epsilon(PLAN, PLAN.paid_evaluations)
    assert reached is not None
    assert 0.995 < reached <= 1.0
    assert section.noise_multiplier == calibrate_evaluation(make_plan())
    less = section.model_copy(update={"noise_multiplier": 0.99 * (section.noise_multiplier or 0.0)})
    more = evaluation_epsilon(PLAN.model_copy(update={"evaluation": less}), PLAN.paid_evaluations)
    assert (more or 0.0) > 1.0


def test_a_run_costs_training_and_evaluation_together() -> None:
    assert run_epsilon(PLAN, 4, 0) == epsilon_after(PLAN, 4)
    assert run_epsilon(PLAN, 0, 2) == evaluation_epsilon(PLAN, 2)
    assert run_epsilon(PLAN, 4, 2) == (epsilon_after(PLAN, 4) or 0) + (evaluation_epsilon(PLAN, 2) or 0)
    assert (planned_epsilon(PLAN) or 9.0) <= 5.0
    assert promised_loss(PLAN) == (5.0, 1e-5 + 1e-6)
    losses = [evaluation_epsilon(PLAN, count) or 0.0 for count in range(5)]
    assert losses == sorted(losses)
    assert losses[0] == 0.0


def test_a_plan_without_the_section_has_no_price_for_it() -> None:
    plan = PLAN.model_copy(update={"evaluation": None})
    assert (plan.paid_evaluations, evaluation_epsilon(plan, 0)) == (0, 0.0)
    assert promised_loss(plan) == (4.0, 1e-5)
    assert planned_epsilon(plan) == epsilon_after(plan, plan.paid_rounds)
    with pytest.raises(PlanInvalid):
        evaluation_epsilon(plan, 1)


# --- the split ---------------------------------------------------------------------------------------

records = st.lists(
    st.tuples(st.lists(st.integers(0, 255), min_size=4, max_size=4), st.integers(0, 9)),
    min_size=1,
    max_size=30,
)


def arrays(rows: list[tuple[list[int], int]]) -> tuple[Any, Any]:
    x = np.array([row for row, _ in rows], dtype=np.uint8).reshape(len(rows), 2, 2)
    return x, np.array([label for _, label in rows])


@given(records, st.data(), st.floats(0.01, 0.5))
def test_adding_or_removing_a_record_moves_no_other(
    rows: list[tuple[list[int], int]], data: st.DataObject, share: float
) -> None:
    holdout = Holdout(KEY, share)
    place = data.draw(st.integers(0, len(rows) - 1))
    whole = holdout.held_out(*arrays(rows))
    without = holdout.held_out(*arrays(rows[:place] + rows[place + 1 :]))
    assert np.array_equal(np.delete(whole, place), without)
    order = data.draw(st.permutations(range(len(rows))))
    assert np.array_equal(whole[order], holdout.held_out(*arrays([rows[index] for index in order])))
    assert np.array_equal(holdout.trained_on(*arrays(rows)), ~whole)


@given(records, st.floats(0.01, 0.24), st.floats(0.25, 0.5))
def test_the_type_of_storage_plays_no_part_and_a_larger_share_holds_out_more(
    rows: list[tuple[list[int], int]], small: float, large: float
) -> None:
    x, y = arrays(rows)
    held = Holdout(KEY, small).held_out(x, y)
    assert np.array_equal(held, Holdout(KEY, small).held_out(x.astype(np.float32), y.astype(np.int8)))
    negative = np.where(x == 0, -0.0, x.astype(np.float32))
    assert np.array_equal(held, Holdout(KEY, small).held_out(negative, y))
    assert not np.any(held & ~Holdout(KEY, large).held_out(x, y))


def test_the_share_is_kept_and_the_key_decides() -> None:
    generator = np.random.default_rng(5)
    x, y = generator.integers(0, 256, (20_000, 4), dtype=np.uint8), generator.integers(0, 10, 20_000)
    first, second = Holdout(KEY, 0.2).held_out(x, y), Holdout(KEY[::-1], 0.2).held_out(x, y)
    for held in (first, second):
        assert abs(np.mean(held) - 0.2) < 5 * math.sqrt(0.16 / 20_000)
    assert abs(np.mean(first & second) - 0.04) < 5 * math.sqrt(0.04 * 0.96 / 20_000)
    # labels do not decide alone, and neither do the values
    assert 0.1 < np.mean(Holdout(KEY, 0.2).held_out(x * 0, y * 0 + np.arange(20_000))) < 0.3


# --- the counts --------------------------------------------------------------------------------------


def examples(labels: list[int]) -> Examples:
    """Rows that the model below answers with their sign: class 1 for positive ones."""
    x = np.tile(np.array([[0.5, 0.5, 0.5, 0.5]], dtype=np.float32), (len(labels), 1))
    return Examples(x, np.array(labels, dtype=np.int64))


def model_of_ones() -> Any:
    """Weights of the linear model that answers class 1 for positive rows."""
    return np.array([-1.0] * 4 + [1.0] * 4 + [0.0, 0.0])


def noiseless(plan: Plan) -> Plan:
    section = plan.evaluation
    assert section is not None
    return plan.model_copy(
        update={"evaluation": section.model_copy(update={"noise": "none", "noise_multiplier": None})}
    )


@given(st.lists(st.integers(0, 1), max_size=12), st.integers(0, 1))
@settings(max_examples=25, deadline=None)
def test_one_record_changes_one_count_by_one(labels: list[int], added: int) -> None:
    plan, task = noiseless(PLAN), task_for(PLAN)
    before = noised_counts(task, plan, model_of_ones(), examples(labels))
    after = noised_counts(task, plan, model_of_ones(), examples([*labels, added]))
    assert before.tolist() == [labels.count(1), labels.count(0)]
    assert (after - before).tolist() == ([1.0, 0.0] if added else [0.0, 1.0])
    assert np.linalg.norm(after - before) == 1.0


def test_a_record_is_counted_by_itself() -> None:
    """A row's answer is the same to the bit, whatever rows are evaluated beside it."""
    task, generator = task_for(PLAN), np.random.default_rng(1)
    model = task.build_model(PLAN)
    x = generator.normal(size=(40, 4)).astype(np.float32)
    y = generator.integers(0, 2, 40)
    whole = task.correct(model, Examples(x, y))
    for size in (1, 7, 39):
        assert np.array_equal(whole[:size], task.correct(model, Examples(x[:size], y[:size])))
    assert len(task.correct(model, Examples(x[:0], y[:0]))) == 0


def test_both_counts_get_the_planned_noise_and_it_is_not_seeded() -> None:
    section = PLAN.evaluation
    assert section is not None
    deviation = section.noise_multiplier or 0.0
    np.random.seed(0)
    held = examples([1, 1, 0])
    draws = np.array([noised_counts(task_for(PLAN), PLAN, model_of_ones(), held) for _ in range(1500)])
    for column, mean in ((0, 2.0), (1, 1.0)):
        standardized = (draws[:, column] - mean) / deviation
        assert stats.kstest(standardized, "norm").pvalue > 1e-6
        assert abs(np.std(standardized) - 1) < 0.1
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.15
    empty = noised_counts(task_for(PLAN), PLAN, model_of_ones(), examples([]))
    assert np.all(np.abs(empty) < 9 * deviation)


# --- the estimate ------------------------------------------------------------------------------------


def test_the_estimate_and_its_error_hold_over_many_openings() -> None:
    """The standard error is what the estimates really scatter by, rounding included."""
    section, packing = PLAN.evaluation, packing_for("exact16", 8)
    assert section is not None
    owners, counts, stream = 5, np.array([240.0, 60.0]), SecureStream()
    found = []
    for _ in range(1500):
        sums = np.zeros(2, dtype=np.uint64)
        for _ in range(owners):
            noised = counts + (section.noise_multiplier or 0.0) * stream.gaussian(2)
            sums += quantize(noised, section.count_range, packing, stream.uniform(2))
        found.append(federated_accuracy(PLAN, sums.tolist(), owners))
    estimates = [one for one in found if one is not None]
    assert len(estimates) == len(found)
    accuracies = np.array([one.accuracy for one in estimates])
    errors = np.array([one.standard_error for one in estimates])
    assert abs(accuracies.mean() - 0.8) < 5 * accuracies.std() / math.sqrt(len(accuracies))
    assert abs(errors.mean() / accuracies.std() - 1) < 0.1


def test_counts_that_do_not_stand_out_of_the_noise_give_no_figure() -> None:
    assert estimate_accuracy(3.0, 1.0, 10.0) is None
    assert estimate_accuracy(-50.0, 20.0, 1.0) is None
    assert estimate_accuracy(0.0, 0.0, 0.0) is None
    assert estimate_accuracy(300.0, -20.0, 10.0) is not None
    exact = estimate_accuracy(9.0, 1.0, 0.0)
    assert exact is not None
    assert (exact.accuracy, exact.standard_error) == (0.9, 0.0)
    clamped = estimate_accuracy(300.0, -20.0, 10.0)
    assert clamped is not None
    assert clamped.accuracy == 1.0


# --- the ledger --------------------------------------------------------------------------------------

RUN = "11" * 32


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = open_ledger(tmp_path)
    opened.open_run(RUN, PLAN)
    yield opened
    opened.close()


def open_ledger(folder: Path, **budget: float) -> Ledger:
    caps = {"epsilon_total": 6.0, "epsilon_per_run": 5.5, "delta_total": 1e-4} | budget
    policy = Policy.model_validate(
        {
            "dataset": "ward-7",
            "data_file": "records.npz",
            "budget": caps,
            "plans": {"tasks": ["image-classification"], "models": ["linear"]},
        }
    )
    return Ledger.open(folder / "ledger" / "ledger.db", policy, folder / "identity" / "ledger.head")


def test_each_purpose_has_its_own_price_and_limit(ledger: Ledger, tmp_path: Path) -> None:
    for attempt in range(1, PLAN.paid_evaluations + 1):
        ledger.reserve(RUN, attempt, "evaluate")
        ledger.commit(RUN, attempt)
    with pytest.raises(LedgerConflict, match="evaluations"):
        ledger.reserve(RUN, 20, "evaluate")
    spent = ledger.spent(RUN)
    assert (spent.epsilon, spent.delta) == (evaluation_epsilon(PLAN, 5), 1e-6)
    assert (spent.sealed, spent.sealed_evaluations) == (0, 5)
    ledger.reserve(RUN, 20, "train")
    assert ledger.spent(RUN).epsilon == run_epsilon(PLAN, 1, 5)
    assert ledger.spent(RUN).delta == 1e-5 + 1e-6
    with pytest.raises(LedgerConflict, match="above every"):
        ledger.reserve(RUN, 19, "evaluate")
    before = ledger.spent(RUN)
    ledger.close()
    again = open_ledger(tmp_path)
    assert again.spent(RUN) == before
    again.close()


def test_a_void_evaluation_is_refunded_and_a_reserved_one_is_not(ledger: Ledger) -> None:
    ledger.reserve(RUN, 1, "evaluate")
    assert ledger.spent(RUN).evaluation_epsilon == evaluation_epsilon(PLAN, 1)
    ledger.void(RUN, 1)
    assert ledger.spent(RUN).evaluation_epsilon == 0.0
    ledger.reserve(RUN, 2, "evaluate")
    assert ledger.spent(RUN).evaluation_epsilon == evaluation_epsilon(PLAN, 1)
    with pytest.raises(LedgerConflict):
        ledger.void(RUN, 1)


def test_an_attempt_is_settled_for_the_purpose_that_it_was_reserved_for(ledger: Ledger) -> None:
    """Whoever writes records by hand cannot turn a dear reservation into a cheap one."""
    spending = Spending()
    for record in ledger.records():
        spending.apply(from_bytes(encode(record.body)))
    entry = {"run": RUN, "attempt": 1, "time_s": 0, "nonce": "22" * 32}
    spending.apply(from_bytes(encode(entry | {"kind": "reserve", "purpose": "train"})))
    with pytest.raises(LedgerConflict):
        spending.apply(from_bytes(encode(entry | {"kind": "commit", "purpose": "evaluate"})))


@pytest.mark.parametrize("budget", [{"epsilon_per_run": 4.9}, {"delta_total": 1.05e-5}])
def test_caps_hold_training_and_evaluation_together(tmp_path: Path, budget: dict[str, float]) -> None:
    """Each part alone would fit."""
    tight = open_ledger(tmp_path, **budget)
    with pytest.raises(BudgetExhausted, match=next(iter(budget))):
        tight.open_run(RUN, PLAN)
    tight.open_run(RUN, PLAN.model_copy(update={"evaluation": None}))
    tight.close()


def test_a_run_without_evaluation_reserves_none(tmp_path: Path) -> None:
    plain = open_ledger(tmp_path)
    plain.open_run(RUN, PLAN.model_copy(update={"evaluation": None}))
    with pytest.raises(LedgerConflict, match="evaluations"):
        plain.reserve(RUN, 1, "evaluate")
    plain.close()
