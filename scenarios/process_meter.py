"""What groups of running processes use, sampled while they run: CPU time and resident memory."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_EVERY_S: Final = 0.1
_TICK_S: Final = 1.0 / os.sysconf("SC_CLK_TCK")
_PAGE_MIB: Final = os.sysconf("SC_PAGE_SIZE") / 1024**2


@dataclass(frozen=True)
class Usage:
    """What a process and its ended children have used.

    Attributes:
        parent: Pid of its parent.
        cpu_s: CPU time of the process and of the children that it has waited for.
        rss_mib: Resident memory of the process.
    """

    parent: int
    cpu_s: float
    rss_mib: float


@dataclass
class Samples:
    """Sums over one group of processes with all their descendants, by wall-clock time."""

    times: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)

    def cpu_between(self, start: float, end: float) -> float:
        """Return the CPU seconds that were used between two moments, interpolated."""
        return self._cpu_at(end) - self._cpu_at(start)

    def rss_growth_mib(self, start: float, end: float) -> float:
        """Return by how much resident memory rose at most above what it was at a moment."""
        first, last = self._index(start), self._index(end)
        return max(self.rss_mib[first : last + 1]) - self.rss_mib[first]

    def _index(self, moment: float) -> int:
        return min(bisect_left(self.times, moment), len(self.times) - 1)

    def _cpu_at(self, moment: float) -> float:
        after = self._index(moment)
        if after == 0 or self.times[after] <= moment:
            return self.cpu_s[after]
        share = (moment - self.times[after - 1]) / (self.times[after] - self.times[after - 1])
        return self.cpu_s[after - 1] + share * (self.cpu_s[after] - self.cpu_s[after - 1])


class ProcessMeter:
    """Samples groups of processes in a thread until its block ends.

    Args:
        groups: Pids of each group; their descendants count too.
    """

    def __init__(self, groups: dict[str, Iterable[int]]) -> None:
        self._groups = {name: tuple(pids) for name, pids in groups.items()}
        self.samples = {name: Samples() for name in self._groups}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        """Start sampling."""
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        usages, now = all_usages(), time.time()
        for name, roots in self._groups.items():
            members = [usages[pid] for pid in with_descendants(roots, usages) if pid in usages]
            samples = self.samples[name]
            samples.times.append(now)
            samples.cpu_s.append(sum(one.cpu_s for one in members))
            samples.rss_mib.append(sum(one.rss_mib for one in members))


def all_usages() -> dict[int, Usage]:
    """Return the usage of every process that this user can see; Linux only, empty elsewhere."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        fields = text.rpartition(")")[2].split()
        ticks = sum(int(value) for value in fields[11:15])
        found[int(folder.name)] = Usage(int(fields[1]), ticks * _TICK_S, int(fields[21]) * _PAGE_MIB)
    return found


def with_descendants(roots: Iterable[int], usages: Mapping[int, Usage]) -> list[int]:
    """Return the pids of some processes and of everything that they started."""
    children: dict[int, list[int]] = {}
    for pid, usage in usages.items():
        children.setdefault(usage.parent, []).append(pid)
    reached = list(roots)
    for pid in reached:
        reached += children.get(pid, [])
    return reached
