"""FedAvg without privacy and encryption, over fedseal's own transport: what the rest costs beside it.

The coordinator, its listeners, the nodes, their certificates and connections are fedseal's. What differs
are the apps: owners train by plain SGD and send their update as float32, and the coordinator adds up.
For benchmarks only. As a module it is a process: ``python -m scenarios.plain_fedavg coordinator|node ...``.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray
from torch.nn import functional

from client.flower import fleet_connection, tls_context
from client.node import relay
from client.owner import IDENTITY
from crypto.identity import load_owner
from crypto.vault import read_passphrase
from protocol.environment import prepare_environment
from protocol.errors import RunFailed
from protocol.plan import Plan
from protocol.records import from_record, to_record
from server.exchange import Exchanger, Request
from server.flower import control as flower_control
from server.listeners.sockets import ListenerOptions
from server.process import run_server
from server.runs import open_run_folder
from server.store import RunStore
from tasks.images import Examples, flatten, unflatten
from tasks.registry import task_for

Floats32 = NDArray[np.float32]

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of a plan and record them as fedseal's coordinator does."""
    store = open_run_folder(str(context.run_config["run"]))
    store.claim()
    store.set("state", "running")
    try:
        run_rounds(grid, store, store.plan())
    except Exception:
        store.set("state", "failed")
        raise
    else:
        store.set("state", "finished")
    finally:
        store.close()


def run_rounds(grid: Grid, store: RunStore, plan: Plan) -> None:
    """Average plain updates over a plan's rounds.

    Raises:
        RunFailed: An owner did not answer.
    """
    exchanger = Exchanger(grid, store)
    weights = task_for(plan).initial_weights(plan).astype(np.float32)
    owners = plan.cohort.maximum
    while len(exchanger.online()) < owners:
        time.sleep(0.1)
    store.event("session", owners=owners)
    for number in range(1, plan.run.rounds + 1):
        started = time.monotonic()
        request = Request(b"", weights.tobytes())
        total, answered = np.zeros_like(weights), 0
        nodes = dict.fromkeys(exchanger.online(), request)
        for reply in exchanger.ask("train.fit", nodes, plan.deadlines.fit_s):
            total += np.frombuffer(reply.blob, dtype=np.float32)
            answered += 1
        if answered < owners:
            raise RunFailed("an owner did not answer")
        weights += total / np.float32(answered)
        store.event("round", round=number, seconds={"fit": time.monotonic() - started})


def plain_update(plan: Plan, weights: Floats32, examples: Examples) -> Floats32:
    """Train by SGD as a plan says, less its privacy, and return trained minus given weights."""
    task = task_for(plan)
    model = task.build_model(plan)
    unflatten(model, weights.astype(np.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.training.learning_rate)
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    batch = min(round(plan.privacy.expected_batch_size), len(y))
    for _ in range(plan.training.local_steps):
        chosen = torch.randperm(len(y))[:batch]
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(x[chosen]), y[chosen]))
        optimizer.step()
    return (flatten(model) - weights).astype(np.float32)


def client_app(plan: Plan, examples: Examples) -> ClientApp:
    """Return an app that answers ``train.fit`` with a plain update."""
    app = ClientApp()

    @app.train("fit")
    def fit(message: Message, _context: Context) -> Message:
        _body, blob = from_record(message.content)
        update = plain_update(plan, np.frombuffer(blob, dtype=np.float32), examples)
        return Message(to_record(b"", update.tobytes()), reply_to=message)

    return app


def run_coordinator(home: Path, port: int, passphrase: bytes) -> None:
    """Run fedseal's coordinator, with the plain ServerApp in place of its own."""
    flower_control.BUNDLE = flower_control.BUNDLE.replace(
        '"server.app:app"', '"scenarios.plain_fedavg:server_app"'
    )
    run_server(home, passphrase, ListenerOptions("127.0.0.1", port))


def run_plain_node(home: Path, address: str, plan: Plan, data: Path, passphrase: bytes) -> None:
    """Answer a coordinator from an owner's home, with the plain app, until SIGTERM."""
    torch.set_num_threads(1)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stop.set())
    credentials, identity = load_owner(home / IDENTITY, passphrase), home / IDENTITY
    context = partial(tls_context, identity / "ca.crt", identity / "transport.crt", credentials)
    app = client_app(plan, task_for(plan).read(data))
    with fleet_connection(address, context(), credentials) as connection:
        relay(connection, app, stop, lambda: None)


if __name__ == "__main__":
    prepare_environment()
    _role, _home, _where, *_rest = sys.argv[1:]
    _secret = read_passphrase(Path(sys.argv[-1]), {}, None)
    if _role == "coordinator":
        run_coordinator(Path(_home), int(_where), _secret)
    else:
        _plan = Plan.from_toml(Path(_rest[0]).read_text(encoding="utf-8"))
        run_plain_node(Path(_home), _where, _plan, Path(_rest[1]), _secret)
