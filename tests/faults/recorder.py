"""Record every write, truncation, sync, deletion and rename of a ledger, and rebuild what a crash leaves.

SQLite's own file calls are observed by a shim around its default file system layer (VFS), the head copy's
by wrapping `os.fsync` and `Path.replace`. The ledger under test runs unchanged. A `Disk` then plays the
recorded calls back as far as a crash point and says what files are left: all of them after a kill, what
was synced plus any part of the rest after a loss of power.
"""

from __future__ import annotations

import ctypes
import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SECTOR_BYTES = 512
_POINTER = ctypes.c_void_p
_OPEN = ctypes.CFUNCTYPE(
    ctypes.c_int, _POINTER, _POINTER, _POINTER, ctypes.c_int, _POINTER
)  # the name stays a pointer: SQLite reads more behind its end
_DELETE = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_char_p, ctypes.c_int)
_WRITE = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, ctypes.c_int, ctypes.c_int64)
_TRUNCATE = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_int64)
_SYNC = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_int)


class _Vfs(ctypes.Structure):
    """The fields of sqlite3_vfs; https://sqlite.org/c3ref/vfs.html."""

    _fields_ = [
        ("version", ctypes.c_int),
        ("file_bytes", ctypes.c_int),
        ("path_bytes", ctypes.c_int),
        ("next", _POINTER),
        ("name", ctypes.c_char_p),
        ("data", _POINTER),
        ("open", _POINTER),
        ("delete", _POINTER),
        ("others", _POINTER * 14),
    ]


class _Methods(ctypes.Structure):
    """The fields of sqlite3_io_methods; https://sqlite.org/c3ref/io_methods.html."""

    _fields_ = [
        ("version", ctypes.c_int),
        ("close", _POINTER),
        ("read", _POINTER),
        ("write", _POINTER),
        ("truncate", _POINTER),
        ("sync", _POINTER),
        ("others", _POINTER * 13),
    ]


@dataclass(frozen=True)
class Event:
    """One call that can change what is on the disk, or a mark of the test's own.

    Attributes:
        kind: write, truncate, sync, delete, replace, sync_folder, or mark.
        file: Name of the file, without its folder.
        offset: Where a write begins, or the size after a truncation.
        data: What is written; for a sync of the head copy's temporary file, its content.
        mark: What the test says has happened by now.
    """

    kind: str
    file: str = ""
    offset: int = 0
    data: bytes = b""
    mark: Any = None


class Recorder:
    """Holds the events of one recording; told of writes before they happen, of syncs after."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, event: Event) -> None:
        self.events.append(event)

    def mark(self, mark: Any) -> None:
        self.add(Event("mark", mark=mark))


class _Shim:
    """SQLite's default VFS with open, delete, write, truncate and sync observed."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
        self.recorder: Recorder | None = None
        self._library = library
        self._original: Any = library.sqlite3_vfs_find(None)
        self._names: dict[int, str] = {}
        self._methods: dict[int, tuple[_Methods, list[Any]]] = {}
        self._vfs = _Vfs.from_buffer_copy(self._original.contents)
        self._vfs.name = b"recorder"
        self._calls = (_OPEN(self._open), _DELETE(self._delete))
        self._vfs.open, self._vfs.delete = (ctypes.cast(call, _POINTER) for call in self._calls)

    def install(self) -> None:
        self._library.sqlite3_vfs_register(ctypes.byref(self._vfs), 1)

    def remove(self) -> None:
        self._library.sqlite3_vfs_register(self._original, 1)
        self._library.sqlite3_vfs_unregister(ctypes.byref(self._vfs))

    def _add(self, event: Event) -> None:
        if self.recorder is not None:
            self.recorder.add(event)

    def _open(self, vfs: int, name: int | None, file: int, flags: int, out_flags: int) -> int:
        result = int(_OPEN(self._original.contents.open)(vfs, name, file, flags, out_flags))
        slot = ctypes.cast(file, ctypes.POINTER(_POINTER))
        if result == 0 and name is not None and slot[0]:
            self._names[file] = os.path.basename(ctypes.string_at(name).decode())
            slot[0] = self._observed(slot[0])
        return result

    def _observed(self, address: int) -> int:
        if address not in self._methods:
            original = _Methods.from_address(address)
            changed = _Methods.from_buffer_copy(original)
            write, truncate, sync = (
                kind(getattr(original, name))
                for kind, name in ((_WRITE, "write"), (_TRUNCATE, "truncate"), (_SYNC, "sync"))
            )

            def observed_write(file: int, data: int, size: int, offset: int) -> int:
                self._add(Event("write", self._names[file], offset, ctypes.string_at(data, size)))
                return int(write(file, data, size, offset))

            def observed_truncate(file: int, size: int) -> int:
                self._add(Event("truncate", self._names[file], size))
                return int(truncate(file, size))

            def observed_sync(file: int, flags: int) -> int:
                result = int(sync(file, flags))
                self._add(Event("sync", self._names[file]))
                return result

            calls = [_WRITE(observed_write), _TRUNCATE(observed_truncate), _SYNC(observed_sync)]
            changed.write, changed.truncate, changed.sync = (ctypes.cast(call, _POINTER) for call in calls)
            self._methods[address] = (changed, calls)
        return ctypes.addressof(self._methods[address][0])

    def _delete(self, vfs: int, name: bytes, sync_folder: int) -> int:
        self._add(Event("delete", os.path.basename(name.decode()), sync_folder))
        return int(_DELETE(self._original.contents.delete)(vfs, name, sync_folder))


