"""What certificates say: who is a member, with which keys, and for what.

Each leaf certificate is for one role, told apart by its extended key usage; see `crypto.authority`. The
signing and operator usages are fedseal's own, so that no certificate passes for another. Nothing here
touches a file. Source: RFC 5280.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal, get_args

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from crypto.issued import issued_list, parsed_certificate, verify_issued
from protocol.errors import CertificateRefused, OwnCertificateExpired, OwnCertificateRevoked

LeafKey = ec.EllipticCurvePublicKey | Ed25519PublicKey
LeafRole = Literal["server", "owner-transport", "owner-signing", "operator"]
Role = LeafRole | Literal["authority", "unknown"]

SIGNING_USAGE = x509.ObjectIdentifier("1.3.6.1.4.1.59999.1.1")
"""Extended key usage of an owner's signing certificate; known to fedseal alone."""

OPERATOR_USAGE = x509.ObjectIdentifier("1.3.6.1.4.1.59999.1.2")
"""Extended key usage of an operator's certificate, beside that of a TLS client."""

USAGES: Final[dict[LeafRole, tuple[x509.ObjectIdentifier, ...]]] = {
    "server": (ExtendedKeyUsageOID.SERVER_AUTH,),
    "owner-transport": (ExtendedKeyUsageOID.CLIENT_AUTH,),
    "owner-signing": (SIGNING_USAGE,),
    "operator": (ExtendedKeyUsageOID.CLIENT_AUTH, OPERATOR_USAGE),
}
"""The extended key usages of each role, in their order."""

LEAF_ROLES: Final[tuple[LeafRole, ...]] = get_args(LeafRole)
MAX_CERTIFICATE_BYTES = 16 * 1024

_OWNER_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_CHECKED = {ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE, ExtensionOID.EXTENDED_KEY_USAGE}


@dataclass(frozen=True)
class ServerCredentials:
    """The coordinator's TLS key and certificate. The key is for the coordinator only."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate


@dataclass(frozen=True)
class OwnerCredentials:
    """An owner's two keys and their certificates. The keys are for that owner only."""

    transport_key: ec.EllipticCurvePrivateKey = field(repr=False)
    transport_certificate: x509.Certificate
    signing_key: Ed25519PrivateKey = field(repr=False)
    signing_certificate: x509.Certificate


