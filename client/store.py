"""An owner's durable protocol state: rows per run, sealed, plus the answers it has given.

Everything that a repeated request or a restart needs is written before an answer leaves the node.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from client.ledger_files import create_private
from client.state import Answer, RunState
from crypto.vault import StorageBox
from protocol.encoding import decode, digest_bytes, encode
from protocol.errors import FileDamaged, SecretUnavailable, SessionMismatch
from protocol.messages import JoinReply, LedgerHead, Signed
from protocol.optimizers import GlobalModel
from protocol.storage import connect

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, session TEXT UNIQUE, state BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS members (run TEXT PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS models (
    run TEXT NOT NULL, vector INTEGER NOT NULL, part INTEGER NOT NULL, content BLOB NOT NULL,
    PRIMARY KEY (run, vector, part)
);
CREATE TABLE IF NOT EXISTS answers (
    run TEXT NOT NULL, request TEXT NOT NULL, attempt INTEGER NOT NULL,
    body BLOB NOT NULL, blob BLOB NOT NULL, PRIMARY KEY (run, request)
);
CREATE TABLE IF NOT EXISTS heads (owner TEXT PRIMARY KEY, message BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS holdout (dataset TEXT PRIMARY KEY, key BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS shown (head TEXT PRIMARY KEY, message BLOB NOT NULL);
"""
STATE_FILE = "this owner's protocol state (state.db)"
_STATE_LIMIT_BYTES = 64 * 1024 * 1024
_MODEL_PART = 4 * 1024 * 1024
"""Values of a model in one row: SQLite takes no row of a gigabyte, and sealing holds a row in memory."""


class _KeptMembers(NamedTuple):
    """What the members' row of a run holds: what grows most with the owners, and rarely changes."""

    run: str
    members: list[JoinReply]
    digest: str


