"""More owners than one machine has room for by itself: a few processes hold them.

``make load OWNERS=1000 ROUNDS=100`` runs the largest; see `tests.load.shared_owners` for what it shares.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from scenarios.grid import LocalGrid
from tasks.resolve import resolve
from tests.load.made import Gauge, many, plan_of, run_watched
from tests.load.shared_owners import OwnersProcess

OWNERS, ROUNDS = (int(os.environ.get(f"FEDSEAL_LOAD_{name}", "0")) for name in ("OWNERS", "ROUNDS"))
PROCESSES = 2
pytestmark = [pytest.mark.long, pytest.mark.timeout(10 * 3_600)]


@pytest.mark.parametrize(("owners", "rounds"), [(OWNERS or 300, ROUNDS or 4)])
def test_many_owners_in_two_processes(
    owners: int, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, started = many(tmp_path / "federation", owners, monkeypatch), time.monotonic()
    homes = dict(enumerate(made.owners, 100))
    shares = [{node: homes[node] for node in homes if node % PROCESSES == one} for one in range(PROCESSES)]
    with ExitStack() as stack:
        processes = [stack.enter_context(OwnersProcess(share)) for share in shares]
        for process in processes:
            process.wait()
        print(f"{owners} owners opened in {time.monotonic() - started:.0f} s", flush=True)
        grid = LocalGrid({node: processes[node % PROCESSES] for node in homes}, workers=2 * PROCESSES)
        stack.callback(grid.close)
        gauge = Gauge(lambda: [os.getpid(), *(process.pid for process in processes)])
        run_watched(grid, made, resolve(plan_of(owners, rounds)), tmp_path / "run", gauge, monkeypatch)
