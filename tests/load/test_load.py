"""Many owners, many rounds: no error, no memory and no file that a round leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from client.app import make_app
from client.owner import open_owner
from scenarios.demo import wait_for_coordinator
from scenarios.grid import LocalGrid
from scenarios.process_meter import all_usages, with_descendants
from scenarios.processes import Processes
from server.listeners.sockets import free_port
from server.submit import prepare_run, submit
from tasks.resolve import resolve
from tests.load.made import PASSPHRASE, Gauge, check_faultless, many, plan_of, run_watched

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(7_200)]


@pytest.mark.parametrize(("owners", "rounds"), [(30, 100), (150, 20)])
def test_many_owners_in_one_process(
    owners: int, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    made = many(tmp_path / "federation", owners, monkeypatch)
    opened = {100 + i: open_owner(home.folder, home.passphrase) for i, home in enumerate(made.owners)}
    apps = {node: make_app(lambda _context, owner=owner: owner) for node, owner in opened.items()}
    plan, gauge = resolve(plan_of(owners, rounds)), Gauge(lambda: [os.getpid()])
    run_watched(LocalGrid(apps), made, plan, tmp_path / "run", gauge, monkeypatch)
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
    check_faultless(store, store.plan())
    assert b"Traceback" not in (tmp_path / "nodes.log").read_bytes()
    gauge.check(files_each=20)
    store.close()
