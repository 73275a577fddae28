"""Targets of the benchmark seal follow from what was measured, and from nothing else."""

import io
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from scenarios import bench_seal
from scenarios.bench_seal_targets import TARGETS, evaluate_seal
from scenarios.bench_targets import targets_table

TARGET_KEYS = [
    "bytes_up.exact16",
    "bytes_up.compact",
    "encrypt_vs_nvflare",
    "add_vs_nvflare",
    "opener_add_vs_nvflare",
    "mask_overhead.8",
    "rss_vs_nvflare.10M",
    "sum_exact",
]


def made_run(parameters: int, clients: int, arms: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A run as the report holds it, from medians."""
    metrics = [metric.key for metric in bench_seal.METRICS]
    summaries = {
        key: {m: {"median": medians[m]} if m in medians else None for m in metrics}
        for key, medians in arms.items()
    }
    return {
        "settings": {"parameters": parameters, "clients": clients},
        "sum_checked": True,
        "arms": [{"key": key, "summary": summary} for key, summary in summaries.items()],
    }


def ours(client: float = 1.3, wrong: float = 0.0) -> dict[str, dict[str, float]]:
    def arm(client_s: float, up: float) -> dict[str, float]:
        costs = {"client_cpu_s": client_s, "server_cpu_s": 1.0, "opener_cpu_s": 4.0, "peak_rss_mib": 100.0}
        return {**costs, "upload_bytes_per_parameter": up, "wrong_integer_sums": wrong}

    return {"exact16": arm(client, 3.5), "unmasked": arm(1.0, 3.5), "compact": arm(0.9, 2.5)}


NVFLARE = {"client_cpu_s": 7.0, "server_cpu_s": 5.0, "peak_rss_mib": 500.0}


def test_targets_are_met_or_missed_by_what_was_measured() -> None:
    runs = [
        made_run(1_000_000, 8, {**ours(), "nvflare": NVFLARE}),
        made_run(10_000_000, 2, {**ours(), "nvflare": NVFLARE}),
    ]
    entries = evaluate_seal(runs)
    assert list(entries) == TARGET_KEYS
    values = {key: entry["value"] for key, entry in entries.items()}
    assert values["encrypt_vs_nvflare"] == pytest.approx(1 / 7)
    assert values["add_vs_nvflare"] == pytest.approx(1 / 5)
    # the smaller cohort is the worse one here: an opener's fixed cost falls on two uploads
    assert values["opener_add_vs_nvflare"] == pytest.approx(4 / 2 / 5)
    assert values["mask_overhead.8"] == pytest.approx(0.3)
    assert values["rss_vs_nvflare.10M"] == pytest.approx(0.2)
    assert entries["rss_vs_nvflare.10M"]["from"] == "10,000,000 parameters, 2 clients"
    missed = {key for key, entry in entries.items() if not entry["met"]}
    assert missed == {"bytes_up.compact", "add_vs_nvflare", "opener_add_vs_nvflare"}


def test_the_worst_run_counts() -> None:
    runs = [
        made_run(n, 8, {**ours(client), "nvflare": NVFLARE})
        for n, client in ((1_000_000, 1.2), (2_000_000, 1.5), (3_000_000, 1.1))
    ]
    entry = evaluate_seal(runs)["mask_overhead.8"]
    assert (entry["met"], entry["from"]) == (False, "2,000,000 parameters, 8 clients")
    assert entry["value"] == pytest.approx(0.5)


def test_what_was_not_measured_has_no_value() -> None:
    entries = evaluate_seal([made_run(1_000_000, 8, ours())])
    for key in ("encrypt_vs_nvflare", "add_vs_nvflare"):
        assert (entries[key]["value"], entries[key]["met"]) == (None, None)
        assert entries[key]["reason"] == "the peer was not measured"
    assert "no run with 10,000,000" in entries["rss_vs_nvflare.10M"]["reason"]
    small = evaluate_seal([made_run(1000, 8, {**ours(), "nvflare": NVFLARE})])
    assert all(small[target.key]["value"] is None for target in TARGETS)


@pytest.mark.parametrize("wrong", [1.0, None])
def test_one_wrong_sum_or_one_that_nobody_compared_is_not_exact(wrong: float | None) -> None:
    arms = ours()
    if wrong is None:
        del arms["compact"]["wrong_integer_sums"]
    else:
        arms["compact"]["wrong_integer_sums"] = wrong
    entry = evaluate_seal([made_run(10, 2, ours()), made_run(10, 8, arms)])["sum_exact"]
    assert (entry["value"], entry["met"]) == (False, False)


def test_a_missed_target_is_printed_as_missed() -> None:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(targets_table(evaluate_seal([made_run(1_000_000, 8, ours())])))
    rows = {line.split(":")[0].strip(): line for line in capture.get().splitlines() if ":" in line}
    assert " missed " in rows["bytes_up.compact"]
    assert " met " in rows["bytes_up.exact16"]
    assert "the peer was not measured" in rows["add_vs_nvflare"]
