"""Certificates for listeners that only this machine's own processes connect to.

Such a certificate is its own authority: who connects is given it as the only root that counts, so that
nothing but the holder of its key can answer. It has nothing to do with the federation's authority.
Source: RFC 5280.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from crypto.certificates import named

VALID_FOR = timedelta(days=3650)
"""Longer than any process lives; a new one is made whenever the coordinator starts."""

_CLOCK_SKEW = timedelta(days=1)


def loopback_pair(
    address: str, now: datetime | None = None
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Make a key, and a certificate that it signs for one IP address. The key is for the listener only.

    Args:
        address: The IP address that clients connect to.
        now: The present; its clock may be set back by a day later.
    """
    key, moment = ec.generate_private_key(ec.SECP384R1()), now or datetime.now(UTC)
    name = named("fedseal loopback")
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - _CLOCK_SKEW)
        .not_valid_after(moment + VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(hosts, critical=False)
    )
    return key, builder.sign(key, hashes.SHA384())
