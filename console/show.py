"""What the verbs of the command line print."""

from __future__ import annotations

import json
import logging
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from console.options import read_plan, require_home
from console.progress import RunProgress, format_bytes, summary_rows
from console.tables import show_pairs, show_table
from console.verdicts import show_steps, show_verdict
from protocol.errors import FedsealError, ResultUndeliverable
from protocol.plan import Plan


def dump_json(value: Any) -> None:
    """Print a JSON value to standard output."""
    from console.options import console

    console.out(json.dumps(value, indent=2, sort_keys=True), highlight=False)


def show_demo(console: Console, out: Path, plan_file: Path | None, seed: int, *, audited: bool) -> int:
    """Run the demo, print its progress and summary, and return the exit status of its audit's verdict."""
    from scenarios.demo import PLANS, DemoOptions, run_demo

    if out.exists() and any(out.iterdir()):
        raise ResultUndeliverable(f"{out} is not empty")
    plan = read_plan(plan_file or PLANS / "digits.toml")
    warn_if_unprotected(console, plan)
    progress = RunProgress(console, plan.run.rounds, protected=plan.privacy.noise != "none")
    try:
        options = DemoOptions(out.resolve(), plan, plan.cohort.maximum, seed, audited)
        summary = run_demo(options, progress.show)
    except (FedsealError, KeyboardInterrupt):
        console.print(f"stopped; all processes have ended. Logs: {out}/logs")
        console.print("To go on: remove the folder and start again, or choose another --out.")
        raise
    console.print()
    show_pairs(console, summary_rows(summary))
    return show_verdict(console, summary)


def show_simulation(console: Console, scenario_file: Path, out: Path | None, repeat: int) -> None:
    """Run a scenario in this process, once or with several seeds, and print progress and accuracies."""
    from scenarios.simulate import Scenario

    scenario, plan = Scenario.read(scenario_file)
    warn_if_unprotected(console, plan)
    progress = RunProgress(console, plan.run.rounds, protected=plan.privacy.noise != "none")
    accuracies = []
    for seed in range(scenario.seed, scenario.seed + repeat):
        one = scenario.model_copy(update={"seed": seed})
        with tempfile.TemporaryDirectory() as temporary:
            folder = out / f"seed-{seed}" if out and repeat > 1 else out or Path(temporary)
            who = (
                "central training" if scenario.kind == "central" else f"{scenario.owners} simulated owners"
            )
            progress.show("stage", {"text": f"{who}, seed {seed}"})
            with _tasks_shown(progress):
                accuracies.append(_simulate(one, plan, folder, progress))
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    if repeat > 1 and known:
        mean = sum(known) / len(known)
        console.print(
            f"accuracy on public data: mean {mean:.4f} of {len(known)} runs, "
            f"smallest {min(known):.4f}, largest {max(known):.4f}"
        )


def _simulate(scenario: Any, plan: Plan, folder: Path, progress: RunProgress) -> float | None:
    from scenarios.simulate import build

    simulation = build(scenario, plan, folder)
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder / "run", progress, stop))
    watcher.start()
    try:
        simulation.run()
        accuracy: float | None = simulation.store.rounds()[-1]["accuracy"]
    finally:
        stop.set()
        watcher.join()
        simulation.close()
    return accuracy


