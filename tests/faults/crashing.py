"""A federation in this process whose coordinator and owners die at named steps and start again.

A crash is an exception that nothing in the product catches. What the dead party had in memory is dropped:
its database connection is closed without a commit, and it is opened again from its folder.

The plan makes every update exact: each value is far outside the range, so that it is clamped to its end,
where no rounding coin matters, and every record is in every batch. Each finished round's model then follows
from the models and lists before it alone, and is recomputed as an undisturbed twin would have made it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from steps import owner_steps

from client.app import make_app
from client.contribution import contribute
from client.owner import POLICY, Owner, open_owner
from protocol.optimizers import GlobalModel, apply_update
from protocol.plan import Plan
from protocol.records import from_record
from scenarios.federation import Federation, OwnerHome
from scenarios.grid import LocalGrid
from server.app import run_plan
from server.store import RunStore
from tasks.images import Examples
from tasks.registry import task_for

RANGE = 1e-4


class Crash(BaseException):
    """The process is gone; no handler may see it."""


def exact_fields(**sections: dict[str, Any]) -> dict[str, Any]:
    """Return a plan without noise in which no coin has any effect."""
    fields: dict[str, dict[str, Any]] = {
        "run": {"name": "crashing", "rounds": 3, "spare_attempts": 4, "paid_spares": 2},
        "task": {
            "name": "image-classification",
            "input_shape": [8, 8],
            "value_range": [0.0, 16.0],
            "classes": 10,
        },
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": 4},
        "deadlines": {"join_s": 30.0, "fit_s": 30.0, "seal_s": 30.0, "open_s": 30.0, "pause_s": 5.0},
        "training": {"local_steps": 1, "learning_rate": 1e4},
        "server_optimizer": {"name": "fedadam", "learning_rate": 0.05, "epsilon": 1e-6},
        "privacy": {"noise": "none", "sample_rate": 1.0, "expected_batch_size": 1.0},
        "encryption": {"preset": "exact16", "quorum": 2, "update_range": RANGE},
        "compression": {"prune_ratio": 0.0, "max_accuracy_drop": 1.0},
    }
    for name, changes in sections.items():
        fields[name] = fields.get(name, {}) | changes
    return fields


def allow_exact_plan(owner: OwnerHome) -> None:
    """Let an owner take part without noise, and in lists that differ in one owner, as crashes make them."""
    file = owner.folder / POLICY
    fields = tomllib.loads(file.read_text(encoding="utf-8"))
    fields["plans"] |= {"allow_no_privacy": True, "allow_close_lists": True}
    file.write_text(tomli_w.dumps(fields), encoding="utf-8")


@dataclass
class Node:
    """One owner's process: its home, its open state, and how often it was started."""

    home: OwnerHome
    owner: Owner
    started: int = 1

    def restart(self) -> None:
        """Lose everything in memory, and open the home again."""
        self.owner.pending.clear()
        self.owner.close()
        self.owner = open_owner(self.home.folder, self.home.passphrase)
        self.started += 1


class CrashingGrid(LocalGrid):
    """Nodes with transport keys, whose ids are new in every grid; an owner that dies starts again."""

    def __init__(
        self, nodes: list[Node], first_node: int, released: list[tuple[str, int]], workers: int
    ) -> None:
        self.nodes = {first_node + index: node for index, node in enumerate(nodes)}
        self._released = released
        super().__init__({number: self._app(node) for number, node in self.nodes.items()}, workers)

    def _app(self, node: Node) -> Any:
        app = make_app(lambda _context: node.owner)

        def answer(message: Message, context: Any) -> Message:
            try:
                reply = app(message, context)
            except Crash:
                node.restart()
                return Message(Error(ErrorCode.NODE_UNAVAILABLE, ""), reply_to=message)
            if message.metadata.message_type == "train.seal" and not reply.has_error():
                attempt = from_record(message.content)[0]
                self._released.append((node.home.name, _attempt_of(attempt)))
            return reply

        return answer

    def get_nodes(self) -> list[NodeInfo]:
        """Report keys and starts of the nodes, as Flower does."""
        return [
            NodeInfo(
                node_id=number,
                public_key=node.home.name.encode(),
                last_activated_at=str(node.started),
            )
            for number, node in self.nodes.items()
            if number in self._nodes
        ]


def _attempt_of(body: bytes) -> int:
    from protocol.messages import SealRequest

    return SealRequest.from_bytes(body).attempt


@dataclass
class Fault:
    """Raises `Crash` at one step, once."""

    armed: bool = True
    struck: int = 0

    def strike(self) -> None:
        """Die here, unless this was done before."""
        if self.armed:
            self.armed = False
            self.struck += 1
            raise Crash


