"""Arms of a benchmark: programs that do the same work, each in a process of its own.

An arm reads one JSON request per line and writes one JSON line per answer: first
``{"versions": ..., "idle_rss_mib": ...}`` when it is ready, then ``{"figures": ...}`` per request, or
``{"error": text}`` instead. A process of its own means that its peak memory is its own, and that a peer may
live in another Python environment.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, cast

from protocol.errors import BenchmarkFailed, PeerUnusable

Figures = dict[str, float | None]
"""One measurement of one arm by metric; None where the metric does not apply to the arm."""

MIN_REPETITIONS: Final = 5

_READY_S: Final = 180.0
_ANSWER_S: Final = 7200.0
_END_S: Final = 10.0
_ROOT: Final = Path(__file__).parents[1]


@dataclass(frozen=True)
class Size:
    """The size of one run.

    Attributes:
        parameters: Length of an update, at least 1.
        clients: Clients of one sum, at least 2.
    """

    parameters: int
    clients: int


@dataclass(frozen=True)
class Settings:
    """What a person chooses; every length is run with every number of clients.

    Attributes:
        parameters: Lengths of an update, each at least 1.
        clients: Numbers of clients of one sum, each at least 2.
        repetitions: Measurements of every arm, at least `MIN_REPETITIONS`.
        peer_python: Python of another environment that holds a peer, or None to leave that peer out.
        peers: Folder with an environment per peer, ``nvflare/bin/python``; the other way to name it.
        leave_out: Keys of arms that are not measured.

    Raises:
        BenchmarkFailed: A number is too small, or the peer is named in both ways.
        PeerUnusable: The folder has no such environment.
    """

    parameters: Sequence[int] = (1_000_000,)
    clients: Sequence[int] = (8,)
    repetitions: int = MIN_REPETITIONS
    peer_python: Path | None = None
    peers: Path | None = None
    leave_out: Sequence[str] = ()

    def __post_init__(self) -> None:
        if min(self.parameters) < 1 or min(self.clients) < 2 or self.repetitions < MIN_REPETITIONS:
            raise BenchmarkFailed(
                f"it takes a parameter, two clients and {MIN_REPETITIONS} repetitions at the least"
            )
        if self.peers is not None and self.peer_python is not None:
            raise BenchmarkFailed("give --peers or --peer-python, not both")
        if self.peers is not None and not self._in_folder(self.peers).exists():
            raise PeerUnusable("the folder that --peers names holds no nvflare/bin/python")

    @property
    def sizes(self) -> list[Size]:
        """All runs, in the order given, none twice."""
        return [Size(n, k) for n in dict.fromkeys(self.parameters) for k in dict.fromkeys(self.clients)]

    @property
    def peer(self) -> Path | None:
        """The peer's Python, however it was named."""
        return self.peer_python if self.peers is None else self._in_folder(self.peers)

    @staticmethod
    def _in_folder(folder: Path) -> Path:
        return folder.absolute() / "nvflare" / "bin" / "python"


@dataclass(frozen=True)
class Arm:
    """One of the programs that are compared.

    Attributes:
        key: Short identifier, unique in a benchmark.
        label: Short name for people.
        description: What exactly is measured, in one line.
        command: Program and arguments.
        peer: Whether it is another project's code in its own environment.
    """

    key: str
    label: str
    description: str
    command: tuple[str, ...]
    peer: bool = False


@dataclass(frozen=True)
class Metric:
    """One row of the result; lower is better in all of them.

    Attributes:
        key: Name in `Figures`.
        label: Name for people, with its unit.
        form: How a figure is printed, a format specification.
        scale: What a figure is multiplied with before it is printed.
        compared: Whether the ratio to the first arm means something.
        rehearsed: Whether it comes from the rehearsal, because finding it out would disturb the others.
    """

    key: str
    label: str
    form: str
    scale: float = 1.0
    compared: bool = True
    rehearsed: bool = False


