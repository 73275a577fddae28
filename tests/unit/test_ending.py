"""How a command ends: a code for every error, no traceback unless asked, and what the reader can take."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from console.ending import INTERRUPTED, Output, coded, ended, heed_signals, prepare_output
from console.tables import show_pairs, show_table
from protocol.environment import heeded
from protocol.errors import (
    AccessDenied,
    DiskFailed,
    DiskFull,
    FedsealError,
    FileDamaged,
    FileUnusable,
    LedgerCorrupt,
    PlanInvalid,
    ResourcesShort,
    StorageBusy,
    Unexpected,
)
from protocol.storage import connect, from_os

HARMLESS = (DiskFull, AccessDenied, StorageBusy, ResourcesShort, FileUnusable)


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "", "x"), DiskFull),
        (OSError(errno.EDQUOT, "", "x"), DiskFull),
        (OSError(errno.EACCES, "", "x"), AccessDenied),
        (OSError(errno.EPERM, "", "x"), AccessDenied),
        (OSError(errno.EROFS, "", "x"), AccessDenied),
        (OSError(errno.EIO, "", "x"), DiskFailed),
        (OSError(errno.EMFILE, "", "x"), ResourcesShort),
        (OSError(errno.EAGAIN, "", "x"), StorageBusy),
        (OSError(errno.ENOENT, "", "x"), FileUnusable),
        (OSError(errno.EISDIR, "", "x"), FileUnusable),
        (OSError(errno.ECONNREFUSED, ""), Unexpected),
        (sqlite3.ProgrammingError("closed"), Unexpected),
        (UnicodeEncodeError("ascii", "é", 0, 1, "secret"), Unexpected),
        (json.JSONDecodeError("secret", "secret", 0), Unexpected),
        (KeyError("secret"), Unexpected),
        (MemoryError(), Unexpected),
        (PlanInvalid("run.rounds"), PlanInvalid),
    ],
)
def test_every_error_ends_with_a_code_and_no_traceback(
    error: Exception, kind: type[FedsealError], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(lambda: raising(error)) == kind.exit_code
    out, err = capsys.readouterr()
    assert err.startswith(kind.code)
    assert "Traceback" not in out + err
    assert "secret" not in err


def test_a_traceback_is_shown_to_who_asks_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSEAL_DEBUG", "1")
    assert ended(lambda: raising(KeyError("place"))) == Unexpected.exit_code
    assert "test_ending.py" in capsys.readouterr().err


def test_no_harmless_cause_tells_anybody_to_restore() -> None:
    for kind in HARMLESS:
        assert "restore" not in kind.remedy.replace("restore no backup", ""), kind.code


def test_ctrl_c_claims_nothing_about_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(lambda: raising(KeyboardInterrupt())) == INTERRUPTED
    assert "processes" not in capsys.readouterr().err


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_ignored_signal_stays_ignored(handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heed_signals()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert heeded(signal.SIGTERM, signal.SIGHUP) == [signal.SIGTERM]
    os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_characters_that_the_output_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    prepare_output()
    Output().print("● PASS \udcff Müller")
    sys.stdout.flush()
    assert raw.getvalue() == "? PASS ? Müller\n".encode("latin-1")


LONG = "fedseal run --resume digits-20261201-101500-3f9a2c1b --home /srv/federation/coordinator"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_what_is_to_be_copied_stays_whole(width: int) -> None:
    out = io.StringIO()
    console = Output(file=out, width=width)
    console.print(f"to go on: {LONG}")
    show_pairs(console, [("plan hash", "a" * 64), ("package", "/srv/" + "x" * 60)])
    show_table(console, ("run", "state"), [("digits-20261201-101500-3f9a2c1b", "running")], "runs")
    text = out.getvalue()
    for whole in (LONG, "a" * 64, "/srv/" + "x" * 60, "digits-20261201-101500-3f9a2c1b"):
        assert whole in text


def test_a_database_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    (tmp_path / "garbage.db").write_bytes(b"garbage" * 1000)
    connection = connect(tmp_path / "garbage.db", "the ledger", LedgerCorrupt)
    with pytest.raises(LedgerCorrupt, match="NOTADB"):
        connection.execute("SELECT 1 FROM record")
    connection.close()
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(FileUnusable):
        connect(tmp_path / "folder.db", "the ledger")
    connection = connect(tmp_path / "text.db", "the state")
    connection.executescript("CREATE TABLE t (x TEXT); INSERT INTO t VALUES (CAST(x'ff' AS TEXT))")
    with pytest.raises(FileDamaged, match="UTF-8"):
        connection.execute("SELECT x FROM t").fetchall()
    connection.close()


def test_a_cursor_tells_what_it_meets_half_way(tmp_path: Path) -> None:
    """Damage in a later page is met by the row that lies there, not by the statement."""
    path = tmp_path / "rows.db"
    connection = connect(path, "the state")
    connection.executescript("CREATE TABLE t (x BLOB)")
    connection.executemany("INSERT INTO t VALUES (?)", ((bytes(2000),) for _ in range(200)))
    connection.close()
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)
    connection = connect(path, "the state")
    with pytest.raises(FileDamaged):
        list(connection.execute("SELECT x FROM t"))
    connection.close()


def test_what_has_nothing_to_do_with_files_has_no_code_of_files() -> None:
    assert from_os(ConnectionResetError(errno.ECONNRESET, "")) is None
    assert isinstance(coded(ConnectionResetError(errno.ECONNRESET, "")), Unexpected)
