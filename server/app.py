"""The coordinator's ServerApp. It runs in a process that Flower's SuperExec starts, with installed code.

The process ends with the SuperExec and with the coordinator (`server.flower.programs`); it records nothing
then, and the coordinator notes the interruption. The run's configuration holds nothing but the name of a
folder below ``$FEDSEAL_SERVER_HOME/runs``.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from crypto.trust import Trust, load_trust
from protocol.errors import FedsealError, RunFailed
from protocol.evaluation import run_epsilon
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from server.home import HOME_VARIABLE, PUBLIC_DATA
from server.runs import open_run_folder, record_end
from server.store import RESUMABLE, RunStore, now_text
from server.strategy import Evaluate, SealStrategy
from tasks.images import unflatten
from tasks.registry import task_for

_LOG = logging.getLogger("fedseal.server")
_CLAIM_WAIT_S = 15.0


def evaluator(plan: Plan, public_data: Path) -> Evaluate:
    """Return a function that measures a model on public data; without data it returns None."""
    if not public_data.exists():
        return lambda _model: None
    task = task_for(plan)
    examples, network = task.read(public_data), task.build_model(plan)

    def evaluate(model: GlobalModel) -> float:
        unflatten(network, model.weights)
        return task.evaluate(network, examples)

    return evaluate


def run_plan(
    grid: Grid,
    store: RunStore,
    trust: Trust,
) -> None:
    """Run the plan of a store over a grid, or go on with it; the store ends as finished, paused or failed.

    Raises:
        RunBusy: Another process carries the run out; nothing is recorded.
        FedsealError: Why the run did not finish; it is recorded before it is raised.
    """
    store.claim(_CLAIM_WAIT_S)
    if store.get("state", "submitted") not in RESUMABLE:
        raise RunFailed("this run has ended; start a new one")
    plan = store.plan()
    initial = GlobalModel.initial(task_for(plan).initial_weights(plan))
    evaluate = evaluator(plan, store.folder / PUBLIC_DATA)
    with store.transaction():
        store.set("state", "running")
        store.set("problem", None)
        store.set("started_at", store.get("started_at") or now_text())
    store.set("loaded_secret_modules", secret_modules())
    # the accountant takes seconds to load, for which no owner shall wait in the first round
    run_epsilon(plan, 1, 0)
    try:
        SealStrategy(store, initial, evaluate, trust).start(grid)
    except FedsealError as error:
        record_end(store, error)
        raise
    finally:
        store.set("loaded_secret_modules", secret_modules())


def secret_modules() -> list[str]:
    """Return the modules of this process that could use a secret encryption key; it must be none."""
    using = ("crypto.measuring", "crypto.secret", "crypto.sealing", "client.opening", "client.rounds")
    return sorted(name for name in sys.modules if name in using)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the plan that the run's configuration names."""
    store = open_run_folder(str(context.run_config["run"]))
    pki = Path(os.environ[HOME_VARIABLE]) / "identity"
    try:
        run_plan(grid, store, load_trust(pki))
    finally:
        store.close()
