"""The benchmark `seal`: what one sum of encrypted updates costs each party, beside other systems.

One request plays a whole round in one process: every client turns its update into bytes, the server checks
and adds them, whoever may opens the sum. The clock covers what is done once per round. Keys, contexts of a
whole run and pair seeds are made before. As a module it is an arm: ``python -m scenarios.bench_seal ARM``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from crypto.presets import packing_for
from protocol.errors import BenchmarkFailed
from scenarios.bench_arms import Arm, Figures, Job, Metric, Settings
from scenarios.seal_rounds import ROUNDS, UPDATE_RANGE, Opened, Round

FLOAT32_BYTES: Final = 4.0
PRESETS: Final = ("exact16", "compact")

LABELS: Final = {
    "exact16": (
        "fedseal exact16",
        "the default preset; sealing, adding and opening as owners and coordinator do",
    ),
    "compact": ("fedseal compact", "the same with three values per slot and a coarser grid"),
    "tenseal": ("TenSEAL CKKS", "its high-level vectors of 4,096 values; 8192, [60, 40, 40], symmetric"),
    "nvflare": ("NVFLARE 2.9.0", "its own HE encryptor, aggregation and decryptor, in its own environment"),
    "secagg": ("flwr SecAgg+", "flwr SecAgg+ (legacy API), server sees the sum in clear"),
}
"""Short name and description of each arm, in the order in which they are measured."""

METRICS: Final = (
    Metric("client_cpu_s", "client, CPU ms", ".1f", 1000.0),
    Metric("server_cpu_s", "server per upload, CPU ms", ".1f", 1000.0),
    Metric("server_round_cpu_s", "server per round, CPU ms", ".1f", 1000.0),
    Metric("opener_cpu_s", "opener, CPU ms", ".1f", 1000.0),
    Metric("upload_bytes_per_parameter", "up, bytes per parameter", ".2f"),
    Metric("upload_per_float32", "up, multiple of float32 (4.00)", ".2f", compared=False),
    Metric("download_bytes_per_parameter", "down, bytes per parameter", ".2f"),
    Metric("opening_bytes_per_parameter", "down besides, each opener", ".2f"),
    Metric("peak_rss_mib", "peak memory, MiB", ".0f"),
    Metric("max_abs_error", "largest error of the mean", ".0e", compared=False),
    Metric("wrong_integer_sums", "wrong integer sums", ".0f", compared=False, rehearsed=True),
)

NOTES: Final = (
    "fedseal: the quorum and one more open (3 owners by default). Each downloads all uploads and answers"
    " 4 bytes per parameter; these opened integers are what every other client downloads.",
    "TenSEAL, NVFLARE: every client downloads and decrypts the sum, so every client pays the opener's row.",
    "fedseal's memory holds all uploads of the round, because openers get them; peers drop each one.",
)

Params = ParamSpec("Params")
Result = TypeVar("Result")


def build(settings: Settings, folder: Path) -> Job:
    """Draw the updates, store them in `folder`, and say what to measure.

    Raises:
        CapacityExceeded: A preset cannot hold a sum of this many clients.
    """
    for preset in PRESETS:
        packing_for(preset, settings.clients)
    updates, result = folder / "updates.f32", folder / "mean.f64"
    mean = write_updates(updates, settings.parameters, settings.clients)
    commands: dict[str, tuple[str, ...]] = {
        key: (sys.executable, "-m", "scenarios.bench_seal", key) for key in ROUNDS
    }
    if settings.peer_python is not None:
        script = Path(__file__).parent / "peers" / "nvflare_seal.py"
        # isolated: neither our packages nor the caller's PYTHONPATH may stand in for the peer's
        commands["nvflare"] = (str(settings.peer_python), "-I", str(script))
    arms = [
        Arm(key, *names, commands[key], peer=key not in ROUNDS)
        for key, names in LABELS.items()
        if key in commands
    ]
    return Job(
        settings={"parameters": settings.parameters, "clients": settings.clients},
        arms=arms,
        metrics=METRICS,
        request={
            "updates": str(updates),
            "result": str(result),
            "parameters": settings.parameters,
            "clients": settings.clients,
        },
        judge=lambda: judge(result, mean),
        references={"plain float32 bytes per parameter": FLOAT32_BYTES},
        notes=NOTES,
    )


def write_updates(file: Path, parameters: int, clients: int) -> NDArray[np.float64]:
    """Write the clients' updates one after the other as little-endian float32; return their mean.

    The values are normal with deviation 0.25, clamped to [-1, 1]; the seed is fixed.
    """
    rng, total = np.random.default_rng(0), np.zeros(parameters)
    with file.open("wb") as stream:
        for _ in range(clients):
            update = rng.normal(0.0, 0.25, parameters).clip(-UPDATE_RANGE, UPDATE_RANGE).astype("<f4")
            stream.write(update.tobytes())
            total += update
    mean: NDArray[np.float64] = total / clients
    return mean


def judge(result: Path, mean: NDArray[np.float64]) -> Figures:
    """Compare the mean that an arm wrote with numpy's, and remove it so that no arm is judged by another's.

    Raises:
        BenchmarkFailed: The arm wrote no mean, one of another length, or one that is not finite.
    """
    found = np.fromfile(result, dtype="<f8") if result.exists() else np.zeros(0)
    result.unlink(missing_ok=True)
    if found.size != mean.size or not np.isfinite(found).all():
        raise BenchmarkFailed("an arm did not return a finite mean of the right length")
    return {"max_abs_error": float(np.max(np.abs(found - mean)))}


class CpuClock:
    """CPU seconds of this process, all threads, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(
        self, phase: str, work: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs
    ) -> Result:
        """Call `work` and charge its CPU time to `phase`."""
        start = time.process_time()
        result = work(*args, **kwargs)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.process_time() - start
        return result


