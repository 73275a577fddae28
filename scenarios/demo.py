"""The demo: a whole federation on one machine, with real processes, certificates and data."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from audit.conclude import Conclusion, conclude
from audit.report import write_report
from client.ledger import Ledger
from client.owner import IDENTITY, LEDGER, read_policy
from protocol.errors import ServerUnavailable
from protocol.plan import Plan
from scenarios.demo_audit import audit_demo
from scenarios.federation import Federation, OwnerHome, make_federation
from scenarios.processes import Processes
from server.addresses import read_addresses
from server.listeners.sockets import free_port
from server.release import release_key
from server.store import RunStore
from server.submit import prepare_run, submit
from server.watch import Listener, follow
from tasks.partition import digits, write_examples

PLANS = Path(__file__).parent / "plans"
_START_S, _EACH_NODE_S, _POLL_S = 60.0, 5.0, 0.1


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does.

    Attributes:
        out: Folder that gets everything: homes, logs, package, report, summary.
        plan: Plan of the run.
        owners: Number of owner processes.
        seed: Decides who owns which rows; the privacy noise does not depend on it.
        audited: Owners' findings and the quick experiments are part of the report.
    """

    out: Path
    plan: Plan
    owners: int = 3
    seed: int = 0
    audited: bool = True


def run_demo(options: DemoOptions, listen: Listener) -> dict[str, Any]:
    """Run the demo and return what ``summary.json`` holds.

    Args:
        options: What to do.
        listen: Called with a kind and facts for everything worth showing.

    Raises:
        FedsealError: Why it did not finish; all processes are stopped by then.
    """
    started = time.monotonic()
    listen("stage", {"text": "making an authority, certificates and data files"})
    splits, public = digits(seed=options.seed, owners=options.owners)
    federation = make_federation(options.out, splits)
    public_file = options.out / "public.npz"
    write_examples(public_file, *public)
    with Processes(options.out / "logs") as processes:
        listen("stage", {"text": "starting one coordinator and the owners' nodes"})
        start_federation(processes, federation)
        listen("processes", {"pids": processes.pids()})
        store = prepare_run(federation.server_home, options.plan, public_file)
        wait_for_coordinator(processes, federation.server_home)
        listen("stage", {"text": "submitting the run"})
        submit(federation.server_home, store, federation.link())
        follow(
            store,
            listen,
            coordinator_ended=lambda: "coordinator" in processes.ended(),
            begin_s=start_limit_s(processes),
        )
    listen("stage", {"text": "compressing, packaging and signing the model"})
    key = release_key(federation.server_home, federation.server_passphrase)

    def progress(text: str) -> None:
        listen("step", {"text": text})

    result = options.out / "result"
    conclusion = conclude(store, federation.server_home, key, result, progress)
    if conclusion.problem is not None:
        raise conclusion.problem
    if options.audited:
        listen("stage", {"text": "auditing: the owners at their homes, and attacks on what they protect"})
        report = audit_demo(store, federation, public_file, key, progress)
        write_report(report, result)
        conclusion = replace(conclusion, verdict=report["verdict"])
    summary = summarize(store, federation, conclusion, time.monotonic() - started)
    summary["audit"]["made"] = options.audited
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    store.close()
    return summary


def start_federation(processes: Processes, federation: Federation, port: int = 0) -> int:
    """Start the coordinator and all owners; returns the fleet port."""
    port = port or free_port()
    processes.start(
        "coordinator",
        ["server", "--home", str(federation.server_home), "--port", str(port)],
        federation.server_passphrase,
    )
    for owner in federation.owners:
        start_owner(processes, owner, port)
    return port


def start_owner(processes: Processes, owner: OwnerHome, port: int) -> int:
    """Start one owner's node; returns its pid."""
    return processes.start(
        owner.name,
        ["client", "--home", str(owner.folder), "--server", f"127.0.0.1:{port}"],
        owner.passphrase,
    )


def start_limit_s(processes: Processes) -> float:
    """Return how long one process may take to start beside all others, in seconds."""
    return _START_S + _EACH_NODE_S * len(processes.pids())


def wait_for_coordinator(processes: Processes, home: Path) -> None:
    """Wait until the coordinator says where it listens.

    Raises:
        ServerUnavailable: It ended, or said nothing in the time that `start_limit_s` gives it.
    """
    deadline = time.monotonic() + start_limit_s(processes)
    while time.monotonic() < deadline:
        if "coordinator" in processes.ended():
            raise ServerUnavailable("the coordinator ended; see coordinator.log in the logs folder")
        with contextlib.suppress(ServerUnavailable):
            read_addresses(home)
            return
        time.sleep(_POLL_S)
    raise ServerUnavailable("the coordinator did not start in time")


def owner_spending(owner: OwnerHome) -> dict[str, Any]:
    """Read what an owner's own ledger says; on real machines only the owner can do this."""
    policy = read_policy(owner.folder)
    path = owner.folder / LEDGER / "ledger.db"
    ledger = Ledger.open(path, policy, owner.folder / IDENTITY / "ledger.head")
    try:
        totals = ledger.totals()
        return {"name": owner.name, "epsilon": totals.epsilon, "delta": totals.delta}
    finally:
        ledger.close()


def summarize(
    store: RunStore, federation: Federation, conclusion: Conclusion, wall_s: float
) -> dict[str, Any]:
    """Return the figures of a finished demo; every one is measured or read from a record."""
    rounds = store.rounds()
    parameters = store.read_checkpoint(0).weights.size
    deployment = conclusion.deployment or {}
    return {
        "accuracy": rounds[-1]["accuracy"],
        "rounds": len(rounds),
        "owners": [owner_spending(owner) for owner in federation.owners],
        "parameters": parameters,
        "wall_s": round(wall_s, 1),
        "upload_bytes_per_parameter": max(facts["upload_bytes"] for facts in rounds) / parameters,
        "download_bytes_per_parameter": max(facts["download_bytes"] for facts in rounds) / parameters,
        "tls_version": store.get("tls")["version"],
        "he": {
            "scheme": conclusion.encryption["scheme"],
            "preset": conclusion.encryption["preset"],
            "exact": conclusion.encryption["exact"],
            "frames": conclusion.encryption["frames"],
            "bytes_per_value": conclusion.encryption["frame_bytes"]
            / conclusion.encryption["values_per_frame"],
        },
        "model": {
            "package": str(conclusion.package),
            "size_ratio": deployment.get("size_ratio"),
            "speed_ratio_b1": deployment.get("speed_ratio_b1"),
            "measure": deployment.get("measure"),
            "accuracy": deployment.get("accuracy_after"),
            "accuracy_drop": deployment.get("accuracy_drop"),
        },
        "audit": {
            "verdict": conclusion.verdict["status"],
            "reasons": conclusion.verdict["reasons"],
            "report": str(conclusion.report_html),
        },
    }
