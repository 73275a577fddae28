"""Flip, cut, swap, copy and delete the files of a ledger: it opens unchanged, or not at all."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from test_ledger_crash import PLAN, POLICY, RUN
from test_ledger_power import folder, place, put

from client.entries import link
from client.ledger import Ledger
from client.policy import Policy
from protocol.encoding import decode, encode
from protocol.errors import LedgerConflict, LedgerCorrupt, LedgerRollback

__all__ = ["folder"]

REFUSALS = (LedgerCorrupt, LedgerRollback, LedgerConflict)


def policy(dataset: str) -> Policy:
    return POLICY.model_copy(update={"dataset": dataset})


def opened(folder: Path, dataset: str = "ward-7") -> Ledger:
    return Ledger.open(place(folder)[0], policy(dataset), place(folder)[1])


def content(folder: Path, dataset: str = "ward-7") -> Any:
    ledger = opened(folder, dataset)
    try:
        return ledger.records(), ledger.head(), ledger.totals()
    finally:
        ledger.close()


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.rglob("ledger.*")
        if path.is_file() and not path.name.endswith(("-shm", ".lock"))
    }


def begin(folder: Path, dataset: str = "ward-7", attempts: int = 4) -> dict[str, bytes]:
    """Make a ledger whose last records are in the write-ahead log only; returns its files."""
    first = opened(folder, dataset)
    first.open_run(RUN, PLAN)
    for attempt in range(1, attempts):
        first.reserve(RUN, attempt)
        first.commit(RUN, attempt)
    first.close()
    last = opened(folder, dataset)
    last.reserve(RUN, attempts)
    found = files(folder)
    last.close()
    return found


@pytest.fixture
def unclean(folder: Path) -> dict[str, bytes]:
    """Files of a ledger whose process was killed: database, log and head copy."""
    found = begin(folder / "made")
    assert set(found) == {"ledger.db", "ledger.db-wal", "ledger.head"}
    return found


def closed(folder: Path, unclean: dict[str, bytes], dataset: str = "ward-7") -> dict[str, bytes]:
    """Return the files after the ledger was opened and closed, without a write-ahead log."""
    put(folder / "trial", unclean)
    content(folder / "trial", dataset)
    found = files(folder / "trial")
    assert set(found) == {"ledger.db", "ledger.head"}
    return found


def refused_or_same(folder: Path, damaged: dict[str, bytes], expected: Any) -> bool:
    put(folder, damaged)
    try:
        found = content(folder)
    except REFUSALS:
        return True
    assert found == expected
    return False


def flip_bytes(folder: Path, clean: dict[str, bytes], name: str, positions: list[int]) -> int:
    """Flip one bit at each position; returns how many of the damaged ledgers were refused."""
    put(folder / "trial", clean)
    expected = content(folder / "trial")
    bits, refused = random.Random(name), 0
    for position in positions:
        damaged = bytearray(clean[name])
        damaged[position] ^= 1 << bits.randrange(8)
        refused += refused_or_same(folder / "trial", clean | {name: bytes(damaged)}, expected)
    return refused


def test_a_bit_flip_is_refused_or_harmless(folder: Path, unclean: dict[str, bytes]) -> None:
    for clean, name in ((closed(folder, unclean), "ledger.db"), (unclean, "ledger.db-wal")):
        positions = random.Random(2).sample(range(len(clean[name])), 120)
        assert flip_bytes(folder, clean, name, sorted(positions)) > 0


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_bit_flip_of_any_byte_is_refused_or_harmless(folder: Path, unclean: dict[str, bytes]) -> None:
    for clean, name in ((closed(folder, unclean), "ledger.db"), (unclean, "ledger.db-wal")):
        assert flip_bytes(folder, clean, name, list(range(len(clean[name])))) > 0


def test_a_bit_flip_of_any_byte_of_the_copy_is_refused(folder: Path, unclean: dict[str, bytes]) -> None:
    size = len(unclean["ledger.head"])
    assert flip_bytes(folder, unclean, "ledger.head", list(range(size))) == size


def test_a_bit_flip_in_a_record_on_the_disk_is_refused(folder: Path, unclean: dict[str, bytes]) -> None:
    """Every field of every record: what is counted is never what a damaged byte says."""
    clean = closed(folder, unclean)
    database, positions = clean["ledger.db"], list[int]()
    for record in content(folder / "trial")[0]:
        body = encode(record.body)
        start = database.index(body)
        positions += range(start, start + len(body))
    sampled = random.Random(4).sample(positions, 200)
    assert flip_bytes(folder, clean, "ledger.db", sampled) == len(sampled)


def test_a_cut_file_is_refused_or_harmless(folder: Path, unclean: dict[str, bytes]) -> None:
    for clean in (closed(folder, unclean), unclean):
        put(folder / "trial", clean)
        expected, refused = content(folder / "trial"), 0
        cuts = [
            (name, size)
            for name, data in clean.items()
            for size in range(0, len(data), max(1, len(data) // 25))
        ]
        for name, size in cuts:
            damaged = clean | {name: clean[name][:size]}
            refused += refused_or_same(folder / "trial", damaged, expected)
        assert refused > len(cuts) // 2


@pytest.mark.parametrize("name", ["ledger.db", "ledger.db-wal", "ledger.head"])
def test_a_deleted_file_is_refused(folder: Path, unclean: dict[str, bytes], name: str) -> None:
    if name == "ledger.db":
        unclean = closed(folder, unclean)
    put(folder / "trial", {other: data for other, data in unclean.items() if other != name})
    with pytest.raises(LedgerRollback):
        content(folder / "trial")


@pytest.mark.parametrize(
    "swapped",
    [
        ("ledger.db-wal",),
        ("ledger.head",),
        ("ledger.db", "ledger.db-wal"),
        ("ledger.db-wal", "ledger.head"),
        ("ledger.db", "ledger.db-wal", "ledger.head"),
    ],
)
def test_files_of_another_dataset_are_refused(
    folder: Path, unclean: dict[str, bytes], swapped: tuple[str, ...]
) -> None:
    other = begin(folder / "other", "ward-8", attempts=6)
    put(folder / "trial", unclean | {name: other[name] for name in swapped})
    with pytest.raises(REFUSALS):
        content(folder / "trial")
    mine, foreign = closed(folder, unclean), closed(folder, other, "ward-8")
    if swapped != ("ledger.db-wal",):
        put(folder / "trial", mine | {name: foreign[name] for name in swapped if name in foreign})
        with pytest.raises(REFUSALS):
            content(folder / "trial")


@pytest.mark.parametrize("older", [("ledger.db", "ledger.db-wal"), ("ledger.db",)])
def test_files_of_an_earlier_time_are_refused(
    folder: Path, older: tuple[str, ...], unclean: dict[str, bytes]
) -> None:
    put(folder / "trial", unclean)
    for attempt in (5, 6):
        ledger = opened(folder / "trial")
        ledger.reserve(RUN, attempt)
        ledger.close()
    newer = files(folder / "trial")
    put(folder / "trial", newer | {name: unclean[name] for name in older if name in unclean})
    with pytest.raises(REFUSALS):
        content(folder / "trial")


def test_every_field_of_every_record_is_bound_to_the_chain(folder: Path) -> None:
    """Whoever also recomputes the record's own hash breaks the next link, or leaves the head copy."""
    begin(folder / "made")
    records = content(folder / "made")[0]
    clean = files(folder / "made")
    changes = 0
    for previous, record in zip([None, *(one.hash for one in records)], records, strict=False):
        for field, value in record.body.items():
            changed = encode(record.body | {field: _other(value)})
            assert changed != encode(record.body)
            put(folder / "trial", clean)
            _rewrite(place(folder / "trial")[0], record.sequence, changed, previous)
            with pytest.raises(REFUSALS):
                content(folder / "trial")
            changes += 1
    assert changes > 40