def measure(make: Callable[[int, bool], Round], request: Mapping[str, Any]) -> Figures:
    """Play one round, write its mean to the request's result file, and return the figures.

    In a rehearsal the integers that went in are kept too, which costs memory, and their sums are compared.
    """
    parameters, clients = int(request["parameters"]), int(request["clients"])
    rehearsal = bool(request.get("rehearsal", False))
    reset_peak()
    parties, clock = make(clients, rehearsal), CpuClock()
    upload_bytes, expected = 0, np.zeros(parameters if rehearsal else 0, dtype=np.int64)
    for index in range(clients):
        offset = 4 * parameters * index
        update = np.fromfile(request["updates"], dtype="<f4", count=parameters, offset=offset)
        upload = clock.run("client", parties.seal, index, update)
        clock.run("server", parties.add, upload)
        upload_bytes += sum(len(part) for part in upload)
        integers = parties.sealed_integers(update) if rehearsal else None
        if integers is not None:
            expected += integers
    download = clock.run("round", parties.finish)
    opened = clock.run("opener", parties.open, download)
    np.asarray(opened.mean, dtype="<f8").tofile(request["result"])
    up, down = upload_bytes / clients / parameters, sum(len(part) for part in download) / parameters
    if parties.download_all:
        # owners answer each opened sum as a little-endian uint32
        down = 4.0
    return {
        "client_cpu_s": clock.seconds["client"] / clients,
        "server_cpu_s": clock.seconds["server"] / clients,
        "server_round_cpu_s": None if parties.download_all else clock.seconds["round"],
        "opener_cpu_s": clock.seconds["opener"] if parties.clients_open else None,
        "upload_bytes_per_parameter": up,
        "upload_per_float32": up / FLOAT32_BYTES,
        "download_bytes_per_parameter": down,
        "opening_bytes_per_parameter": up * clients if parties.download_all else None,
        "peak_rss_mib": peak_rss_mib(),
        "wrong_integer_sums": _wrong_sums(opened, expected) if rehearsal else None,
    }


def _wrong_sums(opened: Opened, expected: NDArray[np.int64]) -> float | None:
    if opened.integers is None:
        return None
    return float(np.count_nonzero(opened.integers.astype(np.int64) != expected))


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


def serve_arm(name: str) -> None:
    """Answer requests from standard input until it ends; see `scenarios.bench_arms`."""
    # libraries print warnings to file descriptor 1, which would break the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    make = ROUNDS[name]
    # imports what the arm needs
    make(2, False)
    packages = ("numpy", "flwr") if name == "secagg" else ("numpy", "tenseal")
    versions = {package: importlib.metadata.version(package) for package in packages}
    ready = {"versions": {"python": platform.python_version(), **versions}, "idle_rss_mib": peak_rss_mib()}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"figures": measure(make, json.loads(line))}
        except Exception as error:
            # only the kind: messages of libraries may hold paths
            answer = {"error": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve_arm(sys.argv[1])
