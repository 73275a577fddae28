"""Starting a run: a checked plan becomes a run folder, and the coordinator is told its name."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from protocol.encoding import digest_bytes
from protocol.errors import RunBusy, RunFailed, ServerUnavailable
from protocol.plan import Plan
from server.addresses import reachable_host, read_addresses
from server.home import IDENTITY, PUBLIC_DATA, RUNS
from server.listeners.control import ControlLink
from server.probe import probe_listener
from server.store import RESUMABLE, RunStore, now_text
from tasks.registry import task_for
from tasks.resolve import resolve


def prepare_run(home: Path, plan: Plan, public_data: Path | None) -> RunStore:
    """Resolve a plan and write a new run folder below the coordinator's home.

    Args:
        home: The coordinator's home.
        plan: As read from plan.toml.
        public_data: Examples that the coordinator may evaluate on; they are copied.

    Raises:
        PlanInvalid, CapacityExceeded, NoiseTooSmall: The plan cannot work.
        DataInvalid: The public data do not fit the task.
    """
    resolved = resolve(plan)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = home / RUNS / f"{resolved.run.name}-{stamp}-{secrets.token_hex(4)}"
    if public_data is not None:
        task_for(resolved).read(public_data)
    store = RunStore(folder)
    if public_data is not None:
        add_public_data(store, resolved, public_data)
    store.set("plan", resolved.fields())
    store.set("plan_hash", resolved.sha256())
    store.set("state", "submitted")
    store.set("submitted_at", now_text())
    return store


def add_public_data(store: RunStore, plan: Plan, public_data: Path) -> None:
    """Give a run, finished or not, public examples in the place of those that it may have.

    Args:
        store: The run.
        plan: Its plan.
        public_data: Examples to measure on; they are copied.

    Raises:
        DataInvalid: They do not fit the task.
    """
    task_for(plan).read(public_data)
    temporary = store.folder / f"{PUBLIC_DATA}.new"
    shutil.copyfile(public_data, temporary)
    temporary.replace(store.folder / PUBLIC_DATA)
    store.set("public_data_sha256", digest_bytes(public_data.read_bytes()))


def submit(home: Path, store: RunStore, link: ControlLink) -> int:
    """Ask the coordinator, as an operator, to begin or resume a run; returns Flower's run id.

    Raises:
        ServerUnavailable: The coordinator does not answer, or refuses this operator.
        RunFailed: The run has ended for good.
        RunBusy: It is under way.
    """
    if store.get("state") not in RESUMABLE:
        raise RunFailed("this run has ended; start a new one")
    if store.is_carried_out():
        raise RunBusy
    _record_listener(home, store)
    store.set("state", "submitted")
    return link.start(store.folder.name)


def _record_listener(home: Path, store: RunStore) -> None:
    """Measure the listeners from outside and record what was seen."""
    addresses = read_addresses(home)
    host = reachable_host(addresses.host)
    try:
        facts = probe_listener(host, addresses.port, home / IDENTITY / "ca.crt")
    except OSError:
        raise ServerUnavailable("the fleet listener does not answer as it should") from None
    store.set("tls", asdict(facts))
    store.set(
        "listening",
        [
            {
                "address": "127.0.0.1",
                "port": addresses.runtime_port,
                "purpose": "the run's own process, same user only",
            },
            {"address": addresses.host, "port": addresses.port, "purpose": "owners"},
        ],
    )
