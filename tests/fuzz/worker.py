"""Feeds mutated inputs to one group of decoders, in a process of its own with bounded memory and time.

``python -m tests.fuzz.worker GROUP COUNT SEED PROGRESS`` prints a JSON summary. An input that takes too
much processor time, or ends the process, is named by the file PROGRESS: input N of a group and seed is the
same in every process.
"""

from __future__ import annotations

import json
import mmap
import random
import resource
import signal
import struct
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from protocol.errors import FedsealError
from tests.fuzz.target import SilentAccept, Target

CPU_LIMIT_S = 4.0
MEMORY_LIMIT_BYTES = 512 * 1024 * 1024
"""What decoding may take beyond what the process had before."""

WARM_UP = 3


def targets_of(group: str) -> list[Target]:
    """Return the targets of a group; each group imports only what it needs."""
    if group == "wire":
        from tests.fuzz.wire_targets import wire_targets

        return wire_targets()
    if group == "seal":
        from tests.fuzz.seal_targets import seal_targets

        return seal_targets()
    from tests.fuzz.app_targets import app_targets

    return app_targets()


class Fuzzer:
    """One run over the targets of a group.

    Args:
        targets: The decoders.
        seed: With an input's number decides everything about it.
        progress: File that always names the input being decoded.
    """

    def __init__(self, targets: list[Target], seed: int, progress: Path) -> None:
        self._targets = targets
        self._seed = seed
        self._order = [index for index, target in enumerate(targets) for _ in range(target.weight)]
        progress.write_bytes(bytes(8))
        with progress.open("r+b") as file:
            self._progress = mmap.mmap(file.fileno(), 8)
        self.outcomes: dict[str, Counter[str]] = {target.name: Counter() for target in targets}
        self.faults: list[dict[str, Any]] = []
        self.slowest: dict[str, float] = {}

    def run(self, count: int) -> None:
        """Feed the inputs 0 to count - 1."""
        for number in range(count):
            if number == WARM_UP * len(self._targets):
                _bound_memory()
            self._one(number)

    def _one(self, number: int) -> None:
        if number < WARM_UP * len(self._targets):
            target = self._targets[number % len(self._targets)]
        else:
            target = self._targets[self._order[number % len(self._order)]]
        rng = random.Random(f"{self._seed}/{target.name}/{number}")
        item = target.make(rng)
        self._progress[:] = struct.pack("<Q", number)
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        started = time.process_time()
        try:
            target.feed(item)
            outcome = "accepted"
        except FedsealError as error:
            outcome = error.code
        except SilentAccept as error:
            outcome = "silent accept"
            self._fault(target, number, f"{error}")
        except BaseException as error:
            outcome = "crash"
            self._fault(target, number, f"{type(error).__name__}: {str(error)[:200]}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.slowest[target.name] = max(self.slowest.get(target.name, 0.0), time.process_time() - started)
        self.outcomes[target.name][outcome] += 1

    def _fault(self, target: Target, number: int, what: str) -> None:
        self.faults.append({"target": target.name, "number": number, "what": what})


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(group: str, count: str, seed: str, progress: str) -> None:
    """Run, and print the summary."""
    warnings.simplefilter("error")
    # the default action ends the process even while it is in compiled code
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    fuzzer = Fuzzer(targets_of(group), int(seed), Path(progress))
    ready = time.process_time()
    fuzzer.run(int(count))
    summary = {
        "inputs": sum(sum(counts.values()) for counts in fuzzer.outcomes.values()),
        "outcomes": {name: dict(counts) for name, counts in fuzzer.outcomes.items()},
        "faults": fuzzer.faults,
        "slowest_s": {name: round(seconds, 3) for name, seconds in fuzzer.slowest.items()},
        "ready_cpu_s": round(ready - started, 1),
        "cpu_s": round(time.process_time() - ready, 1),
        "peak_growth_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main(*sys.argv[1:])
