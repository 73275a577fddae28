"""Kill the process, flip bits, cut records off, put old files back: the ledger never under-counts."""

import os
import random
import select
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from client.ledger import Adoption, Ledger
from client.ledger_files import HeadCopy
from client.policy import Policy
from protocol.accounting import epsilon_after
from protocol.errors import LedgerCorrupt, LedgerRollback
from protocol.plan import Plan

RUN = "11" * 32
ROUNDS = 40
POLICY = Policy.model_validate(
    {
        "dataset": "ward-7",
        "data_file": "records.npz",
        "budget": {"epsilon_total": 1e3, "epsilon_per_run": 1e3, "delta_total": 1e-3},
        "plans": {"tasks": ["image-classification"], "models": ["linear"]},
    }
)
PLAN = Plan.from_fields(
    {
        "run": {"name": "unit", "rounds": ROUNDS, "spare_attempts": 5},
        "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": 8},
        "training": {"local_steps": 2, "learning_rate": 0.5},
        "privacy": {
            "target_epsilon": 8.0,
            "noise_multiplier": 4.0,
            "sample_rate": 0.2,
            "expected_batch_size": 48.0,
        },
    }
)


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "ledger" / "ledger.db", tmp_path / "identity" / "ledger.head"


@pytest.fixture(scope="module", autouse=True)
def _prices() -> None:
    """Fill the cache before any child is forked."""
    for rounds in range(ROUNDS + 1):
        epsilon_after(PLAN, rounds)


def open_ledger(place: tuple[Path, Path]) -> Ledger:
    return Ledger.open(place[0], POLICY, place[1])


def begin(place: tuple[Path, Path], attempts: int) -> None:
    ledger = open_ledger(place)
    ledger.open_run(RUN, PLAN)
    for attempt in range(1, attempts + 1):
        ledger.reserve(RUN, attempt)
        ledger.commit(RUN, attempt)
    ledger.close()


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; returns how it ended, as `os.waitstatus_to_exitcode` does."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly:
    """A connection that dies just before or just after it executes a given statement."""

    def __init__(self, connection: sqlite3.Connection, statement: str, after: bool) -> None:
        self._connection, self._statement, self._after = connection, statement, after

    def execute(self, sql: str, *arguments: object) -> object:
        hit = sql.startswith(self._statement)
        if hit and not self._after:
            die()
        result = self._connection.execute(sql, *arguments)
        if hit:
            die()
        return result

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)


def die_at_statement(ledger: Ledger, statement: str, after: bool) -> None:
    ledger._connection = Deadly(ledger._connection, statement, after)


def die_at_copy(_ledger: Ledger) -> None:
    HeadCopy.write = die


def die_at_rename(_ledger: Ledger) -> None:
    Path.replace = die


POINTS: dict[str, Callable[[Ledger], None]] = {
    "before the transaction": lambda ledger: die_at_statement(ledger, "BEGIN", after=False),
    "inside the transaction": lambda ledger: die_at_statement(ledger, "INSERT", after=True),
    "before the commit": lambda ledger: die_at_statement(ledger, "COMMIT", after=False),
    "after the commit": lambda ledger: die_at_statement(ledger, "COMMIT", after=True),
    "before the head copy": die_at_copy,
    "inside the head copy": die_at_rename,
}


@pytest.mark.parametrize("operation", ["reserve", "commit", "void"])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_step_never_under_counts(
    place: tuple[Path, Path], point: str, operation: str
) -> None:
    begin(place, 2)

    def work() -> None:
        ledger = open_ledger(place)
        if operation != "reserve":
            ledger.reserve(RUN, 3)
        POINTS[point](ledger)
        getattr(ledger, operation)(RUN, 3)

    assert in_child(work) == -signal.SIGKILL
    ledger = open_ledger(place)
    spent = ledger.spent(RUN)
    durable = "after the commit" in point or "head copy" in point
    assert spent.sealed == 2 + (operation == "commit" and durable)
    if operation == "reserve":
        # Data is read only after reserve returned, so that both outcomes are right.
        assert spent.reserved == int(durable)
    else:
        assert spent.sealed + spent.reserved == 3 - (operation == "void" and durable)
    assert spent.epsilon == epsilon_after(PLAN, spent.sealed + spent.reserved)
    ledger.reserve(RUN, 4)
    ledger.close()
    open_ledger(place).close()


@pytest.mark.parametrize("point", ["after the commit", "before the head copy", "inside the head copy"])
def test_a_kill_before_the_very_first_copy_can_be_repeated(place: tuple[Path, Path], point: str) -> None:
    def work() -> None:
        original = Ledger._begin

        def armed(ledger: Ledger, adoption: Adoption | None) -> None:
            POINTS[point](ledger)
            original(ledger, adoption)

        Ledger._begin = armed
        open_ledger(place)

    assert in_child(work) == -signal.SIGKILL
    assert not place[1].exists()
    ledger = open_ledger(place)
    assert ledger.head().sequence == 0
    ledger.close()
    assert place[1].exists()


