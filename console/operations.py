"""What operators do on a coordinator's machine, and ``fedseal log``: what was done by whom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from console.options import AsJson, ask_passphrase, console
from console.show import dump_json
from console.tables import show_table
from protocol.errors import EncodingInvalid, HomeMissing, HomeOfAnother
from protocol.storage import translated

if TYPE_CHECKING:
    from crypto.auditlog import AuditLog, Head
    from server.listeners.control import ControlLink

log_app = typer.Typer(help="The log of administrative and protocol acts.", no_args_is_help=True)

LogHome = Annotated[
    Path, typer.Option("--home", help="Home of the coordinator, or the authority's folder.")
]


def operator_link(home: Path, identity: Path | None, passphrase_file: Path | None) -> ControlLink:
    """Open an operator's identity and return its connection to the coordinator of a home.

    Args:
        home: The coordinator's home.
        identity: The operator's identity folder; ``operator/`` of the home where it is left out.
        passphrase_file: Of the operator's key.
    """
    from crypto.identity import load_operator
    from server.home import OPERATOR
    from server.listeners.control import ControlLink

    folder = identity or home / OPERATOR
    passphrase = ask_passphrase(passphrase_file, "Passphrase of the operator's key")
    return ControlLink(home, folder, load_operator(folder, passphrase))


def show_runs(console: Console, link: ControlLink, *, as_json: bool) -> None:
    """Print the coordinator's runs."""
    runs = link.runs()
    if as_json:
        dump_json(runs)
        return
    rows = [
        (
            str(run["run"]),
            str(run["state"]),
            "" if run["rounds"] is None else f"{run['finished_rounds']}/{run['rounds']}",
            str(run["submitted_at"] or ""),
            str(run["operator"] or "")[:16],
        )
        for run in runs
    ]
    show_table(console, ("run", "state", "rounds", "submitted", "operator"), rows)


@log_app.command("show")
def log_show(home: LogHome, as_json: AsJson = False) -> None:
    """Print every act: who did what, when, with which hashes."""
    acts = _log_of(home).acts()
    if as_json:
        dump_json([act.model_dump(mode="json") for act in acts])
        return
    for act in acts:
        facts = " ".join(f"{name}={_short(value)}" for name, value in act.facts.items())
        console.print(Text(f"{act.sequence:5} {act.time} {act.actor[:16]:16} {act.act} {facts}"))


@log_app.command("verify")
def log_verify(
    home: LogHome,
    head: Annotated[
        str | None, typer.Option(help="SEQUENCE:HASH, a head that you kept from an earlier verify.")
    ] = None,
) -> None:
    """Check every hash and the signed head; exit 3 if a line was changed, removed or cut off."""
    from crypto.trust import CA_CERTIFICATE, read_certificate
    from server.home import IDENTITY

    log = _log_of(home)
    folder = home if (home / CA_CERTIFICATE).exists() else home / IDENTITY
    authority = read_certificate(folder / CA_CERTIFICATE, "authority")
    acts = log.verify(authority, None if head is None else _parsed(head))
    console.print(f"verified: {len(acts)} acts form one chain, up to the signed head at least")
    if acts:
        console.print(f"keep this head elsewhere: {acts[-1].sequence}:{acts[-1].hash}", soft_wrap=True)


def _log_of(home: Path) -> AuditLog:
    """Return the log of a home, which must be there: to look at a log makes none."""
    from crypto.auditlog import FOLDER, AuditLog

    with translated(str(home)):
        if not home.is_dir():
            raise HomeMissing(str(home))
        if not (home / FOLDER).is_dir():
            raise HomeOfAnother(f"{home} has no log of acts, as coordinator and authority have")
    return AuditLog(home / FOLDER)


def _parsed(head: str) -> Head:
    from crypto.auditlog import Head

    sequence, _, digest = head.partition(":")
    try:
        return Head.from_fields({"sequence": int(sequence), "hash": digest})
    except (ValueError, EncodingInvalid):
        raise typer.BadParameter("a head is SEQUENCE:HASH, as fedseal log verify prints it") from None


def _short(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_short(item) for item in value)}]"
    text = str(value)
    return text[:16] if len(text) == 64 else text
