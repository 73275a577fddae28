"""`fedseal privacy`: what a plan's privacy costs round by round, and what it means in words."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from console.options import AsJson, PlanFile, console, read_plan
from protocol.errors import PlanInvalid
from protocol.plan import Plan

if TYPE_CHECKING:
    from audit.outlook import Outlook

privacy_app = typer.Typer(help="What a plan's privacy costs and means.", no_args_is_help=True)

_ALARM = "bold white on red"


@privacy_app.command("plan")
def privacy_plan(
    plan: PlanFile,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw epsilon over rounds into this SVG file.", dir_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show noise, epsilon after each round, cross-checks, and what would change them."""
    from audit.outlook import outlook
    from console.show import dump_json
    from tasks.resolve import resolve

    resolved = resolve(read_plan(plan))
    view = outlook(resolved)
    if plot is not None:
        _write_plot(plot, resolved, view)
    if as_json:
        dump_json(facts(resolved, view))
    else:
        show_outlook(console, resolved, view)


@privacy_app.command("explain")
def privacy_explain(plan: PlanFile, as_json: AsJson = False) -> None:
    """Say in plain words what epsilon, delta, unit and adjacency mean for this plan."""
    from console.privacywords import explain
    from console.show import dump_json
    from tasks.resolve import resolve

    passages = explain(resolve(read_plan(plan)))
    if as_json:
        dump_json([asdict(passage) for passage in passages])
        return
    width = min(console.width, 100)
    for passage in passages:
        console.print(Text(passage.heading, style=_ALARM if passage.alarm else "bold"), width=width)
        for paragraph in passage.paragraphs:
            console.print(Text(paragraph), width=width)
        console.print()


def facts(plan: Plan, view: Outlook | None) -> dict[str, Any]:
    """Return what `show_outlook` prints as JSON values; a loss without bound is the text ``inf``."""
    from protocol.claims import UNITS, adjacency, assumption

    privacy = plan.privacy
    common = {
        "unit": privacy.unit,
        "covers": UNITS[privacy.unit],
        "adjacency": adjacency(plan),
        "noise": privacy.noise,
        "assumption": assumption(plan),
        "experimental": privacy.noise == "distributed",
        "accountant": privacy.accountant,
        "rounds": plan.run.rounds,
        "paid_rounds": plan.paid_rounds,
        "target_epsilon": _finite(privacy.target_epsilon),
    }
    if view is None:
        return common | {"epsilon": "inf", "delta": None, "epsilon_after": []}
    return common | {
        "epsilon": _finite(view.epsilon),
        "delta": view.delta,
        "mechanism": {name: _finite(value) for name, value in asdict(view.mechanism).items()},
        "epsilon_after": [
            {"rounds": row.rounds, "epsilon": _finite(row.epsilon), "epsilon_worst": _finite(row.worst)}
            for row in view.rows
        ],
        "cross_checks": {name: _finite(value) for name, value in asdict(view.checks).items()}
        | {"agree": view.checks.agree},
        "changes": [
            {
                "change": change.name,
                "epsilon": _finite(change.epsilon),
                "noise_multiplier": change.noise_multiplier,
            }
            for change in view.changes
        ],
        "evaluation": None if view.evaluation is None else asdict(view.evaluation),
    }


def show_outlook(console: Console, plan: Plan, view: Outlook | None) -> None:
    """Print what a plan will cost, for a person."""
    from console.privacychart import text_chart
    from console.privacywords import UNPROTECTED
    from protocol.claims import assumption

    if view is None:
        console.print(Text(UNPROTECTED, style=_ALARM))
        console.print("No noise is added, so that nothing bounds what the model gives away.")
        return
    if plan.privacy.noise == "distributed":
        console.print(Text(assumption(plan), style=_ALARM))
    console.print(_head(plan, view))
    console.print()
    console.print(_rounds_table(plan, view))
    console.print()
    console.print(text_chart(view.curve, console.options.ascii_only))
    console.print()
    console.print(_changes_table(plan, view))
    console.print()
    _show_checks(console, view)


