"""The federation's X.509 authority: it certifies public keys, and says which certificates are revoked.

An authority issues four kinds of leaf certificates, told apart by their extended key usage: the
coordinator's server certificate, an owner's transport certificate (TLS client), an owner's signing
certificate (Ed25519) and an operator's certificate (TLS client, with a usage of fedseal's own). It sees
public keys only: holders make their own keys, see `crypto.identity`. Nothing here touches a file; that is
for `crypto.pki`. Source: RFC 5280.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from crypto.certificates import (
    USAGES,
    LeafKey,
    LeafRole,
    check_key_type,
    check_owner_name,
    key_usage,
    named,
)
from protocol.errors import CertificateRefused

CLOCK_SKEW = timedelta(minutes=5)
"""How far in the past validity starts, for machines whose clocks lag."""

MAX_DAYS = 36_500

_AUTHORITY_NAME = re.compile(r"[ -~]{1,64}")
_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


@dataclass(frozen=True)
class Authority:
    """A certificate authority. Its key is for the person who admits members, never for the coordinator.

    In every method `days` is 1 to `MAX_DAYS`, `now` is read from the clock when left out, a validity starts
    `CLOCK_SKEW` earlier, and one that would outlast the authority ends with it.
    """

    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey = field(repr=False)

    def certify(
        self,
        name: str,
        role: LeafRole,
        key: LeafKey,
        days: int,
        hosts: Sequence[str] = (),
        now: datetime | None = None,
    ) -> x509.Certificate:
        """Certify that a public key is that of `name`, for one role.

        Args:
            name: The holder's name; see `check_owner_name`.
            role: What the certificate is for.
            key: Ed25519 for ``owner-signing``, EC P-384 for all other roles.
            days: Validity.
            hosts: Host names and IP addresses that clients connect to; for ``server`` at least one, for
                other roles none.
            now: The present.

        Raises:
            CertificateRefused: A name or the key is not well-formed, or the authority has expired.
        """
        check_owner_name(name)
        check_key_type(role, key)
        if bool(hosts) != (role == "server"):
            raise CertificateRefused("a server certificate, and no other, needs at least one host name")
        begin, end = _validity(days, now or datetime.now(UTC), self.certificate.not_valid_after_utc)
        usages = USAGES[role]
        builder = (
            _builder(named(name), self.certificate.subject, key, begin, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=role == "owner-signing")
            .add_extension(_key_identifier(self.private_key), critical=False)
        )
        if hosts:
            builder = builder.add_extension(alternative_names(hosts), critical=False)
        return builder.sign(self.private_key, hashes.SHA384())

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
    subject = named(name)
    begin, end = _validity(days, now or datetime.now(UTC), None)
    builder = (
        _builder(subject, subject, key.public_key(), begin, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(authority=True), critical=True)
        .add_extension(_key_identifier(key), critical=False)
    )
    return Authority(builder.sign(key, hashes.SHA384()), key)


def alternative_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    """Return host names and IP addresses as certificates and requests hold them.

    Raises:
        CertificateRefused: One is neither a lower-case host name nor an IP address.
    """
    return x509.SubjectAlternativeName([_alternative_name(host) for host in hosts])


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


def _key_identifier(issuer: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())


def _alternative_name(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    if _HOST_NAME.fullmatch(name):
        return x509.DNSName(name)
    raise CertificateRefused("a server name is a lower-case host name or an IP address")
