"""Look at the home folder of one party: its certificates, its secret files, its policy and its ledger."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from console.findings import Finding, guarded

if TYPE_CHECKING:
    from cryptography import x509

    from client.policy import Policy
    from crypto.trust import Trust
    from protocol.plan import Plan

HomeRole = Literal["owner", "coordinator"]

FEW_DAYS = 14
"""A certificate with fewer days left is pointed out."""

FEW_CRL_DAYS = 7
"""A revocation list with fewer days left is pointed out; a stale one makes parties refuse everybody."""

_IDENTITY, _MEMBERS, _POLICY = "identity", "members", "policy.toml"
_PRIVATE_FILES = (
    "*.sealed",
    "identity/*.sealed",
    "operator/*.sealed",
    "log/*.jsonl",
    "identity/storage.salt",
    "ledger/*.db",
    "state.db",
)
_CERTIFICATES: dict[HomeRole, dict[str, str]] = {
    "owner": {"transport.crt": "owner-transport", "signing.crt": "owner-signing"},
    "coordinator": {"server.crt": "server"},
}


def role_of_home(home: Path) -> HomeRole | None:
    """Return whose home a folder is; None if it is nobody's, or closed to this user."""
    # os.path, because pathlib raises where a folder on the way is closed.
    if os.path.isfile(home / _POLICY):
        return "owner"
    return "coordinator" if os.path.isdir(home / _MEMBERS) else None


def certificate_files(home: Path) -> list[Path]:
    """Return the certificates and the revocation list that the home's party relies on."""
    return [*home.glob("identity/*.crt"), *home.glob("identity/crl.pem")]


def check_home(home: Path, now: datetime, plan: Plan | None = None) -> list[Finding]:
    """Check the home folder of an owner or of the coordinator, as of `now`; an owner's data by a plan."""
    role = role_of_home(home)
    if role is None:
        remedy = "Give a home with policy.toml (an owner's) or members/ (the coordinator's)."
        return [Finding("home", "fail", f"{home} is not the home of a party", remedy)]
    findings = [Finding("home", "ok", f"{home} is the home of {'an' if role == 'owner' else 'the'} {role}")]
    findings += guarded("secret files", check_private_files, home)
    findings += guarded("certificates", _check_identity, home, role, now)
    if role == "owner":
        findings += guarded("policy", _check_owner, home, plan)
    return findings


def check_private_files(home: Path) -> Finding:
    """Check that sealed keys, state and ledger are closed to group and others."""
    files = [file for pattern in _PRIVATE_FILES for file in sorted(home.glob(pattern))]
    exposed = [file for file in files if file.stat().st_mode & 0o077]
    if exposed:
        detail = "open to group or others: " + ", ".join(str(file.relative_to(home)) for file in exposed)
        return Finding("secret files", "fail", detail, "Run: chmod 600 " + " ".join(map(str, exposed)))
    return Finding("secret files", "ok", f"{len(files)} files, closed to others")


def _check_identity(home: Path, role: HomeRole, now: datetime) -> list[Finding]:
    from crypto.trust import load_trust

    identity = home / _IDENTITY
    trust = load_trust(identity)
    findings = guarded("revocation list", _check_revocations, trust, now)
    for name, use in {"ca.crt": "authority", **_CERTIFICATES[role]}.items():
        file = identity / name
        findings += guarded(name, _check_certificate, file, use, trust, now)
    if role == "coordinator":
        findings += guarded("members", _check_members, home / _MEMBERS, trust, now)
    return findings


def _check_revocations(trust: Trust, now: datetime) -> Finding:
    from crypto.certificates import check_revocations

    check_revocations(trust.revocations, trust.authority, now)
    until = trust.revocations.next_update_utc
    days = (until - now).days if until is not None else 0
    if days < FEW_CRL_DAYS:
        remedy = "Ask the authority for a new crl.pem and take it with fedseal home crl."
        return Finding("revocation list", "warn", f"stale in {days} days", remedy)
    return Finding("revocation list", "ok", f"good for {days} days")


def _check_certificate(file: Path, use: str, trust: Trust, now: datetime) -> Finding:
    from cryptography import x509

    from crypto.certificates import describe

    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    facts = describe(certificate, now)
    remedy = "Ask the authority for a new one (fedseal pki renew) and install it."
    problem = None
    if facts["role"] != use:
        problem = f"is for the role {facts['role']}, not {use}"
    elif not _issued_by(certificate, trust.authority):
        problem = "is not issued by the authority beside it"
    elif trust.revocations.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
        problem = "is revoked"
    elif now < certificate.not_valid_before_utc:
        problem = f"is not valid before {facts['not_before']}"
        remedy = "Check the clock of this machine and of the authority's."
    elif now > certificate.not_valid_after_utc:
        problem = f"expired at {facts['not_after']}"
    if problem is not None:
        return Finding(file.name, "fail", f"{facts['subject']}: {problem}", remedy)
    if facts["days_left"] < FEW_DAYS:
        return Finding(file.name, "warn", f"{facts['subject']}: {facts['days_left']} days left", remedy)
    return Finding(file.name, "ok", f"{facts['subject']}: {facts['days_left']} days left")


def _check_members(folder: Path, trust: Trust, now: datetime) -> Finding:
    files = sorted(folder.glob("*.transport.crt"))
    findings = [
        finding
        for file in files
        for finding in guarded(file.name, _check_certificate, file, "owner-transport", trust, now)
    ]
    wrong = [f"{finding.name} ({finding.detail})" for finding in findings if finding.status != "ok"]
    if wrong or not files:
        # The coordinator runs all the same: only these members are refused.
        remedy = "Copy the members' current certificates from the authority's members/ folder."
        return Finding("members", "warn", "; ".join(wrong) or "there are none", remedy)
    return Finding("members", "ok", f"{len(files)} members")


def _check_owner(home: Path, plan: Plan | None) -> list[Finding]:
    from client.owner import read_policy

    policy = read_policy(home)
    return [
        Finding("policy", "ok", f"dataset {policy.dataset}"),
        *guarded("ledger", _check_ledger, home, policy),
        *guarded("data file", _check_data, home / policy.data_file, plan),
    ]


def _check_ledger(home: Path, policy: Policy) -> Finding:
    from client.ledger import Ledger

    path, copy = home / "ledger" / "ledger.db", home / _IDENTITY / "ledger.head"
    if not path.exists() and not copy.exists():
        return Finding("ledger", "ok", "not begun yet")
    ledger = Ledger.open(path, policy, copy)
    try:
        return Finding("ledger", "ok", f"{len(ledger.records())} records verified")
    finally:
        ledger.close()


def _check_data(file: Path, plan: Plan | None) -> list[Finding]:
    from console.rows import WITHOUT_PLAN, read_counts, shortage

    counts = read_counts(file, plan)
    closed = Finding("data file", "ok", "read, by this user only")
    if file.stat().st_mode & 0o077:
        closed = Finding(
            "data file", "warn", "others can read it on this machine", f"Run: chmod 600 {file}"
        )
    note, warning = "" if plan else f" ({WITHOUT_PLAN})", shortage(counts, plan)
    detail = f"for this owner alone: {counts.words()}{note}"
    if warning is None:
        return [closed, Finding("rows", "ok", detail)]
    remedy = "Look at the file: docs/tasks.md says which rows are used. Or keep out of such runs."
    return [closed, Finding("rows", "warn", f"{warning}; {detail}", remedy)]


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
