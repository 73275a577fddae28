"""An interrupted benchmark goes on: what was measured lies beside the result until that is written.

After each repetition, in which every arm was measured once, the samples are written to ``FILE.part`` in one
step. Whoever resumes must have the same code, versions, machine and settings, so that one result does not
hold figures of two programs. Arms are started and rehearsed anew; figures are never made up for what an
interruption cut short.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from protocol.errors import BenchmarkFailed
from scenarios.bench_arms import Figures

_ROOT: Final = Path(__file__).parents[1]


def _nothing() -> None:
    """Keep nothing."""


@dataclass
class RunPart:
    """What is known so far of one run, a benchmark in one size.

    Attributes:
        samples: One entry per repetition, figures by arm; a repetition is here wholly or not at all.
        rehearsals: Figures of the latest rehearsal by arm.
        ready: First lines of the arms, by arm.
        sessions: When the run was begun and gone on with: ``begun`` (ISO 8601), ``repetitions`` measured
            since then, ``load_average_start`` and ``load_average_end``.
        save: Called after each repetition.
    """

    samples: list[dict[str, Figures]] = field(default_factory=list)
    rehearsals: dict[str, Figures] = field(default_factory=dict)
    ready: dict[str, dict[str, Any]] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    save: Callable[[], None] = _nothing

    def begin(self) -> None:
        """Note that measuring begins, for the first time or again."""
        load = list(os.getloadavg())
        self.sessions.append(
            {
                "begun": datetime.now(UTC).isoformat(timespec="seconds"),
                "repetitions": 0,
                "load_average_start": load,
                "load_average_end": load,
            }
        )

    def add(self, repetition: dict[str, Figures]) -> None:
        """Keep one repetition of all arms."""
        self.samples.append(repetition)
        session = self.sessions[-1]
        session |= {
            "repetitions": session["repetitions"] + 1,
            "load_average_end": list(os.getloadavg()),
        }
        self.save()


class Parts:
    """The file with everything that was measured so far.

    Args:
        result: The file that will hold the result; the parts lie beside it in ``NAME.part``.
        same: What must be the same when measuring goes on, a JSON value.
        resume: Whether to go on with what lies there.

    Raises:
        BenchmarkFailed: Parts lie there and nobody said to resume, or they are of another measurement.
    """

    def __init__(self, result: Path, same: Mapping[str, Any], *, resume: bool) -> None:
        self._file = result.with_name(f"{result.name}.part")
        self._same = json.loads(json.dumps({**same, "code": _code()}))
        self._runs: list[RunPart] = []
        if not self._file.exists():
            return
        if not resume:
            raise BenchmarkFailed(
                "an interrupted measurement lies beside the file that --json names (.part):"
                " go on with it by --resume, or remove it"
            )
        self._runs = self._read()

    def run(self, index: int) -> RunPart:
        """Return what is known of a run; runs are asked for in their order."""
        if index == len(self._runs):
            self._runs.append(RunPart(save=self._save))
        return self._runs[index]

    def remove(self) -> None:
        """Forget the parts: the result is written."""
        self._file.unlink(missing_ok=True)

    def _read(self) -> list[RunPart]:
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            same = stored["same"]
            runs = [RunPart(**run, save=self._save) for run in stored["runs"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise BenchmarkFailed("the interrupted measurement (.part) cannot be read: remove it") from None
        differing = sorted(key for key in self._same if same.get(key) != self._same[key])
        if differing:
            raise BenchmarkFailed(
                f"the interrupted measurement (.part) was made with another {', '.join(differing)}:"
                " remove it, or name another file by --json"
            )
        return runs

    def _save(self) -> None:
        stored = {
            "same": self._same,
            "runs": [{k: v for k, v in vars(run).items() if k != "save"} for run in self._runs],
        }
        beside = self._file.with_name(f"{self._file.name}.new")
        try:
            beside.write_text(json.dumps(stored) + "\n", encoding="utf-8")
            beside.replace(self._file)
        except OSError:
            raise BenchmarkFailed("what was measured so far cannot be kept beside --json's file") from None


def _code() -> str:
    """Return the digest of all source files of the installed fedseal."""
    names = (importlib.metadata.distribution("fedseal").read_text("top_level.txt") or "").split()
    files = [file for name in names for file in (_ROOT / f"{name}.py", *(_ROOT / name).rglob("*.py"))]
    if len(files) <= len(names):
        raise BenchmarkFailed("the installed fedseal does not name its packages: install it again")
    total = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        total.update(f"{file.relative_to(_ROOT)}\n".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
