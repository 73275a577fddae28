"""The command line: one short function per verb.

Exit status: 0 success, 1 and above as `docs/errors.md` says for each coded error, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from console.certificates import home_app, pki_app
from console.ending import DEBUG_VARIABLE, ended, heed_signals, prepare_output
from console.operations import log_app, operator_link
from console.options import (
    AsJson,
    Home,
    OperatorFolder,
    OperatorPassphraseFile,
    PassphraseFile,
    PlanOption,
    Proxy,
    ask_passphrase,
    console,
    read_plan,
    require_home,
)
from console.privacy import privacy_app
from console.records import audit_app, data_app, ledger_app, package_app, plan_app, seal_app
from protocol.environment import importing, prepare_environment
from scenarios.bench import BenchmarkName

app = typer.Typer(
    name="fedseal",
    help="Train one model over data that must not leave its owners: private, encrypted, audited.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, group in (
    ("pki", pki_app),
    ("home", home_app),
    ("data", data_app),
    ("plan", plan_app),
    ("seal", seal_app),
    ("privacy", privacy_app),
    ("ledger", ledger_app),
    ("log", log_app),
    ("package", package_app),
    ("audit", audit_app),
):
    app.add_typer(group, name=name)


def main() -> None:
    """Run the command line; errors of every kind become a short explanation and an exit status."""
    prepare_output()
    prepare_environment()
    heed_signals()
    sys.exit(ended(app))


@app.callback()
def common(
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show where an error was raised; it may quote data, keep it here."),
    ] = False,
) -> None:
    """Options before the verb."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def _log_to_stderr() -> None:
    """Show fedseal's own log and nothing else; libraries log more than a party may want to keep."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("fedseal")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


# --- demo and simulation -----------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="New or empty folder for everything that is made.")] = Path(
        "demo-out"
    ),
    plan: Annotated[Path | None, typer.Option(help="Plan to run instead of the bundled one.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which owner gets which rows.")] = 0,
    no_audit: Annotated[
        bool, typer.Option("--no-audit", help="End with the package; the report then lacks evidence.")
    ] = False,
) -> None:
    """Run a whole federation on this machine: certificates, four processes, training, package, audit.

    Exit with the audit's verdict: 0 PASS, 1 FAIL, 2 INCONCLUSIVE; 0 with --no-audit.
    """
    from console.show import show_demo

    raise typer.Exit(show_demo(console, out, plan, seed, audited=not no_audit))


@app.command()
def simulate(
    scenario: Annotated[Path, typer.Argument(help="Scenario file; see docs/scenarios.md.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the run; a temporary one otherwise.")] = None,
    repeat: Annotated[
        int, typer.Option(min=1, help="Runs with rising seeds; their accuracies are summed up.")
    ] = 1,
) -> None:
    """Run a scenario in this process: the same apps, no sockets."""
    from console.show import show_simulation

    show_simulation(console, scenario, out, repeat)


@app.command()
def bench(
    name: Annotated[BenchmarkName, typer.Argument(help="Benchmark; see docs/benchmarks.md.")],
    file: Annotated[Path, typer.Option("--json", help="File for all figures.", dir_okay=False)],
    parameters: Annotated[
        list[int] | None, typer.Option(min=1, help="Length of an update; may be repeated.")
    ] = None,
    clients: Annotated[
        list[int] | None, typer.Option(min=2, help="Clients of one sum; may be repeated.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=5, help="Measurements of every program.")] = 5,
    peer_python: Annotated[
        Path | None, typer.Option(help="Python of another environment that holds a peer.")
    ] = None,
    peers: Annotated[
        Path | None, typer.Option(help="Folder with an environment per peer: nvflare/bin/python.")
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="Program that is not measured; may be repeated.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted measurement.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="Earlier file: its ratios are compared, exit 1 if one is worse by a fifth."),
    ] = None,
) -> None:
    """Measure fedseal beside other systems, interleaved, by CPU time, bytes and memory."""
    from scenarios.bench import DEFAULT_SIZES, run_benchmark
    from scenarios.bench_arms import Settings

    length, cohort = DEFAULT_SIZES[name]
    settings = Settings(
        parameters or [length], clients or [cohort], repeat, peer_python, peers, tuple(leave_out or ())
    )
    run_benchmark(console, name, settings, file, resume=resume, against=against)


# --- parties -----------------------------------------------------------------------------------------


@app.command()
def server(
    home: Home,
    host: Annotated[str, typer.Option(help="Address on which owners connect.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on which owners connect.")] = 8443,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Run the coordinator until it is stopped."""
    with importing():
        from server.listeners.sockets import ListenerOptions
        from server.process import run_server

    _log_to_stderr()
    require_home(home, "coordinator", free=True)
    passphrase = ask_passphrase(passphrase_file, "Passphrase of the coordinator's key")
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
    proxy: Proxy = None,
) -> None:
    """Run an owner's node until it is stopped."""
    from client.address import parse_address
    from client.proxy import chosen_proxy

    parse_address(server)
    by = chosen_proxy(proxy)
    with importing():
        from client.node import run_node

    _log_to_stderr()
    require_home(home, "owner", free=True)
    passphrase = ask_passphrase(passphrase_file, "Passphrase of the owner's keys")
    run_node(home, passphrase, server, keep_trying=not once, proxy=by)


