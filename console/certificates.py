"""Verbs for certificates and home folders: ``fedseal pki``, ``fedseal home``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from console.options import (
    AsJson,
    Days,
    Home,
    PassphraseFile,
    Pki,
    PlanOption,
    ask_new_passphrase,
    ask_passphrase,
    console,
    read_plan,
)

pki_app = typer.Typer(help="Certificates of the federation.", no_args_is_help=True)
home_app = typer.Typer(help="Home folders of coordinator and owners.", no_args_is_help=True)

Identity = Annotated[
    Path, typer.Option("--identity", help="Identity folder: HOME/identity, or an operator's own.")
]


class PartyName(Enum):
    """The parties that have certificates."""

    coordinator = "coordinator"
    owner = "owner"
    operator = "operator"


@pki_app.command("init")
def pki_init(
    pki: Pki,
    name: Annotated[str, typer.Option(help="Name of the authority.")] = "fedseal authority",
    days: Days = 3650,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a certificate authority. Keep it away from the coordinator's machine."""
    from crypto.pki import init_pki

    init_pki(pki, name, ask_new_passphrase(passphrase_file, "New passphrase of the authority"), days)
    console.print("authority made; its key is sealed under the passphrase")


@pki_app.command("request")
def pki_request(
    party: Annotated[PartyName, typer.Argument(help="What this party is.")],
    identity: Identity,
    name: Annotated[
        str | None, typer.Option(help="Name of the owner or operator; a coordinator's is fixed.")
    ] = None,
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="Host name or address that owners connect to; may be repeated."),
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make this party's keys, here and nowhere else, and the request that the authority signs."""
    from console.pki import show_request

    passphrase = ask_new_passphrase(passphrase_file, "New passphrase of this party's keys")
    show_request(console, party.value, identity, name, hosts or [], passphrase)


@pki_app.command("sign")
def pki_sign(
    requests: Annotated[list[Path], typer.Argument(help="The parties' request.pem files.")],
    pki: Pki,
    days: Days = 365,
    fingerprint: Annotated[
        str | None,
        typer.Option(help="Fingerprint that the one party gave by another way; other keys are refused."),
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Admit parties: issue the certificates that their requests ask for."""
    from console.pki import show_signed

    passphrase = ask_passphrase(passphrase_file, "Passphrase of the authority")
    show_signed(console, pki, requests, days, fingerprint, passphrase)


@pki_app.command("renew")
def pki_renew(
    name: Annotated[str, typer.Argument(help="Name of the party.")],
    pki: Pki,
    days: Days = 365,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Issue new certificates for the same keys and name, with a later end."""
    from crypto.pki import renew

    answer = renew(pki, ask_passphrase(passphrase_file, "Passphrase of the authority"), name, days)
    console.print(f"give {answer} to {name}, who installs it", soft_wrap=True)


@pki_app.command("install")
def pki_install(
    answer: Annotated[Path, typer.Argument(help="What the authority issued: answers/NAME.pem.")],
    identity: Identity,
) -> None:
    """Put the certificates that the authority issued beside this party's keys."""
    from console.pki import show_installed

    show_installed(console, answer, identity)


@pki_app.command("revoke")
def pki_revoke(
    pki: Pki,
    names: Annotated[list[str] | None, typer.Argument(help="Names; none only renews the list.")] = None,
    days: Annotated[int, typer.Option(min=1, max=365, help="How long the list may be relied on.")] = 30,
    lists: Annotated[
        list[Path] | None,
        typer.Option("--crl", help="Another crl.pem to replace, of a party on this machine; repeatable."),
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Revoke certificates, or renew the revocation list before it is stale."""
    from console.pki import show_revoked

    passphrase = ask_passphrase(passphrase_file, "Passphrase of the authority")
    show_revoked(console, pki, names or [], days, lists or [], passphrase)


@pki_app.command("list")
def pki_list(pki: Pki, as_json: AsJson = False) -> None:
    """List what the authority issued: name, role, fingerprint, days left, and whether it is revoked."""
    from console.pki import show_pki

    show_pki(console, pki, as_json=as_json)


@home_app.command("crl")
def home_crl(
    file: Annotated[Path, typer.Argument(help="The authority's crl.pem.")],
    home: Home,
) -> None:
    """Put a newer revocation list into a home; running processes take it at once."""
    from console.pki import show_replaced

    show_replaced(console, home, file)


@home_app.command("coordinator")
def home_coordinator(
    home: Home,
    members: Annotated[Path, typer.Option(help="Folder members/ with all certificates.")],
) -> None:
    """Lay out a coordinator's home folder around its identity."""
    from scenarios.federation import make_coordinator_home

    make_coordinator_home(home, members)


@home_app.command("owner")
def home_owner(
    home: Home,
    data: Annotated[Path, typer.Option(help="The owner's examples; a copy goes into the home.")],
    dataset: Annotated[str, typer.Option(help="Name under which the privacy budget is kept.")],
    peers: Annotated[Path, typer.Option(help="Folder with signing certificates of known owners.")],
    plan: PlanOption = None,
) -> None:
    """Lay out an owner's home folder around its identity, with a policy.toml to read and edit."""
    from client.owner import IDENTITY
    from console.rows import read_counts, show_counts
    from scenarios.federation import make_owner_home, pins_of

    checked, pins = None if plan is None else read_plan(plan), pins_of(peers, home / IDENTITY)
    counts = read_counts(data, checked)
    make_owner_home(home, data, dataset, pins)
    show_counts(console, counts, checked)
    console.print(f"read and edit {home / 'policy.toml'}: it says what may be done with the data")
