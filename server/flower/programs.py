"""Flower's SuperExec and the run's own process, which both end with the coordinator, however it ends.

Flower starts the two in sessions of their own and lets them look for their parent by its process id. That
finds a parent that ended and was not reaped, or that ended before the look began, to be alive; they then go
on without a coordinator and keep the run's lock. So both are started by this module, as

    python -P -m server.flower.programs PARENTS PROGRAM ARGUMENTS...

which first ties the process to its parents (`protocol.parents`) and then does what the program does.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any, Final

from protocol.errors import ExecutorLost, FlowerChanged
from protocol.parents import Parent, end_with_parents, inherited

_LOG = logging.getLogger("fedseal.server")
SUPEREXEC: Final = "flower-superexec"
_MODULE: Final = "server.flower.programs"
_SOON_S: Final = 20.0
_MOST_STARTS: Final = 5
_END_S: Final = 10.0


def tied_command(command: Sequence[str], descriptors: Sequence[int]) -> list[str]:
    """Return the command line of a program of Flower that ends with this process.

    Args:
        command: Name of an installed program, and its arguments.
        descriptors: Reading ends of the pipes that the program shall watch; it must inherit them.
    """
    return [sys.executable, "-P", "-m", _MODULE, inherited(os.getpid(), descriptors), *command]


class Executor:
    """Keeps Flower's SuperExec running while this process runs. For the main thread only."""

    def __init__(self) -> None:
        self._parent = Parent()
        self._command: list[str] = []
        self._started: list[float] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start it by Flower's own command line, in a session of its own."""
        self._command = list(command)
        self._started.append(time.monotonic())
        self.process = subprocess.Popen(  # noqa: S603  Flower's command line, made from our options
            tied_command(command, (self._parent.descriptor,)),
            pass_fds=(self._parent.descriptor,),
            start_new_session=True,
        )
        return self.process

    @property
    def has_ended(self) -> bool:
        """Whether it was started and has ended."""
        return self.process is not None and self.process.poll() is not None

    def start_again(self) -> None:
        """Start it again after it has ended.

        Raises:
            ExecutorLost: It ended again and again, soon after each start.
        """
        status = None if self.process is None else self.process.returncode
        self._started = [one for one in self._started if time.monotonic() - one < _MOST_STARTS * _SOON_S]
        if len(self._started) >= _MOST_STARTS:
            raise ExecutorLost(
                f"it ended {_MOST_STARTS} times in a row, the last time with status {status}"
            )
        _LOG.warning("the program that starts runs ended with status %s; it is started again", status)
        self.start(self._command)

    def close(self) -> None:
        """Let it and everything that it started end now."""
        self._parent.close()
        if self.process is not None:
            self.process.wait(_END_S)


def lifespan_with(executor: Executor, flower: Any) -> Any:
    """Return what builds a SuperLink's lifespan whose SuperExec is run by an `Executor`.

    Assumes that Flower's lifespan starts it in `_start_superexec_if_needed` by `subprocess.Popen` of its
    module, and that `shutdown` ends what it keeps as `superexec_process`.

    Args:
        executor: Starts and ends it.
        flower: The module `flwr.superlink.cli.flower_superlink`.
    """

    def build(config: Any, state: Any) -> Any:
        lifespan = flower.SuperLinkLifespan(config, state)
        start, shutdown = lifespan._start_superexec_if_needed, lifespan.shutdown

        def start_tied() -> None:
            plain = flower.subprocess
            flower.subprocess = SimpleNamespace(Popen=lambda command, **_options: executor.start(command))
            try:
                start()
            finally:
                flower.subprocess = plain

        def shut_down() -> None:
            shutdown()
            executor.close()

        lifespan._start_superexec_if_needed, lifespan.shutdown = start_tied, shut_down
        return lifespan

    return build


def _tie_children(descriptors: Sequence[int]) -> None:
    """Let the run's own process end with this one and with the coordinator.

    Assumes that `SubprocessExecutor.launch` starts it by `subprocess.Popen` of its module.
    """
    try:
        launcher: Any = import_module("flwr.supercore.superexec.executor.subprocess_executor")
    except ImportError as error:
        raise FlowerChanged("the run's own process is started in another way") from error
    watched = (*descriptors, Parent().descriptor)

    def tied(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(tied_command(command, watched), pass_fds=watched, **options)  # noqa: S603

    launcher.subprocess = SimpleNamespace(Popen=tied, DEVNULL=subprocess.DEVNULL)


def main() -> None:
    """Tie this process to its parents, and do what the named program of Flower does."""
    word, program, *arguments = sys.argv[1:]
    descriptors = end_with_parents(word)
    if program == SUPEREXEC:
        _tie_children(descriptors)
    (found,) = entry_points(group="console_scripts", name=program)
    sys.argv = [program, *arguments]
    found.load()()


if __name__ == "__main__":
    main()
