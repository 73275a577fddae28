"""The coordinator's run store: one folder per run, with everything that must outlive a process.

``run.db`` (SQLite, WAL, synchronous=FULL) holds rounds, owners, events, refusals and the transcript;
``checkpoint-NNNN.safetensors`` holds the global model and the optimizer's memory. A checkpoint is complete
on disk before the transaction that makes its round count; that one transaction holds all else that the
next round builds on. Whatever a crash leaves behind is therefore the state after some finished round, plus
attempts that have begun: those are void from the start and stay so unless they finish.

One process at a time may carry a run out; it holds ``run.lock``. Nothing in here is private: the
coordinator never has anything private.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from crypto.auditlog import AuditLog, short_facts
from crypto.locks import take
from protocol.errors import CheckpointInvalid, FileDamaged, PlanInvalid, RunBusy, RunFailed
from protocol.messages import Purpose
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from protocol.storage import connect, translated
from server.checkpoints import read_checkpoint, write_checkpoint
from server.home import digits_of

RUN_FILE = "the record of a run (run.db)"
_LOCK_POLL_S = 0.1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS attempts (
    attempt INTEGER PRIMARY KEY, purpose TEXT NOT NULL, round INTEGER NOT NULL, void INTEGER NOT NULL,
    facts TEXT NOT NULL, sums BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS owners (fingerprint TEXT PRIMARY KEY, facts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, time TEXT NOT NULL, kind TEXT NOT NULL,
    facts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS refusals (id INTEGER PRIMARY KEY, owner TEXT NOT NULL, kind TEXT NOT NULL,
    code TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS transcript (
    direction TEXT NOT NULL, kind TEXT NOT NULL, content TEXT NOT NULL, count INTEGER NOT NULL,
    total_bytes INTEGER NOT NULL, min_bytes INTEGER NOT NULL, max_bytes INTEGER NOT NULL,
    PRIMARY KEY (direction, kind, content)
);
CREATE TABLE IF NOT EXISTS ciphertexts (
    sha256 BLOB PRIMARY KEY, times INTEGER NOT NULL
) WITHOUT ROWID;
"""


RESUMABLE: Final = ("submitted", "running", "paused")
"""States of a run that can go on; the others are `finished` and `failed`."""


