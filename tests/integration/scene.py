"""A simulated federation whose nodes come and go while a run is under way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context
from real_federation import PASSPHRASE, small_plan

from client.app import make_app
from client.owner import Owner
from client.state import RunState
from scenarios.simulate import Simulation, federate
from server.store import RunStore
from tasks.partition import digits
from tasks.resolve import resolve

ROUNDS = 4
Hook = Callable[[int], None]


def fixed(owner: Owner, _context: Context) -> Owner:
    return owner


class Scene:
    """A simulated federation whose nodes come and go when rounds finish."""

    def __init__(self, folder: Path, owners: int, **sections: dict[str, Any]) -> None:
        defaults = {
            "run": {"rounds": ROUNDS, "spare_attempts": 3},
            "cohort": {"minimum": 3, "maximum": 5},
            "deadlines": {"pause_s": 2.0, "join_s": 20.0},
        }
        fields = {
            name: defaults.get(name, {}) | sections.get(name, {}) for name in {**defaults, **sections}
        }
        self.plan = resolve(small_plan(**fields))
        shards, _public = digits(0, owners)
        self.folder = folder
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("scenarios.federation._passphrase", lambda: PASSPHRASE)
            self.simulation: Simulation = federate(self.plan, shards, folder)
        self.nodes = sorted(self.simulation.owners)

    @property
    def store(self) -> RunStore:
        return self.simulation.store

    def owner(self, index: int) -> Owner:
        return self.simulation.owners[self.nodes[index]]

    def go(self, index: int) -> None:
        self.simulation.grid.remove(self.nodes[index])

    def come(self, index: int) -> None:
        self.simulation.grid.add(self.nodes[index], make_app(partial(fixed, self.owner(index))))

    def run(self, monkeypatch: pytest.MonkeyPatch, after: dict[int, Hook]) -> None:
        """Run the plan; `after` says what happens behind a round, before it counts."""
        finish = RunStore.finish_round

        def finish_round(store: RunStore, attempt: int, number: int, *rest: Any) -> None:
            finish(store, attempt, number, *rest)
            if number in after:
                after.pop(number)(number)

        monkeypatch.setattr(RunStore, "finish_round", finish_round)
        # all nodes of a first roster are there before the run begins
        monkeypatch.setattr("server.cohort.session.SETTLE_S", 0.3)
        self.simulation.run()

    def contributors(self) -> list[list[int]]:
        """Return for each finished round who contributed, by index."""
        prints = {self.owner(index).fingerprint: index for index in range(len(self.nodes))}
        return [sorted(prints[one] for one in facts["contributors"]) for facts in self.store.rounds()]

    def sessions(self) -> list[dict[str, Any]]:
        return [facts for _id, _time, kind, facts in self.store.events() if kind == "session"]

    def state(self, index: int) -> RunState:
        state = self.owner(index).store.find(self.store.get("run"))
        assert state is not None
        return state

    def check_models(self, *indices: int) -> None:
        final = self.store.read_checkpoint(self.store.finished_rounds()).sha256()
        for index in indices:
            assert self.owner(index).store.model(self.store.get("run")).sha256() == final
