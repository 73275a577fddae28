"""Certified keys for tests: what a holder and its authority do together, without files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from crypto.authority import Authority
from crypto.certificates import OperatorCredentials, OwnerCredentials, ServerCredentials
from crypto.identity import install, make_request
from crypto.pki import sign_request
from crypto.requests import Party


def owner_of(authority: Authority, name: str, days: int, now: datetime | None = None) -> OwnerCredentials:
    """Return an owner with two fresh keys and their certificates."""
    transport, signing = ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate()
    return OwnerCredentials(
        transport,
        authority.certify(name, "owner-transport", transport.public_key(), days, now=now),
        signing,
        authority.certify(name, "owner-signing", signing.public_key(), days, now=now),
    )


def server_of(
    authority: Authority, hosts: Sequence[str], days: int, now: datetime | None = None
) -> ServerCredentials:
    """Return a coordinator with a fresh key and its certificate."""
    key = ec.generate_private_key(ec.SECP384R1())
    return ServerCredentials(
        key, authority.certify("coordinator", "server", key.public_key(), days, hosts, now)
    )


def operator_of(
    authority: Authority, name: str, days: int, now: datetime | None = None
) -> OperatorCredentials:
    """Return an operator with a fresh key and its certificate."""
    key = ec.generate_private_key(ec.SECP384R1())
    return OperatorCredentials(key, authority.certify(name, "operator", key.public_key(), days, now=now))


def enrol(
    pki: Path,
    ca_passphrase: bytes,
    identity: Path,
    party: Party,
    name: str,
    passphrase: bytes,
    hosts: Sequence[str] = (),
    days: int = 30,
) -> None:
    """Make an identity folder by the way of request, signature and installation."""
    make_request(identity, party, name, passphrase, hosts)
    _, answer = sign_request(pki, ca_passphrase, (identity / "request.pem").read_bytes(), days)
    install(identity, answer.read_bytes())
