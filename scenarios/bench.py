"""Side-by-side benchmarks: several programs do the same work in turn, and their figures are compared.

The arms are measured A B C A B C ..., so that the machine's load falls on all of them alike. What is
compared is CPU time, by medians and by ratios within one run; figures of two runs are not comparable.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from protocol.errors import BenchmarkFailed, BenchmarkWorse
from scenarios.bench_against import Comparison, compare, read_earlier
from scenarios.bench_arms import ArmProcess, Job, Settings, without
from scenarios.bench_parts import Parts, RunPart
from scenarios.bench_targets import Entry, Run, targets_table

_PACKAGES: Final = ("fedseal", "numpy", "tenseal", "flwr", "cryptography", "zstandard")


class BenchmarkName(StrEnum):
    """The benchmarks that exist."""

    SEAL = "seal"
    PRIVACY = "privacy"
    ROUND = "round"
    AUDIT = "audit"


DEFAULT_SIZES: Final = {
    BenchmarkName.SEAL: (1_000_000, 8),
    BenchmarkName.PRIVACY: (1_000_000, 8),
    BenchmarkName.ROUND: (100_000, 3),
    BenchmarkName.AUDIT: (1, 3),
}
"""Length of an update and number of clients, where a person names none."""


def run_benchmark(
    console: Console,
    name: BenchmarkName,
    settings: Settings,
    file: Path,
    *,
    resume: bool = False,
    against: Path | None = None,
) -> None:
    """Run a benchmark in all sizes, write its report as JSON, print a table per size and one of targets.

    Args:
        console: Where progress, tables and targets are shown.
        name: Which benchmark.
        settings: What a person chose.
        file: The report; until it is written, what was measured lies beside it.
        resume: Go on with what an interrupted call with the same settings measured, if there is any.
        against: An earlier file, with whose ratios the new ones are compared.

    Raises:
        BenchmarkFailed: An arm of our own ended, the file cannot be written, the earlier file cannot be
            compared with, or an interrupted measurement lies beside `file` that is not to be gone on with
            or does not fit.
        BenchmarkWorse: A ratio is worse than in the earlier file; the report is written.
        CapacityExceeded: A size is beyond what a preset holds; nothing was measured then.
        PeerUnusable: The peer's environment does not hold what the benchmark needs.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise BenchmarkFailed("--json must name a file in a folder that exists")
    earlier = None if against is None else read_earlier(against, name.value)
    parts = Parts(file, _same(name, settings), resume=resume)
    with tempfile.TemporaryDirectory(prefix="fedseal-bench-") as folder:
        jobs, evaluate = _prepared(name, settings, Path(folder))
        runs = []
        try:
            with console.status("starting the arms") as status:
                # a console that is a file or a pipe shows no status: there each step is a line that stays
                progress = status.update if console.is_terminal else partial(console.print, markup=False)
                for index, complete in enumerate(jobs):
                    job = without(complete, settings.leave_out)
                    runs.append(run_job(job, settings.repetitions, progress, parts.run(index)))
        except KeyboardInterrupt:
            console.print("whole repetitions are kept: the same command with --resume goes on")
            raise
    report = make_report(name.value, settings, runs, evaluate(runs))
    try:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError:
        raise BenchmarkFailed("the file that --json names cannot be written") from None
    parts.remove()
    for run in runs:
        console.print(table(name.value, run))
    for line in legend(report):
        console.print(line, markup=False)
    console.print()
    console.print(targets_table(report["targets"]))
    if earlier is not None:
        _show_comparison(console, compare(earlier, report))


def _show_comparison(console: Console, comparison: Comparison) -> None:
    for line in comparison.notes:
        console.print(line, markup=False)
    for line in comparison.worse:
        console.print(f"worse: {line}", markup=False)
    if not comparison.compared:
        raise BenchmarkFailed("the earlier file has no ratio in common with this one, such as of one size")
    if comparison.worse:
        raise BenchmarkWorse(f"{len(comparison.worse)} of {comparison.compared} ratios")
    console.print(f"none of {comparison.compared} ratios is worse by more than a fifth", markup=False)


