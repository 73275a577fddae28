"""The privacy ledger of one dataset: durable, hash-chained, and never below what was spent.

Every record holds the hash of the one before it. A round is reserved *before* its data is read and
committed before anything leaves the machine; what was reserved and not voided counts as spent, so that
a crash at any point over-counts and never under-counts. A copy of (sequence, head) lies in another
folder and shows when an older ledger was put back.

Guarantee: for every example of the dataset, over all its runs, the privacy loss is at most (sum of the
runs' epsilons, sum of their deltas), a privacy filter for parameters that are chosen after earlier
results (Rogers et al. 2016). A run is priced at the rounds it used, a prefix of its fixed schedule. It
assumes that no run is cut short on the sight of its results (its planned epsilon is then the right
price), and that nobody rewrites the ledger and its copy together.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from client.policy import Policy
from client.spending import (
    AnyEntry,
    Attempt,
    CloseRun,
    Spending,
    Spent,
    Totals,
    from_bytes,
    genesis,
    link,
    opening,
    to_bytes,
)
from protocol.accounting import epsilon_after
from protocol.encoding import decode
from protocol.errors import EncodingInvalid, LedgerConflict, LedgerCorrupt, LedgerRollback
from protocol.messages import LedgerHead, Message
from protocol.plan import Name, Plan

BUSY_TIMEOUT_S = 30.0
"""Longest wait for another process that holds the database."""

_SCHEMA = """CREATE TABLE IF NOT EXISTS record (
    sequence INTEGER PRIMARY KEY,
    previous TEXT UNIQUE REFERENCES record (hash),
    body BLOB NOT NULL,
    hash TEXT NOT NULL UNIQUE
) STRICT"""


@dataclass(frozen=True)
class LedgerRecord:
    """One record as `ledger show` prints it.

    Attributes:
        sequence: Position, from 0.
        hash: SHA-256 over the previous hash and the body.
        body: Kind, time in seconds since 1970, and the kind's fields.
    """

    sequence: int
    hash: str
    body: dict[str, Any]


class _HeadCopy(Message):
    dataset: Name
    ledger: LedgerHead


class Ledger:
    """The privacy ledger of one dataset name; make one with `Ledger.open`.

    All methods may be called from several threads and processes at once. An object must not be used
    on both sides of a fork.
    """

    def __init__(self, path: Path, policy: Policy, head_copy: Path) -> None:
        self._path = path
        self._dataset = policy.dataset
        self._budget = policy.budget
        self._copy = head_copy
        self._lock = threading.Lock()
        self._copied = -1
        self._forget()
        with _sqlite_translated():
            self._connection = _connect(path)

    @classmethod
    def open(cls, path: Path, policy: Policy, head_copy: Path, *, adopt: bool = False) -> Ledger:
        """Open or begin the ledger of the policy's dataset, and verify every record.

        Args:
            path: Database file; its folder is made if need be.
            policy: Names the dataset and its caps.
            head_copy: File for (sequence, head), outside the ledger's folder, so that restoring the
                folder from a backup does not restore the copy with it.
            adopt: Accept a ledger whose copy is missing, for an owner who moves it on purpose.

        Raises:
            LedgerCorrupt: A record was changed or the file is damaged.
            LedgerRollback: The ledger is behind its copy or differs from it, or one of them is missing.
            LedgerConflict: The ledger belongs to another dataset name, or the copy's place is wrong.
        """
        if path.resolve().parent in head_copy.resolve().parents:
            raise LedgerConflict("the head copy must lie outside the ledger's folder")
        for folder in (path.parent, head_copy.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if head_copy.exists() and not path.exists():
            raise LedgerRollback("the ledger is missing and its head copy is not")
        ledger = cls(path, policy, head_copy)
        try:
            with ledger._transaction():
                ledger._begin(adopt)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Close the database; everything is durable already."""
        self._connection.close()

    def open_run(self, run: str, plan: Plan) -> None:
        """Record a run's mechanism, if the caps hold all its planned rounds; repeating it does nothing.

        Args:
            run: Digest that names the run.
            plan: The resolved plan.

        Raises:
            BudgetExhausted: The planned epsilon or delta does not fit beside what other runs spent.
            LedgerConflict: The run is known with another plan, or closed.
        """
        with self._transaction():
            if run in self._spending.runs:
                if self._spending.open_run(run).opened.plan_hash != plan.sha256():
                    raise LedgerConflict("the run was opened with another plan")
                return
            planned = epsilon_after(plan, plan.paid_rounds)
            if planned is not None:
                self._spending.require_caps(self._budget, run, planned, plan.privacy.delta)
            self._append(opening(run, plan, _now_s()))

    def reserve(self, run: str, attempt: int) -> None:
        """Charge one round, durably, before its data is touched.

        Args:
            run: An open run.
            attempt: A number above every number that the run reserved before.

        Raises:
            BudgetExhausted: A cap would be exceeded.
            LedgerConflict: The number is not new, or the run is closed or used up.
        """
        with self._transaction():
            entry = self._spending.open_run(run)
            epsilon = entry.epsilon(entry.charged() + 1)
            if epsilon is not None:
                self._spending.require_caps(self._budget, run, epsilon, entry.opened.delta)
            self._append(Attempt(kind="reserve", run=run, attempt=attempt, time_s=_now_s()))

    def commit(self, run: str, attempt: int) -> None:
        """Record, before the update is sealed, that a reserved attempt is going to be released.

        Raises:
            LedgerConflict: The attempt is not reserved, or settled already.
        """
        with self._transaction():
            self._append(Attempt(kind="commit", run=run, attempt=attempt, time_s=_now_s()))

    def void(self, run: str, attempt: int) -> None:
        """Refund a reserved attempt; only after its update was erased, and if nothing left the node.

        Raises:
            LedgerConflict: The attempt is not reserved, or settled already.
        """
        with self._transaction():
            self._append(Attempt(kind="void", run=run, attempt=attempt, time_s=_now_s()))

    def close_run(self, run: str) -> None:
        """Let a run spend nothing more; repeating it does nothing.

        Raises:
            LedgerConflict: The run is not known.
        """
        with self._transaction():
            if not self._spending.run(run).closed:
                self._append(CloseRun(run=run, time_s=_now_s()))

    def spent(self, run: str) -> Spent:
        """Return what one run cost so far.

        Raises:
            LedgerConflict: The run is not known.
        """
        with self._current():
            return self._spending.run(run).spent()

    def totals(self) -> Totals:
        """Return what all runs cost so far."""
        with self._current():
            return self._spending.totals()

    def head(self) -> LedgerHead:
        """Return number and hash of the last record, as an owner signs them."""
        with self._current():
            return LedgerHead(sequence=self._sequence, head=self._head or "")

    def records(self) -> list[LedgerRecord]:
        """Return all records, oldest first."""
        with self._current():
            rows = self._connection.execute("SELECT sequence, hash, body FROM record ORDER BY sequence")
            return [LedgerRecord(sequence, digest, decode(body)) for sequence, digest, body in rows]

    # --- inside: every method below runs under the lock -------------------------------------------------

    @contextmanager
    def _current(self) -> Iterator[None]:
        with self._lock, _sqlite_translated():
            self._catch_up()
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # The file lock also keeps the head copies of two processes in the order of their records.
        with self._lock, _exclusive(self._path.with_name(self._path.name + ".lock")):
            with _sqlite_translated(), self._immediate():
                self._catch_up()
                yield
            if self._sequence != self._copied:
                self._write_copy()

    @contextmanager
    def _immediate(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # What is remembered may be ahead of the file now; the next call verifies from the start.
            self._forget()
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _begin(self, adopt: bool) -> None:
        copy = self._read_copy()
        if self._sequence < 0:
            if copy is not None:
                raise LedgerRollback("the ledger is empty and its head copy is not")
            self._append(genesis(self._dataset, _now_s()))
            return
        if self._spending.dataset != self._dataset:
            raise LedgerConflict("the ledger was begun for another dataset name")
        if copy is None:
            # A lone genesis without a copy is a crash at the very first step, and holds no spending.
            if self._sequence > 0 and not adopt:
                raise LedgerRollback("the head copy is missing")
        else:
            self._compare(copy)

    def _compare(self, copy: _HeadCopy) -> None:
        if copy.dataset != self._dataset:
            raise LedgerRollback("the head copy belongs to another dataset name")
        if copy.ledger.sequence > self._sequence:
            raise LedgerRollback(f"it ends at {self._sequence}, its copy at {copy.ledger.sequence}")
        row = self._connection.execute(
            "SELECT hash FROM record WHERE sequence = ?", (copy.ledger.sequence,)
        ).fetchone()
        if row != (copy.ledger.head,):
            raise LedgerRollback(f"it differs from its head copy at {copy.ledger.sequence}")
        self._copied = copy.ledger.sequence

    def _forget(self) -> None:
        self._spending = Spending()
        self._sequence = -1
        self._head: str | None = None

    def _catch_up(self) -> None:
        """Verify and apply every record that is not known yet; the last known one must still be there."""
        rows = self._connection.execute(
            "SELECT sequence, previous, body, hash FROM record WHERE sequence >= ? ORDER BY sequence",
            (self._sequence,),
        )
        if self._sequence >= 0:
            last = rows.fetchone()
            if last is None or last[3] != self._head:
                raise LedgerRollback("records that were read before have gone")
        for sequence, previous, body, digest in rows:
            self._accept(sequence, previous, body, digest)

    def _accept(self, sequence: int, previous: str | None, body: bytes, digest: str) -> None:
        follows = isinstance(body, bytes) and digest == link(self._head, body)
        if not follows or (sequence, previous) != (self._sequence + 1, self._head):
            raise LedgerCorrupt(f"record {sequence} does not follow from the one before")
        try:
            self._spending.apply(from_bytes(body))
        except (EncodingInvalid, ValidationError, LedgerConflict):
            raise LedgerCorrupt(f"record {sequence} makes no sense at its place") from None
        self._sequence, self._head = sequence, digest

    def _append(self, entry: AnyEntry) -> None:
        self._spending.apply(entry)
        body = to_bytes(entry)
        previous, self._head = self._head, link(self._head, body)
        self._sequence += 1
        self._connection.execute(
            "INSERT INTO record (sequence, previous, body, hash) VALUES (?, ?, ?, ?)",
            (self._sequence, previous, body, self._head),
        )

    def _read_copy(self) -> _HeadCopy | None:
        try:
            return _HeadCopy.from_bytes(self._copy.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, EncodingInvalid):
            raise LedgerRollback("the head copy cannot be read") from None

    def _write_copy(self) -> None:
        head = LedgerHead(sequence=self._sequence, head=self._head or "")
        try:
            _write_durably(self._copy, _HeadCopy(dataset=self._dataset, ledger=head).to_bytes())
        except OSError:
            raise LedgerConflict("the head copy cannot be written") from None
        self._copied = self._sequence


def _now_s() -> int:
    return int(time.time())


def _connect(path: Path) -> sqlite3.Connection:
    # Made here, because SQLite would make the file readable for others; its side files inherit the mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    try:
        for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {setting}").fetchall()
        connection.execute(_SCHEMA)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


@contextmanager
def _sqlite_translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None) or "an error"
        if name.startswith("SQLITE_BUSY"):
            raise LedgerConflict("another process holds the ledger") from None
        raise LedgerCorrupt(f"SQLite reports {name}") from None


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
