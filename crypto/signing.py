"""Ed25519 signatures with a domain tag.

What is signed is ``fedseal/<kind>/1``, a zero byte, and the bytes. A kind has no zero byte and no slash,
so the tag of one kind is never a prefix of another's: a signature made for one purpose verifies for no
other. Source: RFC 8032.
"""

from __future__ import annotations

import re
from typing import TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from crypto.certificates import fingerprint
from protocol.encoding import encode
from protocol.errors import SignatureInvalid
from protocol.messages import Body, LedgerHead, Signed

B = TypeVar("B", bound=Body)

_KIND = re.compile(r"[a-z-]+")


def sign(key: Ed25519PrivateKey, body: Body) -> Signed:
    """Sign a message body. For the owner of `key` only.

    Args:
        key: The owner's signing key.
        body: A message body; its `KIND` becomes the domain tag.

    Returns:
        The body with the signer's fingerprint and its 64-byte signature.
    """
    fields = body.model_dump(mode="json")
    return Signed(
        kind=body.KIND,
        body=fields,
        signer=fingerprint(key.public_key()),
        signature=sign_bytes(key, body.KIND, encode(fields)),
    )


def verify(signed: Signed, public_key: Ed25519PublicKey, body_type: type[B]) -> B:
    """Return the body of a signed message, after its signature.

    A body that is returned was signed, to the byte, by the holder of the key that belongs to
    `public_key`, as a message of this kind. That the key belongs to a member is for the caller to know.

    Args:
        signed: As a peer sent it.
        public_key: The key of the expected signer, from its verified certificate.
        body_type: The expected kind of message.

    Raises:
        SignatureInvalid: Another kind, another signer, or a signature that does not verify.
        EncodingInvalid: Truly signed, but not a message of this type.
    """
    if signed.kind != body_type.KIND:
        raise SignatureInvalid(f"expected a message of kind {body_type.KIND}")
    if signed.signer != fingerprint(public_key):
        raise SignatureInvalid("the message names another signer")
    data = encode(signed.body)
    verify_bytes(public_key, signed.kind, data, signed.signature)
    # A left-out default or 1 in place of 1.0 does not pass: a signature must cover what was parsed.
    return body_type.from_encoded(signed.body, data)


def signed_head(signed: Signed, public_key: Ed25519PublicKey) -> LedgerHead:
    """Return the ledger head in a message of any version that the holder of a key signed.

    Raises:
        SignatureInvalid: Another signer, or a signature that does not verify.
        EncodingInvalid: The message has no ledger head.
    """
    if signed.signer != fingerprint(public_key):
        raise SignatureInvalid("the message names another signer")
    verify_bytes(public_key, signed.kind, encode(signed.body), signed.signature)
    return LedgerHead.of(signed)


def sign_bytes(key: Ed25519PrivateKey, kind: str, data: bytes) -> bytes:
    """Sign raw bytes, such as a report or a package manifest. For the owner of `key` only.

    Args:
        key: The signing key.
        kind: What the bytes are: lower-case letters and hyphens. Take one that no message body has.
        data: The bytes, of any length.

    Returns:
        The signature, 64 bytes.

    Raises:
        SignatureInvalid: `kind` has other characters.
    """
    return key.sign(_signature_input(kind, data))


def verify_bytes(public_key: Ed25519PublicKey, kind: str, data: bytes, signature: bytes) -> None:
    """Return if `signature` was made by `sign_bytes` over this kind and these bytes.

    Raises:
        SignatureInvalid: It was not, or `kind` has characters other than lower-case letters and hyphens.
    """
    try:
        public_key.verify(signature, _signature_input(kind, data))
    except InvalidSignature:
        raise SignatureInvalid(f"kind {kind}") from None


def _signature_input(kind: str, data: bytes) -> bytes:
    if _KIND.fullmatch(kind) is None:
        raise SignatureInvalid("the kind of a signature is lower-case letters and hyphens")
    return b"fedseal/" + kind.encode("ascii") + b"/1\0" + data