@dataclass(frozen=True)
class Job:
    """A benchmark that is ready to run.

    Attributes:
        settings: What the result was measured with; goes into the report.
        arms: The programs; ratios are relative to the first.
        metrics: The rows of the result.
        request: What every arm is asked, in every repetition; the rehearsal adds ``"rehearsal": true``.
        judge: Called after every answer; returns the figures that no arm states about itself.
        facts: What else a reader must know of this run; goes into the report as it is.
        references: Fixed figures to read the result against.
        notes: Sentences without which the table would mislead.
    """

    settings: Mapping[str, object]
    arms: Sequence[Arm]
    metrics: Sequence[Metric]
    request: Mapping[str, object]
    judge: Callable[[], Figures]
    facts: Mapping[str, object]
    references: Mapping[str, float]
    notes: Sequence[str]


def without(job: Job, keys: Sequence[str]) -> Job:
    """Return a job without some of its arms; its notes say which are left out.

    Raises:
        BenchmarkFailed: The job has no such arm, or it is the first, with which the others are compared.
    """
    others = {arm.key: arm.label for arm in job.arms[1:]}
    for key in keys:
        if key not in others:
            raise BenchmarkFailed(f"--leave-out takes {' or '.join(others)} here")
    if not keys:
        return job
    left_out = ", ".join(label for key, label in others.items() if key in keys)
    arms = [arm for arm in job.arms if arm.key not in keys]
    return replace(job, arms=arms, notes=[*job.notes, f"Left out on request: {left_out}."])


class ArmProcess:
    """A running arm; leaving the block ends it.

    Args:
        arm: The program to start.
        ready_s: Longest wait for its first line, in seconds.

    Raises:
        PeerUnusable: The arm is a peer and cannot be started, refuses, ends, or is silent.
        BenchmarkFailed: The same for an arm of our own.
    """

    def __init__(self, arm: Arm, ready_s: float = _READY_S) -> None:
        self.arm = arm
        self._failure = PeerUnusable if arm.peer else BenchmarkFailed
        self._pending = b""
        try:
            self._child = subprocess.Popen(  # noqa: S603  the commands are our own
                arm.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(peer=arm.peer),
                bufsize=0,
            )
        except OSError:
            raise self._failure(f"{arm.label}: the program cannot be started") from None
        self._requests, self._answers = (
            cast(IO[bytes], self._child.stdin),
            cast(IO[bytes], self._child.stdout),
        )
        try:
            self.ready = self._receive(ready_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return the running arm."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close()

    def measure(self, request: Mapping[str, object]) -> Figures:
        """Send one request and return the arm's figures."""
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
        except OSError:
            raise self._failure(f"{self.arm.label}: the program ended") from None
        figures = self._receive(_ANSWER_S).get("figures")
        if not isinstance(figures, dict) or not all(map(_is_figure, figures.values())):
            raise self._failure(f"{self.arm.label}: an answer holds no figures")
        return figures

    def close(self) -> None:
        """End the process: by the end of its input, else by force."""
        self._requests.close()
        try:
            self._child.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._answers.close()

    def _receive(self, limit_s: float) -> dict[str, Any]:
        try:
            answer = json.loads(self._line(limit_s))
        except ValueError:
            raise self._failure(f"{self.arm.label}: the program does not answer in JSON") from None
        if not isinstance(answer, dict):
            raise self._failure(f"{self.arm.label}: the program does not answer in JSON")
        if "error" in answer:
            raise self._failure(f"{self.arm.label}: {str(answer['error'])[:200]}")
        return answer

    def _line(self, limit_s: float) -> bytes:
        descriptor, deadline = self._answers.fileno(), time.monotonic() + limit_s
        while b"\n" not in self._pending:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], left_s)[0]:
                self._child.kill()
                raise self._failure(f"{self.arm.label}: no answer within {limit_s:.0f} seconds")
            received = os.read(descriptor, 65536)
            if not received:
                raise self._failure(f"{self.arm.label}: the program ended")
            self._pending += received
        line, self._pending = self._pending.split(b"\n", 1)
        return line


def _environment(*, peer: bool) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **threads}
    if not peer:
        paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _is_figure(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
