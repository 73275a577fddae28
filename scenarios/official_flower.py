"""FedAvg as Flower's own programs run it: SuperLink, SuperNodes, and an app that its command line submits.

The training is that of `scenarios.plain_fedavg`. Neither TLS nor node authentication are switched on, which
favours this arm. For benchmarks only. The functions of this module up to `official_client` run inside
Flower's processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from protocol.errors import BenchmarkFailed
from protocol.plan import Plan
from scenarios.plain_fedavg import plain_update
from scenarios.processes import Processes
from server.listeners.sockets import free_port
from tasks.registry import task_for

ROOT: Final = Path(__file__).parents[1]
ROUNDS_FILE: Final = "rounds.jsonl"

_START_S: Final = 120.0
_BIN: Final = Path(sys.executable).parent
_KEY: Final = "weights"
_APP: Final = """
[project]
name = "plain"
version = "0.1.0"
description = "FedAvg of the benchmark."
license = {text = "Apache-2.0"}
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "server_code:app"
clientapp = "client_code:app"

[tool.flwr.app.config]
folder = ""
"""
_CONNECTION: Final = """
[superlink]
default = "bench"

[superlink.bench]
address = "127.0.0.1:{port}"
insecure = true
"""


def _plan(folder: Path) -> Plan:
    return Plan.from_toml((folder / "plan.toml").read_text(encoding="utf-8"))


def official_server() -> ServerApp:
    """Return FedAvg over all nodes, which notes when each round ended."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        folder = Path(str(context.run_config["folder"]))
        plan = _plan(folder)
        owners = plan.cohort.maximum

        def note(number: int, _arrays: ArrayRecord) -> MetricRecord | None:
            with (folder / ROUNDS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"round": number, "time": time.time()}) + "\n")
            return None

        weights = task_for(plan).initial_weights(plan).astype(np.float32)
        strategy = FedAvg(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=owners, min_available_nodes=owners
        )
        arrays = ArrayRecord({_KEY: _array(weights)})
        strategy.start(grid, arrays, num_rounds=plan.run.rounds, evaluate_fn=note)

    return app


def official_client() -> ClientApp:
    """Return an app that trains on the data file of its node's configuration."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        folder, data = (Path(str(context.node_config[name])) for name in ("folder", "data"))
        plan = _plan(folder)
        weights = message.content.array_records["arrays"][_KEY].numpy()
        examples = task_for(plan).read(data)
        trained = weights + plain_update(plan, weights, examples)
        content = RecordDict(
            {
                "arrays": ArrayRecord({_KEY: _array(trained)}),
                "metrics": MetricRecord({"num-examples": len(examples)}),
            }
        )
        return Message(content=content, reply_to=message)

    return app


def _array(values: Any) -> Any:
    from flwr.app import Array

    return Array(np.ascontiguousarray(values, dtype=np.float32))


def start_official(processes: Processes, folder: Path, data: list[Path]) -> int:
    """Start a SuperLink and a SuperNode per data file; returns the SuperLink's port.

    Raises:
        BenchmarkFailed: The SuperLink does not answer.
    """
    port, shared = free_port(), _environment()
    processes.start(
        "superlink",
        ["--insecure", "--host=127.0.0.1", f"--port={port}", "--disable-runtime-dependency-installation"],
        program=[str(_BIN / "flower-superlink")],
        environment={**shared, "FLWR_HOME": str(folder / "superlink")},
    )
    _wait_for(port)
    for index, file in enumerate(data):
        config = f'folder="{folder}" data="{file}"'
        processes.start(
            f"supernode-{index + 1}",
            [
                "--insecure",
                f"--superlink=127.0.0.1:{port}",
                "--host=127.0.0.1",
                f"--port={free_port()}",
                f"--node-config={config}",
            ],
            program=[str(_BIN / "flower-supernode")],
            environment={**shared, "FLWR_HOME": str(folder / f"supernode-{index + 1}")},
        )
    return port


def submit_official(folder: Path, port: int) -> None:
    """Submit the app by Flower's command line.

    Raises:
        BenchmarkFailed: It refuses.
    """
    app, home = folder / "app", folder / "cli"
    app.mkdir()
    home.mkdir()
    (app / "pyproject.toml").write_text(_APP, encoding="utf-8")
    module = "from scenarios.official_flower import official_{0}\n\napp = official_{0}()\n"
    for name in ("server", "client"):
        (app / f"{name}_code.py").write_text(module.format(name), encoding="utf-8")
    (home / "config.toml").write_text(_CONNECTION.format(port=port), encoding="utf-8")
    command = [str(_BIN / "flwr"), "run", str(app), "bench", "--run-config", f'folder="{folder}"']
    environment = {**os.environ, **_environment(), "FLWR_HOME": str(home)}
    done = subprocess.run(  # noqa: S603  the arguments are our own
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_START_S
    )
    if done.returncode != 0:
        raise BenchmarkFailed("flwr run refused the app")


def ended_rounds(folder: Path) -> list[float]:
    """Return when the rounds so far ended, the initial model first."""
    file = folder / ROUNDS_FILE
    if not file.exists():
        return []
    return [json.loads(line)["time"] for line in file.read_text(encoding="utf-8").splitlines()]


def _environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "OMP_NUM_THREADS": "1"}


def _wait_for(port: int) -> None:
    import httpx

    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise BenchmarkFailed("Flower's SuperLink does not answer")
