"""Noticing that an owner's data file is another one than the one that was read.

A file is compared by its status first, which costs next to nothing, and by its content where the status
differs. A status is relied on only once it is `SETTLED_S` old: a file that is written twice within one
tick of the file system's clock has the same status both times.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import DataInvalid
from tasks.arrays import opened

SETTLED_S = 2.0
"""Age from which the time of a file's last change tells it apart from every later change."""

Status = tuple[int, ...]


@dataclass
class WatchedFile:
    """A file that may change at any time.

    Attributes:
        path: Where it is.
        status: Device, inode, size and times when it was seen last; None before that.
        digest: SHA-256 of its content then.
        is_settled: Whether an equal status means equal content.
    """

    path: Path
    status: Status | None = None
    digest: bytes = b""
    is_settled: bool = False

    def look(self) -> bool:
        """Look at the file, and tell whether its content is another than when it was seen last.

        The first look finds nothing changed. Time depends on the file's size, and on its status alone
        where that is the same as before.

        Raises:
            DataUnavailable: It is not there, or cannot be opened; whatever comes back then has changed.
            DataInvalid: It cannot be read.
        """
        try:
            with opened(self.path) as file:
                status = _status(file)
                if self.is_settled and status == self.status:
                    return False
                seen_at = time.time()
                digest = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            self.forget()
            raise DataInvalid(f"the file cannot be read ({type(error).__name__})") from None
        except DataInvalid:
            self.forget()
            raise
        has_changed = self.status is not None and digest != self.digest
        self.status, self.digest = status, digest
        self.is_settled = max(status[-2:]) / 1e9 < seen_at - SETTLED_S
        return has_changed

    def forget(self) -> None:
        """Let the next look find a file that was never seen."""
        self.status, self.digest, self.is_settled = None, b"", False


def _status(file: io.BufferedReader) -> Status:
    status = os.fstat(file.fileno())
    # the time of the last change of content can be set by anybody, that of the status by nobody
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
