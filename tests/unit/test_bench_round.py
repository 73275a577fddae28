"""The benchmark of a round: what it trains, what it reads from logs and samples, and its targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.errors import BenchmarkFailed
from scenarios import bench_round
from scenarios.bench_arms import Size
from scenarios.bench_round import (
    TARGETS,
    build,
    evaluate_round,
    hidden_widths,
    owners_work,
    plan_for,
    rehearsed,
    shards,
)
from scenarios.bench_targets import targets_table
from scenarios.plain_fedavg import plain_update
from scenarios.process_meter import ProcessMeter, Samples, all_usages, with_descendants
from tasks.registry import task_for

ROOT = Path(__file__).parents[2]
LOG = """
12:00 INFO fedseal.client query.keys answered in 9.000 s
12:00 INFO fedseal.client train.fit answered in {first} s
12:00 INFO fedseal.client train.seal answered in 0.500 s
12:00 INFO fedseal.client query.open answered in 0.250 s
12:00 INFO fedseal.client train.fit answered in {second} s
12:00 INFO fedseal.client train.seal answered in 0.500 s
12:00 INFO fedseal.client train.seal answered in 0.250 s
12:00 INFO fedseal.client query.close answered in 9.000 s
"""


@pytest.mark.parametrize("parameters", [100_000, 1_000_000, 10_000_000, 50_000_000])
def test_a_network_has_about_the_parameters_that_are_asked_for(parameters: int) -> None:
    first, second = hidden_widths(parameters)
    counted = 784 * first + first + first * second + second + 10 * second + 10
    assert counted == pytest.approx(parameters, rel=0.01)


def test_the_network_is_the_one_that_the_plan_builds() -> None:
    plan = plan_for(100_000, 3, 4)
    assert task_for(plan).initial_weights(plan).size == pytest.approx(100_000, rel=0.01)
    assert (plan.run.rounds, plan.cohort.minimum, plan.cohort.maximum) == (4, 3, 3)


def test_a_plain_update_trains() -> None:
    plan = plan_for(10_000, 3, 1)
    examples = task_for(plan).check(*shards(1)[0])
    weights = task_for(plan).initial_weights(plan).astype(np.float32)
    update = plain_update(plan, weights, examples)
    assert update.shape == weights.shape
    assert 0.0 < float(np.abs(update).max()) < 1.0


def test_own_work_is_that_of_the_slowest_owner_of_each_exchange_after_the_first_round() -> None:
    logs = [LOG.format(first="50.0", second="1.000"), LOG.format(first="70.0", second="2.000")]
    assert owners_work(logs) == pytest.approx(2.0 + 0.75)


def test_two_owners_are_too_few() -> None:
    with pytest.raises(BenchmarkFailed):
        build(Size(1000, 2))
    assert [arm.key for arm in build(Size(1000, 3)).arms] == ["private", "plain", "official"]


# --- targets -----------------------------------------------------------------------------------------


def test_a_rehearsal_takes_the_fewest_owners_and_a_measurement_all() -> None:
    asked: list[Any] = []
    arm = rehearsed(lambda request: asked.append(dict(request)) or {})  # type: ignore[func-returns-value]
    arm({"parameters": 10_000_000, "clients": 30, "rehearsal": True})
    arm({"parameters": 10_000_000, "clients": 30})
    assert asked == [
        {"parameters": 10_000, "clients": 3, "rehearsal": True},
        {"parameters": 10_000_000, "clients": 30},
    ]


def made_run(parameters: int, clients: int, **medians: Any) -> dict[str, Any]:
    arms = [
        {
            "key": key,
            "summary": {name: None if value is None else {"median": value} for name, value in row.items()},
        }
        for key, row in medians.items()
    ]
    return {"settings": {"parameters": parameters, "clients": clients}, "arms": arms}


def complete(**changes: float) -> dict[str, Any]:
    row = {"round_s": 1.0, "overhead_s": 0.5, "server_growth": 2.0} | changes
    return row


def test_targets_are_judged_in_the_size_that_they_name() -> None:
    runs = [
        made_run(100_000, 3, private=complete(), plain=complete(), official=complete(round_s=20.0)),
        made_run(1_000_000, 10, private=complete(round_s=2.6), plain=complete(round_s=2.0)),
        made_run(10_000_000, 3, private=complete(server_growth=2.6), plain=complete()),
    ]
    entries = evaluate_round(runs)
    judged = {key: (entry["value"], entry["met"]) for key, entry in entries.items()}
    assert judged == {
        "overhead_s.3x0.1M": (0.5, True),
        "ratio_official.3x0.1M": (20.0, True),
        "private_over_plain.10x1M": (1.3, True),
        "server_peak_over_update.10M": (2.6, False),
    }


def test_a_figure_of_which_more_is_better_is_missed_from_below() -> None:
    slow = made_run(100_000, 3, private=complete(), official=complete(round_s=14.0))
    quick = made_run(100_000, 3, private=complete(), official=complete(round_s=40.0))
    entry = evaluate_round([slow, quick])["ratio_official.3x0.1M"]
    assert (entry["value"], entry["met"], entry["target"]) == (14.0, False, 15.0), "the worst run counts"
    shown = targets_table({"ratio": entry}).columns[2]
    assert list(shown.cells) == [">= 15.000"]


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    entries = evaluate_round([made_run(1000, 3, private=complete())])
    assert set(entries) == {target.key for target in TARGETS}
    assert all(entry["met"] is None and entry["reason"] for entry in entries.values())


# --- the meter ---------------------------------------------------------------------------------------


def test_samples_are_interpolated() -> None:
    samples = Samples([0.0, 1.0, 2.0], [0.0, 1.0, 3.0], [100.0, 150.0, 120.0])
    assert samples.cpu_between(0.5, 1.5) == pytest.approx(1.5)
    assert samples.cpu_between(0.0, 9.0) == pytest.approx(3.0)
    assert samples.rss_growth_mib(0.0, 2.0) == pytest.approx(50.0)


@pytest.mark.skipif(not all_usages(), reason="this system shows no processes")
def test_a_process_is_measured_with_its_children() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]]); input()"
    work = "x = bytearray(80 * 1024**2)\nfor _ in range(4_000_000): pass\nimport time; time.sleep(0.5)"
    child = subprocess.Popen([sys.executable, "-c", code, work], stdin=subprocess.PIPE)
    try:
        with ProcessMeter({"one": [child.pid], "other": [os.getpid()]}) as meter:
            time.sleep(1.5)
    finally:
        child.communicate(b"\n")
    samples = meter.samples["one"]
    assert samples.cpu_s[-1] > 0.05
    assert samples.cpu_s == sorted(samples.cpu_s)
    assert max(samples.rss_mib) > 80
    assert len(samples.times) >= 5


def test_every_arm_is_known() -> None:
    assert set(bench_round.ARMS) == set(bench_round.LABELS) == set(bench_round.ROUNDS)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_arm_measures_a_round_and_leaves_no_process_behind() -> None:
    """Real processes of all three: fedseal, plain FedAvg over it, and Flower's own programs."""
    before, measured = set(all_usages()), dict[str, dict[str, float | None]]()
    request = json.dumps({"parameters": 10_000, "clients": 3}) + "\n"
    for name in bench_round.ARMS:
        command = [sys.executable, "-m", "scenarios.bench_round", name]
        done = subprocess.run(command, cwd=ROOT, input=request, capture_output=True, text=True, timeout=300)
        _ready, answer = (json.loads(line) for line in done.stdout.splitlines())
        measured[name] = answer["figures"]
    for figures in measured.values():
        assert 0.0 < (figures["round_s"] or 0.0) < 120.0
        assert (figures["cpu_s"] or 0.0) > 0.0
    private = measured["private"]
    assert all((private[f"{name}_s"] or 0.0) > 0.0 for name in bench_round.EXCHANGES)
    assert 0.0 < (private["owners_s"] or 0.0) < (private["round_s"] or 0.0)
    left = [pid for pid in with_descendants([os.getpid()], all_usages()) if pid not in before]
    assert left == []
