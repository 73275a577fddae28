"""Options, passphrases and files that several verbs share."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from console.ending import Output
from protocol.errors import HomeMissing, HomeOfAnother, PlanInvalid, SecretUnavailable
from protocol.plan import Plan
from protocol.storage import read_written, translated

console = Output(highlight=False)

Home = Annotated[Path, typer.Option("--home", help="Home folder of this party.", file_okay=False)]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help="File (mode 0600) or /dev/fd/N with the passphrase; else FEDSEAL_PASSPHRASE, else a prompt.",
    ),
]
Proxy = Annotated[
    str | None,
    typer.Option(
        "--proxy",
        help="http://HOST:PORT of a proxy to the coordinator; else FEDSEAL_PROXY, which may hold a login.",
    ),
]
OperatorFolder = Annotated[
    Path | None,
    typer.Option("--operator", help="Identity folder of the operator; operator/ of the home otherwise."),
]
OperatorPassphraseFile = Annotated[
    Path | None,
    typer.Option("--operator-passphrase-file", help="Like --passphrase-file, for the operator's key."),
]
Pki = Annotated[Path, typer.Option("--pki", help="Folder of the certificate authority.")]
Days = Annotated[int, typer.Option("--days", min=1, max=3650, help="Validity in days.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", help="A plan.toml: count the rows that a run of it would use.")
]
PlanFile = Annotated[Path, typer.Argument(help="The plan.toml.")]


def ask_passphrase(file: Path | None, question: str) -> bytes:
    """Return a passphrase from its file, the environment, or a prompt on a terminal."""
    from crypto.vault import read_passphrase

    prompt = (lambda: getpass.getpass(f"{question}: ")) if _is_attended() else None
    return read_passphrase(file, os.environ, prompt)


def ask_new_passphrase(file: Path | None, question: str) -> bytes:
    """Return a passphrase for new keys; a person types it twice, because nobody could correct a slip.

    Raises:
        PassphraseTooShort: It has too few characters.
        SecretUnavailable: There is none, or the two differ.
    """
    from crypto.vault import NEW_PASSPHRASE_CHARACTERS, check_new_passphrase, read_passphrase

    def asked_twice() -> str:
        first = getpass.getpass(f"{question}, at least {NEW_PASSPHRASE_CHARACTERS} characters: ")
        check_new_passphrase(first.encode("utf-8", "surrogateescape"))
        if getpass.getpass("The same once more: ") != first:
            raise SecretUnavailable("the two passphrases differ; nothing was made")
        return first

    passphrase = read_passphrase(file, os.environ, asked_twice if _is_attended() else None)
    check_new_passphrase(passphrase)
    return passphrase


def require_home(home: Path, party: Literal["owner", "coordinator"], *, free: bool = False) -> None:
    """Refuse a folder that is not a party's home, before anybody types a passphrase for it.

    Args:
        home: The folder.
        party: Whose home it must be.
        free: Refuse a home on which a node or a coordinator runs, too.

    Raises:
        HomeMissing: There is no such folder.
        HomeOfAnother: It is not the home of an owner, or it is one where the coordinator's is needed.
        HomeBusy: A node or a coordinator runs on it.
    """
    from crypto.locks import alone_in

    with translated(str(home)):
        if not home.is_dir():
            raise HomeMissing(str(home))
        is_owners = (home / "policy.toml").exists()
    if party == "owner" and not is_owners:
        raise HomeOfAnother(f"{home} holds no policy.toml, which the home of an owner has")
    if party == "coordinator" and is_owners:
        raise HomeOfAnother(f"{home} is the home of an owner; the command needs the coordinator's")
    if free:
        with alone_in(home):
            return


def _is_attended() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def read_plan(file: Path) -> Plan:
    """Read and validate a plan file, or raise PlanInvalid."""
    return Plan.from_toml(read_written(file, PlanInvalid))
