"""The files of a ledger: its database, its lock, and the copy of its head in another folder.

The copy shows when an older ledger was put back. It is written after the ledger's own commit, so that
after a crash it may be behind the ledger and is never ahead of it.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from protocol.errors import EncodingInvalid, LedgerConflict, LedgerCorrupt, LedgerRollback
from protocol.messages import LedgerHead, Message
from protocol.sections import Name

BUSY_TIMEOUT_S = 30.0
"""Longest wait for another process that holds the database."""

_SCHEMA = """CREATE TABLE IF NOT EXISTS record (
    sequence INTEGER PRIMARY KEY,
    previous TEXT UNIQUE REFERENCES record (hash),
    body BLOB NOT NULL,
    hash TEXT NOT NULL UNIQUE
) STRICT"""


def connect(path: Path) -> sqlite3.Connection:
    """Open or make the database of a ledger; what it commits outlasts a loss of power."""
    create_private(path)
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    try:
        for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {setting}").fetchall()
        connection.execute(_SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def create_private(path: Path) -> None:
    """Make an empty database file of mode 0600, durably, unless there is one.

    SQLite would make it readable for others; its side files inherit the mode. The file is linked to its
    name after it was closed: closing a file drops all locks that this process has on it, those of another
    connection too, and then another process takes away the log under that connection.
    """
    if path.exists():
        return
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    os.close(descriptor)
    try:
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
    sync_folder(path.parent)


@contextmanager
def sqlite_translated() -> Iterator[None]:
    """Raise LedgerConflict for a database that stays locked, LedgerCorrupt for what else SQLite meets."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None) or "an error"
        if name.startswith("SQLITE_BUSY"):
            raise LedgerConflict("another process holds the ledger") from None
        raise LedgerCorrupt(f"SQLite reports {name}") from None
    except UnicodeDecodeError:
        # the text of an error, too, may quote damaged bytes
        raise LedgerCorrupt("a text in the database is not UTF-8") from None


class Copied(Message):
    """Content of the file: whose ledger, and where it stood."""

    dataset: Name
    ledger: LedgerHead


class HeadCopy:
    """The file that holds the newest head of one dataset's ledger.

    Args:
        path: The file; its folder exists.
        dataset: Name of the ledger's dataset.
    """

    def __init__(self, path: Path, dataset: str) -> None:
        self._path = path
        self._dataset = dataset

    def read(self) -> LedgerHead | None:
        """Return the head, or None if there is no file.

        Raises:
            LedgerRollback: The file cannot be read.
            LedgerConflict: It belongs to another dataset.
        """
        try:
            copied = Copied.from_bytes(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, EncodingInvalid):
            raise LedgerRollback("the head copy cannot be read") from None
        if copied.dataset != self._dataset:
            raise LedgerConflict("the head copy belongs to another dataset name")
        return copied.ledger

    def write(self, head: LedgerHead) -> None:
        """Replace the head; when this returns, it outlasts a loss of power.

        Raises:
            LedgerConflict: The file cannot be written.
        """
        try:
            self._replace(Copied(dataset=self._dataset, ledger=head).to_bytes())
        except OSError:
            raise LedgerConflict("the head copy cannot be written") from None

    def _replace(self, data: bytes) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        sync_folder(self._path.parent)


def sync_folder(folder: Path) -> None:
    """Make new and renamed entries of a folder outlast a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
