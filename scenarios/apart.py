"""The coordinator's code in a process of its own, beside owners that live in this one.

A laboratory needs both: a coordinator whose memory, disk and loaded modules are nobody else's, and owners
whose values it can plant and read. What runs in the other process is what a deployment runs,
`server.app.run_plan`; a Unix socket takes the place of Flower's grid, so that every byte that reaches the
coordinator passes through `Apart.serve`. Nothing of this can be switched on in a deployment.

Run as ``python -m scenarios.apart SOCKET RUN_FOLDER SERVER_HOME`` by `start_apart`.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode

from crypto.auditlog import FOLDER, AuditLog
from crypto.trust import load_trust
from protocol.encoding import decode, encode
from protocol.environment import prepare_environment
from protocol.errors import FedsealError, ServerUnavailable
from protocol.records import from_record, to_record
from scenarios.grid import LocalGrid
from scenarios.processes import Processes
from server.app import run_plan
from server.home import IDENTITY
from server.store import RunStore

PROGRAM: Final = (sys.executable, "-m", "scenarios.apart")
BEGIN, ENDED = "begin", "ended"
"""What the coordinator asks for leave to do; everything else is a message for a node."""

Stream = BinaryIO | io.BufferedRWPair
_LENGTH = struct.Struct("<I")
_CONNECT_S = 60.0


@dataclass(frozen=True)
class Frame:
    """One message on the socket.

    Attributes:
        kind: Message type, `BEGIN` or `ENDED`; empty in an answer.
        node: The addressed node.
        code: Error code of an answer; empty in all else.
        body: The message's canonical bytes.
        blob: What travels beside them.
    """

    kind: str = ""
    node: int = 0
    code: str = ""
    body: bytes = b""
    blob: bytes = b""

    def to_bytes(self) -> bytes:
        """Return the frame as it is sent."""
        sizes = [len(self.body), len(self.blob)]
        head = encode({"kind": self.kind, "node": self.node, "code": self.code, "sizes": sizes})
        return _LENGTH.pack(len(head)) + head + self.body + self.blob

    @classmethod
    def read(cls, stream: Stream) -> Frame:
        """Read the next frame.

        Raises:
            ConnectionError: The other process has hung up. It is no coded error, which a run would survive.
        """
        (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
        head = decode(_exactly(stream, length))
        body, blob = (_exactly(stream, size) for size in head["sizes"])
        return cls(head["kind"], head["node"], head["code"], body, blob)


@contextmanager
def _short(place: Path) -> Iterator[str]:
    """Yield a path to a socket that fits into the 107 bytes which the kernel has for it."""
    folder = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{place.name}"
    finally:
        os.close(folder)


def _exactly(stream: Stream, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ConnectionError("the other process has hung up")
    return data


class Apart:
    """The laboratory's side of the socket.

    Args:
        listener: Where the coordinator connects.
        pid: The coordinator's process.
    """

    def __init__(self, listener: socket.socket, pid: int) -> None:
        self.pid = pid
        self._listener = listener
        self._stream: Any = None

    def serve(self, answer: Callable[[Frame], Frame | None], tap: BinaryIO) -> None:
        """Let the coordinator run the plan, and answer what it asks the nodes, until it is done.

        Args:
            answer: Returns the answer of a frame's node. It is also called with `ENDED`, while the
                coordinator's process still waits. None gives the run up.
            tap: Gets a copy of every byte that the coordinator receives.

        Raises:
            ServerUnavailable: The coordinator's process did not connect, or ended in the middle.
        """
        self._begin()
        while True:
            try:
                asked = Frame.read(self._stream)
            except ConnectionError:
                raise ServerUnavailable("the laboratory's coordinator has ended; see its log") from None
            answered = Frame() if asked.kind == BEGIN else answer(asked)
            if answered is None:
                return
            data = answered.to_bytes()
            tap.write(data)
            self._stream.write(data)
            self._stream.flush()
            if asked.kind == ENDED:
                return

    def close(self) -> None:
        """Hang up; a coordinator that is in the middle of a run ends."""
        if self._stream is not None:
            with suppress(OSError):
                self._stream.close()
        self._listener.close()

    def _begin(self) -> None:
        self._listener.settimeout(_CONNECT_S)
        try:
            connection, _address = self._listener.accept()
        except OSError:
            raise ServerUnavailable("the laboratory's coordinator did not start") from None
        connection.settimeout(None)
        with connection:
            self._stream = connection.makefile("rwb")


def start_apart(processes: Processes, name: str, folder: Path, run: Path, home: Path) -> Apart:
    """Start a coordinator that waits for `Apart.serve`.

    Args:
        processes: Stops it.
        name: Name of its log.
        folder: Gets its socket and its temporary folder.
        run: The run's folder, with the resolved plan.
        home: The coordinator's home.
    """
    place, temporary = folder / f"{name}.sock", folder / f"{name}-temporary"
    temporary.mkdir()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short(place) as path:
        listener.bind(path)
    listener.listen(1)
    pid = processes.start(
        name,
        [str(place), str(run), str(home)],
        program=PROGRAM,
        environment={"TMPDIR": str(temporary)},
    )
    return Apart(listener, pid)


# --- in the coordinator's process --------------------------------------------------------------------


class RemoteGrid(LocalGrid):
    """A grid whose nodes are at the other end of a socket and answer one at a time."""

    def __init__(self, stream: Stream, nodes: Iterable[int]) -> None:
        self._stream = stream
        # a node is anything that answers a message
        apps: Any = dict.fromkeys(nodes, self._ask)
        super().__init__(apps)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return one reply, so that it is worked on before the next one is there."""
        return super().pull_messages(list(message_ids)[:1])

    def _ask(self, message: Message, _context: Context) -> Message:
        body, blob = from_record(message.content)
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        answered = _say(self._stream, Frame(kind, node, "", body, blob))
        if answered.code:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, answered.code), reply_to=message)
        return Message(to_record(answered.body, answered.blob), reply_to=message)


def _say(stream: Stream, frame: Frame) -> Frame:
    stream.write(frame.to_bytes())
    stream.flush()
    return Frame.read(stream)


def main(place: str, run: str, home: str) -> None:
    """Connect, and run the plan of a folder once the laboratory allows it."""
    logging.basicConfig(level=logging.DEBUG, force=True)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short(Path(place)) as path:
        connection.connect(path)
    store = RunStore(Path(run), AuditLog(Path(home) / FOLDER))
    # the laboratory may hang up; and why a run did not finish is in its store
    with suppress(FedsealError, OSError), connection.makefile("rwb") as stream:
        _say(stream, Frame(BEGIN))
        grid = RemoteGrid(stream, store.get("nodes"))
        with suppress(FedsealError):
            run_plan(grid, store, load_trust(Path(home) / IDENTITY))
        _say(stream, Frame(ENDED))
    store.close()


if __name__ == "__main__":
    prepare_environment()
    main(*sys.argv[1:])
