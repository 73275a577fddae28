"""What the benchmark `seal` is held to: limits on figures of its runs, with what was measured beside them.

Every figure comes from the runs of one report, those of peers too; what was not measured has no value.
Where several runs qualify, the worst counts. Small runs do not qualify, because fixed costs rule them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich import box
from rich.table import Table

Run = Mapping[str, Any]
Figure = Callable[[Run], float | None]
Entry = dict[str, Any]

LEAST_PARAMETERS: Final = 1_000_000
LARGE_PARAMETERS: Final = 10_000_000

_PARTIES: Final = ("exact16", "unmasked", "compact")
_SIXTH: Final = 1 / 6


@dataclass(frozen=True)
class Target:
    """A limit on one figure.

    Attributes:
        key: Name in the report.
        label: What is limited, for people.
        most: Largest value that meets it.
        figure: Takes the value out of a run; None if the run has not measured it.
        qualifies: Whether a run counts.
        wanted: Which runs count, for people.
    """

    key: str
    label: str
    most: float
    figure: Figure
    qualifies: Callable[[int, int], bool]
    wanted: str


def evaluate(runs: Sequence[Run]) -> dict[str, Entry]:
    """Return for every target its value, the limit, whether it is met, and the run that it is from.

    A value that was not measured is None, with a reason; it is neither met nor missed.
    """
    return {target.key: _limited(target, runs) for target in TARGETS} | {"sum_exact": _sum_exact(runs)}


def targets_table(entries: Mapping[str, Entry]) -> Table:
    """Lay the result of `evaluate` out, one row per target."""
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title="targets", title_justify="left"
    )
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("at most", justify="right")
    table.add_column("")
    table.add_column("from")
    labels = {target.key: target.label for target in TARGETS}
    for key, entry in entries.items():
        verdict = {True: "met", False: "missed", None: "-"}[entry["met"]]
        name = f"{key}: {labels.get(key, 'all checked integer sums are right')}"
        origin = entry["from"] or entry["reason"]
        table.add_row(name, _shown(entry["value"]), _shown(entry["target"]), verdict, origin)
    return table


def size_name(run: Run) -> str:
    """Return a run's size for people."""
    return f"{run['settings']['parameters']:,} parameters, {run['settings']['clients']} clients"


def _limited(target: Target, runs: Sequence[Run]) -> Entry:
    entry: Entry = {"value": None, "target": target.most, "met": None, "from": None, "reason": None}
    chosen = [r for r in runs if target.qualifies(r["settings"]["parameters"], r["settings"]["clients"])]
    if not chosen:
        return entry | {"reason": f"no run with {target.wanted}"}
    known = [(value, run) for run in chosen if (value := target.figure(run)) is not None]
    if not known:
        return entry | {"reason": "the peer was not measured"}
    value, run = max(known, key=lambda pair: pair[0])
    return entry | {"value": value, "met": value <= target.most, "from": size_name(run)}


def _sum_exact(runs: Sequence[Run]) -> Entry:
    entry: Entry = {"value": None, "target": True, "met": None, "from": None, "reason": None}
    checked = [run for run in runs if run["sum_checked"]]
    if not checked:
        return entry | {"reason": "no run is small enough for its sum to be checked"}
    exact = all(_median(run, key, "wrong_integer_sums") == 0 for run in checked for key in _PARTIES)
    return entry | {"value": exact, "met": exact, "from": "; ".join(map(size_name, checked))}


def _median(run: Run, arm: str, metric: str) -> float | None:
    for candidate in run["arms"]:
        if candidate["key"] == arm and candidate["summary"][metric] is not None:
            return float(candidate["summary"][metric]["median"])
    return None


def _of(arm: str, metric: str) -> Figure:
    return lambda run: _median(run, arm, metric)


def _ratio(arm: str, other: str, metric: str) -> Figure:
    def figure(run: Run) -> float | None:
        above, below = _median(run, arm, metric), _median(run, other, metric)
        return None if above is None or not below else above / below

    return figure


def _overhead(run: Run) -> float | None:
    ratio = _ratio("exact16", "unmasked", "client_cpu_s")(run)
    return None if ratio is None else ratio - 1.0


def _opener_add(run: Run) -> float | None:
    opener = _median(run, "exact16", "opener_cpu_s")
    server = _median(run, "nvflare", "server_cpu_s")
    return None if opener is None or not server else opener / run["settings"]["clients"] / server


def _shown(value: float | bool | None) -> str:
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else f"{value:.3f}"


def _sizable(parameters: int, _clients: int) -> bool:
    return parameters >= LEAST_PARAMETERS


_SIZABLE: Final = (_sizable, "1,000,000 parameters or more")

TARGETS: Final = (
    Target(
        "bytes_up.exact16",
        "bytes per parameter",
        3.6,
        _of("exact16", "upload_bytes_per_parameter"),
        *_SIZABLE,
    ),
    Target(
        "bytes_up.compact",
        "bytes per parameter",
        2.4,
        _of("compact", "upload_bytes_per_parameter"),
        *_SIZABLE,
    ),
    Target(
        "encrypt_vs_nvflare",
        "client CPU, masks off, to NVFLARE's",
        _SIXTH,
        _ratio("unmasked", "nvflare", "client_cpu_s"),
        *_SIZABLE,
    ),
    Target(
        "add_vs_nvflare",
        "server CPU per upload (checking; openers add) to NVFLARE's",
        _SIXTH,
        _ratio("exact16", "nvflare", "server_cpu_s"),
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
        lambda parameters, clients: parameters >= LEAST_PARAMETERS and clients == 8,
        "1,000,000 parameters or more and 8 clients",
    ),
    Target(
        "rss_vs_nvflare.10M",
        "peak memory to NVFLARE's",
        0.25,
        _ratio("exact16", "nvflare", "peak_rss_mib"),
        lambda parameters, clients: parameters == LARGE_PARAMETERS and clients == 2,
        "10,000,000 parameters and 2 clients",
    ),
)
"""All limits but the one that is no number; see `evaluate`."""
