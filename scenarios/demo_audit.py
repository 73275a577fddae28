"""The audit at the end of the demo: every owner's part at its home, and the experiments beside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.collecting.owner import read_findings
from audit.report import build_report
from scenarios.audits import audit_finished
from scenarios.federation import Federation
from scenarios.processes import Processes
from server.store import RunStore
from tasks.registry import task_for

FINDINGS: Final = "findings"
"""Folder of the owners' signed findings, below that of the demo."""

_OWNERS_S: Final = 600.0
_POLL_S: Final = 0.1


def audit_demo(
    store: RunStore,
    federation: Federation,
    public_file: Path,
    key: Ed25519PrivateKey,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Audit the finished run of a demo and return its report.

    What several parties do on their machines is done here at once: each owner runs ``fedseal audit
    owner`` with its own passphrase, as a process of its own, while the auditor makes the quick
    experiments of ``fedseal audit run``. An owner whose part fails is missing in the report, which says so.

    Args:
        store: The run.
        federation: Its parties.
        public_file: Public examples of the task.
        key: The coordinator's release key, which signs the report.
        progress: Called with a line of text at each step.

    Raises:
        FedsealError: The experiments could not be made, or findings are not what an owner signed.
    """
    folder = federation.folder / FINDINGS
    folder.mkdir()
    files = {owner.name: folder / f"{owner.name}.json" for owner in federation.owners}
    run, home = store.get("run"), federation.server_home
    public = task_for(store.plan()).read(public_file)
    with Processes(federation.folder / "logs") as processes:
        for owner in federation.owners:
            command = ["audit", "owner", "--home", str(owner.folder), "--run", run]
            command += ["--out", str(files[owner.name])]
            name = f"audit-{owner.name}"
            processes.start(name, command, owner.passphrase)
        progress(f"each of {len(files)} owners tests its own code and looks at its keys and its ledger")
        evidence, lab = audit_finished(store, home, public, "quick", progress)
        progress("waiting for the owners' signed findings")
        _wait(processes)
        for name, status in processes.ended().items():
            if status != 0:
                progress(f"{name} ended with status {status}; see {name}.log in the logs folder")
    found = read_findings([file for file in files.values() if file.exists()], evidence)
    return build_report(evidence, datetime.now(UTC), key, lab=lab, findings=found)


def _wait(processes: Processes) -> None:
    deadline = time.monotonic() + _OWNERS_S
    while processes.pids() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