def _prepared(
    name: BenchmarkName, settings: Settings, folder: Path
) -> tuple[Iterable[Job], Callable[[Sequence[Run]], dict[str, Entry]]]:
    """Return a benchmark's jobs, one per size, and what judges their runs.

    Only the chosen one is imported, here: each loads libraries for seconds, and the command line shows its
    help without any.
    """
    if name is BenchmarkName.SEAL:
        from scenarios import bench_seal, bench_seal_targets

        bench_seal.require_capacity(settings.sizes)
        jobs = (bench_seal.build(size, settings.peer, folder) for size in settings.sizes)
        return jobs, bench_seal_targets.evaluate_seal
    if name is BenchmarkName.ROUND:
        from scenarios import bench_round

        return (bench_round.build(size) for size in settings.sizes), bench_round.evaluate_round
    if name is BenchmarkName.AUDIT:
        from scenarios import bench_audit

        return (bench_audit.build() for _ in range(1)), bench_audit.evaluate_audit
    from scenarios import bench_privacy

    return (bench_privacy.build() for _ in range(1)), bench_privacy.evaluate_privacy


def make_report(
    name: str, settings: Settings, runs: Sequence[Mapping[str, Any]], targets: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the report of all runs, a JSON value."""
    chosen = {"parameters": list(settings.parameters), "clients": list(settings.clients)}
    return {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": _versions(),
        "settings": {**chosen, "repetitions": settings.repetitions},
        "runs": list(runs),
        "targets": dict(targets),
    }


def run_job(
    job: Job,
    repetitions: int,
    progress: Callable[[str], None] = lambda _: None,
    part: RunPart | None = None,
) -> dict[str, Any]:
    """Measure all arms, interleaved, and return the run, a JSON value.

    All arms are started first, so that a peer that cannot be used ends the run before anything is measured.
    Each then rehearses once, which warms it up and checks what cannot be checked while it is measured.
    Arms are started anew for every run, so that memory of one does not count in the next.

    Args:
        job: What to measure.
        repetitions: Measurements of every arm.
        progress: Told in one line what is measured next.
        part: What was measured before an interruption; what is measured now is added to it.
    """
    part = RunPart() if part is None else part
    if len(part.samples) < repetitions:
        _measure(job, repetitions, progress, part)
    return {
        "settings": {**job.settings, "repetitions": repetitions},
        **job.facts,
        "load_average_start": part.sessions[0]["load_average_start"],
        "load_average_end": part.sessions[-1]["load_average_end"],
        "sessions": part.sessions,
        "references": dict(job.references),
        "metrics": [asdict(metric) for metric in job.metrics],
        "order": [key for repetition in part.samples for key in repetition],
        "arms": _arms(job, part),
        "notes": list(job.notes),
    }


def _measure(job: Job, repetitions: int, progress: Callable[[str], None], part: RunPart) -> None:
    """Measure what is missing."""
    part.begin()
    with ExitStack() as stack:
        # peers first: one that cannot be used is known in a moment, our own arms take seconds to load
        peers_first = sorted(job.arms, key=lambda arm: not arm.peer)
        started = {arm.key: stack.enter_context(ArmProcess(arm)) for arm in peers_first}
        processes = [started[arm.key] for arm in job.arms]
        part.ready = {process.arm.key: process.ready for process in processes}
        for process in processes:
            progress(f"rehearsal: {process.arm.label}")
            figures = process.measure({**job.request, "rehearsal": True})
            part.rehearsals[process.arm.key] = figures | job.judge()
        for number in range(len(part.samples) + 1, repetitions + 1):
            repetition = {}
            for process in processes:
                progress(f"repetition {number} of {repetitions}: {process.arm.label}")
                repetition[process.arm.key] = process.measure(job.request) | job.judge()
            part.add(repetition)


def summarize(values: Sequence[float | None]) -> dict[str, float] | None:
    """Return median, min and max, or None for a metric that does not apply."""
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "min": min(known), "max": max(known)} if known else None


def table(name: str, run: Mapping[str, Any]) -> Table:
    """Lay a run out: one row per metric, one column per arm.

    A cell holds the median and its ratio to the first arm's median; below, the least and greatest value.
    """
    result = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=_title(name, run),
        title_justify="left",
    )
    result.add_column("")
    for arm in run["arms"]:
        result.add_column(arm["label"], justify="right")
    for metric in run["metrics"]:
        result.add_row(metric["label"], *(_cell(arm, metric) for arm in run["arms"]))
    return result


def legend(report: Mapping[str, Any]) -> list[str]:
    """Return what must stand below the tables: where, when and what was measured."""
    machine, runs = report["machine"], report["runs"]
    sessions = [session for run in runs for session in run["sessions"]]
    loads = [session[key][0] for session in sessions for key in ("load_average_start", "load_average_end")]
    return [
        f"{report['date']}, {machine['cpu_model']}, {machine['cores']} cores,"
        f" load {min(loads):.1f} to {max(loads):.1f}",
        *(interruption(run) for run in runs if len(run["sessions"]) > 1),
        *(f"{a['label']}: {a['description']} ({_named(a['versions'])})" for a in runs[0]["arms"]),
        *dict.fromkeys(note for run in runs for note in run["notes"]),
    ]


def interruption(run: Mapping[str, Any]) -> str:
    """Return the line that says in which sessions a run was measured."""
    when = ", ".join(f"{session['repetitions']} from {session['begun']}" for session in run["sessions"])
    return f"Interrupted and resumed; repetitions, each of all programs in turn: {when}."


def _same(name: BenchmarkName, settings: Settings) -> dict[str, Any]:
    """Return what must be the same when a measurement goes on."""
    return {
        "benchmark": name.value,
        "settings": [
            list(settings.parameters),
            list(settings.clients),
            settings.repetitions,
            str(settings.peer),
            sorted(settings.leave_out),
        ],
        "machine": _machine(),
        "versions": _versions(),
    }


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _arms(job: Job, part: RunPart) -> list[dict[str, Any]]:
    arms: list[dict[str, Any]] = []
    for arm in job.arms:
        first_line = part.ready[arm.key]
        samples = [repetition[arm.key] for repetition in part.samples]
        columns = {
            metric.key: [
                figures.get(metric.key)
                for figures in ([part.rehearsals[arm.key]] if metric.rehearsed else samples)
            ]
            for metric in job.metrics
        }
        summary = {key: summarize(values) for key, values in columns.items()}
        base = arms[0]["summary"] if arms else summary
        ratio = {m.key: _ratio(summary[m.key], base[m.key]) for m in job.metrics if m.compared}
        arms.append(
            {
                "key": arm.key,
                "label": arm.label,
                "description": arm.description,
                "peer": arm.peer,
                "versions": first_line.get("versions", {}),
                "idle_rss_mib": first_line.get("idle_rss_mib"),
                "samples": columns,
                "summary": summary,
                "ratio": ratio,
            }
        )
    return arms


def _ratio(figure: dict[str, float] | None, base: dict[str, float] | None) -> float | None:
    if figure is None or base is None or base["median"] == 0:
        return None
    return figure["median"] / base["median"]


def _cell(arm: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    summary, form = arm["summary"][metric["key"]], metric["form"]
    if summary is None:
        return "-"
    ratio = arm["ratio"].get(metric["key"])
    shown, least, most = (format(summary[key] * metric["scale"], form) for key in ("median", "min", "max"))
    if ratio is not None:
        shown += f" {ratio:.2f}x" if ratio < 10 else f" {ratio:.1f}x"
    return shown if least == most else f"{shown}\n{least}-{most}"


def _title(name: str, run: Mapping[str, Any]) -> str:
    settings = ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
        for key, value in run["settings"].items()
    )
    return f"{name}: {settings}"


def _machine() -> dict[str, Any]:
    return {"cpu_model": _cpu_model(), "cores": os.cpu_count(), "system": platform.system()}


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