@app.command()
def run(
    home: Home,
    plan: Annotated[Path | None, typer.Argument(help="The plan.toml to run.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Name of a run, or its beginning: go on after its last round."),
    ] = None,
    public_data: Annotated[
        Path | None,
        typer.Option(help="Public examples for evaluation and for the package; --resume adds them later."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for package and report.")] = None,
    operator: OperatorFolder = None,
    passphrase_file: PassphraseFile = None,
    operator_passphrase_file: OperatorPassphraseFile = None,
) -> None:
    """Submit a plan to the coordinator of this home, follow it, package the model, write the report.

    Exit 11 if the run paused or was interrupted: --resume goes on with it.
    """
    from console.run import begin_run, resume_run

    if (plan is None) == (resume is None):
        raise typer.BadParameter("give either a plan.toml or --resume RUN")
    checked = None if plan is None else read_plan(plan)
    require_home(home, "coordinator")
    passphrase = ask_passphrase(passphrase_file, "Passphrase of the coordinator's key")
    link = operator_link(home, operator, operator_passphrase_file)
    if checked is not None:
        begin_run(console, home, checked, public_data, out, passphrase, link)
    elif resume is not None:
        resume_run(console, home, resume, public_data, out, passphrase, link)


@app.command()
def runs(
    home: Home,
    operator: OperatorFolder = None,
    operator_passphrase_file: OperatorPassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """List the runs of the coordinator of this home."""
    from console.operations import show_runs

    require_home(home, "coordinator")
    show_runs(console, operator_link(home, operator, operator_passphrase_file), as_json=as_json)


@app.command()
def stop(
    run: Annotated[str, typer.Argument(help="The run's name as fedseal runs shows it, or its beginning.")],
    home: Home,
    operator: OperatorFolder = None,
    operator_passphrase_file: OperatorPassphraseFile = None,
) -> None:
    """Stop a run; every finished round is kept."""
    from server.runs import run_named

    require_home(home, "coordinator")
    link = operator_link(home, operator, operator_passphrase_file)
    name = run_named(home, run)
    console.print(f"{name}: {link.stop(name)}", soft_wrap=True)


@app.command()
def doctor(
    home: Annotated[Path | None, typer.Option(help="Also check this party's home folder.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port that must be free.")] = 8443,
    server: Annotated[
        str | None, typer.Option("--server", help="HOST:PORT of a coordinator to connect to.")
    ] = None,
    proxy: Proxy = None,
    passphrase_file: PassphraseFile = None,
    plan: PlanOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine: Python, packages, encryption, ports, clock, certificates, the way to a server."""
    from console.doctor import examine, show_findings

    findings = examine(home, port, None if plan is None else read_plan(plan))
    if server is not None:
        from client.proxy import chosen_proxy
        from console.doctor_net import check_server

        findings += check_server(server, home, chosen_proxy(proxy), passphrase_file)
    if not show_findings(console, findings, as_json=as_json):
        raise typer.Exit(10)


if __name__ == "__main__":
    main()