def _other(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return 0.5
    if isinstance(value, int | float):
        return value + 1
    return value[:-1] + ("0" if value[-1] != "0" else "1")


def _rewrite(path: Path, sequence: int, body: bytes, previous: str | None) -> None:
    assert decode(body)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(
        "UPDATE record SET body = ?, hash = ? WHERE sequence = ?", (body, link(previous, body), sequence)
    )
    connection.close()


def test_a_ledger_that_is_copied_away_and_spent_from_does_not_come_back(folder: Path) -> None:
    """A copy is a second ledger of the same budget; its records are refused beside the first's copy."""
    begin(folder / "made")
    shutil.copytree(folder / "made", folder / "clone")
    for name, attempts in (("made", (5,)), ("clone", (5, 6))):
        ledger = opened(folder / name)
        for attempt in attempts:
            ledger.reserve(RUN, attempt)
        if name == "clone":
            ledger.commit(RUN, 6)
        ledger.close()
    mixed = files(folder / "made") | {"ledger.db": files(folder / "clone")["ledger.db"]}
    put(folder / "trial", mixed)
    with pytest.raises(LedgerRollback):
        content(folder / "trial")


def test_damage_that_sqlite_quotes_in_its_error_is_a_coded_error(
    folder: Path, unclean: dict[str, bytes]
) -> None:
    clean = closed(folder, unclean)
    damaged = clean["ledger.db"].replace(b"INTEGER PRIMARY KEY", b"INTEGER PRIMARY\xc5KEY")
    assert damaged != clean["ledger.db"]
    put(folder / "trial", clean | {"ledger.db": damaged})
    with pytest.raises(LedgerCorrupt):
        content(folder / "trial")
