"""Key agreement of a session: HPKE wraps, pair seeds, and the hashes that bind a session together.

HPKE in base mode authenticates nobody; every wrap is covered by a signature of its sender (the `Wraps`
message), and a pair's seed needs a half from each side. The KEM is the hybrid of ML-KEM-768 and X25519,
so that recorded traffic stays closed if one of the two falls.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocol.encoding import digest, encode
from protocol.errors import ProtocolViolation
from protocol.messages import Signed

HALF_SEED_BYTES: Final = 32
_MLKEM_PUBLIC_BYTES: Final = 1184
_MLKEM_SEED_BYTES: Final = 64
_X25519_BYTES: Final = 32
_DEALT_NONCE: Final = bytes(12)
_SUITE: Final = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class HpkeKey:
    """A one-time key of one owner for one run; erased once the session stands."""

    def __init__(self, lattice: MLKEM768PrivateKey, curve: X25519PrivateKey) -> None:
        self._lattice = lattice
        self._curve = curve

    @classmethod
    def generate(cls) -> HpkeKey:
        """Draw a fresh key."""
        return cls(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def from_secret(cls, data: bytes) -> HpkeKey:
        """Rebuild a key from `secret`."""
        return cls(
            MLKEM768PrivateKey.from_seed_bytes(data[:_MLKEM_SEED_BYTES]),
            X25519PrivateKey.from_private_bytes(data[_MLKEM_SEED_BYTES:]),
        )

    def secret(self) -> bytes:
        """Return the 96 secret bytes, for the owner's sealed state only."""
        return self._lattice.private_bytes_raw() + self._curve.private_bytes_raw()

    def public(self) -> bytes:
        """Return the 1216 public bytes that `wrap` takes."""
        return self._lattice.public_key().public_bytes_raw() + self._curve.public_key().public_bytes_raw()

    def unwrap(self, ciphertext: bytes, context: WrapContext) -> bytes:
        """Open what a peer wrapped for this key and this context.

        Raises:
            ProtocolViolation: It was wrapped for another key or another context, or changed.
        """
        key = hpke.MLKEM768X25519PrivateKey(self._lattice, self._curve)
        try:
            return _SUITE.decrypt(ciphertext, key, info=context.info())
        except InvalidTag:
            raise ProtocolViolation("a wrapped secret does not open") from None


@dataclass(frozen=True)
class WrapContext:
    """Who wraps what for whom, in which run; part of the encryption."""

    run: str
    roster_hash: str
    sender: str
    receiver: str
    purpose: Literal["pair", "bfv"]

    def info(self) -> bytes:
        """Return the canonical HPKE info."""
        return b"fedseal/wrap/1\0" + encode(
            {
                "run": self.run,
                "roster_hash": self.roster_hash,
                "sender": self.sender,
                "receiver": self.receiver,
                "purpose": self.purpose,
            }
        )


def wrap(public: bytes, secret: bytes, context: WrapContext) -> bytes:
    """Encrypt a secret to a peer's one-time key.

    Args:
        public: The peer's 1216 public bytes, from its signed join.
        secret: A half seed, or the content key of what the dealer dealt.
        context: Bound into the encryption.

    Raises:
        ProtocolViolation: `public` is not a key.
    """
    try:
        if len(public) != _MLKEM_PUBLIC_BYTES + _X25519_BYTES:
            raise ValueError
        key = hpke.MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public[:_MLKEM_PUBLIC_BYTES]),
            X25519PublicKey.from_public_bytes(public[_MLKEM_PUBLIC_BYTES:]),
        )
        return _SUITE.encrypt(secret, key, info=context.info())
    except ValueError:
        raise ProtocolViolation("a peer's one-time key is malformed") from None


def seal_dealt(secret: bytes, run: str, roster_hash: str, dealer: str) -> tuple[bytes, bytes]:
    """Encrypt the dealer's key once for all members: a copy for each would grow with key times roster.

    Args:
        secret: The dealer's encryption key as it is dealt.
        run: Bound into the encryption, as are the next two.
        roster_hash: Hash of the roster.
        dealer: The dealer's fingerprint.

    Returns:
        A fresh content key of 32 bytes, to be wrapped for each member, and the ciphertext (AES-256-GCM).
    """
    content_key = secrets.token_bytes(HALF_SEED_BYTES)
    # the key encrypts nothing else, so that the nonce cannot repeat under it
    sealed = AESGCM(content_key).encrypt(_DEALT_NONCE, secret, _dealt_info(run, roster_hash, dealer))
    return content_key, sealed


def open_dealt(content_key: bytes, sealed: bytes, run: str, roster_hash: str, dealer: str) -> bytes:
    """Inverse of `seal_dealt`, on bytes that the dealer's signature covers.

    Raises:
        ProtocolViolation: They do not open under this key and for this run, roster and dealer.
    """
    try:
        return AESGCM(content_key).decrypt(_DEALT_NONCE, sealed, _dealt_info(run, roster_hash, dealer))
    except (InvalidTag, ValueError):
        raise ProtocolViolation("the dealt key does not open") from None


def _dealt_info(run: str, roster_hash: str, dealer: str) -> bytes:
    return b"fedseal/dealt/1\0" + encode({"run": run, "roster_hash": roster_hash, "dealer": dealer})


def fresh_half_seed() -> bytes:
    """Return 32 fresh bytes from the operating system."""
    return secrets.token_bytes(HALF_SEED_BYTES)


def pair_seed(own: str, peer: str, own_half: bytes, peer_half: bytes, roster_hash: str) -> bytes:
    """Combine both halves into the seed of a pair; both sides get the same 32 bytes.

    Args:
        own: This owner's fingerprint.
        peer: The other owner's fingerprint.
        own_half: The half that this owner wrapped for the peer.
        peer_half: The half that the peer wrapped for this owner.
        roster_hash: Hash of the session's roster.

    Raises:
        ProtocolViolation: The peer's half has the wrong length.
    """
    if len(peer_half) != HALF_SEED_BYTES:
        raise ProtocolViolation("a half seed has the wrong length")
    ordered = own_half + peer_half if own < peer else peer_half + own_half
    info = b"fedseal/pair/1\0" + encode([roster_hash, min(own, peer), max(own, peer)])
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(ordered)


def signed_hash(messages: Sequence[Signed]) -> str:
    """Return the hash of signed messages in their given order.

    It serves as roster hash (over joins), session (over wraps), list hash (over ready messages) and
    headers hash (over headers).
    """
    return digest([message.model_dump(mode="json") for message in messages])
