"""The federation's X.509 authority: who is a member, and with which keys.

An authority issues three kinds of leaf certificates, told apart by one extended key usage each: the
coordinator's server certificate, an owner's transport certificate (TLS client) and an owner's signing
certificate (Ed25519). The signing usage is fedseal's own, so neither certificate of an owner passes for
the other. Nothing here touches a file; that is for `crypto.pki`. Source: RFC 5280.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from protocol.errors import CertificateRefused

LeafKey = ec.EllipticCurvePublicKey | Ed25519PublicKey
Role = Literal["authority", "server", "owner-transport", "owner-signing", "unknown"]

SIGNING_USAGE = x509.ObjectIdentifier("1.3.6.1.4.1.59999.1.1")
"""Extended key usage of an owner's signing certificate; known to fedseal alone."""

CLOCK_SKEW = timedelta(minutes=5)
"""How far in the past validity starts, for machines whose clocks lag."""

MAX_DAYS = 36_500
MAX_CERTIFICATE_BYTES = 16 * 1024

_OWNER_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_AUTHORITY_NAME = re.compile(r"[ -~]{1,64}")
_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_USAGE_ROLES: dict[x509.ObjectIdentifier, Role] = {
    ExtendedKeyUsageOID.SERVER_AUTH: "server",
    ExtendedKeyUsageOID.CLIENT_AUTH: "owner-transport",
    SIGNING_USAGE: "owner-signing",
}
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
class Member:
    """An owner as its verified signing certificate names it, with the fingerprint that peers pin."""

    name: str
    fingerprint: str
    public_key: Ed25519PublicKey
    not_after: datetime