@dataclass(frozen=True)
class OperatorCredentials:
    """An operator's TLS key and certificate. The key is for that operator only."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate


@dataclass(frozen=True)
class Member:
    """An owner as its verified signing certificate names it, with the fingerprint that peers pin."""

    name: str
    fingerprint: str
    public_key: Ed25519PublicKey
    not_after: datetime


def check_owner_name(name: str) -> None:
    """Return if `name` may name an owner; such a name is also safe as a file name.

    Raises:
        CertificateRefused: It does not match ``^[a-z0-9][a-z0-9_-]{0,62}$``.
    """
    if _OWNER_NAME.fullmatch(name) is None:
        raise CertificateRefused(
            "a name is 1 to 63 of a-z, 0-9, - and _, and starts with a letter or digit"
        )


def verify_signing_certificate(
    der: bytes,
    authority: x509.Certificate,
    revocations: x509.CertificateRevocationList | None,
    now: datetime,
) -> Member:
    """Decide whether a certificate of a peer makes it a member, and return the member.

    A member that is returned was admitted by the holder of the authority's key, for signing, and was not
    revoked when the list was made. It trusts the local clock. One certificate has many valid encodings
    (anybody can rewrite an ECDSA signature), so tell members apart by fingerprint, never by these bytes.

    Args:
        der: The certificate as a peer sent it.
        authority: The authority that this party trusts, from its own files.
        revocations: The authority's list, from this party's own files. None skips the check; only for a
            caller that has another way to know, such as an auditor of an old run.
        now: The present, with a time zone.

    Raises:
        CertificateRefused: Names the first condition that fails, and nothing of the certificate.
    """
    return CertificateVerifier(authority, revocations, now).member(der)


def check_certificate(
    certificate: x509.Certificate,
    role: LeafRole,
    authority: x509.Certificate,
    revocations: x509.CertificateRevocationList | None,
    now: datetime,
) -> None:
    """Return if a certificate may be relied on for a role now; see `verify_signing_certificate`.

    Raises:
        CertificateRefused: Names the first condition that fails, and nothing of the certificate.
    """
    CertificateVerifier(authority, revocations, now).check(certificate, role)


def check_own(
    certificate: x509.Certificate, revocations: x509.CertificateRevocationList | None, now: datetime
) -> None:
    """Return if a party's own certificate will not be refused for its dates or as revoked.

    Whether it is of the right authority and for the right use is not looked at: that was done when it was
    installed.

    Args:
        certificate: The party's own.
        revocations: The newest list that the party has, fresh or stale; None skips it.
        now: The present by the party's clock, with a time zone.

    Raises:
        OwnCertificateExpired: The present is not between its dates.
        OwnCertificateRevoked: The list names it.
    """
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    clock = f"this machine's clock shows {format_time(now)}"
    if now < begin:
        raise OwnCertificateExpired(f"it is valid from {format_time(begin)} on; {clock}")
    if now > end:
        raise OwnCertificateExpired(f"it was valid until {format_time(end)}; {clock}")
    if (
        revocations is not None
        and revocations.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None
    ):
        raise OwnCertificateRevoked


class CertificateVerifier:
    """Decides about any number of certificates, by one authority and one list, at one moment.

    Args:
        authority: The authority that this party trusts, from its own files.
        revocations: The authority's list; None as in `verify_signing_certificate`.
        now: The present, with a time zone. Make a new verifier for every occasion.

    Raises:
        CertificateRefused: The authority or its list cannot be relied on now.
    """

    def __init__(
        self,
        authority: x509.Certificate,
        revocations: x509.CertificateRevocationList | None,
        now: datetime,
    ) -> None:
        if role_of(authority) != "authority":
            raise CertificateRefused("the trusted certificate is not an authority's")
        _check_dates(authority, now, "authority's certificate")
        if revocations is not None:
            check_revocations(revocations, authority, now)
        self._authority, self._revocations, self._now = authority, revocations, now

    def member(self, der: bytes) -> Member:
        """Return whom a signing certificate names; see `verify_signing_certificate`.

        Raises:
            CertificateRefused: Names the first condition that fails, and nothing of the certificate.
        """
        if len(der) > MAX_CERTIFICATE_BYTES:
            raise CertificateRefused("the certificate is too long")
        try:
            certificate = parsed_certificate(der)
            certificate.public_key()
        except Exception:  # Hostile bytes raise a dozen types in the parser; each of them is a refusal.
            raise CertificateRefused("the bytes are not a certificate") from None
        self.check(certificate, "owner-signing")
        return _named_member(certificate)

    def check(self, certificate: x509.Certificate, role: LeafRole) -> None:
        """Return if a certificate may be relied on for a role; errors as in `member`."""
        try:
            verify_issued(certificate, self._authority)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            raise CertificateRefused("the certificate is not issued by this authority") from None
        _check_dates(certificate, self._now, "certificate")
        _check_use(certificate, role)
        serial = certificate.serial_number
        if (
            self._revocations is not None
            and self._revocations.get_revoked_certificate_by_serial_number(serial) is not None
        ):
            raise CertificateRefused("the certificate is revoked")


@functools.lru_cache(maxsize=2048)
def _named_member(certificate: x509.Certificate) -> Member:
    """Return whom a signing certificate names; the certificate itself was checked."""
    public_key = certificate.public_key()
    if not isinstance(public_key, Ed25519PublicKey):
        raise CertificateRefused("the key of a signing certificate must be Ed25519")
    name = common_name(certificate.subject)
    check_owner_name(name)
    return Member(name, fingerprint(public_key), public_key, certificate.not_valid_after_utc)


def check_key_type(role: LeafRole, key: object) -> None:
    """Return if a key is of the type that a role has, else raise `CertificateRefused`."""
    if role == "owner-signing":
        if not isinstance(key, Ed25519PublicKey):
            raise CertificateRefused("the key of a signing certificate must be Ed25519")
    elif not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise CertificateRefused("the key of a TLS certificate must be EC P-384")


def check_revocations(
    revocations: x509.CertificateRevocationList, authority: x509.Certificate, now: datetime
) -> None:
    """Return if a revocation list is the authority's own and fresh, else raise `CertificateRefused`."""
    if not issued_list(revocations.public_bytes(Encoding.DER), authority):
        raise CertificateRefused("the revocation list is not signed by this authority")
    if now < revocations.last_update_utc:
        raise CertificateRefused("the revocation list is not yet valid")
    if revocations.next_update_utc is None or now > revocations.next_update_utc:
        raise CertificateRefused("the revocation list is stale; get a new one from the authority")


