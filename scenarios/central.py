"""Central training: one party with all the data, as the bar that a federation is measured against.

The owners' own training step, the plan's server optimizer and the plan's accounting are used as they
are. There is nobody to hide an update from, so that nothing is encrypted, quantized or sent.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from client.training import local_update
from protocol.accounting import epsilon_after
from protocol.optimizers import GlobalModel, apply_update
from protocol.plan import Plan
from server.app import evaluator
from server.home import PUBLIC_DATA
from server.store import RunStore, now_text
from tasks.images import Examples
from tasks.registry import task_for

_EVALUATIONS = 20
"""Measuring a model on ten thousand images can take longer than a step."""


@dataclass
class CentralTraining:
    """Training by one party, ready to run.

    Attributes:
        store: Receives the same events as a federation's.
        plan: Resolved; a round is `local_steps` steps and one step of the server optimizer.
        examples: All the data.
    """

    store: RunStore
    plan: Plan
    examples: Examples

    def run(self) -> None:
        """Train for all rounds; at most twenty of them and the last are evaluated and recorded.

        Raises:
            FedsealError: Training stopped.
        """
        plan, task = self.plan, task_for(self.plan)
        evaluate = evaluator(plan, self.store.folder / PUBLIC_DATA)
        model = GlobalModel.initial(task.initial_weights(plan))
        every = math.ceil(plan.run.rounds / _EVALUATIONS)
        for number in range(1, plan.run.rounds + 1):
            clock = time.monotonic()
            update = local_update(task, plan, model.weights, self.examples)
            model = apply_update(model, update, plan.server_optimizer)
            seconds = {"fit": time.monotonic() - clock, "seal": 0.0, "open": 0.0}
            if number % every == 0 or number == plan.run.rounds:
                self._record(number, model, evaluate(model), seconds)
        self.store.set("state", "finished")
        self.store.set("finished_at", now_text())

    def close(self) -> None:
        """Release files."""
        self.store.close()

    def _record(
        self, number: int, model: GlobalModel, accuracy: float | None, seconds: dict[str, float]
    ) -> None:
        facts = {"accuracy": accuracy, "seconds": seconds}
        self.store.write_checkpoint(number, model)
        self.store.finish_round(number, number, facts, b"", model)
        self.store.event(
            "round",
            round=number,
            attempt=number,
            contributors=1,
            epsilon={"the only owner": epsilon_after(self.plan, number)},
            upload_bytes=0,
            download_bytes=0,
            **facts,
        )


def prepare_central(plan: Plan, examples: Examples, folder: Path) -> CentralTraining:
    """Return central training with a store in a new or empty folder.

    Args:
        plan: Resolved.
        examples: All the data, preprocessed.
        folder: Receives the run's store.
    """
    store = RunStore(folder)
    store.set("plan", plan.fields())
    store.set("plan_hash", plan.sha256())
    return CentralTraining(store, plan, examples)