class StateStore:
    """SQLite store of `RunState` rows and answers.

    Args:
        path: Database file; created with mode 0600.
        box: Seals each state row; the owner's storage key never touches the disk.

    Every method raises `FileDamaged` where the file does not hold what was written, and the other errors
    of `protocol.storage` where the disk or another process is in the way; what was stored is intact then.
    """

    def __init__(self, path: Path, box: StorageBox) -> None:
        create_private(path, STATE_FILE)
        self._box = box
        # the newest state of the run at hand, by its sealed bytes: opening and parsing it takes long
        self._newest: tuple[bytes, RunState] | None = None
        self._members: _KeptMembers | None = None
        # sequence of the head that is kept of each owner, as far as it was looked up
        self._sequences: dict[str, int] = {}
        self._version = 0
        self._database = connect(path, STATE_FILE)
        # rows are models and frames of megabytes, which take half the time in larger pages
        self._database.execute("PRAGMA page_size=16384")
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.execute("PRAGMA secure_delete=ON")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the database."""
        self._newest = None
        self._database.close()

    def find(self, run: str) -> RunState | None:
        """Return the state of a run, or None if the owner never joined it."""
        row = self._database.execute("SELECT run, state FROM runs WHERE run = ?", (run,)).fetchone()
        return None if row is None else self._open_state(*row)

    def by_session(self, session: str) -> RunState:
        """Return the state of the run with this session.

        Raises:
            SessionMismatch: This owner is in no such session.
        """
        row = self._database.execute("SELECT run, state FROM runs WHERE session = ?", (session,)).fetchone()
        if row is None:
            raise SessionMismatch("this owner is not in the named session")
        return self._open_state(*row)

    def model(self, run: str) -> GlobalModel:
        """Return the global model that this owner has computed so far."""
        vectors = [self._vector(run, vector) for vector in range(3)]
        weights = vectors[0]
        rest = (moment if moment.size else np.zeros_like(weights) for moment in vectors[1:])
        return GlobalModel(weights, *rest)

    def model_size(self, run: str) -> int:
        """Return the number of values of the global model; its content is not read."""
        rows, last = self._database.execute(
            "SELECT COUNT(*), MAX(part) FROM models WHERE run = ? AND vector = 0", (run,)
        ).fetchone()
        if rows == 0:
            return 0
        (sealed,) = self._database.execute(
            "SELECT content FROM models WHERE run = ? AND vector = 0 AND part = ?", (run, last)
        ).fetchone()
        content = self._unsealed(sealed, _model_label(run, 0, last))
        return int(last) * _MODEL_PART + len(content) // 8

    def _vector(self, run: str, vector: int) -> NDArray[np.float64]:
        rows = self._database.execute(
            "SELECT part, content FROM models WHERE run = ? AND vector = ? ORDER BY part", (run, vector)
        )
        parts = [self._unsealed(sealed, _model_label(run, vector, part)) for part, sealed in rows]
        return np.concatenate([np.zeros(0), *(np.frombuffer(part, dtype="<f8") for part in parts)])

    def _write_model(self, run: str, model: GlobalModel) -> None:
        """Write a model row by row; a moment that is zero, as those of plain averaging are, takes none.

        Rows keep their length, so that SQLite writes over the old ones in place.
        """
        for vector, values in enumerate((model.weights, model.first_moment, model.second_moment)):
            if vector > 0 and not values.any():
                self._database.execute("DELETE FROM models WHERE run = ? AND vector = ?", (run, vector))
                continue
            for part, start in enumerate(range(0, values.size, _MODEL_PART)):
                content = values[start : start + _MODEL_PART].astype("<f8").tobytes()
                sealed = self._box.seal(content, _model_label(run, vector, part))
                self._database.execute(
                    "INSERT INTO models VALUES (?, ?, ?, ?) "
                    "ON CONFLICT (run, vector, part) DO UPDATE SET content = excluded.content",
                    (run, vector, part, sealed),
                )

    def answer(self, run: str, request: str) -> Answer | None:
        """Return what was answered to a byte-identical request, if anything."""
        row = self._database.execute(
            "SELECT body, blob FROM answers WHERE run = ? AND request = ?", (run, request)
        ).fetchone()
        return None if row is None else Answer(*row)

    def save(
        self,
        state: RunState,
        *,
        model: GlobalModel | None = None,
        request: str | None = None,
        attempt: int = 0,
        answer: Answer | None = None,
        heads: Sequence[Signed] = (),
    ) -> None:
        """Write a state, and optionally its model and the answer to a request, in one transaction.

        Answers of earlier attempts are dropped: the coordinator cannot need them any more. Of each signer
        in `heads`, the message with the highest ledger head is kept.
        """
        fields = state.model_dump(mode="json", exclude={"members"})
        with self._transaction():
            # bound by its digest: an older members' row beside a newer state does not open
            fields["members"] = self._write_members(state)
            sealed = self._box.seal(encode(fields), b"state/" + state.run.encode())
            self._database.execute(
                "INSERT INTO runs (run, session, state) VALUES (?, ?, ?) "
                "ON CONFLICT (run) DO UPDATE SET session = excluded.session, state = excluded.state",
                (state.run, state.session, sealed),
            )
            if model is not None:
                self._write_model(state.run, model)
            if request is not None and answer is not None:
                self._database.execute(
                    "DELETE FROM answers WHERE run = ? AND attempt > 0 AND attempt < ?",
                    (state.run, attempt),
                )
                self._database.execute(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)",
                    (state.run, request, attempt, answer.body, answer.blob),
                )
            self._keep_highest(heads)
        self._newest = (sealed, state)
        # the log would keep earlier states, with keys that this one has erased
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def keep_answer(self, run: str, request: str, attempt: int, answer: Answer) -> None:
        """Write the answer to a request that may come, where the state has not changed."""
        with self._transaction():
            self._database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)",
                (run, request, attempt, answer.body, answer.blob),
            )

    def holdout_key(self, dataset: str) -> bytes:
        """Return the secret key that decides which records of a dataset are held out; for the owner only.

        The first call draws it; it stays the same for all runs on the dataset.
        """
        context = b"holdout/" + dataset.encode()
        with self._transaction():
            fresh = self._box.seal(secrets.token_bytes(32), context)
            self._database.execute("INSERT OR IGNORE INTO holdout VALUES (?, ?)", (dataset, fresh))
            (sealed,) = self._database.execute(
                "SELECT key FROM holdout WHERE dataset = ?", (dataset,)
            ).fetchone()
        return self._unsealed(sealed, context)

    def heads(self, owners: Iterable[str]) -> dict[str, Signed]:
        """Return the message with the highest ledger head that was kept of each owner."""
        found = {}
        for owner in owners:
            row = self._database.execute("SELECT message FROM heads WHERE owner = ?", (owner,)).fetchone()
            if row is not None:
                found[owner] = self._open_message(row[0], "heads/" + owner)
        return found

    def shown(self) -> list[Signed]:
        """Return this owner's own messages that were returned and whose heads its ledger did not hold."""
        rows = self._database.execute("SELECT head, message FROM shown ORDER BY head").fetchall()
        return [self._open_message(message, "shown/" + head) for head, message in rows]

    def keep_shown(self, messages: Sequence[Signed]) -> None:
        """Keep such messages for good: only a ledger that holds their heads answers them."""
        with self._transaction():
            for message in messages:
                head = LedgerHead.of(message).head
                sealed = self._box.seal(message.to_bytes(), b"shown/" + head.encode())
                self._database.execute("INSERT OR IGNORE INTO shown VALUES (?, ?)", (head, sealed))

    def _write_members(self, state: RunState) -> str:
        """Write the members' row, unless it holds this very list; return the digest of its content.

        A list of members is never changed: a state that has others has another list.
        """
        known = self._members
        if known is None or known.run != state.run or known.members is not state.members:
            content = encode([member.model_dump(mode="json") for member in state.members])
            known = _KeptMembers(state.run, state.members, digest_bytes(content))
            self._database.execute(
                "INSERT OR REPLACE INTO members VALUES (?, ?)",
                (state.run, self._box.seal(content, b"members/" + state.run.encode())),
            )
            self._members = known
        return known.digest

    def _read_members(self, run: str, digest: str) -> Any:
        row = self._database.execute("SELECT content FROM members WHERE run = ?", (run,)).fetchone()
        content = self._unsealed(b"" if row is None else row[0], b"members/" + run.encode())
        if digest_bytes(content) != digest:
            raise FileDamaged(f"{STATE_FILE}: the stored members are not those of the stored state")
        return decode(content, _STATE_LIMIT_BYTES)

    def _keep_highest(self, messages: Sequence[Signed]) -> None:
        for message in messages:
            sequence = LedgerHead.of(message).sequence
            if self._kept_sequence(message.signer) < sequence:
                sealed = self._box.seal(message.to_bytes(), b"heads/" + message.signer.encode())
                self._database.execute(
                    "INSERT OR REPLACE INTO heads VALUES (?, ?)", (message.signer, sealed)
                )
                self._sequences[message.signer] = sequence

    def _kept_sequence(self, owner: str) -> int:
        if owner not in self._sequences:
            known = self.heads([owner]).get(owner)
            self._sequences[owner] = -1 if known is None else LedgerHead.of(known).sequence
        return self._sequences[owner]

    def _unsealed(self, sealed: object, label: bytes) -> bytes:
        try:
            if isinstance(sealed, bytes):
                return self._box.open(sealed, label)
        except SecretUnavailable:
            pass
        raise FileDamaged(f"{STATE_FILE}, or identity/storage.salt: a value does not open")

    def _open_message(self, sealed: bytes, label: str) -> Signed:
        return Signed.from_bytes(self._unsealed(sealed, label.encode()))

    def _open_state(self, run: str, sealed: bytes) -> RunState:
        if self._newest is not None and (self._newest[0], self._newest[1].run) == (sealed, run):
            return self._newest[1]
        plain = self._unsealed(sealed, b"state/" + run.encode())
        fields = decode(plain, _STATE_LIMIT_BYTES)
        digest = fields["members"]
        if isinstance(digest, str):  # earlier versions kept the members in the state itself
            fields["members"] = self._read_members(run, digest)
        state = RunState.from_fields(fields)
        if isinstance(digest, str):
            self._members = _KeptMembers(run, state.members, digest)
        self._newest = (sealed, state)
        return state

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._look_for_others()
            yield
            self._database.execute("COMMIT")
        except BaseException:
            # what is remembered may not be in the file; SQLite has ended some failed transactions itself
            self._forget()
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def _look_for_others(self) -> None:
        """Forget what is remembered of the file if another process has written to it."""
        (version,) = self._database.execute("PRAGMA data_version").fetchone()
        if version != self._version:
            self._forget()
            self._version = version

    def _forget(self) -> None:
        self._sequences.clear()
        self._members = None


def _model_label(run: str, vector: int, part: int) -> bytes:
    return f"model/{run}/{vector}/{part}".encode()
