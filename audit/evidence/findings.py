"""What an owner found at its own place, signed by it and read by others.

A signature proves that the holder of an owner's signing key said it, not that it is true: an owner that
lies about its own machine harms the records that are its own to protect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from audit.evidence.experiments import FINDINGS_KIND, OwnerFindings
from crypto.certificates import fingerprint
from crypto.signing import sign_bytes, verify_bytes
from protocol.encoding import encode
from protocol.errors import ReportInvalid, SignatureInvalid
from protocol.messages import Signed


def sign_findings(key: Ed25519PrivateKey, findings: OwnerFindings) -> Signed:
    """Sign what an owner found. For the owner of `key` only."""
    fields = findings.fields()
    return Signed(
        kind=FINDINGS_KIND,
        body=fields,
        signer=fingerprint(key.public_key()),
        signature=sign_bytes(key, FINDINGS_KIND, encode(fields)),
    )


def verify_findings(signed: Signed, public_key: Ed25519PublicKey) -> OwnerFindings:
    """Return signed findings after their signature.

    Args:
        signed: As an owner sent it.
        public_key: The key of the expected owner, from its verified certificate.

    Raises:
        SignatureInvalid: Another kind, another signer, or a signature that does not verify.
        ReportInvalid: Truly signed, but not findings as this version spells them.
    """
    if signed.kind != FINDINGS_KIND or signed.signer != fingerprint(public_key):
        raise SignatureInvalid("expected findings of another signer")
    data = encode(signed.body)
    verify_bytes(public_key, FINDINGS_KIND, data, signed.signature)
    findings = OwnerFindings.from_fields(signed.body)
    if encode(findings.fields()) != data:
        raise ReportInvalid("signed findings are not spelled as their type writes them")
    return findings


def finding(signed: Signed, keys: Mapping[str, Ed25519PublicKey]) -> dict[str, Any]:
    """Return signed findings as a report holds them.

    Args:
        signed: As an owner sent it.
        keys: Public keys of the run's owners by fingerprint.

    Returns:
        Its fields, and in `valid` whether one of these owners truly signed it.
    """
    try:
        verify_findings(signed, keys[signed.signer])
        valid = True
    except (KeyError, SignatureInvalid, ReportInvalid):
        valid = False
    return signed.model_dump(mode="json") | {"valid": valid}
