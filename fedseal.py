"""The command line: one short function per verb.

Exit status: 0 success, 1 and above as `docs/errors.md` says for each coded error, 130 interrupted.
"""

from __future__ import annotations

import getpass
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from protocol.environment import prepare_environment
from protocol.errors import FedsealError, PlanInvalid
from protocol.plan import Plan

app = typer.Typer(
    name="fedseal",
    help="Train one model over data that must not leave its owners: private, encrypted, audited.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
pki_app = typer.Typer(help="Certificates of the federation.", no_args_is_help=True)
home_app = typer.Typer(help="Home folders of coordinator and owners.", no_args_is_help=True)
data_app = typer.Typer(help="Example data.", no_args_is_help=True)
plan_app = typer.Typer(help="Run plans.", no_args_is_help=True)
ledger_app = typer.Typer(help="The privacy ledger of an owner.", no_args_is_help=True)
package_app = typer.Typer(help="Packaged models.", no_args_is_help=True)
audit_app = typer.Typer(help="Audit reports.", no_args_is_help=True)
for name, group in (
    ("pki", pki_app),
    ("home", home_app),
    ("data", data_app),
    ("plan", plan_app),
    ("ledger", ledger_app),
    ("package", package_app),
    ("audit", audit_app),
):
    app.add_typer(group, name=name)

console = Console(highlight=False)

Home = Annotated[Path, typer.Option("--home", help="Home folder of this party.", file_okay=False)]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help="File (mode 0600) or /dev/fd/N with the passphrase; else FEDSEAL_PASSPHRASE, else a prompt.",
    ),
]
Pki = Annotated[Path, typer.Option("--pki", help="Folder of the certificate authority.")]
Days = Annotated[int, typer.Option("--days", min=1, max=3650, help="Validity in days.")]


def main() -> None:
    """Run the command line; coded errors become a short explanation and an exit status."""
    prepare_environment()
    try:
        app()
    except FedsealError as error:
        Console(stderr=True, highlight=False).print(Text(error.explain(), style="red"))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; all processes of this command were stopped")
        sys.exit(130)


def _passphrase(file: Path | None, question: str) -> bytes:
    from crypto.vault import read_passphrase

    prompt = (lambda: getpass.getpass(f"{question}: ")) if sys.stdin.isatty() else None
    return read_passphrase(file, os.environ, prompt)


def _log_to_stderr() -> None:
    """Show fedseal's own log and nothing else; libraries log more than a party may want to keep."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("fedseal")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _read_plan(file: Path) -> Plan:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise PlanInvalid("the plan file cannot be read") from None
    return Plan.from_toml(text)


# --- demo and simulation -----------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="New or empty folder for everything that is made.")] = Path(
        "demo-out"
    ),
    plan: Annotated[Path | None, typer.Option(help="Plan to run instead of the bundled one.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which owner gets which rows.")] = 0,
) -> None:
    """Run a whole federation on this machine: certificates, four processes, training, package, report."""
    from console.show import show_demo

    show_demo(console, out, plan, seed)


@app.command()
def simulate(
    scenario: Annotated[Path, typer.Argument(help="Scenario file; see docs/scenarios.md.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the run; a temporary one otherwise.")] = None,
) -> None:
    """Run a scenario in this process: the same apps, no sockets."""
    from console.show import show_simulation

    show_simulation(console, scenario, out)


# --- parties -----------------------------------------------------------------------------------------


@app.command()
def server(
    home: Home,
    host: Annotated[str, typer.Option(help="Address on which owners connect.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on which owners connect.")] = 8443,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Run the coordinator until it is stopped."""
    from server.launcher import ListenerOptions
    from server.process import run_server

    _log_to_stderr()
    passphrase = _passphrase(passphrase_file, "Passphrase of the coordinator's key")
    run_server(
        home,
        passphrase,
        ListenerOptions(host, port),
        ready=lambda: console.print(f"coordinator ready: owners connect to {host}:{port}"),
    )


@app.command()
def client(
    home: Home,
    server: Annotated[str, typer.Option("--server", help="HOST:PORT of the coordinator.")],
    passphrase_file: PassphraseFile = None,
    once: Annotated[bool, typer.Option(help="End when the coordinator is not there.")] = False,
) -> None:
    """Run an owner's node until it is stopped."""
    from client.node import run_node

    _log_to_stderr()
    passphrase = _passphrase(passphrase_file, "Passphrase of the owner's keys")
    run_node(home, passphrase, server, keep_trying=not once)


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="The plan.toml to run.")],
    home: Home,
    public_data: Annotated[
        Path | None, typer.Option(help="Public examples for evaluation and for the package.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for package and report.")] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Submit a plan to the coordinator of this home, follow it, package the model, write the report."""
    from console.show import show_run

    passphrase = _passphrase(passphrase_file, "Passphrase of the coordinator's key")
    show_run(console, home, _read_plan(plan), public_data, out, passphrase)


@app.command()
def doctor(
    home: Annotated[Path | None, typer.Option(help="Also check this party's home folder.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port that must be free.")] = 8443,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine: Python, packages, encryption, ports, clock, certificates."""
    from console.doctor import examine, show_findings

    findings = examine(home, port)
    if not show_findings(console, findings, as_json=as_json):
        raise typer.Exit(10)


