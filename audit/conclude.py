"""What follows a finished run: the signed package and the signed report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.collecting.collect import collect
from audit.report import build_report, write_report
from deploy.build import build_package
from deploy.gate import FederatedAccuracy, synthetic_inputs
from deploy.statement import PrivacyStatement
from protocol.accounting import epsilon_after, worst_epsilon_after
from protocol.errors import FedsealError, RunFailed
from protocol.plan import Plan
from server.home import PUBLIC_DATA
from server.store import RunStore
from tasks.images import unflatten
from tasks.registry import task_for


@dataclass(frozen=True)
class Conclusion:
    """Where a run's package and report are, and what they say.

    Attributes:
        package: Folder of the model package, or None if there is none.
        deployment: What building the package measured, or why there is no package; None for a run that did
            not finish.
        problem: Why a finished run has no package, or None.
        report_json: The report.
        report_html: The same report to read.
        verdict: The report's verdict.
        encryption: The report's section about encryption.
    """

    package: Path | None
    deployment: dict[str, Any] | None
    problem: FedsealError | None
    report_json: Path
    report_html: Path
    verdict: dict[str, Any]
    encryption: dict[str, Any]


def conclude(
    store: RunStore,
    home: Path,
    key: Ed25519PrivateKey,
    out: Path,
    progress: Callable[[str], None],
) -> Conclusion:
    """Compress and package the final model if the run finished, and write the report in any case.

    A package that is refused does not keep the report from being written; it says why there is none.

    Args:
        store: A run that has ended.
        home: The coordinator's home folder.
        key: The coordinator's release key.
        out: Folder for the package and the report.
        progress: Called with a line of text at each step.

    Raises:
        ReportInvalid: The run has not ended.
    """
    deployment: dict[str, Any] | None = None
    package: Path | None = None
    problem: FedsealError | None = None
    if store.get("state") == "finished":
        try:
            package, deployment = _package(store, key, out, progress)
        except FedsealError as error:
            problem = error
            deployment = {"refused": {"code": error.code, "what": error.what, "why": error.detail}}
        store.set("deployment", deployment)
    progress("writing the report")
    evidence = collect(store, home, deployment)
    report = build_report(evidence, datetime.now(UTC), key)
    report_json, report_html = write_report(report, out)
    return Conclusion(
        package,
        deployment,
        problem,
        report_json,
        report_html,
        report["verdict"],
        report["encryption"],
    )


def _package(
    store: RunStore, key: Ed25519PrivateKey, out: Path, progress: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    plan = store.plan()
    task = task_for(plan)
    network = task.build_model(plan)
    unflatten(network, store.read_checkpoint(plan.run.rounds).weights)
    public_data = store.folder / PUBLIC_DATA
    public = task.read(public_data) if public_data.exists() else None
    sealed = [facts["sealed"] for facts in store.owners().values()]
    if not sealed:
        raise RunFailed("no owner is recorded")
    epsilon, worst = epsilon_after(plan, max(sealed)), worst_epsilon_after(plan, max(sealed))
    delta, accountant = (None, None) if epsilon is None else (plan.privacy.delta, "PLD")
    statement = PrivacyStatement.for_plan(plan, epsilon, worst, delta, accountant)
    out.mkdir(parents=True, exist_ok=True)
    result = build_package(
        plan,
        network,
        None if public is None else public.x,
        None if public is None else public.y,
        synthetic_inputs(plan),
        statement.model_dump(),
        task.input_schema(plan),
        key,
        out,
        progress,
        _federated(store, plan),
    )
    return result.folder, result.to_fields()


def _federated(store: RunStore, plan: Plan) -> FederatedAccuracy | None:
    """Return what the owners' noised counts say of the final model, if the plan asked for them."""
    figures = [
        (float(facts["accuracy"]), float(facts["standard_error"]))
        for _identifier, _moment, kind, facts in store.events()
        if kind == "evaluation" and facts["round"] == plan.run.rounds and facts["accuracy"] is not None
    ]
    return FederatedAccuracy(min(max(figures[-1][0], 0.0), 1.0), figures[-1][1]) if figures else None