@cache
def _shim() -> _Shim:
    try:
        library = ctypes.CDLL("libsqlite3.so.0")
        library.sqlite3_libversion.restype = ctypes.c_char_p
    except OSError:
        pytest.skip("this Python brings its own SQLite, whose file calls cannot be observed")
    assert library.sqlite3_libversion().decode() == sqlite3.sqlite_version
    return _Shim(library)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Send what ledgers that are opened inside do with their files to a recorder."""
    shim, fsync, replace = _shim(), os.fsync, Path.replace

    def observed_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)
        content = b"" if path.is_dir() else path.read_bytes()
        recorder.add(Event("sync_folder" if path.is_dir() else "sync", path.name, data=content))

    def observed_replace(source: Path, target: Path) -> Path:
        recorder.add(Event("replace", target.name, data=source.read_bytes()))
        return replace(source, target)

    shim.recorder = recorder
    shim.install()
    os.fsync, Path.replace = observed_fsync, observed_replace
    try:
        yield
    finally:
        os.fsync, Path.replace = fsync, replace
        shim.remove()
        shim.recorder = None


@dataclass
class _Stored:
    """One file: what is certainly on the disk, and the changes since; offset and None is a truncation."""

    synced: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def content(self, kept: list[tuple[int, bytes | None]]) -> bytes:
        content = bytearray(self.synced)
        for offset, data in kept:
            if data is None:
                del content[offset:]
            else:
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data
        return bytes(content)


class Disk:
    """What a machine's disk holds while recorded events are played back."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self._files = {name: _Stored(content) for name, content in (files or {}).items()}
        self._renamed: dict[str, tuple[bytes, bytes]] = {}
        self._synced_content: dict[str, bytes] = {}

    def play(self, event: Event) -> None:
        name = event.file
        if event.kind in ("write", "truncate"):
            change = (event.offset, event.data if event.kind == "write" else None)
            self._files.setdefault(name, _Stored()).pending.append(change)
        elif event.kind == "sync" and name.endswith(".tmp"):
            self._synced_content[name] = event.data
        elif event.kind == "sync":
            stored = self._files.setdefault(name, _Stored())
            stored.synced, stored.pending = stored.content(stored.pending), []
        elif event.kind == "delete":
            self._files.pop(name, None)
        elif event.kind == "replace":
            # content that was not synced may be lost though the new name is there
            synced = self._synced_content.pop(name + ".tmp", None) == event.data
            self._renamed[name] = (event.data, event.data if synced else b"")
        elif event.kind == "sync_folder":
            self._settle()

    def _settle(self) -> None:
        for name, (_, certain) in self._renamed.items():
            self._files[name] = _Stored(certain)
        self._renamed.clear()

    def after_kill(self) -> dict[str, bytes]:
        """Return the files if only the process dies: the system writes all of it."""
        files = {name: stored.content(stored.pending) for name, stored in self._files.items()}
        return files | {name: written for name, (written, _) in self._renamed.items()}

    def after_power_loss(self, choice: random.Random) -> dict[str, bytes]:
        """Return the files if power fails: any sectors of what was not synced may be there or not."""
        how = choice.choice(("nothing", "prefix", "sectors"))
        files = {}
        for name, stored in self._files.items():
            if how == "nothing":
                kept = []
            elif how == "prefix":
                kept = _prefix(stored.pending, choice)
            else:
                kept = _any_sectors(stored.pending, choice)
            files[name] = stored.content(kept)
        for name, (_, certain) in self._renamed.items():
            if choice.random() < 0.5:
                files[name] = certain
        return files

    def cut(self, name: str, size: int) -> dict[str, bytes]:
        """Return the files if all is written but the last change of one file, of which `size` bytes are."""
        stored = self._files[name]
        offset, data = stored.pending[-1]
        kept = [*stored.pending[:-1], (offset, data if data is None else data[:size])]
        return self.after_kill() | {name: stored.content(kept)}


def _prefix(pending: list[tuple[int, bytes | None]], choice: random.Random) -> list[Any]:
    count = choice.randint(0, len(pending))
    kept = list(pending[:count])
    if kept and kept[-1][1]:
        offset, data = kept[-1]
        kept[-1] = (offset, data[: choice.randint(0, len(data))])
    return kept


def _any_sectors(pending: list[tuple[int, bytes | None]], choice: random.Random) -> list[Any]:
    kept: list[Any] = []
    for offset, data in pending:
        if data is None:
            kept += [(offset, None)] if choice.random() < 0.5 else []
            continue
        for start in range(0, len(data), SECTOR_BYTES):
            if choice.random() < 0.5:
                kept.append((offset + start, data[start : start + SECTOR_BYTES]))
    return kept