# --- certificates ------------------------------------------------------------------------------------


@pki_app.command("init")
def pki_init(
    pki: Pki,
    name: Annotated[str, typer.Option(help="Name of the authority.")] = "fedseal authority",
    days: Days = 3650,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a certificate authority. Keep it away from the coordinator's machine."""
    from crypto.pki import init_pki

    init_pki(pki, name, _passphrase(passphrase_file, "New passphrase of the authority"), days)
    console.print("authority made; its key is sealed under the passphrase")


@pki_app.command("issue")
def pki_issue(
    pki: Pki,
    owner: Annotated[str | None, typer.Option(help="Issue an owner's two certificates.")] = None,
    server_name: Annotated[
        list[str] | None,
        typer.Option("--server", help="Issue the coordinator's certificate for this host."),
    ] = None,
    days: Days = 365,
    renew: Annotated[bool, typer.Option(help="Replace what was issued before.")] = False,
    passphrase_file: PassphraseFile = None,
    key_passphrase_file: Annotated[
        Path | None,
        typer.Option(help="File with the passphrase that seals the new keys; the holder's own."),
    ] = None,
) -> None:
    """Issue certificates for one owner or for the coordinator."""
    from console.show import issue_certificates

    authority = _passphrase(passphrase_file, "Passphrase of the authority")
    key = _passphrase(key_passphrase_file, "New passphrase for the keys that are issued")
    issue_certificates(console, pki, owner, server_name, days, renew, authority, key)


@pki_app.command("revoke")
def pki_revoke(
    pki: Pki,
    names: Annotated[list[str] | None, typer.Argument(help="Names; none only renews the list.")] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Revoke certificates, or renew the revocation list before it is stale. Copy crl.pem to all parties."""
    from crypto.pki import revoke

    revoke(pki, _passphrase(passphrase_file, "Passphrase of the authority"), names or ())
    console.print("a fresh revocation list was signed: copy crl.pem to all parties")


@pki_app.command("show")
def pki_show(
    pki: Pki, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """List what the authority issued, with the days that are left."""
    from console.show import show_pki

    show_pki(console, pki, as_json=as_json)


# --- homes and data ----------------------------------------------------------------------------------


@home_app.command("coordinator")
def home_coordinator(
    home: Home,
    identity: Annotated[Path, typer.Option(help="Folder server/ as the authority issued it.")],
    members: Annotated[Path, typer.Option(help="Folder members/ with all certificates.")],
) -> None:
    """Lay out a coordinator's home folder."""
    from scenarios.federation import make_coordinator_home

    make_coordinator_home(home, identity, members)


@home_app.command("owner")
def home_owner(
    home: Home,
    identity: Annotated[Path, typer.Option(help="Folder owners/NAME as the authority issued it.")],
    data: Annotated[Path, typer.Option(help="The owner's examples; a copy goes into the home.")],
    dataset: Annotated[str, typer.Option(help="Name under which the privacy budget is kept.")],
    peers: Annotated[Path, typer.Option(help="Folder with signing certificates of known owners.")],
) -> None:
    """Lay out an owner's home folder, with a policy.toml to read and edit."""
    from scenarios.federation import make_owner_home, pins_of

    make_owner_home(home, identity, data, dataset, pins_of(peers, identity))
    console.print(f"read and edit {home / 'policy.toml'}: it says what may be done with the data")


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


# --- plans, ledgers, packages, reports ---------------------------------------------------------------


@plan_app.command("check")
def plan_check(
    plan: Annotated[Path, typer.Argument(help="The plan.toml.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the resolved plan as JSON.")] = False,
) -> None:
    """Check a plan and show what follows from it: noise, epsilon, bytes."""
    from console.show import show_plan

    show_plan(console, _read_plan(plan), as_json=as_json)


@ledger_app.command("show")
def ledger_show(
    home: Home, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show what an owner's data has cost so far, after checking every record."""
    from console.show import show_ledger

    show_ledger(console, home, as_json=as_json)


@package_app.command("verify")
def package_verify(
    package: Annotated[Path, typer.Argument(help="A .fedseal folder.")],
    key: Annotated[Path, typer.Option(help="PEM of the signer's public key, from the signer itself.")],
) -> None:
    """Check a package's signature and content, and show its privacy statement."""
    from console.show import show_package

    show_package(console, package, key)


@audit_app.command("verify")
def audit_verify(
    report: Annotated[Path, typer.Argument(help="A report.json.")],
    key: Annotated[Path | None, typer.Option(help="PEM of the signer's public key.")] = None,
) -> None:
    """Check a report and recompute its verdict. Exit 0 PASS, 1 FAIL, 2 INCONCLUSIVE."""
    from console.show import show_report

    raise typer.Exit(show_report(console, report, key))


if __name__ == "__main__":
    main()
