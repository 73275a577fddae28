"""Starting and stopping real processes: by pid, with logs, with passphrases that no command line shows.

Programs of the project also end with the process that started them, however that one ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from protocol.parents import Parent, inherited

FEDSEAL = (sys.executable, "-m", "fedseal")
_TERM_WAIT_S = 10.0


class Processes:
    """A group of child processes that ends with its block.

    Args:
        logs: Folder for one log file per process.
    """

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._parent = Parent()
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        """Return the group."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop everything, whatever happened."""
        self.stop()
        self._parent.close()

    def start(
        self,
        name: str,
        arguments: Sequence[str],
        passphrase: bytes | None = None,
        *,
        program: Sequence[str] = FEDSEAL,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Start ``fedseal``, or another program, with these arguments and return the pid.

        A passphrase goes through a pipe of which the child reads the one end; it stands neither on the
        command line nor in the environment nor on a disk. A program of the project ends at the latest with
        the thread that starts it.
        """
        command = [*program, *arguments]
        tied, descriptors = (self._parent.descriptor,), tuple[int, ...]()
        if tuple(program[:2]) == FEDSEAL[:2]:
            word = inherited(os.getpid(), tied)
            command = [*program[:2], "protocol.parents", word, *program[2:], *arguments]
        if passphrase is not None:
            reader, writer = os.pipe()
            os.write(writer, passphrase)
            os.close(writer)
            descriptors = (reader,)
            command += ["--passphrase-file", f"/dev/fd/{reader}"]
        with (self._logs / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(  # noqa: S603  the arguments are our own
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors + tied,
                start_new_session=True,
                env=None if environment is None else {**os.environ, **environment},
            )
        for descriptor in descriptors:
            os.close(descriptor)
        self._children[name] = child
        return child.pid

    def pids(self) -> dict[str, int]:
        """Return the pids of the processes that are running."""
        return {name: child.pid for name, child in self._children.items() if child.poll() is None}

    def ended(self) -> dict[str, int]:
        """Return the exit status of the processes that have ended."""
        return {
            name: child.returncode for name, child in self._children.items() if child.poll() is not None
        }

    def kill(self, name: str) -> None:
        """Kill one process without warning, as a crash would."""
        self._children[name].kill()
        self._children[name].wait()

    def terminate(self, name: str) -> int:
        """Ask one process to end and return its exit status."""
        child = self._children[name]
        child.terminate()
        return child.wait(_TERM_WAIT_S)

    def stop(self) -> None:
        """Ask all processes to end; kill what does not, together with its children."""
        for child in self._children.values():
            if child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + _TERM_WAIT_S
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.1, deadline - time.monotonic()))
            # each child leads a process group of its own, which may outlive it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
