"""Ending a process together with the processes that it works for, however those end.

Two ways, because each misses what the other sees. The kernel's parent-death signal (Linux, ``prctl(2)``)
ends a process that is stuck in native code, and works for the direct parent only. A pipe whose writing end
the other process holds is closed by the kernel at that process's end, even while nobody has reaped it; it
works for any process and on every POSIX system.

``python -m protocol.parents WORD MODULE ARGUMENT...`` runs a module as a program that ends like this.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import select
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Final

from protocol.errors import ServerUnavailable

_PR_SET_PDEATHSIG: Final = 1


class Parent:
    """A pipe that tells child processes when this process ends.

    The writing end stays in this process; no program that it starts inherits it.
    """

    def __init__(self) -> None:
        self.descriptor, self._writer = os.pipe()

    def close(self) -> None:
        """Let every process that watches the pipe end now."""
        for descriptor in (self.descriptor, self._writer):
            os.close(descriptor)


def inherited(parent: int, descriptors: Sequence[int]) -> str:
    """Return the word that tells a child whom it works for; `end_with_parents` takes it.

    Args:
        parent: Process id of the direct parent.
        descriptors: Reading ends of pipes that the child inherits.
    """
    return ",".join(map(str, (parent, *descriptors)))


def end_with_parents(word: str) -> tuple[int, ...]:
    """End this process as soon as one of those ends that it works for.

    Call it first, from the main thread; the direct parent must have started this process from a thread that
    lasts, because Linux sends the signal at the end of that thread.

    Args:
        word: From `inherited`.

    Returns:
        The descriptors, which stay open, for children of this process.
    """
    parent, *descriptors = (int(part) for part in word.split(","))
    _ask_for_signal()
    # a parent that ended before it was asked for sends no signal
    if os.getppid() != parent:
        os._exit(ServerUnavailable.exit_code)
    threading.Thread(target=_end_when_closed, args=(descriptors,), daemon=True).start()
    return tuple(descriptors)


def _ask_for_signal() -> None:
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        # not Linux: the pipes are watched
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _end_when_closed(descriptors: Sequence[int]) -> None:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    # nobody ever writes: what wakes this up is the end of a writer
    poll.poll()
    os._exit(ServerUnavailable.exit_code)


def main() -> None:
    """Tie this process to its parents, and run the module that the command line names."""
    word, module = sys.argv[1:3]
    end_with_parents(word)
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
