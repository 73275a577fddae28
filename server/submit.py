"""Starting a run: a checked plan becomes a run folder, and the coordinator is told its name."""

from __future__ import annotations

import ipaddress
import secrets
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from crypto.vault import write_private
from protocol.encoding import decode, digest_bytes, encode
from protocol.errors import EncodingInvalid, RunBusy, RunFailed, ServerUnavailable
from protocol.plan import Plan
from server.app import PUBLIC_DATA
from server.home import ADDRESSES, IDENTITY, RUNS
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


def open_run(home: Path, run: str) -> RunStore:
    """Open the folder of an earlier run.

    Args:
        home: The coordinator's home.
        run: Name of the folder, or a path to it.

    Raises:
        RunFailed: There is no such run.
    """
    folder = home / RUNS / Path(run).name
    if not (folder / "run.db").is_file():
        raise RunFailed("there is no such run below this home; fedseal runs lists them")
    return RunStore(folder)


@dataclass(frozen=True)
class Addresses:
    """Where a running coordinator listens.

    Attributes:
        runtime_port: Loopback port of the API for the run's own process.
        host: Host of the fleet listener.
        port: Port of the fleet listener.
    """

    runtime_port: int
    host: str
    port: int


def write_addresses(home: Path, addresses: Addresses) -> None:
    """Note where this coordinator listens, for `fedseal run` on the same machine."""
    write_private(home / ADDRESSES, encode(asdict(addresses)))


def forget_addresses(home: Path) -> None:
    """Remove the note; no coordinator runs from this home now."""
    (home / ADDRESSES).unlink(missing_ok=True)


def read_addresses(home: Path) -> Addresses:
    """Return where the coordinator of this home listens.

    Raises:
        ServerUnavailable: No coordinator was started from it.
    """
    try:
        fields = decode((home / ADDRESSES).read_bytes())
        return Addresses(int(fields["runtime_port"]), str(fields["host"]), int(fields["port"]))
    except (OSError, KeyError, TypeError, ValueError, EncodingInvalid):
        raise ServerUnavailable("no coordinator was started from this home folder") from None


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


def reachable_host(bound: str) -> str:
    """Return an address of this machine for a listener that may be bound to all of them."""
    try:
        return "127.0.0.1" if ipaddress.ip_address(bound).is_unspecified else bound
    except ValueError:
        return bound


def _record_listener(home: Path, store: RunStore) -> None:
    """Measure the listeners from outside and record what was seen."""
    addresses = read_addresses(home)
    host = reachable_host(addresses.host)
    try:
        facts = probe_listener(host, addresses.port, home / IDENTITY / "ca.crt", host)
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