@dataclass(frozen=True)
class Authority:
    """A certificate authority. Its key is for the person who admits members, never for the coordinator.

    In every method `days` is 1 to `MAX_DAYS`, `now` is read from the clock when left out, a validity starts
    `CLOCK_SKEW` earlier, and one that would outlast the authority ends with it.
    """

    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey = field(repr=False)

    def issue_server(
        self, name: str, names: Sequence[str], days: int, now: datetime | None = None
    ) -> ServerCredentials:
        """Make a TLS server key (EC P-384) and its certificate.

        Args:
            name: Common name, in the form of an owner's name. Clients look at `names` only.
            names: Host names and IP addresses that clients connect to; at least one.
            days: Validity.
            now: The present.

        Raises:
            CertificateRefused: A name is not well-formed, or the authority has expired.
        """
        check_owner_name(name)
        if not names:
            raise CertificateRefused("a server certificate needs at least one host name")
        key = ec.generate_private_key(ec.SECP384R1())
        builder = self._leaf(name, key.public_key(), ExtendedKeyUsageOID.SERVER_AUTH, days, now)
        alternatives = x509.SubjectAlternativeName([_alternative_name(item) for item in names])
        return ServerCredentials(key, self._sign(builder.add_extension(alternatives, critical=False)))

    def issue_owner(self, name: str, days: int, now: datetime | None = None) -> OwnerCredentials:
        """Make an owner's transport key (EC P-384) and signing key (Ed25519), each with a certificate.

        Args:
            name: The owner's name; see `check_owner_name`.
            days: Validity of both certificates.
            now: The present.

        Raises:
            CertificateRefused: The name is not well-formed, or the authority has expired.
        """
        check_owner_name(name)
        transport_key = ec.generate_private_key(ec.SECP384R1())
        transport = self._leaf(name, transport_key.public_key(), ExtendedKeyUsageOID.CLIENT_AUTH, days, now)
        signing_key = Ed25519PrivateKey.generate()
        signing = self._leaf(name, signing_key.public_key(), SIGNING_USAGE, days, now)
        return OwnerCredentials(transport_key, self._sign(transport), signing_key, self._sign(signing))

    def revocation_list(
        self, revoked_serials: Iterable[int], days: int, now: datetime | None = None
    ) -> x509.CertificateRevocationList:
        """Sign the complete list of revoked certificates.

        Args:
            revoked_serials: Serial numbers of all revoked certificates, not only of new ones.
            days: How long verifiers may rely on the list; after that they refuse everybody.
            now: Time of issue and, less `CLOCK_SKEW`, revocation date of every entry.

        Raises:
            CertificateRefused: `days` is out of range, or the authority has expired.
        """
        now = now or datetime.now(UTC)
        begin, end = _validity(days, now, self.certificate.not_valid_after_utc)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(begin)
            .next_update(end)
            .add_extension(_key_identifier(self.private_key), critical=False)
            # Microseconds, so that two lists of one second still have rising numbers.
            .add_extension(x509.CRLNumber(int(now.timestamp() * 1_000_000)), critical=False)
        )
        for serial in sorted(set(revoked_serials)):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(begin)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.private_key, hashes.SHA384())

    def _leaf(
        self, name: str, key: LeafKey, usage: x509.ObjectIdentifier, days: int, now: datetime | None
    ) -> x509.CertificateBuilder:
        begin, end = _validity(days, now or datetime.now(UTC), self.certificate.not_valid_after_utc)
        return (
            _builder(_common_name(name), self.certificate.subject, key, begin, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=usage == SIGNING_USAGE)
            .add_extension(_key_identifier(self.private_key), critical=False)
        )

    def _sign(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        return builder.sign(self.private_key, hashes.SHA384())


def create_authority(name: str, days: int, now: datetime | None = None) -> Authority:
    """Make a self-signed authority (EC P-384, path length 0: it issues leaves only).

    Args:
        name: Common name, 1 to 64 printable ASCII characters.
        days: Validity, 1 to `MAX_DAYS`.
        now: Start of validity, less `CLOCK_SKEW`; the present when left out.

    Raises:
        CertificateRefused: The name or the number of days is out of range.
    """
    if _AUTHORITY_NAME.fullmatch(name) is None:
        raise CertificateRefused("an authority's name is 1 to 64 printable ASCII characters")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _common_name(name)
    begin, end = _validity(days, now or datetime.now(UTC), None)
    builder = (
        _builder(subject, subject, key.public_key(), begin, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(_key_identifier(key), critical=False)
    )
    return Authority(builder.sign(key, hashes.SHA384()), key)


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
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise CertificateRefused("the certificate is too long")
    try:
        certificate = x509.load_der_x509_certificate(der)
        public_key = certificate.public_key()
    except Exception:  # Hostile bytes raise a dozen types in the parser; each of them is a refusal.
        raise CertificateRefused("the bytes are not a certificate") from None
    if role_of(authority) != "authority":
        raise CertificateRefused("the trusted certificate is not an authority's")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise CertificateRefused("the certificate is not issued by this authority") from None
    _check_dates(authority, now, "authority's certificate")
    _check_dates(certificate, now, "certificate")
    _check_signing_use(certificate)
    if not isinstance(public_key, Ed25519PublicKey):
        raise CertificateRefused("the key of a signing certificate must be Ed25519")
    if revocations is not None:
        check_revocations(revocations, authority, now)
        if revocations.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
            raise CertificateRefused("the certificate is revoked")
    name = common_name(certificate.subject)
    check_owner_name(name)
    return Member(name, fingerprint(public_key), public_key, certificate.not_valid_after_utc)


def check_revocations(
    revocations: x509.CertificateRevocationList, authority: x509.Certificate, now: datetime
) -> None:
    """Return if a revocation list is the authority's own and fresh, else raise `CertificateRefused`."""
    key = authority.public_key()
    if (
        revocations.issuer != authority.subject
        or not isinstance(key, ec.EllipticCurvePublicKey)
        or not revocations.is_signature_valid(key)
    ):
        raise CertificateRefused("the revocation list is not signed by this authority")
    if now < revocations.last_update_utc:
        raise CertificateRefused("the revocation list is not yet valid")
    if revocations.next_update_utc is None or now > revocations.next_update_utc:
        raise CertificateRefused("the revocation list is stale; get a new one from the authority")


def fingerprint(public_key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of a public key's SubjectPublicKeyInfo (DER), as 64 lower-case hex digits."""
    return _key_sha256(public_key)


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
    if is_authority or len(usages) != 1:
        return "unknown"
    return _USAGE_ROLES.get(usages[0], "unknown")


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
        "sha256_fingerprint": _key_sha256(key),
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


def _check_signing_use(certificate: x509.Certificate) -> None:
    if role_of(certificate) != "owner-signing":
        raise CertificateRefused("the certificate is not for signing")
    extensions = certificate.extensions
    if any(item.critical and item.oid not in _CHECKED for item in extensions):
        raise CertificateRefused("the certificate has an unknown critical extension")
    if _key_usage(authority=False) not in [item.value for item in extensions]:
        raise CertificateRefused("the key usage of a signing certificate must be signatures alone")


def _validity(days: int, now: datetime, limit: datetime | None) -> tuple[datetime, datetime]:
    if not 1 <= days <= MAX_DAYS:
        raise CertificateRefused(f"a validity is 1 to {MAX_DAYS} days")
    if limit is not None and now >= limit:
        raise CertificateRefused("the authority's certificate has expired")
    end = now + timedelta(days=days)
    return now - CLOCK_SKEW, end if limit is None else min(end, limit)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: LeafKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(begin).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    # In the order of RFC 5280, 4.2.1.3: digitalSignature first, keyCertSign and cRLSign sixth and seventh.
    return x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False)


def _key_identifier(issuer: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative_name(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    if _HOST_NAME.fullmatch(name):
        return x509.DNSName(name)
    raise CertificateRefused("a server name is a lower-case host name or an IP address")


def _key_type(key: CertificatePublicKeyTypes) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        return "EC P-384"
    return "Ed25519" if isinstance(key, Ed25519PublicKey) else "other"


def _key_sha256(key: CertificatePublicKeyTypes) -> str:
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