def fingerprint(public_key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of a public key's SubjectPublicKeyInfo (DER), as 64 lower-case hex digits."""
    return key_sha256(public_key)


@functools.lru_cache(maxsize=4096)
def role_of(certificate: x509.Certificate) -> Role:
    """Return what a certificate is for, by its extensions; `unknown` if it is not one of fedseal's."""
    try:
        extensions = certificate.extensions
        is_authority = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, x509.DuplicateExtension, x509.ExtensionNotFound):
        return "unknown"
    try:
        usages = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return "authority" if is_authority else "unknown"
    if is_authority:
        return "unknown"
    return next((role for role in LEAF_ROLES if usages == list(USAGES[role])), "unknown")


def describe(certificate: x509.Certificate, now: datetime | None = None) -> dict[str, Any]:
    """Return what a person wants to know of a certificate, as JSON values.

    Returns:
        subject, issuer (common names), role, key_type, sha256_fingerprint (of the public key, as it is
        pinned), serial (hex), not_before, not_after (ISO 8601, UTC), days_left (negative once expired).
    """
    key = certificate.public_key()
    remaining = certificate.not_valid_after_utc - (now or datetime.now(UTC))
    return {
        "subject": common_name(certificate.subject),
        "issuer": common_name(certificate.issuer),
        "role": role_of(certificate),
        "key_type": _key_type(key),
        "sha256_fingerprint": key_sha256(key),
        "serial": f"{certificate.serial_number:x}",
        "not_before": format_time(certificate.not_valid_before_utc),
        "not_after": format_time(certificate.not_valid_after_utc),
        "days_left": remaining.days,
    }


def format_time(moment: datetime) -> str:
    """Return a UTC time as ISO 8601 with seconds, for example ``2026-01-31T12:00:00Z``."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def common_name(name: x509.Name) -> str:
    """Return the one common name of a subject or issuer; empty if it has none or several."""
    values = [attribute.value for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else ""


def _check_dates(certificate: x509.Certificate, now: datetime, what: str) -> None:
    if now < certificate.not_valid_before_utc:
        raise CertificateRefused(f"the {what} is not yet valid")
    if now > certificate.not_valid_after_utc:
        raise CertificateRefused(f"the {what} has expired")


@functools.lru_cache(maxsize=4096)
def _check_use(certificate: x509.Certificate, role: LeafRole) -> None:
    if role_of(certificate) != role:
        wanted = "signing" if role == "owner-signing" else f"the role {role}"
        raise CertificateRefused(f"the certificate is not for {wanted}")
    extensions = certificate.extensions
    if role == "owner-signing" and any(item.critical and item.oid not in _CHECKED for item in extensions):
        raise CertificateRefused("the certificate has an unknown critical extension")
    if key_usage(authority=False) not in [item.value for item in extensions]:
        raise CertificateRefused("the key usage of a certificate must be signatures alone")


def key_usage(*, authority: bool) -> x509.KeyUsage:
    """Return what a key may do: an authority's certifies, every other key signs."""
    # In the order of RFC 5280, 4.2.1.3: digitalSignature first, keyCertSign and cRLSign sixth and seventh.
    return x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False)


def named(name: str) -> x509.Name:
    """Return a subject or issuer that has this common name and nothing else."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_type(key: CertificatePublicKeyTypes) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        return "EC P-384"
    return "Ed25519" if isinstance(key, Ed25519PublicKey) else "other"


def key_sha256(key: CertificatePublicKeyTypes) -> str:
    """Return the SHA-256 of any public key's SubjectPublicKeyInfo (DER), as 64 lower-case hex digits."""
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
