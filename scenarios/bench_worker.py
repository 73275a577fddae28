"""The inside of an arm: answers requests, and knows the memory of its own process."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from scenarios.bench_arms import Figures

Measure = Callable[[Mapping[str, Any]], Figures]


def serve_arm(make: Callable[[], Measure], packages: Sequence[str]) -> None:
    """Answer requests from standard input until it ends; see `scenarios.bench_arms`.

    Args:
        make: Prepares the arm and returns what answers a request.
        packages: Installed packages whose versions the first line names.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # libraries print warnings to file descriptor 1, which would break the answers
    os.dup2(2, 1)
    measure = make()
    versions = {package: importlib.metadata.version(package) for package in packages}
    ready = {"versions": {"python": platform.python_version(), **versions}, "idle_rss_mib": peak_rss_mib()}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"figures": measure(json.loads(line))}
        except Exception as error:
            # only the kind: messages of libraries may hold paths
            answer = {"error": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


def reset_peak() -> None:
    """Start a new peak of resident memory, where the system can; else the peak is the process' own."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_rss_mib() -> float:
    """Return the peak of resident memory in MiB.

    Linux counts a parent's memory into a child's `getrusage`, therefore its own counter comes first.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return int(text.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        import resource

        unit = 1024**2 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
