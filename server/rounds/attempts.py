"""What the coordinator knows of one attempt at a round."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from crypto.agreement import signed_hash
from protocol.encoding import digest_bytes
from protocol.messages import Purpose, Signed


@dataclass
class Attempt:
    """What happened in one attempt.

    Attributes:
        number: Attempt number.
        round: Round that it tries to finish, or whose model it evaluates.
        model_hash: The model that was trained from or evaluated.
        session: The session that it is made in.
        purpose: What the attempt is for.
        seconds: Wall time of each exchange.
        upload_bytes: Bytes that a contributor sent for its update: header and frames.
        download_bytes: Bytes that an opener received.
        ready: Signed ready messages of the list, in order.
        headers: Signed headers in list order.
        openings: Signed openings that agree.
        sums: Opened sums, little-endian uint32.
        asked: Owners that were asked to seal; it may have cost each of them.
    """

    number: int
    round: int
    model_hash: str
    session: str
    purpose: Purpose = "train"
    seconds: dict[str, float] = field(default_factory=dict)
    upload_bytes: int = 0
    download_bytes: int = 0
    ready: list[Signed] = field(default_factory=list)
    headers: list[Signed] = field(default_factory=list)
    openings: list[Signed] = field(default_factory=list)
    sums: bytes = b""
    asked: list[str] = field(default_factory=list)

    @cached_property
    def list_hash(self) -> str:
        """Hash of the list; `ready` does not change once there is one."""
        return signed_hash(self.ready)

    def facts(self, *, accuracy: float | None = None, reason: str | None = None) -> dict[str, Any]:
        """Return what the run store records of this attempt.

        Args:
            accuracy: Accuracy of the new model on public data, if it was measured.
            reason: Error code that says why the attempt is void.
        """
        counts = self.purpose == "evaluate" and self.sums
        return {
            "session": self.session,
            "contributors": [signed.signer for signed in self.headers],
            "headers": [signed.model_dump(mode="json") for signed in self.headers],
            "openings": [signed.model_dump(mode="json") for signed in self.openings],
            "sums_hash": digest_bytes(self.sums) if self.sums else None,
            "accuracy": accuracy,
            "sums": np.frombuffer(self.sums, dtype="<u4").tolist() if counts else None,
            "seconds": self.seconds,
            "upload_bytes": self.upload_bytes,
            "download_bytes": self.download_bytes,
            "asked": self.asked,
            "reason": reason,
        }
