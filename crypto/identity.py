"""The holder's side of certificates: a party's identity folder, in which it makes its own keys.

Layout, with FILE `server`, `operator`, or `transport` and `signing` of an owner::

    FILE.key.sealed   private key, sealed under the holder's passphrase; never leaves the folder
    request.pem       signing request for the keys: public, goes to the authority
    FILE.crt          certificate, once `install` has put it there
    ca.crt, crl.pem   the authority and its revocation list
"""

from __future__ import annotations

import os
import secrets
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat

from crypto.certificates import (
    LeafRole,
    OperatorCredentials,
    OwnerCredentials,
    ServerCredentials,
    check_certificate,
    check_revocations,
    common_name,
    role_of,
)
from crypto.requests import ROLES, Party, PrivateKey, Request, build_request, read_request
from crypto.trust import (
    CA_CERTIFICATE,
    REVOCATIONS,
    list_number,
    parse,
    read_certificate,
    read_revocations,
)
from crypto.vault import check_new_passphrase, open_secret, seal_secret, write_public
from protocol.errors import CertificateRefused, SecretUnavailable

REQUEST = "request.pem"

FILES: Final[dict[LeafRole, str]] = {
    "server": "server",
    "owner-transport": "transport",
    "owner-signing": "signing",
    "operator": "operator",
}
"""The names of the files of each role, less their endings."""

MAX_ISSUED_BYTES = 16 * 1024 * 1024


def make_request(
    folder: Path, party: Party, name: str, passphrase: bytes, hosts: Sequence[str] = ()
) -> Request:
    """Make a party's keys and the signing request for them. For that party only.

    Args:
        folder: The identity folder; it and its home are created if missing, for their owner only.
        party: What the holder is.
        name: Its name; see `crypto.certificates.check_owner_name`.
        passphrase: Seals the private keys.
        hosts: Host names and IP addresses of a coordinator.

    Returns:
        The request that now lies in ``request.pem``.

    Raises:
        CertificateRefused: The folder holds keys already, or a name is not well-formed.
        SecretUnavailable, PassphraseTooShort: The passphrase is not good enough for new keys.
    """
    check_new_passphrase(passphrase)
    keys = {role: _generate(role) for role in ROLES[party]}
    data = build_request(name, party, keys, hosts)
    if not folder.parent.exists():
        # the mode of mkdir is for the last folder alone
        folder.parent.mkdir(mode=0o700, parents=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if any(_key_file(folder, role).exists() for role in FILES):
        raise CertificateRefused("the folder holds keys already; they are never overwritten")
    for role, key in keys.items():
        seal_key(_key_file(folder, role), key, passphrase)
    write_public(folder / REQUEST, data)
    return read_request(data)


def install(folder: Path, issued: bytes) -> list[x509.Certificate]:
    """Put certificates that the authority issued for this folder's keys beside them.

    The first time, the folder takes whatever authority the file names: compare its fingerprint with one
    that came by another way. From then on no other authority is accepted.

    Args:
        folder: The identity folder that `make_request` made.
        issued: The authority's answer (PEM): its own certificate, the leaf certificates, its list.

    Returns:
        The authority's certificate and the installed ones.

    Raises:
        CertificateRefused: Not for the keys of this folder, not by its authority, or not valid now.
    """
    request = read_request(parse(folder / REQUEST, bytes))
    authority, leaves, revocations = _split(issued)
    known = folder / CA_CERTIFICATE
    if known.exists() and read_certificate(known, "authority") != authority:
        raise CertificateRefused("the certificates are from another authority than the folder's")
    now = datetime.now(UTC)
    if set(leaves) != set(request.keys):
        raise CertificateRefused("the file does not hold the certificates of this party")
    for role, certificate in leaves.items():
        check_certificate(certificate, role, authority, revocations, now)
        if certificate.public_key() != request.keys[role]:
            raise CertificateRefused("a certificate is not for the key of this folder")
        if common_name(certificate.subject) != request.name:
            raise CertificateRefused("a certificate is for another name")
    if not _has_newer_list(folder, authority, revocations):
        write_public(folder / REVOCATIONS, revocations.public_bytes(Encoding.PEM))
    write_public(known, authority.public_bytes(Encoding.PEM))
    for role, certificate in leaves.items():
        write_public(_certificate_file(folder, role), certificate.public_bytes(Encoding.PEM))
    return [authority, *leaves.values()]


def load_owner(folder: Path, passphrase: bytes) -> OwnerCredentials:
    """Open an owner's identity. For that owner only.

    Raises:
        CertificateRefused: A certificate is missing, for another use, or not that of the key beside it.
        SecretUnavailable: The passphrase is wrong, or a sealed key is missing, damaged or open to others.
    """
    transport = read_certificate(_certificate_file(folder, "owner-transport"), "owner-transport")
    signing = read_certificate(_certificate_file(folder, "owner-signing"), "owner-signing")
    if common_name(transport.subject) != common_name(signing.subject):
        raise CertificateRefused("the two certificates name different owners")
    transport_key = open_ec_key(_key_file(folder, "owner-transport"), passphrase, transport)
    signing_key = _open_key(_key_file(folder, "owner-signing"), passphrase, signing)
    if not isinstance(signing_key, Ed25519PrivateKey):
        raise CertificateRefused("a signing key must be Ed25519")
    return OwnerCredentials(transport_key, transport, signing_key, signing)


def load_server(folder: Path, passphrase: bytes) -> ServerCredentials:
    """Open the coordinator's TLS identity. For the coordinator only; errors as of `load_owner`."""
    return ServerCredentials(*_load(folder, "server", passphrase))


def load_operator(folder: Path, passphrase: bytes) -> OperatorCredentials:
    """Open an operator's TLS identity. For that operator only; errors as of `load_owner`."""
    return OperatorCredentials(*_load(folder, "operator", passphrase))


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


def load_pair(context: ssl.SSLContext, certificate: Path, private_key: ec.EllipticCurvePrivateKey) -> None:
    """Let a TLS context show a certificate. For the owner of the key only.

    Raises:
        CertificateRefused: The certificate's file and the key cannot be loaded together.
    """
    with ssl_key_file(private_key) as (key_file, password):
        try:
            context.load_cert_chain(certificate, key_file, password)
        except OSError:
            raise CertificateRefused(f"{certificate.name} and its key cannot be loaded") from None


def seal_key(path: Path, key: PrivateKeyTypes, passphrase: bytes) -> None:
    """Write a private key, sealed, with mode 0600. For the owner of the key only."""
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, serialization.NoEncryption())
    seal_secret(path, der, passphrase)


