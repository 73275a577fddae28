"""Flower's store of objects in transit, with the large ones on disk.

The SuperLink of Flower 1.41.0 keeps every object in memory until its receiver confirms it. Parts of all
owners' updates may wait there at once, so that its memory would grow with the number of owners. What lies
in these files is what crosses the wire: ciphertext frames, opened sums, signed messages.

`tests/integration/test_flower_contract.py` checks what this assumes of Flower.
"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from protocol.errors import FlowerChanged

ON_DISK_BYTES: Final = 256 * 1024
"""Objects of this length or longer are written to disk."""

RESERVED_BYTES: Final = 256 * 1024 * 1024
"""Room on the disk that peers cannot take: checkpoints, run store and logs of the same home need it."""


class DiskObjectStore(InMemoryObjectStore):
    """Assumes that an entry has ``content`` and ``is_available`` and is found under ``lock_store``.

    Args:
        folder: Emptied, and made for this user alone.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        self._folder = folder
        self._lock_spool = threading.Lock()

    def put(self, object_id: str, object_content: bytes) -> None:
        """Store an object; a large one leaves nothing in memory."""
        super().put(object_id, object_content)
        if len(object_content) < ON_DISK_BYTES:
            return
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or not entry.content:
                return
            descriptor = os.open(self._file(object_id), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(object_content)
            entry.content = b""

    def get(self, object_id: str) -> bytes | None:
        """Return an object, empty bytes for one that is announced only, None for an unknown one."""
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or entry.content or not entry.is_available:
                return super().get(object_id)
            return self._file(object_id).read_bytes()

    def open(self, object_id: str) -> BinaryIO | None:
        """Return the file of an object that lies on disk, None for any other; the caller closes it."""
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or entry.content or not entry.is_available:
                return None
            return self._file(object_id).open("rb")

    def spool(self, length: int) -> BinaryIO:
        """Return a new file without a name, for an object that is on its way; gone when it is closed.

        The file takes its whole length at once, so that those of other requests find that much less room.

        Raises:
            OSError: Less than `RESERVED_BYTES` would be left for what must not be lost.
        """
        with self._lock_spool:
            if shutil.disk_usage(self._folder).free < RESERVED_BYTES + length:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with ExitStack() as stack:
                file = stack.enter_context(tempfile.TemporaryFile(dir=self._folder))
                os.posix_fallocate(file.fileno(), 0, length)
                stack.pop_all()
        return cast("BinaryIO", file)

    def delete(self, object_id: str) -> None:
        """Delete an object and what only it refers to."""
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store:
                self._file(object_id).unlink(missing_ok=True)

    def _file(self, object_id: str) -> Path:
        # Flower checks when an object is announced that its id is the hex form of a SHA-256
        return self._folder / object_id


@contextmanager
def objects_on_disk(folder: Path) -> Iterator[None]:
    """Let a SuperLink that is built in the block keep large objects in a folder.

    Assumes that `ObjectStoreFactory.store` builds the store in memory by the name in its module.
    """
    factory: Any = importlib.import_module("flwr.supercore.object_store.object_store_factory")
    original = getattr(factory, "InMemoryObjectStore", None)
    if original is not InMemoryObjectStore:
        raise FlowerChanged("the object store is built otherwise")
    factory.InMemoryObjectStore = lambda: DiskObjectStore(folder)
    try:
        yield
    finally:
        factory.InMemoryObjectStore = original
