"""What disks and databases answer, told apart: full, closed, failing, locked, damaged.

A remedy must fit its cause. A disk that is full, a file that is locked or closed to this user has lost
nothing, so that no backup may be restored for it; only content that is not what was written is damage.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

from protocol.errors import (
    AccessDenied,
    DiskFailed,
    DiskFull,
    FedsealError,
    FileDamaged,
    FileUnusable,
    ResourcesShort,
    StorageBusy,
)

BUSY_TIMEOUT_S: Final = 30.0
"""Longest wait for another process that holds a database."""

STORAGE_FAULTS: Final = (
    *(DiskFull, AccessDenied, DiskFailed, StorageBusy),
    *(FileDamaged, FileUnusable, ResourcesShort),
)
"""Errors of this machine's own storage. They are never the fault of whoever sent a message."""

Damage = Callable[[str], FedsealError]
"""Makes the error for content that is not what was written, from a detail."""

_BY_ERRNO: Final[dict[type[FedsealError], tuple[int, ...]]] = {
    DiskFull: (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    AccessDenied: (errno.EACCES, errno.EPERM, errno.EROFS),
    DiskFailed: (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EUCLEAN, errno.EREMOTEIO),
    StorageBusy: (errno.EAGAIN, errno.EBUSY, errno.EDEADLK, errno.ENOLCK, errno.ETXTBSY),
    ResourcesShort: (errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    FileUnusable: (
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ESPIPE, errno.EXDEV),
    ),
}
_KIND_OF_ERRNO: Final = {number: kind for kind, numbers in _BY_ERRNO.items() for number in numbers}
_SQLITE_FAILED: Final = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_SQLITE_CLOSED: Final = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)
_TRIAL_BYTES: Final = 64 * 1024


def from_os(error: OSError, what: str = "") -> FedsealError | None:
    """Return the coded error for what the system answered; None if it has nothing to do with files.

    Args:
        error: As it was raised.
        what: Names the file for a person; its own name where it is left out.
    """
    kind = _KIND_OF_ERRNO.get(error.errno or 0)
    if kind is None:
        return None
    named = what or (str(error.filename) if error.filename is not None else "")
    return kind(f"{named}: {os.strerror(error.errno or 0)}" if named else os.strerror(error.errno or 0))


def from_sqlite(error: sqlite3.Error, what: str, file: Path, damaged: Damage) -> FedsealError | None:
    """Return the coded error for what SQLite met; None for a wrong use of its interface.

    SQLite keeps the system's reason to itself where a file cannot be opened or extended. The file's access
    bits, or what its folder answers to a trial write, are that reason, unless the cause has just gone.

    Args:
        error: As it was raised.
        what: Names the database for a person.
        file: Where it lies.
        damaged: Makes the error where the content is wrong.
    """
    if isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError):
        return None
    code, name = getattr(error, "sqlite_errorcode", None), getattr(error, "sqlite_errorname", None)
    primary = 0 if code is None else code & 0xFF
    detail = f"{what}: SQLite reports {name or 'a text that is not UTF-8'}"
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        return StorageBusy(detail)
    if primary == sqlite3.SQLITE_FULL:
        return DiskFull(detail)
    if primary == sqlite3.SQLITE_NOMEM:
        return ResourcesShort(detail)
    if primary in _SQLITE_CLOSED:
        return AccessDenied(detail)
    if primary in _SQLITE_FAILED and code != sqlite3.SQLITE_IOERR_SHORT_READ:
        otherwise = DiskFailed if primary == sqlite3.SQLITE_IOERR else FileUnusable
        return _closed(file, what) or _trial(file.parent, what) or otherwise(detail)
    return damaged(detail)


def read_written(path: Path, refused: Damage) -> str:
    """Return the text of a file that a person wrote, less the mark that some editors put before it.

    Args:
        path: The file.
        refused: Makes the error where there is no such file, or it is not text in UTF-8.

    Raises:
        AccessDenied, DiskFailed, ResourcesShort: It cannot be read.
    """
    with translated(path.name, refused):
        data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"{path.name}, line {data[: error.start].count(10) + 1}"
        raise refused(f"{place}: it is not UTF-8; save the file in that encoding") from None


