"""The authority's folder. It holds one private key, the authority's own; holders make theirs themselves.

Layout::

    ca.crt          certificate of the authority
    ca.key.sealed   its private key, sealed under the authority's passphrase
    crl.pem         its revocation list
    issued.jsonl    one line for every certificate ever issued
    members/        <name>.transport.crt, <name>.signing.crt of the owners: public
    answers/        <name>.pem: what a holder installs, the newest of each
    log/            the authority's log of acts, see `crypto.auditlog`

A line of issued.jsonl is durable before the certificate exists on disk, so that no certificate can exist
which the authority cannot revoke. All of it may stay on a machine without a network: requests come in and
answers go out as files.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import StringConstraints

from crypto.auditlog import FOLDER, AuditLog, KeptLog
from crypto.authority import Authority, create_authority
from crypto.certificates import (
    LeafRole,
    check_revocations,
    common_name,
    format_time,
    key_sha256,
    role_of,
)
from crypto.identity import FILES, open_ec_key, seal_key
from crypto.requests import ROLES, Request, read_request
from crypto.trust import CA_CERTIFICATE, REVOCATIONS, load_trust, parse, read_certificate
from crypto.vault import check_new_passphrase, write_public
from protocol.encoding import Digest
from protocol.errors import CertificateRefused
from protocol.messages import Message

CRL_DAYS = 30
"""How long a revocation list may be relied on unless told otherwise."""

CA_KEY, ISSUED, ANSWERS, MEMBERS = "ca.key.sealed", "issued.jsonl", "answers", "members"


class Issued(Message):
    """One line of issued.jsonl."""

    name: str
    role: Literal["authority", "server", "owner-transport", "owner-signing", "operator"]
    serial: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,40}$")]
    fingerprint: Digest
    not_after: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]


def init_pki(folder: Path, name: str, passphrase: bytes, days: int) -> None:
    """Create an authority in `folder`, with an empty revocation list.

    Args:
        folder: Created if missing, for its owner only.
        name: Common name of the authority.
        passphrase: Seals the authority's key; kept by whoever admits members, not by the coordinator.
        days: Validity of the authority.

    Raises:
        CertificateRefused: The folder holds a part of an authority, or `name` or `days` is out of range.
        SecretUnavailable, PassphraseTooShort: The passphrase is not good enough for a new key.
    """
    check_new_passphrase(passphrase)
    authority = create_authority(name, days)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder):
        if any((folder / item).exists() for item in (CA_CERTIFICATE, CA_KEY, ISSUED)):
            raise CertificateRefused("the folder already holds an authority")
        seal_key(folder / CA_KEY, authority.private_key, passphrase)
        _record(folder, [authority.certificate])
        write_public(folder / CA_CERTIFICATE, _pem(authority.certificate))
        _publish(folder, authority, set(), CRL_DAYS)
        _log(folder, authority, "pki.init", name=name)


def sign_request(
    folder: Path, passphrase: bytes, request: bytes, days: int = 365, fingerprint: str | None = None
) -> tuple[Request, Path]:
    """Issue the certificates that a signing request asks for.

    Args:
        folder: The authority's folder.
        passphrase: Opens the authority's key.
        request: What the holder sent, see `crypto.requests`.
        days: Validity.
        fingerprint: That of the holder, had by another way than the request; another key is refused.

    Returns:
        What was requested, and the file that the holder installs.

    Raises:
        CertificateRefused: The request is not well-formed, its key is not the expected one or is that of
            another name, or the name has certificates that are still valid.
        SecretUnavailable: The passphrase is wrong.
    """
    wanted = read_request(request)
    if fingerprint is not None and fingerprint != wanted.fingerprint:
        raise CertificateRefused("the request is for another key than the one with this fingerprint")
    with _locked(folder):
        authority, revoked = _open_authority(folder, passphrase), _revoked_serials(folder)
        _refuse_taken(folder, wanted, revoked)
        certificates = {
            role: authority.certify(wanted.name, role, key, days, wanted.hosts)
            for role, key in wanted.keys.items()
        }
        answer = _issue(folder, authority, wanted.name, certificates, revoked)
        _log(
            folder,
            authority,
            "pki.sign",
            name=wanted.name,
            party=wanted.party,
            fingerprint=wanted.fingerprint,
            serials=[f"{certificate.serial_number:x}" for certificate in certificates.values()],
        )
    return wanted, answer


def renew(folder: Path, passphrase: bytes, name: str, days: int = 365) -> Path:
    """Issue new certificates for the same keys and name, with a later end.

    The earlier ones are superseded; they stay valid until their own end, so that nobody is cut off before
    the new ones are installed.

    Returns:
        The file that the holder installs.

    Raises:
        CertificateRefused: The name has no certificates, they are revoked, or they would not end later.
        SecretUnavailable: The passphrase is wrong.
    """
    with _locked(folder):
        authority, revoked = _open_authority(folder, passphrase), _revoked_serials(folder)
        certificates = {}
        for role, old in _newest(folder, name).items():
            key = old.public_key()
            if old.serial_number in revoked or not isinstance(
                key, ec.EllipticCurvePublicKey | Ed25519PublicKey
            ):
                raise CertificateRefused("revoked certificates are not renewed; request new keys")
            new = authority.certify(name, role, key, days, _hosts(old))
            if new.not_valid_after_utc <= old.not_valid_after_utc:
                raise CertificateRefused("the new certificates would not end later than those they replace")
            certificates[role] = new
        answer = _issue(folder, authority, name, certificates, revoked)
        serials = [f"{certificate.serial_number:x}" for certificate in certificates.values()]
        _log(folder, authority, "pki.renew", name=name, serials=serials)
    return answer


def revoke(folder: Path, passphrase: bytes, names: Sequence[str] = (), days: int = CRL_DAYS) -> Path:
    """Revoke every certificate of these names so far, and sign a fresh revocation list.

    Without names it only renews the list, which must happen before the last one is stale: parties refuse
    everybody then. The list takes effect where it is copied to, see `crypto.trust.replace_revocations`.

    Returns:
        The file of the list.

    Raises:
        CertificateRefused: A name was never issued; nothing is revoked then.
        SecretUnavailable: The passphrase is wrong.
    """
    with _locked(folder):
        authority = _open_authority(folder, passphrase)
        records = [record for record in _read_issued(folder) if record.role != "authority"]
        known = dict.fromkeys(record.name for record in records)
        if not set(names) <= known.keys():
            listed = ", ".join(known) or "none"
            raise CertificateRefused(f"a name to revoke was never issued; there are: {listed}")
        added = {int(record.serial, 16) for record in records if record.name in names}
        _publish(folder, authority, _revoked_serials(folder) | added, days)
        _log(folder, authority, "pki.revoke", names=sorted(set(names)), days=days)
    return folder / REVOCATIONS


def list_pki(folder: Path) -> list[dict[str, Any]]:
    """Return every certificate ever issued, oldest first.

    Returns:
        Dicts with name, role, fingerprint (SHA-256 of the key), serial (hex), not_after (ISO 8601, UTC),
        days_left (negative once expired), revoked, and superseded: a later one has the same name, role and
        key.

    Raises:
        CertificateRefused: A file of the folder is missing, damaged or forged.
    """
    now, revoked = datetime.now(UTC), _revoked_serials(folder)
    records = _read_issued(folder)
    newest = {(record.name, record.role, record.fingerprint): record.serial for record in records}
    return [
        record.model_dump()
        | {
            "days_left": (datetime.fromisoformat(record.not_after) - now).days,
            "revoked": int(record.serial, 16) in revoked,
            "superseded": newest[record.name, record.role, record.fingerprint] != record.serial,
        }
        for record in records
    ]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # Two commands at once could both find a name unused, or lose a line of issued.jsonl.
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        raise CertificateRefused("the authority's folder cannot be opened") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_authority(folder: Path, passphrase: bytes) -> Authority:
    certificate = read_certificate(folder / CA_CERTIFICATE, "authority")
    return Authority(certificate, open_ec_key(folder / CA_KEY, passphrase, certificate))


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _read_issued(folder: Path) -> list[Issued]:
    return parse(folder / ISSUED, lambda data: [Issued.from_bytes(line) for line in data.splitlines()])


def _record(folder: Path, certificates: Sequence[x509.Certificate]) -> None:
    path = folder / ISSUED
    lines = path.read_bytes() if path.exists() else b""
    for certificate in certificates:
        fields = {
            "name": common_name(certificate.subject),
            "role": role_of(certificate),
            "serial": f"{certificate.serial_number:x}",
            "fingerprint": key_sha256(certificate.public_key()),
            "not_after": format_time(certificate.not_valid_after_utc),
        }
        lines += Issued.from_fields(fields).to_bytes() + b"\n"
    # Written whole: an append that a power cut tears would spoil the next line.
    write_public(path, lines)


def _refuse_taken(folder: Path, wanted: Request, revoked: set[int]) -> None:
    """Refuse a name that is in use, another party's keys, and keys that were revoked."""
    now = datetime.now(UTC)
    keys = {key_sha256(key) for key in wanted.keys.values()}
    for record in _read_issued(folder):
        gone = int(record.serial, 16) in revoked
        if record.fingerprint in keys:
            remedy = "make new keys" if gone else "renew its certificates instead"
            raise CertificateRefused(f"a key of the request was certified before; {remedy}")
        if record.name == wanted.name and not gone and datetime.fromisoformat(record.not_after) > now:
            raise CertificateRefused("the name has valid certificates; renew them, or revoke them first")


