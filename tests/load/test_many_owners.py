"""More owners than one machine has room for by itself: a few processes hold them.

``make load OWNERS=1000 ROUNDS=100`` runs the largest; see `tests.load.shared_owners` for what it shares.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from crypto.trust import load_trust
from scenarios.grid import LocalGrid
from server.app import run_plan
from server.store import RunStore
from tasks.resolve import resolve
from tests.load.made import Gauge, many, plan_of
from tests.load.shared_owners import OwnersProcess

OWNERS, ROUNDS = (int(os.environ.get(f"FEDSEAL_LOAD_{name}", "0")) for name in ("OWNERS", "ROUNDS"))
PROCESSES = 2
pytestmark = [pytest.mark.long, pytest.mark.timeout(10 * 3_600)]


@pytest.mark.parametrize(("owners", "rounds"), [(OWNERS or 300, ROUNDS or 4)])
def test_many_owners_in_two_processes(
    owners: int, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - started:7.0f} s: {what}", flush=True)

    made = many(tmp_path / "federation", owners, monkeypatch)
    homes = dict(enumerate(made.owners, 100))
    processes = [
        OwnersProcess({node: home for node, home in homes.items() if node % PROCESSES == number})
        for number in range(PROCESSES)
    ]
    say(f"{owners} homes made")
    for process in processes:
        process.wait()
    say("all owners open")
    plan, store = resolve(plan_of(owners, rounds)), RunStore(tmp_path / "run")
    gauge = Gauge(lambda: [os.getpid(), *(process.pid for process in processes)])
    store.set("plan", plan.fields())
    store.set("plan_hash", plan.sha256())
    finish = store.finish_round

    def finished(*arguments: object) -> None:
        finish(*arguments)  # type: ignore[arg-type]
        gauge.note()
        say(f"round {len(gauge.memory)}: {gauge.memory[-1] // 1024} MiB, {gauge.files[-1]} files")

    monkeypatch.setattr(store, "finish_round", finished)
    apps = {node: processes[node % PROCESSES] for node in homes}
    grid = LocalGrid(apps, workers=2 * PROCESSES)  # type: ignore[arg-type]
    try:
        run_plan(grid, store, load_trust(made.server_home / "identity"))
        assert store.get("state") == "finished", store.get("problem")
        assert [len(facts["contributors"]) for facts in store.rounds()] == [owners] * rounds
        assert store.refusals() == []
        assert not [facts for facts in store.attempts() if facts["void"]]
        gauge.check()
    finally:
        grid.close()
        store.close()
        for process in processes:
            process.close()
