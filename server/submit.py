"""Starting a run: a checked plan becomes a run folder, and the coordinator is told its name."""

from __future__ import annotations

import re
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path

from crypto.vault import write_private
from protocol.encoding import digest_bytes
from protocol.errors import RunFailed, ServerUnavailable
from protocol.plan import Plan
from server.app import PUBLIC_DATA
from server.flower import ControlClient
from server.store import RunStore, now_text
from tasks.registry import task_for
from tasks.resolve import resolve

RUNS = "runs"
CONTROL_FILE = "control.port"


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
    folder = home / RUNS / f"{resolved.run.name}-{stamp}-{secrets.token_hex(2)}"
    if public_data is not None:
        task_for(resolved).read(public_data)
    store = RunStore(folder)
    if public_data is not None:
        shutil.copyfile(public_data, folder / PUBLIC_DATA)
        store.set("public_data_sha256", digest_bytes(public_data.read_bytes()))
    store.set("plan", resolved.fields())
    store.set("plan_hash", resolved.sha256())
    store.set("state", "submitted")
    store.set("submitted_at", now_text())
    return store


def write_control_port(home: Path, port: int) -> None:
    """Note where this coordinator's loopback control API listens, for `fedseal run` on this machine."""
    write_private(home / CONTROL_FILE, str(port).encode())


def control_client(home: Path) -> ControlClient:
    """Return a client of the coordinator that runs from this home.

    Raises:
        ServerUnavailable: No coordinator was started from it.
    """
    try:
        text = (home / CONTROL_FILE).read_text(encoding="ascii")
        authority = (home / "identity" / "ca.crt").read_bytes()
    except OSError:
        raise ServerUnavailable("no coordinator was started from this home folder") from None
    if not re.fullmatch(r"\d{1,5}", text):
        raise ServerUnavailable("the control file of this home folder is damaged")
    return ControlClient(int(text), authority)


def submit(home: Path, store: RunStore) -> int:
    """Tell the coordinator to run a prepared folder; returns Flower's run id.

    Raises:
        ServerUnavailable: The coordinator does not answer.
        RunFailed: The folder was submitted before.
    """
    if store.get("flower_run") is not None:
        raise RunFailed("this run folder was submitted before")
    client = control_client(home)
    try:
        run_id = client.start_run(store.folder.name)
    finally:
        client.close()
    store.set("flower_run", run_id)
    return run_id