def strike_owner(step: str, victim: Node, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Let one node die at a step of an owner."""
    owned = owner_steps(lambda one: one in (victim.owner.store, victim.owner.ledger))
    owned[step]()(monkeypatch, fault)


@dataclass
class CrashingRun:
    """One run of such a federation."""

    federation: Federation
    nodes: list[Node]
    folder: Path
    plan: Plan
    trust: Any
    released: list[tuple[str, int]] = field(default_factory=list)
    starts: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        store = RunStore(self.folder)
        store.set("plan", self.plan.fields())
        store.set("plan_hash", self.plan.sha256())
        store.set("state", "submitted")
        store.close()

    def carry_out(self) -> None:
        """Start a coordinator's process, which finds the nodes under new ids."""
        self.starts += 1
        store = RunStore(self.folder)
        grid = CrashingGrid(self.nodes, 100 * self.starts, self.released, self.workers)
        try:
            run_plan(grid, store, self.trust)
        finally:
            store.close()
            grid.close()

    def to_the_end(self) -> None:
        """Start the coordinator again as often as it dies."""
        for _ in range(3):
            try:
                self.carry_out()
            except Crash:
                continue
            return
        pytest.fail("the coordinator died more than once")

    @contextmanager
    def store(self) -> Iterator[RunStore]:
        """Open the run's store for reading."""
        store = RunStore(self.folder)
        try:
            yield store
        finally:
            store.close()

    def check(self) -> None:
        """Check what must hold after every crash; see the module's text."""
        with self.store() as store:
            assert store.get("state") == "finished", store.get("problem")
            assert [facts["round"] for facts in store.rounds()] == list(range(1, self.plan.run.rounds + 1))
            owners = {node.owner.fingerprint: node.owner for node in self.nodes}
            examples = {print_: owner.examples(self.plan) for print_, owner in owners.items()}
            for number, model in enumerate(twin_models(self.plan, store, examples)):
                assert store.read_checkpoint(number).sha256() == model.sha256(), f"round {number}"
            assert store.get("model_hash") == store.read_checkpoint(self.plan.run.rounds).sha256()
            self._check_spending(store)
            numbers = [facts["attempt"] for facts in store.attempts()]
            assert numbers == sorted(set(numbers))
            assert max(numbers) <= self.plan.max_attempts

    def _check_spending(self, store: RunStore) -> None:
        """Whatever left a node is charged in its ledger, and never below it in the coordinator's book."""
        run = store.get("run")
        for node in self.nodes:
            left = {attempt for name, attempt in self.released if name == node.home.name}
            bodies = [record.body for record in node.owner.ledger.records()]
            settled = {
                body["attempt"] for body in bodies if body["kind"] == "commit" and body["run"] == run
            }
            assert left <= settled, "an update left that the ledger does not charge"
            facts = store.owners().get(node.owner.fingerprint)
            if facts is None:
                assert not left
                continue
            assert facts["sealed"] + facts["sealed_evaluations"] >= len(left)
            if facts["statement"] is not None:
                assert facts["sealed"] + facts["sealed_evaluations"] == len(settled)


MakeRun = Callable[..., CrashingRun]
"""Makes a run; sections of its plan may be given."""


def twin_models(plan: Plan, store: RunStore, examples: dict[str, Examples]) -> list[GlobalModel]:
    """Return the models of an undisturbed run with the same lists of owners, round 0 first.

    Args:
        plan: The resolved plan.
        store: Says who was in which round.
        examples: Each owner's examples, by fingerprint.
    """
    task = task_for(plan)
    models = [GlobalModel.initial(task.initial_weights(plan))]
    for facts in store.rounds():
        updates = [
            contribute(task, plan, models[-1].weights, examples[one]) for one in facts["contributors"]
        ]
        models.append(apply_update(models[-1], exact_mean(updates), plan.server_optimizer))
    assert len({model.sha256() for model in models}) == len(models)
    return models


def exact_mean(updates: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return the mean of updates of which every value is 0 or beyond the range, as their sum gives it."""
    from crypto.packing import mean_update
    from crypto.presets import packing_for

    packing = packing_for("exact16", 4)
    assert all(np.all((update == 0.0) | (np.abs(update) > RANGE)) for update in updates)
    signs = np.sum([np.sign(update) for update in updates], axis=0).astype(np.int64)
    sums = (signs + len(updates)) * packing.half_levels
    return mean_update(sums.astype(np.uint64), len(updates), RANGE, packing, float(len(updates)))
