"""What an authority signed, remembered: members show the same certificates in every exchange.

What a certificate says and whether a signature verifies does not change, unlike dates and revocations,
which are checked each time by `crypto.certificates`. Failures are not remembered.
"""

from __future__ import annotations

import functools

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec


@functools.lru_cache(maxsize=2048)
def parsed_certificate(der: bytes) -> x509.Certificate:
    """Parse a certificate (DER); the bytes may be hostile.

    Raises:
        Exception: Any type; what cannot be parsed is no certificate.
    """
    return x509.load_der_x509_certificate(der)


@functools.lru_cache(maxsize=4096)
def verify_issued(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    """Return if the authority signed the certificate.

    Raises:
        ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm: It did not.
    """
    certificate.verify_directly_issued_by(authority)


@functools.lru_cache(maxsize=64)
def issued_list(revocations_der: bytes, authority: x509.Certificate) -> bool:
    """Tell whether a revocation list (DER) is the authority's own; what cannot be read is nobody's."""
    try:
        revocations, key = x509.load_der_x509_crl(revocations_der), authority.public_key()
        return (
            revocations.issuer == authority.subject
            and isinstance(key, ec.EllipticCurvePublicKey)
            and revocations.is_signature_valid(key)
        )
    except Exception:  # Hostile bytes raise a dozen types in the parser, some of them only when looked at.
        return False
