"""Many owners, many rounds: no error, no memory and no file that a round leaves behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from client.app import make_app
from client.owner import open_owner
from crypto.trust import load_trust
from protocol.plan import Plan
from scenarios.demo import wait_for_coordinator
from scenarios.federation import Federation, PolicySettings, make_federation
from scenarios.grid import LocalGrid
from scenarios.process_meter import all_usages, with_descendants
from scenarios.processes import Processes
from server.app import run_plan
from server.process import free_port
from server.store import RunStore
from server.submit import prepare_run, submit
from tasks.partition import digits
from tasks.resolve import resolve

ROOT = Path(__file__).parents[2]
SLOPE_KIB = 1_000_000 / 1024
"""Most memory that a round may leave behind: a megabyte."""

PASSPHRASE = b"only-the-load-tests-know-this-passphrase"
pytestmark = [pytest.mark.long, pytest.mark.timeout(7_200)]


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
        """Look at the second half of the rounds, when caches are warm; connections come and go."""
        memory = self.memory[len(self.memory) // 2 :]
        slope = float(np.polyfit(np.arange(len(memory)), memory, 1)[0]) / per
        files = self.files[len(self.files) // 2 :]
        print(
            f"slope {slope:.0f} KiB a round, memory {self.memory[-1]} KiB, "
            f"files {min(files)} to {max(files)}"
        )
        assert slope < SLOPE_KIB
        assert max(files) - min(files) <= files_each * per


@pytest.mark.parametrize(("owners", "rounds"), [(30, 100), (150, 20)])
def test_many_owners_in_one_process(
    owners: int, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    made = many(tmp_path / "federation", owners, monkeypatch)
    opened = {100 + i: open_owner(home.folder, home.passphrase) for i, home in enumerate(made.owners)}
    apps = {node: make_app(lambda _context, owner=owner: owner) for node, owner in opened.items()}
    plan, store, gauge = (
        resolve(plan_of(owners, rounds)),
        RunStore(tmp_path / "run"),
        Gauge(lambda: [os.getpid()]),
    )
    store.set("plan", plan.fields())
    store.set("plan_hash", plan.sha256())
    finish = store.finish_round

    def finished(*arguments: object) -> None:
        finish(*arguments)  # type: ignore[arg-type]
        gc.collect()
        gauge.note()

    monkeypatch.setattr(store, "finish_round", finished)
    started = time.monotonic()
    run_plan(LocalGrid(apps), store, load_trust(made.server_home / "identity"))
    print(f"{owners} owners, {rounds} rounds: {time.monotonic() - started:.0f} s")
    assert store.get("state") == "finished"
    assert [len(facts["contributors"]) for facts in store.rounds()] == [owners] * rounds
    assert store.refusals() == []
    gauge.check()
    store.close()
    for owner in opened.values():
        owner.close()


def test_fifty_nodes_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty rounds in which buffers fill, and thirty that are looked at, over all of its processes."""
    owners, rounds, port = 50, 60, free_port()
    made = many(tmp_path / "federation", owners, monkeypatch)
    store = prepare_run(made.server_home, plan_of(owners, rounds), None)
    homes = [str(home.folder) for home in made.owners]
    with Processes(tmp_path / "logs") as processes, (tmp_path / "nodes.log").open("wb") as log:
        processes.start(
            "coordinator",
            ["server", "--home", str(made.server_home), "--port", str(port)],
            made.server_passphrase,
        )
        wait_for_coordinator(processes, made.server_home)
        command = [sys.executable, "-m", "tests.load.many_nodes", str(port), *homes]
        nodes = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log)
        assert nodes.stdin is not None
        nodes.stdin.write(PASSPHRASE)
        nodes.stdin.close()
        try:
            coordinator = processes.pids()["coordinator"]
            gauge = Gauge(lambda: with_descendants([coordinator], all_usages()))
            seen, started = 0, time.monotonic()
            submit(made.server_home, store, made.link())
            while store.get("state") not in ("finished", "failed", "paused"):
                if store.finished_rounds() > seen:
                    seen = store.finished_rounds()
                    gauge.note()
                assert nodes.poll() is None
                time.sleep(0.05)
            print(f"{owners} nodes, {rounds} rounds: {time.monotonic() - started:.0f} s")
        finally:
            nodes.terminate()
            nodes.wait(60)
    assert store.get("state") == "finished", store.get("problem")
    assert [len(facts["contributors"]) for facts in store.rounds()] == [owners] * rounds
    assert store.refusals() == []
    assert not [facts for facts in store.attempts() if facts["void"]]
    assert b"Traceback" not in (tmp_path / "nodes.log").read_bytes()
    gauge.check(files_each=20)
    store.close()