def test_kills_at_random_times_lose_nothing_that_was_acknowledged(place: tuple[Path, Path]) -> None:
    begin(place, 0)
    moments = random.Random(7)
    attempt = acknowledged = 0
    for number in range(12):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                _reserve_until_killed(place, attempt + 1, writer)
            finally:
                os._exit(99)
        os.close(writer)
        if number % 2:
            assert select.select([reader], [], [], 60.0)[0], "nothing was ever reserved"
        time.sleep(moments.uniform(0.005, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            received = len(pipe.read())
        assert received or number % 2 == 0
        acknowledged += received
        ledger = open_ledger(place)
        spent = ledger.spent(RUN)
        assert spent.sealed + spent.reserved >= acknowledged
        attempt = spent.sealed + spent.reserved + spent.void
        ledger.close()


def _reserve_until_killed(place: tuple[Path, Path], attempt: int, writer: int) -> None:
    ledger = open_ledger(place)
    while True:
        if ledger.spent(RUN).sealed + ledger.spent(RUN).reserved >= ROUNDS:
            time.sleep(1.0)
        ledger.reserve(RUN, attempt)
        os.write(writer, b".")
        ledger.commit(RUN, attempt)
        attempt += 1
        time.sleep(0.01)


def rows(path: Path) -> list[tuple[int, str | None, bytes, str]]:
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT sequence, previous, body, hash FROM record ORDER BY sequence")
    result = found.fetchall()
    connection.close()
    return result


def change(path: Path, sql: str, *arguments: object) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(sql, arguments)
    connection.close()


def test_a_bit_flip_anywhere_in_a_body_is_found(place: tuple[Path, Path]) -> None:
    begin(place, 2)
    bits = random.Random(11)
    for sequence, _, body, _ in rows(place[0]):
        for position in bits.sample(range(len(body)), 12):
            flipped = bytearray(body)
            flipped[position] ^= 1 << bits.randrange(8)
            change(place[0], "UPDATE record SET body = ? WHERE sequence = ?", bytes(flipped), sequence)
            with pytest.raises(LedgerCorrupt, match=f"record {sequence}"):
                open_ledger(place)
        change(place[0], "UPDATE record SET body = ? WHERE sequence = ?", body, sequence)
    open_ledger(place).close()


def test_a_flipped_hash_or_link_is_found(place: tuple[Path, Path]) -> None:
    begin(place, 2)
    for column in ("hash", "previous"):
        original = rows(place[0])[3][1 if column == "previous" else 3]
        assert original is not None
        wrong = ("0" if original[0] != "0" else "1") + original[1:]
        change(place[0], f"UPDATE record SET {column} = ? WHERE sequence = 3", wrong)
        with pytest.raises(LedgerCorrupt):
            open_ledger(place)
        change(place[0], f"UPDATE record SET {column} = ? WHERE sequence = 3", original)
    open_ledger(place).close()


def test_random_damage_to_the_file_is_found_or_harmless(place: tuple[Path, Path], tmp_path: Path) -> None:
    begin(place, 6)
    ledger = open_ledger(place)
    expected = (ledger.head(), ledger.spent(RUN))
    ledger.close()
    clean = place[0].read_bytes()
    bits = random.Random(5)
    found = 0
    for _ in range(150):
        damaged = bytearray(clean)
        damaged[bits.randrange(len(clean))] ^= 1 << bits.randrange(8)
        place[0].write_bytes(bytes(damaged))
        try:
            opened = open_ledger(place)
        except (LedgerCorrupt, LedgerRollback):
            found += 1
            continue
        try:
            assert (opened.head(), opened.spent(RUN)) == expected
        finally:
            opened.close()
            for side in ("-wal", "-shm"):
                place[0].with_name(place[0].name + side).unlink(missing_ok=True)
    assert found > 0


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_records_cut_off_the_end_are_missed(place: tuple[Path, Path], cut: int) -> None:
    begin(place, 3)
    last = rows(place[0])[-1][0]
    change(place[0], "DELETE FROM record WHERE sequence > ?", last - cut)
    with pytest.raises(LedgerRollback):
        open_ledger(place)


def test_a_record_taken_out_of_the_middle_is_missed(place: tuple[Path, Path]) -> None:
    begin(place, 3)
    change(place[0], "DELETE FROM record WHERE sequence = 3")
    with pytest.raises(LedgerCorrupt):
        open_ledger(place)


def test_an_old_copy_of_the_whole_folder_is_refused(place: tuple[Path, Path], tmp_path: Path) -> None:
    begin(place, 2)
    shutil.copytree(place[0].parent, tmp_path / "backup")
    ledger = open_ledger(place)
    ledger.reserve(RUN, 3)
    ledger.close()
    shutil.rmtree(place[0].parent)
    shutil.copytree(tmp_path / "backup", place[0].parent)
    with pytest.raises(LedgerRollback):
        open_ledger(place)


def test_an_old_head_copy_is_fine_and_is_brought_up_to_date(
    place: tuple[Path, Path], tmp_path: Path
) -> None:
    begin(place, 2)
    shutil.copy(place[1], tmp_path / "old.head")
    ledger = open_ledger(place)
    ledger.reserve(RUN, 3)
    ledger.close()
    newest = place[1].read_bytes()
    shutil.copy(tmp_path / "old.head", place[1])
    open_ledger(place).close()
    assert place[1].read_bytes() == newest
