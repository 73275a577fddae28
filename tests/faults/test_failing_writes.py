"""Writes that fail, or that another process made: nothing is lost, and the next one is whole."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import pytest

from client.state import RunState
from client.store import StateStore
from crypto.vault import StorageBox
from protocol.messages import JoinReply, Signed
from protocol.storage import STORAGE_FAULTS
from server.store import RunStore

_MANY_PAGES: Final = 2**30


@contextmanager
def full(database: sqlite3.Connection, _table: str) -> Iterator[None]:
    """Let no page be added, as on a full disk."""
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    try:
        yield
    finally:
        database.execute(f"PRAGMA max_page_count = {_MANY_PAGES}")


@contextmanager
def uncommitted(database: sqlite3.Connection, table: str) -> Iterator[None]:
    """Let the commit fail of every transaction that writes a row of the table; SQLite leaves it open."""
    database.execute("PRAGMA foreign_keys = ON")
    database.execute("CREATE TABLE ground (id INTEGER PRIMARY KEY)")
    database.execute("CREATE TABLE air (id REFERENCES ground (id) DEFERRABLE INITIALLY DEFERRED)")
    database.execute(
        f"CREATE TRIGGER unfounded AFTER INSERT ON {table} BEGIN INSERT INTO air VALUES (1); END"
    )
    try:
        yield
    finally:
        for what in ("TRIGGER unfounded", "TABLE air", "TABLE ground"):
            database.execute(f"DROP {what}")


Fault = Callable[[sqlite3.Connection, str], AbstractContextManager[None]]
FAULTS = pytest.mark.parametrize("fault", [full, uncommitted])
RUN = "a" * 64


def member(number: int) -> JoinReply:
    body = {"ledger": {"head": "c" * 64, "sequence": number}, "padding": "x" * 40_000}
    join = Signed(kind="join", body=body, signer=f"{number:064x}", signature=b"signature")
    return JoinReply(certificate=b"certificate", join=join)


@FAULTS
def test_the_state_of_an_owner_after_a_write_that_failed(fault: Fault, tmp_path: Path) -> None:
    """What the store remembers of its file is as old as the file."""
    box, path = StorageBox(secrets.token_bytes(32)), tmp_path / "state.db"
    store = StateStore(path, box)
    members = [member(number) for number in range(4)]
    first = state_of(members[:2])
    store.save(first)
    later = first.with_changes(members=members, round=1)
    heads = [one.join for one in members]
    with fault(store._database, "members"), pytest.raises(STORAGE_FAULTS):
        store.save(later, heads=heads)
    assert store.find(RUN) == first
    store.save(later, heads=heads)
    store.close()
    again = StateStore(path, box)
    assert again.find(RUN) == later
    assert again.heads(one.signer for one in heads) == {one.signer: one for one in heads}
    again.close()


def state_of(members: list[JoinReply]) -> RunState:
    return RunState(run=RUN, plan={}, stage="rostered", join=members[0], nonce="b" * 64, members=members)


def test_what_another_process_wrote_is_not_overwritten_from_memory(tmp_path: Path) -> None:
    """Two nodes on one home, by accident: neither takes its memory of the file for the file."""
    box, path = StorageBox(secrets.token_bytes(32)), tmp_path / "state.db"
    one, other = StateStore(path, box), StateStore(path, box)
    few, many = [member(0), member(1)], [member(number) for number in range(4)]
    ours = state_of(few)
    one.save(ours, heads=[head(5)])
    other.save(state_of(many), heads=[head(9)])
    one.save(ours.with_changes(round=1), heads=[head(7)])
    assert other.find(RUN) == one.find(RUN) == ours.with_changes(round=1)
    assert other.heads(["d" * 64]) == {"d" * 64: head(9)}
    one.close()
    other.close()


def head(sequence: int) -> Signed:
    ledger = {"ledger": {"head": "c" * 64, "sequence": sequence}}
    return Signed(kind="ready", body=ledger, signer="d" * 64, signature=b"signature")


@FAULTS
def test_the_store_of_a_run_after_a_write_that_failed(fault: Fault, tmp_path: Path) -> None:
    """What comes after the failure is written by itself, and for good."""
    store = RunStore(tmp_path / "run")
    store.set("state", "running")
    with fault(store._database, "meta"), pytest.raises(STORAGE_FAULTS), store.transaction():
        store.set("lost", "x" * 1_000_000)
    store.set("state", "paused")
    store.close()
    again = RunStore(tmp_path / "run")
    assert (again.get("state"), again.get("lost")) == ("paused", None)
    again.close()
