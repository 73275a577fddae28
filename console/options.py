"""Options, passphrases and files that several verbs share."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from protocol.errors import PlanInvalid
from protocol.plan import Plan

console = Console(highlight=False)

Home = Annotated[Path, typer.Option("--home", help="Home folder of this party.", file_okay=False)]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help="File (mode 0600) or /dev/fd/N with the passphrase; else FEDSEAL_PASSPHRASE, else a prompt.",
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

    prompt = (lambda: getpass.getpass(f"{question}: ")) if sys.stdin.isatty() else None
    return read_passphrase(file, os.environ, prompt)


def read_plan(file: Path) -> Plan:
    """Read and validate a plan file, or raise PlanInvalid."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise PlanInvalid("the plan file cannot be read") from None
    return Plan.from_toml(text)
