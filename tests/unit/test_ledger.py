"""The ledger's arithmetic and order, its caps, and what it refuses to open."""

import multiprocessing
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.ledger import Ledger
from client.policy import Policy
from protocol.accounting import epsilon_after, epsilon_of_steps
from protocol.errors import BudgetExhausted, LedgerConflict, LedgerCorrupt, LedgerRollback
from protocol.plan import Plan

RUN, OTHER = "11" * 32, "22" * 32


def make_policy(dataset: str = "ward-7", **budget: float) -> Policy:
    caps = {"epsilon_total": 10.0, "epsilon_per_run": 10.0, "delta_total": 1e-4} | budget
    return Policy.model_validate(
        {
            "dataset": dataset,
            "data_file": "records.npz",
            "budget": caps,
            "plans": {"tasks": ["image-classification"], "models": ["linear"]},
        }
    )


def make_plan(rounds: int = 4, spare: int = 2, delta: float = 1e-5, private: bool = True) -> Plan:
    noise = {"target_epsilon": 8.0, "noise_multiplier": 2.0} if private else {"noise": "none"}
    return Plan.from_fields(
        {
            "run": {"name": "unit", "rounds": rounds, "paid_spares": 0, "spare_attempts": spare},
            "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
            "model": {"name": "linear"},
            "cohort": {"minimum": 3, "maximum": 8},
            "training": {"local_steps": 5, "learning_rate": 0.5},
            "privacy": {"delta": delta, "sample_rate": 0.2, "expected_batch_size": 48.0} | noise,
        }
    )


PLAN = make_plan()
WHOLE = epsilon_of_steps(0.2, 2.0, 20, 1e-5)


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "ledger" / "ledger.db", tmp_path / "identity" / "ledger.head"


@pytest.fixture
def ledger(place: tuple[Path, Path]) -> Iterator[Ledger]:
    opened = Ledger.open(place[0], make_policy(), place[1])
    yield opened
    opened.close()


def test_a_run_costs_what_its_attempts_cost(ledger: Ledger) -> None:
    ledger.open_run(RUN, PLAN)
    assert ledger.spent(RUN).epsilon == 0.0
    assert ledger.spent(RUN).delta == 0.0
    ledger.reserve(RUN, 1)
    ledger.commit(RUN, 1)
    ledger.reserve(RUN, 2)
    ledger.void(RUN, 2)
    ledger.reserve(RUN, 5)
    spent = ledger.spent(RUN)
    assert (spent.sealed, spent.void, spent.reserved) == (1, 1, 1)
    assert spent.epsilon == epsilon_after(PLAN, 2)
    assert spent.delta == 1e-5
    assert ledger.totals().epsilon == spent.epsilon


def test_a_void_refunds_delta_with_epsilon(place: tuple[Path, Path]) -> None:
    """Runs that released nothing must not fill a cap on delta."""
    ledger = Ledger.open(place[0], make_policy(delta_total=1e-5), place[1])
    for number in range(3):
        run = f"{number:064x}"
        ledger.open_run(run, PLAN)
        ledger.reserve(run, 1)
        assert ledger.spent(run).delta == 1e-5
        ledger.void(run, 1)
        assert (ledger.spent(run).epsilon, ledger.spent(run).delta) == (0.0, 0.0)
        ledger.close_run(run)
    assert (ledger.totals().epsilon, ledger.totals().delta, ledger.totals().unit) == (0.0, 0.0, None)
    ledger.open_run(RUN, PLAN)
    ledger.reserve(RUN, 1)
    ledger.close()
    # the process died with the attempt reserved: it counts as spent
    again = Ledger.open(place[0], make_policy(delta_total=1e-5), place[1])
    assert again.totals().delta == 1e-5
    again.open_run(OTHER, make_plan(private=False))
    with pytest.raises(BudgetExhausted, match="delta_total"):
        again.open_run(f"{7:064x}", PLAN)
    again.close()


def test_everything_survives_a_restart(ledger: Ledger, place: tuple[Path, Path]) -> None:
    ledger.open_run(RUN, PLAN)
    ledger.reserve(RUN, 3)
    before = (ledger.head(), ledger.spent(RUN), ledger.records())
    ledger.close()
    again = Ledger.open(place[0], make_policy(), place[1])
    assert (again.head(), again.spent(RUN), again.records()) == before
    with pytest.raises(LedgerConflict):
        again.reserve(RUN, 3)
    again.close()


