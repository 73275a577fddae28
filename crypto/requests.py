"""Signing requests: how the holder of new keys asks the authority for certificates.

A request is one PKCS #10 request (PEM) per key, one after the other. Each is signed by its own key, which
proves possession, and carries the hash of all keys of the request in a fedseal extension: so the keys of
one request belong to one holder, who made it with all of them at hand. Source: RFC 2986.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from crypto.authority import alternative_names
from crypto.certificates import (
    LEAF_ROLES,
    USAGES,
    LeafKey,
    LeafRole,
    check_key_type,
    check_owner_name,
    common_name,
    key_sha256,
    named,
)
from protocol.errors import CertificateRefused

Party = Literal["coordinator", "owner", "operator"]
PrivateKey = ec.EllipticCurvePrivateKey | Ed25519PrivateKey

ROLES: Final[dict[Party, tuple[LeafRole, ...]]] = {
    "coordinator": ("server",),
    "owner": ("owner-transport", "owner-signing"),
    "operator": ("operator",),
}
"""The certificates of each party."""

MAX_REQUEST_BYTES = 32 * 1024

_KEYS_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.59999.1.3")
_DER_OCTETS_32 = b"\x04\x20"
_BLOCK = re.compile(
    rb"-----BEGIN CERTIFICATE REQUEST-----[A-Za-z0-9+/=\r\n]+-----END CERTIFICATE REQUEST-----"
)


@dataclass(frozen=True)
class Request:
    """What a verified request asks for.

    Attributes:
        name: The holder's name.
        party: What the holder is.
        keys: The holder's public keys by role, in the order of `ROLES`.
        hosts: Host names and IP addresses of a coordinator.
    """

    name: str
    party: Party
    keys: dict[LeafRole, LeafKey]
    hosts: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key that names the holder: an owner's signing key, else the only key."""
        return key_sha256(self.keys[ROLES[self.party][-1]])


def build_request(
    name: str, party: Party, keys: Mapping[LeafRole, PrivateKey], hosts: Sequence[str] = ()
) -> bytes:
    """Return a signing request as PEM. For the holder of the keys only.

    Args:
        name: The holder's name; see `check_owner_name`.
        party: What the holder is.
        keys: Its private keys, one for each role of `ROLES[party]`.
        hosts: Host names and IP addresses of a coordinator; for other parties none.

    Raises:
        CertificateRefused: A name is not well-formed, or `hosts` does not go with `party`.
    """
    check_owner_name(name)
    if bool(hosts) != (party == "coordinator"):
        raise CertificateRefused("a coordinator, and nobody else, needs at least one host name")
    binding = _binding([keys[role].public_key() for role in ROLES[party]])
    blocks = []
    for role in ROLES[party]:
        builder = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(named(name))
            .add_extension(x509.ExtendedKeyUsage(USAGES[role]), critical=False)
            .add_extension(x509.UnrecognizedExtension(_KEYS_EXTENSION, binding), critical=False)
        )
        if hosts:
            builder = builder.add_extension(alternative_names(hosts), critical=False)
        key = keys[role]
        algorithm = None if isinstance(key, Ed25519PrivateKey) else hashes.SHA384()
        blocks.append(builder.sign(key, algorithm).public_bytes(Encoding.PEM))
    return b"".join(blocks)


def read_request(data: bytes) -> Request:
    """Verify a signing request of a stranger, and return what it asks for.

    Whoever made it held all of its private keys. Who that is, it does not prove: the authority's person
    compares the fingerprint with one that came from the holder by another way.

    Raises:
        CertificateRefused: Names the first condition that fails.
    """
    if len(data) > MAX_REQUEST_BYTES:
        raise CertificateRefused("the signing request is too long")
    found = [_read_block(block) for block in _BLOCK.findall(data)]
    roles = tuple(role for role, _ in found)
    party = next((party for party in ROLES if ROLES[party] == roles), None)
    if party is None:
        raise CertificateRefused("the signing request is not one of a coordinator, owner or operator")
    keys = {role: _key(role, request) for role, request in found}
    binding = _binding(list(keys.values()))
    if len(set(map(key_sha256, keys.values()))) != len(keys):
        raise CertificateRefused("one key is requested for two roles")
    names = {common_name(request.subject) for _, request in found}
    if len(names) != 1:
        raise CertificateRefused("the signing request has several names")
    for _, request in found:
        if _extension(request, x509.UnrecognizedExtension) != binding:
            raise CertificateRefused("the keys of the signing request do not belong together")
    (name,) = names
    check_owner_name(name)
    hosts = _hosts(found[0][1])
    if bool(hosts) != (party == "coordinator"):
        raise CertificateRefused("a coordinator, and nobody else, needs at least one host name")
    return Request(name, party, keys, hosts)


def _read_block(block: bytes) -> tuple[LeafRole, x509.CertificateSigningRequest]:
    try:
        request = x509.load_pem_x509_csr(block)
        signed = request.is_signature_valid
        usages = list(request.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        request.public_key()
    except Exception:  # Hostile bytes raise a dozen types in the parser; each of them is a refusal.
        raise CertificateRefused("the signing request is malformed") from None
    if not signed:
        raise CertificateRefused("the signing request is not signed by its own key")
    role = next((role for role in LEAF_ROLES if usages == list(USAGES[role])), None)
    if role is None:
        raise CertificateRefused("the signing request names no role")
    return role, request


def _key(role: LeafRole, request: x509.CertificateSigningRequest) -> LeafKey:
    key = request.public_key()
    check_key_type(role, key)
    if not isinstance(key, ec.EllipticCurvePublicKey | Ed25519PublicKey):
        raise CertificateRefused("the key of the signing request is of another type")
    return key


def _binding(keys: Sequence[LeafKey]) -> bytes:
    joined = hashlib.sha256()
    for key in keys:
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        joined.update(len(der).to_bytes(4, "big") + der)
    return _DER_OCTETS_32 + joined.digest()


def _extension(
    request: x509.CertificateSigningRequest, kind: type[x509.UnrecognizedExtension]
) -> bytes | None:
    for extension in request.extensions:
        if extension.oid == _KEYS_EXTENSION and isinstance(extension.value, kind):
            return extension.value.value
    return None


def _hosts(request: x509.CertificateSigningRequest) -> tuple[str, ...]:
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    hosts = tuple(str(name.value) for name in names)
    if alternative_names(hosts) != names:
        raise CertificateRefused("a host of the signing request is neither a name nor an address")
    return hosts
