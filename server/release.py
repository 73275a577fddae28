"""The coordinator's release key: signs packages and reports. It opens nothing and decrypts nothing."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from crypto.vault import open_secret, seal_secret, write_public
from protocol.errors import PackageInvalid
from protocol.storage import translated

PRIVATE, PUBLIC = "release.key.sealed", "release.pub"


def release_key(home: Path, passphrase: bytes) -> Ed25519PrivateKey:
    """Open the release key of a coordinator's home; the first call makes it.

    Raises:
        SecretUnavailable: Wrong passphrase, or a file that others can read.
    """
    sealed = home / PRIVATE
    if not sealed.exists():
        key = Ed25519PrivateKey.generate()
        seal_secret(sealed, key.private_bytes_raw(), passphrase)
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        write_public(home / PUBLIC, pem)
    return Ed25519PrivateKey.from_private_bytes(open_secret(sealed, passphrase))


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read the PEM file of a release key, for those who verify.

    Raises:
        PackageInvalid: Not an Ed25519 public key.
        FileUnusable, AccessDenied, DiskFailed: There is no such file, or it cannot be read.
    """
    with translated(str(path)):
        content = path.read_bytes()
    try:
        key = load_pem_public_key(content)
    except ValueError:
        raise PackageInvalid("the file of the signer's public key holds none") from None
    if not isinstance(key, Ed25519PublicKey):
        raise PackageInvalid("the signer's public key is not Ed25519")
    return key