def _head(plan: Plan, view: Outlook) -> Table:
    from protocol.claims import UNITS, adjacency

    privacy, priced = plan.privacy, view.mechanism
    norm = "max_update_norm" if privacy.unit == "client" else "max_grad_norm"
    lines = [
        ("unit of privacy", f"{privacy.unit}: {UNITS[privacy.unit]}; adjacency {adjacency(plan)}"),
        (
            "noise",
            f"{privacy.noise}, multiplier {priced.noise_multiplier:g} of {norm} {plan.sensitivity:g}",
        ),
        (
            "schedule",
            f"{plan.run.rounds} rounds and {plan.run.paid_spares} paid spare, {priced.steps} "
            f"{'step' if priced.steps == 1 else 'steps'} each, sample rate {priced.sample_rate:g}",
        ),
        ("training", _loss(plan, view.rows[-1].epsilon, privacy.delta, privacy.target_epsilon)),
    ]
    if view.evaluation is not None and plan.evaluation is not None:
        loss = view.evaluation
        lines += [
            ("evaluation", _loss(plan, loss.epsilon, loss.delta, plan.evaluation.target_epsilon)),
            ("together", _loss(plan, view.epsilon, view.delta, None)),
        ]
    if privacy.noise == "distributed":
        worst = f"epsilon {_number(view.rows[-1].worst)} of one {privacy.unit}"
        lines.append(("if all others collude", worst))
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in lines:
        style = "bold red" if name == "if all others collude" else ""
        table.add_row(Text(name, style="dim"), Text(value, style=style))
    return table


def _loss(plan: Plan, epsilon: float, delta: float, target: float | None) -> str:
    aim = "" if target is None else f", target {target:g}"
    return f"epsilon {_number(epsilon)} of one {plan.privacy.unit} at delta {delta:g}{aim}"


def _rounds_table(plan: Plan, view: Outlook) -> Table:
    distributed, target = plan.privacy.noise == "distributed", plan.privacy.target_epsilon
    names = ["sealed rounds", f"epsilon of one {plan.privacy.unit}"]
    names += ["if all others collude"] if distributed else []
    names += ["of the target"] if target else []
    table = Table(title=f"training, at delta {plan.privacy.delta:g}", title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for row in view.rows:
        spare = row.rounds > plan.run.rounds
        cells = [f"{row.rounds}{' (with spares)' if spare else ''}", _number(row.epsilon)]
        cells += [_number(row.worst)] if distributed else []
        cells += [f"{100 * row.epsilon / target:.0f} %"] if target else []
        table.add_row(*(Text(cell, style="dim" if spare else "") for cell in cells))
    return table


def _changes_table(plan: Plan, view: Outlook) -> Table:
    target, now = plan.privacy.target_epsilon, view.rows[-1].epsilon
    table = Table(title="what would change it", title_justify="left")
    table.add_column("change")
    table.add_column(f"epsilon of one {plan.privacy.unit}, same noise", justify="right")
    table.add_column("against now", justify="right")
    table.add_column(f"noise for epsilon {target:g}" if target else "noise for the target", justify="right")
    noise = f"{view.mechanism.noise_multiplier:g}"
    table.add_row(*(Text(cell, style="bold") for cell in ("the plan", _number(now), "", noise)))
    for change in view.changes:
        ratio = f"{change.epsilon / now:.2f} x" if math.isfinite(change.epsilon) and now > 0 else ""
        needed = change.noise_multiplier
        table.add_row(change.name, _number(change.epsilon), ratio, "" if needed is None else f"{needed:g}")
    return table


def _show_checks(console: Console, view: Outlook) -> None:
    checks = view.checks
    prv = "not computed" if checks.prv is None else _number(checks.prv)
    console.print(
        f"cross-checks of training: lower bound {_number(checks.lower)}, PLD {_number(checks.pld)} "
        f"(promised), PRV {prv}, RDP {_number(checks.rdp)}"
    )
    if not checks.agree:
        text = "the accountants contradict each other: do not run this plan, and report it"
        console.print(Text(text, style=_ALARM))


def _write_plot(file: Path, plan: Plan, view: Outlook | None) -> None:
    from console.privacychart import svg

    if view is None:
        raise PlanInvalid("privacy.noise is 'none': there is no privacy loss to plot")
    try:
        file.write_text(svg(plan, view), encoding="utf-8")
    except OSError:
        raise PlanInvalid("--plot: the file cannot be written") from None


def _number(epsilon: float) -> str:
    return f"{epsilon:.4f}" if math.isfinite(epsilon) else "no bound"


def _finite(value: float | None) -> float | str | None:
    """Return a number as JSON can hold it."""
    return value if value is None or math.isfinite(value) else "inf"
