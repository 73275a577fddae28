"""Many owners, many rounds: no error, no memory and no file that a round leaves behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from client.app import make_app
from client.owner import open_owner
from crypto.trust import load_trust
from scenarios.demo import wait_for_coordinator
from scenarios.grid import LocalGrid
from scenarios.process_meter import all_usages, with_descendants
from scenarios.processes import Processes
from server.app import run_plan
from server.process import free_port
from server.store import RunStore
from server.submit import prepare_run, submit
from tasks.resolve import resolve
from tests.load.made import PASSPHRASE, Gauge, many, plan_of

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