def test_records_show_the_whole_history(ledger: Ledger) -> None:
    ledger.open_run(RUN, PLAN)
    ledger.reserve(RUN, 1)
    ledger.commit(RUN, 1)
    ledger.close_run(RUN)
    records = ledger.records()
    kinds = [record.body["kind"] for record in records]
    assert kinds == ["genesis", "open_run", "reserve", "commit", "close_run"]
    assert records[-1].hash == ledger.head().head
    assert ledger.head().sequence == 4
    mechanism = {key: records[1].body[key] for key in ("sample_rate", "noise_multiplier", "delta", "unit")}
    assert mechanism == {
        "sample_rate": 0.2,
        "noise_multiplier": 2.0,
        "delta": 1e-5,
        "unit": "example",
    }


def test_opening_a_run_is_idempotent_only_for_the_same_plan(ledger: Ledger) -> None:
    ledger.open_run(RUN, PLAN)
    head = ledger.head()
    ledger.open_run(RUN, PLAN)
    assert ledger.head() == head
    with pytest.raises(LedgerConflict, match="another plan"):
        ledger.open_run(RUN, make_plan(rounds=3))
    ledger.close_run(RUN)
    ledger.close_run(RUN)
    with pytest.raises(LedgerConflict, match="closed"):
        ledger.open_run(RUN, PLAN)


def test_order_is_enforced(ledger: Ledger) -> None:
    with pytest.raises(LedgerConflict, match="does not know"):
        ledger.reserve(RUN, 1)
    with pytest.raises(LedgerConflict, match="does not know"):
        ledger.spent(RUN)
    ledger.open_run(RUN, PLAN)
    for settle in (ledger.commit, ledger.void):
        with pytest.raises(LedgerConflict, match="not reserved"):
            settle(RUN, 2)
    ledger.reserve(RUN, 2)
    for old in (1, 2):
        with pytest.raises(LedgerConflict, match="not above"):
            ledger.reserve(RUN, old)
    ledger.commit(RUN, 2)
    for settle in (ledger.commit, ledger.void):
        with pytest.raises(LedgerConflict, match="already settled"):
            settle(RUN, 2)
    ledger.close_run(RUN)
    for operation in (ledger.reserve, ledger.commit, ledger.void):
        with pytest.raises(LedgerConflict, match="closed"):
            operation(RUN, 3)


def test_a_refused_operation_leaves_no_record(ledger: Ledger) -> None:
    ledger.open_run(RUN, PLAN)
    before = ledger.records()
    with pytest.raises(LedgerConflict):
        ledger.commit(RUN, 1)
    assert ledger.records() == before
    ledger.reserve(RUN, 1)
    assert ledger.head().sequence == len(before)


def test_rounds_and_attempts_are_limited(ledger: Ledger) -> None:
    ledger.open_run(RUN, PLAN)
    for attempt in (1, 2):
        ledger.reserve(RUN, attempt)
        ledger.void(RUN, attempt)
    for attempt in (3, 4, 5, 6):
        ledger.reserve(RUN, attempt)
    with pytest.raises(LedgerConflict, match="rounds"):
        ledger.reserve(RUN, 7)
    ledger.void(RUN, 6)
    with pytest.raises(LedgerConflict, match="attempts"):
        ledger.reserve(RUN, 7)
    assert ledger.spent(RUN).epsilon == epsilon_after(PLAN, 3)


@pytest.mark.parametrize(
    ("budget", "cap"),
    [
        ({"epsilon_total": WHOLE * 0.99, "epsilon_per_run": WHOLE * 0.98}, "epsilon_per_run"),
        ({"delta_total": 9e-6}, "delta_total"),
    ],
)
def test_a_plan_above_a_cap_is_refused_at_the_start(
    place: tuple[Path, Path], budget: dict[str, float], cap: str
) -> None:
    ledger = Ledger.open(place[0], make_policy(**budget), place[1])
    with pytest.raises(BudgetExhausted, match=cap):
        ledger.open_run(RUN, PLAN)
    assert ledger.head().sequence == 0
    ledger.close()