@contextmanager
def translated(what: str, damaged: Damage | None = None) -> Iterator[None]:
    """Raise the coded error for whatever the system answers in the block.

    Args:
        what: Names the file for a person.
        damaged: Makes the error where a file is missing or something else has its name; `FileUnusable`
            if it is left out.
    """
    try:
        yield
    except OSError as error:
        coded = from_os(error, what)
        if coded is None:
            raise
        if damaged is not None and isinstance(coded, FileUnusable):
            coded = damaged(coded.detail)
        raise coded from error


class Database(sqlite3.Connection):
    """A connection that raises coded errors and no others; make one with `connect`."""

    what: str
    file: Path
    damaged: Damage

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Raise the coded error for whatever SQLite meets in the block."""
        try:
            yield
        except sqlite3.Error as error:
            coded = from_sqlite(error, self.what, self.file, self.damaged)
            if coded is None:
                raise
            raise coded from error
        except UnicodeDecodeError as error:
            # the text of an error, too, may quote damaged bytes
            raise self.damaged(f"{self.what}: a text in it is not UTF-8") from error

    def cursor(self, _factory: Any = None) -> Any:
        """Return a cursor that raises coded errors, too."""
        return super().cursor(_Cursor)

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        """Run one statement; what it returns raises coded errors, too."""
        return self.cursor().execute(sql, parameters)

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> Any:
        """Run one statement for each of the parameters."""
        return self.cursor().executemany(sql, parameters)

    def executescript(self, script: str, /) -> Any:
        """Run several statements."""
        return self.cursor().executescript(script)


class _Cursor(sqlite3.Cursor):
    connection: Database

    def execute(self, sql: str, parameters: Any = (), /) -> Self:
        with self.connection.translating():
            return super().execute(sql, parameters)

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> Self:
        with self.connection.translating():
            return super().executemany(sql, parameters)

    def executescript(self, script: str, /) -> Self:
        with self.connection.translating():
            super().executescript(script)
            return self

    def fetchone(self) -> Any:
        with self.connection.translating():
            return super().fetchone()

    def fetchall(self) -> list[Any]:
        with self.connection.translating():
            return super().fetchall()

    def __next__(self) -> Any:
        with self.connection.translating():
            return super().__next__()


def connect(path: Path, what: str, damaged: Damage | None = None) -> Database:
    """Open or make a database, each statement of which commits by itself unless a transaction is begun.

    Args:
        path: The file.
        what: Names it for a person.
        damaged: Makes the error where its content is wrong; `FileDamaged` if it is left out.

    Raises:
        DiskFull, AccessDenied, DiskFailed, FileUnusable, ResourcesShort: It cannot be opened.
    """
    how = damaged or FileDamaged
    try:
        connection = sqlite3.connect(
            path,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
            factory=Database,
        )
    except sqlite3.Error as error:
        coded = from_sqlite(error, what, path, how)
        if coded is None:
            raise
        raise coded from error
    connection.what, connection.file, connection.damaged = what, path, how
    return connection


def write_problem(folder: Path, what: str) -> FedsealError:
    """Return why a file could not be written to a folder, where a library keeps the reason to itself.

    Args:
        folder: Where it was to be.
        what: Names the file for a person.
    """
    return _trial(folder, what) or DiskFailed(f"{what}: it could not be written")


def _closed(file: Path, what: str) -> FedsealError | None:
    """Return that this user may not use a file, by its access bits alone.

    To open and close it here would drop the locks that this process has on it.
    """
    if not os.path.exists(file) or os.access(file, os.R_OK | os.W_OK, effective_ids=True):
        return None
    return AccessDenied(f"{what}: {os.strerror(errno.EACCES)}")


def _trial(folder: Path, what: str) -> FedsealError | None:
    """Write a little to a folder, and return what keeps the system from it."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return from_os(error, what)
    return None
