"""The frames of one attempt, taken part by part: checked as they arrive, kept on disk, never in memory.

A coordinator that held all owners' frames would need memory for as many updates as there are owners. Frames
lie in one file per owner below the run's folder, readable by nobody else, and are removed after it:
only openers need them, and an attempt is opened once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from crypto.frames import SealContext
from crypto.parts import open_parts, seal_parts
from protocol.encoding import digest
from protocol.errors import FrameInvalid, ProtocolViolation
from protocol.messages import Signed
from protocol.storage import translated

_FOLDER: Final = "frames"
_SUMS: Final = "sums"
_FRAMES: Final = "the frames of an attempt"


class Gathering:
    """Takes the frames of one list; leaving the block removes them.

    Args:
        folder: The run's folder.
        context: The form that frames have, and what can be checked of them without a key.
        parameters: Values of an update.
    """

    def __init__(self, folder: Path, context: SealContext, parameters: int) -> None:
        self._folder = folder / _FOLDER
        self._context = context
        self._parameters = parameters
        self.parts = seal_parts(context.packing, parameters)
        self.headers: dict[str, Signed] = {}
        self.received_bytes: dict[str, int] = {}
        self._digests: dict[str, dict[int, bytes]] = {}

    def __enter__(self) -> Self:
        """Remove what a process that was killed left behind, and make the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with translated(_FRAMES):
            self._folder.mkdir(mode=0o700)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the frames."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def take(self, owner: str, part: int, blob: bytes) -> list[bytes]:
        """Check and keep one part of an owner's frames; returns them.

        Frames in SEAL's own form are checked by `check_own_form`, behind the signature of their digests,
        because nothing else may bring them to SEAL's parser.

        Raises:
            FrameInvalid: A frame is malformed, or the part is there already.
        """
        positions, known = self.parts[part], self._digests.setdefault(owner, {})
        frames = self._context.split(blob, len(positions))
        if positions.start in known:
            raise FrameInvalid("a part came twice")
        if self._context.packed:
            for frame in frames:
                self._context.check(frame)
        known.update(zip(positions, (sha256(frame).digest() for frame in frames), strict=True))
        with translated(_FRAMES):
            descriptor = os.open(self._file(owner), os.O_WRONLY | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.seek(positions.start * self._context.frame_bytes)
                file.write(blob)
        return frames

    def digests(self, owner: str, part: int) -> list[bytes]:
        """Return the SHA-256 of each frame of one part of an owner's that was taken."""
        return [self._digests[owner][position] for position in self.parts[part]]

    def is_complete(self, owner: str) -> bool:
        """Return whether all parts and the header of an owner are there."""
        frames = self.parts[-1].stop
        return owner in self.headers and len(self._digests.get(owner, {})) == frames

    def frames_hash(self, owner: str) -> str:
        """Return the SHA-256 of the list of an owner's frame digests, as its header has to name it."""
        known = self._digests[owner]
        return digest([known[position].hex() for position in sorted(known)])

    def check_own_form(self, owner: str) -> None:
        """Let SEAL check frames in its own form, after a verified header was found to cover them.

        Raises:
            FrameInvalid: SEAL refuses one.
        """
        if self._context.packed:
            return
        for positions in self.parts:
            for frame in self._context.split(self._read(owner, positions), len(positions)):
                self._context.check(frame)

    def opening_blobs(self, owners: Sequence[str]) -> Iterator[bytes]:
        """Yield what an opener is sent, part by part; see `protocol.messages.OpenRequest`.

        Args:
            owners: All owners of the list, in its order; each is complete.

        Raises:
            ProtocolViolation: An owner is not complete.
        """
        if not all(self.is_complete(owner) for owner in owners):
            raise ProtocolViolation("an owner of the list did not seal; its masks do not cancel")
        parts = open_parts(self._context.packing, self._parameters, len(owners))
        if len(parts) > 1:
            yield b"".join(self._digests[owner][at] for owner in owners for at in range(parts[-1].stop))
        for positions in parts:
            yield b"".join(self._read(owner, positions) for owner in owners)

    def opening_parts(self, owners: int) -> int:
        """Return how many parts `opening_blobs` yields."""
        parts = len(open_parts(self._context.packing, self._parameters, owners))
        return parts if parts == 1 else parts + 1

    def keep_sums(self, part: bytes) -> None:
        """Keep the next part of opened sums."""
        with translated(_FRAMES):
            descriptor = os.open(self._folder / _SUMS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "ab") as file:
                file.write(part)

    def sums(self) -> bytes:
        """Return the parts of opened sums that were kept, and forget them."""
        file = self._folder / _SUMS
        with translated(_FRAMES):
            kept = file.read_bytes() if file.exists() else b""
            file.unlink(missing_ok=True)
        return kept

    def _file(self, owner: str) -> Path:
        return self._folder / owner

    def _read(self, owner: str, positions: range) -> bytes:
        size = self._context.frame_bytes
        with translated(_FRAMES), self._file(owner).open("rb") as file:
            file.seek(positions.start * size)
            return file.read(len(positions) * size)
