"""An owner goes on after records were lost: at a declared cost, and never by itself."""

import shutil
from pathlib import Path

import pytest
from test_ledger import PLAN, RUN, make_policy

from client.ledger import Adoption, Ledger
from protocol.errors import BudgetExhausted, LedgerConflict, LedgerCorrupt, LedgerRollback
from protocol.messages import LedgerHead

COST = Adoption(epsilon=2.5, delta=1e-6)


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "ledger" / "ledger.db", tmp_path / "identity" / "ledger.head"


def opened(place: tuple[Path, Path], adoption: Adoption | None = None, **budget: float) -> Ledger:
    return Ledger.open(place[0], make_policy(**budget), place[1], adoption=adoption)


@pytest.fixture
def backup(place: tuple[Path, Path], tmp_path: Path) -> LedgerHead:
    """A ledger that was put back to before two rounds; returns the head that was lost."""
    ledger = opened(place)
    ledger.open_run(RUN, PLAN)
    ledger.close()
    shutil.copytree(place[0].parent, tmp_path / "backup")
    ledger = opened(place)
    for attempt in (1, 2):
        ledger.reserve(RUN, attempt)
        ledger.commit(RUN, attempt)
    lost = ledger.head()
    ledger.close()
    shutil.rmtree(place[0].parent)
    shutil.copytree(tmp_path / "backup", place[0].parent)
    return lost


def test_a_backup_goes_on_at_the_declared_cost(place: tuple[Path, Path], backup: LedgerHead) -> None:
    with pytest.raises(LedgerRollback, match="its copy at 5"):
        opened(place)
    ledger = opened(place, COST)
    assert (ledger.totals().epsilon, ledger.totals().delta) == (2.5, 1e-6)
    assert ledger.totals().epsilon_worst == 2.5
    assert ledger.holds(backup)
    assert ledger.head().sequence == backup.sequence + 1
    with pytest.raises(LedgerConflict, match="closed"):
        ledger.reserve(RUN, 3)
    ledger.close()
    again = opened(place)
    assert again.totals().epsilon == 2.5
    again.close()


def test_caps_count_what_was_declared(place: tuple[Path, Path], backup: LedgerHead) -> None:
    opened(place, Adoption(epsilon=9.9, delta=0.0)).close()
    ledger = opened(place)
    with pytest.raises(BudgetExhausted, match="epsilon_total"):
        ledger.open_run("22" * 32, PLAN)
    ledger.close()


def test_a_head_that_peers_returned_is_adopted(place: tuple[Path, Path]) -> None:
    ledger = opened(place)
    ledger.open_run(RUN, PLAN)
    ledger.close()
    shown = LedgerHead(sequence=40, head="ab" * 32)
    ledger = opened(place, Adoption(epsilon=1.0, delta=0.0, heads=(shown,)))
    assert ledger.holds(shown)
    assert ledger.head().sequence == 41
    assert not ledger.holds(LedgerHead(sequence=40, head="cd" * 32))
    ledger.close()


@pytest.mark.parametrize("damage", ["missing copy", "unreadable copy", "missing ledger", "empty ledger"])
def test_whatever_is_missing_needs_an_adoption(place: tuple[Path, Path], damage: str) -> None:
    ledger = opened(place)
    ledger.open_run(RUN, PLAN)
    ledger.close()
    if damage == "missing copy":
        place[1].unlink()
    elif damage == "unreadable copy":
        place[1].write_bytes(b"{")
    else:
        place[0].unlink()
        if damage == "empty ledger":
            place[0].touch()
    with pytest.raises(LedgerRollback):
        opened(place)
    opened(place, COST).close()
    ledger = opened(place)
    assert ledger.totals().epsilon == 2.5
    ledger.close()


def test_nothing_is_adopted_where_nothing_is_missing(place: tuple[Path, Path]) -> None:
    with pytest.raises(LedgerConflict, match="nothing is missing"):
        opened(place, COST)
    ledger = opened(place)
    ledger.open_run(RUN, PLAN)
    own = ledger.head()
    ledger.close()
    with pytest.raises(LedgerConflict, match="nothing is missing"):
        opened(place, Adoption(epsilon=0.0, delta=0.0, heads=(own,)))
    ledger = opened(place)
    assert ledger.head() == own
    ledger.close()


def test_a_backup_of_before_the_adoption_is_refused_again(
    place: tuple[Path, Path], backup: LedgerHead, tmp_path: Path
) -> None:
    opened(place, COST).close()
    shutil.rmtree(place[0].parent)
    shutil.copytree(tmp_path / "backup", place[0].parent)
    with pytest.raises(LedgerRollback, match="its copy at 6"):
        opened(place)


def test_the_copy_of_another_dataset_is_never_adopted(place: tuple[Path, Path], tmp_path: Path) -> None:
    other = (tmp_path / "other" / "ledger.db", tmp_path / "other.head")
    Ledger.open(other[0], make_policy("ward-8"), other[1]).close()
    opened(place).close()
    shutil.copy(other[1], place[1])
    for adoption in (None, COST):
        with pytest.raises(LedgerConflict, match="another dataset"):
            opened(place, adoption)


@pytest.mark.parametrize("cost", [(-0.1, 0.0), (float("inf"), 0.0), (float("nan"), 0.0), (1.0, 1.1)])
def test_an_impossible_cost_is_refused(
    place: tuple[Path, Path], backup: LedgerHead, cost: tuple[float, float]
) -> None:
    with pytest.raises(LedgerConflict, match="cost"):
        opened(place, Adoption(*cost))
    with pytest.raises(LedgerRollback):
        opened(place)


def test_an_adoption_with_another_number_is_corrupt(place: tuple[Path, Path], backup: LedgerHead) -> None:
    import sqlite3

    opened(place, COST).close()
    with sqlite3.connect(place[0]) as intruder:
        intruder.execute("UPDATE record SET sequence = 3 WHERE sequence = 6")
    intruder.close()
    with pytest.raises(LedgerCorrupt, match="number"):
        opened(place)
