"""``fedseal audit run`` and ``fedseal audit owner``: the whole audit, and an owner's part of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from console.options import ask_passphrase, read_plan, require_home
from console.verdicts import show_steps
from protocol.errors import AuditUnfounded, FindingsRefused
from protocol.plan import Plan

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from audit.evidence.experiments import Depth
    from server.store import RunStore
    from tasks.images import Examples


@dataclass(frozen=True)
class AuditOptions:
    """What an audit is of, and where its report goes.

    Attributes:
        subject: A plan file, the folder of a run, or its name.
        out: Folder for the report.
        depth: How much is tried.
        owners: Signed findings of owners.
        home: The coordinator's home. A report on a plan is signed only where one is given.
        public: Public examples of the task.
        passphrase_file: Opens the coordinator's release key, which signs the report.
    """

    subject: Path
    out: Path
    depth: Depth
    owners: Sequence[Path]
    home: Path | None
    public: Path | None
    passphrase_file: Path | None


def run_audit(console: Console, options: AuditOptions) -> int:
    """Audit a plan or a run, write the report, and return the exit status that stands for its verdict.

    Raises:
        AuditUnfounded: There is no such subject, or public examples are missing.
        FindingsRefused: An owner's file is foreign or altered, or the subject is a plan.
        FedsealError: Why the experiments could not be made.
    """
    if options.subject.is_file():
        return _audit_plan(console, options)
    return _audit_run(console, options)


def _audit_plan(console: Console, options: AuditOptions) -> int:
    from audit.report import build_report
    from scenarios.audits import audit_plan
    from tasks.resolve import resolve

    if options.owners:
        raise FindingsRefused("the owners of a plan are not on record yet; audit its run with them")
    plan = resolve(read_plan(options.subject))
    public = _public(plan, options.public)
    if options.home is not None:
        require_home(options.home, "coordinator")
    key = None if options.home is None else _key(options.home, options)
    evidence, lab = audit_plan(plan, public, options.depth, _shown(console))
    return _conclude(console, options.out, build_report(evidence, datetime.now(UTC), key, lab=lab))


def _audit_run(console: Console, options: AuditOptions) -> int:
    from audit.collecting.collect import collect
    from audit.collecting.owner import read_findings
    from audit.report import build_report
    from scenarios.audits import audit_finished
    from server.home import PUBLIC_DATA

    home, store = _opened(options)
    try:
        key = _key(home, options)
        findings = read_findings(options.owners, collect(store, home, None))
        kept = store.folder / PUBLIC_DATA
        public = _public(store.plan(), options.public or (kept if kept.exists() else None))
        evidence, lab = audit_finished(store, home, public, options.depth, _shown(console))
    finally:
        store.close()
    report = build_report(evidence, datetime.now(UTC), key, lab=lab, findings=findings)
    return _conclude(console, options.out, report)


def _key(home: Path, options: AuditOptions) -> Ed25519PrivateKey:
    from server.release import release_key

    return release_key(home, ask_passphrase(options.passphrase_file, "Passphrase of the coordinator's key"))


def _opened(options: AuditOptions) -> tuple[Path, RunStore]:
    """Return the coordinator's home and the run that are meant."""
    from server.home import RUNS
    from server.runs import open_run

    subject, home = options.subject, options.home
    if home is None and subject.is_dir() and subject.resolve().parent.name == RUNS:
        home = subject.resolve().parents[1]
    if home is None:
        raise AuditUnfounded(
            "it is neither a plan file nor the folder of a run; name a run with its --home"
        )
    require_home(home, "coordinator")
    return home, open_run(home, str(subject))


def _public(plan: Plan, file: Path | None) -> Examples:
    """Return public examples of a plan's task: from a file, else the bundled digits if they fit."""
    from scenarios.audits import bundled_examples
    from tasks.registry import task_for

    return bundled_examples(plan) if file is None else task_for(plan).read(file)


def _shown(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(Text(f"    {text}", style="dim"))


def _conclude(console: Console, out: Path, report: dict[str, Any]) -> int:
    from audit.checks.verdict import exit_code
    from audit.report import write_report

    json_file, html_file = write_report(report, out)
    verdict = report["verdict"]
    console.print(Text(f"● {verdict['status']}", style="bold"))
    for reason in verdict["reasons"]:
        console.print(Text(f"  {reason}"))
    show_steps(console, report)
    console.print(f"report: {html_file}  {json_file}", soft_wrap=True)
    return exit_code(verdict["status"])


def audit_owner(
    console: Console,
    home: Path,
    subject: Plan | str,
    depth: Depth,
    out: Path,
    passphrase_file: Path | None,
) -> None:
    """Test the code that this owner has installed, look at its ledger and keys, and write a signed file.

    Args:
        console: Where progress goes.
        home: The owner's home.
        subject: A plan, or a run that this owner joined.
        depth: How much is tried.
        out: The file; nothing else is to leave the owner.
        passphrase_file: Opens the owner's home.

    Raises:
        LedgerConflict: The owner did not join this run.
        FindingsRefused: The file cannot be written.
    """
    from audit.collecting.owner import find_run, owner_findings, write_findings
    from audit.laboratory.mechanism import audit_mechanism
    from client.owner import open_owner
    from tasks.resolve import resolve

    if not os.access(out.absolute().parent, os.W_OK):
        raise FindingsRefused("--out must name a file in a folder that can be written to")
    require_home(home, "owner")
    owner = open_owner(home, ask_passphrase(passphrase_file, "Passphrase of this owner"))
    try:
        if isinstance(subject, Plan):
            run, plan = None, resolve(subject)
        else:
            run, plan = find_run(owner, subject)
        mechanism = audit_mechanism(plan, depth, _shown(console))
        write_findings(owner, owner_findings(home, owner, mechanism, run), out)
    finally:
        owner.close()
    failed = [test.test for test in mechanism.conformance if test.p_value < test.threshold]
    console.print(f"{len(mechanism.conformance) - len(failed)} tests passed, {len(failed)} failed")
    for name in failed:
        console.print(Text(f"  failed: {name}", style="red"))
    console.print(f"signed findings: {out}", soft_wrap=True)