def now_text() -> str:
    """Return the current time as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class RunStore:
    """One run's folder.

    Args:
        folder: Created if missing.
        log: The coordinator's log of acts, which gets every protocol act of the run; None for simulations.

    Every method raises `FileDamaged` where `run.db` does not hold what was written, and the other errors
    of `protocol.storage` where the disk or another process is in the way; what was stored is intact then.
    """

    def __init__(self, folder: Path, log: AuditLog | None = None) -> None:
        with translated(str(folder)):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder
        self._log = log
        self._database = connect(folder / "run.db", f"{RUN_FILE} of {folder.name}")
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.executescript(_SCHEMA)
        self._lock: int | None = None

    @classmethod
    def existing(cls, folder: Path, log: AuditLog | None = None) -> RunStore:
        """Open the folder of a run that was prepared; arguments as of the class.

        Raises:
            FileDamaged: Its record is empty; nothing is written to it then.
        """
        with translated(str(folder)):
            if not (folder / "run.db").stat().st_size:
                raise FileDamaged(f"{RUN_FILE} of {folder.name} is empty")
        return cls(folder, log)

    def close(self) -> None:
        """Close the database, and let another process carry the run out."""
        self._database.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def digits(self) -> str:
        """The first digits of the run's identifier, which end the folder's name."""
        return digits_of(self.folder.name)

    # --- who carries the run out -------------------------------------------------------------------

    def claim(self, wait_s: float = 0.0) -> None:
        """Become the one process that carries the run out, until `close` or the end of the process.

        Args:
            wait_s: Longest wait for a process that is about to end.

        Raises:
            RunBusy: Another process carries it out.
        """
        if self._lock is not None:
            return
        with translated("run.lock"):
            descriptor = os.open(self.folder / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait_s
        while not take(descriptor):
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise RunBusy
            time.sleep(_LOCK_POLL_S)
        self._lock = descriptor
        self.set("claims", self.get("claims", 0) + 1)

    def is_carried_out(self) -> bool:
        """Tell whether some process carries the run out now; the kernel forgets processes that died."""
        if self._lock is not None:
            return True
        with translated("run.lock"):
            try:
                descriptor = os.open(self.folder / "run.lock", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
        try:
            return not take(descriptor)
        finally:
            os.close(descriptor)

    # --- facts of the run --------------------------------------------------------------------------

    def set(self, key: str, value: Any) -> None:
        """Record one fact of the run as JSON."""
        self._database.execute(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value, allow_nan=False))
        )

    def get(self, key: str, default: Any = None) -> Any:
        """Return a fact of the run."""
        row = self._database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return default if row is None else self._parsed(row[0])

    def plan(self) -> Plan:
        """Return the run's resolved plan.

        Raises:
            RunFailed: The folder holds no run.
        """
        fields = self.get("plan")
        if fields is None:
            raise RunFailed("the run folder holds no plan")
        try:
            return Plan.from_fields(fields)
        except PlanInvalid:
            raise FileDamaged(f"{RUN_FILE} of {self.folder.name}: the plan in it is none") from None

    def _parsed(self, text: Any) -> Any:
        try:
            return json.loads(text)
        except (ValueError, TypeError, RecursionError):
            raise FileDamaged(f"{RUN_FILE} of {self.folder.name}: a fact in it is not JSON") from None

    def event(self, kind: str, **facts: Any) -> None:
        """Append an event; facts are public and small."""
        self._database.execute(
            "INSERT INTO events (time, kind, facts) VALUES (?, ?, ?)",
            (now_text(), kind, json.dumps(facts, allow_nan=False)),
        )
        self._act(kind, facts)

    def _act(self, kind: str, facts: dict[str, Any]) -> None:
        """Chain an act of the protocol into the coordinator's log."""
        if self._log is not None:
            self._log.append("coordinator", f"run.{kind}", run=self.folder.name, **short_facts(facts))

    def events(self, after: int = 0) -> Iterator[tuple[int, str, str, dict[str, Any]]]:
        """Yield (id, time, kind, facts) of events with a larger id."""
        rows = self._database.execute(
            "SELECT id, time, kind, facts FROM events WHERE id > ? ORDER BY id", (after,)
        ).fetchall()
        for identifier, moment, kind, facts in rows:
            yield identifier, moment, kind, self._parsed(facts)

    def refuse(self, owner: str, kind: str, code: str) -> None:
        """Record that an owner answered an error code."""
        self._database.execute(
            "INSERT INTO refusals (owner, kind, code) VALUES (?, ?, ?)", (owner, kind, code)
        )
        self._act("refusal", {"owner": owner, "exchange": kind, "code": code})

    def refusals(self) -> list[dict[str, str]]:
        """Return all recorded refusals."""
        rows = self._database.execute("SELECT owner, kind, code FROM refusals ORDER BY id").fetchall()
        return [{"owner": owner, "kind": kind, "code": code} for owner, kind, code in rows]

    def transfer(self, direction: str, kind: str, content: str, size_bytes: int) -> None:
        """Count one transferred part; its content is not kept."""
        self._database.execute(
            "INSERT INTO transcript VALUES (?, ?, ?, 1, ?, ?, ?) "
            "ON CONFLICT (direction, kind, content) DO UPDATE SET count = count + 1, "
            "total_bytes = total_bytes + excluded.total_bytes, "
            "min_bytes = min(min_bytes, excluded.min_bytes), "
            "max_bytes = max(max_bytes, excluded.max_bytes)",
            (direction, kind, content, size_bytes, size_bytes, size_bytes),
        )

    def transcript(self) -> list[dict[str, Any]]:
        """Return what was transferred, by direction, kind and content."""
        names = ["direction", "kind", "content", "count", "total_bytes", "min_bytes", "max_bytes"]
        rows = self._database.execute("SELECT * FROM transcript ORDER BY 1 DESC, 2, 3").fetchall()
        return [dict(zip(names, row, strict=True)) for row in rows]

    def note_ciphertexts(self, digests: Iterable[bytes]) -> None:
        """Count encrypted frames that arrived, by their SHA-256; the frames are not kept."""
        with self.transaction():
            self._database.executemany(
                "INSERT INTO ciphertexts VALUES (?, 1) "
                "ON CONFLICT (sha256) DO UPDATE SET times = times + 1",
                ((one,) for one in digests),
            )

    def ciphertexts(self) -> tuple[int, int]:
        """Return how many encrypted frames arrived, and how many of them had arrived before."""
        total, repeated = self._database.execute(
            "SELECT COALESCE(SUM(times), 0), COALESCE(SUM(times - 1), 0) FROM ciphertexts"
        ).fetchone()
        return int(total), int(repeated)

    # --- owners and rounds -------------------------------------------------------------------------

    def put_owner(self, fingerprint: str, facts: dict[str, Any]) -> None:
        """Record what is known of an owner."""
        self._database.execute(
            "INSERT OR REPLACE INTO owners VALUES (?, ?)", (fingerprint, json.dumps(facts))
        )

    def owners(self) -> dict[str, dict[str, Any]]:
        """Return what is known of all owners, by fingerprint."""
        rows = self._database.execute("SELECT fingerprint, facts FROM owners ORDER BY 1").fetchall()
        return {fingerprint: self._parsed(facts) for fingerprint, facts in rows}

    def void_attempt(
        self, attempt: int, purpose: Purpose, round_number: int, facts: dict[str, Any]
    ) -> None:
        """Record an attempt that has not led to an opened sum; every attempt begins as one."""
        self._database.execute(
            "INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, 1, ?, x'')",
            (attempt, purpose, round_number, json.dumps(facts, allow_nan=False)),
        )

    def finish_evaluation(
        self, attempt: int, round_number: int, facts: dict[str, Any], sums: bytes
    ) -> None:
        """Record the evaluation of a finished round's model."""
        self._database.execute(
            "INSERT OR REPLACE INTO attempts VALUES (?, 'evaluate', ?, 0, ?, ?)",
            (attempt, round_number, json.dumps(facts, allow_nan=False), sums),
        )
        self._opened("evaluate", attempt, round_number, facts)

    def finish_round(
        self,
        attempt: int,
        round_number: int,
        facts: dict[str, Any],
        sums: bytes,
        model: GlobalModel,
    ) -> None:
        """Make a round count, with the hash of its model, whose checkpoint must be written before."""
        with self.transaction():
            self._database.execute(
                "INSERT OR REPLACE INTO attempts VALUES (?, 'train', ?, 0, ?, ?)",
                (attempt, round_number, json.dumps(facts, allow_nan=False), sums),
            )
            self.set("model_hash", model.sha256())
        self._opened("train", attempt, round_number, {**facts, "model_hash": model.sha256()})

    def _opened(self, purpose: Purpose, attempt: int, round_number: int, facts: dict[str, Any]) -> None:
        named = {name: facts.get(name) for name in ("sums_hash", "model_hash", "contributors")}
        self._act("opening", {"purpose": purpose, "attempt": attempt, "round": round_number, **named})

    def last_attempt(self) -> int:
        """Return the highest attempt number that was ever begun, 0 before the first."""
        (number,) = self._database.execute("SELECT COALESCE(MAX(attempt), 0) FROM attempts").fetchone()
        return int(number)

    def attempts(self) -> list[dict[str, Any]]:
        """Return the facts of all attempts in order, each with attempt, purpose, round and void."""
        rows = self._database.execute(
            "SELECT attempt, purpose, round, void, facts FROM attempts ORDER BY attempt"
        ).fetchall()
        return [
            {
                "attempt": attempt,
                "purpose": purpose,
                "round": number,
                "void": bool(void),
                **self._parsed(facts),
            }
            for attempt, purpose, number, void, facts in rows
        ]

    def rounds(self) -> list[dict[str, Any]]:
        """Return the facts of all finished rounds in order, evaluations left out."""
        return [one for one in self.attempts() if one["purpose"] == "train" and not one["void"]]

    def sums(self, round_number: int) -> bytes:
        """Return the opened sums of a finished round."""
        row = self._database.execute(
            "SELECT sums FROM attempts WHERE purpose = 'train' AND round = ? AND void = 0",
            (round_number,),
        ).fetchone()
        if row is None:
            raise RunFailed(f"round {round_number} is not finished")
        return bytes(row[0])

    def finished_rounds(self) -> int:
        """Return the number of finished rounds."""
        (count,) = self._database.execute(
            "SELECT COUNT(*) FROM attempts WHERE purpose = 'train' AND void = 0"
        ).fetchone()
        return int(count)

    def write_checkpoint(self, round_number: int, model: GlobalModel) -> None:
        """Write a model so that a crash leaves either the old state or the new one.

        The file also says which plan, round and model it holds.

        Raises:
            DiskFull, AccessDenied, DiskFailed, FileUnusable, ResourcesShort: It cannot be written.
        """
        said = self._said_of(round_number, model)
        write_checkpoint(self._checkpoint(round_number), model, said)

    def read_checkpoint(self, round_number: int) -> GlobalModel:
        """Return the model after a round; round 0 is the initial model.

        Raises:
            CheckpointInvalid: There is no such file, it is damaged, or it is of another round or plan.
            AccessDenied, DiskFailed, ResourcesShort: It cannot be read.
        """
        model, metadata = read_checkpoint(self._checkpoint(round_number))
        if metadata != self._said_of(round_number, model):
            raise CheckpointInvalid
        return model

    def has_checkpoint(self, round_number: int) -> bool:
        """Tell whether a model was written for a round; only reading it tells whether it is sound."""
        return self._checkpoint(round_number).exists()

    def _said_of(self, round_number: int, model: GlobalModel) -> dict[str, str]:
        """Return what a checkpoint says of the model that it holds."""
        return {
            "plan_hash": str(self.get("plan_hash", "")),
            "round": str(round_number),
            "model_hash": model.sha256(),
        }

    def _checkpoint(self, round_number: int) -> Path:
        return self.folder / f"checkpoint-{round_number:04d}.safetensors"

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write everything in the block, or nothing of it; blocks may stand in one another."""
        if self._database.in_transaction:
            yield
            return
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            # SQLite has ended some failed transactions itself; one that stayed open would take in the next
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
