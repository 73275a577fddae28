"""The benchmark `seal`: what one sum of encrypted updates costs each party, beside other systems.

One request plays a round in one process: clients turn updates into bytes, the server checks and adds them,
whoever may opens the sum. The clock covers what is done once per round. Keys, contexts of a whole run and
pair seeds are made before. As a module it is an arm: ``python -m scenarios.bench_seal ARM``.

Time per client does not depend on how many are timed, so at most `SEALED` clients seal in a repetition and
at most `TIMED_ADDS` uploads are timed. The sum is of all clients all the same: where uploads are not
interchangeable, all clients seal in the rehearsal and the uploads of those that are not timed are kept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from crypto.presets import packing_for
from protocol.errors import BenchmarkFailed
from scenarios.bench_arms import Arm, Figures, Job, Metric, Size
from scenarios.bench_worker import peak_rss_mib, reset_peak, serve_arm
from scenarios.seal_rounds import ROUNDS, UPDATE_RANGE, Opened, Round

FLOAT32_BYTES: Final = 4.0

SEALED: Final = 4
"""Most clients whose sealing is timed; client i has the update of client i modulo this."""

TIMED_ADDS: Final = 8
"""Most uploads whose adding is timed."""

MOST_VALUES: Final = 80_000_000
"""Most values, clients times parameters, whose sum is made and checked; more would take too long."""

PRESETS: Final = ("exact16", "compact")

LABELS: Final = {
    "exact16": (
        "fedseal exact16",
        "the default preset; sealing, adding and opening as owners and coordinator do",
    ),
    "unmasked": (
        "fedseal exact16, masks off",
        "without masks, for comparison with systems that have none; fedseal itself always masks",
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
    "client: NVFLARE's figure is encrypting and serializing; fedseal's is quantizing, packing, encrypting"
    " and hashing, so it includes more.",
)

UNCHECKED: Final = (
    f"more than {MOST_VALUES:,} values: the sum was neither made nor checked, and nothing was opened"
)
"""Note of a run whose exactness is not claimed."""

Params = ParamSpec("Params")
Result = TypeVar("Result")


def build(size: Size, peer_python: Path | None, folder: Path) -> Job:
    """Draw the updates, store them in `folder`, and say what to measure."""
    updates, result = folder / "updates.f32", folder / "mean.f64"
    summed = sum_is_checked(size)
    mean = write_updates(updates, size.parameters, size.clients)
    commands: dict[str, tuple[str, ...]] = {
        key: (sys.executable, "-m", "scenarios.bench_seal", key) for key in ROUNDS
    }
    if peer_python is not None:
        script = Path(__file__).parent / "peers" / "nvflare_seal.py"
        # isolated: neither our packages nor the caller's PYTHONPATH may stand in for the peer's
        commands["nvflare"] = (str(peer_python), "-I", str(script))
    arms = [
        Arm(key, *names, commands[key], peer=key not in ROUNDS)
        for key, names in LABELS.items()
        if key in commands
    ]
    sealed = min(size.clients, SEALED)
    return Job(
        settings={"parameters": size.parameters, "clients": size.clients},
        arms=arms,
        metrics=METRICS,
        request={
            "updates": str(updates),
            "result": str(result),
            "parameters": size.parameters,
            "clients": size.clients,
            "sealed": sealed,
            "timed_adds": min(size.clients, TIMED_ADDS) if summed else sealed,
            "summed": summed,
        },
        judge=(lambda: judge(result, mean)) if summed else (lambda: {"max_abs_error": None}),
        facts={"sum_checked": summed},
        references={"plain float32 bytes per parameter": FLOAT32_BYTES},
        notes=NOTES if summed else (*NOTES, UNCHECKED),
    )


def require_capacity(sizes: Sequence[Size]) -> None:
    """Check all sizes before the first is measured.

    Raises:
        CapacityExceeded: A preset cannot hold a sum of so many clients.
    """
    for size in sizes:
        for preset in PRESETS:
            packing_for(preset, size.clients)


def sum_is_checked(size: Size) -> bool:
    """Whether the sum of this size is made, and compared with the integers that went in."""
    return size.parameters * size.clients <= MOST_VALUES


def write_updates(file: Path, parameters: int, clients: int) -> NDArray[np.float64]:
    """Write the different updates one after the other as little-endian float32; return all clients' mean.

    The values are normal with deviation 0.25, clamped to [-1, 1]; the seed is fixed.
    """
    rng, total, different = np.random.default_rng(0), np.zeros(parameters), min(clients, SEALED)
    with file.open("wb") as stream:
        for first in range(different):
            update = rng.normal(0.0, 0.25, parameters).clip(-UPDATE_RANGE, UPDATE_RANGE).astype("<f4")
            stream.write(update.tobytes())
            total += len(range(first, clients, different)) * update.astype(np.float64)
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


class Player:
    """Plays rounds for one arm; what a rehearsal sealed stays for the repetitions after it.

    Args:
        make: Makes the parties of a round of that many clients.
    """

    def __init__(self, make: Callable[[int], Round]) -> None:
        self._make = make
        self._parties: Round
        self._kept: dict[int, list[bytes]] = {}

    def measure(self, request: Mapping[str, Any]) -> Figures:
        """Play one round, write its mean to the request's result file, and return the figures.

        In a rehearsal all clients seal; their integers are kept too, which costs memory, and the sums are
        compared. Without ``summed``, only what is timed is added, and nothing is opened.
        """
        reset_peak()
        rehearsal, summed = bool(request.get("rehearsal", False)), bool(request["summed"])
        if rehearsal or not self._kept:
            self._parties, self._kept = self._make(int(request["clients"])), {}
        self._parties.begin(rehearsal=rehearsal and summed)
        self._clock, self._upload_bytes, self._added = CpuClock(), 0, 0
        self._expected = np.zeros(int(request["parameters"]) if rehearsal and summed else 0, dtype=np.int64)
        self._add_all(request)
        figures = self._costs(request)
        return figures | (self._open(request) if summed else {"wrong_integer_sums": None})

    def _add_all(self, request: Mapping[str, Any]) -> None:
        sealed, clients = int(request["sealed"]), int(request["clients"])
        if self._parties.reusable:
            # an upload serves all clients with the same update and is then dropped, as a peer drops it
            for first in range(sealed):
                upload = self._seal(first, request)
                for index in range(first, clients if request["summed"] else sealed, sealed):
                    self._add(index, upload, request)
                # nobody needs it any more: it must not count in the peak of the next one's sealing
                del upload
            return
        for index in range(clients if request["summed"] else sealed):
            upload = self._kept.get(index) or self._seal(index, request)
            if index >= sealed:
                self._kept[index] = upload
            self._add(index, upload, request)

    def _seal(self, index: int, request: Mapping[str, Any]) -> list[bytes]:
        parameters, sealed = int(request["parameters"]), int(request["sealed"])
        offset = 4 * parameters * (index % sealed)
        update = np.fromfile(request["updates"], dtype="<f4", count=parameters, offset=offset)
        phase = "client" if index < sealed else "others"
        upload = self._clock.run(phase, self._parties.seal, index, update)
        if index < sealed:
            self._upload_bytes += sum(len(part) for part in upload)
        if self._expected.size and (integers := self._parties.sealed_integers(update)) is not None:
            self._expected += integers
        return upload

    def _add(self, index: int, upload: list[bytes], request: Mapping[str, Any]) -> None:
        phase = "server" if self._added < int(request["timed_adds"]) else "others"
        self._clock.run(phase, self._parties.add, index, upload)
        self._added += 1

    def _costs(self, request: Mapping[str, Any]) -> Figures:
        up = self._upload_bytes / int(request["sealed"]) / int(request["parameters"])
        return {
            "client_cpu_s": self._clock.seconds["client"] / int(request["sealed"]),
            "server_cpu_s": self._clock.seconds["server"] / int(request["timed_adds"]),
            "upload_bytes_per_parameter": up,
            "upload_per_float32": up / FLOAT32_BYTES,
            "opening_bytes_per_parameter": up * int(request["clients"])
            if self._parties.download_all
            else None,
        }

    def _open(self, request: Mapping[str, Any]) -> Figures:
        parties, seconds = self._parties, self._clock.seconds
        download = self._clock.run("round", parties.finish)
        opened = self._clock.run("opener", parties.open, download)
        np.asarray(opened.mean, dtype="<f8").tofile(request["result"])
        down = sum(len(part) for part in download) / int(request["parameters"])
        return {
            "server_round_cpu_s": None if parties.download_all else seconds["round"],
            "opener_cpu_s": seconds["opener"] if parties.clients_open else None,
            # owners answer each opened sum as a little-endian uint32
            "download_bytes_per_parameter": 4.0 if parties.download_all else down,
            "peak_rss_mib": peak_rss_mib(),
            "wrong_integer_sums": _wrong_sums(opened, self._expected) if self._expected.size else None,
        }


def _wrong_sums(opened: Opened, expected: NDArray[np.int64]) -> float | None:
    if opened.integers is None:
        return None
    return float(np.count_nonzero(opened.integers.astype(np.int64) != expected))


def _serve(name: str) -> None:
    def make() -> Callable[[Mapping[str, Any]], Figures]:
        player = Player(ROUNDS[name])
        # imports what the arm needs
        ROUNDS[name](2)
        return player.measure

    serve_arm(make, ("numpy", "flwr") if name == "secagg" else ("numpy", "tenseal"))


if __name__ == "__main__":
    _serve(sys.argv[1])
