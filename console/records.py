"""Verbs for what a run leaves behind or begins with: plans, sealing, ledgers, packages, reports, data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from console.options import AsJson, Home, PassphraseFile, PlanFile, console, read_plan

plan_app = typer.Typer(help="Run plans.", no_args_is_help=True)
seal_app = typer.Typer(help="Encryption of updates.", no_args_is_help=True)
ledger_app = typer.Typer(help="The privacy ledger of an owner.", no_args_is_help=True)
package_app = typer.Typer(help="Packaged models.", no_args_is_help=True)
audit_app = typer.Typer(help="Audit reports.", no_args_is_help=True)
data_app = typer.Typer(help="Example data.", no_args_is_help=True)


FullDepth = Annotated[
    bool,
    typer.Option("--full/--quick", help="Up to ten minutes of experiments, or up to one, the default."),
]


@plan_app.command("check")
def plan_check(
    plan: PlanFile,
    as_json: AsJson = False,
) -> None:
    """Check a plan and show what follows from it: noise, epsilon, bytes."""
    from console.show import show_plan

    show_plan(console, read_plan(plan), as_json=as_json)


@ledger_app.command("show")
def ledger_show(home: Home, as_json: AsJson = False) -> None:
    """Show what an owner's data has cost so far, after checking every record."""
    from console.show import show_ledger

    show_ledger(console, home, as_json=as_json)


@ledger_app.command("verify")
def ledger_verify(home: Home, passphrase_file: PassphraseFile = None, as_json: AsJson = False) -> None:
    """Check every record and the head copy; with --passphrase-file, the heads that peers know too.

    Exit 0 if all of it holds, 3 if the ledger is missing, damaged or older than a head that is known.
    """
    from console.ledger import verify_ledger

    verify_ledger(console, home, passphrase_file, as_json=as_json)


@ledger_app.command("adopt")
def ledger_adopt(
    home: Home,
    epsilon: Annotated[float, typer.Option(min=0, help="What the lost records cost at most.")],
    delta: Annotated[float, typer.Option(min=0, max=1, help="Likewise.")],
    passphrase_file: PassphraseFile = None,
) -> None:
    """Go on after records were lost for good, at a cost that you declare and that counts as spent.

    Stop the node first. If you do not know what was lost, declare your whole caps.
    """
    from console.ledger import adopt_ledger

    adopt_ledger(console, home, passphrase_file, epsilon, delta)


@package_app.command("verify")
def package_verify(
    package: Annotated[Path, typer.Argument(help="A .fedseal folder.")],
    key: Annotated[Path, typer.Option(help="PEM of the signer's public key, from the signer itself.")],
) -> None:
    """Check a package's signature and content, and show its privacy statement."""
    from console.show import show_package

    show_package(console, package, key)


@audit_app.command("run")
def audit_run(
    subject: Annotated[
        Path, typer.Argument(help="A plan.toml, or the folder or the name of an ended run.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")],
    full: FullDepth = False,
    owner: Annotated[
        list[Path] | None, typer.Option(help="File of `fedseal audit owner`; once for each owner of a run.")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="The coordinator's home, for the name of a run and to sign.")
    ] = None,
    public: Annotated[
        Path | None, typer.Option(help="Public examples of the task; else the run's own, or the digits.")
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Audit a plan by a simulated federation, or a run that has ended. Exit 0 PASS, 1 FAIL, 2 INCONCLUSIVE.

    Tests, attacks and searches use made-up and public records. The report is signed by the
    coordinator's release key; that on a plan only with --home.
    """
    from console.audit import AuditOptions, run_audit

    depth: Literal["quick", "full"] = "full" if full else "quick"
    options = AuditOptions(subject, out, depth, owner or [], home, public, passphrase_file)
    raise typer.Exit(run_audit(console, options))


@audit_app.command("owner")
def audit_owner(
    home: Home,
    out: Annotated[Path, typer.Option(help="File for the signed findings, the only thing to hand over.")],
    plan: Annotated[Path | None, typer.Option(help="The plan.toml that they are about.")] = None,
    run: Annotated[
        str | None,
        typer.Option(help="Or the run: its name, or its digits as fedseal ledger show prints them."),
    ] = None,
    full: FullDepth = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Test the code installed at this owner, look at its keys and its ledger, and sign what was found.

    No record of this owner is read and no budget is spent.
    """
    from console.audit import audit_owner as make_findings

    if (plan is None) == (run is None):
        raise typer.BadParameter("give either --plan PLAN or --run RUN")
    depth: Literal["quick", "full"] = "full" if full else "quick"
    subject = read_plan(plan) if plan is not None else str(run)
    make_findings(console, home, subject, depth, out, passphrase_file)


@audit_app.command("render")
def audit_render(
    report: Annotated[Path, typer.Argument(help="A report.json.")],
    out: Annotated[Path, typer.Option(help="File for the page.", dir_okay=False)],
    key: Annotated[Path | None, typer.Option(help="PEM of the signer's public key.")] = None,
) -> None:
    """Check a report as `verify` does, and write its page. Exit 0, whatever its verdict."""
    from console.show import render_report

    render_report(console, report, out, key)


@audit_app.command("verify")
def audit_verify(
    report: Annotated[Path, typer.Argument(help="A report.json.")],
    key: Annotated[Path | None, typer.Option(help="PEM of the signer's public key.")] = None,
) -> None:
    """Check a report and recompute its verdict. Exit 0 PASS, 1 FAIL, 2 INCONCLUSIVE."""
    from console.show import show_report

    raise typer.Exit(show_report(console, report, key))


@audit_app.command("selftest")
def audit_selftest(
    runs: Annotated[int, typer.Option(min=0, help="Correct runs, none of which may alarm.")] = 200,
    file: Annotated[
        Path | None, typer.Option("--json", help="File for all results.", dir_okay=False)
    ] = None,
) -> None:
    """Plant faults in the running code, one by one, and see that the audit notices each. Exit 0 or 1."""
    from console.selftest import run_self_test

    raise typer.Exit(0 if run_self_test(console, runs, file) else 1)


@data_app.command("digits")
def data_digits(
    out: Annotated[Path, typer.Option(help="New folder for the files.")],
    owners: Annotated[int, typer.Option(min=1, max=256, help="Number of owners.")] = 3,
    seed: Annotated[int, typer.Option(help="Decides which owner gets which rows.")] = 0,
) -> None:
    """Split scikit-learn's bundled digits into one file per owner and a public one."""
    from tasks.partition import digits, write_examples

    splits, public = digits(seed=seed, owners=owners)
    out.mkdir(parents=True)
    for number, split in enumerate(splits, start=1):
        write_examples(out / f"owner-{number}.npz", *split)
    write_examples(out / "public.npz", *public)


@seal_app.command("plan")
def seal_plan(
    plan: PlanFile,
    parameters: Annotated[
        int | None, typer.Option(min=1, help="Values of an update; the plan's model by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what sealing a plan's updates costs, and the proof that its sums are exact."""
    from console.sealplan import seal_plan as facts_of
    from console.sealplan import show_seal_plan
    from console.show import dump_json

    facts = facts_of(read_plan(plan), parameters)
    if as_json:
        dump_json(facts)
    else:
        show_seal_plan(console, facts)
