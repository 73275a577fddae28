"""File locks between processes. However a process ends, its locks end with it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from protocol.errors import HomeBusy
from protocol.storage import translated


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a file's lock in the block, after waiting for who holds it; mode 0600 if it is made.

    Raises:
        DiskFull, AccessDenied, DiskFailed, FileUnusable, ResourcesShort: The file cannot be made or opened.
    """
    with translated(path.name):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with translated(path.name):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(home: Path) -> Iterator[None]:
    """Be the only node or coordinator of a home in the block; a home that is not there has none.

    Raises:
        HomeBusy: Another process is, or the home cannot be locked.
    """
    with ExitStack() as stack:
        try:
            descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            free = take(descriptor)
        except FileNotFoundError:
            free = True
        except OSError:
            raise HomeBusy("the home cannot be locked") from None
        if not free:
            raise HomeBusy("a node or a coordinator of this home is running")
        yield


def take(descriptor: int) -> bool:
    """Take the lock of an open file without waiting; tell whether it was free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
