"""The authority's folder, and the folders that it hands to the coordinator and to each owner.

Layout::

    ca.crt            certificate of the authority
    ca.key.sealed     its private key, sealed under the authority's passphrase
    crl.pem           its revocation list
    issued.jsonl      one line for every certificate ever issued
    members/          <name>.transport.crt, <name>.signing.crt: public
    server/           server.crt, server.key.sealed, ca.crt, crl.pem
    owners/<name>/    transport.crt, transport.key.sealed, signing.crt, signing.key.sealed, ca.crt, crl.pem

`server/` and `owners/<name>/` are moved to the machines that they are for; what stays here is public or
sealed. A line of issued.jsonl is durable before the certificate exists on disk, so that no certificate can
exist which the authority cannot revoke.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from pydantic import StringConstraints

from crypto.certificates import (
    Authority,
    OwnerCredentials,
    ServerCredentials,
    check_revocations,
    common_name,
    create_authority,
    format_time,
    role_of,
)
from crypto.vault import check_passphrase, open_secret, seal_secret, write_public
from protocol.errors import CertificateRefused, EncodingInvalid, SecretUnavailable
from protocol.messages import Message

DEFAULT_SERVER_NAMES = ("localhost", "127.0.0.1")
"""Names of a server certificate that serves one machine."""

SERVER_NAME = "coordinator"
"""Common name of the server certificate; no owner may have it."""

CRL_DAYS = 30
"""How long a revocation list may be relied on unless told otherwise."""

CA_CERTIFICATE, CA_KEY, REVOCATIONS, ISSUED = "ca.crt", "ca.key.sealed", "crl.pem", "issued.jsonl"

T = TypeVar("T")


class Issued(Message):
    """One line of issued.jsonl."""

    name: str
    role: Literal["authority", "server", "owner-transport", "owner-signing"]
    serial: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,40}$")]
    not_after: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]


@dataclass(frozen=True)
class Trust:
    """What a party needs to decide who is a member."""

    authority: x509.Certificate
    revocations: x509.CertificateRevocationList


def init_pki(folder: Path, name: str, passphrase: bytes, days: int) -> None:
    """Create an authority in `folder`, with an empty revocation list.

    Args:
        folder: Created if missing, for its owner only.
        name: Common name of the authority.
        passphrase: Seals the authority's key; kept by whoever admits members, not by the coordinator.
        days: Validity of the authority.

    Raises:
        CertificateRefused: The folder holds a part of an authority, or `name` or `days` is out of range.
        SecretUnavailable: The passphrase is empty.
    """
    authority = create_authority(name, days)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder):
        if any((folder / item).exists() for item in (CA_CERTIFICATE, CA_KEY, ISSUED)):
            raise CertificateRefused("the folder already holds an authority")
        _seal_key(folder / CA_KEY, authority.private_key, passphrase)
        _record(folder, [authority.certificate])
        _publish(folder, authority, set(), CRL_DAYS)


def issue_server(
    folder: Path,
    ca_passphrase: bytes,
    key_passphrase: bytes,
    names: Sequence[str] = DEFAULT_SERVER_NAMES,
    days: int = 365,
    renew: bool = False,
) -> None:
    """Issue the coordinator's TLS certificate into `server/`.

    Args:
        folder: The authority's folder.
        ca_passphrase: Opens the authority's key.
        key_passphrase: Seals the new key; the coordinator's own.
        names: Host names and IP addresses that owners connect to.
        days: Validity.
        renew: Replace an earlier certificate. That one stays valid until it expires or is revoked.

    Raises:
        CertificateRefused: Issued before and not `renew`, or a name is not well-formed.
        SecretUnavailable: A passphrase is wrong or empty.
    """
    check_passphrase(key_passphrase)
    with _locked(folder):
        authority = _open_authority(folder, ca_passphrase)
        _refuse_second_issue(folder, SERVER_NAME, renew)
        revoked = _revoked_serials(folder)
        issued = authority.issue_server(SERVER_NAME, names, days)
        _record(folder, [issued.certificate])
        target = folder / "server"
        target.mkdir(mode=0o700, exist_ok=True)
        _seal_key(target / "server.key.sealed", issued.key, key_passphrase)
        write_public(target / "server.crt", _pem(issued.certificate))
        _publish(folder, authority, revoked, CRL_DAYS)


def issue_owner(
    folder: Path,
    ca_passphrase: bytes,
    name: str,
    key_passphrase: bytes,
    days: int = 365,
    renew: bool = False,
) -> OwnerCredentials:
    """Issue an owner's two keys and certificates into `owners/<name>/`.

    Args:
        folder: The authority's folder.
        ca_passphrase: Opens the authority's key.
        name: The owner's name.
        key_passphrase: Seals both new keys; the owner's own.
        days: Validity.
        renew: Replace earlier certificates. The keys are new, so peers must pin the new fingerprint. The
            earlier certificates stay valid until they expire; after a theft, call `revoke` first.

    Returns:
        What was issued, for example to print the fingerprint to pin.

    Raises:
        CertificateRefused: Issued before and not `renew`, or the name is not well-formed.
        SecretUnavailable: A passphrase is wrong or empty.
    """
    check_passphrase(key_passphrase)
    if name == SERVER_NAME:
        raise CertificateRefused(f"the name {SERVER_NAME} is the server's")
    with _locked(folder):
        authority = _open_authority(folder, ca_passphrase)
        _refuse_second_issue(folder, name, renew)
        revoked = _revoked_serials(folder)
        issued = authority.issue_owner(name, days)
        certificates = issued.transport_certificate, issued.signing_certificate
        _record(folder, certificates)
        target, members = folder / "owners" / name, folder / "members"
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        members.mkdir(exist_ok=True)
        _seal_key(target / "transport.key.sealed", issued.transport_key, key_passphrase)
        _seal_key(target / "signing.key.sealed", issued.signing_key, key_passphrase)
        for use, certificate in zip(("transport", "signing"), certificates, strict=True):
            write_public(target / f"{use}.crt", _pem(certificate))
            write_public(members / f"{name}.{use}.crt", _pem(certificate))
        _publish(folder, authority, revoked, CRL_DAYS)
    return issued


def revoke(folder: Path, ca_passphrase: bytes, names: Sequence[str] = (), days: int = CRL_DAYS) -> None:
    """Revoke every certificate of these names so far, and sign a fresh revocation list.

    Without names it only renews the list, which must happen before the last one is stale: parties refuse
    everybody then. The list takes effect where it is copied to; copies in `server/` and `owners/` of this
    folder are written here.

    Raises:
        CertificateRefused: A name was never issued; nothing is revoked then.
        SecretUnavailable: The passphrase is wrong.
    """
    with _locked(folder):
        authority = _open_authority(folder, ca_passphrase)
        records = [record for record in _read_issued(folder) if record.role != "authority"]
        if not set(names) <= {record.name for record in records}:
            raise CertificateRefused("a name to revoke was never issued")
        added = {int(record.serial, 16) for record in records if record.name in names}
        _publish(folder, authority, _revoked_serials(folder) | added, days)


def load_owner(folder: Path, passphrase: bytes) -> OwnerCredentials:
    """Open an owner's identity, a copy of `owners/<name>/`. For that owner only.

    Raises:
        CertificateRefused: A certificate is missing, for another use, or not that of the key beside it.
        SecretUnavailable: The passphrase is wrong, or a sealed key is missing, damaged or open to others.
    """
    transport = _read_certificate(folder / "transport.crt", "owner-transport")
    signing = _read_certificate(folder / "signing.crt", "owner-signing")
    if common_name(transport.subject) != common_name(signing.subject):
        raise CertificateRefused("the two certificates name different owners")
    transport_key = _open_ec(folder / "transport.key.sealed", passphrase, transport)
    signing_key = _open_key(folder / "signing.key.sealed", passphrase, signing)
    if not isinstance(signing_key, Ed25519PrivateKey):
        raise CertificateRefused("a signing key must be Ed25519")
    return OwnerCredentials(transport_key, transport, signing_key, signing)


def load_server(folder: Path, passphrase: bytes) -> ServerCredentials:
    """Open the coordinator's TLS identity, a copy of `server/`. For the coordinator only.

    Raises:
        CertificateRefused: The certificate is missing, for another use, or not that of the key.
        SecretUnavailable: The passphrase is wrong, or the sealed key is missing, damaged or open to others.
    """
    certificate = _read_certificate(folder / "server.crt", "server")
    return ServerCredentials(_open_ec(folder / "server.key.sealed", passphrase, certificate), certificate)


def load_trust(folder: Path) -> Trust:
    """Read ca.crt and crl.pem of any of the folders.

    The list is not judged here: see `crypto.certificates.verify_signing_certificate`.

    Raises:
        CertificateRefused: A file is missing or malformed.
    """
    authority = _read_certificate(folder / CA_CERTIFICATE, "authority")
    return Trust(authority, _parse(folder / REVOCATIONS, x509.load_pem_x509_crl))


def list_pki(folder: Path) -> list[dict[str, Any]]:
    """Return every certificate ever issued, oldest first.

    Returns:
        Dicts with name, role, serial (hex), not_after (ISO 8601, UTC), days_left (negative once expired)
        and revoked.

    Raises:
        CertificateRefused: A file of the folder is missing, damaged or forged.
    """
    now, revoked = datetime.now(UTC), _revoked_serials(folder)
    return [
        record.model_dump()
        | {
            "days_left": (datetime.fromisoformat(record.not_after) - now).days,
            "revoked": int(record.serial, 16) in revoked,
        }
        for record in _read_issued(folder)
    ]


@contextmanager
def ssl_key_file(private_key: ec.EllipticCurvePrivateKey) -> Iterator[tuple[str, str]]:
    """Lend a private key to `ssl.SSLContext.load_cert_chain`, which accepts files only.

    The file holds the key encrypted under a password drawn for this call. It lives in memory where the
    system has anonymous files, else in the temporary folder with mode 0600, and is gone after the block.
    Yields path and password. For the owner of the key only.
    """
    password = secrets.token_hex(32)
    encryption = serialization.BestAvailableEncryption(password.encode("ascii"))
    data = private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    try:
        descriptor = os.memfd_create("fedseal-key", os.MFD_CLOEXEC)
        path, on_disk = f"/proc/self/fd/{descriptor}", False
    except (AttributeError, OSError):
        (descriptor, path), on_disk = tempfile.mkstemp(prefix="fedseal-"), True
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            yield path, password
    finally:
        if on_disk:
            os.unlink(path)


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
    certificate = _read_certificate(folder / CA_CERTIFICATE, "authority")
    return Authority(certificate, _open_ec(folder / CA_KEY, passphrase, certificate))


def _seal_key(path: Path, key: PrivateKeyTypes, passphrase: bytes) -> None:
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, serialization.NoEncryption())
    seal_secret(path, der, passphrase)


def _open_key(path: Path, passphrase: bytes, certificate: x509.Certificate) -> PrivateKeyTypes:
    try:
        key = serialization.load_der_private_key(open_secret(path, passphrase), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SecretUnavailable(f"{path.name} does not hold a private key") from None
    if key.public_key() != certificate.public_key():
        raise CertificateRefused(f"{path.name} is not the key of the certificate beside it")
    return key


def _open_ec(path: Path, passphrase: bytes, certificate: x509.Certificate) -> ec.EllipticCurvePrivateKey:
    key = _open_key(path, passphrase, certificate)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateRefused(f"{path.name} must be an elliptic curve key")
    return key


def _read_certificate(path: Path, role: str) -> x509.Certificate:
    certificate = _parse(path, x509.load_pem_x509_certificate)
    if role_of(certificate) != role:
        raise CertificateRefused(f"{path.name} is not a certificate for the role {role}")
    return certificate


def _parse(path: Path, parser: Callable[[bytes], T]) -> T:
    try:
        return parser(path.read_bytes())
    except OSError as error:
        raise CertificateRefused(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion, EncodingInvalid):
        raise CertificateRefused(f"{path.name} is malformed") from None


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _read_issued(folder: Path) -> list[Issued]:
    return _parse(folder / ISSUED, lambda data: [Issued.from_bytes(line) for line in data.splitlines()])


def _record(folder: Path, certificates: Sequence[x509.Certificate]) -> None:
    path = folder / ISSUED
    lines = path.read_bytes() if path.exists() else b""
    for certificate in certificates:
        fields = {
            "name": common_name(certificate.subject),
            "role": role_of(certificate),
            "serial": f"{certificate.serial_number:x}",
            "not_after": format_time(certificate.not_valid_after_utc),
        }
        lines += Issued.from_fields(fields).to_bytes() + b"\n"
    # Written whole: an append that a power cut tears would spoil the next line.
    write_public(path, lines)


def _refuse_second_issue(folder: Path, name: str, renew: bool) -> None:
    known = {record.name for record in _read_issued(folder) if record.role != "authority"}
    if name in known and not renew:
        raise CertificateRefused(f"the name {name} was issued before; renew it instead")


def _revoked_serials(folder: Path) -> set[int]:
    trust = load_trust(folder)
    # As of its own date: a stale list still tells who was revoked, a forged one does not.
    check_revocations(trust.revocations, trust.authority, trust.revocations.last_update_utc)
    return {entry.serial_number for entry in trust.revocations}


def _publish(folder: Path, authority: Authority, serials: set[int], days: int) -> None:
    data = authority.revocation_list(serials, days).public_bytes(Encoding.PEM)
    copies = [item for item in (folder / "server", *folder.glob("owners/*")) if item.is_dir()]
    for target in (folder, *copies):
        write_public(target / REVOCATIONS, data)
        write_public(target / CA_CERTIFICATE, _pem(authority.certificate))
