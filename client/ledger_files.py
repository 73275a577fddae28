"""The files of a ledger: its database, its lock, and the copy of its head in another folder.

The copy shows when an older ledger was put back. It is written after the ledger's own commit, so that
after a crash it may be behind the ledger and is never ahead of it.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from protocol import storage
from protocol.errors import EncodingInvalid, LedgerConflict, LedgerCorrupt, LedgerRollback
from protocol.messages import LedgerHead, Message
from protocol.sections import Name

LEDGER_FILE, COPY_FILE = "the privacy ledger", "the copy of the ledger's head"

_SCHEMA = """CREATE TABLE IF NOT EXISTS record (
    sequence INTEGER PRIMARY KEY,
    previous TEXT UNIQUE REFERENCES record (hash),
    body BLOB NOT NULL,
    hash TEXT NOT NULL UNIQUE
) STRICT"""


def connect(path: Path) -> storage.Database:
    """Open or make the database of a ledger; what it commits outlasts a loss of power.

    Raises:
        LedgerCorrupt: Its content is wrong.
        DiskFull, AccessDenied, DiskFailed, StorageBusy, FileUnusable, ResourcesShort: It cannot be opened.
    """
    create_private(path, LEDGER_FILE)
    connection = storage.connect(path, LEDGER_FILE, LedgerCorrupt)
    try:
        for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {setting}").fetchall()
        connection.execute(_SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def create_private(path: Path, what: str) -> None:
    """Make an empty database file of mode 0600, durably, unless there is one.

    SQLite would make it readable for others; its side files inherit the mode. The file is linked to its
    name after it was closed: closing a file drops all locks that this process has on it, those of another
    connection too, and then another process takes away the log under that connection.
    """
    with storage.translated(what):
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
            LedgerRollback: It holds no head, or is no file.
            LedgerConflict: It belongs to another dataset.
            AccessDenied, DiskFailed, ResourcesShort: It cannot be read.
        """
        with storage.translated(COPY_FILE, LedgerRollback):
            try:
                data = self._path.read_bytes()
            except FileNotFoundError:
                return None
        try:
            copied = Copied.from_bytes(data)
        except EncodingInvalid:
            raise LedgerRollback("the head copy cannot be read") from None
        if copied.dataset != self._dataset:
            raise LedgerConflict("the head copy belongs to another dataset name")
        return copied.ledger

    def write(self, head: LedgerHead) -> None:
        """Replace the head; when this returns, it outlasts a loss of power.

        Raises:
            DiskFull, AccessDenied, DiskFailed, FileUnusable, ResourcesShort: It cannot be written; an older
                head is then unchanged.
        """
        with storage.translated(COPY_FILE):
            self._replace(Copied(dataset=self._dataset, ledger=head).to_bytes())

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