def open_ec_key(path: Path, passphrase: bytes, certificate: x509.Certificate) -> ec.EllipticCurvePrivateKey:
    """Open a sealed elliptic curve key, the one of a certificate. For the owner of the key only.

    Raises:
        CertificateRefused: It is the key of another certificate, or of another type.
        SecretUnavailable: The passphrase is wrong, or the file is missing, damaged or open to others.
    """
    key = _open_key(path, passphrase, certificate)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateRefused(f"{path.name} must be an elliptic curve key")
    return key


def _load(
    folder: Path, role: LeafRole, passphrase: bytes
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    certificate = read_certificate(_certificate_file(folder, role), role)
    return open_ec_key(_key_file(folder, role), passphrase, certificate), certificate


def _open_key(path: Path, passphrase: bytes, certificate: x509.Certificate) -> PrivateKeyTypes:
    try:
        key = serialization.load_der_private_key(open_secret(path, passphrase), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SecretUnavailable(f"{path.name} does not hold a private key") from None
    if key.public_key() != certificate.public_key():
        raise CertificateRefused(f"{path.name} is not the key of the certificate beside it")
    return key


def _split(
    issued: bytes,
) -> tuple[x509.Certificate, dict[LeafRole, x509.Certificate], x509.CertificateRevocationList]:
    refusal = CertificateRefused("the file is not an answer of an authority")
    if len(issued) > MAX_ISSUED_BYTES:
        raise refusal
    try:
        certificates = x509.load_pem_x509_certificates(issued)
        revocations = x509.load_pem_x509_crl(issued)
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise refusal from None
    by_role = {role_of(certificate): certificate for certificate in certificates}
    authority = by_role.pop("authority", None)
    leaves: dict[LeafRole, x509.Certificate] = {
        role: by_role.pop(role) for role in FILES if role in by_role
    }
    if authority is None or by_role or len(certificates) != len(leaves) + 1:
        raise refusal
    check_revocations(revocations, authority, datetime.now(UTC))
    return authority, leaves, revocations


def _has_newer_list(
    folder: Path, authority: x509.Certificate, revocations: x509.CertificateRevocationList
) -> bool:
    file = folder / REVOCATIONS
    if not file.exists():
        return False
    return list_number(read_revocations(file, authority)) > list_number(revocations)


def _generate(role: LeafRole) -> PrivateKey:
    if role == "owner-signing":
        return Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP384R1())


def _key_file(folder: Path, role: LeafRole) -> Path:
    return folder / f"{FILES[role]}.key.sealed"


def _certificate_file(folder: Path, role: LeafRole) -> Path:
    return folder / f"{FILES[role]}.crt"