def test_runs_share_one_budget(place: tuple[Path, Path]) -> None:
    total = WHOLE + ledger_cost(2)
    ledger = Ledger.open(place[0], make_policy(epsilon_total=total, epsilon_per_run=WHOLE), place[1])
    ledger.open_run(RUN, PLAN)
    ledger.open_run(OTHER, PLAN)  # nothing is spent yet, so that both are admitted
    for attempt in (1, 2, 3, 4):
        ledger.reserve(RUN, attempt)
    for attempt in (1, 2):
        ledger.reserve(OTHER, attempt)
    with pytest.raises(BudgetExhausted, match="epsilon_total"):
        ledger.reserve(OTHER, 3)
    assert ledger.totals().epsilon == pytest.approx(total)
    with pytest.raises(BudgetExhausted, match="epsilon_total"):
        ledger.open_run("33" * 32, PLAN)
    ledger.close()


def test_deltas_of_runs_add_up(place: tuple[Path, Path]) -> None:
    ledger = Ledger.open(place[0], make_policy(epsilon_total=100.0, delta_total=3e-5), place[1])
    for number in range(3):
        run = f"{number:064x}"
        ledger.open_run(run, PLAN)
        ledger.reserve(run, 1)
    with pytest.raises(BudgetExhausted, match="delta_total"):
        ledger.open_run(RUN, PLAN)
    assert ledger.totals().delta == pytest.approx(3e-5)
    ledger.close()


def test_a_lowered_cap_holds_at_once(ledger: Ledger, place: tuple[Path, Path]) -> None:
    ledger.open_run(RUN, PLAN)
    ledger.reserve(RUN, 1)
    ledger.close()
    strict = make_policy(epsilon_total=ledger_cost(1), epsilon_per_run=ledger_cost(1))
    again = Ledger.open(place[0], strict, place[1])
    with pytest.raises(BudgetExhausted):
        again.reserve(RUN, 2)
    again.close()


def ledger_cost(rounds: int) -> float:
    epsilon = epsilon_after(PLAN, rounds)
    assert epsilon is not None
    return epsilon


def test_runs_without_noise_are_flagged(ledger: Ledger) -> None:
    ledger.open_run(RUN, make_plan(private=False))
    assert ledger.totals().unprotected == ()
    ledger.reserve(RUN, 1)
    assert ledger.spent(RUN).epsilon is None
    assert ledger.totals().unprotected == (RUN,)
    ledger.void(RUN, 1)
    assert ledger.totals().unprotected == ()


def test_files_are_private_and_safely_configured(ledger: Ledger, place: tuple[Path, Path]) -> None:
    ledger.open_run(RUN, PLAN)
    for file in [*place[0].parent.iterdir(), *place[1].parent.iterdir()]:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    connection = ledger._connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_another_dataset_name_is_refused(ledger: Ledger, place: tuple[Path, Path]) -> None:
    with pytest.raises(LedgerConflict, match="another dataset"):
        Ledger.open(place[0], make_policy("ward-8"), place[1])


def test_a_copy_beside_the_ledger_is_refused(tmp_path: Path) -> None:
    for copy in (tmp_path / "ledger.head", tmp_path / "deep" / "ledger.head"):
        with pytest.raises(LedgerConflict, match="outside"):
            Ledger.open(tmp_path / "ledger.db", make_policy(), copy)


def test_an_older_ledger_is_refused(ledger: Ledger, place: tuple[Path, Path], tmp_path: Path) -> None:
    ledger.open_run(RUN, PLAN)
    ledger.close()
    shutil.copy(place[0], tmp_path / "old.db")
    newer = Ledger.open(place[0], make_policy(), place[1])
    newer.reserve(RUN, 1)
    newer.close()
    shutil.copy(tmp_path / "old.db", place[0])
    with pytest.raises(LedgerRollback, match="its copy at 2"):
        Ledger.open(place[0], make_policy(), place[1])


def test_a_fork_of_equal_length_is_refused(
    ledger: Ledger, place: tuple[Path, Path], tmp_path: Path
) -> None:
    ledger.open_run(RUN, PLAN)
    ledger.close()
    twin = Ledger.open(tmp_path / "twin" / "ledger.db", make_policy(), tmp_path / "twin.head")
    twin.open_run(RUN, PLAN)
    twin.close()
    shutil.copy(tmp_path / "twin" / "ledger.db", place[0])
    with pytest.raises(LedgerRollback, match="differs"):
        Ledger.open(place[0], make_policy(), place[1])


