"""The limits of the benchmark `seal`. Small runs do not qualify, because fixed costs rule them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scenarios.bench_targets import (
    Entry,
    Run,
    Target,
    entry,
    evaluate,
    median,
    median_of,
    ratio_of,
    size_name,
)

LEAST_PARAMETERS: Final = 1_000_000
LARGE_PARAMETERS: Final = 10_000_000

_PARTIES: Final = ("exact16", "unmasked", "compact")
_SIXTH: Final = 1 / 6


def evaluate_seal(runs: Sequence[Run]) -> dict[str, Entry]:
    """Return all targets of the benchmark, and whether every checked integer sum was right."""
    return evaluate(TARGETS, runs) | {"sum_exact": _sum_exact(runs)}


def _sum_exact(runs: Sequence[Run]) -> Entry:
    result = entry(True, "all checked integer sums are right")
    checked = [run for run in runs if run["sum_checked"]]
    if not checked:
        return result | {"reason": "no run is small enough for its sum to be checked"}
    exact = all(median(run, key, "wrong_integer_sums") == 0 for run in checked for key in _PARTIES)
    return result | {"value": exact, "met": exact, "from": "; ".join(map(size_name, checked))}


def _overhead(run: Run) -> float | None:
    ratio = ratio_of("exact16", "unmasked", "client_cpu_s")(run)
    return None if ratio is None else ratio - 1.0


def _opener_add(run: Run) -> float | None:
    opener = median(run, "exact16", "opener_cpu_s")
    server = median(run, "nvflare", "server_cpu_s")
    return None if opener is None or not server else opener / run["settings"]["clients"] / server


def _sizable(run: Run) -> bool:
    return bool(run["settings"]["parameters"] >= LEAST_PARAMETERS)


def _sizable_of_eight(run: Run) -> bool:
    return _sizable(run) and run["settings"]["clients"] == 8


def _large_of_two(run: Run) -> bool:
    return bool(run["settings"]["parameters"] == LARGE_PARAMETERS and run["settings"]["clients"] == 2)


_SIZABLE: Final = (_sizable, "1,000,000 parameters or more")

TARGETS: Final = (
    Target(
        "bytes_up.exact16",
        "bytes per parameter",
        3.6,
        median_of("exact16", "upload_bytes_per_parameter"),
        *_SIZABLE,
    ),
    Target(
        "bytes_up.compact",
        "bytes per parameter",
        2.4,
        median_of("compact", "upload_bytes_per_parameter"),
        *_SIZABLE,
    ),
    Target(
        "encrypt_vs_nvflare",
        "client CPU, masks off, to NVFLARE's",
        _SIXTH,
        ratio_of("unmasked", "nvflare", "client_cpu_s"),
        *_SIZABLE,
    ),
    Target(
        "add_vs_nvflare",
        "server CPU per upload (checking; openers add) to NVFLARE's",
        _SIXTH,
        ratio_of("exact16", "nvflare", "server_cpu_s"),
        *_SIZABLE,
    ),
    Target(
        "opener_add_vs_nvflare",
        "opener CPU per upload (checking, adding, opening) to NVFLARE's server",
        _SIXTH,
        _opener_add,
        *_SIZABLE,
    ),
    Target(
        "mask_overhead.8",
        "client CPU that seven masks add",
        0.35,
        _overhead,
        _sizable_of_eight,
        "1,000,000 parameters or more and 8 clients",
    ),
    Target(
        "rss_vs_nvflare.10M",
        "peak memory to NVFLARE's",
        0.25,
        ratio_of("exact16", "nvflare", "peak_rss_mib"),
        _large_of_two,
        "10,000,000 parameters and 2 clients",
    ),
)
"""All limits but the one that is no number; see `evaluate_seal`."""
