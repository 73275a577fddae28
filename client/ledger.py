"""The privacy ledger of one dataset: durable, hash-chained, and never below what was spent.

Every record holds the hash of the one before it. A round is reserved *before* its data is read and
committed before anything leaves the machine; what was reserved and not voided counts as spent, so that
a crash at any point over-counts and never under-counts. A copy of (sequence, head) lies in another
folder and shows when an older ledger was put back.

Guarantee: for every example of the dataset, over all its runs, the privacy loss is at most (sum of the
runs' epsilons, sum of their deltas), a privacy filter for parameters that are chosen after earlier
results (Rogers et al. 2016). A run is priced at the rounds it used, a prefix of its fixed schedule. It
assumes that no run is cut short on the sight of its results (its planned epsilon is then the right
price). A rollback of the ledger together with its copy is noticed by the heads that peers return
(`client.heads`). Records that are lost for good are adopted at a cost that the owner declares.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from client.entries import (
    Adopt,
    AnyEntry,
    CloseRun,
    from_bytes,
    genesis,
    link,
    marking,
    number_after,
    opening,
    to_bytes,
)
from client.ledger_files import LEDGER_FILE, HeadCopy, connect
from client.policy import Policy
from client.spending import Spending, Spent, Totals, planned_cost
from crypto.locks import exclusive
from protocol.encoding import decode
from protocol.errors import (
    DatasetRenamed,
    EncodingInvalid,
    LedgerConflict,
    LedgerCorrupt,
    LedgerRollback,
)
from protocol.messages import LedgerHead, Purpose
from protocol.plan import Plan
from protocol.storage import translated


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


@dataclass(frozen=True)
class Adoption:
    """An owner's declaration of what lost records cost at most; the caps count it as spent.

    Attributes:
        epsilon: At least 0.
        delta: 0 to 1.
        heads: Own heads that peers returned; the ones that the ledger holds are left out.
    """

    epsilon: float
    delta: float
    heads: tuple[LedgerHead, ...] = ()


class Ledger:
    """The privacy ledger of one dataset name; make one with `Ledger.open`.

    All methods may be called from several threads and processes at once. An object must not be used
    on both sides of a fork.
    """

    def __init__(self, path: Path, policy: Policy, head_copy: Path) -> None:
        self._path = path
        self._dataset = policy.dataset
        self._budget = policy.budget
        self._copy = HeadCopy(head_copy, policy.dataset)
        self._lock = threading.Lock()
        self._copied = -1
        self._forget()
        self._connection = connect(path)

    @classmethod
    def open(
        cls, path: Path, policy: Policy, head_copy: Path, *, adoption: Adoption | None = None
    ) -> Ledger:
        """Open or begin the ledger of the policy's dataset, and verify every record.

        Args:
            path: Database file; its folder is made if need be.
            policy: Names the dataset and its caps.
            head_copy: File for (sequence, head), outside the ledger's folder, so that restoring the
                folder from a backup does not restore the copy with it.
            adoption: Go on with a ledger that lost records or its copy, at a declared cost; every run is
                closed. Only on the owner's own command.

        Raises:
            LedgerCorrupt: A record was changed or the file is damaged.
            LedgerRollback: The ledger is behind its copy or differs from it, or one of them is missing.
            DatasetRenamed: The ledger belongs to another dataset name.
            LedgerConflict: The copy's place is wrong, or nothing is missing that could be adopted.
            DiskFull, AccessDenied, DiskFailed, StorageBusy, FileUnusable, ResourcesShort: A file cannot be
                used; nothing is wrong with what it holds.
        """
        if path.resolve().parent in head_copy.resolve().parents:
            raise LedgerConflict("the head copy must lie outside the ledger's folder")
        with translated(LEDGER_FILE):
            for folder in (path.parent, head_copy.parent):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lost = head_copy.exists() and not (path.exists() and path.stat().st_size)
        if lost and adoption is None:
            raise LedgerRollback("the ledger is missing or empty, and its head copy is not")
        ledger = cls(path, policy, head_copy)
        try:
            with ledger._transaction():
                ledger._begin(adoption)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Close the database; everything is durable already."""
        self._connection.close()

    def follow(self, policy: Policy) -> None:
        """Take the caps of a changed policy; they hold from the next reservation on.

        Raises:
            DatasetRenamed: The policy names another dataset.
        """
        if policy.dataset != self._dataset:
            raise DatasetRenamed
        with self._lock:
            self._budget = policy.budget

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
            planned = planned_cost(plan)
            if planned is not None:
                self._spending.require_caps(self._budget, run, planned)
            self._append(opening(run, plan, _now_s()))

    def reserve(self, run: str, attempt: int, purpose: Purpose = "train") -> None:
        """Charge one round or one evaluation, durably, before its data is touched.

        Args:
            run: An open run.
            attempt: A number above every number that the run reserved before.
            purpose: What the attempt is for; each purpose has its own price and its own limit.

        Raises:
            BudgetExhausted: A cap would be exceeded.
            LedgerConflict: The number is not new, or the run is closed or used up.
        """
        with self._transaction():
            cost = self._spending.open_run(run).cost_with(purpose)
            if cost is not None:
                self._spending.require_caps(self._budget, run, cost)
            self._append(marking("reserve", run, attempt, purpose, _now_s()))

    def commit(self, run: str, attempt: int) -> None:
        """Record, before the update is sealed, that a reserved attempt is going to be released.

        Raises:
            LedgerConflict: The attempt is not reserved, or settled already.
        """
        self._settle(run, attempt, "commit")

    def void(self, run: str, attempt: int) -> None:
        """Refund a reserved attempt; only after its update was erased, and if nothing left the node.

        Raises:
            LedgerConflict: The attempt is not reserved, or settled already.
        """
        self._settle(run, attempt, "void")

    def _settle(self, run: str, attempt: int, kind: Literal["commit", "void"]) -> None:
        with self._transaction():
            purpose = self._spending.open_run(run).purpose(attempt)
            self._append(marking(kind, run, attempt, purpose, _now_s()))

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
            return self._current_head()

    def holds(self, head: LedgerHead) -> bool:
        """Tell whether a head is one of this chain's, or of lost records that the owner adopted."""
        with self._current():
            return self._holds(head)

    def records(self) -> list[LedgerRecord]:
        """Return all records, oldest first."""
        with self._current():
            rows = self._connection.execute("SELECT sequence, hash, body FROM record ORDER BY sequence")
            return [LedgerRecord(sequence, digest, decode(body)) for sequence, digest, body in rows]

    # --- inside: every method below runs under the lock -------------------------------------------------

    @contextmanager
    def _current(self) -> Iterator[None]:
        with self._lock:
            self._catch_up()
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # The file lock also keeps the head copies of two processes in the order of their records.
        with self._lock, exclusive(self._path.with_name(self._path.name + ".lock")):
            with self._immediate():
                self._catch_up()
                yield
            if self._sequence != self._copied:
                self._copy.write(self._current_head())
                self._copied = self._sequence

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

    def _begin(self, adoption: Adoption | None) -> None:
        if self._sequence >= 0 and self._spending.dataset != self._dataset:
            raise DatasetRenamed
        if adoption is None:
            self._compare(self._copy.read())
        if self._sequence < 0:
            self._append(genesis(self._dataset, _now_s()))
        if adoption is not None:
            self._adopt(adoption)

    def _adopt(self, adoption: Adoption) -> None:
        try:
            copied = self._copy.read()
        except LedgerRollback:
            copied = None
        known = {head for head in (copied, *adoption.heads) if head is not None}
        lost = sorted(
            (head for head in known if not self._holds(head)), key=lambda head: (head.sequence, head.head)
        )
        if not lost and (copied is not None or self._sequence == 0):
            raise LedgerConflict("nothing is missing, so that there is nothing to adopt")
        costs = adoption.epsilon, adoption.delta
        if not (0.0 <= costs[0] < math.inf and 0.0 <= costs[1] <= 1.0):
            raise LedgerConflict("the declared cost is not an epsilon and a delta")
        self._append(Adopt(heads=lost, epsilon=costs[0], delta=costs[1], time_s=_now_s()))

    def _compare(self, copied: LedgerHead | None) -> None:
        if copied is None:
            # A lone genesis without a copy is a crash at the very first step, and holds no spending.
            if self._sequence > 0:
                raise LedgerRollback("the head copy is missing")
            return
        if self._sequence < 0:
            raise LedgerRollback("the ledger is empty and its head copy is not")
        if not self._holds(copied):
            if copied.sequence > self._sequence:
                raise LedgerRollback(f"it ends at {self._sequence}, its copy at {copied.sequence}")
            raise LedgerRollback(f"it differs from its head copy at {copied.sequence}")
        self._copied = copied.sequence

    def _holds(self, head: LedgerHead) -> bool:
        row = self._connection.execute(
            "SELECT hash FROM record WHERE sequence = ?", (head.sequence,)
        ).fetchone()
        return row == (head.head,) or self._spending.acknowledges(head)

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
        if not follows or previous != self._head:
            raise LedgerCorrupt(f"record {sequence} does not follow from the one before")
        try:
            entry = from_bytes(body)
            self._spending.apply(entry)
        except (EncodingInvalid, ValidationError, LedgerConflict):
            raise LedgerCorrupt(f"record {sequence} makes no sense at its place") from None
        if sequence != number_after(self._sequence, entry):
            raise LedgerCorrupt(f"record {sequence} has another number than its place")
        self._sequence, self._head = sequence, digest

    def _current_head(self) -> LedgerHead:
        return LedgerHead(sequence=self._sequence, head=self._head or "")

    def _append(self, entry: AnyEntry) -> None:
        self._spending.apply(entry)
        body = to_bytes(entry)
        previous, self._head = self._head, link(self._head, body)
        self._sequence = number_after(self._sequence, entry)
        self._connection.execute(
            "INSERT INTO record (sequence, previous, body, hash) VALUES (?, ?, ?, ?)",
            (self._sequence, previous, body, self._head),
        )


def _now_s() -> int:
    return int(time.time())
