"""What the verbs for certificates do and print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from console.show import dump_json
from console.tables import show_table
from crypto.requests import Party
from protocol.errors import CertificateRefused, PlanInvalid

_COORDINATOR = "coordinator"


def show_request(
    console: Console,
    party: Party,
    identity: Path,
    name: str | None,
    hosts: Sequence[str],
    passphrase: bytes,
) -> None:
    """Make a party's keys and signing request, and print what to do with it."""
    from crypto.identity import REQUEST, make_request

    if (name is None) != (party == _COORDINATOR):
        raise PlanInvalid("--name names an owner or operator; a coordinator has none to give")
    request = make_request(identity, party, name or _COORDINATOR, passphrase, hosts)
    console.print(f"give {identity / REQUEST} to the authority, and by another way this fingerprint:")
    console.print(request.fingerprint, soft_wrap=True)


def show_signed(
    console: Console,
    pki: Path,
    requests: Sequence[Path],
    days: int,
    fingerprint: str | None,
    passphrase: bytes,
) -> None:
    """Sign requests, and print whom they admit."""
    from crypto.pki import sign_request
    from crypto.trust import parse

    if fingerprint is not None and len(requests) != 1:
        raise PlanInvalid("--fingerprint goes with one request")
    for request in requests:
        signed, answer = sign_request(pki, passphrase, parse(request, bytes), days, fingerprint)
        console.print(f"give {answer} to {signed.name} ({signed.party}), who installs it", soft_wrap=True)
        if fingerprint is None:
            console.print("compare with what the party says by another way; revoke it if it differs:")
        console.print(signed.fingerprint, soft_wrap=True)


def show_installed(console: Console, answer: Path, identity: Path) -> None:
    """Install an authority's answer, and print what to compare and to pin."""
    from crypto.certificates import describe
    from crypto.identity import install
    from crypto.trust import parse

    authority, *certificates = map(describe, install(identity, parse(answer, bytes)))
    console.print("installed; the authority's key has this fingerprint, compare it by another way:")
    console.print(authority["sha256_fingerprint"], soft_wrap=True)
    for facts in certificates:
        console.print(f"{facts['role']} of {facts['subject']}: {facts['days_left']} days left")
    if certificates[-1]["role"] == "owner-signing":
        console.print("others pin you by this fingerprint, which you give to them yourself:")
        console.print(certificates[-1]["sha256_fingerprint"], soft_wrap=True)


def show_revoked(
    console: Console,
    pki: Path,
    names: Sequence[str],
    days: int,
    lists: Sequence[Path],
    passphrase: bytes,
) -> None:
    """Sign a fresh revocation list, and put it where it is wanted."""
    from crypto.pki import revoke
    from crypto.trust import REVOCATIONS, replace_revocations

    if any(file.name != REVOCATIONS for file in lists):
        raise CertificateRefused(f"--crl names the {REVOCATIONS} of an identity folder")
    fresh = revoke(pki, passphrase, names, days)
    for file in lists:
        replace_revocations(file.parent, fresh)
    console.print(f"a fresh revocation list was signed; all parties take it by fedseal home crl {fresh}")


def show_replaced(console: Console, home: Path, file: Path) -> None:
    """Put a revocation list into every identity folder of a home."""
    from crypto.trust import CA_CERTIFICATE, replace_revocations

    folders = [
        folder
        for folder in (home, home / "identity", home / "operator")
        if (folder / CA_CERTIFICATE).is_file()
    ]
    if not folders:
        raise CertificateRefused("the home has no identity yet; install it first")
    for folder in folders:
        revocations = replace_revocations(folder, file)
    console.print(
        f"{len(revocations)} certificates are revoked; next list by {revocations.next_update_utc:%Y-%m-%d}"
    )


def show_pki(console: Console, pki: Path, *, as_json: bool) -> None:
    """Print what an authority issued."""
    from crypto.pki import list_pki

    issued = list_pki(pki)
    if as_json:
        dump_json(issued)
        return
    rows = []
    for row in issued:
        states = [state for state in ("revoked", "superseded") if row[state]]
        if row["days_left"] < 0:
            states.append("expired")
        state = ", ".join(states) or "valid"
        style = "red" if row["revoked"] or row["days_left"] < 0 else ""
        days, print_ = str(row["days_left"]), row["fingerprint"][:16]
        cells = (row["name"], row["role"], print_, days, state)
        rows.append([Text(cell, style=style) for cell in cells])
    show_table(console, ("name", "role", "fingerprint", "days left", "state"), rows)
