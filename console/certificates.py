"""Verbs for certificates and home folders: ``fedseal pki``, ``fedseal home``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from console.options import AsJson, Days, Home, PassphraseFile, Pki, ask_passphrase, console

pki_app = typer.Typer(help="Certificates of the federation.", no_args_is_help=True)
home_app = typer.Typer(help="Home folders of coordinator and owners.", no_args_is_help=True)


@pki_app.command("init")
def pki_init(
    pki: Pki,
    name: Annotated[str, typer.Option(help="Name of the authority.")] = "fedseal authority",
    days: Days = 3650,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a certificate authority. Keep it away from the coordinator's machine."""
    from crypto.pki import init_pki

    init_pki(pki, name, ask_passphrase(passphrase_file, "New passphrase of the authority"), days)
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

    authority = ask_passphrase(passphrase_file, "Passphrase of the authority")
    key = ask_passphrase(key_passphrase_file, "New passphrase for the keys that are issued")
    issue_certificates(console, pki, owner, server_name, days, renew, authority, key)


@pki_app.command("revoke")
def pki_revoke(
    pki: Pki,
    names: Annotated[list[str] | None, typer.Argument(help="Names; none only renews the list.")] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Revoke certificates, or renew the revocation list before it is stale. Copy crl.pem to all parties."""
    from crypto.pki import revoke

    revoke(pki, ask_passphrase(passphrase_file, "Passphrase of the authority"), names or ())
    console.print("a fresh revocation list was signed: copy crl.pem to all parties")


@pki_app.command("show")
def pki_show(pki: Pki, as_json: AsJson = False) -> None:
    """List what the authority issued, with the days that are left."""
    from console.show import show_pki

    show_pki(console, pki, as_json=as_json)


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