def _newest(folder: Path, name: str) -> dict[LeafRole, x509.Certificate]:
    """Return the newest certificates of a name, as its last answer holds them."""
    issued = _read_issued(folder)
    roles = {record.role for record in issued if record.name == name}
    if not roles:
        names = ", ".join(dict.fromkeys(record.name for record in issued if record.role != "authority"))
        raise CertificateRefused(f"the name was never issued; there are: {names or 'none'}")
    file = folder / ANSWERS / f"{name}.pem"
    by_role = {role_of(one): one for one in parse(file, x509.load_pem_x509_certificates)}
    if not roles <= by_role.keys():
        # to renew what is left would let a certificate of the name run out unnoticed
        raise CertificateRefused(f"{file.name} lacks certificates that were issued")
    return {role: by_role[role] for role in FILES if role in by_role}


def _hosts(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def _issue(
    folder: Path,
    authority: Authority,
    name: str,
    certificates: dict[LeafRole, x509.Certificate],
    revoked: set[int],
) -> Path:
    _record(folder, list(certificates.values()))
    for place in (MEMBERS, ANSWERS):
        (folder / place).mkdir(exist_ok=True)
    for role in ROLES["owner"]:
        if role in certificates:
            write_public(folder / MEMBERS / f"{name}.{FILES[role]}.crt", _pem(certificates[role]))
    revocations = _publish(folder, authority, revoked, CRL_DAYS)
    answer = folder / ANSWERS / f"{name}.pem"
    parts = [_pem(authority.certificate), *map(_pem, certificates.values()), revocations]
    write_public(answer, b"".join(parts))
    return answer


def _revoked_serials(folder: Path) -> set[int]:
    trust = load_trust(folder)
    revocations = trust.revocations
    # As of its own date: a stale list still tells who was revoked, a forged one does not.
    check_revocations(revocations, trust.authority, revocations.last_update_utc)
    return {entry.serial_number for entry in revocations}


def _publish(folder: Path, authority: Authority, serials: set[int], days: int) -> bytes:
    data = authority.revocation_list(serials, days).public_bytes(Encoding.PEM)
    write_public(folder / REVOCATIONS, data)
    return data


def _log(folder: Path, authority: Authority, act: str, **facts: str | int | list[str]) -> None:
    kept = KeptLog(AuditLog(folder / FOLDER), "authority", authority.private_key, authority.certificate)
    kept.record(act, **facts)
    kept.sign()
