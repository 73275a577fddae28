"""Made-up owners for loads, gauges of memory and open files, and a run that is watched by one."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crypto.trust import load_trust
from protocol.plan import Plan
from scenarios.federation import Federation, PolicySettings, make_federation
from scenarios.grid import LocalGrid
from server.app import run_plan
from server.store import RunStore
from tasks.partition import digits

LEAST_ROUNDS = 10
SLOPE_KIB = 1_000_000 / 1024
"""Most memory that a round may leave behind: a megabyte."""

PASSPHRASE = b"only-the-load-tests-know-this-passphrase"


def plan_of(owners: int, rounds: int) -> Plan:
    preset = "exact16" if owners <= 256 else "wide"
    return Plan.from_fields(
        {
            "run": {"name": "load", "rounds": rounds, "spare_attempts": 3, "paid_spares": 3},
            "task": {
                "name": "image-classification",
                "input_shape": [8, 8],
                "value_range": [0.0, 16.0],
                "classes": 10,
            },
            "model": {"name": "linear"},
            "cohort": {"minimum": owners, "maximum": owners},
            "training": {"local_steps": 1, "learning_rate": 0.5},
            "privacy": {
                "target_epsilon": 4.0,
                "delta": 1e-6,
                "sample_rate": 0.5,
                "expected_batch_size": 20.0,
            },
            "encryption": {"preset": preset, "quorum": 2},
            "deadlines": {"join_s": 3600.0, "fit_s": 600.0, "seal_s": 600.0, "open_s": 600.0},
        }
    )


def many(folder: Path, owners: int, monkeypatch: pytest.MonkeyPatch) -> Federation:
    x, y = digits(seed=0, owners=1)[0][0]
    chosen = np.random.default_rng(0).integers(0, len(y), (owners, 20))
    monkeypatch.setattr("scenarios.federation._passphrase", lambda: PASSPHRASE)
    return make_federation(
        folder, [(x[rows], y[rows]) for rows in chosen], PolicySettings(epsilon_total=99.0)
    )


def resident_kib(pid: int) -> int:
    lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def files_of(pid: int) -> int:
    return len(list((Path("/proc") / str(pid) / "fd").iterdir()))


class Gauge:
    """Memory and open files of a process after each round."""

    def __init__(self, pids: Callable[[], list[int]]) -> None:
        self._pids = pids
        self.memory: list[int] = []
        self.files: list[int] = []

    def note(self) -> None:
        pids = self._pids()
        self.memory.append(sum(resident_kib(pid) for pid in pids))
        self.files.append(sum(files_of(pid) for pid in pids))

    def check(self, per: int = 1, files_each: int = 4) -> None:
        """Look at the second half of the rounds, when caches are warm; connections come and go.

        Fewer than ten rounds say nothing of memory: in their second half caches are still being filled.
        """
        memory = self.memory[len(self.memory) // 2 :]
        slope = float(np.polyfit(np.arange(len(memory)), memory, 1)[0]) / per
        files = self.files[len(self.files) // 2 :]
        print(
            f"slope {slope:.0f} KiB a round, memory {self.memory[-1]} KiB, "
            f"files {min(files)} to {max(files)}"
        )
        if len(self.memory) >= LEAST_ROUNDS:
            assert slope < SLOPE_KIB
        assert max(files) - min(files) <= files_each * per


def run_watched(
    grid: LocalGrid,
    made: Federation,
    plan: Plan,
    folder: Path,
    gauge: Gauge,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Carry out a run in this process; every owner must be in every round, and nothing may go wrong."""
    store = RunStore(folder)
    store.set("plan", plan.fields())
    store.set("plan_hash", plan.sha256())
    finish, started = store.finish_round, time.monotonic()

    def finished(*arguments: object) -> None:
        finish(*arguments)  # type: ignore[arg-type]
        gc.collect()
        gauge.note()
        print(
            f"round {len(gauge.memory)} ended at {time.monotonic() - started:.0f} s: "
            f"{gauge.memory[-1] // 1024} MiB, {gauge.files[-1]} files",
            flush=True,
        )

    monkeypatch.setattr(store, "finish_round", finished)
    run_plan(grid, store, load_trust(made.server_home / "identity"))
    check_faultless(store, plan)
    gauge.check()
    store.close()


def check_faultless(store: RunStore, plan: Plan) -> None:
    assert store.get("state") == "finished", store.get("problem")
    owners = [len(facts["contributors"]) for facts in store.rounds()]
    assert owners == [plan.cohort.maximum] * plan.run.rounds
    assert store.refusals() == []
    assert not [facts for facts in store.attempts() if facts["void"]]