class _ProgressHandler(logging.Handler):
    def __init__(self, progress: RunProgress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.show("step", {"text": record.getMessage()})


@contextmanager
def _tasks_shown(progress: RunProgress) -> Iterator[None]:
    """Show what tasks log: preparing many images can take a minute."""
    handler, logger = _ProgressHandler(progress), logging.getLogger("fedseal.tasks")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _watch(folder: Path, progress: RunProgress, stop: threading.Event) -> None:
    from server.store import RunStore

    store, last = RunStore(folder), 0
    while True:
        ending = stop.wait(0.2)
        for identifier, _moment, kind, facts in store.events(last):
            last = identifier
            progress.show(kind, facts)
        if ending:
            store.close()
            return


def warn_if_unprotected(console: Console, plan: Plan) -> None:
    """Say in red that noise is missing or rests on others; warn of CKKS and of SEAL's own frames."""
    from protocol.claims import assumption

    if plan.privacy.noise == "none":
        console.print(
            Text("privacy.noise = 'none': this run protects NO record", style="bold white on red")
        )
    if plan.privacy.noise == "distributed":
        console.print(Text(f"privacy.noise = 'distributed': {assumption(plan)}", style="bold red"))
    if plan.encryption.frames == "seal":
        text = (
            "encryption.frames = 'seal': larger frames, which SEAL's parser reads; see docs/encryption.md"
        )
        console.print(Text(text, style="bold yellow"))
    if plan.encryption.preset == "ckks":
        text = (
            "encryption.preset = 'ckks': its decryptions can leak the key, so that none may be released "
            "before it is rounded; sums are rounded, not exact, and seven times as large"
        )
        console.print(Text(text, style="bold yellow"))


def show_plan(console: Console, plan: Plan, *, as_json: bool) -> None:
    """Print what follows from a plan: noise, privacy loss, bytes, capacity."""
    from crypto.measuring import plan_context
    from protocol.claims import UNITS
    from protocol.evaluation import planned_epsilon, planned_worst_epsilon, promised_loss
    from tasks.registry import task_for
    from tasks.resolve import resolve

    resolved = resolve(plan)
    if as_json:
        dump_json(resolved.fields())
        return
    warn_if_unprotected(console, resolved)
    parameters = task_for(resolved).initial_weights(resolved).size
    context = plan_context(resolved)
    packing = context.packing
    upload = packing.frames_for(parameters) * context.frame_bytes
    epsilon, worst = planned_epsilon(resolved), planned_worst_epsilon(resolved)
    unit = resolved.privacy.unit
    pairs = (
        ("plan hash", resolved.sha256()),
        ("parameters", f"{parameters}"),
        ("unit of privacy", f"{unit}: {UNITS[unit]}"),
        ("noise", resolved.privacy.noise),
        ("noise multiplier", f"{resolved.privacy.noise_multiplier}"),
        ("epsilon, spare rounds included", "no guarantee" if epsilon is None else f"{epsilon:.4f}"),
        ("the same if all others collude", "no guarantee" if worst is None else f"{worst:.4f}"),
        ("delta", f"{promised_loss(resolved)[1]:g}"),
        ("federated evaluation", _evaluation(resolved)),
        (
            "an owner sends per round",
            f"{format_bytes(upload)}, {upload / parameters:.2f} bytes per parameter",
        ),
        ("quantization", f"{2 * packing.half_levels + 1} levels in +-{resolved.update_range:.4g}"),
        ("largest cohort", f"{resolved.cohort.maximum}; the sum is exact up to it"),
    )
    show_pairs(console, pairs)


def _evaluation(plan: Plan) -> str:
    from protocol.evaluation import evaluation_epsilon

    section = plan.evaluation
    if section is None:
        return "none"
    loss = evaluation_epsilon(plan, plan.paid_evaluations)
    price = "no guarantee" if loss is None else f"{loss:.4f} of the epsilon above"
    return f"every {section.every} rounds, noise {section.noise_multiplier} on each count, {price}"


def show_ledger(console: Console, home: Path, *, as_json: bool) -> None:
    """Verify an owner's ledger and print what it says."""
    from client.owner import open_ledger, read_policy

    require_home(home, "owner")
    policy = read_policy(home)
    ledger = open_ledger(home, policy)
    try:
        _print_ledger(console, ledger, policy, as_json=as_json)
    finally:
        ledger.close()


def _print_ledger(console: Console, ledger: Any, policy: Any, *, as_json: bool) -> None:
    from protocol.claims import EXPERIMENTAL, UNITS

    totals, head = ledger.totals(), ledger.head()
    bodies = [record.body for record in ledger.records()]
    runs = {body["run"]: ledger.spent(body["run"]) for body in bodies if body["kind"] == "open_run"}
    adopted = [(body["epsilon"], body["delta"]) for body in bodies if body["kind"] == "adopt"]
    if as_json:
        dump_json(
            {
                "dataset": policy.dataset,
                "unit": totals.unit,
                "epsilon": totals.epsilon,
                "epsilon_worst": totals.epsilon_worst,
                "delta": totals.delta,
                "epsilon_total": policy.budget.epsilon_total,
                "epsilon_worst_total": policy.budget.epsilon_worst,
                "delta_total": policy.budget.delta_total,
                "head": head.model_dump(mode="json"),
                "runs": {run: asdict(spent) for run, spent in runs.items()},
                "adopted": [{"epsilon": epsilon, "delta": delta} for epsilon, delta in adopted],
            }
        )
        return
    columns = ("run", "unit", "noise", "epsilon", "of it evaluation", "if all others collude", "delta")
    rows = []
    for run, spent in runs.items():
        unprotected = spent.epsilon is None
        cells = (
            run[:8],
            spent.unit,
            spent.noise,
            "NO PRIVACY" if unprotected else f"{spent.epsilon:.4f}",
            "NO PRIVACY" if spent.evaluation_epsilon is None else f"{spent.evaluation_epsilon:.4f}",
            "NO PRIVACY" if unprotected else f"{spent.epsilon_worst:.4f}",
            f"{spent.delta:g}",
            str(spent.sealed),
            str(spent.sealed_evaluations),
            str(spent.void),
        )
        rows.append([Text(cell, style="bold red" if unprotected else "") for cell in cells])
    show_table(console, (*columns, "sealed", "evaluated", "void"), rows, f"dataset {policy.dataset}")
    remaining = policy.budget.epsilon_total - (totals.epsilon or 0.0)
    console.print(
        f"spent {totals.epsilon or 0.0:.4f} of {policy.budget.epsilon_total:g} epsilon, "
        f"{totals.delta:g} of {policy.budget.delta_total:g} delta; {remaining:.4f} epsilon remain"
    )
    if totals.unit is not None:
        console.print(f"epsilon is the loss of one {totals.unit}: {UNITS[totals.unit]}")
    if totals.epsilon_worst != totals.epsilon:
        cap = policy.budget.epsilon_worst
        limit = "no cap is set" if cap is None else f"of {cap:g}"
        text = (
            f"{EXPERIMENTAL}: if all others collude, {totals.epsilon_worst:.4f} epsilon are spent, {limit}"
        )
        console.print(Text(text, style="bold red"))
    for epsilon, delta in adopted:
        text = f"of it {epsilon:.4f} epsilon and {delta:g} delta declared by the owner for lost records"
        console.print(Text(text, style="bold red"))
    console.print(f"{len(bodies)} records, chain verified, head {head.head[:16]}")


def show_package(console: Console, package: Path, key_file: Path) -> None:
    """Verify a package and print its privacy statement."""
    from deploy.package import verify_package
    from server.release import read_public_key

    verified = verify_package(package, read_public_key(key_file))
    console.print(f"verified: {verified.name}, made {verified.created}")
    console.print(Text(verified.privacy.statement))


def render_report(console: Console, report_file: Path, page: Path, key_file: Path | None) -> None:
    """Verify a report and write its page."""
    from audit.report import write_page

    report = _verified(report_file, key_file)
    write_page(report, page)
    console.print(Text(f"verified: {report['verdict']['status']}, page in {page}"))
    console.print(_signer(report, key_file))


def _verified(report_file: Path, key_file: Path | None) -> dict[str, Any]:
    from audit.report import verify_report
    from server.release import read_public_key

    return verify_report(report_file, None if key_file is None else read_public_key(key_file))


def _signer(report: dict[str, Any], key_file: Path | None) -> Text:
    """Say whose word the evidence is; without a trusted key it is nobody's."""
    if key_file is not None:
        return Text("signed by the owner of the given key")
    if report["signature"] is None:
        return Text("not signed: whoever has the file can change its evidence", style="bold yellow")
    signer = report["signature"]["signer"]
    return Text(f"signed by {signer[:16]}, whoever that is: give --key to know", style="yellow")


def show_report(console: Console, report_file: Path, key_file: Path | None) -> int:
    """Verify a report, print its verdict, and return the exit status that stands for it."""
    from audit.checks.verdict import exit_code

    report = _verified(report_file, key_file)
    verdict = report["verdict"]
    console.print(f"verified: {verdict['status']}")
    console.print(_signer(report, key_file))
    for reason in verdict["reasons"]:
        console.print(Text(f"  {reason}"))
    show_steps(console, report)
    return exit_code(verdict["status"])