def test_a_deleted_ledger_is_refused(ledger: Ledger, place: tuple[Path, Path]) -> None:
    ledger.open_run(RUN, PLAN)
    ledger.close()
    place[0].unlink()
    with pytest.raises(LedgerRollback, match="missing"):
        Ledger.open(place[0], make_policy(), place[1])
    place[0].touch()
    with pytest.raises(LedgerRollback, match="empty"):
        Ledger.open(place[0], make_policy(), place[1])


def test_a_missing_copy_is_refused(ledger: Ledger, place: tuple[Path, Path]) -> None:
    ledger.open_run(RUN, PLAN)
    ledger.close()
    place[1].unlink()
    with pytest.raises(LedgerRollback, match="missing"):
        Ledger.open(place[0], make_policy(), place[1])


def test_a_damaged_copy_is_refused(ledger: Ledger, place: tuple[Path, Path]) -> None:
    ledger.close()
    place[1].write_bytes(place[1].read_bytes()[:-1])
    with pytest.raises(LedgerRollback, match="cannot be read"):
        Ledger.open(place[0], make_policy(), place[1])


def test_records_that_vanish_under_an_open_ledger_are_noticed(
    ledger: Ledger, place: tuple[Path, Path]
) -> None:
    ledger.open_run(RUN, PLAN)
    with sqlite3.connect(place[0]) as intruder:
        intruder.execute("DELETE FROM record WHERE sequence = 1")
    intruder.close()
    with pytest.raises(LedgerRollback, match="gone"):
        ledger.reserve(RUN, 1)


def test_a_rewritten_but_impossible_history_is_corrupt(ledger: Ledger, place: tuple[Path, Path]) -> None:
    """Whoever recomputes the hashes still cannot make a run spend without an opening."""
    from client.entries import link, marking, to_bytes

    genesis = ledger.head().head
    body = to_bytes(marking("reserve", RUN, 1, "train", 0))
    with sqlite3.connect(place[0]) as intruder:
        intruder.execute("INSERT INTO record VALUES (1, ?, ?, ?)", (genesis, body, link(genesis, body)))
    intruder.close()
    with pytest.raises(LedgerCorrupt, match="makes no sense"):
        Ledger.open(place[0], make_policy(), place[1])


def _reserve_many(path: Path, copy: Path, run: str, first: int) -> None:
    ledger = Ledger.open(path, make_policy(epsilon_total=1e3, epsilon_per_run=1e3), copy)
    for attempt in range(first, first + 20):
        ledger.reserve(run, attempt)
        ledger.commit(run, attempt)
    ledger.close()


def test_two_processes_append_to_one_chain(place: tuple[Path, Path]) -> None:
    ledger = Ledger.open(place[0], make_policy(epsilon_total=1e3, epsilon_per_run=1e3), place[1])
    plan = make_plan(rounds=20)
    for run in (RUN, OTHER):
        ledger.open_run(run, plan)
    for rounds in range(21):
        epsilon_after(plan, rounds)  # cached for both children
    ledger.close()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_reserve_many, args=(*place, run, 1)) for run in (RUN, OTHER)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    again = Ledger.open(place[0], make_policy(), place[1])
    assert again.head().sequence == 2 + 2 * 40
    assert again.spent(RUN).sealed == again.spent(OTHER).sealed == 20
    again.close()


def test_two_writers_cannot_both_take_the_last_of_the_budget(place: tuple[Path, Path]) -> None:
    policy = make_policy(epsilon_total=ledger_cost(2), epsilon_per_run=ledger_cost(2))
    first = Ledger.open(place[0], make_policy(epsilon_total=100.0), place[1])
    first.open_run(RUN, PLAN)
    one, two = (Ledger.open(place[0], policy, place[1]) for _ in range(2))
    one.reserve(RUN, 1)
    two.reserve(RUN, 2)
    with pytest.raises(BudgetExhausted):
        one.reserve(RUN, 3)
    with pytest.raises(BudgetExhausted):
        two.reserve(RUN, 3)
    for opened in (first, one, two):
        opened.close()
